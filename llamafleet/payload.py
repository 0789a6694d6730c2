"""Zips for the hosts: the programs in `llamafleet/remote/` with the pinned wheels that they need.

Runs on the operator's machine. pip downloads the wheels once from the operator's package index, by the hashes in
`locks/remote.txt`; later they come from the cache. The hosts need no index.

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

from llamafleet.remote.common import SUMS

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "llamafleet" / "data" / "remote.txt"  # in a checkout a link to `locks/remote.txt`
REMOTE = ROOT / "llamafleet" / "remote"

# Oldest Python on a host for all locked wheels. The probe and its two wheels run on 3.8, which `_SCRIPT` checks.
HELPERS_PYTHON = (3, 9)

# Packages with a compiled wheel, one for each architecture; their stable-ABI wheel runs on every CPython. All other
# packages use the pure Python wheel, even if a faster one exists.
NATIVE = frozenset({"psutil"})
PROBE_PACKAGES = frozenset({"psutil", "nvidia-ml-py"})
# The survey imports the probe, the toolkits, the lock and others. uninstall.py is here because it removes the
# installed helpers and so cannot run from their folder.
PROBE_PROGRAMS = (
    *("probe.py", "probe_bandwidth.py", "probe_cpu.py", "probe_files.py", "probe_vulkan.py"),
    *("gpu_nodes.py", "probe_pci.py", "probe_diagnosis.py", "probe_gpus.py", "probe_gpu_common.py", "probe_amd.py"),
    *("probe_nvidia.py", "probe_nvidia_memory.py", "probe_tegra.py"),
    *("survey.py", "addresses.py", "ground.py", "learned.py", "lock.py", "releases.py", "rocm.py", "toolkits.py"),
    *("boot.py", "disks.py", "left.py", "uninstall.py", "gateway_apply.py", "gateway_admin.py", "staged.py"),
    "monitoring_apply.py",
    *("common.py", "inherited.py", "instance_files.py", "packages.py", "places.py"),  # imported by the programs above
)
# Files of the wheels that the probe does not need on Linux.
_PROBE_LEAVES_OUT = re.compile(r"\.dist-info/|^example\.py$|^psutil/(tests/|_ps(aix|bsd|osx|sunos|windows)\.py$)")

# Versions of glibc that a wheel may need, oldest first: Debian 11, Ubuntu 20.04 and RHEL 8 have glibc 2.28 or later.
_PLATFORMS = ("manylinux2010", "manylinux2014", "manylinux_2_28")
ARCHITECTURES = ("x86_64", "aarch64")

# Folders in which the probe may be unpacked: psutil's library cannot be loaded from a noexec mount.
UNPACK_PLACES = ("/tmp", "/var/tmp", "/run", "/dev/shm", "$HOME")  # noqa: S108 -- mktemp -d makes a private folder
PYTHON_MISSING = "llamafleet: python3 not found"
PYTHON_OLD = "llamafleet: python3 is older than 3.8:"


class PayloadError(RuntimeError):
    """A wheel is not available; the message names it and the next step."""


def default_cache() -> Path:
    """The folder of cached wheels: `.cache/wheels` in a checkout, else in the user's cache folder."""
    if (ROOT / ".git").exists():
        return ROOT / ".cache" / "wheels"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llamafleet" / "wheels"


def wheels(
    arch: str, lock: Path = LOCK, cache: Path | None = None, environment: Mapping[str, str] | None = None
) -> list[Path]:
    """The locked wheels for a host's architecture, in the order of the packages' names. Raises `PayloadError`.

    Each call compares every wheel's SHA-256 with the lock. Wheels in the cache need no network.
    `environment`: pip's, None for this process'.
    """
    if arch not in ARCHITECTURES:
        raise PayloadError(f"no wheels for architecture {arch!r}: only {' and '.join(ARCHITECTURES)} are supported")
    requirements = read_lock(lock)
    paths: dict[str, Path] = {}
    for name in sorted(requirements):
        folder = (cache or default_cache()) / (arch if name in NATIVE else "any")
        paths[name] = _cached(folder, requirements[name]) or _fetch(folder, arch, name, requirements[name], environment)
    return list(paths.values())


