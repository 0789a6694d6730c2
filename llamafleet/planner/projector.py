"""A projector beside its model: whether they belong together, and where it can be.

Sources of the rules: tools/mtmd/mtmd.cpp, mtmd_context (widths); tools/server/server-context.cpp, load_model (a
picture inside one ubatch) at b11434.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from llamafleet.memory.beside import Beside
from llamafleet.memory.flash_attention import KERNELS, is_used
from llamafleet.memory.projector import ProjectorBytes, projector_bytes
from llamafleet.model.projector import Projector, ProjectorError, read
from llamafleet.planner.asked import Asked
from llamafleet.settings.companions import PROJECTOR
from llamafleet.units import MIB

TRIED_GPUS = 2  # those with the most memory left
# Factor on the workload's seconds of a projector on the host: a picture takes seconds there, on a GPU a tenth of one.
ON_HOST = 1.5
UBATCH_STEP = 32
SMALLER_PICTURES = (2048, 1024, 512, 256)  # tokens that are suggested where a plan does not fit


def unfit(asked: Asked) -> Iterator[str]:
    """Why the projector does not fit the model or the settings."""
    header = asked.companions.get(PROJECTOR)
    if header is None:
        return
    try:
        projector = _read(asked)
    except ProjectorError as error:
        yield f"projector: {header.name} {error}: give the mmproj file that was published with the model"
        return
    yield from _other_model(asked, projector)
    yield from _limits(asked, projector)
    yield from _ubatch(asked, projector)


def ways(asked: Asked) -> tuple[Beside, ...]:
    """The projector on a GPU, and on the host; nothing without one."""
    if PROJECTOR not in asked.companions:
        return ()
    projector = _read(asked)
    flash = is_used(asked.model.shape, asked.backend)
    found = [*_on_gpus(asked, projector, flash)]
    if not (asked.capacity.unified and found):
        found.append(_on_host(asked, projector, flash))
    return tuple(found)


def less(asked: Asked) -> Iterator[tuple[str, Asked]]:
    """What takes less memory, the least change first: a sentence, and what is asked for then."""
    if PROJECTOR not in asked.companions:
        return
    vision = _read(asked).vision
    if vision is not None and vision.has_dynamic_size:
        for tokens in SMALLER_PICTURES:
            if (asked.instance.image_min_tokens or 0) <= tokens < vision.max_tokens:
                instance = replace(asked.instance, image_max_tokens=tokens)
                text = f"set image_max_tokens to {tokens} (now {vision.max_tokens}), and it fits: it sees less detail"
                yield text, replace(asked, instance=instance)
    others = {part: one for part, one in asked.companions.items() if part != PROJECTOR}
    yield "set projector to None, and it fits: the model reads text alone", replace(asked, companions=others)


def _read(asked: Asked) -> Projector:
    one = asked.instance
    return read(asked.companions[PROJECTOR], one.image_min_tokens, one.image_max_tokens)


def _other_model(asked: Asked, projector: Projector) -> Iterator[str]:
    shape = asked.model.shape
    width = shape.embedding * (1 + shape.image_layers)
    if projector.width and projector.width != width:
        yield (
            f"projector: {asked.companions[PROJECTOR].name} makes embeddings of {projector.width} numbers, "
            f"{asked.model.header.name} takes {width}: it is another model's; give the one of its own repository, or "
            '"auto"'
        )


def _limits(asked: Asked, projector: Projector) -> Iterator[str]:
    one, vision = asked.instance, projector.vision
    for name in ("image_min_tokens", "image_max_tokens"):
        if getattr(one, name) is None:
            continue
        if vision is None:
            yield f"{name}: the projector hears and does not see; leave it out"
        elif not vision.has_dynamic_size:
            yield f"{name}: pictures of {vision.name} have one size, {vision.max_tokens} tokens each; leave it out"
    least = one.image_min_tokens
    if vision is not None and least is not None and least > vision.max_tokens:
        yield (
            f"image_min_tokens is {least}, but {vision.name} makes {vision.max_tokens} tokens at most: "
            "set image_max_tokens too, or less"
        )
    if vision is not None and vision.max_tokens > asked.context_tokens:
        yield (
            f"a picture takes up to {vision.max_tokens} tokens, and context_tokens is {asked.context_tokens}: "
            f"set context_tokens to {vision.max_tokens} and what text needs"
            + (", or a smaller image_max_tokens" if vision.has_dynamic_size else "")
        )


def _ubatch(asked: Asked, projector: Projector) -> Iterator[str]:
    """llama-server would make pictures smaller without a word, or end at the first one."""
    needed, given = projector.same_ubatch_tokens, asked.instance.ubatch_tokens
    if given is not None and given < needed:
        smaller = projector.vision is not None and projector.vision.has_dynamic_size
        yield (
            f"ubatch_tokens is {given}, but the {needed} tokens of a picture must be in one ubatch, because this model "
            f"attends to them in both directions: set ubatch_tokens to {needed} or more, or leave it out"
            + (f", or set image_max_tokens to {given} or less" if smaller else "")
        )


def _gpus(asked: Asked, projector: Projector, flash: bool) -> list[int]:
    """The positions in the capacity of the GPUs worth a try: those with the most memory, where they compute the
    attention themselves."""
    kernel = KERNELS.get(asked.backend)
    heads = [(one.head, one.head, max(1, one.heads // max(1, one.kv_heads))) for one in projector.encoders]
    if flash and kernel and not all(kernel(*head) for head in heads if head[0]):
        return []
    capacity = asked.capacity
    order = sorted(range(len(capacity.gpus)), key=lambda n: (-capacity.gpu_bytes[n], capacity.gpus[n].index))
    return order[:TRIED_GPUS]


def _on_gpus(asked: Asked, projector: Projector, flash: bool) -> Iterator[Beside]:
    for position in _gpus(asked, projector, flash):
        sizes = projector_bytes(projector, on_gpu=True, flash_attention=flash)
        index = asked.capacity.gpus[position].index
        if asked.has_room(position, sizes.there):
            yield Beside(
                PROJECTOR, {index: sizes.there}, _host_bytes(asked, sizes.host_compute, sizes.pictures),
                ("--mmproj-device", f"{{GPU{index}}}", *_limit_flags(asked)),
                f"projector on GPU{index}: {_said(projector, sizes)}",
                least_ubatch=_least_ubatch(projector), reported=(f"GPU{index}", sizes.at_start),
            )  # fmt: skip


def _on_host(asked: Asked, projector: Projector, flash: bool) -> Beside:
    sizes = projector_bytes(projector, on_gpu=False, flash_attention=flash)
    with_gpus = bool(asked.capacity.gpus)
    return Beside(
        PROJECTOR, {}, _host_bytes(asked, sizes.there, sizes.pictures), ("--no-mmproj-offload", *_limit_flags(asked)),
        f"projector on the host: {_said(projector, sizes)}" + ("; a picture takes seconds there" if with_gpus else ""),
        handicap=ON_HOST if with_gpus else 1.0, least_ubatch=_least_ubatch(projector),
        reported=("host", sizes.at_start),
    )  # fmt: skip


def _host_bytes(asked: Asked, compute: int, pictures: int) -> int:
    """Every request may wait with a picture; one is encoded at a time."""
    return compute + pictures * (asked.instance.slots or asked.instance.concurrency)


def _least_ubatch(projector: Projector) -> int:
    return -(-projector.same_ubatch_tokens // UBATCH_STEP) * UBATCH_STEP


def _limit_flags(asked: Asked) -> Iterator[str]:
    for flag, tokens in (("--image-min-tokens", asked.instance.image_min_tokens),
                         ("--image-max-tokens", asked.instance.image_max_tokens)):  # fmt: skip
        if tokens is not None:
            yield from (flag, str(tokens))


def _said(projector: Projector, sizes: ProjectorBytes) -> str:
    """What it is for, its bytes, and whether they are certain."""
    vision = projector.vision
    what = f"pictures of up to {vision.max_tokens} tokens" if vision else "sound of 30 s at once"
    if vision and len(projector.encoders) > 1:
        what += " and sound"
    certain = "" if sizes.is_exact else ", an upper bound: the graph of this projector is not known here"
    parts = f"{-(-sizes.weights // MIB)} MiB of weights, {-(-sizes.compute // MIB)} MiB to compute {what}{certain}"
    together = projector.same_ubatch_tokens
    return parts + (f"; all {together} tokens of a picture are in one ubatch" if together else "")
