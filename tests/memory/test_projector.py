"""What a projector takes. That llama-server takes the same is a test of the oracle's."""

import functools
import itertools
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType

from llamafleet.memory.projector import SENT_PICTURE_BYTES, _compute, _largest, projector_bytes
from llamafleet.model.gguf import read_path
from llamafleet.model.projector import read
from sandbox import projectors

MIB = 2**20


@functools.cache
def header(name):
    with tempfile.TemporaryDirectory() as folder:
        layouts = {**projectors.PUBLISHED_PROJECTORS, **projectors.OTHER_PROJECTORS}
        return read_path(projectors.write(layouts[name], Path(folder)))


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


@pytest.mark.parametrize("name", {**projectors.PUBLISHED_PROJECTORS, **projectors.OTHER_PROJECTORS})
def test_the_bound_of_a_projector_whose_graph_is_unknown_is_above_its_bytes(name):
    [encoder] = read(header(name)).encoders
    unknown = replace(encoder, name="?")
    for picture, flash in itertools.product(_largest(encoder), (True, False)):
        [exact], is_exact = _compute(encoder, picture, False, flash)
        [bound], is_bound = _compute(unknown, picture, False, flash)
        assert (is_exact, is_bound) == (True, False)
        assert exact <= bound


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
    assert time.monotonic() - began < 30


def published(name, **changes):
    """The projector of a layout with these changes."""
    layout = replace(projectors.PUBLISHED_PROJECTORS[name], **changes)
    with tempfile.TemporaryDirectory() as folder:
        return projector_bytes(
            read(read_path(projectors.write(layout, Path(folder)))), on_gpu=True, flash_attention=True
        )


def test_published_logs_of_cuda_are_reproduced():
    """What llama-server logged at its start on NVIDIA GPUs: weights ("model size") and the GPU's compute buffer, MiB.

    Gemma 3 4B: 811.79, 121.25 and, of the host, 9.19 (github.com/ggml-org/llama.cpp/pull/22790). Qwen3-VL 8B in F32:
    2198.75 and 372.08, where cudaMalloc failed (.../issues/18181). Qwen3.5 4B: 644.26 and 223.30 (.../pull/22673).
    Qwen2.5-VL 7B: 1291.40 (.../issues/13445). Mistral Small 3.2: 837.36 (.../issues/16842). Two of them have their first
    convolutions in F32.
    """
    gemma, qwen3 = published("gemma-3-4b"), published("qwen3-vl-8b", type=GGMLQuantizationType.F32)
    small, qwen25 = published("qwen3-vl-2b", width=2560, deepstack=()), published("qwen2.5-vl-7b")
    weights = [gemma.weights + 14 * 14 * 3 * 1152 * 2, qwen3.weights, small.weights + 2 * 16 * 16 * 3 * 1024 * 2,
               qwen25.weights, published("mistral-small-3.1-24b").weights]  # fmt: skip
    assert [size / MIB for size in weights] == pytest.approx([811.79, 2198.75, 644.26, 1291.40, 837.36], abs=0.01)
    # On the host there are the pixels, of which the log has a line for Gemma alone.
    compute = [gemma.at_start - gemma.weights, qwen3.at_start - qwen3.weights, small.at_start - small.weights]
    assert [size / MIB for size in compute] == pytest.approx([121.25 + 9.19, 372.08 + 24.93, 223.30 + 24.93], abs=0.01)
