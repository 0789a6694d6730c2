"""Plans of models from public reports, with the values that are right. The headers are in tests/reported."""

import functools
import re
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from llamafleet.host import described
from llamafleet.memory.placement import HOST
from llamafleet.model.gguf import read_path
from llamafleet.planner.plan import plan_host
from llamafleet.planner.reconcile import MemoryReport, compare, memory_limits
from llamafleet.planner.result import Plan, Refusal
from sandbox import outlines
from tests import planning

MIB = 2**20
FOLDER = Path(__file__).parents[1] / "reported"


@functools.cache
def header(name):
    with tempfile.TemporaryDirectory() as folder:
        return read_path(outlines.weightless(FOLDER / f"{name}.yaml", Path(folder)))


def plan(name, words, **instance):
    settings = planning.settings(instance)
    return plan_host(described.read(words).machine, [(settings.models[0], header(name))], settings)[0]


def mib(answer, part, device=0):
    return getattr(answer.ledger[device], f"{part}_bytes") // MIB


def test_heads_without_a_kernel_are_computed_without_flash_attention():
    """h2o-danube3-4b on an RTX 3060: off, and 569 MiB to compute in (98 were planned; llama-server: 569.26)."""
    answer = plan("h2o-danube3-4b", "rtx3060,ram=32GB,cores=8", ubatch_tokens=512)
    assert planning.argument(answer.argv, "--flash-attn") == "off"
    assert mib(answer, "compute") == 569
    assert "no flash attention for heads of 120 elements" in "\n".join(answer.why)


@pytest.mark.parametrize("words", ["cpu,ram=32GB,cores=8", "rx7900xtx,ram=32GB,cores=8", "arc b580,ram=32GB,cores=8"])
def test_each_backend_has_kernels_of_its_own(words):
    """The CPU and Vulkan have a kernel for 120 elements; HIP is compiled from ggml-cuda, and has none."""
    answer = plan("h2o-danube3-4b", words)
    on = answer.backend != "hip"
    assert planning.argument(answer.argv, "--flash-attn") == ("on" if on else "off")
    assert ("flash attention is off" in "\n".join(answer.why)) is not on


def test_without_a_gpu_in_use_flash_attention_is_on():
    answer = plan("h2o-danube3-4b", "gt1030,vram=1700MB,ram=32GB,cores=8")
    assert planning.argument(answer.argv, "--device") == "none"
    assert planning.argument(answer.argv, "--flash-attn") == "on"


@pytest.mark.parametrize(("types", "reason"), [(["q8_0"], "heads of 120 elements"), (["iq4_nl"], "heads of 120")])
def test_a_quantised_cache_needs_a_kernel(types, reason):
    answer = plan("h2o-danube3-4b", "rtx3060,ram=32GB,cores=8", kv_types=types)
    assert isinstance(answer, Refusal) and f"has no KV cache of {types[0]}" in answer.reason
    assert "allow kv_types f16" in answer.suggestions[0] and reason in answer.suggestions[0]
    assert plan("h2o-danube3-4b", "rtx3060,ram=32GB,cores=8", kv_types=[*types, "f16"]).kv_type == "f16"


def test_a_type_without_kernels_is_refused_on_the_gpu_alone():
    settings = planning.settings({"kv_types": ["iq4_nl"]})
    [refused] = planning.plans(planning.machine([24564]), [("Llama-3.1-8B",)], settings)
    assert "cuda backend has no flash attention for a cache of iq4_nl" in refused.suggestions[0]
    [planned] = planning.plans(planning.machine([]), [("Llama-3.1-8B",)], settings)
    assert planned.kv_type == "iq4_nl"


MAPPED = 10752 * 262144 * 2 // MIB  # per_layer_token_embd in F16


def test_a_tensor_that_is_mapped_is_no_ram():
    """Tanguille/cluster#4764: Gemma 4 E4B was refused on boxes that serve it: 5376 MiB are page cache."""
    assert MAPPED == 5376
    answer = plan("gemma4-e4b", "rtx3060,ram=6GB,cores=8", context_tokens=8192)
    assert isinstance(answer, Plan)
    assert mib(answer, "weights", -1) == 1280  # the token embedding alone
    assert answer.host_bytes == answer.ledger[-1].used_bytes + 5376 * MIB  # MemoryMax leaves room for its pages
    assert re.search(r"per_layer_token_embd.weight \(5376 MiB\) .* is page cache, not RAM", "\n".join(answer.why))


def test_an_integrated_gpu_maps_nothing():
    answer = plan("gemma4-e4b", "780m,ram=64GB,cores=8", context_tokens=8192)
    assert sum(row.weights_bytes for row in answer.ledger) // MIB == 9017 + 1280 + 5376
    assert answer.mapped_bytes == 0 and "page cache" not in "\n".join(answer.why)


