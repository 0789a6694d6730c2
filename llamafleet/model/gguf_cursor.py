"""Read the values of a GGUF header in order; the file may be damaged or hostile.

Bytes come from a `ByteSource` in windows. Every length is checked against the limits below before it is used, and
arrays as long as a vocabulary are skipped. The value types are defined in ggml/include/gguf.h.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from llamafleet.units import MIB

KIB = 1024

# Limits against hostile files; those of headers and of kept values are for all shards of a model together. The largest
# headers of real models (262144 tokens with merges) take 16 MB.
HEADER_LIMIT_BYTES = 64 * MIB
STRING_LIMIT_BYTES = 8 * MIB  # the longest strings kept are chat templates, below 100 kB
KEY_LIMIT_BYTES = 64 * KIB  # GGUF keys are at most 65535 bytes
ARRAY_LIMIT = 4 * 1024**2  # the longest arrays of real models have half a million merges
KEPT_LIMIT_BYTES = 16 * MIB  # all values and names; those of a large mixture of experts take 0.5 MB
KEPT_EACH_BYTES = 64  # memory of a short value in Python
WINDOW_BYTES = 1 * MIB  # smallest read
LARGEST_WINDOW_BYTES = 8 * MIB
KEPT_ARRAY_LENGTH = 1024  # of longer arrays (tokens, merges, scores) only the length is kept
# Of a vocabulary also sums of its first tokens, by which vocabularies are compared: without FIRST_SUMMED of them, for
# its whole length and for up to SUMS tokens less (common/speculative.cpp, common_speculative_are_compatible).
VOCABULARY, FIRST_SUMMED, SUMS = "tokenizer.ggml.tokens", 5, 128

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


class GgufError(ValueError):
    """The file is not a usable GGUF; the message begins with the file's name."""


class ByteSource(Protocol):
    """A source of a header's bytes: a file or a URL."""

    @property
    def name(self) -> str:
        """Name for messages: a path, or a URL without its query."""

    @property
    def size(self) -> int | None:
        """Bytes of the whole file; None if unknown."""

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
        """`length` bytes from `offset`; fewer only at the end of the file."""
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(length)


@dataclass(frozen=True)
class LongArray:
    """A long array of metadata; only its length was kept."""

    length: int
    sums: Mapping[int, str] = field(default_factory=dict, compare=False, repr=False)  # of the first n tokens, by n


Scalar = int | float | bool | str
Value = Scalar | tuple[Scalar, ...] | LongArray


@dataclass
class Read:
    """What was read of a model so far: bytes of headers, and bytes of the values that were kept."""

    header_bytes: int = 0
    kept_bytes: int = 0


