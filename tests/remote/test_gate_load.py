"""How long a model may load: from its size and what its disk really reads."""

from __future__ import annotations

import os

import pytest

from llamafleet.remote import gate_load

MIB = gate_load.MIB


@pytest.fixture
def sized(monkeypatch):
    """(files, sizes): a model of 8 GiB in two files, on a disk of this speed."""

    def make(speed):
        monkeypatch.setattr(gate_load, "read_speed", lambda sizes: speed)
        monkeypatch.setattr(gate_load.os.path, "exists", lambda path: True)
        monkeypatch.setattr(gate_load.os, "stat", lambda path: os.stat_result([0] * 6 + [4096 * MIB] + [0] * 3))
        return ["/a", "/b"]

    return make


@pytest.mark.parametrize(
    ("speed", "seconds"),
    [(128 * MIB, 60 + 128), (1024 * MIB, 60 + 16), (9000 * MIB, 60 + 16), (8 * MIB, 1000)],
    ids=["hard disk", "fast", "no faster is believed", "never beyond the limit"],
)
def test_the_deadline_follows_the_disk(sized, speed, seconds):
    assert gate_load.deadline(sized(speed), 1000)[0] == seconds


def test_a_real_file_is_measured_past_its_end(tmp_path):
    file = tmp_path / "x.gguf"
    file.write_bytes(os.urandom(5 * MIB + 17))
    speed = gate_load.read_speed({str(file): 5 * MIB + 17})
    assert speed and speed > 0


def test_files_that_are_gone_leave_the_limit():
    assert gate_load.deadline(["/nowhere/x.gguf"], 77.0)[0] == 77.0


def test_pieces_are_spread_over_all_files():
    sizes = {"/a": 100 * MIB, "/b": 300 * MIB}
    places = gate_load.spread(sizes)
    assert len(places) == gate_load.PIECES
    assert sum(path == "/b" for path, _ in places) == gate_load.PIECES * 3 // 4
    assert all(offset % gate_load.PIECE_BYTES == 0 and offset < sizes[path] for path, offset in places)
    assert gate_load.spread({"/small": 10}) == [("/small", 0)]
