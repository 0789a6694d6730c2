"""Read a GGUF's header: metadata and tensor table, never weights.

The file may be on disk or on an HTTP server, and may be damaged or hostile. This module parses and checks a header;
`gguf_cursor` reads its bytes within limits. The format is described in ggml/include/gguf.h. Every header that is
refused here is refused by llama.cpp too (ggml/src/gguf.cpp).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llamafleet.model import header_checks as hyperparameters
from llamafleet.model.ggml_types import GGML_TYPES
from llamafleet.model.gguf_cursor import (
    KEY_LIMIT_BYTES,
    ByteSource,
    Cursor,
    FileSource,
    GgufError,
    LongArray,
    Read,
    Value,
)

__all__ = [
    "GGML_TYPES",
    "ByteSource",
    "FileSource",
    "GgufError",
    "Header",
    "LongArray",
    "Tensor",
    "read_header",
    "read_path",
    "shard_names",
]

# Limits against hostile files; gguf_cursor has the limits of single values.
METADATA_LIMIT = 1 << 16
TENSOR_LIMIT = 1 << 16  # the largest models have about 2000
TENSOR_NAME_LIMIT_BYTES = 63  # GGML_MAX_NAME less the final zero, ggml/include/ggml.h
SHARD_LIMIT = 1 << 10
DEFAULT_ALIGNMENT = 32  # ggml/include/gguf.h, GGUF_DEFAULT_ALIGNMENT
NAME_LIMIT = 100  # characters of a model's name that are shown
DIMENSIONS = 4  # GGML_MAX_DIMS

_ARCHITECTURE = re.compile(r"[A-Za-z0-9_.-]{1,63}")  # src/llama-arch.cpp, LLM_ARCH_NAMES
_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf")
_HTML = "is an HTML page, not a GGUF: a login, error or preview page was saved instead of the file"
_BEFORE_GGUF = "has the GGML format that GGUF replaced: convert the original model to GGUF"
# Other kinds of files by their first bytes (lower case), and the message about each.
_FOREIGN = (
    (b"<!doctype", _HTML),
    (b"<html", _HTML),
    (b"version https://git-lfs", "is a Git LFS pointer, not the model: fetch the model with `git lfs pull`"),
    (b"pk\x03\x04", "is a zip archive, not a GGUF"),
    (b"ggjt", _BEFORE_GGUF),
    (b"ggml", _BEFORE_GGUF),
)


@dataclass(frozen=True)
class Tensor:
    """One entry of the tensor table. `shape` is in ggml's order: the row length first.."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    bytes: int
    shard: int = 0

    @property
    def elements(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """A model's metadata and tensor table, of all shards."""

    version: int
    architecture: str
    metadata: Mapping[str, Value]
    tensors: tuple[Tensor, ...]
    file_bytes: tuple[int, ...]

    @property
    def file_bytes_total(self) -> int:
        """Bytes of all shards' files."""
        return sum(self.file_bytes)

    @property
    def weights_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.bytes for tensor in self.tensors)

    @property
    def name(self) -> str:
        """general.name, or else the architecture; shortened and printable."""
        name = self.metadata.get("general.name")
        return _plain(name if isinstance(name, str) and name else self.architecture)

    def get(self, key: str) -> Value | None:
        """The metadata value `ARCHITECTURE.key`."""
        return self.metadata.get(f"{self.architecture}.{key}")


def _plain(text: str) -> str:
    """The text with "?" for characters that are not printable, NAME_LIMIT characters at most."""
    return "".join(mark if mark.isprintable() else "?" for mark in text[:NAME_LIMIT])


