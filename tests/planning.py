"""What the planning tests share: machines, settings and models as a case file names them."""

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
    """A machine; each GPU is its MiB or a dictionary of what differs from an RTX 4090; `cpu` is what differs there."""
    return Machine.from_json({
        "schema": 1,
        "hostname": "box1",
        "os": {"id": "debian", "version": "13", "arch": "x86_64", "libc": "2.41"},
        "cpu": {"model": "i5-13400F", "sockets": 1, "physical_cores": 10, "logical_cores": 16,
                "performance_cores": performance_cores, "numa_nodes": 1, "flags": ["avx2"], **dict(cpu)},
        "memory": {"total_bytes": ram_gib * 2**30, "swap_total_bytes": swap_gib * 2**30,
                   "available_bytes": (ram_gib - 2 if available_gib is None else available_gib) * 2**30},
        "gpus": [gpu(index, one) for index, one in enumerate(gpus)],
        "driver": {"nvidia": "580.159.04", "cuda": "13.0"},
        "disks": [],
        **more,
    })  # fmt: skip


def gpu(index, given):
    changes = dict(given) if isinstance(given, dict) else {"total_mib": given}
    total, used = changes.pop("total_mib", 24564), changes.pop("used_by_others_mib", 0)
    return {
        "index": index, "uuid": f"GPU-{index}", "name": "NVIDIA GeForce RTX 4090", "compute_capability": "8.9",
        "memory_total_bytes": total * MIB, "memory_used_by_others_bytes": used * MIB,
        "pci_bus_id": f"0000:{index + 1:02x}:00.0", "pcie_generation": 4, "pcie_width": 16, "unified_memory": False,
        **changes,
    }  # fmt: skip


def settings(*instances, **changes):
    entries = [{"name": f"m{n}", "source": "/m.gguf", "port": 9000 + n, **one} for n, one in enumerate(instances)]
    return Settings.from_data({**default_data(), **changes, "models": entries})


@functools.cache
def header(layout, quant=""):
    """A published model's header, by sandbox.models' layout name."""
    with tempfile.TemporaryDirectory() as folder:
        return read_path(models.weightless(Path(folder), layout, quant))


def plans(host, layouts, asked, corrections=None, measurements=None):
    requests = [(one, header(*name)) for one, name in zip(asked.models, layouts, strict=True)]
    return plan_host(host, requests, asked, corrections or {}, measurements or NOT_MEASURED)


def argument(argv, flag):
    """The value behind a flag; None if it is not there."""
    argv = list(argv)
    return argv[argv.index(flag) + 1] if flag in argv else None
