"""Which HIP is used for AMD's GPUs: AMD's own ROCm first, never mixed with the distribution's, and never too old."""

from __future__ import annotations

import pytest

from llamafleet.build.rocm import Hip, NoHip, choose_hip
from llamafleet.host.installed import Offer

OWN = {"path": "/opt/rocm", "version": "6.3", "compiler": "/opt/rocm/llvm/bin/clang++", "hipblas": True,
       "rocblas": True}  # fmt: skip
DISTRO = {"path": "/usr", "version": "6.1", "compiler": None, "hipblas": False, "rocblas": True}


def test_amds_own_comes_before_the_distribution_s():
    """ggml-org/llama.cpp#16320: the distribution's HIP beside AMD's ROCm."""
    hip = choose_hip([OWN, DISTRO], {"hip": Offer("libamdhip64-dev hipcc", "6.1.2-1")})
    assert hip == Hip("/opt/rocm", "/opt/rocm/llvm/bin/clang++") and hip.is_amds_own


def test_the_distribution_s_is_used_where_amds_is_not():
    assert choose_hip([DISTRO], {}) == Hip("/usr")


@pytest.mark.parametrize("version", ["6.1.2-1", "1:6.4.43483", "7.0"])
def test_the_distribution_s_packages_are_installed_where_they_are_new_enough(version):
    assert choose_hip([], {"hip": Offer("hipcc", version)}) == Hip(None)
    assert choose_hip([], {}) == Hip(None)  # nobody could tell: the installation will


@pytest.mark.parametrize(("version", "shown"), [("5.7.1-3", "5.7"), ("5.2.3-5+b1", "5.2"), ("1:6.0.2", "6.0")])
def test_a_distribution_whose_hip_is_too_old(version, shown):
    """Debian 12 has 5.2, Ubuntu 24.04 has 5.7: refused before anything is installed."""
    refused = choose_hip([], {"hip": Offer("hipcc", version)})
    assert isinstance(refused, NoHip)
    assert refused.reason == f"the distribution's HIP is {shown}, llama.cpp needs 6.1 or later"
    assert "rocm-hip-sdk" in refused.suggestions[0]


def test_amds_own_that_is_too_old_is_not_replaced_by_the_distribution_s():
    refused = choose_hip([{**OWN, "version": "5.7"}, DISTRO], {})
    assert refused.reason == "HIP in /opt/rocm is 5.7, llama.cpp needs 6.1 or later"


def test_amds_own_without_its_libraries_is_not_filled_up_with_the_distribution_s():
    """llama-toolchest#142: half of each does not link."""
    refused = choose_hip([{**OWN, "hipblas": False, "rocblas": False}], {"hip": Offer("hipcc", "6.1")})
    assert refused.reason == "ROCm 6.3 in /opt/rocm lacks hipBLAS and rocBLAS"
    assert "hipBLAS and rocBLAS" in refused.suggestions[0]


def test_a_folder_that_llama_cpp_does_not_look_in():
    refused = choose_hip([{**OWN, "path": "/opt/rocm-6.3.0"}], {})
    assert refused.suggestions == ("ln -s /opt/rocm-6.3.0 /opt/rocm",)


def test_no_repository_has_it():
    assert choose_hip([], {"hip": Offer(None)}).reason == "no repository of the host has HIP"
