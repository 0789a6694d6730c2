"""Upper bounds of what each GPU holds with `--split-mode tensor`, where each computes a part of every layer.

The rules are those of src/llama-model.cpp, llama_meta_device_get_split_state: matrices of attention and feed-forward
and the KV cache are cut between groups of heads, or blocks of columns; everything else is on every GPU. Where a cut is
not even, one GPU has more, and which one changes from layer to layer: the bound gives each GPU the most.

Decision 5: docs/decisions/0005-known-or-bound-never-guessed.md.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping

from llamafleet.host.backends import TRAITS
from llamafleet.memory.context import Context
from llamafleet.memory.kv_cache import BLOCKS
from llamafleet.memory.ledger import Usage, usage
from llamafleet.memory.placement import Placement, Segment
from llamafleet.memory.weights import LAYER, Model
from llamafleet.model.architecture import Cache
from llamafleet.model.gguf import Tensor
from llamafleet.model.shape import Shape

# Architectures for which llama.cpp has no such split (src/llama-arch.cpp, llm_arch_supports_sm_tensor).
UNSUPPORTED = frozenset({
    "grok", "mpt", "plamo2", "minicpm3", "gemma3n", "mamba", "mamba2", "jamba", "falcon-h1", "olmo2", "olmoe",
    "deepseek2", "deepseek32", "hy_v4", "dots3note", "glm-dsa", "bitnet", "t5", "nemotron_h", "nemotron_h_moe",
    "granitehybrid", "minimax-01", "minimax-m2", "minimax-m3", "mistral4", "kimi-linear", "bailingmoe3", "kimi-k3",
    "glm5-next", "qwen3tts",
})  # fmt: skip
# With how many GPUs at most llama-server was seen to load a small model of the architecture (b11434). Of others it ends
# with an assertion while it loads, or they were not tried.
_WITH_TWO = frozenset({"command-r", "gemma4", "qwen35", "qwen35moe", "qwen4exp", "stablelm"})
_WITH_THREE = frozenset({
    "afmoe", "apertus", "arcee", "arctic", "bailingmoe2", "cohere2", "cohere2moe", "dbrx", "deepseek", "deepseek4",
    "dots1", "ernie4_5", "ernie4_5-moe", "exaone-moe", "exaone4", "falcon", "gemma", "gemma2", "gemma3", "gpt-oss",
    "granite", "granitemoe", "grovemoe", "hunyuan-dense", "hunyuan-moe", "hunyuan_vl", "hy_v3", "internlm2",
    "laguna", "lfm2", "lfm2moe", "llada-moe", "llama", "mimo2", "mistral3", "nemotron", "paddleocr", "phi2",
    "phimoe", "qwen2", "qwen2moe", "qwen2vl", "qwen3", "qwen3moe", "seed_oss", "smallthinker", "smollm3",
    "starcoder2",
})  # fmt: skip
LOADED: Mapping[str, int] = {**dict.fromkeys(_WITH_TWO, 2), **dict.fromkeys(_WITH_THREE, 3)}
_ATTENTION = re.compile(r"attn_(q|k|v|qkv|output|gate)\.weight")
_RECURRENT = re.compile(r"(attn_qkv|attn_gate|ssm_out)\.weight")
_FEED_FORWARD = re.compile(r"ffn_(up|gate|gate_up|down)(_exps)?\.weight")
COLUMNS = 128  # blocks of columns are multiples of this (get_split_granularity)
F32 = 4
# Of a GPU, for NCCL's channels and buffers: assumed, not measured.
REDUCTION_BYTES = 256 * 1024**2


def split(
    model: Model, context: Context, count: int, backend: str, host_extra_bytes: int, repacked: Mapping[str, int]
) -> tuple[Usage, Usage]:
    """Bytes on each of `count` GPUs, at most, and on the host. The other arguments are those of `ledger.usage`."""
    layers = model.layers
    whole = Placement((Segment(0, 0, layers, layers),))
    devices, host = usage(model, context, whole, backend, host_extra_bytes, repacked)
    reduced = count * context.batch_tokens * model.shape.embedding * F32  # of tensors that are added up
    extra = REDUCTION_BYTES if TRAITS[backend].overhead_bytes else 0
    return Usage(
        math.ceil(weights_bytes(model, count)), math.ceil(cache_bytes(model, context, count)),
        devices[0].compute_bytes + reduced, 0, devices[0].overhead_bytes + extra,
    ), host  # fmt: skip


def weights_bytes(model: Model, count: int) -> float:
    """Bytes of weights on each of `count` GPUs, at most."""
    inside: dict[int, dict[str, Tensor]] = {layer: {} for layer in range(model.shape.trunk_layers)}
    output = 0
    for tensor in model.header.tensors:
        match = LAYER.fullmatch(tensor.name)
        if match and int(match[1]) in inside:
            inside[int(match[1])][match[2]] = tensor
        elif tensor.name == "output.weight":
            output = tensor.bytes
    saved = output * (1 - share(model.shape.vocabulary, 1, count))
    for layer, parts in inside.items():
        saved += sum(tensor.bytes * (1 - _share(model.shape, layer, name, parts, count))
                     for name, tensor in parts.items())  # fmt: skip
    return sum(model.layer_bytes) + model.output_bytes + model.rope_factor_bytes - saved


def cache_bytes(model: Model, context: Context, count: int) -> float:
    """Bytes of the KV cache on each of `count` GPUs, at most; what is not cut by heads is there whole."""
    shape = model.shape
    uncut = shape.cache is not Cache.ORDINARY
    parts = {layer: set[str]() for layer in range(shape.layers)}
    for tensor in model.header.tensors:
        if (match := LAYER.fullmatch(tensor.name)) and int(match[1]) in parts:
            parts[int(match[1])].add(match[2])
    total = 0.0
    for layer, size in enumerate(model.compute.kv_bytes(context)):
        whole = uncut or shape.state.layers[layer] or shape.indexer.layers[layer]
        types = _types(model, layer) if "attn_output.weight" in parts[layer] else ()
        total += size * (1.0 if whole or not types else _by_heads(shape, layer, types, count))
    return total


def _types(model: Model, layer: int) -> tuple[str, ...]:
    """The type of the layer's attention output, whose blocks a cut respects."""
    name = f"blk.{layer}.attn_output.weight"
    return tuple(tensor.type for tensor in model.header.tensors if tensor.name == name)


