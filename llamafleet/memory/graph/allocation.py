"""Bytes of each backend's compute buffer: ggml's scheduler and allocator, for a graph without data.

`buffer_bytes` does what ggml_backend_sched_reserve_size does, for a graph made by `builder.py`: assign backends
and split the graph (ggml/src/ggml-backend.cpp, ggml_backend_sched_split_graph), then place every tensor as the graph
allocator does (ggml/src/ggml-alloc.c, ggml_gallocr_alloc_graph_impl). Backends are numbered as in ggml:
devices first, the CPU last.
"""

from __future__ import annotations

from llamafleet.memory.graph.ggml import INPLACE, VIEWS, Graph, Tensor

COPIES = 4  # GGML_SCHED_MAX_COPIES: copies of each input where the devices form a pipeline
ALIGNMENT = 128  # bytes, in CUDA buffers; CPU buffers have 64
# Smallest batch for op-offload (ggml/src/ggml-cuda/ggml-cuda.cu, ggml_backend_cuda_device_offload_op).
OFFLOAD_TOKENS = 32
UNLIMITED_BYTES = 1 << 62

Steps = list[tuple[Tensor, int]]  # tensors with their backends, in order of allocation


def buffer_bytes(graph: Graph, devices: int, *, pipelined: bool = False, op_offload: bool = False) -> list[int]:
    """Bytes of the compute buffers of `devices` devices and, last, of the CPU."""
    steps, leafs = _schedule(graph, devices, COPIES if pipelined else 1, op_offload)
    return _allocate(steps, leafs, devices + 1)


def _schedule(graph: Graph, cpu: int, copies: int, op_offload: bool) -> tuple[Steps, Steps]:
    _assign(graph, cpu, op_offload)
    splits = _split(graph, copies)
    steps: Steps = []
    for backend, nodes, inputs in splits:
        for tensor in inputs:
            # The source stays allocated until it is copied; the copy is allocated at the start of the split.
            steps.append((_dependency(tensor), tensor.backend))
            steps.append((_copies(tensor, backend)[0], backend))
        steps += [(node, node.backend) for node in nodes]
    leafs = [(leaf, leaf.backend) for leaf in graph.leafs]
    if copies > 1:
        of_inputs = [_copies_of_input(leaf, copies) for leaf in graph.leafs if leaf.input]
        of_splits = [(copy, backend) for backend, _, inputs in splits for t in inputs for copy in _copies(t, backend)]
        leafs = [*(pair for pairs in of_inputs for pair in pairs), *of_splits, *leafs]
    return steps, leafs


def _dependency(tensor: Tensor) -> Tensor:
    return Tensor("none", tensor.type, tensor.ne, (tensor,), nb=tensor.nb, of=tensor)


def _copies_of_input(leaf: Tensor, copies: int) -> list[tuple[Tensor, int]]:
    tensors = [leaf, *(_copy(leaf) for _ in range(copies - 1))]
    for tensor in tensors:
        tensor.input = tensor.output = True
    return [(tensor, leaf.backend) for tensor in tensors]


def _copy(tensor: Tensor) -> Tensor:
    return Tensor("none", tensor.type, tensor.ne, nb=tensor.nb)


def _copies(tensor: Tensor, backend: int) -> list[Tensor]:
    assert tensor.copies is not None  # made in _split
    return tensor.copies[backend]


def _home(tensor: Tensor) -> int | None:
    """The backend whose memory holds the tensor before the graph is allocated; None if no backend does."""
    return (tensor.view_src or tensor).home


def _backend_from_buffers(node: Tensor, cpu: int, op_offload: bool) -> int:
    """Pass 1: the backend that holds the tensor or its weights; -1 if none does (ggml/src/ggml-backend.cpp,
    ggml_backend_sched_backend_id_from_cur)."""
    home = _home(node)
    if home is not None:
        return home
    if node.input:
        return cpu
    if node.op not in ("rope", "flash_attn"):
        for src in node.src:
            if src.weight and src.home is not None:
                offload = op_offload and src.home == cpu and cpu > 0 and _batch(node) >= OFFLOAD_TOKENS
                return 0 if offload else src.home
    return -1


def _batch(node: Tensor) -> int:
    """Batch size of an operation.

    Source: ggml/src/ggml-cuda/ggml-cuda.cu, get_op_batch_size; ggml/src/ggml-vulkan/ggml-vulkan.cpp does the same.
    """
    if node.op == "get_rows":
        return 0
    if node.op == "mul_mat":
        return node.ne[1]
    if node.op in ("mul_mat_id", "rope"):
        return node.ne[2]
    return node.ne[1] * node.ne[2] * node.ne[3]


def _assign(graph: Graph, cpu: int, op_offload: bool) -> None:
    """Passes 1 to 4: set the backend of each tensor."""
    for leaf in graph.leafs:
        if leaf.home is None:
            leaf.backend = _backend_from_buffers(leaf, cpu, op_offload)
    for node in graph.nodes:
        node.backend = _backend_from_buffers(node, cpu, op_offload)
    computed = [node for node in graph.nodes if node.op not in VIEWS]
    for also_cpu in (False, True):
        for ordered in (computed, computed[::-1]):
            current = -1
            for node in ordered:
                backend = node.backend
                if backend == -1:
                    node.backend = current
                else:
                    current = -1 if backend == cpu and not also_cpu else backend
    for node in graph.nodes:
        if node.backend == -1:
            node.backend = node.view_src.backend if node.view_src else 0
        for src in node.src:
            if src.backend == -1:
                src.backend = src.view_src.backend if src.view_src else node.backend


