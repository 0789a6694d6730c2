"""A plan as a table for people: a bar for each device, what is where, why, and what would change it."""

from __future__ import annotations

import os
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TextIO

from llamafleet.cli.compare import Option, best, ordered, short_names
from llamafleet.memory.ledger import LedgerRow
from llamafleet.planner.result import Plan, Refusal
from llamafleet.planner.roofline import Prediction
from llamafleet.units import MIB

GIB = 1024**3
BAR_WIDTH = 40
BESIDE_BAR = 26  # columns, for the device's name and its total
LEGEND_WIDTH = 84
NARROW = 125  # columns, below which a device takes two lines
# What a bar shows, in order: its letter, its name, its part of the ledger, its colour (ECMA-48, SGR).
PARTS = (
    ("W", "weights", "weights_bytes", "34"),
    ("K", "KV cache", "kv_bytes", "32"),
    ("C", "compute", "compute_bytes", "33"),
    ("S", "staging", "staging_bytes", "35"),
    ("o", "overhead", "overhead_bytes", "36"),
)
RESERVE, FREE = ("r", "90"), "."


@dataclass(frozen=True)
class Look:
    """How to write: columns to stay within, None for lines of any length, and whether with colours."""

    columns: int | None = None
    colours: bool = False

    @classmethod
    def of(cls, stream: TextIO) -> Look:
        """As fits where it is written; colours on terminals only, and not under NO_COLOR (no-color.org)."""
        if not stream.isatty():
            return cls()
        wanted = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        return cls(shutil.get_terminal_size().columns, wanted)

    @property
    def bar_width(self) -> int:
        """Columns of a bar."""
        return BAR_WIDTH if self.columns is None else max(8, min(BAR_WIDTH, self.columns - BESIDE_BAR))

    @property
    def is_narrow(self) -> bool:
        """Does a device need two lines?"""
        return self.columns is not None and self.columns < NARROW

    def painted(self, text: str, colour: str) -> str:
        """The text in the colour, where there are colours."""
        return f"\x1b[{colour}m{text}\x1b[0m" if self.colours and text else text

    def wrapped(self, text: str, indent: str = "    ") -> str:
        """The line, broken at words where it is too long."""
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


def table(answer: Plan | Refusal, title: str, look: Look = PLAIN, outlook: Sequence[str] = ()) -> str:
    """The whole table, without a trailing newline. `outlook`: what would change with other settings."""
    return "\n".join([look.wrapped(title), *_lines(answer, look, outlook)])


def _lines(answer: Plan | Refusal, look: Look, outlook: Sequence[str]) -> Iterator[str]:
    if answer.ledger:
        yield from _legend(look)
    for row in answer.ledger:
        yield from _device(row, look)
    if isinstance(answer, Refusal):
        yield look.wrapped(f"  {look.painted('REFUSED', '31;1')}: {answer.reason}")
        yield from (look.wrapped(f"  try: {suggestion}") for suggestion in answer.suggestions)
    else:
        yield look.wrapped(f"  {_speeds(answer.predicted)}")
        yield look.wrapped(f"  flags: {' '.join(answer.argv)}")
    yield from (look.wrapped(f"  - {reason}") for reason in answer.why)
    if isinstance(answer, Plan):
        yield from (look.wrapped(f"  > {sentence}") for sentence in outlook)


def _speeds(guess: Prediction) -> str:
    def told(speed: float, low: float, high: float) -> str:
        span = f" ({rate(low)} to {rate(high)})" if low < high else ""
        return f"{rate(speed)} tokens/s{span}"

    written = told(guess.decode_tokens_per_s, guess.decode_low_tokens_per_s, guess.decode_high_tokens_per_s)
    read = told(guess.prefill_tokens_per_s, guess.prefill_low_tokens_per_s, guess.prefill_high_tokens_per_s)
    return f"{'measured' if guess.measured else 'predicted, roughly'}: {written} written, {read} read"


