"""Memory that is taken beside a model: a projector, a draft model, adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from llamafleet.memory.capacity import Capacity
from llamafleet.memory.context import Context
from llamafleet.memory.ledger import LedgerRow


@dataclass(frozen=True)
class Beside:
    """Bytes of a companion on each device, and the flags that put it there."""

    part: str  # "projector", "draft", "adapter-1"
    gpu_bytes: Mapping[int, int] = field(default_factory=dict)  # by the GPU's index
    host_bytes: int = 0
    # Of llama-server, without paths. "{GPU0}" is replaced by llama.cpp's name of the GPU with that index.
    flags: tuple[str, ...] = ()
    why: str = ""  # a sentence for the plan
    # Factor on the workload's seconds for costs that its prediction does not have, such as a slow image.
    handicap: float = 1.0
    least_ubatch: int = 0  # tokens that must be in one ubatch
    # Of what llama-server reports of it before it loads: the device of the ledger, and bytes. None: nothing.
    reported: tuple[str, int] | None = None
    # Where llama-server reports it device by device, as the model itself: bytes by the ledger's device names.
    reported_rows: Mapping[str, int] = field(default_factory=dict)
    checkpoint_bytes: int = 0  # what it adds to each context checkpoint
    output_on: str | None = None  # the ledger's device that must hold the model's output matrix, which it reads too
    # What it takes with a context, where that is not always the same; None: it does not fit there.
    at: Callable[[Context], Beside | None] | None = field(default=None, compare=False, repr=False)

    def with_context(self, context: Context) -> Beside | None:
        """What is taken with this context; None: it does not fit."""
        return self.at(context) if self.at else self


def reduced(capacity: Capacity, besides: Sequence[Beside]) -> Capacity:
    """The capacity that is left for the model."""
    on_gpus, host = taken(besides)
    host += sum(on_gpus.values()) if capacity.unified else 0
    return replace(
        capacity,
        gpu_bytes=tuple(
            size - (host if capacity.unified else on_gpus.get(gpu.index, 0))
            for gpu, size in zip(capacity.gpus, capacity.gpu_bytes, strict=True)
        ),
        host_bytes=capacity.host_bytes - host,
    )


def taken(besides: Sequence[Beside]) -> tuple[dict[int, int], int]:
    """Bytes of all of them: on each GPU by its index, and on the host."""
    on_gpus: dict[int, int] = {}
    for one in besides:
        for index, size in one.gpu_bytes.items():
            on_gpus[index] = on_gpus.get(index, 0) + size
    return on_gpus, sum(one.host_bytes for one in besides)


def apart(rows: Sequence[LedgerRow], bare: Sequence[LedgerRow]) -> tuple[LedgerRow, ...]:
    """The rows of a model with its adapters, by `bare`, those of the model alone with the same layers on each device:
    what the adapters take, and what they add to the compute buffers, is beside the model."""
    return tuple(
        replace(
            row, weights_bytes=alone.weights_bytes, compute_bytes=alone.compute_bytes,
            staging_bytes=alone.staging_bytes, beside_bytes=row.beside_bytes + row.used_bytes - alone.used_bytes,
        )
        for row, alone in zip(rows, bare, strict=True)
    )  # fmt: skip


def with_besides(
    rows: Sequence[LedgerRow], besides: Sequence[Beside], capacity: Capacity, overhead_bytes: int
) -> tuple[LedgerRow, ...]:
    """The rows of the model, made with the reduced capacity, as rows of the model and what is beside it.

    A GPU that the model itself does not use gets a row of its own, with the process's `overhead_bytes` there.
    `capacity` is that before it was reduced.
    """
    if not besides:
        return tuple(rows)
    on_gpus, host = taken(besides)
    bytes_of = {f"GPU{index}": size for index, size in on_gpus.items()}
    own = [_with(row, bytes_of.pop(row.device, 0)) for row in rows[:-1]]
    for gpu, size, reserve in zip(capacity.gpus, capacity.gpu_bytes, capacity.gpu_reserves_bytes, strict=True):
        if extra := bytes_of.pop(f"GPU{gpu.index}", 0):
            free = size - extra - overhead_bytes - reserve
            own.append(LedgerRow(f"GPU{gpu.index}", 0, 0, 0, 0, overhead_bytes, size, free, reserve, extra))
    return (*own, _with(rows[-1], host))


def _with(row: LedgerRow, size: int) -> LedgerRow:
    return replace(row, beside_bytes=row.beside_bytes + size, capacity_bytes=row.capacity_bytes + size)
