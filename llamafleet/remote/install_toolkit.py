"""Install a CUDA toolkit from packages.

Contract: `install_toolkit.py SPEC.json [ROOT]`, where SPEC has manager (a name in packages.py), packages, components
(of the distribution's archive, such as "non-free"), repository (NVIDIA's name of it | null), url (its address | null),
key_package and repo_file (addresses | null), and nvcc (where the compiler will be). Progress lines on stdout; the last
one of a failure begins with `error: `. Exit 0: the toolkit at nvcc is complete, as toolkits.py finds it. Root, curl,
apt or dnf, standard library; common.py, packages.py and toolkits.py lie beside it. ROOT stands before every path in
tests.

No file of the owner's is changed: sources go into files of our own, whose names begin with `llamafleet-`. NVIDIA's
repository also holds drivers; it is set up so that no driver is taken from it unasked, and an installation that would
change the host's driver is refused.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from typing import Any, Iterator, Type  # the contract is Python 3.8, whose own are typing's

import packages
import toolkits
from common import output_of, replace_file

SOURCES = "/etc/apt/sources.list.d"
COMPONENTS = SOURCES + "/llamafleet-nonfree.sources"
# Options of a one-line source whose names are others in a stanza (sources.list(5)).
ONE_LINE_NAMES = {"arch": "Architectures", "lang": "Languages", "target": "Targets", "pdiffs": "PDiffs"}
KEY = "/usr/share/keyrings/llamafleet-nvidia-cuda.gpg"
# Packages of the driver, kernel or user space, by NVIDIA's and the distributions' names. The stub that
# is linked with (cuda-driver-dev) is none.
DRIVER = re.compile(
    r"(cuda-drivers|cuda-compat|nvidia-(open|driver|kernel|dkms|firmware|headless|utils|compute)|libcuda1$"
    r"|libnvidia-(compute|ml1|cfg1|gl)|kmod-nvidia|xserver-xorg-video-nvidia)"
)
DRIVER_PATTERNS = ("cuda-drivers*", "cuda-compat*", "nvidia-open*", "nvidia-driver*", "nvidia-kernel*",
                   "nvidia-dkms*", "kmod-nvidia*", "libnvidia-*")  # fmt: skip


class Failed(Exception):
    """The installation cannot go on; the text is for the operator."""


def say(text: str) -> None:
    print(text, flush=True)


def install(spec: dict[str, Any], root: str = "/") -> None:
    manager = packages.by_name(spec["manager"])
    if manager is None:
        raise Failed(f"the package manager {spec['manager']!r} is unknown to packages.py")
    if spec["components"]:
        enable_components(spec["components"], root)
    if spec["url"]:
        REPOSITORIES[manager.name](spec, root)
    refresh(manager)
    refuse_driver_change(manager, spec["packages"], root)
    run(manager.install(spec["packages"]), "the packages were not installed")
    check(spec["nvcc"], root)


def refresh(manager: Type[packages.Manager]) -> None:
    command = manager.refresh()
    if command:
        run(command, f"{command[0]} update failed")


def enable_components(components: list[str], root: str) -> None:
    """Enable more components of the distribution's archive, in a sources file of our own with the host's mirrors."""
    own = archive_suites()
    wanted = " ".join(one for one in components if not any(one in enabled for enabled in own.values()))
    if not wanted:
        say(f"enabled already: {' '.join(components)}")
        return
    stanzas = [stanza_for(entry, wanted) for entry in configured_sources(root)
               if "main" in entry["components"] and (entry["uri"].rstrip("/"), entry["suite"]) in own]  # fmt: skip
    if not stanzas:
        raise Failed("no source of the distribution's own archive is configured in /etc/apt: add one with "
                     f"{' '.join(components)}, or set cuda_toolkit to a folder or to nvidia")  # fmt: skip
    write(COMPONENTS, "\n".join(dict.fromkeys(stanzas)), root)
    say(f"enabled {wanted} in {COMPONENTS}")


def archive_suites() -> dict[tuple[str, str], set[str]]:
    """The distribution's own sources that apt has lists of: (URI, suite) to the set of components."""
    found = listed_suites()
    if not found:
        refresh(packages.Apt)
        found = listed_suites()
    return found


