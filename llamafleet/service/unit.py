"""The unit of an instance and those of its liveness check: what they may do and see, as values for their templates.

The templates lie in `templates/`; they format these values and calculate nothing. Reading them is file access, so
the functions here are given a `Renderer` (`tasks/lib/templates.py` has the real one).

Decision 18: docs/decisions/0018-hardening-is-proven-on-the-host.md.
Decision 19: docs/decisions/0019-units-name-the-release-folder.md.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import Any

from llamafleet.build.release import MIB, Build
from llamafleet.host.installed import Installed
from llamafleet.host.vulkan import SOFTWARE
from llamafleet.planner.result import Plan
from llamafleet.remote.common import (
    API_KEYS,
    BUILD,
    ETC,
    GOOD,
    HELPERS,
    JOBS,
    RUN,
    SOURCE,
    STAGED,
    demand_units,
    helper,
    liveness_units,
    plan_path,
)
from llamafleet.remote.inherited import DIRECTIVES
from llamafleet.service.command import unit_escape
from llamafleet.service.record import credentials
from llamafleet.settings.environment import assignment
from llamafleet.settings.schema import DEMAND, Instance, Settings

# From a template's name and its values to the text.
Renderer = Callable[[str, Mapping[str, Any]], str]

SYSTEM_PYTHON = "python3"  # the setting `python`: the system's own

# Character device classes of NVIDIA's driver: 535 and older need nvidia-frontend, MIG nvidia-caps.
NVIDIA_CLASSES = ("nvidia", "nvidia-caps", "nvidia-frontend", "nvidia-modeset", "nvidia-uvm")

# Where programs may be loaded from beside the release: the loader and the libraries of the system ("-": not
# every system has each), without its programs.
LIBRARIES = ("-/usr/lib", "-/usr/lib64", "-/usr/lib32", "-/lib", "-/lib64", "-/lib32")
BACKEND_LIBRARIES = {"cuda": ("-/usr/local",), "hip": ("-/opt/rocm",), "vulkan": ("-/usr/local/lib",)}

# What a server has no business with, hidden although its user could mostly not read it either.
_OURS = (ETC, HELPERS, RUN, BUILD, GOOD, JOBS, SOURCE, STAGED)
_SYSTEM = ("/boot", "/etc/ssh", "/etc/ssl/private", "/srv", "/var/backups", "/var/log", "/var/spool")
HIDDEN = tuple(f"-{path}" for path in sorted((*_OURS, *_SYSTEM)))

# What making room for a server that starts on demand may take at most, with the wait for others that do the same.
ROOM_SECONDS = 240

# What a liveness check may take at most beside its own patience, which is longer on a slow host.
LIVENESS_END_SECONDS = 24 * 3600

# When a server that ended is started again, as directives. systemd 254 and later lengthen the pause from one start that
# fails to the next: 5, 8, 14, 24, 42, 71 and 120 s. Before that there is one pause for all: short for a crash, and long
# enough that a server which cannot start does not read its model all the time.
RESTART_STEPS_SINCE = 254
RESTART = {"RestartSec": 5, "RestartSteps": 6, "RestartMaxDelaySec": 120}
OLD_RESTART = {"RestartSec": 30}

# Above the planned host memory, for what a process needs beside its model: share and bytes.
MEMORY_MARGIN, MEMORY_SPARE = 1.1, 1024 * MIB


def unit_text(
    render: Renderer, instance: Instance, plan: Plan, build: Build, installed: Installed, record: Mapping[str, Any],
    helpers: str, *, allow_swap: bool, python: str = SYSTEM_PYTHON,
    environment: Mapping[str, str] = MappingProxyType({}), stores: Sequence[str] = (), mount: str | None = None,
) -> str:  # fmt: skip
    """The whole unit file of an instance; `record` is its plan.json, `helpers` the version of our programs that it
    calls: those that it was made with, whatever version is installed later. `python` is the setting, `environment` are
    the operator's variables, `stores` the folders where files of the model and its companions lie, where that is not
    below /var/lib/llamafleet, and `mount` the place where its disk is mounted, if it has one of its own."""
    values = unit_values(instance, plan, build, installed, record, helpers, allow_swap=allow_swap, python=python)
    values["operators_environment"] = [assignment(name, value) for name, value in sorted(environment.items())]
    values["stores"] = stores
    values["mount"] = mount and mount_unit(mount)
    values["hidden"] = [path for path in HIDDEN
                        if not any(f"{store}/".startswith(f"{path.lstrip('-')}/") for store in stores)]  # fmt: skip
    return render("llama-server.service.j2", values)


def unit_values(
    instance: Instance, plan: Plan, build: Build, installed: Installed, record: Mapping[str, Any], helpers: str,
    *, allow_swap: bool, python: str = SYSTEM_PYTHON,
) -> dict[str, Any]:  # fmt: skip
    """What the template of the unit names."""
    gate, on_demand = record["gate"], instance.start == DEMAND
    start_check = (helper("gate.py", helpers), "start", plan_path(instance.name))
    return {
        "instance": instance,
        "identity": record["identity"],
        "command": [unit_escape(argument) for argument in gate["argv"]],
        "python": path_of(python),
        "started": [unit_escape(word) for word in start_check],
        "start_seconds": gate["health_seconds"] + (ROOM_SECONDS if on_demand else 30),
        "demand": demand_units(instance.name)[1] if on_demand else None,
        "room": [unit_escape(word) for word in (helper("room.py", helpers), instance.name)],
        "credentials": credentials(instance),
        "api_keys": credentials(instance).get(API_KEYS),
        "environment": plan.environment,
        "not_inherited": DIRECTIVES,
        "gpu": bool(plan.gpus),
        "cuda": build.backend == "cuda",
        # A software device compiles its shaders to code of this CPU while it runs.
        "compiles_code": any(gpu.vendor == SOFTWARE for gpu in plan.gpus),
        "device_classes": _device_classes(build.backend, installed),
        "groups": groups(build.backend, installed),
        "minors": [installed.nvidia_minors.get(gpu.pci_bus_id.lower(), gpu.index) for gpu in plan.gpus],
        "after": _after(instance.listen, build.backend, bool(plan.gpus), installed),
        "restart": {} if on_demand else RESTART if systemd(installed) >= RESTART_STEPS_SINCE else OLD_RESTART,
        "release": build.release,
        "libraries": _libraries(build),
        "families": ("AF_UNIX",) if on_demand else families(instance.listen, bool(plan.gpus)),
        "clients": clients(instance),
        "cpus": plan.cpus,
        "numa_nodes": plan.numa_nodes,
        "memory_max_bytes": int(plan.host_bytes * MEMORY_MARGIN) + MEMORY_SPARE,
        "memory_swap_max": "infinity" if allow_swap else "0",
    }


def path_of(python: str) -> str:
    """The setting `python` as a unit has it: systemd of old wants a path."""
    return "/usr/bin/python3" if python == SYSTEM_PYTHON else python


def groups(backend: str, installed: Installed) -> tuple[str, ...]:
    """The groups without which a server cannot open the backend's device nodes on this host."""
    both = tuple(dict.fromkeys((*installed.gpu_groups, *installed.nvidia_groups)))
    return {"cuda": installed.nvidia_groups, "hip": installed.gpu_groups, "vulkan": both}.get(backend, ())


