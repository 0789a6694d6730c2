"""The ledger's bytes against llama-server's own words: `common_memory_breakdown_print` at b11434.

The numbers were printed by llama-server with the planned flags, `ggml-rpc-server`s standing in for the
GPUs, in MiB: (weights, context, compute) of each device.
"""

from dataclasses import replace

import pytest

from llamafleet.memory import compute
from llamafleet.memory.checkpoints import checkpoint_bytes
from llamafleet.memory.graph import repeats
from llamafleet.memory.kv_cache import kv_bytes, row_bytes
from llamafleet.memory.ledger import Model, Placement, usage
from llamafleet.memory.weights import repacked_types
from llamafleet.model.shape import Context, is_known, windows
from tests import planning
from tests.planning import MIB

F16_512 = {"kv_type": "f16", "ubatch_tokens": 512}


def layers(header):
    return header.get("block_count")


def everything_on(header, device=0):
    return Placement((device,) * (layers(header) + 1))


def on_gpus(header, counts, spilled=()):
    holders = [device for device, count in enumerate(counts) for _ in range(count)]
    front = (None,) * (layers(header) + 1 - len(holders))
    return Placement((*front, *holders), frozenset(spilled))


ORACLE = {
    "gpt-oss-120b, 27 layers' experts on the host": (
        "gpt-oss-120b",
        Context(131072, 1, "f16", 512),
        [37],
        range(9, 36),
        [(16168, 4635, 218)],
        (44269, 0, 151),
    ),
    "gpt-oss-120b, two devices": (
        "gpt-oss-120b",
        Context(131072, 1, "f16", 512),
        [12, 25],
        range(15, 36),
        [(19754, 1545, 218), (6121, 3090, 208)],
        (34562, 0, 151),
    ),
    "gpt-oss-120b, three devices in a pipeline": (
        "gpt-oss-120b",
        Context(131072, 1, "f16", 512),
        [12, 12, 13],
        (),
        [(19754, 1545, 674), (19754, 1545, 646), (20341, 1545, 646)],
        (586, 0, 571),
    ),
    "gpt-oss-20b, three slots": (
        "gpt-oss-20b",
        Context(65536, 3, "f16", 512),
        [25],
        (),
        [(10949, 4662, 155)],
        (586, 0, 87),
    ),
    "Llama-3.1-8B": ("Llama-3.1-8B", Context(32768, 1, "f16", 512), [33], (), [(4403, 4096, 148)], (281, 0, 64)),
    "Llama-3.1-8B, four slots, q8_0": (
        "Llama-3.1-8B",
        Context(8192, 4, "q8_0", 512),
        [33],
        (),
        [(4403, 2176, 124)],
        (281, 0, 40),
    ),
    "Llama-3.1-8B, no GPU": ("Llama-3.1-8B", Context(8192, 1, "f16", 512), [], (), [], (4685, 1024, 132)),
    "Llama-3.1-8B, two devices in a pipeline": (
        "Llama-3.1-8B",
        Context(16384, 1, "f16", 512),
        [17, 16],
        (),
        [(2113, 1088, 276), (2290, 960, 236)],
        (281, 0, 144),
    ),
    "Llama-3.3-70B, half on the host": (
        "Llama-3.3-70B",
        Context(8192, 1, "f16", 512),
        [42],
        (),
        [(20919, 1312, 208)],
        (19623, 1248, 256),
    ),
    "Llama-3.3-70B, two devices in a pipeline": (
        "Llama-3.3-70B",
        Context(8192, 1, "f16", 512),
        [41, 40],
        (),
        [(20038, 1312, 456), (19940, 1248, 376)],
        (563, 0, 192),
    ),
    "Llama-3.2-3B, tied embedding": (
        "Llama-3.2-3B",
        Context(16384, 1, "f16", 512),
        [29],
        (),
        [(1918, 1792, 88)],
        (308, 0, 40),
    ),
    "Qwen3-30B-A3B, two devices in a pipeline": (
        "Qwen3-30B-A3B",
        Context(16384, 1, "f16", 512),
        [24, 25],
        (),
        [(8640, 768, 200), (8883, 768, 180)],
        (166, 0, 104),
    ),
    "Qwen3-30B-A3B, ubatch 2048, q8_0": (
        "Qwen3-30B-A3B",
        Context(32768, 1, "q8_0", 2048),
        [49],
        (),
        [(17524, 1632, 464)],
        (166, 0, 192),
    ),
    "Gemma-3-12B, two slots": (
        "Gemma-3-12B",
        Context(32768, 2, "f16", 512),
        [49],
        (),
        [(6956, 5056, 153)],
        (787, 0, 63),
    ),
    "Gemma-3-12B, two devices in a pipeline": (
        "Gemma-3-12B",
        Context(32768, 1, "f16", 512),
        [27, 22],
        (),
        [(3461, 1300, 344), (3494, 1228, 307)],
        (787, 0, 209),
    ),
    "Gemma-3-12B, no GPU, embedding held once": (
        "Gemma-3-12B",
        Context(131072, 1, "f16", 1024),
        [],
        (),
        [],
        (6955, 8832, 515),
    ),
}


