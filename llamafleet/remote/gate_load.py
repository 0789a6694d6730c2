"""How long an instance may load before the gate takes it for hanging, and why one may not be ready then.

Part of gate.py and under its contract: Python 3.8, standard library.

    START_SECONDS + model bytes / (LOAD_SHARE x min(disk speed, FASTEST_LOAD)), at most the plan's limit

The disk's speed is measured here and now and is part of no plan, so that noise changes no identity.
"""

from __future__ import annotations

import mmap
import os
import time

MIB = 1 << 20
# Before a server answers: start, initialisation of the GPU, warm-up, seconds.
START_SECONDS = 60.0
# llama-server loads slower than the disk reads: it repacks, and copies to the GPU.
LOAD_SHARE = 0.5
# Bytes a second. A faster disk does not make loading faster.
FASTEST_LOAD = 1024 * MIB
# A measurement reads this much in pieces spread over the files, and ends after so many seconds.
PIECE_BYTES, PIECES, MEASURE_SECONDS = 4 * MIB, 16, 2.0


def deadline(files: list[str], limit: float) -> tuple[float, str]:
    """Seconds that loading may take, and how they were calculated."""
    sizes = {path: os.stat(path).st_size for path in files if os.path.exists(path)}
    speed = read_speed(sizes)
    if speed is None:
        return limit, "the plan's limit: the model's files cannot be read"
    rate = LOAD_SHARE * min(speed, FASTEST_LOAD)
    seconds = START_SECONDS + sum(sizes.values()) / rate
    told = f"{START_SECONDS:.0f} s and {sum(sizes.values()) / MIB:.0f} MiB at {rate / MIB:.0f} MiB/s"
    return min(seconds, limit), told


def read_speed(sizes: dict[str, int]) -> float | None:
    """Bytes a second at which the files' disk reads, past the page cache; None where nothing can be read."""
    pieces = spread(sizes)
    done, began = 0, time.monotonic()
    for path, offset in pieces:
        try:
            done += read_piece(path, offset)
        except OSError:
            continue
        if time.monotonic() - began > MEASURE_SECONDS:
            break
    return done / max(time.monotonic() - began, 1e-6) if done else None


def spread(sizes: dict[str, int]) -> list[tuple[str, int]]:
    """Where to read: PIECES places, evenly over all bytes of all files."""
    total, found = sum(sizes.values()), []
    for number in range(PIECES):
        position = total * number // PIECES
        for path, size in sizes.items():
            if position < size:
                found.append((path, position - position % PIECE_BYTES))
                break
            position -= size
    return sorted(set(found))


def read_piece(path: str, offset: int) -> int:
    """Read a piece with O_DIRECT; where unsupported, evict its range from the page cache first. Returns its bytes."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, offset, PIECE_BYTES, os.POSIX_FADV_DONTNEED)
    try:
        with mmap.mmap(-1, PIECE_BYTES) as buffer:  # of whole pages, as direct I/O wants it
            return os.preadv(handle, [buffer], offset)
    finally:
        os.close(handle)


def why_silent(unit: str, pid: int, status: int) -> str:
    """Why a server that runs is not ready: 503 is llama-server's answer while it loads."""
    if status == 503:
        return "loading takes longer than the deadline"
    if status:
        return "something else answers at its port, or llama-server has an error: its journal says why"
    if is_stopped(pid):
        return f"its process is stopped (SIGSTOP, or a debugger): systemctl kill --signal=CONT {unit}, or restart it"
    return "its process runs and does not answer: it hangs, or has not opened its port yet; its journal says why"


def is_stopped(pid: int) -> bool:
    """Whether the kernel has the process as stopped: state T or t in /proc/PID/stat, proc(5)."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] in (b"T", b"t")
    except (OSError, IndexError):
        return False
