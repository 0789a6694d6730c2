"""The host program that installs a toolkit, with stand-ins for apt-get, dnf, curl and dpkg-deb.

The stand-ins note how they were called; apt-get's "installs" a whole toolkit. What real packages do is
for the tests on sandbox hosts.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from llamafleet.remote import network
from tests import forked
from tests.remote.test_toolkits import debians, nvidias

PROGRAM = Path(__file__).parents[2] / "llamafleet" / "remote" / "install_toolkit.py"
URL = "https://developer.download.nvidia.com/compute/cuda/repos/ubuntu2404/x86_64"
DEBIAN = """Types: deb deb-src
# a mirror in the house
URIs: http://mirror.example/debian
Suites: trixie trixie-updates
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
Check-Valid-Until: no

Types: deb
URIs: https://vendor.example/apt
Suites: trixie
Components: main
"""
LISTED = """Debian\thttp://mirror.example/debian/\ttrixie\tmain
Debian\thttp://mirror.example/debian/\ttrixie-updates\tmain
Vendor\thttps://vendor.example/apt/\ttrixie\tmain
"""
NOTE = '#!/bin/sh\necho "$(basename "$0") $*" >> "$NOTES"\n'
APT_GET = (
    NOTE
    + """
case "$*" in
  *indextargets*) cat "$CASE/listed" ;;
  *--simulate*) cat "$CASE/simulated" 2>/dev/null ;;
  *install* | *"-S --needed"*) echo "Setting up" ; test ! -e "$CASE/broken" || { echo "E: Unable to locate package"; exit 100; }
             test ! -d "$CASE/packages" || cp -a "$CASE/packages/." "$ROOT/" ;;
esac
"""
)
CURL = (
    NOTE
    + """
