"""The typical requests to an instance; a plan is chosen so that they are served in the shortest time.

Decision 6: docs/decisions/0006-the-workload-is-the-objective.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from llamafleet.settings.profiles import LIVE, PROFILES
from llamafleet.settings.schema import Instance


@dataclass(frozen=True)
class Workload:
    """One typical request, and how many of them come at once. Defaults and reasons: inventory/group_data/all.py."""

    prompt_tokens: int  # of a request, without those that are in the slot's cache already
    reply_tokens: int
    live_tokens: int  # in the slot's cache, on average while the reply is written
    concurrency: int

    @classmethod
    def of(cls, instance: Instance, context_tokens: int) -> Workload:
        """The instance's settings, with prompt and reply shortened in proportion where the context is too small.

        A server of embeddings or scores reads inputs of `prompt_tokens`, and writes nothing.
        """
        if instance.serves != "chat":
            read = min(instance.prompt_tokens, context_tokens)
            return cls(read, 0, read, instance.concurrency)
        prompt, reply = instance.prompt_tokens, instance.reply_tokens
        if prompt + reply > context_tokens:
            prompt = max(1, prompt * context_tokens // (prompt + reply))
            reply = max(1, context_tokens - prompt)
        least = prompt + reply // 2
        live = instance.live_tokens
        if live is None:
            usual = PROFILES[instance.profile][LIVE] if instance.profile else context_tokens // 4
            live = max(least, usual)
        return cls(prompt, reply, min(live, context_tokens), instance.concurrency)

    @property
    def read_depth_tokens(self) -> int:
        """Tokens in the cache, on average while the prompt is read."""
        return max(self.prompt_tokens // 2, self.live_tokens - (self.prompt_tokens + self.reply_tokens) // 2)
