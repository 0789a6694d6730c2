"""What the programs on a host and the operator's side share: paths, names of units and credentials, small readers.

Contract: a module, no program. On a host it lies beside the programs (`import common`); on the operator's side it is
`llamafleet.remote.common`. It imports nothing of ours. Readers change nothing; where nothing can be read, they return
an empty value, unless their docstring names an error. `replace_file` and `write_json` replace one file as a whole, and
what they have written survives a power cut. Python 3.8, standard library.

Decision 20: docs/decisions/0020-what-comes-from-outside-is-bounded.md.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import tempfile
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Set  # Python 3.8's own are not generic

# --- paths ------------------------------------------------------------------------------------

OPT = "/opt/llamafleet"  # programs
HELPERS = OPT + "/helpers"  # a folder for each version of these programs, and the link `current`
RELEASES = OPT + "/releases"  # a folder for each build of llama.cpp, by its key
CURRENT = OPT + "/current"  # the link to the current release

ETC = "/etc/llamafleet"
INSTANCES = ETC + "/instances"  # a folder for each instance: plan.json and its credentials

VAR = "/var/lib/llamafleet"
MODELS = VAR + "/models"
BUILD = VAR + "/build"  # build trees
SOURCE = VAR + "/src"  # llama.cpp's checkout
JOBS = VAR + "/jobs"  # what detached work is asked, its log and its exit code
STAGED = VAR + "/staged"  # an instance's new files before the switch
GOOD = VAR + "/good"  # an instance's last files that passed the gate
GATES = VAR + "/gate"  # the records of the gate and of the liveness check
TUNED = VAR + "/tuned"  # the records of tunes

RUN = "/run/llamafleet"
LOCK = RUN + "/lock.json"

GATEWAY = ETC + "/gateway"  # a folder for each configuration, by its digest, and the link `current`
GATEWAY_UNIT = "llamafleet-gateway.service"
GATEWAY_RUN = RUN + "/gateway"  # what the gateway forgets at a boot: its sockets, the servers' state, who is drained
GATEWAY_SOCKET = GATEWAY_RUN + "/admin.sock"  # for root: HAProxy's runtime API
GATEWAY_STATE = GATEWAY_RUN + "/servers.state"  # as HAProxy writes and reads it

MONITORING = ETC + "/monitoring"  # a folder for each configuration, by its digest, and the link `current`
PROMETHEUS_UNIT, EXPORTER_UNIT = "llamafleet-prometheus.service", "llamafleet-node-exporter.service"
METRICS_UNIT, METRICS_TIMER = "llamafleet-metrics.service", "llamafleet-metrics.timer"
METRICS = RUN + "/metrics"  # what metrics.py writes for node-exporter

UNITS = "/etc/systemd/system"
CACHES = "/var/cache"  # a folder for each service, by its unit's CacheDirectory=

# Our folders with their modes; all are root's.
FOLDERS = {
    OPT: 0o755, HELPERS: 0o755, RELEASES: 0o755, VAR: 0o755, MODELS: 0o755, JOBS: 0o750,
    STAGED: 0o700, GOOD: 0o700, GATES: 0o755, ETC: 0o755, INSTANCES: 0o755, RUN: 0o755,
}  # fmt: skip
MODEL_MODE = 0o644  # the service's user reads it, root alone changes it

JOURNAL_PART_BYTES = 4 * 2**20  # a server logs its devices and sizes in the first 100 kB of a start
JSON_LIMIT_BYTES = 16 * 2**20  # of a file of ours: plan.json, the largest, has some ten thousand bytes


SUMS = "helpers.sha256"  # in a folder of helpers: the sums of its files, as sha256sum writes them


def helpers_damage(folder: str) -> Optional[str]:
    """The first file of a folder of helpers that is missing, not what was installed, or may be changed by others than
    root; None where all are as they should be."""
    lines = (read_file(f"{folder}/{SUMS}") or b"").decode("utf-8", "replace").splitlines()
    wanted = [line.split("  ", 1) for line in lines if "  " in line]
    if not any(name == "common.py" for _, name in wanted):
        return f"{folder}/{SUMS}"
    paths = {f"{folder}/{name}": digest for digest, name in wanted}
    bad = (path for path, digest in paths.items() if not is_own_file(path) or sha256_of(path) != digest)
    return next(bad, None)


def is_own_file(path: str) -> bool:
    """Whether this is a file, no link, that belongs to whoever runs this, and that nobody else may change."""
    try:
        found = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022


def helper(program: str, key: str = "current") -> str:
    """Where an installed program of ours lies: of the helpers of this version, or of the newest."""
    return f"{HELPERS}/{key}/{program}"


def plan_path(instance: str) -> str:
    """Where the record of an installed instance lies."""
    return f"{INSTANCES}/{instance}/plan.json"


def gate_record(instance: str) -> str:
    """Where the gate keeps what it measured of an instance."""
    return f"{GATES}/{instance}.json"


def tuned_path(instance: str) -> str:
    """What a tune of an instance measured, and what won."""
    return f"{TUNED}/{instance}.json"


def liveness_record(instance: str) -> str:
    """Where the liveness check counts its restarts. In a folder: `m.liveness` is the name of another instance."""
    return f"{GATES}/liveness/{instance}.json"


def may_lead_elsewhere(path: str) -> bool:
    """Whether a folder of ours may be a link to one on another disk."""
    return path in (OPT, RELEASES, VAR, MODELS, BUILD, SOURCE) or os.path.dirname(path) == MODELS


# --- names ------------------------------------------------------------------------------------

USER = "llamafleet"
MADE_BY = "# Made by llamafleet"  # the first line of every unit that we made begins so
PREFIX, SUFFIX = "llama-server-", ".service"
LIVENESS = ("-liveness.service", "-liveness.timer")  # ends of the names of an instance's liveness units
DEMAND = "llamafleet-demand-"  # begins the names of the units before a server that starts on demand
# The credentials of a unit, and the files of an instance's folder that hold them.
API_KEYS, TLS_CERTIFICATE, TLS_KEY = "api-keys", "tls-certificate", "tls-key"
SECRETS = (API_KEYS, TLS_CERTIFICATE, TLS_KEY)
# Files of the operator's that are no secrets. They are credentials too: a service sees nothing of our folders.
CHAT_TEMPLATE, GRAMMAR, JSON_SCHEMA = "chat-template", "grammar", "json-schema"
TEXTS = (CHAT_TEMPLATE, GRAMMAR, JSON_SCHEMA)
LOADED = (*SECRETS, *TEXTS)


def unit_of(instance: str) -> str:
    return PREFIX + instance + SUFFIX


def instance_of(unit: str) -> str:
    return unit[len(PREFIX) : -len(SUFFIX)]


def liveness_units(instance: str) -> List[str]:
    """The service and the timer of an instance's liveness check."""
    return [PREFIX + instance + end for end in LIVENESS]


