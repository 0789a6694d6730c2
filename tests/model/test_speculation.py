"""What llama-server would guess with, and what it would not: told from headers, by name and with the way out."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from llamafleet.model.gguf import read_path
from llamafleet.model.gguf_cursor import LongArray
from llamafleet.model.speculation import unfit, vocabularies_differ
from sandbox import models, outlines
from tests import planning

DRAFTS = Path(__file__).parents[1] / "oracle" / "drafts" / "published"


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drafts")
    return cache(lambda name: read_path(outlines.weightless(DRAFTS / f"{name}.yaml", folder)))


def why(kind, target, draft=None):
    return "; ".join(unfit(kind, target, draft))


def changed(header, **metadata):
    return replace(header, metadata={**header.metadata, **{f"tokenizer.ggml.{key}": value for key, value in metadata.items()}})  # fmt: skip


def test_a_small_model_of_the_family_fits():
    assert why("draft", planning.header("Llama-3.3-70B"), planning.header("Llama-3.2-3B")) == ""


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "gpt2"}, "its tokenizer is of the type gpt2, should be llama"),
        ({"add_bos_token": False}, "add_bos_token is False, should be True"),
        ({"bos_token_id": 7}, "bos_token_id is 7, should be 1"),
        ({"add_eos_token": True}, "add_eos_token is True, should be False"),
        ({"eos_token_id": 9}, ""),
        ({"tokens": LongArray(128256 - 129)}, "it has 128127 tokens, should have 128256"),
        ({"tokens": LongArray(128256 - 128)}, ""),
        ({"tokens": LongArray(128256, {128256: "other"})}, "tokens of the same number have other texts"),
    ],
)
def test_vocabularies_are_compared_by_llama_cpps_rules(changes, said):
    """An end mark that no prompt gets is not compared."""
    target = planning.header("Llama-3.3-70B")
    found = vocabularies_differ(target, changed(planning.header("Llama-3.2-3B"), **changes))
    assert found == said or (said and said in found)


def tokens(folder, size, other=None):
    path = folder / f"{size}-{other}.gguf"
    values = models.tokenizer(size)
    if other is not None:
        values["tokenizer.ggml.tokens"][other] = "another"
    models.write_header(path, "llama", {"general.name": "m", **values}, [])
    return read_path(path)


@pytest.mark.parametrize(
    ("sizes", "other", "differ"),
    [
        ((3000, 3000), None, False),
        ((3000, 2900), None, False),
        ((3000, 2900), 2950, False),  # behind the end of the smaller one
        ((3000, 2900), 2899, True),
        ((3000, 3000), 5, True),
        ((3000, 3000), 4, False),  # control tokens may differ
        ((3000, 3000), 1500, True),
        ((1000, 1000), 999, True),
        ((1000, 1000), None, False),
        ((1100, 1000), None, False),  # of the smaller one the texts are kept
        ((1100, 1000), 700, True),
    ],
)
def test_texts_are_compared_up_to_the_smaller_vocabulary(sizes, other, differ, tmp_path):
    first, second = tokens(tmp_path, sizes[0], other), tokens(tmp_path, sizes[1])
    assert bool(vocabularies_differ(first, second)) is differ
    assert bool(vocabularies_differ(second, first)) is differ


def test_a_head_is_asked_of_the_file_and_of_the_architecture():
    assert why("mtp", planning.header("GLM-4.5-Air")) == ""
    assert "has no draft head in its file (no tensor blk.40.nextn.eh_proj.weight)" in why(
        "mtp", planning.header("Qwen3.6-35B-A3B")
    )
    assert 'set speculation to "ngram"' in why("mtp", planning.header("Llama-3.1-8B"))


@pytest.mark.parametrize(
    ("kind", "target", "draft", "said"),
    [
        ("eagle3", "gpt-oss-120b", "gpt-oss-120b-eagle3", ""),
        ("dflash", "Qwen3-8B", "qwen3-8b-dflash", ""),
        ("dspark", "Qwen3-8B", "qwen3-8b-dspark", ""),
        ("eagle3", "Llama-3.1-8B", "llama-3.3-70b-eagle3", "hidden states of 8192 elements, Llama-3.1-8B has 4096"),
        ("eagle3", "gpt-oss-20b", "gpt-oss-120b-eagle3", "reads the layers [1, 17, 32] of a model (target_layers), gpt-oss-20b has the layers 0 to 24"),
        ("eagle3", "GLM-4.5-Air", "gpt-oss-120b-eagle3", "not for glm4moe"),
        ("dflash", "Qwen3-8B", "qwen3-8b-dspark", 'set speculation = "dspark"'),
        ("dspark", "Qwen3-8B", "qwen3-8b-dflash", 'set speculation = "dflash"'),
        ("draft", "Qwen3-8B", "qwen3-8b-dflash", 'set speculation = "dflash"'),
        ("draft", "gpt-oss-120b", "gpt-oss-120b-eagle3", 'set speculation = "eagle3"'),
        ("eagle3", "Qwen3-8B", "qwen3-8b-dflash", "is no EAGLE-3 draft"),
        ("dflash", "Llama-3.1-8B", "qwen3-8b-dflash", "made for a vocabulary of 151936 tokens, Llama-3.1-8B has 128256"),
    ],
)  # fmt: skip
def test_a_draft_is_for_one_model(kind, target, draft, said, reader):
    found = why(kind, planning.header(target), reader(draft))
    assert (said in found) if said else found == ""


def test_a_small_model_is_no_eagle3_draft():
    assert 'set speculation = "draft"' in why(
        "eagle3", planning.header("Llama-3.3-70B"), planning.header("Llama-3.2-3B")
    )
