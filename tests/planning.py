"""Machines, settings and models for the planning tests, in the terms of a case file."""

import functools
import tempfile
from pathlib import Path

from llamafleet.cli.arguments import default_data
from llamafleet.host.machine import Machine
from llamafleet.host.speeds import NOT_MEASURED
from llamafleet.model.gguf import read_path
from llamafleet.planner.plan import plan_host
from llamafleet.settings.schema import Settings
from sandbox import models

MIB = 2**20


def machine(gpus=(), *, ram_gib=64, available_gib=None, swap_gib=0, performance_cores=6, cpu=(), **more):
    """A machine. Each GPU is its MiB or a dictionary of differences to an RTX 4090; `cpu` has differences to the default."""
    return Machine.from_json({
        "schema": 1,
        "hostname": "box1",
        "os": {"id": "debian", "version": "13", "arch": "x86_64", "libc": "2.41"},
        "cpu": {"model": "i5-13400F", "sockets": 1, "physical_cores": 10, "logical_cores": 16,
                "performance_cores": performance_cores, "numa_nodes": 1, "flags": ["avx2"], **dict(cpu)},
        "memory": {"total_bytes": ram_gib * 2**30, "swap_total_bytes": swap_gib * 2**30,
                   "available_bytes": (ram_gib - 2 if available_gib is None else available_gib) * 2**30},
        "gpus": [gpu(index, changes) for index, changes in enumerate(gpus)],
        "driver": {"nvidia": "580.159.04", "cuda": "13.0"},
        "disks": [],
        **more,
    })  # fmt: skip


def gpu(index, changes):
    changes = dict(changes) if isinstance(changes, dict) else {"total_mib": changes}
    total, used = changes.pop("total_mib", 24564), changes.pop("used_by_others_mib", 0)
    return {
        "index": index, "uuid": f"GPU-{index}", "name": "NVIDIA GeForce RTX 4090", "compute_capability": "8.9",
        "memory_total_bytes": total * MIB, "memory_used_by_others_bytes": used * MIB,
        "pci_bus_id": f"0000:{index + 1:02x}:00.0", "pcie_generation": 4, "pcie_width": 16, "unified_memory": False,
        **changes,
    }  # fmt: skip


def settings(*instances, **changes):
    entries = [
        {"name": f"m{n}", "source": "/m.gguf", "port": 9000 + n, **instance} for n, instance in enumerate(instances)
    ]
    return Settings.from_data({**default_data(), **changes, "models": entries})


@functools.cache
def header(layout, quant=""):
    """A published model's header, by sandbox.models' layout name."""
    with tempfile.TemporaryDirectory() as folder:
        return read_path(models.weightless(Path(folder), layout, quant))


def plans(host, layouts, settings, corrections=None, measurements=None):
    requests = [(instance, header(*name)) for instance, name in zip(settings.models, layouts, strict=True)]
    return plan_host(host, requests, settings, corrections or {}, measurements or NOT_MEASURED)


def argument(argv, flag):
    """The value of a flag; None if the flag is missing."""
    argv = list(argv)
    return argv[argv.index(flag) + 1] if flag in argv else None
