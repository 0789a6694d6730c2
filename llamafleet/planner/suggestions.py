"""Suggestions for a model that does not fit: fewer slots, another cache type, less context, less RAM for the prompt
cache or the reserve, a smaller quantisation. Each was planned, and fits; what took the memory is named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from llamafleet.memory.context import PAD_CELLS, Context, is_quantised
from llamafleet.memory.flash_attention import takes_cache_on
from llamafleet.memory.ledger import LedgerRow
from llamafleet.memory.placement import HOST
from llamafleet.memory.weights import Model
from llamafleet.model.gguf import Header
from llamafleet.planner.quantisations import smaller
from llamafleet.planner.result import Plan
from llamafleet.settings.schema import Instance
from llamafleet.units import MIB

CONTEXT_STEP = 1024  # tokens; a suggested context is a multiple of it
CONTEXT_STEPS = 128  # the longer steps of a long context: at most this many up to the whole context
BACK, TRIES = 16, 3  # if the quick check was wrong, try a sixteenth less, then another sixteenth less

LEAST_RESERVE_MIB = 512  # RAM that a suggestion leaves free: a system without a desktop takes that
STEP_MIB = 64  # a suggested size of RAM is a multiple of it


@dataclass(frozen=True)
class Short:
    """What a model lacks: the fullest device's row, and why there is no more."""

    row: LedgerRow
    missing_bytes: int
    total_bytes: int  # of all devices, without their reserves
    reserve_bytes: int  # of RAM
    memory_bytes: int  # all RAM of the host
    earlier: tuple[Plan, ...]  # of models that were planned before


@dataclass(frozen=True)
class Change:
    """Inputs of the plan that a suggestion changes; None: as it is."""

    prompt_cache_mib: int | None = None
    ram_reserve_mib: int | None = None
    header: Header | None = None


Fits = Callable[[Context], bool]  # Does the model fit with this context?


