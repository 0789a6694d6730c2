"""Which settings fit what a server was asked for, and which profile is the nearest. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from llamafleet.host.answers import Figures, Observed
from llamafleet.settings.profiles import PROFILES

ENOUGH_REQUESTS = 20  # below this a mean says little
DIGITS = 2  # of a setting: requests differ by more than that


@dataclass(frozen=True)
class Fitting:
    """Settings by key, the nearest profile with the factor by which its worst key differs, and what to mind."""

    settings: Mapping[str, int]
    profile: str
    factor: float
    remarks: tuple[str, ...] = ()


def fitting(found: Observed, slots: int | None) -> Fitting | None:
    """What fits; None where nothing was asked. `slots`: of the server, where it is known.

    Tokens are means: times add up, so that few long prompts count for as much as they cost. `concurrency` is what nine
    tenths of the busy time did not exceed.
    """
    prompt, reply, live, at_once = found.prompt_tokens, found.reply_tokens, found.live_tokens, found.concurrency
    if prompt is None or reply is None or live is None or at_once is None:
        return None
    settings = {"prompt_tokens": rounded(prompt.mean), "live_tokens": rounded(live.mean),
                "reply_tokens": rounded(reply.mean), "concurrency": max(1, round(at_once.p90))}  # fmt: skip
    if reply.max == 0:  # embeddings or scores, which have no other settings
        settings = {key: settings[key] for key in ("prompt_tokens", "concurrency")}
    factors = {name: worst_factor(settings, profile) for name, profile in PROFILES.items()}
    nearest = min(factors, key=lambda name: factors[name])
    return Fitting(settings, nearest, factors[nearest], tuple(_remarks(found, at_once, slots)))


def rounded(tokens: float) -> int:
    """A whole number of at least 1, with `DIGITS` digits that count."""
    whole = max(1, round(tokens))
    return max(1, round(whole, DIGITS - len(str(whole))))


def worst_factor(settings: Mapping[str, int], profile: Mapping[str, int]) -> float:
    """The largest factor between a setting and the profile's."""
    return max(math.exp(abs(math.log(value / profile[key]))) for key, value in settings.items())


def _remarks(found: Observed, at_once: Figures, slots: int | None) -> list[str]:
    remarks = []
    if found.requests < ENOUGH_REQUESTS:
        remarks.append(f"{found.requests} requests are too few to say what is usual")
    if slots is not None and at_once.p90 >= slots:
        them = "its only slot was" if slots == 1 else f"all {slots} slots were"
        remarks.append(f"{them} often busy: more requests may have waited than `concurrency` says")
    return remarks