def rate(speed: float) -> str:
    """Three digits: more would claim what no prediction knows."""
    return f"{float(f'{speed:.3g}'):g}"


def _legend(look: Look) -> Iterator[str]:
    parts = [f"{look.painted(letter, colour)} {name}" for letter, name, _, colour in PARTS]
    parts += [f"{look.painted(*RESERVE)} reserve", f"{FREE} free (GiB)"]
    each = 3 if look.columns is not None and look.columns < LEGEND_WIDTH else len(parts)
    rows = (parts[at : at + each] for at in range(0, len(parts), each))
    yield from (f"  {', '.join(row)}" for row in rows)


def _device(row: LedgerRow, look: Look) -> Iterator[str]:
    used = f"{_gib(row.used_bytes)} of {_gib(row.capacity_bytes)}"
    shown = f"  {row.device:<6}|{bar(row, look)}| {used}"
    if look.is_narrow:
        yield shown
        yield look.wrapped(f"        {_parts(row)}", "        ")
    else:
        yield f"{shown}, {_parts(row)}"


def bar(row: LedgerRow, look: Look = PLAIN) -> str:
    """The device's memory as letters; an overfull device ends in `!`."""
    width = look.bar_width
    scale = width / max(1, row.capacity_bytes)
    pieces, filled, upto = [], 0, 0
    shares = [(letter, colour, getattr(row, part)) for letter, _, part, colour in PARTS]
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
    held = [f"{letter} {_gib(getattr(row, part))}" for letter, _, part, _ in PARTS if getattr(row, part)]
    state = "free above the reserve" if row.free_bytes >= 0 else "missing under the reserve"
    return f"{', '.join(held)}; {_gib(abs(row.free_bytes))} {state}"


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}"


NAME_LIMIT = 40  # columns


def comparison_table(options: Sequence[Option], machine: str, min_speed: float, look: Look = PLAIN) -> str:
    """The whole table, without a trailing newline."""
    return "\n".join(_comparison_lines(options, machine, min_speed, look))


def _comparison_lines(options: Sequence[Option], machine: str, min_speed: float, look: Look) -> Iterator[str]:
    names = short_names([option.source for option in options])
    width = min(max(len(name) for name in names.values()), NAME_LIMIT)
    chosen = best(options, min_speed)
    yield look.wrapped(f"{len(options)} models on {machine}; tokens/s are predicted, roughly")
    yield f"  {'':{width}}  weights  bits  on GPU  written     read"
    for option in ordered(options):
        mark = "*" if option is chosen else " "
        row = f"{mark} {names[option.source][-NAME_LIMIT:]:{width}}  {_outcome(option, min_speed)}"
        yield look.painted(row, "1") if option is chosen else row
    if chosen is None:
        yield look.wrapped(f"REFUSED: none of them {_condition(min_speed)}")
    else:
        yield look.wrapped(f"* the best: the one with the most bytes that {_condition(min_speed)}: {chosen.source}")


def _condition(min_speed: float) -> str:
    return f"fits and writes {min_speed:g} tokens/s" if min_speed else "fits"


def _outcome(option: Option, min_speed: float) -> str:
    size = f"{option.weights_bytes / GIB:7.1f} {option.bits_per_weight:5.1f}"
    match option.answer:
        case Plan(predicted=guess):
            slow = "  too slow" if guess.decode_tokens_per_s < min_speed else ""
            share = f"{round(100 * option.on_gpus)} %"
            return (
                f"{size}  {share:>6}  {rate(guess.decode_tokens_per_s):>7}  {rate(guess.prefill_tokens_per_s):>7}{slow}"
            )
        case Refusal(needed_bytes=needed, available_bytes=available, device=device) if needed:
            return f"{size}  does not fit: {(needed - available) // MIB} MiB missing on {device}"
        case Refusal(reason=reason):
            return f"{size}  {reason}"
    return option.problem
