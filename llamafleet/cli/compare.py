"""Compare several models, or the quantisations of one model, on the same machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llamafleet.model.gguf import Header
from llamafleet.planner.result import SCHEMA, Plan, Refusal


@dataclass(frozen=True)
class Option:
    """One model with its plan or refusal. If its header could not be read, `problem` says why, and `result` is None."""

    source: str
    header: Header | None = None
    result: Plan | Refusal | None = None
    problem: str = ""

    @property
    def weights_bytes(self) -> int:
        """Bytes of all tensors; 0 if the header could not be read."""
        return self.header.weights_bytes if self.header else 0

    @property
    def bits_per_weight(self) -> float:
        """The average over all tensors; 0 if the header could not be read."""
        elements = sum(tensor.elements for tensor in self.header.tensors) if self.header else 0
        return 8 * self.weights_bytes / elements if elements else 0.0

    @property
    def on_gpus(self) -> float:
        """The share of the planned weights that is on GPUs, 0 to 1."""
        rows = self.result.ledger if isinstance(self.result, Plan) else ()
        total = sum(row.weights_bytes for row in rows)
        return sum(row.weights_bytes for row in rows[:-1]) / total if total else 0.0

    @property
    def tokens_per_s(self) -> float:
        """The predicted speed of writing, or of reading where nothing is written; 0 if the model does not fit."""
        return self.result.predicted.tokens_per_s if isinstance(self.result, Plan) else 0.0

    def serves(self, min_speed: float) -> bool:
        """Does the model fit, and is it predicted to do at least `min_speed` tokens a second?"""
        return isinstance(self.result, Plan) and self.tokens_per_s >= min_speed


def best(options: Sequence[Option], min_speed: float) -> Option | None:
    """Of the options that fit and are fast enough, the one with the most bytes of weights: it is the nearest to the
    unquantised model. None if no option serves."""
    serving = [option for option in options if option.serves(min_speed)]
    return max(serving, key=lambda option: (option.weights_bytes, option.tokens_per_s), default=None)


def ordered(options: Sequence[Option]) -> list[Option]:
    """The largest option first; options whose header could not be read are last."""
    return sorted(options, key=lambda option: (-option.weights_bytes, option.source))


def short_names(sources: Sequence[str]) -> dict[str, str]:
    """A short name by source: without the beginning that all sources share (up to one of "/-._:") and without .gguf."""
    if len(sources) == 1:
        return {sources[0]: sources[0].rpartition("/")[2]}
    low, high = min(sources), max(sources)
    pairs = enumerate(zip(low, high, strict=False))
    common = low[: next((position for position, (a, b) in pairs if a != b), len(low))]
    start = max((common.rfind(mark) for mark in "/-._:"), default=-1) + 1
    return {source: source[start:].removesuffix(".gguf") or source for source in sources}


def to_json(options: Sequence[Option], machine: str, min_speed: float) -> dict[str, Any]:
    """The comparison as JSON, schema 1; each `plan` follows the plan contract. `min_speed` is tokens/s."""
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
                "plan": option.result.to_json() if option.result else None,
            }
            for option in ordered(options)
        ],
    }
