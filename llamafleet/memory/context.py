"""The requested context (tokens, slots, cache types, ubatch) and the cells that llama-server makes of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from llamafleet.model.shape import Shape

DEFAULT_BATCH_TOKENS = 2048  # llama.cpp's --batch-size; never below the ubatch
PAD_CELLS = 256  # src/llama-context.cpp and src/llama-kv-cache-iswa.cpp pad contexts to this
UNQUANTISED = ("f32", "f16", "bf16")


def types_of(kv_type: str) -> tuple[str, str]:
    """The types of K and of V that a cache type names: "q8_0" is both, "q8_0/f16" is K/V."""
    key, _, value = kv_type.partition("/")
    return key, value or key


def is_quantised(kv_type: str) -> bool:
    """Whether K, V or both are quantised."""
    return not set(types_of(kv_type)) <= set(UNQUANTISED)


@dataclass(frozen=True)
class Context:
    """The requested context: tokens of one slot, number of slots, cache type ("q8_0", or K/V as "q8_0/f16"), tokens of
    a ubatch."""

    tokens: int
    slots: int
    kv_type: str
    ubatch_tokens: int
    flash_attention: bool = True
    unified: bool = False  # all slots share one cache (--kv-unified)
    pool_tokens: int = 0  # of the cache that all slots share; 0: tokens x slots
    drafted: int = 0  # guessed tokens of a slot that are checked together, each with logits of its own
    rollback: int = 0  # further copies of each recurrent state, to take guesses back (n_rs_seq)
    head: bool = False  # the model's own draft head has a context, too: the same cells, slots and cache type
    kept: int = 0  # hidden states of all tokens that a draft reads
    sampled: bool = False  # a draft's backend picks its tokens
    batch_size: int = 0  # tokens that a server hands over together; 0: llama.cpp's own number
    op_offload: bool = True  # a device computes large batches with the host's weights, where its backend can
    repack: bool = True  # the CPU has weights in its own order, of those types that it has one for
    pooling: str = ""  # of a server of embeddings or scores (--pooling); "": the server writes text

    @property
    def key_type(self) -> str:
        """The type of K."""
        return types_of(self.kv_type)[0]

    @property
    def value_type(self) -> str:
        """The type of V."""
        return types_of(self.kv_type)[1]

    @property
    def cells(self) -> int:
        """KV cells of one slot: its tokens, padded."""
        return _padded(self.tokens)

    @property
    def stream_cells(self) -> int:
        """KV cells of one stream: of one slot or, with a unified cache, of all slots."""
        if not self.unified:
            return self.cells
        return _padded(self.pool_tokens) if self.pool_tokens else self.cells * self.slots

    @property
    def streams(self) -> int:
        """Separate caches: one for each slot, or one unified cache (n_stream)."""
        return 1 if self.unified else self.slots

    @property
    def ubatch(self) -> int:
        """Tokens computed together, at most the number of cells (src/llama-context.cpp,
        llama_context::llama_context)."""
        return min(self.ubatch_tokens, self.stream_cells * self.streams)

    @property
    def batch(self) -> int:
        """Tokens that a server hands over together (--batch-size), at most the number of cells."""
        return min(self._batch_size, self.stream_cells * self.streams)

    @property
    def handed_over(self) -> int:
        """Value of --batch-size: an embedding's or score's ubatch, since an input is computed at once."""
        return self.ubatch_tokens if self.pooling else self._batch_size

    @property
    def _batch_size(self) -> int:
        return max(self.batch_size or DEFAULT_BATCH_TOKENS, self.ubatch_tokens)

    @property
    def batch_tokens(self) -> int:
        """Tokens of the graph that memory is reserved for, an equal number for each slot (graph_reserve)."""
        return -(-self.ubatch // self.slots) * self.slots

    @property
    def outputs(self) -> int:
        """Tokens with a result: every token's for embeddings and scores; else one for each slot and for each token that
        is guessed for it (tools/server/server-context.cpp, server_output_limits)."""
        return self.ubatch if self.pooling else min(self.ubatch, self.slots * (1 + self.drafted))

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
