"""Rules between the settings of speculation: each message names the setting, what is wrong and the way out."""

import pytest

from llamafleet.settings.schema import SettingsError
from tests import planning

WRONG = {
    "a draft is missing": ({"speculation": "draft"}, "models[0].draft", "names the small model"),
    "a draft is missing for EAGLE-3": ({"speculation": "eagle3"}, "models[0].draft", "names the small model"),
    "a draft without speculation": ({"draft": "/d.gguf"}, "models[0].draft", "should be left out"),
    "a draft for n-grams": ({"speculation": "ngram", "draft": "/d.gguf"}, "models[0].draft", "should be left out"),
    "a draft for a head": ({"speculation": "mtp", "draft": "/d.gguf"}, "models[0].draft", "should be left out"),
    "an embedder that guesses": ({"speculation": "ngram", "serves": "embedding"}, "models[0].speculation", "writes no tokens"),
    "lengths without speculation": ({"draft_max_tokens": 4}, "models[0].draft_max_tokens", "should be left out"),
    "least without speculation": ({"draft_min_tokens": 4}, "models[0].draft_min_tokens", "should be left out"),
    "least above most": (
        {"speculation": "mtp", "draft_max_tokens": 2, "draft_min_tokens": 3}, "models[0].draft_min_tokens", "at most"),
    "least above llama.cpp's most": ({"speculation": "mtp", "draft_min_tokens": 4}, "models[0].draft_min_tokens", "which is 3"),
    "a head beside split tensors": (
        {"speculation": "mtp", "split_mode": "tensor"}, "models[0].split_mode", 'should be "layer" or "auto"'),
    "an unknown kind": ({"speculation": "medusa"}, "models[0].speculation", "eagle3"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_go_together_is_named(name):
    given, setting, why = WRONG[name]
    with pytest.raises(SettingsError) as caught:
        planning.settings(given)
    [problem] = [one for one in caught.value.problems if setting in one]
    assert why in problem


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"speculation": "ngram", "draft_min_tokens": 60},
        {"speculation": "mtp", "draft_max_tokens": 5, "draft_min_tokens": 5},
        {"speculation": "draft", "draft": "hf:o/r/d.gguf"},
        {"speculation": "dspark", "draft": {"source": "/d.gguf", "sha256": "0" * 64}},
    ],
)
def test_what_goes_together_is_taken(given):
    [instance] = planning.settings(given).models
    assert instance.speculation == given.get("speculation", "none")


def test_flags_of_speculation_have_their_settings():
    with pytest.raises(SettingsError, match="--spec-draft-n-max is given by the setting draft_max_tokens"):
        planning.settings({"extra_flags": ["--spec-draft-n-max 4"]})
