"""What a tune measures: what the operator left open, planned by the ordinary planner, and nothing else."""

import math
from dataclasses import replace

import pytest

from llamafleet.planner.result import Plan, Refusal
from llamafleet.tuning import candidates as tuning
from llamafleet.tuning.race import Batch, Screened, Trial, Verdict
from llamafleet.tuning.search import Course, Measured, affordable, course, installed, progress
from tests import planning

MOE, DENSE = ("gpt-oss-20b",), ("Qwen3-8B", "Q4_K_M")


def asked(layout=DENSE, gpus=(), cpu=(), drafts=(), **instance):
    """An instance, its planner and its machine."""
    host = planning.machine(gpus, cpu=cpu)
    settings = planning.settings({"context_tokens": 8192, **instance}, backend="cuda" if gpus else "cpu")
    companions = {"m0": {"draft": planning.header(*drafts)}} if drafts else {}
    requests = [(settings.models[0], planning.header(*layout))]
    planner = tuning.planner_of(host, requests, settings, "m0", companions)
    return settings.models[0], host, planner, companions.get("m0", {})


def found(**case):
    instance, host, planner, companions = asked(**case)
    made, lost = tuning.candidates(instance, host, planner, companions)
    return made, lost


def settings_of(made):
    return [one.settings for one in made[2:]]


def test_the_baseline_is_llama_server_as_it_ships_and_the_second_is_the_plan():
    made, _ = found()
    baseline, planned = made[:2]
    argv = dict(zip(baseline.plan.argv[::2], baseline.plan.argv[1::2], strict=False))
    assert argv["--ctx-size"] == "8192" and argv["--parallel"] == "1"
    for decided in ("--fit", "--threads", "--ubatch-size", "--n-gpu-layers", "--flash-attn", "--load-mode"):
        assert (decided in planned.plan.argv and decided not in baseline.plan.argv) or decided == "--n-gpu-layers"
    assert planned.settings == {} and len({one.plan.argv for one in made}) == len(made)


@pytest.mark.parametrize(
    ("given", "dimension"),
    [({"threads": 3}, "threads"), ({"ubatch_tokens": 512}, "ubatch"), ({"slots": 2, "concurrency": 4}, "slots"),
     ({"kv_types": ["q8_0"]}, "cache"), ({"repack": False}, "order of weights"),
     ({"repack": True}, "order of weights"), ({"speculation": "none"}, "speculation")],
)  # fmt: skip
def test_what_the_operator_set_is_not_varied(given, dimension):
    open_case = {"slots": {"concurrency": 4}, "cache": {"kv_types": ["f16", "q8_0"]},
                 "speculation": {"speculation": "auto", "tune_prompt_file": "code.txt"}}.get(dimension, {})  # fmt: skip
    assert dimension in {one.dimension for one in found(**open_case)[0]}, "it is varied where it is left open"
    assert dimension not in {one.dimension for one in found(**given)[0]}


@pytest.mark.parametrize(
    ("case", "is_tried"),
    [
        ({}, True),
        ({"layout": MOE}, True),
        ({"layout": ("Qwen3-8B", "Q8_0")}, False),
        ({"layout": ("Qwen3-8B", "Q8_0"), "speculation": "draft", "draft": "/d.gguf", "drafts": DENSE}, True),
        ({"layout": MOE, "gpus": (8192,)}, False),
    ],
)
def test_weights_as_they_are_in_the_file_are_tried_where_they_would_be_repacked(case, is_tried):
    """Neither Q8_0 on x86 nor pinned memory is; a draft is loaded as the model is."""
    assert ("order of weights" in {one.dimension for one in found(**case)[0]}) is is_tried


@pytest.mark.parametrize(
    ("workload", "first"),
    [({"prompt_tokens": 4000, "reply_tokens": 16}, "order of weights"), ({"reply_tokens": 1000}, "threads"),
     ({"prompt_tokens": 4000, "reply_tokens": 16, "threads": 3}, "order of weights")],
)  # fmt: skip
def test_what_changes_reading_is_tried_first_where_reading_takes_longest(workload, first):
    tried = [one.dimension for one in found(**workload)[0] if one.dimension not in ("", tuning.DEFAULTS)]
    assert tried[0] == first and ("threads" in tried) is ("threads" not in workload)


