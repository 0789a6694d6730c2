"""What is measured, in which order, and the flags of everything that ours is compared with. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

PLANNED, TUNED, FIT, NGL, CPU_MOE, N_CPU_MOE = "planned", "tuned", "--fit on", "-ngl", "--cpu-moe", "--n-cpu-moe"
APPROACHES = (PLANNED, FIT, N_CPU_MOE, TUNED, NGL, CPU_MOE)  # the most telling first
OF_MOE = (CPU_MOE, N_CPU_MOE)
CONTEXTS = (1024, 32768)
# How much later an approach, a limit, a context and a model come: planned and --fit for all models at 8 GB first, then
# what people set by hand there, then larger limits.
LATER = {PLANNED: 0, FIT: 0, N_CPU_MOE: 3, TUNED: 4, NGL: 6, CPU_MOE: 8}
LATER_LIMIT, LATER_CONTEXT, LATER_MODEL = 4, 2, 1
FIRST_GUESS_SECONDS = {PLANNED: 25.0, FIT: 25.0, N_CPU_MOE: 70.0, TUNED: 90.0, NGL: 60.0, CPU_MOE: 25.0}


@dataclass(frozen=True)
class Cell:
    """One row: a model, the card's memory, the context in tokens, and who chooses the flags."""

    model: str
    limit_mib: int
    context: int
    approach: str


def cells(models: Mapping[str, bool], limits: Sequence[int], contexts: Sequence[int] = CONTEXTS) -> list[Cell]:
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


def expected_seconds(cell: Cell, took: Iterable[tuple[Cell, float]]) -> float:
    """How long the cell may take: as those of its approach and context did, else of its approach, else a guess."""
    known = list(took)
    alike = [seconds for other, seconds in known if other.approach == cell.approach and other.context == cell.context]
    same = alike or [seconds for other, seconds in known if other.approach == cell.approach]
    return median(same) if same else FIRST_GUESS_SECONDS[cell.approach]


def next_cell(left: Sequence[Cell], took: Sequence[tuple[Cell, float]], seconds: float) -> Cell | None:
    """The first of the cells that are left for which there is time; None: there is none."""
    return next((cell for cell in left if expected_seconds(cell, took) <= seconds), None)


def shipped(context: int) -> list[str]:
    """llama-server as it ships, for the slots and the context that ours has."""
    return ["--ctx-size", str(context), "--parallel", "1"]


def by_hand(approach: str, context: int, number: int) -> list[str]:
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


def few_from(best: int, most: int) -> Iterator[int]:
    """Numbers worth measuring for --n-cpu-moe: the fewest layers that load, and some more in RAM, which leave room."""
    yield from dict.fromkeys(min(most, best + more) for more in (0, 2))
