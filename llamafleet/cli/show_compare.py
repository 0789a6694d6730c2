"""Compared models as a table for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llamafleet.cli.compare import Option, best, ordered, short_names
from llamafleet.cli.tables import GIB, PLAIN, Look, rate
from llamafleet.planner.result import Plan, Refusal

MIB = 1024**2
NAME_LIMIT = 40  # columns


def table(options: Sequence[Option], machine: str, min_speed: float, look: Look = PLAIN) -> str:
    """The whole table, without a trailing newline."""
    return "\n".join(_lines(options, machine, min_speed, look))


def _lines(options: Sequence[Option], machine: str, min_speed: float, look: Look) -> Iterator[str]:
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
