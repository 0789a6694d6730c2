"""Small files of /proc and /sys, as the probe and its parts read them.

Part of probe.py, probe_cpu.py and probe_gpus.py and under their contract: Python 3.8, the standard library and
psutil, reads only.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any, Iterator  # the contract is Python 3.8, whose own Iterator is typing's

ROOT = Path("/")


def below(folder: str) -> None:
    """For tests: from now on read /proc, /sys and /etc below this folder."""
    global ROOT  # noqa: PLW0603 -- set once, before anything is read
    ROOT = Path(folder)


def at(path: str) -> Path:
    """An absolute path, below the root."""
    return ROOT / path.lstrip("/")


def psutil() -> Any:
    """The psutil module, reading the /proc below the root."""
    module: Any = importlib.import_module("psutil")
    module.PROCFS_PATH = str(at("/proc"))
    return module


def read(path: Path | str, default: str = "") -> str:
    """A small file's text without surrounding space; `default` where it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return default


def number(path: Path | str) -> int | None:
    """A file that holds one decimal number; None where it does not."""
    text = read(path)
    return int(text) if text.isdigit() else None


def tegra() -> str | None:
    """NVIDIA's name of the chip of a Jetson, such as "tegra234", by the device tree; None on other machines."""
    found = re.search(r"nvidia,(tegra\d+)", read(at("/proc/device-tree/compatible")))
    return found[1] if found else None


def container() -> str | None:
    """The kind of container that this host is, as systemd names it: "lxc", "docker"; None where it is none."""
    told = read(at("/run/systemd/container"))
    environment = re.search(r"(?:^|\0)container=([\w-]+)", read(at("/proc/1/environ")))
    if told or environment:
        return told or (environment[1] if environment else None)
    marks = {"/run/.containerenv": "podman", "/.dockerenv": "docker"}
    return next((kind for path, kind in marks.items() if at(path).exists()), None)


def cgroup_folders(controller: str) -> Iterator[tuple[bool, Path]]:
    """(of v2?, folder) of every cgroup that a service here lives in, ours first.

    The probe's own slice or session does not bind a system service, so the walk starts in system.slice, where
    services are, beside the first systemd unit in the path, and goes up.
    """
    for line in read(at("/proc/self/cgroup")).splitlines():
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy != "0" and controller not in controllers.split(","):
            continue
        parts = [part for part in path.split("/") if part]
        units = [i for i, part in enumerate(parts) if part.endswith((".slice", ".scope", ".service"))]
        parts = parts[: units[0]] if units else parts
        base = at("/sys/fs/cgroup") if hierarchy == "0" else at(f"/sys/fs/cgroup/{controller}")
        services = base.joinpath(*parts, "system.slice")
        if services.is_dir():
            yield hierarchy == "0", services
        for depth in range(len(parts), -1, -1):
            yield hierarchy == "0", base.joinpath(*parts[:depth])
