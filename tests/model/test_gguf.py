"""The header reader: equal to gguf-py on every shape, quick on real vocabularies, unmoved by hostile files."""

import struct
import time
import tracemalloc

import gguf as reference
import numpy as np
import pytest

from llamafleet.model import gguf, gguf_cursor
from llamafleet.model.gguf import read_header, read_path
from llamafleet.model.gguf_cursor import FileSource, GgufError, LongArray
from sandbox import models


def write(path, *, tensors=None, metadata=(), alignment=None, arch="llama"):
    writer = reference.GGUFWriter(path, arch)
    if alignment:
        writer.add_custom_alignment(alignment)
    for key, value, kind in metadata:
        writer.add_key_value(
            key, value, kind, sub_type=reference.GGUFValueType.get_type(value[0]) if kind == ARRAY else None
        )
    for name, array in (tensors or {}).items():
        if isinstance(array, tuple):
            data, kind = array
            writer.add_tensor(name, data, raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


ARRAY = reference.GGUFValueType.ARRAY
T = reference.GGUFValueType


def same_as_reference(path):
    header, expected = read_path(path), reference.GGUFReader(path)
    assert [(t.name, t.shape, t.type, t.bytes) for t in header.tensors] == [
        (t.name, tuple(int(n) for n in t.shape), t.tensor_type.name, t.n_bytes) for t in expected.tensors
    ]
    for key, field in expected.fields.items():
        if not key.startswith("GGUF."):
            value, found = field.contents(), header.metadata[key]
            if isinstance(found, LongArray):
                assert found.length == len(value), key
            else:
                assert (list(found) if isinstance(found, tuple) else found) == value, key
    return header


def test_every_type_has_the_size_that_gguf_knows():
    known = {int(kind): (kind.name, *size) for kind, size in reference.GGML_QUANT_SIZES.items()}
    ours = dict(gguf.GGML_TYPES)
    assert {number: ours[number] for number in known} == known
    # gguf-py may lag behind ggml/include/ggml.h, which has Q2_0 as 42
    # (ggml/src/ggml-common.h, block_q2_0: 64 weights in 18 bytes).
    assert {ours[number] for number in ours.keys() - known.keys()} <= {("Q2_0", 64, 18)}


@pytest.mark.parametrize("alignment", [None, 8, 64, 4096])
def test_tensors_of_every_plain_type_and_shape(tmp_path, alignment):
    arrays = {
        "f32": np.zeros((3, 5), np.float32), "f16": np.zeros((2, 3, 4), np.float16), "f64": np.zeros(7, np.float64),
        "i8": np.zeros(9, np.int8), "i16": np.zeros((1, 2), np.int16), "i32": np.zeros((2, 2, 2, 2), np.int32),
        "i64": np.zeros(1, np.int64),
    }  # fmt: skip
    header = same_as_reference(write(tmp_path / "a.gguf", tensors=arrays, alignment=alignment))
    assert header.tensors[0].shape == (5, 3)


def test_tensors_of_every_quantised_type(tmp_path):
    arrays = {}
    for kind, (block, size) in reference.GGML_QUANT_SIZES.items():
        if block > 1:
            arrays[kind.name] = (np.zeros((3, 2 * size), np.uint8), kind)
    same_as_reference(write(tmp_path / "q.gguf", tensors=arrays))


def test_metadata_of_every_kind(tmp_path):
    scalars = [
        ("s.u8", 255, T.UINT8),
        ("s.i8", -1, T.INT8),
        ("s.u16", 65535, T.UINT16),
        ("s.i16", -2, T.INT16),
        ("s.u32", 2**32 - 1, T.UINT32),
        ("s.i32", -3, T.INT32),
        ("s.f32", 0.5, T.FLOAT32),
        ("s.true", True, T.BOOL),
        ("s.text", "héllo", T.STRING),
        ("s.u64", 2**64 - 1, T.UINT64),
        ("s.i64", -4, T.INT64),
        ("s.f64", 0.1, T.FLOAT64),
    ]
    arrays = [
        ("a.ints", [1, 2, 3], ARRAY),
        ("a.bools", [True, False], ARRAY),
        ("a.texts", ["a", "", "ccc"], ARRAY),
        ("a.floats", [0.25] * 1025, ARRAY),
        ("a.tokens", [f"t{n}" for n in range(5000)], ARRAY),
    ]
    header = same_as_reference(write(tmp_path / "m.gguf", metadata=scalars + arrays))
    assert header.metadata["a.tokens"] == LongArray(5000)
    assert header.metadata["a.floats"] == LongArray(1025)


def test_a_long_string_array_over_many_windows(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_cursor, "WINDOW_BYTES", 13)
    monkeypatch.setattr(gguf_cursor, "LARGEST_WINDOW_BYTES", 29)
    texts = ["x" * (n % 71) for n in range(3000)]
    same_as_reference(write(tmp_path / "w.gguf", metadata=[("a.tokens", texts, ARRAY), ("z.last", 7, T.UINT32)]))


@pytest.mark.parametrize("layout", models.PUBLISHED)
def test_published_models(tmp_path, layout):
    path = models.weightless(tmp_path, layout)
    start = time.process_time()
    header = read_path(path)
    assert time.process_time() - start < 3
    assert header.file_bytes == (path.stat().st_size,)
    expected = models.tensors(models.PUBLISHED[layout], models.PUBLISHED[layout].quant)
    assert {t.name: t.bytes for t in header.tensors} == {t.name: t.nbytes for t in expected}


def test_a_real_vocabulary_with_merges_is_quick_and_is_not_kept(tmp_path):
    # gpt-oss: 201088 tokens, 446189 merges.
    tokens, merges = [f"token{n}" for n in range(201088)], [f"to ken{n}" for n in range(446189)]
    path = tmp_path / "v.gguf"
    models.write_header(path, "llama", {"t.tokens": tokens, "t.merges": merges}, [])
    del tokens, merges
    start = time.process_time()
    header = read_path(path)
    assert time.process_time() - start < 1  # 0.2 s on an idle core
    tracemalloc.start()
    read_path(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert header.metadata["t.merges"] == LongArray(446189)
    assert peak < 40 * 2**20


def test_only_the_header_is_read(tmp_path):
    path = models.weightless(tmp_path, "Llama-3.2-3B")
    read = []

    class Counting(FileSource):
        def read(self, offset, length):
            read.append(length)
            return super().read(offset, length)

    read_header([Counting(path)])
    assert sum(read) < 0.01 * path.stat().st_size


def test_split_files_are_one_header(tmp_path):
    whole = read_path(models.weightless(tmp_path, "Llama-3.2-3B"))
    first = models.weightless(tmp_path, "Llama-3.2-3B", shards=3)
    header = read_path(first)
    assert len(header.file_bytes) == 3
    assert {t.shard for t in header.tensors} == {0, 1, 2}
    assert {t.name: t.bytes for t in header.tensors} == {t.name: t.bytes for t in whole.tensors}
    assert read_path(tmp_path / gguf.shard_names(first.name)[2]) == header  # any shard names the model


def test_split_files_must_be_complete_and_in_order(tmp_path):
    first = models.weightless(tmp_path, "Llama-3.2-3B", shards=3)
    shards = [FileSource(tmp_path / name) for name in gguf.shard_names(first.name)]
    with pytest.raises(GgufError, match="belongs to a model of 3 shards, 1 given"):
        read_header(shards[:1])
    with pytest.raises(GgufError, match=r"00003-of-00003.*split.no is 2, should be 1"):
        read_header([shards[0], shards[2], shards[1]])
    shards[1].path.unlink()
    with pytest.raises(GgufError, match=r"00002-of-00003\.gguf: there is no such file"):
        read_path(first)


# --- hostile and broken files ---------------------------------------------------------------------


def text(value):
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


ARCH = text("general.architecture") + struct.pack("<I", 8) + text("llama")


def raw(*, version=3, tensors=0, keys=1, body=ARCH):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + body


def tensor(name="t", shape=(32,), kind=0, offset=0, dims=None):
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape) if dims is None else dims, *shape, kind, offset)


