"""Why a model is refused before anything is planned: llama-server does not serve it, or a setting asks for more than
there is."""

from __future__ import annotations

from llamafleet.host.machine import Machine
from llamafleet.model.architectures import ARCHITECTURES, PROJECTOR, RELEASE, nearest
from llamafleet.model.gguf import Header
from llamafleet.model.shape import Shape
from llamafleet.planner.result import Refusal
from llamafleet.settings.schema import Instance


def not_a_model(header: Header, shape: Shape) -> Refusal | None:
    """Why llama-server would not serve this file; None if it would."""
    main_file = "name the model's main GGUF file"
    if header.architecture == PROJECTOR:
        reason = f"{header.name} is a projector ({PROJECTOR}): llama-server loads it only beside a model"
        return Refusal(reason, suggestions=(main_file,))
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


def beyond(instance: Instance, machine: Machine, context_tokens: int) -> str:
    """Which setting asks for more than the host or the context has; empty if none does."""
    if instance.threads is not None and instance.threads > machine.cpu.logical_cores:
        return (
            f"threads: {instance.threads} is more than the {machine.cpu.logical_cores} logical cores of "
            f"{machine.hostname}: leave it out, or set at most that"
        )
    if instance.live_tokens is not None and instance.live_tokens > context_tokens:
        return (
            f"live_tokens: {instance.live_tokens} is more than a slot's context of {context_tokens} tokens: leave it "
            "out, or set at most context_tokens"
        )
    return ""
