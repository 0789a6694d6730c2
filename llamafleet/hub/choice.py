"""Which file of a repository llama-server would take by itself.

The rules are llama.cpp's for `-hf OWNER/REPO[:QUANT]` (common/download.cpp: find_best_model, gguf_filename_is_model,
get_gguf_split_info; common_download_get_hf_plan for preset.ini), so that a command copied from a model's page and a
source of ours give the same file.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

# Tried in this order where no quantisation is named.
DEFAULTS = ("Q4_K_M", "Q8_0")
# Parts of names of files that accompany a model.
_SIDECARS = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")
_SPLIT = re.compile(r".+-([0-9]{5})-of-([0-9]{5})\.gguf")
# With this file at its root llama-server reads the repository as a list of presets.
PRESET = "preset.ini"


def best_file(names: Sequence[str], quant: str = "") -> str | None:
    """The model's file, or its first shard, of a repository's files in the hub's order; None if none fits."""
    models = [name for name in names if _is_first_of_model(name)]
    for tag in (quant,) if quant else DEFAULTS:
        pattern = re.compile(tag + "[.-]", re.IGNORECASE)
        if found := next((name for name in models if pattern.search(name)), None):
            return found
    return None if quant or not models else models[0]


def _is_first_of_model(name: str) -> bool:
    last = name.rpartition("/")[2]
    split = _SPLIT.fullmatch(name)
    is_later = split is not None and int(split[2]) > 1 and int(split[1]) != 1
    return name.endswith(".gguf") and not any(part in last for part in _SIDECARS) and not is_later
