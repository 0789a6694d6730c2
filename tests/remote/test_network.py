"""The way out that jobs get."""

import os
import shutil
import subprocess

import pytest

from llamafleet.remote import network
from tests import company
from tests.serving import raw, serving


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


@pytest.mark.skipif(not shutil.which("apt-config"), reason="needs apt")
def test_apt_reads_the_certificates_from_the_file_that_its_variable_names(tmp_path):
    """ollama/ollama#5446."""
    (tmp_path / "apt.conf").write_text(network.apt_settings("/run/llamafleet/certificates.pem"))
    variables = {**os.environ, "APT_CONFIG": str(tmp_path / "apt.conf")}
    shown = subprocess.run(["apt-config", "dump"], env=variables, capture_output=True, text=True, check=True).stdout
    assert 'Acquire::https::CAInfo "/run/llamafleet/certificates.pem";' in shown


def test_git_reads_by_the_proxy_and_trusts_the_company_s_authority(tmp_path):
    """ollama/ollama#3816, #5446."""
    authority = company.Authority(tmp_path)
    git = {"GIT_TERMINAL_PROMPT": "0", "GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": "/dev/null",
           "PATH": os.environ["PATH"]}  # fmt: skip

    def refs(_):
        lines = ["# service=git-upload-pack\n", f"{'a' * 40} refs/heads/main\0agent=x\n"]
        first, second = (f"{len(line) + 4:04x}{line}" for line in lines)
        body = f"{first}0000{second}0000".encode()
        yield b"HTTP/1.1 200 OK\r\nContent-Type: application/x-git-upload-pack-advertisement\r\n"
        yield b"Content-Length: %d\r\n\r\n" % len(body) + body

    with (
        serving(raw(refs)) as server,
        company.front(authority.context("git.example"), server.server_address[1]) as front,
        company.proxy({"git.example": front.server_address[1]}) as proxy,
    ):
        words = ["git", "ls-remote", "https://git.example/llama.cpp"]
        way = {**git, **network.variables(proxy.url, (), None)}
        refused = subprocess.run(words, env=way, capture_output=True, text=True)
        assert refused.returncode and "certificate" in refused.stderr
        trusting = {**way, **network.variables(None, (), str(authority.certificate))}
        done = subprocess.run(words, env=trusting, capture_output=True, text=True)
    assert done.stdout == f"{'a' * 40}\trefs/heads/main\n", done.stderr
    assert set(proxy.asked) == {"git.example:443"}
