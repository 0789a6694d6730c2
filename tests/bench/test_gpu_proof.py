"""The proof on a GPU: what is measured in which order and in what time, how memory is held, what its rows keep."""

import ctypes
import math
import os
import xml.etree.ElementTree as ET
from dataclasses import replace

import numpy as np
import pytest
from gguf import quants

from bench.gpu_proof import card, cells, rows, shapes
from bench.gpu_proof.cells import CPU_MOE, FIT, N_CPU_MOE, NGL, PLANNED, TUNED, Cell
from bench.gpu_proof.serving import Figures
from llamafleet.host import described
from llamafleet.units import GIB, MIB
from sandbox.models import Tensor, tensors
from tests.bench import fake_cuda

MODELS = {"moe": True, "other": True, "dense": False}
LIMITS, CONTEXTS = (8192, 12288, 24576), (1024, 32768)


# --- the order, and the time --------------------------------------------------------------------------


def test_every_cell_is_there_once_and_ours_beside_fit_on_the_smallest_card_come_first():
    every = cells.cells(MODELS, LIMITS, CONTEXTS)
    assert len(set(every)) == len(every) == len(LIMITS) * len(CONTEXTS) * (6 + 6 + 4)
    assert {one.approach for one in every if one.model == "dense"} == {PLANNED, TUNED, FIT, NGL}
    first = every[:4]
    assert first == [Cell(model, 8192, 1024, approach) for model in ("moe", "other") for approach in (PLANNED, FIT)]


def test_a_cell_is_expected_to_take_as_long_as_those_of_its_approach_and_context():
    cell = Cell("moe", 8192, 1024, PLANNED)
    other, deep = replace(cell, model="other"), replace(cell, context=32768)
    assert cells.expected_seconds(cell, [], 300) == cells.FIRST_GUESS[PLANNED]
    assert cells.expected_seconds(replace(cell, approach=TUNED), [], 300) == 300 + cells.FIRST_GUESS[TUNED]
    assert cells.expected_seconds(cell, [(deep, 90.0), (replace(cell, approach=FIT), 1.0)], 300) == 90
    assert cells.expected_seconds(cell, [(deep, 90.0), (other, 10.0), (other, 12.0)], 300) == 11


def test_a_cell_that_is_too_long_for_the_rest_of_the_time_is_passed_over():
    short, long = Cell("moe", 8192, 1024, PLANNED), Cell("moe", 8192, 1024, TUNED)
    took = [(replace(short, model="other"), 20.0), (replace(long, model="other"), 100.0)]
    left = [short, long, replace(short, limit_mib=12288), replace(short, limit_mib=24576)]
    assert cells.fitting(left, took, 60, 300) == [short, *left[2:]]
    assert cells.fitting(left, took, 59, 300) == [short, left[2]]
    assert cells.fitting(left, took, 19, 300) == []


def test_a_long_context_is_filled_and_a_short_one_leaves_no_room_before_the_prompt():
    short, long = (cells.workload(context, 2048, 48, 3) for context in CONTEXTS)
    assert (short.prompt, short.depth) == (512, 0)
    assert long.prompt == 2048 and long.depth + 3 * (2048 + 48) + cells.MARGIN_TOKENS == 32768
    assert long.seconds(prefill=1024.0, decode=24.0) == 2 + 2


# --- flags --------------------------------------------------------------------------------------------


def test_flags_by_hand_switch_fit_off_and_those_as_shipped_do_not():
    assert cells.shipped(1024) == ["--ctx-size", "1024", "--parallel", "1"]
    assert cells.by_hand(NGL, 1024, 7)[4:] == ["--fit", "off", "--n-gpu-layers", "7"]
    assert cells.by_hand(CPU_MOE, 1024)[4:] == ["--fit", "off", "--n-gpu-layers", "999", "--cpu-moe"]
    assert cells.by_hand(N_CPU_MOE, 1024, 3)[-2:] == ["--n-cpu-moe", "3"]


@pytest.mark.parametrize("most", [0, 1, 24, 48])
def test_the_largest_that_works_is_found_from_any_guess(most):
    for limit in range(-1, most + 1):
        for guess in range(-1, most + 2):
            tried = []
            assert cells.largest(most, lambda n: tried.append(n) or n <= limit, guess) == (  # noqa: B023
                limit if limit >= 0 else None
            )
            assert len(set(tried)) == len(tried) <= 2 * math.log2(most + 2) + 2, "each try loads a model"
            if guess == limit:
                assert len(tried) <= 2


