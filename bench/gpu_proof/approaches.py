"""One cell: the flags of its approach are chosen, and measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench.gpu_proof import cells
from bench.gpu_proof.card import Card
from bench.gpu_proof.cells import CPU_MOE, FIT, N_CPU_MOE, NGL, PLANNED, TUNED, Cell, Workload
from bench.gpu_proof.rows import Row, Setting, row
from bench.gpu_proof.serving import Failed, Figures, Launch
from llamafleet.cli.arguments import default_data, settings_for
from llamafleet.host.machine import Machine
from llamafleet.model.gguf import Header
from llamafleet.planner.plan import plan_host
from llamafleet.planner.result import Plan, Refusal
from llamafleet.settings.schema import Instance, Settings
from llamafleet.tuning.candidates import SHIPPED, Candidate, candidates, planner_of
from llamafleet.tuning.race import BASELINE, SINGLE, Batch, Trial
from llamafleet.tuning.search import Measured, affordable, course, installed
from llamafleet.units import MIB

# A server that loads may have no memory to compute: -ngl is tried with so many layers less in all.
STEPS_BACK = 3
MORE_IN_RAM = (0, 2)  # --n-cpu-moe is measured with the fewest layers that load, and some more, which leave room
SPARED_BYTES = 1024 * MIB  # of the first guess: cache, compute buffers, the context of CUDA
Chosen = tuple[str, Sequence[str], Figures]


@dataclass(frozen=True)
class Model:
    """A model's file with its header."""

    name: str
    path: Path
    header: Header
    is_moe: bool

    @property
    def layers(self) -> int:
        return int(self.header.get("block_count"))


@dataclass(frozen=True)
class Proof:
    """What all cells have in common."""

    setting: Setting
    card: Card
    find: Callable[[], Card]  # the card as it is now
    host: Machine
    launch: Callable[[Model], Launch]
    workload: Callable[[int], Workload]  # by the context in tokens
    tune_seconds: float
    reserve_mib: int | None = None  # of the plans; None: the default
    say: Callable[[str], None] = field(default=print)

    def row(self, cell: Cell, model: Model) -> Row:
        """The cell's row; a failure is one too, whatever it is: the others can still be measured."""
        began = time.monotonic()
        try:
            chosen, flags, figures = _APPROACHES[cell.approach](self, cell, model)
        except Failed as error:
            return row(self.setting, cell, time.monotonic() - began, error=str(error))
        except Exception as error:
            return row(self.setting, cell, time.monotonic() - began, error=f"{type(error).__name__}: {error}")
        return row(self.setting, cell, time.monotonic() - began, chosen=chosen, figures=figures, flags=flags)

    def measured(
        self, cell: Cell, model: Model, flags: Sequence[str], cpus: str = "", runs: int | None = None
    ) -> Figures:
        """Raises Failed, where more than the limit was allocated too."""
        work = self.workload(cell.context)
        figures = self.launch(model).measure(flags, replace(work, runs=runs or work.runs), cpus)
        if self.card.is_over(figures.log, cell.limit_mib):
            raise Failed(f"more than {cell.limit_mib} MiB were allocated on the card")
        return figures

    def fit_flags(self, cell: Cell) -> list[str]:
        """What --fit needs where the limit is emulated, by the memory that is free now."""
        return self.find().fit_flags(cell.limit_mib) if self.card.emulated else []

    def loads(self, cell: Cell, model: Model, flags: Sequence[str]) -> bool:
        """Does a server load within the limit?"""
        log = self.launch(model).loads(flags)
        return log is not None and not self.card.is_over(log, cell.limit_mib)

    def request(self, cell: Cell, model: Model) -> tuple[Instance, Settings]:
        """An instance as an operator asks for it: one slot, f16, the workload that is measured."""
        work = self.workload(cell.context)
        asked = {
            "backend": self.card.backend, "context_tokens": cell.context, "slots": 1, "kv_types": ["f16"],
            "prompt_cache_mib": 0, "prompt_tokens": work.prompt, "reply_tokens": work.reply,
            "live_tokens": work.depth + work.prompt,
        }  # fmt: skip
        if self.reserve_mib is not None:
            asked["gpu_reserve_mib"] = self.reserve_mib
        settings = settings_for(str(model.path), default_data(), asked)
        return settings.models[0], settings


# --- ours -------------------------------------------------------------------------------------------


def planned(proof: Proof, cell: Cell, model: Model) -> Chosen:
    """The planner's best, as a deploy would install it."""
    instance, settings = proof.request(cell, model)
    machine = proof.card.machine(proof.host, cell.limit_mib)
    plan = plan_host(machine, [(instance, model.header)], settings)[0]
    if isinstance(plan, Refusal):
        raise Failed(f"refused: {plan.reason}")
    return placed(plan), plan.argv, proof.measured(cell, model, plan.argv, plan.cpus)


