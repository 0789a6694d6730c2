"""What sets llama.cpp's backends apart, and which one serves a vendor's GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llamafleet.units import MIB


@dataclass(frozen=True)
class Traits:
    """What sets a llama.cpp backend apart, as far as memory goes."""

    device_prefix: str  # its devices' name in llama.cpp, before the number
    visible_variable: str | None  # environment variable that chooses and orders its devices
    op_offload: bool  # host weights are copied to the device for batches of 32 and more
    pinned_host: bool  # host weights sit in page-locked memory and are not repacked
    # Flash attention unpacks a cache that is not f16 (ggml/src/ggml-cuda/fattn.cu,
    # ggml_cuda_flash_attn_ext_get_alloc_size).
    attention_scratch: bool
    overhead_bytes: int  # device memory that no log counts: context, libraries
    host_overhead_bytes: int  # the process itself: code, vocabulary, driver's host part


# Overheads: 300 to 750 MiB are reported for CUDA contexts with cuBLAS; the host's part is the
# driver's and the runtime's, the vocabulary and HTTP threads.
TRAITS: Mapping[str, Traits] = {
    "cuda": Traits("CUDA", "CUDA_VISIBLE_DEVICES", True, True, True, 512 * MIB, 1024 * MIB),
    "hip": Traits("ROCm", "HIP_VISIBLE_DEVICES", True, True, True, 512 * MIB, 1024 * MIB),
    "vulkan": Traits("Vulkan", "GGML_VK_VISIBLE_DEVICES", True, True, False, 256 * MIB, 512 * MIB),
    "cpu": Traits("CPU", None, False, False, False, 0, 256 * MIB),
}

BACKEND_OF_VENDOR = {"nvidia": "cuda", "amd": "hip"}
