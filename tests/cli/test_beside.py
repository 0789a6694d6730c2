"""`llamafleet plan` of a model with what is loaded beside it: the flags, `--set`, the table and the JSON."""

import argparse
import json

import pytest

from llamafleet.cli import arguments, beside
from llamafleet.cli import main as cli
from llamafleet.cli.errors import UsageError
from sandbox import adapters, models

BOX = "rtx3090+rtx3060,ram=64GB,cores=8"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    names = {name: str(models.weightless(folder, name)) for name in ("Llama-3.1-8B", "Qwen3-8B")}
    for name, layout, rank in (("small", "Llama-3.1-8B", 8), ("large", "Llama-3.1-8B", 64), ("other", "Qwen3-8B", 8)):
        names[name] = str(adapters.lora(folder, layout, rank=rank, name=name))
    return names


def changes(*words, **others):
    parser = argparse.ArgumentParser()
    beside.add_flags(parser)
    return beside.changes(parser.parse_args(words), others)


def test_flags_are_settings():
    assert changes() == {}
    assert changes("--projector", "auto", "--speculation", "ngram") == {"projector": "auto", "speculation": "ngram"}
    assert changes("--draft", "hf:a/b/c.gguf") == {"draft": "hf:a/b/c.gguf", "speculation": "draft"}
    assert changes("--draft", "a.gguf", "--speculation", "eagle3")["speculation"] == "eagle3"
    assert changes("--draft", "a.gguf", speculation="dflash") == {"draft": "a.gguf"}
    assert changes("--adapter", "a.gguf", "--adapter", "b.gguf:0.5") == {"adapters": ["a.gguf", "b.gguf:0.5"]}


def test_a_number_says_of_which_model():
    assert changes("--adapter", "2.hf:a/b/c.gguf:0.5", "--adapter", "/x.gguf", "--adapter", "2.https://h/d.gguf") == {
        "2.adapters": ["hf:a/b/c.gguf:0.5", "https://h/d.gguf"], "adapters": ["/x.gguf"],
    }  # fmt: skip
    assert changes("--projector", "2.auto", "--speculation", "1.mtp") == {"2.projector": "auto", "1.speculation": "mtp"}
    assert changes("--draft", "2./x.gguf") == {"2.draft": "/x.gguf", "2.speculation": "draft"}
    assert changes("--projector", "2.model.gguf") == {"projector": "2.model.gguf"}  # a file's name


@pytest.mark.parametrize(
    ("words", "others", "message"),
    [
        (("--projector", "auto"), {"projector": None}, "--projector auto: --set projector says it too"),
        (("--draft", "a", "--draft", "b"), {}, "--draft: given twice"),
    ],
)
def test_what_is_said_twice_is_refused(words, others, message):
    with pytest.raises(UsageError, match=message):
        changes(*words, **others)


@pytest.mark.parametrize(
    ("key", "given", "made"),
    [
        ("adapters", "/a.gguf,hf:o/r/b.gguf:0.5", ["/a.gguf", {"source": "hf:o/r/b.gguf", "scale": 0.5}]),
        ("adapters", "http://h:80/a.gguf:-1e-2", [{"source": "http://h:80/a.gguf", "scale": -0.01}]),
        ("adapters", [{"source": "/a.gguf", "scale": 2}], [{"source": "/a.gguf", "scale": 2}]),
        ("adapters", "hf:o/r:Q8_0", ["hf:o/r:Q8_0"]),
        ("projector", "auto", "auto"),
        ("projector", None, None),
        ("draft", {"source": "hf:o/r/b.gguf"}, {"source": "hf:o/r/b.gguf"}),
    ],
)
def test_values_of_files_beside_a_model(key, given, made):
    assert arguments._items(key, given) == made


def test_a_path_is_of_the_current_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert beside.value("projector", "m.gguf") == f"{tmp_path}/m.gguf"
    assert beside.value("adapters", "m.gguf:0.5") == [{"source": f"{tmp_path}/m.gguf", "scale": 0.5}]


def test_lists_are_known_by_their_types():
    lists = arguments._lists()
    assert {"kv_types", "gpus", "vulkan_devices", "extra_flags", "no_proxy", "models", "adapters"} <= lists
    assert not {"projector", "draft", "gpu_reserve_mib", "copies", "rerank_example", "slots", "environment"} & lists


def plan(files, *words):
    return cli.main(
        ["plan", "--model", files["Llama-3.1-8B"], "--machine", BOX, "--set", "context_tokens=8192", *words]
    )


def test_adapters_are_planned_and_told(files, capsys):
    assert plan(files, "--adapter", files["small"], "--adapter", f"{files['large']}:0.5", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert {part: one["source"] for part, one in told["companions"].items()} == {
        "adapter-1": files["small"], "adapter-2": files["large"],
    }  # fmt: skip
    assert told["companions"]["adapter-2"]["file_bytes"] > told["companions"]["adapter-1"]["file_bytes"] > 10**7
    assert sum(row.get("beside_bytes", 0) for row in told["ledger"]) > 10**8
    assert plan(files, "--json") == 0
    alone = json.loads(capsys.readouterr().out)
    assert "companions" not in alone and not any("beside_bytes" in row for row in alone["ledger"])


def test_the_table_shows_what_is_beside(files, capsys):
    assert plan(files, "--adapter", files["large"]) == 0
    told = capsys.readouterr().out
    assert "B beside the model" in told and ", B 0." in told
    assert plan(files) == 0
    assert "beside the model" not in capsys.readouterr().out


def test_an_adapter_of_another_model_is_refused(files, capsys):
    assert plan(files, "--set", f"adapters={files['other']}") == 3
    assert "adapters[0]: other: it was made for the architecture qwen3" in " ".join(capsys.readouterr().out.split())


def test_of_several_models_each_has_its_own(files, capsys):
    words = ["plan", "--model", files["Llama-3.1-8B"], "--model", files["Qwen3-8B"], "--machine", BOX, "--together"]
    more = ["--adapter", f"1.{files['small']}", "--set", f"2.adapters={files['other']}", "--set", "context_tokens=4096"]
    assert cli.main([*words, *more, "--json"]) == 0
    first, second = (one["plan"] for one in json.loads(capsys.readouterr().out)["together"])
    assert [first["companions"]["adapter-1"]["name"], second["companions"]["adapter-1"]["name"]] == ["small", "other"]
    assert all(any(row.get("beside_bytes") for row in one["ledger"]) for one in (first, second))


def test_a_file_that_is_not_there_is_bad_input(files, capsys):
    assert plan(files, "--projector", "/nowhere.gguf") == 2
    assert "/nowhere.gguf" in capsys.readouterr().err


def test_an_inventory_has_its_own(tmp_path, capsys):
    assert cli.main(["plan", "--inventory", str(tmp_path / "i.py"), "--adapter", "/x.gguf"]) == 2
    assert "--inventory: has its own settings: leave out --adapter" in capsys.readouterr().err
