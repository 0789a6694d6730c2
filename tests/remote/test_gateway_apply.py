"""A gateway's new configuration is put in service, or the old one stays: by a real HAProxy, with systemd played."""

import subprocess
import time

import common
import gateway_admin
import gateway_apply
import pytest
import staged

from llamafleet.fleet import haproxy
from llamafleet.fleet.gateway import Secret
from tasks.lib.templates import render
from tests.fleet.gateways import CLIENT_KEY, SERVER_KEY, Gateway, StandIn, needs_haproxy, server, settings, until

pytestmark = needs_haproxy
UNIT = "# Made by llamafleet\n"


class Host:
    """The folders of a host in a test's, and systemd, which runs one HAProxy."""

    def __init__(self, folder, stand_ins):
        self.stand_ins, self.process, self.told, self.enabled = stand_ins, None, [], False
        self.gateway = Gateway(folder, settings(), [server(one) for one in stand_ins])
        (folder / "gateway" / "current").unlink()
        for old in (folder / "gateway").iterdir():
            subprocess.run(["rm", "-r", old], check=True)
        self.folder = folder

    def staged(self, *stand_ins, **changes):
        """The files of a gateway before these, as an operator's machine sends them: folder and digest."""
        asked = settings(**{"gateway_port": self.gateway.settings.gateway_port,
                            "gateway_stats_port": self.gateway.settings.gateway_stats_port, **changes})  # fmt: skip
        servers = [server(one) for one in stand_ins or self.stand_ins]
        access = haproxy.Access(
            (CLIENT_KEY,), of_servers={(one.host, one.instance): Secret((SERVER_KEY,)) for one in servers}
        )
        files = haproxy.files(render, asked, servers, access)
        folder = self.folder / f"staged {files.digest}"
        folder.mkdir()
        for name, text in {**files.texts, **files.secrets, common.GATEWAY_UNIT: UNIT}.items():
            (folder / name).write_text(self.gateway.local(text))
        return str(folder), files.digest

    def systemctl(self, *words, check=True):
        self.told.append(words[0])
        if words[0] == "kill":
            self.process.send_signal(12)  # SIGUSR2
        elif words[0] == "restart":
            self.stop()
            config = self.folder / "gateway/current/haproxy.cfg"
            with (self.folder / "haproxy.log").open("a") as log:
                self.process = subprocess.Popen(["haproxy", "-W", "-f", config], stdout=log, stderr=log)
            until(lambda: self.gateway.process_number() or self.process.poll() is not None)
            if self.process.poll() is not None:
                raise subprocess.CalledProcessError(1, "systemctl restart")
        elif words[0] == "stop":
            self.stop()
        elif words[0] == "enable":
            self.enabled = True

    def stop(self):
        if self.process:
            self.process.terminate()
            self.process.wait()
            self.process = None

    def is_so(self, verb, unit):
        return self.enabled if verb == "is-enabled" else self.process is not None and self.process.poll() is None

    def asked(self):
        """Who answers six sessions. On a busy machine a stand-in may not answer HAProxy's checks in time."""
        answers = []

        def all_of_them():
            answers[:] = [self.gateway.ask("/tiny/v1/completions", {}, X_Session_Id=str(n)) for n in range(6)]
            return all(status == 200 for status, *_ in answers)

        until(all_of_them)
        return {headers.get("server") for *_, headers in answers}


@pytest.fixture
def host(tmp_path, monkeypatch):
    with StandIn("gpu1") as one, StandIn("gpu2") as two:
        made = Host(tmp_path, (one, two))
        for name in ("GATEWAY", "GATEWAY_RUN", "GATEWAY_SOCKET", "GATEWAY_STATE"):
            monkeypatch.setattr(common, name, made.gateway.local(getattr(common, name)))
        monkeypatch.setattr(common, "UNITS", str(tmp_path))
        monkeypatch.setattr(common, "systemctl", made.systemctl)
        monkeypatch.setattr(staged, "is_so", made.is_so)
        monkeypatch.setattr(gateway_apply, "START_SECONDS", 15.0)
        monkeypatch.setattr(gateway_apply, "journal", lambda: "(the journal)")
        yield made
        made.stop()


def apply(capsys, staged):
    code = gateway_apply.main(["apply", *staged])
    return code, capsys.readouterr().out.strip()


def patient(monkeypatch, host):
    """HAProxy's master hears no signal in its first moments; systemd's would be there long ago."""
    until(lambda: "Loading success" in (host.folder / "haproxy.log").read_text())
    real = host.systemctl

    def again(*words, check=True):
        real(*words, check=check)
        if words[0] == "kill":
            time.sleep(1)
            real(*words, check=check)

    monkeypatch.setattr(common, "systemctl", again)


