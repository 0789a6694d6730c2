"""Variables that an operator gives to the servers of a host, and those that are refused: what llamafleet, systemd or
llama.cpp set themselves.

Names of llama.cpp's are of b11434 (`std::getenv` and `set_env` in its sources). A variable that is not named here is
passed on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from llamafleet.validation import shown

# ROCm takes the card for one of this version, "10.3.0" for gfx1030. _N: of the N-th card alone.
GFX_OVERRIDE = re.compile(r"HSA_OVERRIDE_GFX_VERSION(_\d+)?")
_GFX_VERSION = re.compile(r"(\d{1,2})\.(\d{1,2})\.(\d{1,2})")

_DEVICES = "the plan chooses the GPUs: use the setting `gpus`"
_MEMORY = "it moves memory from one device to another, which the plan counts"
_SYSTEMD = "systemd sets it"
_OURS = {
    **dict.fromkeys(
        ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES",
         "GPU_DEVICE_ORDINAL", "GGML_VK_VISIBLE_DEVICES", "GGML_CUDA_DEVICES", "ONEAPI_DEVICE_SELECTOR",
         "ZE_AFFINITY_MASK", "SYCL_DEVICE_ALLOWLIST", "SYCL_DEVICE_FILTER", "GGML_DISABLE_VULKAN"), _DEVICES),
    **dict.fromkeys(
        ("GGML_CUDA_ENABLE_UNIFIED_MEMORY", "GGML_CUDA_NO_PINNED", "GGML_CUDA_REGISTER_HOST",
         "GGML_SYCL_NO_PINNED", "GGML_OP_OFFLOAD_MIN_BATCH", "GGML_VK_PREFER_HOST_MEMORY",
         "GGML_VK_ALLOW_SYSMEM_FALLBACK", "GGML_VK_DISABLE_HOST_VISIBLE_VIDMEM", "LLAMA_GRAPH_REUSE_DISABLE"),
        _MEMORY),
    **dict.fromkeys(
        ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "LLAMA_CACHE"), "the service has a folder of its own for that"),
    **dict.fromkeys(
        ("CREDENTIALS_DIRECTORY", "CACHE_DIRECTORY", "RUNTIME_DIRECTORY", "STATE_DIRECTORY", "INVOCATION_ID",
         "JOURNAL_STREAM", "NOTIFY_SOCKET", "MAINPID", "SYSTEMD_EXEC_PID", "USER", "LOGNAME", "SHELL"), _SYSTEMD),
    "GGML_BACKEND_PATH": "it loads code from elsewhere than the release",
    "LLAMA_SERVER_CHILD_MODE": "llama-server sets it for its own children",
    "LLAMA_SERVER_ROUTER_PORT": "llama-server sets it for its own children",
    "LLAMA_APP_CMD": "llama-server sets it for its own children",
    "LLAMA_SERVER_SLOTS_DEBUG": "it lets every client read the prompts of others (/slots)",
    "MTMD_BACKEND_DEVICE": _DEVICES,
}  # fmt: skip
_OURS_BEGIN = {
    "AIP_": "it moves the server to another address",
    "LLAMA_ARG_": "it is a flag of llama-server, which the plan does not know of: give the flag in extra_flags",
    "LD_": "libraries come from the release and the system's folders (/etc/ld.so.conf.d): name the folder there",
    "LISTEN_": _SYSTEMD,
    "WATCHDOG_": _SYSTEMD,
    "MEMORY_PRESSURE_": _SYSTEMD,
}
_SECRETS = frozenset(("KEY", "TOKEN", "SECRET", "PASSWORD", "PASSWD"))


def problems(environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """What is wrong with the variables: the path of each and a sentence."""
    for name, value in environment.items():
        if why := _why_not(name):
            yield f"environment.{name}", f"is refused: {why}"
        elif GFX_OVERRIDE.fullmatch(name) and not _GFX_VERSION.fullmatch(value):
            yield f"environment.{name}", f"should be like 10.3.0, is {shown(value)}"


def _why_not(name: str) -> str:
    if _SECRETS.intersection(name.upper().split("_")):
        return (
            "everybody on the host may read a unit: keys belong into api_key_file, a token for downloads into "
            "hub_token_file"
        )
    return _OURS.get(name) or next((why for begin, why in _OURS_BEGIN.items() if name.startswith(begin)), "")


def gfx_targets(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The LLVM targets that ROCm takes the host's cards for, as `gfx1030`; none where the variables do not say it."""
    found = [_GFX_VERSION.fullmatch(value) for name, value in environment.items() if GFX_OVERRIDE.fullmatch(name)]
    return tuple(sorted({f"gfx{int(one[1])}{int(one[2]):x}{int(one[3]):x}" for one in found if one}))


def assignment(name: str, value: str) -> str:
    """The variable as a word of Environment= in a unit (systemd.exec; systemd.unit, specifiers). A dollar means nothing
    there."""
    inner = value.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{name}={inner}"'
