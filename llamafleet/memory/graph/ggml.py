"""A graph of tensors without data, built like ggml's: shapes, strides, views, order of nodes (ggml/src/ggml.c, b11434).

It has only the properties that decide how much memory the graph takes: no names, no parameters of operations. Weights
and caches are tensors with a `home`, the number of the backend that holds them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from llamafleet.model.ggml_types import GGML_TYPES

# Operations that overwrite their operand if no other node needs it (ggml/src/ggml-alloc.c, ggml_op_can_inplace).
INPLACE = frozenset({"scale", "add", "add_id", "sub", "mul", "div", "sqr", "sqrt", "unary", "rope", "rms_norm",
                     "clamp", "soft_max", "fill"})  # fmt: skip
VIEWS = frozenset({"view", "reshape", "permute", "transpose"})
F32, F16, I32, I64 = "F32", "F16", "I32", "I64"
TYPES = {name: (block, size) for name, block, size in GGML_TYPES.values()}

Dimensions = tuple[int, int, int, int]


class Tensor:
    """A node or leaf of a graph. `allocation` sets backend, copies, children, views, allocated, buffer and address."""

    __slots__ = (
        "address",
        "allocated",
        "backend",
        "buffer",
        "bytes",
        "children",
        "copies",
        "home",
        "input",
        "nb",
        "ne",
        "op",
        "output",
        "src",
        "type",
        "view_src",
        "views",
        "visited",
        "weight",
    )

    def __init__(
        self,
        op: str,
        kind: str,
        ne: Dimensions,
        src: Sequence[Tensor] = (),
        *,
        nb: Dimensions | None = None,
        of: Tensor | None = None,
        home: int | None = None,
        weight: bool = False,
    ) -> None:
        self.op, self.type, self.ne, self.src = op, kind, ne, list(src)
        self.view_src: Tensor | None = None if of is None else of.view_src or of
        if nb is None:
            nb = contiguous(kind, ne)
            self.bytes = nb[3] * ne[3]
        else:  # a view takes no memory, a copy of a view does
            self.bytes = _bytes(kind, ne, nb) if of is None else 0
        self.nb = nb
        self.home, self.weight = home, weight
        self.input = self.output = self.visited = self.allocated = False
        self.backend = -1 if home is None else home
        self.children = self.views = self.buffer = self.address = 0
        self.copies: dict[int, list[Tensor]] | None = None


def row_bytes(kind: str, elements: int) -> int:
    """Bytes of a row; a partial last block counts as a whole block."""
    block, size = TYPES[kind]
    return -(-elements // block) * size


def is_contiguous(tensor: Tensor) -> bool:
    """Are the elements stored in order and without gaps?"""
    return tensor.nb == contiguous(tensor.type, tensor.ne)


def elements(tensor: Tensor) -> int:
    """Number of elements."""
    return math.prod(tensor.ne)


def contiguous(kind: str, ne: Dimensions) -> Dimensions:
    """Strides without gaps (ggml_new_tensor)."""
    block, size = TYPES[kind]
    row = ne[0] // block * size
    plane = row * ne[1]
    return (size, row, plane, plane * ne[2])


def _bytes(kind: str, ne: Dimensions, nb: Dimensions) -> int:
    """Bytes from the first element to the end of the last (ggml_nbytes)."""
    if 0 in ne:
        return 0
    block, size = TYPES[kind]
    first = ne[0] // block * size if block > 1 else size + (ne[0] - 1) * nb[0]
    return first + sum((n - 1) * stride for n, stride in zip(ne[1:], nb[1:], strict=True))


def _four(ne: Sequence[int]) -> Dimensions:
    count = len(ne)
    return (ne[0], ne[1] if count > 1 else 1, ne[2] if count > 2 else 1, ne[3] if count > 3 else 1)


class Graph:
    """A graph: nodes in the order of computation, and leafs."""

    def __init__(self) -> None:
        self.nodes: list[Tensor] = []
        self.leafs: list[Tensor] = []

    def expand(self, tensor: Tensor) -> None:
        """Append a tensor and all that it depends on, operands first (ggml_build_forward_expand)."""
        if not tensor.visited:
            tensor.visited = True
            self._visit(tensor)

    def _visit(self, tensor: Tensor) -> None:
        for src in tensor.src:
            if not src.visited:
                src.visited = True
                self._visit(src)
        (self.leafs if tensor.op == "none" else self.nodes).append(tensor)


def weight(kind: str, ne: Sequence[int], home: int) -> Tensor:
    """A weight of the model, held by backend `home`."""
    return Tensor("none", kind, _four(ne), home=home, weight=True)


def cache(kind: str, ne: Sequence[int], home: int) -> Tensor:
    """A tensor of the KV cache, the recurrent state or an adapter, held by backend `home`."""
    return Tensor("none", kind, _four(ne), home=home)


def graph_input(kind: str, *ne: int) -> Tensor:
    """An input, which llama.cpp sets before each computation."""
    tensor = Tensor("none", kind, _four(ne))
    tensor.input = True
    return tensor


def new(op: str, kind: str, ne: Sequence[int], *src: Tensor) -> Tensor:
    """The result of an operation, with the given type and shape, in its own memory."""
    return Tensor(op, kind, _four(ne), src)


def apply(op: str, a: Tensor, *others: Tensor) -> Tensor:
    """The result of an operation, with type and shape of the first operand, contiguous (ggml_dup_tensor)."""
    return Tensor(op, a.type, a.ne, (a, *others))


def mul_mat(a: Tensor, b: Tensor) -> Tensor:
    return Tensor("mul_mat", F32, (a.ne[1], b.ne[1], b.ne[2], b.ne[3]), (a, b))


def mul_mat_id(experts: Tensor, b: Tensor, ids: Tensor) -> Tensor:
    return Tensor("mul_mat_id", F32, (experts.ne[1], ids.ne[0], b.ne[2], 1), (experts, b, ids))


def get_rows(a: Tensor, ids: Tensor) -> Tensor:
    kind = I32 if a.type == I32 else F32
    return Tensor("get_rows", kind, (a.ne[0], ids.ne[0], ids.ne[1], ids.ne[2]), (a, ids))


def set_rows(a: Tensor, b: Tensor, ids: Tensor) -> Tensor:
    return Tensor("set_rows", a.type, a.ne, (b, ids, a), nb=a.nb, of=a)


def cpy(a: Tensor, b: Tensor) -> Tensor:
    return Tensor("cpy", b.type, b.ne, (a, b), nb=b.nb, of=b)


def inplace(op: str, a: Tensor, *others: Tensor) -> Tensor:
    """The result of an operation, written over its first operand (ggml_*_inplace)."""
    return Tensor(op, a.type, a.ne, (a, *others), nb=a.nb, of=a)


def cont(a: Tensor, *ne: int) -> Tensor:
    return Tensor("cont", a.type, _four(ne) if ne else a.ne, (a,))


def reshape(a: Tensor, *ne: int) -> Tensor:
    return Tensor("reshape", a.type, _four(ne), (a,), of=a)


def view(a: Tensor, ne: Sequence[int], strides: Sequence[int] = ()) -> Tensor:
    """A view of a part of `a`. `strides`: bytes, from the second dimension on; missing strides as if contiguous."""
    shape = _four(ne)
    nb = list(contiguous(a.type, shape))
    for index, stride in enumerate(strides, 1):
        nb[index] = stride
    for index in range(len(strides) + 1, 4) if strides else ():
        nb[index] = nb[index - 1] * shape[index - 1]
    return Tensor("view", a.type, shape, (a,), nb=(nb[0], nb[1], nb[2], nb[3]), of=a)


def permute(a: Tensor, *axes: int) -> Tensor:
    """Reorder dimensions: dimension i of `a` becomes dimension axes[i]."""
    ne, nb = [0] * 4, [0] * 4
    for source, target in enumerate(axes):
        ne[target], nb[target] = a.ne[source], a.nb[source]
    return Tensor("permute", a.type, _four(ne), (a,), nb=_four(nb), of=a)


def transpose(a: Tensor) -> Tensor:
    return permute(a, 1, 0, 2, 3)


def flash_attn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor | None) -> Tensor:
    src = (q, k, v, mask, sinks) if sinks else (q, k, v, mask)
    return Tensor("flash_attn", F32, (v.ne[0], q.ne[2], q.ne[1], q.ne[3]), src)


def concat(a: Tensor, b: Tensor, axis: int) -> Tensor:
    ne = list(a.ne)
    ne[axis] += b.ne[axis]
    return new("concat", a.type, ne, a, b)


def mul_mat_hadamard(cur: Tensor, matrix: Tensor) -> Tensor:
    """Multiply pieces of each row by a matrix (src/llama-impl.h, llama_mul_mat_hadamard)."""
    width = matrix.ne[0]
    count = elements(cur) // width
    flat = reshape(cur, width, count) if is_contiguous(cur) else cont(cur, width, count)
    return reshape(mul_mat(matrix, flat), *cur.ne)
