"""The rows of architectures: who is verified, and what a name that nobody knows gets."""

from pathlib import Path

from llamafleet.model.architectures import ARCHITECTURES, architecture_of, nearest
from sandbox import outlines
from sandbox.layouts import PUBLISHED

ORACLE = Path(__file__).parents[1] / "oracle"


def test_verified_are_just_those_that_the_oracle_is_asked_about():
    files = [*(ORACLE / "architectures").glob("*.yaml"), *(ORACLE / "drafts").glob("*.yaml")]
    outlined = {str(outlines.read(path)["architecture"]) for path in files}
    asked = outlined | {layout.architecture for layout in PUBLISHED.values()}
    assert {row.name for row in ARCHITECTURES.values() if row.verified} == asked


def test_each_name_has_one_row():
    assert all(name == row.name for name, row in ARCHITECTURES.items())
    assert len(ARCHITECTURES) > 130


def test_an_unknown_name_is_never_verified_and_has_a_neighbour():
    assert not architecture_of("qwen3moee").verified
    assert nearest("qwen3moee") == "qwen3moe"
    assert nearest("zzzzzzzz") is None
