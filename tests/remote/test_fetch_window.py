"""Which piece a source brings next: all pieces leave once and in order, whatever sources do."""

import random

import pytest
from fetch_window import AHEAD, LATE_S, Window


def test_each_source_takes_the_next_piece_and_no_more_than_the_window_are_under_way():
    window = Window(0, 100, sources=2)
    taken = [window.take("ab"[number % 2], now=0.0) for number in range(2 * AHEAD)]
    assert taken == list(range(2 * AHEAD))
    assert window.take("a", now=0.0) is None


def test_pieces_leave_in_order():
    window = Window(3, 6, sources=2)
    assert [window.take(source, 0.0) for source in "ab"] == [3, 4]
    window.bring(4, b"4")
    assert window.leave() == []
    window.bring(3, b"3")
    assert window.leave() == [(3, b"3"), (4, b"4")]
    assert (window.is_done(), window.take("a", 0.0)) == (False, 5)


def test_a_piece_that_keeps_others_waiting_is_given_to_a_second_source_only():
    window = Window(0, 1, sources=3)
    assert window.take("slow", 0.0) == 0
    assert window.take("b", LATE_S - 0.1) is None
    assert [window.take(one, LATE_S) for one in ("slow", "b", "c")] == [None, 0, None]
    window.bring(0, b"b's")
    assert not window.is_wanted(0)
    window.bring(0, b"slow's")
    assert window.leave() == [(0, b"b's")]


def test_what_a_source_gives_back_another_one_takes():
    window = Window(0, 2, sources=2)
    assert window.take("dies", 0.0) == 0
    window.give_back("dies", 0)
    assert window.take("b", 0.0) == 0


@pytest.mark.parametrize("seed", range(20))
def test_every_piece_leaves_once_with_sources_of_any_speed_that_fail_at_random(seed):
    dice = random.Random(seed)
    sources = {f"s{number}": dice.choice([0.1, 1.0, 30.0]) for number in range(dice.randint(1, 5))}  # seconds a piece
    window, now, left = Window(0, 60, len(sources)), 0.0, []
    busy = {}  # by source: piece, end
    while not window.is_done():
        assert now < 1e4
        for name, seconds in sources.items():
            if name in busy and now >= busy[name][1]:
                piece = busy.pop(name)[0]
                if dice.random() < 0.2:
                    window.give_back(name, piece)
                else:
                    window.bring(piece, b"%d" % piece)
            if name not in busy and (piece := window.take(name, now)) is not None:
                busy[name] = piece, now + seconds
        left += window.leave()
        assert len(window._brought) <= AHEAD * len(sources)
        now += 0.1
    assert left == [(piece, b"%d" % piece) for piece in range(60)]
