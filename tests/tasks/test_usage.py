"""What a run says at its end of the instances that it installed."""

import json
import types

from llamafleet.host.answers import Gate, LiveInstance
from llamafleet.host.left import Left
from llamafleet.planner.roofline import Prediction
from tasks.lib import remote, usage
from tests import planning
from tests.service.test_desired import decided
from tests.tasks.test_certificates import make


class Host:
    """Logs into `lines`."""

    name = "@ssh/box1"
    print_prefix = ""

    def __init__(self, **data):
        self.data, self.lines, self.groups, self.state = data, [], ["gateway"], types.SimpleNamespace(inventory=[self])

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


REBOOT = Left(reboot="packages want a reboot (/run/reboot-required)")


def left(monkeypatch, found, **models):
    """What is logged at the end of a run of what is left to do, where the host's program says this."""
    asked = []

    def run_json(host, command, read):
        asked.append(json.loads(command.words[-1]))
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(remote, "run_json", run_json)
    host, desired = Host(), decided(**({"models": (models,)} if models else {}))
    assert usage._tell_left(host, desired) is True
    return asked, host.lines


def test_what_is_left_to_do_is_read_at_the_end_and_logged(monkeypatch):
    asked, lines = left(monkeypatch, REBOOT, listen="10.0.0.7", allow_unauthenticated=True, port=8080)
    assert asked[0]["ports"] == [8080] and "/var/lib/llamafleet/models" in asked[0]["paths"]
    assert lines == ["left to do: reboot the host: packages want a reboot (/run/reboot-required)"]
    assert left(monkeypatch, Left())[1] == []


def test_a_certificate_that_ends_soon_is_left_to_do(monkeypatch, tmp_path):
    certificate, key = make(tmp_path, begins=-300, ends=5.5)
    _, lines = left(monkeypatch, Left(), tls_certificate_file=certificate, tls_key_file=key)
    assert len(lines) == 1 and lines[0].startswith(
        f"left to do: models: m0: tls_certificate_file: {certificate} ends on"
    )


def test_a_host_that_cannot_say_what_is_left_has_not_failed(monkeypatch):
    assert left(monkeypatch, remote.RemoteError("gone"))[1] == ["what is left to do cannot be read: gone"]
