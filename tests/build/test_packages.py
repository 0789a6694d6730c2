"""What a host needs: what runs a release, what compiles it, and which packages bring it."""

from __future__ import annotations

import pytest

from llamafleet.build.packages import MANAGERS, all_needs, asked_of_hosts, needs


def names(*arguments, **options):
    return {need.name for need in needs(*arguments, **options)}


def test_a_host_that_takes_a_finished_build_needs_no_compiler():
    assert {"g++", "cmake", "git"} <= names("cpu", compiling=True)
    assert not {"g++", "cmake", "git"} & names("cpu", compiling=False)


def test_openssl_is_needed_for_https_alone_and_its_headers_for_compiling():
    assert not {"openssl", "openssl headers"} & names("cpu", compiling=True)
    assert {"openssl", "openssl headers"} & names("cpu", compiling=False, tls=True) == {"openssl"}
    assert {"openssl", "openssl headers"} <= names("cpu", compiling=True, tls=True)


def test_the_survey_is_asked_about_everything_that_any_backend_needs():
    asked = asked_of_hosts()
    assert tuple(asked) == MANAGERS
    for of_manager in asked.values():
        for backend in ("cpu", "cuda", "hip", "vulkan"):
            assert names(backend, compiling=True, tls=True) | names(backend, compiling=False) <= of_manager.keys()


@pytest.mark.parametrize("manager", MANAGERS)
def test_every_need_has_packages_with_every_manager(manager):
    """But for HIP, which openSUSE does not have: AMD's own ROCm is what an owner installs there."""
    without = {name for name, need in all_needs().items() if not need.packages.get(manager)}
    assert without == ({"hip", "hipblas", "rocblas"} if manager == "zypper" else set())


def test_only_ninja_can_be_done_without():
    """ninja-build/ninja#2199: on RHEL's rebuilds it is in CRB, which is switched off. make is there."""
    assert [name for name, need in all_needs().items() if need.optional] == ["ninja"]
    assert "make" in all_needs()


def test_curl_is_a_program_and_not_a_package():
    """CentOS/sig-cloud-instance-images#41, amazonlinux/amazon-linux-2023#150: curl-minimal has it, and `curl` clashes
    with it."""
    assert all_needs()["curl"].shown_by == ("curl",)
    assert all_needs()["curl"].packages["dnf"] == ("curl", "curl-minimal")
