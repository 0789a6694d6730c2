"""What the gate of an instance needs to know of its speculation, from the service's command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llamafleet.planner.speculation import length_flags
from llamafleet.service.trial import value_of


def guessing(kind: str, argv: Sequence[str]) -> dict[str, Any]:
    """plan.json's `gate.speculation`: the kind, the tokens that are guessed at once, and the type of the draft's cache.

    `kind`: the setting; `argv`: the whole command line.
    """
    most, least = (int(value_of(argv, flag) or 0) for flag in length_flags(kind))
    key, value = (value_of(argv, f"--spec-draft-type-{part}") for part in "kv")
    return {"kind": kind, "most": most, "least": least, "kv_type": key if key == value else f"{key}/{value}"}
