"""Package managers: which packages are missing, and that every manager has all that is asked of one."""

from __future__ import annotations

import packages
import pytest


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """Puts a program that prints a text, and notes its arguments, first on PATH."""

    def put(name, text, code=0):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        (tmp_path / "told").write_text(text)
        program.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/calls\ncat {tmp_path}/told\nexit {code}\n')
        program.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    return put


def test_packages_that_are_unknown_or_removed_are_missing(stub):
    told = "git installed\ncurl config-files\ncmake half-configured\n"
    stub("dpkg-query", told, code=1)  # as it exits when one of the names is unknown
    assert packages.missing(packages.Apt, ["git", "curl", "cmake", "ninja-build"]) == ["curl", "cmake", "ninja-build"]


def test_rpm_is_asked_on_fedora(stub):
    stub("rpm", "git installed\npackage ninja-build is not installed\n", code=1)
    assert packages.missing(packages.Dnf, ["git", "ninja-build"]) == ["ninja-build"]


def test_nothing_wanted_asks_nobody(stub, tmp_path):
    stub("dpkg-query", "")
    assert packages.missing(packages.Apt, []) == []
    assert not (tmp_path / "calls").exists()


def test_without_a_package_manager_everything_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert packages.missing(packages.Apt, ["git"]) == ["git"]


def test_nobody_to_ask_means_that_all_are_missing():
    assert packages.missing(None, ["git"]) == ["git"] and packages.missing(None, []) == []


@pytest.mark.parametrize("manager", packages.MANAGERS)
def test_a_manager_has_every_command_and_a_name_of_its_own(manager):
    assert packages.by_name(manager.name) is manager
    for command in (manager.query, manager.install):
        assert command(["a", "b"])[-2:] == ["a", "b"]
    assert manager.refresh() is None or manager.refresh()[0] == manager.program
    assert isinstance(manager.would_change([]), list)


def test_apt_is_asked_what_these_packages_would_change(stub, tmp_path):
    stub("apt-get", "Reading package lists...\nInst a (1)\nRemv nvidia-driver-580 [2]\nConf a (1)\n")
    assert packages.Apt.would_change(["a", "b"]) == ["a", "nvidia-driver-580"]
    (call,) = (tmp_path / "calls").read_text().splitlines()
    assert "--simulate" in call and call.endswith("install a b")


def test_the_manager_of_this_host_is_the_first_whose_program_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(packages, "PLACES", str(tmp_path))
    assert packages.detect() is None
    for name, manager in (("dnf", packages.Dnf), ("apt-get", packages.Apt)):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
        assert packages.detect() is manager
