"""Small files of /proc and /sys, as the probe and its part for GPUs read them.

Part of probe.py and probe_gpus.py and under their contract: Python 3.8, the standard library, reads only.
"""

from __future__ import annotations

from pathlib import Path


def read(path: Path | str, default: str = "") -> str:
    """A small file's text without surrounding space; `default` where it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return default


def number(path: Path | str) -> int | None:
    """A file that holds one decimal number; None where it does not."""
    text = read(path)
    return int(text) if text.isdigit() else None