def shard_names(name: str) -> tuple[str, ...]:
    """Names of all shards, from the name or path of any shard; only `name` for a model that is not split.

    Raises GgufError for an impossible shard number.
    """
    match = _SHARD.fullmatch(name)
    if not match:
        return (name,)
    count = int(match["count"])
    if not 1 <= int(match["number"]) <= count <= SHARD_LIMIT:
        raise GgufError(
            f"{name}: shard {match['number']} of {match['count']} is impossible, 1 to {SHARD_LIMIT} are possible"
        )
    return tuple(f"{match['stem']}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1))


def read_path(path: Path) -> Header:
    """The header of a model on this machine, from any of its shards. Raises GgufError."""
    for shard in (paths := [Path(name) for name in shard_names(str(path))]):
        if not shard.is_file():
            raise GgufError(f"{shard}: there is no such file")
    return read_header([FileSource(shard) for shard in paths])


def read_header(sources: Sequence[ByteSource]) -> Header:
    """The header of a model, from its shards in order; the limits are for all of them together. Raises GgufError."""
    parts: list[Header] = []
    read = Read()
    for shard, source in enumerate(sources):
        tensors_left = TENSOR_LIMIT - sum(len(part.tensors) for part in parts)
        parts.append(_read_one(source, shard, tensors_left, read))
    first = parts[0]
    _check_split(sources, parts)
    tensors = tuple(tensor for part in parts for tensor in part.tensors)
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    if len(shapes) < len(tensors):
        raise GgufError(f"{sources[0].name}: two shards have a tensor of the same name; download the shards again")
    if problem := hyperparameters.problem(first.architecture, first.metadata, shapes):
        raise GgufError(f"{sources[0].name}: {problem}; llama.cpp does not load such a file")
    return Header(
        version=first.version,
        architecture=first.architecture,
        metadata=first.metadata,
        tensors=tensors,
        file_bytes=tuple(part.file_bytes[0] for part in parts),
    )


def _check_split(sources: Sequence[ByteSource], parts: Sequence[Header]) -> None:
    """Raise GgufError unless these are all shards of one model, in order (src/llama-model-loader.cpp,
    LLM_KV_SPLIT_COUNT)."""
    for position, (source, part) in enumerate(zip(sources, parts, strict=True)):
        count, number = part.metadata.get("split.count", 1), part.metadata.get("split.no", 0)
        if count in (0, 1) and len(parts) == 1:
            continue
        if count != len(parts):
            raise GgufError(
                f"{source.name}: belongs to a model of {count} shards, {len(parts)} given;"
                " keep the publisher's file names, NAME-00001-of-0000N.gguf, with all shards in one folder"
            )
        if number != position:
            raise GgufError(f"{source.name}: split.no is {number}, should be {position} by its file name")
    expected = parts[0].metadata.get("split.tensors.count")
    count = sum(len(part.tensors) for part in parts)
    if len(parts) > 1 and expected is not None and expected != count:
        raise GgufError(
            f"{sources[0].name}: split.tensors.count is {expected}, but the {len(parts)} shards have {count} tensors"
        )


def _read_one(source: ByteSource, shard: int, tensors_left: int, read: Read) -> Header:
    cursor = Cursor(source, read)
    version = _version(cursor)
    tensor_count, metadata_count = cursor.u64(), cursor.u64()
    cursor.check(
        tensor_count <= tensors_left, f"has {tensor_count} tensors by its header, {tensors_left} at most are supported"
    )
    cursor.check(
        metadata_count <= METADATA_LIMIT,
        f"has {metadata_count} metadata keys by its header, {METADATA_LIMIT} at most are supported",
    )
    metadata: dict[str, Value] = {}
    for _ in range(metadata_count):
        key = cursor.string(KEY_LIMIT_BYTES)
        cursor.check(key not in metadata, f"has the metadata key {key[:NAME_LIMIT]!r} twice")
        metadata[key] = cursor.value(key)
    alignment = _alignment(cursor, metadata)
    table = [_tensor(cursor, shard) for _ in range(tensor_count)]
    data_start = _padded(cursor.position, alignment)
    end = data_start + _check_offsets(cursor, table, alignment)
    if source.size is not None and table:
        cursor.check(
            end <= source.size,
            f"is cut short: its tensors end at byte {end}, the file has {source.size} bytes; download it again",
        )
    architecture = metadata.get("general.architecture", "")
    if shard == 0:
        cursor.check(isinstance(architecture, str) and bool(architecture), "has no general.architecture")
        match = _ARCHITECTURE.fullmatch(str(architecture))
        cursor.check(match is not None, f"has the invalid general.architecture {str(architecture)[:NAME_LIMIT]!r}")
    size = source.size if source.size is not None else end
    cursor.close()
    return Header(version, str(architecture), metadata, tuple(table), (size,))


def _version(cursor: Cursor) -> int:
    """The GGUF version, 2 or 3, after a check of the magic. Both versions are read alike."""
    start = cursor.peek(32)
    if start[:4] != b"GGUF":
        lowered = start.lstrip().lower()
        for magic, problem in _FOREIGN:
            cursor.check(not lowered.startswith(magic), problem)
        cursor.check(bool(start), "is empty")
        cursor.check(False, f"is not a GGUF: it begins with {start[:4]!r}, not b'GGUF'")
    cursor.skip(4)
    version = cursor.u32()
    cursor.check(version & 0xFFFF != 0, "is a big-endian GGUF, which llama.cpp reads on big-endian machines only")
    cursor.check(
        version != 1, "is a GGUF of version 1, which llama.cpp no longer reads: download or convert the model again"
    )
    cursor.check(version in (2, 3), f"is a GGUF of version {version}, 2 and 3 are supported")
    return version


def _alignment(cursor: Cursor, metadata: Mapping[str, Value]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    is_valid = isinstance(alignment, int) and alignment > 0 and alignment & (alignment - 1) == 0
    cursor.check(is_valid, f"has general.alignment {alignment!r}, should be a power of two")
    assert isinstance(alignment, int)  # for mypy; checked in the line above
    return alignment


def _tensor(cursor: Cursor, shard: int) -> Tensor:
    name = cursor.string(TENSOR_NAME_LIMIT_BYTES)
    dimensions = cursor.u32()
    cursor.check(
        dimensions <= DIMENSIONS,
        f"has tensor {name!r} with {dimensions} dimensions, {DIMENSIONS} at most are possible",
    )
    shape = tuple(cursor.u64() for _ in range(dimensions))
    number = cursor.u32()
    cursor.check(number in GGML_TYPES, f"has tensor {name!r} of the unknown ggml type {number}")
    kind, block, block_bytes = GGML_TYPES[number]
    elements = math.prod(shape)
    cursor.check(elements < 2**63, f"has tensor {name!r} of the impossible shape {shape}")
    row = shape[0] if shape else 1
    cursor.check(
        row % block == 0, f"has tensor {name!r} with rows of {row} in {kind}, whose blocks have {block} elements"
    )
    return Tensor(name, shape, kind, cursor.u64(), elements // block * block_bytes, shard)


def _check_offsets(cursor: Cursor, table: Sequence[Tensor], alignment: int) -> int:
    """Bytes of all tensors, after a check that each begins where the one before it ends, as llama.cpp requires."""
    expected = end = 0
    seen: set[str] = set()
    for tensor in table:
        cursor.check(tensor.name not in seen, f"has tensor {tensor.name!r} twice")
        seen.add(tensor.name)
        cursor.check(
            tensor.offset == expected,
            f"has tensor {tensor.name!r} at data offset {tensor.offset}, should be {expected}",
        )
        end = tensor.offset + tensor.bytes
        expected = _padded(end, alignment)
    return end


def _padded(value: int, alignment: int) -> int:
    return -(-value // alignment) * alignment
