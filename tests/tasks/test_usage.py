"""What a run says at its end of the instances that it installed."""

import types

from llamafleet.host.answers import Gate, LiveInstance
from llamafleet.planner.roofline import Prediction
from tasks.lib import remote, usage
from tests import planning


class Host:
    """Logs into `lines`."""

    name = "@ssh/box1"
    print_prefix = ""

    def __init__(self, **data):
        self.data, self.lines = data, []

    def log(self, text, *_):
        self.lines.append(text)


def serving():
    plan = types.SimpleNamespace(predicted=Prediction(12.0, 72.0))
    instance = planning.settings({"name": "chat", "listen": "0.0.0.0", "allow_unauthenticated": True}).models[0]
    return types.SimpleNamespace(name="chat", instance=instance, plan=plan)


def told(monkeypatch, host, live):
    def run_json(host, command, read):
        if isinstance(live, Exception):
            raise live
        return live

    monkeypatch.setattr(remote, "run_json", run_json)
    assert usage._tell(host, (serving(),)) is True
    return host.lines


def test_the_address_and_what_was_measured_are_logged(monkeypatch):
    gate = Gate(True, decode_tokens_per_s=30.0, record={"prompt_tokens_per_s": 150.0})
    live = {"chat": LiveInstance(None, None, {}, "", gate)}
    lines = told(monkeypatch, Host(), live)
    assert lines[0] == "chat serves at http://box1:9000" and "curl" in lines[1]
    assert lines[2] == "chat, measured: 30 tokens/s written, 150 read; predicted were 12 and 72"


def test_a_host_that_cannot_be_asked_any_more_has_not_failed(monkeypatch):
    lines = told(monkeypatch, Host(ssh_hostname="10.0.0.9"), remote.RemoteError("gone"))
    assert lines[0].endswith("gone") and lines[1] == "chat serves at http://10.0.0.9:9000" and len(lines) == 3
