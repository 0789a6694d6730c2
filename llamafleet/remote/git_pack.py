"""One commit of a git repository as a pack: made from a path on one machine, unpacked on the same one or another.

Contract: a module, no program. It imports the standard library alone, since the operator's side imports it too. git is
on the path. A pack has the commit, its tree and its files, without the commits before it, as a shallow fetch has.
Python 3.8.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from typing import IO, Dict, Iterator, List

# The repository of another user is read all the same: nothing in it is run.
TRUST = ("-c", "safe.directory=*", "-c", "core.fsmonitor=false")


class Failed(Exception):
    """git does not do it; the text has git's own last line."""


def environment() -> Dict[str, str]:
    return {**os.environ, "GIT_TERMINAL_PROMPT": "0", "GIT_NO_LAZY_FETCH": "1", "LC_ALL": "C.UTF-8"}


def git(repository: str, *words: str) -> List[str]:
    return ["git", *TRUST, "-C", repository, *words]


def commit_of(repository: str, ref: str) -> str:
    """The 40 digits of the commit that a tag, branch or commit names; `Failed` where the repository has none."""
    words = git(repository, "rev-parse", "--quiet", "--verify", "--end-of-options", ref + "^{commit}")
    done = subprocess.run(words, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, timeout=60, check=False)  # fmt: skip
    if done.returncode:
        raise Failed(_last(done.stderr) or f"it has no tag, branch or commit {ref!r}")
    return done.stdout.decode().strip()


@contextlib.contextmanager
def of_commit(repository: str, commit: str) -> Iterator[IO[bytes]]:
    """An open file with the commit's pack. Raises `Failed` and OSError."""
    with tempfile.TemporaryFile() as names, tempfile.TemporaryFile() as pack:
        _run(git(repository, "rev-list", "--objects", "--no-walk", commit), names, None)
        names.seek(0)
        _run(git(repository, "pack-objects", "-q", "--stdout", "--threads=1"), pack, names)
        pack.seek(0)
        yield pack


def unpack(folder: str, pack: IO[bytes], commit: str) -> None:
    """Put a pack into the repository of `folder`; the commits before the commit count as left out. Raises `Failed`."""
    with tempfile.TemporaryFile() as out:
        _run(git(folder, "index-pack", "--stdin"), out, pack)
    shallow = os.path.join(folder, ".git", "shallow")
    lines = set()
    with contextlib.suppress(FileNotFoundError), open(shallow) as file:
        lines = set(file.read().split())
    with open(shallow + ".new", "w") as file:
        file.write("".join(f"{one}\n" for one in sorted({*lines, commit})))
    os.replace(shallow + ".new", shallow)


def _run(words: List[str], out: IO[bytes], given: "IO[bytes] | None") -> None:
    done = subprocess.run(words, env=environment(), stdin=given or subprocess.DEVNULL, stdout=out,
                          stderr=subprocess.PIPE, check=False)  # fmt: skip
    if done.returncode:
        verb, place = words[len(TRUST) + 3], words[len(TRUST) + 2]
        raise Failed(f"git {verb} fails in {place}: {_last(done.stderr) or f'exit code {done.returncode}'}")


def _last(text: bytes) -> str:
    lines = text.decode("utf-8", "replace").strip().splitlines()
    return next((line[:300] for line in lines if line.startswith("fatal: ")), lines[-1][:300] if lines else "")
