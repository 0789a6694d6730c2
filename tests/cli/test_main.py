"""`llamafleet plan`: exit status, JSON on stdout, messages on stderr."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llamafleet.cli import main as cli
from llamafleet.cli import on_inventory
from llamafleet.hub import http
from llamafleet.settings.schema import SettingsError
from sandbox import models
from sandbox.hub import Hub
from tests import planning

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(models.weightless(tmp_path_factory.mktemp("models"), "gpt-oss-120b"))


@pytest.fixture
def machine_file(tmp_path):
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(planning.machine([24564]).to_json()))
    return str(path)


def test_a_model_in_the_place_of_the_machine_is_named(tmp_path, capsys):
    """Of any size: only its first bytes are read."""
    model = tmp_path / "m.gguf"
    with model.open("wb") as file:
        file.write(b"GGUF")
        file.truncate(59 * 2**30)  # a hole
    assert cli.main(["plan", "--machine", str(model), "--model", "machine.json"]) == 2
    assert "m.gguf' names a model: give it with --model" in capsys.readouterr().err
    model = model.rename(tmp_path / "m.json")
    assert cli.main(["plan", "--machine", str(model), "--model", "/m.gguf"]) == 2
    assert "m.json' is a model (GGUF), no machine file: give it with --model" in capsys.readouterr().err
    assert cli.main(["plan", "--machine", "hf:acme/m/m.gguf", "--model", "cpu,ram=8GB,cores=4"]) == 2
    assert "'hf:acme/m/m.gguf' names a model" in capsys.readouterr().err


def test_a_file_of_gigabytes_is_no_machine_file(tmp_path, capsys):
    path = tmp_path / "m.json"
    with path.open("wb") as file:
        file.truncate(2**34)
    assert cli.main(["plan", "--machine", str(path), "--model", "/m.gguf"]) == 2
    assert "and no machine file is so long" in capsys.readouterr().err


def test_ctrl_c_ends_with_130_and_a_line(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "read_machine", interrupted)
    assert cli.main(["plan", "--machine", "x", "--model", "/m.gguf"]) == 130
    assert capsys.readouterr().err == "llamafleet: interrupted\n"


def test_a_plan_exits_0_and_is_the_contract_s_json(model, machine_file, capsys):
    arguments = ["plan", "--model", model, "--machine", machine_file, "--set", "context_tokens=131072", "--json"]
    assert cli.main(arguments) == 0
    output = json.loads(capsys.readouterr().out)
    assert (output["schema"], output["fits"], output["refusal"]) == (1, True, None)
    assert output["argv"][:2] == ["--ctx-size", "131072"]


def test_a_refusal_exits_3_with_json(model, machine_file, capsys):
    assert cli.main(["plan", "--model", model, "--machine", machine_file, "--set", "gpu_reserve_mib=1024",
                     "--set", "ram_reserve_mib=60000", "--json"]) == 3  # fmt: skip
    output = json.loads(capsys.readouterr().out)
    assert output["fits"] is False
    assert output["refusal"]["needed_bytes"] > output["refusal"]["available_bytes"]


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
        (["context_tokens=many"], "should be a whole number from 256 to 2147483647 or None, is 'many'"),
        (["context_tokens"], "should be KEY=VALUE"),
        (["=3"], "should be KEY=VALUE"),
        (["source=/x"], "give the model with --model"),
        (["slots=0"], "should be a whole number from 1 to 256 or None, is 0"),
        (["n_ctx=4096"], "n_ctx: unknown setting; it is `context_tokens` here"),
        (["ctx-size=4096"], "ctx_size: unknown setting; it is `context_tokens` here"),
        (["ngl=99"], "ngl: unknown setting; the plan decides it"),
        (["cache_type_k=q8_0"], "cache_type_k: unknown setting; it is `kv_types` here"),
        (["kv_types=q9"], "kv_types[0]: should be one of"),
    ],
)
def test_bad_settings_exit_2(model, machine_file, changes, message, capsys):
    sets = [word for change in changes for word in ("--set", change)]
    assert cli.main(["plan", "--model", model, "--machine", machine_file, *sets]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("change", ["kv_types=q8_0", "kv_types=q8_0,", "kv_types=['q8_0']", "kv-types=q8_0"])
def test_a_word_is_a_list_of_one(model, machine_file, change, capsys):
    assert cli.main(["plan", "--model", model, "--machine", machine_file, "--set", change, "--json"]) == 0
    argv = json.loads(capsys.readouterr().out)["argv"]
    assert argv[argv.index("--cache-type-k") + 1] == "q8_0"


@pytest.mark.parametrize(
    ("change", "device"), [("gpus=1", "GPU1"), ("gpus=[0]", "GPU0"), ("gpus=0000:02:00.0", "GPU1")]
)
def test_a_card_of_an_imagined_box_is_left_out(model, change, device, capsys):
    words = "2xrtx3090,ram=96GB,cores=8"
    assert cli.main(["plan", "--model", model, "--machine", words, "--set", change, "--json",
                     "--set", "gpu_reserve_mib={0: 3000, 1: 4000}"]) == 0  # fmt: skip
    rows = json.loads(capsys.readouterr().out)["ledger"]
    assert [row["device"] for row in rows] == [device, "host"]
    assert rows[0]["reserve_bytes"] == {"GPU0": 3000, "GPU1": 4000}[device] * 2**20


def test_a_folder_is_named_as_such(tmp_path, machine_file, capsys):
    assert cli.main(["plan", "--model", str(tmp_path), "--machine", machine_file]) == 2
    assert "is a folder: name the model's GGUF file in it (it has no .gguf file)" in capsys.readouterr().err
    (tmp_path / "a.gguf").touch()
    assert cli.main(["plan", "--model", str(tmp_path), "--machine", machine_file]) == 2
    assert "(it has a.gguf)" in capsys.readouterr().err


def test_what_the_words_leave_open_is_said(model, capsys):
    assert cli.main(["plan", "--model", model, "--machine", "rtx3080,ram=64GB,cores=8"]) == 0
    assert "RTX 3080: taken with 10 GB; it is also sold with 12 GB: add the size" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "should be JSON"),
        ("[]", "machine: should be an object, is []"),
        ('{"schema": 9}', "schema"),
        ('{"schema": 1}', "hostname"),
        ("[" * 100_000, "should be JSON"),
        ('{"schema": ' + "9" * 5000 + "}", "should be JSON"),
        ('{"schema": 1, "hostname": "h", "memory": {"total_bytes": ' + "9" * 400 + "}}", "machine."),
    ],
)
def test_bad_machine_files_exit_2(model, tmp_path, text, message, capsys):
    path = tmp_path / "m.json"
    path.write_text(text)
    assert cli.main(["plan", "--model", model, "--machine", str(path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--machine", "9" * 5000 + "xrtx3090,ram=1GB,cores=2"], "it has 5024 characters, 500 at most are read"),
        (["--machine", "/" + "m" * 5000 + ".json"], "cannot be read: File name too long"),
        (["--machine", "a\0b.json"], "cannot be read"),
        (
            ["--machine", "cpu,ram=4GB,cores=4", "--model", "/" + "m" * 5000 + ".gguf"],
            "cannot be read: File name too long",
        ),
        (
            ["--set", f"gpu_reserve_mib={'9' * 400}"],
            "gpu_reserve_mib: should be a whole number from 0 to 2147483647, is 999",
        ),
        (["--set", f"slots={'9' * 5000}"], "slots: should be a whole number from 1 to 256"),
        (
            ["--set", "hub_endpoint=http://h.example", "--set", "hub_token_file=/t"],
            "hub_endpoint: 'http://h.example' is neither",
        ),
        (["--model", "hf:o/r/m;touch${IFS}x;.gguf"], "source: should end in a file name of letters, digits"),
        (["--model", f"http://{'a' * 70}/m.gguf"], "source: should be an http(s) address"),
    ],
)
def test_names_numbers_and_addresses_of_any_length_exit_2(model, machine_file, arguments, message, capsys):
    for option, value in (("--machine", machine_file), ("--model", model)):
        if option not in arguments:
            arguments = [*arguments, option, value]
    assert cli.main(["plan", *arguments]) == 2
    captured = capsys.readouterr()
    assert (
        message in captured.err and captured.out == "" and "Traceback" not in captured.err and len(captured.err) < 1000
    )


def test_missing_files_exit_2(model, machine_file, tmp_path, capsys):
    assert cli.main(["plan", "--model", str(tmp_path / "no.gguf"), "--machine", machine_file]) == 2
    assert "there is no such file" in capsys.readouterr().err
    assert cli.main(["plan", "--model", model, "--machine", str(tmp_path / "no.json")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert cli.main(["plan", "--model", model, "--machine", "no-such-box"]) == 2
    assert "there is no file 'no-such-box', and as a description: 'no-such-box': no such GPU" in capsys.readouterr().err
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


def test_no_file_of_the_current_folder_is_run(model, machine_file, tmp_path):
    """Neither for a machine nor for an inventory that lies elsewhere: the folder may be a stranger's."""
    stranger, own = tmp_path / "stranger", tmp_path / "own"
    for file in ("inventory/group_data/all.py", "group_data/all.py", "tasks/__init__.py", "json.py"):
        (stranger / file).parent.mkdir(parents=True, exist_ok=True)
        (stranger / file).write_text(f"raise SystemExit('a stranger at {file}')\n")
    own.mkdir()
    (own / "inventory.py").write_text("hosts = ['@local']\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for words in (
        ["--model", model, "--machine", machine_file],
        ["--inventory", str(own / "inventory.py"), "--limit", "x"],
    ):
        done = subprocess.run([sys.executable, "-P", "-m", "llamafleet.cli", "plan", *words], env=environment,
                              capture_output=True, text=True, cwd=stranger)  # fmt: skip
        assert "a stranger" not in done.stderr and done.returncode == (0 if "--model" in words else 2), done.stderr


