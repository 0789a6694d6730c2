"""The graph that llama.cpp computes for a full batch of prompt tokens, from a header and a context.

Built operation by operation as src/llama-graph.cpp and src/models/*.cpp do at b11434, because the order and
the shapes decide what the allocator can reuse. Which operations a layer has is read off its tensors, so
most architectures need no code of their own; what only the source says is in the tables below.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from llamafleet.memory.context import Context, cache_cells
from llamafleet.memory.graph import ggml
from llamafleet.memory.graph.ggml import (
    F16,
    F32,
    I32,
    I64,
    Graph,
    Tensor,
    mul_mat,
    new,
    permute,
    reshape,
    rotated,
    same,
    view,
)
from llamafleet.memory.graph.layers import ROTATIONS, Layers
from llamafleet.model.shape import Shape

T = TypeVar("T")

ROTATED = 64  # elements of a head that a rotation takes at least

Homes = Callable[[str, int | None], int]  # a tensor's name and layer: the backend that holds it


class GraphUnknownError(LookupError):
    """What an architecture computes is not known here."""


class Builder:
    """Builds one graph; what all layers share."""

    def __init__(self, shape: Shape, layers: Layers, context: Context, homes: Homes, scratch: bool) -> None:
        self.shape, self.layers, self.context, self.homes, self.scratch = shape, layers, context, homes, scratch
        self.graph = Graph()
        self.embd = shape.embedding
        self.tokens = context.batch_tokens
        self.streams = 1 if context.unified else context.slots
        self.windows = shape.windows
        self.has_windows = any(self.windows)
        self.token_ids: Tensor | None = None
        self.chosen: Tensor | None = None  # cells that an indexer picked, for its layer and those behind it
        self.images: Tensor | None = None
        self.layer = -1
        self._made: dict[Hashable, Any] = {}

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What all layers share under this key: made when the first layer asks for it."""
        if key not in self._made:
            self._made[key] = make()
        made: T = self._made[key]
        return made

    # Leafs

    def weight(self, part: str, layer: int | None = None) -> Tensor | None:
        """The tensor of the model, or None if it has none of that name."""
        layer = self.layer if layer is None else layer
        found = self.layers[layer].get(part)
        if found is None:
            return None
        ne = [*found.shape, 1, 1, 1][:4]
        return ggml.weight(found.type, ne, self.homes(part, layer if layer >= 0 else None))

    def need(self, part: str) -> Tensor:
        """A tensor that the layer must have."""
        found = self.weight(part)
        if found is None:
            raise GraphUnknownError(f"{self.shape.architecture.name} without blk.{self.layer}.{part}")
        return found

    def position_factors(self) -> tuple[Tensor, ...]:
        """Factors of the positions, where the model has them: one for all layers of a device (TENSOR_DUPLICATED).

        Staged for the first layer of the host, their copy stays to the last, and parts what is free there.
        """
        outside = self.layers[-1]
        part = next((part for part in ROTATIONS if part in outside), None)
        row = self.shape.architecture
        if part is None or (row.rope_factors_only_without_window and self.windows[self.layer]):
            return ()
        home = self.homes(part, self.layer)
        tensor = outside[part]
        return (self.once(("factors", home), lambda: ggml.weight(tensor.type, [*tensor.shape, 1, 1, 1][:4], home)),)

    def linear(self, part: str, cur: Tensor) -> Tensor:
        """A matrix, its scale and its bias, where there are."""
        cur = mul_mat(self.need(f"{part}.weight"), cur)
        for suffix, op in (("scale", "mul"), ("bias", "add")):
            if extra := self.weight(f"{part}.{suffix}"):
                cur = same(op, cur, extra)
        return cur

    def norm(self, cur: Tensor, part: str) -> Tensor:
        """Normalise by the layer's tensors of that name."""
        scale, bias = self.weight(f"{part}.weight"), self.weight(f"{part}.bias")
        if scale is None:
            return cur
        row = self.shape.architecture
        centred = row.layer_norm or (bias is not None and not row.rms_norm_with_bias)
        cur = same("norm" if centred else "rms_norm", cur)
        cur = same("mul", cur, scale)
        return same("add", cur, bias) if bias else cur

    def gated(self, gate: Tensor, up: Tensor, is_clamped: bool) -> Tensor:
        """Gate and up together: one operation, or several where both are held below a limit."""
        if not is_clamped:
            return same("glu", gate, up)
        return same("mul", same("clamp", same("unary", gate)), same("clamp", up))

    # Inputs

    def embeddings(self) -> Tensor:
        """build_inp_embd: from tokens, from vectors, or from both mixed; all three are laid out."""
        table = self.weight("token_embd.weight", -1)
        if table is None:
            raise GraphUnknownError(f"{self.shape.architecture.name} without token_embd.weight")
        width = self.embd * (1 + self.shape.image_layers)
        ids, vectors = ggml.graph_input(I32, self.tokens), ggml.graph_input(F32, width, self.tokens)
        self.token_ids = ids
        cur = self.token_rows(table, ids, width)
        self.graph.expand(cur)
        self.graph.expand(vectors)
        if self.shape.architecture.mixes_inputs:
            ids, rows = ggml.graph_input(I32, self.tokens), ggml.graph_input(I64, self.tokens)
            mixed = ggml.graph_input(F32, width, self.tokens)
            self.graph.expand(ggml.set_rows(same("dup", mixed), self.token_rows(table, ids, width), rows))
        if self.shape.image_layers:
            self.images = cur
            cur = view(cur, (self.embd, self.tokens), (cur.nb[1],))
        if self.shape.architecture.scales_tokens:
            cur = same("mul", cur, ggml.graph_input(F32, 1, self.tokens))
        elif self.shape.scales_embeddings:
            cur = same("scale", cur)
        self.graph.expand(cur)
        return cur

    def token_rows(self, table: Tensor, ids: Tensor, width: int) -> Tensor:
        """Tokens' rows, made as wide as those of images are."""
        cur = ggml.get_rows(table, ids)
        return cur if width == self.embd else new("pad", F32, (width, self.tokens), cur)

    def fed(self, cur: Tensor) -> Tensor:
        """A layer's result; the first layers add what an image says to them besides (deepstack)."""
        if self.layer >= self.shape.image_layers:
            return cur
        assert self.images is not None  # made with the embeddings
        return same("add", cur, view(self.images, (self.embd, self.tokens), (self.images.nb[1],)))

    def attention_inputs(self, window: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Where K and V rows go, and the mask; one of each for all layers of a kind."""

        def make() -> tuple[Tensor, Tensor, Tensor]:
            cells = cache_cells(self.context, max(self.windows) if window else 0)
            values = 1 if self.context.flash_attention else self.values_width()
            kind = F16 if self.context.flash_attention else F32
            return (
                ggml.graph_input(I64, self.tokens),
                ggml.graph_input(I64, self.tokens * values),
                ggml.graph_input(kind, cells, self.tokens // self.streams, 1, self.streams),
            )

        return self.once(("mask", window), make)

    def values_width(self) -> int:
        """Elements of a row of V, the widest layer's (n_embd_v_gqa_max)."""
        kinds = {(size > 0, heads) for size, heads in zip(self.windows, self.shape.kv_heads, strict=True)}
        return max(self.shape.head_sizes(window)[1] * heads for window, heads in kinds)

    # Attention

    def attend(self, q: Tensor, k: Tensor | None, v: Tensor | None, size_k: int, size_v: int) -> Tensor:
        """build_attn: store K and V, unless the layer has none of its own; attend over the whole cache."""
        window = self.windows[self.layer] > 0
        heads_kv, kind = k.ne[1] if k else self.shape.kv_heads[self.layer], self.context.kv_type.upper()
        k_ids, v_ids, mask = self.attention_inputs(window)
        turn_k, turn_v = self.rotation("k", size_k, window), self.rotation("v", size_v, window)
        if turn_k is not None:
            q, k = rotated(q, turn_k), rotated(k, turn_k) if k else None
        v = rotated(v, turn_v) if turn_v is not None and v else v
        for tensor in (q, k, v) if self.has_windows else (q, v, k):
            if tensor is not None:
                self.graph.expand(tensor)
        cells = cache_cells(self.context, max(self.windows) if window else 0)
        home, flash = self.homes("cache", self.shape.cache_owners[self.layer]), self.context.flash_attention
        width_v = size_v * heads_kv if flash else self.values_width()
        stored_k = ggml.cache(kind, (size_k * heads_kv, cells, self.streams), home)
        stored_v = ggml.cache(kind, (width_v, cells, self.streams), home)
        if k is not None:
            self.store(stored_k, k, k_ids)
        if v is not None:
            (self.store if flash else self.store_across)(stored_v, v, v_ids)
        if flash:
            cached_v = self.cached(stored_v, size_v, heads_kv, cells)
        else:
            line = ggml.row_bytes(kind, cells)
            cached_v = view(stored_v, (cells, heads_kv, size_v, self.streams), (line * size_v, line, line * width_v))
        cur = self.attend_cached(q, self.cached(stored_k, size_k, heads_kv, cells), cached_v, mask, None)
        return cur if turn_v is None else rotated(cur, turn_v)

    def rotation(self, part: str, size: int, window: bool) -> Tensor | None:
        """The Hadamard matrix that a quantised cache's rows are turned by before (llama-kv-cache.cpp:290)."""
        blocks = ggml.TYPES[self.context.kv_type.upper()][0]
        if blocks == 1 or size % ROTATED or not size:  # a header may tell of heads of nothing
            return None
        width = ROTATED
        while part == "k" and size % (2 * width) == 0:
            width *= 2
        return self.once(("rotation", part, window), lambda: ggml.graph_input(F32, width, width))

    def store(self, cache: Tensor, cur: Tensor, ids: Tensor) -> None:
        """Write the batch's rows (cpy_k, cpy_v)."""
        rows = view(cur, (cache.ne[0], self.tokens), (cur.nb[2],))
        target = cache if self.streams == 1 else reshape(cache, cache.ne[0], cache.ne[1] * self.streams)
        self.graph.expand(ggml.set_rows(target, rows, ids))

    def store_across(self, cache: Tensor, cur: Tensor, ids: Tensor) -> None:
        """The same for V without flash attention: value by value, filled up to the widest layer's (cpy_v)."""
        elements = cur.ne[0] * cur.ne[1]
        if cur.nb[2] != ggml.row_bytes(cur.type, elements):
            cur = ggml.cont(cur, elements, self.tokens)
        if elements < cache.ne[0]:
            cur = ggml.new("pad", F32, (cache.ne[0], self.tokens), reshape(cur, elements, self.tokens))
        rows = reshape(cur, 1, cache.ne[0] * self.tokens)
        self.graph.expand(ggml.set_rows(reshape(cache, 1, ggml.elements(cache)), rows, ids))

    def cached(self, cache: Tensor, size: int, heads: int, cells: int) -> Tensor:
        """Read the cache, head by head (get_k, get_v)."""
        return view(cache, (size, heads, cells, self.streams))

    def attend_cached(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, decompress: Tensor | None) -> Tensor:
        """build_attn_mha."""
        streams, is_across = k.ne[3], v.nb[1] > v.nb[2]
        per_stream = q.ne[2] // streams
        q = view(q, (q.ne[0], q.ne[1], per_stream, streams), (q.nb[1], q.nb[2], q.nb[2] * per_stream))
        q, k = permute(q, 0, 2, 1, 3), permute(k, 0, 2, 1, 3)
        v = permute(v, 0, 2, 1, 3)
        if self.context.flash_attention:
            if k.type == F32:  # of a cache of f32, or of none
                k, v = (new("cast", F16, one.ne, one) for one in (k, v))
            cur = ggml.flash_attn(q, k, v, mask, self.weight("attn_sinks.weight"))
            if self.scratch and k.type != F16:  # unpacked behind the result; K may serve as V
                cur.bytes += ggml.elements(k) * 2 + (0 if v.view_src is k.view_src else ggml.elements(v) * 2)
            if decompress:
                cur = mul_mat(decompress, permute(cur, 0, 2, 1, 3))
                cur = ggml.cont(permute(cur, 0, 2, 1, 3))
            cur = reshape(cur, cur.ne[0] * cur.ne[1], cur.ne[2] * cur.ne[3])
        else:
            scores = mul_mat(k, q)
            if self.shape.caps_attention:
                scores = same("scale", same("unary", same("scale", scores)))
            scores = same("soft_max", scores, mask)
            if not is_across:
                v = ggml.cont(ggml.transpose(v))
            cur = mul_mat(v, scores)
            cur = mul_mat(decompress, cur) if decompress else cur
            cur = permute(cur, 0, 2, 1, 3)
            cur = ggml.cont(cur, cur.ne[0] * cur.ne[1], cur.ne[2] * cur.ne[3])
        self.graph.expand(cur)
        return cur

    def head_sizes(self) -> tuple[int, int]:
        """Elements of a head of K and of V in this layer."""
        return self.shape.head_sizes(self.windows[self.layer] > 0)

    def query_scales(self) -> Tensor:
        """One number for each token; one input for all layers (build_inp_attn_scale)."""
        return self.once("query scales", lambda: ggml.graph_input(F32, 1, 1, self.tokens))

    @property
    def positions(self) -> int:
        """Numbers that give one token's position (n_pos_per_embd): four with sections of rotation."""
        return self.shape.position_numbers

    def state_ids(self) -> tuple[Tensor, Tensor, Tensor]:
        """Which slot's recurrent state is whose: all, those of the batch, all but the first; once for all layers."""

        def make() -> tuple[Tensor, Tensor, Tensor]:
            ids = ggml.graph_input(I32, self.context.slots)
            return ids, view(ids, (self.context.slots,)), view(ids, (self.context.slots - 1,))

        return self.once("state ids", make)
