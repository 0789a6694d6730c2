"""The state of the host around a trial: whether something else is at work, how warm and how fast it is, what it uses.

A module of tune.py and under its contract: Python 3.8, standard library, pynvml where the host has NVIDIA's driver;
gate_nvml.py lies beside it. What a host does not tell is left out, or null: a virtual machine often has neither
temperatures nor energy.
"""

from __future__ import annotations

import contextlib
import glob
import os
import time
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple, cast

import gate_nvml

SYS, PROC = "/sys", "/proc"
LOOK_SECONDS = 1.0
# CPUs that may be at work on an idle host: of each twentieth one, and what a system always does.
BUSY_SHARE, BUSY_ALWAYS = 0.05, 0.25
BUSY_GPU_PERCENT = 10
# Drivers of sensors inside a processor (Documentation/hwmon).
PROCESSORS = ("coretemp", "k10temp", "zenpower", "cpu_thermal", "soc_thermal")
# Bits of NVML's reasons for lower clocks (nvml.h, nvmlClocksEventReason...): those that no operator chose.
SLOWED = {0x04: "power limit", 0x08: "hardware slowdown", 0x20: "temperature", 0x40: "temperature",
          0x80: "power brake"}  # fmt: skip


def wait_until_idle(seconds: float) -> Dict[str, Any]:
    """Wait until nothing else is at work, at most so long: "waited_seconds", "busy_cpus" at last, "is_idle"."""
    began = time.monotonic()
    bound = BUSY_ALWAYS + BUSY_SHARE * (os.cpu_count() or 1)
    while True:
        busy = busy_cpus()
        is_idle = busy <= bound and not any(one.get("percent", 0) > BUSY_GPU_PERCENT for one in gpus().values())
        waited = time.monotonic() - began
        if is_idle or waited >= seconds:
            return {"waited_seconds": round(waited, 1), "busy_cpus": round(busy, 2), "is_idle": is_idle}


def busy_cpus() -> float:
    """How many CPUs' worth of time was not idle, for a second. Time that a hypervisor gave to others counts."""
    idle_before, before = _ticks()
    time.sleep(LOOK_SECONDS)
    idle, all_of_them = _ticks()
    passed = all_of_them - before
    return (1 - (idle - idle_before) / passed) * (os.cpu_count() or 1) if passed else 0.0


def _ticks() -> Tuple[int, int]:
    """Those in which the CPUs were idle, and all, since the boot (proc(5), /proc/stat)."""
    with open(f"{PROC}/stat") as file:
        numbers = [int(word) for word in file.readline().split()[1:9]]
    return numbers[3] + numbers[4], sum(numbers)


class Samples:
    """What was seen while a trial ran, in looks at the host from time to time."""

    def __init__(self) -> None:
        self.celsius: List[float] = []
        self.mhz: List[float] = []
        self.throttles = throttles()
        self.gpus: Dict[str, List[Dict[str, Any]]] = {}

    def look(self) -> None:
        self.celsius += processor_celsius()
        self.mhz += processor_mhz()
        for uuid, found in gpus().items():
            self.gpus.setdefault(uuid, []).append(found)

    def told(self) -> Dict[str, Any]:
        """Warmest, mean clock, and what slowed it."""
        more = throttles() - self.throttles
        return {
            "celsius": max(self.celsius, default=None),
            "mhz": round(sum(self.mhz) / len(self.mhz)) if self.mhz else None,
            "throttled": f"the processor was too warm {more} times" if more > 0 else None,
            "gpus": {uuid: _of_gpu(looks) for uuid, looks in self.gpus.items()},
        }


def _of_gpu(looks: List[Dict[str, Any]]) -> Dict[str, Any]:
    clocks = [look["mhz"] for look in looks if "mhz" in look]
    reasons = sorted({reason for look in looks for reason in look.get("slowed", ())})
    return {
        "celsius": max((look["celsius"] for look in looks if "celsius" in look), default=None),
        "mhz": round(sum(clocks) / len(clocks)) if clocks else None,
        "throttled": ", ".join(reasons) or None,
    }


