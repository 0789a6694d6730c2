"""Which CUDA toolkit is used or installed: one situation a file in tests/toolkit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from llamafleet.build import cuda_support, nvidia_repository
from llamafleet.build.cuda_toolkit import (
    Install,
    InstalledToolkit,
    Repositories,
    Toolkit,
    Unsuitable,
    architectures,
    choose_toolkit,
)
from llamafleet.host.installed import Offer
from tasks.toolkit import spec
from tests import planning

CASES = {
    path.stem: yaml.safe_load(path.read_text())
    for path in sorted((Path(__file__).parents[1] / "toolkit").glob("*.yaml"))
}
INSTALLING = [name for name, case in CASES.items() if "install" in case]
WHOLE = {"headers": True, "cublas": True, "cudart": True, "driver_stub": True, "host_compiler": "14.2.0",
         "accepted_compiler": None, "problems": [], "aliases": [], "distro": False}  # fmt: skip
OUTCOMES = {"use": Toolkit, "install": Install, "unsuitable": Unsuitable}


def host(case):
    known = {"id": "debian", "version": "13", "arch": "x86_64", "libc": "2.41"}
    driver = {"driver": case["driver"]} if "driver" in case else {}
    return planning.machine(
        [{"compute_capability": one} for one in case["gpus"]], os={**known, **case.get("os", {})}, **driver,
        package_manager=case.get("package_manager"),
    )  # fmt: skip


def toolkit(given):
    return InstalledToolkit.from_json({"nvcc": f"{given['path']}/bin/nvcc", **WHOLE, **given})


def decide(case):
    offers = {name: Offer(name, version) for name, version in case.get("offers", {}).items()}
    own = Repositories(case.get("compiler"), offers)
    found = [toolkit(given) for given in case.get("found", [])]
    return choose_toolkit(case.get("asked", "auto"), host(case), found, own)


def value_of(outcome, key):
    value = outcome.repository.url if key == "url" else getattr(outcome, key)
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("name", CASES)
def test_case(name):
    case = CASES[name]
    outcome = decide(case)
    (kind,) = OUTCOMES.keys() & case.keys()
    assert isinstance(outcome, OUTCOMES[kind]), outcome
    if kind == "unsuitable":
        text = "\n".join([outcome.reason, *outcome.suggestions])
        assert [words for words in case[kind] if words not in text] == [], text
        assert outcome.suggestions
    else:
        assert {key: value_of(outcome, key) for key in case[kind]} == case[kind]
    if "architectures" in case:
        assert list(architectures(host(case))) == case["architectures"]


@pytest.mark.parametrize("name", INSTALLING)
def test_identity_is_the_same_once_it_is_installed(name):
    """Else the second run would build everything again."""
    case = CASES[name]
    before = decide(case)
    path = before.nvcc.removesuffix("/bin/nvcc")
    installed = {"path": path, "nvcc": before.nvcc, "version": before.version, "distro": path == "/usr"}
    others = [one for one in case.get("found", []) if one["path"] != path]
    after = decide({**case, "found": [*others, installed]})
    assert isinstance(after, Toolkit)
    assert (after.identity, after.nvcc) == (before.identity, before.nvcc)


def test_what_the_archive_has_may_move_within_a_release():
    """Debian may update its toolkit in a point release; the key stays, as it was before installing."""
    given = {"path": "/usr", "nvcc": "/usr/bin/nvcc", "version": "12.5", "distro": True}
    assert decide({"asked": "distro", "gpus": ["8.9"], "found": [given]}).identity == "distro-debian-13"


def test_architectures_are_those_of_the_usable_gpus_in_order():
    gpus = [{"compute_capability": one} for one in ("12.0", "8.9", "9.0", "8.9", "10.0")]
    gpus += [{"compute_capability": "7.5", "problem": "fallen off the bus"}, {"compute_capability": None}]
    assert architectures(planning.machine(gpus)) == ("89", "90", "100", "120a-real")


def test_every_missing_part_is_named():
    lacking = toolkit({"path": "/opt/cuda", "version": None, "headers": False, "cublas": False})
    unsuitable = choose_toolkit("/opt/cuda", host({"gpus": ["8.9"]}), [lacking])
    for words in ("a working nvcc", "cuda_runtime.h", "cublas_v2.h"):
        assert words in unsuitable.reason


def test_a_driver_of_a_later_major_runs_every_older_toolkit():
    assert cuda_support.unfit_for_driver((11, 8), (13, 0)) is None
    assert "needs a driver for CUDA 13" in cuda_support.unfit_for_driver((13, 0), (12, 9))


@pytest.mark.parametrize(("capability", "first", "last"), [
    ("6.1", "11.8", "12.9"), ("7.0", "11.8", "12.9"), ("7.5", "11.8", "13.4"), ("8.9", "11.8", "13.4"),
    ("9.0", "11.8", "13.4"), ("10.0", "12.8", "13.4"), ("12.0", "12.8", "13.4"), ("12.1", "12.9", "13.4"),
])  # fmt: skip
def test_range_of_toolkits_for_a_gpu(capability, first, last):
    able = [
        cuda_support.text(one) for one in cuda_support.RELEASES if cuda_support.unfit_for_gpu(one, capability) is None
    ]
    assert (able[0], able[-1]) == (first, last)


@pytest.mark.parametrize("version", ["8", "", "rolling"])
def test_what_is_no_version_is_refused(version):
    with pytest.raises(ValueError, match="not a version"):
        cuda_support.version(version)


def test_the_program_on_the_host_gets_every_value_that_it_reads():
    install = decide({"os": {"id": "ubuntu", "version": "24.04", "libc": "2.39"}, "gpus": ["8.9"]})
    url = f"{nvidia_repository.BASE}/ubuntu2404/x86_64"
    assert spec(install) == {
        "manager": "apt", "packages": list(install.packages), "components": [], "repository": "ubuntu2404",
        "url": url, "key_package": f"{url}/cuda-keyring_1.1-1_all.deb", "repo_file": f"{url}/cuda-ubuntu2404.repo",
        "nvcc": "/usr/local/cuda-13.0/bin/nvcc",
    }  # fmt: skip
    assert spec(dataclasses.replace(install, repository=None))["url"] is None


@pytest.mark.parametrize(("toolkit", "glibc", "function"), [
    ((12, 9), "2.40", None), ((12, 9), "2.41", "cospi"), ((13, 0), "2.41", None), ((13, 1), "2.42", "rsqrt"),
    ((13, 2), "2.43", None), ((11, 8), "musl", None),
])  # fmt: skip
def test_nvidias_headers_against_glibc(toolkit, glibc, function):
    why = cuda_support.unfit_for_glibc(toolkit, glibc)
    assert function in why if function else why is None
