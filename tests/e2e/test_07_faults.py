"""What breaks by itself or by hand comes back: by systemd, by the liveness check, or by the next run.

Elsewhere: a unit edited by hand and a download killed with its host (test_02_change), a port taken by another program,
no space for a model from the start, a wrong checksum, a host that is down (test_03_errors).
"""

import contextlib
import json
import os
import random
import threading
import time

import pytest

from sandbox import upstream
from tests.e2e.deploying import ask, main_pid, on, pyinfra, serves, with_names

UNIT, CHECK = "llama-server-tiny.service", "llama-server-tiny-liveness.service"
LIVENESS = {"liveness_seconds": 5, "liveness_interval_seconds": 1}


@pytest.fixture(scope="module")
def host(builder):
    return builder


@pytest.fixture
def deploy(settings, inventory, host):
    """A run that must end green, on the host with these settings."""

    def run(*options, **overrides):
        done = pyinfra(inventory((host, settings(host, **{**LIVENESS, **overrides}))), *options)
        assert done.code == 0, done.text
        return done

    return run


# Every file that a run installs, by its content, and what runs.
INSTALLED = """
find /etc/llamafleet /etc/systemd/system/llama-server-* /opt/llamafleet /var/lib/llamafleet/models -type f -print0 |
    sort -z | xargs -0 sha256sum
readlink /opt/llamafleet/current
systemctl is-active llama-server-tiny.service llama-server-tiny-liveness.timer || true
"""


@pytest.fixture(scope="module")
def left():
    """What the last run of `serving` installed."""
    return {}


@pytest.fixture(autouse=True)
def serving(deploy, host, left):
    """It does before anything goes wrong; where the test before left all as it was, without another run."""
    if left.get("installed") != on(host, "sh", "-c", INSTALLED) or not serves(host):
        deploy()
        left["installed"] = on(host, "sh", "-c", INSTALLED)