def suggestions(
    model: Model,
    context: Context,
    instance: Instance,
    short: Short,
    *,
    backend: str,
    fits: Fits,
    fits_by_estimate: Fits,
    is_planned: Callable[[Change], bool],
) -> tuple[str, ...]:
    """Sentences for the operator: what took the memory, then what would help, the smallest change first.

    `fits` is exact and slow; `fits_by_estimate` is quick and may be slightly wrong; `is_planned` plans anew.
    """

    def largest(most: int, changed: Callable[[int], Context]) -> int:
        estimated = _largest(most, lambda count: fits_by_estimate(changed(count)))
        counts = dict.fromkeys(estimated * (BACK - n) // BACK for n in range(TRIES))
        return next((count for count in counts if count and fits(changed(count))), 0)

    weights = model.header.weights_bytes
    sentences: list[str] = []
    if context.slots > 1 and not context.unified and fits(replace(context, slots=1)):
        slots = largest(context.slots - 1, lambda slots: replace(context, slots=slots)) or 1
        sentences.append(f"set slots to {slots}, and the same context fits: each slot has its own KV cache")
    if (
        not is_quantised(context.kv_type)
        and "q8_0" not in instance.kv_types
        and takes_cache_on(model.shape, "q8_0", backend)
        and fits(replace(context, kv_type="q8_0"))
    ):
        sentences.append("allow kv_types q8_0, and it fits: the KV cache takes 47 % less")
    most, key = (context.pool_tokens, "pool_tokens") if context.unified else (context.tokens, "context_tokens")
    step = CONTEXT_STEP if most > 2 * CONTEXT_STEP else PAD_CELLS
    step *= max(1, most // step // CONTEXT_STEPS)
    steps = largest(most // step, lambda count: _with_tokens(context, count * step))
    if steps:
        sentences.append(f"set {key} to {steps * step}, about the most that fits")
    sentences += _less_ram(instance, short, is_planned)
    sentences += _smaller_quantisation(model, short, is_planned)
    if not sentences and weights > short.total_bytes:
        sentences.append(
            f"the weights alone need {weights // MIB} MiB, all devices together have"
            f" {max(0, short.total_bytes) // MIB} MiB"
        )
    return (*_why(short), *(sentences or ("choose a smaller model or a host with more memory",)))


def _with_tokens(context: Context, tokens: int) -> Context:
    """The context with this many tokens for each slot or, where the slots share a pool, in all."""
    if context.unified:
        return replace(context, tokens=min(context.tokens, tokens), pool_tokens=tokens)
    return replace(context, tokens=tokens)


def _why(short: Short) -> Iterator[str]:
    """What took the memory beside the model itself."""
    if short.reserve_bytes >= short.memory_bytes:
        yield (
            f"ram_reserve_mib is {short.reserve_bytes // MIB}, but the host has {short.memory_bytes // MIB} MiB of RAM"
            " in all: lower it"
        )
    taken = [(plan, _taken(plan, short.row.device)) for plan in short.earlier]
    taken = [(plan, size) for plan, size in taken if size]
    if not taken:
        return
    names = ", ".join(f"{plan.instance} {size // MIB} MiB" for plan, size in taken)
    caches = sum(plan.prompt_cache_mib for plan, _ in taken) if short.row.device == HOST else 0
    yield (
        f"models that are planned before it, by priority and then by their order, took the rest: {names}"
        + (f", of which {caches} MiB are prompt_cache_mib" if caches else "")
        + ": give this one a higher priority, lower theirs, or serve one of them elsewhere"
    )


def _taken(plan: Plan, device: str) -> int:
    return sum(row.used_bytes for row in plan.ledger if row.device == device)


def _less_ram(instance: Instance, short: Short, is_planned: Callable[[Change], bool]) -> Iterator[str]:
    """A smaller prompt cache or a smaller reserve; both, if neither is enough alone."""
    if short.row.device != HOST:
        return
    missing = -(-short.missing_bytes // MIB)
    cache, reserve = instance.prompt_cache_mib, short.reserve_bytes // MIB
    left = _fitting(cache - missing, 0, lambda size: is_planned(Change(prompt_cache_mib=size)))
    if cache and left is not None:
        yield f"set prompt_cache_mib to {left} (now {cache}), and it fits: more prompts are read again"
        return
    left = _fitting(reserve - missing, LEAST_RESERVE_MIB, lambda size: is_planned(Change(ram_reserve_mib=size)))
    if left is not None:
        yield f"set ram_reserve_mib to {left} (now {reserve}), and it fits: less RAM stays free for everything else"
        return
    left = _fitting(
        reserve + cache - missing, LEAST_RESERVE_MIB, lambda size: is_planned(Change(0, ram_reserve_mib=size))
    )
    if cache and left is not None:
        yield (
            f"set prompt_cache_mib to 0 (now {cache}) and ram_reserve_mib to {left} (now {reserve}), and it fits: more"
            " prompts are read again, and less RAM stays free"
        )


def _fitting(most: int, least: int, fits: Callable[[int], bool]) -> int | None:
    """A number of MiB from `least` up to `most`, in steps, that fits; None if neither the most nor a bit less does."""
    most = most // STEP_MIB * STEP_MIB
    sizes = [size for size in (most, most - 2 * STEP_MIB, least) if size >= least] if most >= least else []
    return next((size for size in sizes if fits(size)), None)


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number from 1 to `most` that fits, by bisection; 0 if none does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _smaller_quantisation(model: Model, short: Short, is_planned: Callable[[Change], bool]) -> Iterator[str]:
    """The largest smaller quantisation that fits, with its size as estimated tensor by tensor."""
    now = model.header.weights_bytes
    for name, header in smaller(model.header):
        could_fit = header.weights_bytes <= min(now - short.missing_bytes, short.total_bytes)
        if could_fit and is_planned(Change(header=header)):
            yield (
                f"take a smaller quantisation: {name} needs about {header.weights_bytes // MIB} MiB for the weights"
                f" (now {now // MIB} MiB), and it fits"
            )
            return
