"""For which heads and cache types a backend has a flash-attention kernel."""

from dataclasses import replace

import pytest

from llamafleet.memory import flash_attention
from llamafleet.model.shape import Shape
from tests import planning


def shape_of(key, value, heads, kv_heads):
    known = Shape.of(planning.header("Llama-3.1-8B"))
    layers = known.layers
    sizes = {"head": (key, value), "window_head": (key, value)}
    return replace(known, **sizes, heads=(heads,) * layers, kv_heads=(kv_heads,) * layers)


@pytest.mark.parametrize(
    ("key", "value", "heads", "kv_heads", "cuda", "vulkan", "sycl"),
    [
        (40, 40, 8, 8, True, True, True),
        (64, 64, 64, 8, True, True, True),
        (72, 72, 16, 16, True, True, True),
        (80, 80, 32, 32, True, True, True),
        (96, 96, 32, 8, True, True, True),
        (112, 112, 64, 8, True, True, True),
        (128, 128, 32, 8, True, True, True),
        (256, 256, 16, 2, True, True, True),
        (100, 100, 32, 8, False, False, False),
        (120, 120, 32, 8, False, True, False),
        (160, 160, 40, 8, False, True, False),
        (96, 64, 40, 40, False, True, False),  # MiniCPM3
        (192, 128, 128, 128, False, True, False),  # DeepSeek before MLA
        (192, 128, 16, 4, False, True, False),  # four heads share one of K
        (192, 128, 64, 8, True, True, False),
        (192, 128, 64, 4, True, True, False),
        (192, 192, 64, 8, False, True, False),
        (320, 256, 32, 1, True, True, False),
        (320, 256, 16, 1, False, True, False),
        (512, 512, 8, 2, True, True, True),
        (512, 512, 8, 8, False, True, True),
        (576, 512, 128, 1, True, True, True),
        (576, 512, 1, 1, False, True, False),
        (128, 64, 32, 8, False, True, False),
    ],
)
def test_heads(key, value, heads, kv_heads, cuda, vulkan, sycl):
    """The list in ggml/src/ggml-cuda/fattn.cu: without a kernel, attention would run on the CPU."""
    shape = shape_of(key, value, heads, kv_heads)
    used = {backend: flash_attention.is_used(shape, backend) for backend in ("cuda", "hip", "vulkan", "sycl", "cpu")}
    assert used == {"cuda": cuda, "hip": cuda, "vulkan": vulkan, "sycl": sycl, "cpu": True}
    head = (key, value, heads // kv_heads)
    assert flash_attention.lacking(shape, "cuda") == (None if cuda else head)


def test_layers_that_compute_no_attention_do_not_count():
    known = Shape.of(planning.header("Qwen3.5-4B"))
    heads = tuple(0 if recurrent else count for recurrent, count in zip(known.state.layers, known.heads, strict=True))
    assert any(known.state.layers) and flash_attention.is_used(known, "cuda")
    assert flash_attention.is_used(replace(known, heads=heads), "cuda")
    assert not flash_attention.is_used(replace(known, head=(100, 100)), "cuda")


@pytest.mark.parametrize(
    ("backend", "taken"),
    [
        ("cuda", {"f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"}),
        ("vulkan", {"f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"}),
        ("sycl", {"f32", "f16", "bf16", "q8_0", "q4_0"}),
        ("cpu", {"f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"}),
    ],
)
def test_types_of_the_cache(backend, taken):
    every = flash_attention.TYPES["vulkan"]
    shape = shape_of(128, 128, 32, 8)
    assert {kind for kind in every if flash_attention.takes_cache_on(shape, kind, backend)} == taken
    without_kernel = shape_of(160, 160, 40, 8)  # a quantised V needs flash attention
    if backend in ("cuda", "sycl"):
        taken = {"f32", "f16", "bf16"}
    assert {kind for kind in every if flash_attention.takes_cache_on(without_kernel, kind, backend)} == taken


@pytest.mark.parametrize(
    ("kv_type", "cuda", "vulkan", "sycl", "cpu"),
    [
        ("q8_0/f16", True, True, False, True),
        ("f16/q5_1", True, True, False, True),
        ("bf16/q8_0", True, False, False, True),
        ("f32/f16", True, True, False, True),
        ("f16/iq4_nl", False, True, False, True),
        ("bf16", True, True, True, True),
    ],
)
def test_types_of_k_and_v_apart(kv_type, cuda, vulkan, sycl, cpu):
    shape = shape_of(128, 128, 32, 8)
    taken = [flash_attention.takes_cache_on(shape, kv_type, backend) for backend in ("cuda", "vulkan", "sycl", "cpu")]
    assert taken == [cuda, vulkan, sycl, cpu]


def test_a_quantised_k_needs_no_flash_attention_and_a_quantised_v_does():
    shape = shape_of(160, 160, 40, 8)  # ggml-cuda has no kernel for it
    taken = [kind for kind in ("q8_0/f16", "q8_0/bf16", "f16/q8_0", "q8_0")
             if flash_attention.takes_cache_on(shape, kind, "cuda")]  # fmt: skip
    assert taken == ["q8_0/f16", "q8_0/bf16"]
    assert not flash_attention.takes_cache_on(shape_of(100, 128, 40, 8), "q8_0/f16", "cpu")  # 32 do not divide 100
    assert flash_attention.takes_cache_on(shape_of(100, 128, 40, 8), "f16/q8_0", "cpu")


def test_mla_has_one_type():
    shape = Shape.of(planning.header("DeepSeek-R1"))
    assert not flash_attention.takes_cache_on(shape, "q8_0/f16", "cpu")
    assert flash_attention.takes_cache_on(shape, "q8_0", "cpu")
