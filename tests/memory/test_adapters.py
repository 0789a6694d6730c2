"""LoRA adapters: beside which models they fit, where their bytes go, and what a plan says of them."""

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from llamafleet.memory.adapters import adapters_of, merged, unfit
from llamafleet.memory.weights import Model
from llamafleet.model.gguf import Header, read_path
from llamafleet.planner.plan import plan_host
from llamafleet.planner.reconcile import MemoryReport, compare, memory_limits
from llamafleet.planner.result import Plan, Refusal
from sandbox import adapters
from sandbox.layouts import PUBLISHED
from tests import planning

LLAMA, OLMOE = PUBLISHED["Llama-3.1-8B"], PUBLISHED["OLMoE-1B-7B"]


def lora(layout="Llama-3.1-8B", **asked) -> Header:
    with tempfile.TemporaryDirectory() as folder:
        return read_path(adapters.lora(Path(folder), layout, **asked))


def without(header: Header, end: str) -> Header:
    return replace(header, tensors=tuple(one for one in header.tensors if not one.name.endswith(end)))


@pytest.mark.parametrize(
    ("adapter", "why"),
    [
        (lora(), ""),
        (lora(matrices="output.weight|token_embd.weight"), ""),
        (planning.header("Llama-3.1-8B"), "it is no adapter: its general.type is ''"),
        (lora(adapter__type="control"), "llama.cpp loads adapters of type lora alone, this is 'control'"),
        (lora("Qwen3-8B"), "it was made for the architecture qwen3, and Llama-3.1-8B is llama"),
        (lora(replace(LLAMA, blocks=33)), "it changes blk.32.attn_q.weight, which Llama-3.1-8B does not have"),
        (
            lora(replace(LLAMA, embd=8192)),
            "its tensor blk.0.attn_q.weight is for [8192, 4096], and it is [4096, 4096] in",
        ),
        (
            lora(replace(LLAMA, vocab=1024), matrices="token_embd.weight"),
            "its tensor token_embd.weight is for [4096, 1024]",
        ),
        (without(lora(), "v.weight.lora_b"), "its tensor blk.0.attn_v.weight lacks lora_b"),
        (without(lora(), ""), "it changes no tensor"),
    ],
)
def test_an_adapter_of_another_model_is_refused_by_what_does_not_fit(adapter, why):
    found = unfit(planning.header("Llama-3.1-8B"), adapter)
    assert found.startswith(why) and bool(found) == bool(why)


def test_tensors_that_llama_cpp_does_not_load_do_not_count():
    """Norms are left out of an adapter; of a model the draft head is not loaded."""
    norm = replace(lora().tensors[0], name="blk.0.attn_norm.weight")
    assert unfit(planning.header("Llama-3.1-8B"), replace(lora(), tensors=(*lora().tensors, norm))) == ""
    other = replace(norm, name="blk.0.attn_q.bias")
    assert "is none of a LoRA" in unfit(
        planning.header("Llama-3.1-8B"), replace(lora(), tensors=(*lora().tensors, other))
    )


def test_experts_of_another_number_do_not_fit():
    assert unfit(planning.header("OLMoE-1B-7B"), lora("OLMoE-1B-7B")) == ""
    assert "is for [2048, 1024, 32], and it is [2048, 1024, 64]" in unfit(
        planning.header("OLMoE-1B-7B"), lora(replace(OLMOE, experts=32), matrices=r"blk\.0\.ffn_up_exps\.weight")
    )


def test_each_tensor_of_an_adapter_is_where_the_one_is_that_it_changes():
    base = planning.header("OLMoE-1B-7B")
    model, both = Model.of(base), Model.of(merged(base, {1: lora("OLMoE-1B-7B"), 2: lora("OLMoE-1B-7B", rank=16)}))
    rank = 8 + 16
    experts = 64 * rank * 3 * (2048 + 1024) * 2  # F16, three matrices of 64 experts
    attention = rank * 4 * (2048 + 2048) * 2
    assert {more - less for more, less in zip(both.spill_bytes, model.spill_bytes, strict=True)} == {experts}
    assert {more - less for more, less in zip(both.layer_bytes, model.layer_bytes, strict=True)} == {
        experts + attention
    }
    assert both.layer_repackable == model.layer_repackable  # llama.cpp does not repack adapters
    assert adapters_of({"adapter-2": base, "draft": base, "adapter-1": base}) == {1: base, 2: base}


def plans(*headers, gpus=(24564,), **asked):
    settings = planning.settings(
        {
            "name": "m",
            "adapters": [{"source": f"/lora-{n}.gguf"} for n in range(len(headers))],
            "context_tokens": 8192,
            **asked,
        }
    )
    companions = {"m": {f"adapter-{number}": header for number, header in enumerate(headers, 1)}}
    request = [(settings.models[0], planning.header("Llama-3.1-8B"))]
    return plan_host(planning.machine(gpus), request, settings, companions=companions)[0]


def test_a_plan_has_the_bytes_beside_the_model():
    alone, planned = plans(), plans(lora(), lora(rank=64))
    assert isinstance(alone, Plan) and isinstance(planned, Plan)
    files = sum(tensor.bytes for header in (lora(), lora(rank=64)) for tensor in header.tensors)
    assert planned.ledger[0].beside_bytes == pytest.approx(files, abs=2**20)
    for name in ("weights_bytes", "kv_bytes", "compute_bytes", "staging_bytes"):
        assert getattr(planned.ledger[0], name) == getattr(alone.ledger[0], name)
    assert planned.ledger[0].free_bytes == alone.ledger[0].free_bytes - planned.ledger[0].beside_bytes
    assert planned.predicted.decode_tokens_per_s < alone.predicted.decode_tokens_per_s  # they are read too
    assert "beside_bytes" in planned.ledger[0].to_json() and "beside_bytes" not in alone.ledger[0].to_json()


def test_what_llama_server_reports_before_it_loads_has_no_adapters():
    """It makes its model and context without memory before it reads an adapter (common/fit.cpp)."""
    planned = plans(lora(rank=64))
    row = planned.ledger[0]
    told = {"CUDA0": row.weights_bytes + row.kv_bytes + row.compute_bytes, "Host": 0}
    assert compare(planned, MemoryReport(told)).differences["GPU0"] == 0
    assert memory_limits(planned)["limits"]["GPU0"] == told["CUDA0"] + row.staging_bytes + row.free_bytes


def test_where_model_and_adapters_do_not_fit_a_gpu_together_layers_go_to_the_host():
    tight = (6400,)
    alone, planned = plans(gpus=tight), plans(lora(rank=256), gpus=tight)
    assert isinstance(alone, Plan) and isinstance(planned, Plan)
    assert len(planned.placement.moved) + planned.placement.layer_devices.count(None) > 0
    assert all(row.free_bytes >= 0 for row in planned.ledger)


def test_an_adapter_that_does_not_fit_refuses_the_plan_with_its_place():
    refused = plans(lora(), lora("Qwen3-8B"))
    assert isinstance(refused, Refusal)
    assert refused.reason == ("m: adapters[1]: lora: it was made for the architecture qwen3, and Llama-3.1-8B is llama")


def test_matrices_that_are_divided_over_gpus_take_no_adapters():
    refused = plans(lora(), gpus=(24564, 24564), split_mode="tensor")
    assert isinstance(refused, Refusal) and "set it to layer" in refused.reason
