"""Does the server see the picture, or hear the sound, that a request brings?

Part of gate.py and under its contract: Python 3.8, standard library. plan.json's `gate.modalities` is the list of what
the projector makes of: "vision", "audio"; it is missing without a projector. The picture and the sound are made here,
and the check holds for any model: no word of the reply is looked at.
"""

from __future__ import annotations

import array
import base64
import math
import struct
import sys
import time
import zlib
from typing import Any, Dict, List, Optional

from gate_prompt_files import free
from gate_server import ask, first_key, found_status, result

SIDE = 96  # pixels
SAMPLES, HERTZ = 16000, 440  # a second of a tone
TOKENS = 2
# The fewest that any projector makes of so small a picture, or of a second of sound.
LEAST_TOKENS = 4
# Pictures of Gemma 3 have one size, of which an encoder takes 5 million million operations: minutes on two cores.
SECONDS = 1200.0
QUESTION = "What is this?"


def check_picture(spec: Dict[str, Any]) -> Optional[Dict[str, Any]]:
    """The server must tell the planned modalities, and reply to a request with a picture or a sound."""
    wanted = spec.get("modalities", [])
    if not wanted:
        return None
    status, props = ask(spec["url"], "/props", first_key(spec))
    told = props.get("modalities") if isinstance(props, dict) else None
    found = sorted(name for name in ("audio", "vision") if isinstance(told, dict) and told.get(name) is True)
    if found != sorted(wanted):
        return result("picture", False, f"modalities {', '.join(sorted(wanted))}",
                      ", ".join(found) or (found_status(status, props) if told is None else "none"),
                      "the projector was not loaded, or is another one")  # fmt: skip
    counted = []
    for modality in wanted:
        part, began = picture_part() if modality == "vision" else sound_part(), time.monotonic()
        bad, tokens = asked(spec, modality, part)
        if bad is not None:
            return bad
        if modality == "vision":  # liveness.py waits accordingly for a large one
            spec["measured"]["picture_seconds"] = time.monotonic() - began
        counted.append("{} tokens of a {}".format(tokens, "picture" if modality == "vision" else "sound"))
    return result("picture", True, "a reply that counts what it was shown", " and ".join(counted))


def asked(spec: Dict[str, Any], modality: str, part: Dict[str, Any]) -> "tuple[Optional[Dict[str, Any]], int]":
    """(what is wrong, or None; the tokens that were counted for it) of one request."""
    what = "picture" if modality == "vision" else "sound"
    body = {
        "messages": [{"role": "user", "content": [part, {"type": "text", "text": QUESTION}]}],
        "max_tokens": TOKENS, "temperature": 0, "cache_prompt": False, "logprobs": True, "top_logprobs": 1,
        **free(spec),
    }  # fmt: skip
    status, answer = ask(spec["url"], "/v1/chat/completions", first_key(spec), body, SECONDS)
    usage = answer.get("usage") if isinstance(answer, dict) else None
    counted = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    if status != 200 or not isinstance(counted, int):
        found = f"{found_status(status, answer)}: {str(answer)[:200]}"
        return result("picture", False, f"200 to a {what}", found,
                      "the projector fails: out of memory, another model's, or damaged"), 0  # fmt: skip
    least = text_tokens(spec) + LEAST_TOKENS
    if counted < least:
        return result("picture", False, f"a prompt of {least} tokens or more, with the {what}", f"{counted} tokens",
                      f"the {what} did not reach the model: template or projector is another model's"), 0  # fmt: skip
    odd = [value for value in likelihoods(answer) if not math.isfinite(value)]
    if odd or not likelihoods(answer):
        return result("picture", False, f"finite likelihoods behind a {what}", odd or "none",
                      "the projector computes garbage: a broken kernel or driver, or a damaged file"), 0  # fmt: skip
    return None, counted - least + LEAST_TOKENS


def text_tokens(spec: Dict[str, Any]) -> int:
    """Tokens of the same prompt without picture or sound; 0 if the server does not tell them."""
    key, body = first_key(spec), {"messages": [{"role": "user", "content": QUESTION}]}
    _, made = ask(spec["url"], "/apply-template", key, body)
    text = made.get("prompt") if isinstance(made, dict) else None
    _, told = ask(spec["url"], "/tokenize", key, {"content": text, "add_special": True, "parse_special": True})
    tokens = told.get("tokens") if isinstance(told, dict) else None
    return len(tokens) if isinstance(tokens, list) else 0


def likelihoods(answer: Dict[str, Any]) -> List[float]:
    """Of the reply's tokens; what is no number is NaN."""
    choices = answer.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else {}
    told = first.get("logprobs") if isinstance(first, dict) else None
    places = told.get("content") if isinstance(told, dict) else None
    values = [one.get("logprob") if isinstance(one, dict) else None for one in places or []]
    return [float(value) if isinstance(value, (int, float)) else math.nan for value in values]


def picture_part() -> Dict[str, Any]:
    """A picture as a part of a message."""
    data = base64.b64encode(picture()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def picture() -> bytes:
    """A PNG: a bright square on a shaded ground."""
    rows = b"".join(b"\0" + b"".join(pixel(x, y) for x in range(SIDE)) for y in range(SIDE))
    header = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def pixel(x: int, y: int) -> bytes:
    inside = SIDE // 4 < x < SIDE * 3 // 4 and SIDE // 4 < y < SIDE * 3 // 4
    return bytes((230, 60, 30) if inside else (x * 255 // SIDE, y * 255 // SIDE, 90))


def sound_part() -> Dict[str, Any]:
    """A sound as a part of a message."""
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(sound()).decode(), "format": "wav"}}


def sound() -> bytes:
    """A WAV: one second of a tone, mono, 16 bits, 16 kHz."""
    wave = array.array("h", [int(8000 * math.sin(2 * math.pi * HERTZ * n / SAMPLES)) for n in range(SAMPLES)])
    if sys.byteorder == "big":
        wave.byteswap()
    data = wave.tobytes()
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, SAMPLES, SAMPLES * 2, 2, 16)
    body = b"WAVE" + form + struct.pack("<4sI", b"data", len(data)) + data
    return struct.pack("<4sI", b"RIFF", len(body)) + body
