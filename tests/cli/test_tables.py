"""The table for people: bars that add up, on any terminal."""

import dataclasses
import io
import re

import pytest

from llamafleet.cli import compare, tables
from llamafleet.memory.ledger import LedgerRow
from llamafleet.planner.result import Plan
from llamafleet.planner.roofline import Prediction
from tests import planning

GIB = 2**30


def row(*gib, capacity=40, reserve=2):
    """Weights, KV, compute, staging and overhead in GiB; a letter of the bar is one GiB."""
    weights, kv, compute, staging, overhead = (size * GIB for size in gib)
    free = capacity * GIB - sum(gib) * GIB - reserve * GIB
    return LedgerRow("GPU0", weights, kv, compute, staging, overhead, capacity * GIB, free, reserve * GIB)


@pytest.mark.parametrize(
    ("filled", "bar"),
    [
        (row(10, 5, 2, 1, 2), "W" * 10 + "K" * 5 + "CCSoo" + "rr" + "." * 18),
        (row(38, 0, 0, 0, 0), "W" * 38 + "rr"),
        (row(39, 0, 0, 0, 0), "W" * 39 + "r"),
        (row(40, 0, 0, 0, 0, reserve=0), "W" * 40),
        (row(30, 30, 0, 0, 0), "W" * 30 + "K" * 9 + "!"),
        (row(10**9, 0, 0, 0, 0), "W" * 39 + "!"),
        (row(0, 0, 0, 0, 0, capacity=0, reserve=0), "." * 40),
    ],
)
def test_a_bar_is_as_long_as_the_device(filled, bar):
    assert tables.bar(filled) == bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_colours_are_for_terminals_that_want_them(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "133")
    assert tables.Look.of(Terminal()) == tables.Look(133, colours=True)
    assert tables.Look.of(io.StringIO()) == tables.Look(None, colours=False)
    monkeypatch.setenv("NO_COLOR", "1")
    assert not tables.Look.of(Terminal()).colours
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not tables.Look.of(Terminal()).colours


def test_colours_change_nothing_else():
    plain = tables.bar(row(10, 5, 2, 1, 2))
    painted = tables.bar(row(10, 5, 2, 1, 2), tables.Look(None, colours=True))
    assert painted != plain
    assert re.sub(r"\x1b\[[0-9;]*m", "", painted) == plain


@pytest.fixture(scope="module")
def answers():
    asked = planning.settings({"context_tokens": 32768})
    hosts = (planning.machine([24564]), planning.machine([24564], ram_gib=16))
    return [planning.plans(host, [("gpt-oss-120b",)], asked)[0] for host in hosts]


@pytest.mark.parametrize("columns", [40, 80, 100, 160])
def test_no_line_is_wider_than_the_terminal(answers, columns):
    for answer in answers:
        output = tables.table(answer, "gpt-oss-120b on box1", tables.Look(columns), ["a sentence " * 20])
        # A single word is never broken, such as the list of layers on the CPU.
        assert [line for line in output.splitlines() if len(line) > columns and len(line.split()) > 1] == []
        assert "gpt-oss-120b on box1" in output


def test_a_narrow_terminal_shows_everything_too(answers):
    for answer in answers:
        words = tables.table(answer, "t").replace(",", " ").split()
        narrow = tables.table(answer, "t", tables.Look(60)).replace(",", " ").split()
        assert [word for word in words if word not in narrow and "|" not in word] == []


def test_the_alternatives_come_after_the_reasons(answers):
    plan, refusal = answers
    assert isinstance(plan, Plan)
    assert tables.table(plan, "t", alternatives=["more would fit"]).splitlines()[-1] == "  > more would fit"
    assert "missing to keep the reserve" in tables.table(refusal, "t")


def test_a_prediction_has_a_range_and_a_measurement_is_marked(answers):
    prediction = Prediction(23.456, 1158.4, 15.0, 30.0, 700.0, 1500.0)
    output = tables.table(dataclasses.replace(answers[0], predicted=prediction), "t")
    assert "predicted, roughly: 23.5 tokens/s (15 to 30) written, 1160 tokens/s (700 to 1500) read" in output
    output = tables.table(dataclasses.replace(answers[0], predicted=Prediction.of_trial(23.456, 1158.4)), "t")
    assert "measured: 23.5 tokens/s written, 1160 tokens/s read" in output


def test_a_prediction_says_which_of_its_speeds_rest_on_measurements(answers):
    prediction = Prediction(23.4, 1158.4, decode_source="measured on this host", prefill_source="estimated")
    output = tables.table(dataclasses.replace(answers[0], predicted=prediction), "t")
    assert "predicted: 23.4 tokens/s written [measured on this host], 1160 tokens/s read [estimated]" in output


def test_a_server_that_writes_nothing_has_a_speed_of_reading(answers):
    output = tables.table(dataclasses.replace(answers[0], predicted=Prediction(0.0, 1158.4)), "t")
    assert "predicted, roughly: 1160 tokens/s read; nothing is written" in output


def test_a_plan_that_swaps_has_no_predicted_speed(answers):
    output = tables.table(dataclasses.replace(answers[0], predicted=Prediction(0.0, 0.0, swap_bytes=3 * 2**30)), "t")
    assert "predicted: no speed, since 3.0 GiB would be in swap, and how fast its disk reads them" in output


def test_a_part_of_nothing_is_not_shown():
    """Op-offload may need a little less than without it: "S -0.0" stood in the table."""
    less = dataclasses.replace(row(10, 5, 2, 0, 2), staging_bytes=-20 * 2**20)
    [line] = tables._device(less, tables.PLAIN)
    assert "S " not in line.split("|")[2] and "-" not in line.split("|")[2]
    [line] = tables._device(dataclasses.replace(less, staging_bytes=-GIB), tables.PLAIN)
    assert "S -1.0" in line


def test_one_model_is_not_several():
    one = compare.Option("/m.gguf", planning.header("Llama-3.1-8B"), problem="")
    assert tables.comparison_table([one], "box", 0.0).startswith("1 model on box")
    assert tables.comparison_table([one, one], "box", 0.0).startswith("2 models on box")
