"""The way out that jobs get."""

import pytest

from llamafleet.remote import network


def test_nothing_is_set_where_nothing_is_asked():
    assert network.variables(None, ["x.example"], None) == {}


def test_every_program_is_told_of_the_proxy_and_never_for_this_machine():
    """ollama/ollama#729, #3816: what runs detached has no environment of a login."""
    found = network.variables("http://p:3128", [".example.net", "10.0.0.0/8"], None)
    assert {found[name] for name in ("http_proxy", "https_proxy", "HTTPS_PROXY")} == {"http://p:3128"}
    assert found["no_proxy"] == found["NO_PROXY"] == "localhost,127.0.0.1,::1,.example.net,10.0.0.0/8"


@pytest.mark.parametrize(
    ("host", "is_direct"),
    [
        ("localhost", True), ("127.0.0.9", True), ("::1", True), ("[::1]", True), ("example.net", True),
        ("hub.example.net", True), ("HUB.Example.NET.", True), ("badexample.net", False), ("10.1.2.3", True),
        ("11.1.2.3", False), ("fd00::7", True), ("huggingface.co", False), ("", False),
    ],
)  # fmt: skip
def test_names_and_networks_are_excepted(host, is_direct):
    assert network.is_excepted(host, [".example.net", "10.0.0.0/8", "fd00::/64"]) is is_direct


def test_the_public_certificates_stay_trusted(tmp_path):
    public = tmp_path / "ca-bundle.crt"
    public.write_bytes(b"PUBLIC\n")
    assert network.bundle(b"OWN\n\n", [str(tmp_path / "none"), str(public), "/etc/passwd"]) == b"PUBLIC\n\nOWN\n"
    assert network.bundle(b"OWN", [str(tmp_path / "none")]) == b"OWN\n"
