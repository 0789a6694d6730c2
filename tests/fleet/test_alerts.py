"""When each alert is on, by promtool."""

import json
import subprocess

import pytest

from llamafleet.fleet import alerts
from sandbox import programs
from tests.fleet.monitors import files, needs_prometheus, watched

NOW = 90 * 60  # promtool's time() at the end of a test, seconds


def series(metric, fine, bad, extra="", name=True):
    """A series of a host where all is well, and one where it is not."""
    labels = 'host="%s",name="tiny"' if name else 'host="%s"'
    return [
        {"series": f"{metric}{{{labels % host}{extra}}}", "values": values}
        for host, values in (("fine", fine), ("bad", bad))
    ]


# What Prometheus saw in the last 90 minutes, one value for each.
SEEN = {
    "HostDown": series("up", "1x90", "1x86 0x3", ',job="hosts"', name=False),
    "ServerDown": [
        *series("llamafleet_instance_active", "1x90", "1x86 0x3"),
        *series("llamafleet_instance_starting", "0x90", "0x90"),
        *series("llamafleet_instance_on_demand", "0x90", "0x90"),
        {"series": 'llamafleet_instance_active{host="loads",name="tiny"}', "values": "0x90"},
        {"series": 'llamafleet_instance_starting{host="loads",name="tiny"}', "values": "1x90"},
        {"series": 'llamafleet_instance_starting{host="asked",name="tiny"}', "values": "0x90"},
        {"series": 'llamafleet_instance_active{host="asked",name="tiny"}', "values": "0x90"},
        {"series": 'llamafleet_instance_on_demand{host="asked",name="tiny"}', "values": "1x90"},
    ],
    "ServerSilent": [
        *series("up", "1x90", "1x85 0x4", ',job="servers"'),
        *series("llamafleet_instance_starting", "0x90", "0x90"),
        {"series": 'up{host="loads",name="tiny",job="servers"}', "values": "0x90"},
        {"series": 'llamafleet_instance_starting{host="loads",name="tiny"}', "values": "1x90"},
    ],
    "ServerWedged": series("llamafleet_last_wedge_time_seconds", "3600x90", f"{NOW - 60}x90"),
    "ServerStuck": [
        *series("llamacpp:n_decode_total", "0+50x90", "0+50x70 3500x20"),
        *series("llamacpp:requests_processing", "1x90", "1x90"),
        {"series": 'llamacpp:n_decode_total{host="idle",name="tiny"}', "values": "7x90"},
        {"series": 'llamacpp:requests_processing{host="idle",name="tiny"}', "values": "0x90"},
    ],
    "ServerRestarts": series("llamafleet_restarts_total", "7x90", "0x60 0+1x29", ',by="systemd"'),
    "LivenessFailed": series("llamafleet_liveness_failed", "0x90", "0x80 1x9"),
    "Drift": series("llamafleet_drift", "0x90", "0x80 1x9", ',what="unit"'),
    "GateFailed": series("llamafleet_gate_ok", "1x90", "0x90"),
    "GateSlow": [
        *series("llamafleet_gate_tokens_per_second", "40x90", "30x90", ',kind="write"'),
        *series("llamafleet_gate_usual_tokens_per_second", "50x90", "50x90", ',kind="write"'),
    ],
    "GateSlower": series("llamafleet_gate_slower", "0x90", "1x90"),
    "MemoryAbovePlan": [
        *series("llamafleet_held_bytes", "1000x90", "1100x90", ',device="host"'),
        *series("llamafleet_planned_bytes", "1000x90", "1000x90", ',device="host"'),
    ],
    "GpuMemoryAbovePlan": [
        *series("llamafleet_held_bytes", "11e9x90", "12e9x90", ',device="GPU-1"'),
        *series("llamafleet_planned_bytes", "10e9x90", "10e9x90", ',device="GPU-1"'),
    ],
    "MemoryNearLimit": [
        *series("llamafleet_cgroup_bytes", "90x90", "97x90"), *series("llamafleet_limit_bytes", "100x90", "100x90"),
    ],
    "HostMemoryLow": [
        *series("node_memory_MemAvailable_bytes", "10x90", "3x90", name=False),
        *series("node_memory_MemTotal_bytes", "100x90", "100x90", name=False),
    ],
    "DiskFull": [
        *series("node_filesystem_avail_bytes", "10x90", "3x90", ',fstype="ext4",mountpoint="/"', name=False),
        *series("node_filesystem_size_bytes", "100x90", "100x90", ',fstype="ext4",mountpoint="/"', name=False),
    ],
    "CertificateEnds": series(
        "llamafleet_certificate_end_time_seconds", f"{NOW + 20 * 86400}x90", f"{NOW + 10 * 86400}x90"
    ),
    "MetricsOld": series("llamafleet_metrics_time_seconds", f"{NOW - 60}x90", f"{NOW - 400}x90", name=False),
    "MetricsErrors": series("llamafleet_metrics_errors", "0x90", "1x90", name=False),
    "GatewayServerDown": series("haproxy_server_status", "0x90", "0x80 1x9", ',state="DOWN",server="a:b"', name=False),
    "GatewayQueue": series("haproxy_backend_current_queue", "0x90", "0x70 2x19", ',proxy="model:a"', name=False),
    "GatewayErrors": [
        *series("haproxy_backend_http_responses_total", "0+100x90", "0+100x90", ',proxy="m",code="2xx"', name=False),
        *series("haproxy_backend_http_responses_total", "0+1x90", "0+10x90", ',proxy="m",code="5xx"', name=False),
    ],
}  # fmt: skip


