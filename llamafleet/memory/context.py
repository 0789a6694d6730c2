"""The context asked for: tokens, slots, cache type and ubatch, as llama-server pads them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from llamafleet.model.shape import Shape

PAD_CELLS = 256  # llama-context.cpp and llama-kv-cache-iswa.cpp pad contexts to this


@dataclass(frozen=True)
class Context:
    """The context asked for: tokens of one slot, slots, cache type, tokens computed together."""

    tokens: int
    slots: int
    kv_type: str
    ubatch_tokens: int
    flash_attention: bool = True
    unified: bool = False  # one cache of tokens x slots that the slots share, instead of one for each

    @property
    def cells(self) -> int:
        """KV cells of one slot, padded."""
        return _padded(self.tokens)

    @property
    def stream_cells(self) -> int:
        """KV cells of one cache: a slot's, or, unified, all slots' together."""
        return self.cells * (self.slots if self.unified else 1)

    @property
    def streams(self) -> int:
        """Caches side by side."""
        return 1 if self.unified else self.slots

    @property
    def ubatch(self) -> int:
        """Tokens computed together; never more than there are cells (llama-context.cpp:226)."""
        return min(self.ubatch_tokens, self.cells * self.slots)

    @property
    def batch_tokens(self) -> int:
        """Tokens of the graph that memory is reserved for: the same number for each slot (graph_reserve)."""
        return -(-self.ubatch // self.slots) * self.slots

    @property
    def outputs(self) -> int:
        """Tokens whose logits are computed: llama-server asks for one of each slot."""
        return min(self.ubatch, self.slots)


def cache_cells(context: Context, window: int) -> int:
    """Cells of a layer's cache in one stream (llama-kv-cache-iswa.cpp:71)."""
    if not window:
        return context.stream_cells
    reach = window * (context.slots if context.unified else 1) + context.ubatch
    return _padded(min(context.stream_cells, reach))


def _padded(cells: int) -> int:
    return -(-cells // PAD_CELLS) * PAD_CELLS


def as_served(shape: Shape, context: Context) -> Context:
    """The context that llama-server makes of the one that is asked for."""
    return replace(context, flash_attention=False) if not shape.architecture.flash_attention else context