class Cursor:
    """Reads a source from front to end, with one window of it in memory. `before` counts what other shards took."""

    def __init__(self, source: ByteSource, before: Read | None = None) -> None:
        self._source = source
        self._read = before or Read()
        self._size = source.size
        self._base = 0  # file offset of the window
        self._window = b""
        self._at = 0  # position in the window; past its end after a skip
        self._fetch = 0  # estimated bytes that will be read next

    @property
    def position(self) -> int:
        """File offset of the next byte."""
        return self._base + self._at

    def close(self) -> None:
        """Count what was read, for the next shard. Raises GgufError if it was too much."""
        self._check_end(self.position)
        self._read.header_bytes += self.position

    def check(self, is_valid: bool, problem: str) -> None:
        """Raise GgufError with the file's name and `problem` unless `is_valid`."""
        if not is_valid:
            raise GgufError(f"{self._source.name}: {problem}")

    def _check_end(self, offset: int) -> None:
        self.check(
            offset <= HEADER_LIMIT_BYTES - self._read.header_bytes,
            f"has a header of more than {HEADER_LIMIT_BYTES} bytes, which is not supported",
        )

    def peek(self, length: int) -> bytes:
        """The next `length` bytes without going forward; fewer at the end of the file."""
        if self._size is not None:
            length = min(length, self._size - self.position)
        self._fill(length)
        return self._window[self._at : self._at + length]

    def _fill(self, length: int) -> bool:
        """Read until the window has `length` bytes; False if the file ends before."""
        have = len(self._window) - self._at
        if have >= length:
            return True
        self._check_end(self.position + length)
        if self._size is not None and self.position + length > self._size:
            return False
        kept = self._window[self._at :] if have > 0 else b""
        self._base, self._at = self.position, 0
        wanted = max(WINDOW_BYTES, min(self._fetch, LARGEST_WINDOW_BYTES), length - len(kept))
        more = self._source.read(self._base + len(kept), wanted)
        self._window = kept + more
        return len(self._window) >= length

    def take(self, length: int) -> bytes:
        """The next `length` bytes. Raises GgufError if the file ends before."""
        self._need(length)
        piece = self._window[self._at : self._at + length]
        self._at += length
        return piece

    def _need(self, length: int) -> None:
        if not self._fill(length):
            size = "" if self._size is None else f" ({self._size} bytes)"
            self.check(False, f"is cut short: its header continues past the end of the file{size}; download it again")

    def skip(self, length: int) -> None:
        """Go `length` bytes forward without reading them."""
        self._at += length
        self._check_end(self.position)
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
            f"has a string of {length} bytes at byte {self.position}, {limit} at most are supported",
        )
        self._keep(length + KEPT_EACH_BYTES)
        return self.take(length).decode("utf-8", errors="replace")

    def _keep(self, size: int) -> None:
        self._read.kept_bytes += size
        self.check(
            self._read.kept_bytes <= KEPT_LIMIT_BYTES,
            f"has more than {KEPT_LIMIT_BYTES} bytes of names and values, which is not supported",
        )

    def value(self, key: str) -> Value:
        """A metadata value of any type."""
        kind, key = self.u32(), key[:100]  # long enough for a message
        if kind != _ARRAY:
            return self._scalar(kind, key)
        kind, length = self.u32(), self.u64()
        self.check(kind != _ARRAY, f"has nested arrays in {key!r}, which llama.cpp does not read")
        self.check(kind == _STRING or kind in _SCALARS, f"has the unknown value type {kind} in {key!r}")
        smallest = 8 if kind == _STRING else _SCALARS[kind].size
        self.check(
            length <= ARRAY_LIMIT, f"has {length} values in {key!r} by its header, {ARRAY_LIMIT} at most are supported"
        )
        if length <= KEPT_ARRAY_LENGTH:
            return self._kept_array(kind, length)
        if kind == _STRING and key == VOCABULARY:
            return LongArray(length, self._sums(length))
        if kind == _STRING:
            self._skip_strings(length)
        else:
            self.skip(length * smallest)
        return LongArray(length)

    def _scalar(self, kind: int, key: str) -> Scalar:
        if kind == _STRING:
            return self.string(STRING_LIMIT_BYTES)
        self.check(kind in _SCALARS, f"has the unknown value type {kind} in {key!r}")
        self._keep(KEPT_EACH_BYTES)
        number: int | float | bool = _SCALARS[kind].unpack(self.take(_SCALARS[kind].size))[0]
        return number

    def _kept_array(self, kind: int, length: int) -> tuple[Scalar, ...]:
        if kind == _STRING:
            return tuple(self.string(STRING_LIMIT_BYTES) for _ in range(length))
        self._keep(length * KEPT_EACH_BYTES)
        scalar = _SCALARS[kind]
        return tuple(number for (number,) in scalar.iter_unpack(self.take(length * scalar.size)))

    def _sums(self, count: int) -> dict[int, str]:
        """Read strings; sums of the first n of them, by n."""
        summed, sums = hashlib.sha256(), {}
        self._skip_strings(FIRST_SUMMED)
        self._sum_strings(count - FIRST_SUMMED - SUMS, summed)
        for number in range(count - SUMS, count + 1):
            sums[number] = summed.copy().hexdigest()
            if number < count:
                self._sum_strings(1, summed)
        return sums

    def _sum_strings(self, count: int, summed: hashlib._Hash) -> None:
        """Add strings with their lengths to a sum; of one that is longer than any token, its length alone."""
        unpack, start, whole = _U64.unpack_from, self.position, count
        while count:
            if count < whole:
                self._fetch = count * (self.position - start) // (whole - count)
            self._need(8)
            window, at, last = self._window, self._at, len(self._window)
            while count and at + 8 <= last and (end := at + 8 + unpack(window, at)[0]) <= last:
                at, count = end, count - 1
            if at > self._at:
                summed.update(memoryview(window)[self._at : at])
                self._at = at
            elif (length := int(unpack(window, at)[0])) <= KEY_LIMIT_BYTES:
                self._need(8 + length)
            else:
                summed.update(self.take(8))
                self.skip(length)
                count -= 1
        self._fetch = 0

    def _skip_strings(self, count: int) -> None:
        """Skip strings: up to half a million tokens and merges, so without a call or a slice for each."""
        unpack, start, whole = _U64.unpack_from, self.position, count
        while count:
            if count < whole:  # estimate the rest from the strings so far, to read it in few requests
                self._fetch = count * (self.position - start) // (whole - count)
            self._need(8)
            window, at, last = self._window, self._at, len(self._window) - 8
            while count and at <= last:
                at += 8 + unpack(window, at)[0]
                count -= 1
            self.skip(at - self._at)
        self._fetch = 0