def u64(key, value):
    return text(key) + struct.pack("<IQ", 10, value)


EMBEDDING = tensor("token_embd.weight", (32, 3)) + bytes(600)

BROKEN = {
    "empty": (b"", "is empty"),
    "html": (b"\n<!DOCTYPE html><html>" + b" " * 100, "is an HTML page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
    "zip": (b"PK\x03\x04" + bytes(40), "zip archive"),
    "other": (b"\x93NUMPY" + bytes(40), "is not a GGUF: it begins with"),
    "short": (b"GG", "is not a GGUF"),
    "cut_in_counts": (b"GGUF\x03\x00\x00\x00\x01", "is cut short"),
    "cut_in_key": (raw()[:-3], "is cut short"),
    "version_1": (raw(version=1), "version 1, which llama.cpp no longer reads"),
    "version_9": (raw(version=9), "version 9, 2 and 3 are supported"),
    "big_endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "many_tensors": (raw(tensors=2**60), "has 1152921504606846976 tensors"),
    "many_keys": (raw(keys=2**63), "metadata keys"),
    "long_key": (raw(body=struct.pack("<Q", 2**62)), "has a string of 4611686018427387904 bytes"),
    "long_value": (raw(body=text("k") + struct.pack("<IQ", 8, 2**40)), "has a string of 1099511627776 bytes"),
    "huge_array": (
        raw(body=text("k") + struct.pack("<IIQ", 9, 8, 2**61)),
        "values in 'k' by its header, 4194304 at most are supported",
    ),
    "long_strings": (
        raw(body=text("k") + struct.pack("<IIQ", 9, 8, 2000) + struct.pack("<Q", 2**63) * 2000),
        "header of more",
    ),
    "cut_array": (raw(body=text("k") + struct.pack("<IIQ", 9, 4, 4_000_000)), "is cut short"),
    "many_values": (
        raw(body=text("k") + struct.pack("<IIQ", 9, 0, 2**23) + bytes(2**23)),
        "values in 'k' by its header, 4194304 at most are supported",
    ),
    "hoarded": (
        raw(
            keys=2**14, body=b"".join(text(f"k{n}") + struct.pack("<IIQ", 9, 0, 1000) + bytes(1000) for n in range(400))
        ),
        "more than 16777216 bytes of names and values",
    ),
    "nested": (raw(body=text("k") + struct.pack("<IIQ", 9, 9, 2)), "has nested arrays"),
    "unknown_value": (raw(body=text("k") + struct.pack("<I", 77)), "unknown value type 77"),
    "twice": (raw(keys=2, body=ARCH * 2), "twice"),
    "nameless": (raw(keys=0, body=b""), "has no general.architecture"),
    "odd_architecture": (
        raw(body=text("general.architecture") + struct.pack("<I", 8) + text("x\x1b[2J")),
        "invalid general.architecture",
    ),
    "long_name": (raw(tensors=1, body=ARCH + tensor("n" * 64) + bytes(400)), "has a string of 64 bytes"),
    "five_dims": (raw(tensors=1, body=ARCH + tensor(shape=(1,) * 5)), "5 dimensions"),
    "many_dims": (raw(tensors=1, body=ARCH + tensor(dims=2**31)), "dimensions"),
    "huge_shape": (raw(tensors=1, body=ARCH + tensor(shape=(2**40, 2**40))), "impossible shape"),
    "unknown_type": (raw(tensors=1, body=ARCH + tensor(kind=4) + bytes(200)), "unknown ggml type 4"),
    "partial_block": (raw(tensors=1, body=ARCH + tensor(shape=(31,), kind=2) + bytes(200)), "rows of 31 in Q4_0"),
    "out_of_file": (raw(tensors=1, body=ARCH + tensor(shape=(4096,)) + bytes(64)), "tensors end at byte"),
    "gap": (raw(tensors=1, body=ARCH + tensor(offset=64) + bytes(400)), "data offset 64, should be 0"),
    "overlap": (raw(tensors=2, body=ARCH + tensor("a") + tensor("b") + bytes(400)), "data offset 0, should be 128"),
    "same_name": (raw(tensors=2, body=ARCH + tensor("a") + tensor("a", offset=128) + bytes(400)), "tensor 'a' twice"),
    "many_blocks": (
        raw(keys=2, body=ARCH + u64("llama.block_count", 2**62)),
        "'llama.block_count' = 4611686018427387904",
    ),
    "layers": (raw(keys=2, body=ARCH + u64("llama.block_count", 513)), "512 at most"),
    "no_tensors": (
        raw(keys=2, body=ARCH + u64("llama.block_count", 32)),
        "has 32 layers by llama.block_count, but tensors of 0 layers",
    ),
    "lost_layers": (
        raw(keys=2, tensors=1, body=ARCH + u64("llama.block_count", 3) + tensor("blk.0.attn_q.weight") + bytes(400)),
        "has 3 layers by llama.block_count, but tensors of 1 layers",
    ),
    "many_experts": (raw(keys=2, body=ARCH + u64("llama.expert_count", 1025)), "1024 at most"),
    "wide": (raw(keys=2, body=ARCH + u64("llama.embedding_length", 2**62)), "4294967295 at most"),
    "no_number": (
        raw(keys=2, body=ARCH + text("llama.head") + struct.pack("<If", 6, float("nan"))),
        "= nan, should be a whole",
    ),
    "part_of_a_layer": (
        raw(keys=2, body=ARCH + text("llama.block_count") + struct.pack("<If", 6, 1e30)),
        "should be a whole number",
    ),
    "negative": (
        raw(keys=2, body=ARCH + text("llama.attention.sliding_window") + struct.pack("<Ii", 5, -1)),
        "= -1, should not be negative",
    ),
    "odd_block": (
        raw(tensors=1, body=ARCH + tensor("blk.\u00b2.attn_q.weight") + bytes(400)),
        "should be blk.NUMBER.PART",
    ),
    "odd_part": (raw(tensors=1, body=ARCH + tensor("blk.7") + bytes(400)), "should be blk.NUMBER.PART"),
    "infinite": (raw(keys=2, body=ARCH + text("llama.a") + struct.pack("<IIQf", 9, 6, 1, float("inf"))), "= inf"),
    "other_width": (
        raw(tensors=1, keys=2, body=ARCH + u64("llama.embedding_length", 64) + EMBEDDING),
        "embedding_length = 64, but rows of 32 elements in token_embd.weight",
    ),
    "other_vocabulary": (
        raw(
            tensors=1,
            keys=2,
            body=ARCH + text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 0, 2) + b"ab" + EMBEDDING,
        ),
        "has 2 tokens in tokenizer.ggml.tokens, but 3 rows",
    ),
    "alignment": (raw(keys=2, body=ARCH + text("general.alignment") + struct.pack("<II", 4, 33)), "power of two"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused_by_name_quickly_and_within_memory(tmp_path, case):
    content, message = BROKEN[case]
    path = tmp_path / f"{case}.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(GgufError, match=message) as caught:
        read_path(path)
    assert str(caught.value).startswith(str(path))
    assert time.process_time() - start < 2
    assert tracemalloc.get_traced_memory()[1] < 32 * 2**20
    tracemalloc.stop()


def test_a_name_is_fit_for_a_terminal(tmp_path):
    path = tmp_path / "n.gguf"
    path.write_bytes(
        raw(keys=2, body=ARCH + text("general.name") + struct.pack("<I", 8) + text("a\x1b[2J\n" + "b" * 999))
    )
    assert read_path(path).name == "a?[2J?" + "b" * 94


def test_every_cut_of_a_file_is_refused(tmp_path):
    whole = write(
        tmp_path / "w.gguf", tensors={"a": np.zeros((4, 4), np.float32)}, metadata=[("a.x", ["q"] * 3, ARRAY)]
    )
    content = whole.read_bytes()
    end = read_path(whole).tensors[-1].bytes + content.index(b"\x00" * 64)
    for length in range(0, min(end, len(content) - 32)):
        whole.write_bytes(content[:length])
        with pytest.raises(GgufError):
            read_path(whole)


def test_version_2_is_read_like_3(tmp_path):
    path = tmp_path / "v2.gguf"
    path.write_bytes(raw(version=2))
    assert read_path(path).architecture == "llama"


@pytest.mark.parametrize(
    "name", ["m-00000-of-00002.gguf", "m-00003-of-00002.gguf", "m-00001-of-00000.gguf", "m-00001-of-99999.gguf"]
)
def test_impossible_shard_names_are_refused(name):
    with pytest.raises(GgufError, match="is impossible"):
        gguf.shard_names(name)


def test_shard_names():
    assert gguf.shard_names("q/m-00002-of-00003.gguf") == tuple(f"q/m-0000{n}-of-00003.gguf" for n in (1, 2, 3))
    assert gguf.shard_names("m.gguf") == ("m.gguf",)
