"""A trial's llama-server: started in a unit with the directives of its service, and why it ended.

A module of tune.py and under its contract: Python 3.8, standard library; boot.py, common.py, confined.py,
gate_server.py, hardening_trial.py and tune_prompts.py lie beside it. The unit ends by itself some time after its trial
should have, so that a job that was killed leaves none for long; the next trial of the instance stops it before that.
"""

from __future__ import annotations

import re
import time
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import boot
import gate_server
from common import TEXTS, show, transient_unit, whole_number
from confined import UNKNOWN, forget
from hardening_trial import NO_MEMORY, NOT_TRIED, Started, free_port, how_it_ended, run_words, url_of
from tune_prompts import Failed

POLL_SECONDS = 0.1
LATE_SECONDS = 60  # after the trial's time, until systemd itself ends the server
END_SECONDS = 5.0  # for systemd to say how a server ended whose connection was cut
DIRECTIVE = re.compile(r"[A-Z][A-Za-z0-9]+=")  # begins one; comments and the rest of a long one begin otherwise
# Beside those that start nothing: what tells the service's own messages from others.
LEFT_OUT = (*NOT_TRIED, "SyslogIdentifier", "LogExtraFields", "RuntimeMaxSec")
# systemd's word for it (systemd.exec(5), $SERVICE_RESULT), as systemd-run writes it.
KILLED_FOR_MEMORY = re.compile(r"Finished with result: oom-kill")


class Place(NamedTuple):
    """Where a trial's server listens."""

    unit: str
    host: str
    port: int

    @property
    def url(self) -> str:
        return url_of(self.host, self.port)

    @property
    def folder(self) -> str:
        """Of its RuntimeDirectory=."""
        return self.unit[: -len(".service")]

    @property
    def socket(self) -> str:
        return f"/run/{self.folder}/http.sock"


def unit_of(instance: str) -> str:
    return transient_unit("tune", instance)


class Server:
    """The server of one trial, within a `with` block. Raises Failed."""

    def __init__(self, instance: str, spec: Dict[str, Any], trial: Dict[str, Any], ignored: Sequence[str] = ()) -> None:
        host = str(spec.get("host") or "127.0.0.1")
        self.place = Place(unit_of(instance), host, free_port(host))
        self.lines = [line for line in trial.get("directives") or spec["directives"] if DIRECTIVE.match(line)]
        forget(self.place.unit)  # of a job that was killed
        if any(line.startswith("DeviceAllow=char-nvidia") for line in self.lines):
            boot.make_nodes()  # a unit does it before it starts
        if "{socket}" in trial["argv"]:
            gate_server.trust({"url": self.place.url, "socket": self.place.socket})
        command = words(trial["argv"], self.place)
        kept = [line for line in directives(self.lines, self.place.port) if name_of(line) not in ignored]
        seconds = float(spec["trial_seconds"]) + LATE_SECONDS
        started = run_words(self.place.unit, command, kept, self.place.folder, seconds, trial["environment"])
        self.process = Started(self.place.unit, started)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.__exit__()
        forget(self.place.unit)

    def ready(self, over: float) -> float:
        """Seconds until it has loaded its model. Raises Failed where it ends, or is not ready at `over`."""
        began = time.monotonic()
        while time.monotonic() < over:
            if why := self.ended():
                raise Failed(why)
            status, _ = gate_server.ask(self.place.url, "/health", seconds=5)
            if status == 200:
                return time.monotonic() - began
            time.sleep(POLL_SECONDS)
        raise Failed(f"it did not load its model within {time.monotonic() - began:.0f} s")

    def ended(self, seconds: float = 0) -> Optional[str]:
        """How the server ended; None while it runs."""
        code = self.process.wait(seconds)
        return None if code is None else why(self.process.said(), code, self.lines)

    def unknown(self) -> Optional[str]:
        """The directive that this systemd does not know, for which it did not start the unit. A unit file may have
        such a one."""
        found = UNKNOWN.search(self.process.said())
        return found[1] if found and found[1] in map(name_of, self.lines) else None

    def peak_bytes(self) -> Optional[int]:
        """None where systemd or the kernel does not count it; a number without an end says the same."""
        return whole_number(show(self.place.unit, "MemoryPeak").get("MemoryPeak"))


def why(said: str, code: int, lines: Sequence[str]) -> str:
    """How a server ended, with its last words; where memory was missing, that first."""
    if KILLED_FOR_MEMORY.search(said):
        limit = next((line for line in lines if line.startswith("MemoryMax=")), "the host's memory")
        return f"out of memory: the server was killed, for it needed more than {limit}"
    missing = [line.strip() for line in said.splitlines() if NO_MEMORY.search(line)]
    if missing:
        return f"out of memory: {missing[0][:200]}"
    return f"the server ended: {how_it_ended(said, code)}"


def name_of(line: str) -> str:
    return line.partition("=")[0]


def words(argv: Sequence[str], place: Place) -> List[str]:
    """The command with what stands for places."""
    known = {"{port}": str(place.port), "{host}": place.host, "{socket}": place.socket}
    begin, folder = "{credentials}/", f"/run/credentials/{place.unit}/"
    return [folder + word[len(begin) :] if word.startswith(begin) else known.get(word, word) for word in argv]


def directives(lines: Sequence[str], port: int) -> List[str]:
    """Those of the service that a trial has: its sandbox and its limits, and files that are no secrets."""
    kept = [line for line in lines if name_of(line) not in LEFT_OUT or is_text(line)]
    return [f"SocketBindAllow=tcp:{port}" if line.startswith("SocketBindAllow=") else line for line in kept]


def is_text(line: str) -> bool:
    """Whether it loads a chat template, a grammar or a schema."""
    return line.startswith("LoadCredential=") and line.partition("=")[2].partition(":")[0] in TEXTS
