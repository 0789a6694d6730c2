"""The gate asks a server that speaks https: it believes the installed certificate and no other."""

import http.server
import ssl
import threading

import gate_server
import pytest

from tests.test_certificates import make


@pytest.fixture
def server(tmp_path):
    """Serves https with the certificate "one"; its URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"status": "ok"}')

        def log_message(self, *_):
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*make(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as one:
        one.socket = context.wrap_socket(one.socket, server_side=True)
        thread = threading.Thread(target=one.serve_forever, args=(0.02,))
        thread.start()
        yield f"https://127.0.0.1:{one.server_address[1]}"
        one.shutdown()
        thread.join()


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
