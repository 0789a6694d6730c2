"""The stage before the switch, offline: a host with a GPU, and a binary that counts otherwise than the ledger."""

import dataclasses
import json

import pytest
from pyinfra.context import ctx_host

from llamafleet.build.release import Build
from llamafleet.hub import source as published
from llamafleet.planner.reconcile import Answer
from llamafleet.remote import verify
from llamafleet.service.changes import sha256
from tasks import service
from tasks.lib import decision as situation
from tasks.lib import facts, jobs, operations
from tasks.lib import memory_check as asking
from tasks.lib.examined import Examined
from tasks.lib.lookups import Model
from tests import planning
from tests.planning import MIB
from tests.service.test_changes import FOUND, INSTANCE

GIB = 1024 * MIB


class Host:
    """What the stage needs of pyinfra's: a name for the situation and a place to log."""

    def __init__(self):
        self.said = []

    def log(self, text, *_):
        self.said.append(text)

    def log_styled(self, text, **_):
        self.said.append(text)


def build():
    return Build(commit="c" * 40, backend="cuda", toolkit=None, architectures=(), machine_arch="x86_64", libc="2.41",
                 cpu_flags=(), kv_types=("f16",), ui=False, tls=False)  # fmt: skip


def now(instances=None, used_mib=0, **asked):
    """The situation of a host with one RTX 4090 and gpt-oss-120b, with what is installed there."""
    settings = planning.settings({"context_tokens": 32768, **asked})
    survey = facts.Survey(
        planning.machine([{"used_by_others_mib": used_mib}]), dataclasses.replace(FOUND, instances=instances or {})
    )
    file = published.RemoteFile("m.gguf", "https://x/y", 5, "a" * 64)
    model = Model((file,), planning.header("gpt-oss-120b"))
    examined = Examined(settings, survey, "cuda", (model,), {"m0": "key"})
    return situation._situation(examined, examined.choice, build(), None, examined.corrections(), {})


@pytest.fixture
def host(monkeypatch):
    one = Host()
    monkeypatch.setattr(situation, "_situations", {})
    monkeypatch.setattr(situation, "_guard", {one: situation.RLock()})
    with ctx_host.use(one):
        yield one


class Binary:
    """The host's llama-server: it counts as the ledger does by the header alone, and so much more."""

    def __init__(self, monkeypatch, plan, **more):
        self.asked, self.more, self.silent = [], more, None
        self.compute = {row.device: row.compute_bytes for row in plan.ledger}
        monkeypatch.setattr(asking, "_ask", self.ask)

    def ask(self, host, now, plan):
        self.asked.append(asking.spec(now, plan))
        return self.silent or Answer(self.told(plan))

    def told(self, plan):
        sizes = [row.weights_bytes + row.kv_bytes + row.staging_bytes + self.compute[row.device] for row in plan.ledger]
        return {"CUDA0": sizes[0] + self.more.get("gpu", 0), "Host": sizes[1] + self.more.get("ram", 0)}


def begin(host, monkeypatch, found=None, **more):
    situation._situations[host] = first = found or now()
    return first, Binary(monkeypatch, first.servings[0].plan, **more)


def spilled(found):
    return len(found.servings[0].plan.placement.spilled)


def test_a_new_plan_is_to_be_verified(host, monkeypatch):
    first, _ = begin(host, monkeypatch)
    assert [one.instance.name for one in first.to_verify()] == ["m0"]
    assert first.servings[0].record["verified"] is None


def test_agreement_is_recorded_and_nothing_else_changes(host, monkeypatch):
    first, binary = begin(host, monkeypatch)
    assert asking.agree(host) is True
    after = situation.situation()
    assert after.servings[0].service.unit_text == first.servings[0].service.unit_text
    assert after.to_verify() == () and len(binary.asked) == 1
    said = json.loads(after.servings[0].service.plan_json)["verified"]
    assert said["binary_bytes"] == said["ledger_bytes"] and said["rounds"] == 1


