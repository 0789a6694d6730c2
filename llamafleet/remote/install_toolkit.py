"""Install a CUDA toolkit from packages.

Contract: `install_toolkit.py SPEC.json [ROOT]`, where SPEC has manager (a name in packages.py), packages, components
(of the distribution's archive, such as "non-free"), repository (NVIDIA's name of it | null), url (its address | null),
key_package and repo_file (addresses | null), and nvcc (where the compiler will be). Progress lines on stdout; the last
one of a failure begins with `error: `. Exit 0: the toolkit at nvcc is complete, as toolkits.py finds it. Root, curl,
a package manager, standard library; common.py, packages.py, running.py, toolkit_sources.py and toolkits.py lie beside
it. ROOT stands before every path in tests.

No file of the owner's is changed, see toolkit_sources.py. NVIDIA's repository also holds drivers; it is set up so that
no driver is taken from it unasked, and an installation that would change the host's driver is refused.
"""

from __future__ import annotations

import json
import os
import re
import sys
from typing import Any, Type  # the contract is Python 3.8, whose own are typing's

import packages
import toolkits
from running import Failed, refresh, run, say
from toolkit_sources import REPOSITORIES, enable_components

# Packages of the driver, kernel or user space, by NVIDIA's and the distributions' names. The stub that
# is linked with (cuda-driver-dev) is none.
DRIVER = re.compile(
    r"(cuda-drivers|cuda-compat|nvidia-(open|driver|kernel|dkms|firmware|headless|utils|compute|gl|video)|libcuda1$"
    r"|libnvidia-(compute|ml1|cfg1|gl)|kmod-nvidia|xserver-xorg-video-nvidia|nvidia$|opencl-nvidia)"
)
# What shows that the host has a driver: Windows' own under WSL, which no package of Linux may hide.
DRIVER_SIGNS = ("/proc/driver/nvidia/version", "/usr/lib/wsl/lib/libcuda.so", "/usr/lib/wsl/lib/libcuda.so.1")


def install(spec: dict[str, Any], root: str = "/") -> None:
    manager = packages.by_name(spec["manager"])
    if manager is None:
        raise Failed(f"the package manager {spec['manager']!r} is unknown to packages.py")
    if spec["components"]:
        enable_components(spec["components"], root)
    if spec["url"]:
        REPOSITORIES[manager.name](spec, root)
    unread = refresh(manager)
    refuse_driver_change(manager, spec["packages"], root)
    try:
        run(manager.install(spec["packages"]), "the packages were not installed", manager)
    except Failed as failed:
        raise Failed(f"{failed}; before that, {unread}") if unread else failed from None
    check(spec["nvcc"], root)


def refuse_driver_change(manager: Type[packages.Manager], names: list[str], root: str) -> None:
    """Raise where the packages would bring another driver to a host that has one."""
    if not any(os.path.exists(toolkits.inside(root, sign)) for sign in DRIVER_SIGNS):
        return
    driver = [name for name in manager.would_change(names) if DRIVER.match(name)]
    if driver:
        raise Failed(
            f"installing {', '.join(names)} would change the NVIDIA driver of this host ({', '.join(driver)}): "
            'set cuda_toolkit = "nvidia", whose toolkit needs none of them, or name a toolkit\'s folder'
        )


def check(nvcc: str, root: str) -> None:
    """Raise unless the toolkit is now there and whole."""
    found = [one for one in toolkits.find(root) if one["nvcc"] == nvcc]
    if not found:
        raise Failed(f"the packages were installed, but there is no compiler at {nvcc}")
    parts = ("version", "headers", "cublas", "cudart", "driver_stub")
    missing = [part for part in parts if not found[0][part]]
    if missing or found[0]["problems"]:
        raise Failed(f"the toolkit at {nvcc} is not usable: {', '.join([*missing, *found[0]['problems']])}")
    say(f"CUDA {found[0]['version']} is at {found[0]['path']}")


def main(argv: list[str]) -> int:
    with open(argv[0]) as file:
        spec = json.load(file)
    try:
        install(spec, *argv[1:2])
    except Failed as failed:
        say(f"error: {failed}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
