"""The runner of a tune on a host: planted candidates that fail, kills at any point, and the service that ran before.

The runner is driven as the stage drives it: as a job of the host, with the command line and the directives of the
installed service.
"""

import json
import random
import time

import pytest

from llamafleet.remote.common import HELPERS, core_of_unit
from llamafleet.service.trial import measured
from tests.e2e import deploying
from tests.e2e.deploying import on, pyinfra, serves

KEY = "0123456789abcdef"
UNIT = "llama-server-tiny.service"
PROGRAM = ("python3", "-s", "-E", "-B")
TUNE = (*PROGRAM, f"{HELPERS}/current/tune.py")
SPEC = "var/lib/llamafleet/jobs/tune-tiny.json"
# Directives without which a candidate may start other programs than the server.
EXECUTES = ("NoExecPaths", "ExecPaths")
# Ten times as slow as the server, whatever else the machine does: most of the time it is stopped.
STANDS_STILL = '(while sleep 0.02; do kill -STOP $$; sleep 0.2; kill -CONT $$; done) & exec "$0" "$@"'
# Ends with its server when this says that it works at a request, after it loaded its model.
ENDS_AT_WORK = '"$0" "$@" 2>&1 | while read -r line; do case $line in *"processing task"*) kill -KILL 0;; esac; done'
WORKLOAD = {"prompt": 256, "reply": 64, "depth": 128, "concurrency": 2}


@pytest.fixture(scope="module")
def host(deployed, outside, tmp_path_factory):
    """A host that serves a tiny model with two slots."""
    inventory = tmp_path_factory.mktemp("tune") / "inventory.py"
    deploying.write_inventory(inventory, [(deployed[0], deploying.settings(outside, deployed[0], model={"slots": 2}))])
    done = pyinfra(inventory)
    assert done.code == 0, done.text
    return deployed[0]


@pytest.fixture
def tune(host):
    """Runs batches on the host; without a trial at the test's beginning, and with a service that runs at its end."""
    on(host, "rm", "-rf", "/var/lib/llamafleet/tune/tiny")
    tune = Tune(host)
    yield tune
    tune.wait()
    on(host, "systemctl", "enable", "--now", UNIT)


class Tune:
    def __init__(self, host):
        self.host = host
        plan = json.loads(on(host, "cat", "/etc/llamafleet/instances/tiny/plan.json"))
        unit = on(host, "cat", f"/etc/systemd/system/{UNIT}")
        self.of_service = measured(plan["gate"]["argv"], has_text=False)
        self.directives = core_of_unit(unit).split("[Service]\n")[1].split("\n[")[0].split("\n")

    def candidate(self, label, more=(), drop=(), **other):
        lines = [line for line in self.directives if not line.startswith(tuple(drop))]
        return {"label": label, "argv": self.of_service["argv"], "directives": [*lines, *more], **other}

    def start(self, candidates, **more):
        trials = [{"id": number, "candidate": number, "stage": 1, "environment": {}, **one}
                  for number, one in enumerate(candidates)]  # fmt: skip
        spec = {
            "schema": 1, "instance": "tiny", "key": KEY, "trials": trials, "directives": self.directives,
            "workload": WORKLOAD, "text": None, "trial_seconds": 60, "budget_seconds": 3600, "stops": True,
            "host": self.of_service["host"], "idle_seconds": 0, **more,
        }  # fmt: skip
        (self.host.root / SPEC).write_text(json.dumps(spec))
        command = (*TUNE, "run", f"/{SPEC}")
        on(self.host, *PROGRAM, f"{HELPERS}/current/job.py", "start", "tune-tiny", "--", *command)

    def wait(self):
        """What the job says of its end."""
        state = {"state": "running"}
        while state["state"] == "running":
            told = on(self.host, *PROGRAM, f"{HELPERS}/current/job.py", "follow", "tune-tiny", "--seconds", "30")
            state = json.loads(told)
        return state

    def run(self, candidates, **more):
        self.start(candidates, **more)
        return self.wait()

    def trials(self):
        return json.loads(on(self.host, *TUNE, "read", "tiny", KEY))

    def is_active(self, unit=UNIT):
        return self.host.run(["systemctl", "is-active", unit]).stdout.strip() == "active"

    def units(self):
        """The units of a tune that systemd has."""
        return on(self.host, "systemctl", "list-units", "--all", "--plain", "--no-legend", "llamafleet-*tune*")


def until(true, seconds):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.3)


