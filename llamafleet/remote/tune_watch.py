"""Look at the host while a trial runs: how warm and how fast it is, and whether the trial can go on.

A module of tune.py and under its contract: Python 3.8, standard library; confined.py, tune_service.py and tune_state.py
lie beside it.
"""

from __future__ import annotations

import subprocess
import threading
from typing import Optional

import tune_state
from confined import forget
from tune_service import Aside

LOOK_SECONDS = 3.0
ASKED = 3  # at each third look systemd is asked, which takes more


class Watch:
    """Looks at the host while a trial runs, and ends the trial's unit where the trial cannot go on: `why`."""

    def __init__(self, aside: Aside, unit: str) -> None:
        self.aside, self.unit = aside, unit
        self.why: Optional[str] = None
        self.samples = tune_state.Samples()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.look, daemon=True)

    def __enter__(self) -> Watch:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()
        self.samples.look()
        self.why = self.why or self.aside.disturbed()

    def look(self) -> None:
        number = 0
        while not self.over.wait(LOOK_SECONDS):
            number += 1
            try:
                self.samples.look()
                self.why = self.aside.disturbed() if number % ASKED == 0 else None
            except (OSError, subprocess.SubprocessError):  # systemd has no time: the next look tells
                continue
            if self.why:
                forget(self.unit)
                return
