"""Where the packages of a CUDA toolkit come from: the sources of packages that install_toolkit.py adds to this host.

Contract: a module of install_toolkit.py. No file of the owner's is changed: sources go into files of our own, whose
names begin with `llamafleet-`. What an owner has switched off stays off; ours is added beside it. Raises `Failed`.
Python 3.8, the standard library; common.py, packages.py, running.py and toolkits.py beside it.
"""

from __future__ import annotations

import os
import re
import tempfile
from typing import Any, Iterator  # the contract is Python 3.8, whose own are typing's

import packages
import toolkits
from common import output_of, replace_file
from running import Failed, refresh, run, say

SOURCES = "/etc/apt/sources.list.d"
COMPONENTS = SOURCES + "/llamafleet-nonfree.sources"
# Options of a one-line source whose names are others in a stanza (sources.list(5)).
ONE_LINE_NAMES = {"arch": "Architectures", "lang": "Languages", "target": "Targets", "pdiffs": "PDiffs"}
KEY = "/usr/share/keyrings/llamafleet-nvidia-cuda.gpg"
# Folders of files that describe repositories, by package manager.
REPO_FOLDERS = {packages.Dnf.name: "/etc/yum.repos.d", packages.Zypper.name: "/etc/zypp/repos.d"}
DRIVER_PATTERNS = ("cuda-drivers*", "cuda-compat*", "nvidia-open*", "nvidia-driver*", "nvidia-kernel*",
                   "nvidia-dkms*", "kmod-nvidia*", "libnvidia-*")  # fmt: skip


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


def add_rpm_repository(spec: dict[str, Any], root: str) -> None:
    """NVIDIA's repository in a file of our own, under a name of our own: of two with one name the first counts, and it
    may be switched off. dnf leaves its drivers out; zypper, which cannot, takes from it only what nobody else has."""
    manager, url, repo_file = spec["manager"], spec["url"], spec["repo_file"]
    folder = REPO_FOLDERS[manager]
    path = f"{folder}/llamafleet-cuda-{spec['repository']}.repo"
    if any(is_enabled(url, read(other)) for other in listing(toolkits.inside(root, folder))):
        say(f"the repository {url} is already configured on this host")
        return
    with tempfile.TemporaryDirectory() as temporary:
        fetched = os.path.join(temporary, "repo")
        run(["curl", "-fsSL", "--retry", "3", "-o", fetched, repo_file], f"cannot download {repo_file}")
        text = read(fetched)
    if not text.startswith("[") or text.count("\n[") or "gpgcheck=1" not in text:
        raise Failed(f"{repo_file} is not one repository with checked signatures")
    text = re.sub(r"^\[.*\]", f"[llamafleet-cuda-{spec['repository']}]", text).rstrip("\n")
    own = {"enabled": "1", **LIMITS[manager]}
    kept = [line for line in text.splitlines() if line.split("=")[0].strip() not in own]
    write(path, "\n".join([*kept, *(f"{name}={value}" for name, value in own.items())]) + "\n", root)
    say(f"added the repository {url} in {path}")


# What keeps an upgrade of the owner's from taking a driver from NVIDIA's repository. zypper's own repositories have
# priority 99, of which the lowest number comes first.
LIMITS = {packages.Dnf.name: {"excludepkgs": " ".join(DRIVER_PATTERNS)}, packages.Zypper.name: {"priority": "200"}}


def is_enabled(url: str, text: str) -> bool:
    """Whether a file of repositories has one at this address that is not switched off."""
    for section in re.split(r"^\[", text, flags=re.M)[1:]:
        values = dict(line.split("=", 1) for line in section.splitlines() if "=" in line and line[0] not in "#;")
        values = {name.strip().lower(): value.strip() for name, value in values.items()}
        if values.get("baseurl", "").rstrip("/") == url.rstrip("/") and values.get("enabled", "1") not in ("0", "no"):
            return True
    return False


# What adds NVIDIA's repository, by package manager.
REPOSITORIES = {
    packages.Apt.name: add_apt_repository,
    packages.Dnf.name: add_rpm_repository,
    packages.Zypper.name: add_rpm_repository,
}


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