def _split(graph: Graph, copies: int) -> list[tuple[int, list[Tensor], list[Tensor]]]:
    """Pass 5: (backend, its nodes, tensors copied to it) for each run of nodes on one backend."""
    current = next((node.backend for node in graph.nodes if node.op not in VIEWS), 0)
    splits: list[tuple[int, list[Tensor], list[Tensor]]] = [(current, [], [])]
    for node in graph.nodes:
        backend, nodes, inputs = splits[-1]
        if node.op not in VIEWS:
            if node.backend != backend or (inputs and _has_foreign_weight(node, backend)):
                backend, nodes, inputs = node.backend, [], []
                splits.append((backend, nodes, inputs))
            for index, src in enumerate(node.src):
                home = (src.view_src or src).home
                if (src.backend if home is None else home) == backend:
                    continue
                if src.copies is None:
                    src.copies = {}
                if backend not in src.copies:
                    src.copies[backend] = [_copy(src) for _ in range(copies)]
                    for copy in src.copies[backend]:
                        copy.input = copy.output = copies > 1
                    inputs.append(src)
                node.src[index] = src.copies[backend][0]
        nodes.append(node)
    return splits


def _has_foreign_weight(node: Tensor, backend: int) -> bool:
    return any([src.weight and src.home != backend for src in node.src])


class _Arena:
    """One buffer: its free blocks by address, and the highest byte that was used (ggml_dyn_tallocr)."""

    def __init__(self) -> None:
        self.free: list[list[int]] = [[0, UNLIMITED_BYTES]]  # [offset, size]
        self.peak_bytes = 0

    def allocate(self, size: int) -> int:
        free = self.free
        best, best_size = len(free) - 1, UNLIMITED_BYTES
        for index in range(len(free) - 1):
            if size <= free[index][1] <= best_size:
                best, best_size = index, free[index][1]
        block = free[best]
        offset = block[0]
        block[0] += size
        block[1] -= size
        if not block[1]:
            del free[best]
        self.peak_bytes = max(self.peak_bytes, offset + size)
        return offset

    def free_block(self, offset: int, size: int) -> None:
        free = self.free
        for index, block in enumerate(free):
            if block[0] + block[1] == offset:
                block[1] += size
                if index + 1 < len(free) and block[0] + block[1] == free[index + 1][0]:
                    block[1] += free[index + 1][1]
                    del free[index + 1]
                return
            if offset + size == block[0]:
                block[0] = offset
                block[1] += size
                if index and free[index - 1][0] + free[index - 1][1] == offset:
                    free[index - 1][1] += block[1]
                    del free[index]
                return
        position = next((index for index, block in enumerate(free) if block[0] >= offset), len(free))
        free.insert(position, [offset, size])


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _allocate(steps: Steps, leafs: Steps, backends: int) -> list[int]:
    """Peak bytes of each buffer when tensors are freed after their last use (ggml_gallocr_alloc_graph_impl)."""
    arenas = [_Arena() for _ in range(backends)]
    for leaf, backend in leafs:
        _place(leaf, backend, arenas)
    for node, backend in steps:
        if node.view_src is not None and node.op != "none":
            node.view_src.views += 1
        if node.input:
            _place(node, backend, arenas)
        for src in node.src:
            src.children += 1
            if src.input:
                _place(src, backend, arenas)
    for node, backend in steps:
        for src in node.src:
            if not src.allocated and src.view_src is None and src.home is None:
                _place(src, backend, arenas)
        if node.view_src is None:
            _place(node, backend, arenas)
        for src in node.src:
            src.children -= 1
            if not src.children and not src.views:
                _release(src, arenas)
    return [arena.peak_bytes for arena in arenas]


def _release(tensor: Tensor, arenas: list[_Arena]) -> None:
    root = tensor.view_src
    if root is not None:
        root.views -= 1
        if root.views or root.children:
            return
        tensor = root
    if tensor.allocated and not tensor.output:
        arenas[tensor.buffer].free_block(tensor.address, _padded(tensor.bytes))
        tensor.allocated = False


def _place(node: Tensor, backend: int, arenas: list[_Arena]) -> None:
    if node.allocated or node.view_src is not None or node.home is not None:
        return
    node.allocated = True
    parent = _reusable(node) if node.op in INPLACE else None
    if parent is not None:
        node.buffer, node.address = parent.buffer, parent.address
        parent.allocated = False
        return
    node.buffer, node.address = backend, arenas[backend].allocate(_padded(node.bytes))


def _reusable(node: Tensor) -> Tensor | None:
    """The operand whose memory the node may overwrite; a view has no memory of its own and is never reused."""
    for parent in node.src:
        if not parent.allocated or parent.output or parent.children != 1 or parent.views:
            continue
        if parent.type == node.type and parent.ne == node.ne and parent.nb == node.nb:
            return parent
    return None