def test_what_llama_server_reports_of_it_while_it_only_measures():
    """It counts what will be mapped: 6656 MiB on the host at b11434 (9017 on the device)."""
    answer = plan("gemma4-e4b", "rtx3090,ram=16GB,cores=8", context_tokens=8192, ubatch_tokens=512)
    device = answer.ledger[0].weights_bytes + answer.ledger[0].kv_bytes + answer.ledger[0].compute_bytes
    host = (6656 + 56) * MIB
    verified = compare(answer, MemoryReport({"CUDA0": device, "CUDA_Host": host}))
    assert verified.beyond(only_more=False) == {}
    row = answer.ledger[-1]
    limit = row.used_bytes - row.overhead_bytes + row.free_bytes + 5376 * MIB
    assert memory_limits(answer)["limits"][HOST] == limit >= host


def test_an_encoder_has_neither_cache_nor_output_matrix():
    """bge-reranker-v2-m3 was planned 488 MiB too high: the embedding is no output matrix."""
    answer = plan("bge-reranker-v2-m3", "rtx3060,ram=32GB,cores=8", serves="reranking", context_tokens=512)
    assert mib(answer, "weights") == 579  # 1067 with an output matrix
    assert (mib(answer, "weights", -1), mib(answer, "kv"), mib(answer, "kv", -1)) == (520, 0, 0)
    assert (mib(answer, "compute"), mib(answer, "compute", -1)) == (12, 10)  # llama-server: 12.50 and 10.51
    why = "\n".join(answer.why)
    assert "serves scores (pooling rank): inputs of up to 512 tokens, no KV cache" in why and "upper bound" not in why


def test_flash_next_is_exact():
    """nibor1896/Crow#140: a cache of 13924 MiB was planned at 131072 tokens. llama-server at b11434 says 53675, 3915
    (3840 of cells, 75 of state) and 501.19 MiB on the device, 27806 (27465 of them mapped) and 162.37 on the host."""
    answer = plan("qwen3.8-flash-next", "h100,ram=24GB,cores=16", context_tokens=131072, ubatch_tokens=512)
    assert isinstance(answer, Plan)
    assert (mib(answer, "weights"), mib(answer, "kv"), mib(answer, "compute")) == (53675, 3915, 501)
    assert mib(answer, "weights", -1) == 341 and answer.mapped_bytes // MIB == 27465
    assert "upper bound" not in "\n".join(answer.why)


@pytest.mark.parametrize(
    ("kind", "message"),
    [("adapter", "is a LoRA adapter"), ("imatrix", "is an importance matrix"), ("vocab", "is a vocabulary")],
)
def test_files_that_are_no_models_are_named(kind, message):
    known = planning.header("Llama-3.1-8B")
    other = replace(known, metadata={**known.metadata, "general.type": kind})
    settings = planning.settings({})
    [refused] = plan_host(planning.machine([24564]), [(settings.models[0], other)], settings)
    assert message in refused.reason and "main GGUF file" in refused.suggestions[0]
    model = replace(known, metadata={**known.metadata, "general.type": "model"})
    assert plan_host(planning.machine([24564]), [(settings.models[0], model)], settings)[0].fits


@pytest.mark.parametrize("name", ["foo", "llama5", "qwen9"])
def test_an_architecture_that_llama_cpp_does_not_know_is_refused_before_the_download(name):
    """Any architecture's name was planned as exact (`foo`)."""
    settings = planning.settings({})
    other = replace(planning.header("Llama-3.1-8B"), architecture=name)
    [refused] = plan_host(planning.machine([24564]), [(settings.models[0], other)], settings)
    assert isinstance(refused, Refusal) and f"does not know the architecture {name!r}" in refused.reason


def test_what_is_faster_and_not_taken_is_laid_out_too():
    """Llama 3.1 8B with four slots of 32768 on an RTX 3060 said "ubatch 256: 54.6 s (512: 51.1 s)": an estimate
    beside a figure that was laid out. And four slots were asked for a workload of one request at a time."""
    settings = planning.settings({"slots": 4, "context_tokens": 32768, "kv_types": ["f16", "q8_0"]})
    machine = described.read("rtx3060,ram=32GB,cores=8").machine
    [answer] = plan_host(machine, [(settings.models[0], planning.header("Llama-3.1-8B"))], settings)
    [line] = [line for line in answer.why if line.startswith("ubatch")]
    chosen = float(re.search("takes ([0-9.]+) s", line)[1])
    others = re.findall(r"([0-9]+): ([0-9.]+) s( \()?", line.partition("with other ubatches")[2])
    assert len(others) == 3
    assert all(float(seconds) >= chosen or reason for _, seconds, reason in others), line
    assert "slots is 4, and the workload has one request at a time" in "\n".join(answer.why)


def test_layers_without_experts_are_not_counted():
    """ "experts of 83 layers are on the CPU, of 0 of 108 layers on GPUs": only layers with experts count."""
    settings = planning.settings({"context_tokens": 4096})
    known = planning.header("GLM-4.5-Air")  # 46 layers and a draft head; the first layer is dense
    [answer] = plan_host(planning.machine([24564]), [(settings.models[0], known)], settings)
    [line] = [line for line in answer.why if "are on the CPU" in line]
    spilled, kept, total = map(
        int, re.search("experts of ([0-9]+) layers .* of ([0-9]+) of ([0-9]+) layers", line).groups()
    )
    assert (spilled + kept + len(answer.placement.partly), total) == (total, 45)
