"""Display controllers and accelerators on the PCI bus, whether a driver lists them or not.

Part of probe.py and under its contract: Python 3.8, the standard library, reads only.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Dict, List, Optional

import probe_diagnosis
from probe_files import at, container, read

VENDORS = {"0x10de": "nvidia", "0x1002": "amd", "0x8086": "intel"}
OTHERS = {
    "0x1a03": "ASPEED", "0x102b": "Matrox", "0x1013": "Cirrus", "0x1234": "QEMU", "0x1af4": "virtio", "0x1b36": "QXL",
    "0x15ad": "VMware", "0x80ee": "VirtualBox", "0x1414": "Hyper-V", "0x1d0f": "Amazon", "0x1ed5": "Moore Threads",
    "0x19e5": "Huawei", "0x1da3": "Habana", "0x1e60": "Hailo", "0x17cb": "Qualcomm",
}  # fmt: skip
# PCI classes: AMD's data-centre cards are processing accelerators (12), as are NPUs; all other GPUs are displays (03).
DISPLAY, ACCELERATOR = "0x03", "0x12"
# Intel's GPUs with memory of their own, by PCI device id (include/drm/intel/pciids.h): DG1, Ponte Vecchio, DG2 (Arc A,
# Flex, Arc Pro A), Battlemage (Arc B, Arc Pro B).
INTEL_CARDS = re.compile(r"0x(490[5-9]|0b[d-e][0-9a-f]|56[9a-c][0-9a-f]|e2[0-2][0-9a-f])")
INTEL_NAMES = {
    "0x5690": "A770M", "0x5691": "A730M", "0x5692": "A550M", "0x5693": "A370M", "0x5694": "A350M", "0x56a0": "A770",
    "0x56a1": "A750", "0x56a2": "A580", "0x56a5": "A380", "0x56a6": "A310", "0x56b0": "Pro A30M", "0x56b1": "Pro A40",
    "0x56b3": "Pro A60", "0xe20b": "B580", "0xe20c": "B570", "0xe211": "Pro B60", "0xe212": "Pro B50",
}  # fmt: skip
FOR_VIRTUAL_MACHINES = ("vfio-pci", "pci-stub", "pciback", "xen-pciback")


def pci_gpus() -> List[Dict[str, Any]]:
    """By bus id, each with its kind (see `kind_of`) and, if it is not this host's to use, the reason in `withheld`."""
    folders = sorted(at("/sys/bus/pci/devices").glob("*"))
    return [device(folder) for folder in folders if read(folder / "class").startswith((DISPLAY, ACCELERATOR))]


def device(folder: Path) -> Dict[str, Any]:
    number, identifier = read(folder / "vendor"), read(folder / "device")
    vendor = VENDORS.get(number, number or "unknown")
    found = {"pci_bus_id": folder.name, "vendor": vendor, "device_id": identifier}
    kind = kind_of(folder, vendor, identifier)
    return {
        **found,
        "kind": kind,
        "name": name_of(vendor, identifier, kind),
        "driver": driver_of(folder),
        "withheld": withheld(folder, vendor) if kind == "gpu" else None,
        "problem": None,
    }


def kind_of(folder: Path, vendor: str, identifier: str) -> str:
    """gpu, integrated (Intel's), npu, virtual (a function for virtual machines), display or accelerator (of others)."""
    is_accelerator = read(folder / "class").startswith(ACCELERATOR)
    if vendor not in VENDORS.values():
        return "accelerator" if is_accelerator else "display"
    if os.path.lexists(folder / "physfn"):
        return "virtual"
    if vendor != "intel":
        return "gpu"
    if is_accelerator:
        return "npu"
    # Intel's integrated GPUs are on bus 0, at 02.0 on real machines; a virtual machine may have a card there.
    is_integrated = folder.name.split(":")[1] == "00" and not INTEL_CARDS.fullmatch(identifier)
    return "integrated" if is_integrated else "gpu"