def until(true, seconds):
    """Waits for it; how long that took."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < seconds, f"not within {seconds} s"
        time.sleep(0.2)
    return time.monotonic() - began


def shown(host, name):
    return on(host, "systemctl", "show", f"--property={name}", "--value", UNIT)


def test_a_killed_server_is_back_by_itself(host):
    before = main_pid(host, "tiny")
    on(host, "kill", "-9", str(before))
    took = until(lambda: main_pid(host, "tiny") not in (0, before) and serves(host), 30)
    print(f"served again {took:.1f} s after SIGKILL")


def test_a_stopped_server_is_restarted_by_the_liveness_check(host):
    before = main_pid(host, "tiny")
    on(host, "kill", "-STOP", str(before))
    # Its deadline, longer where this machine has so much else to do that it read prompts slowly: see liveness.py.
    speed = json.loads(on(host, "cat", "/var/lib/llamafleet/gate/tiny.json"))["prompt_tokens_per_s"]
    deadline = max(5, 3 * 1024 / speed)
    # Two pauses at most before it is asked, then the deadline, the last look, and a restart.
    took = until(lambda: main_pid(host, "tiny") not in (0, before) and serves(host), 2 * 1 + deadline + 6 + 20)
    print(f"served again {took:.1f} s after SIGSTOP, with a deadline of {deadline:.1f} s")
    noted = json.loads(on(host, "cat", "/var/lib/llamafleet/gate/liveness/tiny.json"))
    assert noted["restarts"] >= 1 and f"no sign of life within {deadline:.0f} s: /props: no answer" in noted["why"]
    assert "is wedged" in on(host, "journalctl", "--no-pager", "-u", CHECK)
    # Its exit status says so, and systemd counts no failure.
    assert on(host, "systemctl", "show", "--property=Result", "--value", CHECK) == "success"


def checked(host, times):
    """Wait for so many more liveness checks."""
    count = ["sh", "-c", f"journalctl -q --no-pager -u {CHECK} | grep -c Finished"]
    before = int(on(host, *count))
    until(lambda: int(on(host, *count)) >= before + times, 60)


@pytest.mark.long
def test_a_conversation_is_untouched_by_looks(host):
    prompt = [1, *range(5, 405), *range(5, 405)]
    assert ask(host, "/completion", {"prompt": prompt, "n_predict": 1})[0] == 200
    [before] = json.loads(ask(host, "/slots")[1])
    checked(host, 3)
    [after] = json.loads(ask(host, "/slots")[1])
    assert after == before and after["n_prompt_tokens"] >= len(prompt)
    timings = ask(host, "/completion", {"prompt": [*prompt, 7, 7], "n_predict": 1})[1]["timings"]
    assert (timings["cache_n"], timings["prompt_n"]) == (len(prompt), 2)


def test_a_busy_server_is_left_alone(host):
    before, restarts = main_pid(host, "tiny"), on(host, "cat", "/var/lib/llamafleet/gate/liveness/tiny.json")
    stop = threading.Event()

    def talk():
        while not stop.is_set():  # its one slot is never free for long
            ask(host, "/completion", {"prompt": "Once upon a time", "n_predict": 200, "ignore_eos": True})

    talkers = [threading.Thread(target=talk) for _ in range(3)]
    for one in talkers:
        one.start()
    try:
        checked(host, 3)
    finally:
        stop.set()
        for one in talkers:
            one.join()
    assert main_pid(host, "tiny") == before
    assert on(host, "cat", "/var/lib/llamafleet/gate/liveness/tiny.json") == restarts


def test_a_stopped_liveness_check_is_drift_and_is_mended_without_a_restart(host, deploy):
    before = main_pid(host, "tiny")
    on(host, "systemctl", "stop", "llama-server-tiny-liveness.timer")
    assert [name for name in deploy("--dry").changed() if "liveness check" in name]
    assert [name for name in deploy().changed() if "Install the liveness check" in name]
    assert on(host, "systemctl", "is-active", "llama-server-tiny-liveness.timer") == "active"
    assert main_pid(host, "tiny") == before
    assert deploy("--dry").changed() == []


def test_a_damaged_model_is_found_fetched_anew_and_the_server_runs_on(host, deploy):
    [path] = [file["path"] for file in json.loads(on(host, "cat", "/etc/llamafleet/instances/tiny/plan.json"))["files"]]
    whole, before = on(host, "sha256sum", path), main_pid(host, "tiny")
    on(host, "dd", "if=/dev/urandom", f"of={path}", "bs=4096", "seek=200", "count=1", "conv=notrunc", "status=none")
    assert on(host, "sha256sum", path) != whole
    assert [name for name in deploy("--dry").changed() if "Fetch tiny-dense" in name]
    assert [name for name in deploy().changed() if "Fetch tiny-dense" in name]
    assert on(host, "sha256sum", path) == whole
    # It has read the file when it was whole, and needs it no more.
    assert main_pid(host, "tiny") == before and serves(host)


@pytest.mark.long
def test_a_half_deleted_release_is_made_again(host, deploy):
    release = on(host, "readlink", "-f", "/opt/llamafleet/current")
    on(host, "sh", "-c", f"cd {release}/bin && ls | sort -R | head -n $(($(ls | wc -l) / 2)) | xargs rm")
    on(host, "rm", "-f", f"{release}/bin/libllama.so", f"{release}/bin/libllama.so.0")
    on(host, "systemctl", "kill", "--signal=KILL", UNIT)  # so that it has to start from what is left
    assert [name for name in deploy("--dry").changed() if "Build llama.cpp" in name]
    assert [name for name in deploy().changed() if "Build llama.cpp" in name]
    assert serves(host)
    assert deploy("--dry").changed() == []


# Of 5, 8, 14, 24, 42 and 71 s before the next start: with the last ones it had given up.
@pytest.mark.parametrize("restarts", [2, pytest.param(6, marks=pytest.mark.long)])
def test_a_server_that_cannot_start_comes_up_by_itself_when_the_cause_is_gone(host, restarts):
    """NixOS/nixpkgs#487054, ollama/ollama#7669, #11963: it was given up for good."""
    folder = os.path.dirname(
        json.loads(on(host, "cat", "/etc/llamafleet/instances/tiny/plan.json"))["files"][0]["path"]
    )
    on(host, "systemctl", "reset-failed", UNIT)
    on(host, "chmod", "700", folder)
    try:
        on(host, "systemctl", "restart", "--no-block", UNIT)
        until(lambda: int(shown(host, "NRestarts")) >= restarts, 240)
        assert not serves(host)
    finally:
        on(host, "chmod", "755", folder)
    print(f"up after {until(lambda: serves(host), 150):.0f} s")