# --- the processor --------------------------------------------------------------------------------


def processor_celsius() -> List[float]:
    """Of each sensor in a processor."""
    found = []
    for folder in glob.glob(f"{SYS}/class/hwmon/hwmon*"):
        if _text(f"{folder}/name") in PROCESSORS:
            found += [number / 1000 for path in glob.glob(f"{folder}/temp*_input")
                      if (number := _number(path)) is not None]  # fmt: skip
    return found


def processor_mhz() -> List[float]:
    """Of each CPU."""
    paths = glob.glob(f"{SYS}/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq")
    return [number / 1000 for path in paths if (number := _number(path)) is not None]


def throttles() -> int:
    """How often the processors were slowed since the boot, because they were too warm: Intel's count each."""
    paths = glob.glob(f"{SYS}/devices/system/cpu/cpu[0-9]*/thermal_throttle/package_throttle_count")
    return sum(_number(path) or 0 for path in paths)


# --- energy -----------------------------------------------------------------------------------------


class Joules:
    """What processors, their memory and GPUs use: `used()` since it was made, None where nothing tells that."""

    def __init__(self) -> None:
        self.began = counters()

    def used(self) -> Optional[float]:
        now = counters()
        spent = [self._since(name, *now[name]) for name in now if name in self.began]
        return sum(spent) if spent else None

    def _since(self, name: str, joules: float, most: float) -> float:
        """Counters of processors begin anew at their greatest value."""
        difference = joules - self.began[name][0]
        return difference if difference >= 0 else difference + most


def counters() -> Dict[str, Tuple[float, float]]:
    """Joules by what used them, with the greatest value of the counter: packages and their memory by RAPL
    (Documentation/power/powercap), GPUs by NVML."""
    found = {}
    for folder in glob.glob(f"{SYS}/class/powercap/intel-rapl:*"):
        used, most = _number(f"{folder}/energy_uj"), _number(f"{folder}/max_energy_range_uj")
        name = _text(f"{folder}/name")
        if used is not None and (name.startswith("package") or name == "dram"):
            found[os.path.basename(folder)] = (used / 1e6, (most or 0) / 1e6)
    for uuid, one in gpus().items():
        if "joules" in one:
            found[uuid] = (one["joules"], 0.0)
    return found


# --- GPUs -------------------------------------------------------------------------------------------

_no_nvml: List[str] = []


def gpus() -> Dict[str, Dict[str, Any]]:
    """By UUID what NVML tells of each GPU: "celsius", "mhz", "slowed", "percent" at work, "joules" since the driver was
    loaded."""
    if _no_nvml:
        return {}
    try:
        found: Any = gate_nvml.by_uuid(_asked)
    except ImportError as error:
        found = str(error)
    if isinstance(found, str):  # once: a host without the driver would be asked all the time
        _no_nvml.append(found)
        return {}
    return cast(Dict[str, Dict[str, Any]], found)


def _asked(nvml: Any, device: Any) -> Dict[str, Any]:
    asked: Dict[str, Callable[[], Any]] = {
        "celsius": lambda: nvml.nvmlDeviceGetTemperature(device, nvml.NVML_TEMPERATURE_GPU),
        "mhz": lambda: nvml.nvmlDeviceGetClockInfo(device, nvml.NVML_CLOCK_SM),
        "slowed": lambda: list(_reasons(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(device))),
        "percent": lambda: nvml.nvmlDeviceGetUtilizationRates(device).gpu,
        "joules": lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(device) / 1000,
    }
    found = {}
    for key, ask in asked.items():
        with contextlib.suppress(nvml.NVMLError):
            found[key] = ask()
    return found


def _reasons(bits: int) -> Iterator[str]:
    return (word for bit, word in SLOWED.items() if bits & bit)


# --- files ------------------------------------------------------------------------------------------


def _text(path: str) -> str:
    try:
        with open(path) as file:
            return file.read().strip()
    except (OSError, ValueError):
        return ""


def _number(path: str) -> Optional[int]:
    text = _text(path)
    return int(text) if text.isascii() and text.lstrip("-").isdigit() else None