while [ $# -gt 1 ]; do test "$1" != -o || target=$2; shift; done
test ! -e "$CASE/offline" || exit 6
cp "$CASE/downloaded" "$target"
"""
)
DPKG_DEB = NOTE + 'mkdir -p "$3/usr/share/keyrings" && echo KEY > "$3/usr/share/keyrings/cuda-archive-keyring.gpg"\n'


class Host:
    """A tree to stand for the host, and a folder that says how the stand-ins behave."""

    def __init__(self, folder):
        self.root, self.case, self.notes = folder / "root", folder / "case", folder / "notes"
        for name in ("etc/apt/sources.list.d", "etc/yum.repos.d", "etc/zypp/repos.d"):
            (self.root / name).mkdir(parents=True)
        self.case.mkdir()
        (self.case / "listed").write_text(LISTED)
        (self.case / "downloaded").write_text("a package")
        self.sources = self.root / "etc/apt/sources.list.d"
        (self.sources / "debian.sources").write_text(DEBIAN)
        self.programs = folder / "bin"
        self.programs.mkdir()
        for name, text in {
            "apt-get": APT_GET,
            "dnf": APT_GET,
            "zypper": APT_GET,
            "pacman": APT_GET,
            "curl": CURL,
            "dpkg-deb": DPKG_DEB,
        }.items():
            (self.programs / name).write_text(text)
            (self.programs / name).chmod(0o755)

    def install(self, **spec):
        known = {"manager": "apt", "packages": ["nvidia-cuda-toolkit"], "components": [], "repository": None,
                 "url": None, "key_package": None, "repo_file": None, "nvcc": "/usr/bin/nvcc"}  # fmt: skip
        path = self.case / "spec.json"
        path.write_text(json.dumps({**known, **spec}))
        # This machine's own certificates are none of the host's.
        without = {name: value for name, value in os.environ.items() if name not in network.BUNDLE_VARIABLES}
        environment = {**without, "PATH": f"{self.programs}:/usr/bin:/bin", "ROOT": str(self.root),
                       "CASE": str(self.case), "NOTES": str(self.notes)}  # fmt: skip
        return forked.programs().run([PROGRAM, path, self.root], env=environment)

    def from_debian(self):
        return self.install(components=["contrib", "non-free"])

    def from_nvidia(self):
        return self.install(
            repository="ubuntu2404", url=URL, key_package=f"{URL}/cuda-keyring_1.1-1_all.deb",
            packages=["cuda-nvcc-12-8", "libcublas-dev-12-8"], nvcc="/usr/local/cuda-12.8/bin/nvcc",
        )  # fmt: skip

    def from_fedora(self):
        url = URL.replace("ubuntu2404", "fedora43")
        return self.install(
            manager="dnf", repository="fedora43", url=url, repo_file=f"{url}/cuda-fedora43.repo",
            packages=["cuda-nvcc-13-2"], nvcc="/usr/local/cuda-13.2/bin/nvcc",
        )  # fmt: skip

    def calls(self, program):
        lines = self.notes.read_text().splitlines() if self.notes.exists() else []
        return [line for line in lines if line.startswith(program + " ") and "indextargets" not in line]


@pytest.fixture
def host(tmp_path):
    return Host(tmp_path)


@pytest.fixture
def debian(host):
    debians(host.case / "packages")
    return host


@pytest.fixture
def ubuntu(host):
    nvidias(host.case / "packages", "/usr/local/cuda-12.8", gcc=99)
    return host


def test_debian_gets_non_free_from_its_own_mirror(debian):
    done = debian.from_debian()
    assert done.returncode == 0, done.stdout + done.stderr
    assert (debian.sources / "llamafleet-nonfree.sources").read_text() == (
        "Types: deb\nURIs: http://mirror.example/debian\nSuites: trixie\nComponents: contrib non-free\n"
        "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\nCheck-Valid-Until: no\n\n"
        "Types: deb\nURIs: http://mirror.example/debian\nSuites: trixie-updates\nComponents: contrib non-free\n"
        "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\nCheck-Valid-Until: no\n"
    )
    assert (debian.sources / "debian.sources").read_text() == DEBIAN, "the owner's file is the owner's"
    update, install = debian.calls("apt-get")
    assert update.endswith(" update") and install.endswith(" --no-install-recommends install nvidia-cuda-toolkit")
    assert "DPkg::Lock::Timeout=300" in install
    assert "CUDA 12.4 is at /usr" in done.stdout


def test_one_line_sources_and_a_key_written_into_the_stanza(debian):
    (debian.sources / "debian.sources").write_text(
        "Types: deb\nURIs: http://mirror.example/debian/\nSuites: trixie-updates\nComponents: main\n"
        "Signed-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n mQINBF==\n -----END PGP PUBLIC KEY BLOCK-----\n"
    )
    (debian.root / "etc/apt/sources.list").write_text(
        "# deb http://mirror.example/debian trixie contrib\ndeb-src http://mirror.example/debian trixie main\n"
        "deb [arch=amd64,i386 signed-by=/k.gpg] http://mirror.example/debian trixie main contrib # ours\n"
    )
    assert debian.from_debian().returncode == 0
    assert (debian.sources / "llamafleet-nonfree.sources").read_text() == (
        "Types: deb\nURIs: http://mirror.example/debian\nSuites: trixie\nComponents: contrib non-free\n"
        "Architectures: amd64 i386\nSigned-By: /k.gpg\n\n"
        "Types: deb\nURIs: http://mirror.example/debian/\nSuites: trixie-updates\nComponents: contrib non-free\n"
        "Signed-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n mQINBF==\n -----END PGP PUBLIC KEY BLOCK-----\n"
    )


def test_only_what_is_not_enabled_is_added(debian):
    listed = LISTED + "Debian\thttp://mirror.example/debian/\ttrixie\tcontrib\n"
    (debian.case / "listed").write_text(listed)
    assert debian.from_debian().returncode == 0
    ours = debian.sources / "llamafleet-nonfree.sources"
    assert "Components: non-free\n" in ours.read_text() and "contrib" not in ours.read_text()


def test_components_that_are_enabled_need_no_source(debian):
    listed = "".join(f"Debian\thttp://mirror.example/debian/\ttrixie\t{one}\n" for one in ("contrib", "non-free"))
    (debian.case / "listed").write_text(LISTED + listed)
    assert debian.from_debian().returncode == 0
    assert [path.name for path in debian.sources.iterdir()] == ["debian.sources"]


def test_no_source_of_the_archive_is_said(debian):
    (debian.case / "listed").write_text("Vendor\thttps://vendor.example/apt/\ttrixie\tmain\n")
    done = debian.from_debian()
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].startswith("error: no source of the distribution's own archive")
    assert not [call for call in debian.calls("apt-get") if "install" in call]


def test_the_hosts_driver_is_not_replaced(debian):
    """Debian's toolkit depends on libcuda1, which NVIDIA's installer does not provide."""
    driver = debian.root / "proc/driver/nvidia/version"
    driver.parent.mkdir(parents=True)
    driver.write_text("NVRM version: 580.159.04\n")
    simulated = "Inst libcublas12 (12.4)\nInst libcuda1 (550.163.01-2)\nConf libcuda1\n"
    (debian.case / "simulated").write_text(simulated)
    done = debian.from_debian()
    assert done.returncode == 1 and "would change the NVIDIA driver of this host (libcuda1)" in done.stdout
    assert [call for call in debian.calls("apt-get") if "install" in call and "--simulate" not in call] == []
    (debian.case / "simulated").write_text(simulated.replace("Inst libcuda1 (550.163.01-2)\n", ""))
    assert debian.from_debian().returncode == 0


def test_packages_that_are_not_found(debian):
    (debian.case / "broken").touch()
    done = debian.from_debian()
    assert done.returncode == 1
    last = done.stdout.splitlines()[-1]
    assert last == ("error: the packages were not installed (exit code 100): "
                    "Setting up | E: Unable to locate package")  # fmt: skip


def test_packages_that_bring_no_compiler(host):
    done = host.from_debian()
    assert done.returncode == 1 and "there is no compiler at /usr/bin/nvcc" in done.stdout


def test_packages_that_bring_half_a_toolkit(ubuntu):
    (ubuntu.case / "packages/usr/local/cuda-12.8/targets/x86_64-linux/lib/libcublas.so").unlink()
    done = ubuntu.from_nvidia()
    assert done.returncode == 1 and "/usr/local/cuda-12.8/bin/nvcc is not usable: cublas" in done.stdout


def test_nvidias_repository_comes_with_its_key_and_below_the_distributions(ubuntu):
    done = ubuntu.from_nvidia()
    assert done.returncode == 0, done.stdout + done.stderr
    key = "/usr/share/keyrings/llamafleet-nvidia-cuda.gpg"
    source = (ubuntu.sources / "llamafleet-nvidia-cuda.sources").read_text()
    assert source == f"Types: deb\nURIs: {URL}\nSuites: /\nSigned-By: {key}\n"
    assert (ubuntu.root / key.lstrip("/")).read_text() == "KEY\n"
    pin = (ubuntu.root / "etc/apt/preferences.d/llamafleet-nvidia-cuda").read_text()
    assert pin == "Package: *\nPin: origin developer.download.nvidia.com\nPin-Priority: 100\n"
    assert [call.split()[-1] for call in ubuntu.calls("curl")] == [f"{URL}/cuda-keyring_1.1-1_all.deb"]
    assert ubuntu.calls("apt-get")[-1].endswith("install cuda-nvcc-12-8 libcublas-dev-12-8")


@pytest.mark.parametrize("line", [
    f"deb [signed-by=/usr/share/keyrings/cuda-archive-keyring.gpg] {URL}/ /\n", f"deb {URL} /\n",
])  # fmt: skip
def test_the_owners_own_entry_of_nvidias_repository_is_used(ubuntu, line):
    (ubuntu.sources / "cuda-ubuntu2404-x86_64.list").write_text(line)
    assert ubuntu.from_nvidia().returncode == 0
    assert ubuntu.calls("curl") == [] and not (ubuntu.sources / "llamafleet-nvidia-cuda.sources").exists()
    assert not (ubuntu.root / "etc/apt/preferences.d").exists()


def test_a_download_that_fails_leaves_nothing(ubuntu):
    (ubuntu.case / "offline").touch()
    done = ubuntu.from_nvidia()
    assert done.returncode == 1 and f"cannot download {URL}/cuda-keyring_1.1-1_all.deb (exit code 6)" in done.stdout
    assert [path.name for path in ubuntu.sources.iterdir()] == ["debian.sources"]


def test_a_second_time_changes_no_file(ubuntu):
    assert ubuntu.from_nvidia().returncode == 0
    before = {path: path.stat().st_ino for path in ubuntu.root.glob("etc/**/*")}
    assert ubuntu.from_nvidia().returncode == 0
    assert {path: path.stat().st_ino for path in ubuntu.root.glob("etc/**/*")} == before
    assert len(ubuntu.calls("curl")) == 1


REPO = "[cuda-fedora43-x86_64]\nname=cuda\nbaseurl=https://x\nenabled=1\ngpgcheck=1\ngpgkey=https://x/1.pub\n"


def test_fedora_gets_nvidias_repository_without_its_drivers(host):
    nvidias(host.case / "packages", "/usr/local/cuda-13.2", "13.2", gcc=99)
    (host.case / "downloaded").write_text(REPO)
    done = host.from_fedora()
    assert done.returncode == 0, done.stdout + done.stderr
    text = (host.root / "etc/yum.repos.d/llamafleet-cuda-fedora43.repo").read_text()
    # A name of its own: of two repositories of one name the first counts, which an owner may have switched off.
    assert text.startswith("[llamafleet-cuda-fedora43]\nname=cuda\nbaseurl=https://x\ngpgcheck=1\n")
    assert "\nenabled=1\n" in text
    (excluded,) = [line for line in text.splitlines() if line.startswith("excludepkgs=")]
    assert {"nvidia-driver*", "nvidia-open*", "cuda-drivers*", "libnvidia-*"} <= set(excluded[12:].split())
    assert host.calls("dnf") == ["dnf -y --setopt=install_weak_deps=False install cuda-nvcc-13-2"]


@pytest.mark.parametrize("text", ["<html>404</html>", REPO.replace("gpgcheck=1", "gpgcheck=0"), REPO + REPO])
def test_a_repository_without_checked_signatures_is_refused(host, text):
    (host.case / "downloaded").write_text(text)
    done = host.from_fedora()
    assert done.returncode == 1 and "is not one repository with checked signatures" in done.stdout
    assert list((host.root / "etc/yum.repos.d").iterdir()) == []


@pytest.mark.parametrize(("enabled", "ours"), [("1", False), ("0", True)])
def test_nvidias_repository_that_an_owner_has_switched_off_stays_off_and_ours_is_added(host, enabled, ours):
    nvidias(host.case / "packages", "/usr/local/cuda-13.2", "13.2", gcc=99)
    url = URL.replace("ubuntu2404", "fedora43")
    own = REPO.replace("https://x\n", url + "\n", 1)
    (host.case / "downloaded").write_text(own)
    theirs = host.root / "etc/yum.repos.d/cuda-fedora43.repo"
    theirs.write_text(own.replace("enabled=1", f"enabled={enabled}"))
    before = theirs.read_text()
    assert host.from_fedora().returncode == 0
    assert (host.root / "etc/yum.repos.d/llamafleet-cuda-fedora43.repo").exists() == ours
    assert theirs.read_text() == before
    assert host.from_fedora().returncode == 0 and len(host.calls("curl")) == ours  # once, if at all


def test_apt_s_entry_that_is_switched_off_is_none(ubuntu):
    text = f"Types: deb\nURIs: {URL}\nSuites: /\nEnabled: no\n"
    (ubuntu.sources / "cuda.sources").write_text(text)
    (ubuntu.sources / "cuda.list").write_text(f"# deb {URL}/ /\n")
    assert ubuntu.from_nvidia().returncode == 0
    assert (ubuntu.sources / "llamafleet-nvidia-cuda.sources").exists()
    assert (ubuntu.sources / "cuda.sources").read_text() == text


def test_opensuse_takes_from_nvidias_repository_only_what_nobody_else_has(host):
    nvidias(host.case / "packages", "/usr/local/cuda-13.0", "13.0", gcc=99)
    url = URL.replace("ubuntu2404", "opensuse15")
    (host.case / "downloaded").write_text(REPO)
    done = host.install(manager="zypper", repository="opensuse15", url=url, repo_file=f"{url}/cuda-opensuse15.repo",
                        packages=["cuda-nvcc-13-0"], nvcc="/usr/local/cuda-13.0/bin/nvcc")  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    text = (host.root / "etc/zypp/repos.d/llamafleet-cuda-opensuse15.repo").read_text()
    assert text.startswith("[llamafleet-cuda-opensuse15]\n") and text.endswith("enabled=1\npriority=200\n")
    assert host.calls("zypper")[-1].endswith("--no-recommends --auto-agree-with-licenses cuda-nvcc-13-0")


def test_arch_s_own_package(host):
    nvidias(host.case / "packages", "/opt/cuda", "13.4", gcc=99)
    done = host.install(manager="pacman", packages=["cuda"], nvcc="/opt/cuda/bin/nvcc")
    assert done.returncode == 0, done.stdout + done.stderr


def test_windows_driver_under_wsl_is_not_hidden_by_one_of_linux(debian):
    """Under WSL there is no /proc/driver/nvidia."""
    driver = debian.root / "usr/lib/wsl/lib/libcuda.so.1"
    driver.parent.mkdir(parents=True)
    driver.touch()
    (debian.case / "simulated").write_text("Inst libcublas12 (12.4)\nInst libnvidia-compute-550 (550.163)\n")
    done = debian.from_debian()
    assert done.returncode == 1
    assert "would change the NVIDIA driver of this host (libnvidia-compute-550)" in done.stdout
