"""Which file of a repository llama-server would take by itself.

The rules are llama.cpp's for `-hf OWNER/REPO[:QUANT]` (common/download.cpp: find_best_model, find_best_sibling,
gguf_filename_is_model, get_gguf_split_info, extract_quant_bits; common_download_get_hf_plan for preset.ini), so that a
command copied from a model's page and a source of ours give the same file.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

# Tried in this order where no quantisation is named.
DEFAULTS = ("Q4_K_M", "Q8_0")
# Parts of names of files that accompany a model.
_SIDECARS = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")
_SPLIT = re.compile(r".+-([0-9]{5})-of-([0-9]{5})\.gguf")
_SPLIT_TAIL = re.compile(r"-[0-9]{5}-of-[0-9]{5}$")
_TAG = re.compile(r"[-.]([A-Z0-9_]+)$", re.IGNORECASE | re.ASCII)
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


def best_projector(names: Sequence[str], model: str) -> str | None:
    """The projector for a repository's file `model`, of the repository's files in the hub's order; None without one.

    It lies in the model's folder or in one above: the nearest folder counts first, then the nearest quantisation, then
    the hub's order.
    """
    folders, bits = model.split("/")[:-1], _bits(model)
    found: list[tuple[int, int, str]] = []
    for name in names:
        of_name = name.split("/")[:-1]
        if name.endswith(".gguf") and "mmproj" in name and of_name == folders[: len(of_name)]:
            found.append((-len(of_name), abs(_bits(name) - bits), name))
    return min(found, key=lambda one: one[:2])[2] if found else None


def _bits(name: str) -> int:
    """The first number in the last part of a file's name: 4 for Q4_K_M, 16 for F16, 0 without a number."""
    tag = _TAG.search(_SPLIT_TAIL.sub("", name.removesuffix(".gguf")))
    digits = re.search("[0-9]+", tag[1]) if tag else None
    return int(digits[0][:9]) if digits else 0
