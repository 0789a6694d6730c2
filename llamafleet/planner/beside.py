"""What is loaded beside a model, and where: every combination of the places of its companions is planned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice, product

from llamafleet.memory import adapters
from llamafleet.memory.beside import Beside
from llamafleet.planner import projector
from llamafleet.planner.asked import Asked

MOST = 16  # combinations that are planned


def unfit_adapters(asked: Asked) -> Iterator[str]:
    """Adapters that llama.cpp would not load beside the model. Where they go needs no choice: with the layers."""
    for number, header in adapters.adapters_of(asked.companions).items():
        if why := adapters.unfit(asked.model.header, header):
            yield f"adapters[{number - 1}]: {header.name}: {why}"


# For each kind of companion: why it does not fit the model, a sentence each.
UNFIT: tuple[Callable[[Asked], Iterator[str]], ...] = (projector.unfit, unfit_adapters)
# For each kind: the ways to load it, the preferred one first; none where it was not asked for.
WAYS: tuple[Callable[[Asked], Sequence[Beside]], ...] = (projector.ways,)


def unfit(asked: Asked) -> str:
    """Why a companion does not fit the model; empty where all do."""
    return next((why for kind in UNFIT for why in kind(asked)), "")


def options(asked: Asked) -> list[tuple[Beside, ...]]:
    """The combinations, the preferred one first; one empty combination where nothing is loaded beside the model."""
    ways = [found for kind in WAYS if (found := kind(asked))]
    return list(islice(product(*ways), MOST))
