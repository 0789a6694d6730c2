"""Why no driver lists a GPU that is on the PCI bus, and what to do: a driver of another kind or none, Secure Boot, a
kernel without the module, a GPU that fell off the bus.

Part of probe.py and under its contract: Python 3.8, the standard library, reads only.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Dict, List, Optional

from probe_files import at, read

# By vendor: the modules that list its GPUs for us, and what to install for them.
MODULES = {"nvidia": ("nvidia",), "amd": ("amdgpu",), "intel": ("i915", "xe")}
PACKAGE = {
    "nvidia": "NVIDIA's driver (such as nvidia-driver or nvidia-open)",
    "amd": "a kernel with amdgpu, and the firmware (firmware-amd-graphics or linux-firmware)",
    "intel": "a kernel with i915 or xe, and the firmware (firmware-intel-graphics or linux-firmware)",
}
SECURE_BOOT = "/sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
UNSIGNED = "sign the module and enrol the key (mokutil --import, then reboot and confirm), or switch Secure Boot off"
# What kernel and drivers log where a GPU cannot be used: NVIDIA's, AMD's, and the check of signatures.
LOGGED = re.compile(
    r"NVRM: .*(?:Xid|fallen off|RmInitAdapter failed|not supported|API mismatch|requires use of)|"
    r"amdgpu .*(?:Fatal error|failed|lost from bus)|Lockdown: modprobe|Loading of (?:unsigned )?module|"
    r"Key was rejected by service|module verification failed"
)
LOG_RECORDS = 50_000


def why_unlisted(device: Dict[str, Any], told: List[str]) -> Optional[str]:
    """The cause and the way out, as a text; None where nothing is wrong. `told`: what its drivers say is wrong."""
    vendor, driver = device["vendor"], device["driver"]
    if is_silent(device["pci_bus_id"]):
        why = "it does not answer on the PCI bus (fallen off the bus): check power, cables and riser, then reboot"
    elif driver in MODULES[vendor]:
        if vendor == "intel":
            return None  # Vulkan lists it
        why = " ".join(told) or f"{driver} drives it and does not list it: see dmesg, then reboot"
    elif driver in ("nouveau", "nova", "nova_core", "NovaCore"):
        why = f"{driver} drives it: install {PACKAGE[vendor]}, which keeps {driver} from loading, and reboot"
    elif driver is not None:
        why = f"{driver} drives it, which no backend of llama.cpp uses: install {PACKAGE[vendor]}, and reboot"
    else:
        why = without_driver(vendor)
    said = last_logged(device["pci_bus_id"])
    return f"{why}; the kernel logged: {said}" if said else why


def is_silent(bus_id: str) -> bool:
    """Whether a device's configuration reads as ones alone: what a bus gives where nothing answers."""
    try:
        with open(at(f"/sys/bus/pci/devices/{bus_id}/config"), "rb") as file:
            return file.read(4) == b"\xff" * 4
    except OSError:
        return False


def without_driver(vendor: str) -> str:
    """Why no driver is bound to a GPU of this vendor."""
    names = MODULES[vendor]
    for name in names:
        if at(f"/sys/module/{name}").exists():
            return (
                f"the module {name} is loaded and does not take it: this version may not know the GPU, or lack its "
                "firmware: see dmesg"
            )
    if vendor != "nvidia" and re.search(r"\bnomodeset\b", read(at("/proc/cmdline"))):
        return f"the kernel was started with nomodeset, which keeps {names[0]} from its GPUs: remove it, and reboot"
    return f"no driver is bound to it: {module_missing(vendor)}"


def module_missing(vendor: str) -> str:
    """Why the kernel module of this vendor's driver is not loaded, with the way out."""
    names = MODULES[vendor]
    kernel = read(at("/proc/sys/kernel/osrelease")) or os.uname().release
    folders = at("/lib/modules") if at("/lib/modules").is_dir() else at("/usr/lib/modules")
    kernels = sorted(path.name for path in folders.glob("*") if path.is_dir())
    if kernels and kernel not in kernels:
        return f"the modules of the running kernel {kernel} are gone, it was updated: reboot"
    if has_module(folders / kernel, names):
        if has_secure_boot():
            return f"Secure Boot is on and does not let the kernel load the module {names[0]}: {UNSIGNED}"
        return f"its module is there and not loaded: modprobe {names[0]}, and see dmesg"
    others = [one for one in kernels if one != kernel and has_module(folders / one, names)]
    if others:
        return (
            f"the module {names[0]} was built for kernel {others[-1]}, and {kernel} runs: reboot into that one, or "
            f"install the headers of {kernel} and build it (dkms autoinstall)"
        )
    return f"install {PACKAGE[vendor]}, and reboot"


def has_module(folder: Path, names: "tuple[str, ...]") -> bool:
    """Whether a kernel's modules have one of these: nvidia.ko.zst, or nvidia-current.ko as Debian calls it."""
    wanted = re.compile(rf"(?:{'|'.join(names)})(?:-current\w*)?\.ko(?:\.\w+)?")
    return any(wanted.fullmatch(name) for _, _, files in os.walk(folder) for name in files)


def has_secure_boot() -> bool:
    """Whether the firmware enforces signatures: the last byte of the EFI variable; False where there is no EFI."""
    try:
        return at(SECURE_BOOT).read_bytes()[-1:] == b"\x01"
    except OSError:
        return False


def last_logged(bus_id: str) -> str:
    """The last line of the kernel's log about a GPU that cannot be used, of this one if there is one; or empty."""
    lines = [line.partition(";")[2] or line for line in kernel_log().splitlines() if LOGGED.search(line)]
    own = [line for line in lines if bus_id in line or bus_id.rsplit(".", 1)[0] in line]
    return (own or [line for line in lines if not re.search(r"[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}", line)] or [""])[-1]


def kernel_log() -> str:
    """What the kernel has in its log, LOG_RECORDS of it at most; empty where it may not be read."""
    parts: List[bytes] = []
    try:
        handle = os.open(at("/dev/kmsg"), os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return ""
    try:
        while len(parts) < LOG_RECORDS:
            part = os.read(handle, 8192)  # one record
            if not part:
                break
            parts.append(part)
    except OSError:  # there are no more
        pass
    finally:
        os.close(handle)
    return b"".join(parts).decode("utf-8", "replace")