def read_lock(lock: Path) -> dict[str, str]:
    """The requirement of each package, `name==version --hash=...`, by package name."""
    text = re.sub(r"\\\n\s*", "", lock.read_text(encoding="utf-8"))
    lines = [line.strip() for line in text.splitlines()]
    requirements = [line for line in lines if line and not line.startswith("#")]
    return {re.split(r"[=<>!~ ;\[]", line, maxsplit=1)[0]: line for line in requirements}


def _hashes(requirement: str) -> frozenset[str]:
    return frozenset(re.findall(r"--hash=sha256:([0-9a-f]{64})", requirement))


def _cached(folder: Path, requirement: str) -> Path | None:
    """The cached wheel with the right name and one of the locked hashes; None if there is none."""
    name, version = re.split("==| ", requirement)[:2]
    for wheel in sorted(folder.glob(f"{name.replace('-', '_')}-{version}-*.whl")):
        if hashlib.sha256(wheel.read_bytes()).hexdigest() in _hashes(requirement):
            return wheel
    return None


def _fetch(folder: Path, arch: str, name: str, requirement: str, environment: Mapping[str, str] | None) -> Path:
    """Download a wheel into the cache with pip, complete or not at all. Raises `PayloadError`."""
    if importlib.util.find_spec("pip") is None:
        raise PayloadError(
            f"pip is missing on this machine: {sys.executable} needs it once, to download {name} for the hosts: run "
            f"{sys.executable} -m ensurepip (on Debian and Ubuntu after apt-get install python3-venv; in one of "
            f"uv's: uv pip install --python {sys.executable} pip)"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        requirement_file = Path(temporary, "requirement.txt")
        requirement_file.write_text(requirement + "\n", encoding="utf-8")
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
        command += ["--dest", temporary, "--requirement", str(requirement_file)]
        result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        for wheel in Path(temporary).glob("*.whl"):
            os.replace(wheel, folder / wheel.name)
    wheel_path = _cached(folder, requirement)
    if result.returncode or wheel_path is None:
        reason = (result.stderr.strip().splitlines() or ["pip downloaded nothing that matches the lock"])[-1]
        raise PayloadError(
            f"no wheel of {requirement.partition(' ')[0]} for {arch}: {reason}. Next: check that pip reaches "
            f"a package index from this machine (pip download {name}), or put the wheel into {folder}"
        )
    return wheel_path


def _tags(arch: str, name: str) -> list[str]:
    """pip's options for a wheel that runs on the hosts' Python, which may differ from this one."""
    python = ["--python-version", ".".join(map(str, HELPERS_PYTHON))]
    if name not in NATIVE:
        return [*python, "--implementation", "py", "--abi", "none", "--platform", "any"]
    platforms = [f"--platform={platform}_{arch}" for platform in _PLATFORMS]
    return [*python, "--implementation", "cp", "--abi", "abi3", *platforms]


def probe_zip(
    arch: str, lock: Path = LOCK, cache: Path | None = None, environment: Mapping[str, str] | None = None
) -> bytes:
    """The probe and all that it imports, for `probe_command`. Equal inputs give equal bytes."""
    by_name = dict(zip(sorted(read_lock(lock)), wheels(arch, lock, cache, environment), strict=True))
    files = _contents(by_name[name] for name in PROBE_PACKAGES)
    files = {name: data for name, data in files.items() if not _PROBE_LEAVES_OUT.search(name)}
    return _zip(files | {name: (REMOTE / name).read_bytes() for name in PROBE_PROGRAMS})


def helpers_zip(
    arch: str, lock: Path = LOCK, cache: Path | None = None, environment: Mapping[str, str] | None = None
) -> bytes:
    """All programs and wheels that stay on a host, in /opt/llamafleet/helpers/KEY/ (`helpers_key`).

    Programs and packages are in one folder, so that `python3 -s -E KEY/PROGRAM.py` can import them. Their sums lie
    beside them: a power cut can empty files that were not written by this version.
    """
    files = _contents(wheels(arch, lock, cache, environment))
    files |= {path.name: path.read_bytes() for path in REMOTE.glob("*.py") if path.name != "__init__.py"}
    return _zip(files | {SUMS: _sums(files)})


def _sums(files: Mapping[str, bytes]) -> bytes:
    """The SHA-256 of each file, as `sha256sum` writes and checks them."""
    lines = [f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in sorted(files)]
    return "".join(lines).encode()


def helpers_key(lock: Path = LOCK) -> str:
    """Name of the installed helpers: a hash of the programs and the lock, for all architectures."""
    digest = hashlib.sha256(lock.read_bytes())
    for path in sorted(REMOTE.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _contents(paths: Iterable[Path]) -> dict[str, bytes]:
    """The files of the wheels by path, as pip would install them."""
    files: dict[str, bytes] = {}
    for path in paths:
        with zipfile.ZipFile(path) as wheel:
            files.update({name: wheel.read(name) for name in wheel.namelist() if not name.endswith("/")})
    return files


def _zip(files: Mapping[str, bytes]) -> bytes:
    """A zip of these files. Its bytes depend only on names and contents: sorted, without times, mode 644."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.external_attr = 0o100644 << 16
            entry.create_system = 3  # Unix, on every system that this runs on
            archive.writestr(entry, files[name], zipfile.ZIP_DEFLATED, 9)
    return buffer.getvalue()


# $1 is Python, $2 the SHA-256 of the zip that comes by standard input in base64, $3 the folders to try, $4 the program
# in the zip; its arguments follow. A folder is used if a program in it can be run; nobody else can enter it. The
# program runs in the background, so that a signal interrupts `wait` and is passed on. What came is read also where it
# is not used: the operator's side would take a pipe that is closed too early for a broken connection.
_SCRIPT = """\
python=$1; sum=$2; places=$3; shift 3
folder=; child=
clean() { [ -z "$folder" ] || rm -rf -- "$folder"; }
stop() { trap '' HUP INT TERM; [ -z "$child" ] || { kill "$child"; wait "$child"; } 2>/dev/null; exit "$1"; }
refuse() { while read -r line; do :; done; echo "$2" >&2; exit "$1"; }
trap clean EXIT
trap 'stop 129' HUP
trap 'stop 130' INT
trap 'stop 143' TERM
umask 077
named=; [ "$python" = python3 ] || named=": the setting python names $python"
command -v "$python" >/dev/null 2>&1 || refuse 127 "$PYTHON_MISSING$named"
"$python" -I -c 'import sys; sys.exit(sys.version_info < (3, 8))' </dev/null ||
    refuse 127 "$PYTHON_OLD $("$python" -V 2>&1)"
for place in $places; do
    [ "$place" != '$HOME' ] || place=$HOME
    [ -n "$place" ] || continue
    folder=$(mktemp -d -- "$place/llamafleet-probe.XXXXXXXX" 2>/dev/null) || { folder=; continue; }
    printf '#!/bin/sh\\n' >"$folder/try" && chmod 700 "$folder/try" && "$folder/try" 2>/dev/null && break
    rm -rf -- "$folder"; folder=
done
[ -n "$folder" ] || refuse 126 "llamafleet: nowhere to unpack: none of $places is writable and not noexec"
"$python" -I -c '$UNPACK' "$sum" "$folder" || exit 125
program=$1; shift
"$python" -s -E -B "$folder/$program" "$@" </dev/null &
child=$!
wait "$child"; code=$?; child=
exit "$code"
"""
_UNPACK = """
import base64, hashlib, io, sys, zipfile
data = base64.b64decode(sys.stdin.buffer.read())
if hashlib.sha256(data).hexdigest() != sys.argv[1]:
    sys.exit("llamafleet: what arrived has another SHA-256 than what was sent: the transfer was cut or damaged, or "
             "standard input does not reach the program (su with a password takes it)")
zipfile.ZipFile(io.BytesIO(data)).extractall(sys.argv[2])
"""


def probe_command(sha256: str, program: str, *arguments: str, python: str = "python3") -> list[str]:
    """The command that unpacks a zip of programs, runs one of them, and leaves nothing behind.

    The zip goes to its standard input in base64, and is used only if it has this SHA-256. Exit status: the program's;
    127 with PYTHON_MISSING or PYTHON_OLD on stderr; 126 if no folder can be used; 125 if unpacking failed, or the sum
    differs; 128 + N after signal N. A shell needs `shlex.join` of the command.
    """
    script = _SCRIPT.replace("$PYTHON_MISSING", PYTHON_MISSING).replace("$PYTHON_OLD", PYTHON_OLD)
    script = script.replace("$UNPACK", _UNPACK)
    return ["sh", "-c", script, "llamafleet-probe", python, sha256, " ".join(UNPACK_PLACES), program, *arguments]