def name_of(vendor: str, identifier: str, kind: str) -> str:
    if vendor in VENDORS.values():
        makers = {"nvidia": "NVIDIA", "amd": "AMD", "intel": "Intel"}
        what = {"npu": "NPU", "integrated": "integrated GPU"}.get(kind, "GPU")
        model = INTEL_NAMES.get(identifier) if vendor == "intel" else None
        return f"Intel Arc {model}" if model else f"{makers[vendor]} {what} {identifier}"
    what = "display" if kind == "display" else "accelerator"
    return f"{OTHERS.get(vendor, vendor)} {what} {identifier}"


def driver_of(folder: Path) -> Optional[str]:
    """The kernel's driver that is bound to a device."""
    try:
        return os.path.basename(os.readlink(folder / "driver"))
    except OSError:
        return None


def withheld(folder: Path, vendor: str) -> Optional[str]:
    """Why a GPU is not this host's to use; None where it is, or where nothing is known."""
    driver = driver_of(folder)
    if driver in FOR_VIRTUAL_MACHINES:
        return f"{driver} holds it for virtual machines: unbind it there to use it here"
    inside = container()
    if inside is None:
        return None
    nodes = nodes_of(folder, vendor)
    missing = [node for node in nodes if not at(node).exists()]
    if not missing:
        return None
    return (
        f"it is not given to this container ({inside}), which has no {', '.join(missing)}: give it the device (LXC: an "
        "entry dev0; Docker: --gpus or --device; Podman: --device)"
    )


def nodes_of(folder: Path, vendor: str) -> List[str]:
    """The device nodes without which a GPU cannot be used; empty where they are not known."""
    if vendor == "nvidia":
        told = read(at(f"/proc/driver/nvidia/gpus/{folder.name}/information"))
        minor = re.search(r"^Device Minor:\s*(\d+)", told, re.M)
        return [f"/dev/nvidia{minor[1]}", "/dev/nvidiactl"] if minor else []
    render = sorted(path.name for path in folder.glob("drm/renderD*"))
    return [f"/dev/dri/{name}" for name in render[:1]] + (["/dev/kfd"] if vendor == "amd" and render else [])


def without_withheld(gpus: List[Dict[str, Any]], pci: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """The GPUs without AMD's that are not this host's to use: a container sees them all in /sys."""
    withheld = {one["pci_bus_id"] for one in pci if one["withheld"]}
    kept = [gpu for gpu in gpus if gpu["vendor"] != "amd" or gpu["pci_bus_id"] not in withheld]
    return [dict(gpu, index=index) for index, gpu in enumerate(kept)]


def name_lost_gpus(gpus: List[Dict[str, Any]], pci: List[Dict[str, Any]]) -> None:
    """NVIDIA's GPUs without a bus id get theirs by elimination, where that is unambiguous."""
    listed = {gpu["pci_bus_id"] for gpu in gpus}
    free = [one["pci_bus_id"] for one in pci
            if one["vendor"] == "nvidia" and one["kind"] == "gpu" and not one["withheld"]
            and one["pci_bus_id"] not in listed]  # fmt: skip
    nameless = [gpu for gpu in gpus if gpu["vendor"] == "nvidia" and not gpu["pci_bus_id"]]
    if len(free) == len(nameless):
        for gpu, bus_id in zip(nameless, free):  # noqa: B905 -- zip(strict=) needs Python 3.10; lengths checked
            gpu["pci_bus_id"] = bus_id


def explain_missing(gpus: List[Dict[str, Any]], pci: List[Dict[str, Any]], told: List[str]) -> List[str]:
    """Note with each GPU that no driver lists why that is so, and return what is new in these texts. `told` is what the
    drivers said of themselves. Intel's are listed by Vulkan alone: only their kernel driver is looked at."""
    listed = {gpu["pci_bus_id"] for gpu in gpus}
    problems = []
    for one in pci:
        if one["kind"] != "gpu" or one["withheld"] or one["pci_bus_id"] in listed:
            continue
        one["problem"] = probe_diagnosis.why_unlisted(one, told)
        if one["problem"] and one["problem"] not in told:
            problems.append(f"{one['name']} at {one['pci_bus_id']}: {one['problem']}")
    return problems
