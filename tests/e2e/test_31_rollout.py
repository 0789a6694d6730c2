"""A fleet is rolled out wave by wave behind its gateway: no request fails or is cut, and a bad change ends with the first
wave."""

import collections
import http.client
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest

from sandbox import upstream
from tests.e2e.deploying import ROOT, connection, environment, main_pid, on, pyinfra, serves
from tests.e2e.test_08_rollback import FAULTS, MAIN

pytestmark = pytest.mark.long

# llama-server takes the argument, loads, and computes what is no number: the gate's completion fails.
BAD = {"extra_flags": ["--rope-freq-base nan"]}
# A gateway refuses servers on addresses of loopback, which sandbox hosts have alone: each listens everywhere, on a port
# of its own.
GATEWAY_PORT, FIRST_PORT = 21180, 21181
CLIENTS, TOKENS = 8, 60


def command(inventory, *options):
    return [sys.executable, "-m", "llamafleet.cli", "rollout", "--inventory", str(inventory), *options]


def roll_out(inventory, *options):
    return subprocess.run(command(inventory, *options), cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, timeout=900)  # fmt: skip


@pytest.fixture(scope="module")
def contexts():
    """Numbers of tokens that no test before has asked for."""
    return iter(range(1088, 8192, 64))


@pytest.fixture
def fleet(hosts, deployed, settings, tmp_path, contexts):
    """Two replicas of a model behind a gateway on the third host, as deployed; a function writes their inventory with a
    change for both."""
    numbers = iter(range(100))

    def changed(*, of_host=None, **model):
        asked = {
            "context_tokens": next(contexts),
            "slots": 2,
            "listen": "0.0.0.0",
            "allow_unauthenticated": True,
            **model,
        }
        data = {host.name: settings(host, drain_seconds=60, reached_at=host.address, model={**asked, "port": port}, **(of_host or {}))
                for host, port in ports(hosts).items()}  # fmt: skip
        gateway = {**settings(hosts[2]), "models": [], "allow_empty_models": True,
                   "gateway_listen": hosts[2].address, "gateway_port": GATEWAY_PORT,
                   "gateway_allow_unauthenticated": True}  # fmt: skip
        return write(tmp_path / f"fleet{next(numbers)}.py", hosts, {**data, hosts[2].name: gateway})

    done = pyinfra(changed(context_tokens=1024))
    assert done.code == 0, done.text
    return changed


def ports(hosts):
    return {host: FIRST_PORT + number for number, host in enumerate(hosts[:2])}


def all_serve(hosts):
    return all(serves(host, port) for host, port in ports(hosts).items())


def write(path, hosts, data):
    entries = [(host.name, {**connection(host), **data[host.name]}) for host in hosts]
    path.write_text(f"serving = {entries[:2]!r}\ngateway = {entries[2:]!r}\n")
    return path


class Load:
    """Streaming requests in flight all the time, each over a connection of its own to the gateway, one client with one
    session; what became of each."""

    def __init__(self, gateway, clients=CLIENTS):
        self.address, self.found, self._end = gateway.address, collections.Counter(), threading.Event()
        self._clients = [threading.Thread(target=self._ask, args=(number,)) for number in range(clients)]

    def _ask(self, number):
        body = json.dumps({"model": "tiny", "prompt": f"{number}: Once", "max_tokens": TOKENS, "stream": True,
                           "ignore_eos": True})  # fmt: skip
        headers = {"Content-Type": "application/json", "X-Session-Id": str(number)}
        while not self._end.is_set():
            connection = http.client.HTTPConnection(self.address, GATEWAY_PORT, timeout=120)
            try:
                connection.request("POST", "/tiny/v1/completions", body, headers)
                answer = connection.getresponse()
                text = answer.read().decode()
                whole = answer.status == 200 and text.rstrip().endswith("data: [DONE]")
                self.found["whole" if whole else f"{answer.status}: {text[-200:]}"] += 1
            except (OSError, http.client.HTTPException) as error:
                self.found[repr(error)] += 1
            finally:
                connection.close()

    def __enter__(self):
        for client in self._clients:
            client.start()
        return self

    def __exit__(self, *_):
        self._end.set()
        for client in self._clients:
            client.join()


def drained(gateway):
    """The servers that the gateway leaves out."""
    told = on(gateway, "python3", "-s", "-E", "-B", "/opt/llamafleet/helpers/current/gateway_admin.py", "show")
    return [name for name, one in json.loads(told.splitlines()[-1]).items() if one["drained"]]


