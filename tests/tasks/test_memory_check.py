"""The stage before the switch, offline: a host with a GPU, and a binary that counts otherwise than the ledger."""

import contextlib
import dataclasses
import json

import pytest
from pyinfra.context import ctx_host

from llamafleet.host.recorded import PlanRecord
from llamafleet.hub.source import ModelFiles, RemoteFile
from llamafleet.planner.reconcile import MemoryReport
from llamafleet.remote import verify
from llamafleet.service.changes import changes_needed
from llamafleet.service.desired import desire
from llamafleet.service.instance_changes import sha256
from llamafleet.service.plan_inputs import plan_inputs
from llamafleet.service.succession import Handover
from tasks import service
from tasks.lib import decision, jobs, memory_check, operations, switching
from tasks.lib.decision import Decision
from tasks.lib.templates import render
from tests import planning
from tests.planning import MIB
from tests.service.test_changes import INSTANCE
from tests.service.test_desired import RUN, survey

GIB = 1024 * MIB
OPTIONS = switching.Options(30, "cut", None)


class Host:
    """What the stage needs of pyinfra's: a key for the decision and a place to log."""

    def __init__(self):
        self.lines, self.name = [], "box"

    def log(self, text, *_):
        self.lines.append(text)

    def log_styled(self, text, **_):
        self.lines.append(text)


def now(instances=None, used_mib=0, run=RUN, **asked):
    """The decision about a host with one RTX 4090 and gpt-oss-120b, with what is installed there."""
    settings = planning.settings({"source": "hf:a/b/m.gguf", "context_tokens": 32768, **asked})
    read = survey([{"used_by_others_mib": used_mib}], instances=instances or {})
    model = ModelFiles((RemoteFile("m.gguf", "https://x/y", 5, "a" * 64),), planning.header("gpt-oss-120b"))
    desired = desire(plan_inputs(settings, read, {"m0": model}), run, render)
    if instances:  # they run from the wanted release
        there = dataclasses.replace(read.installed, releases={desired.build.key: {}})
        read = dataclasses.replace(read, installed=there)
        desired = desire(plan_inputs(settings, read, {"m0": model}), run, render)
    return Decision(desired, changes_needed(desired, read.installed))


@pytest.fixture
def host(monkeypatch):
    one = Host()
    monkeypatch.setattr(decision, "_decisions", {})
    monkeypatch.setattr(decision, "_locks", {one: decision.RLock()})
    with ctx_host.use(one):
        yield one


class Binary:
    """The host's llama-server: it counts as the ledger does by the header alone, and so much more."""

    def __init__(self, monkeypatch, plan, **more):
        self.asked, self.more, self.silent = [], more, None
        self.compute = {row.device: row.compute_bytes for row in plan.ledger}
        monkeypatch.setattr(memory_check, "_ask", self.ask)

    def ask(self, host, now, plan):
        self.asked.append(memory_check.spec(now, plan))
        return self.silent or MemoryReport(self.sizes(plan))

    def sizes(self, plan):
        rows = [row.weights_bytes + row.kv_bytes + row.staging_bytes + self.compute[row.device] for row in plan.ledger]
        return {"CUDA0": rows[0] + self.more.get("gpu", 0), "Host": rows[1] + self.more.get("ram", 0)}


def begin(host, monkeypatch, first=None, **more):
    decision._decisions[host] = first = first or now()
    return first, Binary(monkeypatch, first.desired.servings[0].plan, **more)


def spilled(decided):
    return len(decided.desired.servings[0].plan.placement.spilled)


def test_a_new_plan_is_to_be_verified(host, monkeypatch):
    first, _ = begin(host, monkeypatch)
    assert first.changes.verify == ("m0",)
    assert first.desired.servings[0].record["verified"] is None


def test_agreement_is_recorded_and_nothing_else_changes(host, monkeypatch):
    first, binary = begin(host, monkeypatch)
    assert memory_check.check_plans(host) is True
    after = decision.decision()
    assert after.desired.servings[0].service.unit_text == first.desired.servings[0].service.unit_text
    assert after.changes.verify == () and len(binary.asked) == 1
    answer = json.loads(after.desired.servings[0].service.plan_json)["verified"]
    assert answer["binary_bytes"] == answer["ledger_bytes"] and answer["rounds"] == 1


def test_the_question_has_the_plan_s_device_and_no_address_of_ours(host, monkeypatch):
    first, binary = begin(host, monkeypatch)
    memory_check.check_plans(host)
    [asked] = binary.asked
    assert asked["environment"]["CUDA_VISIBLE_DEVICES"] == "GPU-0" and asked["gpus"] == ["GPU-0"]
    assert asked["room_bytes"] == (512 + 256) * MIB
    assert asked["command"][0] == f"{first.desired.build.release}/bin/llama-server"
    assert asked["command"][-6:] == ("--host", "127.0.0.1", "--port", "0", "-lv", "4")