@pytest.mark.parametrize("case", ORACLE)
def test_bytes_are_what_llama_server_says(case):
    layout, context, counts, spilled, devices, host = ORACLE[case]
    header = planning.header(layout)
    # RPC devices have neither op-offload nor pinned host memory: the traits of the CPU.
    used, held = usage(Model.of(header), context, on_gpus(header, counts, spilled), "cpu")
    for ours, told in zip(used.values(), devices, strict=True):
        assert (ours.weights_bytes // MIB, ours.kv_bytes // MIB, ours.compute_bytes // MIB) == told
    assert held.weights_bytes / MIB == pytest.approx(host[0], abs=2)  # printed as two figures, both rounded down
    assert (held.kv_bytes // MIB, held.compute_bytes // MIB) == host[1:]


# compute and staging together, by the Vulkan backend on llvmpipe: bench/results/staging.csv
STAGED = [
    ("FFN of the last layer, whose batch is one token by then", 512, [33], (31,), 124),
    ("FFN of 10 layers", 512, [33], range(22, 32), 127),
    ("FFN of 10 layers, in larger batches than weights", 2048, [33], range(22, 32), 496),
    ("8 whole front layers", 2048, [25], (), 528),
    ("all layers but the output", 2048, [1], (), 528),
]


@pytest.mark.parametrize(
    ("ubatch", "counts", "spilled", "told"), [one[1:] for one in STAGED], ids=[s[0] for s in STAGED]
)
def test_op_offload_stages_host_weights_beside_what_is_computed(ubatch, counts, spilled, told):
    header, context = planning.header("Llama-3.1-8B"), Context(8192, 1, "f16", ubatch)
    used, _ = usage(Model.of(header), context, on_gpus(header, counts, spilled), "vulkan")
    assert (used[0].compute_bytes + used[0].staging_bytes) // MIB in (told - 1, told)


def test_staging_is_flat_after_the_first_layer_and_only_where_the_backend_has_it():
    header, context = planning.header("gpt-oss-120b"), Context(8192, 1, "f16", 512)
    expert = 2880 * 2880 * 128 * 17 // 32  # MXFP4

    def staged(backend, spilled):
        used, _ = usage(Model.of(header), context, on_gpus(header, [37], spilled), backend)
        return used[0].staging_bytes

    assert 0.9 * expert < staged("cuda", (20,)) <= staged("cuda", range(36)) < 1.1 * expert
    assert staged("cuda", ()) == staged("cpu", (20,)) == 0


def test_a_cache_that_is_not_f16_is_unpacked_on_cuda():
    header, context = planning.header("Llama-3.1-8B"), Context(131072, 1, "q8_0", 512)
    [cuda], [vulkan] = (
        usage(Model.of(header), context, everything_on(header), b)[0].values() for b in ("cuda", "vulkan")
    )
    scratch = 2 * 8 * 128 * 131072 * 2  # K and V of one layer as f16
    assert 0.8 * scratch < cuda.compute_bytes - vulkan.compute_bytes <= scratch


def test_overhead_is_the_backend_s_and_the_logits_buffer():
    header, context = planning.header("Llama-3.2-3B"), Context(8192, 3, "f16", 512)
    used, host = usage(Model.of(header), context, everything_on(header), "cuda", host_extra_bytes=100)
    assert used[0].overhead_bytes == 512 * MIB
    assert host.overhead_bytes == 1024 * MIB + 100 + 3 * 128256 * 4


def test_everything_on_one_device_is_not_taken_for_everything_on_the_host():
    # Device 0 of one and the host of none have the same number for the scheduler.
    header, context = planning.header("Llama-3.1-8B"), Context(8192, 1, "f16", 512)
    model = Model.of(header)
    used, with_device = usage(model, context, everything_on(header), "cpu")
    _, alone = usage(model, context, Placement((None,) * (layers(header) + 1)), "cpu")
    assert (used[0].compute_bytes // MIB, with_device.compute_bytes // MIB, alone.compute_bytes // MIB) == (
        124,
        40,
        132,
    )


# Groups of repeated layers, each laid out twice, got Qwen3.5-9B and -235B wrong, by 4 and 96 MiB; rows of three neighbours
# Qwen3.6-35B-A3B, by 64 MiB.
@pytest.mark.parametrize("name, counts, spilled", [
    ("Gemma-3-12B", [17, 18, 10], range(30, 48)),
    ("Llama-3.3-70B", [55], range(3, 30)),
    ("Qwen3-Next-80B-A3B", [48], range(14, 48)),
    ("Qwen3.5-9B", [25], range(9, 20)),
    ("Qwen3-235B-A22B", [43, 23, 14, 15], [*range(11, 43), *range(57, 66)]),
    ("Qwen3.6-35B-A3B", [10, 10, 10, 11], range(40)),
    ("Llama-3.3-70B", [10, 10, 10, 10, 10, 10, 10, 11], ()),
    ("gpt-oss-120b", [6, 6, 6, 6, 6, 7], [4, 5, 10, 11, 16, 17, 22, 23, 28, 29]),
])  # fmt: skip
def test_layers_that_repeat_need_not_be_laid_out_again(monkeypatch, name, counts, spilled):
    header, context = planning.header(name), Context(32768, 1, "f16", 2048)
    placement = on_gpus(header, counts, spilled)
    for backend in ("cuda", "cpu"):
        monkeypatch.setattr(compute, "_KNOWN", {})
        few = usage(Model.of(header), context, placement, backend)
        with monkeypatch.context() as patch:
            patch.setattr(compute, "_KNOWN", {})
            patch.setattr(compute, "NEIGHBOURS", (1000, 1000))
            patch.setattr(repeats, "ALIKE", 1000)
            assert usage(Model.of(header), context, placement, backend) == few


@pytest.mark.parametrize("signs, kept", [
    ("aaaaaaa", 3), ("abababab", 4), ("aaabbbaaabbb", 12), ("abcdefgh", 8), ("aabaabaabaab", 6), ("", 0), ("a", 1),
])  # fmt: skip
def test_every_row_of_neighbours_is_kept(signs, kept):
    order = repeats.shorten(signs, "x" * len(signs), (3, 1))
    short = "".join(signs[n] for n in order)
    rows = [signs[n : n + 3] for n in range(len(signs) - 2)]
    assert len(order) == kept
    assert {short[n : n + 3] for n in range(len(short) - 2)} == set(rows)


@pytest.mark.parametrize("shares, numbers", [
    ("aaaaa", (0, 1, 1, 1, 2)), ("abbbbc", (0, 1, 2, 2, 2, 3)), ("abab", (0, 1, 2, 3)), ("aa", (0, 1)), ("a", (0,)), ("", ()),
])  # fmt: skip
def test_devices_alike_are_laid_out_once_but_for_the_first_two_and_the_last(shares, numbers):
    assert repeats.fold(shares) == numbers


@pytest.mark.parametrize("flags, kind, repacked", [
    (("avx2",), "Q4_K", True), (("avx2",), "Q6_K", False), (("avx2",), "Q8_0", False), (("avx2",), "Q2_K", False),
    (("avx2", "avx512f"), "Q2_K", True), (("asimd", "asimddp"), "Q6_K", True), (("asimd", "asimddp"), "Q8_0", True),
    (("sse4_2",), "Q4_K", False),
])  # fmt: skip
def test_what_the_cpu_repacks_depends_on_the_processor(flags, kind, repacked):
    assert (kind in repacked_types(flags)) is repacked


def test_weights_that_are_repacked_are_not_in_pinned_memory():
    header, context = planning.header("Qwen3-30B-A3B"), Context(8192, 1, "f16", 512)
    placement = on_gpus(header, [49], range(48))
    assert usage(Model.of(header), context, placement, "cuda")[1].repacked_bytes == 0
    assert usage(Model.of(header), context, placement, "cpu")[1].repacked_bytes > 10 * 1024 * MIB


def test_a_draft_head_is_not_loaded():
    header = planning.header("GLM-4.5-Air")
    model = Model.of(header)
    assert model.layers == 47
    assert (model.layer_bytes[46], kv_bytes(header, Context(8192, 1, **F16_512))[46]) == (0, 0)


def test_what_computes_in_an_unknown_way_gets_a_bound_and_says_so():
    header = with_metadata("Falcon3-Mamba-7B", "mamba", ssm__time_step_rank=0)
    known, unknown = Model.of(planning.header("Falcon3-Mamba-7B")), Model.of(header)
    unknown = replace(unknown, compute=compute.Compute(without(header, "ssm_x.weight")))
    context = Context(8192, 1, **F16_512)
    assert known.compute.is_exact
    assert not unknown.compute.is_exact
    [ours], [bound] = (usage(one, context, everything_on(header), "cpu")[0].values() for one in (known, unknown))
    assert bound.compute_bytes > ours.compute_bytes


def without(header, part):
    return replace(header, tensors=tuple(t for t in header.tensors if not t.name.endswith(part)))


def test_windows_alternate_as_the_architecture_says():
    assert windows(planning.header("gpt-oss-20b"))[:4] == (128, 0, 128, 0)
    assert windows(planning.header("Gemma-3-12B"))[:6] == (1024,) * 5 + (0,)
    assert set(windows(planning.header("Llama-3.1-8B"))) == {0}


def with_metadata(layout, arch, **changes):
    header = planning.header(layout)
    old = header.architecture
    moved = {k.replace(f"{old}.", f"{arch}.", 1): v for k, v in header.metadata.items()}
    named = {f"{arch}.{key.replace('__', '.')}": value for key, value in changes.items()}
    return replace(header, architecture=arch, metadata={**moved, **named})


def test_an_unknown_window_pattern_is_an_upper_bound_and_says_so():
    header = with_metadata("Llama-3.1-8B", "brand-new", attention__sliding_window=512)
    context = Context(8192, 1, **F16_512)
    assert not is_known(header)
    assert kv_bytes(header, context) == kv_bytes(planning.header("Llama-3.1-8B"), context)
    assert is_known(
        with_metadata(
            "Llama-3.1-8B",
            "brand-new",
            attention__sliding_window=512,
            attention__sliding_window_pattern=(True, False) * 16,
        )
    )


def test_a_pattern_array_decides_layer_by_layer():
    pattern = (True, True, True, False) * 8
    header = with_metadata(
        "Llama-3.1-8B", "step35", attention__sliding_window=512, attention__sliding_window_pattern=pattern
    )
    assert windows(header) == tuple(512 if swa else 0 for swa in pattern)
    cache = kv_bytes(header, Context(8192, 1, **F16_512))
    row = 8 * 128 * 2 * 2  # heads x size x (K and V) x f16
    assert (cache[0], cache[3]) == (1024 * row, 8192 * row)


def test_latent_attention_keeps_k_only():
    # DeepSeek: one head of 576 for K, no V, where both *_mla lengths are given (src/llama-kv-cache.cpp).
    mla = {
        "attention__key_length": 576,
        "attention__value_length": 512,
        "attention__head_count_kv": 1,
        "attention__key_length_mla": 192,
        "attention__value_length_mla": 128,
    }
    context = Context(4096, 1, **F16_512)
    assert kv_bytes(with_metadata("Llama-3.1-8B", "deepseek2", **mla), context)[0] == 4096 * 576 * 2
    del mla["attention__value_length_mla"]
    assert kv_bytes(with_metadata("Llama-3.1-8B", "deepseek2", **mla), context)[0] == 4096 * (576 + 512) * 2


def test_a_cache_of_unknown_rules_is_a_bound_and_says_so():
    mla = {"attention__key_length": 576, "attention__value_length": 512, "attention__head_count_kv": 1,
           "attention__key_length_mla": 192, "attention__value_length_mla": 128}  # fmt: skip
    context = Context(4096, 1, **F16_512)
    header = with_metadata("Llama-3.1-8B", "dots3note", **mla, attention__indexer__key_length=128)
    assert not is_known(header)
    assert kv_bytes(header, context)[0] == 4096 * (576 + 512 + 128) * 2  # K, V and an indexer's keys


def test_hybrid_models_keep_state_instead_of_a_cache_in_most_layers():
    # Qwen3-Next: 3 of 4 layers recurrent; n_embd_r + n_embd_s of src/llama-hparams.cpp, f32, for each slot.
    ssm = {"ssm__inner_size": 4096, "ssm__state_size": 128, "ssm__group_count": 16, "ssm__conv_kernel": 4}
    header = with_metadata("Llama-3.1-8B", "qwen3next", full_attention_interval=4, **ssm)
    cache = kv_bytes(header, Context(8192, 3, **F16_512))
    state = 3 * (4096 + 2 * 16 * 128) + 128 * 4096
    assert cache[:3] == (state * 4 * 3,) * 3
    assert cache[3] == 8192 * 8 * 128 * 2 * 2 * 3


def test_layers_that_share_a_cache_take_none():
    header = with_metadata("Llama-3.1-8B", "gemma4", attention__shared_kv_layers=12)
    assert [bool(size) for size in kv_bytes(header, Context(4096, 1, **F16_512))] == [True] * 20 + [False] * 12


def test_contexts_are_padded_to_256_cells():
    header = planning.header("Llama-3.1-8B")
    assert kv_bytes(header, Context(1000, 1, **F16_512)) == kv_bytes(header, Context(1024, 1, **F16_512))


@pytest.mark.parametrize(("kv_type", "size"), [("f32", 512), ("f16", 256), ("bf16", 256), ("q8_0", 136), ("q5_1", 96),
                                               ("q5_0", 88), ("q4_1", 80), ("q4_0", 72), ("iq4_nl", 72)])  # fmt: skip
def test_rows_of_every_cache_type(kv_type, size):
    assert row_bytes(128, kv_type) == size


def test_a_context_checkpoint_copies_one_window_and_the_state():
    # Every second layer of 24 has a window of 128 tokens; 8 heads of 64, K and V, f16. However large the ubatch.
    window = 12 * 128 * 8 * 64 * 2 * 2
    for ubatch in (512, 4096):
        planned = checkpoint_bytes(planning.header("gpt-oss-20b"), Context(65536, 4, "f16", ubatch))
        assert window < planned < window + 4096
    assert checkpoint_bytes(planning.header("Llama-3.1-8B"), Context(65536, 4, **F16_512)) == 0
    hybrid = planning.header("Qwen3-Next-80B-A3B")
    state = sum(
        size // 2 for layer, size in enumerate(kv_bytes(hybrid, Context(8192, 2, **F16_512))) if (layer + 1) % 4
    )
    assert state < checkpoint_bytes(hybrid, Context(8192, 2, **F16_512)) < state + 4096


def test_a_context_checkpoint_copies_no_more_than_the_context():
    gemma = planning.header("Gemma-3-12B")  # its window has 1024 tokens
    sizes = [checkpoint_bytes(gemma, Context(tokens, 1, **F16_512)) for tokens in (512, 1024, 8192)]
    assert 2 * sizes[0] == pytest.approx(sizes[1], rel=1e-4)
    assert sizes[1] == sizes[2]


def test_where_it_is_unknown_what_a_context_checkpoint_copies_a_bound_is_counted():
    context = Context(8192, 1, **F16_512)
    row = 8 * 128 * 2 * 2  # heads x size x (K and V) x f16
    every_layer = with_metadata("Llama-3.1-8B", "brand-new", attention__sliding_window=512)
    assert checkpoint_bytes(every_layer, context) >= 32 * 512 * row
    everything = with_metadata("Llama-3.1-8B", "dots3note", attention__sliding_window=512)
    assert checkpoint_bytes(everything, context) >= 32 * 8192 * row
    assert checkpoint_bytes(with_metadata("Llama-3.1-8B", "deepseek32"), context) == 0  # none are made


def test_a_checkpoint_of_compressed_cells_copies_the_window_and_what_is_not_compressed_yet():
    keys = {"attention__sliding_window": 128, "attention__compress_ratios": (4, 128) * 16,
            "attention__key_length": 512, "attention__indexer__key_length": 128}  # fmt: skip
    header = with_metadata("Llama-3.1-8B", "deepseek4", **keys)
    # In f32: keys and scores, of 8 tokens two halves of a cell and of an indexer's, or of 128 tokens one.
    copied = 32 * 128 * 512 * 2 + 16 * 4 * 2 * (8 * 2 * (512 + 128) + 128 * 512)
    for tokens in (8192, 131072):
        assert copied < checkpoint_bytes(header, Context(tokens, 1, **F16_512)) < copied + 8192
