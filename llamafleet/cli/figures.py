"""The figures of a report: each a chart, a sentence that says what it shows, and the same numbers as a table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llamafleet.cli import charts
from llamafleet.cli.charts import BY_GATE, BY_TUNE, PREDICTED, Bar, Point
from llamafleet.cli.tables import rate
from llamafleet.host.learned import GatedSpeed
from llamafleet.memory.ledger import LedgerRow
from llamafleet.planner.at_gate import GATE_WORK
from llamafleet.planner.curves import Curves, Speed
from llamafleet.settings.workload import Workload
from llamafleet.tuning.record import Tuned
from llamafleet.tuning.tried import Range, Tried
from llamafleet.units import GIB

SHIPPED = "llama-server as it ships"
MOST_SAID = 3  # rows that the sentence of a chart names; its table has all
Row = tuple[str, ...]


@dataclass(frozen=True)
class Figure:
    """A chart as a Vega-Lite specification; `says` is what it shows, for who does not see it."""

    title: str
    says: str
    chart: Mapping[str, Any]
    columns: Row
    rows: tuple[Row, ...]
    note: str = ""  # what the reader should know of the numbers


def memory(ledger: Sequence[LedgerRow]) -> Figure:
    """What a plan takes of each device."""
    parts = [charts.memory_parts(row) for row in ledger]
    names = [name for name in charts.FIELDS if any(name in part for part in parts)]
    says = (f"{row.device}: {gib(row.used_bytes)} of {gib(row.capacity_bytes)} GiB planned, "
            f"{gib(row.reserve_bytes)} reserved" for row in ledger)  # fmt: skip
    return Figure(
        "Memory", sentence(says), charts.memory(ledger), ("device, GiB", *names, "all of it"),
        tuple((row.device, *(gib(part.get(name, 0)) for name in names), gib(row.capacity_bytes))
              for row, part in zip(ledger, parts, strict=True)),
    )  # fmt: skip


def speeds(found: Sequence[Tried], winner: str) -> Figure | None:
    """How fast each candidate was beside llama-server as it ships; None where nothing can be compared. `winner`: the
    label of what is installed."""
    known = [one for one in found if one.speed]
    bars = [Bar(one.label, one.speed, _kind(one, winner)) for one in known if one.speed]
    if len(bars) < 2:
        return None
    return Figure(
        f"Speed beside {SHIPPED}",
        sentence(f"{bar.label}: {times(bar.value)}" for bar in bars if bar.kind != "baseline"),
        charts.bars(bars, f"times as fast as {SHIPPED}", one=True),
        ("candidate", "times as fast", "seconds of the workload", "trials"),
        tuple((one.label, times(one.speed), spread(one.seconds), str(one.trials)) for one in known),
        f"Each point is the median of its trials, each line goes from the slowest to the fastest.{_not_shown(bars)}",
    )


def energy(found: Sequence[Tried], winner: str) -> Figure | None:
    """Tokens for a joule; None where no meter was read."""
    known = [one for one in found if one.tokens_per_joule]
    bars = [Bar(one.label, one.tokens_per_joule, _kind(one, winner)) for one in known if one.tokens_per_joule]
    if not bars:
        return None
    return Figure(
        "Tokens for a joule",
        sentence(f"{bar.label}: {spread(bar.value)}" for bar in bars),
        charts.bars(bars, "tokens for a joule", one=False),
        ("candidate", "tokens for a joule", "trials"),
        tuple((one.label, spread(one.tokens_per_joule), str(one.trials)) for one in known),
        f"As NVML or RAPL of the host told it, prompts and replies together.{_not_shown(bars)}",
    )


def gains(rows: Sequence[tuple[str, Tuned]]) -> Figure | None:
    """What tuning gained on each host; None where nothing was tuned. `rows`: names of hosts and instances."""
    known = [(name, one, gain) for name, one in rows if (gain := gain_of(one))]
    bars = [Bar(name, gain, "chosen" if gain.low > 1 else "other") for name, _, gain in known]
    if not bars:
        return None
    return Figure(
        f"What was gained over {SHIPPED}",
        sentence(f"{bar.label}: {times(bar.value)}" for bar in bars),
        charts.bars(bars, f"times as fast as {SHIPPED}", one=True),
        ("instance", "times as fast", "what won"),
        tuple((name, times(gain), one.winner.label) for name, one, gain in known),
        f"Each line is the interval that the pairs of the final prove.{_not_shown(bars)}",
    )


def gain_of(record: Tuned) -> Range | None:
    """The gain with its interval; None where llama-server as it ships did not run."""
    winner = record.winner
    if winner.gain is None or not winner.gain:
        return None
    if winner.gain == 1:  # nothing was proven, and the interval is of what was not
        return Range(1.0, 1.0, 1.0)
    low = winner.gain if winner.low is None else winner.low
    high = winner.gain if winner.high is None else winner.high
    return Range(winner.gain, min(low, winner.gain), max(high, winner.gain))


def curves(
    found: Curves | None, work: Workload | None, gated: GatedSpeed | None, tuned: Tuned | None
) -> Iterator[Figure]:
    """Latency over depth and speed over requests at once: predicted as curves, measured as points."""
    each, first, together = list(_each(found)), list(_first(found)), list(_together(found))
    writes = found is None or any(one.each for one in found.by_depth)
    if gated and gated.decode_tokens_per_s:
        each.append(Point(GATE_WORK.live_tokens, 1000 / gated.decode_tokens_per_s, BY_GATE))
    if tuned:
        asked, winner = tuned.fingerprint.workload, tuned.winner
        if winner.decode_tokens_per_s:
            together.append(Point(asked.concurrency, winner.decode_tokens_per_s, BY_TUNE))
        if winner.decode_tokens_per_s and asked.concurrency == 1:
            each.append(Point(asked.live_tokens, 1000 / winner.decode_tokens_per_s, BY_TUNE))
        if winner.prompt_tokens_per_s and asked.concurrency == 1:
            first.append(Point(asked.live_tokens, asked.prompt_tokens / winner.prompt_tokens_per_s, BY_TUNE))
    depth = "tokens in the context" if writes else "tokens of the input"
    if each:
        yield _curve("Time for each token of a reply, over depth", each, depth, "milliseconds", "ms")
    if first and writes:
        prompt = f"{work.prompt_tokens} tokens" if work else "the prompt"
        yield _curve(f"Time to read {prompt}, over depth", first, depth, "seconds", "s")
    elif first:
        yield _curve("Time to read an input, over its length", first, depth, "seconds", "s")
    if len(together) > 1:
        yield _curve("Speed of all together, over requests at once", together, "requests at the same time", "tokens/s",
                     "tokens/s")  # fmt: skip


def _each(found: Curves | None) -> Iterator[Point]:
    for one in found.by_depth if found else ():
        if one.each:
            yield _predicted(one.tokens, one.each, 1000)


def _first(found: Curves | None) -> Iterator[Point]:
    return (_predicted(one.tokens, one.first) for one in (found.by_depth if found else ()))


def _together(found: Curves | None) -> Iterator[Point]:
    return (_predicted(one.requests, one.together) for one in (found.by_count if found else ()))


def _predicted(x: float, speed: Speed, unit: float = 1) -> Point:
    return Point(x, unit * speed.value, PREDICTED, unit * speed.low, unit * speed.high)


def _curve(title: str, points: Sequence[Point], x: str, y: str, unit: str) -> Figure:
    line = [point for point in points if point.source == PREDICTED]
    measured = [point for point in points if point.source != PREDICTED]
    ends = [f"{PREDICTED}: {rate(line[0].value)} {unit} at {line[0].x:g}, {rate(line[-1].value)} {unit} at "
            f"{line[-1].x:g} {x}"] if line else []  # fmt: skip
    said = [f"{point.source}: {rate(point.value)} {unit} at {point.x:g}" for point in measured]
    rows = (
        (f"{point.x:g}", rate(point.value), "" if point.low is None or point.high is None
         else f"{rate(point.low)} to {rate(point.high)}", point.source)
        for point in sorted(points, key=lambda point: (point.x, point.source))
    )  # fmt: skip
    note = "The line and its range are predicted, without guesses ahead" if line else "Measured; there is no prediction"
    missing = "" if measured else "; nothing of it was measured"
    return Figure(
        title, sentence([*ends, *said]), charts.curve(points, x, y), (x, y, "range", "source"), tuple(rows),
        f"{note}{missing}.",
    )  # fmt: skip


# --- words ------------------------------------------------------------------------------------------


def sentence(parts: Iterable[str]) -> str:
    """The first parts, and how many more there are."""
    every = list(parts)
    more = [f"{len(every) - MOST_SAID} more in the table"] if len(every) > MOST_SAID else []
    return "; ".join([*every[:MOST_SAID], *more])


def gib(size: int) -> str:
    """Bytes as GiB, with one digit."""
    return f"{size / GIB:.1f}"


def times(value: Range | None) -> str:
    """A ratio with its range, such as "1.31 (1.22 to 1.40)"."""
    return "" if value is None else f"{value.middle:.2f} ({value.low:.2f} to {value.high:.2f})"


def spread(value: Range | None) -> str:
    """A value with its range, three significant digits each; empty where there is none."""
    if value is None:
        return ""
    low, high = rate(value.low), rate(value.high)
    return rate(value.middle) if low == high else f"{rate(value.middle)} ({low} to {high})"


def _kind(one: Tried, winner: str) -> str:
    return "baseline" if one.is_baseline else "chosen" if one.label == winner else "other"


def _not_shown(bars: Sequence[Bar]) -> str:
    return f" {len(bars) - charts.MOST_ROWS} more are in the table." if len(bars) > charts.MOST_ROWS else ""
