"""Changing what is deployed: only what differs is touched, and the old one is kept until the new one serves."""

import contextlib
import json
import signal
import subprocess
import tarfile
import threading
import time

import pytest

from sandbox import upstream
from tests.e2e.deploying import ROOT, ask, command, environment, main_pid, on, pyinfra, serves


@pytest.fixture(scope="module")
def host(builder):
    return builder


def model(outside, host, name, port, **other):
    return {"name": name, "source": outside.sources["dense"], "port": port, "listen": host.address,
            "context_tokens": 1024, **other}  # fmt: skip


# Of a build's unit, as systemd shows them.
LIMITS = {"Nice": "10", "CPUWeight": "20", "IOWeight": "20", "OOMScoreAdjust": "500", "RuntimeMaxUSec": "12h",
          "ProtectSystem": "strict", "NoNewPrivileges": "yes"}  # fmt: skip


@contextlib.contextmanager
def watching(host, units):
    """What systemd shows of the first unit of that pattern which runs meanwhile; empty until there is one."""
    seen, ended = {}, threading.Event()

    def look():
        while not seen and not ended.wait(0.2):
            names = ",".join([*LIMITS, "MemoryMax"])
            shown = host.run(["systemctl", "show", f"--property={names}", units]).stdout
            seen.update(line.split("=", 1) for line in shown.splitlines() if "=" in line)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


def test_two_instances_and_a_change_of_context_restarts_only_one(outside, settings, inventory, host):
    two = [model(outside, host, "tiny", 8080), model(outside, host, "second", 8081)]
    assert pyinfra(inventory((host, settings(host, models=two)))).code == 0
    before = main_pid(host, "tiny"), main_pid(host, "second")

    two[1]["context_tokens"] = 2048
    run = pyinfra(inventory((host, settings(host, models=two))))
    assert run.code == 0, run.text
    assert not [name for name in run.changed() if "llama-server-tiny" in name]
    assert main_pid(host, "tiny") == before[0]
    assert main_pid(host, "second") != before[1]
    assert ask(host, "/props", port=8081)[1]["default_generation_settings"]["n_ctx"] == 2048


def test_an_instance_that_left_the_inventory_is_removed(outside, settings, inventory, host):
    before = main_pid(host, "tiny")
    run = pyinfra(inventory((host, settings(host, models=[model(outside, host, "tiny", 8080)]))))
    assert run.code == 0, run.text
    assert ask(host, "/health", port=8081)[0] == 0
    assert on(host, "sh", "-c", "ls /etc/systemd/system/llama-server-second.service 2>&1; true").startswith("ls: ")
    assert main_pid(host, "tiny") == before


