"""Stop the service of an instance for a tune, and put it back, whatever happens to the tune.

Contract: a module of tune.py. `Aside(name, spec)` is used in a `with` block: it takes the lock of the instance's
switches, stops the service where it runs and may be stopped, and puts it back at the end of the block, or lets it stay
stopped for a while where the spec says so. Raises Refused. `guard(name)` is a process outside of the tune's job, begun
before the stop, that puts the service back when the job is gone, silent past its time, or no next batch comes. A host
that boots starts the service by itself: nothing here disables it, and what is noted lies in /run.

A service that somebody else started or stopped, disabled or masked meanwhile is left as it is. That a stopped unit is
stopped again changes nothing in it: a second unit, which is part of it (PartOf=), is stopped with it, and so shows it.

Root, systemd, the standard library, Python 3.8; common.py, lock.py, switch_lock.py, draining.py, starting.py and what
they import lie beside it.

Decision 21: docs/decisions/0021-new-connections-wait-while-replies-end.md.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from typing import Any, Dict, List, Optional

import common
import draining
import lock
import starting
import tune_server
from common import demand_units, show, systemctl, transient_unit, unit_of
from confined import forget
from switch_lock import unswitched

DONE, FAILED, RUNS, CLOSED, HELD = 0, 1, 3, 4, 5  # exit codes of tune.py
LOCK_SECONDS = 60.0  # to wait for whoever else has the instance's lock
# Beside the trial's time: to wait for an idle host or for room, and to start and stop the server. Then the guard takes
# over from a job that says nothing more.
LATE_SECONDS = 180.0
POLL_SECONDS = 1.0
AGAIN_SECONDS = 30.0  # between two tries to start a service that does not start
START_SECONDS = 60.0  # that a service takes to start, where no trial has told how long it loads
DAY = 24 * 3600


class Refused(Exception):
    """Nothing can be measured now; `code` is tune.py's exit code."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(why)
        self.code = code


def note_path(name: str) -> str:
    return f"{common.RUN}/tune-{name}.json"


def mark_of(name: str) -> str:
    """The unit that is stopped where somebody stops the service which is stopped already."""
    return transient_unit("tunemark", name)


def guard_of(name: str) -> str:
    return transient_unit("tuneguard", name)


def units_of(name: str) -> List[str]:
    """What serves: of an instance on demand its socket too."""
    return [*([demand_units(name)[0]] if common.is_on_demand(name) else []), unit_of(name)]


def state_of(unit: str) -> str:
    return show(unit, "ActiveState", seconds=30.0).get("ActiveState", "")


def runs(name: str) -> bool:
    """Whether the service runs, starts, or can be started by a client."""
    return any(state_of(unit) not in ("inactive", "failed", "") for unit in units_of(name))


def start_of(name: str) -> str:
    """Whether the host starts the service at a boot, as `systemctl is-enabled` says it."""
    return common.output_of(["systemctl", "is-enabled", units_of(name)[0]]).strip()


