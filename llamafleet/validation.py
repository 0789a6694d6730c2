"""Values from outside: the types that Pydantic checks them by, and its errors in our form of message.

A schema is a plain frozen dataclass. Pydantic checks what an operator or a host wrote, once, where it comes in; our own
code builds the same objects without that cost. Imports nothing of ours, so that settings/ and host/ can share it.
"""

from __future__ import annotations

import dataclasses
import difflib
import reprlib
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, GetCoreSchemaHandler, Strict, ValidationError
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError, core_schema

T = TypeVar("T")

# Strict: True is no whole number, 1 is no True, 1.0 is no 1 and b"x" is no text, unlike in Pydantic's default mode.
Whole = Annotated[int, Strict()]
Text = Annotated[str, Strict()]
Flag = Annotated[bool, Strict()]
# Python and JSON write a list, our frozen objects keep a tuple.
Listed = Annotated[
    tuple[T, ...], Strict(), BeforeValidator(lambda value: tuple(value) if type(value) is list else value)
]

SHOWN_CHARACTERS = 80  # of a value or key in a message: one line of a terminal, with the path before it
_PROBLEMS = "problems"  # the type of the errors that `refuse` raises
_KEY = "[key]"  # Pydantic's mark, in a location, for an error of a mapping's key


@dataclass(frozen=True)
class Should:
    """A rule for one value beside its type: what it should do or be, in words ("begin with /"), and the check."""

    what: str
    check: Callable[[Any], object]  # is it as it should be?

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Pydantic's protocol for annotations: check the type first, then this rule."""
        return core_schema.no_info_after_validator_function(self._checked, handler(source))

    def _checked(self, value: Any) -> Any:
        if not self.check(value):
            raise ValueError(self.what)
        return value


def one_of(names: Iterable[str]) -> Should:
    """The value is one of these names."""
    allowed = tuple(names)
    return Should(f"be one of {', '.join(allowed)}", allowed.__contains__)


