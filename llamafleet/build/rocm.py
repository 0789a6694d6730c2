"""Which HIP llama.cpp is compiled with for AMD's GPUs: AMD's own ROCm where the host has it, else the distribution's.

The two are never mixed: beside AMD's own nothing of the distribution's is installed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llamafleet.build.packages import HIP
from llamafleet.host.installed import Offer

# ggml/src/ggml-hip/CMakeLists.txt: "At least ROCM/HIP V6.1 is required".
OLDEST = (6, 1)
OWN = "/opt/rocm"
WAYS_OUT = (
    "install ROCm from AMD's repository (its package rocm-hip-sdk), which goes to /opt/rocm",
    'or set backend = "vulkan"',
)


@dataclass(frozen=True)
class Hip:
    """HIP to compile with; `path` is None where the distribution's packages bring it."""

    path: str | None
    compiler: str | None = None

    @property
    def is_amds_own(self) -> bool:
        """Whether it is AMD's own ROCm."""
        return self.path is not None and self.path.startswith(OWN)


@dataclass(frozen=True)
class NoHip:
    """No HIP can be used: the reason, and what would help."""

    reason: str
    suggestions: tuple[str, ...] = WAYS_OUT


def choose_hip(found: Sequence[Mapping[str, Any]], offers: Mapping[str, Offer]) -> Hip | NoHip:
    """HIP for this host. `found` is what `llamafleet/remote/rocm.py` reports, AMD's own first; `offers` what the host's
    repositories have, where they were asked."""
    if found:
        return _there(found[0])
    offer = offers.get(HIP.name)
    if offer is None:
        return Hip(None)
    if offer.package is None:
        return NoHip("no repository of the host has HIP")
    if too_old := _too_old(offer.version):
        return NoHip(f"the distribution's HIP is {_short(offer.version)}, {too_old}")
    return Hip(None)


def _there(one: Mapping[str, Any]) -> Hip | NoHip:
    path, version = one["path"], one["version"]
    hip = Hip(path, one["compiler"])
    if too_old := _too_old(version or "0"):
        return NoHip(f"HIP in {path} is {version or 'of unknown version'}, {too_old}")
    missing = [what for key, what in (("hipblas", "hipBLAS"), ("rocblas", "rocBLAS")) if not one[key]]
    if hip.is_amds_own and missing:
        return NoHip(
            f"ROCm {version} in {path} lacks {' and '.join(missing)}",
            (f"install AMD's own packages of {' and '.join(missing)} with their headers (rocm-hip-sdk has all)",
             WAYS_OUT[1]),
        )  # fmt: skip
    if hip.is_amds_own and path != OWN:
        return NoHip(f"ROCm {version} lies in {path}, llama.cpp looks in {OWN}", (f"ln -s {path} {OWN}",))
    return hip


def _too_old(version: str) -> str:
    numbers = [int(part) for part in re.findall(r"\d+", version.partition(":")[2] or version)[:2]]
    needed = ".".join(map(str, OLDEST))
    return "" if tuple(numbers) >= OLDEST else f"llama.cpp needs {needed} or later"


def _short(version: str) -> str:
    found = re.search(r"\d+\.\d+", version.partition(":")[2] or version)
    return found[0] if found else version
