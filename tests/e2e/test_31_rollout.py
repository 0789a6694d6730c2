"""A fleet is rolled out wave by wave behind its gateway: two models, two servers each, on four hosts. No request fails or
is cut, and each model is served at every moment; a bad commit ends with the first wave; and whatever is killed, the next
run ends well."""

import collections
import contextlib
import csv
import http.client
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.request

import pytest

from sandbox import hosts as sandbox
from sandbox import oracle_build, upstream
from tests.e2e import deploying
from tests.e2e.conftest import PREFIX
from tests.e2e.deploying import ROOT, connection, environment, main_pid, on, pyinfra, serves
from tests.e2e.test_08_rollback import FAULTS, MAIN

pytestmark = pytest.mark.long

MODELS = ("dense", "moe")
# The machine's loopback is the hosts' as well: there HAProxy has its statistics.
GATEWAY_PORT, STATS_PORT = 21180, 21181
CLIENTS, TOKENS = 8, 60
LOOK_SECONDS = 0.2


def command(inventory, *options):
    return [sys.executable, "-m", "llamafleet.cli", "rollout", "--inventory", str(inventory), *options]


def roll_out(inventory, *options):
    return subprocess.run(command(inventory, *options), cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, timeout=1500)  # fmt: skip


@contextlib.contextmanager
def rolling_out(inventory):
    """A rollout in a group of processes, which is killed where it still runs at the end of the block. What it says is in
    the file with the suffix .log."""
    with (
        inventory.with_suffix(".log").open("w") as log,
        subprocess.Popen(command(inventory), cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, process_group=0,
                         stdout=log, stderr=log) as process,
    ):  # fmt: skip
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def five(turn, boot):
    """Four that serve, and a gateway."""
    turn.close()
    made = boot(5, f"{PREFIX}r", 3, packages=oracle_build.COMPILER)
    yield made
    sandbox.down([one.name for one in made])


@pytest.fixture(scope="module")
def serving(five):
    """By host, its model."""
    return dict(zip(five, [one for one in MODELS for _ in range(2)], strict=False))


@pytest.fixture(scope="module")
def gateway(five):
    return five[4]


@pytest.fixture(scope="module")
def fleet(serving, gateway, outside, tmp_path_factory):
    """The fleet as deployed; a function writes its inventory with a change for all servers, without one with numbers
    of tokens that no host was asked for before. A context is rounded up, and may be the same; a batch is not."""
    numbers, contexts, batches = iter(range(100)), iter(range(1088, 8192, 64)), iter(range(1024, 2048, 32))
    folder = tmp_path_factory.mktemp("fleet")

    def changed(of_host=(), **model):
        asked = {"context_tokens": next(contexts) if not of_host else 1024, "slots": 2,
                 "batch_tokens": next(batches) if not of_host else 1024, **model}  # fmt: skip
        entries = [
            (host.name, {**connection(host), **deploying.settings(outside, host, kind, drain_seconds=60,
                                                                  model={"name": kind, **asked}), **dict(of_host)})
            for host, kind in serving.items()
        ]  # fmt: skip
        front = {**outside.settings(), "models": [], "gateway_listen": gateway.address, "gateway_port": GATEWAY_PORT,
                 "gateway_stats_port": STATS_PORT}  # fmt: skip
        path = folder / f"fleet{next(numbers)}.py"
        path.write_text(f"serving = {entries!r}\ngateway = {[(gateway.name, {**connection(gateway), **front})]!r}\n")
        return path

    with oracle_build.compiling():
        done = pyinfra(changed(context_tokens=1024))
    assert done.code == 0, done.text
    return changed


def all_serve(serving):
    return [host.name for host, kind in serving.items() if not serves(host)] == []


class Load:
    """Streaming requests in flight all the time, half of them for each model, each over a connection of its own to the
    gateway, one client with one session: what became of each, by model. And how long a model had no server up."""

    def __init__(self, gateway):
        self.address, self.found, self.away = gateway.address, collections.Counter(), []
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(CLIENTS)]
        self._threads.append(threading.Thread(target=self._look))

    def _ask(self, number):
        model = MODELS[number % len(MODELS)]
        body = json.dumps({"prompt": f"{number}: Once", "max_tokens": TOKENS, "stream": True, "ignore_eos": True})
        headers = {"Content-Type": "application/json", "X-Session-Id": str(number)}
        while not self._end.is_set():
            self.found[model, self._outcome(model, body, headers)] += 1

    def _outcome(self, model, body, headers):
        connection = http.client.HTTPConnection(self.address, GATEWAY_PORT, timeout=120)
        try:
            connection.request("POST", f"/{model}/v1/completions", body, headers)
            answer = connection.getresponse()
            text = answer.read().decode()
            whole = answer.status == 200 and text.rstrip().endswith("data: [DONE]")
            return "whole" if whole else f"{answer.status}: {text[-200:]}"
        except (OSError, http.client.HTTPException) as error:
            return repr(error)
        finally:
            connection.close()

    def _look(self):
        while not self._end.wait(LOOK_SECONDS):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{STATS_PORT}/;csv", timeout=20) as answer:
                    rows = list(csv.DictReader(answer.read().decode().lstrip("# ").splitlines()))
            except OSError as error:  # a reload takes it for a moment
                self.away.append(repr(error)) if "refused" not in str(error) else None
                continue
            up = {row["pxname"] for row in rows if row["type"] == "2" and row["status"].startswith("UP")}
            self.away += [model for model in MODELS if f"model:{model}" not in up]

    def all_whole(self):
        return all(self.found[model, "whole"] >= CLIENTS for model in MODELS) and len(self.found) == len(MODELS)

    def __enter__(self):
        for one in self._threads:
            one.start()
        return self

    def __exit__(self, *_):
        self._end.set()
        for one in self._threads:
            one.join()


