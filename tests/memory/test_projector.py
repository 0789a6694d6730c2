"""What a projector takes. That llama-server takes the same is a test of the oracle's."""

import functools
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

from llamafleet.memory.projector import SENT_PICTURE_BYTES, projector_bytes
from llamafleet.model.gguf import read_path
from llamafleet.model.projector import read
from sandbox import projectors

MIB = 2**20


@functools.cache
def header(name):
    with tempfile.TemporaryDirectory() as folder:
        return read_path(projectors.write(projectors.PUBLISHED_PROJECTORS[name], Path(folder)))


def sizes(name, *, on_gpu=True, flash_attention=True, max_tokens=None):
    return projector_bytes(read(header(name), None, max_tokens), on_gpu=on_gpu, flash_attention=flash_attention)


def test_the_largest_picture_takes_more_than_is_reserved_at_the_start():
    found = sizes("qwen3-vl-2b", on_gpu=False)
    assert found.is_exact
    # 4096 tokens, where llama-server starts with 2116: its buffers grow at the first large picture.
    assert found.at_start / MIB == pytest.approx(1103.91, abs=0.01)
    assert (found.weights + found.compute) / MIB == pytest.approx(1405, abs=1)


def test_a_picture_of_one_size_takes_what_is_reserved_at_the_start():
    found = sizes("gemma-3-4b", on_gpu=False)
    assert found.weights + found.compute == found.at_start


def test_pictures_that_are_encoded_together_are_counted_together():
    # Four tiles of 256 tokens.
    found = sizes("internvl3-8b", on_gpu=False)
    assert found.weights + found.compute > found.at_start + 60 * MIB


def test_without_flash_attention_the_scores_are_held():
    assert sizes("pixtral-12b", flash_attention=False).compute > sizes("pixtral-12b").compute


def test_the_host_holds_the_picture_and_its_embeddings():
    few, many = (sizes("qwen3-vl-2b", max_tokens=tokens) for tokens in (100, 4096))
    assert few.pictures > SENT_PICTURE_BYTES
    assert many.pictures - few.pictures > 300 * MIB


def test_a_projector_that_is_not_known_has_a_bound_above_the_exact_size(monkeypatch):
    exact = sizes("qwen2.5-vl-7b")
    monkeypatch.setattr("llamafleet.memory.graph.projectors.GRAPHS", {})
    bound = sizes("qwen2.5-vl-7b")
    assert not bound.is_exact
    assert exact.compute < bound.compute
    assert exact.at_start < bound.at_start


@pytest.mark.parametrize(
    "metadata",
    [
        {"clip.vision.attention.head_count": 2**31 - 1},
        {"clip.vision.embedding_length": 2**31 - 1},
        {"clip.vision.image_size": 8192, "clip.vision.patch_size": 1},
        {"clip.vision.block_count": 512},
        {"clip.vision.projector.scale_factor": 1},
    ],
)
def test_a_hostile_header_takes_no_time(metadata):
    one = header("gemma-3-4b")
    began = time.monotonic()
    found = projector_bytes(
        read(replace(one, metadata={**one.metadata, **metadata})), on_gpu=True, flash_attention=True
    )
    assert found.weights > 0
    assert time.monotonic() - began < 5
