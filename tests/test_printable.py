"""The one cleaner: what a terminal would act on, or not show, becomes visible; and every exit of ours uses it."""

import ast
import io
import json
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamafleet import printable
from llamafleet.printable import cleaned, coloured, finished, json_text, one_line
from tests.mutations import FUZZ

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 日本 🙂\nsecond line", "plain é 日本 🙂\nsecond line"),
        ("\x1b[31mred\x1b]8;;http://x\x07", r"\x1b[31mred\x1b]8;;http://x\x07"),
        ("a\r\tb\b\x00\x7f", r"a\r\tb\x08\x00\u007f"),
        ("\x9b31m\x85", r"\x9b31m\x85"),  # C1: one byte that begins a sequence, and a line feed
        ("\u202egpj\u202c \u2066x\u2069 \u200f", r"\u202egpj\u202c \u2066x\u2069 \u200f"),
        ("a\u200bb\u200d\ufeff\u00ad", r"a\u200bb\u200d\ufeff\xad"),
        ("a\u2028b\u2029c", r"a\u2028b\u2029c"),
        ("\ud800 \udcff", r"\ud800 \udcff"),
        ("\ue000 \U0010ffff \u0378", r"\ue000 \U0010ffff \u0378"),  # private, no character, not assigned
        ("a\u00a0b\u3000c", r"a\xa0b\u3000c"),
        ("\U000e0041", r"\U000e0041"),  # a tag, which shows nothing
    ],
)
def test_what_does_not_print_as_itself_becomes_visible(text, shown):
    assert printable.printable(text) == cleaned(text) == finished(text) == shown
    assert printable.printable(shown) == shown


def test_lines_stay_or_become_visible():
    assert printable.printable("a\nb") == "a\nb" and one_line("a\nb\r") == r"a\nb\r"


def test_a_text_is_bounded_with_a_word_about_the_rest():
    assert printable.printable("x" * 100, limit=10) == "x" * 10 + "... (90 more characters)"
    assert cleaned("x" * 10, limit=10) == "x" * 10


@FUZZ
@given(st.text(st.characters() | st.sampled_from("\x1b\x9b\u202e\ud800\n[0;1m"), max_size=60))
def test_whatever_the_text_is_it_prints(text):
    for clean in (finished(text), one_line(text), json_text({text: [text]}), finished(coloured(text, "31"))[5:-4]):
        assert all(one == "\n" or unicodedata.category(one)[0] not in "CZ" or one == " " for one in clean)
    assert json.loads(json_text(text)) == text


def test_our_colours_pass_and_no_others():
    text = coloured("warm\x1b[7m", "31;1") + " \x1b[32mgreen"
    assert finished(text) == "\x1b[31;1mwarm\\x1b[7m\x1b[0m \\x1b[32mgreen"
    assert finished(coloured(coloured("inner", "32") + "outer", "31")) == (
        "\x1b[31m\x1b[32minner\x1b[0mouter\x1b[0m"
    )  # fmt: skip
    # Cleaned again on its way, as a log does, it is the same.
    assert finished(cleaned(text)) == finished(text)


def test_nobody_can_know_the_mark_of_our_colours():
    assert len(printable._MARK) == 18 and finished(f"\x1b[31;{'1' * 18}m") == rf"\x1b[31;{'1' * 18}m"


@pytest.mark.parametrize(("encoding", "shown"), [("utf-8", "é\n"), ("ascii", "\\xe9\n"), ("latin-1", "é\n")])
def test_characters_that_the_stream_does_not_have_become_visible(monkeypatch, encoding, shown):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding))
    printable.out("é")
    assert raw.getvalue().decode(encoding) == shown


def exits(path):
    """Places of a module that print beside the cleaner."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Call(func=ast.Name(id="print" | "input")):
                yield node.lineno
            case ast.Attribute(value=ast.Name(id="sys"), attr="stdout" | "stderr"):
                yield node.lineno
            case ast.Import(names=[ast.alias(name="click")]) | ast.ImportFrom(module="click"):
                yield node.lineno
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id="json"), attr="dumps"), keywords=[*_, ast.keyword(arg="indent")]
            ):
                yield node.lineno


# Of these lines: colours and columns of the terminal, a closed pipe, the end after Ctrl-C, and what is written into
# files, here or on a host.
KNOWN = {
    "llamafleet/cli/main.py": 5, "llamafleet/fleet/monitoring.py": 1, "llamafleet/service/record.py": 1, "tasks/lib/builds.py": 1, "tasks/lib/ends.py": 1,
    "tasks/lib/paths.py": 1, "tasks/status.py": 4,
}  # fmt: skip


def test_every_exit_of_ours_is_the_cleaner_s():
    files = [path for folder in ("llamafleet", "tasks") for path in (ROOT / folder).rglob("*.py")]
    found = {str(path.relative_to(ROOT)): list(exits(path)) for path in [*files, ROOT / "deploy.py"]}
    ours = {"llamafleet/printable.py", "tasks/lib/output.py"}
    beside = {
        name: len(lines) for name, lines in found.items() if lines and "/remote/" not in name and name not in ours
    }
    assert beside == KNOWN, found