def test_planted_candidates_fail_by_name_and_the_batch_ends(tune, host):
    """Out of memory inside the unit's own limit; where the machine cannot enforce that, inside an address space as
    small, which the server may call anything."""
    enforced = "memory" in on(host, "cat", "/sys/fs/cgroup/cgroup.controllers").split()
    small = "MemoryMax=3M" if enforced else "LimitAS=60M"
    ended = tune.run([
        tune.candidate("the plan"),
        tune.candidate("slow", argv=["/bin/sh", "-c", STANDS_STILL, *tune.of_service["argv"]], drop=EXECUTES),
        tune.candidate("crashes at once", argv=[*tune.of_service["argv"], "--no-such-flag"]),
        tune.candidate("crashes at work", argv=["/bin/sh", "-c", ENDS_AT_WORK, *tune.of_service["argv"]], drop=EXECUTES),
        tune.candidate("hangs", argv=["/usr/bin/sleep", "1000"], drop=EXECUTES),
        tune.candidate("runs out of memory", drop=["MemoryMax"], more=[small]),
        tune.candidate("the plan again"),
    ], trial_seconds=18, workload={"prompt": 700, "reply": 16, "depth": 128, "concurrency": 2})  # fmt: skip
    assert ended["exit_code"] == 0, ended
    plan, slow, at_once, at_work, hangs, memory, again = tune.trials()
    assert plan["error"] is None and again["error"] is None
    assert slow["seconds"] is None or slow["seconds"] > min(plan["seconds"], again["seconds"])
    assert "no-such-flag" in at_once["error"]
    assert at_work["error"] == "the server ended: code=killed, status=9/KILL"
    assert "did not load its model within" in hangs["error"]
    assert ("out of memory" in memory["error"] and small in memory["error"]) if enforced else memory["error"]
    assert all(one["seconds"] is None for one in (at_once, at_work, hangs, memory))
    assert plan["reply_tokens"] == 16 and abs(plan["prompt_tokens"] - 700) <= 4 and plan["reread_tokens"] <= 4
    assert plan["load_seconds"] > 0 and plan["state"]["busy_cpus"] >= 0
    assert plan["peak_bytes"] > 2**20 if enforced else plan["peak_bytes"] is None
    assert serves(host)
    until(lambda: not tune.units(), 10)


def test_a_service_that_may_not_be_stopped_is_named_and_runs_on(tune):
    since = on(tune.host, "systemctl", "show", "--value", "--property=InvocationID", UNIT)
    ended = tune.run([tune.candidate("the plan")], stops=False)
    assert ended["exit_code"] == 3 and f"{UNIT} runs" in ended["line"]
    hour = int(on(tune.host, "date", "+%H"))
    ended = tune.run([tune.candidate("the plan")], window=f"{(hour + 5) % 24:02}:00-{(hour + 7) % 24:02}:00")
    assert ended["exit_code"] == 4 and "window" in ended["line"]
    assert tune.trials() == [] and not tune.units()
    assert on(tune.host, "systemctl", "show", "--value", "--property=InvocationID", UNIT) == since


@pytest.mark.long
def test_killed_at_any_point_it_resumes_and_the_service_runs_again(tune, host):
    chance, batch = random.Random(14), [tune.candidate(f"trial {n}") for n in range(14)]
    for number in range(10):
        before = len(tune.trials())
        tune.start(batch)
        time.sleep(chance.uniform(0.1, 12.0))
        host.run(["systemctl", "kill", "--signal=KILL", "llamafleet-job-tune-tiny.service"])
        tune.wait()
        until(lambda: tune.is_active() and not tune.units(), 60)
        assert serves(host), f"after kill {number}"
        assert len(tune.trials()) >= before
    ended = tune.run(batch)
    assert ended["exit_code"] == 0, ended
    found = tune.trials()
    assert [one["id"] for one in found] == list(range(14)) and all(one["error"] is None for one in found)
    assert serves(host)


@pytest.mark.long
def test_what_somebody_does_with_the_service_meanwhile_counts(tune, host):
    batch = [tune.candidate(f"trial {n}") for n in range(20)]
    tune.start(batch)
    until(lambda: tune.is_active("llamafleet-tunemark-tiny.service"), 60)
    on(host, "systemctl", "stop", UNIT)
    ended = tune.wait()
    assert ended["exit_code"] == 5 and "was stopped by somebody else" in ended["line"]
    until(lambda: not tune.units(), 10)
    assert not tune.is_active()
    on(host, "systemctl", "start", UNIT)
    tune.start(batch)
    until(lambda: tune.is_active("llamafleet-tunemark-tiny.service"), 60)
    on(host, "systemctl", "start", UNIT)
    ended = tune.wait()
    assert ended["exit_code"] == 5 and "was started by somebody else" in "\n".join(ended["tail"])
    until(lambda: not tune.units(), 10)
    assert serves(host)


@pytest.mark.long
def test_between_two_batches_it_stays_stopped_for_a_while(tune, host):
    assert tune.run([tune.candidate("one")], stays_stopped_seconds=300)["exit_code"] == 0
    assert not tune.is_active() and tune.is_active("llamafleet-tuneguard-tiny.service")
    ended = tune.run([tune.candidate("one"), tune.candidate("two")], stays_stopped_seconds=300)
    assert ended["exit_code"] == 0 and len(tune.trials()) == 2
    on(host, *TUNE, "end", "tiny")
    assert serves(host)
    until(lambda: not tune.units(), 10)
    assert tune.run([tune.candidate(f"trial {n}") for n in range(3)], stays_stopped_seconds=2)["exit_code"] == 0
    until(tune.is_active, 30)


@pytest.mark.long
def test_after_a_power_cut_the_host_starts_the_service(tune, host):
    tune.start([tune.candidate(f"trial {n}") for n in range(20)])
    until(lambda: tune.is_active("llamafleet-tunemark-tiny.service"), 60)
    host.kill()
    host.start()
    until(lambda: serves(host), 60)
    assert not tune.units()
