"""Who is asked by whom, and what keeps a host from being watched."""

import json

import pytest

from llamafleet.fleet import monitoring
from llamafleet.remote.common import EXPORTER_UNIT, METRICS_UNIT
from tests.fleet.monitors import exec_start, files, model, watched

MON = watched("mon", reached_at="10.0.0.5", monitors=True)
LISTENS = {"listen": "10.0.0.7", "allow_unauthenticated": True}


def gpu(*models, **settings):
    return watched("gpu1", *models, **{"reached_at": "10.0.0.7", **settings})


def scraped(host, *monitors):
    return [one.name for one in monitoring.scraped(host, (host, *monitors))]


@pytest.mark.parametrize(
    ("settings", "is_asked"),
    [
        (LISTENS, True),
        ({}, False),  # at loopback
        ({"listen": "0.0.0.0", "allow_unauthenticated": True}, True),
        ({**LISTENS, "allowed_clients": ["10.0.0.0/24"]}, True),
        ({**LISTENS, "allowed_clients": ["10.0.0.9"]}, False),
        ({**LISTENS, "start": "demand"}, False),  # asking would start it
        ({**LISTENS, "tls_certificate_file": "/c", "tls_key_file": "/k"}, False),
        ({**LISTENS, "copies": "per_gpu"}, False),  # how many, the inventory does not say
    ],
    ids=["address", "loopback", "all", "allowed", "not allowed", "on demand", "https", "per_gpu"],
)
def test_prometheus_asks_the_servers_that_it_reaches_and_the_timer_asks_all_others(settings, is_asked):
    host = gpu(model("tiny", **settings))
    assert scraped(host, MON) == (["tiny"] if is_asked else [])
    command = exec_start(files(host, (host, MON)).units[METRICS_UNIT])
    assert ("--scraped" in command) == is_asked


def test_copies_are_asked_one_by_one():
    assert scraped(gpu(model("tiny", copies=2, **LISTENS)), MON) == ["tiny-1", "tiny-2"]


def test_a_host_that_monitors_itself_reaches_its_own_loopback():
    host = watched("box", model("tiny"), monitors=True, is_gateway=True)
    made = files(host, (host,))
    assert scraped(host) == ["tiny"] and "--gateway" not in exec_start(made.units[METRICS_UNIT])
    jobs = {one["job_name"] for one in json.loads(made.texts["prometheus.yml"])["scrape_configs"]}
    assert jobs == {"hosts", "servers-1", "gateway", "prometheus"}
    assert f"127.0.0.1:{host.settings.metrics_port}" in made.units[EXPORTER_UNIT]


def test_what_only_one_of_two_monitors_reaches_the_timer_asks():
    host = gpu(model("tiny"), monitors=True)
    assert scraped(host, MON) == []


def test_node_exporter_lets_in_who_monitors_and_nobody_else():
    host = gpu(metrics_allowed_clients=["10.9.0.0/16"])
    unit = files(host, (host, MON)).units[EXPORTER_UNIT]
    assert "IPAddressDeny=any" in unit and "IPAddressAllow=localhost 10.0.0.7 10.0.0.5 10.9.0.0/16" in unit
    assert f"--web.listen-address=10.0.0.7:{host.settings.metrics_port}" in unit


def test_servers_with_one_key_are_one_job_and_those_with_another_a_second():
    host = gpu(*(model(name, **LISTENS) for name in ("a", "b", "c", "d")))
    keys = {("gpu1", "a"): "one", ("gpu1", "b"): "two", ("gpu1", "c"): "one"}
    made = files(MON, (MON, host), keys)
    jobs = [one for one in json.loads(made.texts["prometheus.yml"])["scrape_configs"] if "servers" in one["job_name"]]
    found = [
        (one.get("authorization", {}).get("credentials_file"), [t["labels"]["name"] for t in one["static_configs"]])
        for one in jobs
    ]
    place = monitoring.CREDENTIALS
    assert found == [
        (f"{place}/{monitoring.key_name('one')}", ["a", "c"]), (f"{place}/{monitoring.key_name('two')}", ["b"]),
        (None, ["d"]),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("host", "monitor", "said"),
    [
        (gpu(reached_at="gpu1.example.net"), MON, "gpu1: metrics_listen: gpu1.example.net is a name"),
        (gpu(metrics_listen="127.0.0.1"), MON, "Prometheus on mon cannot reach 127.0.0.1 of another host"),
        (gpu(), watched("mon", reached_at="mon.lan", monitors=True), "mon of `monitoring` is known as mon.lan alone"),
        (gpu(model("tiny", port=9100), metrics_port=9100), MON, "gpu1: metrics_port: 9100 is the port of tiny"),
        (gpu(is_gateway=True, gateway_stats_port=9100, metrics_port=9100), MON, "9100 is gateway_stats_port"),
    ],
    ids=["name", "loopback", "unknown monitor", "port", "gateway's port"],
)
def test_what_keeps_a_host_from_being_watched_is_said_with_the_way_out(host, monitor, said):
    problems = list(monitoring.problems(host, (host, monitor)))
    assert len(problems) == 1 and said in problems[0]


def test_names_and_all_addresses_are_no_problem_where_the_settings_say_the_rest():
    host = gpu(reached_at="gpu1.example.net", metrics_listen="0.0.0.0", metrics_allowed_clients=["10.0.0.5"])
    monitor = watched("mon", reached_at="mon.lan", monitors=True)
    assert list(monitoring.problems(host, (host, monitor))) == []
    hosts = json.loads(files(monitor, (monitor, host)).texts["prometheus.yml"])["scrape_configs"][0]["static_configs"]
    assert [one["targets"] for one in hosts][1] == [f"gpu1.example.net:{host.settings.metrics_port}"]