def demand_units(instance: str) -> List[str]:
    """The socket at which clients reach a server that starts on demand, and the service that hands their connections
    on. No instance can have such a unit's name."""
    return [f"{DEMAND}{instance}.socket", f"{DEMAND}{instance}.service"]


def is_on_demand(instance: str) -> bool:
    """Whether the installed instance is one that starts on demand."""
    return os.path.lexists(f"{UNITS}/{demand_units(instance)[0]}")


def server_folder(instance: str) -> str:
    """The folder that a unit on demand makes for its server's own socket, by its RuntimeDirectory=."""
    return f"/run/{PREFIX}{instance}"


def server_socket(instance: str) -> str:
    """Where a server on demand listens itself. llama-server takes what ends in .sock for such a path."""
    return f"{server_folder(instance)}/http.sock"


def transient_unit(purpose: str, name: str) -> str:
    """A unit of ours that has no file: "job", "verify" or "preflight" for a job or an instance.

    The probe knows these names, and so does not take their GPU memory for somebody else's.
    """
    return f"llamafleet-{purpose}-{name}.service"


# --- what comes from outside --------------------------------------------------------------------

# A model's file: part of paths, of a unit's command line and of a job's name. No blank, quote, bracket or slash.
MODEL_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=-]{0,200}\.[Gg][Gg][Uu][Ff]")
MODEL_FILE_RULE = "letters, digits and . _ + = - only, a letter, digit or _ first, .gguf last, 206 characters at most"
ADDRESS_RULE = "an http(s) address without blanks, quotes, backslashes or @, 4096 characters at most"
_ADDRESS = re.compile(r"https?://[^\s\"\\\x00-\x20\x7f@]+")
_LARGEST = 2**63 - 1  # of a signed file offset


