"""For which heads and cache types each backend has a flash-attention kernel.

Without one, `--flash-attn on` makes the CPU compute the attention of layers that are on a GPU; `auto` would switch it
off (src/llama-context.cpp, llama_context::resolve_fused_ops). So a plan decides: on with a kernel, else off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from llamafleet.memory.context import UNQUANTISED, types_of
from llamafleet.memory.kv_cache import attends, takes_cache_of
from llamafleet.model.shape import Shape

Kernel = Callable[[int, int, int], bool]  # by elements of a head of K and of V, and heads of Q for each head of K

SAME_SIZES = (40, 64, 72, 80, 96, 112, 128, 256)  # of K and V
# Cache types with kernels (ggml_cuda_fattn_kv_type_supported, ggml_backend_vk_device_supports_op, ggml_sycl_get_
# best_fattn_kernel without GGML_SYCL_FA_ALL_QUANTS, which is off by default).
_SOME_QUANTISED = (*UNQUANTISED, "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
TYPES = {
    "cuda": _SOME_QUANTISED,
    "hip": _SOME_QUANTISED,
    "vulkan": (*_SOME_QUANTISED, "iq4_nl"),
    "sycl": (*UNQUANTISED, "q8_0", "q4_0"),
}


RATIO_DECIDES = (192, 320, 512, 576)  # elements of a head of K for which the kernels depend on how many share it


def _cuda(key: int, value: int, ratio: int) -> bool:
    """ggml/src/ggml-cuda/fattn.cu, ggml_cuda_get_best_fattn_kernel: HIP is compiled from it too."""
    if key == 192:
        return value == 128 and ratio >= 2 and ratio % 8 == 0
    if key == 320:
        return value == 256 and ratio >= 2 and ratio % 32 == 0
    if key in (512, 576):
        return value == 512 and ratio >= 2
    return key in SAME_SIZES and value == key


def _vulkan(key: int, value: int, ratio: int) -> bool:
    """ggml/src/ggml-vulkan/ggml-vulkan.cpp, ggml_backend_vk_device_supports_op."""
    return key % 8 == 0 and value % 8 == 0


def _sycl(key: int, value: int, ratio: int) -> bool:
    """ggml/src/ggml-sycl/fattn.cpp, ggml_sycl_get_best_fattn_kernel."""
    if key == 576:
        return value == 512 and ratio >= 2
    return key in (*SAME_SIZES, 512) and value == key


KERNELS: dict[str, Kernel] = {"cuda": _cuda, "hip": _cuda, "vulkan": _vulkan, "sycl": _sycl}


def lacking(shape: Shape, backend: str) -> tuple[int, int, int] | None:
    """The first kind of head that the backend has no kernel for: elements of K and of V, and heads of Q for each head
    of K. None if it has one for every layer; the CPU always has."""
    kernel = KERNELS.get(backend)
    return next((head for head in _heads(shape) if kernel and not kernel(*head)), None)


def is_used(shape: Shape, backend: str) -> bool:
    """Is a model's attention computed with flash attention by this backend, as far as its kernels go?"""
    return lacking(shape, backend) is None


def takes_cache_on(shape: Shape, kv_type: str, backend: str) -> bool:
    """Does llama-server take this cache type, without computing attention on the CPU? A quantised V needs flash
    attention (src/llama-context.cpp, llama_init_from_model); K may be quantised without."""
    if not takes_cache_of(shape, kv_type):
        return False
    if not is_used(shape, backend):
        return types_of(kv_type)[1] in UNQUANTISED
    return has_kernel(kv_type, backend)


def has_kernel(kv_type: str, backend: str) -> bool:
    """Has the backend flash attention for a cache of these types of K and V?

    ggml-cuda takes every pair of its types: one that it was not compiled for (see `Build.mixed_pairs`) is converted to
    f16. Vulkan has no bf16 beside another type (ggml_backend_vk_device_supports_op); ggml-sycl is compiled for pairs of
    the same type.
    """
    key, value = types_of(kv_type)
    if key != value and (backend == "sycl" or (backend == "vulkan" and "bf16" in (key, value))):
        return False
    return {key, value} <= set(TYPES.get(backend, (key, value)))


def _heads(shape: Shape) -> Iterator[tuple[int, int, int]]:
    for layer, window in enumerate(shape.windows[: shape.trunk_layers]):
        heads, kv_heads = shape.heads[layer], shape.kv_heads[layer]
        if heads and kv_heads and attends(shape, layer):
            key, value = shape.head_sizes(window > 0)
            yield key, value, heads // kv_heads
