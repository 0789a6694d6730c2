"""Real package managers, as far as Debian has them, in a tree of their own, against small repositories made here: what
they offer, what is off, what they install, and that their locks are waited for."""

import fcntl
import hashlib
import json
import os
import subprocess
import sys
import tarfile
import threading
import time

import pytest

from tests.e2e.deploying import ROOT

REMOTE = ROOT / "llamafleet" / "remote"
SPEC = """
Name: {first}
Version: 3.26.5
Release: 2
Summary: x
License: x
BuildArch: noarch
AutoReqProv: no
%description
x
%install
mkdir -p %{{buildroot}}/usr/bin
touch {files}
%files
/usr/bin/{first}
"""
PACKAGE = (
    "%package -n {name}\nSummary: x\nAutoReqProv: no\n%description -n {name}\nx\n%files -n {name}\n/usr/bin/{name}\n"
)
# What the enabled repository has, and what the one that is switched off has.
HAS, OFF = ("cmake", "curl-minimal"), ("ninja", "glslc")


class Site:
    """A package manager's tree and repositories in a folder."""

    off: tuple[str, ...] = ("crb",)
    version = "3.26.5-2"

    def __init__(self, folder):
        self.folder, self.root, self.bin = folder, folder / "root", folder / "bin"
        for one in (self.root, self.bin, folder / "has", folder / "off"):
            one.mkdir()
        self.make()

    @property
    def name(self):
        return type(self).__name__.lower()

    def wrap(self, program, *options, environment=""):
        """Put the real program, with these options, first on PATH."""
        path = self.bin / program
        path.write_text(f'#!/bin/sh\n{environment}\nexec /usr/bin/{program} {" ".join(map(str, options))} "$@"\n')
        path.chmod(0o755)

    def needs(self, **entries):
        """Needs by a file in the tree: by word the packages, a `?` first where the host does without it."""
        return {
            word: {"shown_by": [f"{self.root}/usr/bin/{one}" for entry in packages for one in entry.split()],
                   "packages": [entry.removeprefix("?") for entry in packages], "optional": packages[0][0] == "?"}
            for word, packages in entries.items()
        }  # fmt: skip

    def run(self, program, *arguments):
        words = [sys.executable, "-s", "-B", str(REMOTE / program), *arguments]
        environment = {**os.environ, "PATH": f"{self.bin}:{os.environ['PATH']}"}
        return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=120)

    def offers(self, needs):
        done = self.run("packages.py", "offers", self.name, json.dumps(needs))
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def install(self, needs):
        return self.run("install_packages.py", self.name, json.dumps(needs))

    def would_change(self, *names):
        code = (
            f"import packages, json; print(json.dumps(packages.by_name({self.name!r}).would_change({list(names)!r})))"
        )
        done = subprocess.run([sys.executable, "-s", "-B", "-c", code], cwd=REMOTE, capture_output=True, text=True,
                              env={**os.environ, "PATH": f"{self.bin}:{os.environ['PATH']}"}, timeout=60)  # fmt: skip
        return json.loads(done.stdout)

    def rpms(self):
        """Both repositories, of packages from one run of rpmbuild."""
        first, *others = (*HAS, *OFF)
        files = " ".join(f"%{{buildroot}}/usr/bin/{name}" for name in (first, *others))
        spec = SPEC.format(first=first, files=files) + "".join(PACKAGE.format(name=name) for name in others)
        (self.folder / "all.spec").write_text(spec)
        places = {"_topdir": self.folder / "build", "_rpmdir": self.folder / "rpms"}
        defined = [word for key, value in places.items() for word in ("--define", f"{key} {value}")]
        quiet(["rpmbuild", "-bb", "--quiet", *defined, str(self.folder / "all.spec")])
        for place, names in (("has", HAS), ("off", OFF)):
            for name in names:
                rpm = self.folder / f"rpms/noarch/{name}-3.26.5-2.noarch.rpm"
                rpm.rename(self.folder / place / rpm.name)
            quiet(["createrepo_c", "-q", str(self.folder / place)])

    def repositories(self):
        """A file of both for dnf and zypper, in a folder of its own."""
        (self.folder / "repos").mkdir()
        (self.folder / "repos/both.repo").write_text("".join(
            f"[{name}]\nname={name}\nbaseurl=file://{self.folder}/{place}\nenabled={enabled}\ngpgcheck=0\n"
            for name, place, enabled in (("base", "has", 1), ("crb", "off", 0))
        ))  # fmt: skip