def whole_number(text: Optional[str], most: int = _LARGEST) -> Optional[int]:
    """The number that ASCII digits say; None for any other text and for a number above `most`."""
    found = re.fullmatch(r"\s*([0-9]{1,20})\s*", text or "")
    number = int(found.group(1)) if found else most + 1
    return number if number <= most else None


def is_model_file(name: object) -> bool:
    """Whether a model's file may have this name, without a folder; see MODEL_FILE_RULE."""
    return isinstance(name, str) and MODEL_FILE.fullmatch(name) is not None


def file_name(source: str) -> str:
    """The name of the file that a model's source names: the last part of a path, of an address or behind hf:."""
    from urllib.parse import unquote, urlsplit

    if source.startswith("hf:"):
        return source.partition("@")[0].rpartition("/")[2]
    if not source.startswith(("http://", "https://")):
        return source.rpartition("/")[2]
    try:
        return unquote(urlsplit(source).path.rpartition("/")[2])
    except ValueError:
        return ""


def is_address(text: object) -> bool:
    """Whether every program of ours can read this address; see ADDRESS_RULE. Port and host name are checked too."""
    from urllib.parse import urlsplit

    if not isinstance(text, str) or len(text) > 4096 or not _ADDRESS.fullmatch(text):
        return False
    try:
        text.encode()  # not a surrogate
        parts = urlsplit(text)
        host = parts.hostname or ""
        # `port` raises ValueError unless it is from 0 to 65535, `encode` where a label is empty or has over 63 bytes.
        return parts.port != 0 and 0 < len(host) <= 253 and bool(host.encode("idna"))
    except ValueError:  # UnicodeError is one
        return False


def keeps_secrets(address: str) -> bool:
    """Whether nobody between can read what is sent there: it is https, or an address of this machine itself."""
    import ipaddress
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(address)
        host = parts.hostname or ""
        return parts.scheme == "https" or host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def unit_words(command: Sequence[str]) -> List[str]:
    """The words of a command for systemd-run: systemd replaces variables in them, and $$ is a dollar."""
    return [word.replace("$", "$$") for word in command]


# --- what is written in files ---------------------------------------------------------------------

# Numbers of the forms of our records. A record without a number was made before it was read.
PLAN_SCHEMA, GATE_SCHEMA, RELEASE_SCHEMA = 1, 1, 1


# Of plan.json the keys that make a difference to the running service; their hash is its `identity`.
IDENTITY_KEYS = ("schema", "name", "source", "release", "commit", "backend", "files", "gate", "cpus", "numa_nodes",
                 "environment")  # fmt: skip


def identity_of(record: Mapping[str, Any]) -> str:
    """The hash of these keys, 16 hexadecimal digits."""
    named = {key: record[key] for key in IDENTITY_KEYS if key in record}
    return sha256(json.dumps(named, sort_keys=True).encode())[:16]


def is_as_written(record: Mapping[str, Any]) -> bool:
    """Whether plan.json has the identity that it was written with. `public_identity` is that of a record whose source
    was shortened."""
    return bool(record.get("public_identity", record.get("identity")) == identity_of(record))


