"""With `--diff`: how the operator's chat templates, grammars and JSON schemas differ from those on the host.

They are no secrets, in contrast to the other credentials, which no diff shows.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator

from pyinfra.api.host import Host

from llamafleet.remote.common import INSTANCES, TEXTS
from llamafleet.service.desired import Desired
from llamafleet.service.instance_changes import CREDENTIALS, sha256
from tasks.lib import remote

LINES = 200  # of one file that are shown


def from_host(host: Host) -> Callable[[str], list[str]]:
    """A function that reads the lines of a file on the host; none where it cannot be read."""

    def read(path: str) -> list[str]:
        ok, out, _ = remote.run(host, remote.HostCommand(["cat", "--", path], purpose=f"read {path}"))
        return out if ok else []

    return read


def differences(desired: Desired, read: Callable[[str], list[str]]) -> Iterator[str]:
    """A unified diff for each text that the host has otherwise, or not. `read` gives the lines of the host's file."""
    for serving in desired.servings:
        installed = desired.installed.instances.get(serving.name)
        for name in TEXTS:
            text, there = serving.service.secrets.get(name), installed.secrets.get(name) if installed else None
            if there == (None if text is None else sha256(text)):
                continue
            path = f"{INSTANCES}/{serving.name}/{name}"
            old, new = read(path) if there else [], (text or "").splitlines()
            lines = list(difflib.unified_diff(old, new, "on the host", "to be", lineterm=""))
            more = [f"... {len(lines) - LINES} more lines"] if len(lines) > LINES else []
            # Line ends and blanks at the end of a line are no lines of a diff.
            shown = [*lines[:LINES], *more] or ["(in line ends alone)"]
            yield "\n".join([f"{serving.name}: {CREDENTIALS[name]}, {path}:", *shown])
