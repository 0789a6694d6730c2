"""The ledger: one situation a case file in tests/ledger, and what must hold in any situation.

`devices_mib` and `host_mib` are what llama-server printed with the planned flags (`common_memory_breakdown_print`
at b11434). `ggml-rpc-server`s stood in for the GPUs; these have neither op-offload nor pinned host memory, so the
ledger is asked with the traits of the CPU unless a case names a backend. `layers` says how many layers, the output
counted as one, are on each device, the others on the host; `offloaded` gives the first and last of the layers on a
device whose experts or FFN are on the host.
"""

from dataclasses import replace
from functools import cached_property
from itertools import cycle, islice
from pathlib import Path

import pytest
import yaml

from llamafleet.memory import checkpoints, compute, kv_cache
from llamafleet.memory.context import Context
from llamafleet.memory.graph import repeats
from llamafleet.memory.kv_cache import row_bytes
from llamafleet.memory.ledger import usage
from llamafleet.memory.placement import Placement
from llamafleet.memory.weights import Model, repacked_types
from llamafleet.model.shape import Shape
from tests import planning
from tests.planning import MIB

F16_512 = {"kv_type": "f16", "ubatch_tokens": 512}


def kv_bytes(header, context):
    return kv_cache.kv_bytes(Shape.of(header), context)


def checkpoint_bytes(header, context):
    return checkpoints.checkpoint_bytes(Shape.of(header), context)


def windows(header):
    return Shape.of(header).windows


def is_known(header):
    return Shape.of(header).cache_is_exact


def layers(header):
    return header.get("block_count")


def everything_on(header, device=0):
    return Placement.of((device,) * (layers(header) + 1))


def on_gpus(header, counts, spilled=()):
    holders = [device for device, count in enumerate(counts) for _ in range(count)]
    front = (None,) * (layers(header) + 1 - len(holders))
    return Placement.of((*front, *holders), frozenset(spilled))


CASES = sorted((Path(__file__).parents[1] / "ledger").glob("*.yaml"))


class Case:
    """One case file: a model's header, changed or not, its context, and where its layers are."""

    def __init__(self, data):
        self.header = planning.header(data["model"])
        if "architecture" in data:
            self.header = with_metadata(data["model"], data["architecture"], data.get("metadata", {}))
        self.context = Context(**data["context"]) if "context" in data else None
        self.backend = data.get("backend", "cpu")
        first, last = data.get("offloaded", (0, -1))
        self.placement = on_gpus(self.header, data.get("layers", []), range(first, last + 1))

    @cached_property
    def model(self):
        return Model.of(self.header)

    @cached_property
    def usage(self):
        """Of each device in order, and of the host."""
        used, host = usage(self.model, self.context, self.placement, self.backend)
        return list(used.values()), host


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_situation(path):
    data = yaml.safe_load(path.read_text())
    case = Case(data)
    assert data["expect"], "a case that expects nothing"
    for key, value in data["expect"].items():
        CHECKS[key](case, value)


