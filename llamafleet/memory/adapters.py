"""LoRA adapters beside a model: which fit it, and their tensors among the model's.

llama.cpp loads each of an adapter's tensors into the buffer of the tensor that it changes, or into the host's where
that is repacked, and computes two more products for it (src/llama-adapter.cpp, llama_adapter_lora_init_impl;
src/llama-graph.cpp, build_lora_mm, build_lora_mm_id, build_inp_embd). So an adapter's tensors are placed with the
model's own: `merged` gives a header that has both.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from llamafleet.model.gguf import Header, Tensor
from llamafleet.model.shape import Shape

EMBEDDING = "token_embd.weight"
ADAPTER = re.compile(r"adapter-(\d+)")
_PAIR = re.compile(r"(.+)\.lora_([ab])")
_LAYER = re.compile(r"blk\.(\d+)\.(.*)")
_NOT_LOADED = "_norm.weight"  # ends names of tensors that llama.cpp leaves out


def adapters_of(companions: Mapping[str, Header]) -> dict[int, Header]:
    """The headers of the adapters among a model's companions, by their numbers, in order."""
    numbered = {int(match[1]): header for part, header in companions.items() if (match := ADAPTER.fullmatch(part))}
    return dict(sorted(numbered.items()))


def merged(header: Header, adapters: Mapping[int, Header]) -> Header:
    """The model's header with the tensors of all adapters, each pair named `TENSOR.lora_a.NUMBER` and `.lora_b.NUMBER`.

    `file_bytes` stay the model's.
    """
    more = (
        replace(tensor, name=f"{tensor.name}.{number}")
        for number, adapter in adapters.items()
        for tensor in adapter.tensors
        if _PAIR.fullmatch(tensor.name)
    )
    return replace(header, tensors=(*header.tensors, *more))


def unfit(header: Header, adapter: Header) -> str:
    """Why llama.cpp would not load the adapter beside the model; empty where it would."""
    return next(_problems(header, adapter), "")


def _problems(header: Header, adapter: Header) -> Iterator[str]:
    kind = str(adapter.metadata.get("general.type", ""))
    if kind != "adapter":
        yield f"it is no adapter: its general.type is {kind[:40]!r}"
        return
    form = str(adapter.metadata.get("adapter.type", ""))
    if form != "lora":
        yield f"llama.cpp loads adapters of type lora alone, this is {form[:40]!r}"
    if adapter.architecture != header.architecture:
        yield f"it was made for the architecture {adapter.architecture}, and {header.name} is {header.architecture}"
    loaded = _loaded(header)
    pairs: dict[str, dict[str, Tensor]] = {}
    for tensor in adapter.tensors:
        if match := _PAIR.fullmatch(tensor.name):
            pairs.setdefault(match[1], {})[match[2]] = tensor
        elif not tensor.name.endswith(_NOT_LOADED):
            yield f"its tensor {tensor.name} is none of a LoRA: llama.cpp refuses the file"
    if not pairs:
        yield "it changes no tensor"
    for name, pair in pairs.items():
        base = loaded.get(name)
        if len(pair) < 2:
            yield f"its tensor {name} lacks lora_{'b' if 'a' in pair else 'a'}"
        elif base is None:
            yield f"it changes {name}, which {header.name} does not have: it was made for another model"
        elif wrong := _misshapen(base, pair["a"], pair["b"]):
            yield f"its tensor {name} {wrong} {list(base.shape)} in {header.name}: it was made for another model"
        elif name == EMBEDDING and "output.weight" not in loaded:
            yield f"it changes {name}, which is also the output matrix of {header.name}: llama.cpp cannot compute that"


def _loaded(header: Header) -> dict[str, Tensor]:
    """The model's tensors that llama.cpp loads, by name: those of a draft head only where the architecture needs it."""
    shape = Shape.of(header)
    draft = shape.architecture.draft_parts
    return {
        tensor.name: tensor
        for tensor in header.tensors
        if not (match := _LAYER.fullmatch(tensor.name))
        or int(match[1]) < shape.trunk_layers
        or (draft and draft.fullmatch(match[2]))
    }


def _misshapen(base: Tensor, a: Tensor, b: Tensor) -> str:
    """How a pair's shapes do not fit the tensor that it changes, to go before that one's shape; empty where they do.

    Of the token embedding, rows of A are picked by token (llama_adapter_lora_init_impl).
    """
    if len(base.shape) < 2 or len(a.shape) < 2 or len(b.shape) < 2:
        return "is no matrix, as for"
    if base.name == EMBEDDING:
        fits = (base.shape[0], base.shape[1], a.shape[0]) == (b.shape[1], a.shape[1], b.shape[0])
    else:
        fits = (base.shape[0], base.shape[1], a.shape[1]) == (a.shape[0], b.shape[1], b.shape[0])
    experts = base.shape[2:] == a.shape[2:] == b.shape[2:]
    return "" if fits and experts else f"is for {_shape_for(base, a, b)}, and it is"


def _shape_for(base: Tensor, a: Tensor, b: Tensor) -> list[int]:
    columns, rows = (b.shape[1], a.shape[1]) if base.name == EMBEDDING else (a.shape[0], b.shape[1])
    return [columns, rows, *a.shape[2:]]