def test_cpus_that_the_operator_named_hold_for_the_default_and_every_candidate():
    usual, named = found()[0], found(cpus="0-2")[0]
    assert usual[0].plan.cpus == "" and {one.plan.cpus for one in named} == {"0-2"}
    assert not any("cpus" in one.settings for one in named)
    tried = {one.settings["threads"] for one in named if "threads" in one.settings}
    assert tried and max(tried) <= 3 and named[1].plan.threads == 3


def test_every_candidate_is_within_the_ledger():
    """On a card that experts do not fit on; what does not fit is named, and not run."""
    made, lost = found(layout=MOE, gpus=(8192,))
    assert all(isinstance(one.plan, Plan) and all(row.free_bytes >= 0 for row in one.plan.ledger) for one in made)
    assert {"spilled layers", "op-offload", "ubatch"} <= {one.dimension for one in made}
    assert any("does not fit" in one.why for one in lost)


def test_what_can_be_guessed_is_tried():
    case = {"speculation": "auto", "drafts": ("Qwen3-0.6B",), "draft": "/d.gguf"}
    made, lost = found(**case, tune_prompt_file="code.txt")
    kinds = {one.settings["speculation"] for one in made if one.dimension == "speculation"}
    assert kinds == {"ngram", "draft"} and any("draft head" in one.why for one in lost)
    by_kind = {one.settings["speculation"]: one.plan.argv for one in made if one.dimension == "speculation"}
    assert "--spec-draft-device" in by_kind["draft"] and "--spec-draft-device" not in by_kind["ngram"]
    assert "--spec-type" not in made[1].plan.argv


def test_no_guess_is_measured_with_words_by_chance():
    made, lost = found(speculation="auto", drafts=("Qwen3-0.6B",), draft="/d.gguf")
    assert "speculation" not in {one.dimension for one in made}
    assert [one.why for one in lost if "tune_prompt_file" in one.why], "and the way out is told"
    assert not any("tune_prompt_file" in one.why for one in found()[1])


def test_a_model_that_does_not_fit_has_no_candidates():
    instance, _, planner, _ = asked(layout=("Llama-3.3-70B", "Q8_0"))
    assert isinstance(tuning.candidates(instance, planning.machine(), planner), Refusal)


def test_what_won_is_put_together_and_planned():
    instance, host, planner, _ = asked()
    made, _ = tuning.candidates(instance, host, planner)
    threads = next(n for n, one in enumerate(made) if one.dimension == "threads")
    ubatch = next(n for n, one in enumerate(made) if one.dimension == "ubatch")
    [whole] = tuning.combined(instance, planner, made, Screened(threads, (), {threads: -0.2, ubatch: -0.1, 1: 0.0}))
    assert whole.settings == {**made[threads].settings, **made[ubatch].settings}
    assert planning.argument(whole.plan.argv, "--threads") == str(made[threads].settings["threads"])
    assert planning.argument(whole.plan.argv, "--ubatch-size") == str(made[ubatch].settings["ubatch_tokens"])


# --- the course of a tune ---------------------------------------------------------------------------


def run(truth, budget_seconds=3600.0, took=20.0, upto=None, **case):
    """A tune on a host without noise; `truth`: seconds by a candidate."""
    instance, host, planner, companions = asked(**case)
    made, _ = tuning.candidates(instance, host, planner, companions)
    first, measured = affordable(made, budget_seconds, took), []
    while isinstance((now := course(instance, planner, first, measured, budget_seconds)).step, Batch):
        for one in now.step.candidates:
            if upto is not None and len(measured) == upto:
                return now, measured
            measured.append(Measured(Trial(one, truth(now.candidates[one]), now.step.stage), took))
    return now, measured


def slow_unless(*labels):
    """Each of these changes takes a fifth of the time; a combination has them all."""
    return lambda one: 10.0 * 0.8 ** sum(label in one.label for label in labels)


def test_two_changes_that_pay_are_installed_together():
    now, measured = run(slow_unless("ubatch 1024", "16 threads for prompts"))
    assert isinstance(now.step, Verdict)
    assert now.winner.settings == {"ubatch_tokens": 1024, "threads_batch": 16}
    assert 1.5 < now.step.gain < 1.6 and len(measured) <= 3600 / 20


def test_where_nothing_pays_nothing_is_installed():
    now, _ = run(lambda one: 10.0)
    assert now.winner is None and now.step.why


