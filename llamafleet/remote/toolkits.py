"""CUDA toolkits that this host has.

Contract: `find(root="/", extra=())` gives a list of dictionaries, one for each toolkit, by path:

    {"path": "/usr/local/cuda-12.8", "nvcc": "/usr/local/cuda-12.8/bin/nvcc", "version": "12.8" | null,
     "aliases": ["/usr/local/cuda"], "distro": false, "headers": true, "cublas": true, "cudart": true,
     "driver_stub": true, "host_compiler": "14.2.0" | null, "accepted_compiler": "/usr/bin/g++-13" | null,
     "gcc_limit": 14 | null, "build": "12.8.93" | null, "problems": ["..."]}

`distro` marks the distribution's own package, whose path is /usr; `driver_stub` says that a libcuda.so
to link with is there; `accepted_compiler` is a g++ that this nvcc accepts where the default one is too
new for it; `gcc_limit` is the newest gcc's major version that it accepts; `build` is the compiler's own version, which
tells patch releases apart; `problems` says why it cannot compile on this very host. `root` stands before every path in
tests; `extra` names further folders to look in. Run as a program with such folders as arguments it
prints the list as JSON. Changes nothing. Python 3.8, standard library; common.py beside it.
"""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import sys
from typing import Any, Iterable  # the contract is Python 3.8, whose own Iterable is typing's

from common import output_of

# Where Debian's and Ubuntu's nvidia-cuda-toolkit keep the compiler; headers and libraries are in /usr.
# It brings a gcc of its own choice and headers that fit the distribution's glibc.
DISTRO = "/usr/lib/nvidia-cuda-toolkit"
SECONDS = 20  # that a compiler may take to print its version
# From this glibc on the function clashes with its declaration in older toolkits' math_functions.h, which
# has no exception specification ("exception specification is incompatible", llama.cpp's docs/build.md).
CLASHES = (((2, 41), "cospi"), ((2, 42), "rsqrt"))


def main(argv: list[str]) -> None:
    print(json.dumps(find(extra=argv)))


def find(root: str = "/", extra: Iterable[str] = ()) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for nvcc in candidates(root, extra):
        real, home = resolve(nvcc, root)
        if home is None:
            continue
        one = found.get(home) or found.setdefault(home, describe(home, real, root))
        seen = os.path.dirname(os.path.dirname(nvcc))
        if seen != home and os.path.realpath(inside(root, seen)) == os.path.realpath(inside(root, home)):
            one["aliases"] = sorted({*one["aliases"], seen})
    return [found[home] for home in sorted(found)]


def candidates(root: str, extra: Iterable[str]) -> list[str]:
    """Paths of possible compilers, as seen on the host: without `root`."""
    patterns = ["/usr/local/cuda*/bin/nvcc", "/opt/cuda*/bin/nvcc", DISTRO + "/bin/nvcc", "/usr/bin/nvcc"]
    patterns += [glob.escape(folder.rstrip("/")) + "/bin/nvcc" for folder in extra]
    paths = [path for pattern in patterns for path in sorted(glob.glob(inside(root, pattern)))]
    if root == "/":
        paths.append(shutil.which("nvcc") or "")
    return [outside(root, path) for path in paths if path and os.path.isfile(path)]


def inside(root: str, path: str) -> str:
    return os.path.join(root, path.lstrip("/"))


def outside(root: str, path: str) -> str:
    return "/" + os.path.relpath(path, root)


def resolve(nvcc: str, root: str, depth: int = 3) -> tuple[str, str | None]:
    """The compiler that a link or a wrapper script leads to, and its toolkit's folder; None: nowhere."""
    real = outside(os.path.realpath(root), os.path.realpath(inside(root, nvcc)))
    if os.path.basename(real) != "nvcc":
        return real, None  # ccache and the like
    target = wrapped(inside(root, real))
    if depth and target and target != real and os.path.isfile(inside(root, target)):
        return resolve(target, root, depth - 1)
    if real.startswith(DISTRO + "/"):
        return "/usr/bin/nvcc", "/usr"
    return real, os.path.dirname(os.path.dirname(real))


def wrapped(path: str) -> str | None:
    """The compiler that a wrapper script runs; None for a program."""
    with open(path, "rb") as file:
        start = file.read(4096)
    match = re.search(rb"\bexec\s+[\"']?(/[^\s\"']*/bin/nvcc)\b", start) if start.startswith(b"#!") else None
    return match.group(1).decode() if match else None


