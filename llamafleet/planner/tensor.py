"""Plans with `--split-mode tensor`: every GPU computes a part of every layer (llama.cpp's docs call it experimental).

Nothing of the model is on the host, and all GPUs get equal parts, so the smallest and the slowest one decide.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llamafleet.memory.capacity import Capacity
from llamafleet.memory.context import Context, is_quantised
from llamafleet.memory.flash_attention import is_used
from llamafleet.memory.ledger import LedgerRow
from llamafleet.memory.placement import HOST, Placement, Segment
from llamafleet.memory.tensor_split import LOADED, UNSUPPORTED, split
from llamafleet.memory.weights import Model
from llamafleet.model.shape import Shape
from llamafleet.planner.estimate import Budgets
from llamafleet.planner.pools import in_words, running_out
from llamafleet.planner.roofline import Prediction, Roofline
from llamafleet.settings.workload import Workload

AUTO_GAIN = 1.1  # "auto" takes it where the workload is predicted to be this much faster: it is experimental
# Two sums over all GPUs for each layer and token. A 27B on two cards writes 33.3 tokens/s by layers and 48.8 so: 0.1 ms
# for each of its 64 layers (llama.cpp #21788).
SUM_SECONDS = 50e-6
SUMS = 2
SMALLER_SHARE = 0.85  # speed of a GPU with a part of each matrix, as a share of that with whole ones
ERROR = 0.5  # of a prediction


@dataclass(frozen=True)
class Tensors:
    """A context on some GPUs, with its ledger and its predicted speed."""

    context: Context
    order: tuple[int, ...]  # positions in the capacity's GPUs
    rows: tuple[LedgerRow, ...]
    predicted: Prediction
    score: float  # seconds of the workload, with the handicaps of the context

    @property
    def short_bytes(self) -> int:
        """Bytes that the fullest device lacks; 0 or less where all fit."""
        return max(-row.free_bytes for row in self.rows)


def impossible(shape: Shape, backend: str, capacity: Capacity, kv_types: Sequence[str]) -> str:
    """Why llama.cpp cannot split this model so on these GPUs; empty where it can (src/llama-context.cpp,
    llama_init_from_model)."""
    if shape.architecture.name in UNSUPPORTED:
        return f"llama.cpp does not split the tensors of {shape.architecture.name!r}"
    if not is_used(shape, backend) or not shape.architecture.flash_attention:
        return f"it needs flash attention, which {backend} does not have for this model"
    if all(is_quantised(kv_type) for kv_type in kv_types):
        return f"it takes no quantised KV cache, and kv_types is {', '.join(kv_types)}"
    if capacity.unified or len(_usable(capacity)) < 2:
        return "it needs two GPUs with memory of their own"
    return ""


def is_tried(shape: Shape, backend: str) -> bool:
    """Whether "auto" tries it: with CUDA, of which llama.cpp's docs expect a gain, and for an architecture with which
    llama-server was seen to load."""
    return backend == "cuda" and shape.architecture.name in LOADED


def best(budgets: Budgets, contexts: Sequence[tuple[Context, float]]) -> Tensors:
    """The fastest that fits; where none does, the one that lacks least. `contexts`: each with its handicap."""
    found = [
        _on(order, context, handicap, budgets)
        for order in _orders(budgets.capacity, budgets.roofline)
        for context, handicap in contexts
        if not is_quantised(context.kv_type)
    ]
    return min(found, key=lambda one: (max(0, one.short_bytes), one.score))


def placement(model: Model) -> Placement:
    """All layers and the output on GPUs, as `--n-gpu-layers` counts them."""
    return Placement((Segment(0, 0, model.layers, model.layers),))


def is_proven(shape: Shape, count: int) -> bool:
    """Whether llama-server was seen to load a model of this architecture on so many GPUs."""
    return count <= LOADED.get(shape.architecture.name, 0)


def why(
    chosen: Tensors, capacity: Capacity, shape: Shape, work: Workload, seconds_by_layers: float | None
) -> Iterator[str]:
    """Sentences for the plan; `seconds_by_layers`: the workload's with whole layers on GPUs, where that fits."""
    names = " and ".join(f"GPU{capacity.gpus[n].index}" for n in chosen.order)
    compared = f", {seconds_by_layers:.1f} s with whole layers on each" if seconds_by_layers is not None else ""
    yield (
        f"each of {names} computes a part of every layer (--split-mode tensor, experimental in llama.cpp): the"
        f" workload takes {chosen.predicted.workload_seconds:.1f} s, predicted{compared}"
    )
    yield f"KV cache {chosen.context.kv_type}: {in_words(chosen.context)}"
    yield from running_out(chosen.context, work)
    yield (
        "the GPUs' bytes are upper bounds: cuts between heads are uneven, and llama-server does not measure this split "
        "before it loads, so the gate compares what it allocates"
    )
    if not is_proven(shape, len(chosen.order)):
        yield (
            f"warning: no model of {shape.architecture.name!r} was seen to load so on {len(chosen.order)} GPUs: "
            "llama-server may end at its start"
        )


