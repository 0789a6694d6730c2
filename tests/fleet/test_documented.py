"""The fleet of docs/fleet.md is accepted, and its gateway and its Prometheus reach every server."""

import re
from pathlib import Path

import pytest
from pyinfra.api import Inventory

from llamafleet.cli.arguments import default_data
from llamafleet.fleet import gateway, monitoring
from llamafleet.fleet.gateway import Member, Offered, Secret
from llamafleet.fleet.monitoring import Watched
from llamafleet.settings.schema import Settings

PAGE = Path(__file__).resolve().parents[2] / "docs/fleet.md"


@pytest.fixture(scope="module")
def fleet():
    """As pyinfra reads the inventory of the page."""
    block = PAGE.read_text().split("`inventory/fleet.py`:\n\n")[1]
    code = re.match(r"(?: {4}.*\n|\n)+", block)[0]
    found = {}
    exec(re.sub("^    ", "", code, flags=re.M), found)
    groups = {name: (value, {}) for name, value in found.items() if not name.startswith("_")}
    names = {one if isinstance(one, str) else one[0]: None for hosts, _ in groups.values() for one in hosts}
    hosts = list(Inventory((list(names), {}), **groups))
    return [
        Watched(one.name, (settings := Settings.from_data({**default_data(), **one.data.dict()})).reached_at, settings,
                "monitoring" in one.groups, "gateway" in one.groups)
        for one in hosts
    ]  # fmt: skip


def test_its_hosts_are_watched_and_their_servers_asked_by_prometheus_itself(fleet):
    assert [one.name for one in fleet if one.monitors] == [one.name for one in fleet if one.is_gateway] != []
    assert [list(monitoring.problems(one, fleet)) for one in fleet] == [[]] * len(fleet)
    asked = [(one.name, server.name) for one in fleet for server in monitoring.scraped(one, fleet)]
    assert asked == [(one.name, server.name) for one in fleet for server in one.settings.models] and len(asked) > 1


def test_its_gateway_has_every_server(fleet):
    members = [
        Member(
            one.name, one.reached_at, tuple(Offered(model, model.name, 4, 8192, 60) for model in one.settings.models)
        )
        for one in fleet
    ]
    secrets = {(one.name, model.name): Secret(keys=("the-servers-own-key-0001",)) for one in fleet
               for model in one.settings.models}  # fmt: skip
    front = next(one for one in fleet if one.is_gateway)
    found = gateway.servers(front.name, front.settings, members, (), secrets)
    assert found.problems == ()
    assert {one.address for one in found.servers} == {one.reached_at for one in fleet if one.settings.models}
