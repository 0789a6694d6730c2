"""The test models: published ones at their published size, tiny ones that the real llama-server answers
with.
"""

from __future__ import annotations

import json
import math
import socket
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Q
from gguf import GGUFReader

from sandbox import models, oracle

SIZES = [(name, mix) for name, layout in models.PUBLISHED.items() for mix in layout.sizes]


@pytest.mark.parametrize(("name", "mix"), SIZES, ids=map("-".join, SIZES))
def test_a_layout_comes_out_at_its_published_size(name: str, mix: str) -> None:
    published_gib, source = models.PUBLISHED[name].sizes[mix]
    size_gib = sum(tensor.nbytes for tensor in models.tensors(models.PUBLISHED[name], mix)) / 2**30
    # llama-bench rounds at the third decimal, some who quote it cut there
    assert abs(size_gib - published_gib) <= 0.0051, source


@pytest.mark.parametrize("name", models.PUBLISHED)
def test_a_layout_has_as_many_tensors_as_published(name: str) -> None:
    layout = models.PUBLISHED[name]
    found = list(models.tensors(layout, layout.quant))
    assert len({tensor.name for tensor in found}) == len(found)
    assert layout.sizes or layout.tensors, "nothing to check it against"
    assert layout.tensors in (0, len(found))


# "model_size" and "model_n_params" of llama-bench, "size" and "n_params" of /v1/models, of published Q4_K_M files
BYTES = {
    "Qwen3.6-27B": (16536406016, 26895998464),
    "Qwen3.6-35B-A3B": (21155768832, 34660610688),
    "OLMoE-1B-7B": (4211730432, 6919161856),
    "Qwen3-0.6B": (390753280, 596049920),
}


@pytest.mark.parametrize("name", BYTES)
def test_a_layout_is_right_to_the_byte_where_bytes_are_published(name: str) -> None:
    found = list(models.tensors(models.PUBLISHED[name], "Q4_K_M"))
    assert (sum(one.nbytes for one in found), sum(math.prod(one.shape) for one in found)) == BYTES[name]


def test_gpt_oss_120b_has_the_published_tensors() -> None:
    # "type f32: 433 tensors, q8_0: 146, mxfp4: 108", tensors.count 687: log in ggml-org/llama.cpp#15253
    types = [tensor.type for tensor in models.tensors(models.PUBLISHED["gpt-oss-120b"], "MXFP4")]
    assert (types.count(Q.F32), types.count(Q.Q8_0), types.count(Q.MXFP4)) == (433, 146, 108)


def test_q4_k_m_spends_more_bits_on_the_layers_that_llama_quantize_picks() -> None:
    # src/llama-quant.cpp, use_more_bits, for 32 layers: the first and last eighth, and every third between.
    table = {t.name: t.type for t in models.tensors(models.PUBLISHED["Llama-3.1-8B"], "Q4_K_M")}
    for part in ("attn_v", "ffn_down"):
        finer = [i for i in range(32) if table[f"blk.{i}.{part}.weight"] == Q.Q6_K]
        assert finer == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]


def test_tied_embeddings_are_stored_once_and_finer() -> None:
    table = {t.name: t.type for t in models.tensors(models.PUBLISHED["Llama-3.2-3B"], "Q4_K_M")}
    assert "output.weight" not in table
    assert table["token_embd.weight"] == Q.Q6_K


def test_a_row_that_no_k_quant_divides_falls_back() -> None:
    table = {t.name: t.type for t in models.tensors(models.PUBLISHED["gpt-oss-20b"], "Q4_K_M")}
    assert table["blk.0.attn_q.weight"] == Q.Q5_0  # 2880 is no multiple of 256
    assert table["blk.0.attn_output.weight"] == Q.Q4_K  # 4096 is
    assert table["output.weight"] == Q.Q8_0


def test_a_weightless_model_has_the_full_length_and_hardly_any_disk(tmp_path: Path) -> None:
    stat = models.weightless(tmp_path, "gpt-oss-120b").stat()
    assert 59.02 < stat.st_size / 2**30 < 59.04
    assert stat.st_blocks * 512 < 8e6


