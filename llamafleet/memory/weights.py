"""Bytes of a model's weights, in groups that are placed on a device together.

The device of each layer: src/llama-model.cpp, load_tensors; tensors of input, output and layers:
src/llama-arch.cpp, LLM_TENSOR_INFOS; tensors that the CPU backend repacks: ggml/src/ggml-cpu/repack.cpp,
ggml_repack_get_optimal_repack_type, extra_buffer_type.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from llamafleet.memory.compute import Compute
from llamafleet.memory.graph.layers import FIRST_LAYER, INPUTS
from llamafleet.model.gguf import Header, Tensor
from llamafleet.model.shape import DENSE, EXPERTS, Shape

LAYER_INPUTS = "per_layer_token_embd.weight"
MAPPED_ABOVE_BYTES = 4 * 1024**3
LAYER = re.compile(r"blk\.(\d+)\.(.*)")
# Each device that has layers gets a copy (src/llama-model.cpp, TENSOR_DUPLICATED).
_ROPE_FACTORS = re.compile(r"rope_(freqs|factors_long|factors_short)\.weight")

# Types that the CPU backend repacks, with the number that must divide a tensor's rows; by CPU features.
X86_TYPES = {"Q4_0": 8, "Q4_K": 8, "IQ4_NL": 8, "MXFP4": 8}  # AVX2
AVX512_TYPES = {"Q2_K": 8}
ARM_TYPES = {"Q4_0": 4, "Q4_K": 8, "Q5_K": 8, "Q6_K": 8, "IQ4_NL": 4, "MXFP4": 4, "Q8_0": 4, "Q1_0": 4}  # dot products
_ALIGNMENT_BYTES = 32  # of tensors in a CPU buffer (ggml/src/ggml-impl.h, TENSOR_ALIGNMENT)


def repacked_types(cpu_flags: Collection[str]) -> Mapping[str, int]:
    """Types that llama.cpp built for this CPU repacks, each with the number that must divide a tensor's rows."""
    if "asimddp" in cpu_flags or "asimdhp" in cpu_flags:
        return ARM_TYPES if "asimddp" in cpu_flags else {}
    wide = AVX512_TYPES if "avx512f" in cpu_flags else {}
    return {**X86_TYPES, **wide} if "avx2" in cpu_flags else {}


