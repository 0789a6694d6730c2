"""The proxy and the certificates that settings name, on the operator's machine: headers, sums, git and pip."""

import subprocess
import sys
from pathlib import Path

import pytest

from llamafleet.hub.network import Network
from llamafleet.hub.source import read_header, resolve
from llamafleet.model.gguf import read_path
from llamafleet.sources import SourceError
from sandbox import hub as stand_in
from sandbox import models
from tests import company

NAMES = ("hub.company.example", "cdn.company.example")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The Hub at names that the proxy alone knows, with certificates of the company's own authority."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    authority = company.Authority(tmp_path)
    with stand_in.Hub() as hub:
        hub.file, hub.authority = models.tiny(tmp_path), authority
        hub.add("acme/tiny-GGUF", "tiny.gguf", hub.file)
        ports = [int(url.rpartition(":")[2]) for url in (hub.url, hub.cdn_url)]
        hub.url, hub.cdn_url = (f"https://{name}" for name in NAMES)
        context = authority.context(*NAMES)
        with company.front(context, ports[0]) as one, company.front(context, ports[1]) as two:
            places = dict(zip(NAMES, (one.server_address[1], two.server_address[1]), strict=True))
            with company.proxy(places) as proxy:
                hub.proxy = proxy
                yield hub


def test_headers_and_sums_come_by_the_proxy_and_the_company_s_authority(hub, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")  # the settings come before the environment
    way = Network(hub.proxy.url, (), str(hub.authority.certificate))
    files = resolve("hf:acme/tiny-GGUF", endpoint=hub.url, network=way)
    assert files[0].sha256 and read_header(files, network=way) == read_path(hub.file)
    assert set(hub.proxy.asked) == {f"{name}:443" for name in NAMES}


def test_without_the_authority_the_server_is_not_trusted(hub):
    with pytest.raises(SourceError, match=r"\(SSLCertVerificationError\); if a company's .* with ca_file"):
        resolve("hf:acme/tiny-GGUF", endpoint=hub.url, network=Network(hub.proxy.url))


def test_what_is_excepted_and_this_machine_are_reached_directly(hub, tmp_path):
    way = Network(hub.proxy.url, (".company.example",), str(hub.authority.certificate))
    with pytest.raises(SourceError, match=r"NameResolutionError.*check address and network"):
        resolve("hf:acme/tiny-GGUF", endpoint=hub.url, network=way)
    with stand_in.Hub() as near:
        near.add("acme/tiny-GGUF", "tiny.gguf", hub.file)
        assert resolve("hf:acme/tiny-GGUF", endpoint=near.url, network=Network(hub.proxy.url))
    assert hub.proxy.asked == []


def test_a_proxy_that_is_away_is_named(hub):
    with pytest.raises(SourceError, match=r"whether the proxy http://127\.0\.0\.1:1 lets it through"):
        resolve("hf:acme/tiny-GGUF", endpoint=hub.url, network=Network("http://127.0.0.1:1"))


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "No such file"), (b"", "no certificate in PEM form"), (b"\xff\0", "no certificate"),
     (b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "no certificate in PEM form")],
    ids=["no file", "empty", "binary", "damaged"],
)  # fmt: skip
def test_a_file_without_certificates_is_named(tmp_path, content, says):
    file = tmp_path / "ca.pem"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SourceError, match=f"ca_file: {file}: .*{says}"):
        Network(ca_file=str(file)).certificates()


def test_programs_of_this_machine_have_the_same_way_out(hub):
    way = Network(hub.proxy.url, ("x.example",), str(hub.authority.certificate))
    words = ["curl", "--silent", "--fail", "--head", f"{hub.url}/acme/tiny-GGUF/resolve/main/tiny.gguf"]
    assert "302" in subprocess.run(words, env=way.environment(), capture_output=True, text=True, check=True).stdout
    assert "company.example:443" in "".join(hub.proxy.asked)
    bundle = Path(way.environment()["GIT_SSL_CAINFO"]).read_text()
    assert "BEGIN CERTIFICATE" in bundle and "Company" not in bundle


def test_the_bundle_is_gone_when_the_program_ends(tmp_path):
    made = company.Authority(tmp_path).certificate
    script = (
        f"from llamafleet.hub.network import Network; print(Network(ca_file={str(made)!r}).environment()['PIP_CERT'])"
    )
    bundle = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    assert bundle.endswith(".pem") and not subprocess.run(["ls", bundle], capture_output=True).stdout
