"""Packages of the distribution, by a package manager that only notes what it is asked."""

from __future__ import annotations

import packages
import pytest

from llamafleet.remote import install_packages


@pytest.fixture
def manager(monkeypatch):
    """Notes the commands; `fail` is the first word of the one that fails; `missing` is not installed by it."""

    class Manager:
        calls, fail, missing = [], None, []

    def run(command, failure):
        Manager.calls.append(command)
        if Manager.fail in command:
            raise install_packages.Failed(f"{failure} (exit code 100): No space left on device")

    monkeypatch.setattr(install_packages, "run", run)
    monkeypatch.setattr(install_packages.refresh.__globals__["packages"], "missing", lambda *_: Manager.missing)
    monkeypatch.setitem(install_packages.refresh.__globals__, "run", run)
    monkeypatch.setattr(packages, "missing", lambda *_: Manager.missing)
    monkeypatch.setattr(Manager, "calls", [])
    return Manager


def test_apt_reads_its_lists_and_installs_without_questions(manager):
    assert install_packages.main(["apt", "cmake", "g++"]) == 0
    update, install = manager.calls
    assert update[-1] == "update" and install[-3:] == ["install", "cmake", "g++"]
    assert {"-y", "--no-install-recommends", "DPkg::Lock::Timeout=300"} <= set(install)


def test_dnf_installs_at_once(manager):
    assert install_packages.main(["dnf", "cmake"]) == 0
    [install] = manager.calls
    assert install == ["dnf", "-y", "--setopt=install_weak_deps=False", "install", "cmake"]


def test_a_failure_says_the_manager_s_own_words(manager, capsys):
    manager.fail = "install"
    assert install_packages.main(["apt", "cmake"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == (
        "error: the packages were not installed (exit code 100): No space left on device"
    )


def test_what_is_not_there_afterwards_is_named(manager, capsys):
    manager.missing = ["g++"]
    assert install_packages.main(["apt", "cmake", "g++"]) == 1
    assert "these are missing: ['g++']" in capsys.readouterr().out


def test_an_unknown_manager(capsys):
    assert install_packages.main(["zypper", "cmake"]) == 1
    assert "'zypper' is unknown" in capsys.readouterr().out