class Dnf(Site):
    version = "3.26.5"

    def make(self):
        self.rpms()
        self.repositories()
        own = "".join(f"{name}dir={self.folder}/{name}\n" for name in ("cache", "log", "persist"))
        text = f"[main]\nreposdir={self.folder}/repos\ngpgcheck=0\nplugins=0\n{own}"
        (self.folder / "dnf.conf").write_text(text)
        self.wrap("dnf", f"--config={self.folder}/dnf.conf", f"--installroot={self.root}", "--releasever=9")


class Zypper(Site):
    def make(self):
        self.rpms()
        self.repositories()
        places = ("--root", self.root, "--reposd-dir", f"{self.folder}/repos", "--cache-dir", f"{self.folder}/cache")
        self.wrap("zypper", *places, "--no-gpg-checks")


class Pacman(Site):
    off = ()  # whether a repository that is off has a package cannot be seen

    def make(self):
        with tarfile.open(self.folder / "has/has.db", "w:gz") as lists:
            for name in HAS:
                self.package(name)
                lists.add(self.folder / f"desc-{name}", f"{name}-{self.version}/desc")
        (self.root / "var/lib/pacman").mkdir(parents=True)
        conf = f"[options]\nArchitecture = auto\nSigLevel = Never\n[has]\nServer = file://{self.folder}/has\n"
        (self.folder / "pacman.conf").write_text(conf)
        places = (f"--root={self.root}", f"--dbpath={self.root}/var/lib/pacman", f"--cachedir={self.folder}/cache")
        self.wrap("pacman", *places, f"--config={self.folder}/pacman.conf", f"--logfile={self.folder}/log")

    def package(self, name):
        tree = self.folder / f"tree-{name}"
        (tree / "usr/bin").mkdir(parents=True)
        (tree / "usr/bin" / name).touch(0o755)
        (tree / ".PKGINFO").write_text(f"pkgname = {name}\npkgver = {self.version}\narch = any\nsize = 0\n")
        path = self.folder / f"has/{name}-{self.version}-any.pkg.tar.gz"
        with tarfile.open(path, "w:gz") as tar:
            tar.add(tree / ".PKGINFO", ".PKGINFO")
            tar.add(tree / "usr", "usr")
        values = {"FILENAME": path.name, "NAME": name, "VERSION": self.version, "ARCH": "any", "ISIZE": "0",
                  "CSIZE": path.stat().st_size, "SHA256SUM": hashlib.sha256(path.read_bytes()).hexdigest()}  # fmt: skip
        desc = "".join(f"%{key}%\n{value}\n\n" for key, value in values.items())
        (self.folder / f"desc-{name}").write_text(desc)


