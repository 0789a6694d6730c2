"""What goes wrong on one host stays there: it fails by name with the way out, its old service goes
on serving, and the other host is deployed all the same."""

import contextlib
import json
import signal
import subprocess
import sys
import time

import pytest

from sandbox import upstream
from tests.e2e import deploying
from tests.e2e.deploying import ask, main_pid, on, pyinfra, serves, write_inventory

RUNNING_JOBS = (
    "systemctl",
    "list-units",
    "--plain",
    "--state=active",
    "llamafleet-job-*",
)  # one that failed stays listed


@pytest.fixture(scope="module")
def bad(builder):
    return builder


@pytest.fixture(scope="module")
def good(deployed, builder):
    return next(host for host in deployed if host is not builder)


@pytest.fixture
def run_with(settings, inventory, bad, good):
    """Deploys the bad host with these settings beside the good one, and checks what always holds."""

    def run(*expected, data=None, connection=None, serving=True, **overrides):
        given = data if data is not None else settings(bad, **overrides)
        done = pyinfra(inventory((bad, {**given, **(connection or {})}), (good, settings(good, "moe"))))
        assert done.code != 0
        for text in expected:
            assert text in done.text, f"{text!r} is not in:\n{done.text[-3000:]}"
        lines = [line for line in done.text.splitlines() if bad.name in line]
        assert lines, "the message does not name the host"
        assert not [name for name in done.failed(good.name)], done.text
        assert serves(good)
        if serving:
            assert serves(bad), "the previous service no longer serves"
        return done

    return run


@pytest.fixture(scope="module", autouse=True)
def both_serve(bad, good, outside, tmp_path_factory):
    """Before anything goes wrong."""
    pairs = [(bad, deploying.settings(outside, bad, "dense")), (good, deploying.settings(outside, good, "moe"))]
    done = pyinfra(write_inventory(tmp_path_factory.mktemp("serving") / "inventory.py", pairs))
    assert done.code == 0, done.text


def test_settings_that_cannot_be_are_told_all_at_once(run_with):
    run_with(
        "refused: keep_release: unknown setting; did you mean `keep_releases`?",
        "models[0].port: should be a whole number from 1 to 65535, is '8080'",
        "models[0].source: should end in a file name of",
        keep_release=1, model={"port": "8080", "source": "http://hub.example/m;touch${IFS}x;.gguf"},
    )  # fmt: skip


def test_port_taken(run_with, bad):
    serve = ["systemd-run", "--quiet", "--unit=squatter", "python3", "-m", "http.server", "--bind", bad.address, "8090"]
    on(bad, *serve)
    try:
        until(lambda: ask(bad, "/", port=8090)[0])
        run_with("port 8090", "is taken by squatter.service", "give the model another port", model={"port": 8090})
    finally:
        on(bad, "systemctl", "stop", "squatter")


def until(true, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.1)


def test_no_space_for_the_model(run_with, outside, bad):
    on(bad, "mount", "-t", "tmpfs", "-o", "size=2M", "tmpfs", "/var/lib/llamafleet/models")
    try:
        done = run_with(
            "refused: disks: ", "are needed", "/var/lib/llamafleet/models", model={"source": outside.sources["moe"]}
        )
        assert not [name for name in done.changed() if "Fetch" in name or "Build" in name]
    finally:
        on(bad, "umount", "/var/lib/llamafleet/models")


def test_checksum_mismatch(run_with, outside, bad):
    path = outside.sources["moe"].removeprefix("hf:")
    on(bad, "sh", "-c", "rm -rf /var/lib/llamafleet/models/tiny-moe-*")  # an earlier test may have fetched it
    outside.hub.fault(path, times=None, corrupt_at=100_000)
    try:
        run_with("sha256", model={"source": outside.sources["moe"]})
    finally:
        outside.hub.heal()


def test_a_plain_address_needs_a_sum(run_with, outside):
    plain = outside.sources["moe"].replace("hf:", f"{outside.hub.url}/plain/")
    done = run_with("refused: models: tiny: sha256: it is not known of", "and 2 more from", model={"source": plain})
    assert not [name for name in done.changed() if "Fetch" in name or "Build" in name]


@pytest.mark.long
def test_connection_cut_in_mid_download_is_resumed(settings, inventory, outside, bad):
    path = outside.sources["moe"].removeprefix("hf:")
    on(bad, "sh", "-c", "rm -rf /var/lib/llamafleet/models/tiny-moe-*")
    outside.hub.fault(path, times=2, cut_at=1_000_000)
    run = pyinfra(inventory((bad, settings(bad, "moe"))))
    outside.hub.heal()
    assert run.code == 0, run.text
    assert serves(bad)
    assert pyinfra(inventory((bad, settings(bad)))).code == 0


def test_gated_model_without_token(run_with, outside, tmp_path):
    from sandbox import models

    outside.hub.add("acme/gated-GGUF", "gated.gguf", models.tiny(tmp_path), gated=True)
    run_with("acme/gated-GGUF", "hub_token_file", model={"source": "hf:acme/gated-GGUF/gated.gguf"})


