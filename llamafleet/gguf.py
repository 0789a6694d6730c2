"""Read a GGUF's header: metadata and tensor table, never weights.

The file may be on disk or behind an HTTP server, complete or hostile: only the header's bytes are
fetched, in growing windows, and no size in it is believed before it is checked. The format is
described in ggml/include/gguf.h; what is refused here is refused by llama.cpp too (ggml/src/gguf.cpp).
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

KIB = 1024
MIB = 1024**2

# Limits against hostile files. The largest headers in use (262144 tokens with merges) take 16 MB.
HEADER_LIMIT_BYTES = 256 * MIB
STRING_LIMIT_BYTES = 8 * MIB  # chat templates are the longest strings kept, below 100 kB
KEY_LIMIT_BYTES = 64 * KIB  # GGUF keys are at most 65535 bytes
METADATA_LIMIT = 1 << 16
TENSOR_LIMIT = 1 << 18
SHARD_LIMIT = 1 << 10
FIRST_WINDOW_BYTES = 1 * MIB
LAST_WINDOW_BYTES = 8 * MIB
KEPT_ARRAY_LENGTH = 1024  # longer arrays (tokens, merges, scores) are kept as their length only
DEFAULT_ALIGNMENT = 32  # GGUF_DEFAULT_ALIGNMENT, ggml/include/gguf.h
DIMENSIONS = 4  # GGML_MAX_DIMS

# ggml type number: name, elements in a block, bytes of a block (ggml/src/ggml.c, type_traits).
GGML_TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}

# Metadata value types (enum gguf_type): 8 is a string, 9 an array.
_SCALARS = {
    number: struct.Struct("<" + code)
    for number, code in {
        0: "B",
        1: "b",
        2: "H",
        3: "h",
        4: "I",
        5: "i",
        6: "f",
        7: "?",
        10: "Q",
        11: "q",
        12: "d",
    }.items()
}
_STRING, _ARRAY = 8, 9
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")

_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_FOREIGN = (
    (
        b"<!doctype",
        "is an HTML page, not a GGUF: a login, error or preview page was saved instead of the file",
    ),
    (b"<html", "is an HTML page, not a GGUF: a login, error or preview page was saved instead of the file"),
    (b"version https://git-lfs", "is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`"),
    (b"pk\x03\x04", "is a zip archive, not a GGUF"),
    (b"ggjt", "is a GGML file from before GGUF: convert the original model anew"),
    (b"ggml", "is a GGML file from before GGUF: convert the original model anew"),
)


class GgufError(ValueError):
    """A file that is no usable GGUF; the message begins with its name."""


class ByteSource(Protocol):
    """Where a header's bytes come from."""

    @property
    def name(self) -> str:
        """For messages: a path, or a URL without its query."""

    @property
    def size(self) -> int | None:
        """Bytes of the whole file, None where nobody tells."""

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`; fewer only at the end of the file."""


@dataclass(frozen=True)
class FileSource:
    """A file on this machine."""

    path: Path

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.path.stat().st_size

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the file."""
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(length)


@dataclass(frozen=True)
class LongArray:
    """An array that was skipped, of which only the length is known."""

    length: int


Scalar = int | float | bool | str
Value = Scalar | tuple[Scalar, ...] | LongArray


@dataclass(frozen=True)
class Tensor:
    """One line of the tensor table. `shape` is in ggml's order, rows' length first."""

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
    """A model's metadata and tensor table, all shards together."""

    version: int
    architecture: str
    metadata: Mapping[str, Value]
    tensors: tuple[Tensor, ...]
    file_bytes: tuple[int, ...]

    @property
    def shards(self) -> int:
        """Number of files."""
        return len(self.file_bytes)

    @property
    def file_bytes_total(self) -> int:
        """Bytes of all files."""
        return sum(self.file_bytes)

    @property
    def weights_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.bytes for tensor in self.tensors)

    @property
    def name(self) -> str:
        """What the model calls itself, or its architecture."""
        name = self.metadata.get("general.name")
        return name if isinstance(name, str) and name else self.architecture

    def get(self, key: str) -> Value | None:
        """The metadata value `ARCHITECTURE.key`."""
        return self.metadata.get(f"{self.architecture}.{key}")


def shard_names(name: str) -> tuple[str, ...]:
    """All files of a split model, given any one's name or path; just the name if it is not split."""
    match = _SHARD.fullmatch(name)
    if not match:
        return (name,)
    count = int(match["count"])
    if not 1 <= int(match["number"]) <= count <= SHARD_LIMIT:
        raise GgufError(f"{name}: shard {match['number']} of {match['count']} cannot be")
    return tuple(f"{match['stem']}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1))


def read_path(path: Path) -> Header:
    """The header of a file on this machine, with all its shards."""
    for shard in (paths := [Path(name) for name in shard_names(str(path))]):
        if not shard.is_file():
            raise GgufError(f"{shard}: there is no such file")
    return read_header([FileSource(shard) for shard in paths])


def read_header(sources: Sequence[ByteSource]) -> Header:
    """The header of a model of one or more files, given in order. Raises `GgufError`."""
    parts = [_read_one(source, shard) for shard, source in enumerate(sources)]
    first = parts[0]
    _check_split(sources, parts)
    tensors = tuple(tensor for part in parts for tensor in part.tensors)
    names = {tensor.name for tensor in tensors}
    if len(names) < len(tensors):
        raise GgufError(f"{sources[0].name}: a tensor's name appears in more than one shard")
    return Header(
        version=first.version,
        architecture=first.architecture,
        metadata=first.metadata,
        tensors=tensors,
        file_bytes=tuple(part.file_bytes[0] for part in parts),
    )


def _check_split(sources: Sequence[ByteSource], parts: Sequence[Header]) -> None:
    """Are these the shards of one model, all and in order? (llama-model-loader.cpp, split.*)"""
    for position, (source, part) in enumerate(zip(sources, parts, strict=True)):
        count, number = part.metadata.get("split.count", 1), part.metadata.get("split.no", 0)
        if count in (0, 1) and len(parts) == 1:
            continue
        if count != len(parts):
            raise GgufError(
                f"{source.name}: is part of a model of {count} files, {len(parts)} were read;"
                " name the first shard as its publisher did, -00001-of-0000N.gguf, beside the others"
            )
        if number != position:
            raise GgufError(f"{source.name}: says it is shard {number}, should be {position} (split.no)")
    expected = parts[0].metadata.get("split.tensors.count")
    found = sum(len(part.tensors) for part in parts)
    if len(parts) > 1 and expected is not None and expected != found:
        raise GgufError(f"{sources[0].name}: {expected} tensors promised, {found} found in {len(parts)} shards")


def _read_one(source: ByteSource, shard: int) -> Header:
    cursor = _Cursor(source)
    version = _version(cursor)
    tensor_count, metadata_count = cursor.u64(), cursor.u64()
    cursor.check(tensor_count <= TENSOR_LIMIT, f"promises {tensor_count} tensors, at most {TENSOR_LIMIT} are read")
    cursor.check(
        metadata_count <= METADATA_LIMIT,
        f"promises {metadata_count} metadata keys, at most {METADATA_LIMIT} are read",
    )
    metadata: dict[str, Value] = {}
    for _ in range(metadata_count):
        key = cursor.string(KEY_LIMIT_BYTES)
        cursor.check(key not in metadata, f"has the metadata key {key!r} twice")
        metadata[key] = cursor.value(key)
    alignment = _alignment(cursor, metadata)
    table = [_tensor(cursor, shard) for _ in range(tensor_count)]
    data_start = _padded(cursor.position, alignment)
    end = data_start + _check_offsets(cursor, table, alignment)
    if source.size is not None and table:
        cursor.check(
            end <= source.size,
            f"is cut short: its tensors end at byte {end}, the file has {source.size}; download it again",
        )
    architecture = metadata.get("general.architecture", "")
    if shard == 0:
        cursor.check(isinstance(architecture, str) and bool(architecture), "names no general.architecture")
    size = source.size if source.size is not None else end
    return Header(version, str(architecture), metadata, tuple(table), (size,))


def _version(cursor: _Cursor) -> int:
    """Check the magic; the version is 2 or 3 (they differ in nothing that is read here)."""
    start = cursor.peek(32)
    if start[:4] != b"GGUF":
        lowered = start.lstrip().lower()
        for magic, problem in _FOREIGN:
            cursor.check(not lowered.startswith(magic), problem)
        cursor.check(bool(start), "is empty")
        cursor.check(False, f"is no GGUF: begins with {start[:4]!r} instead of b'GGUF'")
    cursor.skip(4)
    version = cursor.u32()
    cursor.check(version & 0xFFFF != 0, "is a big-endian GGUF; llama.cpp reads it on big-endian machines only")
    cursor.check(version != 1, "is a GGUF of version 1, which llama.cpp dropped: download or convert it anew")
    cursor.check(version in (2, 3), f"is a GGUF of version {version}; 2 and 3 are known")
    return version


def _alignment(cursor: _Cursor, metadata: Mapping[str, Value]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    good = isinstance(alignment, int) and alignment > 0 and alignment & (alignment - 1) == 0
    cursor.check(good, f"has general.alignment {alignment!r}, should be a power of two")
    assert isinstance(alignment, int)  # for mypy, checked the line above
    return alignment


def _tensor(cursor: _Cursor, shard: int) -> Tensor:
    name = cursor.string(KEY_LIMIT_BYTES)
    dimensions = cursor.u32()
    cursor.check(
        dimensions <= DIMENSIONS,
        f"gives tensor {name!r} {dimensions} dimensions, at most {DIMENSIONS} can be",
    )
    shape = tuple(cursor.u64() for _ in range(dimensions))
    number = cursor.u32()
    cursor.check(number in GGML_TYPES, f"stores tensor {name!r} in the unknown ggml type {number}")
    kind, block, block_bytes = GGML_TYPES[number]
    elements = math.prod(shape)
    cursor.check(elements < 2**63, f"gives tensor {name!r} the impossible shape {shape}")
    row = shape[0] if shape else 1
    cursor.check(row % block == 0, f"stores tensor {name!r} with rows of {row} in {kind}, whose blocks are of {block}")
    return Tensor(name, shape, kind, cursor.u64(), elements // block * block_bytes, shard)


def _check_offsets(cursor: _Cursor, table: Sequence[Tensor], alignment: int) -> int:
    """Tensors follow one another without overlap, as llama.cpp demands; bytes of them all."""
    expected = end = 0
    seen: set[str] = set()
    for tensor in table:
        cursor.check(tensor.name not in seen, f"has the tensor {tensor.name!r} twice")
        seen.add(tensor.name)
        cursor.check(
            tensor.offset == expected,
            f"puts tensor {tensor.name!r} at data offset {tensor.offset}, expected {expected}",
        )
        end = tensor.offset + tensor.bytes
        expected = _padded(end, alignment)
    return end


def _padded(value: int, alignment: int) -> int:
    return -(-value // alignment) * alignment


class _Cursor:
    """Reads forward through a source, keeping one window of it."""

    def __init__(self, source: ByteSource) -> None:
        self._source = source
        self._size = source.size
        self._base = 0  # file offset of the window
        self._window = b""
        self._at = 0  # place in the window; may lie past its end after a skip
        self._fetch = FIRST_WINDOW_BYTES

    @property
    def position(self) -> int:
        """Offset in the file of the next byte."""
        return self._base + self._at

    def check(self, good: bool, problem: str) -> None:
        """Raise `GgufError` with the file's name unless `good`."""
        if not good:
            raise GgufError(f"{self._source.name}: {problem}")

    def peek(self, length: int) -> bytes:
        """The next bytes, fewer at the end of the file."""
        if self._size is not None:
            length = min(length, self._size - self.position)
        self._fill(length)
        return self._window[self._at : self._at + length]

    def _fill(self, length: int) -> bool:
        """Have `length` bytes in the window if the file has them."""
        have = len(self._window) - self._at
        if have >= length:
            return True
        self.check(
            self.position + length <= HEADER_LIMIT_BYTES,
            f"has a header of more than {HEADER_LIMIT_BYTES} bytes",
        )
        if self._size is not None and self.position + length > self._size:
            return False
        kept = self._window[self._at :] if have > 0 else b""
        self._base, self._at = self.position, 0
        more = self._source.read(self._base + len(kept), max(length - len(kept), self._fetch))
        self._fetch = min(2 * self._fetch, LAST_WINDOW_BYTES)
        self._window = kept + more
        return len(self._window) >= length

    def take(self, length: int) -> bytes:
        """Exactly the next `length` bytes."""
        self._need(length)
        piece = self._window[self._at : self._at + length]
        self._at += length
        return piece

    def _need(self, length: int) -> None:
        if not self._fill(length):
            size = "" if self._size is None else f" of {self._size} bytes"
            self.check(False, f"is cut short: its header goes on past the end{size}; download it again")

    def skip(self, length: int) -> None:
        """Go forward without reading."""
        self._at += length
        self.check(self.position <= HEADER_LIMIT_BYTES, f"has a header of more than {HEADER_LIMIT_BYTES} bytes")
        if self._size is not None and self.position > self._size:
            self._need(1)

    def u32(self) -> int:
        """An unsigned 32-bit number."""
        return int(_U32.unpack(self.take(4))[0])

    def u64(self) -> int:
        """An unsigned 64-bit number."""
        return int(_U64.unpack(self.take(8))[0])

    def string(self, limit: int) -> str:
        """A string of at most `limit` bytes."""
        length = self.u64()
        self.check(
            length <= limit,
            f"has a string of {length} bytes at byte {self.position}, at most {limit} are read",
        )
        return self.take(length).decode("utf-8", errors="replace")

    def value(self, key: str) -> Value:
        """A metadata value of any type."""
        kind = self.u32()
        if kind != _ARRAY:
            return self._scalar(kind, key)
        kind, length = self.u32(), self.u64()
        self.check(kind != _ARRAY, f"nests arrays in {key!r}, which llama.cpp does not read")
        self.check(kind == _STRING or kind in _SCALARS, f"has the unknown value type {kind} in {key!r}")
        smallest = 8 if kind == _STRING else _SCALARS[kind].size
        self.check(
            length * smallest <= HEADER_LIMIT_BYTES,
            f"promises {length} values in {key!r}, too many to be true",
        )
        if length <= KEPT_ARRAY_LENGTH:
            return tuple(self._scalar(kind, key) for _ in range(length))
        if kind == _STRING:
            self._skip_strings(length)
        else:
            self.skip(length * smallest)
        return LongArray(length)

    def _scalar(self, kind: int, key: str) -> Scalar:
        if kind == _STRING:
            return self.string(STRING_LIMIT_BYTES)
        self.check(kind in _SCALARS, f"has the unknown value type {kind} in {key!r}")
        number: int | float | bool = _SCALARS[kind].unpack(self.take(_SCALARS[kind].size))[0]
        return number

    def _skip_strings(self, count: int) -> None:
        """Half a million tokens and merges go by here: no call, no slice for each."""
        unpack = _U64.unpack_from
        while count:
            self._need(8)
            window, at, last = self._window, self._at, len(self._window) - 8
            while count and at <= last:
                at += 8 + unpack(window, at)[0]
                count -= 1
            self.skip(at - self._at)


def find(header: Header, pattern: str) -> Iterator[Tensor]:
    """The tensors whose whole name matches a regular expression."""
    compiled = re.compile(pattern)
    return (tensor for tensor in header.tensors if compiled.fullmatch(tensor.name))