def describe(home: str, nvcc: str, root: str) -> dict[str, Any]:
    distro = home == "/usr"
    include = existing(root, [home + "/include", *targets(root, home, "include")])
    libraries = existing(root, [home + "/lib64", home + "/lib", *targets(root, home, "lib"), *multiarch(root, home)])
    system = existing(root, ["/usr/lib64", "/usr/lib", *multiarch(root, "/usr")])
    stubs = [folder + "/stubs" for folder in libraries] + libraries + system
    limit = None if distro else gcc_limit(include)
    compiler, accepted, problems = (None, None, []) if distro else host_compiler(limit)
    told = told_by(inside(root, DISTRO + "/bin/nvcc" if distro else nvcc))
    return {
        "path": home,
        "nvcc": nvcc,
        "version": told[0],
        "build": told[1],
        "aliases": [],
        "distro": distro,
        "headers": has(include, "cuda_runtime.h") and has(include, "crt/host_config.h"),
        "cublas": has(include, "cublas_v2.h") and has(libraries, "libcublas.so"),
        "cudart": has(libraries, "libcudart.so"),
        "driver_stub": has(stubs, "libcuda.so"),
        "host_compiler": compiler,
        "accepted_compiler": accepted,
        "gcc_limit": limit,
        "problems": problems + ([] if distro else clashes(include, libc())),
    }


def targets(root: str, home: str, part: str) -> list[str]:
    return [outside(root, path) for path in sorted(glob.glob(inside(root, home) + "/targets/*-linux/" + part))]


def multiarch(root: str, home: str) -> list[str]:
    return [outside(root, path) for path in sorted(glob.glob(inside(root, home) + "/lib/*-linux-gnu"))]


def existing(root: str, folders: list[str]) -> list[str]:
    return [inside(root, folder) for folder in folders if os.path.isdir(inside(root, folder))]


def has(folders: list[str], name: str) -> bool:
    return any(os.path.isfile(os.path.join(folder, name)) for folder in folders)


def told_by(nvcc: str) -> tuple[str | None, str | None]:
    """ "12.8" and "12.8.93", as the compiler prints them; None if it does not run."""
    match = re.search(r"release (\d+\.\d+)(?:, V([\d.]+))?", output_of([nvcc, "--version"], SECONDS, only_success=True))
    return (match.group(1), match.group(2)) if match else (None, None)


def gcc_limit(include: list[str]) -> int | None:
    """The newest gcc that the toolkit's header accepts; None where it does not say."""
    limit = re.search(r"gcc versions later than (\d+) are not supported", text_of(include, "crt/host_config.h"))
    return int(limit.group(1)) if limit else None


def host_compiler(limit: int | None) -> tuple[str | None, str | None, list[str]]:
    """Version of the default gcc, a g++ to use in its place, and why neither does."""
    default = gcc_version("gcc")
    if default is None or limit is None or int(default.split(".")[0]) <= limit:
        return default, None, []
    for major in range(limit, 7, -1):  # C++17 begins with gcc 8
        accepted = shutil.which("g++-%d" % major)
        if accepted:
            return default, accepted, []
    return default, None, ["it accepts gcc up to %d, the host has %s: install g++-%d" % (limit, default, limit)]


def gcc_version(name: str) -> str | None:
    told = output_of([name, "-dumpfullversion"], SECONDS, only_success=True).strip()
    return told if re.match(r"\d+(\.\d+)*$", told) else None


def cmake_version() -> str | None:
    """The version of CMake, "3.25.1"; None where there is none."""
    match = re.search(r"version (\d+\.\d+[.\d]*)", output_of(["cmake", "--version"], SECONDS, only_success=True))
    return match.group(1) if match else None


def clashes(include: list[str], glibc: tuple[int, ...]) -> list[str]:
    """Functions that this glibc and the toolkit declare differently."""
    declared = text_of(include, "crt/math_functions.h")
    names = [
        name
        for first, name in CLASHES
        if glibc >= first and re.search(r"\bdouble\s+%s\s*\(\s*double\s+\w+\s*\)\s*;" % name, declared)
    ]
    told = ".".join(str(part) for part in glibc)
    return ["its headers clash with glibc %s over %s()" % (told, name) for name in names[:1]]


def libc() -> tuple[int, ...]:
    """The C library's version as numbers; (0,) where it is not glibc."""
    try:
        told = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()[1]
        return tuple(int(part) for part in told.split("."))
    except (AttributeError, IndexError, ValueError, OSError):
        return (0,)


def text_of(folders: list[str], name: str) -> str:
    for folder in folders:
        try:
            with open(os.path.join(folder, name), errors="replace") as file:
                return file.read()
        except OSError:
            continue
    return ""


if __name__ == "__main__":
    main(sys.argv[1:])
