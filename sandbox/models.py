"""Make test models: tiny models that can be served, and weightless models of any published size.

A `Layout` (`sandbox/layouts.py`) has a model's numbers. `tensors()` derives every tensor, with the type that
llama-quantize would choose. `make()` writes a GGUF file: with random weights (`TINY`, a few MB, served by a real
llama-server), or with a hole in their place (`PUBLISHED`). gpt-oss-120b then takes 6 MB of disk, and every program that
reads only the header works with it, llama-server's memory breakdown included.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUFValueType, GGUFWriter, TokenType
from gguf import GGMLQuantizationType as Q
from gguf.quants import quantize

from sandbox import embedders
from sandbox.encoder_shapes import ENCODERS, TOKEN_TYPES
from sandbox.layouts import PUBLISHED, TINY, Layout
from sandbox.quants import MIXES, tensor_types
from sandbox.shapes import shapes

ALIGNMENT_BYTES = 32  # gguf's general.alignment default
SHARD_NAME = "{}-{:05d}-of-{:05d}.gguf"  # llama_split_path, llama.cpp src/llama.cpp
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class Unsigned64(int):
    """A whole number that is written as one of 64 bits, where llama.cpp reads such a list."""


class _Writer(GGUFWriter):  # type: ignore[misc]  # untyped, see pyproject.toml
    """Pack the vocabulary's long arrays at once; item by item the base class needs a second for each model."""

    _FORMATS: ClassVar = {
        int: (GGUFValueType.INT32, "i"),
        Unsigned64: (GGUFValueType.UINT64, "Q"),
        float: (GGUFValueType.FLOAT32, "f"),
        bool: (GGUFValueType.BOOL, "?"),
    }
    _DTYPES: ClassVar = {"<i4": GGUFValueType.INT32, "<f4": GGUFValueType.FLOAT32}

    def _pack_val(
        self, val: Any, vtype: GGUFValueType, add_vtype: bool, sub_type: GGUFValueType | None = None
    ) -> bytes:
        if vtype is not GGUFValueType.ARRAY:
            return bytes(super()._pack_val(val, vtype, add_vtype, sub_type))
        if isinstance(val, np.ndarray):
            kind, data = self._DTYPES[val.dtype.str], val.tobytes()
        elif isinstance(val[0], str):
            kind, data = GGUFValueType.STRING, _strings(val)
        else:
            kind, letter = self._FORMATS[type(val[0])]
            data = struct.pack(f"<{len(val)}{letter}", *val)
        return (struct.pack("<I", vtype) if add_vtype else b"") + struct.pack("<IQ", kind, len(val)) + data


# Lengths of strings as GGUF has them, 64 bits each, as text: all characters are single bytes in UTF-8.
_LENGTHS = [chr(length) + "\0" * 7 for length in range(128)]


def _strings(texts: list[str]) -> bytes:
    """Strings with their lengths, as in a GGUF's array; of 127 bytes each at most."""
    return "".join([_LENGTHS[len(text if text.isascii() else text.encode())] + text for text in texts]).encode()


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
    """Make a model with random weights that can be served; equal arguments give equal bytes.

    `kind` is "dense" (5 MB), "moe" (15 MB), "windowed" (attention windows), "hybrid" (recurrent state beside attention)
    or "recurrent" (recurrent state only), or one of embedders.TINY; `quant` is F16 or Q8_0. Returns the (first) file,
    in `folder`.
    """
    return make({**TINY, **embedders.TINY}[kind], folder, quant=quant, seed=seed, shards=shards)


def weightless(folder: Path, layout: Layout | str, quant: str = "", *, shards: int = 1) -> Path:
    """Make a published model without its weights: the whole header, then a hole up to the full size. See `make`."""
    return make(
        PUBLISHED[layout] if isinstance(layout, str) else layout,
        folder,
        quant=quant,
        seed=None,
        shards=shards,
    )


def make(layout: Layout, folder: Path, *, quant: str = "", seed: int | None = None, shards: int = 1) -> Path:
    """Write the model as GGUF into `folder`; without `seed` the weights are a hole. Returns the (first) file.

    Several shards are named and numbered as llama-gguf-split does: NAME-00001-of-0000N.gguf.
    """
    quant = quant or layout.quant
    table = list(tensors(layout, quant))
    per_shard = math.ceil(len(table) / shards)
    base = folder / f"{layout.name}-{quant}.gguf"
    write_header(base, layout.architecture, metadata(layout, quant), table, per_shard if shards > 1 else 0)
    parts = _batches(table, per_shard)
    files = [base] if shards == 1 else [
        base.with_name(SHARD_NAME.format(base.stem, i + 1, len(parts))) for i in range(len(parts))
    ]  # fmt: skip
    for file, part in zip(files, parts, strict=True):
        _fill(file, part, layout, seed)
    return files[0]


