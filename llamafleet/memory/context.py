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
    pooling: str = ""  # of a server of embeddings or scores (--pooling); "": the server writes text

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
        """Tokens with a result: llama-server requests one for each slot, and every token's for embeddings and scores
        (tools/server/server-context.cpp, server_output_limits)."""
        return self.ubatch if self.pooling else min(self.ubatch, self.slots)

    def pooled(self, pooling: str) -> Context:
        """This context for embeddings or scores of that pooling ("": for text). Its ubatch is a multiple of the slots:
        llama.cpp reserves as many tokens for each of them, and the mean is over as many (build_inp_mean)."""
        ubatch = -(-self.ubatch_tokens // self.slots) * self.slots if pooling else self.ubatch_tokens
        return replace(self, pooling=pooling, ubatch_tokens=ubatch)

    @property
    def takes_whole_inputs(self) -> bool:
        """Does a ubatch hold the longest input of a server of embeddings or scores?"""
        return bool(self.pooling) and self.ubatch_tokens >= self.tokens


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
