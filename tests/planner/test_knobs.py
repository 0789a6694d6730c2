"""Settings that decide what a plan else decides by itself: what they put on the command line, and what is refused."""

import pytest

from llamafleet.memory.weights import Model
from llamafleet.planner.result import Plan, Refusal
from llamafleet.settings.schema import SettingsError
from tests import planning

MOE, DENSE = ("gpt-oss-20b",), ("Qwen3-8B", "Q4_K_M")


def planned(moe=False, gpus=(), cpu=(), ram_gib=64, layout=None, **asked):
    """The plan or refusal of one model with these settings."""
    host = planning.machine(gpus, cpu=cpu, ram_gib=ram_gib)
    settings = planning.settings({"context_tokens": 8192, **asked}, backend="cuda" if gpus else "cpu")
    return planning.plans(host, [layout or (MOE if moe else DENSE)], settings)[0]


@pytest.mark.parametrize(
    ("asked", "flags"),
    [
        ({"batch_tokens": 4096}, {"--batch-size": "4096"}),
        ({"batch_tokens": 512, "ubatch_tokens": 256}, {"--batch-size": "512", "--ubatch-size": "256"}),
        ({"threads_batch": 10}, {"--threads": "6", "--threads-batch": "10"}),
        ({"threads": 3}, {"--threads": "3", "--threads-batch": "3"}),
        ({"load_mode": "mlock"}, {"--load-mode": "mlock"}),
    ],
)
def test_a_setting_is_on_the_command_line(asked, flags):
    plan = planned(**asked)
    assert {flag: planning.argument(plan.argv, flag) for flag in flags} == flags


def test_without_them_nothing_changes():
    usual = {"batch_tokens": None, "threads_batch": None, "cpus": None, "numa": "auto", "load_mode": "none",
             "op_offload": True, "repack": None, "spilled_layers": None, "speculation": "none"}  # fmt: skip
    for gpus in ((), (8192,)):
        assert planned(True, gpus, **usual) == planned(True, gpus)


def test_a_ubatch_is_never_above_the_batch():
    plan = planned(batch_tokens=512, prompt_tokens=8000, ubatch_tokens=None)
    assert plan.ubatch_tokens <= 512 and planning.argument(plan.argv, "--batch-size") == "512"


def test_cpus_that_are_named_are_the_unit_s_even_where_threads_are_set():
    assert planned().cpus == ""
    plan = planned(cpus="0-3,8", threads=5)
    assert plan.cpus == "0-3,8" and any("set by cpus" in sentence for sentence in plan.why)


@pytest.mark.parametrize(("cpus", "threads"), [("2", "1"), ("0-3,8", "5"), ("0-11", "6"), (None, "6")])
def test_there_are_no_more_threads_than_cpus_that_are_named(cpus, threads):
    plan = planned(cpus=cpus)
    assert [planning.argument(plan.argv, flag) for flag in ("--threads", "--threads-batch")] == [threads, threads]


@pytest.mark.parametrize(("numa", "nodes"), [("auto", "0-1"), ("interleave", "0-1"), ("local", "")])
def test_memory_of_several_nodes(numa, nodes):
    assert planned(cpu={"numa_nodes": 2, "numa_node_list": "0-1"}, numa=numa).numa_nodes == nodes
    assert planned(numa=numa).numa_nodes == "", "one node"


def test_without_op_offload_nothing_is_staged():
    """With it a GPU has a buffer for the weights that are in RAM."""
    offloaded, plain = planned(True, (8192,)), planned(True, (8192,), op_offload=False)
    assert sum(row.staging_bytes for row in offloaded.ledger) > 0
    assert sum(row.staging_bytes for row in plain.ledger) == 0
    assert "--no-op-offload" in plain.argv and "--no-op-offload" not in offloaded.argv


def test_weights_that_are_not_repacked_are_held_once():
    """A tied embedding has a second copy where it is repacked, as ARM does with its Q6_K."""
    tied, arm = ("Llama-3.2-3B", "Q4_K_M"), {"flags": ["asimddp"]}
    usual, plain = (planned(layout=tied, cpu=arm, **asked).ledger[-1] for asked in ({}, {"repack": False}))
    embedding = Model.of(planning.header(*tied)).tied_bytes
    assert usual.weights_bytes - plain.weights_bytes == embedding > 0


@pytest.mark.parametrize(
    ("case", "is_given"),
    [
        ({}, True),
        ({"gpus": (24564,)}, False),  # all of it on the card
        ({"moe": True, "gpus": (8192,)}, False),  # in pinned memory
        ({"layout": ("Qwen3-8B", "Q8_0")}, False),  # no order of its own on x86
    ],
)
def test_a_server_is_told_not_to_repack_where_it_would(case, is_given):
    """Else two command lines would differ in nothing."""
    assert ("--no-repack" in planned(repack=False, **case).argv) is is_given


@pytest.mark.parametrize("gpus", [(8192,), (6144, 6144)])
def test_so_many_layers_spill(gpus):
    """More than the plan would choose frees memory, fewer does not fit; each is what the ledger counts."""
    chosen = planned(True, gpus)
    own = len(chosen.placement.spilled) + len(chosen.placement.partly)
    assert 0 < own < 24, "the case is of use only between the ends"
    for count in (own, own + 2, 24):
        plan = planned(True, gpus, spilled_layers=count)
        assert isinstance(plan, Plan) and len(plan.placement.spilled) == count and not plan.placement.partly
    fuller, emptier = (planned(True, gpus, spilled_layers=count) for count in (own + 1, own + 4))
    assert sum(row.weights_bytes for row in fuller.ledger[:-1]) > sum(row.weights_bytes for row in emptier.ledger[:-1])
    none = planned(True, gpus, spilled_layers=0)
    assert isinstance(none, Refusal) and "does not fit" in none.reason


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"threads_batch": 17}, "threads_batch: 17 is more than the 16 logical cores"),
        ({"cpus": "5-3"}, "cpus: 5-3 names no CPU"),
        ({"spilled_layers": 3}, "spilled_layers: 3, but the plan uses no GPU"),
        ({"spilled_layers": 99, "card": True}, "spilled_layers: 99 is more than the 36 layers"),
    ],
)
def test_what_cannot_be_is_refused_by_name(asked, said):
    refusal = planned(gpus=(8192,) if asked.pop("card", False) else (), **asked)
    assert isinstance(refusal, Refusal) and said in refusal.reason


def test_a_batch_has_whole_ubatches():
    with pytest.raises(SettingsError, match=r"batch_tokens.*less than ubatch_tokens"):
        planning.settings({"batch_tokens": 256, "ubatch_tokens": 512})


def test_what_a_tune_is_to_choose_is_not_guessed_before():
    """With "auto" the draft is there, and nothing is planned for it."""
    plan = planned(speculation="auto", draft="/d.gguf")
    assert plan.argv == planned().argv and plan.ledger == planned().ledger
