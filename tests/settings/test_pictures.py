"""Rules between a projector and other settings."""

import pytest

from llamafleet.settings.kinds import AUTO, Companion
from llamafleet.settings.schema import SettingsError
from tests import planning


@pytest.mark.parametrize("given", ["auto", "/mmproj.gguf", {"source": "hf:acme/m-GGUF/mmproj.gguf"}])
def test_a_projector_is_a_source_a_dictionary_or_auto(given):
    found = planning.settings({"projector": given, "image_min_tokens": 64, "image_max_tokens": 64}).models[0]
    assert found.projector == (
        AUTO if given == "auto" else Companion(given["source"] if isinstance(given, dict) else given)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_max_tokens": 100}, r"image_max_tokens: is 100, but there is no projector"),
        ({"image_min_tokens": 100}, r"image_min_tokens: is 100, but there is no projector"),
        ({"projector": "auto", "image_min_tokens": 101, "image_max_tokens": 100},
         r"image_min_tokens: is 101, should be image_max_tokens at most, which is 100"),
        ({"projector": "auto", "serves": "embedding"}, r'projector: pictures and sound come with chats'),
        ({"projector": "auto", "extra_flags": ["--cache-reuse 256"]},
         r"--cache-reuse 256: llama-server switches it off with a projector"),
        ({"projector": "auto", "extra_flags": ["--context-shift"]}, r"--context-shift: llama-server switches it off"),
        ({"extra_flags": ["--mmproj /m.gguf"]}, r"--mmproj is given by the setting projector"),
        ({"extra_flags": ["--no-mmproj-offload"]}, r"--no-mmproj-offload is decided by the plan"),
    ],
)  # fmt: skip
def test_what_does_not_agree_is_refused(changes, message):
    with pytest.raises(SettingsError, match=message):
        planning.settings(changes)


def test_what_a_projector_forbids_is_allowed_without_one():
    flags = planning.settings({"extra_flags": ["--cache-reuse 256", "--context-shift"]}).models[0].extra_flags
    assert flags == ("--cache-reuse 256", "--context-shift")