def later_schema(record: Dict[str, Any], known: int) -> Optional[str]:
    """Why a record cannot be read: a later version of llamafleet made it. None where its form is known."""
    number = record.get("schema", 1)
    if isinstance(number, int) and number <= known:
        return None
    return f"it has schema {number!r}, and this llamafleet knows up to {known}: use the llamafleet that made it"


# Directives that systemd takes over from a unit file by daemon-reload, or that count at the next start alone. A unit
# that differs from the wanted one in these alone is replaced while its server runs on.
QUIET = frozenset((
    "Description", "Documentation", "Wants", "After", "RequiresMountsFor", "StartLimitIntervalSec", "StartLimitBurst",
    "AssertFileNotEmpty", "AssertPathExists", "ExecCondition", "ExecStartPre", "ExecStartPost", "TimeoutStartSec",
    "TimeoutStopSec", "Restart", "RestartSec", "RestartSteps", "RestartMaxDelaySec", "LogRateLimitIntervalSec",
    "LogRateLimitBurst", "UnsetEnvironment",
))  # fmt: skip
# Lines that count at the next start alone, of directives of which other lines do not: see inherited.py.
QUIET_LINES = frozenset(("Environment=XDG_CONFIG_HOME=/dev/null", "InaccessiblePaths=-/etc/llama.cpp"))

# Directives that keep an instance from reading the keys of another one, which runs as the same user: from its memory
# and its files in /proc, and from our folders. The preflight may drop them only where the host has no other instance.
APART = frozenset(("PrivateUsers", "ProtectProc", "InaccessiblePaths"))


def core_of_unit(text: str, dropped: Sequence[str] = ()) -> str:
    """The lines of a unit that a running server depends on: without comments, `QUIET` directives, and the directives
    of [Service] in `dropped`. Continued lines are joined."""
    section, lines = "", []
    for line in _whole_lines(text):
        section = line if line.startswith("[") else section
        quiet = line in QUIET_LINES or line.partition("=")[0].rstrip() in QUIET
        if line and not quiet and not (section == "[Service]" and line in dropped):
            lines.append(line)
    return "\n".join(lines)


def _whole_lines(text: str) -> Iterator[str]:
    """As systemd reads them: comments left out, also between the parts of a continued line."""
    begun = ""
    for line in text.split("\n"):
        if line.lstrip().startswith(("#", ";")):
            continue
        if line.endswith("\\"):
            begun += line[:-1] + " "
            continue
        yield (begun + line).strip()
        begun = ""


def without_directives(unit: str, lines: Sequence[str]) -> str:
    """The unit with these lines as comments, as the preflight drops directives."""
    gone = set(lines)
    note = "# Dropped by the preflight (see plan.json): "
    return "\n".join(note + line if line in gone else line for line in unit.split("\n"))


def is_as_verified(path: str, record: Mapping[str, Any], owner: Optional[int] = None) -> bool:
    """Whether a model file is the one that FILE.verified describes: as large and as old, a file of `owner` (None: of
    whoever runs this) that everybody may read and nobody else change, and not touched since. Any change of a file's
    content, mode or owner sets its ctime, which no program can set back."""
    try:
        file, note = os.lstat(path), os.stat(path + ".verified")
    except OSError:
        return False
    same = (file.st_size, file.st_mtime_ns) == (record.get("size_bytes"), record.get("mtime_ns"))
    mode_and_owner = (stat.S_IMODE(file.st_mode), file.st_uid) == (MODEL_MODE, os.geteuid() if owner is None else owner)
    return stat.S_ISREG(file.st_mode) and same and mode_and_owner and file.st_ctime_ns <= note.st_ctime_ns


# --- systemd ----------------------------------------------------------------------------------

