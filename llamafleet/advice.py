"""What would help where a model does not fit: a smaller context, another quantisation."""

from __future__ import annotations

from collections.abc import Callable

from .kv import PAD_CELLS, Context, kv_bytes
from .ledger import MIB, Model
from .settings import Instance

UNQUANTISED = ("f16", "bf16", "f32")
CONTEXT_STEP = 1024  # tokens: finer answers would not be easier to use

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


def suggestions(model: Model, context: Context, instance: Instance, *, available: int, fits: Fits) -> tuple[str, ...]:
    """Steps for the operator, the least painful first. `available`: bytes of all devices together."""
    weights = model.header.weights_bytes
    cache = sum(kv_bytes(model.header, context))
    found = []
    if context.slots > 1 and fits(context.tokens, 1, context.kv_type):
        slots = _largest(context.slots - 1, lambda slots: fits(context.tokens, slots, context.kv_type))
        found.append(f"set slots to {slots}, and the same context fits: each has a KV cache of its own")
    if (
        context.kv_type in UNQUANTISED
        and "q8_0" not in instance.kv_types
        and fits(context.tokens, context.slots, "q8_0")
    ):
        found.append("allow kv_types q8_0, and it fits: the KV cache takes 47 % less")
    step = CONTEXT_STEP if context.tokens > 2 * CONTEXT_STEP else PAD_CELLS
    steps = _largest(context.tokens // step, lambda count: fits(count * step, context.slots, context.kv_type))
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
