"""The graphs of projectors, by kind: from pixels or sound to embeddings of a model.

Built like tools/mtmd/models/*.cpp at b11434, one function for each file there. Kinds without one have an upper bound
(`memory/projector_bound.py`).
"""

from __future__ import annotations

from collections.abc import Callable

from llamafleet.memory.graph import ggml
from llamafleet.memory.graph.builder import GraphUnknownError
from llamafleet.memory.graph.gemma4_audio import gemma4_audio
from llamafleet.memory.graph.ggml import F16, F32, I32, Graph, Tensor, apply, cont, mul_mat, new, permute, reshape, view
from llamafleet.memory.graph.tower import LAYER, RMS, Picture, Tower, conv_1d, conv_2d, rope_2d
from llamafleet.model.projector import Encoder

LARGE_INTERNVL = (3200, 45)  # width and layers of the tower that has RMS norms (clip_graph_internvl)


def build(encoder: Encoder, picture: Picture, *, flash_attention: bool) -> Graph:
    """The graph of one encoding. Raises GraphUnknownError for a kind that has none here, or without its tensors."""
    make = GRAPHS.get(encoder.name)
    if make is None:
        raise GraphUnknownError(encoder.name)
    tower = Tower(encoder, picture, flash_attention=flash_attention)
    tower.graph.expand(make(tower))
    return tower.graph


def _siglip(t: Tower) -> Tensor:
    """tools/mtmd/models/siglip.cpp, clip_graph_siglip."""
    inputs = t.patch_rows()
    moves = t.encoder.name in ("lfm2", "phi4")
    learned = t.learned_positions() if moves else t.weight("v.position_embd.weight")
    cur = t.transformer(inputs, t.patches, LAYER, learned)
    name = t.encoder.name
    if name == "gemma3":
        cur = _pooled(t, cur)
        cur = apply("mul", apply(RMS, cur), t.need("mm.soft_emb_norm.weight"))
        return mul_mat(cont(ggml.transpose(t.need("mm.input_projection.weight"))), cur)
    if name == "idefics3":
        return t.multiply("mm.model.fc.weight", t.merged(cur, t.encoder.merge))
    if name == "lfm2":
        cur = t.merged(cur, t.encoder.merge)
        if "mm.input_norm.weight" in t.tensors:
            cur = t.norm("mm.input_norm", cur, LAYER)
        return t.mlp("mm.1", "mm.2", cur)
    return t.mlp("mm.0", "mm.1" if name == "janus_pro" else "mm.2", cur)


