"""Rules between the settings of a projector and others of an instance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

# Flags that llama-server switches off with a projector (tools/server/server-context.cpp, load_model).
_FORBIDDEN = {
    "--context-shift": "pictures cannot be shifted out of the context",
    "--cache-reuse": "pictures cannot be moved within the cache",
}


def clashes(
    *, has_projector: bool, min_tokens: int | None, max_tokens: int | None, serves: str, extra_flags: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """What is wrong: the setting, and a sentence each."""
    if not has_projector:
        for name, tokens in (("image_min_tokens", min_tokens), ("image_max_tokens", max_tokens)):
            if tokens is not None:
                yield name, f"is {tokens}, but there is no projector: give one, or leave it out"
        return
    if serves != "chat":
        yield (
            "projector",
            f'pictures and sound come with chats: set serves = "chat" (it is "{serves}"), or leave it out',
        )
    if min_tokens is not None and max_tokens is not None and min_tokens > max_tokens:
        yield "image_min_tokens", f"is {min_tokens}, should be image_max_tokens at most, which is {max_tokens}"
    for flag in extra_flags:
        if reason := _FORBIDDEN.get(flag.partition(" ")[0]):
            yield "extra_flags", f"{flag}: llama-server switches it off with a projector, because {reason}"
