"""Run one command in a transient unit that may do little.

Contract: a module, no program. `run(unit, command, directives, seconds)` starts the command in a unit with these
directives, waits for its end, and returns exit status, standard output and standard error. A directive that this
systemd does not know is left out. Raises NotStarted where systemd cannot start the unit at all. `TIGHT` are directives
that leave no capability, a file system to read alone, and little of the kernel. Root, systemd with its bus, the
standard library, Python 3.8; common.py beside it.

docs/hardening.md has the exposure of every unit that is made here.
"""

from __future__ import annotations

import os
import re
import subprocess
from typing import IO, Dict, List, NamedTuple, Optional, Sequence, Set, Tuple

from common import show, systemctl, transient_unit, unit_words

# What no program of ours and no llama-server needs to tell its version or to talk to a server. PrivateUsers is not
# among it: where user namespaces are forbidden, as in many containers, a unit with it does not start.
TIGHT = (
    "NoNewPrivileges=yes", "CapabilityBoundingSet=", "AmbientCapabilities=",
    "ProtectSystem=strict", "ProtectHome=yes", "PrivateTmp=yes", "PrivateMounts=yes", "PrivateIPC=yes",
    "ProtectKernelTunables=yes", "ProtectKernelModules=yes", "ProtectKernelLogs=yes", "ProtectControlGroups=yes",
    "ProtectClock=yes", "ProtectHostname=yes",
    "RestrictNamespaces=yes", "RestrictRealtime=yes", "RestrictSUIDSGID=yes", "LockPersonality=yes",
    "SystemCallArchitectures=native", "SystemCallFilter=@system-service", "SystemCallFilter=~@privileged @resources",
    "SystemCallErrorNumber=EPERM",
    "KeyringMode=private", "RemoveIPC=yes", "UMask=0077", "LimitCORE=0", "LimitFSIZE=64M", "TasksMax=256",
)  # fmt: skip
# Of a program that needs no network, no device and no other process, such as one that tells its version.
ALONE = (
    "DynamicUser=yes", "PrivateNetwork=yes", "PrivateDevices=yes", "ProtectProc=invisible",
    "RestrictAddressFamilies=AF_UNIX", "IPAddressDeny=any", "MemoryMax=4G", "MemorySwapMax=0",
)  # fmt: skip
VERSION_SECONDS = 60
# More output than any of these programs has.
MOST_OUTPUT = 4 << 20
# Messages of systemd-run about a directive that this systemd does not know.
UNKNOWN = re.compile(r"(?:Unknown assignment: |Cannot set property )(\w+)")
STOP_SECONDS = 5
TIMED_OUT = 124


class NotStarted(Exception):
    """systemd does not start the unit, or cannot set up its directives; the text says why."""


class Result(NamedTuple):
    code: int
    stdout: bytes
    stderr: str


# Directives that were found to be unknown here.
_unknown: Set[str] = set()


def properties(*more: str) -> List[str]:
    """The directives of a unit, as systemd-run takes them and as a unit file has them."""
    return [*TIGHT, *more]


def user(nsswitch: str = "/etc/nsswitch.conf") -> str:
    """A user for a program that asks systemd: one who exists for that time alone, where the bus can look up its name
    (libnss-systemd); else nobody, since the bus refuses users without a name."""
    try:
        with open(nsswitch) as file:
            sources = [line.split() for line in file if line.startswith("passwd:")]
    except OSError:
        sources = []
    return "DynamicUser=yes" if any("systemd" in one for one in sources) else "User=nobody"


def words(unit: str, command: Sequence[str], directives: Sequence[str], environment: Dict[str, str]) -> List[str]:
    """The command line that runs `command` in the unit."""
    known = [one for one in directives if one.partition("=")[0] not in _unknown]
    return [
        "systemd-run", "--quiet", "--pipe", "--wait", f"--unit={unit}", "--property=Type=exec",
        *(f"--property={one}" for one in known),
        *(f"--setenv={name}={value}" for name, value in environment.items()),
        "--", *unit_words(command),
    ]  # fmt: skip


def run(
    unit: str, command: Sequence[str], directives: Sequence[str], seconds: float,
    environment: Optional[Dict[str, str]] = None,
) -> Result:  # fmt: skip
    """Run the command in the unit; raises NotStarted."""
    forget(unit)  # of a run that was killed
    timed = [*directives, f"RuntimeMaxSec={seconds:.0f}", f"TimeoutStopSec={STOP_SECONDS}"]
    # In memory: a full disk must not keep a server from its start.
    with os.fdopen(os.memfd_create("out"), "w+b") as out, os.fdopen(os.memfd_create("err"), "w+b") as err:
        try:
            done = subprocess.run(words(unit, command, timed, environment or {}), stdin=subprocess.DEVNULL, stdout=out,
                                  stderr=err, timeout=seconds + 3 * STOP_SECONDS)  # fmt: skip
            started = done.returncode == 0 or was_started(unit)
        except OSError as error:
            raise NotStarted(f"systemd-run: {error}") from error
        except subprocess.TimeoutExpired:  # systemd itself hangs
            return Result(TIMED_OUT, b"", f"{unit} does not end within {seconds:.0f} s")
        finally:
            forget(unit)
        said = head(err).decode("utf-8", "replace")
        unknown = UNKNOWN.search(said)
        if not started and unknown and unknown[1] not in _unknown:
            _unknown.add(unknown[1])
            return run(unit, command, directives, seconds, environment)
        if not started:
            raise NotStarted(f"{unit} cannot be started: {said.strip()[-300:]}")
        return Result(done.returncode, head(out), said)


def was_started(unit: str) -> bool:
    """Whether the command of a unit that has failed was executed. It is systemd that says so: the command itself, which
    may be in the hands of whoever made it fail, cannot look like one that was not."""
    try:
        since = show(unit, "ActiveEnterTimestampMonotonic", seconds=30.0).get("ActiveEnterTimestampMonotonic", "")
    except (OSError, subprocess.SubprocessError):
        return True
    return since not in ("", "0")


def forget(unit: str) -> None:
    """Stop the unit, if it runs, and have systemd forget its failure."""
    for verb in ("stop", "reset-failed"):
        systemctl("--quiet", verb, unit, check=False)


def head(file: IO[bytes]) -> bytes:
    """The first MOST_OUTPUT bytes of a file."""
    file.seek(0)
    return file.read(MOST_OUTPUT)


# Runs a command as nobody where systemd cannot: without a way back, but with the whole system to read.
AS_NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs", "--bounding-set=-all")


def version_of(server: str) -> Tuple[int, str]:
    """Exit status and output of `llama-server --version`, which never runs as root."""
    environment = {"HOME": "/tmp", "XDG_CACHE_HOME": "/tmp"}  # noqa: S108 -- a private one
    command = [server, "--version"]
    try:
        done = run(
            transient_unit("version", str(os.getpid())), command, properties(*ALONE), VERSION_SECONDS, environment
        )
    except NotStarted as error:
        print(f"note: {error}; {server} runs as nobody, but without further hardening", flush=True)
        try:
            plain = subprocess.run([*AS_NOBODY, *command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, timeout=VERSION_SECONDS)  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as failed:
            return 1, str(failed)
        return plain.returncode, plain.stdout[:MOST_OUTPUT].decode("utf-8", "replace")
    return done.code, done.stdout.decode("utf-8", "replace") + done.stderr
