"""Files are served while the run that asked for it holds the host's lock, and no longer. systemd is played; nginx's own part
is tried in tests/fleet/test_site_server.py."""

import hashlib
import json
import os
import socket
import subprocess
import threading

import lock
import pieces
import pytest
import share

from tests.serving import Server, serving

RUN, BODY = "3f0e", b"GGUF" * 1000
SHA = hashlib.sha256(BODY).hexdigest()
SECRETS = {"nginx.conf": "daemon off;", "certificate": "C", "key": "a private key"}


class Systemd:
    """Notes commands; a unit that was started is active until it is stopped."""

    def __init__(self):
        self.told, self.active, self.secrets = [], set(), {}

    def run(self, words, check=False, **_):
        self.told.append(words)
        if words[0] == "systemd-run":
            [unit] = [word.partition("=")[2] for word in words if word.startswith("--unit=")]
            self.active.add(unit)
            for word in words:
                if word.startswith("--property=LoadCredential="):
                    name, _, path = word.split("=", 2)[2].partition(":")
                    with open(path) as file:
                        self.secrets[name] = (file.read(), os.stat(path).st_mode & 0o777)
        else:
            self.active.discard(words[2])
        return subprocess.CompletedProcess(words, 0)

    def show(self, unit, *_):
        return {"ActiveState": "active" if unit in self.active else "inactive"}


@pytest.fixture
def systemd(monkeypatch, tmp_path):
    made = Systemd()
    monkeypatch.setattr(share.subprocess, "run", made.run)
    monkeypatch.setattr(share, "show", made.show)
    monkeypatch.setattr(share, "RUN", str(tmp_path / "run"))
    monkeypatch.setattr(share, "LISTS", str(tmp_path / "run" / "share"))
    monkeypatch.setattr(share, "NGINX", "/bin/true")
    monkeypatch.setattr(share, "START_SECONDS", 0.5)
    return made


@pytest.fixture
def asked(tmp_path):
    """What an operator's machine asks for; the port listens."""
    path = tmp_path / "x.gguf"
    path.write_bytes(BODY)
    with serving(Server()) as listening:
        file = {"path": str(path), "sha256": SHA, "size_bytes": len(BODY)}
        yield {
            "run": RUN,
            "address": "127.0.0.1",
            "port": listening.server_port,
            "allowed": ["10.0.0.2", "fd00::2"],
            "files": [file],
        }


def serve(tmp_path, spec):
    for name, content in (("spec", spec), ("secret", SECRETS)):
        (tmp_path / name).write_text(json.dumps(content))
    return share.main(["serve", str(tmp_path / "spec"), str(tmp_path / "secret")])


def started(systemd):
    return [word.partition("=")[2] for words in systemd.told for word in words if word.startswith("--unit=")]


def test_a_file_is_listed_and_the_server_started_once_for_a_run(systemd, asked, tmp_path):
    assert serve(tmp_path, asked) == 0
    listed = (tmp_path / "run/share" / f"{SHA}.pieces").read_bytes()
    assert pieces.read(listed, SHA, len(BODY)) == [SHA]
    assert started(systemd) == [share.WATCHER, share.SERVER]
    assert serve(tmp_path, asked) == 0
    assert len(started(systemd)) == 2
    assert serve(tmp_path, {**asked, "run": "another"}) == 0
    assert len(started(systemd)) == 4


def test_the_server_starts_again_where_it_gets_more_files(systemd, asked, tmp_path, monkeypatch):
    assert serve(tmp_path, asked) == 0
    monkeypatch.setitem(SECRETS, "nginx.conf", "daemon off; # more")
    assert serve(tmp_path, asked) == 0
    assert len(started(systemd)) == 4
    assert (tmp_path / "run/share" / f"{SHA}.pieces").exists()


def test_what_is_secret_is_with_systemd_alone_when_the_server_runs(systemd, asked, tmp_path):
    assert serve(tmp_path, asked) == 0
    assert systemd.secrets == {name: (text, 0o600) for name, text in SECRETS.items()}
    assert sorted(os.listdir(tmp_path / "run")) == ["share"]
    assert SECRETS["key"] not in " ".join(word for words in systemd.told for word in words)


