"""Stage: llama.cpp, compiled on this host from one commit into a release folder."""

from __future__ import annotations

import re
from typing import Any

from pyinfra import host
from pyinfra.api.deploy import deploy

from llamafleet.build import release
from llamafleet.remote.common import JOBS, SOURCE
from llamafleet.service.desired import Desired
from tasks.lib import lookups, operations, paths, site_builds, site_members
from tasks.lib.decision import Decision, build_job, for_stage
from tasks.lib.site_builds import Release


@deploy("Build llama.cpp")
def build() -> None:
    """Make the release of the wanted build key, unless the host has it."""
    now = for_stage("build")
    if now is None:
        return
    settings, wanted = now.desired.settings, now.desired.build
    if now.has_work:
        check_out(now)
    site = None if settings.build_cache or not settings.models else site_members.of(host, settings)
    name, job = f"Build llama.cpp {settings.llama_cpp_ref} for {wanted.backend}", build_job(now.desired)
    if site:
        release = Release(job, spec(now.desired), now.changes.build, job in now.desired.installed.jobs)
        site.join(host, now.desired, (release,))
        site_builds.build_in_site(name=name, site=site, release=release)
    elif now.has_work:
        operations.build_release(
            name=name, needed=now.changes.build, job=job, spec=spec(now.desired), network=lookups.network(settings),
        )  # fmt: skip


def check_out(now: Decision) -> None:
    """Check out the wanted commit, unless the host has a release of it."""
    settings, commit = now.desired.settings, now.desired.build.commit
    needed, repository = now.changes.build and not now.desired.is_cached, settings.llama_cpp_repository
    if paths.is_ours(host, repository):
        pack = f"{JOBS}/checkout-{commit}.pack"
        operations.send_commit(
            name=f"Send llama.cpp {settings.llama_cpp_ref}", needed=needed, repository=repository, commit=commit,
            path=pack,
        )  # fmt: skip
        repository = pack
    operations.checkout(
        name=f"Check out llama.cpp {settings.llama_cpp_ref}", needed=needed, repository=repository, commit=commit,
        folder=SOURCE, network=lookups.network(settings),
    )  # fmt: skip


def spec(desired: Desired) -> dict[str, Any]:
    """What `llamafleet/remote/build.py` needs to know."""
    settings, wanted, machine = desired.settings, desired.build, desired.machine
    number = re.fullmatch(r"b(\d+)", settings.llama_cpp_ref)
    # These do not change the code, hence are not part of the key. A shallow clone would count one commit.
    unkeyed = [f"-DLLAMA_BUILD_COMMIT={wanted.commit[:7]}", f"-DLLAMA_BUILD_NUMBER={number[1] if number else 0}"]
    if wanted.nvcc:
        unkeyed.append(f"-DCMAKE_CUDA_COMPILER={wanted.nvcc}")
    if wanted.host_compiler:
        unkeyed.append(f"-DCMAKE_CUDA_HOST_COMPILER={wanted.host_compiler}")
    if desired.hip and desired.hip.compiler:  # beside AMD's own ROCm CMake may find the distribution's
        unkeyed += [
            f"-DCMAKE_HIP_COMPILER={desired.hip.compiler}",
            f"-DCMAKE_HIP_COMPILER_ROCM_ROOT={desired.hip.path}",
        ]
    return {
        "key": wanted.key,
        "commit": wanted.commit,
        "source": SOURCE,
        "tree": wanted.tree,
        "cmake_flags": [*wanted.cmake_flags(), *unkeyed],
        "jobs": release.jobs(
            wanted.backend, machine.cpu.logical_cores, machine.memory.available_bytes, settings.build_jobs
        ),
        "bytes_for_job": None if settings.build_jobs else release.JOB_BYTES[wanted.backend],
        "build_cache": settings.build_cache,
        "record": {
            "backend": wanted.backend, "toolkit": wanted.toolkit, "architectures": list(wanted.architectures),
            "libc": wanted.libc, "ref": settings.llama_cpp_ref, "repository": settings.llama_cpp_repository,
            "built_on": machine.hostname, "cmake_flags": list(wanted.cmake_flags()),
        },
    }  # fmt: skip