def test_the_guess_is_the_cards_share_of_the_model():
    assert cells.guess(48, 16 * GIB, 8 * GIB, 0) == 24
    assert cells.guess(48, 16 * GIB, 8 * GIB, 9 * GIB) == 0
    assert cells.guess(48, 4 * GIB, 8 * GIB, GIB) == 48


# --- the card -----------------------------------------------------------------------------------------

TABLE = """\
0.01.123 I common_memory_breakdown_print: | memory breakdown [MiB] | total    free    self   model   context   compute |
0.01.123 I common_memory_breakdown_print: |   - Vulkan0 (llvmpipe (LLVM 19.1.7)) | 24152 = 22464 + ({} =  12 +  1 +  6) + 1667 |
0.01.123 I common_memory_breakdown_print: |   - Host                             |                     6 =     4 +  0 +  2    |
"""
SOFTWARE = card.Card("Vulkan0", "llvmpipe", 24152, 23075, "vulkan")
REAL = card.Card("CUDA0", "RTX 4090", 24576, 24000, "cuda")


def test_an_emulated_limit_is_a_margin_for_fit_and_a_bound_for_what_is_allocated():
    assert card.allocated_mib(TABLE.format(900) + TABLE.format(19), "Vulkan0") == 19  # fit's own table is the first
    assert card.allocated_mib(TABLE.format(19), "Vulkan1") == 0
    assert SOFTWARE.fit_flags(276) == ["--fit-target", str(23075 - 20)]  # 256 MiB are the ledger's for the process
    assert not SOFTWARE.is_over(TABLE.format(20), 276) and SOFTWARE.is_over(TABLE.format(21), 276)


def test_nothing_is_emulated_where_memory_is_held():
    assert REAL.fit_flags(8192) == [] and not REAL.is_over(TABLE.format(9999).replace("Vulkan0", "CUDA0"), 8192)


def test_the_machine_has_this_card_alone_with_so_much_memory():
    host = described.read("2x rtx4090,ram=128GB,cores=16").machine
    (gpu,) = REAL.machine(host, 8192).gpus
    assert gpu.memory_total_bytes == 8 * GIB and gpu.memory_used_by_others_bytes == 0
    assert gpu.name == host.gpus[0].name and gpu.vulkan_index is None
    (stand_in,) = SOFTWARE.machine(replace(host, gpus=()), 276).gpus
    assert stand_in.memory_total_bytes == 276 * MIB and stand_in.vulkan_index == 0


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    return fake_cuda.build(tmp_path_factory.mktemp("driver"))


@pytest.mark.parametrize("limit", [8192, 12288, 24001, 24270])
def test_the_rest_is_held_to_the_last_page_that_cuda_allocates(driver, limit):
    assert 0 <= card.hold(ctypes.CDLL(str(driver / "libcuda.so.1")), limit) - limit < 2


def test_less_free_memory_than_the_limit_is_named(driver):
    library = ctypes.CDLL(str(driver / "libcuda.so.1"))
    with pytest.raises(card.CardError, match="24276 MiB are free, 24576 are to be left"):
        card.hold(library, 24576)


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return file.read().split()


def test_a_process_holds_it_until_the_block_ends(driver, monkeypatch):
    monkeypatch.setenv("LD_LIBRARY_PATH", str(driver))
    before = children(os.getpid())
    with card.limited(REAL, 8192):
        (holder,) = set(children(os.getpid())) - set(before)
        with open(f"/proc/{holder}/environ") as file:
            assert "CUDA_VISIBLE_DEVICES=0" in file.read().split("\0")
    assert holder not in children(os.getpid())
    monkeypatch.setenv("NO_DEVICE", "1")
    with pytest.raises(card.CardError, match="could not be held: cuInit: CUDA's error 100"), card.limited(REAL, 8192):
        pass


# --- rows ---------------------------------------------------------------------------------------------

