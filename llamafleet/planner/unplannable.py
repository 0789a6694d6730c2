"""Why a model is refused before anything is planned: llama-server does not serve it, or a setting asks for more than
there is."""

from __future__ import annotations

from llamafleet.host.machine import Machine
from llamafleet.memory.flash_attention import RATIO_DECIDES, lacking
from llamafleet.memory.kv_cache import has_one_type, takes_cache_of
from llamafleet.memory.weights import Model
from llamafleet.model.architectures import ARCHITECTURES, PROJECTOR, RELEASE, nearest
from llamafleet.model.gguf import Header
from llamafleet.model.shape import Shape
from llamafleet.planner.processors import numbers
from llamafleet.planner.result import Refusal
from llamafleet.settings.schema import Instance

# What a GGUF file is that is no model, by its general.type (gguf-py/gguf/constants.py, GGUFType).
KINDS = {
    "adapter": "a LoRA adapter: llama-server loads it only beside the model that it was made for",
    "imatrix": "an importance matrix: it is read while a model is quantised, and llama-server does not load it",
    "mmproj": f"a projector ({PROJECTOR}): llama-server loads it only beside a model",
    "vocab": "a vocabulary without a model",
}


def not_a_model(header: Header, shape: Shape) -> Refusal | None:
    """Why llama-server would not serve this file; None if it would."""
    main_file = "name the model's main GGUF file"
    if header.architecture == PROJECTOR:
        reason = f"{header.name} is a projector ({PROJECTOR}): llama-server loads it only beside a model"
        return Refusal(reason, suggestions=(main_file,))
    if kind := KINDS.get(str(header.metadata.get("general.type", ""))):
        return Refusal(f"{header.name} is {kind}", suggestions=(main_file,))
    if shape.architecture.vocabulary_of_target:
        reason = f"{header.name} is a draft ({header.architecture}): llama-server loads it only beside a model"
        return Refusal(
            reason, suggestions=("name the model that it guesses for as the source, and this file as its draft",)
        )
    if header.architecture not in ARCHITECTURES:
        near = nearest(header.architecture)
        return Refusal(
            f"{header.name}: llama.cpp {RELEASE} does not know the architecture {header.architecture!r}"
            f"{f' (the nearest name it knows is {near!r})' if near else ''}: the model would not load",
            suggestions=("choose a GGUF of an architecture that llama.cpp supports, or use a newer llamafleet",),
        )
    if shape.layers < 1 or shape.embedding < 1:
        reason = f"{header.name} ({header.architecture}) is no language model: its header has no layers"
        return Refusal(reason, suggestions=(main_file,))
    return None


def no_cache(instance: Instance, header: Header, shape: Shape, backend: str) -> Refusal:
    """The refusal where llama-server takes none of the instance's cache types for this model on this backend."""
    types, head = ", ".join(instance.kv_types), lacking(shape, backend)
    why = "the head size must be a multiple of a quantised type's block size"
    if has_one_type(shape) and all("/" in kv_type for kv_type in instance.kv_types):
        why = f"{shape.architecture.name!r} has one type for K and V"
    elif head:
        why = f"a quantised V needs flash attention, and {without_kernel(backend, head)}"
    elif any(takes_cache_of(shape, kv_type) for kv_type in instance.kv_types):
        why = f"llama.cpp's {backend} backend has no flash attention for a cache of {types}"
    return Refusal(
        f"{instance.name}: llama-server has no KV cache of {types} for {header.name}",
        instance=instance.name,
        suggestions=(f"allow kv_types f16: {why}",),
    )


def without_kernel(backend: str, head: tuple[int, int, int]) -> str:
    """The fact that a backend has no flash attention for these heads (see `flash_attention.lacking`)."""
    key, value, ratio = head
    sizes = f"{key} elements" if key == value else f"{key} elements of K and {value} of V"
    shared = f", {ratio} for each head of K" if key in RATIO_DECIDES else ""
    return f"llama.cpp's {backend} backend has no flash attention for heads of {sizes}{shared}"


def nothing_to_spill(instance: Instance, model: Model, gpus: int) -> str:
    """Why `spilled_layers` layers cannot have experts (FFN) in RAM beside a GPU; empty if they can."""
    asked, movable = instance.spilled_layers, sum(size > 0 for size in model.spill_bytes)
    if asked is None or (gpus and asked <= movable):
        return ""
    if not gpus:
        return f"spilled_layers: {asked}, but the plan uses no GPU: leave it out"
    return f"spilled_layers: {asked} is more than the {movable} layers that have experts or an FFN: set at most that"


def beyond(instance: Instance, machine: Machine, context_tokens: int) -> str:
    """Which setting asks for more than the host or the context has; empty if none does."""
    most = machine.cpu.logical_cores
    for key, threads in (("threads", instance.threads), ("threads_batch", instance.threads_batch)):
        if threads is not None and threads > most:
            return (
                f"{key}: {threads} is more than the {most} logical cores of "
                f"{machine.hostname}: leave it out, or set at most that"
            )
    if instance.cpus and not numbers(instance.cpus):
        return f"cpus: {instance.cpus} names no CPU: give the lower number of each range first"
    if instance.live_tokens is not None and instance.live_tokens > context_tokens:
        return (
            f"live_tokens: {instance.live_tokens} is more than a slot's context of {context_tokens} tokens: leave it "
            "out, or set at most context_tokens"
        )
    return ""
