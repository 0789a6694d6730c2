"""A tune from its first batch to the record, with a host that answers as `tune.py` does."""

import contextlib
import json
import types

import pytest
from pyinfra.context import ctx_host

from llamafleet.host.answers import Job
from llamafleet.service import tune
from llamafleet.tuning.candidates import SHIPPED
from llamafleet.tuning.record import Tuned
from llamafleet.tuning.records import Kept
from tasks.lib import decision, jobs, lookups, memory_check, records, remote, sending, switching, tuning
from tasks.lib.decision import Decision, changes_needed
from tests.planning import argument
from tests.service.test_changes import INSTANCE
from tests.service.test_desired import survey
from tests.service.test_measured import KV
from tests.service.test_tune import with_units

DONE = Job("ended", 0, "", (), "exit code 0")


class Box:
    """A host with its trials: `seconds` gives those of a command line, None where it fails."""

    def __init__(self, seconds):
        self.name, self.lines, self.failed = "box1", [], []
        self.trials, self.files, self.ended, self.turns = {}, {}, [], []
        self.jobs, self.seconds, self.exit, self.quits, self.disturbed = [], seconds, DONE, None, None
        self.took = 4.0

    @contextlib.contextmanager
    def turn(self, host, names, at_once):
        self.turns.append((names, at_once))
        yield
        self.turns.append(f"ended {', '.join(self.ended)}")

    def log(self, text, *_):
        self.lines.append(text)

    def log_styled(self, text, **_):
        self.failed.append(text)

    def run_json(self, host, command, read):
        verb, name, key = command.words[-3:]
        assert verb == "read"
        return read(json.dumps(self.trials.get((name, key), [])))

    def run(self, host, command):
        if command.words[0] == "rm":
            assert command.words[-1] == "/var/lib/llamafleet/tune/m0/trials.jsonl"
            self.trials.clear()
            return True, [], []
        if command.words[-2:-1] == ["end"]:
            self.ended.append(command.words[-1])
            return True, [], []
        self.files |= command.files
        return True, [], []

    def job(self, state, host, name, words, secret=None, network=None):
        """Measures what the spec lists, as far as the budget goes."""
        spec = json.loads(self.files[words[-1]])
        self.jobs.append((spec, secret))
        if self.exit.exit_code:
            return self.exit
        there = self.trials.setdefault((spec["instance"], spec["key"]), [])
        for one in spec["trials"]:
            if sum(each["took_seconds"] for each in there) + self.took * bool(there) > spec["budget_seconds"]:
                break
            if self.quits == len(there):
                raise KeyboardInterrupt
            if self.disturbed == len(there):
                break
            if one["id"] not in {each["id"] for each in there}:
                seconds = self.seconds(one["argv"])
                there.append({
                    **{key: one[key] for key in ("id", "candidate", "label", "stage")}, "seconds": seconds,
                    "error": None if seconds else "it crashed", "took_seconds": self.took, "prompt_tokens_per_s": 1.0,
                    "decode_tokens_per_s": 2.0, "spread": 1.0,
                })  # fmt: skip
        return DONE


@pytest.fixture
def box(monkeypatch, tmp_path):
    """A host on which five threads are twice as fast as everything else."""
    one = Box(lambda argv: 1.0 if argument(argv, "--threads") == "5" else 2.0)
    monkeypatch.setattr(remote, "run_json", one.run_json)
    monkeypatch.setattr(remote, "run", one.run)
    monkeypatch.setattr(sending, "received", lambda files, *options: types.SimpleNamespace(
        words=["receive", *options], files={path: data.decode() for path, (_, data) in files.items()}))  # fmt: skip
    monkeypatch.setattr(jobs, "ended", one.job)
    monkeypatch.setattr(jobs, "hold", lambda state, host: True)
    monkeypatch.setattr(memory_check, "check_plans", lambda host: True)
    monkeypatch.setattr(switching, "turn", one.turn)
    monkeypatch.setattr(records, "folder", lambda: tmp_path / "tuned")
    monkeypatch.setattr(decision, "_decisions", {})
    monkeypatch.setattr(decision, "_locks", {one: decision.RLock()})
    with ctx_host.use(one):
        decide(one)
        yield one


def decide(box, read=None, models=(KV,), **asked):
    desired = with_units(read or survey(), models, **asked)
    decision._decisions[box] = Decision(desired, changes_needed(desired, desired.installed))


def measure(box, installs=True):
    return tuning.tune_instance(None, box, "m0", installs=installs)


def threads(box):
    return argument(decision.of(box).desired.servings[0].plan.argv, "--threads")


def kept(tmp_path):
    return json.loads((tmp_path / "tuned" / "box1.json").read_text())["m0"]


