"""What is measured, in which order, what fits into the time, and the flags that ours is compared with. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

PLANNED, TUNED, FIT, NGL, CPU_MOE, N_CPU_MOE = "planned", "tuned", "fit", "ngl", "cpu-moe", "n-cpu-moe"
APPROACHES = (PLANNED, FIT, N_CPU_MOE, TUNED, NGL, CPU_MOE)  # the most telling first
OF_MOE = (CPU_MOE, N_CPU_MOE)
# How much later an approach, a limit, a context and a model come: planned and --fit of all models on the smallest card
# first, then what people set by hand there, then larger cards.
LATER = {PLANNED: 0, FIT: 0, N_CPU_MOE: 3, TUNED: 4, NGL: 6, CPU_MOE: 8}
LATER_LIMIT, LATER_CONTEXT, LATER_MODEL = 4, 2, 1
# Seconds of a cell before one like it was measured; a tune's own time comes on top. Guesses: they choose the order.
FIRST_GUESS = {PLANNED: 25.0, FIT: 25.0, N_CPU_MOE: 70.0, TUNED: 30.0, NGL: 60.0, CPU_MOE: 25.0}
MARGIN_TOKENS = 8  # of a context: the tokens that a template or the server may add


@dataclass(frozen=True)
class Cell:
    """One row: a model, the card's memory in MiB, the context in tokens, and who chooses the flags."""

    model: str
    limit_mib: int
    context: int
    approach: str

    def __str__(self) -> str:
        return f"{self.model}, {self.limit_mib} MiB, {self.context} tokens, {self.approach}"


@dataclass(frozen=True)
class Workload:
    """Tokens of a request, `depth` of them before the prompt, in the cache; and how often it is measured."""

    prompt: int
    reply: int
    depth: int
    runs: int

    def seconds(self, prefill: float, decode: float) -> float:
        """Of one request at these speeds, tokens a second."""
        return self.prompt / prefill + self.reply / decode


def workload(context: int, most_prompt: int, reply: int, runs: int) -> Workload:
    """The workload that fills the context. Each run goes on behind the one before, where there is room for all of them;
    else each begins anew."""
    prompt = min(most_prompt, context // 2)
    return Workload(prompt, reply, max(0, context - runs * (prompt + reply) - MARGIN_TOKENS), runs)


def cells(models: Mapping[str, bool], limits: Sequence[int], contexts: Sequence[int]) -> list[Cell]:
    """All cells, the most telling first. `models`: by name, whether it has experts."""
    found: list[tuple[tuple[int, ...], Cell]] = []
    for number, (model, is_moe) in enumerate(models.items()):
        for place, limit in enumerate(limits):
            for turn, context in enumerate(contexts):
                for approach in APPROACHES:
                    if is_moe or approach not in OF_MOE:
                        late = LATER[approach] + LATER_LIMIT * place + LATER_CONTEXT * turn + LATER_MODEL * number
                        order = (late, place, turn, number, APPROACHES.index(approach))
                        found.append((order, Cell(model, limit, context, approach)))
    return [cell for _, cell in sorted(found, key=lambda item: item[0])]


def expected_seconds(cell: Cell, took: Iterable[tuple[Cell, float]], tune_seconds: float) -> float:
    """How long the cell may take: as those of its approach and context did, else of its approach, else a guess."""
    known = [(other, seconds) for other, seconds in took if other.approach == cell.approach]
    alike = [seconds for other, seconds in known if other.context == cell.context] or [seconds for _, seconds in known]
    return median(alike) if alike else FIRST_GUESS[cell.approach] + (tune_seconds if cell.approach == TUNED else 0.0)


def fitting(
    left: Sequence[Cell], took: Sequence[tuple[Cell, float]], seconds: float, tune_seconds: float
) -> list[Cell]:
    """The cells for which there is probably time, in their order; a cell that is too long is passed over."""
    found = []
    for cell in left:
        if (expected := expected_seconds(cell, took, tune_seconds)) <= seconds:
            found.append(cell)
            seconds -= expected
    return found


# --- flags ------------------------------------------------------------------------------------------


def shipped(context: int) -> list[str]:
    """llama-server as it ships, for the slots and the context that ours has."""
    return ["--ctx-size", str(context), "--parallel", "1"]


def by_hand(approach: str, context: int, number: int = 0) -> list[str]:
    """Flags as people set them; `number`: layers on the card for -ngl, layers with experts in RAM for --n-cpu-moe."""
    chosen = {
        NGL: ["--n-gpu-layers", str(number)],
        CPU_MOE: ["--n-gpu-layers", "999", "--cpu-moe"],
        N_CPU_MOE: ["--n-gpu-layers", "999", "--n-cpu-moe", str(number)],
    }
    return [*shipped(context), "--fit", "off", *chosen[approach]]


def largest(most: int, works: Callable[[int], bool], guess: int) -> int | None:
    """The largest number from 0 to `most` that works, where all below one that works do; None: not even 0. Tried from
    the guess on with growing steps, then by bisection: each try loads a model."""
    low, high = -1, most + 1  # works, does not
    step, at = 1, min(max(guess, 0), most)
    while high - low > 1:
        if works(at):
            low = at
            at, step = (at + step, 2 * step) if high > most else ((low + high) // 2, step)
        else:
            high = at
            at, step = (at - step, 2 * step) if low < 0 else ((low + high) // 2, step)
        at = min(max(at, low + 1), high - 1)
    return low if low >= 0 else None


def guess(most: int, model_bytes: int, limit_bytes: int, spared_bytes: int) -> int:
    """Layers that the card may hold: its share of the model, with `spared_bytes` for cache and compute."""
    return max(0, min(most, int(most * (limit_bytes - spared_bytes) / max(1, model_bytes))))
