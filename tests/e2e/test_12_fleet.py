"""Several hosts and several runs: locks that live as long as their run, a host that never answers, and an ordinary user
of a host who would like to be root."""

import json
import threading
import time

import pytest

from tests.e2e.deploying import PORT, ask, on, pyinfra, serves

QUICK = "tests/e2e/quick_deploy.py"
LEASE = 4.0  # of quick_deploy.py
LOCK = "/run/llamafleet/lock.json"


class Beside:
    """A deploy in a thread of its own; `run` is its result once it has ended."""

    def __init__(self, inventory, **options):
        self.run = None
        self._thread = threading.Thread(target=self._work, args=(inventory,), kwargs=options)

    def _work(self, inventory, **options):
        self.run = pyinfra(inventory, **options)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._thread.join()


def until(true, seconds=120.0):
    deadline = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)
    return value


def holder(host):
    """Who holds the host's lock; None where nobody does."""
    text = host.run(["cat", LOCK]).stdout
    return json.loads(text) if text else None


@pytest.fixture
def slow_download(outside):
    """The first part of the model with experts, 5 MB, comes slowly: for seven leases."""
    path = outside.sources["moe"].removeprefix("hf:")
    outside.hub.fault(path, times=None, bytes_per_second=180_000)
    yield
    outside.hub.heal()


@pytest.mark.long
def test_one_host_works_through_three_leases_while_the_others_wait(
    settings, inventory, hosts, deployed, outside, slow_download, tmp_path
):
    """All end green; and a second operator, in another container of the same machine, is told who is at work."""
    slow, *others = reversed(hosts)  # the third one is bare
    on(slow, "sh", "-c", "rm -rf /var/lib/llamafleet/models/tiny-moe-*")
    pairs = [(host, settings(host, model={"context_tokens": 768})) for host in others]
    asked = inventory((slow, settings(slow, "moe")), *pairs)
    with Beside(asked, deploy=QUICK) as first:
        until(lambda: on(slow, "sh", "-c", "ls -A /var/lib/llamafleet/models/tiny-moe-*/.*.partial 2>/dev/null; true"))
        began = time.monotonic()
        seen, names = {host.name: set() for host in hosts}, set()
        while time.monotonic() - began < 3 * LEASE:
            for host in hosts:
                held = holder(host)
                assert held is not None, f"{host.name}: its lock was lost after {time.monotonic() - began:.0f} s"
                seen[host.name].add(held["refreshed_seconds"])
                names.add((held["run"], held["who"]))
            time.sleep(0.3)
        second = pyinfra(asked, deploy=QUICK, before=["unshare", "--pid", "--fork", "--mount-proc"])
        assert first.run is None, "the download did not take that long"
    [(_, who)] = names
    assert all(len(times) >= 3 for times in seen.values()), {name: len(times) for name, times in seen.items()}
    # A lease that had ended would have been taken.
    told = [line for line in second.text.splitlines() if f"] refused: {who} (pid " in line]
    assert second.code != 0 and len(told) == 3, second.text
    assert "3 of 3 hosts failed:" in second.text  # and each with its reason, at the end
    assert first.run.code == 0, first.run.text
    assert all(serves(host) for host in hosts)
    assert [holder(host) for host in hosts] == [None] * 3


def test_a_host_that_never_answers_and_one_whose_port_is_taken_fail_by_name(settings, inventory, hosts, deployed):
    """The one at its deadline; an ordinary user has taken the other one's port. The third host deploys."""
    silent, good, squatted = hosts
    on(squatted, "sh", "-c", "systemctl stop llama-server-tiny.service || true")  # where a test has deployed it
    squat = ["systemd-run", "--quiet", "--unit=squatter", "--uid=nosudo", "python3", "-m", "http.server", "--bind"]
    on(squatted, *squat, squatted.address, str(PORT))
    until(lambda: ask(squatted, "/")[0], 20)
    on(silent, "sh", "-c", "mv /usr/bin/python3 /usr/bin/python3.away")
    on(silent, "sh", "-c", "printf '#!/bin/sh\\nkill -STOP $$\\n' >/usr/bin/python3 && chmod 755 /usr/bin/python3")
    try:
        began = time.monotonic()
        changed = settings(good, "moe", model={"context_tokens": 640})
        all_three = inventory((silent, settings(silent)), (good, changed), (squatted, settings(squatted, "moe")))
        run = pyinfra(all_three, deploy=QUICK)
        took = time.monotonic() - began
    finally:
        on(squatted, "systemctl", "stop", "squatter")
        on(squatted, "sh", "-c", "systemctl start llama-server-tiny.service || true")
        on(silent, "sh", "-c", "mv /usr/bin/python3.away /usr/bin/python3")
    assert run.code != 0 and f"[{silent.name}]" in run.text
    assert "refused: the survey: it did not end within 15 s" in run.text
    assert f"port {PORT} on {squatted.address} is taken by squatter.service" in run.text
    assert [name for name in run.changed(good.name) if "Start and check" in name], run.text
    assert serves(good) and serves(silent)
    assert "Traceback" not in run.text
    left = on(silent, "sh", "-c", "ps -eo args | grep -c '[p]ython3.*survey.py' || true")
    assert left == "0", "what hung is still there"
    print(f"failed by name and deployed in {took:.0f} s")