def test_a_first_configuration_starts_it_and_the_host_starts_it_too(host, capsys):
    folder, digest = host.staged()
    assert apply(capsys, (folder, digest)) == (0, "")
    shown = gateway_apply.show()
    assert (shown["digest"], shown["active"], shown["enabled"]) == (digest, True, True)
    assert list(shown["servers"]["servers"]) == ["gpu1/tiny", "gpu2/tiny"]
    assert shown["unit"] == common.sha256(UNIT.encode())
    assert host.asked() == {"gpu1", "gpu2"}


def test_another_configuration_is_reloaded_and_the_old_one_goes(host, capsys, monkeypatch):
    assert apply(capsys, host.staged())[0] == 0
    patient(monkeypatch, host)
    folder, digest = host.staged(host.stand_ins[0])
    assert apply(capsys, (folder, digest)) == (0, "")
    assert (gateway_apply.show()["digest"], gateway_apply.running()) == (digest, digest)
    assert sorted(one.name for one in (host.folder / "gateway").iterdir()) == sorted([digest, "current"])
    assert host.told.count("restart") == 1 and host.asked() == {"gpu1"}


def test_what_haproxy_refuses_changes_nothing(host, capsys):
    folder, digest = host.staged()
    assert apply(capsys, (folder, digest))[0] == 0
    bad, other = host.staged(gateway_queue_seconds=61)
    with open(f"{bad}/haproxy.cfg", "a") as file:
        file.write("backend x\n    balance by-guess\n")
    code, said = apply(capsys, (bad, other))
    assert code == 1 and "haproxy -c refuses the configuration" in said and "/haproxy.cfg:" in said
    assert gateway_apply.show()["digest"] == digest and not (host.folder / "gateway" / other).exists()
    assert host.told.count("kill") == 0 and host.asked() == {"gpu1", "gpu2"}


def test_where_it_does_not_run_with_the_new_one_the_old_one_is_back(host, capsys, monkeypatch):
    """A port that another program has is not seen by `haproxy -c`."""
    folder, digest = host.staged()
    assert apply(capsys, (folder, digest))[0] == 0
    patient(monkeypatch, host)
    code, said = apply(capsys, host.staged(gateway_port=host.stand_ins[0].server_port))
    assert code == 1 and said.endswith("the gateway runs with the configuration that it had"), said
    assert gateway_apply.show()["digest"] == gateway_apply.running() == digest
    assert host.asked() == {"gpu1", "gpu2"}


def test_where_a_first_one_does_not_run_nothing_is_left(host, capsys):
    code, said = apply(capsys, host.staged(gateway_port=host.stand_ins[0].server_port))
    assert code == 1 and "it had no configuration before" in said
    assert list((host.folder / "gateway").iterdir()) == [] and not host.enabled


def test_a_drain_lives_through_it(host, capsys, monkeypatch):
    monkeypatch.setattr(gateway_admin, "schedule", lambda name, seconds: None)
    assert apply(capsys, host.staged())[0] == 0
    patient(monkeypatch, host)
    assert gateway_admin.main(["drain", "gpu1/tiny"]) == 0
    capsys.readouterr()
    code, said = apply(capsys, host.staged(gateway_queue_seconds=61))
    assert code == 0 and "note: gpu1/tiny is drained, for" in said
    assert host.asked() == {"gpu2"}


def test_a_server_that_gets_nothing_is_told_with_the_reason(host, capsys):
    host.stand_ins[0].key = "another-key-00000000000"
    code, said = apply(capsys, host.staged())
    assert code == 0 and said.startswith("note: gpu1/tiny gets no requests: L7STS 401") and "api_key_file" in said


@pytest.mark.parametrize(
    ("version", "said"), [(None, "HAProxy is not installed"), ("1.8.27", "2.4 or later is needed")]
)
def test_without_a_haproxy_that_can_it_is_refused(host, capsys, monkeypatch, version, said):
    monkeypatch.setattr(gateway_apply, "version", lambda: version)
    assert said in apply(capsys, host.staged())[1]
    assert not (host.folder / "gateway/current").exists()


def test_the_version_is_read(monkeypatch):
    monkeypatch.setattr(gateway_apply, "output_of", lambda _: "HA-Proxy version 2.4.22-0ubuntu0 2023/08/14\n")
    assert gateway_apply.version() == "2.4.22-0ubuntu0"
