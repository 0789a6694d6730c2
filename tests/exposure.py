"""What `systemd-analyze security` makes of a unit."""

import re
import subprocess

import pytest


def exposure(unit, folder, name="llama-server-model.service"):
    """The exposure of a unit's text, 0 best and 10 worst; skips where it cannot be asked."""
    file = folder / name
    file.write_text(unit)
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(file)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no systemd-analyze here")
    if "unrecognized option" in done.stderr:
        pytest.skip("this systemd-analyze (before 250) has no --offline")
    return float(re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)[1])


def of_directives(directives, folder):
    """The exposure of a transient unit with these directives."""
    lines = "\n".join(directives)
    return exposure(f"[Service]\nType=exec\nExecStart=/bin/true\n{lines}\n", folder, "llamafleet-transient.service")