def test_with_keys_nobody_gets_in_without_one(outside, settings, inventory, host, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("first-secret\n\n second-secret \n")
    keys.chmod(0o600)
    run = pyinfra(inventory((host, settings(host, model={"api_key_file": str(keys)}))), "-vvv", "--diff")
    assert run.code == 0, run.text
    body = {"prompt": "a", "max_tokens": 1}
    assert ask(host, "/v1/completions", body)[0] == 401
    assert ask(host, "/v1/completions", body, "wrong")[0] == 401
    assert serves(host, key="first-secret") and serves(host, key="second-secret")
    assert "secret" not in run.text.replace(str(keys), "")
    assert "secret" not in on(
        host, "sh", "-c", "tr '\\0' ' ' </proc/[0-9]*/cmdline 2>/dev/null | cat; journalctl --no-pager"
    )
    keys.write_text("\n")
    empty = pyinfra(inventory((host, settings(host, model={"api_key_file": str(keys)}))))
    assert empty.code != 0 and f"api_key_file: {keys} is empty" in empty.text
    assert serves(host, key="first-secret")
    assert pyinfra(inventory((host, settings(host)))).code == 0


def test_a_new_commit_is_built_and_the_old_release_is_kept(outside, settings, inventory, host):
    old = json.loads(on(host, "cat", "/opt/llamafleet/current/release.json"))
    path = "tools/server/README-dev.md"
    commit = upstream.add_commit(outside.clone, {path: "changed\n"}, "changed")
    with watching(host, "llamafleet-job-build-*.service") as seen:
        run = pyinfra(inventory((host, settings(host, llama_cpp_ref="changed"))))
    assert run.code == 0, run.text
    # The server beside it has its time, its disk and its memory.
    assert LIMITS.items() <= seen.items() and int(seen["MemoryMax"]) < 2**40, seen
    new = json.loads(on(host, "cat", "/opt/llamafleet/current/release.json"))
    assert new["commit"] == commit != old["commit"]
    releases = on(host, "ls", "/opt/llamafleet/releases").split()
    assert {old["key"], new["key"]} <= set(releases)
    assert f"/releases/{new['key']}/" in on(host, "readlink", f"/proc/{main_pid(host, 'tiny')}/exe")
    assert serves(host)
    # And back: the old release is there, so nothing is compiled.
    back = pyinfra(inventory((host, settings(host))))
    assert back.code == 0 and not [name for name in back.changed() if "Build" in name], back.text
    assert serves(host)


@pytest.mark.long
def test_a_build_that_somebody_changed_in_the_cache_is_not_used(settings, inventory, deployed, host, builds):
    [other] = [one for one in deployed if one is not host]
    written = inventory((other, settings(other, "moe", llama_cpp_ref="changed")))
    dry = pyinfra(written, "--dry")
    [name] = [name for name in dry.changed() if "the current release" in name]
    # This checkout saw the build made, and the cache seems to have it: nothing is checked out.
    assert not [name for name in dry.changed() if "Check out" in name]
    [archive] = builds.glob(f"{name.split('Make build ')[1].split()[0]}-*.tar")
    with tarfile.open(archive) as tar, archive.open("r+b") as file:
        library = next(member for member in tar if member.isreg() and "libllama.so" in member.name)
        file.seek(library.offset_data + library.size // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    run = pyinfra(written)
    assert run.code != 0 and f"{archive.name} is not used: bin/libllama.so" in run.text, run.text
    assert "run again, and it compiles" in run.text and serves(other)
    again = pyinfra(written)
    assert again.code == 0 and [name for name in again.changed() if "Check out" in name], again.text
    release = f"/opt/llamafleet/releases/{json.loads(on(other, 'cat', '/opt/llamafleet/current/release.json'))['key']}"
    digest = on(other, "sha256sum", f"{release}/release.json").split()[0]
    assert digest not in archive.name and (builds / archive.name.replace(archive.name[17:81], digest)).exists()
    assert on(other, "find", release, "-perm", "/7022", "!", "-type", "l") == "" and serves(other)
    assert pyinfra(inventory((other, settings(other, "moe")))).code == 0


@pytest.mark.long
def test_killed_in_mid_download_the_next_run_ends_green(outside, settings, inventory, hosts):
    host = hosts[2]
    path = outside.sources["dense"].removeprefix("hf:")
    # Slow enough that the run is killed while it downloads, and the host loses power on top of it.
    outside.hub.fault(path, times=None, bytes_per_second=150_000)
    written = inventory((host, settings(host)))
    process = subprocess.Popen(command(written, "-y"), cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip
    try:
        for line in process.stdout:
            if "progress" in line:
                break
        else:
            pytest.fail("the download never showed progress")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    host.kill()
    host.start()
    outside.hub.heal()
    outside.hub.requests.clear()
    run = pyinfra(written)
    assert run.code == 0, run.text
    assert serves(host)
    resumed = [one.range for one in outside.hub.settled() if one.server == "cdn" and one.range not in ("", "bytes=0-")]
    assert resumed, "the download began again from zero"


def test_two_runs_at_once_cannot_meet(settings, inventory, hosts):
    host = hosts[2]
    holder = {"run": "other", "who": "bob@desk", "machine": "desk", "pid": 1, "began": "today", "pid_started": 0}
    on(host, "sh", "-c", f"mkdir -p /run/llamafleet; echo '{json.dumps(holder)}' > /run/llamafleet/lock.json")
    run = pyinfra(inventory((host, settings(host, model={"context_tokens": 512}))))
    assert run.code != 0 and "bob@desk" in run.text, run.text
    on(host, "rm", "/run/llamafleet/lock.json")


def test_unit_edited_by_hand_is_found_and_repaired(settings, inventory, host):
    unit = "/etc/systemd/system/llama-server-tiny.service"
    on(
        host,
        "sh",
        "-c",
        f"sed -i s/ProtectHome=yes/ProtectHome=no/ {unit} && systemctl daemon-reload && systemctl restart llama-server-tiny",
    )
    run = pyinfra(inventory((host, settings(host))), "--dry")
    assert [name for name in run.changed(host.name) if "Start and check" in name] and "its unit differs" in run.text
    assert pyinfra(inventory((host, settings(host)))).code == 0
    assert "ProtectHome=yes" in on(host, "cat", unit)
    deadline = time.monotonic() + 10
    while not serves(host) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert serves(host)
