"""Flags of llama-server: those that this project passes, allows or refuses, against the `--help` of another release."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.adopting.change import Change
from llamafleet.settings import extra_flags

ROOT = Path(__file__).resolve().parents[2]
TABLES = "llamafleet/settings/extra_flags.py"
DEFINITIONS = "common/arg.cpp"  # in the tree of llama.cpp
# Flags of git and of our own command only.
OTHERS = ("llamafleet/remote/git_pack.py", "llamafleet/cli/beside.py", "llamafleet/cli/on_inventory.py",
          "tasks/report.py")  # fmt: skip
PLANNED = ("llamafleet/planner/flags.py", "llamafleet/service/command.py")  # llama-server's flags only
_NAMES = re.compile(r"(-{1,2}[A-Za-z][\w.-]*)(?:,\s+(?=-))?")
# Not short ones of one letter: those are other programs'.
_LITERAL = re.compile(r"--[a-z][\w.-]*|-[a-z]\w+")
_GROUP = re.compile(r'\{\s*((?:"-[\w.-]+"\s*,?\s*)+)\}')
_REMOVED = "the argument has been removed"


@dataclass(frozen=True)
class Flag:
    """A flag as `llama-server --help` lists it."""

    names: tuple[str, ...]  # all its spellings, the negated ones too
    takes_value: bool
    is_removed: bool = False  # listed only to say what replaced it

    @property
    def name(self) -> str:
        """The first long spelling, or the first one if all are short."""
        return next((name for name in self.names if name.startswith("--")), self.names[0])


def parse(text: str) -> list[Flag]:
    """Read the output of `llama-server --help`."""
    return [_flag(line) for line in text.splitlines() if line.startswith("-") and _NAMES.match(line)]


def _flag(line: str) -> Flag:
    names, end = [], 0
    while match := _NAMES.match(line, end):
        names.append(match[1])
        end = match.end()
    rest = line[end:]  # one blank and the value's name, or the blanks before the description, or nothing
    return Flag(tuple(names), rest.startswith(" ") and not rest.startswith("  "), _REMOVED in rest)


def groups(source: str) -> list[tuple[str, ...]]:
    """The spellings of each flag in the text of common/arg.cpp, whichever program has it."""
    return [tuple(re.findall(r'"([^"]+)"', match[1])) for match in _GROUP.finditer(source)]


def passed(root: Path = ROOT) -> dict[str, str]:
    """Words of llamafleet/ and tasks/ that look like a flag, each with the module that has it."""
    found: dict[str, str] = {}
    modules = [
        path.relative_to(root).as_posix()
        for folder in ("llamafleet", "tasks")
        for path in root.glob(f"{folder}/**/*.py")
    ]
    for where in sorted(set(modules) - {TABLES, *OTHERS}, key=lambda where: (where not in PLANNED, where)):
        for node in ast.walk(ast.parse((root / where).read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and _LITERAL.fullmatch(node.value):
                found.setdefault(node.value, where)
    return found


def used(pinned: Iterable[tuple[str, ...]], root: Path = ROOT) -> dict[str, str]:
    """Every flag of llama-server that this project passes or classifies, with the module to look at.

    A word that looks like a flag counts as one of llama-server if the pinned release has it, or if it stands in a
    module that has no other program's flags.
    """
    there = {name for group in pinned for name in group}
    tables = dict.fromkeys(
        (*extra_flags.SAFE, *extra_flags.DANGEROUS, *extra_flags.OWN_PLACE, *extra_flags.PLANNED, *extra_flags.REFUSED),
        TABLES,
    )
    return tables | {name: where for name, where in passed(root).items() if name in there or where in PLANNED}


def takes_value() -> dict[str, bool]:
    """The flags of which this project says whether a value follows."""
    return extra_flags.SAFE | {name: takes for name, (takes, _) in extra_flags.DANGEROUS.items()}


def changes(
    pinned: list[tuple[str, ...]], theirs: list[Flag], ours: Mapping[str, str], values: Mapping[str, bool]
) -> Iterator[Change]:
    """Flags that are gone, that take a value now or no longer, and new ones that nobody has classified.

    `pinned`: spellings by flag in the pinned common/arg.cpp; `theirs`: the other release's `--help`.
    """
    there = {name: flag for flag in theirs if not flag.is_removed for name in flag.names}
    for name in sorted(ours):
        if name not in there:
            yield Change(name, "a flag of llama-server", _successor(name, pinned, there), ours[name])
        elif name in values and values[name] != there[name].takes_value and name == there[name].name:
            yield Change(name, _value(values[name]), _value(not values[name]), ours[name])
    known = {name for group in pinned for name in group} | set(ours)
    for flag in theirs:
        if not flag.is_removed and not known & set(flag.names):
            yield Change(", ".join(flag.names), "not there", "new, not classified", TABLES)


def _successor(name: str, pinned: list[tuple[str, ...]], there: Mapping[str, Flag]) -> str:
    """What the other release calls it, judged by the pinned release's other spellings of the flag."""
    for group in pinned:
        for other in group if name in group else ():
            if other in there:
                return f"gone; its spelling {other} is now one of {there[other].name}"
    return "gone"


def _value(takes: bool) -> str:
    return "a value follows" if takes else "no value follows"
