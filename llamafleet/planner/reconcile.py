"""Compare a plan with the memory that the built llama-server reports it would allocate.

If the two differ by more than the tolerance, the binary is right: the difference becomes an `Correction`, and the plan
is made again, `ROUNDS` times at most. `tasks/verify.py` runs llama-server on the host for this.

Decision 4: docs/decisions/0004-the-binary-is-asked-before-it-is-trusted.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llamafleet.host.backends import TRAITS
from llamafleet.memory.ledger import NO_CORRECTION, Correction
from llamafleet.memory.placement import HOST
from llamafleet.planner.result import BESIDE, Plan, Refusal
from llamafleet.units import MIB

# llama-server prints whole MiB, rounded down; a GPU's reserve, 1024 MiB, is 64 times this.
TOLERANCE_BYTES = 16 * MIB
TOLERANCE_SHARE = 0.01
ROUNDS = 3
# Flags with a value that `question` leaves out: without `--fit off` llama-server prints its memory breakdown; keys and
# address are not needed.
LEFT_OUT = frozenset({"--fit", "--api-key-file", "--ssl-cert-file", "--ssl-key-file", "--host", "--port"})


def question(argv: Sequence[str]) -> tuple[str, ...]:
    """The command line that makes llama-server report its memory: the service's, with a free port of 127.0.0.1 and a
    more detailed log."""
    words = iter(argv)
    arguments = []
    for word in words:
        if word in LEFT_OUT:
            next(words, None)
        else:
            arguments.append(word)
    return (*arguments, "--host", "127.0.0.1", "--port", "0", "-lv", "4")


def beside(argv: Sequence[str]) -> str:
    """What llama-server reports beside the model: a "draft" model, the "head" of the model itself, or "" for
    neither."""
    if "--spec-draft-model" in argv:
        return "draft"
    return "head" if "draft-mtp" in argv else ""


@dataclass(frozen=True)
class MemoryReport:
    """The memory that llama-server reported: bytes by its own names of devices and kinds of host memory.

    `told` is None if it reported nothing; `why` is then the reason.
    """

    told: Mapping[str, int] | None
    why: str = ""
    room: bool = True  # False: the GPU had no free memory for this run beside the running server


@dataclass(frozen=True)
class Verified:
    """One plan compared with the binary's report; bytes by the ledger's device names."""

    ledger_bytes: Mapping[str, int]  # predicted from the header alone, only the parts that the binary reports
    binary_bytes: Mapping[str, int] | None  # reported by the binary; None: it reported nothing
    extra_bytes: Mapping[str, int] = field(default_factory=dict)  # correction that the plan was made with
    why: str = ""
    room: bool = True
    rounds: int = 1

    @property
    def differences(self) -> dict[str, int]:
        """Bytes that the binary needs beyond the plan, by device; negative where it needs less."""
        return {
            device: size - self.ledger_bytes[device] - self.extra_bytes.get(device, 0)
            for device, size in (self.binary_bytes or {}).items()
        }

    def beyond(self, *, only_more: bool) -> dict[str, int]:
        """The differences above the tolerance; `only_more`: only those where the binary needs more."""
        reported = self.binary_bytes or {}
        return {
            device: difference
            for device, difference in self.differences.items()
            if (difference if only_more else abs(difference)) > tolerance(reported[device])
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


def tolerance(reported_bytes: int) -> int:
    """Bytes by which ledger and binary may differ on a device without a new plan."""
    return max(TOLERANCE_BYTES, int(reported_bytes * TOLERANCE_SHARE))


def compare(plan: Plan, answer: MemoryReport, extra: Correction = NO_CORRECTION, rounds: int = 1) -> Verified:
    """Compare the plan's ledger, which was made with the correction `extra`, with the binary's report.

    Overhead is not compared, since llama-server does not report it. Of a projector the size of its start is compared,
    which the plan exceeds for the largest picture. Host memory is one sum, repacked weights included,
    and tensors that will be mapped, which llama-server counts while it only measures (src/llama-model.cpp, no_alloc).
    """
    expected = {
        row.device: row.weights_bytes + row.kv_bytes + row.compute_bytes + row.staging_bytes
        - extra.extra_bytes.get(row.device, 0) + (plan.mapped_bytes if row.device == HOST else 0)
        for row in plan.ledger
    }  # fmt: skip
    without_report = Verified(expected, None, extra.extra_bytes, answer.why, answer.room, rounds)
    if answer.told is None:
        return without_report
    devices = _devices(plan)
    of_model = list(devices)[: len(plan.placement.devices)]  # others are a companion's alone
    missing = [name for name in of_model if name not in answer.told]
    if missing:
        return replace(without_report, why=f"it did not report the memory of {', '.join(missing)}")
    for part, (device, size) in plan.reported_beside.items():
        if part in answer.told:  # an earlier llama.cpp does not report it
            expected[device] += size
    reported = dict.fromkeys(expected, 0)
    for name, size in answer.told.items():
        reported[devices.get(name.removeprefix(BESIDE), HOST)] += size
    return replace(without_report, binary_bytes=reported)


def memory_limits(plan: Plan) -> dict[str, Any]:
    """For the memory check in the switch: llama.cpp's name of each device, and the most bytes that llama-server may
    report for it: the planned bytes and the free bytes besides the reserve, by the ledger's device names. What is
    beside the model counts as far as it is reported: adapters are read only while a server loads."""
    limit = {
        row.device: row.used_bytes - row.overhead_bytes - row.beside_bytes + max(0, row.free_bytes)
        for row in plan.ledger
    }
    for device, size in plan.reported_beside.values():
        limit[device] += size
    limit[HOST] += plan.mapped_bytes
    return {"devices": _devices(plan), "limits": limit}


def _devices(plan: Plan) -> dict[str, str]:
    """The ledger's device names by llama.cpp's, and by what is reported of parts beside the model."""
    prefix = TRAITS[plan.backend].device_prefix
    beside = {part: device for part, (device, _) in plan.reported_beside.items()}
    return {**{f"{prefix}{number}": f"GPU{gpu.index}" for number, gpu in enumerate(plan.gpus)}, **beside}


@dataclass(frozen=True)
class Reconciled:
    """The plans after comparison with the binary, a refusal where the model does not fit by the binary's numbers.

    A plan that the binary reported nothing about stays as it was.
    """

    results: tuple[Plan | Refusal, ...]
    corrections: Mapping[str, Correction]
    verified: Mapping[str, Verified]


Planner = Callable[[Mapping[str, Correction]], Sequence[Plan | Refusal]]


def reconcile(
    planner: Planner,
    ask: Callable[[Plan], MemoryReport],
    corrections: Mapping[str, Correction],
    is_known: Callable[[Plan], bool],
) -> Reconciled:
    """Plan, let the binary report its memory, and plan again with the differences until plan and binary agree.

    The first round adjusts in both directions, later rounds only upwards, so that the rounds end. If the binary still
    needs more after the last round, the plan stands if it fits by the binary's own numbers.
    """
    current = dict(corrections)
    reports: dict[tuple[str, tuple[str, ...]], MemoryReport] = {}
    verified: dict[str, Verified] = {}
    plans: tuple[Plan | Refusal, ...] = ()
    for number in range(1, ROUNDS + 1):
        plans = tuple(planner(current))
        corrections = {}
        for plan in plans:
            if isinstance(plan, Refusal):
                return Reconciled(plans, current, verified)
            if is_known(plan):
                continue
            key = (plan.instance, plan.argv)
            if key not in reports:
                reports[key] = ask(plan)
            extra = current.get(plan.instance, NO_CORRECTION)
            verified[plan.instance] = compare(plan, reports[key], extra, number)
            if more := verified[plan.instance].beyond(only_more=number > 1):
                corrections[plan.instance] = extra.plus(more)
        if not corrections:
            return Reconciled(plans, current, verified)
        current.update(corrections)
    return Reconciled(tuple(_with_binary_numbers(plan, verified) for plan in plans), current, verified)


def _with_binary_numbers(plan: Plan | Refusal, verified: Mapping[str, Verified]) -> Plan | Refusal:
    """The plan with the binary's numbers in its ledger; a refusal if it does not fit with them."""
    if isinstance(plan, Refusal) or plan.instance not in verified:
        return plan
    differences = verified[plan.instance].differences
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
        f"{plan.instance}: after {ROUNDS} rounds llama-server still needs more memory than is planned: {worst.device}:"
        f" {needed // MIB} MiB needed, {available // MIB} MiB available besides the reserve",
        device=worst.device, needed_bytes=needed, available_bytes=max(0, available), ledger=rows,
        instance=plan.instance, suggestions=("set a smaller context_tokens", "set a larger reserve"),
    )  # fmt: skip


def summary(name: str, verified: Verified) -> str:
    """A line for the run's output: the bytes by the binary and by the header, or why the binary reported nothing."""
    if verified.binary_bytes is None:
        return f"{name}: llama-server did not report its memory ({verified.why}); the gate decides"
    parts = [
        f"{device} {size // MIB} MiB, planned from the header {verified.ledger_bytes[device] // MIB} MiB"
        for device, size in verified.binary_bytes.items()
    ]
    again = f", planned again with the binary's numbers ({verified.rounds} rounds)" if verified.rounds > 1 else ""
    return f"{name}: llama-server would allocate {'; '.join(parts)}{again}"
