"""Suggestions for a model that does not fit: fewer slots, another cache type, less context, a smaller quantisation."""

from __future__ import annotations

from collections.abc import Callable

from llamafleet.memory.context import PAD_CELLS, Context
from llamafleet.memory.kv_cache import takes_cache_of
from llamafleet.memory.weights import Model
from llamafleet.settings.schema import Instance
from llamafleet.units import MIB

UNQUANTISED = ("f16", "bf16", "f32")
CONTEXT_STEP = 1024  # tokens; a suggested context is a multiple of it
CONTEXT_STEPS = 128  # the longer steps of a long context: at most this many up to the whole context
BACK, TRIES = 16, 3  # if the quick check was wrong, try a sixteenth less, then another sixteenth less

# Bits per weight of common quantisations, as llama-quantize prints them (tools/quantize/quantize.cpp).
BITS_PER_WEIGHT = (
    ("Q8_0", 8.5),
    ("Q6_K", 6.56),
    ("Q5_K_M", 5.7),
    ("Q4_K_M", 4.89),
    ("IQ4_XS", 4.46),
    ("Q3_K_M", 4.0),
    ("IQ3_XXS", 3.25),
    ("Q2_K", 3.16),
    ("IQ2_XS", 2.43),
)  # fmt: skip -- a table


# Does the model fit with (tokens for each slot, slots, KV cache type)?
Fits = Callable[[int, int, str], bool]


def suggestions(
    model: Model, context: Context, instance: Instance, *, available: int, fits: Fits, fits_by_estimate: Fits
) -> tuple[str, ...]:
    """Sentences for the operator, the smallest change first. `available` is bytes of all devices together.

    `fits` is exact and slow; `fits_by_estimate` is quick and may be slightly wrong.
    """

    def largest(most: int, arguments: Callable[[int], tuple[int, int, str]]) -> int:
        estimated = _largest(most, lambda count: fits_by_estimate(*arguments(count)))
        counts = dict.fromkeys(estimated * (BACK - n) // BACK for n in range(TRIES))
        return next((count for count in counts if count and fits(*arguments(count))), 0)

    weights = model.header.weights_bytes
    cache = sum(model.compute.kv_bytes(context))
    sentences = []
    if context.slots > 1 and fits(context.tokens, 1, context.kv_type):
        slots = largest(context.slots - 1, lambda slots: (context.tokens, slots, context.kv_type)) or 1
        sentences.append(f"set slots to {slots}, and the same context fits: each slot has its own KV cache")
    if (
        context.kv_type in UNQUANTISED
        and "q8_0" not in instance.kv_types
        and takes_cache_of(model.shape, "q8_0")
        and fits(context.tokens, context.slots, "q8_0")
    ):
        sentences.append("allow kv_types q8_0, and it fits: the KV cache takes 47 % less")
    step = CONTEXT_STEP if context.tokens > 2 * CONTEXT_STEP else PAD_CELLS
    step *= max(1, context.tokens // step // CONTEXT_STEPS)
    steps = largest(context.tokens // step, lambda count: (count * step, context.slots, context.kv_type))
    if steps:
        sentences.append(f"set context_tokens to {steps * step}, about the most that fits")
    smaller = _smaller_quantisation(model, available - cache)
    if smaller:
        sentences.append(smaller)
    if not sentences and weights > available:
        sentences.append(
            f"the weights alone need {weights // MIB} MiB, all devices together have {max(0, available) // MIB} MiB"
        )
    return tuple(sentences) or ("choose a smaller model or a host with more memory",)


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number from 1 to `most` that fits, by bisection; 0 if none does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _smaller_quantisation(model: Model, budget: int) -> str:
    elements = sum(tensor.elements for tensor in model.header.tensors)
    now = model.header.weights_bytes * 8 / max(1, elements)
    for name, bits in BITS_PER_WEIGHT:
        size = int(elements * bits / 8)
        if bits < now * 0.95 and size <= budget * 0.9:
            return (
                f"take a smaller quantisation: {name} needs about {size // MIB} MiB for the weights"
                f" (now {now:.1f} bits per weight)"
            )
    return ""
