"""Every expression of alerts and of the dashboard, asked of a real Prometheus that watches a small fleet of stand-ins."""

import contextlib
import json
import threading
import time

import common
import metrics
import pytest
import status

from llamafleet.fleet import alerts
from tasks.lib.templates import TEMPLATES
from tests.fleet.gateways import Gateway, StandIn, needs_haproxy, server
from tests.fleet.monitors import Prometheus, exec_start, exporter, files, model, needs_prometheus, until, watched
from tests.remote.metered import Host, redirect, stand_in

pytestmark = [needs_prometheus, needs_haproxy]

COUNTERS = ("prompt_tokens_total", "prompt_seconds_total", "tokens_predicted_total", "tokens_predicted_seconds_total",
            "n_decode_total")  # fmt: skip
GAUGES = ("requests_processing", "requests_deferred", "n_busy_slots_per_decode", "n_tokens_max")
GPU = "GPU-1a2b"


def told(count):
    """llama-server's /metrics after so many requests."""
    lines = []
    for name in COUNTERS:
        lines += [f"# TYPE llamacpp:{name} counter", f"llamacpp:{name} {count * 100}"]
    for name in GAUGES:
        lines += [f"# TYPE llamacpp:{name} gauge", f"llamacpp:{name} 1"]
    return "\n".join(lines) + "\n"


class Fleet:
    """gpu1 has the instance `tiny` at an address that Prometheus on `mon` reaches; gpu2 has one on its loopback, which
    its timer asks. The gateway of gpu1 is at loopback too."""

    def __init__(self, folder, monkeypatch, stack):
        self.monkeypatch, self.now = monkeypatch, {}
        self.servers = [stack.enter_context(stand_in()) for _ in range(2)]
        for number, one in enumerate(self.servers):
            one.key, one.text = f"key-of-the-server-{number}-0123456789", told(1)
        key_file = folder / "keys"
        key_file.write_text("a-key-that-tests-read-elsewhere\n")
        models = [model("tiny", port=one.server_port, api_key_file=str(key_file)) for one in self.servers]
        behind = stack.enter_context(StandIn("gpu1"))
        # Prometheus asks 127.0.0.1, where all of this test's hosts are; gpu2's server listens as on another loopback.
        self.one = watched("gpu1", models[0], is_gateway=True)
        self.two = watched("gpu2", {**models[1], "listen": "127.0.0.5"})
        self.mon = watched("mon", monitors=True)
        self.all = (self.one, self.two, self.mon)
        (folder / "gateway").mkdir()
        self.gateway = stack.enter_context(Gateway(folder / "gateway", self.one.settings, [server(behind)]))
        self.hosts = {}
        for watch, one in zip(self.all[:2], self.servers, strict=True):
            place = folder / watch.name
            place.mkdir()
            self.hosts[watch.name] = Host(place, one)
        keys = {("gpu1", "tiny"): self.servers[0].key, ("gpu2", "tiny"): self.servers[1].key}
        self.made = {one.name: files(one, self.all, keys) for one in self.all}
        for one in self.all:
            stack.enter_context(exporter(folder / f"exporter-{one.name}", self.made[one.name],
                                         folder / one.name / "run/metrics"))  # fmt: skip
        self.write()
        self.prometheus = stack.enter_context(Prometheus(folder / "prometheus", self.mon, self.made["mon"]))

    def write(self):
        """What the timers do on each host, by the very words of their units."""
        for name, host in self.hosts.items():
            with self.monkeypatch.context() as patch:
                redirect(patch, host.folder)
                patch.setattr(common, "show", host.show)
                patch.setattr(metrics, "certificate_end", lambda path: 4e9 if "tiny" in path else None)
                patch.setattr(status, "gpu_bytes", lambda *_: {GPU: 3 * 2**30})
                command = exec_start(self.made[name].units[common.METRICS_UNIT])
                assert metrics.main(command[command.index(common.helper("metrics.py")) + 1 :]) == 0

    def go_on(self, count):
        """Another moment: requests were answered, and the timers have run."""
        for one in self.servers:
            one.text = told(count)
        assert self.gateway.ask("/tiny/v1/completions", {})[0] == 200
        self.write()


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as monkeypatch:
        made = Fleet(tmp_path_factory.mktemp("fleet"), monkeypatch, stack)
        for host in made.hosts.values():
            host.plan(gpus=[{"uuid": GPU, "device": "CUDA0", "planned_bytes": 2**30}])
            host.shows("tiny", MainPID=1)
        stop = threading.Event()

        def work():
            count = 1
            while not stop.wait(0.5):
                count += 1
                made.go_on(count)

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        # Two samples of each server, and what was asked of the gateway.
        until(lambda: len(made.prometheus.query("increase(llamacpp:n_decode_total[5m]) > 0")) == len(made.servers))
        until(lambda: made.prometheus.query("rate(haproxy_backend_http_responses_total[5m]) > 0"))
        yield made
        stop.set()
        worker.join(30)


def test_every_target_answers(fleet):
    def targets():
        found = fleet.prometheus.api("targets")["activeTargets"]
        return sorted((one["labels"]["job"], one["labels"]["host"], one["health"]) for one in found)

    wanted = [("hosts", "gpu1", "up"), ("hosts", "gpu2", "up"), ("hosts", "mon", "up"), ("prometheus", "mon", "up"),
              ("servers", "gpu1", "up")]  # fmt: skip
    until(lambda: targets() == wanted)


@pytest.mark.parametrize("alert", alerts.ALERTS, ids=lambda one: one.name)
def test_what_an_alert_looks_at_is_known(fleet, alert):
    assert fleet.prometheus.known(alert.value), alert.value


def panels():
    found = json.loads((TEMPLATES / "grafana-dashboard.json").read_text())
    for panel in found["panels"]:
        for asked in panel.get("targets", ()):
            yield pytest.param(asked["expr"], id=f"{panel['title']}-{asked['refId']}")


@pytest.mark.parametrize("expression", list(panels()))
def test_what_the_dashboard_shows_is_known(fleet, expression):
    asked = expression.replace("$__rate_interval", "5m").replace("$host", ".*")
    assert fleet.prometheus.known(asked), asked


def test_a_server_is_known_by_one_way_alone(fleet):
    found = until(lambda: len(told := fleet.prometheus.query("llamacpp:requests_processing")) > 1 and told)
    assert sorted((one["metric"]["host"], one["metric"]["name"], one["metric"]["job"]) for one in found) == [
        ("gpu1", "tiny", "servers"), ("gpu2", "tiny", "hosts"),
    ]  # fmt: skip


def test_no_key_is_shown_to_who_reads_the_configuration(fleet):
    shown = fleet.prometheus.get("/api/v1/status/config").decode() + fleet.prometheus.get("/api/v1/targets").decode()
    assert not [one.key for one in fleet.servers if one.key in shown]


def test_a_wedge_a_drift_and_a_slow_gate_become_alerts(fleet):
    host = fleet.hosts["gpu2"]
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    host.write("gate/liveness/tiny.json", {"restarts": 1, "time": when, "why": "it hangs"})
    host.write("gate/tiny.json", {"ok": True, "time": when, "speeds": [40.0, 50.0, 60.0, 20.0]})
    wanted = {("LlamafleetServerWedged", "gpu2", "tiny"), ("LlamafleetGateSlow", "gpu2", "tiny")}
    until(lambda: wanted <= fleet.prometheus.firing())
    host.shows("tiny", NeedDaemonReload="yes")
    until(lambda: fleet.prometheus.query('ALERTS{alertname="LlamafleetDrift",alertstate="pending",host="gpu2"}'))