def test_no_request_fails_while_a_change_is_rolled_out(fleet, hosts):
    asked = fleet()
    dry = roll_out(asked, "--dry")
    assert dry.returncode == 0 and dry.stdout.startswith("wave 1 of 2: "), dry.stdout + dry.stderr
    assert all(f"    {host.name}: serve tiny: " in dry.stdout for host in hosts[:2]), dry.stdout
    before = [main_pid(host, "tiny") for host in hosts[:2]]
    with Load(hosts[2]) as load:
        run = roll_out(asked)
    assert run.returncode == 0, run.stdout + run.stderr
    assert list(load.found) == ["whole"] and load.found["whole"] > 2 * CLIENTS, (load.found, run.stderr)
    assert all_serve(hosts) and drained(hosts[2]) == []
    assert not set(before) & {main_pid(host, "tiny") for host in hosts[:2]}
    again = roll_out(asked)
    assert (again.returncode, again.stdout) == (0, "nothing to do: all 3 hosts are as planned\n")
    assert pyinfra(asked, "--dry").changed() == []


def test_a_change_that_does_not_pass_the_gate_ends_with_the_first_wave(fleet, hosts):
    before = {host.name: main_pid(host, "tiny") for host in hosts[:2]}
    with Load(hosts[2]) as load:
        run = roll_out(fleet(**BAD), "--json")
    told = json.loads(run.stdout)
    assert run.returncode == 1 and len(told["failed"]) == 1, run.stderr
    [(failed, why)] = told["failed"].items()
    assert "did not pass the gate" in why and "the previous one was put back and serves" in why
    assert told["done"] == [] and set(told["untouched"]) == set(before) - {failed}
    after = {host.name: main_pid(host, "tiny") for host in hosts[:2]}
    assert {name for name, pid in before.items() if after[name] == pid} == set(told["untouched"])
    assert list(load.found) == ["whole"], (load.found, run.stderr)
    assert all_serve(hosts) and drained(hosts[2]) == []


def test_a_commit_whose_server_is_no_good_ends_with_the_first_wave(fleet, hosts, outside):
    """It compiles, and writes other tokens each time: the other host does not even compile it."""
    parts, reason, _ = FAULTS["garbage"]
    commit = upstream.add_commit(outside.clone, {"tools/server/main.cpp": MAIN % parts}, "rolled-out-garbage")
    with Load(hosts[2]) as load:
        run = roll_out(fleet(of_host={"llama_cpp_ref": commit}), "--json")
    told = json.loads(run.stdout)
    assert run.returncode == 1 and [reason in why for why in told["failed"].values()] == [True], run.stdout + run.stderr
    [other] = [host for host in hosts[:2] if host.name not in told["failed"]]
    releases = on(other, "sh", "-c", "cat /opt/llamafleet/releases/*/release.json")
    assert told["untouched"] == [other.name] and commit not in releases
    assert list(load.found) == ["whole"], (load.found, run.stderr)
    assert all_serve(hosts) and drained(hosts[2]) == []


def test_a_plain_deploy_takes_turns_and_says_that_it_is_no_rollout(fleet, hosts):
    with Load(hosts[2]) as load:
        run = pyinfra(fleet())
    assert run.code == 0 and run.text.count("this is no rollout: 2 hosts of this run serve tiny") == 1, run.text
    assert list(load.found) == ["whole"], (load.found, run.text)


def test_killed_at_any_moment_the_next_rollout_ends_well(fleet, hosts):
    chance = random.Random(14)
    for _ in range(10):
        asked = fleet()
        with subprocess.Popen(command(asked), cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, process_group=0,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:  # fmt: skip
            time.sleep(chance.uniform(2, 40))
            os.killpg(process.pid, signal.SIGKILL)
        again = roll_out(asked)
        assert again.returncode == 0, again.stdout + again.stderr
        assert all_serve(hosts) and drained(hosts[2]) == []
        assert pyinfra(asked, "--dry").changed() == []


def test_a_gateway_is_taken_over_by_the_timer_where_nobody_puts_a_server_back(fleet, hosts):
    """A rollout that is killed in mid-switch, and no other one: the drain ends by itself."""
    asked = fleet()
    with subprocess.Popen(command(asked), cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, process_group=0,
                          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:  # fmt: skip
        deadline = time.monotonic() + 120
        while not drained(hosts[2]):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 180
    while drained(hosts[2]):
        assert time.monotonic() < deadline
        time.sleep(1)
    assert all_serve(hosts)
    assert roll_out(asked).returncode == 0