def test_what_is_fastest_is_found_recorded_in_both_places_and_planned(box, tmp_path):
    assert threads(box) != "5"
    assert measure(box) and box.failed == []
    assert threads(box) == "5"
    record = json.loads(box.files["/var/lib/llamafleet/tuned/m0.json"])
    assert record == kept(tmp_path) and Tuned.of(record).settings == {"threads": 5}
    assert record["winner"]["gain"] == pytest.approx(2.0) and record["winner"]["low"] > 1.5
    assert "m0: planned with it: --threads 5 --threads-batch 5" in box.lines
    assert record["trials"] == box.trials["m0", next(iter(box.trials))[1]]
    said = [line for line in box.lines if line.startswith("m0: 5 threads: 2.00 times as fast as llama-server")]
    assert len(said) == 1 and said[0].endswith(f"{len(record['trials'])} trials")
    assert decision.of(box).desired.servings[0].plan.why[0].startswith("measured here: 5 threads: 2.00 times")


def test_it_ends_within_its_budget(box, tmp_path):
    decide(box, tune_minutes=3)
    measure(box)
    assert 90 < sum(one["took_seconds"] for one in kept(tmp_path)["trials"]) <= 180


def test_the_bar_says_how_far_it_is(box):
    measure(box)
    bars = [line for line in box.lines if line.startswith("tune m0: [")]
    assert len(bars) > 3 and bars[0].startswith("tune m0: [") and "2 of about" in bars[0]
    assert "best so far: 5 threads (2.00 times llama-server as it ships)" in bars[-1] and bars[-1].endswith(
        "left at most"
    )
    assert {line.index("]") for line in bars} == {bars[0].index("]")}


@pytest.mark.parametrize("after", [1, 17, *(pytest.param(count, marks=pytest.mark.long) for count in (0, 5, 30))])
def test_a_run_that_is_ended_is_gone_on_with(box, tmp_path, after):
    box.quits = after
    with pytest.raises(KeyboardInterrupt):
        measure(box)
    done = sum(len(trials) for trials in box.trials.values())
    assert done == after and not (tmp_path / "tuned").exists()
    box.quits = None
    decide(box)
    assert measure(box)
    [trials] = box.trials.values()
    assert [one["id"] for one in trials] == list(range(len(trials))) and kept(tmp_path)["settings"] == {"threads": 5}


def test_candidates_that_fail_lose_and_the_tune_ends(box, tmp_path):
    box.seconds = lambda argv: None if argument(argv, "--threads") == "5" else 2.0
    assert measure(box)
    assert kept(tmp_path)["settings"].get("threads") != 5 and threads(box) != "5"
    assert kept(tmp_path)["winner"]["gain"] == 1.0


def test_where_nothing_runs_there_is_no_record_and_the_plan_stays(box, tmp_path):
    box.seconds = lambda argv: None
    before = decision.of(box)
    assert measure(box) and measure(box, installs=False) and box.failed == []  # other instances are measured
    assert decision.of(box) is before and not (tmp_path / "tuned").exists()
    assert any("nothing could be measured, so that its plan stays: it crashed" in line for line in box.lines)
    box.seconds = lambda argv: 2.0
    assert measure(box) and kept(tmp_path)["trials"][0]["seconds"] == 2.0  # begun anew


def test_a_first_trial_that_takes_all_the_time_ends_the_tune(box, tmp_path):
    box.took = 700.0
    assert measure(box) and not (tmp_path / "tuned").exists() and len(box.jobs) == 1
    assert "the time was over before anything was proven" in box.lines[-1] and box.trials == {}


@pytest.mark.parametrize(("code", "why"), [(3, "its service runs"), (4, "the window is over"), (5, "another run")])
def test_what_cannot_be_measured_now_is_said_and_nothing_fails(box, tmp_path, code, why):
    box.exit = Job("ended", code, "", ("a line", f"error: {why}"), f"exit code {code}")
    assert measure(box) and box.failed == [] and not (tmp_path / "tuned").exists()
    assert box.lines[-1] == f"m0 is not measured now: {why}"


def test_a_batch_that_something_else_ends_proves_nothing(box, tmp_path):
    box.disturbed = 9
    assert measure(box) and not (tmp_path / "tuned").exists() and len(box.jobs) < 5
    assert box.lines[-1] == "m0 is not measured to the end now: the host ended a batch without a trial"
    box.disturbed = None
    assert measure(box) and kept(tmp_path)["settings"] == {"threads": 5}


def test_a_runner_that_fails_fails_the_host(box):
    box.exit = Job("ended", 1, "", ("error: no spec",), "exit code 1")
    with pytest.raises(remote.RemoteError, match="m0 cannot be measured"):
        measure(box)
    assert "error: no spec" in box.failed[0]


def test_a_service_that_was_stopped_is_put_back_whatever_happens(box):
    decide(box, survey(instances={"m0": INSTANCE}), tune_stops_service=True)
    measure(box)
    assert box.ended == ["m0"] and all(spec["stops"] for spec, _ in box.jobs)
    box.trials.clear()
    box.quits = 3
    decide(box, survey(instances={"m0": INSTANCE}), tune_stops_service=True)
    with pytest.raises(KeyboardInterrupt):
        measure(box)
    assert box.ended == ["m0", "m0"]


