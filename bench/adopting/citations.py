"""Citations of llama.cpp's source in this project: `PATH, IDENTIFIER`, checked against the tree of a release.

PATH is the file's path from the root of llama.cpp, IDENTIFIER a function, type, constant or field in it; several are
joined by a comma or "and". What has neither an underscore nor a `::` counts as a word of the sentence; a function whose
name has neither is cited as `CLASS::NAME`. `IDENTIFIER in PATH` and `IDENTIFIER of PATH` are read too. Line numbers are
no citation: they change with every release.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("llamafleet", "tasks", "sandbox", "bench", "templates", "inventory", "docs", "tests/oracle")
KINDS = frozenset({".py", ".md", ".j2", ".yaml"})
# Files of others that are named: headers of CUDA, ROCm, glibc, Linux, Vulkan and NVML, and our own C.
FOREIGN = frozenset({
    "cuda_runtime.h", "cublas_v2.h", "host_config.h", "math_functions.h", "hip_version.h", "hipblas.h", "rocblas.h",
    "mathcalls.h", "vulkan_core.h", "nvml.h", "seccomp.h", "proc_ns.h", "fs.h", "pciids.h", "sched.h",
    "fake_nvml.c", "fake_vulkan.c", "hollow.c", "socket-proxyd.c",
})  # fmt: skip
PROJECT = "llama.cpp"  # the name of the project, and of a file in src/models

_GAP = r"(?:[ \t]*\n[ \t]*(?:#[ \t]*)?|[ ])"  # a blank, or the next line of a comment or docstring
_FILE = r"(?<![\w/.@:-])(?:[\w.-]+/)*[\w-]+\.(?:cpp|hpp|cuh|cu|c|h)(?![\w/-])|(?<![\w/.-])(?:[\w.-]+/)*CMakeLists\.txt"
_WORD = r"`?(?P<{}>[A-Za-z_]\w*(?:::~?\w+)*)(?:\(\))?`?(?![\w./:-]*/|\.[a-z])"
_CITED = re.compile(rf"(?P<path>{_FILE})(?P<line>:\d+)?")
_NEXT = re.compile(rf"(?:,|{_GAP}and){_GAP}(?:and{_GAP})?{_WORD.format('name')}")
_BEFORE = re.compile(rf"(?P<name>[A-Za-z_]\w*(?:::\w+)*)(?:\(\))?`?{_GAP}(?:in|of){_GAP}`?$")
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_CMAKE_COMMENT = re.compile(r"#[^\n]*")


@dataclass(frozen=True)
class Citation:
    """A file of llama.cpp that this project names, and the identifiers that it is named for."""

    place: str  # here, with the line
    path: str
    names: tuple[str, ...]
    has_line: bool  # it gives a line number

    @property
    def is_pattern(self) -> bool:
        """It stands for many files, as src/models/ARCHITECTURE.cpp does."""
        return Path(self.path).stem.isupper()


def find(text: str, place: str) -> Iterator[Citation]:
    """The citations in one of our files."""
    for match in _CITED.finditer(text):
        path = match["path"]
        name = Path(path).name
        if name in FOREIGN or (name == PROJECT and not path.endswith(f"models/{PROJECT}")):
            continue
        before = _BEFORE.search(text[max(0, match.start() - 200) : match.start()])
        names = [before["name"]] if before else []
        end = match.end()
        while after := _NEXT.match(text, end):
            names.append(after["name"])
            end = after.end()
        line = text.count("\n", 0, match.start()) + 1
        code = tuple(name for name in names if _is_code(name))
        yield Citation(f"{place}:{line}", path, code, match["line"] is not None)


def _is_code(name: str) -> bool:
    return "_" in name or "::" in name


def in_project(folders: Collection[str] = FOLDERS, root: Path = ROOT) -> Iterator[Citation]:
    """The citations in all our files below these folders."""
    for folder in folders:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in KINDS:
                yield from find(path.read_text(), path.relative_to(root).as_posix())


def problems(citations: Iterable[Citation], paths: Collection[str], read: Callable[[str], str]) -> Iterator[str]:
    """What does not hold in a tree of llama.cpp with these files, a sentence each."""

    @cache
    def code(path: str) -> str:
        comment = _CMAKE_COMMENT if path.endswith(".txt") else _COMMENT
        return comment.sub("", read(path))

    for citation in citations:
        if citation.has_line:
            yield f"{citation.place}: {citation.path} is cited by line: name a function, as in `{citation.path}, NAME`"
        if citation.path not in paths:
            if not citation.is_pattern:
                yield f"{citation.place}: llama.cpp has no file {citation.path}{_nearest(citation.path, paths)}"
            continue
        for name in citation.names:
            if not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", code(citation.path)):
                yield f"{citation.place}: {citation.path} has no {name}"


def _nearest(path: str, paths: Collection[str]) -> str:
    ends = sorted(other for other in paths if other.endswith(f"/{path}"))
    return f"; should be {' or '.join(ends)}" if ends else ""
