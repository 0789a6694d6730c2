"""The lock of an instance, which switch.py holds while it switches it. A module of liveness.py and room.py; common.py
lies beside it. Python 3.8, standard library."""

from __future__ import annotations

import contextlib
import fcntl
from typing import Iterator  # the contract is Python 3.8, whose own is typing's

import common


@contextlib.contextmanager
def unswitched(name: str) -> Iterator[bool]:
    """Keep the instance from being switched for the block; False, without its lock, where that is under way."""
    with open(f"{common.RUN}/switch-{name}.lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
