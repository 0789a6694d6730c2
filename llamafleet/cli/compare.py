"""Several models, or quantisations of one, on the same machine: which is the best that it can serve?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llamafleet.model.gguf import Header
from llamafleet.planner.result import SCHEMA, Plan, Refusal


@dataclass(frozen=True)
class Option:
    """One model with what became of it. `problem`: why it could not be read, and then there is no answer."""

    source: str
    header: Header | None = None
    answer: Plan | Refusal | None = None
    problem: str = ""

    @property
    def weights_bytes(self) -> int:
        """Of all tensors; 0 where they are not known."""
        return self.header.weights_bytes if self.header else 0

    @property
    def bits_per_weight(self) -> float:
        """On average over all tensors."""
        elements = sum(tensor.elements for tensor in self.header.tensors) if self.header else 0
        return 8 * self.weights_bytes / elements if elements else 0.0

    @property
    def on_gpus(self) -> float:
        """The share of the planned weights that GPUs hold."""
        rows = self.answer.ledger if isinstance(self.answer, Plan) else ()
        total = sum(row.weights_bytes for row in rows)
        return sum(row.weights_bytes for row in rows[:-1]) / total if total else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """As predicted; 0 for what does not fit."""
        return self.answer.predicted.decode_tokens_per_s if isinstance(self.answer, Plan) else 0.0

    def serves(self, min_speed: float) -> bool:
        """Does it fit, and is it predicted to write that many tokens a second?"""
        return isinstance(self.answer, Plan) and self.decode_tokens_per_s >= min_speed


def best(options: Sequence[Option], min_speed: float) -> Option | None:
    """The one with the most bytes of weights, which is the nearest to the original, of those that serve."""
    serving = [option for option in options if option.serves(min_speed)]
    return max(serving, key=lambda one: (one.weights_bytes, one.decode_tokens_per_s), default=None)


def ordered(options: Sequence[Option]) -> list[Option]:
    """Largest first, those that could not be read last."""
    return sorted(options, key=lambda one: (-one.weights_bytes, one.source))


def short_names(sources: Sequence[str]) -> dict[str, str]:
    """What tells the sources apart: without what all begin with, up to a mark."""
    if len(sources) == 1:
        return {sources[0]: sources[0].rpartition("/")[2]}
    low, high = min(sources), max(sources)
    common = low[: next((at for at, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))]
    keep = max((common.rfind(mark) for mark in "/-._:"), default=-1) + 1
    return {source: source[keep:].removesuffix(".gguf") or source for source in sources}


def to_json(options: Sequence[Option], machine: str, min_speed: float) -> dict[str, Any]:
    """Schema 1: each plan is the plan contract's."""
    chosen = best(options, min_speed)
    return {
        "schema": SCHEMA,
        "fits": chosen is not None,
        "machine": machine,
        "min_speed_tokens_per_s": min_speed,
        "best": chosen.source if chosen else None,
        "compared": [
            {
                "model": option.source,
                "weights_bytes": option.weights_bytes,
                "bits_per_weight": round(option.bits_per_weight, 2),
                "problem": option.problem or None,
                "plan": option.answer.to_json() if option.answer else None,
            }
            for option in ordered(options)
        ],
    }