# Where systemd looks for a unit's drop-ins: the operator's, and those of `systemctl edit --runtime` and `set-property`.
RUN_UNITS, CONTROL, RUN_CONTROL = "/run/systemd/system", "/etc/systemd/system.control", "/run/systemd/system.control"


def drop_in_folders(unit: str) -> List[str]:
    """Where drop-ins of this unit alone may lie."""
    return [f"{folder}/{unit}.d" for folder in (UNITS, RUN_UNITS, CONTROL, RUN_CONTROL)]


def drop_ins(unit: str) -> List[str]:
    """The drop-ins of this unit alone that are on the disk, whether systemd has read them or not."""
    return [f"{folder}/{name}" for folder in drop_in_folders(unit) for name in listing(folder)
            if name.endswith(".conf")]  # fmt: skip


def systemctl(*words: str, check: bool = True) -> None:
    """Run systemctl. Raises CalledProcessError where it fails; without `check` a failure is silent."""
    subprocess.run(["systemctl", *words], check=check, stderr=None if check else subprocess.DEVNULL)


def show(unit: str, *properties: str, seconds: Optional[float] = None) -> Dict[str, str]:
    """Properties of a unit as systemd writes them. Raises OSError or SubprocessError where it cannot be asked."""
    done = subprocess.run(["systemctl", "show", "--property=" + ",".join(properties), unit],
                          stdout=subprocess.PIPE, text=True, check=True, timeout=seconds)  # fmt: skip
    return dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)


# PROC_PID_INIT_INO (include/linux/proc_ns.h): the namespace of process ids that is no container's.
INITIAL_PIDS = "pid:[4026531836]"


def sees_all_processes(link: str = "/proc/self/ns/pid") -> bool:
    """Whether this process's ids are the kernel's own, which drivers tell: not in a container."""
    try:
        return os.readlink(link) == INITIAL_PIDS
    except OSError:
        return True


def running_jobs() -> Set[str]:
    """The names of jobs whose unit systemd has."""
    begin, end = transient_unit("job", "*").split("*")
    lines = output_of(["systemctl", "list-units", "--all", "--plain", "--no-legend", f"{begin}*{end}"]).splitlines()
    units = [line.split()[0] for line in lines if line.strip()]
    return {unit[len(begin) : -len(end)] for unit in units if unit.startswith(begin) and unit.endswith(end)}


def invocation(unit: str) -> str:
    """systemd's id of the unit's present start. Raises as `show` does."""
    return show(unit, "InvocationID").get("InvocationID", "")


def journal(*options: str) -> str:
    """The text of the journal's messages that the options of journalctl select.

    Of a long text, such as that of a server that ran for months, JOURNAL_PART_BYTES of its beginning and of its end.
    """
    reading = subprocess.Popen(["journalctl", "--quiet", "--no-pager", "--output=cat", *options],
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)  # fmt: skip
    out = reading.stdout
    assert out is not None
    with reading:
        first, last = out.read(JOURNAL_PART_BYTES), b""
        for block in iter(lambda: out.read(JOURNAL_PART_BYTES), b""):
            last = (last + block)[-JOURNAL_PART_BYTES:]
    return (first + last).decode("utf-8", "replace")


def journal_of_start(start: str) -> str:
    """All that a unit logged in one start, which `invocation` names."""
    return journal("_SYSTEMD_INVOCATION_ID=" + start)


# --- programs and files -------------------------------------------------------------------------


def output_of(command: Sequence[str], seconds: Optional[float] = 30.0, only_success: bool = False) -> str:
    """The command's stdout; empty where it cannot run or takes longer, with `only_success` also where it fails."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              timeout=seconds, env={**os.environ, "LC_ALL": "C.UTF-8"})  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "" if only_success and done.returncode else done.stdout.decode("utf-8", "replace")


def command_line(pid: int | str) -> List[str]:
    """The program and the arguments of a process; empty where there is no such process."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().decode("utf-8", "surrogateescape").split("\0")[:-1]
    except OSError:
        return []


