"""Builds the stand-in for libnvidia-ml.so.1; `fake_nvml.c` says what its state file can hold."""

from __future__ import annotations

import subprocess
from pathlib import Path

HERE = Path(__file__).parent
RTX4090 = HERE / "rtx4090.state"


def build(directory: Path) -> Path:
    """Compile into `directory` and return the library's path; needs a C compiler."""
    directory.mkdir(parents=True, exist_ok=True)
    library = directory / "libnvidia-ml.so.1"
    options = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O1", "-shared", "-fPIC"]
    command = ["cc", *options, "-Wl,-soname,libnvidia-ml.so.1", "-o", str(library), str(HERE / "fake_nvml.c")]
    subprocess.run(command, check=True)
    return library
