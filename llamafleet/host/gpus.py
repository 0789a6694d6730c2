"""Look cards up in the catalogue of GPUs, whose rows are in `cards/`: by a driver's name, or by words.

Bandwidth and arithmetic are the manufacturers' figures; each row's `source` says which. Arithmetic is dense f16 with
f32 accumulation on tensor cores, which on GeForce is half of the figure with f16 accumulation; for cards without tensor
cores it is the shaders' rate that llama.cpp uses. The memory of NVIDIA's cards is what NVML reports, with ECC as
shipped, where a report is known, else nominal; that of other cards is nominal, less 16 MiB for the firmware.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Sequence

from llamafleet.host.cards.arc import ARC
from llamafleet.host.cards.geforce import GEFORCE
from llamafleet.host.cards.laptops import LAPTOPS
from llamafleet.host.cards.radeon import INSTINCT, RADEON
from llamafleet.host.cards.row import MIB, GpuModel
from llamafleet.host.cards.shared import SHARED
from llamafleet.host.cards.workstations import SERVERS, WORKSTATIONS

GPUS: tuple[GpuModel, ...] = (*GEFORCE, *LAPTOPS, *WORKSTATIONS, *SERVERS, *RADEON, *INSTINCT, *ARC, *SHARED)
# Of a size on the box, a driver shows at least this share: ECC takes a sixteenth, the firmware of a module a little.
SHOWN_SHARE = 0.93
# Words that name the maker, or say nothing.
_NOISE = frozenset({
    "nvidia", "geforce", "amd", "ati", "radeon", "intel", "instinct", "tesla", "gpu", "graphics", "r", "tm", "c",
    "generation", "edition", "with", "design", "card",
})  # fmt: skip
_MOBILE = frozenset({"laptop", "mobile"})
LEAST_SIMILARITY = 0.6  # of a name that is offered for one that is not known
_SIZE = re.compile(r"\b([0-9]{1,6}) ?g(?:i?b)?\b")


@functools.lru_cache(maxsize=1024)  # a fleet has a few kinds of cards, and each plan asks for every card again
def find(name: str, memory_bytes: int | None = None) -> GpuModel | None:
    """The model with the longest name that is part of a driver's name: "NVIDIA GeForce RTX 4090", "Tesla V100-SXM2".

    If several sizes have that name, it is the one nearest to `memory_bytes`, or to a size in `name`, else the first
    row. None if no row's name is part of `name`.
    """
    words = _words(name)
    # The chip of a laptop's card differs from the desktop card's of that name.
    parts = [(known, model) for known, model in _KNOWN if not _MOBILE & set(words) or _MOBILE & set(known)]
    matches = [(len("".join(known)), model) for known, model in parts if _within(known, words)]
    longest = max((length for length, _ in matches), default=0)
    best = [model for length, model in matches if length == longest]
    size = _SIZE.search(name.lower())
    if memory_bytes is None and size:
        memory_bytes = int(size[1]) * 1024 * MIB
    if memory_bytes is None:
        return best[0] if best else None
    return min(best, key=lambda model: abs(model.memory_bytes - memory_bytes), default=None)


def named(name: str) -> tuple[tuple[GpuModel, ...], int | None]:
    """The models of exactly this name, one for each size, and the GB that the name gives; no model if none has it.

    Case, blanks, dashes and the maker's name do not count: "rtx4090", "RTX 4090", "NVIDIA GeForce RTX 4090".
    """
    key = _key(name)
    if key in _BY_NAME:  # such as "A100 80GB", whose name has the size
        return _BY_NAME[key], None
    text, size = name.lower(), None
    if match := _SIZE.search(text):
        size, text = int(match[1]), text[: match.start()] + " " + text[match.end() :]
    return _BY_NAME.get(_key(text), ()), size


def of_size(models: Sequence[GpuModel], gb: int) -> GpuModel | None:
    """The model that is sold with so many GB; None if none is."""
    labelled = gb * 1024 * MIB
    fitting = [model for model in models if SHOWN_SHARE * labelled <= model.memory_bytes <= 1.01 * labelled]
    return max(fitting, key=lambda model: model.memory_bytes, default=None)


def nearest(name: str) -> tuple[str, ...]:
    """Up to three names of the catalogue that are similar to `name`, for messages."""
    words = tuple(word for word in _words(name) if word not in _NOISE)
    scores: dict[str, float] = {}
    for known, model in _KNOWN:
        scores[model.name] = max(scores.get(model.name, 0.0), _similarity(words, known))
    similar = (known for known, score in scores.items() if score >= LEAST_SIMILARITY)
    return tuple(sorted(similar, key=lambda known: -scores[known])[:3])


def _similarity(words: tuple[str, ...], known: tuple[str, ...]) -> float:
    """How near a name is to a known one, from 0: their letters and, counted again, their numbers."""
    matcher = difflib.SequenceMatcher(None, "".join(words), "".join(known))
    if matcher.real_quick_ratio() < LEAST_SIMILARITY / 2 or not words:
        return 0.0
    numbers, known_numbers = ({word for word in group if word.isdigit()} for group in (words, known))
    swapped, known_swapped = ({"".join(sorted(number)) for number in group} for group in (numbers, known_numbers))
    same_length = {len(number) for number in numbers} & {len(number) for number in known_numbers}
    shared = 0.4 * bool(numbers & known_numbers) + 0.1 * bool(swapped & known_swapped) + 0.1 * bool(same_length)
    shared += 0.1 * (words[0] == known[0])
    return matcher.ratio() + shared


def _words(name: str) -> tuple[str, ...]:
    """Groups of letters and of digits: "rtx4090" has those of "RTX 4090", and "T4" is not a part of "T400"."""
    return tuple(re.findall(r"[a-z]+|\d+", name.lower()))


def _key(name: str) -> str:
    """What two forms of one name have in common."""
    words = re.findall(r"[a-z]+|\d+|\+", name.lower().replace("max+", "max"))
    return "".join(word for word in words if word not in _NOISE)


def _within(part: tuple[str, ...], whole: tuple[str, ...]) -> bool:
    return any(whole[start : start + len(part)] == part for start in range(len(whole) - len(part) + 1))


def _by_name() -> dict[str, tuple[GpuModel, ...]]:
    rows: dict[str, tuple[GpuModel, ...]] = {}
    for model in GPUS:
        for key in dict.fromkeys(_key(name) for name in (model.name, *model.aliases)):
            rows[key] = (*rows.get(key, ()), model)
    return rows


_KNOWN = tuple((_words(name), model) for model in GPUS for name in (model.name, *model.aliases))
_BY_NAME = _by_name()
