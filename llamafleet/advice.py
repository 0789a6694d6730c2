"""What would help where a model does not fit: a smaller context, another quantisation."""

from __future__ import annotations

from .kv import PAD_CELLS, Context, kv_bytes
from .ledger import MIB, Model
from .settings import Instance

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


def suggestions(model: Model, context: Context, instance: Instance, *, available: int) -> tuple[str, ...]:
    """Steps for the operator, the least painful first. `available`: bytes of all devices together."""
    weights = model.header.weights_bytes
    cache = sum(kv_bytes(model.header, context))
    found = []
    if weights < available and cache > (available - weights) // 2:
        tokens = _smaller_context(model, context, (available - weights) // 2)
        if tokens:
            found.append(f"set context_tokens to {tokens}: its KV cache would fit")
    if context.slots > 1:
        found.append(f"set slots to 1: the KV cache is {context.slots} times that of one slot")
    if context.kv_type in ("f16", "bf16", "f32") and cache > weights // 10 and "q8_0" not in instance.kv_types:
        found.append("allow kv_types q8_0: the KV cache takes 47 % less")
    smaller = _smaller_quantisation(model, available - cache)
    if smaller:
        found.append(smaller)
    return tuple(found) or ("choose a smaller model or a host with more memory",)


def _smaller_context(model: Model, context: Context, budget: int) -> int:
    tokens = context.tokens // 2
    while tokens >= PAD_CELLS:
        smaller = Context(tokens, context.slots, context.kv_type, context.ubatch_tokens)
        if sum(kv_bytes(model.header, smaller)) <= budget:
            return tokens
        tokens //= 2
    return 0


def _smaller_quantisation(model: Model, budget: int) -> str:
    elements = sum(tensor.elements for tensor in model.header.tensors)
    now = model.header.weights_bytes * 8 / max(1, elements)
    for name, bits in BITS_PER_WEIGHT:
        size = int(elements * bits / 8)
        if bits < now * 0.95 and size <= budget * 0.9:
            return f"take a smaller quantisation: about {size // MIB} MiB as {name}, now {now:.1f} bits a weight"
    return ""