class Aside:
    """The instance without its service."""

    def __init__(self, name: str, spec: Dict[str, Any]) -> None:
        self.name = name
        self.run, self.path = spec.get("run"), str(spec.get("path"))
        self.stops = bool(spec.get("stops"))
        self.window: Optional[str] = spec.get("window")
        self.drain = float(spec.get("drain_seconds") or 0)
        self.stays = float(spec.get("stays_stopped_seconds") or 0)
        self.trial_seconds = float(spec["trial_seconds"])
        self.start_seconds = START_SECONDS
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> "Aside":
        with contextlib.ExitStack() as stack:
            stack.enter_context(locked(self.name))
            if why := self.others():
                raise Refused(HELD, why)
            if is_aside(self.name) and self.has_time():
                self.renew()
                guarded(self.name)
            else:
                if os.path.exists(note_path(self.name)) and (why := put_back(self.name)):
                    raise Refused(FAILED, why)
                if runs(self.name):
                    self.stop()
            self.stack = stack.pop_all()
        return self

    def __exit__(self, kind: Optional[type], *_: object) -> None:
        with self.stack:
            note = common.read_json(note_path(self.name))
            if note and self.stays > 0 and kind is None and is_aside(self.name):
                seconds = min(self.stays, max(0.0, left_of(self.window) - self.start_seconds))
                common.write_json(note_path(self.name), {**note, "waits": True, "until": lock.now() + seconds})
            elif note and (why := put_back(self.name)):
                raise Refused(FAILED, why)

    def others(self) -> Optional[str]:
        """The other run that holds the host; None where there is none. One that joined this batch has written its spec
        anew."""
        holder = lock.read()
        if self.run is None or holder is None or holder["run"] == self.run:
            return None
        if common.read_json(self.path).get("run") == holder["run"]:
            return None
        return f"another run holds the host, that of {holder.get('who', 'somebody')}"

    def disturbed(self) -> Optional[str]:
        """Why a trial cannot go on; None where it can."""
        if why := self.others():
            return why
        if runs(self.name):
            return f"{unit_of(self.name)} was started by somebody else"
        if is_marked(self.name) and state_of(mark_of(self.name)) != "active":
            return f"{unit_of(self.name)} was stopped by somebody else, and stays stopped"
        return None

    def has_time(self) -> bool:
        """Whether a trial that begins now ends inside the window, with the start of the service."""
        is_bound = bool(common.read_json(note_path(self.name)))
        return not is_bound or left_of(self.window) >= self.trial_seconds + self.start_seconds

    def renew(self) -> None:
        """Tell the guard that a trial begins."""
        note = common.read_json(note_path(self.name))
        if note:
            until = lock.now() + self.trial_seconds + LATE_SECONDS
            common.write_json(note_path(self.name), {**note, "waits": False, "until": until, "pid": os.getpid()})

    def stop(self) -> None:
        unit = unit_of(self.name)
        if not self.stops:
            raise Refused(RUNS, f"{unit} runs: set tune_stops_service, so that a tune may stop it, or stop it")
        if left_of(self.window) < self.drain + self.trial_seconds + self.start_seconds:
            raise Refused(CLOSED, f"{unit} runs, and no trial of {self.trial_seconds:.0f} s would end in the window "
                                  f"{self.window}: it is {time.strftime('%H:%M')} here")  # fmt: skip
        timer = starting.timer_of(self.name)
        common.write_json(note_path(self.name), {
            "until": lock.now() + self.drain + LATE_SECONDS, "waits": False, "marked": False, "pid": os.getpid(),
            "start": start_of(self.name), "watched": state_of(timer) == "active",
        })  # fmt: skip
        guarded(self.name)
        drained = draining.Draining([self.name], self.drain)
        systemctl("stop", timer, check=False)  # it would start the service again; one on demand may have none
        print(f"note: {unit} is stopped while it is measured", flush=True)
        starting.stop([self.name], drained)
        mark(self.name)


@contextlib.contextmanager
def locked(name: str) -> Any:
    """Keep the instance from being switched for the block. Raises Refused."""
    os.makedirs(common.RUN, mode=0o755, exist_ok=True)
    over = time.monotonic() + LOCK_SECONDS
    while True:
        with unswitched(name) as free:
            if free:
                yield
                return
        if time.monotonic() > over:
            raise Refused(HELD, f"{unit_of(name)} is being switched or measured: run again when that has ended")
        time.sleep(POLL_SECONDS / 2)


def left_of(window: Optional[str], now: Optional[time.struct_time] = None) -> float:
    """Seconds until the window ends; 0 outside of it, and no end without one."""
    if not window:
        return float("inf")
    begin, end = (int(clock[:2]) * 3600 + int(clock[3:5]) * 60 for clock in window.split("-"))
    now = now or time.localtime()
    passed = (now.tm_hour * 3600 + now.tm_min * 60 + now.tm_sec - begin) % DAY
    length = (end - begin) % DAY or DAY
    return max(0, length - passed)


# --- what is noted, and who notices ---------------------------------------------------------------