def test_a_small_budget_has_few_candidates_and_is_kept():
    now, measured = run(slow_unless("ubatch 1024"), budget_seconds=600, took=20)
    assert sum(one.took_seconds for one in measured) <= 600 and isinstance(now.step, Verdict)
    now, measured = run(slow_unless("ubatch 1024"), budget_seconds=200, took=20)
    assert sum(one.took_seconds for one in measured) <= 200 + 20, "what was begun is ended by the host"
    assert now.winner is None and now.step.why


def test_the_smallest_budget_still_has_what_is_installed_where_the_plan_is_slower():
    made, _ = found(layout=MOE, gpus=(8192,), prompt_tokens=8000)
    assert [one.dimension for one in affordable(made, 60, 20)] == ["", "", tuning.DEFAULTS]
    assert len(affordable(found(threads=6, ubatch_tokens=512, batch_tokens=2048)[0], 60, 20)) == 2, "it is the plan"


@pytest.mark.parametrize("upto", [0, 1, 5, 17, 30, 40])
def test_an_interrupted_tune_goes_on_with_the_same_trial(upto):
    """From the trials alone: the next one is what it would have been."""
    truth = slow_unless("ubatch 1024")
    _, whole = run(truth)
    upto = min(upto, len(whole) - 1)
    instance, host, planner, companions = asked()
    first = affordable(tuning.candidates(instance, host, planner, companions)[0], 3600.0, 20)
    now = course(instance, planner, first, whole[:upto], 3600.0)
    following = whole[upto : upto + len(now.step.candidates)]
    assert [one.trial.candidate for one in following] == list(now.step.candidates)
    assert {one.trial.stage for one in following} == {now.step.stage}


def test_progress_names_the_best_so_far():
    now, measured = run(slow_unless("ubatch 1024"), upto=20)
    told = progress(now, measured, 3600.0)
    assert told.best == "ubatch 1024" and told.gain == pytest.approx(1.25)
    assert (told.done, told.left_seconds) == (20, 3600 - 20 * 20) and told.about >= 20


def test_where_the_time_is_over_before_a_final_nothing_is_installed():
    """A budget that all of the screening uses up."""
    _, measured = run(slow_unless("ubatch 1024"))
    instance, host, planner, companions = asked()
    first = affordable(tuning.candidates(instance, host, planner, companions)[0], 3600, 20)
    late = [replace(one, took_seconds=120.0) for one in measured[: 2 * len(first) + 1]]
    over = course(instance, planner, first, late, 120.0 * len(late) + 60)
    assert over.winner is None and "tune_minutes" in over.step.why and over.step.high == math.inf


# --- what is installed ------------------------------------------------------------------------------


def over_without_winner(*trials):
    made, _ = found(layout=MOE, gpus=(8192,), prompt_tokens=8000)
    return made, installed(Course(made, Verdict(0, 1, 1, 1, "none"), 100), [Trial(*one) for one in trials])


def test_where_nothing_is_proven_faster_the_plan_stays():
    made, kept = over_without_winner((0, 10.0), (1, 10.1), (2, 9.9))
    assert kept is made[1] and over_without_winner()[1].label == tuning.PLANNED


def test_a_plan_that_is_slower_than_the_default_is_not_installed():
    """Drift makes all trials of the second round slower; each is compared with the baseline beside it."""
    made, kept = over_without_winner((0, 10.0), (1, 13.0), (2, 10.1), (2, 20.1), (1, 26.0), (0, 20.0))
    assert kept is made[2] and kept.label == "as llama-server by default"
    assert planning.argument(kept.plan.argv, "--ubatch-size") == "512"
    assert over_without_winner((0, 10.0), (1, 13.0), (2, 12.0))[1].label == kept.label, "slower by the least"
    assert over_without_winner((0, 10.0), (1, 13.0), (2, None))[1].label == tuning.PLANNED, "it runs"


@pytest.mark.parametrize(
    ("given", "settings"),
    [({}, {"ubatch_tokens": 512, "batch_tokens": 2048, "threads": 6}),
     ({"threads": 3}, {"ubatch_tokens": 512, "batch_tokens": 2048}),
     ({"batch_tokens": 256}, {"ubatch_tokens": 256, "threads": 6}),
     ({"ubatch_tokens": 4096}, {"batch_tokens": 4096, "threads": 6})],
)  # fmt: skip
def test_the_defaults_of_llama_server_leave_alone_what_the_operator_set(given, settings):
    instance, host, planner, companions = asked(**given)
    changes = list(tuning.changes(instance, planner(instance), host, companions))
    assert [one.settings for one in changes if one.dimension == tuning.DEFAULTS] == [settings]
