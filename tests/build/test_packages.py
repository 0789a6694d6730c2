"""Distribution packages: what runs a release, and what compiles it."""

from __future__ import annotations

import pytest

from llamafleet.build.packages import all_packages, packages


def test_a_host_that_takes_a_finished_build_needs_no_compiler():
    assert "g++" in packages("apt", "cpu", compiling=True)
    assert "g++" not in packages("apt", "cpu", compiling=False)


@pytest.mark.parametrize(
    ("manager", "run", "compile_"), [("apt", "openssl", "libssl-dev"), ("dnf", "openssl-libs", "openssl-devel")]
)
def test_openssl_is_needed_for_https_alone_and_its_headers_for_compiling(manager, run, compile_):
    assert not {run, compile_} & set(packages(manager, "cpu", compiling=True))
    assert {run, compile_} & set(packages(manager, "cpu", compiling=False, tls=True)) == {run}
    assert {run, compile_} <= set(packages(manager, "cpu", compiling=True, tls=True))


def test_the_survey_is_asked_about_every_package_that_any_backend_needs():
    asked = all_packages()
    assert asked.keys() == {"apt", "dnf"}
    for manager, names in asked.items():
        for backend in ("cpu", "cuda", "hip", "vulkan"):
            for compiling in (True, False):
                assert set(packages(manager, backend, compiling, tls=True)) <= set(names)
        assert list(names) == sorted(set(names))
