"""Memory of speculation: what a draft takes, and what it adds to the model that it guesses for.

The rules are llama.cpp's at b11434: common/speculative.cpp (common_base_params_to_speculative,
common_speculative_init_result), tools/server/server-context.cpp (load_model) and src/llama-context.cpp
(output_reserve). A draft has as many tokens and slots as the model, and the same ubatch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from llamafleet.memory.checkpoints import checkpoint_bytes
from llamafleet.memory.context import Context
from llamafleet.memory.ledger import FLOAT_BYTES, Usage, usage
from llamafleet.memory.placement import Placement
from llamafleet.memory.weights import X86_TYPES, Model
from llamafleet.model import speculation as kinds
from llamafleet.model.gguf import Header
from llamafleet.model.shape import Shape
from llamafleet.units import MIB

NGRAM = "ngram"
NGRAM_BYTES = 16 * MIB  # a table of 4 Mi tokens (common_speculative_impl_ngram_mod)
TYPES = {
    NGRAM: "ngram-mod", kinds.MTP: "draft-mtp", kinds.DRAFT: "draft-simple", kinds.EAGLE3: "draft-eagle3",
    kinds.DFLASH: "draft-dflash", kinds.DSPARK: "draft-dspark",
}  # fmt: skip
# llama.cpp's defaults (common/common.h, common_params_speculative_ngram_mod, common_params_speculative_draft).
LENGTHS = {NGRAM: (64, 48)}
OTHER_LENGTHS = (3, 0)
F32 = 4
# Logits of a draft that a backend samples: raw, sampled, likelihoods, numbers (output_reserve, has_sampling).
SAMPLED = 4
# Copies of the rows that are read from the model, at most: collected, in a batch, kept to take guesses back.
COPIES = 3
SAMPLERS_ON_CPU = (NGRAM, kinds.DRAFT)


@dataclass(frozen=True)
class Speculation:
    """How tokens are guessed: the kind (a value of the setting), and how many at most and at least."""

    kind: str
    most: int
    least: int

    @classmethod
    def of(cls, kind: str, most: int | None, least: int | None) -> Speculation | None:
        """None for "none". Without a number it is llama.cpp's own."""
        if kind not in TYPES:
            return None
        usual = LENGTHS.get(kind, OTHER_LENGTHS)
        most = usual[0] if most is None else most
        return cls(kind, most, min(usual[1], most) if least is None else least)

    def served(self, shape: Shape, context: Context, draft: Header | None) -> Context:
        """The context that the model is served with: logits for guesses, states to go back to, hidden states kept."""
        reads = self.kind in (kinds.MTP, *kinds.READERS)
        keeps = reads and shape.architecture.name in kinds.WITH_ROLLBACK
        kept = len(kinds.target_layers(draft)) if draft and self.kind in kinds.READERS else 0
        return replace(
            context,
            drafted=self.most,
            rollback=self.most if keeps else 0,
            head=self.kind == kinds.MTP,
            kept=2 if self.kind == kinds.MTP else kept,
        )

    def of_draft(self, context: Context, kv_type: str) -> Context:
        """The draft's own context."""
        blocks = self.kind in (kinds.DFLASH, kinds.DSPARK)  # all guesses at once
        return replace(context, kv_type=kv_type, drafted=self.most if blocks else 0, rollback=0, head=False, kept=0)

    def rows_bytes(self, shape: Shape, context: Context, draft: Shape | None) -> int:
        """RAM of the rows that go from the model to its head or draft, and of what the draft's logits are sampled in,
        at most."""
        own = self.of_draft(context, context.kv_type)
        logits = 0 if self.kind == NGRAM else (draft or shape).vocabulary * own.outputs * FLOAT_BYTES
        if self.kind not in SAMPLERS_ON_CPU:
            logits *= SAMPLED
        rows = COPIES * context.kept * shape.embedding * context.batch * F32
        return logits + rows + (NGRAM_BYTES if self.kind == NGRAM else 0)

    def checkpoints_bytes(self, shape: Shape, context: Context) -> int:
        """RAM of the copies that slots keep while guesses are checked, where a state cannot be taken back
        (COMMON_CONTEXT_SEQ_RM_TYPE_FULL)."""
        if context.rollback or not any(shape.state.layers):
            return 0
        return checkpoint_bytes(shape, context) * context.slots


@dataclass(frozen=True)
class Draft:
    """What a draft model takes on one device and on the host."""

    gpu_bytes: int
    host_bytes: int
    gpu_reported: int  # of them what llama-server reports before it loads
    host_reported: int

    @classmethod
    def of(
        cls, model: Model, context: Context, backend: str, repacked: Mapping[str, int] = X86_TYPES, *, on_gpu: bool
    ) -> Draft:
        """The draft whole on one GPU, or whole on the host. `context`: its own (`Speculation.of_draft`)."""
        placement = Placement.of((0 if on_gpu else None,) * (model.layers + 1))
        reads = bool(kinds.target_layers(model.header))  # those are sampled by their backend, with further buffers
        first, later = (
            usage(model, replace(context, sampled=sampled), placement, backend, 0, repacked)
            for sampled in (False, reads)
        )
        hidden = encoder_bytes(model, context)
        gpu_told, gpu = (_held(devices[0]) if on_gpu else 0 for devices, _ in (first, later))
        more = max(0, hidden - later[0][0].compute_bytes) if on_gpu else 0
        return cls(gpu + more, _held(later[1]) + hidden, gpu_told, _held(first[1]))


def _held(used: Usage) -> int:
    """What llama-server itself counts: without overhead."""
    return used.weights_bytes + used.kv_bytes + used.compute_bytes + used.staging_bytes


def encoder_bytes(model: Model, context: Context) -> int:
    """Bytes of the buffer in which hidden states of the target become the draft's, at most: the rows as they come, and
    projected (src/models/eagle3.cpp, src/models/dflash.cpp)."""
    layers = kinds.target_layers(model.header)
    width = model.header.get("target_hidden_size") or model.shape.embedding
    wide = len(layers) * width if isinstance(width, int) else 0
    return 2 * (wide + model.shape.embedding) * context.batch_tokens * F32 if layers else 0