def devices_mib(case, expected):
    used = [
        {"weights": row.weights_bytes // MIB, "kv": row.kv_bytes // MIB, "compute": row.compute_bytes // MIB}
        for row in case.usage[0]
    ]
    assert used == expected


def host_mib(case, expected):
    host = case.usage[1]
    # llama-server prints the host's weights as two figures, both rounded down.
    assert host.weights_bytes / MIB == pytest.approx(expected["weights"], abs=2)
    assert (host.kv_bytes // MIB, host.compute_bytes // MIB) == (expected["kv"], expected["compute"])


def compute_and_staging_mib(case, expected):
    [used] = case.usage[0]
    assert (used.compute_bytes + used.staging_bytes) // MIB in (expected - 1, expected)


def windows_repeat(case, pattern):
    assert windows(case.header) == repeated(pattern, case.header)


def cache_bytes(case, expected):
    by_layer = kv_bytes(case.header, case.context)
    wanted = dict.fromkeys(range(layers(case.header)), expected["all"]) if "all" in expected else expected
    assert {layer: by_layer[layer] for layer in wanted} == wanted


def layers_with_cache(case, expected):
    first, last = expected
    by_layer = kv_bytes(case.header, case.context)
    assert [layer for layer, size in enumerate(by_layer) if size] == list(range(first, last + 1))
    assert len(by_layer) == layers(case.header)


def weights_bytes(case, expected):
    assert {layer: case.model.layer_bytes[layer] for layer in expected} == expected


CHECKS = {
    "devices_mib": devices_mib, "host_mib": host_mib, "compute_and_staging_mib": compute_and_staging_mib,
    "windows": windows_repeat, "kv_bytes": cache_bytes, "layers_with_cache": layers_with_cache,
    "weights_bytes": weights_bytes,
    "is_known": lambda case, expected: is_known(case.header) is expected or pytest.fail(f"not {expected}"),
    "loaded_layers": lambda case, expected: case.model.layers == expected or pytest.fail(str(case.model.layers)),
}  # fmt: skip


def with_metadata(layout, arch, changes):
    """A published model's header under another architecture's name, with more metadata of that architecture."""
    header = planning.header(layout)
    old = header.architecture
    moved = {k.replace(f"{old}.", f"{arch}.", 1): v for k, v in header.metadata.items()}
    named = {
        f"{arch}.{key}": repeated(value["repeat"], header) if isinstance(value, dict) else value
        for key, value in changes.items()
    }
    return replace(header, architecture=arch, metadata={**moved, **named})


def repeated(pattern, header):
    """A pattern of layers, over all layers."""
    return tuple(islice(cycle(pattern), layers(header)))


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
    _, alone = usage(model, context, Placement.of((None,) * (layers(header) + 1)), "cpu")
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


def test_what_computes_in_an_unknown_way_gets_a_bound_and_says_so():
    header = with_metadata("Falcon3-Mamba-7B", "mamba", {"ssm.time_step_rank": 0})
    known, unknown = Model.of(planning.header("Falcon3-Mamba-7B")), Model.of(header)
    unknown = replace(unknown, compute=compute.Compute(without(header, "ssm_x.weight")))
    context = Context(8192, 1, **F16_512)
    assert known.compute.is_exact
    assert not unknown.compute.is_exact
    [ours], [bound] = (usage(one, context, everything_on(header), "cpu")[0].values() for one in (known, unknown))
    assert bound.compute_bytes > ours.compute_bytes


def without(header, part):
    return replace(header, tensors=tuple(t for t in header.tensors if not t.name.endswith(part)))


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
    every_layer = with_metadata("Llama-3.1-8B", "brand-new", {"attention.sliding_window": 512})
    assert checkpoint_bytes(every_layer, context) >= 32 * 512 * row
    everything = with_metadata("Llama-3.1-8B", "dots3note", {"attention.sliding_window": 512})
    assert checkpoint_bytes(everything, context) >= 32 * 8192 * row
    assert checkpoint_bytes(with_metadata("Llama-3.1-8B", "deepseek32", {}), context) == 0  # none are made


def test_a_checkpoint_of_compressed_cells_copies_the_window_and_what_is_not_compressed_yet():
    keys = {"attention.sliding_window": 128, "attention.compress_ratios": (4, 128) * 16,
            "attention.key_length": 512, "attention.indexer.key_length": 128}  # fmt: skip
    header = with_metadata("Llama-3.1-8B", "deepseek4", keys)
    # In f32: keys and scores, of 8 tokens two halves of a cell and of an indexer's, or of 128 tokens one.
    copied = 32 * 128 * 512 * 2 + 16 * 4 * 2 * (8 * 2 * (512 + 128) + 128 * 512)
    for tokens in (8192, 131072):
        assert copied < checkpoint_bytes(header, Context(tokens, 1, **F16_512)) < copied + 8192