def repeated(values):
    """promtool's notation: "1x90" is one value, repeated as often."""
    words = [word if "+" in word else f"{word.partition('x')[0]}+0x{word.partition('x')[2]}" for word in values.split()]
    return " ".join(words)


@pytest.fixture(scope="module")
def rules(tmp_path_factory):
    path = tmp_path_factory.mktemp("rules") / "rules.yml"
    path.write_text(json.dumps(alerts.rules()))
    return path


def promtool(*words):
    return subprocess.run([programs.find("promtool"), *map(str, words)], capture_output=True, text=True)


def seen(alert):
    """What Prometheus saw, of hosts that are this alert's alone."""
    for one in SEEN[alert.name]:
        yield {"series": one["series"].replace('host="', f'host="{alert.name}-'), "values": repeated(one["values"])}


def is_on(alert):
    """That it is on for its host `bad`, and for no other host."""
    expression = f'count by (host) (ALERTS{{alertname="Llamafleet{alert.name}",alertstate="firing"}})'
    sample = {"labels": f'{{host="{alert.name}-bad"}}', "value": 1}
    return {"expr": expression, "eval_time": "90m", "exp_samples": [sample]}


@needs_prometheus
def test_each_alert_is_on_where_something_is_wrong_and_nowhere_else(rules, tmp_path):
    """promtool names those of which it is not so."""
    test = {
        "interval": "1m",
        "input_series": [one for alert in alerts.ALERTS for one in seen(alert)],
        "promql_expr_test": [is_on(alert) for alert in alerts.ALERTS],
    }
    path = tmp_path / "test.yml"
    path.write_text(json.dumps({"rule_files": [str(rules)], "evaluation_interval": "1m", "tests": [test]}))
    done = promtool("test", "rules", path)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_prometheus
def test_promtool_finds_nothing_wrong_with_the_configuration(tmp_path):
    host = watched("mon", monitors=True, is_gateway=True, alertmanagers=["alerts.example.net:9093"])
    for name, text in files(host, (host,)).texts.items():
        (tmp_path / name).write_text(text)
    done = promtool("check", "config", tmp_path / "prometheus.yml")
    assert done.returncode == 0 and f"{len(alerts.ALERTS)} rules found" in done.stdout, done.stdout + done.stderr
