"""Named workloads: what the setting `profile` puts in place of the defaults of the four keys of a workload.

A trace is named where a figure has one; the other figures are round numbers with their reason. docs/planning.md has the
same table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llamafleet.settings.defaults import MODEL_DEFAULTS, defaults

LIVE = "live_tokens"
PROFILES: Mapping[str, Mapping[str, int]] = {
    # People who talk: a question is short, since earlier turns are in the cache; a reply is about a page, and a
    # conversation has some turns of that.
    "chat": {"prompt_tokens": 512, "live_tokens": 4096, "reply_tokens": 512, "concurrency": 1},
    # A tool's loop over files: a step adds a tool's output to a long conversation in the cache, and writes a call.
    # TraceLab (tracelab.cs.washington.edu, token lengths per step of coding agents): medians of 857 and 886 tokens
    # appended, 252 and 184 written. Its conversations, 126k and 117k tokens, are those of models with longer contexts;
    # 24576 is three quarters of 32768, the context where none is set.
    "agent": {"prompt_tokens": 896, "live_tokens": 24576, "reply_tokens": 256, "concurrency": 1},
    # Passages that were searched for, anew for each question, so that none of them is in the cache: some ten of 600
    # tokens; a reply of some paragraphs.
    "rag": {"prompt_tokens": 6144, "live_tokens": 6400, "reply_tokens": 384, "concurrency": 2},
    # Records that a program sends side by side, each with a page of text and a few values as the reply.
    "batch": {"prompt_tokens": 1024, "live_tokens": 1152, "reply_tokens": 128, "concurrency": 8},
}


def filled(entry: Mapping[str, Any], model_defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A model's entry with the defaults of the keys that it lacks, and with its profile's values.

    A profile gives way to a key of the entry, and to one of `model_defaults` that has another value than our default:
    a group's data has all our defaults in it, so that an equal value does not say who wrote it. `live_tokens` stays as
    it is: `Workload.of` takes it from the profile, no more than the context has.
    """
    ours = defaults()[MODEL_DEFAULTS]
    name = entry.get("profile", model_defaults.get("profile"))
    profile = PROFILES.get(name, {}) if isinstance(name, str) else {}
    open_keys = {key: value for key, value in profile.items()
                 if key != LIVE and model_defaults.get(key) == ours[key]}  # fmt: skip
    return {**model_defaults, **open_keys, **entry}
