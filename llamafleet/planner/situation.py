"""One instance, and everything that its plan depends on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llamafleet.host.backends import TRAITS
from llamafleet.host.machine import Gpu, Machine
from llamafleet.host.speeds import Measurements, rates
from llamafleet.memory.adapters import merged
from llamafleet.memory.beside import Beside, apart, reduced, taken, with_besides
from llamafleet.memory.capacity import Capacity
from llamafleet.memory.checkpoints import checkpoint_bytes
from llamafleet.memory.context import Context
from llamafleet.memory.flash_attention import is_used
from llamafleet.memory.ledger import Correction, LedgerRow, repacks
from llamafleet.memory.placement import HOST, Placement
from llamafleet.memory.weights import Model
from llamafleet.model.gguf import Header
from llamafleet.planner import processors, speculation, vectors
from llamafleet.planner.at_gate import host_cost
from llamafleet.planner.backend import environment
from llamafleet.planner.beside import Weighted
from llamafleet.planner.flags import device_names, planned_flags
from llamafleet.planner.refine import Refined
from llamafleet.planner.result import BESIDE, Plan
from llamafleet.planner.roofline import Prediction, Roofline
from llamafleet.planner.search import Candidate, Search, contexts
from llamafleet.settings.companions import DRAFT
from llamafleet.settings.schema import Instance
from llamafleet.settings.workload import Workload
from llamafleet.units import MIB

MOST_CHECKPOINTS = 32  # of a slot: llama.cpp's own limit (common/common.h, n_ctx_checkpoints)


@dataclass(frozen=True)
class Situation:
    """One instance on one host, with the capacity that is left for it."""

    machine: Machine
    backend: str
    capacity: Capacity
    instance: Instance
    model: Model
    context_tokens: int
    correction: Correction
    measured: Measurements  # that the plan is chosen with
    known: Measurements  # that its speed is predicted with
    alone: bool  # no other model is served by this host
    earlier: tuple[Plan, ...] = ()  # of models that were planned before, and took their memory
    besides: tuple[Beside, ...] = ()  # what is loaded beside the model; the capacity is what it leaves
    whole: Capacity | None = None  # with what is beside the model; None: the same
    contexts: tuple[Weighted, ...] = ()  # that the besides are for; empty: all
    served: Callable[[Context], Context] = field(default=lambda context: context, compare=False)
    bare: Model | None = None  # the model without its adapters, where it has some

    def with_adapters(self, headers: Mapping[int, Header]) -> Situation:
        """The case with these adapters, by their numbers, among the model's tensors."""
        if not headers:
            return self
        head = speculation.uses_head(self.instance)
        return replace(self, model=Model.of(merged(self.model.header, headers), head=head), bare=self.model)

    def with_besides(self, besides: tuple[Beside, ...], contexts: Sequence[Weighted]) -> Situation:
        """The case with this beside the model, for contexts that it takes the same memory with."""
        capacity = reduced(self.capacity, besides)
        return replace(self, besides=besides, whole=self.capacity, capacity=capacity, contexts=tuple(contexts))

    def weighted_contexts(self, besides: Sequence[Beside]) -> Sequence[Weighted]:
        """Every context worth a try with its handicap, the preferred first."""
        shape = self.model.shape
        pooling = vectors.pooling_of(self.instance, shape)
        every = contexts(
            self.instance, self.context_tokens, self.work, flash_attention=is_used(shape, self.backend),
            trained=shape.context_tokens, pooling=pooling,
            least_ubatch=max((one.least_ubatch for one in besides), default=0),
            whole_inputs=vectors.needs_whole_inputs(shape, pooling),
        )  # fmt: skip
        return [(self.served(context), handicap) for context, handicap in every]

    def where_needed(self, candidates: list[Candidate]) -> list[Candidate]:
        """The candidates with the output matrix where companions read it; all of them where none has it there."""
        needed = {one.output_on for one in self.besides} - {None}
        near = [one for one in candidates if needed <= {self._output_on(one)}]
        return near or candidates

    def _output_on(self, candidate: Candidate) -> str:
        device = candidate.placement.layer_devices[-1]
        return HOST if device is None else f"GPU{self.capacity.gpus[candidate.order[device]].index}"

    def checkpoint(self, context: Context) -> int:
        """Bytes of a context checkpoint, with what companions add to it; 0 where llama-server makes none."""
        own = checkpoint_bytes(self.model.shape, context)
        return own + sum(one.checkpoint_bytes for one in self.besides) if own else 0

    @property
    def handicap(self) -> float:
        """Factor on the seconds for what the prediction does not have of the companions."""
        return math.prod(one.handicap for one in self.besides)

    def ledger(self, refined: Refined) -> tuple[LedgerRow, ...]:
        """The model's rows and what is beside it."""
        rows = refined.ledger()
        if self.bare:
            rows = apart(rows, replace(refined.case, model=self.bare).rows(refined.candidate.placement))
        return self.with_rows(rows)

    def with_rows(self, rows: Sequence[LedgerRow]) -> tuple[LedgerRow, ...]:
        """The rows of the model alone, with what is beside it."""
        return with_besides(rows, self.besides, self.whole or self.capacity, TRAITS[self.backend].overhead_bytes)

    def gpus_of(self, order: Sequence[int]) -> tuple[Gpu, ...]:
        """The model's GPUs, and those that only its companions use."""
        own = tuple(self.capacity.gpus[device] for device in order)
        others, _ = taken(self.besides)
        return (*own, *(gpu for gpu in self.capacity.gpus if others.get(gpu.index) and gpu not in own))

    @property
    def work(self) -> Workload:
        """The typical requests."""
        return Workload.of(self.instance, self.context_tokens)

    @property
    def threads(self) -> int:
        """Threads of the processor's part."""
        return processors.threads(self.machine.cpu, self.instance)

    @property
    def op_offload(self) -> bool:
        """Does a GPU compute large batches with the host's weights?"""
        return TRAITS[self.backend].op_offload and self.instance.op_offload

    def checkpoints(self, context: Context) -> int:
        """Context checkpoints of each slot: as many as fit into `context_checkpoints_mib` for all slots together."""
        if context.pooling:
            return 0
        each = self.checkpoint(context) * context.slots
        return min(MOST_CHECKPOINTS, self.instance.context_checkpoints_mib * MIB // each) if each else MOST_CHECKPOINTS

    def checkpoints_bytes(self, contexts: Sequence[Context]) -> int:
        """RAM of all slots' checkpoints together, the largest of these contexts; 0 if the model makes none."""
        different = {(context.kv_type, context.slots): context for context in contexts}.values()
        return max(self.checkpoints(each) * each.slots * self.checkpoint(each) for each in different)

    def roofline(self, work: Workload, measured: Measurements, *, by_type: bool = False) -> Roofline:
        """The speed of this model with these measurements. `by_type`: with what its types of weights cost a processor,
        which choosing a plan leaves out."""
        machine_rates = rates(self.machine.cpu, self.capacity.gpus, self.threads, measured)
        if by_type:
            cost = host_cost(self.model, machine_rates)
            machine_rates = replace(machine_rates, host_flops=machine_rates.host_flops / cost)
        return Roofline(self.model, work, machine_rates, op_offload=self.op_offload)

    def predicted(self, candidate: Candidate, swap_bytes: int) -> Prediction:
        """The speed by all that is known of the host; none for a plan that swaps, since no disk was measured."""
        if swap_bytes:
            return Prediction(0.0, 0.0, swap_bytes=swap_bytes)
        roofline = self.roofline(self.work, self.known, by_type=True)
        return roofline.predict(candidate.order, candidate.segments, candidate.context)

    def search(self, contexts: Sequence[Context]) -> Search:
        """The search for a placement with these contexts."""
        roofline = self.roofline(self.work, self.measured)
        extra = self.instance.prompt_cache_mib * MIB + self.checkpoints_bytes(contexts)
        return Search(self.model, self.capacity, self.backend, extra, self.correction, roofline)

    def _names(self, gpus: Sequence[Gpu]) -> dict[str, str]:
        """llama.cpp's names of the GPUs in use, by the ledger's."""
        return {f"GPU{gpu.index}": name for gpu, name in zip(gpus, device_names(self.backend, len(gpus)), strict=True)}

    def plan(
        self, context: Context, placement: Placement, order: Sequence[int], rows: tuple[LedgerRow, ...],
        reasons: Iterable[str], *, tensors: bool = False, **others: Any,
    ) -> Plan:  # fmt: skip
        """The plan with this context and placement on the GPUs of this order. `rows`: its ledger, with what is beside
        the model; `tensors`: each GPU computes a part of every layer; `others`: further fields of the plan."""
        gpus, cpu, model, one = self.gpus_of(order), self.machine.cpu, self.model, self.instance
        if not context.repack and not self._repacks(placement):
            context = replace(context, repack=True)
        argv = planned_flags(
            context, placement, backend=self.backend, gpus=len(order), load_mode=one.load_mode,
            threads=(self.threads, one.threads_batch or self.threads), prompt_cache_mib=one.prompt_cache_mib,
            checkpoints=self.checkpoints(context), is_moe=model.is_moe, tensors=tensors,
        )  # fmt: skip
        mapped = 0 if self.capacity.unified else model.mapped_bytes
        return Plan(
            instance=one.name, backend=self.backend, argv=(*argv, *self.beside_flags(gpus)), gpus=gpus,
            context_tokens=context.tokens, slots=context.slots, kv_type=context.kv_type, pooling=context.pooling,
            vector_elements=model.shape.embedding_out if context.pooling else 0, ubatch_tokens=context.ubatch_tokens,
            threads=self.threads, prompt_cache_mib=one.prompt_cache_mib, checkpoints=self.checkpoints(context),
            placement=placement, is_moe=model.is_moe, mapped_bytes=mapped, ledger=rows,
            why=(*reasons, *(beside.why for beside in self.besides if beside.why)),
            # With room for the pages of mapped tensors, which count as the service's.
            host_bytes=sum(row.used_bytes for row in (rows if self.capacity.unified else rows[-1:])) + mapped,
            environment=environment(self.backend, gpus, self.machine),
            cpus=processors.cpus(cpu, one, placement, alone=self.alone),
            numa_nodes=processors.numa_nodes(cpu, one, placement), **others,
        )  # fmt: skip

    def _repacks(self, placement: Placement) -> bool:
        """Does `repack` change anything? A draft is loaded in the same way as the model."""
        drafts = any(one.part == DRAFT for one in self.besides)
        return drafts or repacks(self.model, placement, self.backend, self.capacity.repacked)

    def beside_flags(self, gpus: Sequence[Gpu]) -> Iterator[str]:
        """The flags of what is beside the model, with llama.cpp's names of the GPUs."""
        names = self._names(gpus)
        for one in self.besides:
            yield from (flag.format(**names) for flag in one.flags)

    def reported(self, gpus: Sequence[Gpu]) -> dict[str, tuple[str, int]]:
        """What llama-server reports of what is beside the model, by its own names: the ledger's device, and bytes."""
        names = self._names(gpus)
        whole = {one.part: one.reported for one in self.besides if one.reported}
        rows = {BESIDE + names.get(device, "Host"): (device, size)
                for one in self.besides for device, size in one.reported_rows.items()}  # fmt: skip
        return {**whole, **rows}


@dataclass(frozen=True)
class Timed:
    """A plan with the seconds that it was chosen by."""

    seconds: float
    plan: Plan
