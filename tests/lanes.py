"""`make test`: several processes side by side, each with its log in `.cache/test-LANE.log`, shown at the end.

Sandbox hosts mostly wait, so tests that compute run meanwhile, once llama.cpp is compiled. Every lane is a process
group of its own: an interruption reaches all of it, and takes its hosts down.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sandbox import machine

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / ".cache"
PYTEST = [sys.executable, "-m", "pytest", "-q", "--durations=15", "--durations-min=2"]
# Files of the further lanes with sandbox hosts, in this order; all others are the first one's, where the first deploy
# compiles for all. The last one's host has another libc and compiles for itself.
FURTHER = {
    "second": ("test_06_verify", "test_08_rollback", "test_18_successor", "test_28_tune"),
    "third": ("test_07_faults", "test_10_preflight", "test_16_upgrade", "test_17_drift", "test_19_network"),
    "fourth": (
        "test_11_power", "test_12_fleet", "test_14_odd_answers", "test_09_secrets", "test_20_package_managers",
        "test_29_tune_faults",
    ),
    "fifth": (
        "test_21_vectors", "test_22_vision", "test_23_speculation", "test_24_adapters", "test_26_demand",
        "test_27_real_models",
    ),
    "sixth": ("test_05_uninstall",),
}  # fmt: skip
# Oracle tests of lanes whose hosts are done first; the others are in the lane aside, which begins before llama.cpp is
# compiled.
ASK_TOO = {"first": "test_speculation.py", "second": "test_projector.py", "third": "test_[cdl]*.py",
           "fourth": "test_ad*.py", "fifth": "test_[tv]*.py", "sixth": "test_ar*.py"}  # fmt: skip
# Tests of a second lane that computes: more than half of the processor time of all that need neither host nor oracle.
ASIDE = ("remote", "tasks", "test_*.py")
# What computes lets hosts go first, a little: tests with limits of time would meet them otherwise.
GIVE_WAY = ["nice", "-n", "5"]
# The oracle takes the object files that the first deploy has compiled. All lanes with hosts wait for these: they cannot
# do much before, and that deploy is to compile by itself.
COMPILE = [sys.executable, "-m", "sandbox.oracle_build"]
# For which all others would wait. The first deploy's hosts are bare: once they are up, it keeps nobody waiting.
LAYERS = [*COMPILE, "--layers"]
# Builds that all hosts share: those of other lanes take what the first deploy has compiled.
BUILDS = LOGS / "test-builds"
SHARED = {"E2E_BUILDS": str(BUILDS)}
ADDRESSES = 10  # of a lane's hosts
HOSTS = 26  # of all lanes at a time, and some


@dataclass
class Lane:
    """Commands that run one after another, all of them, whatever becomes of one; a condition among them is waited for."""

    name: str
    steps: Sequence[list[str] | Callable[[], bool]]
    environment: dict[str, str] = field(default_factory=dict)
    codes: list[int] = field(default_factory=list)
    wall_seconds: float = 0
    cpu_seconds: float = 0  # of the commands and what they waited for; what runs in hosts is not among it
    process: subprocess.Popen[bytes] | None = None
    stopped: bool = False

    @property
    def is_green(self) -> bool:
        """Whether it ran all its commands, each with success."""
        return self.codes == [0] * sum(isinstance(step, list) for step in self.steps)

    @property
    def log(self) -> Path:
        return LOGS / f"test-{self.name}.log"

    def run(self) -> None:
        began = time.monotonic()
        with self.log.open("wb") as log:
            for step in self.steps:
                while callable(step) and not self.stopped and not step():
                    time.sleep(1)
                if isinstance(step, list) and not self.stopped:
                    self._run(step, log.fileno())
        self.wall_seconds = time.monotonic() - began
        print(f"--- lane {self.name} ended with {self.codes} after {self.wall_seconds:.0f} s", flush=True)

    def _run(self, command: list[str], log: int) -> None:
        environment = {**os.environ, **self.environment}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0
        )
        _, status, used = os.wait4(self.process.pid, 0)
        self.process.returncode = os.waitstatus_to_exitcode(status)
        self.codes.append(self.process.returncode)
        self.cpu_seconds += used.ru_utime + used.ru_stime

    def stop(self) -> None:
        """Interrupt it, as a terminal would."""
        self.stopped = True
        if self.process and self.process.returncode is None:
            os.killpg(self.process.pid, signal.SIGINT)


def lanes() -> list[Lane]:
    """What runs side by side. Every test but those of CUDA and the long ones is in exactly one lane."""
    ours = "not cuda and not long"
    hosts, oracle = [*PYTEST, "-m", f"e2e and {ours}"], [*GIVE_WAY, *PYTEST, "-m", f"oracle and not e2e and {ours}"]
    offline = [*GIVE_WAY, *PYTEST, "-m", f"not e2e and not oracle and {ours}"]
    aside = sorted(str(path.relative_to(ROOT)) for names in ASIDE for path in ROOT.glob(f"tests/{names}"))
    asking = {lane: sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(f"tests/oracle/{names}"))
              for lane, names in ASK_TOO.items()}  # fmt: skip
    elsewhere = [file(name) for names in FURTHER.values() for name in names]
    first = Lane(
        "first",
        [[*hosts, "tests/e2e", *(f"--ignore={one}" for one in elsewhere)], [*oracle, *asking["first"]]],
        SHARED,
    )

    def is_compiled() -> bool:
        """By the first deploy, or it never will be."""
        return any(BUILDS.glob("*.tar")) or first.wall_seconds > 0

    def is_compiling() -> bool:
        return any(BUILDS.iterdir()) or first.wall_seconds > 0

    return [
        first,
        *(
            Lane(
                name,
                [is_compiled, [*hosts, *map(file, FURTHER[name])], [*oracle, *asking[name]]],
                own_hosts(number, name),
            )
            for number, name in enumerate(FURTHER)
        ),
        Lane(
            "computing",
            [
                [*GIVE_WAY, "make", "--no-print-directory", "check"],
                is_compiling,
                LAYERS,
                is_compiled,
                COMPILE,
                [*offline, *(f"--ignore={one}" for one in aside)],
            ],
        ),
        Lane(
            "aside",
            [
                [*offline, *aside],
                is_compiled,
                COMPILE,
                [*oracle, *sorted(with_oracle() - {one for files in asking.values() for one in files})],
            ],
        ),
    ]


def with_oracle() -> set[str]:
    """The files with questions to llama-server: to collect all others takes many seconds."""
    found = (path for path in ROOT.glob("tests/**/test_*.py") if "mark.oracle" in path.read_text())
    return {str(path.relative_to(ROOT)) for path in found}


def file(name: str) -> str:
    return f"tests/e2e/{name}.py"


def own_hosts(number: int, prefix: str) -> dict[str, str]:
    """Names and addresses of hosts that no other lane has."""
    first = int(os.environ.get("E2E_FIRST_ADDRESS") or 1)
    return {"E2E_PREFIX": prefix, "E2E_FIRST_ADDRESS": str(first + ADDRESSES * (number + 1)), **SHARED}


@contextmanager
def enough_inotify() -> Iterator[None]:
    """Raise the machine's limit once for all lanes: each alone would restore it while others need it."""
    before = LOGS / "inotify_before"
    if os.geteuid() == 0:
        machine.allow_hosts(HOSTS, before)
    try:
        yield
    finally:
        machine.restore(before)


def main() -> int:
    shutil.rmtree(BUILDS, ignore_errors=True)
    BUILDS.mkdir(parents=True)
    for number in (signal.SIGINT, signal.SIGTERM):  # also where this was started in the background, deaf to SIGINT
        signal.signal(number, signal.default_int_handler)
    with enough_inotify():
        running = lanes()
        run(running)
    show(running)
    return 0 if all(lane.is_green for lane in running) else 1


def run(running: list[Lane]) -> None:
    """All lanes, until the last has ended."""
    threads = [threading.Thread(target=lane.run) for lane in running]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except KeyboardInterrupt:
        for lane in running:
            lane.stop()
        for thread in threads:
            thread.join()


def show(running: list[Lane]) -> None:
    """What the lanes said, and how long they took."""
    for lane in running:
        print(f"\n=== {lane.name}: {lane.log.relative_to(ROOT)}", flush=True)
        sys.stdout.buffer.write(lane.log.read_bytes())
        sys.stdout.flush()
    for lane in running:
        print(f"{lane.name}: exit codes {lane.codes}, {lane.wall_seconds:.0f} s, {lane.cpu_seconds:.0f} s of CPU")


if __name__ == "__main__":
    raise SystemExit(main())
