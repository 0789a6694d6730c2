"""How our programs travel to a host: pinned wheels and `llamafleet/remote/*.py` in one zip.

Runs on the operator's machine. The wheels come from the operator's package index once, by pip and
with the hashes of `locks/remote.txt`, and from the cache from then on; the hosts need no index.

Decision 14: docs/decisions/0014-hosts-need-no-python-packages.md.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "locks" / "remote.txt"
REMOTE = ROOT / "llamafleet" / "remote"

# Oldest Python on a host that all the locked wheels run on; the probe with its two runs on 3.8 (`_SCRIPT`).
HELPERS_PYTHON = (3, 9)

# Packages whose wheel is compiled, so that there is one for each architecture. Their stable-ABI wheel
# runs on every CPython; of all the others the pure wheel is taken, though a faster one may exist.
NATIVE = frozenset({"psutil"})
PROBE_PACKAGES = frozenset({"psutil", "nvidia-ml-py"})
# The survey reads what is installed and asks its siblings: the probe, the toolkits, the lock. What uninstalls
# cannot be among the helpers that it removes.
PROBE_PROGRAMS = (
    *("probe.py", "probe_cpu.py", "probe_files.py", "probe_vulkan.py"),
    *("probe_gpus.py", "probe_gpu_common.py", "probe_nvidia.py", "probe_amd.py"),
    *("survey.py", "ground.py", "lock.py", "releases.py", "toolkits.py", "uninstall.py"),
    *("common.py", "packages.py"),  # which those above share
)
# Not needed to run the probe on Linux.
_PROBE_LEAVES_OUT = re.compile(r"\.dist-info/|^example\.py$|^psutil/(tests/|_ps(aix|bsd|osx|sunos|windows)\.py$)")

# The C library a wheel may need, oldest first: Debian 11, Ubuntu 20.04 and RHEL 8 have 2.28 and later.
_PLATFORMS = ("manylinux2010", "manylinux2014", "manylinux_2_28")
ARCHITECTURES = ("x86_64", "aarch64")

# Where the probe may unpack itself: psutil's library cannot be mapped from a noexec mount.
UNPACK_PLACES = ("/tmp", "/var/tmp", "/run", "/dev/shm", "$HOME")  # noqa: S108 -- mktemp -d makes a private folder
PYTHON_MISSING = "llamafleet: python3 not found"
PYTHON_OLD = "llamafleet: python3 is older than 3.8:"


class PayloadError(RuntimeError):
    """Something to send cannot be had; the text names it and the next step."""


def default_cache() -> Path:
    """Where wheels are kept: `.cache/wheels` in a checkout, else the user's cache directory."""
    if (ROOT / ".git").exists():
        return ROOT / ".cache" / "wheels"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llamafleet" / "wheels"


def wheels(arch: str, lock: Path = LOCK, cache: Path | None = None) -> list[Path]:
    """The locked wheels for a host's architecture, by package name; raises PayloadError.

    Every wheel's SHA-256 is compared with the lock on each use. Without network once cached.
    """
    if arch not in ARCHITECTURES:
        raise PayloadError(f"no wheels for architecture {arch!r}: only {' and '.join(ARCHITECTURES)} are supported")
    requirements = read_lock(lock)
    found: dict[str, Path] = {}
    for name in sorted(requirements):
        folder = (cache or default_cache()) / (arch if name in NATIVE else "any")
        found[name] = _cached(folder, requirements[name]) or _fetch(folder, arch, name, requirements[name])
    return list(found.values())


def read_lock(lock: Path) -> dict[str, str]:
    """Requirement lines, `name==version --hash=...`, by package name."""
    text = re.sub(r"\\\n\s*", "", lock.read_text(encoding="utf-8"))
    lines = [line.strip() for line in text.splitlines()]
    requirements = [line for line in lines if line and not line.startswith("#")]
    return {re.split(r"[=<>!~ ;\[]", line, maxsplit=1)[0]: line for line in requirements}


def _hashes(requirement: str) -> frozenset[str]:
    return frozenset(re.findall(r"--hash=sha256:([0-9a-f]{64})", requirement))


def _cached(folder: Path, requirement: str) -> Path | None:
    """A cached wheel with one of the locked hashes. One of the right name with another is no match."""
    name, version = re.split("==| ", requirement)[:2]
    for wheel in sorted(folder.glob(f"{name.replace('-', '_')}-{version}-*.whl")):
        if hashlib.sha256(wheel.read_bytes()).hexdigest() in _hashes(requirement):
            return wheel
    return None


