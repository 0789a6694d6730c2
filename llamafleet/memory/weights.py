"""A model's tensors, sorted by what moves together, and where on a host they lie.

Who gets which layer: src/llama-model.cpp:1591; which tensor belongs to input, output or layers: LLM_TENSOR_INFOS in
src/llama-arch.cpp; what the CPU keeps in a layout of its own: ggml-cpu/repack.cpp:4974, :5191.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from llamafleet.memory.compute import Compute
from llamafleet.memory.graph.layers import FIRST_LAYER, INPUTS
from llamafleet.model.gguf import Header, Tensor
from llamafleet.model.shape import DENSE, EXPERTS, Shape

LAYER = re.compile(r"blk\.(\d+)\.(.*)")
# One copy on each device that has layers (src/llama-model.cpp, TENSOR_DUPLICATED).
_ROTATION = re.compile(r"rope_(freqs|factors_long|factors_short)\.weight")

# Types that the CPU backend repacks, with the rows that must divide: by what the processor can.
X86_TYPES = {"Q4_0": 8, "Q4_K": 8, "IQ4_NL": 8, "MXFP4": 8}  # AVX2
AVX512_TYPES = {"Q2_K": 8}
ARM_TYPES = {"Q4_0": 4, "Q4_K": 8, "Q5_K": 8, "Q6_K": 8, "IQ4_NL": 4, "MXFP4": 4, "Q8_0": 4, "Q1_0": 4}  # dot products
_ALIGNMENT_BYTES = 32  # of a tensor in a buffer of the CPU backend (TENSOR_ALIGNMENT, ggml-impl.h:44)


def repacked_types(cpu_flags: Collection[str]) -> Mapping[str, int]:
    """Types that a build for this processor repacks, each with the rows that must divide a tensor's."""
    if "asimddp" in cpu_flags or "asimdhp" in cpu_flags:
        return ARM_TYPES if "asimddp" in cpu_flags else {}
    wide = AVX512_TYPES if "avx512f" in cpu_flags else {}
    return {**X86_TYPES, **wide} if "avx2" in cpu_flags else {}