class Apt(Site):
    off = ("universe",)  # the archive says that it is Ubuntu's, and has no other component than main

    def make(self):
        entries = [self.deb(name) for name in HAS]
        lists = self.folder / "has/dists/noble/main/binary-amd64"
        lists.mkdir(parents=True)
        (lists / "Packages").write_text("\n".join(entries))
        digest = hashlib.sha256((lists / "Packages").read_bytes()).hexdigest()
        size = (lists / "Packages").stat().st_size
        (self.folder / "has/dists/noble/Release").write_text(
            "Origin: Ubuntu\nSuite: noble\nComponents: main\nArchitectures: amd64\n"
            f"SHA256:\n {digest} {size} main/binary-amd64/Packages\n"
        )
        for place in ("etc/apt/preferences.d", "var/lib/dpkg/updates", "var/lib/dpkg/info", "var/lib/apt/lists/partial",
                      "var/cache/apt/archives/partial", "var/log/apt"):  # fmt: skip
            (self.root / place).mkdir(parents=True)
        (self.root / "var/lib/dpkg/status").touch()
        line = f"deb [trusted=yes arch=amd64] file:{self.folder}/has noble main\n"
        (self.root / "etc/apt/sources.list").write_text(line)
        conf = self.folder / "apt.conf"
        conf.write_text(
            f'Dir "{self.root}";\nDir::State::status "{self.root}/var/lib/dpkg/status";\nAPT::Architecture "amd64";\n'
            f'APT::Architectures {{ "amd64"; }};\nDPkg::Options {{ "--root={self.root}"; "--force-all"; }};\n'
            'Dir::Bin::dpkg "/usr/bin/dpkg";\nDir::Bin::methods "/usr/lib/apt/methods";\nAPT::Sandbox::User "root";\n'
        )
        for program in ("apt-get", "apt-cache"):
            self.wrap(program, environment=f"export APT_CONFIG={conf}")
        self.wrap("dpkg-query", f"--admindir={self.root}/var/lib/dpkg")

    def deb(self, name):
        tree = self.folder / f"tree-{name}"
        (tree / "usr/bin").mkdir(parents=True)
        (tree / "usr/bin" / name).touch(0o755)
        (tree / "DEBIAN").mkdir()
        control = f"Package: {name}\nVersion: {self.version}\nArchitecture: amd64\nMaintainer: x\nDescription: x\n"
        (tree / "DEBIAN/control").write_text(control)
        deb = self.folder / f"has/{name}.deb"
        quiet(["dpkg-deb", "-Znone", "-b", str(tree), str(deb)])
        data = deb.read_bytes()
        return f"{control}Filename: {name}.deb\nSize: {len(data)}\nSHA256: {hashlib.sha256(data).hexdigest()}\n"


def quiet(words):
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)


@pytest.fixture(params=[Apt, Dnf, Zypper, Pacman])
def site(request, tmp_path):
    return request.param(tmp_path)


def test_what_is_offered_is_what_is_installed(site):
    """CentOS/sig-cloud-instance-images#41 (curl-minimal in curl's place) and ninja-build/ninja#2199 (Ninja in CRB, which
    is off)."""
    needs = site.needs(cmake=["cmake"], curl=["curl", "curl-minimal"], ninja=["?ninja"])
    if isinstance(site, Apt | Pacman):  # dnf and zypper read their lists whenever they are asked
        assert site.offers(needs) == {}, "before the lists were read nobody can tell"
    done = site.install(needs)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "note: without ninja, which no enabled repository has" in done.stdout
    there = {path.name for path in (site.root / "usr/bin").iterdir()}
    assert there == {"cmake", "curl-minimal"}
    offered = site.offers(needs)
    assert offered["cmake"] == {"package": "cmake", "version": site.version, "off": []}
    assert offered["curl"]["package"] == "curl-minimal"
    assert offered["ninja"] == {"package": None, "version": "", "off": list(site.off)}


def test_what_no_repository_has_is_an_error_and_nothing_is_installed(site):
    needs = site.needs(cmake=["cmake"], glslc=["glslc"])
    done = site.install(needs)
    assert done.returncode == 1
    off = f"; switched off there: {', '.join(site.off)}" if site.off else ""
    assert done.stdout.splitlines()[-1] == f"error: no repository that is enabled on the host has glslc{off}"
    assert not (site.root / "usr/bin").exists()
    assert site.would_change("cmake") == ["cmake"]
    assert not (site.root / "usr/bin").exists()


def released_later(release):
    """Call it after the first attempt has failed."""

    def wait():
        time.sleep(1.5)
        release()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_apt_s_lists_are_locked_on_a_first_boot(tmp_path):
    """cfengine#2477: `apt-get update` fails at once where another apt holds the lock of the lists."""
    site = Apt(tmp_path)
    with (site.root / "var/lib/apt/lists/lock").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        waiting = released_later(lambda: fcntl.lockf(lock, fcntl.LOCK_UN))
        done = site.install(site.needs(cmake=["cmake"]))
        waiting.join()
    assert "Could not get lock" in done.stdout and "waiting for it" in done.stdout
    assert done.returncode == 0, done.stdout


def test_pacman_s_lock_is_waited_for(tmp_path):
    site = Pacman(tmp_path)
    lock = site.root / "var/lib/pacman/db.lck"
    lock.touch()
    waiting = released_later(lock.unlink)
    done = site.install(site.needs(cmake=["cmake"]))
    waiting.join()
    assert "unable to lock database" in done.stdout and done.returncode == 0, done.stdout
