"""One run of a command, with what it cost."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Cost:
    """Seconds by the clock and of the processor, the most resident memory, and what was printed."""

    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int
    text: str


def one_run(name: str, command: Sequence[str]) -> Cost:
    """Run the command in the checkout. Raises SystemExit with the end of what it printed where it fails."""
    with tempfile.TemporaryFile("w+") as output:
        began = time.monotonic()
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                                   env={**os.environ, "PYINFRA_PROGRESS": "off"})  # fmt: skip
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.monotonic() - began
        output.seek(0)
        text = output.read()
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{name} failed:\n{text[-4000:]}")
    return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, text)
