"""Plans and comparisons of models as text: a bar for each device, speeds, flags, reasons and alternatives."""

from __future__ import annotations

import os
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TextIO

from llamafleet.cli.compare import Option, best, ordered, short_names
from llamafleet.host.speeds import ESTIMATED
from llamafleet.memory.ledger import LedgerRow
from llamafleet.planner.result import Plan, Refusal
from llamafleet.planner.roofline import Prediction
from llamafleet.printable import coloured, one_line
from llamafleet.units import MIB

GIB = 1024**3
BAR_WIDTH = 40
BESIDE_BAR = 26  # columns for the device's name and its total
LEGEND_WIDTH = 84  # columns
NARROW = 125  # columns; on a narrower terminal each device takes two lines
# The parts of a bar, in order: letter, name, field of the ledger row, colour (ECMA-48, SGR).
PARTS = (
    ("W", "weights", "weights_bytes", "34"),
    ("K", "KV cache", "kv_bytes", "32"),
    ("C", "compute", "compute_bytes", "33"),
    ("S", "staging", "staging_bytes", "35"),
    ("o", "overhead", "overhead_bytes", "36"),
)
BESIDE = ("B", "beside the model", "beside_bytes", "91")  # a projector, a draft model, adapters
RESERVE, FREE = ("r", "90"), "."


@dataclass(frozen=True)
class Look:
    """How to write: the columns of the terminal (None: lines of any length), and whether to use colours."""

    columns: int | None = None
    colours: bool = False

    @classmethod
    def of(cls, stream: TextIO) -> Look:
        """The look for this stream; colours only on a terminal, and not if NO_COLOR is set (no-color.org)."""
        if not stream.isatty():
            return cls()
        colours = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        return cls(shutil.get_terminal_size().columns, colours)

    @property
    def bar_width(self) -> int:
        """Columns of a bar."""
        return BAR_WIDTH if self.columns is None else max(8, min(BAR_WIDTH, self.columns - BESIDE_BAR))

    @property
    def is_narrow(self) -> bool:
        """Does a device need two lines?"""
        return self.columns is not None and self.columns < NARROW

    def painted(self, text: str, colour: str) -> str:
        """The text in this colour, if colours are used."""
        return coloured(text, colour) if self.colours and text else text

    def wrapped(self, text: str, indent: str = "    ") -> str:
        """The text as one line, cleaned, broken at words into lines that fit the terminal."""
        text = one_line(text)
        if self.columns is None:
            return text
        return "\n".join(
            textwrap.wrap(
                text,
                max(self.columns, 20),
                subsequent_indent=indent,
                break_long_words=False,
                break_on_hyphens=False,
            )
        )


PLAIN = Look()


def table(
    result: Plan | Refusal, title: str, look: Look = PLAIN, alternatives: Sequence[str] = (), measured: str = ""
) -> str:  # fmt: skip
    """The plan or refusal as text, without a trailing newline. `alternatives`: sentences of `what_if`; `measured`: the
    speeds that the gate has measured of this plan, which are shown instead of the predicted ones."""
    return "\n".join([look.wrapped(title), *_lines(result, look, alternatives, measured)])


def _lines(result: Plan | Refusal, look: Look, alternatives: Sequence[str], measured: str) -> Iterator[str]:
    if result.ledger:
        yield from _legend(look, any(row.beside_bytes for row in result.ledger))
    for row in result.ledger:
        yield from _device(row, look)
    if isinstance(result, Refusal):
        # Painted after it was wrapped, which counts the characters.
        yield look.wrapped(f"  REFUSED: {result.reason}").replace("REFUSED", look.painted("REFUSED", "31;1"), 1)
        yield from (look.wrapped(f"  try: {suggestion}") for suggestion in result.suggestions)
    else:
        yield look.wrapped(f"  measured by its gate: {measured}" if measured else f"  {_speeds(result.predicted)}")
        yield look.wrapped(f"  flags: {' '.join(result.argv)}")
    yield from (look.wrapped(f"  - {reason}") for reason in result.why)
    yield from (look.wrapped(f"  ! {problem}") for problem in result.problems)
    if isinstance(result, Plan):
        yield from (look.wrapped(f"  > {sentence}") for sentence in alternatives)


def _speeds(speeds: Prediction) -> str:
    def with_range(speed: float, low: float, high: float) -> str:
        span = f" ({rate(low)} to {rate(high)})" if low < high else ""
        return f"{rate(speed)} tokens/s{span}"

    written = with_range(speeds.decode_tokens_per_s, speeds.decode_low_tokens_per_s, speeds.decode_high_tokens_per_s)
    read = with_range(speeds.prefill_tokens_per_s, speeds.prefill_low_tokens_per_s, speeds.prefill_high_tokens_per_s)
    if speeds.measured:
        return f"measured: {written} written, {read} read"
    if speeds.swap_bytes:
        return (
            f"predicted: no speed, since {_gib(speeds.swap_bytes)} GiB would be in swap, and how fast its disk reads "
            "them for every token was not measured"
        )
    if not speeds.decode_tokens_per_s:
        how = ", roughly" if speeds.prefill_source == ESTIMATED else f" [{speeds.prefill_source}]"
        return f"predicted{how}: {read} read; nothing is written"
    if speeds.decode_source == speeds.prefill_source == ESTIMATED:
        return f"predicted, roughly: {written} written, {read} read"
    return f"predicted: {written} written [{speeds.decode_source}], {read} read [{speeds.prefill_source}]"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A line for each row, with columns as wide as their longest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def rate(speed: float) -> str:
    """The number with three significant digits: a prediction is not more exact."""
    return f"{float(f'{speed:.3g}'):g}"


