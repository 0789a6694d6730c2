"""What was measured where: a line for each instance, and in JSON all but the trials."""

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

from llamafleet.cli import main as cli
from llamafleet.cli.tuned import HostRows, Row, table, with_kept
from llamafleet.service.refusals import Refused
from llamafleet.tuning.records import Kept, tuning_of
from tasks import tuned
from tasks.lib.decision import SettingsError
from tests import planning
from tests.tuning.test_record import fingerprint, value

ROOT = Path(__file__).parents[2]
NOW = fingerprint()
OTHER = fingerprint(ram_gib=8)


def row(there=(), kept=None):
    [instance] = planning.settings({}).models
    return Row.of(tuning_of(instance, NOW, dict(there), kept or Kept()))


def lines(**instances):
    return table({"box1": HostRows(instances)}).splitlines()


def test_a_record_that_holds_has_its_winner_gain_and_time():
    head, line = lines(m0=row({"m0": value({"threads": 2}, ended=1.8e9)}))
    assert head.split() == ["host", "instance", "state", "winner", "gain", "interval", "measured", "minutes"]
    assert line.split("  ") == [one for one in line.split("  ")]
    assert [cell.strip() for cell in line.split("  ") if cell.strip()] == [
        "box1", "m0", "holds", "2 threads", "1.50", "1.40 to 1.60", "2027-01-15T08:00:00Z", "20",
    ]  # fmt: skip


def test_a_stale_record_is_shown_with_what_differs_and_one_that_was_measured_elsewhere_with_where():
    _, line, note = lines(m0=row({"m0": value({"threads": 2}, of=OTHER)}))
    assert "  stale  2 threads  1.50  " in line
    assert note.startswith("box1: m0: what was measured no longer holds: another amount of RAM: 8.0 GiB before")
    kept = Kept.of({"gpu2": ("tuned/gpu2.json", {"m0": value()})})
    assert "  holds, measured on gpu2  " in lines(m0=row(kept=kept))[1]


def test_what_was_never_measured_and_what_is_damaged():
    assert lines(m0=row())[1].split() == ["box1", "m0", "not", "measured"]
    _, line, note = lines(m0=row({"m0": {}}))
    assert line.split() == ["box1", "m0", "unusable"] and "is damaged" in note


def test_a_default_that_does_not_run_has_no_gain():
    winner = {"label": "x", "seconds": 2.0, "gain": None, "low": None, "high": None}
    assert "default fails" in lines(m0=row({"m0": {**value(), "winner": winner}}))[1]


def test_json_has_the_record_without_its_trials():
    found = json.loads(json.dumps(HostRows({"m0": row({"m0": value({"threads": 2})})}).to_json()))
    [one] = found["instances"].values()
    assert (one["state"], one["settings"], one["winner"]["gain"]) == ("holds", {"threads": 2}, 1.5)
    assert one["budget_minutes"] == 20 and "trials" not in one and one["fingerprint"]["ram_bytes"] == 64 * 2**30


def test_records_of_hosts_that_do_not_answer_and_of_instances_that_are_gone_are_shown():
    kept = Kept.of({"box1": ("x", {"m0": value(), "gone": value()}), "away": ("y", {"m0": value()}),
                    "old": ("z", {"m0": value()})})  # fmt: skip
    hosts = {"box1": HostRows({"m0": Row("holds")}), "away": HostRows({}, "cannot be reached")}
    found = with_kept(hosts, kept, whole=True)
    states = {(host, name): row.state for host, rows in found.items() for name, row in rows.instances.items()}
    assert states == {("box1", "m0"): "holds", ("box1", "gone"): "not compared", ("away", "m0"): "not compared",
                      ("old", "m0"): "not compared"}  # fmt: skip
    assert found["away"].problem == "cannot be reached" and set(with_kept(hosts, kept, whole=False)) == set(hosts)


# --- the program ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outcome", "problem"), [(Refused.because("no backend"), "no backend"), (SettingsError(["name: missing"]), "name: missing")]
)  # fmt: skip
def test_a_host_that_cannot_be_planned_has_the_reason(monkeypatch, outcome, problem):
    def read(host):
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(tuned, "read_inputs", read)
    assert tuned.look(None) == HostRows({}, problem)


def test_where_nothing_was_measured_every_instance_says_so(monkeypatch):
    inputs = types.SimpleNamespace(settings=planning.settings({}, {}), tunings={})
    monkeypatch.setattr(tuned, "read_inputs", lambda host: inputs)
    monkeypatch.setattr(tuned, "with_measured", lambda host, inputs: (inputs, None, ""))
    assert tuned.look(None) == HostRows({"m0": Row("not measured"), "m1": Row("not measured")})
    monkeypatch.setattr(tuned, "with_measured", lambda host, inputs: (inputs, None, "no commit"))
    assert tuned.look(None) == HostRows({}, "no commit")


def test_a_file_that_is_no_inventory_is_named(tmp_path, capsys):
    assert cli.main(["tuned", "--inventory", str(tmp_path / "none.py")]) == 2
    assert "there is no such inventory file" in capsys.readouterr().err


def test_a_host_that_cannot_be_used_is_named_with_its_records(tmp_path):
    """pyinfra in a process of its own, as users start it."""
    (tmp_path / "fleet.py").write_text('hosts = [("@local", {"models": [{"slot": 3}]})]\n')
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "@local.json").write_text(json.dumps({"m0": value({"threads": 2})}))
    (tmp_path / "tuned" / "gpu2.json").write_text("{")
    words = [sys.executable, "-m", "llamafleet.cli", "tuned", "--inventory", str(tmp_path / "fleet.py")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stderr
    assert "@local  m0        not compared  2 threads" in done.stdout and "models[0].slot: unknown" in done.stdout
    assert f"{tmp_path}/tuned/gpu2.json is damaged" in done.stdout
