"""Read cards from words such as "2xrtx3090", "rtx3060 12gb" or "rtx3090x2+rtx3060".

    cards = card {"+" card}
    card  = [COUNT "x"] NAME [SIZE "gb"] ["x" COUNT] [SIZE "gb"]     "*" and the sign for "times" mean "x"

A name is exactly one of the catalogue's, or refused with the nearest ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from llamafleet.host.cards.row import MIB, GpuModel
from llamafleet.host.gpus import SHOWN_SHARE, named, nearest, of_size

FORM = "should be like rtx4090,ram=64GB,cores=10 or 2xrtx3090,ram=128GB,cores=16 or cpu,ram=32GB,cores=8"
GPU_LIMIT = 16  # ggml/include/ggml-cuda.h, GGML_CUDA_MAX_DEVICES
# Memory sizes that cards are sold with, GB.
LABELS = (2, 3, 4, 5, 6, 8, 10, 11, 12, 16, 20, 24, 32, 40, 48, 64, 72, 80, 94, 96, 128, 141, 180, 192, 256, 288)

_TIMES = "[x*\u00d7]"
_BEFORE = re.compile(rf"(?P<count>[0-9]{{1,20}})(?: ?{_TIMES} ?(?=[a-z0-9])| +(?=[a-z]))(?P<name>.+)")
_BEHIND = re.compile(rf"(?P<name>.+?)(?P<mark> ?)\(?{_TIMES} ?(?P<count>[0-9]{{1,20}})\)?(?P<size> [0-9]+ ?g(?:i?b)?)?")
# A plus sign between two cards; that of "Ryzen AI Max+ 395" is followed by a number.
_PLUS = re.compile(r"(?<!max)\+|\+(?= *[a-z])")
_APPLE = re.compile(r"(apple\b.*|mac[a-z ]*\b.*|(apple )?m[1-9]( ?(pro|max|ultra))?( ?[0-9]+ ?gb?)?)")


class DescriptionError(ValueError):
    """The description is invalid; the message has the invalid word and says what it should be."""


@dataclass(frozen=True)
class Card:
    """A card of a described machine."""

    model: GpuModel
    word: str  # that it was read from
    note: str = ""  # what was assumed of it

    def with_memory(self, size: int) -> Card:
        """The card with so many bytes of memory. Raises `DescriptionError` where they are the processor's."""
        if self.model.unified:
            raise DescriptionError(
                f"{self.word!r}: {self.model.name} shares the RAM: give its size as ram=, not as vram="
            )
        return Card(replace(self.model, memory_bytes=size), self.word)


def read_cards(words: str) -> Iterator[Card]:
    """The cards of a word. Raises `DescriptionError`."""
    for word in _PLUS.split(words.lower()):
        if not word.strip():
            raise DescriptionError(f"{words!r}: a card is missing beside the plus sign")
        yield from _several(word.strip())


def _several(word: str) -> list[Card]:
    """The cards of a word without a plus sign."""
    if named(word)[0]:
        return [_card(word)]
    before, behind = _BEFORE.fullmatch(word), _BEHIND.fullmatch(word)
    match = before or behind
    if match is None or (before and int(before["count"]) > GPU_LIMIT and not named(before["name"])[0]):
        return [_card(word)]  # "7900xtx" is no number of a card "tx"
    if before is None and match["name"][-1].isalpha() and not match["mark"]:
        name, count = match["name"], match["count"]
        if not named(name)[0]:  # "rtx4900" is no number of a card "rt"
            return [_card(word)]
        if named(f"{name}x")[0]:
            raise DescriptionError(f"{word!r}: can be read in two ways: write {count}x{name}, or {count}x{name}x")
    if int(match["count"]) == 0:
        raise DescriptionError(f"{word!r}: 0 cards: leave the word out")
    name = match["name"].strip() + (match.groupdict().get("size") or "")
    return [_card(name)] * min(int(match["count"]), GPU_LIMIT + 1)


def _card(word: str) -> Card:
    models, size = named(word)
    if not models:
        raise DescriptionError(f"{word!r}: {_unknown(word)}")
    if size is None:
        sizes = [label(model) for model in models]
        kept = f"{models[0].name}: taken with {sizes[0]} GB; it is also sold with {_list(sizes[1:])}: add the size"
        return Card(models[0], word, kept if len(set(sizes)) > 1 else "")
    model = of_size(models, size)
    if model is None:
        sold = _list([label(each) for each in models])
        how = "ram=" if models[0].unified else "vram="
        raise DescriptionError(
            f"{word!r}: the catalogue has {models[0].name} with {sold}; for another size give {how}{size}GB"
        )
    return Card(model, word)


def _unknown(word: str) -> str:
    if _APPLE.fullmatch(word):
        return "llama.cpp uses Apple's GPUs by Metal, on macOS, where nothing is deployed: no plan is made for them"
    names = nearest(word)
    hint = f"the nearest are {', '.join(names)}" if names else FORM
    return f"no such GPU is in the catalogue; {hint}; or give a machine file"


def label(model: GpuModel) -> int:
    """The GB that a model is sold with."""
    gib = model.memory_bytes / 1024 / MIB
    return next((size for size in LABELS if SHOWN_SHARE * size <= gib <= 1.01 * size), round(gib))


def _list(sizes: Sequence[int]) -> str:
    return " or ".join(f"{size} GB" for size in dict.fromkeys(sizes))