def test_out_of_memory_is_tried_again_with_pauses_and_the_next_run_repairs(host, deploy):
    """Inside the unit's own limit; where the machine cannot enforce MemoryMax, inside an address space as small."""
    enforced = "memory" in on(host, "cat", "/sys/fs/cgroup/cgroup.controllers").split()
    small = "s/^MemoryMax=.*/MemoryMax=12M/" if enforced else "s/^MemoryMax=.*/LimitAS=60M/"
    on(host, "sed", "-i", small, f"/etc/systemd/system/{UNIT}")
    on(host, "systemctl", "daemon-reload")
    on(host, "systemctl", "restart", "--no-block", UNIT)
    until(lambda: int(shown(host, "NRestarts")) >= 3, 120)
    if enforced:
        assert "oom" in on(host, "journalctl", "-q", "--no-pager", "-u", UNIT, "-n", "60").lower()
    run = deploy()
    assert "it is activating" in run.text and "its unit differs" in run.text
    assert serves(host)


@pytest.mark.long
def test_without_the_credentials_file_it_serves_nobody_and_the_next_run_repairs(host, deploy, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("a-long-enough-key\n")
    keys.chmod(0o600)
    keyed = {"model": {"api_key_file": str(keys)}}
    deploy(**keyed)
    assert serves(host, key="a-long-enough-key")
    on(host, "rm", "/etc/llamafleet/instances/tiny/api-keys")
    on(host, "systemctl", "restart", "--no-block", UNIT)
    until(lambda: "CREDENTIALS" in on(host, "journalctl", "-q", "--no-pager", "-u", UNIT, "-n", "20"), 30)
    assert ask(host, "/v1/completions", {"prompt": "a", "max_tokens": 1})[0] == 0
    assert "its API keys differ" in deploy(**keyed).text
    assert ask(host, "/v1/completions", {"prompt": "a", "max_tokens": 1})[0] == 401
    assert serves(host, key="a-long-enough-key")


@contextlib.contextmanager
def without_dns(host):
    """The host's resolver answers nobody."""
    resolver = on(host, "cat", "/etc/resolv.conf")
    on(host, "sh", "-c", "echo nameserver 127.0.0.77 > /etc/resolv.conf")
    try:
        yield
    finally:
        on(host, "sh", "-c", 'printf "%s\\n" "$0" > /etc/resolv.conf', resolver)


@pytest.mark.long
def test_dns_that_is_dead_fails_what_needs_it_by_name_and_nothing_else(settings, inventory, host, deploy):
    nameless = {"llama_cpp_repository": "http://llama.invalid/llama.cpp.git", "llama_cpp_ref": "a" * 40}
    run = pyinfra(inventory((host, settings(host, **LIVENESS, **nameless))))
    assert run.code != 0 and host.name in run.text
    assert "Could not resolve host: llama.invalid" in run.text and f"does not give commit {'a' * 40}" in run.text
    assert serves(host)
    # What is there needs no name: neither a run nor a restart.
    with without_dns(host):
        assert deploy().changed() == []
        on(host, "systemctl", "restart", UNIT)
        assert serves(host)


@pytest.mark.long
def test_dns_that_is_dead_at_a_download_leaves_the_old_model_serving(
    settings, inventory, outside, host, deploy, tmp_path
):
    """The operator's machine knows the Hub by name, so the run gets as far as the host, which does not."""
    before = with_names(["hub.example"], tmp_path)
    on(host, "sh", "-c", "rm -rf /var/lib/llamafleet/models/tiny-moe-*")  # another test may have fetched it
    hub = outside.hub.url.replace(outside.hub.address, "hub.example")
    asked = inventory((host, settings(host, **LIVENESS, hub_endpoint=hub, model={"source": outside.sources["moe"]})))
    served, pid = ask(host, "/props")[1]["model_path"], main_pid(host, "tiny")
    with without_dns(host):
        run = pyinfra(asked, before=before)
    assert run.code != 0 and any("Fetch tiny-moe" in name for name in run.failed(host.name)), run.text
    [error] = [line for line in run.text.splitlines() if line.lstrip().startswith("error: ")]
    for part in ("Could not resolve host: hub.example", "check this host's DNS", "then run again"):
        assert part in error
    assert f"[{host.name}] Error" in run.text
    assert (ask(host, "/props")[1]["model_path"], main_pid(host, "tiny")) == (served, pid) and serves(host)
    left = on(host, "find", "/var/lib/llamafleet/models", "-path", "*tiny-moe*", "-type", "f")
    assert [path for path in left.split() if not path.endswith("/.fetch.lock")] == []
    assert deploy("--dry").changed() == []

    on(host, "sh", "-c", "cp /etc/hosts /etc/hosts.before && echo 127.0.0.1 hub.example >> /etc/hosts")
    try:
        run = pyinfra(asked, before=before)
    finally:
        on(host, "mv", "/etc/hosts.before", "/etc/hosts")
    assert run.code == 0 and serves(host), run.text
    assert "tiny-moe" in ask(host, "/props")[1]["model_path"]


def filled_up(host, folder, mebibytes, under_way, asked):
    """A run during which another program fills the disk of this folder, as soon as this `find` finds something."""
    runs = []
    on(host, "mount", "-t", "tmpfs", "-o", f"size={mebibytes}M", "tmpfs", folder)
    running = threading.Thread(target=lambda: runs.append(pyinfra(asked)))
    try:
        running.start()
        until(lambda: on(host, "find", folder, *under_way), 120)
        host.run(["dd", "if=/dev/zero", f"of={folder}/filler", "bs=64k", "status=none"])  # to the last byte, and fails
    finally:
        running.join()
        on(host, "umount", folder)
    return runs[0]


@pytest.mark.long
def test_a_disk_that_fills_up_during_a_build_leaves_the_old_one_serving(settings, inventory, outside, host, deploy):
    upstream.add_commit(outside.clone, {"tools/server/README-dev.md": f"{time.time()}\n"}, "full")
    asked = settings(host, **LIVENESS, llama_cpp_ref="full")
    before = main_pid(host, "tiny")
    # One compiler at a time: the first that ends after the disk is full fails.
    one = inventory((host, {**asked, "build_jobs": 1}))
    run = filled_up(host, "/var/lib/llamafleet/build", 192, ["-path", "*/ggml/*", "-name", "*.o"], one)
    assert run.code != 0 and "No space left on device" in run.text and host.name in run.text
    assert serves(host) and main_pid(host, "tiny") == before
    assert pyinfra(inventory((host, asked))).code == 0 and serves(host)
    deploy()


@pytest.mark.long
def test_a_disk_that_fills_up_during_a_download_leaves_the_old_one_serving(settings, inventory, outside, host):
    path = outside.sources["moe"].removeprefix("hf:")
    asked = inventory((host, settings(host, **LIVENESS, model={"source": outside.sources["moe"]})))
    before = main_pid(host, "tiny")
    outside.hub.fault(path, times=None, bytes_per_second=300_000)
    try:
        # Beside the reserve of 1 GiB that a download leaves free there is room for the 15 MB, until something fills it.
        under_way = ["-name", ".*.partial", "-size", "+100k"]
        run = filled_up(host, "/var/lib/llamafleet/models", 1060, under_way, asked)
    finally:
        outside.hub.heal()
    assert run.code != 0 and "free some space and run again" in run.text and host.name in run.text, run.text
    assert serves(host) and main_pid(host, "tiny") == before
    assert pyinfra(asked).code == 0 and serves(host)


WIPE = """
systemctl disable -q --now $(cd /etc/systemd/system && ls -d llama-server-* | grep -v '\\.wants$') 2>/dev/null
rm -rf /etc/systemd/system/llama-server-* /opt/llamafleet /etc/llamafleet
cd /var/lib/llamafleet && ls -A | grep -vx -e build -e src | xargs -r rm -rf
systemctl daemon-reload; systemctl reset-failed
"""
ROUNDS = 20  # of one power cut on each of three hosts


@pytest.mark.long
def test_power_cuts_at_random_points_of_a_deploy_and_one_more_run_ends_green(settings, inventory, hosts):
    """From hosts that have the packages and, in the shared cache, the build."""
    seed = int(os.environ.get("E2E_SEED") or time.time())
    chance = random.Random(seed)
    print(f"E2E_SEED={seed}")
    asked = inventory(*((host, settings(host)) for host in hosts))

    def wipe():
        for host in hosts:
            on(host, "sh", "-c", WIPE)
            assert not serves(host)

    wipe()
    began = time.monotonic()
    assert pyinfra(asked).code == 0
    usual = time.monotonic() - began

    def cut(host, after):
        time.sleep(after)  # the point of the deploy, not a wait for something
        host.kill()
        host.start()

    for number in range(ROUNDS):
        wipe()
        after = {host.name: round(chance.uniform(0.1, 1.0) * usual, 2) for host in hosts}
        cuts = [threading.Thread(target=cut, args=(host, after[host.name])) for host in hosts]
        for one in cuts:
            one.start()
        broken = pyinfra(asked)
        for one in cuts:
            one.join()
        run = pyinfra(asked)
        where = f"round {number} of E2E_SEED={seed}: power cut after {after} s of {usual:.0f} s"
        print(f"{where}: that run ended with {broken.code}, the next one with {run.code}")
        assert run.code == 0, f"{where}:\n{run.text}"
        assert all(serves(host) for host in hosts), where
    assert pyinfra(asked, "--dry").changed() == []


@pytest.mark.long
def test_models_lie_on_the_disk_that_the_settings_name_and_are_served_with_the_operators_variables(
    deploy, settings, inventory, outside, host
):  # fmt: skip
    """ollama/ollama#2701, #14347, #1311, ggml-org/llama.cpp#14421."""
    asked = {"model": {"source": outside.sources["moe"]}, "models_dir": "/mnt/big/models",
             "environment": {"MADE_BY": "an operator, 100 %"}}  # fmt: skip
    on(host, "sh", "-c", "rm -rf /var/lib/llamafleet/models/tiny-moe-*; mkdir -p /mnt/big /root/disk; touch /etc/fstab; "
       "cp /etc/fstab /root/fstab; echo '/root/disk /mnt/big none bind,noauto 0 0' >>/etc/fstab; systemctl daemon-reload; "
       "systemctl start mnt-big.mount")  # fmt: skip
    try:
        deploy(**asked)
        link = on(host, "sh", "-c", "readlink /var/lib/llamafleet/models/tiny-moe-*")
        assert link.startswith("/mnt/big/models/tiny-moe-") and on(host, "ls", link)
        assert link in on(host, "systemctl", "show", "--property=RequiresMountsFor", UNIT)
        assert "mnt-big.mount" in on(host, "systemctl", "show", "--property=Requires", UNIT)
        variables = on(host, "sh", "-c", f"tr '\\0' '\\n' </proc/{main_pid(host, 'tiny')}/environ").splitlines()
        assert "MADE_BY=an operator, 100 %" in variables and serves(host)
        assert deploy("--dry", **asked).changed() == []
        # Its disk gone, the model is not downloaded to another one; when it is back, its server is.
        on(host, "systemctl", "stop", "mnt-big.mount")
        assert not serves(host)
        run = pyinfra(inventory((host, settings(host, **LIVENESS, **asked))))
        assert run.code != 0 and f"leads to {link}, which is not there: mount its disk" in run.text, run.text
        on(host, "mount", "/mnt/big")
        until(lambda: serves(host), 60)
    finally:
        host.run(["umount", "/mnt/big"])
        on(host, "sh", "-c", "mv /root/fstab /etc/fstab; systemctl daemon-reload; "
           "rm -rf /var/lib/llamafleet/models/tiny-moe-* /root/disk")  # fmt: skip
    deploy()
