"""`llamafleet plan`: exit status, JSON on stdout, messages on stderr."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llamafleet import cli
from llamafleet.settings import SettingsError
from sandbox import models
from tests import planning

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(models.weightless(tmp_path_factory.mktemp("models"), "gpt-oss-120b"))


@pytest.fixture
def machine_file(tmp_path):
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(planning.machine([24564]).to_json()))
    return str(path)


def test_a_plan_exits_0_and_is_the_contract_s_json(model, machine_file, capsys):
    arguments = ["plan", "--model", model, "--machine", machine_file, "--set", "context_tokens=131072", "--json"]
    assert cli.main(arguments) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["schema"], told["fits"], told["refusal"]) == (1, True, None)
    assert told["argv"][:2] == ["--ctx-size", "131072"]


def test_a_refusal_exits_3_with_json(model, machine_file, capsys):
    assert cli.main(["plan", "--model", model, "--machine", machine_file, "--set", "gpu_reserve_mib=1024",
                     "--set", "ram_reserve_mib=60000", "--json"]) == 3  # fmt: skip
    told = json.loads(capsys.readouterr().out)
    assert told["fits"] is False
    assert told["refusal"]["needed_bytes"] > told["refusal"]["available_bytes"]


def test_the_table_shows_devices_and_reasons(model, machine_file, capsys):
    assert cli.main(["plan", "--model", model, "--machine", machine_file]) == 0
    out = capsys.readouterr().out
    assert "GPU0" in out
    assert "host" in out
    assert "|WWWW" in out
    assert "experts of" in out


def test_the_refusal_s_table_says_what_would_help(model, machine_file, capsys):
    assert cli.main(["plan", "--model", model, "--machine", machine_file, "--set", "ram_reserve_mib=60000"]) == 3
    out = capsys.readouterr().out
    assert "REFUSED: model:" in out
    assert "try: " in out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["contxt_tokens=1"], "did you mean"),
        (["context_tokens=many"], "should be a whole number or None"),
        (["context_tokens"], "should be KEY=VALUE"),
        (["=3"], "should be KEY=VALUE"),
        (["source=/x"], "is given by --model"),
        (["slots=0"], "should be from 1 to 256"),
    ],
)
def test_bad_settings_exit_2(model, machine_file, changes, message, capsys):
    sets = [word for change in changes for word in ("--set", change)]
    assert cli.main(["plan", "--model", model, "--machine", machine_file, *sets]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not JSON"), ("[]", "machine file"), ('{"schema": 9}', "schema"), ('{"schema": 1}', "hostname")],
)
def test_bad_machine_files_exit_2(model, tmp_path, text, message, capsys):
    path = tmp_path / "m.json"
    path.write_text(text)
    assert cli.main(["plan", "--model", model, "--machine", str(path)]) == 2
    assert message in capsys.readouterr().err


def test_missing_files_exit_2(model, machine_file, tmp_path, capsys):
    assert cli.main(["plan", "--model", str(tmp_path / "no.gguf"), "--machine", machine_file]) == 2
    assert "there is no such file" in capsys.readouterr().err
    assert cli.main(["plan", "--model", model, "--machine", str(tmp_path / "no.json")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    (tmp_path / "page.gguf").write_text("<!DOCTYPE html>")
    assert cli.main(["plan", "--model", str(tmp_path / "page.gguf"), "--machine", machine_file]) == 2
    assert "is an HTML page" in capsys.readouterr().err


def test_it_runs_as_a_program_from_elsewhere_with_the_machine_on_standard_input(model, machine_file, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "llamafleet.cli", "plan", "--model", model, "--machine", "-", "--json"],
        input=Path(machine_file).read_text(), capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["fits"]


def test_values_are_python_literals_or_text():
    told = cli.parse_changes(["a=1", "b=None", "c=['f16']", "d=cuda", "e=x=y", "f=True"])
    assert told == {"a": 1, "b": None, "c": ["f16"], "d": "cuda", "e": "x=y", "f": True}


def test_changes_go_where_they_belong():
    settings = cli.settings_for("hf:a/b/c.gguf", cli.default_data(), {"slots": 3, "backend": "cpu"})
    assert (settings.models[0].slots, settings.backend) == (3, "cpu")
    assert settings.models[0].source == "hf:a/b/c.gguf"
    with pytest.raises(SettingsError):
        cli.settings_for("/m.gguf", cli.default_data(), {"backend": "tpu"})