@dataclass(frozen=True)
class Model:
    """Weight bytes of a model, in groups. Of a draft head (nextn) only the tensors that llama.cpp loads count.

    A `..._repackable` mapping has bytes by `repack_key`.
    """

    header: Header
    layer_bytes: tuple[int, ...]  # all weights of each layer
    spill_bytes: tuple[int, ...]  # weights of each layer that may be on the host alone: experts (FFN)
    layer_repackable: tuple[Mapping[str, int], ...]  # of the weights in `layer_bytes`
    spill_repackable: tuple[Mapping[str, int], ...]  # of the weights in `spill_bytes`
    input_bytes: int  # token embedding and other input tensors: always on the host
    mapped_bytes: int  # further input tensors, which llama.cpp maps from the file where it can (see `is_mapped`)
    output_bytes: int  # output matrix and norm
    output_repackable: Mapping[str, int]
    tied: Tensor | None  # the token embedding, where it is also the output matrix and is loaded twice
    rope_factor_bytes: int  # RoPE factors: each device has a copy
    is_moe: bool
    down_bytes: tuple[int, ...]  # down projections among the weights in `spill_bytes`
    down_repackable: tuple[Mapping[str, int], ...]
    compute: Compute = field(compare=False, repr=False)

    @property
    def shape(self) -> Shape:
        """The model's dimensions."""
        return self.compute.shape

    @cached_property
    def operations(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Operations of each layer for one token, two for each weight: of fixed weights, and of experts (FFN)."""
        spilled = EXPERTS if self.is_moe else DENSE
        fixed, spill = [0.0] * self.layers, [0.0] * self.layers
        for tensor in self.header.tensors:
            match = LAYER.fullmatch(tensor.name)
            if match and int(match[1]) < self.layers:
                (spill if spilled.fullmatch(match[2]) else fixed)[int(match[1])] += 2.0 * tensor.elements
        return tuple(fixed), tuple(spill)

    @cached_property
    def elements(self) -> Mapping[str, int]:
        """Elements of all layers' tensors, by their type."""
        counted: Counter[str] = Counter()
        for tensor in self.header.tensors:
            if LAYER.fullmatch(tensor.name):
                counted[tensor.type] += tensor.elements
        return counted

    def moved_bytes(self, layer: int, part: str | None) -> int:
        """Bytes of a layer's experts (FFN) on the host: of "all", "down", or "up" and gate; 0 for None."""
        if part is None:
            return 0
        down = self.down_bytes[layer]
        return {"all": self.spill_bytes[layer], "down": down, "up": self.spill_bytes[layer] - down}[part]

    def moved_repackable(self, layer: int, part: str | None) -> Mapping[str, int]:
        """The bytes of `moved_bytes` that can be repacked, by `repack_key`."""
        if part is None:
            return {}
        whole, down = self.spill_repackable[layer], self.down_repackable[layer]
        if part == "up":
            return {key: size - down.get(key, 0) for key, size in whole.items()}
        return down if part == "down" else whole

    def part_bytes(self, layer: int, part: str) -> int:
        """Bytes of a part of a layer's experts (FFN): "down", or "up" for up and gate, which are moved together."""
        return self.moved_bytes(layer, part)

    @property
    def tied_bytes(self) -> int:
        """Bytes of the tied embedding in `output_bytes`; 0 if the model has an output matrix."""
        return self.tied.bytes if self.tied else 0

    @property
    def tied_repackable(self) -> Mapping[str, int]:
        """Bytes of the tied embedding by `repack_key`; empty if the model has an output matrix."""
        return _repackable([self.tied]) if self.tied else {}

    @property
    def tied_is_shared(self) -> bool:
        """Does an x86 host hold the tied embedding once, not twice?"""
        return self.shares_tied(X86_TYPES)

    def shares_tied(self, types: Mapping[str, int]) -> bool:
        """Does a host that repacks these types hold a tied embedding once? Repacking it makes a second copy."""
        return not self.shape.architecture.embedding_held_twice and not repacked_bytes(self.tied_repackable, types)

    @property
    def layers(self) -> int:
        """Number of layers (blk.*), without the output."""
        return len(self.layer_bytes)

    @classmethod
    def of(cls, header: Header, *, head: bool = False) -> Model:
        """The weight groups of a header, grouped once for as long as `Compute.of` knows it. `head`: all tensors of its
        draft head (nextn) are loaded (load_mtp)."""
        compute = Compute.of(header)
        if head not in compute.models:
            compute.models[head] = cls._of(compute, header, head)
        model: Model = compute.models[head]
        return model

    @classmethod
    def _of(cls, compute: Compute, header: Header, head: bool) -> Model:
        shape, row = compute.shape, compute.shape.architecture
        layers, trunk, draft = shape.layers, shape.trunk_layers, row.draft_parts
        inside: list[list[tuple[str, Tensor]]] = [[] for _ in range(layers)]
        outside: list[Tensor] = []
        for tensor in header.tensors:
            match = LAYER.fullmatch(tensor.name)
            if tensor.name.startswith(FIRST_LAYER) and layers and not row.output_norm_misnamed:
                inside[0].append((tensor.name, tensor))
            elif match is None or int(match[1]) >= layers:
                outside.append(tensor)
            elif head or int(match[1]) < trunk or (draft and draft.fullmatch(match[2])):
                inside[int(match[1])].append((match[2], tensor))
        is_moe = any(EXPERTS.fullmatch(part) for layer in inside for part, _ in layer)
        spillable = EXPERTS if is_moe else DENSE
        whole = [[tensor for _, tensor in layer] for layer in inside]
        spill = [[tensor for part, tensor in layer if spillable.fullmatch(part)] for layer in inside]
        down = [[tensor for tensor in layer if "ffn_down" in tensor.name] for layer in spill]
        by_name = {tensor.name: tensor for tensor in outside}
        tied = None if "output.weight" in by_name or not row.has_output else by_name.get("token_embd.weight")
        inputs = [tensor for tensor in outside if tensor.name.startswith(INPUTS)]
        mapped = [tensor for tensor in inputs if row.maps_layer_inputs and is_mapped(tensor)]
        factors = [tensor for tensor in outside if _ROPE_FACTORS.fullmatch(tensor.name)]
        outputs = [t for t in outside if t not in inputs and t not in factors] + ([tied] if tied else [])
        return cls(
            header,
            tuple(_bytes(layer) for layer in whole),
            tuple(_bytes(layer) for layer in spill),
            tuple(_repackable(layer) for layer in whole),
            tuple(_repackable(layer) for layer in spill),
            _bytes([tensor for tensor in inputs if tensor not in mapped]),
            _bytes(mapped),
            _bytes(outputs),
            _repackable(outputs),
            tied,
            _bytes(factors),
            is_moe,
            tuple(_bytes(layer) for layer in down),
            tuple(_repackable(layer) for layer in down),
            compute,
        )


def _bytes(tensors: Collection[Tensor]) -> int:
    return sum(-(-tensor.bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES for tensor in tensors)


def is_mapped(tensor: Tensor) -> bool:
    """Does llama.cpp read the rows of this tensor from the file as they are needed, with `--lazy-mode auto`?

    It is page cache then, not RAM of the process, whatever `--load-mode` says (src/llama-model-loader.cpp,
    lazy_read::add). Not with an integrated GPU (src/llama-model.cpp, load_tensors).
    """
    return tensor.name == LAYER_INPUTS and tensor.bytes > MAPPED_ABOVE_BYTES


def repack_key(tensor: Tensor) -> str:
    """Tensors with equal keys are repacked on the same hosts: "TYPE/ROWS", ROWS 8 or 4; "" if never repacked."""
    experts = EXPERTS.search(tensor.name) is not None
    rows = tensor.shape[1] if len(tensor.shape) > 1 else 1
    if len(tensor.shape) != (3 if experts else 2) or not tensor.name.endswith(".weight") or rows % 4:
        return ""
    return f"{tensor.type}/{8 if rows % 8 == 0 else 4}"


def _repackable(tensors: Collection[Tensor]) -> Mapping[str, int]:
    repackable: dict[str, int] = {}
    for tensor in tensors:
        if key := repack_key(tensor):
            repackable[key] = repackable.get(key, 0) + tensor.bytes
    return repackable


def repacked_bytes(repackable: Mapping[str, int], types: Mapping[str, int]) -> int:
    """Bytes that a host repacks, from bytes by `repack_key`. `types`: as returned by `repacked_types`."""
    total = 0
    for key, size in repackable.items():
        kind, rows = key.split("/")
        total += size if kind in types and int(rows) % types[kind] == 0 else 0
    return total
