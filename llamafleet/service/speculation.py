"""What the gate of an instance needs to know of its speculation, from the service's command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llamafleet.service.trial import value_of


def guessing(kind: str, argv: Sequence[str]) -> dict[str, Any]:
    """plan.json's `gate.speculation`: the kind, the tokens that are guessed at once, and the type of the draft's cache.

    `kind`: the setting; `argv`: the whole command line.
    """
    lengths = "--spec-ngram-mod-n" if kind == "ngram" else "--spec-draft-n"
    most, least = (int(value_of(argv, f"{lengths}-{end}") or 0) for end in ("max", "min"))
    key, value = (value_of(argv, f"--spec-draft-type-{part}") for part in "kv")
    return {"kind": kind, "most": most, "least": least, "kv_type": key if key == value else f"{key}/{value}"}
