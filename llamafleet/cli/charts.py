"""The charts of a report as Vega-Lite specifications: plain dictionaries, drawn elsewhere.

Colours are names of the page's own (`var(--...)`), so that each chart is light or dark with the page. Texts from
outside are in the data alone, which Vega never takes for an expression.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llamafleet.cli.tables import BESIDE, PARTS
from llamafleet.memory.ledger import LedgerRow
from llamafleet.tuning.tried import Range
from llamafleet.units import GIB

WIDTH = 340  # of a chart, pixels: as wide as a phone
LABEL = 280  # of a label, as Vega measures it; a page's font may be wider
ROW = 38  # of a bar with its label above it
HEIGHT = 190  # of a chart with curves
MOST_ROWS = 40  # of a chart; the table beside it has all
PREDICTED, BY_GATE, BY_TUNE = "predicted", "measured by the gate", "measured by the tune"
LIGHT, INK, MUTED, GRID = 0.16, "var(--ink)", "var(--muted)", "var(--grid)"
COLOURS = {
    PREDICTED: "var(--muted)", BY_GATE: "var(--kv)", BY_TUNE: "var(--weights)",
    "chosen": "var(--weights)", "baseline": "var(--muted)", "other": "var(--overhead)",
}  # fmt: skip
SHAPES = {PREDICTED: "stroke", BY_GATE: "diamond", BY_TUNE: "circle"}
MEMORY = {
    **{name: f"var(--{field.partition('_')[0]})" for _, name, field, _ in (*PARTS, BESIDE)},
    "reserve": "var(--reserve)", "free": "var(--free)",
}  # fmt: skip
FIELDS = {**{name: field for _, name, field, _ in (*PARTS, BESIDE)}, "reserve": "reserve_bytes", "free": "free_bytes"}
TEXT = {"labelColor": INK, "titleColor": INK, "labelFontSize": 11, "titleFontSize": 11, "titleFontWeight": "normal"}
CONFIG: Mapping[str, Any] = {
    "background": None, "font": "system-ui, sans-serif", "aria": False,
    "view": {"stroke": None},
    "axis": {**TEXT, "gridColor": GRID, "domainColor": GRID, "tickColor": GRID, "tickCount": 5},
    "legend": {**TEXT, "orient": "bottom", "title": None, "columns": 3, "symbolSize": 80, "symbolOpacity": 1},
    "text": {"color": INK, "fontSize": 12},
}  # fmt: skip


@dataclass(frozen=True)
class Bar:
    """A row of a chart: its label, a value with its range, and what it is: "chosen", "baseline" or "other"."""

    label: str
    value: Range
    kind: str = "other"


@dataclass(frozen=True)
class Point:
    """A value at `x`, with its range where it has one, by its source: PREDICTED, BY_GATE or BY_TUNE."""

    x: float
    value: float
    source: str
    low: float | None = None
    high: float | None = None


def memory_parts(row: LedgerRow) -> dict[str, int]:
    """Bytes of a device by what they are for, in the order of the bar; parts without any are left out. Staging that
    takes less than nothing is taken off what computes."""
    parts = {name: getattr(row, field) for name, field in FIELDS.items()}
    if parts["staging"] < 0:
        parts["compute"] += parts["staging"]
    return {name: size for name, size in parts.items() if size > 0}


def memory(rows: Sequence[LedgerRow]) -> dict[str, Any]:
    """A bar for each device: what a plan takes of its memory, in shares of it."""
    parts = [(row, *part) for row in rows for part in memory_parts(row).items()]
    used = [name for name in FIELDS if any(name == part for _, part, _ in parts)]
    values = [{"device": n, "part": part, "order": used.index(part), "gib": size / GIB}
              for n, row in enumerate(rows) for owner, part, size in parts if owner is row]  # fmt: skip
    bars = {
        "data": {"values": values},
        "mark": {"type": "bar", "height": 14, "stroke": "var(--page)", "strokeWidth": 1},
        "encoding": {
            "x": {
                "field": "gib",
                "type": "quantitative",
                "stack": "normalize",
                "title": "share of the device's memory",
                "axis": {"grid": False, "format": "%"},
            },
            "color": _colour("part", {name: MEMORY[name] for name in used}),
            "order": {"field": "order", "type": "quantitative"},
        },
    }
    labels = [{"device": n, "label": _device(row)} for n, row in enumerate(rows)]
    return _chart([bars, _labels(labels, "device")], len(rows) * ROW, y="device")


def _device(row: LedgerRow) -> str:
    return f"{row.device}: {row.used_bytes / GIB:.1f} of {row.capacity_bytes / GIB:.1f} GiB"


def bars(rows: Sequence[Bar], title: str, *, one: bool) -> dict[str, Any]:
    """A point with its range for each row, at most MOST_ROWS. `one`: with a line at 1, to which all compare; else the
    axis begins at 0."""
    shown = rows[:MOST_ROWS]
    values = [{"row": n, "value": bar.value.middle, "low": bar.value.low, "high": bar.value.high, "kind": bar.kind}
              for n, bar in enumerate(shown)]  # fmt: skip
    colour = {**_colour("kind", {kind: COLOURS[kind] for kind in ("chosen", "baseline", "other")}), "legend": None}
    scale = {"zero": not one, "nice": True, **({"padding": 12} if one else {})}
    x = {"type": "quantitative", "title": title, "scale": scale, "axis": {"grid": False}}
    layers = [
        {"data": {"values": [{"at": 1}]}, "mark": {"type": "rule", "color": MUTED, "strokeDash": [4, 3]},
         "encoding": {"x": {"field": "at", **x}}},
    ] if one else []  # fmt: skip
    layers += [
        {"data": {"values": values}, "mark": {"type": "rule", "strokeWidth": 3, "opacity": 0.55, "strokeCap": "round"},
         "encoding": {"x": {"field": "low", **x}, "x2": {"field": "high"}, "y": _row("row"), "color": colour}},
        {"data": {"values": values}, "mark": {"type": "point", "filled": True, "size": 70, "opacity": 1},
         "encoding": {"x": {"field": "value", **x}, "y": _row("row"), "color": colour}},
        _labels([{"row": n, "label": bar.label} for n, bar in enumerate(shown)], "row"),
    ]  # fmt: skip
    return _chart(layers, max(1, len(shown)) * ROW)


def curve(points: Sequence[Point], x: str, y: str) -> dict[str, Any]:
    """What is predicted as a line in its range, what was measured as points; `x` and `y` name the axes."""
    sources = [source for source in SHAPES if any(point.source == source for point in points)]
    colour = {**_colour("source", {source: COLOURS[source] for source in sources}), "legend": {"columns": 2}}
    shape = {"field": "source", "type": "nominal", "scale": {"domain": sources, "range": [SHAPES[s] for s in sources]}}
    x_axis = {"field": "x", "type": "quantitative", "title": x, "axis": {"format": "~s", "tickMinStep": 1}}
    y_scale = {"type": "quantitative", "title": y, "scale": {"zero": True}}
    line = [vars(point) for point in points if point.source == PREDICTED]
    measured = [vars(point) for point in points if point.source != PREDICTED]
    encoding = {"x": x_axis, "color": colour}
    layers: list[dict[str, Any]] = []
    if line:
        layers = [
            {"data": {"values": line}, "mark": {"type": "area", "opacity": LIGHT},
             "encoding": {**encoding, "y": {"field": "low", **y_scale}, "y2": {"field": "high"}}},
            {"data": {"values": line}, "mark": {"type": "line", "strokeWidth": 2, "strokeDash": [5, 3]},
             "encoding": {**encoding, "y": {"field": "value", **y_scale}}},
        ]  # fmt: skip
    layers.append({
        "data": {"values": measured}, "mark": {"type": "point", "filled": True, "size": 90, "opacity": 1},
        "encoding": {**encoding, "y": {"field": "value", **y_scale}, "shape": shape},
    })  # fmt: skip
    return _chart(layers, HEIGHT)


def _chart(layers: Sequence[Mapping[str, Any]], height: int, y: str = "") -> dict[str, Any]:
    made: dict[str, Any] = {
        "width": WIDTH, "height": height, "layer": list(layers), "config": dict(CONFIG), "padding": 2,
        "autosize": {"type": "fit-x", "contains": "padding"},
    }  # fmt: skip
    return {**made, "encoding": {"y": _row(y)}} if y else made


def _row(field: str) -> dict[str, Any]:
    return {"field": field, "type": "ordinal", "axis": None, "scale": {"paddingInner": 0, "paddingOuter": 0}}


def _labels(values: Sequence[Mapping[str, Any]], row: str) -> dict[str, Any]:
    """A label above each bar."""
    mark = {"type": "text", "align": "left", "baseline": "bottom", "dy": -6, "limit": LABEL}
    return {"data": {"values": list(values)}, "mark": mark,
            "encoding": {"x": {"value": 0}, "y": _row(row), "text": {"field": "label"}}}  # fmt: skip


def _colour(field: str, colours: Mapping[str, str]) -> dict[str, Any]:
    return {"field": field, "type": "nominal", "scale": {"domain": list(colours), "range": list(colours.values())}}
