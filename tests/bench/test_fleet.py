"""Simulated hosts answer as converged ones do, so that what a run over many of them costs can be measured."""

import contextlib
import json
import shlex
from collections import Counter
from pathlib import Path

import pytest

from bench.fleet import scale
from bench.fleet.converged import Converged
from bench.fleet.ssh import words_of
from llamafleet import payload
from llamafleet.remote.common import HELPERS, helper
from sandbox import models
from sandbox.hub import Hub

COMMIT = "c" * 40


@pytest.fixture
def settings(tmp_path):
    """Of a host that serves a model of the stand-in for the Hub."""
    file = models.weightless(tmp_path, "Qwen3-0.6B")
    with Hub() as hub:
        hub.add("bench/model", file.name, file)
        model = {"name": "chat", "source": f"hf:bench/model/{file.name}", "port": 8080, "listen": "127.20.0.1"}
        yield {"hub_endpoint": hub.url, "llama_cpp_ref": COMMIT, "models": [model]}


@pytest.mark.parametrize(
    "machine",
    [
        "cpu,ram=16GB,cores=4",
        "2xrtx3090,ram=64GB,cores=8",
        pytest.param("rtx4090,ram=64GB,cores=8", marks=pytest.mark.long),
    ],
)
def test_a_run_would_change_nothing_on_a_converged_host_of_any_kind(settings, machine):
    """`Converged` asks that itself, by `changes_needed`, and raises where something differs."""
    host = Converged("box", machine, settings, COMMIT)
    found = json.loads(host(["python3", f"{HELPERS}/{payload.helpers_key()}", "survey.py", "{}"]))["found"]
    assert list(found["instances"]) == ["chat"] and found["instances"]["chat"]["record"]["plan"]["fits"]
    assert list(json.loads(host(["python3", helper("status.py")]))) == ["chat"]


def test_a_host_that_does_not_converge_is_refused(settings):
    with pytest.raises(ValueError, match="MiB"):
        Converged("box", "cpu,ram=2GB,cores=2", settings, COMMIT)


def test_a_host_knows_no_other_programs_and_no_helpers_of_another_version(settings):
    host = Converged("box", "cpu,ram=16GB,cores=4", settings, COMMIT)
    assert host(["python3", f"{HELPERS}/of-before", "survey.py", "{}"]) is None
    assert host(["python3", helper("switch.py")]) is None


def test_the_words_of_a_command_are_those_behind_shells_and_deadlines():
    assert words_of("sh -c 'timeout -k 5 120 python3 a.py '\"'\"'b c'\"'\"''") == ["python3", "a.py", "b c"]
    assert words_of("sh -c 'uname -m'") == ["uname", "-m"]


@pytest.mark.parametrize("words", [["a", "b c"], ["it's", '"'], ["", "\\n"], ["'", '{"a": "b\'c d"}', "a\nb"]])
def test_words_are_split_as_a_shell_does(words):
    assert words_of(shlex.join(words)) == shlex.split(shlex.join(words)) == words
    assert words_of(shlex.join(["sh", "-c", shlex.join(["sh", "-c", shlex.join(words)])])) == words


def test_a_run_without_changes_sends_one_command_to_each_host_and_status_two():
    """The real commands, by SSH. More commands would be felt where hosts are far away."""
    rows = {row["run"]: row for row in scale.measure(2)}
    commands = {kind: row["commands_per_host"] for kind, row in rows.items()}
    assert commands == {"connect": 0, "deploy": 1, "status": 2, "rollout --dry": 1}
    assert all(row["cpu_s"] > 0 and row["rss_mib"] > 10 for row in rows.values())


def test_a_run_that_would_change_something_is_no_measurement(monkeypatch):
    monkeypatch.setattr(scale, "fleet", lambda count, folder: contextlib.nullcontext(folder))
    monkeypatch.setattr(scale, "asked", lambda hosts: Counter())
    monkeypatch.setattr(scale, "run", lambda kind, inventory: ({"cpu_s": 1.0}, "[host0] to do: serve chat"))
    with pytest.raises(SystemExit, match="a run over 1 hosts has something to do"):
        list(scale.measure(1))


def test_the_inventory_has_every_host_with_its_own_address(tmp_path):
    data = [scale.settings(n, "http://hub", {layout: "m.gguf" for _, layout in scale.KINDS}) for n in range(300)]
    scale.write_inventory(tmp_path, data, range(300))
    names: dict = {}
    exec((tmp_path / "inventory.py").read_text(), names)
    assert len({host["ssh_hostname"] for _, host in names["fleet"]}) == 300
    assert Path(names["fleet"][0][1]["ssh_key"]).is_file()