def write_header(
    file: Path, architecture: str, values: Mapping[str, object], table: Iterable[Tensor], per_shard: int = 0
) -> None:
    """Write a GGUF without the tensors' data, in shards of `per_shard` tensors (0: one file)."""
    writer = _Writer(file, architecture, split_max_tensors=per_shard)
    for key, value in values.items():
        _add(writer, key, value)
    for tensor in table:
        # numpy's order is the reverse of ggml's; a dtype that is not uint8 leaves the shape as it is.
        writer.add_tensor_info(tensor.name, tensor.shape[::-1], np.dtype(np.float32), tensor.nbytes, tensor.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def leave_hole(file: Path, table: Iterable[Tensor]) -> int:
    """Extend the file by the size of the tensors' data; returns the offset at which the data would begin."""
    start = _padded(file.stat().st_size)
    with file.open("r+b") as stream:
        stream.truncate(start + sum(_padded(tensor.nbytes) for tensor in table))
    return start


def tensors(layout: Layout, quant: str) -> Iterator[Tensor]:
    """All tensors of the model in file order, with the types that llama-quantize gives them."""
    table = list(shapes(layout))
    for (name, shape), kind in zip(table, tensor_types(layout, quant, table), strict=True):
        yield Tensor(name, shape, kind)


def metadata(layout: Layout, quant: str) -> dict[str, Any]:
    """The header's metadata, with the keys that llama.cpp reads (src/llama-arch.cpp)."""
    own: dict[str, Any] = {
        "block_count": layout.blocks,
        "context_length": layout.context,
        "embedding_length": layout.embd,
        "feed_forward_length": layout.ff,
        "attention.head_count": layout.heads,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "vocab_size": layout.vocab,
    }
    if layout.heads:
        own |= {
            "attention.head_count_kv": layout.kv_heads,
            "attention.key_length": layout.head_dim,
            "attention.value_length": layout.head_dim,
            "rope.freq_base": layout.rope_base,
            "rope.dimension_count": layout.head_dim,
        }
    if layout.experts:
        own |= {"expert_count": layout.experts, "expert_used_count": layout.experts_used}
        own |= {"expert_feed_forward_length": layout.expert_ff or layout.ff}
    if layout.dense_blocks:
        own["leading_dense_block_count"] = layout.dense_blocks
    if layout.window:
        own["attention.sliding_window"] = layout.window
    own |= layout.extra
    general = {"general.name": layout.name, "general.file_type": int(MIXES[quant][0])}
    words = word_pieces(layout.vocab) if layout.architecture in ENCODERS else tokenizer(layout.vocab)
    if layout.scores > 1:
        own["classifier.output_labels"] = [f"label {number}" for number in range(layout.scores)]
    return general | {f"{layout.architecture}.{key}": value for key, value in own.items()} | words


def word_pieces(size: int) -> dict[str, Any]:
    """A vocabulary of `size` tokens as BERT has it: special tokens, the beginnings and the other parts of words."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(code) for code in range(0x21, 0x7F) if not chr(code).isupper()]
    pieces = [*("\u2581" + letter for letter in letters), *letters]
    pieces += [a + b for a in "bcdfghjklmnprstvwz" for b in "aeiou"]
    pieces += [f"\u2581t{i}" for i in range(len(special) + len(pieces), size)]
    tokens = [*special, *pieces][:size]
    return {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [int(TokenType.CONTROL)] * 5 + [int(TokenType.NORMAL)] * (len(tokens) - 5),
        "tokenizer.ggml.token_type_count": TOKEN_TYPES,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.unknown_token_id": 1,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.cls_token_id": 2,
        "tokenizer.ggml.seperator_token_id": 3,
        "tokenizer.ggml.mask_token_id": 4,
    }


def tokenizer(size: int) -> dict[str, Any]:
    """A SentencePiece vocabulary of `size` tokens: control tokens, all bytes, printable ASCII, syllables, filler."""
    control = ["<unk>", "<s>", "</s>"]
    syllables = [a + b for a in "bcdfghjklmnprstvwz" for b in "aeiou"]
    words = ["\u2581", *map(chr, range(0x21, 0x7F)), *syllables, *("\u2581" + s for s in syllables)]
    words += [f"t{i}" for i in range(len(words), size)]
    words = words[: size - 259]
    kinds = np.full(259 + len(words), TokenType.NORMAL, "<i4")
    kinds[:259] = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [*control, *(f"<0x{i:02X}>" for i in range(256)), *words],
        "tokenizer.ggml.scores": np.concatenate([np.zeros(259, "<f4"), -np.arange(len(words), dtype="<f4")]),
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def _add(writer: GGUFWriter, key: str, value: object) -> None:
    """Add a value with its GGUF type; bool comes before int, since a Python bool is an int."""
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case list() | np.ndarray():
            writer.add_array(key, value)
        case _:
            raise TypeError(f"{key}: no GGUF type for {type(value).__name__}")


def _fill(file: Path, table: list[Tensor], layout: Layout, seed: int | None) -> None:
    """Append the tensors' data: random values with a seed, else a hole."""
    start = leave_hole(file, table)
    if seed is None:
        return
    with file.open("r+b") as stream:
        for tensor in table:
            stream.seek(start)
            stream.write(_values(tensor, layout, seed).tobytes())
            start += _padded(tensor.nbytes)


def _values(tensor: Tensor, layout: Layout, seed: int) -> np.ndarray[Any, Any]:
    """Random weights that keep activations near 1; only printable tokens get logits, so a reply is readable text."""
    generator = np.random.default_rng([seed, zlib.crc32(tensor.name.encode())])
    if "norm" in tensor.name:
        return np.ones(tensor.shape[::-1], np.float32)
    scale = 1 / math.sqrt(tensor.shape[0])
    values = (generator.standard_normal(tensor.shape[::-1]) * scale).astype(np.float32)
    if tensor.name.endswith("ssm_a"):
        values = -np.abs(values)  # states decay
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