def test_the_question_has_the_plan_s_device_and_no_address_of_ours(host, monkeypatch):
    _, binary = begin(host, monkeypatch)
    asking.agree(host)
    [asked] = binary.asked
    assert asked["environment"]["CUDA_VISIBLE_DEVICES"] == "GPU-0" and asked["gpus"] == ["GPU-0"]
    assert asked["room_bytes"] == (512 + 256) * MIB
    assert asked["command"][0] == f"{build().release}/bin/llama-server"
    assert asked["command"][-6:] == ("--host", "127.0.0.1", "--port", "0", "-lv", "4")


def test_what_the_binary_says_is_in_the_unit_that_is_installed(host, monkeypatch):
    first, _ = begin(host, monkeypatch, gpu=3 * GIB)
    assert asking.agree(host) is True
    after = situation.situation()
    assert spilled(after) > spilled(first)
    assert after.servings[0].service.identity != first.servings[0].service.identity
    assert any("m0: planned again: --override-tensor" in line for line in host.said)
    staged = service.staging("m0")
    assert staged.files["llama-server-m0.service"] == after.servings[0].service.unit_text
    assert "question.json" not in staged.files


def test_what_does_not_fit_after_all_is_refused_by_name(host, monkeypatch):
    first, _ = begin(host, monkeypatch, ram=64 * GIB)
    assert asking.agree(host) is False
    [line] = [line for line in host.said if line.startswith("refused: models: m0")]
    assert "MiB of RAM needed" in line
    assert situation.situation() is first


def installed(found, **more):
    """The instance as that situation would have installed it."""
    record = found.servings[0].record
    return {"m0": dataclasses.replace(INSTANCE, record={**record, **more})}


def test_the_next_run_remembers_and_does_not_ask(host, monkeypatch):
    begin(host, monkeypatch, gpu=3 * GIB)
    asking.agree(host)
    after = situation.situation()
    again = now(installed(after))
    assert again.servings[0].plan.argv == after.servings[0].plan.argv
    assert again.servings[0].record == after.servings[0].record
    assert again.to_verify() == ()
    assert again.why == "kept: the same inputs give the installed plan"


def test_another_build_is_asked_anew(host, monkeypatch):
    begin(host, monkeypatch)
    asking.agree(host)
    monkeypatch.setattr(situation, "command", lambda build, *_: ["/opt/another/bin/llama-server"])
    again = now(installed(situation.situation()))
    assert [one.instance.name for one in again.to_verify()] == ["m0"]


def test_drift_of_others_memory_changes_no_unit(host, monkeypatch):
    first, _ = begin(host, monkeypatch)
    texts = {now(installed(first), used_mib=used).servings[0].service.unit_text for used in range(0, 256, 15)}
    assert texts == {first.servings[0].service.unit_text}
    without = {now(used_mib=used).servings[0].service.unit_text for used in range(0, 2048, 64)}
    assert len(without) > 1


# --- the same service for another reason ----------------------------------------------------------


def running(found, **more):
    """The host on which exactly that runs; `more` is in its record."""
    service, record = found.servings[0].service, found.servings[0].record
    return {"m0": dataclasses.replace(
        INSTANCE, unit_sha256=sha256(service.unit_text), good_sha256=sha256(service.unit_text), secrets={}, argv=service.argv, exe=service.argv[0],
        record=json.loads(json.dumps({**record, **more})),
    )}  # fmt: skip


def test_a_plan_that_the_binary_makes_the_running_one_is_noted_and_not_restarted(host, monkeypatch):
    begin(host, monkeypatch, ram=2 * GIB)
    asking.agree(host)
    instances = running(situation.situation(), inputs={"key": "of other settings"}, preflight={"dropped": []})
    situation._situations[host] = first = now(instances)
    assert first.work.services["m0"] == ("its unit differs",)  # by the header alone MemoryMax is another
    assert asking.agree(host) is True
    after = situation.situation()
    assert after.work.services == {} and [one.instance.name for one in after.to_note()] == ["m0"]
    [noted] = asking.records().values()
    told = json.loads(noted)
    assert told["inputs"]["key"] == "key" and told["preflight"] == {"dropped": []}
    again = now(running(after, **told))
    assert again.work.services == {} and again.to_note() == ()


