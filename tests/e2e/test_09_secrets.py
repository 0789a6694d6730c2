"""A deploy with an API key and a Hub token: neither is found anywhere but where it belongs. Every search is shown
to find what is planted for it."""

import base64
import contextlib
import os
import shlex
import shutil
import subprocess
import threading
import time
from pathlib import Path

import psutil
import pytest

from sandbox import models
from tests.e2e.deploying import ROOT, ask, command, environment, main_pid, on, pyinfra, serves

KEY, NEW_KEY = "sk-e2e-f0e1d2c3b4a59687", "sk-e2e-00112233445566778"
NAME = "guarded"
SAMPLED = "/root/sampled"
# Distinct arguments and environments of every process, as fast as it goes.
SAMPLER = f"""
import os, time
seen = set()
with open({SAMPLED!r}, "a") as out:
    while True:
        for pid in filter(str.isdigit, os.listdir("/proc")):
            for name in ("cmdline", "environ"):
                try:
                    with open("/proc/" + pid + "/" + name, "rb") as file:
                        text = file.read()
                except OSError:
                    continue
                if text and text not in seen:
                    seen.add(text)
                    out.write(repr(text) + "\\n")
                    out.flush()
        time.sleep(0.005)
"""
# Where a deploy writes, or somebody might look. Not the devices, nor /proc, which is sampled.
SEARCHED = ["/etc", "/home", "/opt", "/root", "/run", "/tmp", "/usr/local", "/var"]


@pytest.fixture(scope="module")
def host(hosts):
    return hosts[2]


@pytest.fixture
def key_file(tmp_path):
    path = tmp_path / "api-keys"
    path.write_text(f"# of the tests\n{KEY}\r\n")
    path.chmod(0o600)
    return path


@pytest.fixture
def asked(outside, settings, host, key_file):
    """Two instances, one of them guarded."""

    def make(**guarded):
        common = {"source": outside.sources["dense"], "listen": host.address, "context_tokens": 1024}
        two = [{"name": NAME, "port": 8080, "api_key_file": str(key_file), **common, **guarded},
               {"name": "open", "port": 8081, **common}]  # fmt: skip
        return settings(host, models=two)

    return make


class Beside:
    """Works in a thread of its own until the end of the block, which sets `_ended`."""

    def __init__(self):
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        self._thread.join()

    def _work(self):
        raise NotImplementedError


class Watcher(Beside):
    """What the operator's processes show of themselves, and the texts of their temporary files, until the end
    of the block."""

    def __init__(self, pid, folder):
        super().__init__()
        self.process, self.folder, self.seen = psutil.Process(pid), folder, {}

    def _work(self):
        while not self._ended.wait(0.005):
            try:
                children = self.process.children(recursive=True)
            except psutil.NoSuchProcess:
                children = []
            own = self._read(f"/proc/{self.process.pid}/cmdline")
            for child in children:
                # A child that is not yet another program still has the environment that this test gave.
                if self._read(f"/proc/{child.pid}/cmdline") not in (own, b""):
                    self._read(f"/proc/{child.pid}/environ")
            for path in self.folder.rglob("*"):
                self._read(path)

    def _read(self, path):
        text = b""
        with contextlib.suppress(OSError):  # it has ended, or is gone
            text = Path(path).read_bytes()
            self.seen.setdefault(str(path), set()).add(text)
        return text

    def where(self, secret):
        return [path for path, texts in self.seen.items() if any(secret.encode() in text for text in texts)]


def noting_environments(program, folder, noted):
    """A folder for $PATH where this program notes the environment that it was given, each time in a file of its own."""
    folder.mkdir()
    noted.mkdir()
    (folder / program).write_text(f'#!/bin/sh\ncat /proc/$$/environ >{noted}/$$ && exec {shutil.which(program)} "$@"\n')
    (folder / program).chmod(0o755)
    return folder


def found_on(host, *secrets):
    """The files of the host that have one of these, and the lines of its journal."""
    patterns = "".join(f"{secret}\n" for secret in secrets)
    listed = host.run(["grep", "-rlaFs", "--devices=skip", "-f", "-", *SEARCHED], input=patterns).stdout
    # With all fields, among them every command line that systemd has seen.
    journal = on(host, "journalctl", "--no-pager", "--output=export", "--all")
    files = {path for path in listed.split() if not path.startswith(("/var/log/journal/", "/run/log/journal/"))}
    return files, [line for line in journal.splitlines() if any(secret in line for secret in secrets)]