def test_values_are_python_literals_or_text():
    changes = cli.parse_changes(["a=1", "b=None", "c=['f16']", "d=cuda", "e=x=y", "f=True"])
    assert changes == {"a": 1, "b": None, "c": ["f16"], "d": "cuda", "e": "x=y", "f": True}


def test_changes_go_where_they_belong():
    settings = cli.settings_for("hf:a/b/c.gguf", cli.default_data(), {"slots": 3, "backend": "cpu"})
    assert (settings.models[0].slots, settings.backend) == (3, "cpu")
    assert settings.models[0].source == "hf:a/b/c.gguf"
    with pytest.raises(SettingsError):
        cli.settings_for("/m.gguf", cli.default_data(), {"backend": "tpu"})


def test_a_machine_can_be_described_in_words(model, capsys):
    words = "rtx4090,ram=64GB,cores=10"
    assert cli.main(["plan", "--model", model, "--machine", words, "--set", "context_tokens=131072", "--json"]) == 0
    output = json.loads(capsys.readouterr().out)
    assert [row["device"] for row in output["ledger"]] == ["GPU0", "host"]
    assert output["ledger"][0]["capacity_bytes"] == 24564 * 2**20
    assert output["ledger"][1]["capacity_bytes"] == 64 * 2**30


def test_a_described_memory_bandwidth_changes_the_prediction(model, capsys):
    speeds = []
    for rate in ("40GB/s", "200GB/s"):
        machine = f"cpu,ram=96GB,cores=32,memory-bandwidth={rate}"
        assert cli.main(["plan", "--model", model, "--machine", machine, "--json"]) == 0
        speeds.append(json.loads(capsys.readouterr().out)["predicted"]["decode_tokens_per_s"])
    assert speeds[1] > 2 * speeds[0]


