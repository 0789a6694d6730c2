"""The sandbox's state folder, and common code of its modules: error, lock, paths, messages.

Everything is under the checkout's `.cache/sandbox/` (or $SANDBOX_DIR):

    root-KEY/tree      a Debian root; KEY is the hash of its inputs
    layer-KEY/upper    packages installed on top of a root
    debs/              package files that hosts and layers downloaded, for later use
    ssh/               one key pair, and known_hosts
    hosts/NAME/        spec.json, upper/ (the host's disk), log, debs/ ...
    lock               held by a command that changes the state

Running hosts are read from the cgroups (see cgroups.py), never from a file, so that nothing is wrong after a crash.
"""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]


class SandboxError(RuntimeError):
    """A disposable host cannot be made, started, found or removed; the message says why and what to do."""


@dataclass(frozen=True)
class State:
    """The folder of one sandbox. Each checkout has its own, and never changes hosts of another."""

    directory: Path

    @property
    def hosts(self) -> Path:
        return self.directory / "hosts"

    @property
    def debs(self) -> Path:
        return self.directory / "debs"

    @property
    def ssh_key(self) -> Path:
        return self.directory / "ssh" / "id_ed25519"

    @property
    def known_hosts(self) -> Path:
        return self.directory / "ssh" / "known_hosts"

    @property
    def inotify_before(self) -> Path:
        """The file with the machine's inotify limit before it was raised for the first host."""
        return self.directory / "inotify_before"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock, waiting for it if needed. The kernel releases it when the holder ends for any reason."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with (self.directory / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"another sandbox command holds {file.name}; waiting for it")
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


def current() -> State:
    """The state of this checkout.

    Raises SandboxError if the path cannot be part of the overlay file system's mount options.
    """
    directory = Path(os.environ.get("SANDBOX_DIR") or CHECKOUT / ".cache" / "sandbox").resolve()
    if set(":,\\") & set(str(directory)):
        raise SandboxError(
            f"{directory}: a comma, colon or backslash cannot be part of an overlay mount; "
            "set SANDBOX_DIR to another folder on a local disk"
        )
    return State(directory)


def say(message: str) -> None:
    """Print progress to stderr; stdout is for the output of `list` and `exec`."""
    print(f"sandbox: {message}", file=sys.stderr, flush=True)


def tail(file: Path, lines: int = 15) -> str:
    """The last lines of a log, indented, for an error message."""
    text = file.read_text(errors="replace") if file.exists() else ""
    return "".join(f"\n    {line}" for line in text.splitlines()[-lines:])
