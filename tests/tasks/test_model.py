"""What a download is asked: the host's own program accepts it, and no file goes without a sum or the operator's word."""

import dataclasses
import json

import pytest
from fetch_spec import Failed, read_spec

from llamafleet.hub.source import ModelFiles, RemoteFile
from llamafleet.remote.common import MODELS
from llamafleet.service.desired import Desired
from llamafleet.service.plan_inputs import plan_inputs
from tasks import model
from tests import planning
from tests.service.test_desired import decide, survey

A, B = "a" * 64, "b" * 64
NAMES = ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf")


def asked(*sums, installed=None, host=(), **entry):
    """The spec for a model of two files with these sums."""
    settings = planning.settings({"source": f"https://x/{NAMES[0]}", "context_tokens": 4096, **entry}, **dict(host))
    files = tuple(RemoteFile(name, f"https://x/{name}", 5, one) for name, one in zip(NAMES, sums, strict=True))
    made = ModelFiles(files, planning.header("Qwen3-8B"))
    there = {f"{MODELS}/{made.folder}/{name}": one for name, one in (installed or {}).items()}
    outcome = decide(settings, survey(models=there), {"m0": made})
    assert isinstance(outcome, Desired), outcome
    return model.spec(outcome, *asks(outcome), with_token=False)


def asks(outcome):
    """The instance and the model of the only service."""
    [serving] = outcome.servings
    return serving.instance, serving.model


def read(spec, tmp_path):
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(spec))
    return read_spec(str(path)).files


@pytest.mark.parametrize(
    ("given", "sums", "unverified"),
    [
        ({"sums": (A, B)}, (A, B), (False, False)),
        ({"sums": (A, None), "allow_unverified": True}, (A, None), (False, True)),
        # The first file is missing, the second one was verified before sums were asked for.
        ({"sums": (A, None), "installed": {NAMES[1]: B}}, (A, B), (False, False)),
    ],
    ids=["sums", "allowed", "verified earlier"],
)
def test_the_host_accepts_what_it_is_asked(tmp_path, given, sums, unverified):
    files = read(asked(*given.pop("sums"), **given), tmp_path)
    assert [file.sha256 for file in files] == list(sums)
    assert [file.unverified for file in files] == list(unverified)


def test_the_host_refuses_a_file_without_a_sum_even_if_this_side_forgot_to(tmp_path):
    spec = asked(A, B)
    spec["files"][1]["sha256"] = None
    with pytest.raises(
        Failed, match=r"files\[1\]\.sha256 should be 64 hex digits; or say that the file is `unverified`"
    ):
        read(spec, tmp_path)


@pytest.mark.parametrize("name", ["X.GGUF", "a+b=c_d-e.f.gguf", "m" * 201 + ".gguf"])
def test_both_sides_accept_the_same_names(tmp_path, name):
    settings = planning.settings({"source": f"https://x/{name}", "context_tokens": 4096})
    made = ModelFiles((RemoteFile(name, f"https://x/{name}", 5, A),), planning.header("Qwen3-8B"))
    inputs = plan_inputs(settings, survey(), {"m0": made})
    outcome = decide(settings, inputs.survey, {"m0": dataclasses.replace(made)})
    [file] = read(model.spec(outcome, *asks(outcome), with_token=False), tmp_path)
    assert file.name == name


def test_a_model_for_another_disk_is_asked_for_there(tmp_path):
    """Earlier helpers, with which a single stage may run, do not know the key: it is left out where it is not needed."""
    assert "store" not in asked(A, B)
    spec = asked(A, B, host={"models_dir": "/mnt/big"})
    assert spec["store"] == f"/mnt/big/{spec['directory'].rpartition('/')[2]}"
    assert len(read(spec, tmp_path)) == 2
    with pytest.raises(Failed, match="store should be an absolute path"):
        read({**spec, "store": "/mnt/../etc"}, tmp_path)