def mount_unit(path: str) -> str:
    """The name of systemd's unit for what is mounted there (systemd.unit, "String escaping"), for a path but /."""
    words = path.strip("/").encode(errors="replace")
    kept = re.sub(rb"[^A-Za-z0-9:_./]|^\.", lambda one: b"\\x%02x" % one[0][0], words)
    return f"{kept.decode().replace('/', '-')}.mount"


def _device_classes(backend: str, installed: Installed) -> tuple[str, ...]:
    """For CUDA every class that NVIDIA's driver is known to make, whether it has made it yet or not: the unit must
    not differ after the driver was first used. systemd passes over a class that does not exist."""
    known = NVIDIA_CLASSES if backend == "cuda" else ()
    return tuple(sorted({*known, *installed.device_classes}))


def _after(listen: str, backend: str, gpu: bool, installed: Installed) -> tuple[str, ...]:
    """The units that come up before a server: the network, and of those that the host starts at a boot what makes its
    GPUs usable and may bring its address."""
    address = ipaddress.ip_address(listen)
    kinds = (["gpu"] if gpu else []) + ([] if address.is_loopback or address.is_unspecified else ["network"])
    own = ("network-online.target", *(("nvidia-persistenced.service",) if backend == "cuda" else ()))
    return tuple(dict.fromkeys((*own, *(unit for kind in kinds for unit in installed.boot_units.get(kind, ())))))


def systemd(installed: Installed) -> int:
    """The number of the host's systemd; 0 where it is not known."""
    found = re.match(r"\d{1,6}", installed.ground.get("systemd") or "")
    return int(found[0]) if found else 0


def _libraries(build: Build) -> tuple[str, ...]:
    """Folders of libraries: the system's, the backend's, and those of a CUDA toolkit that lies elsewhere."""
    toolkit = (f"-{PurePosixPath(build.nvcc).parent.parent}",) if build.nvcc else ()
    return tuple(dict.fromkeys((*LIBRARIES, *BACKEND_LIBRARIES.get(build.backend, ()), *toolkit)))


def families(listen: str, gpu: bool) -> tuple[str, ...]:
    """Socket families: that of the address; AF_UNIX for daemons that GPU drivers speak with (MPS, persistenced)."""
    own = "AF_INET6" if ":" in listen else "AF_INET"
    return (own, "AF_UNIX") if gpu else (own,)


def address_from_host(listen: str) -> str:
    """The address by which the host itself reaches a server, as IPAddressAllow= takes it."""
    address = ipaddress.ip_address(listen.partition("%")[0])
    return "localhost" if address.is_loopback or address.is_unspecified else str(address)


def clients(instance: Instance) -> tuple[str, ...]:
    """Who may speak with the server, as IPAddressAllow= takes it; empty where everybody may."""
    if ipaddress.ip_address(instance.listen).is_loopback:
        return ("localhost",)
    if not instance.allowed_clients:
        return ()
    # The host itself asks from the address that it asks.
    return tuple(dict.fromkeys(("localhost", address_from_host(instance.listen), *instance.allowed_clients)))


def liveness_texts(render: Renderer, instance: Instance, settings: Settings, helpers: str) -> dict[str, str]:
    """The units of the instance's liveness check by name; empty where the check is switched off. `helpers` is the
    version of our programs that they call."""
    if settings.liveness_seconds == 0:
        return {}
    words = (helper("liveness.py", helpers), plan_path(instance.name), str(settings.liveness_seconds))
    values = {
        "instance": instance,
        "python": path_of(settings.python),
        "command": [unit_escape(word) for word in words],
        "interval_seconds": settings.liveness_interval_seconds,
        "end_seconds": settings.liveness_seconds + LIVENESS_END_SECONDS,
        "family": families(instance.listen, gpu=False)[0],
        "address": address_from_host(instance.listen),
    }
    templates = ("llama-server-liveness.service.j2", "llama-server-liveness.timer.j2")
    names = liveness_units(instance.name)
    return {name: render(template, values) for name, template in zip(names, templates, strict=True)}
