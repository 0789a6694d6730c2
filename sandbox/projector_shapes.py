"""Names and shapes of a projector's tensors, row length first.

They are those that llama.cpp's conversion scripts write (gguf-py/gguf/constants.py; conversion/*.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from sandbox.projector_layouts import ProjectorLayout

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def shapes(layout: ProjectorLayout) -> Shapes:
    """All tensors in file order."""
    yield from _inputs(layout)
    yield from _layers(layout)
    yield from _outputs(layout)


def _both(name: str, shape: tuple[int, ...]) -> Shapes:
    """A weight and its bias."""
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[-1:]


def _inputs(one: ProjectorLayout) -> Shapes:
    if one.kind == "gemma4uv":
        row = 3 * (one.patch * one.merge) ** 2
        yield from _both("v.patch_embd", (row, one.embd))
        yield from _both("v.patch_norm.1", (row,))
        yield from _both("v.patch_norm.2", (one.embd,))
        yield from _both("v.patch_norm.3", (one.embd,))
        yield "v.position_embd.weight", (one.embd, 1120, 2)
    elif one.kind == "gemma4a":
        for number, (channels, out) in enumerate(((1, 128), (128, 32))):
            yield f"a.conv1d.{number}.weight", (3, 3, channels, out)
            yield f"a.conv1d.{number}.norm.weight", (out,)
        yield "a.input_projection.weight", (32 * one.mel_bins // 4, one.embd)
    elif one.mel_bins:
        yield from _conv_1d("a.conv1d.1", one.mel_bins, one.embd)
        yield from _conv_1d("a.conv1d.2", one.embd, one.embd)
        yield "a.position_embd.weight", (one.embd, 1500)
        yield from _both("a.post_ln", (one.embd,))
    else:
        yield from _of_pictures(one)


def _of_pictures(one: ProjectorLayout) -> Shapes:
    side, places = one.image // one.patch, "v.position_embd.weight"
    parts: dict[str, tuple[int, ...]] = {
        "v.patch_embd.weight": (one.patch, one.patch, 3, one.embd),
        "v.patch_embd.weight.1": (one.patch, one.patch, 3, one.embd),
        "v.patch_embd.bias": (one.embd,),
        "v.class_embd": (one.embd,),
        "v.norm_embd.weight": (one.embd,),
        places: {"gemma4v": (one.embd, 10240, 2), "internvl": (one.embd, side * side + 1),
                 "mlp": (one.embd, side * side + 1)}.get(one.kind, (one.embd, side * side)),
        **{f"v.{norm}.{part}": (one.embd,) for norm in ("pre_ln", "post_ln") for part in ("weight", "bias")},
    }  # fmt: skip
    yield "v.patch_embd.weight", parts["v.patch_embd.weight"]
    for name in _INPUTS[one.kind]:
        yield name, parts[name]


# What is before the layers, by kind, beside the first convolution.
_TWO_FRAMES, _PLACES = "v.patch_embd.weight.1", "v.position_embd.weight"
_POST_LN = ("v.post_ln.weight", "v.post_ln.bias")
_INPUTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("gemma3", "idefics3", "kimivl", "lfm2", "janus_pro", "phi4"), ("v.patch_embd.bias", _PLACES, *_POST_LN)
    ),
    "qwen2vl_merger": (_TWO_FRAMES, *_POST_LN),
    "qwen2.5vl_merger": (_TWO_FRAMES, "v.post_ln.weight"),
    "qwen3vl_merger": (_TWO_FRAMES, "v.patch_embd.bias", _PLACES, *_POST_LN),
    "glm5v": (_TWO_FRAMES, "v.patch_embd.bias", _PLACES, "v.post_ln.weight"),
    "glm4v": (_TWO_FRAMES, "v.patch_embd.bias", _PLACES, "v.norm_embd.weight", "v.post_ln.weight"),
    "gemma4v": (_PLACES,),
    "internvl": ("v.class_embd", _PLACES, "v.patch_embd.bias"),
    "mlp": ("v.class_embd", _PLACES, "v.pre_ln.weight", "v.pre_ln.bias"),
    **dict.fromkeys(("pixtral", "lightonocr"), ("v.pre_ln.weight",)),
}


def _conv_1d(name: str, channels: int, out: int) -> Shapes:
    yield f"{name}.weight", (3, channels, out)
    yield f"{name}.bias", (1, out)


def _conformer(one: ProjectorLayout) -> Shapes:
    """The layers of Gemma 4's encoder of sound."""
    for layer in range(one.blocks):
        name = f"a.blk.{layer}"
        for norm in ("ffn_norm", "ffn_norm_1", "ffn_post_norm", "ffn_post_norm_1", "attn_pre_norm", "attn_post_norm",
                     "conv_norm", "norm_conv", "ln2"):  # fmt: skip
            yield f"{name}.{norm}.weight", (one.embd,)
        for which in ("", "_1"):
            yield f"{name}.ffn_up{which}.weight", (one.embd, one.ff)
            yield f"{name}.ffn_down{which}.weight", (one.ff, one.embd)
        for part in ("attn_q", "attn_k", "attn_v", "attn_out", "attn_k_rel"):
            yield f"{name}.{part}.weight", (one.embd, one.embd)
        yield f"{name}.per_dim_scale.weight", (one.embd // one.heads,)
        yield f"{name}.conv_pw1.weight", (one.embd, 2 * one.embd)
        yield f"{name}.conv_dw.weight", (5, one.embd)
        yield f"{name}.conv_pw2.weight", (one.embd, one.embd)


def _layers(one: ProjectorLayout) -> Shapes:
    if one.kind == "gemma4a":
        yield from _conformer(one)
        return
    has_biases = one.kind not in ("pixtral", "lightonocr", "gemma4v", "glm4v", "glm5v")
    inner = one.heads * (one.head_dim or one.embd // one.heads)
    for layer in range(one.blocks):
        name = f"{one.prefix}.blk.{layer}"

        def part(suffix: str, shape: tuple[int, ...], biased: bool = has_biases, name: str = name) -> Shapes:
            yield f"{name}.{suffix}.weight", shape
            if biased:
                yield f"{name}.{suffix}.bias", shape[-1:]

        if one.kind in ("qwen3vl_merger", "glm4v", "glm5v"):
            yield from part("attn_qkv", (one.embd, 3 * inner))
        else:
            yield from part("attn_q", (one.embd, inner))
            yield from part("attn_k", (one.embd, inner), has_biases and not one.mel_bins)
            yield from part("attn_v", (one.embd, inner))
        yield from part("attn_out", (inner, one.embd))
        plain_norm = has_biases and one.kind != "qwen2.5vl_merger"
        for norm in ("ln1", "ln2"):
            yield from part(norm, (one.embd,), plain_norm)
        if one.kind == "gemma4v":
            head = inner // one.heads
            for norm, size in (("attn_q_norm", head), ("attn_k_norm", head), ("attn_post_norm", one.embd),
                               ("ffn_post_norm", one.embd)):  # fmt: skip
                yield from part(norm, (size,))
        if one.kind == "internvl":
            yield f"{name}.ls1.weight", (one.embd,)
            yield f"{name}.ls2.weight", (one.embd,)
        if one.kind in ("qwen2.5vl_merger", "pixtral", "lightonocr", "gemma4v", "glm4v", "glm5v"):
            yield from part("ffn_gate", (one.embd, one.ff))
        yield from part("ffn_up", (one.embd, one.ff))
        yield from part("ffn_down", (one.ff, one.embd))


def _outputs(one: ProjectorLayout) -> Shapes:
    return _OUTPUTS[one.kind](one, one.embd * one.merge**2)


def _of_gemma3(one: ProjectorLayout, squared: int) -> Shapes:
    yield "mm.soft_emb_norm.weight", (one.embd,)
    yield "mm.input_projection.weight", (one.width, one.embd)


def _of_gemma4(one: ProjectorLayout, squared: int) -> Shapes:
    if "standardized" in one.options:
        yield "v.std_bias", (one.embd,)
        yield "v.std_scale", (one.embd,)
    yield "mm.input_projection.weight", (one.embd, one.width)


def _of_qwen(one: ProjectorLayout, squared: int) -> Shapes:
    yield from _both("mm.0", (squared, squared))
    yield from _both("mm.2", (squared, one.width))
    for layer in one.deepstack:
        yield from _both(f"v.deepstack.{layer}.norm", (squared,))
        yield from _both(f"v.deepstack.{layer}.fc1", (squared, squared))
        yield from _both(f"v.deepstack.{layer}.fc2", (squared, one.width))


def _of_pixtral(one: ProjectorLayout, squared: int) -> Shapes:
    if one.merge > 1:
        yield "mm.input_norm.weight", (one.embd,)
        yield "mm.patch_merger.weight", (squared, one.embd)
    for name, shape in (("mm.1", (one.embd, one.width)), ("mm.2", (one.width, one.width))):
        yield from _both(name, shape) if one.merge == 1 else [(f"{name}.weight", shape)]
    if one.kind == "pixtral":
        yield "v.token_embd.img_break", (one.width,)


def _of_internvl(one: ProjectorLayout, squared: int) -> Shapes:
    yield from _both("mm.model.mlp.0", (squared,))
    yield from _both("mm.model.mlp.1", (squared, one.width))
    yield from _both("mm.model.mlp.3", (one.width, one.width))


def _of_llava(one: ProjectorLayout, squared: int) -> Shapes:
    yield from _both("mm.0", (one.embd, one.width))
    yield from _both("mm.2", (one.width, one.width))


def _of_idefics3(one: ProjectorLayout, squared: int) -> Shapes:
    yield "mm.model.fc.weight", (squared, one.width)


def _of_kimi(one: ProjectorLayout, squared: int) -> Shapes:
    yield from _both("mm.input_norm", (one.embd,))
    yield from _both("mm.1", (squared, squared))
    yield from _both("mm.2", (squared, one.width))


def _of_glm(one: ProjectorLayout, squared: int) -> Shapes:
    yield from _both("mm.patch_merger", (one.merge, one.merge, one.embd, one.width))
    yield "mm.model.fc.weight", (one.width, one.width)
    yield from _both("mm.post_norm", (one.width,))
    yield "mm.up.weight", (one.width, 13696)
    yield "mm.gate.weight", (one.width, 13696)
    yield "mm.down.weight", (13696, one.width)


def _of_lfm2(one: ProjectorLayout, squared: int) -> Shapes:
    yield from _both("mm.input_norm", (squared,))
    yield from _both("mm.1", (squared, 2560))
    yield from _both("mm.2", (2560, one.width))


def _of_janus(one: ProjectorLayout, squared: int) -> Shapes:
    yield from _both("mm.0", (one.embd, one.width))
    yield from _both("mm.1", (one.width, one.width))


def _of_ultravox(one: ProjectorLayout, squared: int) -> Shapes:
    yield "mm.a.norm_pre.weight", (one.embd * 8,)
    yield "mm.a.mlp.1.weight", (one.embd * 8, 2 * one.width)
    yield "mm.a.norm_mid.weight", (one.width,)
    yield "mm.a.mlp.2.weight", (one.width, one.width)


def _of_flamingo(one: ProjectorLayout, squared: int) -> Shapes:
    yield from _both("mm.a.mlp.1", (one.embd, one.width))
    yield from _both("mm.a.mlp.2", (one.width, one.width))


def _of_voxtral(one: ProjectorLayout, squared: int) -> Shapes:
    yield "mm.a.mlp.1.weight", (one.embd * 4, one.width)
    yield "mm.a.mlp.2.weight", (one.width, one.width)


def _of_gemma4_audio(one: ProjectorLayout, squared: int) -> Shapes:
    yield from _both("a.pre_encode.out", (one.embd, 1536))
    yield "mm.a.input_projection.weight", (1536, one.width)


def _of_qwen_audio(one: ProjectorLayout, squared: int) -> Shapes:
    yield from _both("mm.a.fc", (one.embd, one.width))


# What is behind the layers, by kind; the second argument is the length of a row of merged patches.
_OUTPUTS: dict[str, Callable[[ProjectorLayout, int], Shapes]] = {
    **dict.fromkeys(("qwen2vl_merger", "qwen2.5vl_merger", "qwen3vl_merger"), _of_qwen),
    "gemma3": _of_gemma3, "gemma4v": _of_gemma4, "pixtral": _of_pixtral, "internvl": _of_internvl, "mlp": _of_llava,
    "idefics3": _of_idefics3, "kimivl": _of_kimi, "glm4v": _of_glm, "voxtral": _of_voxtral, "qwen2a": _of_qwen_audio,
    "gemma4a": _of_gemma4_audio, "gemma4uv": _of_gemma4, "lightonocr": _of_pixtral, "glm5v": _of_glm, "lfm2": _of_lfm2,
    "janus_pro": _of_janus, "phi4": _of_llava, "ultravox": _of_ultravox, "musicflamingo": _of_flamingo,
}  # fmt: skip
