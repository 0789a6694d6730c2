"""The plan against what the built llama-server itself says it would allocate.

Where the two differ by more than the tolerance the binary is right: its difference becomes a `Correction`, and
the plan is made again, a bounded number of times. `tasks/verify.py` asks, on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llamafleet.host.backends import TRAITS
from llamafleet.memory.ledger import NO_CORRECTION, Correction
from llamafleet.memory.placement import HOST
from llamafleet.planner.result import Plan, Refusal
from llamafleet.units import MIB

# The breakdown is printed in whole MiB, cut off; and a GPU's reserve, 1024 MiB, is sixty times this.
TOLERANCE_BYTES = 16 * MIB
TOLERANCE_SHARE = 0.01
ROUNDS = 3
# Flags with a value that the question leaves out: --fit prints the breakdown, secrets and address are not needed.
LEFT_OUT = frozenset({"--fit", "--api-key-file", "--ssl-cert-file", "--ssl-key-file", "--host", "--port"})


def question(argv: Sequence[str]) -> tuple[str, ...]:
    """The service's command line as the question: the same placement, a free port of the loopback, more log."""
    words = iter(argv)
    kept = []
    for word in words:
        if word in LEFT_OUT:
            next(words, None)
        else:
            kept.append(word)
    return (*kept, "--host", "127.0.0.1", "--port", "0", "-lv", "4")


@dataclass(frozen=True)
class Answer:
    """What llama-server told: bytes by its own names of devices and kinds of host memory; None: nothing."""

    told: Mapping[str, int] | None
    why: str = ""
    room: bool = True  # False: it was the GPU that had no room beside the running server


@dataclass(frozen=True)
class Verified:
    """One plan against the binary, by the ledger's device names."""

    ledger_bytes: Mapping[str, int]  # of what the binary counts too, by the header alone
    binary_bytes: Mapping[str, int] | None  # None: it told nothing
    extra_bytes: Mapping[str, int] = field(default_factory=dict)  # in the plan: what it counts beyond the ledger's
    why: str = ""
    room: bool = True
    rounds: int = 1

    @property
    def differences(self) -> dict[str, int]:
        """What the binary takes beyond the plan, device by device."""
        told = self.binary_bytes or {}
        return {
            device: size - self.ledger_bytes[device] - self.extra_bytes.get(device, 0) for device, size in told.items()
        }

    def beyond(self, *, only_more: bool) -> dict[str, int]:
        """The differences that are too large to pass over."""
        told = self.binary_bytes or {}
        return {
            device: difference
            for device, difference in self.differences.items()
            if (difference if only_more else abs(difference)) > tolerance(told[device])
        }

    def to_json(self) -> dict[str, Any]:
        """For plan.json."""
        return {
            "ledger_bytes": dict(self.ledger_bytes),
            "binary_bytes": None if self.binary_bytes is None else dict(self.binary_bytes),
            "extra_bytes": dict(self.extra_bytes),
            "rounds": self.rounds,
            "why": self.why,
        }


def tolerance(told_bytes: int) -> int:
    """Bytes by which ledger and binary may differ on a device without a new plan."""
    return max(TOLERANCE_BYTES, int(told_bytes * TOLERANCE_SHARE))


def compare(plan: Plan, answer: Answer, extra: Correction = NO_CORRECTION, rounds: int = 1) -> Verified:
    """The plan's ledger, made with the `extra`, against the binary's answer.

    Overhead is not compared: it is what no log counts. Host memory is one sum, repacked weights included.
    """
    expected = {
        row.device: row.weights_bytes + row.kv_bytes + row.compute_bytes + row.staging_bytes
        - extra.extra_bytes.get(row.device, 0)
        for row in plan.ledger
    }  # fmt: skip
    seen = Verified(expected, None, extra.extra_bytes, answer.why, answer.room, rounds)
    if answer.told is None:
        return seen
    devices = _devices(plan)
    missing = [name for name in devices if name not in answer.told]
    if missing:
        return replace(seen, why=f"it told nothing of {', '.join(missing)}")
    told = dict.fromkeys(expected, 0)
    for name, size in answer.told.items():
        told[devices.get(name, HOST)] += size
    return replace(seen, binary_bytes=told)


