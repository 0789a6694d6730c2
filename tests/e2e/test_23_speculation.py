"""Models that guess with a small one, with a head of their own and from what was said, on one host.

Random weights guess nothing right; that guesses are made, checked, and change no reply is what is seen here.
"""

import json

import pytest

from sandbox import models
from sandbox.draft_layouts import TINY_DRAFTS
from tests.e2e.deploying import PORT, ask, main_pid, on, pyinfra, serves, shipped_checks

PORTS = {"tiny": PORT, "head": PORT + 1, "grams": PORT + 2}
# A key of the tokenizer and its value (gguf's type 7, a boolean).
ADD_BOS = b"tokenizer.ggml.add_bos_token\x07\x00\x00\x00"


@pytest.fixture(scope="module")
def host(deployed):
    return deployed[0]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The files by name. Of "silent" and "deaf" the headers do not tell that llama-server would not join them: the one
    has no key for the mark of a text's begin, which then is made, the other has none made."""
    folder = tmp_path_factory.mktemp("files")
    made = {kind: models.make(layout, folder, seed=1) for kind, layout in TINY_DRAFTS.items()}
    made["dense"] = models.tiny(folder, "dense")
    for name, source, old, new in (
        ("silent", made["dense"], ADD_BOS, ADD_BOS.replace(b"add_bos", b"xxx_bos")),
        ("deaf", made["draft"], ADD_BOS + b"\x01", ADD_BOS + b"\x00"),
    ):
        data = source.read_bytes()
        assert data.count(old) == 1
        made[name] = folder / f"{name}.gguf"
        made[name].write_bytes(data.replace(old, new))
    return {name: str(path) for name, path in made.items()}


@pytest.fixture
def wanted(settings, inventory, host, files):
    """The inventory with three models; `changes` are of the first."""

    def make(**changes):
        data = settings(host)
        [first] = data["models"]
        first |= {"source": files["dense"], "speculation": "draft", "draft": files["draft"], **changes}
        head = {
            **first,
            "name": "head",
            "port": PORTS["head"],
            "source": files["head"],
            "speculation": "mtp",
            "draft": None,
        }
        grams = {**head, "name": "grams", "port": PORTS["grams"], "source": files["dense"], "speculation": "ngram"}
        return inventory((host, {**data, "models": [first, head, grams]}))

    return make


def gate_record(host, name):
    return json.loads(on(host, "cat", f"/var/lib/llamafleet/gate/{name}.json"))


def test_a_draft_a_head_and_n_grams_are_deployed_and_guess(host, wanted):
    run = pyinfra(wanted())
    assert run.code == 0, run.text
    for name, port in PORTS.items():
        assert serves(host, port), name
        record = gate_record(host, name)
        assert [check["name"] for check in record["checks"] if not check["ok"]] == []
        assert "speculation" in [check["name"] for check in record["checks"]]
        assert record["speculation"]["drafted"] > 0 or name == "grams", record
    body = {"prompt": "Once upon a time", "n_predict": 12, "temperature": 0, "ignore_eos": True}
    for name in ("tiny", "head"):
        _, answer = ask(host, "/completion", body, port=PORTS[name])
        assert answer["timings"]["draft_n"] > 0, name
    line = on(host, "cat", f"/proc/{main_pid(host, 'tiny')}/cmdline")
    assert "--spec-draft-model" in line and "draft-simple" in line


def test_a_second_run_changes_nothing(host, wanted):
    written, pid = wanted(), main_pid(host, "tiny")
    run = pyinfra(written)
    assert run.code == 0 and run.changed(host.name) == [] and main_pid(host, "tiny") == pid, run.text


@pytest.mark.long
def test_the_shipped_checks_pass(host, wanted):
    done = shipped_checks(wanted())
    assert done.returncode == 0, done.stdout[-4000:]


def test_a_draft_with_another_vocabulary_is_refused_by_name_before_anything_changes(host, wanted, files):
    pid = main_pid(host, "tiny")
    run = pyinfra(wanted(draft=files["other"]))
    assert run.code != 0 and run.changed(host.name) == [], run.text
    assert "draft: tiny-other has another vocabulary than tiny-dense: it has 700 tokens" in " ".join(run.text.split())
    assert main_pid(host, "tiny") == pid


@pytest.mark.long
def test_a_draft_that_llama_server_does_not_use_is_rolled_back(host, wanted, files):
    run = pyinfra(wanted(source=files["silent"], draft=files["deaf"]))
    assert run.code != 0 and "goes on without it" in run.text, run.text
    assert serves(host, PORTS["tiny"])
    line = on(host, "cat", f"/proc/{main_pid(host, 'tiny')}/cmdline")
    assert "tiny-draft" in line and "deaf" not in line
