"""The operator's chat template, grammar and JSON schema: read whole, or refused with the file and the way out."""

import pytest

from llamafleet.settings import prompt_files
from llamafleet.settings.prompt_files import LIMIT_BYTES, PromptFileError, read
from llamafleet.settings.schema import SettingsError
from tests import planning

TEXTS = {"chat-template": "{% for m in messages %}{{ m.content }}\r\n{% endfor %} \n", "grammar": "a ::= \"x\"\nroot ::= a\n",
         "json-schema": '{"type": "object"}'}  # fmt: skip


@pytest.mark.parametrize("kind", TEXTS)
def test_a_file_is_read_as_it_is_with_its_blanks_and_line_ends(kind, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(TEXTS[kind].encode())
    assert read(str(path), "x_file", kind) == TEXTS[kind]


@pytest.mark.parametrize(
    ("kind", "data", "what"),
    [
        ("chat-template", None, "there is no file"),
        ("chat-template", b" \n", "is empty; put the text in it, or set it to None"),
        ("chat-template", b"a" * (LIMIT_BYTES + 1), "has more than 128 KiB"),
        ("chat-template", b"ab\xff", "is no UTF-8: byte 2 is 0xff"),
        ("chat-template", b"a\0b", "has a zero byte"),
        ("json-schema", b"{'a': 1}", "is no JSON: Expecting"),
        ("json-schema", b"[1]", "a schema is a JSON object"),
        ("json-schema", b'{"a":' * 20_000, "is no JSON"),
        ("grammar", b'{"type": "object"}', "looks like a JSON schema: give it as json_schema_file"),
        ("grammar", b'start ::= "a"', "has no rule root"),
        ("grammar", b"%llguidance {}", "is a grammar of llguidance"),
    ],
)
def test_what_is_no_such_file_is_named_with_its_place(kind, data, what, tmp_path):
    path = tmp_path / "file"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(PromptFileError) as error:
        read(str(path), "models: m: x_file", kind)
    assert str(error.value).startswith("models: m: x_file: ") and str(path) in str(error.value)
    assert what in str(error.value)


@pytest.mark.parametrize("place", ["/dev/null", "/", "~nobody-of-that-name/x", "/a\0b", "/proc/1/mem"])
def test_what_is_no_file_is_refused(place):
    with pytest.raises(PromptFileError, match="x_file: "):
        read(place, "x_file", "chat-template")


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        (
            {"chat_template_file": "/t", "extra_flags": ["--chat-template chatml"]},
            "--chat-template and chat_template_file",
        ),
        ({"chat_template_file": "/t", "extra_flags": ["--no-jinja"]}, "--no-jinja and chat_template_file"),
        ({"grammar_file": "/g", "json_schema_file": "/s"}, "json_schema_file: grammar_file constrains"),
        ({"extra_flags": ["--grammar-file /x"]}, "given by the setting grammar_file"),
        ({"extra_flags": ["--lora /x"]}, "given by the setting adapters"),
    ],
)
def test_what_says_the_same_twice_is_refused(changes, what):
    with pytest.raises(SettingsError, match=what):
        planning.settings(changes)


@pytest.mark.parametrize("setting", prompt_files.SETTINGS.values())
def test_a_server_that_writes_no_text_takes_no_such_file(setting):
    with pytest.raises(SettingsError, match=f"{setting}: a server of kind 'embedding' writes no text"):
        planning.settings({"serves": "embedding", setting: "/x"})
    assert getattr(planning.settings({setting: "/x"}).models[0], setting) == "/x"