def test_the_text_of_prompts_is_on_the_host_only_while_a_job_runs(box, tmp_path):
    text = tmp_path / "prompts.txt"
    text.write_text("Rename x\n%\nExplain y")
    decide(box, models=({**KV, "tune_prompt_file": str(text)},))
    measure(box)
    for spec, secret in box.jobs:
        assert spec["text"] == secret.path == "/run/llamafleet/tune-m0.txt" and secret.text == text.read_text()
    assert not [path for path, content in box.files.items() if "Explain y" in content]


def test_the_stage_alone_says_what_the_next_deploy_installs(box):
    assert measure(box, installs=False)
    assert box.lines[-1] == "m0: deploy.py installs what won"


def test_a_copy_that_cannot_be_written_here_is_said_and_the_host_has_its_own(box, tmp_path):
    (tmp_path / "tuned").write_text("")
    assert measure(box) and threads(box) == "5"
    assert any("the copy of its record cannot be written here" in line for line in box.lines)


def test_an_instance_that_is_like_one_that_was_measured_takes_its_record(box):
    decide(box, models=({**KV, "name": "a"}, {**KV, "name": "b"}), tune="missing")
    assert tuning.tune_instance(None, box, "a", installs=True) and tuning.tune_instance(None, box, "b", installs=True)
    assert "b is not measured: it was measured already, with a" in box.lines and {name for name, _ in box.trials} == {
        "a"
    }
    assert [argument(one.plan.argv, "--threads") for one in decision.of(box).desired.servings] == ["5", "5"]


def test_a_record_whose_copy_is_missing_here_is_copied(box, monkeypatch, tmp_path):
    """The run that measured it ended before it wrote the copy."""
    measure(box)
    text, path = box.files["/var/lib/llamafleet/tuned/m0.json"], tmp_path / "tuned" / "box1.json"
    path.unlink()
    decide(box, survey(tuned={"m0": {key: one for key, one in json.loads(text).items() if key != "trials"}}))
    now = decision.of(box)
    assert tuning.to_copy(now, "box1", Kept()) == ("m0",)
    monkeypatch.setattr(remote, "run", lambda host, command: (True, text.splitlines(), []))
    assert tuning.copy_here(None, box, "m0") and kept(tmp_path) == json.loads(text)
    there = Kept.of(records.read(path.parent))
    assert tuning.to_copy(now, "box1", there) == () and tuning.to_copy(now, "box2", there) == ("m0",)


@pytest.mark.parametrize(
    "answer", [(False, [], ["cat: no such file"]), (True, ["{"], []), (True, ['{"schema": 1}'], [])]
)
def test_a_record_that_cannot_be_copied_fails_nothing(box, monkeypatch, tmp_path, answer):
    monkeypatch.setattr(remote, "run", lambda host, command: answer)
    assert tuning.copy_here(None, box, "m0") and not (tmp_path / "tuned").exists()
    assert box.lines[-1].startswith("m0: its record is not copied: ")


def test_the_baseline_stays_where_all_are_alike(box, tmp_path):
    box.seconds = lambda argv: 2.0
    measure(box)
    record = kept(tmp_path)
    assert record["settings"] == {} and record["baseline"] == {"label": SHIPPED, "seconds": 2.0}


def test_prompt_files_are_sent_for_the_trials(box, monkeypatch):
    monkeypatch.setattr(lookups, "instance_secrets", lambda instance: {"chat-template": "{{ x }}", "api-keys": "k"})
    decide(box, models=({**KV, "chat_template_file": "/t", "api_key_file": "/k"},))
    measure(box)
    assert box.files["/var/lib/llamafleet/tune/m0/chat-template"] == "{{ x }}"
    assert "k" not in box.files.values()


def test_only_what_is_to_be_measured_needs_the_host_s_programs_of_this_version(box):
    """An earlier version's runner does not know this version's specs."""
    desired = with_units(survey(helpers="old"))
    now = Decision(desired, changes_needed(desired, desired.installed))
    assert now.changes.helpers and tune.to_measure(desired, as_set=True) == ("m0",)
    assert decision._is_missing("helpers", now, "tune") and not decision._is_missing("helpers", now, "service")


def test_a_running_service_is_stopped_in_the_host_s_turn_and_runs_again_at_its_end(box):
    decide(box, survey(instances={"m0": INSTANCE}), tune_stops_service=True, switch_at_once=3)
    assert measure(box) and box.turns == [(["m0"], 3), "ended m0"]
    assert measure(box) and len(box.turns) == 2  # it is measured already


@pytest.mark.parametrize("asked", [{"tune_stops_service": True}, {"tune_stops_service": False}])
def test_where_nothing_is_stopped_nobody_is_waited_for(box, asked):
    decide(box, survey(instances={} if asked["tune_stops_service"] else {"m0": INSTANCE}), **asked)
    assert measure(box) and box.turns == []
