"""`llamafleet report`: one file, exit statuses, and what is said where it cannot be written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pyinfra.api.exceptions import PyinfraError

from llamafleet.cli import main as cli
from llamafleet.cli import on_inventory
from tasks import report
from tasks.lib import records
from tests import reporting
from tests.tuning.test_record import value

ROOT = Path(__file__).parents[2]
GONE = 'hosts = [("gone", {"ssh_hostname": "127.0.0.1", "ssh_port": 1, "ssh_connect_retries": 0})]\n'


@pytest.fixture
def hosts(monkeypatch):
    """What is read of the inventory's hosts: facts or sentences by name."""
    found = {"cpu1": reporting.cpu_box()}
    monkeypatch.setattr(report, "over_hosts", lambda inventory, limit, action: found)
    monkeypatch.setattr(records, "kept", lambda: reporting.NOTHING_KEPT)
    return found


def run(folder, *more):
    (folder / "fleet.py").write_text(GONE)
    return report.main([str(folder / "fleet.py"), "--output", str(folder / "report.html"), *more])


def test_a_host_that_does_not_answer_is_in_the_page_with_what_was_measured_there(tmp_path):
    (tmp_path / "fleet.py").write_text(GONE)
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned/gone.json").write_text(json.dumps({"chat": value({"threads": 2})}))
    words = [sys.executable, "-m", "llamafleet.cli", "report", "--inventory", str(tmp_path / "fleet.py"),
             "--output", str(tmp_path / "page.html")]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=ROOT)
    assert done.returncode == 1, done.stderr
    first, last = done.stdout.splitlines()
    assert first.startswith("gone: cannot be reached: nothing answers at its SSH port")
    assert last == f"{tmp_path / 'page.html'}: 1 host, 0 as they should be, 1 could not be read"
    text = (tmp_path / "page.html").read_text()
    assert "nothing answers at its SSH port" in text and "2 threads: 1.50 times as fast" in text
    assert text.startswith("<!doctype html>") and text.endswith("</html>\n") and "<svg" in text


def test_of_many_charts_their_number_is_said_before_they_are_drawn(tmp_path, hosts, monkeypatch, capsys):
    hosts |= {f"box{n}": hosts["cpu1"] for n in range(30)}
    monkeypatch.setattr(report.drawing, "html", lambda page: "drawn")
    assert run(tmp_path) == 0 and (tmp_path / "report.html").read_text() == "drawn"
    charts = 31 * len(reporting.report({"cpu1": hosts["cpu1"]}).hosts[0].instances[0].figures)
    assert capsys.readouterr().err == f"llamafleet: 31 hosts are read; drawing {charts} charts\n"


def test_where_all_hosts_were_read_the_exit_status_is_0(tmp_path, hosts, capsys):
    assert run(tmp_path) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}: 1 host, 1 as they should be\n"
    assert "AMD EPYC" in (tmp_path / "report.html").read_text()


def test_an_earlier_page_is_replaced_and_nothing_else_is_left(tmp_path, hosts):
    (tmp_path / "report.html").write_text("earlier")
    assert run(tmp_path) == 0 and "earlier" not in (tmp_path / "report.html").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fleet.py", "report.html"]
    assert (tmp_path / "report.html").stat().st_mode & 0o777 == 0o644


def test_what_draws_is_asked_for_before_any_host_is_read(tmp_path, monkeypatch, capsys):
    def never(*arguments):
        raise AssertionError("a host was read")

    monkeypatch.setattr(report, "over_hosts", never)
    monkeypatch.setattr(report.drawing, "DRAWS", "not_there_at_all")
    assert run(tmp_path) == 2
    assert 'pip install "llamafleet[report]"' in capsys.readouterr().err and not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("place", ["nowhere/report.html", "."])
def test_a_page_that_cannot_be_written_is_named(tmp_path, hosts, capsys, place):
    assert run(tmp_path, "--output", str(tmp_path / place)) == 2
    said = capsys.readouterr().err
    assert (
        said.startswith(f"llamafleet: --output: {tmp_path / place} cannot be written: ") and len(said.splitlines()) == 1
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fleet.py"]


def test_a_limit_that_names_nobody_is_bad_input(tmp_path, monkeypatch, capsys):
    def nobody(*arguments):
        raise PyinfraError("no host is named nobody")

    monkeypatch.setattr(report, "over_hosts", nobody)
    assert run(tmp_path, "--limit", "nobody") == 2
    assert "no host is named nobody" in capsys.readouterr().err


def test_the_command_passes_inventory_limit_and_output(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        on_inventory, "run", lambda module, options, *words: asked.append((module, options, words)) or 5
    )
    assert cli.main(["report", "--inventory", "fleet.py", "--limit", "gpu*"]) == 5
    [(module, options, words)] = asked
    assert (module, str(options.inventory), options.limit) == ("tasks.report", "fleet.py", "gpu*")
    assert words == ("--output", "report.html") and not options.json
