"""What a projector's header says."""

import functools
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from llamafleet.model.gguf import read_path
from llamafleet.model.projector import ProjectorError, read
from sandbox import projectors


@functools.cache
def header(name):
    with tempfile.TemporaryDirectory() as folder:
        return read_path(projectors.write(projectors.PUBLISHED_PROJECTORS[name], Path(folder)))


def changed(name, **metadata):
    """The header with other values; None takes a key out. A double underscore stands for a dot."""
    one = header(name)
    values = {**one.metadata, **{f"clip.{key.replace('__', '.')}": value for key, value in metadata.items()}}
    return replace(one, metadata={key: value for key, value in values.items() if value is not None})


@pytest.mark.parametrize(
    ("name", "modalities", "width", "tokens", "together"),
    [
        ("gemma-3-4b", ("vision",), 2560, 256, 256),
        ("gemma-4-e4b", ("vision",), 2560, 1120, 0),  # the small ones read pictures as they read text
        ("gemma-4-31b", ("vision",), 5376, 1120, 1120),
        ("qwen3-vl-2b", ("vision",), 2048 * 4, 4096, 0),  # with the features of three layers
        ("qwen2.5-vl-7b", ("vision",), 3584, 4096, 0),
        ("pixtral-12b", ("vision",), 5120, 1024, 0),
        ("internvl3-8b", ("vision",), 3584, 256, 0),
        ("llava-1.5-7b", ("vision",), 4096, 576, 0),
        ("smolvlm2-500m", ("vision",), 960, 64, 0),
        ("voxtral-mini-3b", ("audio",), 3072, 0, 0),
    ],
)
def test_modalities_width_and_tokens(name, modalities, width, tokens, together):
    found = read(header(name))
    assert (found.modalities, found.width, found.encoders[0].max_tokens, found.same_ubatch_tokens) == (
        modalities, width, tokens, together,
    )  # fmt: skip


def test_fewer_tokens_make_a_smaller_picture_where_the_size_is_free():
    assert read(header("qwen3-vl-2b"), max_tokens=100).encoders[0].max_tokens == 100
    assert read(header("gemma-3-4b"), max_tokens=100).encoders[0].max_tokens == 256


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"projector_type": "foo"}, r"of the type 'foo', which the pinned llama.cpp does not know"),
        ({"projector_type": None}, r"of the type None"),
        ({"projector_type": "qwen3tts_gen"}, r"of speech \(qwen3tts_gen\)"),
        ({"has_vision_encoder": False}, r"neither an encoder of pictures nor one of sound"),
        ({"vision__patch_size": 0}, r"clip.vision.patch_size = 0"),
        ({"vision__patch_size": None}, r"clip.vision.patch_size = None"),
        ({"vision__image_size": 10_000}, r"image_size 10000, which llama.cpp refuses"),
        ({"vision__block_count": 2**30}, r"block_count = 1073741824, 512 at most"),
        ({"vision__embedding_length": "many"}, r"clip.vision.embedding_length = many"),
        ({"vision__projector__scale_factor": 2**20}, r"scale_factor 1048576, which llama.cpp refuses"),
    ],
)
def test_what_llama_cpp_would_not_load_is_refused(metadata, message):
    with pytest.raises(ProjectorError, match=message):
        read(changed("gemma-3-4b", **metadata))


def test_a_projector_of_two_encoders_has_both():
    sound, sight = header("qwen2-audio-7b"), header("qwen3.6-35b-a3b")
    values = {**sound.metadata, **sight.metadata, "clip.projector_type": None,
              "clip.vision.projector_type": "qwen3vl_merger", "clip.audio.projector_type": "qwen2a"}  # fmt: skip
    both = replace(sight, metadata=values, tensors=(*sight.tensors, *sound.tensors))
    found = read(both)
    assert found.modalities == ("vision", "audio")
    # The first convolution of pictures is loaded with each encoder.
    names = [{tensor.name for tensor in one.tensors} for one in found.encoders]
    assert names[0] & names[1] == {"v.patch_embd.weight", "v.patch_embd.weight.1", "v.patch_embd.bias"}
    assert "a.conv1d.1.weight" in names[1] - names[0]


def test_how_much_longer_the_largest_picture_takes():
    assert read(header("gemma-3-4b")).largest_to_smallest == 1
    # From 8 tokens to 4096: more than in proportion, because all patches attend to all.
    assert read(header("qwen3-vl-2b")).largest_to_smallest > 2 * 4096 / 8
    assert read(header("qwen3-vl-2b"), 100, 100).largest_to_smallest == 1
    assert read(header("voxtral-mini-3b")).largest_to_smallest == 1