def until(true, what, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def as_sent(text):
    """A part of what goes to the host's standard input, which nobody else sees either."""
    return base64.b64encode(text.encode()).decode()[4:-4]


def sampled(host, text):
    return host.run(["grep", "-caF", "-f", "-", SAMPLED], input=text + "\n").stdout.strip() not in ("", "0")


@pytest.fixture
def sampler(host):
    on(host, "rm", "-f", SAMPLED)
    # By a file: the sampler's own arguments shall show nothing.
    host.run(["sh", "-c", "cat > /root/sampler.py"], input=SAMPLER, check=True)
    on(host, "systemd-run", "--quiet", "--unit=sampler", "python3", "/root/sampler.py")
    yield
    on(host, "systemctl", "stop", "sampler")
    on(host, "rm", "-f", SAMPLED, "/root/sampler.py")


def plant(host):
    """One canary for each kind of place; returns them."""
    plants = {
        "argument": ["systemd-run", "--quiet", "--unit=plant-argument", "sh", "-c", "sleep 300 # canary-in-argument"],
        "environment": ["systemd-run", "--quiet", "--unit=plant-environment", "--setenv=P=canary-in-environment",
                        "sleep", "300"],
        "journal": ["logger", "canary-in-journal"],
        "file": ["sh", "-c", "echo canary-in-file > /tmp/plant"],
    }  # fmt: skip
    for words in plants.values():
        on(host, *words)
    return {kind: f"canary-in-{kind}" for kind in plants}


def uproot(host):
    on(host, "systemctl", "stop", "plant-argument", "plant-environment")
    on(host, "rm", "-f", "/tmp/plant")


def test_no_secret_is_left_or_shown_during_a_deploy(outside, asked, inventory, host, sampler, tmp_path):
    outside.hub.add("acme/gated-GGUF", "secret.gguf", models.tiny(tmp_path, seed=11), gated=True)
    token, temporary = outside.hub.token, tmp_path / "tmp"
    temporary.mkdir()
    canaries = plant(host)
    try:
        for kind in ("argument", "environment"):
            until(lambda kind=kind: sampled(host, canaries[kind]), f"the sampler does not see the {kind}")
        files, lines = found_on(host, *canaries.values())
        assert "/tmp/plant" in files and any(canaries["journal"] in line for line in lines)
    finally:
        uproot(host)

    written, environments = inventory((host, asked(source="hf:acme/gated-GGUF/secret.gguf"))), tmp_path / "environments"
    programs = noting_environments("git", tmp_path / "programs", environments)
    with (tmp_path / "said").open("w+") as said:
        process = subprocess.Popen(
            command(written, "-y", "-vvv", "--debug", "--diff"), cwd=ROOT, stdin=subprocess.DEVNULL, stdout=said,
            stderr=said, env={**environment(), "HF_TOKEN": token, "TMPDIR": str(temporary),
                                                        "PATH": f"{programs}:{os.environ['PATH']}"},
        )  # fmt: skip
        with Watcher(process.pid, temporary) as watcher:
            assert process.wait(1500) == 0, Path(said.name).read_text()[-3000:]
        text = Path(said.name).read_text()
    assert serves(host, key=KEY) and ask(host, "/v1/completions", {"prompt": "a"})[0] == 401

    on_the_way = [as_sent(f"{KEY}\n"), as_sent(f'header = "Authorization: Bearer {token}"\n')]
    assert len(text) > 10_000 and not [secret for secret in (KEY, token, *on_the_way) if secret in text]
    assert watcher.where("deploy.py") and not watcher.where(KEY) and not watcher.where(token)
    started = [path.read_bytes() for path in environments.iterdir()]  # of programs that pyinfra started
    assert started and not [text for text in started if KEY.encode() in text or token.encode() in text]
    # The sampler has seen this very deploy, and neither key nor token.
    assert sampled(host, "switch.py") and sampled(host, "fetch.py")
    assert not [secret for secret in (KEY, token, *on_the_way) if sampled(host, secret)]
    files, lines = found_on(host, token)
    assert (files, lines) == (set(), [])
    files, lines = found_on(host, KEY)
    assert lines == []
    assert {path for path in files if not path.startswith("/run/credentials/")} == {
        f"/etc/llamafleet/instances/{NAME}/api-keys",
        f"/var/lib/llamafleet/good/{NAME}/api-keys",
    }
    modes = on(host, "stat", "--format=%U %a", *sorted(files)).splitlines()
    assert {mode.split()[1] for mode in modes} <= {"600", "400", "440"}, modes
    # The server's own environment names the folder of its credentials, and no more.
    environ = on(host, "cat", f"/proc/{main_pid(host, NAME)}/environ")
    assert KEY not in environ


@pytest.mark.parametrize(
    ("content", "mode", "says"),
    [
        pytest.param("\n \t\r\n", 0o600, "is empty", id="blanks", marks=pytest.mark.long),
        pytest.param("# only this\n", 0o600, "comments only", id="comments", marks=pytest.mark.long),
        pytest.param(KEY, 0o644, "chmod 600", id="readable"),
    ],
)
def test_a_careless_key_file_is_refused_and_nothing_changes(asked, inventory, host, key_file, content, mode, says):
    key_file.write_text(content)
    key_file.chmod(mode)
    run = pyinfra(inventory((host, asked())))
    assert run.code != 0 and run.changed() == []
    assert f"models: {NAME}: api_key_file: {key_file}" in run.text and says in run.text and host.name in run.text
    assert KEY not in run.text
    assert serves(host, key=KEY)


@pytest.mark.parametrize(
    "options",
    [
        ["--debug-operations", "--json"],
        *(pytest.param(one, marks=pytest.mark.long) for one in (["--debug-operations"], ["--dry", "--json"])),
    ],
)
def test_what_pyinfra_tells_of_operations_has_no_key(asked, inventory, host, key_file, options):
    """While a new key is to be sent: it is among the arguments of an operation."""
    key_file.write_text(NEW_KEY)
    done = subprocess.run([*command(inventory((host, asked())), *options)], cwd=ROOT, env=environment(),
                          stdin=subprocess.DEVNULL, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"llama-server-{NAME}.service" in done.stdout + done.stderr
    assert NEW_KEY not in done.stdout + done.stderr


class Gap(Beside):
    """The longest time for which an instance did not answer during the block."""

    def __init__(self, host):
        super().__init__()
        self.host, self.seconds = host, 0.0

    def _work(self):
        last = time.monotonic()
        while not self._ended.wait(0.02):
            if ask(self.host, "/health")[0] == 200:
                self.seconds, last = max(self.seconds, time.monotonic() - last), time.monotonic()


def test_a_new_key_is_a_restart_of_that_instance_alone(asked, inventory, host, key_file):
    written = inventory((host, asked()))
    run = pyinfra(written)
    assert run.code == 0, run.text
    with Gap(host) as restart:
        on(host, "systemctl", "restart", f"llama-server-{NAME}")
    other = main_pid(host, "open")
    key_file.write_text(NEW_KEY + "\n")
    with Gap(host) as rotation:
        run = pyinfra(written)
    assert run.code == 0, run.text
    print(f"away: {restart.seconds:.2f} s by a restart, {rotation.seconds:.2f} s by the rotation")
    assert [name for name in run.changed() if "Start and check" in name] == [
        f"Serve | Start and check llama-server-{NAME}.service"
    ]
    assert "its API keys differ" in run.text
    assert serves(host, key=NEW_KEY) and ask(host, "/v1/completions", {"prompt": "a"}, KEY)[0] == 401
    assert main_pid(host, "open") == other
    # Stop, start and load; the rest is this machine's load in that moment.
    assert 0 < rotation.seconds <= 2 * restart.seconds + 5
    assert pyinfra(written).changed() == []


@pytest.mark.long
def test_the_key_may_come_from_the_environment(asked, inventory, host):
    written = inventory((host, asked(api_key_file="env:FLEET_KEYS")))
    words = [*command(written, "-y")]
    done = subprocess.run(words, cwd=ROOT, env={**environment(), "FLEET_KEYS": KEY}, stdin=subprocess.DEVNULL,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert KEY not in done.stdout + done.stderr
    assert serves(host, key=KEY) and ask(host, "/v1/completions", {"prompt": "a"}, NEW_KEY)[0] == 401


def test_other_origins_get_no_word_to_use_it(host):
    """A web page elsewhere may not read answers; llama-server's default would allow every page."""
    words = ["curl", "-s", "-i", "-X", "OPTIONS", "-H", "Origin: http://evil.example",
             f"http://{host.address}:8081/v1/completions"]  # fmt: skip
    said = on(host, "sh", "-c", shlex.join(words)).lower()
    allowed = [line.split(":", 1)[1].strip() for line in said.splitlines() if line.startswith("access-control-allow-o")]
    assert allowed == ["none"] and "access-control-allow-credentials: false" in said


def test_afterwards_without_keys(settings, inventory, host):
    """What later tests find: one open instance."""
    assert pyinfra(inventory((host, settings(host)))).code == 0
    assert serves(host)
    files, _ = found_on(host, KEY, NEW_KEY)
    assert files == set()
