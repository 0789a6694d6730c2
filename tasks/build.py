"""Stage: llama.cpp, compiled on this host from one commit into a release folder."""

from __future__ import annotations

import re
from typing import Any

from pyinfra.api.deploy import deploy

from llamafleet.build import release as builds
from llamafleet.remote.common import SOURCE
from tasks.lib import operations
from tasks.lib.decision import Situation, situation


@deploy("Build llama.cpp")
def build() -> None:
    """A release for the wanted build key, unless it is there."""
    now = situation()
    if now is None:
        return
    wanted = now.build
    cached = wanted.key in now.survey.found.cached_builds
    operations.checkout(
        name=f"Check out llama.cpp {now.settings.llama_cpp_ref}", needed=now.work.build and not cached,
        repository=now.settings.llama_cpp_repository, commit=wanted.commit, folder=SOURCE,
    )  # fmt: skip
    operations.run_job(
        name=f"Build llama.cpp {now.settings.llama_cpp_ref} for {wanted.backend}", needed=now.work.build,
        job=f"build-{wanted.key}", program="build.py", spec=spec(now),
    )  # fmt: skip


def spec(now: Situation) -> dict[str, Any]:
    """What `llamafleet/remote/build.py` needs to know."""
    wanted, machine = now.build, now.survey.machine
    number = re.fullmatch(r"b(\d+)", now.settings.llama_cpp_ref)
    # Of no influence on the code, hence not part of the key: a shallow clone counts one commit.
    told = [f"-DLLAMA_BUILD_COMMIT={wanted.commit[:7]}", f"-DLLAMA_BUILD_NUMBER={number[1] if number else 0}"]
    if wanted.nvcc:
        told.append(f"-DCMAKE_CUDA_COMPILER={wanted.nvcc}")
    if wanted.host_compiler:
        told.append(f"-DCMAKE_CUDA_HOST_COMPILER={wanted.host_compiler}")
    return {
        "key": wanted.key,
        "commit": wanted.commit,
        "source": SOURCE,
        "tree": wanted.tree,
        "cmake_flags": [*wanted.cmake_flags(), *told],
        "jobs": builds.jobs(
            wanted.backend, machine.cpu.logical_cores, machine.memory.available_bytes, now.settings.build_jobs
        ),
        "build_cache": now.settings.build_cache,
        "record": {
            "backend": wanted.backend, "toolkit": wanted.toolkit, "architectures": list(wanted.architectures),
            "libc": wanted.libc, "ref": now.settings.llama_cpp_ref, "repository": now.settings.llama_cpp_repository,
            "built_on": machine.hostname, "cmake_flags": list(wanted.cmake_flags()),
        },
    }  # fmt: skip
