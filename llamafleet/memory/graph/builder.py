"""The graph that llama.cpp computes for a full batch of prompt tokens, from a header and a context.

Built operation by operation like src/llama-graph.cpp and src/models/*.cpp at b11434, because the order and
the shapes decide which memory the allocator can reuse. A layer's tensors decide which operations it has, so
most architectures need no code of their own; other properties are in `model/architectures`.
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
    apply,
    mul_mat,
    mul_mat_hadamard,
    new,
    permute,
    reshape,
    view,
)
from llamafleet.memory.graph.layers import ROPE_FACTORS, Layers
from llamafleet.model.shape import Shape

T = TypeVar("T")

HADAMARD_SIZE = 64  # smallest size of a Hadamard matrix (src/llama-kv-cache.cpp)

BackendOf = Callable[[str, int | None], int]  # (tensor name, layer): number of the backend that holds it


class GraphUnknownError(LookupError):
    """The graph of this model cannot be built."""


class Builder:
    """Builds one graph: state of the build, and operations that several kinds of layers use."""

    def __init__(self, shape: Shape, layers: Layers, context: Context, backend_of: BackendOf, scratch: bool) -> None:
        self.shape, self.layers, self.context = shape, layers, context
        self.backend_of, self.scratch = backend_of, scratch
        self.graph = Graph()
        self.embd = shape.embedding
        self.tokens = context.batch_tokens
        self.streams = 1 if context.unified else context.slots
        self.windows = shape.windows
        self.has_windows = any(self.windows)
        self.token_ids: Tensor | None = None
        self.top_k: Tensor | None = None  # cells picked by the last indexer, also for later layers without an indexer
        self.images: Tensor | None = None
        self.layer = -1
        self._made: dict[Hashable, Any] = {}

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value under this key, which all layers share: made at the first call."""
        if key not in self._made:
            self._made[key] = make()
        value: T = self._made[key]
        return value

    # Leafs

    def weight(self, part: str, layer: int | None = None) -> Tensor | None:
        """The model's tensor of this name, or None. `layer`: None for the current one, -1 for tensors outside blk.*."""
        layer = self.layer if layer is None else layer
        tensor = self.layers[layer].get(part)
        if tensor is None:
            return None
        ne = [*tensor.shape, 1, 1, 1][:4]
        return ggml.weight(tensor.type, ne, self.backend_of(part, layer if layer >= 0 else None))

    def need(self, part: str) -> Tensor:
        """The layer's tensor of this name; raises GraphUnknownError without it."""
        tensor = self.weight(part)
        if tensor is None:
            raise GraphUnknownError(f"{self.shape.architecture.name}: no tensor blk.{self.layer}.{part}")
        return tensor

    def adapter(self, part: str) -> Tensor:
        """A matrix of an adapter. Its buffer is not marked as one of weights: the scheduler computes with it where the
        operations around it are (llama_adapter_lora_init_impl; ggml_backend_sched_backend_id_from_cur)."""
        tensor = self.need(part)
        assert tensor.home is not None  # as of all weights
        return ggml.cache(tensor.type, tensor.ne, tensor.home)

    def rope_factors(self) -> tuple[Tensor, ...]:
        """RoPE factors, empty without them: one tensor for all layers of a device (TENSOR_DUPLICATED).

        Copied from the host for its first layer, the copy stays allocated up to the last layer and splits free memory.
        """
        outside = self.layers[-1]
        part = next((part for part in ROPE_FACTORS if part in outside), None)
        row = self.shape.architecture
        if part is None or (row.rope_factors_only_without_window and self.windows[self.layer]):
            return ()
        home = self.backend_of(part, self.layer)
        tensor = outside[part]
        return (self.once(("factors", home), lambda: ggml.weight(tensor.type, [*tensor.shape, 1, 1, 1][:4], home)),)

    def linear(self, part: str, cur: Tensor) -> Tensor:
        """Multiply by a matrix, then apply its scale, its adapters and its bias if the model has them."""
        res = mul_mat(self.need(f"{part}.weight"), cur)
        if scale := self.weight(f"{part}.scale"):
            res = apply("mul", res, scale)
        res = self.adapted(f"{part}.weight", res, mul_mat, cur)
        bias = self.weight(f"{part}.bias")
        return apply("add", res, bias) if bias else res

    def adapted(
        self, part: str, res: Tensor, product: Callable[[Tensor, Tensor], Tensor], cur: Tensor, *, rows: bool = False
    ) -> Tensor:
        """The result of a matrix with what its adapters add to it (build_lora_mm). `product` multiplies `cur`, as for
        the matrix itself; `rows`: the first one picks rows by `cur` (build_inp_embd)."""
        for number in self.layers.adapted.get((self.layer, part), ()):
            a, b = (self.adapter(f"{part}.lora_{one}.{number}") for one in "ab")
            low = ggml.get_rows(a, cur) if rows else product(a, cur)
            res = apply("add", res, apply("scale", product(b, low)))
        return res

    def norm(self, cur: Tensor, part: str) -> Tensor:
        """Normalise with the layer's tensors of this name; `cur` unchanged if it has none."""
        scale, bias = self.weight(f"{part}.weight"), self.weight(f"{part}.bias")
        if scale is None:
            return cur
        row = self.shape.architecture
        centred = row.layer_norm or (bias is not None and not row.rms_norm_with_bias)
        cur = apply("norm" if centred else "rms_norm", cur)
        cur = apply("mul", cur, scale)
        return apply("add", cur, bias) if bias else cur

    def gated(self, gate: Tensor, up: Tensor, is_clamped: bool) -> Tensor:
        """Activation of gate times up: one operation, or several where both are clamped."""
        if not is_clamped:
            return apply("glu", gate, up)
        return apply("mul", apply("clamp", apply("unary", gate)), apply("clamp", up))

    # Inputs

    def embeddings(self) -> Tensor:
        """Embeddings from tokens, from vectors, or from both mixed: the graph has all three (build_inp_embd)."""
        table = self.weight("token_embd.weight", -1)
        if table is None:
            raise GraphUnknownError(f"{self.shape.architecture.name}: no tensor token_embd.weight")
        width = self.embd * (1 + self.shape.image_layers)
        ids, vectors = ggml.graph_input(I32, self.tokens), ggml.graph_input(F32, width, self.tokens)
        self.token_ids = ids
        cur = self.token_rows(table, ids, width)
        self.graph.expand(cur)
        self.graph.expand(vectors)
        if self.shape.architecture.mixes_inputs:
            ids, rows = ggml.graph_input(I32, self.tokens), ggml.graph_input(I64, self.tokens)
            mixed = ggml.graph_input(F32, width, self.tokens)
            self.graph.expand(ggml.set_rows(apply("dup", mixed), self.token_rows(table, ids, width), rows))
        if self.shape.image_layers:
            self.images = cur
            cur = view(cur, (self.embd, self.tokens), (cur.nb[1],))
        if self.shape.architecture.scales_tokens:
            cur = apply("mul", cur, ggml.graph_input(F32, 1, self.tokens))
        elif self.shape.scales_embeddings:
            cur = apply("scale", cur)
        self.graph.expand(cur)
        return cur

    def token_rows(self, table: Tensor, ids: Tensor, width: int) -> Tensor:
        """Embedding rows of tokens, padded to the width of image rows."""
        cur = self.adapted("token_embd.weight", ggml.get_rows(table, ids), mul_mat, ids, rows=True)
        return cur if width == self.embd else new("pad", F32, (width, self.tokens), cur)

    def with_deepstack(self, cur: Tensor) -> Tensor:
        """A layer's result; each of the first layers also adds its rows of an image (deepstack)."""
        if self.layer >= self.shape.image_layers:
            return cur
        assert self.images is not None  # set by `embeddings`
        return apply("add", cur, view(self.images, (self.embd, self.tokens), (self.images.nb[1],)))

    def attention_inputs(self, window: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Cells to write K and V to, and the mask. Shared by all layers with a window, or by all without."""

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
        """Elements of a row of V in the widest layer (n_embd_v_gqa_max)."""
        kinds = {(size > 0, heads) for size, heads in zip(self.windows, self.shape.kv_heads, strict=True)}
        return max(self.shape.head_sizes(window)[1] * heads for window, heads in kinds)

    # Attention

    def build_attn(self, q: Tensor, k: Tensor | None, v: Tensor | None, size_k: int, size_v: int) -> Tensor:
        """Store K and V if the layer has its own, and attend to the whole cache (build_attn)."""
        window = self.windows[self.layer] > 0
        heads_kv = k.ne[1] if k else self.shape.kv_heads[self.layer]
        kind_k, kind_v = self.cache_kinds
        k_ids, v_ids, mask = self.attention_inputs(window)
        hadamard_k, hadamard_v = self.hadamard("k", size_k, window), self.hadamard("v", size_v, window)
        if hadamard_k is not None:
            q, k = mul_mat_hadamard(q, hadamard_k), mul_mat_hadamard(k, hadamard_k) if k else None
        v = mul_mat_hadamard(v, hadamard_v) if hadamard_v is not None and v else v
        for tensor in (q, k, v) if self.has_windows else (q, v, k):
            if tensor is not None:
                self.graph.expand(tensor)
        cells = cache_cells(self.context, max(self.windows) if window else 0)
        home, flash = self.backend_of("cache", self.shape.cache_owners[self.layer]), self.context.flash_attention
        width_v = size_v * heads_kv if flash else self.values_width()
        stored_k = ggml.cache(kind_k, (size_k * heads_kv, cells, self.streams), home)
        stored_v = ggml.cache(kind_v, (width_v, cells, self.streams), home)
        if k is not None:
            self.store(stored_k, k, k_ids)
        if v is not None:
            (self.store if flash else self.store_transposed)(stored_v, v, v_ids)
        if flash:
            cached_v = self.read_cache(stored_v, size_v, heads_kv, cells)
        else:
            line = ggml.row_bytes(kind_v, cells)
            cached_v = view(stored_v, (cells, heads_kv, size_v, self.streams), (line * size_v, line, line * width_v))
        cur = self.build_attn_mha(q, self.read_cache(stored_k, size_k, heads_kv, cells), cached_v, mask, None)
        return cur if hadamard_v is None else mul_mat_hadamard(cur, hadamard_v)

    @property
    def cache_kinds(self) -> tuple[str, str]:
        """The types of K and V in the cache, by ggml's names."""
        return self.context.key_type.upper(), self.context.value_type.upper()

    def hadamard(self, part: str, size: int, window: bool) -> Tensor | None:
        """The Hadamard matrix for rows of a quantised cache (src/llama-kv-cache.cpp, ggml_gen_hadamard); None where
        none is used. `part`: "k" or "v"."""
        blocks = ggml.TYPES[self.cache_kinds[part == "v"]][0]
        if blocks == 1 or size % HADAMARD_SIZE or not size:  # a hostile header may give heads of size 0
            return None
        width = HADAMARD_SIZE
        while part == "k" and size % (2 * width) == 0:
            width *= 2
        return self.once(("rotation", part, window), lambda: ggml.graph_input(F32, width, width))

    def store(self, cache: Tensor, cur: Tensor, ids: Tensor) -> None:
        """Write the batch's rows to the cache (cpy_k, cpy_v)."""
        rows = view(cur, (cache.ne[0], self.tokens), (cur.nb[2],))
        target = cache if self.streams == 1 else reshape(cache, cache.ne[0], cache.ne[1] * self.streams)
        self.graph.expand(ggml.set_rows(target, rows, ids))

    def store_transposed(self, cache: Tensor, cur: Tensor, ids: Tensor) -> None:
        """Write V without flash attention: transposed, and padded to the widest layer's row (cpy_v)."""
        elements = cur.ne[0] * cur.ne[1]
        if cur.nb[2] != ggml.row_bytes(cur.type, elements):
            cur = ggml.cont(cur, elements, self.tokens)
        if elements < cache.ne[0]:
            cur = ggml.new("pad", F32, (cache.ne[0], self.tokens), reshape(cur, elements, self.tokens))
        rows = reshape(cur, 1, cache.ne[0] * self.tokens)
        self.graph.expand(ggml.set_rows(reshape(cache, 1, ggml.elements(cache)), rows, ids))

    def read_cache(self, cache: Tensor, size: int, heads: int, cells: int) -> Tensor:
        """A view of the whole cache by head (get_k, get_v)."""
        return view(cache, (size, heads, cells, self.streams))

    def build_attn_mha(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, v_mla: Tensor | None) -> Tensor:
        """Attention of q to k and v, with or without flash attention (build_attn_mha).

        `v_mla`: MLA's matrix that decompresses the result.
        """
        streams, v_is_transposed = k.ne[3], v.nb[1] > v.nb[2]
        per_stream = q.ne[2] // streams
        q = view(q, (q.ne[0], q.ne[1], per_stream, streams), (q.nb[1], q.nb[2], q.nb[2] * per_stream))
        q, k = permute(q, 0, 2, 1, 3), permute(k, 0, 2, 1, 3)
        v = permute(v, 0, 2, 1, 3)
        if self.context.flash_attention:
            # An f32 cache, or no cache.
            k, v = (new("cast", F16, x.ne, x) if x.type == F32 else x for x in (k, v))
            cur = ggml.flash_attn(q, k, v, mask, self.weight("attn_sinks.weight"))
            cur.bytes += self.converted_bytes(k, v)
            if v_mla:
                cur = mul_mat(v_mla, permute(cur, 0, 2, 1, 3))
                cur = ggml.cont(permute(cur, 0, 2, 1, 3))
            cur = reshape(cur, cur.ne[0] * cur.ne[1], cur.ne[2] * cur.ne[3])
        else:
            scores = mul_mat(k, q)
            if self.shape.caps_attention:
                scores = apply("scale", apply("unary", apply("scale", scores)))
            scores = apply("soft_max", scores, mask)
            if not v_is_transposed:
                v = ggml.cont(ggml.transpose(v))
            cur = mul_mat(v, scores)
            cur = mul_mat(v_mla, cur) if v_mla else cur
            cur = permute(cur, 0, 2, 1, 3)
            cur = ggml.cont(cur, cur.ne[0] * cur.ne[1], cur.ne[2] * cur.ne[3])
        self.graph.expand(cur)
        return cur

    def converted_bytes(self, k: Tensor, v: Tensor) -> int:
        """Bytes behind the result of flash attention for what is converted to f16; V may be a view of K."""
        if not self.scratch:
            return 0
        kept = k if v.view_src is k.view_src else v
        return sum(2 * ggml.elements(x) for x in ((k,) if kept is k else (k, v)) if x.type != F16)

    def head_sizes(self) -> tuple[int, int]:
        """Elements of a head of K and of V in this layer."""
        return self.shape.head_sizes(self.windows[self.layer] > 0)

    def query_scales(self) -> Tensor:
        """A scale of Q for each token, shared by all layers (build_inp_attn_scale)."""
        return self.once("query scales", lambda: ggml.graph_input(F32, 1, 1, self.tokens))

    @property
    def positions(self) -> int:
        """Numbers that give one token's position (n_pos_per_embd): four with RoPE sections, else one."""
        return self.shape.position_numbers

    def state_ids(self) -> tuple[Tensor, Tensor, Tensor]:
        """Row numbers of the slots' recurrent states: all, those of the batch, the others. Shared by all layers."""

        def make() -> tuple[Tensor, Tensor, Tensor]:
            ids = ggml.graph_input(I32, self.context.slots)
            return ids, view(ids, (self.context.slots,)), view(ids, (self.context.slots - 1,))

        return self.once("state ids", make)