def test_what_the_binary_says_is_in_the_unit_that_is_installed(host, monkeypatch):
    first, _ = begin(host, monkeypatch, gpu=3 * GIB)
    assert memory_check.check_plans(host) is True
    after = decision.decision()
    assert spilled(after) > spilled(first)
    assert after.desired.servings[0].service.identity != first.desired.servings[0].service.identity
    assert any("m0: planned again: --override-tensor" in line for line in host.lines)
    staged = service.staging("m0")
    assert staged.files["llama-server-m0.service"] == after.desired.servings[0].service.unit_text
    assert "question.json" not in staged.files


def test_what_does_not_fit_after_all_is_refused_by_name(host, monkeypatch):
    first, _ = begin(host, monkeypatch, ram=64 * GIB)
    assert memory_check.check_plans(host) is False
    [line] = [line for line in host.lines if line.startswith("refused: models: m0")]
    assert "MiB of RAM needed" in line
    assert decision.decision() is first


def installed(decided, **more):
    """The instance as that decision installs it."""
    record = decided.desired.servings[0].record
    return {"m0": dataclasses.replace(INSTANCE, record=PlanRecord.of({**record, **more}))}


def test_the_next_run_remembers_and_does_not_ask(host, monkeypatch):
    begin(host, monkeypatch, gpu=3 * GIB)
    memory_check.check_plans(host)
    after = decision.decision()
    again = now(installed(after))
    assert again.desired.servings[0].plan.argv == after.desired.servings[0].plan.argv
    assert again.desired.servings[0].record == after.desired.servings[0].record
    assert again.changes.verify == ()
    assert again.desired.why == "kept: the same inputs give the installed plan"


def test_another_build_is_asked_anew(host, monkeypatch):
    begin(host, monkeypatch)
    memory_check.check_plans(host)
    again = now(installed(decision.decision()))
    assert again.changes.verify == ()
    rebuilt = dataclasses.replace(RUN, commit="d" * 40)
    again = now(installed(decision.decision()), run=rebuilt)
    assert again.changes.verify == ("m0",)


def test_drift_of_others_memory_changes_no_unit(host, monkeypatch):
    first, _ = begin(host, monkeypatch)
    texts = {now(installed(first), used_mib=used).desired.servings[0].service.unit_text for used in range(0, 256, 15)}
    assert texts == {first.desired.servings[0].service.unit_text}
    without = {now(used_mib=used).desired.servings[0].service.unit_text for used in range(0, 2048, 64)}
    assert len(without) > 1


# --- the same service for another reason ----------------------------------------------------------


def running(decided, key=None, **more):
    """The host on which exactly that runs; `more` is in its record, and `key` is that of other inputs."""
    service, record = decided.desired.servings[0].service, decided.desired.servings[0].record
    more = {"inputs": {**record["inputs"], "key": key}, **more} if key else more
    return {"m0": dataclasses.replace(
        INSTANCE, unit_sha256=sha256(service.unit_text), good_sha256=sha256(service.unit_text), secrets={}, argv=service.argv, exe=service.argv[0],
        preflight=more.get("preflight"), record=PlanRecord.of(json.loads(json.dumps({**record, **more}))),
    )}  # fmt: skip


def test_a_plan_that_the_binary_makes_the_running_one_is_noted_and_not_restarted(host, monkeypatch):
    begin(host, monkeypatch, ram=2 * GIB)
    memory_check.check_plans(host)
    instances = running(decision.decision(), key="of other settings", preflight={"dropped": []})
    decision._decisions[host] = first = now(instances)
    assert first.changes.services["m0"][0] == "its unit differs"  # by the header alone MemoryMax is another
    assert memory_check.check_plans(host) is True
    after = decision.decision()
    assert after.changes.services == {} and after.changes.note == ("m0",)
    [noted] = memory_check.changed_records().values()
    record = json.loads(noted)
    assert record["inputs"]["key"] == after.desired.inputs.keys["m0"] and record["preflight"] == {"dropped": []}
    again = now(running(after, **record))
    assert again.changes.services == {} and again.changes.note == ()


def test_an_answer_that_corrected_nothing_holds_under_other_inputs_too(host, monkeypatch):
    begin(host, monkeypatch)
    memory_check.check_plans(host)
    again = now(running(decision.decision(), key="old"))
    assert again.changes.services == {} and again.desired.servings[0].is_verified
    assert again.desired.servings[0].record["inputs"]["key"] == again.desired.inputs.keys["m0"]


def test_other_inputs_that_give_the_same_service_are_noted_at_once(host, monkeypatch):
    first, _ = begin(host, monkeypatch)
    assert now(running(first, key="old")).changes.note == ("m0",)
    assert now(running(first)).changes.note == ()


