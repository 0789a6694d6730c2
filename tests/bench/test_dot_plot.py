"""The benchmarks' plot: what is drawn is where its axis says."""

import xml.etree.ElementTree as ET

from bench import dot_plot

NS = "{http://www.w3.org/2000/svg}"


def test_dots_are_at_their_values_and_missing_ones_are_left_out():
    picture = ET.fromstring(
        dot_plot.svg("a < b", "percent", ["x", "y"], {"one": [0, 4], "two": [-2, ""], "three": [1, 1]})
    )
    dots = [(dot.get("fill"), float(dot.get("cx"))) for dot in picture.iter(f"{NS}circle") if dot.get("cy") != "60"]
    assert len(dots) == 5
    ticks = {
        text.text: float(text.get("x")) for text in picture.iter(f"{NS}text") if text.get("text-anchor") == "middle"
    }
    one = [x for fill, x in dots if fill == dot_plot.COLOURS[0]]
    assert one == [ticks["0"], ticks["4"]]
    assert [x for fill, x in dots if fill == dot_plot.COLOURS[1]] == [ticks["-2"]]


def test_equal_values_need_no_range():
    assert "circle" in dot_plot.svg("t", "a", ["x"], {"one": [0], "two": [0], "three": [0]})
    assert "</svg>" in dot_plot.svg("t", "a", ["x"], {"one": [""]})