def _legend(look: Look, has_beside: bool) -> Iterator[str]:
    named = (*PARTS, BESIDE) if has_beside else PARTS
    parts = [f"{look.painted(letter, colour)} {name}" for letter, name, _, colour in named]
    parts += [f"{look.painted(*RESERVE)} reserve", f"{FREE} free (GiB)"]
    per_row = 3 if look.columns is not None and look.columns < LEGEND_WIDTH else len(parts)
    rows = (parts[start : start + per_row] for start in range(0, len(parts), per_row))
    yield from (f"  {', '.join(row)}" for row in rows)


def _device(row: LedgerRow, look: Look) -> Iterator[str]:
    used = f"{_gib(row.used_bytes)} of {_gib(row.capacity_bytes)}"
    line = f"  {row.device:<6}|{bar(row, look)}| {used}"
    if look.is_narrow:
        yield line
        yield look.wrapped(f"        {_parts(row)}", "        ")
    else:
        yield f"{line}, {_parts(row)}"


def bar(row: LedgerRow, look: Look = PLAIN) -> str:
    """The device's memory as letters; the bar of an overfull device ends in `!`."""
    width = look.bar_width
    scale = width / max(1, row.capacity_bytes)
    pieces, filled, upto = [], 0, 0
    shares = [(letter, colour, getattr(row, part)) for letter, _, part, colour in (*PARTS, BESIDE)]
    for letter, colour, size in (*shares, (*RESERVE, row.reserve_bytes)):
        upto += size
        end = min(round(upto * scale), width)
        pieces.append(look.painted(letter * (end - filled), colour))
        filled = max(filled, end)
    if row.used_bytes > row.capacity_bytes:
        return _overfull("".join(pieces), look)
    return "".join(pieces) + FREE * (width - filled)


def _overfull(text: str, look: Look) -> str:
    mark = look.painted("!", "31;1")
    if not look.colours:
        return text[:-1] + mark if text else mark
    return text + mark


def _parts(row: LedgerRow) -> str:
    # Op-offload may need some kilobytes less than without it: no "S -0.0".
    sizes = [(letter, getattr(row, part)) for letter, _, part, _ in (*PARTS, BESIDE)]
    parts = [f"{letter} {_gib(size)}" for letter, size in sizes if size > 0 or abs(size) >= 0.05 * GIB]
    state = "free above the reserve" if row.free_bytes >= 0 else "missing to keep the reserve"
    return f"{', '.join(parts)}; {_gib(abs(row.free_bytes))} {state}"


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}"


NAME_LIMIT = 40  # columns


def comparison_table(options: Sequence[Option], machine: str, min_speed: float, look: Look = PLAIN) -> str:
    """The comparison as text, without a trailing newline. `min_speed` is tokens/s; 0: no minimum."""
    return "\n".join(_comparison_lines(options, machine, min_speed, look))


def _comparison_lines(options: Sequence[Option], machine: str, min_speed: float, look: Look) -> Iterator[str]:
    names = short_names([option.source for option in options])
    width = min(max(len(name) for name in names.values()), NAME_LIMIT)
    chosen = best(options, min_speed)
    models = f"{len(options)} model{'s' if len(options) > 1 else ''}"
    yield look.wrapped(f"{models} on {machine}; tokens/s are predicted, roughly")
    yield f"  {'':{width}}  weights  bits  on GPU  written     read"
    for option in ordered(options):
        mark = "*" if option is chosen else " "
        row = one_line(f"{mark} {names[option.source][-NAME_LIMIT:]:{width}}  {_outcome(option, min_speed)}")
        yield look.painted(row, "1") if option is chosen else row
    if chosen is None:
        yield look.wrapped(f"REFUSED: none of these models {_condition(min_speed)}")
    else:
        yield look.wrapped(f"* the best: the largest model that {_condition(min_speed)}: {chosen.source}")


def _condition(min_speed: float) -> str:
    return f"fits and writes {min_speed:g} tokens/s" if min_speed else "fits"


def _outcome(option: Option, min_speed: float) -> str:
    size = f"{option.weights_bytes / GIB:7.1f} {option.bits_per_weight:5.1f}"
    match option.result:
        case Plan(predicted=speeds):
            slow = "  too slow" if option.tokens_per_s < min_speed else ""
            share = f"{round(100 * option.on_gpus)} %"
            written = rate(speeds.decode_tokens_per_s) if speeds.decode_tokens_per_s else "-"
            read = rate(speeds.prefill_tokens_per_s)
            return f"{size}  {share:>6}  {written:>7}  {read:>7}{slow}"
        case Refusal(needed_bytes=needed, available_bytes=available, device=device) if needed:
            return f"{size}  does not fit: {(needed - available) // MIB} MiB missing on {device}"
        case Refusal(reason=reason):
            return f"{size}  {reason}"
    return option.problem
