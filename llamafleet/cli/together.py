"""Plan several models that one machine serves at the same time: each takes its memory before the next is planned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llamafleet.cli import tables
from llamafleet.planner.result import SCHEMA, Plan, Refusal


def text(models: Sequence[str], results: Sequence[Plan | Refusal], machine: str, look: tables.Look) -> str:
    """The plans one after another, and what is left of each device; without a trailing newline."""
    parts = [look.wrapped(f"{len(models)} models together on {machine}")]
    for number, (model, result) in enumerate(zip(models, results, strict=True), 1):
        parts.append(tables.table(result, f"{number}. {model}", look))
    refused = [number for number, result in enumerate(results, 1) if isinstance(result, Refusal)]
    names = ", ".join(map(str, refused))
    parts.append(look.wrapped(f"REFUSED: {names} of {len(models)}" if refused else f"all {len(models)} fit together"))
    return "\n".join(parts)


def to_json(
    models: Sequence[str], results: Sequence[Plan | Refusal], machine: str, companions: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The plans as JSON, schema 1; each `plan` follows the plan contract. `companions`: of each the keys of
    `beside.to_json`."""
    return {
        "schema": SCHEMA,
        "fits": all(result.fits for result in results),
        "machine": machine,
        "together": [
            {"model": model, "plan": {**result.to_json(), **beside}}
            for model, result, beside in zip(models, results, companions, strict=True)
        ],
    }