def _usable(capacity: Capacity) -> list[int]:
    return [n for n, gpu in enumerate(capacity.gpus) if not gpu.mig]


def _orders(capacity: Capacity, roofline: Roofline) -> Iterator[tuple[int, ...]]:
    """The fastest two GPUs, three and so on, and the largest likewise, in bus order."""
    rates, sizes, usable = roofline.rates.gpus, capacity.gpu_bytes, _usable(capacity)
    fastest = sorted(usable, key=lambda n: (-rates[n].bytes_per_s, -sizes[n], n))
    largest = sorted(usable, key=lambda n: (-sizes[n], -rates[n].bytes_per_s, n))
    yield from dict.fromkeys(
        tuple(sorted(gpus[:count])) for count in range(2, len(usable) + 1) for gpus in (fastest, largest)
    )


def _on(order: tuple[int, ...], context: Context, handicap: float, budgets: Budgets) -> Tensors:
    here, correction = budgets.capacity.only(order), budgets.correction
    gpu, host = split(budgets.model, context, len(order), budgets.backend, budgets.extra_bytes, here.repacked)
    used = {number: correction.applied(f"GPU{one.index}", gpu) for number, one in enumerate(here.gpus)}
    rows = here.ledger(used, correction.applied(HOST, host))
    predicted = predict(order, context, budgets.roofline)
    return Tensors(context, order, rows, predicted, predicted.workload_seconds * handicap)


def predict(order: Sequence[int], context: Context, roofline: Roofline) -> Prediction:
    """The speed, from that of the slowest of these GPUs if it had the whole model: its work is divided, and the sums
    are added."""
    rates, work, model = roofline.rates, roofline.work, roofline.model
    slowest = min(order, key=lambda n: rates.gpus[n].bytes_per_s)
    weakest = min(order, key=lambda n: rates.gpus[n].flops)
    segments, count = (Segment(0, 0, model.layers, model.layers),), len(order)
    link = min(rates.gpus[n].link_bytes_per_s for n in order)

    def writing(sequences: int) -> float:
        alone = roofline.decode((slowest,), segments, sequences, context.kv_type)
        return alone.gpu / (count * SMALLER_SHARE) + alone.waiting + model.layers * SUMS * SUM_SECONDS

    alone = roofline.prefill((weakest,), segments, context.ubatch_tokens)
    runs = -(-work.prompt_tokens // min(context.ubatch_tokens, work.prompt_tokens))
    moved = SUMS * model.layers * work.prompt_tokens * model.shape.embedding * 4 * 2 * (count - 1) / count
    reading = alone.gpu / (count * SMALLER_SHARE) + alone.waiting + moved / link
    reading += runs * model.layers * SUMS * SUM_SECONDS
    busy = min(context.slots, work.concurrency)
    seconds = -(-work.concurrency // busy) * (busy * reading + work.reply_tokens * writing(busy))
    decode, prefill, more = 1 / writing(1), work.prompt_tokens / reading, 1 + ERROR
    return Prediction(
        round(decode, 2), round(prefill, 1), round(decode / more, 2), round(decode * more, 2), round(prefill / more, 1),
        round(prefill * more, 1), round(context.slots / writing(context.slots), 2), round(seconds, 2),
    )  # fmt: skip
