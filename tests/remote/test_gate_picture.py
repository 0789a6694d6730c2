"""The picture and the sound that the gate shows a server, and what it makes of the reply."""

from __future__ import annotations

import base64
import io
import struct
import wave
import zlib

import gate_picture
import gate_spec
import pytest
from gate_picture import check_picture

from sandbox import models, oracle, projectors
from tests.remote.test_gate import Answers
from tests.serving import serving

REPLY = {
    "choices": [{"logprobs": {"content": [{"logprob": -1.5}, {"logprob": -0.1}]}}],
    "usage": {"prompt_tokens": 30},
}


@pytest.fixture
def server():
    with serving(Answers()) as one:
        one.answer("/props", (200, {"modalities": {"vision": True, "audio": False, "video": True}}))
        one.answer("/apply-template", (200, {"prompt": "a"}))
        one.answer("/tokenize", (200, {"tokens": [1] * 10}))
        one.answer("/v1/chat/completions", (200, REPLY))
        yield one


def spec(server, *modalities):
    return {"url": server.url, "api_keys": None, "modalities": list(modalities), "measured": {}}


def test_without_a_projector_nothing_is_asked(server):
    assert check_picture({"url": server.url, "api_keys": None}) is None
    assert check_picture(spec(server)) is None and server.asked == []


def test_a_reply_that_counts_the_picture_is_good(server):
    asked = spec(server, "vision")
    found = check_picture(asked)
    assert found["ok"] and found["found"] == "20 tokens of a picture"
    assert 0 < asked["measured"]["picture_seconds"] < 60


def test_sound_is_sent_where_the_server_hears(server):
    server.answer("/props", (200, {"modalities": {"vision": True, "audio": True}}))
    found = check_picture(spec(server, "vision", "audio"))
    assert found["found"] == "20 tokens of a picture and 20 tokens of a sound"


@pytest.mark.parametrize(
    ("path", "answer", "expected", "said"),
    [
        ("/props", (200, {"modalities": {"vision": False, "audio": False}}), "modalities vision", "none"),
        ("/props", (200, {"modalities": {"vision": True, "audio": True}}), "modalities vision", "audio, vision"),
        ("/props", (200, {}), "modalities vision", "status 200"),
        ("/props", (503, {"error": "no"}), "modalities vision", "status 503"),
        ("/v1/chat/completions", (500, {"error": {"message": "failed to process image"}}), "200 to a picture",
         "failed to process image"),
        ("/v1/chat/completions", (200, {}), "200 to a picture", "status 200"),
        ("/v1/chat/completions", (200, {**REPLY, "usage": {"prompt_tokens": 10}}), "a prompt of 14 tokens or more",
         "10 tokens"),
        ("/v1/chat/completions", (200, {**REPLY, "choices": []}), "finite likelihoods", "none"),
        ("/v1/chat/completions",
         (200, {**REPLY, "choices": [{"logprobs": {"content": [{"logprob": None}]}}]}), "finite likelihoods", "nan"),
    ],
)  # fmt: skip
def test_what_no_seeing_server_answers_fails(server, path, answer, expected, said):
    server.answer(path, answer)
    found = check_picture(spec(server, "vision"))
    assert (found["name"], found["ok"]) == ("picture", False)
    assert expected in found["expected"] and said in str(found["found"])


def test_the_picture_is_a_png_of_its_size():
    data = gate_picture.picture()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", data[16:24]) == (gate_picture.SIDE, gate_picture.SIDE)
    rows = zlib.decompress(data[data.index(b"IDAT") + 4 : data.index(b"IEND") - 8])
    assert len(rows) == gate_picture.SIDE * (gate_picture.SIDE * 3 + 1)
    assert len(data) < 20_000


def test_the_sound_is_a_wav_of_one_second():
    part = gate_picture.sound_part()["input_audio"]
    with wave.open(io.BytesIO(base64.b64decode(part["data"]))) as one:
        assert (one.getnchannels(), one.getsampwidth(), one.getframerate(), one.getnframes()) == (1, 2, 16000, 16000)


def test_a_plan_without_modalities_is_read():
    assert gate_spec.ABSENT["modalities"] == []


@pytest.mark.oracle
@pytest.mark.parametrize(("kind", "found"), [("good", "tokens of a picture"), ("broken", "nan"), ("none", "none")])
def test_a_real_server_passes_with_a_good_projector_alone(kind, found, tmp_path):
    projector = projectors.tiny(tmp_path, 256, is_broken=kind == "broken")
    flags = [] if kind == "none" else ["--mmproj", projector, "--no-mmproj-offload"]
    port = oracle.free_port()
    command = [oracle.build().llama_server, "-m", models.tiny(tmp_path, "windowed"), *flags, "-c", "1024", "-np", "1",
               "--no-ui", "--host", "127.0.0.1", "--port", port]  # fmt: skip
    with oracle.serving(command, port, tmp_path / "log") as url:
        verdict = check_picture({"url": url, "api_keys": None, "modalities": ["vision"], "measured": {}})
    assert verdict["ok"] == (kind == "good"), verdict
    assert found in str(verdict["found"])
