"""What is loaded beside a model, and where: every combination of the places of its companions is planned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice, product

from llamafleet.memory import adapters
from llamafleet.memory.beside import Beside
from llamafleet.memory.context import Context
from llamafleet.planner import projector, speculation
from llamafleet.planner.asked import Asked

MOST = 16  # combinations that are planned


def unfit_adapters(asked: Asked) -> Iterator[str]:
    """Adapters that llama.cpp would not load beside the model. Where they go needs no choice: with the layers."""
    found = adapters.adapters_of(asked.companions)
    if found and asked.instance.split_mode == "tensor":
        yield "split_mode: what adapters take where matrices are divided over GPUs is not known: set it to layer"
    for number, header in found.items():
        if why := adapters.unfit(asked.model.header, header):
            yield f"adapters[{number - 1}]: {header.name}: {why}"


# For each kind of companion: why it does not fit the model, a sentence each.
UNFIT: tuple[Callable[[Asked], Iterator[str]], ...] = (projector.unfit, speculation.unfit, unfit_adapters)
# For each kind: the ways to load it, the preferred one first; none where it was not asked for.
WAYS: tuple[Callable[[Asked], Sequence[Beside]], ...] = (projector.ways, speculation.ways)
Weighted = tuple[Context, float]  # a context and its handicap


def unfit(asked: Asked) -> str:
    """Why a companion does not fit the model; empty where all do."""
    return next((why for kind in UNFIT for why in kind(asked)), "")


def options(asked: Asked) -> list[tuple[Beside, ...]]:
    """The combinations, the preferred one first; one empty combination where nothing is loaded beside the model."""
    ways = [found for kind in WAYS if (found := kind(asked))]
    return list(islice(product(*ways), MOST))


def by_context(
    option: tuple[Beside, ...], contexts: Sequence[Weighted]
) -> list[tuple[tuple[Beside, ...], list[Weighted]]]:
    """What a combination takes, with the contexts that it takes this with, none where it is the same with each; without
    those that it does not fit with."""
    if not any(one.at for one in option):
        return [(option, [])]
    found: list[tuple[tuple[Beside, ...], list[Weighted]]] = []
    for weighted in contexts:
        at = tuple(one.with_context(weighted[0]) for one in option)
        known = [one for one in at if one is not None]
        if len(known) < len(at):
            continue
        group = next((group for besides, group in found if besides == tuple(known)), None)
        if group is None:
            found.append((tuple(known), [weighted]))
        else:
            group.append(weighted)
    return found