def drained(gateway):
    """The servers that the gateway leaves out."""
    told = on(gateway, "python3", "-s", "-E", "-B", "/opt/llamafleet/helpers/current/gateway_admin.py", "show")
    return [name for name, one in json.loads(told.splitlines()[-1]).items() if one["drained"]]


def pids(serving):
    return {host.name: main_pid(host, kind) for host, kind in serving.items()}


def test_no_request_fails_while_a_commit_is_rolled_out(fleet, serving, gateway, outside):
    commit = upstream.add_commit(outside.clone, {"rolled-out.txt": "nothing else\n"}, "rolled-out")
    asked, before = fleet(of_host={"llama_cpp_ref": commit}), pids(serving)
    with Load(gateway) as load:
        run = roll_out(asked)
    assert run.returncode == 0, run.stdout + run.stderr
    assert load.all_whole() and load.away == [], (load.found, load.away, run.stderr)
    assert all_serve(serving) and drained(gateway) == []
    assert {name for name, pid in pids(serving).items() if pid == before[name]} == set()
    current = {on(host, "cat", "/opt/llamafleet/current/release.json") for host in serving}
    assert all(commit in one for one in current)
    again = roll_out(asked)
    assert (again.returncode, again.stdout) == (0, "nothing to do: all 5 hosts are as planned\n")
    assert pyinfra(asked, "--dry").changed() == []


def test_a_commit_whose_server_is_no_good_ends_with_the_first_wave(fleet, serving, gateway, outside):
    """It compiles, and writes other tokens each time: the other hosts do not even compile it."""
    parts, reason, _ = FAULTS["garbage"]
    commit = upstream.add_commit(outside.clone, {"tools/server/main.cpp": MAIN % parts}, "rolled-out-garbage")
    before = pids(serving)
    with Load(gateway) as load:
        run = roll_out(fleet(of_host={"llama_cpp_ref": commit}), "--json")
    told = json.loads(run.stdout)
    assert run.returncode == 1 and len(told["waves"][0]) == 1, run.stdout + run.stderr
    [(failed, why)] = told["failed"].items()
    assert failed in told["waves"][0] and reason in why and "the previous one was put back and serves" in why
    assert told["done"] == [] and set(told["untouched"]) == set(before) - {failed}
    after = pids(serving)
    assert {name for name, pid in before.items() if after[name] == pid} == set(told["untouched"])
    assert not any(commit in on(host, "sh", "-c", "cat /opt/llamafleet/releases/*/release.json")
                   for host in serving if host.name != failed)  # fmt: skip
    assert load.all_whole() and load.away == [], (load.found, load.away, run.stderr)
    assert all_serve(serving) and drained(gateway) == []


def test_a_plain_deploy_takes_turns_and_says_that_it_is_no_rollout(fleet, serving, gateway):
    """Other numbers of tokens reload the gateway, too."""
    with Load(gateway) as load:
        run = pyinfra(fleet())
    assert run.code == 0 and run.text.count("this is no rollout: 2 hosts of this run serve") == len(MODELS), run.text
    assert load.all_whole() and load.away == [], (load.found, load.away, run.text)


@pytest.mark.parametrize("number", range(10))
def test_killed_at_any_moment_the_next_rollout_ends_well(fleet, serving, gateway, number):
    """The machine that rolls out, a host that serves, or the gateway: the last two have a power cut, and boot again."""
    chance = random.Random(number)
    victim = ["controller", chance.choice(list(serving)), gateway][number % 3]
    asked = fleet()
    with rolling_out(asked) as process:
        time.sleep(chance.uniform(2, 60))
        if victim != "controller":
            victim.kill()
            time.sleep(chance.uniform(0, 10))
            victim.start()
            process.wait(1500)
    again = roll_out(asked)
    assert again.returncode == 0, again.stdout + again.stderr
    assert all_serve(serving) and drained(gateway) == []
    assert pyinfra(asked, "--dry").changed() == []


def test_a_gateway_is_taken_over_by_the_timer_where_nobody_puts_a_server_back(fleet, serving, gateway):
    """A rollout that is killed in mid-switch, and no other one: the drain ends by itself."""
    asked = fleet()
    with rolling_out(asked) as process:
        deadline = time.monotonic() + 300
        while not drained(gateway):
            is_over = process.poll() is not None or time.monotonic() > deadline
            assert not is_over, asked.with_suffix(".log").read_text()
            time.sleep(0.2)
    deadline = time.monotonic() + 240
    while drained(gateway):
        assert time.monotonic() < deadline
        time.sleep(1)
    assert all_serve(serving)
    assert roll_out(asked).returncode == 0
