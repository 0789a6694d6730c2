"""The command line: complete, explicit, unquoted; and what systemd makes of an escaped argument."""

import dataclasses
import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamafleet.service.command import FlagError, argv, credential_flags, unit_escape
from tests import planning
from tests.planning import argument


@pytest.fixture(scope="module")
def planned():
    asked = planning.settings({"name": "gpt", "port": 9931, "context_tokens": 65536, "slots": 2, "listen": "10.0.0.7",
                               "allow_unauthenticated": True})  # fmt: skip
    [plan] = planning.plans(planning.machine([24564, 12282]), [("gpt-oss-120b",)], asked)
    return plan, asked.models[0]


def test_all_that_llama_cpp_would_else_decide_is_given(planned):
    command = argv(*planned, "/srv/models/gpt.gguf")
    expected = {
        "--model": "/srv/models/gpt.gguf", "--alias": "gpt", "--host": "10.0.0.7", "--port": "9931", "--fit": "off",
        "--ctx-size": "131072", "--parallel": "2", "--n-gpu-layers": "37", "--device": "CUDA0,CUDA1",
        "--split-mode": "layer", "--cache-type-k": "f16", "--cache-type-v": "f16", "--flash-attn": "on",
        "--batch-size": "2048", "--ubatch-size": "2048", "--threads": "6", "--threads-batch": "6",
        "--cache-ram": "1024", "--load-mode": "none", "--cors-origins": "none",
    }  # fmt: skip
    assert {flag: argument(command, flag) for flag in expected} == expected
    assert {"--no-kv-unified", "--metrics", "--slots", "--no-ui", "--offline", "--no-cors-credentials"} <= set(command)
    assert all(isinstance(word, str) for word in command)


def test_what_opens_the_host_is_not_given(planned):
    command = argv(*planned, "/m.gguf")
    assert not {"--props", "--tools", "--agent", "--rpc", "--mcp-servers", "--api-key", "--ui-mcp-proxy"} & set(command)


def test_the_planned_part_is_in_the_command_unchanged(planned):
    plan, instance = planned
    command = argv(plan, instance, "/m.gguf")
    start = command.index(plan.argv[0])
    assert tuple(command[start : start + len(plan.argv)]) == plan.argv


@pytest.mark.parametrize("path", ["-m.gguf", "", "/a\nb.gguf", "--port"])
def test_values_that_could_be_flags_or_lines_are_refused(planned, path):
    with pytest.raises(FlagError, match="--model: should"):
        argv(*planned, path)


def test_a_listen_address_that_looks_like_a_flag_is_refused(planned):
    from dataclasses import replace

    with pytest.raises(FlagError, match="--host: should not"):
        argv(planned[0], replace(planned[1], listen="-v"), "/m.gguf")


# --- systemd's reading of an ExecStart argument ---------------------------------------------------


def systemd_reads(word, environment=()):
    """One double-quoted ExecStart= word as systemd reads it: specifiers, C escapes, then variables."""
    assert word[0] == word[-1] == '"'
    out, at, body = [], 0, word[1:-1].replace("%%", "\0")
    assert "%" not in body, "an unescaped specifier"
    while at < len(body):
        character = body[at]
        if character == "\\":
            assert body[at + 1] in '\\"', "an escape that means something else"
            out.append(body[at + 1])
            at += 2
            continue
        assert character != '"', "the quote ends here"
        out.append(character)
        at += 1
    text = "".join(out)
    assert "$" not in text.replace("$$", ""), "a variable"
    return text.replace("$$", "$").replace("\0", "%")


PRINTABLE = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")))


@given(PRINTABLE)
def test_systemd_reads_back_what_was_escaped(argument):
    assert systemd_reads(unit_escape(argument)) == argument


@pytest.mark.parametrize("argument", ["a\nb", "a\rb", "\0", "tab\t", "\x1b[0m", "\x7f"])
def test_control_characters_are_refused(argument):
    with pytest.raises(FlagError, match="control characters"):
        unit_escape(argument)


NASTY = [
    "",
    "plain",
    "two words",
    "50%",
    "%i%%n",
    "$HOME",
    "${HOME}",
    "$$",
    'say "hi"',
    "it's",
    "back\\slash",
    "\\n",
    "a;b",
    ";",
    "blk\\.(1|2)\\.ffn_(up|down)_(ch|)exps\\.=CPU",
    "ünïcode 日本",
    "#no comment",
    "@x",
    "-v",
    "trailing\\",
    " ",
]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze here")
def test_systemd_itself_accepts_the_line(tmp_path):
    words = " ".join(unit_escape(word) for word in NASTY)
    unit = tmp_path / "nasty.service"
    unit.write_text(f"[Service]\nExecStart=/bin/true {words}\n")
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, check=False)
    assert "nasty.service" not in done.stderr


def test_every_nasty_word_survives():
    for word in NASTY:
        assert systemd_reads(unit_escape(word)) == word
    assert unit_escape("a b") == '"a b"'


def test_credentials_are_named_by_their_place_on_the_host():
    asked = {"name": "gpt", "api_key_file": "/home/me/keys", "tls_certificate_file": "/home/me/c", "tls_key_file": "/k"}
    (instance,) = planning.settings(asked).models
    folder = "/run/credentials/llama-server-gpt.service"
    assert credential_flags(instance) == [
        "--api-key-file", f"{folder}/api-keys", "--ssl-cert-file", f"{folder}/tls-certificate",
        "--ssl-key-file", f"{folder}/tls-key",
    ]  # fmt: skip
    assert credential_flags(planning.settings({}).models[0]) == []


def test_what_was_asked_for_by_name_is_given(planned):
    from dataclasses import replace

    instance = replace(planned[1], extra_flags=("--temp 0.2",), dangerous_flags=("--cors-origins https://a.example",))
    command = argv(planned[0], instance, "/m.gguf")
    assert argument(command, "--temp") == "0.2" and argument(command, "--cors-origins") == "https://a.example"
    assert command.count("--cors-origins") == 1 and "--no-cors-credentials" in command


def test_adapters_are_one_flag_in_their_order_with_their_scales(planned):
    plan, _ = planned
    asked = [{"source": "/a.gguf"}, {"source": "/b.gguf", "scale": 0}, {"source": "/c.gguf", "scale": -0.25}]
    [instance] = planning.settings({"adapters": asked}).models
    paths = {f"adapter-{number}": f"/m/{name}.gguf" for number, name in enumerate("abc", 1)}
    command = argv(plan, instance, "/m.gguf", paths)
    assert argument(command, "--lora-scaled") == "/m/a.gguf:1.0,/m/b.gguf:0.0,/m/c.gguf:-0.25"
    assert "--lora-scaled" not in argv(plan, instance, "/m.gguf")
    for path in ("/m,x.gguf", "/m:x.gguf", '/m"x.gguf'):
        with pytest.raises(FlagError, match="--lora-scaled: a path should have no"):
            argv(plan, instance, "/m.gguf", {**paths, "adapter-2": path})


def test_a_server_may_sleep_where_that_was_asked_for(planned):
    plan, instance = planned
    assert "--sleep-idle-seconds" not in argv(plan, instance, "/m.gguf")
    asked = dataclasses.replace(instance, sleep_idle_seconds=900)
    assert argument(argv(plan, asked, "/m.gguf"), "--sleep-idle-seconds") == "900"
