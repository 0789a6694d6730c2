"""Stage: install the CUDA toolkit to compile llama.cpp with, where the host has none that fits."""

from __future__ import annotations

from typing import Any

from pyinfra.api.deploy import deploy

from llamafleet.build.cuda_toolkit import Install
from tasks.lib import lookups, operations
from tasks.lib.decision import for_stage


@deploy("Install the CUDA toolkit")
def toolkit() -> None:
    """Install NVIDIA's or the distribution's packages, as chosen; the driver is not touched."""
    now = for_stage("toolkit")
    if now is None or now.desired.install_toolkit is None:
        return
    install = now.desired.install_toolkit
    origin = "NVIDIA's repository" if install.repository else "the distribution"
    operations.run_job(
        name=f"Install CUDA {install.version} from {origin}", needed=now.changes.toolkit,
        job=f"toolkit-{install.identity}", program="install_toolkit.py", spec=spec(install),
        network=lookups.network(now.desired.settings),
    )  # fmt: skip


def spec(install: Install) -> dict[str, Any]:
    """What `llamafleet/remote/install_toolkit.py` needs to know."""
    repository = install.repository
    return {
        "manager": install.manager,
        "packages": list(install.packages),
        "components": list(install.components),
        "repository": repository.name if repository else None,
        "url": repository.url if repository else None,
        "key_package": repository.key_package if repository else None,
        "repo_file": repository.repo_file if repository else None,
        "nvcc": install.nvcc,
    }
