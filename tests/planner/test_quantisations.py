"""Estimates of a model's size in other quantisations, against published files."""

import math
from dataclasses import replace

import pytest

from llamafleet.model.ggml_types import GGML_TYPES
from llamafleet.model.gguf import Tensor
from llamafleet.planner.quantisations import larger, main_type, smaller
from tests import planning

GIB = 2**30


@pytest.mark.parametrize(
    ("layout", "quant", "published_gib"),
    [
        # Sizes of Q5_K_M and Q8_0 as llama-bench prints them: llama.cpp's docs and discussions.
        ("Llama-3.1-8B", "Q4_K_M", 5.33),
        ("Llama-3.3-70B", "Q4_K_M", 46.51),
    ],
)
def test_the_next_quantisation_is_about_as_large_as_the_published_one(layout, quant, published_gib):
    bigger = larger(planning.header(layout, quant))
    assert bigger.weights_bytes / GIB == pytest.approx(published_gib, rel=0.02)
    assert bigger.file_bytes_total > bigger.weights_bytes


def test_the_end_of_the_ladder():
    assert larger(planning.header("Qwen3-30B-A3B", "Q8_0")) is None
    assert larger(planning.header("Qwen3-30B-A3B", "F16")) is None


# Sizes as llama-quantize's own table has them for Llama 3.1 8B (tools/quantize/README.md).
PUBLISHED_GIB = {"Q8_0": 7.95, "Q6_K": 6.14, "Q5_K_M": 5.33, "Q4_K_M": 4.58, "Q3_K_M": 3.74, "Q2_K": 2.95}


@pytest.mark.parametrize("quant", ["F16", "Q4_K_M"])
def test_smaller_quantisations_are_about_as_large_as_the_published_ones(quant):
    header = planning.header("Llama-3.1-8B", quant)
    sizes = {name: one.weights_bytes / GIB for name, one in smaller(header)}
    names = list(PUBLISHED_GIB) if quant == "F16" else ["Q3_K_M", "Q2_K"]
    assert list(sizes) == names
    for name, size in sizes.items():
        assert size == pytest.approx(PUBLISHED_GIB[name], rel=0.03), name


def tensor(name, kind, *shape):
    block, size = {one: (block, size) for one, block, size in GGML_TYPES.values()}[kind]
    return Tensor(name, shape, kind, 0, math.prod(shape) // block * size)


def test_a_small_model_whose_rows_are_no_multiple_of_256_becomes_hardly_smaller():
    """Qwen2.5 0.5B in Q4_K_M: its rows have 896 weights. Bits per weight alone would promise a quarter less."""
    tensors = [tensor("token_embd.weight", "Q5_0", 896, 151936), tensor("output.weight", "Q8_0", 896, 151936)]
    for block in range(24):
        rows = {"attn_q": 896, "attn_k": 128, "attn_v": 128, "attn_output": 896, "ffn_gate": 4864, "ffn_up": 4864}
        tensors += [tensor(f"blk.{block}.{name}.weight", "Q5_0", 896, count) for name, count in rows.items()]
        tensors.append(tensor(f"blk.{block}.ffn_down.weight", "Q4_K" if block % 2 else "Q6_K", 4864, 896))
    header = replace(planning.header("Qwen3-8B"), tensors=tuple(tensors))
    [(name, one), *_] = smaller(header)
    assert round(header.weights_bytes / 2**20) == 462
    assert (name, round(one.weights_bytes / 2**20)) == ("Q3_K_M", 406)


def test_what_was_trained_in_its_type_has_no_smaller_quantisation():
    assert main_type(planning.header("gpt-oss-120b")) == "MXFP4"
    assert smaller(planning.header("gpt-oss-120b")) == []
