"""Test models, made on the spot: tiny ones that really answer, and weightless ones of any published size.

A model is a `Layout` (`sandbox/layouts.py`): its numbers as data. `tensors()` derives every tensor with its
type as llama-quantize would choose it. `make()` writes a GGUF whose weights are random (`TINY`, a few MB,
served by a real llama-server) or a hole in the file (`PUBLISHED`: gpt-oss-120b takes 6 MB of disk; enough for
whatever reads the header, llama-server's own memory breakdown included).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUFWriter, LlamaFileType, TokenType
from gguf import GGMLQuantizationType as Q
from gguf.quants import quantize

from sandbox.layouts import PUBLISHED, TINY, Layout

ALIGNMENT_BYTES = 32  # gguf's general.alignment default
SHARD_NAME = "{}-{:05d}-of-{:05d}.gguf"  # llama_split_path, llama.cpp src/llama.cpp
FILE_TYPES = {
    "F16": LlamaFileType.MOSTLY_F16,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
    "Q4_K_M": LlamaFileType.MOSTLY_Q4_K_M,
    "MXFP4": LlamaFileType.MOSTLY_MXFP4_MOE,
}
# Extra per-block tensors by architecture: name, and the Layout attribute with its length (src/models/*.cpp)
QK_NORMS = (("attn_q_norm.weight", "head_dim"), ("attn_k_norm.weight", "head_dim"))
BLOCK_VECTORS: dict[str, tuple[tuple[str, str], ...]] = {
    "llama": (("ffn_norm.weight", "embd"),),
    "qwen3": (("ffn_norm.weight", "embd"), *QK_NORMS),
    "qwen3moe": (("ffn_norm.weight", "embd"), *QK_NORMS),
    "gemma3": (("ffn_norm.weight", "embd"), *QK_NORMS,
               ("post_attention_norm.weight", "embd"), ("post_ffw_norm.weight", "embd")),
    "gpt-oss": (("post_attention_norm.weight", "embd"), ("attn_sinks.weight", "heads")),
}  # fmt: skip
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@dataclass(frozen=True)
class Tensor:
    """One tensor: `shape` in ggml's order (row length first)."""

    name: str
    shape: tuple[int, ...]
    type: Q

    @property
    def nbytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.type]
        return int(math.prod(self.shape) // block * size)


def tiny(folder: Path, kind: str = "dense", *, quant: str = "F16", seed: int = 0, shards: int = 1) -> Path:
    """A servable model of random weights: "dense" (5 MB) or "moe" (15 MB); the same bytes for the same
    arguments.

    `quant` is F16 or Q8_0. Returns the (first) file, in `folder`.
    """
    return make(TINY[kind], folder, quant=quant, seed=seed, shards=shards)


def weightless(folder: Path, layout: Layout | str, quant: str = "", *, shards: int = 1) -> Path:
    """A published model without its weights: the full header, then a hole up to the full size. See `make`."""
    return make(
        PUBLISHED[layout] if isinstance(layout, str) else layout,
        folder,
        quant=quant,
        seed=None,
        shards=shards,
    )


def make(layout: Layout, folder: Path, *, quant: str = "", seed: int | None = None, shards: int = 1) -> Path:
    """Write the model as GGUF into `folder`; with no `seed` the weights are a hole. Returns the (first) file.

    Several shards are named and numbered as llama-gguf-split does: NAME-00001-of-0000N.gguf.
    """
    quant = quant or layout.quant
    table = list(tensors(layout, quant))
    per_shard = math.ceil(len(table) / shards)
    base = folder / f"{layout.name}-{quant}.gguf"
    writer = GGUFWriter(base, layout.architecture, split_max_tensors=per_shard if shards > 1 else 0)
    for key, value in metadata(layout, quant).items():
        _add(writer, key, value)
    for tensor in table:
        # numpy's order is the reverse of ggml's; a dtype that is not uint8 leaves the shape as it is.
        writer.add_tensor_info(tensor.name, tensor.shape[::-1], np.dtype(np.float32), tensor.nbytes, tensor.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    parts = _batches(table, per_shard)
    files = [base] if shards == 1 else [
        base.with_name(SHARD_NAME.format(base.stem, i + 1, len(parts))) for i in range(len(parts))
    ]  # fmt: skip
    for file, part in zip(files, parts, strict=True):
        _fill(file, part, layout, seed)
    return files[0]


def tensors(layout: Layout, quant: str) -> Iterator[Tensor]:
    """Every tensor of the model in file order, with the type that llama-quantize gives it."""
    for name, shape in _shapes(layout):
        yield Tensor(name, shape, _type(layout, quant, name, shape))


def metadata(layout: Layout, quant: str) -> dict[str, Any]:
    """The header's keys and values; the keys are those that llama.cpp reads (src/llama-arch.cpp)."""
    own: dict[str, Any] = {
        "block_count": layout.blocks,
        "context_length": layout.context,
        "embedding_length": layout.embd,
        "feed_forward_length": layout.ff,
        "attention.head_count": layout.heads,
        "attention.head_count_kv": layout.kv_heads,
        "attention.key_length": layout.head_dim,
        "attention.value_length": layout.head_dim,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": layout.rope_base,
        "rope.dimension_count": layout.head_dim,
        "vocab_size": layout.vocab,
        **layout.extra,
    }
    if layout.experts:
        own |= {"expert_count": layout.experts, "expert_used_count": layout.experts_used}
        own |= {"expert_feed_forward_length": layout.ff}
    if layout.window:
        own["attention.sliding_window"] = layout.window
    general = {"general.name": layout.name, "general.file_type": int(FILE_TYPES[quant])}
    return general | {f"{layout.architecture}.{key}": value for key, value in own.items()} | _tokenizer(layout.vocab)


def _shapes(layout: Layout) -> Iterator[tuple[str, tuple[int, ...]]]:
    embd, q, kv = layout.embd, layout.heads * layout.head_dim, layout.kv_heads * layout.head_dim
    yield "token_embd.weight", (embd, layout.vocab)
    for i in range(layout.blocks):
        block = f"blk.{i}."
        yield block + "attn_norm.weight", (embd,)
        for name, length in BLOCK_VECTORS[layout.architecture]:
            yield block + name, (getattr(layout, length),)
        for part, columns, rows in (("q", embd, q), ("k", embd, kv), ("v", embd, kv), ("output", q, embd)):
            yield f"{block}attn_{part}.weight", (columns, rows)
            if layout.biases:
                yield f"{block}attn_{part}.bias", (rows,)
        suffix, many = ("_exps", (layout.experts,)) if layout.experts else ("", ())
        if layout.experts:
            yield block + "ffn_gate_inp.weight", (embd, layout.experts)
            if layout.biases:
                yield block + "ffn_gate_inp.bias", (layout.experts,)
        for part, columns, rows in (
            ("gate", embd, layout.ff),
            ("up", embd, layout.ff),
            ("down", layout.ff, embd),
        ):
            yield f"{block}ffn_{part}{suffix}.weight", (columns, rows, *many)
            if layout.biases:
                yield f"{block}ffn_{part}{suffix}.bias", (rows, *many)
    yield "output_norm.weight", (embd,)
    if not layout.tied:
        yield "output.weight", (embd, layout.vocab)


def _type(layout: Layout, quant: str, name: str, shape: tuple[int, ...]) -> Q:
    """The tensor's type: vectors, biases and routers stay F32 (tensor_allows_quantization,
    src/llama-quant.cpp).
    """
    if len(shape) == 1 or name.endswith(".bias") or "ffn_gate_inp" in name:
        return Q.F32
    if quant == "MXFP4":  # llama-quant.cpp:512-524
        return Q.MXFP4 if "_exps" in name else Q.Q8_0
    if quant != "Q4_K_M":
        return Q[quant]
    wanted = _q4_k_m(layout, name)
    block_length, _ = GGML_QUANT_SIZES[wanted]
    if shape[0] % block_length:  # tensor_type_fallback, llama-quant.cpp
        wanted = {Q.Q4_K: Q.Q5_0, Q.Q5_K: Q.Q5_1, Q.Q6_K: Q.Q8_0}.get(wanted, wanted)
    return wanted


def _q4_k_m(layout: Layout, name: str) -> Q:
    """llama_tensor_get_type_impl for LLAMA_FTYPE_MOSTLY_Q4_K_M (llama-quant.cpp:490-665)."""
    if name == "output.weight" or (layout.tied and name == "token_embd.weight"):
        return Q.Q6_K
    if not name.startswith("blk."):
        return Q.Q4_K
    index, total = int(name.split(".")[1]), layout.blocks
    more_bits = index < total // 8 or index >= 7 * total // 8 or (index - total // 8) % 3 == 2
    if "attn_v" in name:
        plain = Q.Q5_K if layout.is_70b else Q.Q4_K
        chosen = Q.Q6_K if more_bits else plain
    else:
        chosen = Q.Q6_K if "ffn_down" in name and more_bits else Q.Q4_K
    of_eight = layout.experts == 8 and ("attn_v" in name or "attn_k." in name)  # Mixtral
    return Q.Q8_0 if of_eight else chosen


def _tokenizer(size: int) -> dict[str, Any]:
    """A SentencePiece vocabulary: three control tokens, all bytes, then printable ASCII, syllables and
    filler.
    """
    control = ["<unk>", "<s>", "</s>"]
    syllables = [a + b for a in "bcdfghjklmnprstvwz" for b in "aeiou"]
    words = ["\u2581", *map(chr, range(0x21, 0x7F)), *syllables, *("\u2581" + s for s in syllables)]
    words += [f"t{i}" for i in range(len(words), size)]
    words = words[: size - 259]
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    kinds += [TokenType.BYTE] * 256 + [TokenType.NORMAL] * len(words)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [*control, *(f"<0x{i:02X}>" for i in range(256)), *words],
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(words))],
        "tokenizer.ggml.token_type": [int(kind) for kind in kinds],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def _add(writer: GGUFWriter, key: str, value: object) -> None:
    """bool before int: a bool is an int to Python, but not to GGUF."""
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case list():
            writer.add_array(key, value)
        case _:
            raise TypeError(f"{key}: no GGUF type for {type(value).__name__}")


