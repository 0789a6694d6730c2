"""The proof's rows: a CSV to which each finished cell is added at once, what of it is done already, and the plot."""

from __future__ import annotations

import csv
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median

from bench import dot_plot
from bench.gpu_proof.cells import APPROACHES, Cell
from bench.gpu_proof.serving import Figures


@dataclass(frozen=True)
class Row:
    """One cell with its figures, tokens a second: the middle, the lowest and the highest of the runs; or the error."""

    card: str
    build: str
    scale: str
    model: str
    limit_mib: int
    context: int
    approach: str
    chosen: str
    prefill: float | str
    prefill_low: float | str
    prefill_high: float | str
    decode: float | str
    decode_low: float | str
    decode_high: float | str
    runs: int
    load_seconds: float | str
    took_seconds: float
    error: str
    flags: str

    @property
    def cell(self) -> Cell:
        return Cell(self.model, int(self.limit_mib), int(self.context), self.approach)


@dataclass(frozen=True)
class Setting:
    """What a row is comparable within: another card, build or scale is measured anew."""

    card: str
    build: str
    scale: str


def row(
    setting: Setting, cell: Cell, took: float, *, chosen: str = "", figures: Figures | None = None, error: str = "",
    flags: Sequence[str] = (),
) -> Row:  # fmt: skip
    """The row of a finished cell: with figures, or with the reason why there are none."""
    spread = [spread_of(figures.prefill), spread_of(figures.decode)] if figures else [("", "", "")] * 2
    return Row(
        **asdict(setting), **asdict(cell), chosen=chosen,
        prefill=spread[0][0], prefill_low=spread[0][1], prefill_high=spread[0][2],
        decode=spread[1][0], decode_low=spread[1][1], decode_high=spread[1][2],
        runs=len(figures.decode) if figures else 0, load_seconds=round(figures.load_seconds, 1) if figures else "",
        took_seconds=round(took, 1), error=" ".join(error.split())[:400], flags=shlex.join(flags),
    )  # fmt: skip


def spread_of(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, lowest and highest."""
    return round(median(values), 2), round(min(values), 2), round(max(values), 2)


def read(path: Path, setting: Setting) -> list[Row]:
    """The rows of this setting that are there. A line that was cut off when the machine stopped is no row."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        found = [line for line in csv.DictReader(file) if None not in line.values() and None not in line]
    kinds = {field.name: field.type for field in fields(Row)}
    rows = [Row(**{key: _value(kinds[key], text) for key, text in line.items()}) for line in found]  # type: ignore[arg-type]
    return [one for one in rows if Setting(one.card, one.build, one.scale) == setting]


def _value(kind: object, text: str) -> object:
    if kind == "int":
        return int(text)
    return float(text) if "float" in str(kind) and text else text


def add(path: Path, one: Row) -> None:
    """Write a row behind the others, and the heading before the first."""
    is_new = not path.exists() or not path.stat().st_size
    ends = is_new or path.read_bytes().endswith(b"\n")  # a line that was cut off ends here
    with path.open("a", newline="") as file:
        if not ends:
            file.write("\n")
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(asdict(one))


def _short(number: int, thousands: str, ones: str) -> str:
    """A number in 1024s where it is so many, so that a name has room beside the plot."""
    return f"{number // 1024} {thousands}" if number % 1024 == 0 else f"{number} {ones}".rstrip()


def plot(rows: Sequence[Row], what: str) -> str:
    """SVG: for each model, limit and context, tokens a second (`what`: prefill or decode) of each approach."""
    places = sorted({(one.model, one.limit_mib, one.context) for one in rows})
    names = [f"{model}, {_short(limit, 'GB', 'MiB')}, {_short(context, 'k', '')}" for model, limit, context in places]
    by_cell = {one.cell: getattr(one, what) for one in rows}
    series = {
        approach: [by_cell.get(Cell(*place, approach), "") for place in places]
        for approach in APPROACHES
        if any(one.approach == approach for one in rows)
    }
    card = rows[0].card if rows else ""
    return dot_plot.svg(f"{what.capitalize()} on {card}", "tokens a second, the middle of the runs", names, series)
