"""A report as one HTML page with everything in it: no script, and nothing that a browser would fetch.

The charts are drawn here by Vega-Lite, which `vl-convert-python` brings, as inline SVG. It is an extra of the package,
since nothing else needs it. Names of models and hosts come from outside: Jinja escapes each text, and the page's own
policy forbids scripts.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from llamafleet.cli.report import Page
from llamafleet.printable import one_line
from tasks.lib.templates import TEMPLATES

DRAWS = "vl_convert"
MISSING = (
    "the charts of a report need the package vl-convert-python, which is not installed: "
    'pip install "llamafleet[report]", or pip install "vl-convert-python>=1.9"'
)
NOT_DRAWN = "This chart cannot be drawn; its numbers are below."
MOST_OPEN = 8  # hosts that are shown unfolded
MOST_LABEL = 200  # characters of a text in a chart, of which some 40 have room
_OUTSIDE_BMP = re.compile("[^\\u0000-\\uffff]")
_SVG = re.compile(r'<svg [^>]*viewBox="([\d. -]+)"[^>]*>')
_ROOT = r'<svg class="chart" aria-hidden="true" viewBox="\1">'  # what it shows is said beside it
# Half of what Vega writes is for scripts and readers that this page leaves out, or draws nothing.
_IDLE = re.compile(r'<path class="(?:back|fore)ground"[^<>]*/>')
_ELEMENT = re.compile(r"<[^<>]*>")  # in texts both are escaped
_NOTES = re.compile(r' (?:class="mark-[^"]*"|role="[^"]*"|aria-[a-z]+="[^"]*"|pointer-events="none"|opacity="1")')
_DIGITS = re.compile(r"(\.\d)\d+")  # of coordinates, which have 15


class CannotDrawError(Exception):
    """There is nothing that draws charts; the text says what to install."""


def check() -> None:
    """Raise CannotDrawError unless charts can be drawn."""
    if importlib.util.find_spec(DRAWS) is None:
        raise CannotDrawError(MISSING)


def html(page: Page) -> str:
    """The whole page. Raises CannotDrawError."""
    check()
    return _environment().get_template("report.html.j2").render(page=page, is_open=len(page.hosts) <= MOST_OPEN)


def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        autoescape=True, finalize=_shown, keep_trailing_newline=True,
    )  # fmt: skip
    made.filters["drawn"] = drawn
    return made


def _shown(value: Any) -> Any:
    """A text from outside without characters that hide or turn what follows them."""
    return one_line(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def drawn(chart: Mapping[str, Any]) -> Markup:
    """The chart as an SVG element, which takes its size and its colours from the page; a sentence where Vega fails."""
    import vl_convert

    try:
        text = vl_convert.vegalite_to_svg(json.dumps(_cleaned(chart)), allowed_base_urls=[])
    except ValueError:  # a text that no test has: the rest of the page is shown
        return escape(NOT_DRAWN)
    text = _ELEMENT.sub(_shortened, _IDLE.sub("", text))
    return Markup(_SVG.sub(_ROOT, text, count=1))  # noqa: S704 -- Vega escapes the texts


def _shortened(found: re.Match[str]) -> str:
    return _DIGITS.sub(r"\1", _NOTES.sub("", found[0]))


def _cleaned(value: Any) -> Any:
    """The chart with texts that can be drawn; the table beside it has all of each. At a control character what draws
    would end this process, and Vega cuts a long text within a character of two UTF-16 units, which is an error."""
    if isinstance(value, Mapping):
        return {key: _cleaned(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_cleaned(one) for one in value]
    return _OUTSIDE_BMP.sub("\ufffd", one_line(value[:MOST_LABEL])) if isinstance(value, str) else value
