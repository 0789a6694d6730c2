"""Where what guesses tokens is put: a head beside its layers, a draft model whole on one GPU, or on the host.

A draft on several GPUs would be divided as the model is (`common_base_params_to_speculative` keeps its tensor split),
so it is never put on several. Whether guessing pays is for measuring: no plan is chosen by it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from llamafleet.memory.beside import Beside
from llamafleet.memory.checkpoints import checkpoint_bytes
from llamafleet.memory.context import Context, types_of
from llamafleet.memory.flash_attention import takes_cache_on
from llamafleet.memory.placement import HOST
from llamafleet.memory.speculation import NGRAM, TYPES, Draft, Speculation
from llamafleet.memory.weights import Model
from llamafleet.model import speculation as kinds
from llamafleet.planner.asked import Asked
from llamafleet.settings.companions import DRAFT
from llamafleet.settings.schema import Instance
from llamafleet.settings.speculation import WITH_DRAFT
from llamafleet.units import MIB

PART = "speculation"
ON_HOST = 1.05  # factor on the seconds: a draft is computed before each token


def of(instance: Instance) -> Speculation | None:
    """How tokens are guessed for this instance; None: they are not."""
    return Speculation.of(instance.speculation, instance.draft_max_tokens, instance.draft_min_tokens)


def uses_head(instance: Instance) -> bool:
    """Is the model's own draft head loaded?"""
    return instance.speculation == kinds.MTP


def served(asked: Asked, context: Context) -> Context:
    """The context that the model is served with."""
    speculation = of(asked.instance)
    return speculation.served(asked.model.shape, context, asked.companions.get(DRAFT)) if speculation else context


def unfit(asked: Asked) -> Iterator[str]:
    """Why llama-server would not guess for this model in the way that was asked for."""
    yield from kinds.unfit(asked.instance.speculation, asked.model.header, asked.companions.get(DRAFT))


def ways(asked: Asked) -> Sequence[Beside]:
    """The places of a draft, the GPUs first; of a head and of n-grams the only one."""
    speculation = of(asked.instance)
    if speculation is None:
        return ()
    draft = asked.companions.get(DRAFT) if speculation.kind in WITH_DRAFT else None
    if draft is None:
        return (Beside(PART, at=partial(_without_draft, asked, speculation)),)
    model = Model.of(draft)
    places: list[int | None] = [*range(len(asked.capacity.gpus)), None]
    if asked.capacity.unified:
        places = places[:1]
    return [Beside(DRAFT, at=partial(_placed, asked, speculation, model, place)) for place in places]


def _without_draft(asked: Asked, speculation: Speculation, context: Context) -> Beside:
    shape = asked.model.shape
    size = speculation.rows_bytes(shape, context, None) + speculation.checkpoints_bytes(shape, context)
    what = "from what the conversation repeats" if speculation.kind == NGRAM else "by the model's own head"
    head = 0
    if context.head:
        head = _head_bytes(asked.model, context)
    return Beside(
        PART,
        host_bytes=size,
        flags=(*_flags(speculation), *(_cache_flags(context.kv_type) if head else ())),
        why=_why(speculation, what, f"{(size + head) // MIB} MiB"),
    )


def _head_bytes(model: Model, context: Context) -> int:
    """Bytes of the head's weights and cache; its buffers are among the model's."""
    weights = sum(model.layer_bytes[model.shape.trunk_layers :])
    return weights + sum(model.compute.kv_bytes(context)[model.shape.trunk_layers :])


def _placed(asked: Asked, speculation: Speculation, model: Model, place: int | None, context: Context) -> Beside | None:
    """The draft at a place, a position among the GPUs or None for the host; None: the GPU is too small."""
    kv_type = context.kv_type if takes_cache_on(model.shape, context.kv_type, asked.backend) else "f16"
    own = speculation.of_draft(context, kv_type)
    taken = Draft.of(model, own, asked.backend, asked.capacity.repacked, on_gpu=place is not None)
    if place is not None and not asked.capacity.unified and not asked.has_room(place, taken.gpu_bytes):
        return None
    rows = speculation.rows_bytes(asked.model.shape, context, model.shape)
    rows += speculation.checkpoints_bytes(asked.model.shape, context)
    host_bytes, host_flags = taken.host_bytes + rows, ("--spec-draft-device", "none", "--spec-draft-ngl", "0")
    shares = speculation.kind in kinds.READERS and kinds.shares_output(model.header)
    name, checkpoint = model.shape.name, checkpoint_bytes(model.shape, own)
    if place is None:
        return Beside(
            DRAFT,
            host_bytes=host_bytes,
            flags=(*_flags(speculation), *host_flags, *_cache_flags(kv_type)),
            why=_why(speculation, f"by {name} on the host", f"{taken.host_bytes // MIB} MiB"),
            handicap=ON_HOST if asked.capacity.gpus else 1.0,
            reported_rows={HOST: taken.host_reported},
            checkpoint_bytes=checkpoint,
            output_on=HOST if shares else None,
        )
    index = asked.capacity.gpus[place].index
    gpu_flags = ("--spec-draft-device", f"{{GPU{index}}}", "--spec-draft-ngl", str(model.layers + 1))
    return Beside(
        DRAFT,
        gpu_bytes={index: taken.gpu_bytes},
        host_bytes=host_bytes,
        flags=(*_flags(speculation), *gpu_flags, *_cache_flags(kv_type)),
        why=_why(speculation, f"by {name} on GPU{index}", f"{taken.gpu_bytes // MIB} MiB"),
        reported_rows={f"GPU{index}": taken.gpu_reported, HOST: taken.host_reported},
        checkpoint_bytes=checkpoint,
        output_on=f"GPU{index}" if shares else None,
    )


def length_flags(kind: str) -> tuple[str, str]:
    """The flags of the most and of the fewest tokens that are guessed at once."""
    lengths = "--spec-ngram-mod-n" if kind == NGRAM else "--spec-draft-n"
    return f"{lengths}-max", f"{lengths}-min"


def _flags(speculation: Speculation) -> tuple[str, ...]:
    most, least = length_flags(speculation.kind)
    return "--spec-type", TYPES[speculation.kind], most, str(speculation.most), least, str(speculation.least)


def _cache_flags(kv_type: str) -> tuple[str, ...]:
    key, value = types_of(kv_type)
    return "--spec-draft-type-k", key, "--spec-draft-type-v", value


def _why(speculation: Speculation, what: str, size: str) -> str:
    return (
        f"speculation: up to {speculation.most} tokens are guessed {what}, with {size}; the predicted speed is that "
        "without it: only measuring tells whether it pays"
    )
