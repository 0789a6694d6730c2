"""Measure how fast this host's processors read memory together, and how fast each computes: that decides how fast a
model on the CPU writes and reads.

Contract: `probe_bandwidth.py THREADS` takes some 1.7 s, 1 GiB of memory at most, and the lowest priority; it prints
{"bytes_per_s": float | null, "core_steps_per_s": float | null, "why": text}, where `why` says what kept it from
measuring, and exits 0. A step is one of the C library's `strverscmp`, see `Steps`. Python 3.8,
standard library and psutil; `probe_files.py` lies beside it. It changes nothing. `hardware` names what a figure is of,
and `measured` runs it in a process of its own: both are for survey.py.
"""

from __future__ import annotations

import ctypes
import functools
import json
import mmap
import os
import re
import subprocess
import sys
import threading
import time
from typing import Any, Dict, List

from probe_files import at, psutil, read

MIB = 2**20
# More than the processors' caches hold, or those would be measured; less than what hurts a host.
LEAST_BYTES, MOST_BYTES, CACHES = 256 * MIB, 1024 * MIB, 2
SHARE_OF_AVAILABLE = 4  # of what is available now, one in so many may be used
MOST_THREADS = 64  # as many reach the limit of any memory
PIECE_BYTES = 4 * MIB  # that are read by one call, some 0.2 ms
ROUNDS, ROUND_SECONDS = 6, 0.1
STEP_ROUNDS, STEP_ROUND_SECONDS = 4, 0.05
STEPS = 16 * 1024 - 1  # of a call, some 30 us; both texts are in a processor's first-level cache
BUSY_SAMPLE_SECONDS, BUSY_PERCENT = 0.2, 20.0
SECONDS = 15.0  # after which it is given up


def main(argv: List[str]) -> int:
    os.nice(19)
    print(json.dumps(bandwidth(int(argv[0]))))
    return 0


def bandwidth(threads: int) -> Dict[str, Any]:
    """Bytes a second that so many threads read together, and steps a second of each while all compute; the best of some
    rounds, since other load only takes away."""
    busy = float(psutil().cpu_percent(interval=BUSY_SAMPLE_SECONDS))
    if busy > BUSY_PERCENT:
        return unmeasured(f"the processors were busy ({busy:.0f} %)")
    threads = max(1, min(threads, MOST_THREADS))
    needed, available = min(max(LEAST_BYTES, CACHES * cache_bytes()), MOST_BYTES), psutil().virtual_memory().available
    if needed * SHARE_OF_AVAILABLE > available:
        return unmeasured(f"only {available // MIB} MiB of memory were available")
    try:
        parts = [Part(needed // threads // PIECE_BYTES * PIECE_BYTES or PIECE_BYTES) for _ in range(threads)]
        together([part.fill for part in parts])
        read_bytes = max(one_round(parts) for _ in range(ROUNDS))
        texts = [Steps() for _ in range(threads)]
        steps = max(steps_of_one(texts) for _ in range(STEP_ROUNDS))
        return {"bytes_per_s": read_bytes, "core_steps_per_s": steps or None, "why": ""}
    except (OSError, MemoryError, AttributeError) as error:
        return unmeasured(f"{type(error).__name__}: {error}")


def unmeasured(why: str) -> Dict[str, Any]:
    return {"bytes_per_s": None, "core_steps_per_s": None, "why": why}


class Part:
    """Memory of one thread in two equal halves, which are compared: that reads both, and writes nothing."""

    def __init__(self, size: int) -> None:
        self.memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.start, self.half = ctypes.addressof(ctypes.c_char.from_buffer(self.memory)), size // 2
        self.read_bytes, self.at = 0, 0
        # A library's function lets other threads of Python run meanwhile; ctypes.memmove does not.
        libc = ctypes.CDLL(None)
        self.compare, self.set = libc.memcmp, libc.memset
        self.compare.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
        self.set.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

    def fill(self) -> None:
        """Untouched pages would all be one page of zeros."""
        self.set(self.start, 1, 2 * self.half)

    def read(self, end: float) -> None:
        self.read_bytes, piece = 0, PIECE_BYTES // 2
        while time.monotonic() < end:
            here = self.start + self.at
            self.compare(here, here + self.half, piece)
            self.read_bytes += PIECE_BYTES
            self.at = (self.at + piece) % self.half


class Steps:
    """Two equal texts that `strverscmp` compares for one thread. Each character is a step of a few cycles that waits
    for the one before, whatever instructions the processor has beside: so it tells how many cycles a second there are.
    """

    def __init__(self) -> None:
        self.texts = [ctypes.create_string_buffer(b"a" * STEPS) for _ in range(2)]
        self.per_s = 0.0
        self.compare = ctypes.CDLL(None).strverscmp
        self.compare.argtypes = [ctypes.c_char_p, ctypes.c_char_p]

    def work(self, end: float) -> None:
        began, done = time.thread_time(), 0  # while the thread waits for a processor it has no cycles
        while time.monotonic() < end:
            self.compare(*self.texts)
            done += STEPS
        self.per_s = done / max(time.thread_time() - began, 1e-9)


def one_round(parts: List[Part]) -> float:
    """Bytes a second that all threads read together."""
    began = time.monotonic()
    end = began + ROUND_SECONDS
    together([functools.partial(part.read, end) for part in parts])
    return sum(part.read_bytes for part in parts) / (time.monotonic() - began)


def steps_of_one(texts: List[Steps]) -> float:
    """Steps a second of a thread, on average, while all compute."""
    end = time.monotonic() + STEP_ROUND_SECONDS
    together([functools.partial(text.work, end) for text in texts])
    return sum(text.per_s for text in texts) / len(texts)


def together(actions: List[Any]) -> None:
    threads = [threading.Thread(target=action) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def cache_bytes() -> int:
    """The largest cache of the first processor; 0 where the kernel does not tell."""
    sizes = [read(path) for path in at("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * 1024 for size in sizes if re.fullmatch(r"[0-9]{1,9}K", size)), default=0)


def hardware(machine: Dict[str, Any]) -> str:
    """What a measurement is of, from the machine file; with other processors or memory it is made again."""
    cpu, gib = machine["cpu"], round(machine["memory"]["total_bytes"] / 2**30)
    return f"{cpu['model']}, {cpu['physical_cores']} cores, {cpu['numa_nodes']} nodes, {gib} GiB"[:200]


def measured(threads: int) -> Dict[str, Any]:
    """What this program prints when it is run by itself, or why it could not be."""
    command = [sys.executable, "-s", "-E", "-B", os.path.abspath(__file__), str(threads)]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              timeout=SECONDS)  # fmt: skip
        return dict(json.loads(done.stdout))
    except subprocess.TimeoutExpired:
        return unmeasured(f"it took longer than {SECONDS:.0f} s")
    except (OSError, ValueError) as error:
        return unmeasured(f"{type(error).__name__}: {error}"[:300])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
