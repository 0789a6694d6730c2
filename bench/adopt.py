"""What a release of llama.cpp changes for this project: `make adopt REF=bNNNNN`.

Builds llama-server of that release for the CPU and prints, against the pinned release: flags, architectures, head sizes
of flash attention, numbers that are repeated here, citations, and the memory of every layout and architecture against
the ledger. The report and all figures are also written to .cache/adopt/REF/.

Exit: 0 the report is complete, whatever it says; 1 the release could not be had or built; 2 bad arguments.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from bench.adopting import architectures, attention, citations, constants, flags, memory, source
from bench.adopting.change import Change
from sandbox import oracle, upstream

HELP_TIMEOUT_SECONDS = 60


@dataclass(frozen=True)
class Release:
    """A release's source, and what is read from it."""

    source: oracle.Source

    def read(self, path: str) -> str:
        """The text of one of its files; "" if it has none at that path."""
        return source.read(self.source, path)

    @cached_property
    def files(self) -> Mapping[str, str]:
        """The hash of each file's content, by path."""
        return source.files(self.source)

    @cached_property
    def architectures(self) -> Mapping[str, str]:
        """The constant of each architecture, by its name."""
        return architectures.names(self.read(architectures.NAMES_FILE))

    @property
    def head_sizes(self) -> tuple[frozenset[int], frozenset[str]]:
        """Of flash attention in ggml-cuda: sizes of K heads, and pairs that have a kernel."""
        return attention.head_sizes(self.read(attention.FILE)), attention.instances(self.files)


def main(argv: Sequence[str] | None = None) -> int:
    """Fetch, build, compare, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ref", metavar="bNNNNN", help="the tag of a release")
    parser.add_argument("--jobs", type=int, default=2, help="compiler processes, and questions asked at once")
    given = parser.parse_args(argv)
    try:
        pinned, other = Release(source.obtain(upstream.TAG)), Release(source.obtain(given.ref))
        built = oracle.build(given.jobs, other.source)
        sections = dict(cheap(pinned, other, built.llama_server))
        with tempfile.TemporaryDirectory() as folder:
            figures = memory.figures(built, Path(folder), given.jobs)
    except (source.SourceError, oracle.OracleError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    sections["memory"] = list(memory.changes(figures, partial(changed_source, pinned, other)))
    text = "\n".join(report(given.ref, sections, [*memory.summary(figures), *differing(pinned, other)]))
    folder_of = source.FOLDER / given.ref
    folder_of.mkdir(parents=True, exist_ok=True)
    (folder_of / "report.txt").write_text(text + "\n")
    memory.write(figures, folder_of / "figures.csv")
    print(text)
    return 0


def cheap(pinned: Release, other: Release, server: Path) -> Iterator[tuple[str, list[Change]]]:
    """The sections that ask for no memory: flags by `--help`, all else from the source."""
    known = architectures.known_architectures()
    spellings = flags.groups(pinned.read(flags.DEFINITIONS))
    ours = flags.used(spellings)
    theirs = flags.parse(help_of(server))
    yield "flags", list(flags.changes(spellings, theirs, ours, flags.takes_value()))
    yield "architectures", list(architectures.changes(pinned.architectures, other.architectures, known))
    yield "flash attention", list(attention.changes(pinned.head_sizes, other.head_sizes))
    yield "numbers", list(constants.changes(other.read))
    cited = list(citations.in_project())
    before = set(citations.problems(cited, pinned.files, pinned.read))
    gone = [problem for problem in citations.problems(cited, other.files, other.read) if problem not in before]
    yield "citations", [Change(*_cited(problem)) for problem in gone]


def help_of(server: Path) -> str:
    """What `llama-server --help` prints. Raises OracleError."""
    done = subprocess.run([server, "--help"], capture_output=True, text=True, timeout=HELP_TIMEOUT_SECONDS, check=False)
    if done.returncode != 0:
        raise oracle.OracleError(f"{server} --help ended with {done.returncode}: {done.stderr[-800:]}")
    return done.stdout


def changed_source(pinned: Release, other: Release, architecture: str) -> str:
    """Whether the source file of an architecture's graph differs, in words; "" if it does not."""
    constant = pinned.architectures.get(architecture, "")
    path = architectures.source_of(constant, pinned.files)
    return f"{path} differs" if path and other.files.get(path) != pinned.files[path] else ""


def differing(pinned: Release, other: Release) -> Iterator[str]:
    """A line with the source files of known architectures that differ, for who reads llama.cpp's changes."""
    known = architectures.known_architectures()
    differ = architectures.changed_sources(pinned.architectures, known, pinned.files, other.files)
    if differ:
        yield f"{len(differ)} source files of architectures with a row differ: {', '.join(differ)}"


def report(ref: str, sections: Mapping[str, Sequence[Change]], last: Sequence[str]) -> Iterator[str]:
    """The whole report, line by line."""
    count = sum(map(len, sections.values()))
    yield f"llama.cpp {ref} against {upstream.TAG}: {f'{count} changes' if count else 'nothing changed'}"
    for name, changes in sections.items():
        if changes:
            yield ""
            yield f"{name} ({len(changes)})"
            yield from (f"  {one.what}: {one.before} -> {one.after} [{one.look_at}]" for one in changes)
    yield ""
    yield from last


def _cited(problem: str) -> tuple[str, str, str, str]:
    place, _, what = problem.partition(": ")
    return place, "holds", what, place.partition(":")[0]


if __name__ == "__main__":
    sys.exit(main())
