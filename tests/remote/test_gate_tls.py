"""The gate asks a server that speaks https: it believes the installed certificate and no other."""

import ssl

import gate_server
import pytest

from tests.serving import Server, serving
from tests.tasks.test_certificates import make


class Healthy(Server):
    def respond(self, path, body, headers):
        return 200, {"status": "ok"}


@pytest.fixture
def server(tmp_path):
    """Serves https with the certificate "one"; its URL."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*make(tmp_path))
    one = Healthy()
    one.socket = context.wrap_socket(one.socket, server_side=True)
    with serving(one):
        yield f"https://127.0.0.1:{one.server_port}"


@pytest.fixture(autouse=True)
def nobody_trusted(monkeypatch):
    monkeypatch.setattr(gate_server, "_trusted", {})


def test_the_installed_certificate_is_believed_by_its_content_not_its_name(server, tmp_path):
    gate_server.trust({"url": server, "tls_certificate": str(tmp_path / "one.crt")})
    assert gate_server.ask(server, "/health") == (200, {"status": "ok"})


def test_another_certificate_is_not(server, tmp_path):
    other, _ = make(tmp_path, "other")
    gate_server.trust({"url": server, "tls_certificate": other})
    status, said = gate_server.ask(server, "/health")
    assert status == 0 and "CERTIFICATE_VERIFY_FAILED" in said


def test_nor_is_what_stands_behind_it_in_the_chain(server, tmp_path):
    """Who holds another certificate of the same chain is not this server."""
    make(tmp_path, "other")
    chain = tmp_path / "chain.crt"
    chain.write_text((tmp_path / "other.crt").read_text() + (tmp_path / "one.crt").read_text())
    gate_server.trust({"url": server, "tls_certificate": str(chain)})
    assert gate_server.ask(server, "/health")[0] == 0


def test_without_an_installed_certificate_none_is_believed(server):
    gate_server.trust({"url": server, "tls_certificate": None})
    assert gate_server.ask(server, "/health")[0] == 0