def is_marked(name: str) -> bool:
    return bool(common.read_json(note_path(name)).get("marked"))


def is_aside(name: str) -> bool:
    """Whether a tune has stopped the service, and nobody has changed that since."""
    return is_marked(name) and state_of(mark_of(name)) == "active" and not runs(name)


def mark(name: str) -> None:
    """Start the unit that somebody else's stop of the service stops too."""
    parts = " ".join(units_of(name))
    forget(mark_of(name))
    subprocess.run(
        ["systemd-run", "--quiet", "--collect", f"--unit={mark_of(name)}", "--property=Type=oneshot",
         "--property=RemainAfterExit=yes", f"--property=PartOf={parts}", "true"], check=True,
    )  # fmt: skip
    common.write_json(note_path(name), {**common.read_json(note_path(name)), "marked": True})


def guarded(name: str) -> None:
    """Have a process outside of this job put the service back where this job does not."""
    if state_of(guard_of(name)) in ("active", "activating"):
        return
    forget(guard_of(name))
    subprocess.run(
        ["systemd-run", "--quiet", "--collect", f"--unit={guard_of(name)}", "--property=Type=exec",
         "--property=Restart=on-failure", "--property=RestartSec=2", "--property=StartLimitIntervalSec=0",
         "--property=MemoryMax=256M",
         sys.executable, "-s", "-E", "-B", f"{starting.FOLDER}/tune.py", "guard", name], check=True,
    )  # fmt: skip


def guard(name: str) -> int:
    """Wait until the service has to be put back, or has been."""
    while True:
        note = common.read_json(note_path(name))
        if not note:
            return DONE
        is_late = lock.now() > float(note.get("until") or 0)
        failed: Optional[str] = None
        with unswitched(name) as free:
            if free and (is_late or not note.get("waits")) and os.path.exists(note_path(name)):
                failed = put_back(name)
        if failed:
            print(f"error: {failed}", flush=True)
            time.sleep(AGAIN_SECONDS)
        if not free and is_late:
            end_job(note)
        time.sleep(POLL_SECONDS)


def end_job(note: Dict[str, Any]) -> None:
    """Kill a runner that is past its time, so that its lock is free."""
    pid = note.get("pid")
    if isinstance(pid, int) and any(word.endswith("/tune.py") for word in common.command_line(pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def end(name: str) -> int:
    """Put the service back, where a tune has stopped it. Raises Refused."""
    with locked(name):
        if os.path.exists(note_path(name)) and (why := put_back(name)):
            raise Refused(FAILED, why)
    return DONE


def put_back(name: str) -> Optional[str]:
    """Start the service again as it ran before, unless somebody else has decided about it since; None, or why it does
    not start."""
    forget(tune_server.unit_of(name))
    note, unit = common.read_json(note_path(name)), unit_of(name)
    is_stopped = bool(note.get("marked")) and state_of(mark_of(name)) != "active"
    if is_stopped and not runs(name):
        print(f"note: {unit} stays stopped: somebody else stopped it while it was measured", flush=True)
    elif start_of(name) != note.get("start") and not runs(name):
        print(f"note: {unit} stays stopped: it is {start_of(name) or 'gone'} now", flush=True)
    elif why := started(name):
        return why
    else:
        draining.let_in(name)  # of a job that was killed while replies ended
        if note.get("watched"):
            starting.start_watching(name, check=False)
    forget(mark_of(name))
    with contextlib.suppress(FileNotFoundError):
        os.unlink(note_path(name))
    return None


def started(name: str) -> Optional[str]:
    """Start the service, unless it runs; None, or why it does not."""
    if runs(name):
        return None
    systemctl("reset-failed", unit_of(name), check=False)
    if common.is_on_demand(name):
        starting.open_door(name, check=False)
    else:
        systemctl("start", unit_of(name), check=False)
    if not runs(name):
        return f"{unit_of(name)} does not start again after it was measured: journalctl -u {unit_of(name)}"
    print(f"note: {unit_of(name)} {'can be reached' if common.is_on_demand(name) else 'runs'} again", flush=True)
    return None