def test_the_table_says_what_would_change(tmp_path, capsys):
    model = str(models.weightless(tmp_path, "Qwen3-8B"))
    assert (
        cli.main(["plan", "--model", model, "--machine", "rtx3060,ram=32GB,cores=8", "--set", "context_tokens=8192"])
        == 0
    )
    out = capsys.readouterr().out
    assert "the largest context that fits: 40960 tokens (the whole trained context)" in out
    assert "the next larger quantisation, Q5_K with about 5.4 GiB, fits" in out  # published: 5.44 GiB


# --- models of the Hub ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    with Hub() as hub:
        for quant in ("Q4_K_M", "Q8_0", "F16"):
            path = models.weightless(folder, "Qwen3-30B-A3B", quant)
            hub.add("acme/Qwen3-GGUF", path.name, path)
        (folder / "split").mkdir()
        models.weightless(folder / "split", "Qwen3-30B-A3B", "Q8_0", shards=2)
        for shard in sorted((folder / "split").iterdir()):
            hub.add("acme/Qwen3-GGUF", f"split/{shard.name}", shard)
        hub.add("acme/Qwen3-GGUF", "mmproj-F16.gguf", path)
        hub.add("acme/Qwen3-GGUF", "lost-00001-of-00002.gguf", path)
        (folder / "page.gguf").write_text("<!DOCTYPE html>")
        hub.add("acme/Qwen3-GGUF", "broken.gguf", folder / "page.gguf")
        yield hub


def plan(hub, model, machine, *more):
    arguments = ["plan", "--model", model, "--machine", machine, "--set", f"hub_endpoint={hub.url}"]
    return cli.main([*arguments, "--set", "context_tokens=16384", *more])