@pytest.mark.long
def test_gated_model_with_token_leaves_no_token_behind(settings, inventory, outside, bad, tmp_path):
    from sandbox import models

    outside.hub.add("acme/gated-GGUF", "gated.gguf", models.tiny(tmp_path, seed=7), gated=True)
    token = tmp_path / "token"
    token.write_text(outside.hub.token + "\n")
    token.chmod(0o600)
    data = settings(bad, model={"source": "hf:acme/gated-GGUF/gated.gguf"}, hub_token_file=str(token))
    run = pyinfra(inventory((bad, data)), "-vvv", "--diff")
    assert run.code == 0, run.text
    assert serves(bad)
    assert outside.hub.token not in run.text
    assert (
        on(bad, "sh", "-c", f"grep -rl {outside.hub.token} /run /etc /var/lib/llamafleet /tmp 2>/dev/null; true") == ""
    )
    assert pyinfra(inventory((bad, settings(bad)))).code == 0


def test_unknown_ref(run_with):
    run_with("llama_cpp_ref", "no tag or branch 'b99999999'", llama_cpp_ref="b99999999")


def test_unknown_commit(run_with):
    run_with("does not give commit", llama_cpp_ref="1234567890" * 4)


def test_compile_error(run_with, outside, bad):
    source = upstream.read_file(outside.clone, "ggml/src/ggml.c")
    upstream.add_commit(outside.clone, {"ggml/src/ggml.c": "#error broken on purpose\n" + source}, "broken")
    before = on(bad, "readlink", "/opt/llamafleet/current")
    run_with("llama.cpp does not compile", "broken on purpose", llama_cpp_ref="broken")
    assert on(bad, "readlink", "/opt/llamafleet/current") == before


def test_a_file_that_is_no_model(run_with, outside, tmp_path):
    file = tmp_path / "page.gguf"
    file.write_bytes(b"<html>not a model</html>" * 9)
    outside.hub.add("acme/broken-GGUF", file.name, file)
    run_with("GGUF", file.name, model={"source": f"hf:acme/broken-GGUF/{file.name}"})


def test_a_model_too_large_for_the_host_is_refused_before_anything_is_built(run_with, outside, tmp_path):
    from sandbox import models

    # Two gigabytes of weights as a hole, and 16 slots of 131072 tokens: 240 GB of KV cache.
    large = models.weightless(tmp_path, "Llama-3.2-3B")
    outside.hub.add("acme/large-GGUF", large.name, large)
    asked = {"source": f"hf:acme/large-GGUF/{large.name}", "context_tokens": 131072, "slots": 16}
    run = run_with("refused: models: tiny:", "Llama-3.2-3B", "context_tokens", model=asked)
    assert not [name for name in run.changed() if "Fetch" in name]


def test_host_down(run_with, bad):
    bad.kill()
    try:
        run_with(bad.name, serving=False)
    finally:
        bad.start()
    until(lambda: serves(bad), 30)
    assert serves(bad)


