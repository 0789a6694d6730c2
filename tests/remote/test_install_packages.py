"""Installing what a host lacks, by a package manager that only notes what it is asked."""

from __future__ import annotations

import json

import install_packages
import packages
import pytest
import running

NINJA = {"shown_by": ["ninja"], "packages": ["ninja-build"], "optional": True}
CMAKE = {"shown_by": ["cmake"], "packages": ["cmake"], "optional": False}
CURL = {"shown_by": ["curl"], "packages": ["curl", "curl-minimal"], "optional": False}


class Noting(packages.Manager):
    name, program = "noting", "noting"

    @staticmethod
    def refresh():
        return ["noting", "refresh"]

    @staticmethod
    def install(names):
        return ["noting", "install", *names]

    @staticmethod
    def offered(names):
        return Noting.has

    @staticmethod
    def off(names):
        return {name: ["crb"] for name in names}


@pytest.fixture
def manager(monkeypatch):
    """Notes the commands; `fail` are the words of those that fail; `missing` is not installed by it."""
    Noting.calls, Noting.fail, Noting.missing, Noting.has = [], (), [], {"cmake": "1", "curl": "1", "ninja-build": "1"}

    def run(command, failure, manager=None):
        Noting.calls.append(command)
        if command[1] in Noting.fail:
            raise running.Failed(f"{failure} (exit code 100): No space left on device")

    monkeypatch.setattr(install_packages, "run", run)
    monkeypatch.setattr(running, "run", run)
    monkeypatch.setattr(packages, "MANAGERS", (Noting,))
    monkeypatch.setattr(packages, "missing", lambda manager, needs: [one for one in needs if one in Noting.missing])
    return Noting


def main(**needs):
    return install_packages.main(["noting", json.dumps(needs)])


def test_lists_are_read_and_the_first_packages_that_are_offered_are_installed(manager):
    manager.has = {"cmake": "1", "curl-minimal": "1"}
    assert main(cmake=CMAKE, curl=CURL) == 0
    assert manager.calls == [["noting", "refresh"], ["noting", "install", "cmake", "curl-minimal"]]


def test_what_is_optional_is_left_out_where_no_repository_has_it(manager, capsys):
    """ninja-build/ninja#2199: in CRB, which is off on RHEL's rebuilds; make compiles as well."""
    manager.has = {"cmake": "1"}
    manager.missing = ["ninja"]
    assert main(ninja=NINJA, cmake=CMAKE) == 0
    assert manager.calls[-1] == ["noting", "install", "cmake"]
    assert "note: without ninja" in capsys.readouterr().out


def test_what_no_repository_has_is_named_with_those_that_are_off(manager, capsys):
    manager.has = {"curl": "1"}
    assert main(cmake=CMAKE, curl=CURL) == 1
    assert ["noting", "install"] not in [call[:2] for call in manager.calls]
    assert capsys.readouterr().out.splitlines()[-1] == (
        "error: no repository that is enabled on the host has cmake; switched off there: crb"
    )


def test_where_nobody_can_tell_the_first_packages_are_tried(manager):
    manager.has = None
    assert main(cmake=CMAKE, curl=CURL) == 0
    assert manager.calls[-1] == ["noting", "install", "cmake", "curl"]


def test_a_repository_that_is_gone_does_not_end_what_the_others_can_do(manager, capsys):
    manager.fail = ("refresh",)
    assert main(cmake=CMAKE) == 0
    manager.fail = ("refresh", "install")
    assert main(cmake=CMAKE) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("error: the packages were not installed (exit code 100)")
    assert "before that, noting cannot read its lists of packages" in last


def test_what_is_not_there_afterwards_is_named(manager, capsys):
    manager.missing = ["cmake"]
    assert main(cmake=CMAKE, curl=CURL) == 1
    assert "noting installed cmake curl, but these are missing: cmake" in capsys.readouterr().out


def test_an_unknown_manager(capsys):
    assert install_packages.main(["apk", "{}"]) == 1
    assert "'apk' is unknown" in capsys.readouterr().out


class Systemd:
    """Notes commands beside those of the package manager; `units` have the states of those that are there."""

    def __init__(self, calls):
        self.calls, self.units = calls, {}

    def show(self, unit, *_):
        return self.units.get(unit, {"ActiveState": "inactive", "UnitFileState": ""})

    def systemctl(self, *words, check=True):
        self.calls.append(["systemctl", *words])


@pytest.fixture
def systemd(manager, monkeypatch):
    made = Systemd(manager.calls)
    monkeypatch.setattr(install_packages, "show", made.show)
    monkeypatch.setattr(install_packages, "systemctl", made.systemctl)
    return made


NGINX = {**CURL, "packages": ["curl"], "unit": "nginx.service"}


@pytest.mark.parametrize("fails", [False, True])
def test_a_service_that_comes_with_a_package_is_not_started(manager, systemd, fails):
    manager.fail = ("install",) if fails else ()
    assert main(nginx=NGINX) == int(fails)
    assert manager.calls[1:] == [
        ["systemctl", "mask", "--runtime", "--quiet", "nginx.service"],
        ["noting", "install", "curl"],
        ["systemctl", "unmask", "--runtime", "--quiet", "nginx.service"],
        ["systemctl", "disable", "--quiet", "nginx.service"],
    ]


@pytest.mark.parametrize("state", [("active", "disabled"), ("inactive", "enabled"), ("activating", "")])
def test_a_service_that_the_owner_uses_stays_as_it_is(manager, systemd, state):
    systemd.units["nginx.service"] = dict(zip(("ActiveState", "UnitFileState"), state, strict=True))
    assert main(nginx=NGINX) == 0
    assert not [call for call in manager.calls if call[0] == "systemctl"]