def _share(shape: Shape, layer: int, name: str, parts: Mapping[str, Tensor], count: int) -> float:
    """The part of a layer's tensor that one GPU has, at most."""
    if _FEED_FORWARD.fullmatch(name):
        downs = [parts[one] for one in ("ffn_down.weight", "ffn_down_exps.weight") if one in parts]
        own = parts.get("ffn_down_exps.weight" if "_exps" in name else "ffn_down.weight")
        return share(own.shape[0], math.lcm(_block(downs[0].type), COLUMNS), count) if own else 1.0
    if shape.state.layers[layer]:
        out = parts.get("ssm_out.weight")
        if out is None or not _RECURRENT.fullmatch(name) or not shape.state.size:
            return 1.0
        keys = shape.state.size * shape.state.groups
        return share(keys, math.lcm(_block(out.type), COLUMNS, shape.state.size), count)
    if _ATTENTION.fullmatch(name) and "attn_output.weight" in parts:
        return _by_heads(shape, layer, (parts["attn_output.weight"].type,), count)
    return 1.0


def _by_heads(shape: Shape, layer: int, types: Collection[str], count: int) -> float:
    """The part of the heads that one GPU has, at most. `types`: of the attention's output."""
    heads, kv_heads = shape.heads[layer], shape.kv_heads[layer]
    size = shape.head_sizes(shape.windows[layer] > 0)[0]
    if not heads or not kv_heads or not size:
        return 1.0
    group = heads // kv_heads * size
    block = max(_block(kind) for kind in types)
    while block < COLUMNS and block * count < group:
        block *= 2
    return share(heads * size, math.lcm(group, block), count)


def share(elements: int, granularity: int, count: int) -> float:
    """The largest of `count` parts of so many elements, which are cut evenly and then down to the granularity."""
    cuts = [elements * number // count // granularity * granularity for number in range(count)]
    ends = [*cuts[1:], elements]
    return max(end - start for start, end in zip(cuts, ends, strict=True)) / elements if elements else 1.0


def _block(kind: str) -> int:
    return BLOCKS[kind.lower()][0]
