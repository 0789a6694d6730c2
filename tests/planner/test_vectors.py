"""Plans of embedders and rerankers: flags, memory, reasons, and which model can serve what."""

import dataclasses
import functools
import tempfile
from pathlib import Path

import pytest

from llamafleet.memory.context import Context
from llamafleet.model.gguf import read_path
from llamafleet.model.shape import Shape
from llamafleet.planner.plan import plan_host
from llamafleet.planner.result import Plan, Refusal
from llamafleet.planner.vectors import needs_whole_inputs
from sandbox import models
from sandbox.embedders import EMBEDDERS, NONE, RERANKERS
from sandbox.layouts import PUBLISHED
from tests.planning import MIB, argument, machine, settings

LAYOUTS = {**PUBLISHED, **EMBEDDERS, **RERANKERS}


@functools.cache
def header(name, **extra):
    layout = LAYOUTS[name]
    with tempfile.TemporaryDirectory() as folder:
        layout = dataclasses.replace(layout, extra={**layout.extra, **extra})
        return read_path(models.weightless(Path(folder), layout))


def planned(name, instance, gpus=(24564,), ram_gib=64, **extra):
    wanted = settings(instance)
    [result] = plan_host(machine(gpus, ram_gib=ram_gib), [(wanted.models[0], header(name, **extra))], wanted)
    return result


def test_an_encoder_computes_an_input_at_once():
    plan = planned("bge-m3", {"serves": "embedding"})
    assert argument(plan.argv, "--pooling") == "cls" and "--embedding" in plan.argv
    sizes = [argument(plan.argv, flag) for flag in ("--ctx-size", "--batch-size", "--ubatch-size")]
    assert sizes == ["8192"] * 3  # what it was trained for
    assert [argument(plan.argv, flag) for flag in ("--cache-ram", "--ctx-checkpoints")] == ["0", "0"]
    assert (plan.prompt_cache_mib, plan.checkpoints, plan.pooling, plan.vector_elements) == (0, 0, "cls", 1024)
    assert sum(row.kv_bytes for row in plan.ledger) == 0
    # 250002 logits and 1024 elements for each token: that is RAM, wherever the model is.
    assert plan.ledger[-1].overhead_bytes >= (250002 + 1024) * 8192 * 4
    assert plan.host_bytes >= plan.ledger[-1].overhead_bytes


def test_a_decoder_whose_last_token_is_the_vector_reads_in_batches():
    plan = planned("Qwen3-Embedding-0.6B", {"serves": "embedding"})
    assert (plan.context_tokens, argument(plan.argv, "--pooling")) == (32768, "last")
    assert argument(plan.argv, "--batch-size") == argument(plan.argv, "--ubatch-size") == str(plan.ubatch_tokens)
    assert plan.ubatch_tokens < plan.context_tokens
    whole = planned("Qwen3-Embedding-0.6B", {"serves": "embedding", "pooling": "mean", "context_tokens": 4096})
    assert whole.ubatch_tokens == 4096 and argument(whole.argv, "--pooling") == "mean"


@pytest.mark.parametrize(
    ("name", "pooling", "whole"),
    [
        ("bge-m3", "cls", True),
        ("Qwen3-Embedding-0.6B", "last", False),
        ("Qwen3-Embedding-0.6B", "none", True),
        ("Qwen3-Reranker-0.6B", "rank", False),
        ("bge-reranker-v2-m3", "rank", True),
        ("Qwen3-0.6B", "", False),
    ],
)
def test_inputs_are_split_where_a_cache_has_what_was_before(name, pooling, whole):
    assert needs_whole_inputs(Shape.of(header(name)), pooling) is whole


def test_a_reranker():
    plan = planned("bge-reranker-v2-m3", {"serves": "reranking"})
    assert "--rerank" in plan.argv and "--embedding" not in plan.argv and argument(plan.argv, "--pooling") is None


def test_a_ubatch_is_a_multiple_of_the_slots():
    """llama.cpp ends at its start where the mean of 1500 tokens is taken over 1501 (build_inp_mean)."""
    plan = planned("all-MiniLM-L6-v2", {"serves": "embedding", "slots": 3})
    assert (plan.context_tokens, argument(plan.argv, "--ctx-size"), plan.ubatch_tokens) == (512, "1536", 513)
    assert Context(512, 3, "f16", 512).pooled("").ubatch_tokens == 512


