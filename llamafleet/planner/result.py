"""The result of planning, a plan or a refusal, and the JSON (the plan contract) of each.

`planner.plan` makes these values; code that shows, compares, records or applies a plan needs only this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llamafleet.host.learned import Expected
from llamafleet.host.machine import Gpu
from llamafleet.memory.demand import Demand
from llamafleet.memory.ledger import LedgerRow
from llamafleet.memory.placement import HOST, Placement
from llamafleet.planner.roofline import Prediction

SCHEMA = 1
BESIDE = "beside "  # what names of memory begin with that llama-server reports of a draft, or of a head
NO_PREDICTION = Prediction(0.0, 0.0)


@dataclass(frozen=True)
class Refusal:
    """Why a model is not served: the reason, the device, bytes needed and available there, and suggestions."""

    reason: str
    device: str = HOST
    needed_bytes: int = 0
    available_bytes: int = 0
    suggestions: tuple[str, ...] = ()
    ledger: tuple[LedgerRow, ...] = ()
    why: tuple[str, ...] = ()
    instance: str = ""
    problems: tuple[str, ...] = ()  # what is wrong with the host, as its probe found, each with the way out

    fits = False

    def to_json(self) -> dict[str, Any]:
        """The plan contract, schema 1, with `refusal` set."""
        refusal = {
            "reason": self.reason,
            "device": self.device,
            "needed_bytes": self.needed_bytes,
            "available_bytes": self.available_bytes,
            "suggestions": list(self.suggestions),
        }
        return _contract(self, refusal)


@dataclass(frozen=True)
class Plan:
    """How one instance is served on one host."""

    instance: str
    backend: str
    argv: tuple[str, ...]  # the planned part of the command line: context and placement, no path, address or name
    gpus: tuple[Gpu, ...]  # the GPUs in use; llama.cpp's device N is the N-th of them
    context_tokens: int  # of one slot
    slots: int
    kv_type: str
    ubatch_tokens: int
    threads: int
    prompt_cache_mib: int
    checkpoints: int  # of one slot's context, at most
    placement: Placement  # device numbers are positions in `gpus`
    is_moe: bool
    mapped_bytes: int  # weights that are page cache, not RAM: they are in no row of the ledger
    ledger: tuple[LedgerRow, ...]
    predicted: Prediction  # by all that is known of the host's rates now
    why: tuple[str, ...]
    host_bytes: int  # RAM that the process needs, for MemoryMax
    environment: Mapping[str, str] = field(default_factory=dict)
    cpus: str = ""  # CPUs that the server may run on, such as "0-11"; empty: all
    numa_nodes: str = ""  # NUMA nodes that its memory is spread over, such as "0-1"; empty: the kernel decides
    # By the rates that the plan was chosen with, which plan.json keeps: they stay while the plan does.
    chosen_for: Prediction = NO_PREDICTION
    at_gate: Expected | None = None
    at_work: Expected | None = None  # as a tune measures it
    pooling: str = ""  # of a server of embeddings or scores; "": the server writes text
    vector_elements: int = 0  # of an embedding
    problems: tuple[str, ...] = ()  # what is wrong with the host, as its probe found, each with the way out
    demand: Demand | None = None  # of a model that starts on demand: what it shares with the others of its kind
    # What llama-server reports of what is beside the model, by its part: the ledger's device, and bytes.
    reported_beside: Mapping[str, tuple[str, int]] = field(default_factory=dict)

    fits = True

    @property
    def gpu_bytes(self) -> tuple[tuple[Gpu, int], ...]:
        """Each GPU in use with the bytes planned for it."""
        return tuple(zip(self.gpus, (row.used_bytes for row in self.ledger[:-1]), strict=True))

    def to_json(self) -> dict[str, Any]:
        """The plan contract, schema 1, with `refusal` null."""
        return _contract(self, None)


def _contract(result: Plan | Refusal, refusal: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "fits": result.fits,
        "argv": list(result.argv) if isinstance(result, Plan) else [],
        "ledger": [row.to_json() for row in result.ledger],
        "predicted": (result.predicted if isinstance(result, Plan) else NO_PREDICTION).to_json(),
        "why": list(result.why),
        "refusal": refusal,
        "problems": list(result.problems),
    }
