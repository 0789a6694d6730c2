"""Installations of HIP in a tree that stands for the host."""

from __future__ import annotations

import pytest
import rocm


@pytest.fixture
def put(tmp_path):
    def make(folder, version=(6, 3), libraries=("hipblas", "rocblas"), compiler=True):
        home = tmp_path / folder
        (home / "include/hip").mkdir(parents=True)
        major, minor = version
        (home / "include/hip/hip_version.h").write_text(
            f"#define HIP_VERSION_MAJOR {major}\n#define HIP_VERSION_MINOR {minor}\n#define HIP_VERSION_PATCH 42133\n"
        )
        for name in libraries:
            (home / "include" / name).mkdir()
            (home / "include" / name / f"{name}.h").touch()
        if compiler:
            (home / "llvm/bin").mkdir(parents=True)
            (home / "llvm/bin/clang++").touch()
        return home

    return make


def test_nothing(tmp_path):
    assert rocm.find(str(tmp_path)) == []


def test_amds_own_comes_first_and_is_seen_once_behind_its_link(put, tmp_path):
    put("opt/rocm-6.3.0")
    (tmp_path / "opt/rocm").symlink_to("rocm-6.3.0")
    put("usr", (5, 7), libraries=("rocblas",), compiler=False)
    own, distro = rocm.find(str(tmp_path))
    assert own == {"path": "/opt/rocm", "version": "6.3", "compiler": "/opt/rocm/llvm/bin/clang++", "hipblas": True,
                   "rocblas": True}  # fmt: skip
    assert (distro["path"], distro["version"], distro["hipblas"], distro["rocblas"]) == ("/usr", "5.7", False, True)


def test_without_the_link_the_newest_folder_comes_first(put, tmp_path):
    put("opt/rocm-6.10.0", (6, 10))
    put("opt/rocm-6.4.0", (6, 4))
    assert [one["version"] for one in rocm.find(str(tmp_path))] == ["6.10", "6.4"]


def test_a_folder_that_was_left_behind_is_none(tmp_path):
    (tmp_path / "opt/rocm-5.4.0/share").mkdir(parents=True)
    assert rocm.find(str(tmp_path)) == []


def test_a_header_that_does_not_say(put, tmp_path):
    (put("opt/rocm") / "include/hip/hip_version.h").write_text("")
    assert rocm.find(str(tmp_path))[0]["version"] is None