# What an ordinary user of a host can do: he has made the names that pyinfra would upload to, as files, links and
# folders of his, swaps whatever appears in /tmp for his own, and answers on the port.
ATTACK = r"""
import glob, hashlib, http.server, os, sys, threading, time
MINE = b"#!/bin/sh\ntouch /root/was-here; id >/tmp/was-root\n"
paths = sys.argv[2:]
for number, path in enumerate(paths):
    name = "/tmp/pyinfra-" + hashlib.sha1(path.encode()).hexdigest()
    if number % 3 == 0:
        open(name, "wb").write(MINE)
        os.chmod(name, 0o666)
    elif number % 3 == 1:
        os.symlink("/etc/passwd", name)
    else:
        os.mkdir(name, 0o777)
open("/tmp/ready", "w").close()
own, seen = set(os.listdir("/tmp")), {}
while True:
    for folder in ("/tmp", "/var/tmp", "/run", "/dev/shm"):
        for path in glob.glob(folder + "/*") + glob.glob(folder + "/llamafleet-probe.*/*"):
            if os.path.basename(path) in own:
                continue
            try:
                if os.path.isfile(path):
                    with open(path, "r+b") as file:
                        file.truncate(); file.write(MINE)
                    seen[path] = "written"
                elif os.path.isdir(path):
                    open(path + "/evil.py", "wb").write(MINE)
                    seen[path] = "entered"
            except OSError:
                pass
            try:
                os.rename(path, path + ".away")
                open(path, "wb").write(MINE)
                seen[path] = "replaced"
            except OSError:
                pass
    with open("/tmp/attacked", "w") as out:
        out.write("\n".join(f"{how} {path}" for path, how in sorted(seen.items())))
"""
GUESSED = [
    *(f"/var/lib/llamafleet/staged/tiny/{name}" for name in ("llama-server-tiny.service", "plan.json", "api-keys")),
    "/etc/llamafleet/instances/tiny/plan.json.new",
]


@pytest.fixture
def attacker(deployed):
    """He is at work on the first host."""
    host = deployed[0]
    jobs = on(host, "sh", "-c", "ls /var/lib/llamafleet/jobs/*.json").split()
    key = on(host, "readlink", "/opt/llamafleet/helpers/current")
    guessed = [*GUESSED, *jobs, f"/opt/llamafleet/helpers/{key}.zip"]
    host.run(["sh", "-c", "cat > /home/nosudo/attack.py"], user="nosudo", input=ATTACK, check=True)
    words = ["systemd-run", "--quiet", "--unit=attacker", "--uid=nosudo", "python3", "/home/nosudo/attack.py", "x"]
    on(host, *words, *guessed)
    until(lambda: host.run(["test", "-e", "/tmp/ready"]).returncode == 0, 20)
    yield host
    on(host, "systemctl", "stop", "attacker")
    on(host, "sh", "-c", "rm -rf /home/nosudo/attack.py /tmp/ready /tmp/attacked /tmp/pyinfra-* /root/was-here")


@pytest.mark.parametrize("way", ["sudo", pytest.param("su with a password", marks=pytest.mark.long)])
def test_nothing_of_an_ordinary_user_s_is_installed_or_run_as_root(settings, inventory, attacker, way, tmp_path):
    """Through every file that a deploy sends: programs, a job's question, staged files, keys, plans."""
    host, keys = attacker, tmp_path / "keys"
    keys.write_text("a-key-of-the-team\n")
    keys.chmod(0o600)
    if way == "sudo":
        on(host, "sh", "-c", "rm -rf /opt/llamafleet/helpers /var/lib/llamafleet/models/tiny-dense-*")
        connection = {"ssh_user": "admin", "_sudo": True}
    else:
        host.run(["chpasswd"], input="root:a password of root's\n", check=True)
        connection = {"ssh_user": "admin", "_su_user": "root", "_su_password": "a password of root's"}
    data = settings(host, model={"api_key_file": str(keys), "context_tokens": 512 if way == "sudo" else 896})
    run = pyinfra(inventory((host, {**data, **connection})))
    attacked = on(host, "cat", "/tmp/attacked")
    assert run.code == 0, f"{run.text}\n{attacked}"
    assert "llamafleet" not in attacked and "pyinfra" not in attacked, attacked
    assert host.run(["test", "-e", "/tmp/was-root"]).returncode != 0
    assert serves(host, key="a-key-of-the-team") and ask(host, "/v1/completions", {"prompt": "a"})[0] == 401
    # All that was installed is root's, and none of it has a word of his.
    installed = ["/opt/llamafleet", "/etc/llamafleet", "/var/lib/llamafleet/jobs", "/var/lib/llamafleet/good"]
    assert on(host, "sh", "-c", f"find {' '.join(installed)} ! -user root -printf '%p ' | head") == ""
    found = host.run(["grep", "-rlF", "was-here", *installed, "/etc/systemd/system"])
    assert (found.returncode, found.stdout) == (1, "")
    unit = on(host, "cat", "/etc/systemd/system/llama-server-tiny.service")
    plan = on(host, "cat", "/etc/llamafleet/instances/tiny/plan.json")
    assert unit.startswith("# Made by llamafleet") and json.loads(plan)["schema"]


@pytest.mark.parametrize(
    ("script", "how"),
    [
        ("exit 3", "exit code 3"),
        ("kill -KILL $$", "it was killed by SIGKILL"),
        ("sleep 300", "it was killed by SIGTERM"),
    ],
)
def test_how_a_job_ended_is_what_systemd_says(deployed, script, how):
    """Also if the job itself could write nothing any more."""
    program = ["python3", "-s", "-E", "-B", "/opt/llamafleet/helpers/current/job.py"]
    on(deployed[0], *program, "start", "trial-1", "--", "sh", "-c", script)
    if script.startswith("sleep"):
        on(deployed[0], "systemctl", "stop", "llamafleet-job-trial-1.service")
    seen = json.loads(on(deployed[0], *program, "follow", "trial-1", "--seconds", "30"))
    assert (seen["state"], seen["how"]) == ("ended", how)
    on(deployed[0], "sh", "-c", "rm /var/lib/llamafleet/jobs/trial-1.*")