SETTING = rows.Setting("llvmpipe (LLVM 19.1.7, 256 bits)", "b11434", "tiny")
CELL = Cell("moe", 8192, 1024, PLANNED)
FIGURES = Figures((100.0, 300.0, 200.0), (10.0, 30.0, 20.0), 3.14, "")


def test_rows_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "rows.csv"
    one = rows.row(SETTING, CELL, 12.34, chosen="a, b", figures=FIGURES, flags=["--a", "b c"])
    bad = rows.row(SETTING, replace(CELL, approach=FIT), 1.0, error="out of\nmemory")
    for row in (one, bad):
        rows.add(path, row)
    assert rows.read(path, SETTING) == [one, bad]
    assert (one.prefill, one.prefill_low, one.prefill_high, one.decode, one.runs) == (200, 100, 300, 20, 3)
    assert (bad.error, bad.prefill) == ("out of memory", "") and one.cell == CELL
    assert rows.read(path, replace(SETTING, card="another")) == []


def test_a_line_that_was_cut_off_is_no_row_and_the_next_one_is_whole(tmp_path):
    path = tmp_path / "rows.csv"
    one = rows.row(SETTING, CELL, 12.34, figures=FIGURES)
    rows.add(path, one)
    whole = path.read_text()
    path.write_text(whole + whole.splitlines()[1][:40])
    assert rows.read(path, SETTING) == [one]
    rows.add(path, one)
    assert rows.read(path, SETTING) == [one, one]


def test_the_plot_has_a_row_for_each_place_and_a_dot_for_each_figure():
    found = [
        rows.row(SETTING, replace(CELL, approach=approach, limit_mib=limit), 1.0, figures=FIGURES)
        for approach in cells.APPROACHES
        for limit in LIMITS[:2]
    ]
    found[-1] = rows.row(SETTING, found[-1].cell, 1.0, error="failed")
    picture = ET.fromstring(rows.plot(found, "decode"))
    texts = [text.text for text in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert {"moe, 8 GB, 1 k", "moe, 12 GB, 1 k", *cells.APPROACHES} <= set(texts)
    dots = [dot for dot in picture.iter("{http://www.w3.org/2000/svg}circle") if dot.get("cy") != "60"]
    assert len(dots) == 2 * len(cells.APPROACHES) - 1


# --- models -------------------------------------------------------------------------------------------


def test_random_blocks_have_the_weights_of_a_model_that_computes():
    """Each type that the models have: mean about 0, deviation about 1 by the root of the row's length."""
    by_type = {
        tensor.type: tensor
        for scale in ("real", "tiny")
        for layout in shapes.layouts(scale).values()
        for tensor in tensors(layout, layout.quant)
        if tensor.name.startswith("blk.") and len(tensor.shape) > 1
    }
    assert len(by_type) > 3
    for kind, tensor in by_type.items():
        small = Tensor(tensor.name, (tensor.shape[0] // 256 * 256, 64), kind)
        weights = quants.dequantize(np.ascontiguousarray(shapes.values(small, 1)).view(np.uint8).reshape(-1), kind)
        scaled = np.asarray(weights, np.float64) * math.sqrt(small.shape[0])
        assert abs(scaled.mean()) < 0.2 and 0.6 < scaled.std() < 1.7, kind


def test_the_file_has_its_whole_size_on_the_disk_and_is_kept(tmp_path):
    layout = shapes.layouts("tiny")["Qwen3-8B"]
    path = shapes.write(layout, tmp_path)
    data = sum(tensor.nbytes for tensor in tensors(layout, layout.quant))
    assert data < path.stat().st_size <= path.stat().st_blocks * 512 and list(tmp_path.iterdir()) == [path]
    made = path.stat().st_mtime_ns
    assert shapes.write(layout, tmp_path) == path and path.stat().st_mtime_ns == made


def test_the_real_shapes_are_those_of_the_published_models():
    sizes = {name: sum(one.nbytes for one in tensors(layout, layout.quant)) / GIB
             for name, layout in shapes.layouts("real").items()}  # fmt: skip
    assert {name: round(size, 1) for name, size in sizes.items()} == {
        "gpt-oss-20b": 11.3, "Qwen3-30B-A3B": 17.3, "Qwen3-8B": 4.7
    }  # fmt: skip
    assert list(sizes) == list(shapes.layouts("tiny"))
