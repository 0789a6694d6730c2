"""monitoring_apply.py with a real Prometheus and node-exporter, and a stand-in for systemctl."""

import contextlib
import shutil

import common
import monitoring_apply
import pytest
import staged

from sandbox import programs
from sandbox.oracle import free_port
from tests.fleet.monitors import exec_start, files, needs_prometheus, running, watched

pytestmark = needs_prometheus

PORTS = {"metrics_port": free_port(), "monitoring_port": free_port()}


class Systemd:
    """Units that run: Prometheus and node-exporter as their units say, without what only a unit can do."""

    def __init__(self, folder):
        self.folder, self.stack, self.running, self.enabled, self.told = folder, contextlib.ExitStack(), {}, set(), []

    def systemctl(self, *words, check=True):
        self.told.append(words)
        unit = words[-1]
        if words[0] == "enable":
            self.enabled.add(unit)
        elif words[0] == "disable":
            self.enabled.discard(unit)
            self.stop(unit)
        elif words[0] == "restart":
            self.stop(unit)
            self.start(unit)

    def start(self, unit):
        if unit == common.METRICS_TIMER:
            self.running[unit] = None
            return
        text = (self.folder / "units" / unit).read_text()
        program, *words = exec_start(text, **{"/var/lib/llamafleet-prometheus": self.folder / "data"})
        command = [shutil.which(program.rpartition("/")[2]), *words]
        self.running[unit] = self.stack.enter_context(running(command, self.folder / f"{unit}.log"))

    def stop(self, unit):
        process = self.running.pop(unit, None)
        if process is not None:
            process.terminate()
            process.wait(30)

    def is_so(self, verb, unit):
        if verb == "is-enabled":
            return unit in self.enabled
        process = self.running.get(unit)
        return unit in self.running and (process is None or process.poll() is None)

    def restarted(self):
        return [words[-1] for words in self.told if words[0] == "restart"]


@pytest.fixture
def systemd(tmp_path, monkeypatch):
    made = Systemd(tmp_path)
    monkeypatch.setenv("PATH", programs.path())
    (tmp_path / "units").mkdir()
    monkeypatch.setattr(common, "UNITS", str(tmp_path / "units"))
    monkeypatch.setattr(common, "MONITORING", str(tmp_path / "monitoring"))
    monkeypatch.setattr(common, "systemctl", made.systemctl)
    monkeypatch.setattr(staged, "is_so", made.is_so)
    monkeypatch.setattr(monitoring_apply, "READY_SECONDS", 30.0)
    monkeypatch.setattr(monitoring_apply, "SETTLE_SECONDS", 0.1)
    monkeypatch.setattr(monitoring_apply, "POLL_SECONDS", 0.1)
    with made.stack:
        yield made


def apply(systemd, host, change=lambda text: text):
    made = files(host, (host,))
    staged = systemd.folder / "staged"
    staged.mkdir()
    for name, text in {**made.units, **made.texts, **made.secrets}.items():
        (staged / name).write_text(change(text.replace(common.ETC, str(systemd.folder))))
    return monitoring_apply.main(["apply", str(staged), made.digest]), made


def host(**settings):
    return watched("mon", monitors=True, **{**PORTS, **settings})


def test_everything_runs_and_a_second_time_nothing_is_started_again(systemd):
    code, made = apply(systemd, host())
    shown = monitoring_apply.show()
    assert code == 0 and shown["digest"] == made.digest and shown["prometheus"] and shown["exporter"]
    assert all(shown["units"][unit]["active"] and shown["units"][unit]["enabled"] for unit in monitoring_apply.STARTED)
    before = systemd.restarted()
    assert apply(systemd, host())[0] == 0 and systemd.restarted() == before


def test_a_new_configuration_restarts_prometheus_alone(systemd):
    apply(systemd, host())
    before = len(systemd.restarted())
    assert apply(systemd, host(alertmanagers=["alerts.example.net:9093"]))[0] == 0
    assert systemd.restarted()[before:] == [common.PROMETHEUS_UNIT]
    assert len([one for one in (systemd.folder / "monitoring").iterdir() if not one.is_symlink()]) == 1


def test_what_promtool_refuses_changes_nothing(systemd, capsys):
    _, made = apply(systemd, host())
    before = len(systemd.told)
    code, _ = apply(systemd, host(monitoring_days=31), lambda text: text.replace('"scrape_interval": "15s"', '"x": 1'))
    assert code == 1 and "promtool refuses" in capsys.readouterr().out
    assert monitoring_apply.show()["digest"] == made.digest and len(systemd.told) == before


def test_where_the_new_one_does_not_run_the_old_one_does(systemd, capsys):
    _, made = apply(systemd, host())
    code, _ = apply(systemd, host(monitoring_days=31), lambda text: text.replace("--storage.tsdb.path", "--no-such"))
    out = capsys.readouterr().out
    assert code == 1 and common.PROMETHEUS_UNIT in out and "as it was before" in out
    shown = monitoring_apply.show()
    assert shown["digest"] == made.digest and shown["units"][common.PROMETHEUS_UNIT]["active"]


def test_a_host_that_no_longer_monitors_loses_prometheus(systemd):
    apply(systemd, host())
    other = watched("mon", metrics_port=PORTS["metrics_port"])
    assert apply(systemd, other)[0] == 0
    assert common.PROMETHEUS_UNIT not in monitoring_apply.show()["units"]
    assert not systemd.is_so("is-active", common.PROMETHEUS_UNIT) and systemd.is_so("is-active", common.EXPORTER_UNIT)
