"""A rollout over pretended hosts: pyinfra's own runs, with a file in place of what hosts have. No test itself.

    python -m tests.tasks.rolled_out FILE INVENTORY [options of tasks.rollout]

FILE has by host name: what it has ("now"), what it should have ("wanted"), its models, and how its deploy goes wrong
("fails", "refused", "hangs"). Each deploy adds the host to the file FILE.log, and so does what a gateway is told: it is
the host "gateway", and has the servers of the others ("servers", by name whether each is up). A host whose monitoring is looked at is noted there, too.
"""

import pyinfra_cli  # isort: skip  # as in tasks.rollout  # noqa: F401

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from pyinfra.api import FunctionCommand, operation
from pyinfra.context import ctx_host

from llamafleet import stages
from llamafleet.fleet.rollout import HostState
from llamafleet.fleet.waves import Member
from llamafleet.host.answers import GatewayServer
from tasks import rollout
from tasks.lib import decision, ends, gateway_drains, switching, to_do

FILE = Path(sys.argv[1])


def fleet():
    return json.loads(FILE.read_text())


def look(host):
    one = fleet()[host.name]
    if "unread" in one:
        return one["unread"]
    to_do = () if one["now"] == one["wanted"] else (f"serve x: {one['now']} is not {one['wanted']}",)
    models = frozenset(one.get("models", "x"))
    return HostState(models, Member(host.name, models), to_do)


def note(line):
    with FILE.with_suffix(".log").open("a") as log:
        log.write(f"{line}\n")


@operation()
def replace():
    yield FunctionCommand(_replace, (), {})


def _replace(state, host):
    with switching.turn(host, ["x"], None):
        note(host.name)
        one = fleet()[host.name]
        if "fails" in one:
            ends.note(host.name, one["fails"])
            return False
        time.sleep(one.get("hangs", 0))
        data = fleet()
        data[host.name]["now"] = one["wanted"]
        FILE.write_text(json.dumps(data))
    return True


def deploy():
    host = ctx_host.get()
    if why := fleet()[host.name].get("refused"):
        ends.note(host.name, why)
        host.state.fail_hosts({host})
    replace(name="Replace what the host has")


def gateway():
    host = ctx_host.get()
    if "gateway" in host.groups:
        others = [one for one in host.state.inventory if one is not host and decision.makes(one, "services")]
        to_do.say(host, "gateway", [f"{one.name}/x has changed" for one in others if fleet()[one.name]["now"] == 1])
        learn(name="Let the gateway learn")


def monitoring():
    host = ctx_host.get()
    to_do.say(host, "monitoring", ["it is new"] if fleet()[host.name].get("unwatched") else [])
    watch(name="Monitor the host")


@operation()
def watch():
    yield FunctionCommand(_watch, (), {})


def _watch(state, host):
    note(f"monitoring: {host.name}")
    return "unwatched" not in fleet()[host.name]


@operation()
def learn():
    yield FunctionCommand(_learn, (), {})


def _learn(state, host):
    others = sorted(one.name for one in state.inventory if state.is_host_in_limit(one) and one is not host)
    note(f"gateway: learns of {', '.join(others)}")
    return "fails" not in fleet()[host.name]


def ask(host, verb, *words):
    """gateway_admin.py."""
    servers = [word for word in words if "/" in word]
    if verb != "show":
        note(f"gateway: {verb} {', '.join(servers)}")
    return {
        f"{name}/x": GatewayServer(up=one.get("up", True), drained="left" in one, drained_seconds=one.get("left"), check="L4TOUT")
        for name, one in fleet().items() if name != host.name
    }  # fmt: skip


if __name__ == "__main__":
    rollout.look, stages.deploy, stages.gateway, stages.monitoring = look, deploy, gateway, monitoring
    gateway_drains._ask, gateway_drains.UP_SECONDS = ask, 0.5
    there = SimpleNamespace(desired=SimpleNamespace(installed=SimpleNamespace(instances={"x": None})))
    decision.of = lambda host: there
    sys.exit(rollout.main(sys.argv[2:]))
