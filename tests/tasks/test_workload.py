"""`llamafleet workload` on a host: the survey's instances, the program's answer, and what the inventory has."""

import json
import types

import pytest

from llamafleet.host import answers
from tasks import workload
from tasks.lib import facts, remote, sending
from tests import planning

FIGURES = {"mean": 870.4, "p10": 1, "p50": 640, "p90": 2100, "p99": 9000, "max": 9999}
FOUND = {"since": 1.0, "until": 2.0, "requests": 100, "cut_short": 0, "checks": 1, "prompt_tokens": FIGURES,
         "reply_tokens": FIGURES, "live_tokens": FIGURES, "concurrency": {**FIGURES, "p90": 4}}  # fmt: skip


@pytest.fixture
def host(monkeypatch):
    """A host with two instances, one of which the inventory names; `asked` has what ran there."""
    host = types.SimpleNamespace(name="gpu1", data=types.SimpleNamespace(dict=dict), asked=[], printed=None)
    record = types.SimpleNamespace(gate=types.SimpleNamespace(slots=4))
    there = {name: types.SimpleNamespace(record=record) for name in ("chat", "old")}
    settings = planning.settings({"name": "chat", "prompt_tokens": 2048, "concurrency": 1})
    host.installed = types.SimpleNamespace(instances=there)
    monkeypatch.setattr(workload.Settings, "from_data", lambda data: settings)
    monkeypatch.setattr(facts, "survey", lambda *_, **__: types.SimpleNamespace(installed=host.installed))

    def run_helper(host, name, *arguments, **_):
        host.asked.append((name, *arguments))
        if isinstance(host.printed, Exception):
            raise host.printed
        return host.printed or (True, [json.dumps({one: FOUND for one in arguments[1:]})], [])

    monkeypatch.setattr(sending, "run_helper", run_helper)
    return host


def test_every_instance_is_asked_for_and_stands_beside_the_inventory(host):
    found = workload.look("yesterday", host)
    assert host.asked == [("workload.py", "yesterday", "chat", "old")]
    assert found.problem == "" and set(found.instances) == {"chat", "old"}
    chat = found.instances["chat"]
    assert chat.fitting.settings == {"prompt_tokens": 870, "live_tokens": 870, "reply_tokens": 870, "concurrency": 4}
    assert chat.now["prompt_tokens"] == 2048 and found.instances["old"].now == {}
    assert chat.fitting.remarks[0].startswith("all 4 slots were often busy")


def test_a_host_without_instances_is_not_asked(host):
    host.installed.instances = {}
    assert workload.look("yesterday", host).problem == "has no instance" and host.asked == []


@pytest.mark.parametrize(
    ("printed", "said"),
    [
        ((False, [], ["error: journalctl: Failed to parse timestamp: soon"]), "Failed to parse timestamp: soon"),
        ((True, ['{"chat": {"since": "x"}}'], []), "workload.py on the host: answer"),
        (remote.RemoteError("gone"), "gone"),
    ],
)
def test_what_goes_wrong_there_is_a_sentence(host, printed, said):
    host.printed = printed
    assert said in workload.look("soon", host)


def test_the_exit_status_says_whether_all_hosts_could_be_read(host, monkeypatch, capsys):
    shown = workload.look("yesterday", host)
    for states, status in (({"gpu1": shown}, 0), ({"gpu1": shown, "gpu2": "cannot be reached"}, 1)):
        monkeypatch.setattr(workload, "over_hosts", lambda *_, states=states: states)
        assert workload.main(["fleet.py", "--json", "--since", "yesterday"]) == status
        assert set(json.loads(capsys.readouterr().out)) == set(states)
    assert answers.observed(json.dumps({"chat": FOUND}))["chat"] == shown.instances["chat"].observed
