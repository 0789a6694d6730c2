"""metrics.py on a stand-in for a host: what it writes of instances, servers and the gateway."""

import os
import shutil
import subprocess
import time

import common
import metrics
import metrics_relay
import psutil
import pytest

from sandbox.oracle import free_port
from tests.remote.metered import HAPROXY, HELD, PLANNED, SERVER, Host, redirect, stand_in


@pytest.fixture
def server():
    with stand_in() as made:
        yield made


@pytest.fixture
def host(tmp_path, monkeypatch, server):
    redirect(monkeypatch, tmp_path)
    made = Host(tmp_path, server)
    monkeypatch.setattr(common, "show", made.show)
    return made


def drift(found):
    return {name.split('what="')[1].split('"')[0] for name, value in found.items() if "_drift{" in name and value}


def test_an_instance_is_told_with_its_speed_memory_build_and_restarts(host):
    host.write("gate/liveness/tiny.json", {"restarts": 3, "by_systemd": 4, "time": "2026-11-30T09:00:00Z"})
    found = host.wrote()
    wanted = {
        'llamafleet_instance_active{name="tiny"}': 1,
        'llamafleet_restarts_total{name="tiny",by="systemd"}': 6,
        'llamafleet_restarts_total{name="tiny",by="liveness"}': 3,
        'llamafleet_last_wedge_time_seconds{name="tiny"}': 1796029200,
        'llamafleet_gate_ok{name="tiny"}': 1,
        'llamafleet_gate_tokens_per_second{name="tiny",kind="write"}': 20,
        'llamafleet_gate_usual_tokens_per_second{name="tiny",kind="write"}': 50,
        'llamafleet_predicted_tokens_per_second{name="tiny"}': 45.5,
        'llamafleet_planned_bytes{name="tiny",device="host"}': PLANNED,
        'llamafleet_held_bytes{name="tiny",device="host"}': HELD,
        'llamafleet_cgroup_bytes{name="tiny"}': HELD + 9000 - 4096,
        'llamafleet_limit_bytes{name="tiny"}': 4 * 2**30,
        'llamafleet_build_info{name="tiny",commit="c0ffee",build="0123456789abcdef"}': 1,
        "llamafleet_metrics_errors": 0,
    }
    assert {name: found.get(name) for name in wanted} == wanted
    assert drift(found) == set() and abs(found["llamafleet_metrics_time_seconds"] - time.time()) < 600


def test_where_a_cgroup_counts_no_memory_the_process_does(host):
    shutil.rmtree(host.folder / "cgroups")
    host.shows("tiny", MainPID=os.getpid())
    found, size = host.wrote(), psutil.Process().memory_info()
    held = found['llamafleet_held_bytes{name="tiny",device="host"}']
    assert abs(held - (size.rss - size.shared)) < size.rss / 4 and 'llamafleet_cgroup_bytes{name="tiny"}' not in found
    host.shows("tiny", MainPID=0)
    assert 'llamafleet_held_bytes{name="tiny",device="host"}' not in host.wrote()


def test_what_a_server_tells_gets_its_name_and_no_key_is_written(host, server):
    found = host.wrote()
    assert found['llamacpp:prompt_tokens_total{name="tiny"}'] == 8192
    assert found['llamafleet_server_answers{name="tiny"}'] == 1 and "something_else" not in str(found)
    assert server.key not in (host.folder / "run/metrics/llamafleet.prom").read_text()


def test_a_server_that_prometheus_asks_is_not_asked_again(host, server):
    assert not [name for name in host.wrote("--scraped", "tiny") if name.startswith("llamacpp:")]
    assert server.asked == []


@pytest.mark.parametrize(
    ("active", "sub", "starting"),
    [
        ("activating", "start-post", 1),
        ("activating", "auto-restart", 0),
        ("failed", "failed", 0),
        ("active", "running", 0),
    ],
)
def test_a_server_that_loads_is_starting(host, active, sub, starting):
    host.shows("tiny", ActiveState=active, SubState=sub)
    assert host.wrote()['llamafleet_instance_starting{name="tiny"}'] == starting


def test_a_server_that_does_not_run_is_not_asked(host, server):
    host.shows("tiny", ActiveState="inactive", SubState="dead")
    assert host.wrote()['llamafleet_instance_active{name="tiny"}'] == 0
    assert server.asked == []


