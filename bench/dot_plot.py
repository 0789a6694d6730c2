"""Dot plots as SVG: a row for each name, with a dot for each series."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

ROW, LEFT, WIDTH, TOP = 20, 210, 640, 96  # pixels
COLOURS = ("#0b7a3b", "#c2410c", "#e9a76b", "#1d4ed8", "#7c3aed", "#555555")  # of so many series at most
TICKS = 6


def svg(title: str, axis: str, names: Sequence[str], series: Mapping[str, Sequence[object]]) -> str:
    """The plot as SVG text; a value of "" gets no dot."""
    assert len(series) <= len(COLOURS)
    known = [float(str(value)) for values in series.values() for value in values if value != ""]
    low, high = min([0.0, *known]), max([0.0, *known])
    step = _step(max(high - low, 1.0) / TICKS)
    low, high = step * (low // step), step * max(1, -(-high // step))
    height = TOP + ROW * len(names) + 40

    def x(value: float) -> float:
        return LEFT + WIDTH * (value - low) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 40}" height="{height}" font-size="12"'
        ' font-family="sans-serif">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="12" y="22" font-size="15">{escape(title)}</text>',
        f'<text x="12" y="42" fill="#555">{escape(axis)}</text>',
    ]
    at = 12
    for name, colour in zip(series, COLOURS, strict=False):
        parts.append(f'<circle cx="{at + 5}" cy="60" r="5" fill="{colour}"/>')
        parts.append(f'<text x="{at + 16}" y="64">{escape(name)}</text>')
        at += 40 + 7 * len(name)
    for number in range(round((high - low) / step) + 1):
        value = low + number * step
        colour = "#333" if abs(value) < step / 2 else "#ddd"
        parts.append(f'<path d="M{x(value):.1f} {TOP - 12}V{height - 30}" stroke="{colour}"/>')
        parts.append(f'<text x="{x(value):.1f}" y="{height - 12}" text-anchor="middle">{value:g}</text>')
    for row, name in enumerate(names):
        y = TOP + ROW * row
        parts.append(f'<text x="{LEFT - 10}" y="{y + 4}" text-anchor="end">{escape(name)}</text>')
        for values, colour in reversed(list(zip(series.values(), COLOURS, strict=False))):
            if values[row] != "":
                parts.append(f'<circle cx="{x(float(str(values[row]))):.1f}" cy="{y}" r="5" fill="{colour}"/>')
    return "\n".join([*parts, "</svg>", ""])


def _step(about: float) -> float:
    """The smallest of 1, 2 or 5 times a power of ten that is at least `about`."""
    size = 1e-3
    while True:
        for times in (1, 2, 5):
            if times * size >= about:
                return times * size
        size *= 10