def refuse(problems: Iterable[tuple[str, str]]) -> None:
    """For a validator over several fields: raise what is wrong, a path below the validated object and a sentence each.

    Does nothing where there are no problems.
    """
    if found := list(problems):
        raise PydanticCustomError(_PROBLEMS, "{problems}", {_PROBLEMS: found})


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a value from outside, and where."""

    path: str
    text: str

    def __str__(self) -> str:
        return f"{self.path}: {self.text}"


@dataclass(frozen=True)
class Vocabulary:
    """What the writer of a value calls its types, and how to supply a missing key, by the length of its path."""

    none: str
    flag: str
    text: str
    mapping: str
    mappings: str
    missing: Callable[[int], str] | None = None


JSON = Vocabulary("null", "true or false", "text", "an object", "objects")


def problems(error: ValidationError, schema: type, words: Vocabulary, root: str = "") -> Iterator[Problem]:
    """Every error as a problem: "path: should be ..., is ...". `root` names the validated object itself."""
    for one in error.errors(include_url=False):
        if one["type"] == "invalid_key":  # no text: the location ends with it
            one["loc"] = one["loc"][:-1]
        path = _path(root, one["loc"])
        if one["type"] == _PROBLEMS:
            yield from (Problem(_path(path, (below,)), text) for below, text in one["ctx"][_PROBLEMS])
        else:
            yield Problem(path, _sentence(one, _hints(schema, one["loc"]), words))


def _sentence(error: ErrorDetails, hints: list[Any], words: Vocabulary) -> str:
    """What is wrong, for an error at the last of these annotations."""
    kind, optional = error["type"], f" or {words.none}" if _is_optional(hints[-1]) else ""
    if kind == "unexpected_keyword_argument":
        return _unknown(str(error["loc"][-1]), hints[-2])
    if kind == "missing":
        depth = len(error["loc"])
        return f"missing; {words.missing(depth) if words.missing else f'should be {_noun(hints[-1], words)}'}"
    if kind in ("too_long", "string_too_long"):
        unit = "items" if kind == "too_long" else "characters"
        return f"should have at most {error['ctx']['max_length']} {unit}, has {len(error['input'])}"
    if kind in ("invalid_key", "string_unicode") and _noun(hints[-1], words) != words.text:
        return f"should have {words.text} as keys, has {shown(error['input'])}"
    if words is not JSON and _bare(hints[-1]) is bool and (meant := _meant(error["input"])) is not None:
        write = words.flag.split(" or ")[not meant]
        return f"should be {words.flag}{optional}, is {shown(error['input'])}: write {write}"
    # A value error is that of a `Should`.
    what = str(error["ctx"]["error"]) if kind == "value_error" else f"be {_noun(hints[-1], words)}"
    return f"should {what}{optional}, is {shown(error['input'])}{_as_list(error['input'], what, words)}"


def _as_list(value: object, what: str, words: Vocabulary) -> str:
    """What to write where a text was given for a list of strings; empty for anything else."""
    if words is JSON or not isinstance(value, str) or what != "be a list of strings":
        return ""
    return f": write {shown([item.strip() for item in value.split(',')])}"


def _meant(value: object) -> bool | None:
    """The flag that was written as a text, as other formats have it; None for anything else."""
    known = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    return known.get(value.lower()) if isinstance(value, str) else None


def _path(root: str, location: Iterable[int | str]) -> str:
    path = root
    for part in location:
        if part == _KEY:
            continue
        if isinstance(part, int):
            path += f"[{part}]"
        else:
            name = part if part and part.isprintable() and len(part) <= SHOWN_CHARACTERS else shown(part)
            path += f".{name}" if path else name
    return path


def _hints(schema: Any, location: Iterable[int | str]) -> list[Any]:
    """The annotation of every step from the schema to the location; None where the schema does not go so far."""
    hints = [schema]
    for part in location:
        # The mark of a key's error comes behind the key itself, whose step is taken for the value's.
        hints.append(typing.get_args(_bare(hints[-2]))[0] if part == _KEY else _below(_bare(hints[-1]), part))
    return hints


def _below(hint: Any, part: int | str) -> Any:
    arguments = typing.get_args(hint)
    if arguments:  # of a list or a mapping
        return arguments[0 if typing.get_origin(hint) is tuple else 1]
    return _fields(hint).get(str(part)) if isinstance(hint, type) else None


@cache
def _fields(schema: type) -> dict[str, Any]:
    """The annotations of a dataclass. Kept, since a broken answer may be wrong at some thousand places."""
    return typing.get_type_hints(schema, include_extras=True)


def _is_optional(hint: Any) -> bool:
    return isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union


def _option(hint: Any) -> Any:
    """The annotation without `| None`."""
    return next(option for option in typing.get_args(hint) if option is not type(None)) if _is_optional(hint) else hint


def _bare(hint: Any) -> Any:
    """The annotation without `| None` and `Annotated`."""
    hint = _option(hint)
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


def _noun(hint: Any, words: Vocabulary) -> str:
    """What the annotation takes, as its writer calls it."""
    base = _bare(hint)
    if typing.get_origin(base) is tuple:
        return f"a list of {_plural(_bare(typing.get_args(base)[0]), words)}"
    if base is int:
        return _whole_number(typing.get_args(_option(hint))[1:])
    return {bool: words.flag, str: words.text, float: "a number"}.get(base, words.mapping)


def _plural(item: Any, words: Vocabulary) -> str:
    return {str: "texts" if words.text == "text" else "strings", int: "whole numbers"}.get(item, words.mappings)


def _whole_number(extras: Iterable[Any]) -> str:
    """A whole number in the range of Pydantic's `Field(ge=, le=)`, in words."""
    bounds = {name: getattr(bound, name) for extra in extras for bound in getattr(extra, "metadata", ())
              for name in ("ge", "le") if hasattr(bound, name)}  # fmt: skip
    low, high = bounds.get("ge"), bounds.get("le")
    if low is not None and low == high:
        return str(low)
    if high is not None:
        return f"a whole number from {low} to {_round(high)}"
    return "a whole number" if low is None else f"a whole number of {low} or more"


def _round(number: int) -> str:
    """A large power of two as such: its digits say nothing."""
    large = number > 2**40 and number & (number - 1) == 0
    return f"2**{number.bit_length() - 1}" if large else str(number)


def _unknown(key: str, schema: Any) -> str:
    known = [field.name for field in dataclasses.fields(_bare(schema))]
    if meant := getattr(_bare(schema), "OTHER_NAMES", {}).get(key.lower().lstrip("-").replace("-", "_")):
        return f"unknown setting; {meant}"
    near = difflib.get_close_matches(key[:SHOWN_CHARACTERS], known, n=1)
    return f"unknown setting; {f'did you mean `{near[0]}`?' if near else 'known are ' + ', '.join(known)}"


def shown(value: object) -> str:
    """A value for a message, in one short line, whatever it is."""
    try:
        text = _REPR.repr(value)
    except (ValueError, RecursionError):  # a number of more digits than Python prints
        return f"{'an' if isinstance(value, int) else 'a'} {type(value).__name__} that is too large to print"
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 3]}..."


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = SHOWN_CHARACTERS
_REPR.maxlevel = 3