def test_quantisations_are_compared_and_the_best_is_named(hub, capsys):
    assert plan(hub, "hf:acme/Qwen3-GGUF", "rtx4090,ram=64GB,cores=10", "--compare", "--json") == 0
    output = json.loads(capsys.readouterr().out)
    names = [option["model"].rpartition("/")[2] for option in output["compared"]]
    assert names == [
        "Qwen3-30B-A3B-F16.gguf",
        "Qwen3-30B-A3B-Q8_0.gguf",
        "Qwen3-30B-A3B-Q8_0-00001-of-00002.gguf",
        "Qwen3-30B-A3B-Q4_K_M.gguf",
        "broken.gguf",
    ]
    assert "is an HTML page" in output["compared"][-1]["problem"]
    assert [option["plan"]["fits"] for option in output["compared"][:-1]] == [True] * 4
    assert output["compared"][1]["weights_bytes"] == output["compared"][2]["weights_bytes"]
    assert output["best"] == "hf:acme/Qwen3-GGUF/Qwen3-30B-A3B-F16.gguf"


def test_the_best_is_fast_enough_and_fits(hub, capsys):
    machine = "rtx4090,ram=36GB,cores=10"
    assert plan(hub, "hf:acme/Qwen3-GGUF/Qwen3-30B-A3B-F16.gguf", machine, "--compare") == 0
    out = capsys.readouterr().out
    assert re.search(r"  Qwen3-30B-A3B-F16 +56\.9 +16\.0 +does not fit: \d+ MiB missing on ", out)
    assert re.search(r"\* Qwen3-30B-A3B-Q8_0 +30\.2 +8\.5 ", out)
    assert out.endswith("that fits: hf:acme/Qwen3-GGUF/Qwen3-30B-A3B-Q8_0.gguf\n")
    assert plan(hub, "hf:acme/Qwen3-GGUF", machine, "--compare", "--min-speed", "80") == 0
    out = capsys.readouterr().out
    assert "too slow" in out
    assert "fits and writes 80 tokens/s: hf:acme/Qwen3-GGUF/Qwen3-30B-A3B-Q4_K_M.gguf" in out
    assert plan(hub, "hf:acme/Qwen3-GGUF", machine, "--compare", "--min-speed", "9999") == 3
    assert "REFUSED: none of these models fits and writes 9999 tokens/s" in capsys.readouterr().out


def test_models_named_one_by_one_are_compared(hub, model, capsys):
    files = ["hf:acme/Qwen3-GGUF/Qwen3-30B-A3B-Q8_0.gguf", "--model", model]
    assert plan(hub, files[0], "cpu,ram=48GB,cores=8", *files[1:], "--json") == 0
    output = json.loads(capsys.readouterr().out)
    assert [option["model"] for option in output["compared"]] == [model, files[0]]
    assert output["best"] == files[0]  # the other needs more than 48 GB
    assert output["compared"][0]["plan"]["refusal"]["needed_bytes"] > 60 * 2**30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("hf:acme/none", "cpu,ram=64GB,cores=8", "--compare"), "HTTP 401, RepoNotFound"),
        (("hf:acme", "cpu,ram=64GB,cores=8", "--compare"), "should be hf:OWNER/REPO"),
        (("/m.gguf", "cpu,ram=64GB,cores=8", "--compare"), "/m.gguf: should be hf:OWNER/REPO or a file of it"),
        (("hf:acme/Qwen3-GGUF/x.gguf", "cpu,ram=64GB,cores=8", "--min-speed", "3"), "add --compare"),
        (
            ("hf:acme/Qwen3-GGUF:Q9_9", "cpu,ram=64GB,cores=8"),
            "no model file of the quantisation Q9_9; it has Qwen3-30B",
        ),
    ],
)
def test_comparing_what_cannot_be(hub, arguments, message, capsys):
    assert plan(hub, *arguments) == 2
    assert message in capsys.readouterr().err


def test_of_a_repository_the_file_is_chosen_and_named(hub, capsys):
    assert plan(hub, "hf:acme/Qwen3-GGUF", "cpu,ram=64GB,cores=8") == 0
    assert "hf:acme/Qwen3-GGUF/Qwen3-30B-A3B-Q4_K_M.gguf is taken" in capsys.readouterr().err


