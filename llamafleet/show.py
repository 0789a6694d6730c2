"""A plan as a table for people: a bar for each device, what is where, and why."""

from __future__ import annotations

from collections.abc import Iterator

from .ledger import LedgerRow
from .plan import Plan, Refusal

GIB = 1024**3
BAR_WIDTH = 40
# What a bar shows, in order, with its letter.
PARTS = (
    ("W", "weights", "weights_bytes"),
    ("K", "KV cache", "kv_bytes"),
    ("C", "compute", "compute_bytes"),
    ("S", "staging", "staging_bytes"),
    ("o", "overhead", "overhead_bytes"),
)


def table(answer: Plan | Refusal, title: str) -> str:
    """The whole table, without a trailing newline."""
    return "\n".join([title, *_lines(answer)])


def _lines(answer: Plan | Refusal) -> Iterator[str]:
    if answer.ledger:
        yield "  " + ", ".join(f"{letter} {name}" for letter, name, _ in PARTS) + ", . free and reserve (GiB)"
    for row in answer.ledger:
        used = f"{_gib(row.used_bytes)} of {_gib(row.capacity_bytes)}"
        yield f"  {row.device:<6}|{bar(row)}| {used}, {_parts(row)}"
    if isinstance(answer, Refusal):
        yield f"  REFUSED: {answer.reason}"
        yield from (f"  try: {suggestion}" for suggestion in answer.suggestions)
    else:
        guess = answer.predicted
        yield (
            f"  predicted, roughly: {guess.decode_tokens_per_s:g} tokens/s written,"
            f" {guess.prefill_tokens_per_s:g} tokens/s read"
        )
        yield f"  flags: {' '.join(answer.argv)}"
    yield from (f"  - {reason}" for reason in answer.why)


def bar(row: LedgerRow) -> str:
    """The device's memory as letters; an overfull device ends in `!`."""
    scale = BAR_WIDTH / max(1, row.capacity_bytes)
    text, upto = "", 0
    for letter, _, part in PARTS:
        upto += getattr(row, part)
        text += letter * (min(round(upto * scale), BAR_WIDTH + 1) - len(text))
    return text[: BAR_WIDTH - 1] + "!" if len(text) > BAR_WIDTH else text.ljust(BAR_WIDTH, ".")


def _parts(row: LedgerRow) -> str:
    held = [f"{letter} {_gib(getattr(row, part))}" for letter, _, part in PARTS if getattr(row, part)]
    return f"{', '.join(held)}; {_gib(row.free_bytes)} free above the reserve"


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}"