def test_what_cannot_be_reached_is_told_with_its_cause_in_status_and_plan(bad, tmp_path):
    """One host by wrong ways, and a name that does not exist: what pyinfra's own connector says, explained."""
    known = tmp_path / "known"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "key")], check=True)
    known.write_text(f"{bad.address} {(tmp_path / 'key.pub').read_text()}")
    right = deploying.connection(bad)
    hosts = {
        "changed": {**right, "ssh_known_hosts_file": str(known)},
        "unknown": {**right, "ssh_known_hosts_file": str(tmp_path / "empty")},
        "stranger": {**right, "ssh_key": str(tmp_path / "key")},
        "closed": {**right, "ssh_port": 1},
        "nameless": {**right, "ssh_hostname": "no-such-host.invalid"},
    }
    causes = {
        "changed": "another SSH key than your known_hosts", "unknown": "not in your known_hosts",
        "stranger": "it refuses the login", "closed": "nothing answers at its SSH port",
        "nameless": "its name is not known to this machine",
    }  # fmt: skip
    inventory = tmp_path / "inventory.py"
    inventory.write_text(f"web = {list(hosts.items())!r}\n")
    for command, key, code in (("status", "problem", 1), ("plan", "error", 2)):
        words = [sys.executable, "-m", "llamafleet.cli", command, "--inventory", str(inventory), "--json"]
        done = subprocess.run(words, cwd=deploying.ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
        told = {name: host[key] for name, host in json.loads(done.stdout).items()}
        assert set(told) == set(causes)
        for name, text in told.items():
            assert text.startswith("cannot be reached: ") and causes[name] in text, told


def test_python_missing(run_with, bad):
    on(bad, "mv", "/usr/bin/python3", "/usr/bin/python3.away")
    try:
        run_with("python3 is missing on the host: install it")
    finally:
        on(bad, "mv", "/usr/bin/python3.away", "/usr/bin/python3")


@pytest.mark.parametrize(
    ("connection", "before", "says"),
    [
        ({"ssh_user": "nosudo"}, "true", "connect as root"),
        ({"ssh_user": "nosudo", "_sudo": True}, "true", "sudo"),
        ({"ssh_user": "nosudo", "_sudo": True}, "echo 'nosudo ALL=(ALL) ALL' >/etc/sudoers.d/asks", "NOPASSWD"),
        ({"ssh_user": "admin", "_sudo": True}, "mv /usr/bin/sudo /usr/bin/sudo.away", "the host has no sudo"),
    ],
    ids=["plain user", "user without sudo", "sudo asks for a password", "no sudo"],
)
def test_no_root(run_with, bad, connection, before, says):
    on(bad, "sh", "-c", before)
    try:
        run = run_with(says, connection=connection)
    finally:
        on(
            bad,
            "sh",
            "-c",
            "rm -f /etc/sudoers.d/asks; [ ! -e /usr/bin/sudo.away ] || mv /usr/bin/sudo.away /usr/bin/sudo",
        )
    assert "Traceback" not in run.text and "connecting again" not in run.text


def test_a_full_disk_is_told_with_its_bytes(run_with, bad):
    """On the file system of the jobs, whose own log is lost then."""
    on(bad, "mount", "-t", "tmpfs", "-o", "size=64k,mode=750", "tmpfs", "/var/lib/llamafleet/jobs")
    try:
        on(bad, "sh", "-c", "cat /dev/zero >/var/lib/llamafleet/jobs/ballast 2>/dev/null; true")
        run_with("0 of 65536 bytes are free", "/var/lib/llamafleet/jobs", model={"context_tokens": 2048})
    finally:
        on(bad, "umount", "/var/lib/llamafleet/jobs")


@contextlib.contextmanager
def slow_download(inventory, outside, host, data):
    """A run in the middle of a download that would take hours. Ends it, whatever comes."""
    path = outside.sources["moe"].removeprefix("hf:")
    on(host, "sh", "-c", "rm -rf /var/lib/llamafleet/models/tiny-moe-*")
    run = subprocess.Popen(
        deploying.command(inventory((host, data)), "-y"), cwd=deploying.ROOT, env=deploying.environment(),
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        for _ in iter(run.stderr.readline, "--> Beginning operation run...\n"):
            assert run.poll() is None
        outside.hub.fault(path, times=None, bytes_per_second=2000)  # not before: this machine has read the header
        until(lambda: "fetch-tiny-moe" in on(host, *RUNNING_JOBS), 60)
        yield run
    finally:
        run.kill()
        run.wait()
        outside.hub.heal()


def test_ctrl_c_ends_the_run_within_seconds_while_a_job_goes_on(settings, inventory, outside, bad):
    """It says which job goes on where; the next run takes its lock at once, since it sees that the first one is dead."""
    with slow_download(inventory, outside, bad, settings(bad, "moe")) as run:
        began = time.monotonic()
        run.send_signal(signal.SIGINT)
        text = run.stderr.read()
        run.wait(timeout=60)
        assert time.monotonic() - began < 10  # a run ends after 2.7 s at the latest; the machine may be busy
        assert run.returncode == 130 and "goes on there" in text, text
        [said] = [line for line in text.splitlines() if "goes on there" in line]
        job = said.rpartition("systemctl stop ")[2].strip()
        assert bad.name in said and job.startswith("llamafleet-job-fetch-tiny-moe") and "Traceback" not in text
        assert on(bad, "systemctl", "is-active", job) == "active"
        on(bad, "systemctl", "stop", job)  # what was said to stop it
    done = pyinfra(inventory((bad, settings(bad))))
    assert done.code == 0, done.text


@pytest.mark.long
def test_a_power_cut_in_mid_run_is_told_in_a_line(settings, inventory, outside, bad):
    """The host stays away for longer than a run waits for it, a minute."""
    try:
        with slow_download(inventory, outside, bad, settings(bad, "moe")) as run:
            bad.kill()
            text = run.stderr.read()
            assert run.wait(timeout=60) == 1
    finally:
        bad.start()
    assert "Traceback" not in text and "NoneType" not in text, text
    assert text.count("the connection broke") == 1, text
    [lost] = [line for line in text.splitlines() if "does not come back" in line]
    assert bad.name in lost and "fetch-tiny-moe" in lost and "nothing answers at its SSH port" in lost
    done = pyinfra(inventory((bad, settings(bad))))
    assert done.code == 0 and serves(bad), done.text


def test_an_ordinary_user_with_sudo_does_as_well(settings, inventory, bad):
    data = {**settings(bad), "ssh_user": "admin", "_sudo": True}
    run = pyinfra(inventory((bad, data)))
    assert run.code == 0 and run.changed() == [], run.text


@pytest.mark.long
def test_a_server_that_exits_at_once_never_takes_the_place_of_the_old_one(run_with, outside, bad):
    # It compiles and starts. What shows itself in the real service only, the gate sees: test_08_rollback.
    before = main_pid(bad, "tiny")
    upstream.add_commit(outside.clone, {"tools/server/main.cpp": "int main() { return 0; }\n"}, "exits")
    run_with("llama-server does not work on this host, even without hardening", llama_cpp_ref="exits")
    assert main_pid(bad, "tiny") == before
