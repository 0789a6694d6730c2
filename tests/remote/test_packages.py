"""Package managers: what is missing, what brings it, and that every manager has all that is asked of one. What the real
programs say: tests/e2e/test_20_package_managers.py."""

from __future__ import annotations

import json

import packages
import pytest

CMAKE = {"shown_by": ["cmake"], "packages": ["cmake"], "optional": False}
GOMP = {"shown_by": ["/usr/lib64/libgomp.so.1", "/usr/lib/*-linux-gnu/libgomp.so.1"], "packages": ["libgomp1"],
        "optional": False}  # fmt: skip
CURL = {"shown_by": ["curl"], "packages": ["curl", "curl-minimal"], "optional": False}
DRIVER = {"shown_by": ["/usr/share/vulkan/icd.d/*.json"], "packages": ["radeon intel", "mesa"], "optional": False}


@pytest.fixture
def root(tmp_path):
    """A tree of a host; puts programs and files in it."""

    def put(*paths):
        for path in paths:
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).touch(mode=0o755)
        return str(tmp_path)

    return put


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """Puts a program that prints a text, and notes its arguments, first on PATH."""

    def put(name, text, code=0):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.told").write_text(text)
        program.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/calls\ncat {tmp_path}/{name}.told\nexit {code}\n')
        program.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    return put


class Offers(packages.Manager):
    """Has these packages."""

    has, elsewhere = {}, {}

    @staticmethod
    def offered(names):
        return Offers.has

    @staticmethod
    def off(names):
        return Offers.elsewhere


def test_a_program_or_a_library_is_there_wherever_the_distribution_puts_it(root):
    host = root("usr/local/bin/cmake", "usr/lib/x86_64-linux-gnu/libgomp.so.1")
    assert packages.missing(None, {"cmake": CMAKE, "libgomp": GOMP, "curl": CURL}, host) == ["curl"]


def test_the_package_s_name_does_not_matter_where_the_program_is_there(root, stub):
    """CentOS/sig-cloud-instance-images#41, amazonlinux/amazon-linux-2023#150: curl-minimal is installed, and the package
    `curl` clashes with it."""
    assert packages.missing(packages.Dnf, {"curl": CURL}, root("usr/bin/curl")) == []


def test_what_was_cut_off_in_its_installation_is_missing(root, stub):
    stub("dpkg-query", "cmake half-configured\ncurl installed\ncurl-minimal not-installed\n", code=1)
    assert packages.missing(packages.Apt, {"cmake": CMAKE, "curl": CURL}, root("usr/bin/cmake", "usr/bin/curl")) == [
        "cmake"
    ]


def test_a_file_that_is_no_program_is_none(root, tmp_path):
    host = root("usr/bin/cmake")
    (tmp_path / "usr/bin/cmake").chmod(0o644)
    assert packages.missing(None, {"cmake": CMAKE}, host) == ["cmake"]


def test_the_first_packages_that_are_offered_bring_it(monkeypatch):
    monkeypatch.setattr(Offers, "has", {"curl-minimal": "8.5", "intel": "1", "mesa": "25.1"})
    assert packages.offers(Offers, {"curl": CURL, "driver": DRIVER}) == {
        "curl": {"package": "curl-minimal", "version": "8.5", "off": []},
        "driver": {"package": "mesa", "version": "25.1", "off": []},  # all of an entry, or none of it
    }


def test_where_no_repository_has_it_those_that_are_off_are_named(monkeypatch):
    monkeypatch.setattr(Offers, "has", {"curl": "8.5"})
    monkeypatch.setattr(Offers, "elsewhere", {"mesa": ["crb"], "intel": ["epel", "crb"]})
    found = packages.offers(Offers, {"driver": DRIVER, "cmake": CMAKE})
    assert found["driver"] == {"package": None, "version": "", "off": ["crb", "epel"]}
    assert found["cmake"] == {"package": None, "version": "", "off": []}


def test_where_nobody_can_tell_nothing_is_said(monkeypatch, capsys):
    monkeypatch.setattr(packages, "MANAGERS", (Offers,))
    monkeypatch.setattr(Offers, "name", "known", raising=False)
    monkeypatch.setattr(Offers, "has", None)
    assert packages.main(["offers", "known", json.dumps({"curl": CURL})]) == 0
    assert json.loads(capsys.readouterr().out) == {}
    assert packages.main(["offers", "apk", "{}"]) == 1
    assert packages.choose(CURL, None) == "curl"


@pytest.mark.parametrize("manager", packages.MANAGERS)
def test_a_manager_has_every_command_and_a_name_of_its_own(manager):
    assert packages.by_name(manager.name) is manager
    assert manager.install(["a", "b"])[0] == manager.program and manager.install(["a", "b"])[-2:] == ["a", "b"]
    for method in ("offered", "would_change"):
        assert getattr(manager, method) is not getattr(packages.Manager, method)


def test_apt_is_asked_what_these_packages_would_change(stub, tmp_path):
    stub("apt-get", "Reading package lists...\nInst a (1)\nRemv nvidia-driver-580 [2]\nConf a (1)\n")
    assert packages.Apt.would_change(["a", "b"]) == ["a", "nvidia-driver-580"]
    (call,) = (tmp_path / "calls").read_text().splitlines()
    assert "--simulate" in call and call.endswith("install a b")


def test_ubuntu_without_universe(stub):
    stub("apt-get", "Ubuntu main\nUbuntu restricted\n")
    assert packages.Apt.off(["glslc"]) == {"glslc": ["universe"]}
    stub("apt-get", "Ubuntu main\nUbuntu universe\n")
    assert packages.Apt.off(["glslc"]) == {}


def test_of_many_repositories_that_are_off_the_likely_ones_are_asked(stub, tmp_path):
    """RHEL's subscription has some two hundred, each of which is read as a whole."""
    names = [f"product-{n}-rpms" for n in range(20)]
    listed = "repo id   repo name\n" + "".join(
        f"{one}  {one}\n" for one in [*names, "codeready-builder-for-rhel-9-x86_64-debug-rpms", "crb"]
    )
    stub("dnf", listed)
    packages.Dnf.off(["ninja-build"])
    asked = (tmp_path / "calls").read_text().split()
    assert next(word for word in asked if word.startswith("--enablerepo=")) == "--enablerepo=crb"
    assert sum(word.startswith("--enablerepo=") for word in asked) == packages.MOST_ASKED
    assert not any("debug" in word for word in asked)


def test_the_manager_of_this_host_is_the_first_whose_program_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(packages, "PLACES", str(tmp_path))
    assert packages.detect() is None
    for manager in reversed(packages.MANAGERS):
        (tmp_path / manager.program).write_text("#!/bin/sh\n")
        (tmp_path / manager.program).chmod(0o755)
        assert packages.detect() is manager


def test_dnf_trusts_the_company_s_authority(monkeypatch):
    """ollama/ollama#5446: dnf reads the proxy from the environment, and certificates from an option alone."""
    monkeypatch.delenv("CURL_CA_BUNDLE", raising=False)
    assert not [word for word in packages.Dnf.install(["cmake"]) if "sslcacert" in word]
    monkeypatch.setenv("CURL_CA_BUNDLE", "/run/llamafleet/certificates.pem")
    assert "--setopt=sslcacert=/run/llamafleet/certificates.pem" in packages.Dnf.install(["cmake"])
