"""A model with a draft, or with its own head, in several situations: the ledger's figures beside llama-server's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from bench.oracle_cases import Case
from bench.outline_cases import Figure
from llamafleet.memory.context import Context
from llamafleet.memory.flash_attention import takes_cache_on
from llamafleet.memory.ledger import Usage, usage
from llamafleet.memory.placement import Placement
from llamafleet.memory.speculation import NGRAM, TYPES, Speculation
from llamafleet.memory.weights import Model
from llamafleet.model.gguf import read_path
from llamafleet.units import MIB
from sandbox.oracle import Breakdown, ask


@dataclass(frozen=True)
class Guessing:
    """A target with its layers on devices, and what guesses for it."""

    target: Path
    kind: str  # a value of the setting `speculation`
    context: Context  # as without speculation
    counts: tuple[int, ...]  # the target's layers on each device
    draft: Path | None = None
    draft_on: int | None = 0  # the device; None: the host
    most: int = 3

    def figures(self) -> Iterator[Figure]:
        """Weights and caches in whole MiB, compute buffers to the hundredth, of the target, then of draft or head."""
        speculation = Speculation(self.kind, self.most, 0)
        target = Model.of(read_path(self.target), head=self.kind == "mtp")
        draft = Model.of(read_path(self.draft)) if self.draft else None
        served = speculation.served(target.shape, self.context, draft.header if draft else None)
        case = Case(self.target.stem, "", self.context, self.counts)
        flags = [*case.flags(target.is_moe), *self._flags(target, draft)]
        theirs = ask(self.target, flags, len(self.counts), beside=self.kind != NGRAM)
        own, placement = replace(served, head=False), case.placement(target.layers)
        alone = usage(target, own, placement, "cpu")
        yield from _compared(self.target.stem, theirs, *alone)
        if theirs.beside is None:
            return
        if draft:
            place = Placement.of((None if self.draft_on is None else 0,) * (draft.layers + 1))
            on_devices, on_host = usage(draft, speculation.of_draft(served, self._kv_type(draft)), place, "cpu")
            yield from _compared(draft.shape.name, theirs.beside, on_devices, on_host)
        else:
            both, both_host = usage(target, served, placement, "cpu")
            heads = {device: _less(both[device], used) for device, used in alone[0].items()}
            yield from _compared("head", theirs.beside, heads, _less(both_host, alone[1]))

    def _flags(self, target: Model, draft: Model | None) -> list[str]:
        lengths = "--spec-ngram-mod-n-max" if self.kind == NGRAM else "--spec-draft-n-max"
        flags = ["--spec-type", TYPES[self.kind], lengths, str(self.most)]
        kv_type = self._kv_type(draft)
        flags += ["-ctkd", kv_type, "-ctvd", kv_type]
        if draft:
            on_host = self.draft_on is None
            flags += ["-md", str(self.draft), "--spec-draft-device", "none" if on_host else f"RPC{self.draft_on}"]
            flags += ["--spec-draft-ngl", "0" if on_host else str(draft.layers + 1)]
        return flags

    def _kv_type(self, draft: Model | None) -> str:
        """The type of the draft's cache: f16 where its heads do not divide into blocks of the model's type."""
        takes = draft is None or takes_cache_on(draft.shape, self.context.kv_type, "cpu")
        return self.context.kv_type if takes else "f16"


def _less(both: Usage, alone: Usage) -> Usage:
    """What a head adds: the weights are the target's as before."""
    return replace(
        both, kv_bytes=both.kv_bytes - alone.kv_bytes, compute_bytes=both.compute_bytes - alone.compute_bytes
    )


def _compared(name: str, theirs: Breakdown, devices: dict[int, Usage], host: Usage) -> Iterator[Figure]:
    for row, ours in [*zip(theirs.devices, devices.values(), strict=True), (theirs.host, host)]:
        repacked, buffer = (ours.repacked_bytes, "CPU") if row is theirs.host else (0, row.name)
        place = f"{name} on {row.name}"
        yield place, "weights", (ours.weights_bytes - repacked) // MIB, row.model
        yield place, "cache", ours.kv_bytes // MIB, row.context
        yield place, "compute", ours.compute_bytes / MIB, theirs.buffers.get(buffer, 0.0)
