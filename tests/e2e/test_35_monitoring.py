"""A host that serves and another one that watches it, both by the real deploy: what goes wrong is an alert within the time
that docs/monitoring.md states, a second run changes nothing, and leaving removes all of it."""

import json
import subprocess
import sys
import time
import urllib.parse

import pytest

from llamafleet.fleet.alerts import ALERTS
from sandbox import oracle_build
from sandbox.oracle import free_port
from tests import chromium
from tests.e2e import deploying
from tests.e2e.conftest import PREFIX
from tests.e2e.deploying import ROOT, connection, environment, main_pid, on, pyinfra, serves, shipped_checks
from tests.fleet.monitors import Asked, until

pytestmark = pytest.mark.long

KEY = "the-servers-own-key-0001"
# Liveness: a pause, then its patience, and a restart.
LIVENESS = {"liveness_seconds": 5, "liveness_interval_seconds": 5}
# The timer's half minute; Prometheus asks every 15 seconds, and compares every 15 seconds.
SEEN_SECONDS = 60
# The machine of these tests does much else.
BUSY_SECONDS = 30
AFTER = {f"Llamafleet{one.name}": one.seconds for one in ALERTS}
UNITS = ("llamafleet-prometheus.service", "llamafleet-node-exporter.service", "llamafleet-metrics.timer")
OF_DEBIAN = ("prometheus.service", "prometheus-node-exporter.service")
GATE = "/var/lib/llamafleet/gate"
DRIFT = ("sed", "-i", "s/TasksMax=2048/TasksMax=99/", "/etc/systemd/system/llama-server-tiny.service")
# On the page of alerts: those that are on, with their annotations.
UNFOLD = """
document.querySelectorAll(".alert-danger .alert_header, .alert_header.alert-danger").forEach(one => one.click());
document.querySelector("div.show-annotations").click();
"""


@pytest.fixture(scope="module")
def two(turn, boot):
    """One serves, one watches."""
    turn.close()
    return boot(2, f"{PREFIX}m", 3, packages=oracle_build.COMPILER)


@pytest.fixture(scope="module")
def port():
    """Where Prometheus listens: sandbox hosts share 127.0.0.1."""
    return free_port()


@pytest.fixture(scope="module")
def inventory(two, port, outside, tmp_path_factory):
    """`tiny` has an address that the other host reaches, and a key; `second` is at loopback."""
    serving, watching = two
    folder = tmp_path_factory.mktemp("monitoring")
    keys = folder / "keys"
    keys.write_text(f"{KEY}\n")
    keys.chmod(0o600)
    data = deploying.settings(outside, serving, speed_floor_percent=1, **LIVENESS, model={"api_key_file": str(keys)})
    data["models"].append({**data["models"][0], "name": "second", "listen": "127.0.0.1", "port": free_port()})
    own = {**outside.settings(), "models": [], "monitoring_port": port, "metrics_port": free_port()}
    path = folder / "inventory.py"
    path.write_text(f"serving = {[(serving.name, {**connection(serving), **data})]!r}\n"
                    f"monitoring = {[(watching.name, {**connection(watching), **own})]!r}\n")  # fmt: skip
    return path


@pytest.fixture(scope="module")
def first(inventory):
    with oracle_build.compiling():
        done = pyinfra(inventory)
    assert done.code == 0, done.text
    return done


@pytest.fixture
def prometheus(first, port):
    return Asked(port)


def alert(name, host, of):
    return (f"Llamafleet{name}", host.name, of)


def fires(prometheus, wanted, since, seconds):
    """Wait for an alert that begins so many seconds after `since` at most; how long it took."""
    allowed = AFTER[wanted[0]] + SEEN_SECONDS + BUSY_SECONDS + seconds
    until(lambda: wanted in prometheus.firing(), max(1, allowed - (time.monotonic() - since)))
    took = time.monotonic() - since
    print(f"{wanted[0]} after {took:.0f} s of {allowed:.0f}")
    return took


def test_every_server_is_seen_by_one_way(prometheus, two):
    until(lambda: {one["health"] for one in prometheus.api("targets")["activeTargets"]} == {"up"}, SEEN_SECONDS)
    found = until(lambda: len(told := prometheus.query("llamacpp:requests_processing")) == 2 and told, 2 * SEEN_SECONDS)
    ways = {(one["metric"]["host"], one["metric"]["name"], one["metric"]["job"]) for one in found}
    assert ways == {(two[0].name, "tiny", "servers"), (two[0].name, "second", "hosts")}
    assert {one["metric"]["host"] for one in prometheus.query("node_memory_MemTotal_bytes")} == {
        one.name for one in two
    }
    assert prometheus.query("llamafleet_metrics_errors > 0") == []
    assert len(prometheus.query('llamafleet_held_bytes{device="host"} > 0')) == 2
    assert [one for one in prometheus.firing() if one[2]] == []


