"""Secrets of the operator: an invalid one is refused with its setting and place, and never quoted."""

import os

import pytest

from llamafleet.settings import secrets as secret_files
from llamafleet.settings.secrets import SecretError

SECRET = "sk-very-secret-0123456789"


@pytest.fixture
def file(tmp_path):
    def make(text, mode=0o600):
        path = tmp_path / "keys"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        path.chmod(mode)
        return str(path)

    return make


def refused(place, read=secret_files.api_keys):
    with pytest.raises(SecretError) as caught:
        read(place, "api_key_file")
    message = str(caught.value)
    assert message.startswith("api_key_file: ") and SECRET not in message
    return message


@pytest.mark.parametrize("text", ["", "\n", " \t\r\n \n"], ids=["empty", "a line", "blanks"])
def test_an_empty_file_would_open_the_door(file, text):
    assert "is empty" in refused(file(text))


def test_a_file_of_comments_would_open_the_door_too(file):
    assert "comments only" in refused(file("# " + SECRET + "\n#x\n"))


@pytest.mark.parametrize("mode", [0o604, 0o644, 0o602, 0o620, 0o666, 0o607])
def test_a_file_that_others_read_or_change_is_refused(file, mode):
    place = file(SECRET, mode)
    assert (
        refused(place) == f"api_key_file: {place} has mode {mode:04o}, others may read or change it: chmod 600 {place}"
    )


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640])
def test_the_owner_and_a_group_that_reads_are_fine(file, mode):
    assert (
        secret_files.api_keys(file(SECRET, mode), "api_key_file") == f"{SECRET}\n{SECRET}\n"
    )  # a single key is partly logged


def test_lines_become_keys_as_llama_server_takes_them(file):
    text = f"# of the team\r\n {SECRET} \r\n\r\n\tother-key-123\n"
    assert secret_files.api_keys(file(text), "api_key_file") == f"{SECRET}\nother-key-123\n"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (f"{SECRET} of bob\n", "line 1: a key should be printable ASCII without blanks"),
        (f"good-key-1\n{SECRET}\u00e9\n", "line 2: a key should be printable ASCII"),
        ("short\n", "line 1: a key should have at least 8 characters"),
        (f"{SECRET}\n\n{SECRET}\n", "line 3: the same key as in line 1"),
        (b"\xff\xfe", "is not text"),
    ],
)
def test_invalid_keys_are_named_by_line(file, text, problem):
    assert problem in refused(file(text))


def test_a_place_without_a_regular_file_is_refused(tmp_path):
    assert refused(str(tmp_path / "none")).endswith(f"make one: (umask 077; openssl rand -hex 32 >{tmp_path}/none)")
    assert "is not a file" in refused(str(tmp_path))
    os.mkfifo(tmp_path / "pipe", 0o600)
    assert "is not a file" in refused(str(tmp_path / "pipe"))


def test_a_token_is_one_word(file):
    assert secret_files.token(file(SECRET + "\n"), "hub_token_file") == SECRET
    for text in (f"{SECRET} x", f"{SECRET}\nx"):
        assert "one token" in refused(file(text), secret_files.token)


def test_a_variable_does_as_well(monkeypatch):
    monkeypatch.setattr(secret_files, "_taken", {})
    monkeypatch.setenv("FLEET_KEYS", SECRET)
    assert (
        secret_files.api_keys("env:FLEET_KEYS", "api_key_file") == f"{SECRET}\n{SECRET}\n"
    )  # a single key is partly logged
    assert "no such variable" in refused("env:FLEET_KEY")


@pytest.mark.parametrize("place", [None, "env:OTHER"])
def test_a_token_is_not_sent_where_others_can_read_it(monkeypatch, place):
    monkeypatch.setattr(secret_files, "_taken", {})
    monkeypatch.setenv("HF_TOKEN", "hf_environment")
    monkeypatch.setenv("OTHER", "hf_other")
    name = "hub_token_file" if place else "HF_TOKEN"
    with pytest.raises(
        SecretError, match=f"^{name}: hub_endpoint http://hub.example is neither https nor this machine"
    ) as caught:
        secret_files.hub_token(place, "http://hub.example")
    assert "hf_" not in str(caught.value)
    assert (
        secret_files.hub_token(place, "http://127.0.0.1:9")
        == secret_files.hub_token(place, "https://hub.example")
        is not None
    )


def test_without_a_token_any_endpoint_will_do(monkeypatch):
    monkeypatch.setattr(secret_files, "_taken", {})
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert secret_files.hub_token(None, "http://hub.example") is None


@pytest.mark.parametrize("place", ["~no-such-user-here/keys", "/" + "k" * 5000, "/nowhere"])
def test_a_place_that_cannot_be_read_is_named(place):
    with pytest.raises(SecretError, match=r"^api_key_file: (cannot read|there is no file) "):
        secret_files.read(place, "api_key_file")


def test_a_file_of_any_length_is_no_secret(file, monkeypatch):
    monkeypatch.setattr(secret_files, "LIMIT", 100)
    assert secret_files.read(file("k" * 100), "api_key_file") == "k" * 100
    with pytest.raises(SecretError, match="has more than 100 characters"):
        secret_files.read(file("k" * 101), "api_key_file")
