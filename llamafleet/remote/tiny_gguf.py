"""Write a tiny model of random weights that llama-server can serve: about 1 MB, made in a fraction of a second.

Contract: `write(path)` writes one GGUF file, the same bytes each time. Standard library only, Python 3.8. The
keys are those that llama.cpp reads for its architecture "llama" (src/llama-arch.cpp); a head has 64 values, so
that quantised KV caches (blocks of 32) can be tried on it too.
"""

from __future__ import annotations

import array
import random
import struct
from typing import Any, List, Tuple  # the contract is Python 3.8, whose own are typing's

BLOCKS, EMBEDDING, FEED_FORWARD, CONTEXT = 4, 64, 128, 512
CONTROL, BYTES = 3, 256
VOCABULARY = CONTROL + BYTES + 64
ALIGNMENT = 32  # general.alignment's default
F32 = 0  # ggml/include/ggml.h, GGML_TYPE_F32
# ggml/include/gguf.h, gguf_type
UINT32, FLOAT32, STRING, ARRAY, INT32 = 4, 6, 8, 9, 5


def write(path: str) -> None:
    tensors = list(shapes())
    with open(path, "wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata())))
        for key, kind, value in metadata():
            file.write(text(key) + struct.pack("<I", kind) + packed(kind, value))
        at = 0
        for name, shape in tensors:
            file.write(text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, F32, at))
            at += padded(4 * size(shape))
        file.write(b"\0" * (padded(file.tell()) - file.tell()))
        numbers = random.Random(1)  # noqa: S311 -- weights, not secrets
        for name, shape in tensors:
            data = weights(name, shape, numbers)
            file.write(data + b"\0" * (padded(len(data)) - len(data)))


def shapes() -> List[Tuple[str, Tuple[int, ...]]]:
    """Every tensor by name, row length first."""
    square, out = (EMBEDDING, EMBEDDING), (FEED_FORWARD, EMBEDDING)
    found: List[Tuple[str, Tuple[int, ...]]] = [("token_embd.weight", (EMBEDDING, VOCABULARY))]
    for block in range(BLOCKS):
        found += [(f"blk.{block}.{name}.weight", (EMBEDDING,)) for name in ("attn_norm", "ffn_norm")]
        found += [(f"blk.{block}.attn_{name}.weight", square) for name in ("q", "k", "v", "output")]
        found += [(f"blk.{block}.ffn_{name}.weight", (EMBEDDING, FEED_FORWARD)) for name in ("gate", "up")]
        found += [(f"blk.{block}.ffn_down.weight", out)]
    return [*found, ("output_norm.weight", (EMBEDDING,)), ("output.weight", (EMBEDDING, VOCABULARY))]


def weights(name: str, shape: Tuple[int, ...], numbers: random.Random) -> bytes:
    if "norm" in name:
        return array.array("f", [1.0] * size(shape)).tobytes()
    limit = (3.0 / shape[0]) ** 0.5  # activations stay near one
    return array.array("f", [numbers.uniform(-limit, limit) for _ in range(size(shape))]).tobytes()


def metadata() -> List[Tuple[str, int, Any]]:
    return [
        ("general.architecture", STRING, "llama"),
        ("general.name", STRING, "preflight"),
        ("llama.block_count", UINT32, BLOCKS),
        ("llama.context_length", UINT32, CONTEXT),
        ("llama.embedding_length", UINT32, EMBEDDING),
        ("llama.feed_forward_length", UINT32, FEED_FORWARD),
        ("llama.attention.head_count", UINT32, 1),
        ("llama.attention.head_count_kv", UINT32, 1),
        ("llama.attention.layer_norm_rms_epsilon", FLOAT32, 1e-5),
        ("llama.rope.dimension_count", UINT32, EMBEDDING),
        ("tokenizer.ggml.model", STRING, "llama"),
        ("tokenizer.ggml.tokens", ARRAY, (STRING, tokens())),
        ("tokenizer.ggml.scores", ARRAY, (FLOAT32, [0.0] * VOCABULARY)),
        # include/llama.h, llama_token_type: unknown, control, control; the bytes; normal ones
        ("tokenizer.ggml.token_type", ARRAY, (INT32, [2, 3, 3] + [6] * BYTES + [1] * 64)),
        ("tokenizer.ggml.bos_token_id", UINT32, 1),
        ("tokenizer.ggml.eos_token_id", UINT32, 2),
    ]


def tokens() -> List[str]:
    control, letters = ["<unk>", "<s>", "</s>"], [chr(0x40 + number) for number in range(63)]
    return control + [f"<0x{byte:02X}>" for byte in range(BYTES)] + ["\u2581", *letters]


def packed(kind: int, value: Any) -> bytes:
    if kind == STRING:
        return text(value)
    if kind == ARRAY:
        of, items = value
        return struct.pack("<IQ", of, len(items)) + b"".join(packed(of, item) for item in items)
    return struct.pack({UINT32: "<I", INT32: "<i", FLOAT32: "<f"}[kind], value)


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def size(shape: Tuple[int, ...]) -> int:
    return shape[0] * (shape[1] if len(shape) > 1 else 1)


def padded(length: int) -> int:
    return -(-length // ALIGNMENT) * ALIGNMENT
