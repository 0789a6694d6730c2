"""What llama-server would read of its host beside its command line: kept away, and seen where it was not."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import common
import inherited
import preflight
import pytest

from llamafleet.service.instance_changes import differences, quiet_differences, sha256
from tests.service.test_changes import GROUND, INSTANCE, SERVICE
from tests.service.test_unit import made


@pytest.fixture
def process():
    """Starts a process that has these variables and waits; ended with the test."""
    started = []

    def start(**variables):
        words = [sys.executable, "-c", "print(flush=True); input()"]
        one = subprocess.Popen(words, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        started.append(one)
        one.stdout.readline()
        return one.pid

    yield start
    for one in started:
        one.communicate()


def test_variables_of_a_running_server_are_named(process):
    pid = process(PATH="/usr/bin", LLAMA_ARG_CTX_SIZE="7", LLAMA_ARG_NO_MMPROJ_AUTO="1", AIP_MODE="PREDICTION", MINE="x",
                  XDG_CONFIG_HOME="/dev/null")  # fmt: skip
    assert inherited.of_process(pid) == ["LLAMA_ARG_CTX_SIZE", "LLAMA_ARG_NO_MMPROJ_AUTO", "AIP_MODE"]
    assert inherited.of_process(process(PATH="/usr/bin", XDG_CONFIG_HOME="/dev/null")) == []
    assert inherited.of_process(2**22 + 1) == []


def test_presets_that_a_running_server_sees_are_named(process, monkeypatch, tmp_path):
    (tmp_path / ".config/llama.cpp").mkdir(parents=True)
    (tmp_path / ".config/llama.cpp/config.ini").write_text("[*]\n")
    (tmp_path / "config.ini").write_text("[*]\n")
    monkeypatch.setattr(inherited, "FOLDER", str(tmp_path))
    of_user = f"{tmp_path}/.config/llama.cpp/config.ini"
    assert inherited.of_process(process(HOME=str(tmp_path))) == [f"{tmp_path}/config.ini", of_user]
    assert inherited.of_process(process(XDG_CONFIG_HOME=f"{tmp_path}/.config")) == [f"{tmp_path}/config.ini", of_user]
    assert inherited.of_process(process(HOME=str(tmp_path), XDG_CONFIG_HOME="/dev/null")) == [f"{tmp_path}/config.ini"]


def test_every_unit_keeps_them_away_and_a_unit_without_is_replaced_while_its_server_runs_on():
    unit = made([])[0]
    lines = [one.line for one in preflight.service_directives(unit)]
    assert set(inherited.DIRECTIVES) <= set(lines)
    older = "\n".join(line for line in unit.split("\n") if line not in inherited.DIRECTIVES)
    assert older != unit and common.core_of_unit(older) == common.core_of_unit(unit)
    service = dataclasses.replace(SERVICE, unit_text=unit)
    core = sha256(common.core_of_unit(older))
    there = dataclasses.replace(
        INSTANCE, unit_sha256=sha256(older), good_sha256=sha256(older), unit_core_sha256=core, good_core_sha256=core
    )
    assert differences(service, there, GROUND) == ()
    assert quiet_differences(service, there) == ("its unit differs in lines that need no restart",)
    # One that has taken something over starts again without it.
    taken = dataclasses.replace(there, inherited=("LLAMA_ARG_CTX_SIZE", "/etc/llama.cpp/config.ini"))
    assert differences(service, taken, GROUND) == (
        "it runs with presets of the host: LLAMA_ARG_CTX_SIZE, /etc/llama.cpp/config.ini",
    )


def test_other_hidden_paths_still_need_a_restart_and_may_be_dropped():
    unit = made([])[0]
    hidden, presets = [line for line in unit.split("\n") if line.startswith("InaccessiblePaths=")]
    assert common.core_of_unit(unit.replace(hidden + "\n", "")) != common.core_of_unit(unit)
    assert preflight.lines_of("InaccessiblePaths", preflight.service_directives(unit)) == [hidden]
    assert presets == "InaccessiblePaths=-/etc/llama.cpp"