# --- where the GPU has no room for the question ---------------------------------------------------

NO_ROOM = MemoryReport(None, "GPU-0 has 700 MiB free", room=False)


def test_without_room_the_question_goes_with_the_switch(host, monkeypatch):
    _, binary = begin(host, monkeypatch, now({"m0": INSTANCE}))
    binary.silent = NO_ROOM
    assert memory_check.check_plans(host) is True
    question = json.loads(service.staging("m0").files["question.json"])
    assert question["devices"] == {"CUDA0": "GPU0"}
    [row, host_row] = decision.decision().desired.servings[0].plan.ledger
    assert question["limits"]["GPU0"] == row.capacity_bytes - row.overhead_bytes - 1024 * MIB
    assert verify.by_device({"CUDA0": 5, "Host": 1, "CPU_REPACK": 2}, question) == {"GPU0": 5, "host": 3}
    assert host_row.device == "host"


def test_without_an_old_server_there_is_nothing_to_stop(host, monkeypatch):
    _, binary = begin(host, monkeypatch)
    binary.silent = NO_ROOM
    memory_check.check_plans(host)
    assert "question.json" not in service.staging("m0").files


def test_what_the_switch_was_told_makes_another_plan(host, monkeypatch):
    first, binary = begin(host, monkeypatch, now({"m0": INSTANCE}), gpu=3 * GIB)
    binary.silent = NO_ROOM
    memory_check.check_plans(host)
    assert memory_check.replan_after_switch(host, "m0", binary.sizes(first.desired.servings[0].plan)) is True
    after = decision.decision()
    assert spilled(after) > spilled(first)
    assert "question.json" in service.staging("m0").files  # the new plan is asked about in the next switch


def test_what_the_switch_was_told_and_no_plan_can_hold_is_refused(host, monkeypatch):
    first, binary = begin(host, monkeypatch, now({"m0": INSTANCE}), ram=64 * GIB)
    binary.silent = NO_ROOM
    memory_check.check_plans(host)
    assert memory_check.replan_after_switch(host, "m0", binary.sizes(first.desired.servings[0].plan)) is False
    assert any(line.startswith("refused: models: m0") for line in host.lines)


def test_after_the_switch_the_same_plan_again_is_refused(host, monkeypatch):
    first, binary = begin(host, monkeypatch, now({"m0": INSTANCE}))
    sizes = binary.sizes(first.desired.servings[0].plan)  # as planned: nothing to correct
    assert memory_check.replan_after_switch(host, "m0", sizes) is False
    assert host.lines[-1] == (
        "refused: models: m0: llama-server needs more memory than its plan has, and no other plan is left"
    )


def test_the_switch_is_tried_again_with_the_new_plan_and_not_for_ever(host, monkeypatch):
    begin(host, monkeypatch, now({"m0": INSTANCE}))
    staged = service.staging("m0")
    tried, replanned = [], []
    monkeypatch.setattr(jobs, "follow", lambda state, host, job, command: tried.append(job))
    monkeypatch.setattr(operations.remote, "run", lambda host, command: (True, ['told: {"CUDA0": 5}'], []))

    def again(host, name, told):
        replanned.append((name, told))
        return True

    monkeypatch.setattr(jobs, "hold", lambda state, host: True)
    monkeypatch.setattr(switching, "turn", lambda *_: contextlib.nullcontext())
    commands = operations.switch_service._inner(lambda: (staged,), again, Handover(("m0",)), OPTIONS)
    _, *results = [command.function(None, host, *command.args) for command in commands if hasattr(command, "function")]
    assert len(tried) == 3 and replanned == [("m0", {"CUDA0": 5})] * 2
    assert results == [True, True, True, True, False]


def test_a_switch_that_fails_for_another_reason_is_not_tried_again(host, monkeypatch):
    begin(host, monkeypatch, now({"m0": INSTANCE}))
    staged = service.staging("m0")
    monkeypatch.setattr(jobs, "follow", lambda state, host, job, command: False)
    monkeypatch.setattr(operations.remote, "run", lambda host, command: (False, [], []))
    monkeypatch.setattr(switching, "turn", lambda *_: contextlib.nullcontext())
    _, command = operations.switch_service._inner(
        lambda: (staged,), lambda host, name, told: pytest.fail("planned again"), Handover(("m0",)), OPTIONS
    )
    assert command.function(None, host, *command.args) is False


def test_a_device_that_the_build_lacks_is_no_fault_of_the_settings():
    line = 'error while handling argument "--device": invalid device: CUDA0'
    assert "--list-devices" in memory_check.way_out(line) and "extra_flags" not in memory_check.way_out(line)
    assert memory_check.way_out("error: invalid argument: --foo") == "see extra_flags and source"
