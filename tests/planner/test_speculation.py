"""Where drafts go, what they leave for the model, and what a plan says of them."""

from functools import cache
from pathlib import Path

import pytest

from llamafleet.memory.context import Context
from llamafleet.memory.ledger import usage
from llamafleet.memory.placement import Placement
from llamafleet.memory.speculation import NGRAM_BYTES, Speculation
from llamafleet.memory.weights import Model
from llamafleet.model.gguf import read_path
from llamafleet.planner.plan import plan_host
from llamafleet.planner.reconcile import MemoryReport, beside, compare
from llamafleet.service.command import argv
from sandbox import models, outlines
from sandbox.draft_layouts import DRAFTS
from tests import planning
from tests.planning import MIB, argument


@pytest.fixture(scope="module")
def header(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return cache(lambda name: read_path(models.weightless(folder, DRAFTS.get(name, name))))


@pytest.fixture(scope="module")
def planned(header):
    def plan(gpus, target, draft=None, **settings):
        asked = planning.settings({**settings, **({"draft": "/d.gguf"} if draft else {})})
        machine = planning.machine(gpus, ram_gib=128)
        companions = {"m0": {"draft": header(draft)}} if draft else {}
        [found] = plan_host(machine, [(asked.models[0], header(target))], asked, companions=companions)
        return found

    return plan


def rows(plan):
    return {row.device: row for row in plan.ledger}


def test_without_speculation_nothing_changes(planned):
    plan = planned([24564], "Llama-3.1-8B")
    assert not any(word.startswith("--spec") for word in plan.argv)
    assert all("beside_bytes" not in row.to_json() for row in plan.ledger)


def test_a_draft_goes_to_the_gpu_that_has_room(planned):
    plan = planned([24564], "Llama-3.1-8B", "Llama-3.2-1B", speculation="draft")
    assert argument(plan.argv, "--spec-type") == "draft-simple"
    assert argument(plan.argv, "--spec-draft-device") == "CUDA0" and argument(plan.argv, "--spec-draft-ngl") == "17"
    assert (argument(plan.argv, "--spec-draft-n-max"), argument(plan.argv, "--spec-draft-n-min")) == ("3", "0")
    # 807 MiB of weights without the embedding, and 1024 of cache: 16 layers, 8 heads of 64, K and V in f16.
    taken = rows(plan)["GPU0"].beside_bytes
    assert 1024 * MIB + 600 * MIB < taken < 1024 * MIB + 1000 * MIB
    assert all(row.free_bytes >= 0 for row in plan.ledger)


def test_a_draft_that_would_push_the_model_out_goes_to_the_host(planned):
    """8 GB hold the 8B model with 16384 tokens, but not both."""
    plan = planned([8192], "Llama-3.1-8B", "Llama-3.2-1B", speculation="draft", context_tokens=16384)
    assert argument(plan.argv, "--spec-draft-device") == "none" and argument(plan.argv, "--spec-draft-ngl") == "0"
    assert rows(plan)["GPU0"].beside_bytes == 0 and rows(plan)["host"].beside_bytes > 1000 * MIB
    assert argument(plan.argv, "--n-gpu-layers") == "33"


def test_a_draft_takes_a_gpu_that_the_model_does_not_use(planned):
    """The model fills the first; a second process-wide overhead is counted there."""
    plan = planned([24564, 12282], "Qwen2.5-32B", "Qwen2.5-Coder-0.5B", speculation="draft", context_tokens=8192)
    assert argument(plan.argv, "--spec-draft-device") in ("CUDA0", "CUDA1")
    assert all(row.free_bytes >= 0 for row in plan.ledger)


def test_a_draft_has_the_models_cache_type(planned):
    plan = planned([24564], "Llama-3.1-8B", "Llama-3.2-1B", speculation="draft", kv_types=["q8_0/f16"])
    assert argument(plan.argv, "--spec-draft-type-k") == "q8_0" and argument(plan.argv, "--spec-draft-type-v") == "f16"


def test_without_a_gpu_all_is_on_the_host(planned):
    plan = planned([], "Qwen2.5-Coder-1.5B", "Qwen2.5-Coder-0.5B", speculation="draft", draft_max_tokens=8)
    assert argument(plan.argv, "--spec-draft-device") == "none" and argument(plan.argv, "--spec-draft-n-max") == "8"
    assert rows(plan)["host"].beside_bytes > 600 * MIB


def test_a_head_is_loaded_with_its_cache_and_states(planned):
    alone = planned([24564], "Qwen3.6-35B-A3B-MTP", ubatch_tokens=512)
    plan = planned([24564], "Qwen3.6-35B-A3B-MTP", speculation="mtp", ubatch_tokens=512)
    assert argument(plan.argv, "--spec-type") == "draft-mtp"
    more = {part: getattr(rows(plan)["GPU0"], part) - getattr(rows(alone)["GPU0"], part)
            for part in ("weights_bytes", "kv_bytes", "compute_bytes")}  # fmt: skip
    # llama-server: 20424 - 19902 MiB; a layer of 32768 cells, and three more copies of 62.81 MiB of states.
    assert 521 * MIB <= more["weights_bytes"] <= 523 * MIB
    assert more["kv_bytes"] == 64 * MIB + 3 * rows(alone)["GPU0"].kv_bytes - 3 * 640 * MIB
    assert more["compute_bytes"] > 70 * MIB


def test_the_buffers_of_a_head_nearly_double_those_of_its_model(header):
    """As was reported of GLM-5.2 (llama.cpp's pull request 25980); here of GLM 4.5 Air, 146.76 MiB beside 170.01."""
    model = Model.of(header("GLM-4.5-Air"), head=True)
    place = Placement.of((0,) * (model.layers + 1))
    context = Context(8192, 1, "f16", 512, drafted=3)
    (alone, _), (both, _) = (usage(model, one, place, "cpu") for one in (context, Speculation("mtp", 3, 0).served(model.shape, context, None)))  # fmt: skip
    assert round(alone[0].compute_bytes / MIB, 2) == 170.01
    assert round((both[0].compute_bytes - alone[0].compute_bytes) / MIB, 2) == 146.76
    assert both[0].kv_bytes - alone[0].kv_bytes == 32 * MIB


def test_n_grams_take_a_table_and_logits(planned):
    plan = planned([24564], "Llama-3.1-8B", speculation="ngram")
    assert argument(plan.argv, "--spec-type") == "ngram-mod" and argument(plan.argv, "--spec-ngram-mod-n-max") == "64"
    assert rows(plan)["host"].beside_bytes == NGRAM_BYTES
    alone = planned([24564], "Llama-3.1-8B")
    assert rows(plan)["host"].overhead_bytes - rows(alone)["host"].overhead_bytes == 64 * 128256 * 4


def test_a_plan_says_what_guesses_and_claims_no_speed(planned):
    plan = planned([24564], "Llama-3.1-8B", "Llama-3.2-1B", speculation="draft")
    [said] = [line for line in plan.why if line.startswith("speculation:")]
    assert "up to 3 tokens are guessed by Llama-3.2-1B on GPU0" in said and "only measuring tells" in said


@pytest.mark.parametrize(
    ("target", "draft", "settings", "said"),
    [
        ("Llama-3.1-8B", "Qwen3-0.6B", {"speculation": "draft"}, "has another vocabulary than Llama-3.1-8B"),
        ("Llama-3.1-8B", None, {"speculation": "mtp"}, "has no draft head (MTP) for the architecture llama"),
        ("Llama-3.3-70B", "Llama-3.2-1B", {"speculation": "eagle3"}, "is no EAGLE-3 draft"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(planned, target, draft, settings, said):
    refusal = planned([24564], target, draft, **settings)
    assert not refusal.fits and said in refusal.reason


def test_the_command_names_the_draft(planned):
    plan = planned([24564], "Llama-3.1-8B", "Llama-3.2-1B", speculation="draft")
    [instance] = planning.settings({"speculation": "draft", "draft": "/d.gguf"}).models
    command = argv(plan, instance, "/m.gguf", {"draft": "/models/d.gguf"})
    assert argument(command, "--spec-draft-model") == "/models/d.gguf" and beside(command) == "draft"


def test_what_the_binary_reports_of_a_draft_is_compared(planned):
    plan = planned([24564], "Llama-3.1-8B", "Llama-3.2-1B", speculation="draft")
    row, host = rows(plan)["GPU0"], rows(plan)["host"]
    own = row.weights_bytes + row.kv_bytes + row.compute_bytes + row.staging_bytes
    told = {"CUDA0": own, "Host": host.weights_bytes + host.compute_bytes}
    assert not compare(plan, MemoryReport(told)).beyond(only_more=False)
    both = {**told, "beside CUDA0": row.beside_bytes, "beside Host": plan.reported_beside["beside Host"][1]}
    assert not compare(plan, MemoryReport(both)).beyond(only_more=False)
    more = compare(plan, MemoryReport({**both, "beside CUDA0": row.beside_bytes + 500 * MIB}))
    assert more.beyond(only_more=True) == {"GPU0": 500 * MIB}


def test_a_head_is_known_by_its_flags(planned):
    assert beside(planned([24564], "Qwen3.6-35B-A3B-MTP", speculation="mtp").argv) == "head"
    assert beside(planned([24564], "Llama-3.1-8B", speculation="ngram").argv) == ""


@pytest.mark.parametrize(
    ("kind", "most", "least", "lengths"),
    [
        ("ngram", None, None, (64, 48)),
        ("ngram", 16, None, (16, 16)),
        ("mtp", None, None, (3, 0)),
        ("draft", 8, 2, (8, 2)),
    ],
)
def test_lengths_are_llama_cpps_unless_given(kind, most, least, lengths):
    found = Speculation.of(kind, most, least)
    assert (found.most, found.least) == lengths


def test_a_draft_alone_is_no_model(tmp_path):
    outline = Path(__file__).parents[1] / "oracle" / "drafts" / "eagle3.yaml"
    asked = planning.settings({})
    [refusal] = plan_host(
        planning.machine(), [(asked.models[0], read_path(outlines.weightless(outline, tmp_path)))], asked
    )
    assert "is a draft (eagle3)" in refusal.reason and "as its draft" in refusal.suggestions[0]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """An EAGLE-3 draft for Llama 3.3 70B that has neither embedding nor output matrix."""
    text = (Path(__file__).parents[1] / "oracle" / "drafts" / "published" / "llama-3.3-70b-eagle3.yaml").read_text()
    lines = [line for line in text.splitlines() if not line.startswith(("  token_embd", "  output.weight", "  d2t"))]
    outline = tmp_path_factory.mktemp("outline") / "shared.yaml"
    outline.write_text(
        "\n".join(lines).replace("embedding_length: 6144", "embedding_length: 8192").replace("6144", "8192")
    )
    return read_path(outlines.weightless(outline, outline.parent))


@pytest.mark.parametrize(("gpus", "device"), [([49140], "CUDA0"), ([24564, 24564, 24564], "CUDA2"), ([], "none")])
def test_a_draft_that_reads_the_models_output_matrix_lies_where_that_lies(gpus, device, header, shared):
    asked = planning.settings({"speculation": "eagle3", "draft": "/d.gguf", "context_tokens": 4096})
    requests = [(asked.models[0], header("Llama-3.3-70B"))]
    [plan] = plan_host(planning.machine(gpus, ram_gib=128), requests, asked, companions={"m0": {"draft": shared}})
    assert plan.fits, plan.reason
    output = plan.placement.layer_devices[-1]
    assert argument(plan.argv, "--spec-draft-device") == device == ("none" if output is None else f"CUDA{output}")
