"""The log on standard output, a line of text each time, and the progress of the download.

Part of fetch.py and under its contract: Python 3.8, standard library, what lies beside it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

GIB = 2**30
MIB = 2**20
PROGRESS_S, PROGRESS_SHARE = 5.0, 0.05


def say(line: str) -> None:
    print(line, flush=True)


def gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB // 10 else f"{count} bytes"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@dataclass
class Progress:
    """Counts the bytes of all files together and says so now and then. `total` 0: not known."""

    total: int
    present: int = 0
    began: float = field(default_factory=time.monotonic)
    moved: int = 0
    said_at: float = 0.0
    said_share: float = 0.0

    def add(self, count: int, name: str) -> None:
        self.present += count
        self.moved += count
        if not self.moved:
            return  # no speed, so no time left
        share = min(1.0, self.present / self.total) if self.total else 0.0
        now = time.monotonic()
        if now - self.said_at < PROGRESS_S and share - self.said_share < PROGRESS_SHARE:
            return
        self.said_at, self.said_share = now, share
        speed = self.moved / max(now - self.began, 0.001)
        if not self.total:
            say(f"progress {gib(self.present)} so far, {speed / MIB:.0f} MiB/s ({name})")
            return
        left = duration(max(self.total - self.present, 0) / max(speed, 1.0))
        say(f"progress {100 * share:.0f} % of {gib(self.total)}, {speed / MIB:.0f} MiB/s, {left} left ({name})")