def listing(folder: str) -> List[str]:
    """The names in a folder in order, hidden ones left out."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError:
        return []


def read_json(path: str) -> Dict[str, Any]:
    """The JSON object of a file; empty where there is none, or more than JSON_LIMIT_BYTES."""
    try:
        with open(path, "rb") as file:
            found = json_object(file.read(JSON_LIMIT_BYTES + 1))
    except OSError:
        return {}
    return found or {}


def json_object(text: bytes) -> Optional[Dict[str, Any]]:
    """The JSON object that a text is; None for any other text, and for one of more than JSON_LIMIT_BYTES."""
    try:
        found = json.loads(text) if len(text) <= JSON_LIMIT_BYTES else None
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def write_json(path: str, value: Dict[str, Any]) -> None:
    """Replace the file by this JSON object; its folder is made where it is missing."""
    make_folder(os.path.dirname(path))
    replace_file(path, (json.dumps(value, indent=1) + "\n").encode())


def replace_file(path: str, data: bytes, mode: int = 0o644) -> None:
    """Give the file this content at once and durably: a reader sees the old file or the new one, never a part, also
    after a power cut. Raises OSError, and then the old file is as it was."""
    folder = os.path.dirname(path) or "."
    make_way(path)
    # A name that nobody else has; hidden, so that systemd and `listing` pass it over.
    file, temporary = tempfile.mkstemp(prefix=f".{os.path.basename(path)[:200]}.", dir=folder)
    try:
        _fill(file, data, mode)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync(folder)


def write_file(path: str, data: bytes, mode: int = 0o644) -> None:
    """Write a file that nobody reads yet, and sync it. Its name survives a power cut after `sync`."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    _fill(os.open(path, flags, 0o600), data, mode)


def _fill(file: int, data: bytes, mode: int) -> None:
    try:
        left = memoryview(data)
        while left:
            left = left[os.write(file, left) :]
        os.fchmod(file, mode)
        os.fsync(file)
    finally:
        os.close(file)


def replace_link(path: str, target: str) -> None:
    """Let the link point there at once and durably. Raises OSError, and then it points where it did."""
    folder, name = os.path.split(path)
    part = f"{folder}/.{name}"
    make_way(path)
    if os.path.lexists(part):
        os.unlink(part)
    os.symlink(target, part)
    os.replace(part, path)
    sync(folder)


def make_way(path: str) -> None:
    """Set a folder aside that lies where a file or a link belongs: what is in it is not ours, so it is not removed."""
    if os.path.isdir(path) and not os.path.islink(path):
        set_aside(path)


def set_aside(path: str) -> str:
    """Rename what lies there to `.NAME.rejected` beside it, in place of what was set aside before; that name."""
    folder, name = os.path.split(path)
    aside = f"{folder}/.{name}.rejected"
    if os.path.isdir(aside) and not os.path.islink(aside):
        shutil.rmtree(aside)
    elif os.path.lexists(aside):
        os.unlink(aside)
    os.rename(path, aside)
    os.utime(aside, follow_symlinks=False)  # what is set aside goes after a while, from now on
    return aside


def sync(path: str | os.PathLike[str]) -> None:
    """Let what is in a file, or the names in a folder, survive a power cut. Raises OSError."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: str, mode: int = 0o755) -> None:
    """Make a folder with those above it, where they are missing, so that they survive a power cut. Raises OSError."""
    if os.path.isdir(path):
        return
    parent = os.path.dirname(path)
    make_folder(parent)
    os.mkdir(path, mode)
    sync(parent)


def sha256(data: bytes) -> str:
    """In hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def read_file(path: str) -> Optional[bytes]:
    """The content of a file; None where there is none, or where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return None


def sha256_of(path: str) -> Optional[str]:
    """The SHA-256 of a file in hexadecimal digits; None where it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                digest.update(block)
    except OSError:
        return None
    return digest.hexdigest()