def test_a_weightless_model_ends_with_its_last_tensor(tmp_path: Path) -> None:
    layout = replace(models.PUBLISHED["gpt-oss-120b"], vocab=512)  # a short vocabulary: GGUFReader is slow
    path = models.weightless(tmp_path, layout)
    reader = GGUFReader(path)
    last = max(reader.tensors, key=lambda tensor: tensor.data_offset)
    assert 0 <= path.stat().st_size - (last.data_offset + last.n_bytes) < models.ALIGNMENT_BYTES
    assert reader.fields["gpt-oss.expert_count"].contents() == 128


@pytest.mark.parametrize(
    ("kind", "quant"),
    [
        pytest.param(kind, quant, marks=() if (kind, quant) in [("moe", "F16"), ("hybrid", "Q8_0")] else pytest.mark.long)
        for kind in models.TINY for quant in ("F16", "Q8_0")
    ],
)  # fmt: skip
def test_a_tiny_model_is_the_same_for_the_same_seed(tmp_path: Path, kind: str, quant: str) -> None:
    contents = []
    for run, seed in enumerate((0, 0, 1)):
        (tmp_path / str(run)).mkdir()
        contents.append(models.tiny(tmp_path / str(run), kind, quant=quant, seed=seed).read_bytes())
    assert contents[0] == contents[1] != contents[2]
    assert 1e6 < len(contents[0]) < 20e6


def test_shards_are_named_and_numbered_as_llama_cpp_does(tmp_path: Path) -> None:
    whole = GGUFReader(models.tiny(tmp_path, "moe"))
    first = models.tiny(tmp_path, "moe", shards=3)
    files = sorted(tmp_path.glob("*-of-*.gguf"))
    assert first == files[0]
    assert [file.name for file in files] == [f"tiny-moe-F16-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    data = {}
    for number, reader in enumerate(map(GGUFReader, files)):
        assert reader.fields["split.no"].contents() == number
        assert reader.fields["split.count"].contents() == 3
        assert reader.fields["split.tensors.count"].contents() == len(whole.tensors)
        data |= {tensor.name: tensor.data.tobytes() for tensor in reader.tensors}
    assert data == {tensor.name: tensor.data.tobytes() for tensor in whole.tensors}


@pytest.mark.oracle
@pytest.mark.parametrize(("kind", "quant", "shards"), [("dense", "F16", 1), ("moe", "Q8_0", 1), ("moe", "F16", 3)])
def test_llama_server_completes_a_chat_with_a_tiny_model(tmp_path: Path, kind: str, quant: str, shards: int) -> None:
    server = oracle.build().llama_server
    model = models.tiny(tmp_path, kind, quant=quant, shards=shards)
    port = free_port()
    argv = [server, "-m", model, "--port", str(port), "--ctx-size", "2048", "--parallel", "1"]
    request = {"messages": [{"role": "user", "content": "Grüße!"}], "max_tokens": 8, "temperature": 0}
    with oracle.serving(argv, port, tmp_path / "server.log") as url:
        post = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(request).encode())
        with urllib.request.urlopen(post, timeout=30) as response:
            answer = json.load(response)
    assert answer["usage"]["completion_tokens"] == 8
    assert answer["choices"][0]["message"]["content"].isprintable()
    assert answer["system_fingerprint"].startswith("b11434-")


@pytest.mark.oracle
@pytest.mark.parametrize(
    "name", [name if name == "gpt-oss-20b" else pytest.param(name, marks=pytest.mark.long) for name in models.PUBLISHED]
)
def test_llama_server_sees_a_weightless_model_at_its_published_size(tmp_path: Path, name: str) -> None:
    layout = models.PUBLISHED[name]
    seen = oracle.ask(models.weightless(tmp_path, name), ["-c", "4096"])
    skipped = [f"blk.{i}." for i in range(layout.blocks - layout.nextn, layout.blocks)]  # unless asked to predict
    kept = [t.nbytes for t in models.tensors(layout, layout.quant) if not t.name.startswith(tuple(skipped))]
    # Without a GPU tied embeddings are held once: as a matrix repacked, if their type is one that is.
    assert seen.host.model + seen.repacked == pytest.approx(sum(kept) / 2**20, abs=8)


@pytest.mark.oracle
def test_llama_server_sees_a_split_model_whole(tmp_path: Path) -> None:
    answers = []
    for shards in (1, 3):
        (tmp_path / str(shards)).mkdir()
        first = models.weightless(tmp_path / str(shards), "gpt-oss-120b", shards=shards)
        answers.append(oracle.ask(first, ["-c", "4096"]))
    assert answers[0] == answers[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