def test_the_server_ends_with_its_watcher_and_answers_hosts_of_the_site_alone(systemd, asked, tmp_path):
    serve(tmp_path, asked)
    words = systemd.told[-1]
    for needed in (f"BindsTo={share.WATCHER}", "DynamicUser=yes", "IPAddressDeny=any",
                   "IPAddressAllow=10.0.0.2", "IPAddressAllow=fd00::2", "CapabilityBoundingSet="):  # fmt: skip
        assert f"--property={needed}" in words
    assert words[-3:] == ["/bin/true", "-c", "/run/credentials/llamafleet-share.service/nginx.conf"]


def test_a_damaged_file_is_not_served_and_others_are(systemd, asked, tmp_path, capsys):
    other = tmp_path / "other.gguf"
    other.write_bytes(b"rotten")
    asked["files"].insert(0, {"path": str(other), "sha256": "0" * 64, "size_bytes": 6})
    asked["files"].insert(0, {"path": str(tmp_path / "gone.gguf"), "sha256": "1" * 64, "size_bytes": 6})
    assert serve(tmp_path, asked) == 0
    said = capsys.readouterr().out
    assert f"note: {other} is damaged, and not served" in said
    assert "gone.gguf is not served: No such file" in said
    assert sorted(os.listdir(tmp_path / "run/share")) == sorted([f"{SHA}.pieces", "run.json"])


def test_a_server_that_does_not_answer_is_an_error_with_the_way_out(systemd, asked, tmp_path, capsys):
    with serving(Server()) as gone:
        port = gone.server_port
    assert serve(tmp_path, {**asked, "port": port}) == 1
    assert (
        capsys.readouterr().out.splitlines()[-1].startswith(f"error: nginx does not answer at port {port}: journalctl")
    )


def test_a_host_without_nginx_says_so(systemd, asked, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(share, "NGINX", str(tmp_path / "no-nginx"))
    assert serve(tmp_path, asked) == 1
    assert capsys.readouterr().out.splitlines()[-1].endswith("is not there: install the package nginx")
    assert systemd.told == []


@pytest.mark.parametrize("how", ["released", "taken", "lost"])
def test_the_watcher_ends_when_its_run_no_longer_holds_the_lock(monkeypatch, tmp_path, how):
    path = str(tmp_path / "lock.json")
    read = lock.read
    monkeypatch.setattr(share.lock, "read", lambda: read(path))
    monkeypatch.setattr(share, "WATCH_SECONDS", 0.02)
    lock.write({"run": RUN, "lease_seconds": 1.0 if how == "lost" else 60.0}, path)
    watching = threading.Thread(target=share.watch, args=(RUN,), daemon=True)
    watching.start()
    watching.join(0.2)
    assert watching.is_alive()
    if how == "released":
        lock.release(RUN, path)
    elif how == "taken":
        lock.write({"run": "another"}, path)
    watching.join(10)
    assert not watching.is_alive()


def test_the_end_stops_both_units(systemd, asked, tmp_path):
    serve(tmp_path, asked)
    assert share.main(["end"]) == 0
    assert systemd.active == set()
    assert not (tmp_path / "run/share/run.json").exists()


def test_a_host_is_reached_where_it_answers_or_refuses_and_not_where_nothing_comes_back(monkeypatch, capsys):
    with serving(Server()) as listening:
        port = listening.server_port
        connect = socket.create_connection

        def create(address, timeout):
            if address[0] == "10.0.0.9":
                raise TimeoutError
            return connect(address, timeout)

        monkeypatch.setattr(share.socket, "create_connection", create)
        assert share.main(["apart", str(port), "10.0.0.9", "127.0.0.1"]) == 0
    assert share.main(["apart", str(port), "127.0.0.1", "10.0.0.9"]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [{"apart": ["10.0.0.9"]}] * 2


def test_a_file_is_read_again_for_every_run(systemd, asked, tmp_path):
    """A list shows what the file was when it was made."""
    assert serve(tmp_path, asked) == 0
    (tmp_path / "x.gguf").write_bytes(b"rotten")
    assert serve(tmp_path, {**asked, "run": "another"}) == 0
    assert os.listdir(tmp_path / "run/share") == ["run.json"]


def test_a_server_of_another_address_is_not_taken_for_this_one(systemd, asked, tmp_path):
    """Hosts on one machine see each other's sockets."""
    assert share.listens("127.0.0.1", asked["port"])
    assert not share.listens("127.0.0.2", asked["port"])
    assert serve(tmp_path, {**asked, "address": "127.0.0.2"}) == 1
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as listening:
        assert share.listens("::1", listening.getsockname()[1])
