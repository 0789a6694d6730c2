"""Rules between the settings of speculation."""

from __future__ import annotations

from collections.abc import Iterator

# Those that need a file of their own, and those that take lengths from llama.cpp's n-gram flags.
AUTO = "auto"  # none, until a tune has measured what pays
GUESSES_NOTHING = ("none", AUTO)
WITHOUT_MEMORY = (*GUESSES_NOTHING, "ngram")  # on GPUs
WITH_DRAFT = ("draft", "eagle3", "dflash", "dspark")
USUAL_MOST = {"ngram": 64}  # tokens that are guessed at once at most, where the setting does not say (common/common.h)
OTHER_MOST = 3


def problems(
    kind: str, *, has_draft: bool, serves: str, split_mode: str, most: int | None, least: int | None
) -> Iterator[tuple[str, str]]:
    """What is wrong with an instance's speculation: the setting and a sentence each."""
    if kind in WITH_DRAFT and not has_draft:
        yield "draft", f'missing: with speculation = "{kind}" it names the small model that guesses'
    if has_draft and kind not in (*WITH_DRAFT, AUTO):
        kinds = ", ".join(f'"{one}"' for one in (*WITH_DRAFT, AUTO))
        yield "draft", f'should be left out with speculation = "{kind}"; it is for {kinds}'
    if kind != "none" and serves != "chat":
        yield "speculation", f'should be "none" with serves = "{serves}": such a server writes no tokens'
    if kind not in WITHOUT_MEMORY and split_mode == "tensor":
        yield "split_mode", f'should be "layer" or "auto" with speculation = "{kind}": what it takes else is not known'
    given = {"draft_max_tokens": most, "draft_min_tokens": least}
    if kind in GUESSES_NOTHING:
        for name, value in given.items():
            if value is not None:
                yield name, f'should be left out with speculation = "{kind}"'
        return
    limit = USUAL_MOST.get(kind, OTHER_MOST) if most is None else most
    if least is not None and least > limit:
        yield "draft_min_tokens", f"should be at most draft_max_tokens, which is {limit}, is {least}"
