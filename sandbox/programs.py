"""Programs of Debian's that tests run and this machine does not have: packages, unpacked into `.cache/programs/`.

Installed, each would be a service of this machine: Debian starts what it installs, and at every boot.

    python -m sandbox.programs        unpacks all that is missing; needs apt, no root where its lists are there
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from sandbox.state import SandboxError, say
from sandbox.upstream import CACHE, locked

FOLDER = CACHE / "programs"
PACKAGES = {
    "prometheus": "prometheus",
    "promtool": "prometheus",
    "prometheus-node-exporter": "prometheus-node-exporter",
    "nginx": "nginx",
}
PLACES = ("usr/bin", "usr/sbin")


def find(name: str) -> str | None:
    """The path of a program: installed, or unpacked; None where it is neither."""
    return shutil.which(name, path=path())


def path() -> str:
    """$PATH, with the folders of what is unpacked behind it."""
    unpacked = [str(FOLDER / package / place) for package in dict.fromkeys(PACKAGES.values()) for place in PLACES]
    return os.pathsep.join([os.environ.get("PATH", os.defpath), *unpacked])


def unpack(package: str) -> None:
    """Download the package and unpack it into a folder of its own. Raises SandboxError."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with locked(FOLDER / "lock"), tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        if (FOLDER / package).exists():
            return
        # As another user apt downloads into no folder of root's alone.
        download = ["apt-get", "download", "-q", "-o", "APT::Sandbox::User=root", package]
        if subprocess.run(download, cwd=folder, capture_output=True).returncode != 0:  # its lists may be missing
            _run(["apt-get", "update", "-q"], folder)
            _run(download, folder)
        [archive] = Path(folder).glob("*.deb")
        _run(["dpkg-deb", "--extract", str(archive), f"{folder}/unpacked"], folder)
        Path(folder, "unpacked").rename(FOLDER / package)


def _run(command: list[str], folder: str) -> None:
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise SandboxError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}")


def main() -> None:
    for name, package in PACKAGES.items():
        if find(name) is None:
            say(f"unpacking {package} into {FOLDER}")
            unpack(package)


if __name__ == "__main__":
    main()
