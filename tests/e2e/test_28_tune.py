"""Measuring on a host what serves fastest: the record, the plan that follows, and a service that is left in peace.

Random weights are as fast as trained ones, so that a tune of a minute is a real one; who wins is not what is seen here.
"""

import json
import subprocess
import time

import pytest

from tests.e2e import deploying
from tests.e2e.deploying import (
    PORT,
    ROOT,
    command,
    environment,
    main_pid,
    on,
    pyinfra,
    serves,
    shipped_checks,
    write_inventory,
)

STAGE = "tasks.tune.tune"
# A tiny workload: where cores are shared, the threads of llama-server as it ships wait for each other. With one thread
# the batches are open.
WORKLOAD = {"prompt_tokens": 16, "reply_tokens": 4, "live_tokens": 24}
FRESH = {"name": "fresh", "port": PORT + 5, **WORKLOAD}


@pytest.fixture(scope="module")
def host(deployed, outside, tmp_path_factory):
    """The host with the one model that all tests here begin with, whatever others did before."""
    data = deploying.settings(outside, deployed[0])
    done = pyinfra(write_inventory(tmp_path_factory.mktemp("before") / "inventory.py", [(deployed[0], data)]))
    assert done.code == 0, done.text
    return deployed[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of the inventories, so that their records lie together."""
    return tmp_path_factory.mktemp("inventories")


@pytest.fixture
def wanted(settings, host, folder):
    """An inventory of the running instance and of `fresh`, whose settings `other` and `model` change; `changes` are of
    the host's."""

    def make(model=(), other=(), **changes):
        data = settings(host, **{"tune": "missing", "tune_minutes": 1, **changes})
        [tiny] = data["models"]
        return write_inventory(
            folder / "inventory.py",
            [(host, {**data, "models": [{**tiny, **dict(other)}, {**tiny, **FRESH, **dict(model)}]})],
        )

    return make


def trials(host, name="fresh"):
    return on(host, "cat", f"/var/lib/llamafleet/tune/{name}/trials.jsonl").splitlines()[1:]


def record(host, name="fresh"):
    return json.loads(on(host, "cat", f"/var/lib/llamafleet/tuned/{name}.json"))


def status(inventory):
    words = [str(ROOT / ".venv/bin/python"), "-m", "llamafleet.cli", "status", "--json", "--inventory", str(inventory)]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    return json.loads(done.stdout)


def test_a_deploy_measures_what_does_not_run_yet_and_installs_what_won(host, wanted, folder):
    pid = main_pid(host, "tiny")
    run = pyinfra(wanted())
    assert run.code == 0, run.text
    assert "tiny is not measured: its service runs, and is not stopped for it" in run.text
    assert main_pid(host, "tiny") == pid and serves(host, FRESH["port"])
    found = record(host)
    assert found == json.loads((folder / "tuned" / f"{host.name}.json").read_text())["fresh"]
    assert len(found["trials"]) == len(trials(host)) >= 2, found["why"]
    assert f"fresh: {found['winner']['label']}: " in run.text and "fresh: the record is in " in run.text
    # The last trial may take longer than those before it, by which it is told whether there is time for one more.
    assert sum(one["took_seconds"] for one in found["trials"][:-1]) <= 60
    plan = json.loads(on(host, "cat", "/etc/llamafleet/instances/fresh/plan.json"))
    assert plan["plan"]["why"][0].startswith("measured here: ")
    for key, flag in (("ubatch_tokens", "--ubatch-size"), ("batch_tokens", "--batch-size")):
        if key in found["settings"]:
            argv = plan["plan"]["argv"]
            assert argv[argv.index(flag) + 1] == str(found["settings"][key])


def test_the_next_run_changes_nothing_and_measures_nothing(host, wanted):
    pid, before = main_pid(host, "fresh"), trials(host)
    run = pyinfra(wanted())
    assert run.code == 0 and run.changed(host.name) == [] and main_pid(host, "fresh") == pid, run.text
    assert trials(host) == before
    state = status(wanted())[host.name]["instances"]
    assert (state["fresh"]["tuned"]["state"], state["tiny"]["tuned"]) == ("used", {}) and state["fresh"]["fine"]
    done = shipped_checks(wanted())
    assert done.returncode == 0, done.stdout[-4000:]


def test_another_workload_is_named_and_the_plan_is_as_without_the_record(host, wanted):
    run = pyinfra(wanted({"reply_tokens": 5}, tune="never"), "--dry")
    assert "tuned: what was measured no longer holds: another workload: reply_tokens 4 before, 5 now" in run.text
    found = status(wanted({"reply_tokens": 5}, tune="never"))[host.name]["instances"]["fresh"]
    assert found["tuned"]["state"] == "stale"


def test_the_stage_alone_leaves_a_service_that_runs_in_peace(host, wanted):
    pid = main_pid(host, "fresh")
    run = pyinfra(wanted({"reply_tokens": 5}), deploy=STAGE)
    assert run.code == 0 and run.changed(host.name) == [] and main_pid(host, "fresh") == pid, run.text
    assert (
        "fresh is not measured: its service runs, and is not stopped for it: set tune_stops_service = True" in run.text
    )
    run = pyinfra(wanted(), deploy=STAGE)
    assert run.code == 0 and 'fresh is not measured: it was measured already: set tune = "always"' in run.text


@pytest.mark.long
def test_a_service_is_stopped_where_it_may_be_and_put_back(host, wanted):
    run = pyinfra(wanted())  # as the tests before left it, also where this one runs alone
    assert run.code == 0 and serves(host, FRESH["port"]), run.text
    asked = {"reply_tokens": 5}
    run = pyinfra(wanted(asked, WORKLOAD, tune_stops_service=True), deploy=STAGE)
    assert run.code == 0 and serves(host, FRESH["port"]) and serves(host), run.text
    assert record(host)["fingerprint"]["workload"]["reply_tokens"] == 5
    assert "tiny is not measured: it was measured already, with fresh" in run.text  # the same model and workload
    run = pyinfra(wanted(asked, WORKLOAD))
    assert run.code == 0 and "fresh is not measured: it was measured already" in run.text, run.text
    assert serves(host, FRESH["port"]) and serves(host)
    run = pyinfra(wanted(asked, WORKLOAD))
    assert run.code == 0 and run.changed(host.name) == [], run.text


@pytest.mark.long
@pytest.mark.parametrize("least", [1, 6])
def test_a_run_that_is_killed_is_gone_on_with(host, wanted, least, tmp_path):
    name, port = f"killed{least}", PORT + 5 + least
    inventory = wanted({"name": name, "port": port, "reply_tokens": 5 + least})
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command(inventory, "-y"), cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, stdout=file, stderr=file
        )
    try:
        over = time.monotonic() + 300
        done = []
        while len(done) < least and process.poll() is None and time.monotonic() < over:
            time.sleep(0.5)
            told = host.run(["cat", f"/var/lib/llamafleet/tune/{name}/trials.jsonl"]).stdout.splitlines()[1:]
            done = [line for line in told if line.endswith("}")]
        assert len(done) >= least and process.poll() is None, log.read_text()
    finally:
        process.kill()
        process.wait()
    run = pyinfra(inventory)
    assert run.code == 0 and serves(host, port), run.text
    assert trials(host, name)[: len(done)] == done
    ids = [json.loads(line)["id"] for line in trials(host, name)]
    assert ids == list(range(len(ids))) and len(record(host, name)["trials"]) == len(ids)