def _fill(file: Path, table: list[Tensor], layout: Layout, seed: int | None) -> None:
    """Append the tensor data: random with a seed, else nothing but length."""
    start = _padded(file.stat().st_size)
    with file.open("r+b") as stream:
        stream.truncate(start + sum(_padded(tensor.nbytes) for tensor in table))
        if seed is None:
            return
        for tensor in table:
            stream.seek(start)
            stream.write(_values(tensor, layout, seed).tobytes())
            start += _padded(tensor.nbytes)


def _values(tensor: Tensor, layout: Layout, seed: int) -> np.ndarray[Any, Any]:
    """Weights that keep activations near one; only printable tokens get a logit, so a reply is readable
    text.
    """
    generator = np.random.default_rng([seed, zlib.crc32(tensor.name.encode())])
    if "norm" in tensor.name:
        return np.ones(tensor.shape[::-1], np.float32)
    scale = 1 / math.sqrt(tensor.shape[0])
    values = (generator.standard_normal(tensor.shape[::-1]) * scale).astype(np.float32)
    if tensor.name == "output.weight":
        values[:259] = 0
        values *= 4
    if tensor.type == Q.F32:
        return values
    return values.astype(np.float16) if tensor.type == Q.F16 else quantize(values, tensor.type)


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _batches(table: list[Tensor], size: int) -> list[list[Tensor]]:
    return [table[i : i + size] for i in range(0, len(table), size)]
