"""The compiler cache that test hosts and the oracle share: ccache, with its folder in `.cache/ccache`.

Where source, options and paths are the same, the second compilation takes the object files of the first. CMake finds
the launcher in its environment (CMAKE_CXX_COMPILER_LAUNCHER): no setting, CMake option or build key knows of it. The
launcher also lowers llama.cpp's own -O3, half of the time of a compilation: these tests measure no speed. A toolchain
file, which CMake finds there too, lets it compile many files together.
"""

from __future__ import annotations

import os
from pathlib import Path

from sandbox import upstream
from sandbox.host import SandboxHost

FOLDER = upstream.CACHE / "ccache"
ON_HOST = "/var/cache/compiler-cache"  # the folder as hosts and the oracle's build see it
OBJECTS = f"{ON_HOST}/objects"
PACKAGE = "ccache"
BUILDS = "/var/lib/llamafleet/build"  # of build folders; their names differ, and are no part of what is compared
# The names of the backends are options of every file, and only ggml/src/ggml-backend-reg.cpp reads them. The launcher
# removes them from all other files, or a build for the CPU and another build would share no object file. The last of
# several -O counts. The files that parse arguments, JSON and templates take most of the time; they are not optimised
# (common/json-schema-to-grammar.cpp: 7.3 s with -O3, 5.1 with -O1, 3.7 with -O0), nor is what drives Vulkan's shaders.
# All of ggml for the CPU takes 72 s with -O2, 51 with -O1.
# Without AMX every x86 machine allocates alike: weights in AMX's own layout are not what the ledger computes. What a
# deploy with an old compiler says against it then changes nothing, and is left out.
LAUNCHER = f"""#!/bin/sh
for source; do :; done
for word; do
    shift
    case $word:$source in
    *:*/ggml-backend-reg.cpp) ;;
    -DGGML_USE_RPC:* | -DGGML_USE_VULKAN:* | -U__AMX_INT8__:*) continue ;;
    esac
    set -- "$@" "$word"
done
case $source in
*/common/* | */tools/* | */vendor/* | */ggml-vulkan/*) level=-O0 ;;
*) level=-O1 ;;
esac
export CCACHE_DIR={OBJECTS} CCACHE_BASEDIR={BUILDS} CCACHE_NOCOMPRESS=1
case $(uname -m) in x86_64) level="$level -mno-amx-int8" ;; esac
exec ccache "$@" $level
"""
TOGETHER = Path(__file__).with_name("compile_together.cmake").read_text()
TOOLCHAIN = f"set(CMAKE_PROJECT_llama.cpp_INCLUDE {ON_HOST}/compile_together.cmake)\n"
FILES = {"launcher": LAUNCHER, "toolchain.cmake": TOOLCHAIN, "compile_together.cmake": TOGETHER}
ENVIRONMENT = {
    "CMAKE_C_COMPILER_LAUNCHER": f"{ON_HOST}/launcher",
    "CMAKE_CXX_COMPILER_LAUNCHER": f"{ON_HOST}/launcher",
    "CMAKE_TOOLCHAIN_FILE": f"{ON_HOST}/toolchain.cmake",
}
MANAGER = "/etc/systemd/system.conf.d/compiler-cache.conf"


def ensure() -> Path:
    """The folder, with our files in it. Lanes of tests may write them at the same time, each its own first."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in FILES.items():
        new = FOLDER / f"{name}.{os.getpid()}"
        new.write_text(text)
        new.chmod(0o755)
        new.rename(FOLDER / name)
    return FOLDER


def bind() -> str:
    """The bind that a host needs, beside the package."""
    return f"{ensure()}:{ON_HOST}"


def equip(host: SandboxHost) -> None:
    """Let everything that the host's systemd starts compile through the cache. Needs the bind and the package."""
    words = " ".join(f"{name}={value}" for name, value in ENVIRONMENT.items())
    write = 'mkdir -p "${1%/*}" && cat >"$1" && systemctl daemon-reexec'
    text = f"[Manager]\nDefaultEnvironment={words}\n"
    host.run(["sh", "-c", write, "sh", MANAGER], input=text, check=True)
