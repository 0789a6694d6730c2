"""Configurations of a gateway or of Prometheus: each in a folder named by its digest, and the link `current` to the one
in service. A module of gateway_apply.py and monitoring_apply.py. Python 3.8, standard library; common.py lies beside
it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import Optional

from common import make_folder, sync


def link(home: str) -> str:
    return f"{home}/current"


def in_service(home: str) -> Optional[str]:
    """The digest of the configuration in service."""
    return os.path.basename(os.readlink(link(home))) if os.path.islink(link(home)) else None


def take(home: str, staged: str, digest: str) -> str:
    """Put the staged files in a folder of their own, and return it."""
    folder, part = f"{home}/{digest}", f"{home}/.{digest}"
    make_folder(home)
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(staged, part)
    for name in os.listdir(part):
        sync(f"{part}/{name}")
    os.chmod(part, 0o755)  # noqa: S103 -- the files with keys in it are root's alone
    sync(part)
    if os.path.isdir(folder):  # of a run that was cut off, or the one in service: it has the same files
        shutil.rmtree(part)
    else:
        os.rename(part, folder)
    sync(home)
    shutil.rmtree(staged)
    return folder


def is_so(verb: str, unit: str) -> bool:
    """What `systemctl is-active` or `is-enabled` says of the unit."""
    return subprocess.run(["systemctl", "--quiet", verb, unit], stderr=subprocess.DEVNULL).returncode == 0
