"""Which models can be guessed for, and by what: the rules by which llama-server takes a draft or a head, from headers.

common/speculative.cpp at b11434, common_speculative_are_compatible, and what src/models/*.cpp of the target must have.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from llamafleet.model.gguf import Header
from llamafleet.model.gguf_cursor import FIRST_SUMMED, SUMS, LongArray
from llamafleet.model.keys import Keys
from llamafleet.model.shape import Shape

MTP, DRAFT, EAGLE3, DFLASH, DSPARK = "mtp", "draft", "eagle3", "dflash", "dspark"
# src/models/*.cpp with a graph_mtp: the others skip a head that their file has.
WITH_HEAD = frozenset({
    "bailingmoe3", "cohere2moe", "deepseek2", "deepseek32", "deepseek4", "glm-dsa", "glm4moe", "glm5-next", "hy_v3",
    "mimo2", "nemotron_h_moe", "qwen35", "qwen35moe", "qwen3next", "qwen4exp", "step35",
})  # fmt: skip
# src/models/*.cpp that set t_layer_inp, the hidden states between their layers, which these drafts read; others would
# end the server at its first request (llm_graph_result::set_outputs).
WITH_HIDDEN_STATES = frozenset({
    "bailingmoe3", "deepseek4", "gemma4", "gpt-oss", "hunyuan-dense", "hunyuan_vl", "lfm2", "lfm2moe", "llama",
    "llama-embed", "mimo2", "minimax-01", "minimax-m2", "muse-glimmer", "nanbeige", "nemotron_h", "nemotron_h_moe",
    "qwen3", "qwen35", "qwen35moe", "qwen3moe", "qwen3next", "qwen4exp",
})  # fmt: skip
# Recurrent states of these can be taken back by some tokens (src/llama-arch.cpp, llm_arch_supports_rs_rollback).
WITH_ROLLBACK = frozenset({
    "bailingmoe3", "deepseek4", "glm5-next", "kimi-k3", "lfm2", "lfm2moe", "nemotron_h", "nemotron_h_moe", "qwen35",
    "qwen35moe", "qwen4exp",
})  # fmt: skip
READERS = (EAGLE3, DFLASH, DSPARK)  # drafts that read the target's hidden states
MARKOV_HEAD = "markov_w1.weight"  # a DFlash file with it is DSpark's (common_speculative_types_from_gguf)
EAGLE3_LAYERS = 3
# Tokenizers of one type (src/llama-vocab.cpp, llama_vocab::impl::load).
_TYPES = {"hybriddna": "gpt2", "whitespace": "gpt2", "gemma4": "gpt2", "no_vocab": "none"}


def unfit(kind: str, target: Header, draft: Header | None) -> Iterator[str]:
    """Why llama-server would not guess for this model in this way, a sentence each. `kind`: a value of the setting
    `speculation`; `draft`: the header of the file that it names."""
    if kind == MTP:
        yield from _without_head(target)
    elif draft is not None and kind == DRAFT:
        yield from _no_draft(target, draft)
    elif draft is not None and kind in READERS:
        yield from _no_reader(kind, target, draft)


def target_layers(draft: Header) -> tuple[int, ...]:
    """The layers of the target whose hidden states the draft reads."""
    layers = draft.get("target_layers")
    return tuple(int(one) for one in layers if isinstance(one, int)) if isinstance(layers, tuple) else ()


def shares_output(draft: Header) -> bool:
    """Does the draft read the output matrix of its target, since it has none of its own?

    llama.cpp can compute with it only on the device that holds it (src/models/dflash.cpp, load_arch_tensors).
    """
    names = {tensor.name for tensor in draft.tensors}
    tied = draft.architecture == DFLASH and "token_embd.weight" in names
    return "output.weight" not in names and not tied


def _without_head(target: Header) -> Iterator[str]:
    shape = Shape.of(target)
    head = f"blk.{shape.trunk_layers}.nextn.eh_proj.weight"
    if target.architecture not in WITH_HEAD:
        yield (
            f'speculation = "mtp": llama.cpp has no draft head (MTP) for the architecture {target.architecture}: set '
            'speculation to "ngram", or to "draft" with a small model of the same vocabulary'
        )
    elif shape.layers == shape.trunk_layers or all(tensor.name != head for tensor in target.tensors):
        yield (
            f'speculation = "mtp": {target.name} has no draft head in its file (no tensor {head}): choose a file that '
            "was converted with it (often named MTP)"
        )


def _no_draft(target: Header, draft: Header) -> Iterator[str]:
    own_kind = {EAGLE3: EAGLE3, DFLASH: _dflash_kind(draft)}.get(draft.architecture)
    if own_kind:
        yield f'draft: {draft.name} is made for another kind of speculation: set speculation = "{own_kind}"'
        return
    if Shape.of(draft).layers < 1 or draft.architecture == "clip":
        yield f"draft: {draft.name} ({draft.architecture}) is no language model"
        return
    if why := vocabularies_differ(target, draft):
        yield f"draft: {draft.name} has another vocabulary than {target.name}: {why}"


def _dflash_kind(draft: Header) -> str:
    return DSPARK if any(tensor.name == MARKOV_HEAD for tensor in draft.tensors) else DFLASH


def _no_reader(kind: str, target: Header, draft: Header) -> Iterator[str]:
    name = {EAGLE3: "EAGLE-3", DFLASH: "DFlash", DSPARK: "DSpark"}[kind]
    wanted = EAGLE3 if kind == EAGLE3 else DFLASH
    if draft.architecture != wanted:
        yield (
            f"draft: {draft.name} ({draft.architecture}) is no {name} draft (architecture {wanted}): set speculation = "
            '"draft" for a small model of its own'
        )
        return
    if kind != EAGLE3 and _dflash_kind(draft) != kind:
        yield f'draft: {draft.name} is a draft of {_dflash_kind(draft)}: set speculation = "{_dflash_kind(draft)}"'
        return
    if target.architecture not in WITH_HIDDEN_STATES:
        yield (
            f"llama.cpp gives the hidden states that {name} reads for other architectures, not for "
            f"{target.architecture}"
        )
        return
    shape, layers = Shape.of(target), target_layers(draft)
    width = Keys(draft).number("target_hidden_size") if kind == EAGLE3 else Shape.of(draft).embedding
    if width != shape.embedding:
        yield (
            f"draft: {draft.name} was made for a model with hidden states of {width} elements, {target.name} has "
            f"{shape.embedding}"
        )
    last = shape.trunk_layers if kind == EAGLE3 else shape.trunk_layers - 1
    if not layers or (kind == EAGLE3 and len(layers) != EAGLE3_LAYERS) or max(layers) > last or min(layers) < 0:
        yield (
            f"draft: {draft.name} reads the layers {list(layers)} of a model (target_layers), {target.name} has the "
            f"layers 0 to {last}"
        )
    sizes = [Shape.of(header).vocabulary for header in (target, draft)]
    if sizes[0] != sizes[1]:
        yield f"draft: {draft.name} was made for a vocabulary of {sizes[1]} tokens, {target.name} has {sizes[0]}"


def vocabularies_differ(target: Header, draft: Header) -> str:
    """By which rule of common_speculative_are_compatible two vocabularies differ; empty where they agree, or where the
    headers do not tell."""
    kinds = [_type(header) for header in (target, draft)]
    if kinds[0] != kinds[1]:
        return f"its tokenizer is of the type {kinds[1]}, should be {kinds[0]}"
    for mark in ("bos", "eos"):
        adds = [header.metadata.get(f"tokenizer.ggml.add_{mark}_token") for header in (target, draft)]
        if None not in adds and adds[0] != adds[1]:
            return f"its tokenizer.ggml.add_{mark}_token is {adds[1]}, should be {adds[0]}"
        numbers = [header.metadata.get(f"tokenizer.ggml.{mark}_token_id") for header in (target, draft)]
        if all(adds) and None not in numbers and numbers[0] != numbers[1]:
            return f"its tokenizer.ggml.{mark}_token_id is {numbers[1]}, should be {numbers[0]}"
    tokens = [header.metadata.get("tokenizer.ggml.tokens") for header in (target, draft)]
    sizes = [one.length if isinstance(one, LongArray) else len(one) if isinstance(one, tuple) else 0 for one in tokens]
    if abs(sizes[0] - sizes[1]) > SUMS:  # SPEC_VOCAB_MAX_SIZE_DIFFERENCE
        return f"it has {sizes[1]} tokens, should have {sizes[0]}, or at most {SUMS} more or less"
    first, second = (_beginning(one, min(sizes)) for one in tokens)
    return "tokens of the same number have other texts" if first and second and first != second else ""


def _type(header: Header) -> str:
    model = str(header.metadata.get("tokenizer.ggml.model", "none"))
    return _TYPES.get(model, model)


def _beginning(tokens: object, count: int) -> str | None:
    """A sum of the first `count` tokens; None where it is not known."""
    if isinstance(tokens, LongArray):
        return tokens.sums.get(count)
    if not isinstance(tokens, tuple):
        return None
    texts = [str(token).encode() for token in tokens[FIRST_SUMMED:count]]
    return hashlib.sha256(b"".join(len(text).to_bytes(8, "little") + text for text in texts)).hexdigest()
