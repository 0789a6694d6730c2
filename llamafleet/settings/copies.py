"""Copies of an instance: `copies = 2` is NAME-1 and NAME-2, with ports counted up."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

PER_GPU = "per_gpu"
MOST_COPIES = 256
LONGEST_NAME, LAST_PORT = 63, 65535


def copies(value: object) -> object:
    """A number of copies, or "per_gpu". Raises ValueError with what it should be."""
    number = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST_COPIES
    if number or value == PER_GPU:
        return value
    raise ValueError('be a number from 1 to 256, or "per_gpu"')


@dataclass(frozen=True)
class Asked:
    """An instance's name and port, and how many copies it has; None: it is served as it is."""

    name: str
    port: int
    count: int | None

    def places(self) -> Iterator[tuple[int | None, str, int]]:
        """Of the instance, or of each copy: its number, name and port."""
        if self.count is None:
            yield None, self.name, self.port
        for number in range(1, (self.count or 0) + 1):
            yield number, f"{self.name}-{number}", self.port + number - 1


def clashes(instances: Sequence[Asked]) -> Iterator[tuple[str, str]]:
    """Instances of a host share its unit names and its ports: the key and a sentence for each clash, or copy that has
    none."""
    names: dict[str, str] = {}
    ports: dict[int, str] = {}
    for position, one in enumerate(instances):
        for number, name, port in one.places():
            where = f"models[{position}]"
            of = "" if number is None else f"copy {number} of {one.name!r} would "
            whose = f"{name!r}" if number is None else f"{name!r}, copy {number} of {one.name!r}"
            if len(name) > LONGEST_NAME:
                yield f"{where}.name", f"{of}be {name!r}, which has more than {LONGEST_NAME} characters"
            if port > LAST_PORT:
                yield f"{where}.copies", f"{of}have port {port}: ports are counted up from {one.port}, to {LAST_PORT}"
            if name in names:
                said = f"{name!r} is used twice" if not of and names[name] == f"{name!r}" else ""
                yield f"{where}.name", said or f"{of or f'{name!r} '}has the name of {names[name]}"
            if port in ports:
                counted = f"{of}have port {port}, counted up from {one.port}, which" if of else f"{port}"
                yield f"{where}.port", f"{counted} is already the port of {ports[port]}"
            names.setdefault(name, whose)
            ports.setdefault(port, whose)


def model_of(name: str, models: Container[str]) -> str:
    """The model whose instance or copy has this name; the name itself where none of these models has."""
    model, _, number = name.rpartition("-")
    return model if name not in models and model in models and number.isdecimal() else name
