"""The graph that a projector computes for one picture or one piece of sound: what its kinds have in common.

Built like tools/mtmd/clip.cpp at b11434 (clip_graph::build_vit, build_attn, build_ffn, build_norm), because the order
and the shapes decide which memory the allocator can reuse. `projectors.py` has what differs by kind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llamafleet.memory.graph import ggml
from llamafleet.memory.graph.builder import GraphUnknownError
from llamafleet.memory.graph.ggml import F16, F32, I32, Graph, Tensor, apply, cont, mul_mat, new, permute, reshape, view
from llamafleet.model.projector import Encoder

NodePart = Callable[[Tensor], Tensor]
RMS, LAYER = "rms_norm", "norm"
# Kinds whose older files have the two matrices of the feed-forward part under each other's name (load_tensors).
_SWAPPED = ("mlp", "ldp", "ldpv2", "qwen2vl_merger", "qwen2.5vl_merger", "exaone4_5", "adapter", "gemma3", "idefics3",
            "resampler", "minicpmv4_6")  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """What is encoded: a grid of patches, or frames of sound by their bins; `count` of them at once."""

    across: int
    down: int
    count: int = 1


class Tower:
    """Builds one graph; every weight is on backend 0."""

    def __init__(self, encoder: Encoder, picture: Picture, *, flash_attention: bool) -> None:
        self.encoder, self.picture, self.flash_attention = encoder, picture, flash_attention
        self.embd, self.patches = encoder.embedding, picture.across * picture.down
        self.graph = Graph()
        self.prefix = "a" if encoder.hears else "v"
        self.tensors = {one.name: one for one in encoder.tensors}
        self.clamps = encoder.name in ("gemma4v", "gemma4a")

    # Leafs

    def weight(self, name: str) -> Tensor | None:
        """The projector's tensor of this name, or None. The same node each time."""
        tensor = self.tensors.get(name)
        if tensor is None:
            return None
        return ggml.weight(tensor.type, [*tensor.shape, 1, 1, 1][:4], 0)

    def need(self, name: str) -> Tensor:
        """The projector's tensor of this name. Raises GraphUnknownError without it."""
        tensor = self.weight(name)
        if tensor is None:
            raise GraphUnknownError(f"{self.encoder.name}: no tensor {name}")
        return tensor

    def raw_input(self, channels: int = 3) -> Tensor:
        """The pixels, or the sound's spectrum (build_inp_raw)."""
        one, size = self.picture, self.encoder.patch
        return ggml.graph_input(F32, one.across * size, one.down * size, channels, one.count)

    def positions(self, each: int = 1) -> Tensor:
        """`each` numbers for every patch."""
        return ggml.graph_input(I32, self.patches * each)

    # Operations

    def multiply(self, name: str, cur: Tensor) -> Tensor:
        """Multiply by a matrix; Gemma 4 clamps what goes in and comes out (clip_graph_gemma4v::build_mm)."""
        weight = self.need(name)
        if not self.clamps:
            return mul_mat(weight, cur)
        return apply("clamp", mul_mat(weight, apply("clamp", cur)))

    def linear(self, part: str, cur: Tensor) -> Tensor:
        """Multiply by a matrix and add its bias, if there is one."""
        return self.added(f"{part}.bias", self.multiply(f"{part}.weight", cur))

    def added(self, name: str, cur: Tensor) -> Tensor:
        """Add a tensor, if there is one."""
        bias = self.weight(name)
        return cur if bias is None else apply("add", cur, bias)

    def scaled(self, name: str, cur: Tensor) -> Tensor:
        """Multiply element by element, if there is such a tensor."""
        scale = self.weight(name)
        return cur if scale is None else apply("mul", cur, scale)

    def norm(self, part: str, cur: Tensor, kind: str) -> Tensor:
        """build_norm."""
        return self.added(f"{part}.bias", self.scaled(f"{part}.weight", apply(kind, cur)))

    def mlp(self, up: str, down: str, cur: Tensor, gate: str = "") -> Tensor:
        """build_ffn: up, an activation, down. `gate`: of a gated one."""
        tmp = self.linear(up, cur)
        if gate and f"{gate}.weight" in self.tensors:
            return self.linear(down, apply("glu", self.linear(gate, cur), tmp))
        return self.linear(down, apply("unary", tmp))

    def patched(self, raw: Tensor, name: str = "v.patch_embd.weight") -> Tensor:
        """The convolution that makes vectors of patches (ggml_conv_2d)."""
        return conv_2d(self.need(name), raw, self.encoder.patch)

    def patch_rows(self, raw: Tensor | None = None) -> Tensor:
        """Rows of patches (build_inp)."""
        cur = self.patched(raw or self.raw_input())
        cur = reshape(cur, self.patches, self.embd, self.picture.count)
        return self.added("v.patch_embd.bias", cont(ggml.transpose(cur)))

    def learned_positions(self) -> Tensor:
        """The learned embeddings of positions, interpolated to the picture (resize_position_embeddings)."""
        table = self.need(f"{self.prefix}.position_embd.weight")
        side, one = int(table.ne[1] ** 0.5), self.picture
        if one.across == one.down == side:
            return table
        cur = permute(reshape(table, self.embd, side, side), 2, 0, 1, 3)
        cur = new("interpolate", cur.type, (one.across, one.down, self.embd), cur)
        return cont(permute(cur, 1, 2, 0, 3), self.embd, self.patches)

    def attend(self, part: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """build_attn, without sinks."""
        for one in (q, k, v):
            self.graph.expand(one)
        heads, keys = permute(q, 0, 2, 1, 3), permute(k, 0, 2, 1, 3)
        if self.flash_attention:
            values = permute(v, 0, 2, 1, 3)
            keys, values = _cast(keys), _cast(values)
            masks = () if mask is None else (_cast(mask),)
            ne = (values.ne[0], heads.ne[2], heads.ne[1], heads.ne[3])
            cur = Tensor("flash_attn", F32, ne, (heads, keys, values, *masks))
            cur = reshape(cur, cur.ne[0] * cur.ne[1], cur.ne[2] * cur.ne[3])
        else:
            values = cont(permute(v, 1, 2, 0, 3))
            scores = mul_mat(keys, heads)
            scores = apply("soft_max", scores, *(() if mask is None else (mask,)))
            cur = permute(mul_mat(values, scores), 0, 2, 1, 3)
            cur = cont(cur, cur.ne[0] * cur.ne[1], cur.ne[2] * cur.ne[3])
        return self.linear(part, cur)

    def transformer(
        self, inputs: Tensor, positions: int, norm: str, learned: Tensor | None = None,
        rotate: NodePart | None = None, skip_last_norm: bool = False,
    ) -> Tensor:  # fmt: skip
        """The layers of a vision transformer (build_vit). `positions`: patches and class tokens of each picture."""
        count = inputs.ne[2]
        if learned is not None:
            inputs = apply("add", inputs, learned)
        cur = reshape(inputs, self.embd, positions * count)
        if f"{self.prefix}.pre_ln.weight" in self.tensors:
            cur = self.norm(f"{self.prefix}.pre_ln", cur, norm)
        for layer in range(self.encoder.layers):
            cur = self._layer(f"{self.prefix}.blk.{layer}", cur, positions, count, norm, rotate)
        if self.encoder.name in ("qwen2a", "voxtral", "musicflamingo"):  # audio_has_avgpool
            cur = cont(ggml.transpose(cur))
            cur = new("pool_1d", F32, (cur.ne[0] // 2, *cur.ne[1:]), cur)
            cur = cont(ggml.transpose(cur))
        if f"{self.prefix}.post_ln.weight" in self.tensors and not skip_last_norm:
            cur = self.norm(f"{self.prefix}.post_ln", cur, norm)
        return reshape(cur, self.embd, cur.ne[1] // count, count)

    def _layer(
        self, name: str, inputs: Tensor, positions: int, count: int, norm: str, rotate: NodePart | None
    ) -> Tensor:
        cur = inputs
        if f"{name}.ln1.weight" in self.tensors:
            cur = self.norm(f"{name}.ln1", cur, norm)
        q, k, v = self._heads(name, cur, positions, count, norm)
        if rotate is not None:
            q, k = rotate(q), rotate(k)
        if self.encoder.name == "gemma4v":
            v = apply("rms_norm", v)
        cur = self.attend(f"{name}.attn_out", q, k, v)
        cur = self.scaled(f"{name}.ls1.weight", cur)
        if f"{name}.attn_post_norm.weight" in self.tensors:
            cur = self.scaled(f"{name}.attn_post_norm.weight", apply(norm, cur))
        inputs = apply("add", cur, inputs)
        cur = self.feed_forward(name, self.norm(f"{name}.ln2", inputs, norm))
        if f"{name}.ffn_post_norm.weight" in self.tensors:
            cur = self.scaled(f"{name}.ffn_post_norm.weight", apply(norm, cur))
        cur = self.scaled(f"{name}.ls2.weight", cur)
        return self.scaled(f"{name}.out_scale.weight", apply("add", inputs, cur))

    def feed_forward(self, name: str, cur: Tensor) -> Tensor:
        """The feed-forward part of a layer."""
        if f"{name}.ffn_gate_exps.weight" in self.tensors:
            raise GraphUnknownError(f"{self.encoder.name}: experts")
        up, down = f"{name}.ffn_up", f"{name}.ffn_down"
        if self.encoder.name in _SWAPPED and self.need(f"{down}.weight").ne[0] == self.embd:
            up, down = down, up
        return self.mlp(up, down, cur, f"{name}.ffn_gate")

    def _heads(self, name: str, cur: Tensor, positions: int, count: int, norm: str) -> tuple[Tensor, Tensor, Tensor]:
        one = self.encoder
        sizes = ((one.head, one.heads), (one.head, one.kv_heads), (one.head, one.kv_heads))
        if f"{name}.attn_qkv.weight" in self.tensors:
            cur = self.linear(f"{name}.attn_qkv", cur)
            strides = (one.head * 4, cur.nb[1], cur.nb[1] * positions)
            q, k, v = (view(cur, (one.head, one.heads, positions, count), strides) for _ in sizes)
            return self._normed(f"{name}.attn_q_norm", q, norm), self._normed(f"{name}.attn_k_norm", k, norm), v
        q, k, v = (self.linear(f"{name}.attn_{letter}", cur) for letter in "qkv")
        scale = self.tensors.get(f"{name}.attn_q_norm.weight")
        per_head = scale is not None and scale.shape[0] == one.head
        if not per_head:
            q, k = self._normed(f"{name}.attn_q_norm", q, norm), self._normed(f"{name}.attn_k_norm", k, norm)
        q, k, v = (
            reshape(x, *size, positions, count) for x, size in zip((q, k, v), sizes, strict=True)
        )  # fmt: skip
        if per_head:
            q, k = self._normed(f"{name}.attn_q_norm", q, norm), self._normed(f"{name}.attn_k_norm", k, norm)
        return q, k, v

    def _normed(self, name: str, cur: Tensor, norm: str) -> Tensor:
        return self.scaled(f"{name}.weight", apply(norm, cur)) if f"{name}.weight" in self.tensors else cur

    def merged(self, cur: Tensor, scale: int) -> Tensor:
        """Squares of `scale` patches a side become one row each (build_patch_merge_permute)."""
        width, height, embd = self.picture.across, self.picture.down, cur.ne[0]
        wide, high = -(-width // scale) * scale, -(-height // scale) * scale
        cur = reshape(cur, embd, width, height)
        if (wide, high) != (width, height):
            cur = new("pad", cur.type, (embd, wide, high), cur)
        cur = permute(reshape(cur, embd * scale, wide // scale, high), 0, 2, 1, 3)
        cur = cont(cur, embd * scale * scale, high // scale, wide // scale)
        cur = permute(cur, 0, 2, 1, 3)
        return cont(cur, cur.ne[0], cur.ne[1] * cur.ne[2])


def conv_2d(kernel: Tensor, cur: Tensor, stride: int, padding: int = 0) -> Tensor:
    """ggml_conv_2d: a matrix of what the kernel sees at each place, then a product."""
    wide, high, channels, out = kernel.ne
    across, down = ((n + 2 * padding - k) // stride + 1 for n, k in ((cur.ne[0], wide), (cur.ne[1], high)))
    seen = im2col(kernel, cur, (channels * wide * high, across, down, cur.ne[3]))
    flat = reshape(seen, seen.ne[0], seen.ne[1] * seen.ne[2] * seen.ne[3])
    cur = mul_mat(flat, reshape(kernel, wide * high * channels, out))
    return cont(permute(reshape(cur, across, down, seen.ne[3], out), 0, 1, 3, 2))


def conv_1d(kernel: Tensor, cur: Tensor, stride: int) -> Tensor:
    """ggml_conv_1d_ph."""
    wide, channels, out, _ = kernel.ne
    length = (cur.ne[0] + 2 * (wide // 2) - wide) // stride + 1
    seen = im2col(kernel, cur, (channels * wide, length, cur.ne[2], 1))
    flat = reshape(seen, seen.ne[0], seen.ne[1] * seen.ne[2])
    return reshape(mul_mat(flat, reshape(kernel, wide * channels, out)), length, out, seen.ne[2])


def im2col(kernel: Tensor, cur: Tensor, ne: tuple[int, int, int, int]) -> Tensor:
    """ggml_im2col, of the type that ggml_conv_2d gives it."""
    return new("im2col", F32 if kernel.type == "BF16" else F16, ne, kernel, cur)


def rope_2d(positions: tuple[Tensor, Tensor]) -> NodePart:
    """Rotate the halves of each head by the two coordinates (build_rope_2d)."""
    return lambda cur: apply("rope", apply("rope", cur, positions[0]), positions[1])


def _cast(tensor: Tensor) -> Tensor:
    return new("cast", F16, tensor.ne, tensor)
