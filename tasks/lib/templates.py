"""What is installed as text: the unit, from its Jinja template, and the record beside it."""

from __future__ import annotations

import hashlib
import ipaddress
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from llamafleet.build.release import MIB, Build
from llamafleet.host.machine import Gpu
from llamafleet.host.vulkan import SOFTWARE
from llamafleet.planner.flags import device_names
from llamafleet.planner.result import Plan
from llamafleet.service.command import unit_escape
from llamafleet.service.trial import told_to_host
from llamafleet.settings.schema import Instance, Settings
from tasks.lib.facts import Survey
from tasks.lib.lookups import Model

TEMPLATES = Path(__file__).resolve().parent.parent.parent / "templates"
_environment = Environment(
    loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    keep_trailing_newline=True, autoescape=False,  # noqa: S701 - units and scripts, not HTML
)  # fmt: skip

# Character device classes of NVIDIA's driver: 535 and older need nvidia-frontend, MIG nvidia-caps.
NVIDIA_CLASSES = ("nvidia", "nvidia-caps", "nvidia-frontend", "nvidia-modeset", "nvidia-uvm")

# Where programs may be loaded from beside the release: the loader and the libraries of the system ("-": not
# every system has each), without its programs.
LIBRARIES = ("-/usr/lib", "-/usr/lib64", "-/usr/lib32", "-/lib", "-/lib64", "-/lib32")
BACKEND_LIBRARIES = {"cuda": ("-/usr/local",), "hip": ("-/opt/rocm",), "vulkan": ("-/usr/local/lib",)}

# What a server has no business with, hidden although its user could mostly not read it either.
HIDDEN = ("-/boot", "-/etc/llamafleet", "-/etc/ssh", "-/etc/ssl/private", "-/opt/llamafleet/helpers",
          "-/run/llamafleet", "-/srv", "-/var/backups", "-/var/lib/llamafleet/build", "-/var/lib/llamafleet/good",
          "-/var/lib/llamafleet/jobs", "-/var/lib/llamafleet/src", "-/var/lib/llamafleet/staged", "-/var/log",
          "-/var/spool")  # fmt: skip

GATE = "/opt/llamafleet/helpers/current/gate.py"

LIVENESS = "/opt/llamafleet/helpers/current/liveness.py"

# Nobody serves from a disk that is slower, bytes a second. The gate measures the disk, and waits less.
SLOWEST_LOAD = 10 * MIB
# Before a server answers: start, warm-up, GPU initialisation, seconds.
START_SECONDS = 60
# Above the planned host memory, for what a process needs beside its model: share and bytes.
MEMORY_MARGIN, MEMORY_SPARE = 1.1, 1024 * MIB


def health_seconds(model: Model) -> int:
    """The most that an instance may load, from the size of its model; gate_load.py has the real deadline."""
    return START_SECONDS + model.header.file_bytes_total // SLOWEST_LOAD


def plan_record(
    instance: Instance, plan: Plan, build: Build, model: Model, path: str, argv: tuple[str, ...],
    *, speed_floor_percent: int,
) -> dict[str, Any]:  # fmt: skip
    """plan.json: what was decided, what is checked, and of what it was made.

    `identity` is a hash of everything that makes a difference to the running service; the ledger's
    free bytes, which drift from run to run, do not.
    """
    gate = {
        "unit": instance.unit,
        "argv": list(argv),
        "url": f"{'https' if instance.tls_certificate_file else 'http'}://{url_host(instance.listen)}:{instance.port}",
        "api_keys": credentials(instance).get("api-keys"),
        "tls_certificate": credentials(instance).get("tls-certificate"),
        "health_seconds": health_seconds(model),
        "context_tokens": plan.context_tokens,
        "slots": plan.slots,
        "kv_type": plan.kv_type,
        "speed_floor_percent": speed_floor_percent,
        "backend": build.backend,
        "gpus": [
            {"uuid": gpu.uuid, "name": gpu.name, "device": device, **_planned(plan, gpu)}
            for gpu, device in zip(plan.gpus, device_names(plan.backend, len(plan.gpus)), strict=True)
        ],
    }
    files = [{"path": f"{path.rsplit('/', 1)[0]}/{file.name}", "size_bytes": file.size_bytes, "sha256": file.sha256}
             for file in model.files]  # fmt: skip
    record = {
        "schema": 1,
        "name": instance.name,
        "source": instance.source,
        "release": build.key,
        "commit": build.commit,
        "backend": build.backend,
        "files": files,
        "gate": gate,
        "cpus": plan.cpus,
        "numa_nodes": plan.numa_nodes,
    }
    identity = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]
    return {**record, "identity": identity, **told_to_host(argv), "plan": plan.to_json()}