@dataclass(frozen=True)
class Model:
    """A header's tensors, sorted by what moves together. Little or nothing is loaded of a draft head (nextn)."""

    header: Header
    layer_bytes: tuple[int, ...]  # all of a layer's weights
    spill_bytes: tuple[int, ...]  # of them, those that may go to the host while attention stays
    layer_packs: tuple[Mapping[str, int], ...]  # of a layer's weights, bytes by what would be repacked on the host
    spill_packs: tuple[Mapping[str, int], ...]  # the same of what may be spilled
    input_bytes: int  # token embedding and the like: always on the host
    output_bytes: int  # output matrix and norm
    output_packs: Mapping[str, int]
    tied: Tensor | None  # the embedding that serves as output matrix too, being held twice
    rotation_bytes: int  # factors of positions: one copy on each device
    is_moe: bool
    down_bytes: tuple[int, ...]  # of the spillable ones, the down projections
    down_packs: tuple[Mapping[str, int], ...]
    compute: Compute = field(compare=False, repr=False)

    @property
    def shape(self) -> Shape:
        """The header, resolved."""
        return self.compute.shape

    def moved_bytes(self, layer: int, part: str | None) -> int:
        """Bytes of a layer's spillable tensors of a part: "all", "down", or "up" for up and gate; None for none."""
        if part is None:
            return 0
        down = self.down_bytes[layer]
        return {"all": self.spill_bytes[layer], "down": down, "up": self.spill_bytes[layer] - down}[part]

    def moved_packs(self, layer: int, part: str | None) -> Mapping[str, int]:
        """The same by what would be repacked on the host."""
        if part is None:
            return {}
        whole, down = self.spill_packs[layer], self.down_packs[layer]
        if part == "up":
            return {key: size - down.get(key, 0) for key, size in whole.items()}
        return down if part == "down" else whole

    def part_bytes(self, layer: int, part: str) -> int:
        """Bytes of a layer's spillable tensors of a part: "down", or "up" for up and gate, which work together."""
        return self.moved_bytes(layer, part)

    @property
    def tied_bytes(self) -> int:
        """What `output_bytes` has of the embedding, because the model has no output matrix."""
        return self.tied.bytes if self.tied else 0

    @property
    def tied_packs(self) -> Mapping[str, int]:
        """The tied embedding as a matrix, by what would be repacked."""
        return _packs([self.tied]) if self.tied else {}

    @property
    def tied_is_shared(self) -> bool:
        """On an x86 host the tied embedding is held once, not twice."""
        return self.shares_tied(X86_TYPES)

    def shares_tied(self, types: Mapping[str, int]) -> bool:
        """Is a tied embedding held once by a host that repacks these types? One that is repacked is another copy."""
        return not self.shape.architecture.embedding_held_twice and not repacked_bytes(self.tied_packs, types)

    @property
    def layers(self) -> int:
        """Blocks, without the output layer."""
        return len(self.layer_bytes)

    @classmethod
    def of(cls, header: Header) -> Model:
        """Sort the tensors of a header."""
        compute = Compute.of(header)
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
            elif int(match[1]) < trunk or (draft and draft.fullmatch(match[2])):
                inside[int(match[1])].append((match[2], tensor))
        is_moe = any(EXPERTS.fullmatch(part) for layer in inside for part, _ in layer)
        wanted = EXPERTS if is_moe else DENSE
        whole = [[tensor for _, tensor in layer] for layer in inside]
        spill = [[tensor for part, tensor in layer if wanted.fullmatch(part)] for layer in inside]
        down = [[tensor for tensor in layer if "ffn_down" in tensor.name] for layer in spill]
        by_name = {tensor.name: tensor for tensor in outside}
        tied = None if "output.weight" in by_name else by_name.get("token_embd.weight")
        inputs = [tensor for tensor in outside if tensor.name.startswith(INPUTS)]
        rotation = [tensor for tensor in outside if _ROTATION.fullmatch(tensor.name)]
        outputs = [t for t in outside if t not in inputs and t not in rotation] + ([tied] if tied else [])
        return cls(
            header,
            tuple(_bytes(layer) for layer in whole),
            tuple(_bytes(layer) for layer in spill),
            tuple(_packs(layer) for layer in whole),
            tuple(_packs(layer) for layer in spill),
            _bytes(inputs),
            _bytes(outputs),
            _packs(outputs),
            tied,
            _bytes(rotation),
            is_moe,
            tuple(_bytes(layer) for layer in down),
            tuple(_packs(layer) for layer in down),
            compute,
        )


def _bytes(tensors: Collection[Tensor]) -> int:
    return sum(-(-tensor.bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES for tensor in tensors)


def pack(tensor: Tensor) -> str:
    """Under what a tensor is repacked: its type, and the rows that divide it; "" for never."""
    experts = EXPERTS.search(tensor.name) is not None
    rows = tensor.shape[1] if len(tensor.shape) > 1 else 1
    if len(tensor.shape) != (3 if experts else 2) or not tensor.name.endswith(".weight") or rows % 4:
        return ""
    return f"{tensor.type}/{8 if rows % 8 == 0 else 4}"


def _packs(tensors: Collection[Tensor]) -> Mapping[str, int]:
    packs: dict[str, int] = {}
    for tensor in tensors:
        if key := pack(tensor):
            packs[key] = packs.get(key, 0) + tensor.bytes
    return packs


def repacked_bytes(packs: Mapping[str, int], types: Mapping[str, int]) -> int:
    """Of these tensors, the bytes that are repacked where `types` are."""
    total = 0
    for key, size in packs.items():
        kind, rows = key.split("/")
        total += size if kind in types and int(rows) % types[kind] == 0 else 0
    return total
