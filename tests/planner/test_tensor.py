"""Plans in which every GPU computes a part of every layer."""

import dataclasses

import pytest

from llamafleet.memory.context import Context
from llamafleet.memory.tensor_split import LOADED, UNSUPPORTED, share, split
from llamafleet.memory.weights import X86_TYPES, Model
from llamafleet.model.architectures import ARCHITECTURES
from llamafleet.planner.result import Plan, Refusal
from tests import planning
from tests.planning import argument

TWO = [24564, 24564]


def planned(layout="Llama-3.1-8B", cards=TWO, **instance):
    host = planning.machine(cards)
    changes = {"backend": instance.pop("backend")} if "backend" in instance else {}
    settings = planning.settings({"context_tokens": 8192, "split_mode": "tensor", **instance}, **changes)
    [answer] = planning.plans(host, [(layout,)], settings)
    return answer


def test_all_gpus_have_equal_parts():
    plan = planned()
    assert isinstance(plan, Plan), plan
    assert argument(plan.argv, "--split-mode") == "tensor" and "--tensor-split" not in plan.argv
    assert (argument(plan.argv, "--device"), argument(plan.argv, "--n-gpu-layers")) == ("CUDA0,CUDA1", "33")
    first, second, _ = plan.ledger
    assert dataclasses.replace(first, device="") == dataclasses.replace(second, device="")
    whole = planned(split_mode="layer", cards=[24564]).ledger[0]
    assert whole.weights_bytes // 2 <= first.weights_bytes < whole.weights_bytes * 0.55
    assert first.kv_bytes == whole.kv_bytes // 2  # eight heads of K, four on each
    assert "upper bounds" in "\n".join(plan.why) and "experimental" in "\n".join(plan.why)
    assert plan.at_gate is None  # its gate's speed tells nothing of a GPU's rates


def test_three_gpus_cut_between_groups_of_heads():
    """Eight heads of K on three GPUs: 2, 3 and 3, or the other way round from layer to layer."""
    model, context = Model.of(planning.header("Llama-3.1-8B")), Context(8192, 1, "f16", 512)
    two, three = (split(model, context, count, "cuda", 0, X86_TYPES)[0] for count in (2, 3))
    assert three.kv_bytes == two.kv_bytes * 2 * 3 // 8 and three.weights_bytes < two.weights_bytes


@pytest.mark.parametrize(
    ("elements", "granularity", "count", "expected"),
    [(4096, 512, 2, 0.5), (4096, 512, 3, 0.375), (512, 512, 2, 1.0), (0, 1, 2, 1.0), (11008, 128, 2, 0.5)],
)
def test_shares(elements, granularity, count, expected):
    assert share(elements, granularity, count) == expected


@pytest.mark.parametrize(
    ("layout", "more", "why"),
    [
        ("DeepSeek-R1", {}, "llama.cpp does not split the tensors of 'deepseek2'"),
        ("Llama-3.1-8B", {"kv_types": ["q8_0"]}, "it takes no quantised KV cache, and kv_types is q8_0"),
        ("Llama-3.1-8B", {"kv_types": ["f16/q8_0"]}, "it takes no quantised KV cache"),
        ("Llama-3.1-8B", {"gpus": ["0"]}, "it needs two GPUs with memory of their own"),
        ("Llama-3.1-8B", {"backend": "cpu"}, "it needs two GPUs with memory of their own"),
        ("Llama-3.1-8B", {"serves": "embedding", "pooling": "last"}, "it is planned for chat alone"),
    ],
)
def test_what_llama_cpp_cannot_split_is_refused_with_the_reason(layout, more, why):
    refusal = planned(layout, **more)
    assert isinstance(refusal, Refusal) and refusal.reason.startswith(f'm0: split_mode "tensor": {why}')
    assert refusal.suggestions == ('set split_mode to "layer" or "auto"',)


def test_a_quantised_type_is_passed_over():
    assert planned(kv_types=["q8_0", "f16"]).kv_type == "f16"


def test_a_model_that_does_not_fit_is_refused_by_the_smallest_gpu():
    refusal = planned("Llama-3.3-70B", cards=[24564, 12288])
    assert isinstance(refusal, Refusal) and refusal.device == "GPU1"
    assert "of GPU1 needed" in refusal.reason and refusal.needed_bytes > refusal.available_bytes


def test_auto_takes_it_where_it_is_clearly_faster_and_layers_where_one_card_does():
    large, small = planned("Qwen3-32B", split_mode="auto"), planned("Qwen3-0.6B", split_mode="auto")
    assert argument(large.argv, "--split-mode") == "tensor"
    assert argument(small.argv, "--split-mode") is None and small.gpus == small.gpus[:1]
    layers = planned("Qwen3-32B", split_mode="layer")
    assert large.chosen_for.workload_seconds * 1.1 < layers.chosen_for.workload_seconds
    assert "with whole layers on each" in "\n".join(large.why)


@pytest.mark.parametrize(
    ("layout", "more"),
    [("DeepSeek-R1", {}), ("Qwen3-32B", {"kv_types": ["q8_0"]}), ("Qwen3-32B", {"gpus": ["1"]}),
     ("Llama-3.3-70B", {"cards": [16376, 16376]})],
)  # fmt: skip
def test_auto_is_by_layers_where_it_cannot_be_or_does_not_fit(layout, more):
    auto, layers = planned(layout, split_mode="auto", **more), planned(layout, split_mode="layer", **more)
    assert (auto.argv if isinstance(auto, Plan) else auto) == (layers.argv if isinstance(layers, Plan) else layers)


def test_layers_are_the_default():
    assert planning.settings({}).models[0].split_mode == "layer"


def test_the_lists_name_architectures_that_are_known():
    """Those of llama.cpp's own list that we do not know are refused before."""
    assert set(LOADED) <= set(ARCHITECTURES) and not set(LOADED) & UNSUPPORTED
    assert {"llama", "qwen3", "deepseek2", "mamba"} <= set(ARCHITECTURES)
