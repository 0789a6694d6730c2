"""What would help where a model does not fit: a smaller context, another quantisation."""

from __future__ import annotations

from collections.abc import Callable

from llamafleet.memory.context import PAD_CELLS, Context
from llamafleet.memory.kv_cache import takes_cache_of
from llamafleet.memory.weights import Model
from llamafleet.settings.schema import Instance
from llamafleet.units import MIB

UNQUANTISED = ("f16", "bf16", "f32")
CONTEXT_STEP = 1024  # tokens: finer answers would not be easier to use
CONTEXT_STEPS = 128  # of these and more, to the whole context
BACK, TRIES = 16, 3  # where the quick answer was wrong a sixteenth less is tried, and another

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


# Would the model be served with so many tokens for each of so many slots and this cache type?
Fits = Callable[[int, int, str], bool]


def suggestions(
    model: Model, context: Context, instance: Instance, *, available: int, fits: Fits, maybe: Fits
) -> tuple[str, ...]:
    """Steps for the operator, the least painful first. `available`: bytes of all devices together.

    `maybe` is quick and may err by a little; `fits` is not and does not.
    """

    def largest(most: int, question: Callable[[int], tuple[int, int, str]]) -> int:
        found = _largest(most, lambda count: maybe(*question(count)))
        tried = dict.fromkeys(found * (BACK - n) // BACK for n in range(TRIES))
        return next((count for count in tried if count and fits(*question(count))), 0)

    weights = model.header.weights_bytes
    cache = sum(model.compute.kv_bytes(context))
    found = []
    if context.slots > 1 and fits(context.tokens, 1, context.kv_type):
        slots = largest(context.slots - 1, lambda slots: (context.tokens, slots, context.kv_type)) or 1
        found.append(f"set slots to {slots}, and the same context fits: each has a KV cache of its own")
    if (
        context.kv_type in UNQUANTISED
        and "q8_0" not in instance.kv_types
        and takes_cache_of(model.shape, "q8_0")
        and fits(context.tokens, context.slots, "q8_0")
    ):
        found.append("allow kv_types q8_0, and it fits: the KV cache takes 47 % less")
    step = CONTEXT_STEP if context.tokens > 2 * CONTEXT_STEP else PAD_CELLS
    step *= max(1, context.tokens // step // CONTEXT_STEPS)
    steps = largest(context.tokens // step, lambda count: (count * step, context.slots, context.kv_type))
    if steps:
        found.append(f"set context_tokens to {steps * step}, about the most that fits")
    smaller = _smaller_quantisation(model, available - cache)
    if smaller:
        found.append(smaller)
    if not found and weights > available:
        found.append(f"the weights alone take {weights // MIB} MiB, all memory is {max(0, available) // MIB} MiB")
    return tuple(found) or ("choose a smaller model or a host with more memory",)


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `most` that fits, by halving; 0 if not even one does."""
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
            return f"take a smaller quantisation: about {size // MIB} MiB as {name}, now {now:.1f} bits a weight"
    return ""