def test_nothing_is_written_and_the_reasons_say_so():
    plan = planned("nomic-embed-text-v1.5", {"serves": "embedding", "concurrency": 4})
    speeds = plan.predicted
    assert speeds.decode_tokens_per_s == speeds.decode_high_tokens_per_s == speeds.all_slots_tokens_per_s == 0
    assert speeds.prefill_tokens_per_s > 0 and speeds.workload_seconds > 0 and plan.at_gate is None
    text = "\n".join(plan.why)
    assert "serves embeddings (pooling mean): inputs of up to 2048 tokens, no KV cache" in text
    assert "ubatch 2048: an input is computed at once" in text
    assert "each request is an input of 2048 tokens, 4 requests at once" in text
    assert "no prompt cache" in text and "writes" not in text


def test_long_inputs_take_longer_for_their_attention():
    short = planned("bge-m3", {"serves": "embedding", "prompt_tokens": 512}).predicted.prefill_tokens_per_s
    long = planned("bge-m3", {"serves": "embedding", "prompt_tokens": 8192}).predicted.prefill_tokens_per_s
    assert long < 0.9 * short


def test_a_context_that_does_not_fit_gets_a_smaller_one():
    refusal = planned("bge-m3", {"serves": "embedding"}, gpus=(), ram_gib=8)
    assert isinstance(refusal, Refusal)
    [words] = [one for one in refusal.suggestions if one.startswith("set context_tokens to ")]
    tokens = int(words.split()[3].rstrip(","))
    plan = planned("bge-m3", {"serves": "embedding", "context_tokens": tokens}, gpus=(), ram_gib=8)
    assert isinstance(plan, Plan) and plan.ubatch_tokens == plan.context_tokens == tokens


@pytest.mark.parametrize(
    ("name", "instance", "extra", "reason", "way_out"),
    [
        ("bge-m3", {}, {}, "(bert) makes embeddings, and cannot write text", 'serves = "embedding"'),
        ("bge-reranker-v2-m3", {}, {}, "(bert) makes scores, and cannot write text", 'serves = "reranking"'),
        ("Qwen3-Reranker-0.6B", {}, {}, "is a reranker (its pooling_type is rank)", 'serves = "reranking"'),
        ("bge-reranker-v2-m3", {"serves": "embedding"}, {}, "is a reranker", 'serves = "reranking"'),
        ("Qwen3-0.6B", {"serves": "embedding"}, {}, "it has no pooling_type", "set pooling to"),
        ("Qwen3-Embedding-0.6B", {"serves": "reranking"}, {}, "has no classifier", "converted as a reranker"),
        ("bge-m3", {"serves": "embedding", "ubatch_tokens": 512}, {}, "ubatch_tokens: 512 is less", ""),
    ],
)
def test_a_model_that_cannot_serve_it_is_refused_by_name(name, instance, extra, reason, way_out):
    refusal = planned(name, instance, **extra)
    assert (isinstance(refusal, Refusal) and reason in refusal.reason and name in refusal.reason) or way_out == ""
    assert reason in refusal.reason
    assert way_out in "".join(refusal.suggestions) or not way_out


@pytest.mark.parametrize(
    ("name", "instance"),
    [
        ("Qwen3-0.6B", {"serves": "embedding", "pooling": "last"}),
        ("bge-reranker-v2-m3", {"serves": "embedding", "pooling": "cls"}),
        ("Qwen3-Embedding-0.6B", {}),
        ("Qwen3-Embedding-0.6B", {"serves": "embedding", "ubatch_tokens": 256}),
    ],
)
def test_what_llama_server_can_do_is_planned(name, instance):
    plan = planned(name, instance)
    assert isinstance(plan, Plan)
    assert ("--embedding" in plan.argv) is (instance.get("serves") == "embedding")


def test_a_pooling_of_none_is_said_by_the_file_too():
    plan = planned("bge-m3", {"serves": "embedding"}, pooling_type=NONE)
    assert argument(plan.argv, "--pooling") == "none" and plan.pooling == "none"


def test_a_server_that_writes_is_planned_as_before():
    plan = planned("Qwen3-0.6B", {})
    assert not {"--embedding", "--pooling", "--rerank"} & set(plan.argv)
    assert argument(plan.argv, "--batch-size") == "2048" and argument(plan.argv, "--cache-ram") == "1024"
    assert (plan.pooling, plan.vector_elements) == ("", 0) and plan.ledger[-1].overhead_bytes < 2100 * MIB
