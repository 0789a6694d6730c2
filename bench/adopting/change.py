"""One thing that a release of llama.cpp changes for this project."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Change:
    """A row of the report."""

    what: str  # a flag, an architecture, a constant, a layout's compute buffer
    before: str  # with the pinned release, or what this project says
    after: str  # with the other release
    look_at: str  # the file of this project to open first