def test_a_refusal_names_siblings_that_fit(hub, capsys):
    source = "hf:acme/Qwen3-GGUF/Qwen3-30B-A3B-F16.gguf"
    assert plan(hub, source, "rtx3060,ram=32GB,cores=8", "--json") == 3
    steps = json.loads(capsys.readouterr().out)["refusal"]["suggestions"]
    assert any(step.startswith("take hf:acme/Qwen3-GGUF/Qwen3-30B-A3B-Q8_0.gguf: 30.2 GiB") for step in steps)
    assert plan(hub, source, "cpu,ram=8GB,cores=8", "--json") == 3
    assert "take hf:" not in capsys.readouterr().out


def test_a_refusal_stands_where_the_repository_cannot_be_listed(hub, capsys):
    hub.fault("api/models/acme/Qwen3-GGUF", on="hub", times=None, status=403)
    try:
        assert plan(hub, "hf:acme/Qwen3-GGUF/Qwen3-30B-A3B-F16.gguf", "rtx3060,ram=32GB,cores=8") == 3
    finally:
        hub.heal()
    assert "REFUSED" in capsys.readouterr().out


def test_a_60_gb_model_is_planned_from_few_bytes_in_little_time(model, capsys):
    """The header of gpt-oss-120b over HTTP: less than 12 MB and, on an idle core, less than a second."""
    with Hub() as hub:
        hub.add("acme/oss", "oss.gguf", Path(model))
        began = time.process_time()
        assert plan(hub, "hf:acme/oss/oss.gguf", "rtx4090,ram=64GB,cores=10", "--json") == 0
        assert time.process_time() - began < 1
        requests = hub.settled()
    assert json.loads(capsys.readouterr().out)["fits"]
    assert Path(model).stat().st_size > 59 * 2**30
    assert sum(request.bytes_sent for request in requests) < 12e6
    assert len(requests) <= 8  # each request is a round trip to a distant server


def test_a_signed_address_that_expires_while_it_is_read_is_asked_for_anew(model, capsys):
    with Hub(link_seconds=3600) as hub:
        hub.add("acme/oss", "oss.gguf", Path(model))
        reader = http.Web()
        url = f"{hub.url}/acme/oss/resolve/main/oss.gguf"
        with Path(model).open("rb") as file:
            whole = file.read(3000)
        assert reader.read(url, 0, 1000)[0] == whole[:1000]
        assert reader.read(url, 1000, 1000)[0] == whole[1000:2000]
        hub.fault("acme/oss/oss.gguf", status=403)
        assert reader.read(url, 2000, 1000)[0] == whole[2000:]
        assert [request.server for request in hub.settled()] == ["hub", "cdn", "cdn", "cdn", "hub", "cdn"]


def test_a_token_file_that_others_read_is_refused(tmp_path, machine_file, model, capsys):
    token = tmp_path / "token"
    token.write_text("hf_secret")
    token.chmod(0o644)
    arguments = ["plan", "--model", model, "--machine", machine_file, "--set", f"hub_token_file={token}"]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert f"hub_token_file: {token} has mode 0644" in error and "hf_secret" not in error


@pytest.mark.parametrize(
    ("words", "given"),
    [
        (["status", "--limit", "a b"], ["tasks.status", "FILE", "--limit=a b"]),
        (["rollout"], ["tasks.rollout", "FILE", "--waves", "1,25%,100%"]),
        (
            ["rollout", "--limit", "a", "--limit=-b", "--exclude", "c", "--waves", "2", "--dry", "--json"],
            ["tasks.rollout", "FILE", "--limit=a", "--limit=-b", "--json", "--waves", "2", "--dry", "--exclude=c"],
        ),
    ],
)
def test_a_command_over_an_inventory_is_a_process_with_these_words(tmp_path, monkeypatch, words, given):
    file, started = tmp_path / "fleet.py", []
    file.write_text("hosts = []\n")

    class Process:
        def __init__(self, command, env):
            started.extend(command)

        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda *_: None  # noqa: E731
        wait = lambda self: 7  # noqa: E731

    monkeypatch.setattr(on_inventory.subprocess, "Popen", Process)
    assert cli.main([words[0], "--inventory", str(file), *words[1:]]) == 7
    assert started[2:] == ["-m", *(str(file) if word == "FILE" else word for word in given)]


def test_waves_that_cannot_be_read_are_bad_input_before_anything_is_started(tmp_path, capsys):
    (tmp_path / "fleet.py").write_text("hosts = []\n")
    assert cli.main(["rollout", "--inventory", str(tmp_path / "fleet.py"), "--waves", "x"]) == 2
    assert capsys.readouterr().err.startswith("llamafleet: --waves x: 'x' should be a number of hosts")
