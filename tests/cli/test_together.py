"""Several models that one imagined box serves at the same time."""

import json

import pytest

from llamafleet.cli import main as cli
from sandbox import models

BOX = "rtx3090+rtx3060,ram=64GB,cores=8"


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [str(models.weightless(folder, name)) for name in ("Llama-3.1-8B", "Qwen3-30B-A3B")]


def plan(paths, *more):
    given = [word for path in paths for word in ("--model", path)]
    return cli.main(["plan", *given, "--machine", BOX, "--together", *more])


def test_each_takes_its_memory_before_the_next(two, capsys):
    assert plan(two, "--json", "--set", "context_tokens=8192") == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["schema"], answer["fits"], answer["machine"]) == (1, True, BOX)
    first, second = (one["plan"] for one in answer["together"])
    assert [one["model"] for one in answer["together"]] == two
    rows = [{row["device"]: row for row in one["ledger"]} for one in (first, second)]
    shared = set(rows[0]) & set(rows[1])
    assert "host" in shared
    for device in shared:
        before, after = rows[0][device]["capacity_bytes"], rows[1][device]["capacity_bytes"]
        parts = ("weights", "kv", "compute", "staging", "overhead")
        assert after == before - sum(rows[0][device][f"{part}_bytes"] for part in parts)


def test_settings_of_one_model_and_of_the_box(two, capsys):
    assert plan(two, "--json", "--set", "2.context_tokens=4096", "--set", "context_tokens=8192",
                "--set", "2.priority=5", "--set", "ram_reserve_mib=4096") == 0  # fmt: skip
    first, second = (one["plan"] for one in json.loads(capsys.readouterr().out)["together"])
    assert first["argv"][:2] == ["--ctx-size", "8192"] and second["argv"][:2] == ["--ctx-size", "4096"]
    assert second["ledger"][-1]["reserve_bytes"] == 4096 * 2**20
    # The second has the higher priority: the whole box is its own, and the first gets what is left.
    assert second["ledger"][-1]["capacity_bytes"] == 64 * 2**30 > first["ledger"][-1]["capacity_bytes"]


def test_one_that_does_not_fit_beside_the_others_is_refused(two, capsys):
    assert plan(two * 3, "--set", "context_tokens=32768", "--set", "ram_reserve_mib=20000") == 3
    out = capsys.readouterr().out
    assert "6 models together on rtx3090+rtx3060" in out and "REFUSED: " in out.splitlines()[-1]
    assert out.count("REFUSED: model") >= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "3.slots=2"], "--set 3.slots: should be a setting of a model, of 1 to 2"),
        (["--set", "1.backend=cpu"], "--set 1.backend: should be a setting of a model"),
        (["--set", "1.source=/x"], "give the model with --model"),
        (["--compare"], "--together: plans models that are served together"),
        (["--min-speed", "10"], "leave out --compare and --min-speed"),
    ],
)
def test_what_does_not_go_together(two, arguments, message, capsys):
    assert plan(two, *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_setting_of_one_model_needs_several(two, capsys):
    assert cli.main(["plan", "--model", two[0], "--machine", BOX, "--set", "1.slots=2"]) == 2
    assert "--set 1.slots: a setting of one of several models needs --together" in capsys.readouterr().err


def test_copies_of_a_model_are_planned_together(two, capsys):
    words = ["plan", "--model", two[0], "--machine", "2xrtx3090,ram=64GB,cores=8", "--set", "context_tokens=8192"]
    assert cli.main([*words, "--set", "copies=per_gpu", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [one["model"] for one in answer["together"]] == [f"{two[0]}, copy 1", f"{two[0]}, copy 2"]
    assert [one["plan"]["ledger"][0]["device"] for one in answer["together"]] == ["GPU0", "GPU1"]
    assert cli.main([*words, "--set", "copies=3"]) == 0
    assert "all 3 fit together" in capsys.readouterr().out
    assert cli.main([*words[:3], "--machine", "cpu,ram=64GB,cores=8", "--set", "copies=per_gpu"]) == 2
    assert "--set copies: model: copies is 'per_gpu', and" in capsys.readouterr().err


def test_copies_of_one_of_several_models(two, capsys):
    assert plan(two, "--json", "--set", "2.copies=2", "--set", "context_tokens=4096") == 0
    models = [one["model"] for one in json.loads(capsys.readouterr().out)["together"]]
    assert models == [two[0], f"{two[1]}, copy 1", f"{two[1]}, copy 2"]
