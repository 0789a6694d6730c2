"""What hosts of a site know each other by: a certificate that clients take from its addresses alone."""

import contextlib
import json
import socket
import ssl
import threading

import pytest

from tasks.lib import site_access
from tasks.lib.site_access import Access, resolved

ADDRESSES = {"h1": "127.0.1.7", "h2": "127.0.1.8", "h3": "fd00::3"}


@pytest.fixture(scope="module")
def access():
    return Access.made(ADDRESSES, 7627)


def shaken(access, folder, at):
    """Whether a client of the run takes the server's certificate at this address."""
    pair = folder / "pair.pem"
    pair.write_text(access.key + access.certificate)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(pair)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.load_verify_locations(cadata=json.loads(access.for_clients())["certificate"])
    one, other = socket.socketpair()

    def answer():
        stream = server.wrap_socket(one, server_side=True, do_handshake_on_connect=False)
        with stream, contextlib.suppress(OSError):
            stream.do_handshake()

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        with other, client.wrap_socket(other, server_hostname=at):
            return True
    except ssl.SSLCertVerificationError:
        return False
    finally:
        thread.join(10)


@pytest.mark.parametrize(("at", "taken"), [("127.0.1.7", True), ("fd00::3", True), ("127.0.1.9", False)])
def test_the_certificate_is_for_the_hosts_of_the_site(access, tmp_path, at, taken):
    assert shaken(access, tmp_path, at) is taken


def test_each_run_has_its_own(access):
    other = Access.made(ADDRESSES, 7627)
    assert len({access.token, other.token, access.key, other.key}) == 4
    assert len(access.token) >= 43


def test_clients_get_no_key_and_nothing_secret_is_shown(access):
    assert set(json.loads(access.for_clients())) == {"token", "certificate"}
    assert json.loads(access.for_server("daemon off;"))["nginx.conf"] == "daemon off;"
    assert [secret for secret in (access.token, access.key) if secret in repr(access)] == []


def test_a_host_does_not_count_among_the_others(access):
    assert Access.made({"h1": "10.0.0.1", "h2": "10.0.0.2", "h3": "fd00::3"}, 1).others("h1") == ("10.0.0.2", "fd00::3")


def test_hosts_on_one_machine_come_from_its_first_address(access):
    assert access.others("h1") == ("127.0.0.1", "127.0.1.8", "fd00::3")
    assert access.others("h3") == ("127.0.1.7", "127.0.1.8")


def test_an_address_that_is_none_is_refused():
    with pytest.raises(ValueError, match="gpu1"):
        Access.made({"h1": "gpu1.example.net"}, 7627)


@pytest.mark.parametrize(
    ("name", "address"),
    [("127.0.1.7", "127.0.1.7"), ("10.1.2.3", "10.1.2.3"), ("localhost", None), ("127.0.0.1", None), ("fe80::1", None),
     ("no such name", None), ("a" * 300, None)],
)  # fmt: skip
def test_addresses_that_other_hosts_can_use(name, address):
    assert resolved(name) == address


def test_a_name_is_looked_up_on_this_machine(monkeypatch):
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.9.8.7", 0))]
    monkeypatch.setattr(site_access.socket, "getaddrinfo", lambda *_, **__: found)
    assert resolved("gpu1.lan") == "10.9.8.7"