def _pooled(t: Tower, cur: Tensor) -> Tensor:
    """The mean of each square of patches."""
    one, size = t.picture, t.encoder.merge
    cur = cont(ggml.transpose(cur), one.across, one.down, t.embd, one.count)
    cur = new("pool_2d", F32, (one.across // size, one.down // size, t.embd, one.count), cur)
    return cont(ggml.transpose(reshape(cur, cur.ne[0] * cur.ne[1], t.embd, one.count)))


def _pixtral(t: Tower) -> Tensor:
    """tools/mtmd/models/pixtral.cpp, clip_graph_pixtral."""
    places = (t.positions(), t.positions())
    inputs = t.patch_rows()
    cur = t.transformer(inputs, t.patches, RMS, None, rope_2d(places))
    one, merge = t.picture, t.encoder.merge
    if "mm.patch_merger.weight" in t.tensors:
        cur = apply("mul", apply(RMS, cur), t.need("mm.input_norm.weight"))
        cur = cont(permute(reshape(cur, t.embd, one.across, one.down), 2, 0, 1, 3))
        kernel = view(cur, (merge, merge, cur.ne[2]), (0, 0))
        ne = (t.embd * merge * merge, one.across // merge, one.down // merge, 1)
        cur = new("im2col", inputs.type, ne, kernel, cur)
        cur = t.multiply("mm.patch_merger.weight", reshape(cur, ne[0], ne[1] * ne[2]))
    cur = t.mlp("mm.1", "mm.2", cur)
    mark = t.weight("v.token_embd.img_break")
    if mark is None:
        return cur
    across, down = one.across // merge, one.down // merge
    rows = reshape(cur, cur.ne[0], across, down)
    marks = apply("add", apply("scale", Tensor("none", F32, (cur.ne[0], 1, down, 1))), mark)
    return view(ggml.concat(rows, marks, 1), (cur.ne[0], across * down + down - 1))


def _merge_order(t: Tower, cur: Tensor) -> Tensor:
    """Rows of patches in the order of the squares that are merged (clip_graph_qwen2vl::build)."""
    across, down = t.picture.across, t.picture.down
    cur = cont(cur, t.embd * 2, across // 2, down)
    cur = permute(reshape(cur, t.embd * 2, across // 2, 2, down // 2), 0, 2, 1, 3)
    return cont(cur, t.embd, across * down, 1)


def _two_frames(t: Tower) -> Tensor:
    """A picture as two equal frames of a film, or two frames (build_inp_with_temporal_merge)."""
    raw = t.raw_input()
    frames = [view(raw, raw.ne[:3], raw.nb[1:3]) for _ in range(2)] if t.picture.count > 1 else [raw, raw]
    cur = apply("add", t.patched(frames[0]), t.patched(frames[1], "v.patch_embd.weight.1"))
    return _merge_order(t, permute(cur, 1, 2, 0, 3))


def _qwen2vl(t: Tower) -> Tensor:
    """tools/mtmd/models/qwen2vl.cpp, clip_graph_qwen2vl."""
    norm = RMS if t.encoder.name == "qwen2.5vl_merger" else LAYER
    cur, windowed = _two_frames(t), t.encoder.window_pattern > 0
    places, mask = t.positions(4), None
    if "v.pre_ln.weight" in t.tensors:
        cur = t.norm("v.pre_ln", cur, norm)
    if windowed:
        order = ggml.graph_input(I32, t.patches // 4)
        mask = ggml.graph_input(F32, t.patches, t.patches)
        mask = new("cast", F16, mask.ne, mask) if t.flash_attention else mask
        cur = ggml.get_rows(reshape(cur, t.embd * 4, t.patches // 4), order)
        cur = reshape(cur, t.embd, t.patches, 1)
    for layer in range(t.encoder.layers):
        whole = not windowed or (layer + 1) % t.encoder.window_pattern == 0
        cur = _qwen_layer(t, f"v.blk.{layer}", cur, places, norm, None if whole else mask)
    if "v.post_ln.weight" in t.tensors:
        cur = t.norm("v.post_ln", cur, norm)
    cur = t.mlp("mm.0", "mm.2", reshape(cur, t.embd * 4, t.patches // 4, 1))
    if windowed:
        cur = ggml.get_rows(reshape(cur, cur.ne[0], t.patches // 4), ggml.graph_input(I32, t.patches // 4))
        cur = reshape(cur, cur.ne[0], t.patches // 4, 1)
    return cur


def _qwen_layer(t: Tower, name: str, inputs: Tensor, places: Tensor, norm: str, mask: Tensor | None) -> Tensor:
    one = t.encoder
    cur = t.norm(f"{name}.ln1", inputs, norm)
    if f"{name}.attn_qkv.weight" in t.tensors:
        cur = t.linear(f"{name}.attn_qkv", cur)
        q, k, v = (view(cur, (one.head, one.heads, t.patches), (one.head * 4, cur.nb[1])) for _ in range(3))
    else:
        q, k, v = (
            reshape(t.linear(f"{name}.attn_{letter}", cur), one.head, one.heads, t.patches) for letter in "qkv"
        )  # fmt: skip
    q, k = apply("rope", q, places), apply("rope", k, places)
    inputs = apply("add", t.attend(f"{name}.attn_out", q, k, v, mask), inputs)
    return apply("add", inputs, t.feed_forward(name, t.norm(f"{name}.ln2", inputs, norm)))


def _qwen3vl(t: Tower) -> Tensor:
    """tools/mtmd/models/qwen3vl.cpp, clip_graph_qwen3vl."""
    cur = apply("add", _two_frames(t), t.need("v.patch_embd.bias"))
    cur = apply("add", cur, _merge_order(t, t.learned_positions()))
    places, stacked = t.positions(4), None
    if "v.pre_ln.weight" in t.tensors:
        cur = t.norm("v.pre_ln", cur, LAYER)
    squared = t.encoder.merge**2
    for layer in range(t.encoder.layers):
        cur = _qwen_layer(t, f"v.blk.{layer}", cur, places, LAYER, None)
        part = f"v.deepstack.{layer}"
        if f"{part}.fc1.weight" in t.tensors:
            features = t.norm(f"{part}.norm", reshape(cur, t.embd * squared, t.patches // squared, 1), LAYER)
            features = t.mlp(f"{part}.fc1", f"{part}.fc2", features)
            stacked = features if stacked is None else ggml.concat(stacked, features, 0)
    if "v.post_ln.weight" in t.tensors:
        cur = t.norm("v.post_ln", cur, LAYER)
    cur = t.mlp("mm.0", "mm.2", reshape(cur, t.embd * 4, t.patches // 4, 1))
    return cur if stacked is None else ggml.concat(cur, stacked, 0)


def _glm4v(t: Tower) -> Tensor:
    """tools/mtmd/models/glm4v.cpp, clip_graph_glm4v."""
    raw, places = t.raw_input(), t.positions(4)
    cur = apply("add", t.patched(raw), t.patched(raw, "v.patch_embd.weight.1"))
    cur = apply("add", _merge_order(t, permute(cur, 1, 2, 0, 3)), t.need("v.patch_embd.bias"))
    if "v.norm_embd.weight" in t.tensors:
        cur = t.norm("v.norm_embd", cur, RMS)
    learned = _merge_order(t, t.learned_positions()) if "v.position_embd.weight" in t.tensors else None
    cur = t.transformer(cur, t.patches, RMS, learned, lambda x: apply("rope", x, places))
    merge = t.encoder.merge
    rows = t.patches // merge // merge
    cur = cont(permute(reshape(cur, t.embd, merge, merge, rows), 2, 0, 1, 3))
    cur = conv_2d(t.need("mm.patch_merger.weight"), cur, merge)
    cur = apply("add", reshape(cur, cur.ne[2], rows), t.need("mm.patch_merger.bias"))
    cur = apply("unary", t.norm("mm.post_norm", t.multiply("mm.model.fc.weight", cur), LAYER))
    return t.mlp("mm.up", "mm.down", cur, "mm.gate")


def _gemma4v(t: Tower) -> Tensor:
    """tools/mtmd/models/gemma4v.cpp, clip_graph_gemma4v."""
    raw = apply("scale", t.raw_input())
    cur = reshape(t.patched(raw), t.patches, t.embd, t.picture.count)
    cur = cont(ggml.transpose(cur))
    places = (t.positions(), t.positions())
    cur = _looked_up(t, cur, places)
    cur = t.transformer(cur, t.patches, RMS, None, rope_2d(places))
    cur = apply("scale", _pooled(t, cur))
    if "v.std_bias" in t.tensors and "v.std_scale" in t.tensors:
        cur = apply("mul", apply("sub", cur, t.need("v.std_bias")), t.need("v.std_scale"))
    return t.multiply("mm.input_projection.weight", apply(RMS, cur))


def _looked_up(t: Tower, cur: Tensor, places: tuple[Tensor, Tensor]) -> Tensor:
    """Add the embeddings of both coordinates."""
    table = t.need("v.position_embd.weight")
    rows = [ggml.get_rows(view(table, (t.embd, table.ne[1]), (table.nb[1],)), place) for place in places]
    return apply("add", apply("add", cur, rows[0]), rows[1])


def _gemma4uv(t: Tower) -> Tensor:
    """No layers, only a projection (tools/mtmd/models/gemma4uv.cpp, clip_graph_gemma4uv)."""
    raw, size = t.raw_input(), t.encoder.patch
    kernel = Tensor("none", F32, (size, size, 3, 1))
    seen = new("im2col", F32, (size * size * 3, t.picture.across, t.picture.down), kernel, raw)
    cur = t.norm("v.patch_norm.1", reshape(seen, seen.ne[0], t.patches), LAYER)
    cur = apply("add", mul_mat(t.need("v.patch_embd.weight"), cur), t.need("v.patch_embd.bias"))
    cur = t.norm("v.patch_norm.2", cur, LAYER)
    cur = t.norm("v.patch_norm.3", _looked_up(t, cur, (t.positions(), t.positions())), LAYER)
    return t.multiply("mm.input_projection.weight", apply(RMS, cur))


def _internvl(t: Tower) -> Tensor:
    """tools/mtmd/models/internvl.cpp, clip_graph_internvl."""
    one, scale = t.picture, t.encoder.merge
    inputs, first = t.patch_rows(), t.need("v.class_embd")
    inputs = ggml.concat(inputs, new("repeat", first.type, (first.ne[0], 1, one.count, 1), first), 1)
    norm = RMS if (t.embd, t.encoder.layers) == LARGE_INTERNVL else LAYER
    cur = t.transformer(inputs, t.patches + 1, norm, t.need("v.position_embd.weight"))
    cur = cont(view(cur, (t.embd, t.patches, one.count), (cur.nb[1], cur.nb[2])))
    cur = permute(reshape(cur, t.embd * scale, one.down // scale, one.across, one.count), 0, 2, 1, 3)
    cur = cont(cur, t.embd * scale * scale, one.down // scale, one.across // scale, one.count)
    cur = permute(cur, 0, 2, 1, 3)
    cur = cont(cur, cur.ne[0], cur.ne[1] * cur.ne[2], cur.ne[3])
    return t.mlp("mm.model.mlp.1", "mm.model.mlp.3", t.norm("mm.model.mlp.0", cur, LAYER))


def _llava(t: Tower) -> Tensor:
    """LLaVA and Granite (tools/mtmd/models/llava.cpp, clip_graph_llava)."""
    one, features = t.encoder, t.encoder.feature_layers
    if "mm.3.weight" in t.tensors or not one.layers:  # the projector of Yi
        raise GraphUnknownError(f"{one.name}: mm.3.weight")
    deepest = max(features, default=one.layers - 1)
    cur, first = t.patch_rows(), t.weight("v.class_embd")
    count = t.patches
    if first is not None:
        cur, count = ggml.concat(cur, first, 1), count + 1
    cur = apply("add", cur, ggml.get_rows(t.need("v.position_embd.weight"), ggml.graph_input(I32, count)))
    if "v.pre_ln.weight" in t.tensors:
        cur = t.norm("v.pre_ln", cur, LAYER)
    stack = []
    for layer in range(deepest):
        stack += [cur] if layer in features else []
        cur = _llava_layer(t, f"v.blk.{layer}", cur, count)
    if "v.post_ln.weight" in t.tensors:
        cur = t.norm("v.post_ln", cur, LAYER)
    stack += [cur] if deepest in features else []
    if stack:
        cur = stack[0]
        for more in stack[1:]:
            cur = ggml.concat(cur, more, 0)
    cur = ggml.get_rows(reshape(cur, cur.ne[0], cur.ne[1]), ggml.graph_input(I32, t.patches))
    cur = apply("unary", t.linear("mm.0", cur))
    return t.linear("mm.2", cur) if "mm.2.weight" in t.tensors else cur


def _llava_layer(t: Tower, name: str, inputs: Tensor, count: int) -> Tensor:
    one = t.encoder
    cur = t.norm(f"{name}.ln1", inputs, LAYER)
    q, k, v = (reshape(t.linear(f"{name}.attn_{letter}", cur), one.head, one.heads, count) for letter in "qkv")
    inputs = apply("add", t.attend(f"{name}.attn_out", q, k, v), inputs)
    return apply("add", inputs, t.feed_forward(name, t.norm(f"{name}.ln2", inputs, LAYER)))


def _kimivl(t: Tower) -> Tensor:
    """tools/mtmd/models/kimivl.cpp, clip_graph_kimivl."""
    places = (t.positions(), t.positions())
    learned = t.learned_positions()
    cur = t.transformer(t.patch_rows(), t.patches, LAYER, learned, rope_2d(places))
    scale = t.encoder.merge
    cur = t.merged(cur, scale)
    wide, rows = cur.ne[0], cur.ne[1]
    cur = view(cur, (t.embd, rows * scale * scale), (t.embd * 4,))
    cur = apply("add", apply("mul", apply(LAYER, cur), t.need("mm.input_norm.weight")), t.need("mm.input_norm.bias"))
    return t.mlp("mm.1", "mm.2", view(cur, (wide, rows), (wide * 4,)))


def _whisper(t: Tower) -> Tensor:
    """tools/mtmd/models/whisper-enc.cpp, clip_graph_whisper_enc."""
    cur = t.raw_input(1)
    for number, stride in (("1", 1), ("2", 2)):
        cur = conv_1d(t.need(f"a.conv1d.{number}.weight"), cur, stride)
        cur = apply("unary", apply("add", cur, t.need(f"a.conv1d.{number}.bias")))
    cur, count = cont(ggml.transpose(cur)), t.picture.across // 2
    table = t.need("a.position_embd.weight")
    cur = t.transformer(cur, count, LAYER, view(table, (table.ne[0], count), (table.nb[1],)))
    name = t.encoder.name
    if name in ("ultravox", "voxtral"):
        cur = _stacked(t, cur)
    if name == "qwen2a":
        return t.linear("mm.a.fc", cur)
    if name == "ultravox":
        cur = t.multiply("mm.a.mlp.1.weight", apply("mul", apply(RMS, cur), t.need("mm.a.norm_pre.weight")))
        cur = new("glu", F32, (cur.ne[0] // 2, *cur.ne[1:]), cur)
        return t.multiply("mm.a.mlp.2.weight", apply("mul", apply(RMS, cur), t.need("mm.a.norm_mid.weight")))
    return t.mlp("mm.a.mlp.1", "mm.a.mlp.2", cur)


def _stacked(t: Tower, cur: Tensor) -> Tensor:
    """Rows of several frames (build_stack)."""
    if t.encoder.stack <= 1:
        return cur
    wide = t.embd * t.encoder.stack
    total = ggml.elements(cur)
    if total % wide:
        cur = new("pad", F32, (-(-total // wide) * wide,), view(cur, (total,)))
    return view(cur, (wide, -(-total // wide)), (wide * 4,))


def _gemma4ua(t: Tower) -> Tensor:
    """tools/mtmd/models/gemma4ua.cpp, clip_graph_gemma4ua."""
    return t.multiply("mm.a.input_projection.weight", apply(RMS, cont(permute(t.raw_input(1), 1, 0, 2, 3))))


GRAPHS: dict[str, Callable[[Tower], Tensor]] = {
    **dict.fromkeys(("gemma3", "idefics3", "lfm2", "janus_pro", "phi4"), _siglip),
    **dict.fromkeys(("pixtral", "lightonocr"), _pixtral),
    **dict.fromkeys(("qwen2vl_merger", "qwen2.5vl_merger"), _qwen2vl),
    **dict.fromkeys(("glm4v", "glm5v"), _glm4v),
    **dict.fromkeys(("ultravox", "voxtral", "qwen2a", "musicflamingo"), _whisper),
    "qwen3vl_merger": _qwen3vl,
    "gemma4v": _gemma4v,
    "gemma4a": gemma4_audio,
    "gemma4uv": _gemma4uv,
    "gemma4ua": _gemma4ua,
    "internvl": _internvl,
    "mlp": _llava,
    "kimivl": _kimivl,
}
