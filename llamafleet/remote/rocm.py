"""Installations of HIP that this host has: AMD's own ROCm, and the distribution's packages.

Contract: `find(root="/")` gives a list of dictionaries, AMD's own first, the newest first:

    {"path": "/opt/rocm", "version": "6.3" | null, "compiler": "/opt/rocm/llvm/bin/clang++" | null,
     "hipblas": true, "rocblas": true}

`path` is /usr for the distribution's, and /opt/rocm-X.Y where no link /opt/rocm leads to a folder. `root` stands before
every path in tests. Changes nothing. Python 3.8, standard library; common.py and toolkits.py beside it.
"""

from __future__ import annotations

import glob
import os
import re
from typing import Any, Dict, List, Optional

from toolkits import inside, outside, text_of

HEADER = "hip/hip_version.h"
COMPILERS = ("llvm/bin/clang++", "lib/llvm/bin/clang++", "bin/amdclang++")


def find(root: str = "/") -> List[Dict[str, Any]]:
    linked = ["/opt/rocm"] if os.path.isdir(inside(root, "/opt/rocm")) else []
    folders = linked or sorted((outside(root, path) for path in glob.glob(inside(root, "/opt/rocm-*"))), key=numbers)
    own = [describe(folder, root) for folder in reversed(folders) if os.path.isdir(inside(root, folder + "/include"))]
    there = os.path.isfile(inside(root, "/usr/include/" + HEADER))
    return [*own, *([describe("/usr", root)] if there else [])]


def numbers(path: str) -> List[int]:
    return [int(part) for part in re.findall(r"\d+", path)]


def describe(folder: str, root: str) -> Dict[str, Any]:
    include = [inside(root, folder + "/include")]
    compilers = [f"{folder}/{name}" for name in COMPILERS if folder != "/usr"]
    return {
        "path": folder,
        "version": version(text_of(include, HEADER)),
        "compiler": next((path for path in compilers if os.path.exists(inside(root, path))), None),
        "hipblas": os.path.isfile(os.path.join(include[0], "hipblas/hipblas.h")),
        "rocblas": os.path.isfile(os.path.join(include[0], "rocblas/rocblas.h")),
    }


def version(header: str) -> Optional[str]:
    """ "6.3", from the text of hip_version.h."""
    found = dict(re.findall(r"^#define HIP_VERSION_(MAJOR|MINOR) +(\d+)", header, re.M))
    return f"{found['MAJOR']}.{found['MINOR']}" if len(found) == 2 else None