def test_a_server_that_refuses_the_key_does_not_answer(host, server):
    server.key = "another"
    assert host.wrote()['llamafleet_server_answers{name="tiny"}'] == 0


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("unit", lambda host: (host.folder / "units" / common.unit_of("tiny")).write_text("# Made by llamafleet\n#")),
        ("unit", lambda host: (host.folder / "units" / common.liveness_units("tiny")[1]).write_text("#\n")),
        ("plan", lambda host: host.plan(commit="edited")),
        ("not-reloaded", lambda host: host.shows("tiny", NeedDaemonReload="yes")),
        ("liveness", lambda host: host.units.update({common.liveness_units("tiny")[1]: {"ActiveState": "inactive"}})),
        ("release", lambda host: (host.folder / "releases/0123456789abcdef/bin/llama-server").unlink()),
    ],
)
def test_what_was_changed_by_hand_is_drift(host, what, change):
    change(host)
    assert drift(host.wrote()) == {what}


def test_drop_ins_are_drift_unless_they_are_allowed(host, monkeypatch):
    monkeypatch.setattr(common, "drop_ins", lambda unit: [f"/etc/systemd/system/{unit}.d/nice.conf"])
    assert drift(host.wrote()) == {"drop-in"}
    host.plan(allowed_drop_ins=["nice.conf"])
    assert drift(host.wrote()) == set()


def test_a_damaged_plan_is_counted_and_named_and_the_rest_is_told(host, capsys):
    (host.folder / "instances/tiny/plan.json").write_text("{")
    found = host.wrote()
    assert found["llamafleet_metrics_errors"] == 1 and drift(found) == {"plan"}
    assert "tiny" in capsys.readouterr().err


def test_the_gateway_s_queues_are_told_where_it_is_named(host, server):
    server.text, server.key = HAPROXY, ""
    found = host.wrote("--scraped", "tiny", "--gateway", str(server.server_port))
    assert found['haproxy_server_current_sessions{proxy="model:tiny",server="gpu1:tiny"}'] == 2
    assert not [name for name in found if "process" in name]


def test_a_gateway_that_is_silent_is_an_error(host):
    assert host.wrote("--gateway", str(free_port()))["llamafleet_metrics_errors"] == 1


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl is not installed")
def test_the_end_of_a_certificate_is_told(host):
    path = host.folder / "instances/tiny/tls-certificate"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
                    "-keyout", host.folder / "key", "-out", path, "-days", "30", "-subj", "/CN=tiny"],
                   check=True, capture_output=True)  # fmt: skip
    end = host.wrote()['llamafleet_certificate_end_time_seconds{name="tiny"}']
    assert 29 * 86400 < end - time.time() < 31 * 86400


def test_samples_of_two_servers_stay_together():
    """node-exporter refuses a file in which a metric has two TYPE lines."""
    lines = [*metrics_relay.labelled(SERVER, "one"), *metrics_relay.labelled(SERVER, "two")]
    told = metrics_relay.together(lines)
    assert len([one for one in told if one.startswith("# TYPE llamacpp:requests_processing")]) == 1
    first = told.index('llamacpp:requests_processing{name="one"} 1')
    assert told[first + 1] == 'llamacpp:requests_processing{name="two"} 1' and len(told) == 6


def test_labels_are_quoted():
    assert metrics.line("m", {"a": 'b"\\\n'}, 1.5) == 'm{a="b\\"\\\\\\n"} 1.5'


@pytest.mark.skipif(not shutil.which("promtool"), reason="Prometheus is not installed")
def test_promtool_finds_nothing_wrong_with_our_own_metrics(host):
    host.wrote("--scraped", "tiny")
    with (host.folder / "run/metrics/llamafleet.prom").open() as text:
        done = subprocess.run(["promtool", "check", "metrics"], stdin=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_a_server_tells_cannot_spoil_the_file(host, server):
    hostile = ["llamacpp:a 1 2 3", "llamacpp:a abc", 'llamacpp:a{x="y"} 1', "llamafleet_drift 1", "# TYPE llamacpp:a foo",
               "# HELP llamacpp:a \\x", "# TYPE llamacpp:prompt_tokens_total gauge", "llamacpp:prompt_tokens_total 7",
               "llamacpp:a " + "1" * 10_000, "llamacpp:requests_processing 5"]  # fmt: skip
    server.text = SERVER + "\n".join(hostile) + "\n"
    host.wrote()
    lines = (host.folder / "run/metrics/llamafleet.prom").read_text().splitlines()
    assert [one for one in lines if "llamacpp:" in one] == [
        "# TYPE llamacpp:prompt_tokens_total counter", 'llamacpp:prompt_tokens_total{name="tiny"} 8192',
        "# TYPE llamacpp:requests_processing gauge", 'llamacpp:requests_processing{name="tiny"} 1',
    ]  # fmt: skip
    assert "llamafleet_drift 1" not in lines
