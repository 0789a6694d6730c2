"""One cell: the flags of its approach are chosen, and measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.gpu_proof import cells, serving
from bench.gpu_proof.card import Card
from bench.gpu_proof.cells import CPU_MOE, FIT, N_CPU_MOE, NGL, PLANNED, TUNED, Cell
from bench.gpu_proof.rows import Row, Setting, row
from bench.gpu_proof.serving import Failed, Figures, Launch
from llamafleet.cli.arguments import default_data, settings_for
from llamafleet.host.machine import Machine
from llamafleet.model.gguf import Header
from llamafleet.planner.plan import plan_host
from llamafleet.planner.result import Plan, Refusal
from llamafleet.settings.schema import Instance, Settings
from llamafleet.tuning.candidates import SHIPPED, Candidate, candidates, planner_of
from llamafleet.units import MIB

TRIED = 4  # candidates of a tune beside the planner's best: there is no time for its whole course
STEPS_BACK = 3  # where a server loads, and then has no memory to compute: so many times with a layer less
SPARED_BYTES = 1024 * MIB  # of the first guess: cache, compute buffers, the context of CUDA
Chosen = tuple[str, list[str], Figures]


@dataclass(frozen=True)
class Model:
    """A model's file with its header."""

    name: str
    path: Path
    header: Header
    is_moe: bool
    layers: int
    vocabulary: int


@dataclass(frozen=True)
class Proof:
    """What all cells have in common."""

    setting: Setting
    card: Card
    host: Machine
    launch: Callable[[Model], Launch]
    reserve_mib: int | None = None  # of the plans; None: the default
    say: Callable[[str], None] = field(default=print)

    def row(self, cell: Cell, model: Model) -> Row:
        """The cell's row; a failure is one too."""
        began = time.monotonic()
        chosen, flags = "", list[str]()
        try:
            chosen, flags, figures = _APPROACHES[cell.approach](self, cell, model)
        except Failed as error:
            return row(self.setting, cell, time.monotonic() - began, chosen=chosen, error=str(error), flags=flags)
        return row(self.setting, cell, time.monotonic() - began, chosen=chosen, figures=figures, flags=flags)

    def measured(
        self, cell: Cell, model: Model, flags: Sequence[str], cpus: str = "", runs: int = serving.RUNS
    ) -> Figures:
        """Raises Failed, where more than the limit was allocated too."""
        figures = self.launch(model).measure(flags, cell.context, cpus, runs)
        if self.card.is_over(figures.log, cell.limit_mib):
            raise Failed(f"more than {cell.limit_mib} MiB were allocated on the card")
        return figures

    def loads(self, cell: Cell, model: Model, flags: Sequence[str]) -> bool:
        """Does a server load within the limit?"""
        log = self.launch(model).loads(flags)
        return log is not None and not self.card.is_over(log, cell.limit_mib)


# --- ours -------------------------------------------------------------------------------------------