def tuned(proof: Proof, cell: Cell, model: Model) -> Chosen:
    """What a tune of `tune_seconds` would install, measured anew."""
    instance, settings = proof.request(cell, model)
    machine = proof.card.machine(proof.host, cell.limit_mib)
    planner = planner_of(machine, [(instance, model.header)], settings, instance.name)
    found = candidates(instance, machine, planner)
    if isinstance(found, Refusal):
        raise Failed(f"refused: {found.reason}")
    done = [_trial(proof, cell, model, found[0][BASELINE], BASELINE, SINGLE)]
    few = affordable(found[0], proof.tune_seconds, done[0].took_seconds)
    now = course(instance, planner, few, done, proof.tune_seconds)
    while isinstance(now.step, Batch):
        for number in now.step.candidates:
            if sum(one.took_seconds for one in done) < proof.tune_seconds:
                done.append(_trial(proof, cell, model, now.candidates[number], number, now.step.stage))
        now = course(instance, planner, few, done, proof.tune_seconds)
    best = installed(now, [one.trial for one in done])
    said = f"{best.label}: {placed(best.plan)}; {len(done)} trials of {len(few)} candidates: {now.step.why}"
    return said, best.plan.argv, proof.measured(cell, model, best.plan.argv, best.plan.cpus)


def _trial(proof: Proof, cell: Cell, model: Model, one: Candidate, number: int, stage: int) -> Measured:
    """One server, one run; a failure is a trial without seconds."""
    began, seconds = time.monotonic(), None
    flags = [*one.plan.argv, *(proof.fit_flags(cell) if one.label == SHIPPED else [])]
    try:
        figures = proof.measured(cell, model, flags, one.plan.cpus, runs=1)
        seconds = figures.seconds(proof.workload(cell.context))
        proof.say(f"    {one.label}: {seconds:.2f} s")
    except Failed as error:
        proof.say(f"    {one.label}: {error}")
    return Measured(Trial(number, seconds, stage), time.monotonic() - began)


def placed(plan: Plan) -> str:
    """Where the layers are, in a few words."""
    layers = plan.placement.layer_devices[:-1]
    whole = sum(device is None for device in layers)
    parts = len(plan.placement.spilled) + len(plan.placement.partly)
    return f"{whole} of {len(layers)} layers in RAM, experts or FFN of {parts} more, ubatch {plan.ubatch_tokens}"


# --- llama-server's own, and by hand ------------------------------------------------------------------


def fit(proof: Proof, cell: Cell, model: Model) -> Chosen:
    """llama-server as it ships."""
    flags = [*cells.shipped(cell.context), *proof.fit_flags(cell)]
    return "its own", flags, proof.measured(cell, model, flags)


def cpu_moe(proof: Proof, cell: Cell, model: Model) -> Chosen:
    """All experts in RAM."""
    flags = cells.by_hand(CPU_MOE, cell.context)
    return "all experts in RAM", flags, proof.measured(cell, model, flags)


def ngl(proof: Proof, cell: Cell, model: Model) -> Chosen:
    """As many layers on the card as load and compute, the output counted as one."""
    most = model.layers + 1
    count = _most_on_card(proof, cell, model, most, lambda on_card: cells.by_hand(NGL, cell.context, on_card))
    tries = [(f"-ngl {one} of {most}", cells.by_hand(NGL, cell.context, one))
             for one in range(count, max(-1, count - STEPS_BACK), -1)]  # fmt: skip
    return _measured_of(proof, cell, model, tries, most=1)[0]


def n_cpu_moe(proof: Proof, cell: Cell, model: Model) -> Chosen:
    """The fastest of the fewest layers of experts in RAM that load, and some more."""
    layers = model.layers

    def flags_of(in_ram: int) -> list[str]:
        return cells.by_hand(N_CPU_MOE, cell.context, in_ram)

    least = layers - _most_on_card(proof, cell, model, layers, lambda on_card: flags_of(layers - on_card))
    numbers = dict.fromkeys(min(layers, least + more) for more in MORE_IN_RAM)
    tries = [(f"--n-cpu-moe {one} of {layers}", flags_of(one)) for one in numbers]
    work = proof.workload(cell.context)
    return min(_measured_of(proof, cell, model, tries, len(tries)), key=lambda chosen: chosen[2].seconds(work))


def _measured_of(
    proof: Proof, cell: Cell, model: Model, tries: Sequence[tuple[str, list[str]]], most: int
) -> list[Chosen]:
    """The first `most` of the tries that can be measured, at least one. Raises Failed: the last one's reason."""
    found: list[Chosen] = []
    last = Failed("nothing to try")
    for label, flags in tries:
        if len(found) < most:
            try:
                found.append((label, flags, proof.measured(cell, model, flags)))
            except Failed as error:
                proof.say(f"    {label}: {error}")
                last = error
    if not found:
        raise last
    return found


def _most_on_card(proof: Proof, cell: Cell, model: Model, most: int, flags_of: Callable[[int], list[str]]) -> int:
    """The most layers with which a server loads. Raises Failed."""

    def works(count: int) -> bool:
        done = proof.loads(cell, model, flags_of(count))
        proof.say(f"    {count} of {most} layers on the card: {'loads' if done else 'does not load'}")
        return done

    guess = cells.guess(most, model.header.weights_bytes, cell.limit_mib * MIB, SPARED_BYTES)
    found = cells.largest(most, works, guess)
    if found is None:
        raise Failed("it does not load with any number of layers")
    return found


_APPROACHES: dict[str, Callable[[Proof, Cell, Model], Chosen]] = {
    PLANNED: planned, TUNED: tuned, FIT: fit, NGL: ngl, CPU_MOE: cpu_moe, N_CPU_MOE: n_cpu_moe,
}  # fmt: skip
