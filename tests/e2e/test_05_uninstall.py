"""A host of Debian 12 (systemd 252, g++ 12, glibc 2.36) from the first deploy to the way back: after it the host's file
list is the one from before, apart from packages and logs."""

import json
import subprocess

import pytest

from sandbox import oracle_build, roots
from tests.e2e.conftest import ON_HOST
from tests.e2e.deploying import PYINFRA, ROOT, ask, environment, on, pyinfra, read, serves

PREFIX = "leaving"
# Somebody else's, with names as near to ours as they can be.
FOREIGN = """
set -e
printf '[Service]\\nExecStart=/usr/bin/sleep infinity\\n' >/etc/systemd/system/llama-server-mine.service
mkdir -p /var/cache/llama-server-mine /opt/llama /etc/systemd/system/llama-server-mine.service.d
touch /var/cache/llama-server-mine/file /opt/llama/file
systemctl daemon-reload
systemctl start llama-server-mine.service
"""
# Logs, what packages and the package manager brought, and what the system itself writes while it is up.
ELSEWHERE = ("/var/log/", "/var/lib/apt/", "/var/lib/dpkg/", "/var/cache/apt/", "/var/cache/debconf/",
             "/var/cache/ldconfig/", "/etc/ssl/certs/", "/etc/alternatives/",
             "/var/tmp/systemd-private-", "/tmp/systemd-private-")  # fmt: skip


@pytest.fixture(scope="module")
def host(boot):
    (one,) = boot(1, PREFIX, 6, packages=oracle_build.COMPILER, suite=roots.OLDER_SUITE)
    assert "VERSION_CODENAME=bookworm" in on(one, "cat", "/etc/os-release")
    on(one, "dpkg", "--remove", "ninja-build")  # for the deploy to install
    on(one, "sh", "-c", FOREIGN)
    return one


def listing(host):
    """Every path of the host's own file system, and of ours in /run."""
    found = on(host, "sh", "-c", "find / -xdev -print; find /tmp /var/tmp -xdev -print; ls -d /run/llamafleet* || true")
    return {path for path in found.splitlines() if not path.startswith(ELSEWHERE)}


def of_packages(host):
    """Paths that the package manager knows."""
    return set(on(host, "sh", "-c", "cat /var/lib/dpkg/info/*.list").splitlines())


def uninstall(inventory, *options):
    dry = "--dry" in options
    words = [
        str(PYINFRA),
        *(options if dry else ("-y", *options)),
        str(inventory),
        "tasks.uninstall.uninstall",
        "--json",
    ]
    done = subprocess.run(words, cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True)
    return read(done.returncode, done.stdout, done.stderr, dry)


def accounts(host):
    return on(host, "sh", "-c", "cut -d: -f1 /etc/passwd /etc/group /etc/shadow /etc/gshadow | sort | uniq -c")


@pytest.fixture(scope="module")
def before(host):
    """The bare host, and then the host with two instances, one with keys, deployed for the test to remove."""
    return {"files": listing(host), "accounts": accounts(host)}


@pytest.fixture(scope="module")
def deployed(before, host, outside, tmp_path_factory):
    from tests.e2e.deploying import write_inventory

    folder = tmp_path_factory.mktemp("uninstall")
    (folder / "keys").write_text("a-key-of-the-team\n")
    (folder / "keys").chmod(0o600)
    models = [
        {"name": name, "source": outside.sources[kind], "port": port, "listen": host.address, "context_tokens": 512,
         "api_key_file": str(folder / "keys")}
        for name, kind, port in (("tiny", "dense", 8080), ("second", "moe", 8081))
    ]  # fmt: skip
    data = {**outside.settings(), "build_cache": ON_HOST}
    two = write_inventory(folder / "two.py", [(host, {**data, "models": models})])
    with oracle_build.compiling(roots.OLDER_SUITE):
        run = pyinfra(two)
    assert run.code == 0, run.text
    for part in ("Install packages", "Build llama.cpp b"):
        assert any(part in name for name in run.changed()), run.changed()
    for name in ("tiny", "second"):
        assert json.loads(on(host, "cat", f"/var/lib/llamafleet/gate/{name}.json"))["ok"]
    again = pyinfra(two)
    assert again.code == 0 and again.changed() == [], again.text
    # One leaves again: what it leaves behind is ours too.
    one = write_inventory(folder / "one.py", [(host, {**data, "models": models[:1]})])
    run = pyinfra(one)
    assert run.code == 0, run.text
    all_of_it = write_inventory(folder / "all.py", [(host, {**data, "models": models[:1], "uninstall_models": True})])
    return one, all_of_it


def test_a_host_that_another_run_deploys_to_is_left_alone(deployed, host):
    holder = {"run": "other", "who": "bob@desk", "machine": "desk", "pid": 1, "began": "today", "pid_started": 0}
    on(host, "sh", "-c", f"mkdir -p /run/llamafleet; echo '{json.dumps(holder)}' >/run/llamafleet/lock.json")
    run = uninstall(deployed[0])
    assert run.code != 0 and "bob@desk" in run.text, run.text
    assert serves(host, key="a-key-of-the-team")
    on(host, "rm", "/run/llamafleet/lock.json")


def test_a_dry_run_tells_and_removes_nothing(deployed, host):
    files = listing(host)
    run = uninstall(deployed[0], "--dry")
    assert run.code == 0 and run.changed(host.name) == ["Uninstall llamafleet | Remove llamafleet"], run.text
    assert listing(host) == files and serves(host, key="a-key-of-the-team")


def test_everything_but_the_models_goes(deployed, host, before):
    run = uninstall(deployed[0])
    assert run.code == 0, run.text
    left = listing(host) - before["files"] - of_packages(host)
    assert {path for path in left if not path.startswith("/var/lib/llamafleet/models/")} == {
        "/var/lib/llamafleet", "/var/lib/llamafleet/models",
    }  # fmt: skip
    assert len([path for path in left if path.endswith(".gguf")]) == 4
    owners = on(host, "sh", "-c", "find /var/lib/llamafleet -printf '%U\\n' | sort -u")
    assert owners == "0", "files of a user that is no more"
    assert "kept the models in /var/lib/llamafleet/models" in run.text
    assert ask(host, "/health")[0] == 0
    assert accounts(host) == before["accounts"]
    assert on(host, "sh", "-c", "systemctl list-units --all --no-legend 'llamafleet*' 'llama-server-tiny*'") == ""


def test_a_second_time_changes_nothing(deployed, host):
    files = listing(host)
    run = uninstall(deployed[0])
    assert run.code == 0 and run.changed(host.name) == [], run.text
    assert uninstall(deployed[0], "--dry").changed(host.name) == []
    assert listing(host) == files


def test_models_go_where_they_are_named_and_the_listing_is_the_one_from_before(deployed, host, before):
    run = uninstall(deployed[1])
    assert run.code == 0 and run.changed(host.name), run.text
    after = listing(host)
    assert after - before["files"] - of_packages(host) == set()
    assert before["files"] - after == set()
    assert uninstall(deployed[1]).changed(host.name) == []


def test_what_others_made_is_still_there_and_runs(deployed, host):
    assert on(host, "systemctl", "is-active", "llama-server-mine.service") == "active"
    assert on(host, "ls", "/var/cache/llama-server-mine", "/opt/llama").split().count("file") == 2