def listed_suites() -> dict[tuple[str, str], set[str]]:
    wanted = ["$(ORIGIN)", "$(REPO_URI)", "$(RELEASE)", "$(COMPONENT)"]
    lines = output_of(["apt-get", "indextargets", "--format", "\t".join(wanted), "Created-By: Packages"], None)
    found: dict[tuple[str, str], set[str]] = {}
    for origin, uri, suite, component in (line.split("\t") for line in lines.splitlines() if line.count("\t") == 3):
        if origin in ("Debian", "Ubuntu"):
            found.setdefault((uri.rstrip("/"), suite), set()).add(component)
    return found


def configured_sources(root: str) -> list[dict[str, Any]]:
    """Every enabled binary source in /etc/apt: uri, suite, components, and options by their stanza names."""
    found = list(one_line_sources(read(toolkits.inside(root, "/etc/apt/sources.list"))))
    for path in listing(toolkits.inside(root, SOURCES)):
        if path.endswith(".list"):
            found += one_line_sources(read(path))
        elif path.endswith(".sources"):
            found += deb822_sources(read(path))
    return found


def one_line_sources(text: str) -> Iterator[dict[str, Any]]:
    """`deb [option=value ...] URI SUITE COMPONENT...`, see sources.list(5)."""
    for line in text.splitlines():
        match = re.match(r"\s*deb\s+(?:\[([^]]*)\]\s+)?(\S+)\s+(\S+)([^#]*)", line)
        if match:
            options = [option.split("=", 1) for option in (match[1] or "").split() if "=" in option]
            yield {"uri": match[2], "suite": match[3], "components": match[4].split(),
                   "options": {ONE_LINE_NAMES.get(name, name.title()): value.replace(",", " ")
                               for name, value in options}}  # fmt: skip


def deb822_sources(text: str) -> Iterator[dict[str, Any]]:
    """Stanzas of `Field: value`; a continued line keeps its indentation, so that a key stays a key."""
    for block in re.split(r"\n[ \t]*\n", text):
        fields: dict[str, str] = {}
        name = ""
        for line in block.splitlines():
            if line.startswith((" ", "\t")) and name:
                fields[name] += "\n" + line
            elif ":" in line and not line.startswith("#"):
                name, value = line.split(":", 1)
                name = name.strip().title()
                fields[name] = value.strip()
        uris, suites = fields.pop("Uris", "").split(), fields.pop("Suites", "").split()
        components = fields.pop("Components", "").split()
        types, enabled = fields.pop("Types", "").split(), fields.pop("Enabled", "yes").lower()
        if "deb" in types and enabled not in ("no", "false"):
            yield from ({"uri": uri, "suite": suite, "components": components, "options": fields}
                        for uri in uris for suite in suites)  # fmt: skip


def stanza_for(entry: dict[str, Any], components: str) -> str:
    lines = ["Types: deb", f"URIs: {entry['uri']}", f"Suites: {entry['suite']}", f"Components: {components}"]
    lines += [f"{name}: {value}".replace(": \n", ":\n") for name, value in entry["options"].items()]
    return "\n".join(lines) + "\n"


def add_apt_repository(spec: dict[str, Any], root: str) -> None:
    """NVIDIA's repository with its key, at a priority below the distribution's.

    Its own cuda-keyring package would put everything in it, drivers included, above the distribution's
    packages: the owner's next upgrade would change the driver.
    """
    url, key_package = spec["url"], spec["key_package"]
    ours = f"{SOURCES}/llamafleet-nvidia-cuda.sources"
    address = url.rsplit("://", 1)[-1]
    if any(entry["uri"].rstrip("/").rsplit("://", 1)[-1] == address for entry in configured_sources(root)):
        say(f"the repository {url} is already configured on this host")
        return
    with tempfile.TemporaryDirectory() as folder:
        package = os.path.join(folder, "keyring.deb")
        run(["curl", "-fsSL", "--retry", "3", "-o", package, key_package], f"cannot download {key_package}")
        run(["dpkg-deb", "-x", package, folder], f"{key_package} is not a package")
        with open(os.path.join(folder, "usr/share/keyrings/cuda-archive-keyring.gpg"), "rb") as file:
            write(KEY, file.read(), root)
    host = url.split("/")[2]
    # 100: taken where no other source has the package (apt_preferences(5)).
    write("/etc/apt/preferences.d/llamafleet-nvidia-cuda", f"Package: *\nPin: origin {host}\nPin-Priority: 100\n", root)
    write(ours, f"Types: deb\nURIs: {url}\nSuites: /\nSigned-By: {KEY}\n", root)
    say(f"added the repository {url} in {ours}")