def limits(plan: Plan) -> dict[str, Any]:
    """For asking in the switch: llama.cpp's names of the plan's devices, and what each may hold at most, by the
    ledger's names: what is planned and what is left under the reserve."""
    most = {row.device: row.used_bytes - row.overhead_bytes + max(0, row.free_bytes) for row in plan.ledger}
    return {"devices": _devices(plan), "limits": most}


def _devices(plan: Plan) -> dict[str, str]:
    prefix = TRAITS[plan.backend].device_prefix
    return {f"{prefix}{number}": f"GPU{gpu.index}" for number, gpu in enumerate(plan.gpus)}


@dataclass(frozen=True)
class Settled:
    """Plans that the binary agrees with, or that it told nothing of; with a refusal where there is none."""

    answers: tuple[Plan | Refusal, ...]
    corrections: Mapping[str, Correction]
    verified: Mapping[str, Verified]


Planner = Callable[[Mapping[str, Correction]], Sequence[Plan | Refusal]]


def settle(
    planner: Planner,
    ask: Callable[[Plan], Answer],
    corrections: Mapping[str, Correction],
    is_known: Callable[[Plan], bool],
) -> Settled:
    """Plan, ask, and plan again with what was told, until plan and binary agree.

    The first round corrects both ways, the later ones upwards only: so it ends. A plan that the binary
    still finds too small after the last round stands if it fits by the binary's own numbers.
    """
    now = dict(corrections)
    asked: dict[tuple[str, tuple[str, ...]], Answer] = {}
    seen: dict[str, Verified] = {}
    plans: tuple[Plan | Refusal, ...] = ()
    for number in range(1, ROUNDS + 1):
        plans = tuple(planner(now))
        corrections = {}
        for plan in plans:
            if isinstance(plan, Refusal):
                return Settled(plans, now, seen)
            if is_known(plan):
                continue
            key = (plan.instance, plan.argv)
            if key not in asked:
                asked[key] = ask(plan)
            extra = now.get(plan.instance, NO_CORRECTION)
            seen[plan.instance] = compare(plan, asked[key], extra, number)
            if more := seen[plan.instance].beyond(only_more=number > 1):
                corrections[plan.instance] = extra.plus(more)
        if not corrections:
            return Settled(plans, now, seen)
        now.update(corrections)
    return Settled(tuple(_by_the_binary(one, seen) for one in plans), now, seen)


def _by_the_binary(plan: Plan | Refusal, seen: Mapping[str, Verified]) -> Plan | Refusal:
    """The plan with the binary's numbers in its ledger; a refusal where they do not fit."""
    if isinstance(plan, Refusal) or plan.instance not in seen:
        return plan
    differences = seen[plan.instance].differences
    rows = tuple(
        replace(
            row,
            compute_bytes=row.compute_bytes + differences.get(row.device, 0),
            free_bytes=row.free_bytes - differences.get(row.device, 0),
        )
        for row in plan.ledger
    )
    worst = min(rows, key=lambda row: row.free_bytes)
    if worst.free_bytes >= 0:
        return replace(plan, ledger=rows)
    needed, available = worst.used_bytes, worst.used_bytes + worst.free_bytes
    return Refusal(
        f"{plan.instance}: after {ROUNDS} rounds llama-server still asks for more than the plan gives: {worst.device}:"
        f" {needed // MIB} MiB needed, {available // MIB} MiB available under the reserve",
        device=worst.device, needed_bytes=needed, available_bytes=max(0, available), ledger=rows,
        instance=plan.instance, suggestions=("ask for less context", "keep a larger reserve"),
    )  # fmt: skip


def say(name: str, seen: Verified) -> str:
    """One line for the run's output."""
    if seen.binary_bytes is None:
        return f"{name}: llama-server was not asked ({seen.why}); the gate decides"
    parts = [
        f"{device} {size // MIB} MiB, planned by the header {seen.ledger_bytes[device] // MIB}"
        for device, size in seen.binary_bytes.items()
    ]
    again = f", planned again with the binary's numbers ({seen.rounds} rounds)" if seen.rounds > 1 else ""
    return f"{name}: llama-server would allocate {'; '.join(parts)}{again}"