def credentials(instance: Instance) -> dict[str, str]:
    """The unit's credentials by name: where the host keeps them, for root alone."""
    names = ["api-keys"] if instance.api_key_file else []
    names += ["tls-certificate", "tls-key"] if instance.tls_certificate_file else []
    return {name: f"/etc/llamafleet/instances/{instance.name}/{name}" for name in names}


def url_host(address: str) -> str:
    """The address as it stands in a URL that reaches it from the host itself."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)  # noqa: S104 -- compared with, never bound
    return f"[{reachable}]" if ":" in reachable else reachable


def _planned(plan: Plan, gpu: Gpu) -> dict[str, int]:
    """Bytes that llama.cpp itself allocates on a GPU, by part; but for what is staged its process must hold them."""
    row = next(row for row in plan.ledger if row.device == f"GPU{gpu.index}")
    parts = {name: getattr(row, name) for name in ("weights_bytes", "kv_bytes", "compute_bytes")}
    held = sum(parts.values()) + min(0, row.staging_bytes)
    return {"planned_bytes": held, **parts, "staging_bytes": row.staging_bytes}


def _device_classes(backend: str, survey: Survey) -> tuple[str, ...]:
    """Of NVIDIA's driver all that it is known to make, whether it has made them yet or not: the unit must
    not differ after the driver was first used. systemd passes over a class that is not there."""
    known = NVIDIA_CLASSES if backend == "cuda" else ()
    return tuple(sorted({*known, *survey.found.device_classes}))


def _libraries(build: Build) -> tuple[str, ...]:
    """Folders of libraries: the system's, the backend's, and a CUDA toolkit's that lies elsewhere."""
    toolkit = (f"-{Path(build.nvcc).parent.parent}",) if build.nvcc else ()
    return tuple(dict.fromkeys((*LIBRARIES, *BACKEND_LIBRARIES.get(build.backend, ()), *toolkit)))


def _families(listen: str, gpu: bool) -> tuple[str, ...]:
    """Socket families: that of the address; AF_UNIX for what GPU drivers speak with (MPS, persistenced)."""
    own = "AF_INET6" if ":" in listen else "AF_INET"
    return (own, "AF_UNIX") if gpu else (own,)


def unit(
    instance: Instance, plan: Plan, build: Build, survey: Survey, record: dict[str, Any], *, allow_swap: bool
) -> str:
    """The whole unit file of an instance."""
    gate = record["gate"]
    return _environment.get_template("llama-server.service.j2").render(
        instance=instance,
        identity=record["identity"],
        command=[unit_escape(argument) for argument in gate["argv"]],
        started=[unit_escape(word) for word in (GATE, "start", f"/etc/llamafleet/instances/{instance.name}/plan.json")],
        start_seconds=gate["health_seconds"] + 30,
        credentials=credentials(instance),
        environment=plan.environment,
        gpu=bool(plan.gpus),
        cuda=build.backend == "cuda",
        # A software device compiles its shaders to code of this CPU while it runs.
        compiles_code=any(gpu.vendor == SOFTWARE for gpu in plan.gpus),
        device_classes=_device_classes(build.backend, survey),
        groups=survey.found.gpu_groups if build.backend in ("hip", "vulkan") else (),
        release=build.release,
        hidden=HIDDEN,
        libraries=_libraries(build),
        families=_families(instance.listen, bool(plan.gpus)),
        loopback=ipaddress.ip_address(instance.listen).is_loopback,
        cpus=plan.cpus,
        numa_nodes=plan.numa_nodes,
        memory_max_bytes=int(plan.host_bytes * MEMORY_MARGIN) + MEMORY_SPARE,
        memory_swap_max="infinity" if allow_swap else "0",
    )


def liveness(instance: Instance, settings: Settings) -> dict[str, str]:
    """Units of the instance's liveness check by name; none where it is switched off."""
    if settings.liveness_seconds == 0:
        return {}
    words = (LIVENESS, f"/etc/llamafleet/instances/{instance.name}/plan.json", str(settings.liveness_seconds))
    return {
        f"llama-server-{instance.name}-liveness.{kind}": _environment.get_template(
            f"llama-server-liveness.{kind}.j2"
        ).render(
            instance=instance, command=[unit_escape(word) for word in words],
            interval_seconds=settings.liveness_interval_seconds,
        )
        for kind in ("service", "timer")
    }  # fmt: skip
