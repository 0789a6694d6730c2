"""The card, limited to less memory than it has: the rest is held by another process, or by flags where it cannot be.

On CUDA a process of ours (this file as a program) allocates the rest by the driver's own library. Elsewhere the limit
is emulated: --fit is given a margin that leaves the limit, and what a server allocated is read in its log. The free
memory of a software device is the machine's, so that --fit is limited only while others allocate and free little.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from llamafleet.host.backends import TRAITS
from llamafleet.host.machine import Gpu, Machine
from llamafleet.units import MIB

ROOT = Path(__file__).resolve().parents[2]
DEVICE = re.compile(r"^\s+(\w+?\d+): (.*) \((\d+) MiB, (\d+) MiB free\)", re.M)  # of --list-devices
# common_memory_breakdown_print: device, total, free, and what the server itself allocated on it
ALLOCATED = re.compile(r"\| +- (\w+) .*\| +\d+ = +\d+ \+ \( *(\d+) =")
FIRST_OF_CUDA = {"CUDA_VISIBLE_DEVICES": "0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}  # NVML's order
END_SECONDS = 60.0  # for the holder
STEP_BYTES, PAGE_BYTES = 1 << 30, 2 << 20  # that are allocated at a time, and that CUDA allocates at least


class CardError(RuntimeError):
    """There is no card to measure on, or its memory cannot be held."""


@dataclass(frozen=True)
class Card:
    """The first device of the backend, as llama-server lists it; memory in MiB."""

    device: str
    name: str
    total_mib: int
    free_mib: int
    backend: str

    @property
    def emulated(self) -> bool:
        """Is the limit one of flags, with nothing held?"""
        return self.backend != "cuda"

    def fit_flags(self, limit_mib: int) -> list[str]:
        """What --fit needs beside its default: nothing where the memory is really held. Else the margin that leaves as
        much as the ledger has for buffers."""
        if not self.emulated:
            return []
        overhead = TRAITS[self.backend].overhead_bytes // MIB
        return ["--fit-target", str(max(0, self.free_mib - (limit_mib - overhead)))]

    def is_over(self, log: str, limit_mib: int) -> bool:
        """Did a server allocate more than an emulated limit? `log` is its own."""
        overhead = TRAITS[self.backend].overhead_bytes // MIB
        return self.emulated and allocated_mib(log, self.device) > limit_mib - overhead

    def machine(self, host: Machine, limit_mib: int) -> Machine:
        """The host with this card alone, which has so much memory."""
        known = next((gpu for gpu in host.gpus if gpu.usable), None)
        gpu = known or Gpu(0, "", self.name, None, 0, 0, "0000:01:00.0", 4, 16, unified_memory=False)
        limited = replace(
            gpu, memory_total_bytes=limit_mib * MIB, memory_used_by_others_bytes=0, problem=None, index=0,
            vulkan_index=0 if self.backend == "vulkan" else None,
        )  # fmt: skip
        return replace(host, gpus=(limited,), vulkan=None, pci_gpus=(), problems=(), notes=())


def allocated_mib(log: str, device: str) -> int:
    """MiB that a server allocated on the device, by the last table in its log; 0 where there is none."""
    return next((int(match[2]) for match in reversed([*ALLOCATED.finditer(log)]) if match[1] == device), 0)


def environment(backend: str, work: Path) -> dict[str, str]:
    """That llama-server has the first card alone. Mesa keeps compiled shaders for the next server in `work`."""
    if backend == "cuda":
        return FIRST_OF_CUDA
    return {TRAITS[backend].visible_variable or "": "0", "MESA_SHADER_CACHE_DIR": str(work / "shaders")}


def find(server: Path, backend: str, variables: Mapping[str, str]) -> Card:
    """The first device of the backend, as llama-server lists it. Raises CardError."""
    done = subprocess.run([str(server), "--list-devices"], capture_output=True, text=True, timeout=120,
                          env={**os.environ, **variables})  # fmt: skip
    prefix = TRAITS[backend].device_prefix
    for match in DEVICE.finditer(done.stdout + done.stderr):
        if match[1].startswith(prefix):
            return Card(match[1], match[2], int(match[3]), int(match[4]), backend)
    raise CardError(f"{server} lists no device of {backend}; it said: {(done.stdout + done.stderr).strip()[-400:]}")


def host_machine() -> Machine:
    """This machine, as the project's probe sees it. Raises CardError."""
    program = ROOT / "llamafleet" / "remote" / "probe.py"
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise CardError(f"{program} failed: {done.stderr.strip()[-400:]}")
    return Machine.from_json(json.loads(done.stdout))


@contextmanager
def limited(card: Card, limit_mib: int) -> Iterator[None]:
    """Within the block the card has this much free memory. Raises CardError."""
    if card.emulated:
        yield
        return
    command = [sys.executable, "-m", "bench.gpu_proof.card", str(limit_mib)]
    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, **FIRST_OF_CUDA}, text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:  # fmt: skip
        assert holder.stdout is not None and holder.stdin is not None  # pipes were asked for
        try:
            answer = holder.stdout.readline()
            told = json.loads(answer or '{"error": "the holder ended without a word"}')
            if "error" in told:
                raise CardError(f"the card's memory could not be held: {told['error']}")
            yield
        finally:
            holder.stdin.close()
            try:
                holder.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                holder.kill()


def hold(cuda: ctypes.CDLL, limit_mib: int) -> int:
    """Allocate device memory until `limit_mib` are free; the free MiB then. `cuda` is the driver's library. The context
    of this process counts as held. Raises CardError."""
    device, context = ctypes.c_int(), ctypes.c_void_p()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    _call(cuda, "cuInit", 0)
    _call(cuda, "cuDeviceGet", ctypes.byref(device), 0)
    _call(cuda, "cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    _call(cuda, "cuCtxSetCurrent", context)
    _call(cuda, "cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    if free.value < limit_mib * MIB:
        raise CardError(f"{free.value // MIB} MiB are free, {limit_mib} are to be left")
    while (more := free.value - limit_mib * MIB) >= PAGE_BYTES:
        place, size = ctypes.c_uint64(), min(more // PAGE_BYTES * PAGE_BYTES, STEP_BYTES)
        _call(cuda, "cuMemAlloc_v2", ctypes.byref(place), ctypes.c_size_t(size))
        _call(cuda, "cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    return free.value // MIB


def _call(library: ctypes.CDLL, name: str, *arguments: object) -> None:
    if status := getattr(library, name)(*arguments):
        raise CardError(f"{name}: CUDA's error {status}")


if __name__ == "__main__":
    try:
        print(json.dumps({"free_mib": hold(ctypes.CDLL("libcuda.so.1"), int(sys.argv[1]))}), flush=True)
        sys.stdin.read()  # it ends with the one who started it
    except (CardError, OSError) as problem:
        print(json.dumps({"error": str(problem)}), flush=True)
        sys.exit(1)
