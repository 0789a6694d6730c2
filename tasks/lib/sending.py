"""Sending programs and files to a host: by standard input, to programs of root's that compare a SHA-256. Nothing
passes through a name that another user of the host could guess or replace.

Decision 11: docs/decisions/0011-secrets-never-travel-in-the-open.md.
"""

from __future__ import annotations

import base64
import hashlib
import json
import platform
from collections.abc import Mapping, Sequence

from pyinfra.api.host import Host

from llamafleet import payload
from llamafleet.hub.network import Network
from llamafleet.remote.common import HELPERS
from tasks.lib import lookups, remote

# Printed where the host does not have our helpers of this version.
_NO_HELPERS = "llamafleet-no-helpers"
# $0 is that, $1 Python, $2 the folder of the helpers, $3 the program; its arguments follow. Helpers that are not what
# their sums say, as after a power cut, are not run.
_INSTALLED = """\
python=$1; shift
cd "$1" 2>/dev/null && [ -s "$2" ] &&
    { [ ! -e helpers.sha256 ] || sha256sum --status -c helpers.sha256 2>/dev/null; } || { echo "$0"; exit 0; }
program=$1/$2; shift 2; cd /; exec "$python" -s -E -B "$program" "$@"
"""


def run_helper(
    host: Host,
    name: str,
    *arguments: str,
    purpose: str,
    seconds: float = remote.COMMAND_SECONDS,
    network: Network | None = None,
) -> tuple[bool, list[str], list[str]]:
    """Run a program of this very version: the installed one, or, where the host has another version, a damaged one or
    none, one from a copy that leaves nothing behind. So a bare host can be read and locked, too. `network` is the way
    by which pip fetches what that copy needs. Raises as `remote.run` does, and `payload.PayloadError`."""
    folder = f"{HELPERS}/{lookups.helpers_key()}"
    words = ["sh", "-c", _INSTALLED, _NO_HELPERS, remote.PYTHON, folder, name, *arguments]
    command = remote.HostCommand(words, purpose=purpose, seconds=seconds)
    ok, out, err = remote.run(host, command)
    if out[-1:] != [_NO_HELPERS]:
        return ok, out, err
    return run_copy(host, name, *arguments, purpose=purpose, seconds=seconds, network=network)


def run_copy(
    host: Host,
    name: str,
    *arguments: str,
    purpose: str,
    seconds: float = remote.COMMAND_SECONDS,
    network: Network | None = None,
) -> tuple[bool, list[str], list[str]]:
    """Run a program from a copy that is sent along and leaves nothing behind. Raises as `run_helper` does."""
    arch = architecture(host)
    way = network or Network()
    programs = lookups.once(("probe", arch, way), lambda: payload.probe_zip(arch, environment=way.environment()))
    return remote.run(host, copied(programs, name, *arguments, purpose=purpose, seconds=seconds))


def copied(archive: bytes, name: str, *arguments: str, purpose: str, seconds: float) -> remote.HostCommand:
    """The command that runs a program of an archive of programs, which goes to its standard input."""
    asked = payload.probe_command(hashlib.sha256(archive).hexdigest(), name, *arguments, python=remote.PYTHON)
    # Beside its own time, the time to send a few hundred kB over a slow line.
    return remote.HostCommand(asked, purpose=purpose, seconds=seconds + 60, stdin=base64.b64encode(archive).decode())


def packed(files: Sequence[tuple[int, bytes]]) -> str:
    """Modes and contents of files for standard input, as `llamafleet/remote/receive.py` reads them."""
    text = json.dumps([[mode, base64.b64encode(data).decode()] for mode, data in files])
    return f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}"


def with_modes(texts: Mapping[str, str], secrets: Mapping[str, str]) -> dict[str, tuple[int, bytes]]:
    """Mode and content of each file by name: `secrets` are for root alone."""
    modes = {name: (0o644, text.encode()) for name, text in texts.items()}
    return modes | {name: (0o600, text.encode()) for name, text in secrets.items()}


def received(files: Mapping[str, tuple[int, bytes]], *options: str) -> remote.HostCommand:
    """The command that writes files on the host, by path: mode and content."""
    return remote.program("receive.py", *options, *files, stdin=packed(list(files.values())))


def architecture(host: Host) -> str:
    """The host's processor architecture, as the kernel names it."""
    ok, out, err = remote.run(host, remote.HostCommand(["uname", "-m"], purpose="uname"))
    if not ok:
        raise remote.RemoteError(f"cannot run commands on the host: {remote.explain(out, err)}")
    return out[-1].strip() if out else platform.machine()