def test_ours_run_and_those_of_debian_s_packages_do_not(first, two):
    for host, units, others in zip(two, (UNITS[1:], UNITS), (OF_DEBIAN[1:], OF_DEBIAN), strict=True):
        assert on(host, "systemctl", "is-active", *units).split() == ["active"] * len(units)
        states = host.run(["systemctl", "show", "--property=LoadState,ActiveState", "--value", *others]).stdout.split()
        assert states == ["masked", "inactive"] * len(others)
    assert KEY not in on(
        two[1], "sh", "-c", "cat /proc/[0-9]*/cmdline /etc/systemd/system/llamafleet-* 2>/dev/null; true"
    )


def test_a_second_run_changes_nothing(first, inventory, two):
    again = pyinfra(inventory)
    assert (again.code, again.changed()) == (0, []), again.text
    alone = pyinfra(inventory, "--limit", two[1].name, deploy="tasks.monitoring.monitoring")
    assert (alone.code, alone.changed()) == (0, []), alone.text


def test_a_host_that_only_watches_is_fine_for_who_looks_at_the_fleet(first, inventory):
    words = [sys.executable, "-m", "llamafleet.cli", "status", "--inventory", str(inventory)]
    status = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert status.returncode == 0, status.stdout + status.stderr
    checks = shipped_checks(inventory)
    assert checks.returncode == 0, checks.stdout + checks.stderr


def test_a_wedge_and_a_drift_are_alerts_in_time(prometheus, two, tmp_path):
    host = two[0]
    on(host, *DRIFT)
    drifted = time.monotonic()
    wedged = main_pid(host, "second")
    on(host, "kill", "-STOP", str(wedged))
    speed = json.loads(on(host, "cat", f"{GATE}/second.json"))["prompt_tokens_per_s"]
    fires(prometheus, alert("ServerWedged", host, "second"), drifted, 5 + max(5, 3 * 1024 / speed) + 8)
    until(lambda: main_pid(host, "second") not in (0, wedged))
    assert fires(prometheus, alert("Drift", host, "tiny"), drifted, 0) >= AFTER["LlamafleetDrift"]
    shown(prometheus, tmp_path, ("LlamafleetDrift", f"{host.name}/tiny is not as it was installed: unit"),
          ("LlamafleetServerWedged", f"{host.name}/second made no progress, and was restarted"))  # fmt: skip


def test_a_deploy_mends_the_drift_and_its_slow_gate_is_an_alert(prometheus, inventory, two):
    """The gates before were three times as fast."""
    host = two[0]
    on(host, *DRIFT)
    record = json.loads(on(host, "cat", f"{GATE}/tiny.json"))
    record["speeds"] = [3 * one for one in record["speeds"]] * 3
    on(host, "python3", "-c", "import sys; open(sys.argv[1], 'w').write(sys.argv[2])", f"{GATE}/tiny.json",
       json.dumps(record))  # fmt: skip
    done = pyinfra(inventory)
    mended = time.monotonic()
    assert done.code == 0 and serves(host, key=KEY), done.text
    fires(prometheus, alert("GateSlow", host, "tiny"), mended, 0)
    until(lambda: alert("Drift", host, "tiny") not in prometheus.firing(), SEEN_SECONDS + BUSY_SECONDS)


def shown(prometheus, folder, *alerts):
    """The pages of Debian's Prometheus show these alerts with what they say, and a graph."""
    page = f"http://127.0.0.1:{prometheus.port}/classic"
    graph = urllib.parse.urlencode({"g0.expr": "llamafleet_held_bytes", "g0.tab": "0", "g0.range_input": "15m"})
    with chromium.browser() as browser:
        browser.visit(f"{page}/alerts", width=1280)
        browser.value(UNFOLD)
        text = browser.value("document.body.innerText")
        assert [one for of_one in alerts for one in of_one if one not in text] == []
        (folder / "alerts.png").write_bytes(browser.picture())
        browser.visit(f"{page}/graph?{graph}", width=1280)
        until(lambda: "llamafleet_held_bytes{" in browser.value("document.body.innerText"))
        (folder / "graph.png").write_bytes(browser.picture())


def test_after_a_power_cut_it_goes_on(prometheus, two):
    known = int(prometheus.query("count_over_time(up{job='prometheus'}[1h])")[0]["value"][1])
    for host in two:
        host.kill()
        host.start()
    began = time.time()
    until(prometheus.is_ready, 60)
    until(lambda: serves(two[0], key=KEY), 60)
    seen = f"timestamp(llamacpp:requests_processing) > {began:.0f}"
    until(lambda: len(prometheus.query(seen)) == 2, 2 * SEEN_SECONDS)
    assert int(prometheus.query("count_over_time(up{job='prometheus'}[1h])")[0]["value"][1]) >= known


def test_leaving_removes_it(prometheus, inventory, two):
    done = pyinfra(inventory, deploy="tasks.uninstall.uninstall")
    assert done.code == 0, done.text
    assert not prometheus.is_ready()
    for host in two:
        left = on(
            host, "sh", "-c", "ls -d /etc/llamafleet /run/llamafleet /etc/systemd/system/llamafleet-* 2>&1 || true"
        )
        assert all("No such file" in line for line in left.splitlines()), left
        assert on(host, "sh", "-c", "systemctl list-units --all --no-legend 'llamafleet*'") == ""
