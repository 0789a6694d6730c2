"""Texts from the Jinja templates in `templates/`; `llamafleet/service/unit.py` has the values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

import llamafleet

# A copy that travels with the package; in a checkout a link to `templates/`.
TEMPLATES = Path(llamafleet.__file__).resolve().parent / "data" / "templates"
_environment = Environment(
    loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    keep_trailing_newline=True, autoescape=False,  # noqa: S701 - units and scripts, not HTML
)  # fmt: skip


def render(template: str, values: Mapping[str, Any]) -> str:
    """The template of that file name with its values; raises where it names a value that is not given."""
    return _environment.get_template(template).render(values)
