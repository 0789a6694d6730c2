"""The form of messages about values from outside: path, what should be there, what is there, in one short line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pytest
from pydantic import Field, TypeAdapter, ValidationError

from llamafleet.validation import JSON, SHOWN_CHARACTERS, Flag, Listed, Should, Text, Whole, one_of, problems, shown

Key = Annotated[Text, Should("be lower case", str.islower)]


@dataclass(frozen=True)
class Part:
    size: Annotated[Whole, Field(ge=1, le=9)]
    kind: Annotated[Text, one_of(["a", "b"])] | None = None


@dataclass(frozen=True)
class Thing:
    parts: Listed[Part] = ()
    sizes: Listed[Whole] | None = None
    names: dict[Key, Part] | None = None
    on: Flag = False


def told(data):
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(Thing).validate_python(data)
    return [str(problem) for problem in problems(caught.value, Thing, JSON, "thing")]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "thing: should be an object, is []"),
        ({"parts": [{}]}, "thing.parts[0].size: missing; should be a whole number from 1 to 9"),
        ({"parts": [{"size": 1}, {"size": 10}]}, "thing.parts[1].size: should be a whole number from 1 to 9, is 10"),
        ({"parts": [{"size": 1, "kind": "c"}]}, "thing.parts[0].kind: should be one of a, b or null, is 'c'"),
        ({"parts": None}, "thing.parts: should be a list of objects, is None"),
        ({"sizes": "12"}, "thing.sizes: should be a list of whole numbers or null, is '12'"),
        ({"sizes": [1.0]}, "thing.sizes[0]: should be a whole number, is 1.0"),
        ({"names": {"A": {"size": 1}}}, "thing.names.A: should be lower case, is 'A'"),
        ({"names": {"a": 1}}, "thing.names.a: should be an object, is 1"),
        ({"names": {3: {"size": 1}}}, "thing.names[3]: should be text, is 3"),
        ({"on": 1}, "thing.on: should be true or false, is 1"),
    ],
)
def test_each_problem_is_a_path_and_a_sentence(data, message):
    assert told(data) == [message]


def test_all_problems_are_told():
    assert len(told({"parts": [{"size": 0}, 3], "on": None})) == 3


def _deep(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value


ODD = {"long": "x" * 10**6, "digits": 10**5000, "deep": _deep(5000), "many": list(range(10**5)),
       "unicode": {"k" * 999: "\ud800\n"}, "bytes": b"\0"}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_any_value_is_shown_in_one_short_line(name):
    text = shown(ODD[name])
    assert len(text) <= SHOWN_CHARACTERS and text.isprintable()