def add_dnf_repository(spec: dict[str, Any], root: str) -> None:
    """NVIDIA's repository, its drivers left out."""
    url, repo_file = spec["url"], spec["repo_file"]
    path = f"/etc/yum.repos.d/llamafleet-cuda-{spec['repository']}.repo"
    folder = toolkits.inside(root, "/etc/yum.repos.d")
    if any(url in read(other) for other in listing(folder)):
        say(f"the repository {url} is already configured on this host")
        return
    with tempfile.TemporaryDirectory() as temporary:
        fetched = os.path.join(temporary, "repo")
        run(["curl", "-fsSL", "--retry", "3", "-o", fetched, repo_file], f"cannot download {repo_file}")
        text = read(fetched)
    if not text.startswith("[") or text.count("\n[") or "gpgcheck=1" not in text:
        raise Failed(f"{repo_file} is not one repository with checked signatures")
    write(path, text.rstrip("\n") + "\nexcludepkgs=" + " ".join(DRIVER_PATTERNS) + "\n", root)
    say(f"added the repository {url} in {path}")


# What adds NVIDIA's repository, by package manager.
REPOSITORIES = {packages.Apt.name: add_apt_repository, packages.Dnf.name: add_dnf_repository}


def refuse_driver_change(manager: Type[packages.Manager], names: list[str], root: str) -> None:
    """Raise where the packages would bring another driver to a host that has one."""
    if not os.path.exists(toolkits.inside(root, "/proc/driver/nvidia/version")):
        return
    driver = [name for name in manager.would_change(names) if DRIVER.match(name)]
    if driver:
        raise Failed(
            f"installing {', '.join(names)} would change the NVIDIA driver of this host ({', '.join(driver)}): "
            'set cuda_toolkit = "nvidia", whose toolkit needs none of them, or name a toolkit\'s folder'
        )


def check(nvcc: str, root: str) -> None:
    """Raise unless the toolkit is now there and whole."""
    found = [one for one in toolkits.find(root) if one["nvcc"] == nvcc]
    if not found:
        raise Failed(f"the packages were installed, but there is no compiler at {nvcc}")
    parts = ("version", "headers", "cublas", "cudart", "driver_stub")
    missing = [part for part in parts if not found[0][part]]
    if missing or found[0]["problems"]:
        raise Failed(f"the toolkit at {nvcc} is not usable: {', '.join([*missing, *found[0]['problems']])}")
    say(f"CUDA {found[0]['version']} is at {found[0]['path']}")


def listing(folder: str) -> list[str]:
    return [os.path.join(folder, name) for name in sorted(os.listdir(folder))] if os.path.isdir(folder) else []


def read(path: str) -> str:
    try:
        with open(path, errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def write(path: str, content: str | bytes, root: str) -> None:
    """The file, whole or not at all, readable by everyone, as apt's own user must."""
    path = toolkits.inside(root, path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    replace_file(path, content.encode() if isinstance(content, str) else content)


def run(command: list[str], failure: str) -> None:
    """Run a command with its output among our progress lines; `Failed` with what it said at the end."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
    last: list[str] = []
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          env=environment, text=True, errors="replace") as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            say(line.rstrip())
            last = [*last[-4:], line.strip()]
    if process.returncode:
        raise Failed(f"{failure} (exit code {process.returncode}): {' | '.join(line for line in last if line)}")


def main(argv: list[str]) -> int:
    with open(argv[0]) as file:
        spec = json.load(file)
    try:
        install(spec, *argv[1:2])
    except Failed as failed:
        say(f"error: {failed}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
