"""Names of architectures in the source of a release, against the pinned release and against what the ledger knows."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

from bench.adopting.change import Change
from llamafleet.model.architectures import ARCHITECTURES, PROJECTOR

NAMES_FILE = "src/llama-arch.cpp"
ROWS = "llamafleet/model/architectures.py"
_TABLE = re.compile(r"LLM_ARCH_NAMES\s*=\s*\{(.*?)\n\};", re.DOTALL)
_ROW = re.compile(r'\{\s*LLM_ARCH_(\w+)\s*,\s*"([^"]+)"\s*\}')
_NO_NAMES = frozenset({"(unknown)"})  # what llama.cpp prints for an unknown one


def known_architectures() -> frozenset[str]:
    """The architectures with a row of ours, and the projector's name, which is no model of its own."""
    return frozenset((*ARCHITECTURES, PROJECTOR))


def names(source: str) -> dict[str, str]:
    """The names in the text of src/llama-arch.cpp, each with its constant's (LLM_ARCH_...)."""
    table = _TABLE.search(source)
    rows = _ROW.findall(table[1]) if table else ()
    return {name: constant for constant, name in rows if name not in _NO_NAMES}


def source_of(constant: str, paths: Mapping[str, str]) -> str | None:
    """The file of the tree that builds the graph of LLM_ARCH_..., if it is named like that."""
    path = f"src/models/{constant.lower().replace('_', '-')}.cpp"
    return path if path in paths else None


def changes(pinned: Collection[str], theirs: Collection[str], known: frozenset[str]) -> Iterator[Change]:
    """New names, and names that are gone."""
    if not theirs:
        yield Change("LLM_ARCH_NAMES", f"a table in {NAMES_FILE}", "not found", "bench/adopting/architectures.py")
        return
    for name in sorted(set(theirs) - set(pinned)):
        yield Change(name, "not there", "new, without a row" if name not in known else "new, has a row", ROWS)
    for name in sorted({*pinned, *known} - set(theirs)):
        has_row = "has a row" if name in known else "has no row"
        yield Change(name, f"there, {has_row}", "gone: llama-server would not load it", ROWS)


def changed_sources(
    constants: Mapping[str, str], known: frozenset[str], pinned: Mapping[str, str], theirs: Mapping[str, str]
) -> list[str]:
    """Files that build a known architecture's graph and differ. `pinned`, `theirs`: hash by path."""
    paths = {source_of(constant, pinned) for name, constant in constants.items() if name in known}
    return sorted(path for path in paths if path and theirs.get(path) != pinned[path])