def test_an_answer_that_corrected_nothing_holds_under_other_inputs_too(host, monkeypatch):
    begin(host, monkeypatch)
    asking.agree(host)
    again = now(running(situation.situation(), inputs={"key": "old"}))
    assert again.work.services == {} and again.servings[0].is_verified
    assert again.servings[0].record["inputs"]["key"] == "key"


def test_other_inputs_that_give_the_same_service_are_noted_at_once(host, monkeypatch):
    first, _ = begin(host, monkeypatch)
    assert [one.instance.name for one in now(running(first, inputs={"key": "old"})).to_note()] == ["m0"]
    assert now(running(first)).to_note() == ()


# --- where the GPU has no room for the question ---------------------------------------------------

NO_ROOM = Answer(None, "GPU-0 has 700 MiB free", room=False)


def test_without_room_the_question_goes_with_the_switch(host, monkeypatch):
    _, binary = begin(host, monkeypatch, now({"m0": INSTANCE}))
    binary.silent = NO_ROOM
    assert asking.agree(host) is True
    question = json.loads(service.staging("m0").files["question.json"])
    assert question["devices"] == {"CUDA0": "GPU0"}
    [row, host_row] = situation.situation().servings[0].plan.ledger
    assert question["limits"]["GPU0"] == row.capacity_bytes - row.overhead_bytes - 1024 * MIB
    assert verify.by_device({"CUDA0": 5, "Host": 1, "CPU_REPACK": 2}, question) == {"GPU0": 5, "host": 3}
    assert host_row.device == "host"


def test_without_an_old_server_there_is_nothing_to_stop(host, monkeypatch):
    _, binary = begin(host, monkeypatch)
    binary.silent = NO_ROOM
    asking.agree(host)
    assert "question.json" not in service.staging("m0").files


def test_what_the_switch_was_told_makes_another_plan(host, monkeypatch):
    first, binary = begin(host, monkeypatch, now({"m0": INSTANCE}), gpu=3 * GIB)
    binary.silent = NO_ROOM
    asking.agree(host)
    assert asking.agree_with(host, "m0", binary.told(first.servings[0].plan)) is True
    after = situation.situation()
    assert spilled(after) > spilled(first)
    assert "question.json" in service.staging("m0").files  # the new plan is asked about in the next switch


def test_what_the_switch_was_told_and_no_plan_can_hold_is_refused(host, monkeypatch):
    first, binary = begin(host, monkeypatch, now({"m0": INSTANCE}), ram=64 * GIB)
    binary.silent = NO_ROOM
    asking.agree(host)
    assert asking.agree_with(host, "m0", binary.told(first.servings[0].plan)) is False
    assert any(line.startswith("refused: models: m0") for line in host.said)


def test_the_switch_is_tried_again_with_the_new_plan_and_not_for_ever(host, monkeypatch):
    begin(host, monkeypatch, now({"m0": INSTANCE}))
    staged = service.staging("m0")
    tried, replanned = [], []
    monkeypatch.setattr(jobs, "follow", lambda state, host, job, command: tried.append(job))
    monkeypatch.setattr(operations.remote, "run", lambda host, command: (True, ['told: {"CUDA0": 5}'], []))

    def again(host, told):
        replanned.append(told)
        return True

    results = [command.function(None, host, *command.args) for command in
               operations.switch_service._inner(lambda: staged, again) if hasattr(command, "function")]  # fmt: skip
    assert len(tried) == 3 and replanned == [{"CUDA0": 5}] * 2
    assert results == [True, True, True, True, False]


def test_a_switch_that_fails_for_another_reason_is_not_tried_again(host, monkeypatch):
    begin(host, monkeypatch, now({"m0": INSTANCE}))
    staged = service.staging("m0")
    monkeypatch.setattr(jobs, "follow", lambda state, host, job, command: False)
    monkeypatch.setattr(operations.remote, "run", lambda host, command: (False, [], []))
    [command] = operations.switch_service._inner(lambda: staged, lambda host, told: pytest.fail("planned again"))
    assert command.function(None, host, *command.args) is False