def _fetch(folder: Path, arch: str, name: str, requirement: str) -> Path:
    """Have pip download one wheel into the cache. It appears there whole or not at all."""
    if importlib.util.find_spec("pip") is None:
        raise PayloadError(f"{sys.executable} has no pip to fetch {name}: run it with -m ensurepip")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        wanted = Path(temporary, "requirement.txt")
        wanted.write_text(requirement + "\n", encoding="utf-8")
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-input",
        ]
        command += ["--require-hashes", "--no-deps", "--only-binary=:all:", *_tags(arch, name)]
        command += ["--dest", temporary, "--requirement", str(wanted)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        for wheel in Path(temporary).glob("*.whl"):
            os.replace(wheel, folder / wheel.name)
    found = _cached(folder, requirement)
    if result.returncode or found is None:
        reason = (result.stderr.strip().splitlines() or ["pip downloaded nothing that matches the lock"])[-1]
        raise PayloadError(
            f"no wheel of {requirement.partition(' ')[0]} for {arch}: {reason}. Next: check that pip reaches "
            f"a package index from this machine (pip download {name}), or put the wheel into {folder}"
        )
    return found


def _tags(arch: str, name: str) -> list[str]:
    """pip's options for the kind of wheel we want, for a Python that is not ours."""
    python = ["--python-version", ".".join(map(str, HELPERS_PYTHON))]
    if name not in NATIVE:
        return [*python, "--implementation", "py", "--abi", "none", "--platform", "any"]
    platforms = [f"--platform={platform}_{arch}" for platform in _PLATFORMS]
    return [*python, "--implementation", "cp", "--abi", "abi3", *platforms]


def probe_zip(arch: str, lock: Path = LOCK, cache: Path | None = None) -> bytes:
    """The probe with what it imports, to be unpacked and run by `probe_command`; the same bytes each time."""
    by_name = dict(zip(sorted(read_lock(lock)), wheels(arch, lock, cache), strict=True))
    files = _contents(by_name[name] for name in PROBE_PACKAGES)
    files = {name: data for name, data in files.items() if not _PROBE_LEAVES_OUT.search(name)}
    return _zip(files | {name: (REMOTE / name).read_bytes() for name in PROBE_PROGRAMS})


def helpers_zip(arch: str, lock: Path = LOCK, cache: Path | None = None) -> bytes:
    """Everything that stays on a host, unpacked into /opt/llamafleet/helpers/KEY/ (`helpers_key`).

    The programs lie beside the packages, so that `python3 -s -E KEY/PROGRAM.py` finds them.
    """
    files = _contents(wheels(arch, lock, cache))
    programs = {path.name: path.read_bytes() for path in REMOTE.glob("*.py") if path.name != "__init__.py"}
    return _zip(files | programs)


def helpers_key(lock: Path = LOCK) -> str:
    """Name of the installed helpers, the same for every architecture: a hash of the programs and the lock."""
    digest = hashlib.sha256(lock.read_bytes())
    for path in sorted(REMOTE.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _contents(paths: Iterable[Path]) -> dict[str, bytes]:
    """The files of all the wheels, as installing them would lay them out."""
    files: dict[str, bytes] = {}
    for path in paths:
        with zipfile.ZipFile(path) as wheel:
            files.update({name: wheel.read(name) for name in wheel.namelist() if not name.endswith("/")})
    return files


def _zip(files: Mapping[str, bytes]) -> bytes:
    """A zip that depends on names and contents alone: sorted, no times, mode 644."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.external_attr = 0o100644 << 16
            entry.create_system = 3  # Unix, also where this runs on another system
            archive.writestr(entry, files[name], zipfile.ZIP_DEFLATED, 9)
    return buffer.getvalue()


# $1 is the zip, $2 the names of places, $3 the program in the zip, the rest its arguments. A place
# serves if a program in it may be run. The probe runs in the background, so that a signal interrupts
# `wait` and is passed on.
_SCRIPT = """\
zip=$1; places=$2; shift 2
folder=; child=
clean() { [ -z "$folder" ] || rm -rf -- "$folder"; rm -f -- "$zip"; }
stop() { trap '' HUP INT TERM; [ -z "$child" ] || { kill "$child"; wait "$child"; } 2>/dev/null; exit "$1"; }
trap clean EXIT
trap 'stop 129' HUP
trap 'stop 130' INT
trap 'stop 143' TERM
umask 077
command -v python3 >/dev/null 2>&1 || { echo "$PYTHON_MISSING" >&2; exit 127; }
python3 -I -c 'import sys; sys.exit(sys.version_info < (3, 8))' ||
    { echo "$PYTHON_OLD $(python3 -V 2>&1)" >&2; exit 127; }
for place in $places; do
    [ "$place" != '$HOME' ] || place=$HOME
    [ -n "$place" ] || continue
    folder=$(mktemp -d -- "$place/llamafleet-probe.XXXXXXXX" 2>/dev/null) || { folder=; continue; }
    printf '#!/bin/sh\\n' >"$folder/try" && chmod 700 "$folder/try" && "$folder/try" 2>/dev/null && break
    rm -rf -- "$folder"; folder=
done
[ -n "$folder" ] || { echo "llamafleet: nowhere to unpack: none of $places is writable and not noexec" >&2
    exit 126; }
python3 -I -c 'import sys, zipfile; zipfile.ZipFile(sys.argv[1]).extractall(sys.argv[2])' \\
    "$zip" "$folder" || exit 125
program=$1; shift
python3 -s -E -B "$folder/$program" "$@" </dev/null &
child=$!
wait "$child"; code=$?; child=
exit "$code"
"""


def probe_command(zip_path: str, program: str, *arguments: str) -> list[str]:
    """The command that unpacks an uploaded probe zip, runs one of its programs and removes every trace.

    Exit codes: the program's; 127 with PYTHON_MISSING or PYTHON_OLD on stderr; 126 nowhere to unpack;
    125 unpacking failed; 128 + N ended by signal N. For a shell: `shlex.join` of it.
    """
    if not zip_path.startswith("/"):
        raise ValueError(f"the zip's path on the host must be absolute, not {zip_path!r}")
    script = _SCRIPT.replace("$PYTHON_MISSING", PYTHON_MISSING).replace("$PYTHON_OLD", PYTHON_OLD)
    return ["sh", "-c", script, "llamafleet-probe", zip_path, " ".join(UNPACK_PLACES), program, *arguments]