def request(model: Model, context: int, backend: str, reserve_mib: int | None) -> tuple[Instance, Settings]:
    """An instance as an operator asks for it: one slot, f16, a prompt that is as long as what is measured."""
    prompt = min(serving.LONG_PROMPT if context >= serving.LONG else serving.SHORT_PROMPT, context // 2)
    asked = {
        "backend": backend, "context_tokens": context, "slots": 1, "kv_types": ["f16"], "prompt_cache_mib": 0,
        "prompt_tokens": prompt, "reply_tokens": serving.REPLY_TOKENS,
        "live_tokens": context - serving.REPLY_TOKENS if context >= serving.LONG else prompt,
    }  # fmt: skip
    if reserve_mib is not None:
        asked["gpu_reserve_mib"] = reserve_mib
    settings = settings_for(str(model.path), default_data(), asked)
    return settings.models[0], settings


def plan_of(
    model: Model, context: int, machine: Machine, backend: str, reserve_mib: int | None = None
) -> Plan | Refusal:
    """The plan for that machine."""
    instance, settings = request(model, context, backend, reserve_mib)
    return plan_host(machine, [(instance, model.header)], settings)[0]


def planned(proof: Proof, cell: Cell, model: Model) -> Chosen:
    """The planner's best, as a deploy would install it."""
    machine = proof.card.machine(proof.host, cell.limit_mib)
    plan = plan_of(model, cell.context, machine, proof.card.backend, proof.reserve_mib)
    if isinstance(plan, Refusal):
        raise Failed(f"refused: {plan.reason}")
    return placed(plan), list(plan.argv), proof.measured(cell, model, plan.argv, plan.cpus)


def tuned(proof: Proof, cell: Cell, model: Model) -> Chosen:
    """The fastest of the planner's best and the first changes that a tune would measure, by a trial each; then measured
    anew, since the best of several trials was lucky."""
    machine = proof.card.machine(proof.host, cell.limit_mib)
    instance, settings = request(model, cell.context, proof.card.backend, proof.reserve_mib)
    planner = planner_of(machine, [(instance, model.header)], settings, instance.name)
    found = candidates(instance, machine, planner)
    if isinstance(found, Refusal):
        raise Failed(f"refused: {found.reason}")
    ours = [one for one in found[0] if one.label != SHIPPED][: TRIED + 1]
    best = min(_trials(proof, cell, model, ours), key=lambda item: item[0], default=None)
    if best is None:
        raise Failed("no candidate of the tune ran")
    figures = proof.measured(cell, model, best[1].plan.argv, best[1].plan.cpus)
    return f"{best[1].label}: {placed(best[1].plan)}", list(best[1].plan.argv), figures


def _trials(proof: Proof, cell: Cell, model: Model, ours: Sequence[Candidate]) -> Iterator[tuple[float, Candidate]]:
    for one in ours:
        try:
            seconds = proof.measured(cell, model, one.plan.argv, one.plan.cpus, runs=1).seconds(cell.context)
        except Failed as error:
            proof.say(f"    {one.label}: {error}")
            continue
        proof.say(f"    {one.label}: {seconds:.2f} s")
        yield seconds, one


def placed(plan: Plan) -> str:
    """Where the layers are, in a few words."""
    layers, place = len(plan.placement.layer_devices) - 1, plan.placement
    spilled = len(place.spilled) + len(place.partly)
    whole = sum(device is None for device in place.layer_devices[:-1])
    return f"{layers} layers: {whole} in RAM, of {spilled} others experts or FFN; ubatch {plan.ubatch_tokens}"


# --- llama-server's own, and by hand ------------------------------------------------------------------


def fit(proof: Proof, cell: Cell, model: Model) -> Chosen:
    """llama-server as it ships."""
    flags = [*cells.shipped(cell.context), *proof.card.fit_flags(cell.limit_mib)]
    return "its own", flags, proof.measured(cell, model, flags)


def cpu_moe(proof: Proof, cell: Cell, model: Model) -> Chosen:
    """All experts in RAM."""
    flags = cells.by_hand(CPU_MOE, cell.context, 0)
    return "all experts in RAM", flags, proof.measured(cell, model, flags)


def ngl(proof: Proof, cell: Cell, model: Model) -> Chosen:
    """As many layers on the card as load, the output counted as one."""
    most = model.layers + 1
    count = _most_on_card(proof, cell, model, most, lambda on_card: cells.by_hand(NGL, cell.context, on_card))
    for less in range(STEPS_BACK):
        flags = cells.by_hand(NGL, cell.context, max(0, count - less))
        try:
            return f"-ngl {max(0, count - less)} of {most}", flags, proof.measured(cell, model, flags)
        except Failed as error:
            proof.say(f"    -ngl {count - less}: {error}")
            last = error
    raise last


def n_cpu_moe(proof: Proof, cell: Cell, model: Model) -> Chosen:
    """The fastest of the fewest layers of experts in RAM that load, and some more."""

    def flags_of(with_experts: int) -> list[str]:
        return cells.by_hand(N_CPU_MOE, cell.context, model.layers - with_experts)

    least = model.layers - _most_on_card(proof, cell, model, model.layers, flags_of)
    results: list[tuple[float, Chosen]] = []
    error = Failed("no --n-cpu-moe ran")
    for number in cells.few_from(least, model.layers):
        flags = cells.by_hand(N_CPU_MOE, cell.context, number)
        try:
            figures = proof.measured(cell, model, flags)
        except Failed as problem:
            proof.say(f"    --n-cpu-moe {number}: {problem}")
            error = problem
            continue
        results.append((figures.seconds(cell.context), (f"--n-cpu-moe {number} of {model.layers}", flags, figures)))
    if not results:
        raise error
    return min(results, key=lambda item: item[0])[1]


def _most_on_card(proof: Proof, cell: Cell, model: Model, most: int, flags_of: Callable[[int], list[str]]) -> int:
    """The most layers with which a server loads. Raises Failed."""
    guess = cells.guess(most, model.header.weights_bytes, cell.limit_mib * MIB, SPARED_BYTES)

    def works(count: int) -> bool:
        done = proof.loads(cell, model, flags_of(count))
        proof.say(f"    {count} of {most} layers on the card: {'loads' if done else 'does not load'}")
        return done

    found = cells.largest(most, works, guess)
    if found is None:
        raise Failed("it does not load with any number of layers")
    return found


_APPROACHES: dict[str, Callable[[Proof, Cell, Model], Chosen]] = {
    PLANNED: planned, TUNED: tuned, FIT: fit, NGL: ngl, CPU_MOE: cpu_moe, N_CPU_MOE: n_cpu_moe,
}  # fmt: skip


def described(name: str, path: Path, header: Header, is_moe: bool) -> Model:
    """A model of its file and header."""
    tokens = header.get("vocab_size")
    return Model(name, path, header, is_moe, int(header.get("block_count")), int(tokens))
