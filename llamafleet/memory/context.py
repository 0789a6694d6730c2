"""The requested context (tokens, slots, cache type, ubatch) and the cells that llama-server makes of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from llamafleet.model.shape import Shape

PAD_CELLS = 256  # src/llama-context.cpp and src/llama-kv-cache-iswa.cpp pad contexts to this


@dataclass(frozen=True)
class Context:
    """The requested context: tokens of one slot, number of slots, cache type, tokens of a ubatch."""

    tokens: int
    slots: int
    kv_type: str
    ubatch_tokens: int
    flash_attention: bool = True
    unified: bool = False  # all slots share one cache of tokens x slots cells (--kv-unified)
    drafted: int = 0  # guessed tokens of a slot that are checked together, each with logits of its own
    rollback: int = 0  # further copies of each recurrent state, to take guesses back (n_rs_seq)
    head: bool = False  # the model's own draft head has a context, too: the same cells, slots and cache type

    @property
    def cells(self) -> int:
        """KV cells of one slot: its tokens, padded."""
        return _padded(self.tokens)

    @property
    def stream_cells(self) -> int:
        """KV cells of one stream: of one slot or, with a unified cache, of all slots."""
        return self.cells * (self.slots if self.unified else 1)

    @property
    def streams(self) -> int:
        """Separate caches: one for each slot, or one unified cache (n_stream)."""
        return 1 if self.unified else self.slots

    @property
    def ubatch(self) -> int:
        """Tokens computed together, at most the number of cells (src/llama-context.cpp,
        llama_context::llama_context)."""
        return min(self.ubatch_tokens, self.cells * self.slots)

    @property
    def batch_tokens(self) -> int:
        """Tokens of the graph that memory is reserved for, an equal number for each slot (graph_reserve)."""
        return -(-self.ubatch // self.slots) * self.slots

    @property
    def outputs(self) -> int:
        """Tokens whose logits are computed: one for each slot and for each token that is guessed for it
        (common/speculative.cpp, common_speculative_get_output_limits)."""
        return min(self.ubatch, self.slots * (1 + self.drafted))


def cache_cells(context: Context, window: int) -> int:
    """Cells of a layer's cache in one stream. `window`: in tokens, 0 for none (src/llama-kv-cache-iswa.cpp,
    size_swa)."""
    if not window:
        return context.stream_cells
    reach = window * (context.slots if context.unified else 1) + context.ubatch
    return _padded(min(context.stream_cells, reach))


def _padded(cells: int) -> int:
    return -(-cells // PAD_CELLS) * PAD_CELLS


def as_served(shape: Shape, context: Context) -> Context:
    """The context that llama-server uses: without flash attention where the architecture cannot use it."""
    return replace(context, flash_attention=False) if not shape.architecture.flash_attention else context
