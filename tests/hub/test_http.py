"""Servers that send too much, too slowly or what no standard knows: every case ends in time, with a message that names
the address, and without much memory."""

import gzip
import resource
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamafleet.hub.http import Deadline, SourceError, Web, shown
from llamafleet.sources import SHOWN_CHARACTERS
from tests.mutations import FUZZ
from tests.serving import dripping, flood, raw, serving

OK = b"HTTP/1.1 200 OK\r\n"
SECONDS = 0.4
MIB = 2**20


@pytest.fixture
def served():
    """Starts a server with a script; down at the end."""
    running = []

    def start(script):
        server = serving(raw(script))
        running.append(server)
        return server.__enter__()

    yield start
    for server in running:
        server.__exit__(None, None, None)


def sends(*pieces):
    return lambda _: iter(pieces)


def web(seconds=SECONDS, **more):
    return Web(sleep=lambda seconds: None, deadline=Deadline(seconds), **more)


def problem(act, server):
    """The message of the SourceError; it came in time and names the address."""
    began = time.monotonic()
    with pytest.raises(SourceError) as caught:
        act()
    assert time.monotonic() - began < SECONDS + 30  # a busy machine gets time; a server that never ends would take more
    assert server.url in str(caught.value) and len(str(caught.value)) < 1000
    return str(caught.value)


# --- time ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "start",
    [b"", b"HTTP/1.1 200 OK\r\nX: ", OK, OK + b"Content-Length: 1000000\r\n\r\n", OK + b"\r\n",
     OK + b"Transfer-Encoding: chunked\r\n\r\n", OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab"],
    ids=["status", "header", "headers", "body", "body without a length", "chunk size", "chunk"],
)  # fmt: skip
def test_a_byte_now_and_then_ends_at_the_deadline(served, start):
    server = served(dripping(start))
    with web() as client:
        assert "took longer than 0 s" in problem(lambda: client.read(f"{server.url}/x", 0, 5000), server)
        # The time is for all that this client asks: there is none left.
        assert "took longer" in problem(lambda: client.ask("HEAD", f"{server.url}/y"), server)
    assert not any("/y" in line for line in server.asked)


def test_headers_that_the_deadline_cut_are_no_answer(served):
    server = served(dripping(OK + b"X-Linked-Size: 5\r\nX: "))
    with web() as client:
        assert "took longer" in problem(lambda: client.ask("HEAD", f"{server.url}/x", follow=False), server)


def test_silence_ends_at_the_deadline(served):
    server = served(sends(30.0))
    with web() as client:
        assert "took longer" in problem(lambda: client.ask("GET", f"{server.url}/x"), server)


def test_answers_before_the_real_one_end_at_the_deadline(served):
    server = served(flood(block=b"HTTP/1.1 100 Continue\r\n\r\n" * 100))
    with web() as client:
        assert "took longer" in problem(lambda: client.ask("GET", f"{server.url}/x"), server)


def test_a_tls_handshake_that_drips_ends_at_the_deadline(served):
    server = served(dripping(b"\x16\x03\x03\x3f\xff", 0.02))
    url = server.url.replace("http:", "https:")
    with web() as client, pytest.raises(SourceError, match="took longer"):
        client.ask("GET", f"{url}/x")


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_drips_ends_at_the_deadline(served, monkeypatch, scheme):
    server = served(dripping(b"HTTP/1.1 200 "))
    monkeypatch.setenv(f"{scheme}_proxy", server.url)
    monkeypatch.delenv("no_proxy", raising=False)
    with web() as client, pytest.raises(SourceError, match=f"{scheme}://h.example/x: reading took longer"):
        client.ask("GET", f"{scheme}://h.example/x")
    assert server.asked == [
        f"{'CONNECT h.example:443' if scheme == 'https' else 'GET http://h.example/x'} HTTP/1.{'01'[scheme == 'http']}"
    ]


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:1", "http://[::1", "ftp://h", "http://h:99999", "x"])
def test_an_odd_proxy_is_an_error_that_names_the_address(monkeypatch, proxy):
    monkeypatch.setenv("http_proxy", proxy)
    monkeypatch.delenv("no_proxy", raising=False)
    with web(5) as client, pytest.raises(SourceError, match=r"http://h\.example/x: cannot be reached"):
        client.ask("GET", "http://h.example/x")


def test_waiting_for_a_busy_server_counts_too(served):
    server = served(sends(b"HTTP/1.1 503 Busy\r\nRetry-After: 2\r\nContent-Length: 0\r\n\r\n"))
    with web() as client:
        assert "HTTP 503" in problem(lambda: client.ask("GET", f"{server.url}/x"), server)
    assert len(server.asked) == 1, "it was waited for longer than there is time"


# --- size ------------------------------------------------------------------------------------------


def grown(act):
    """MiB by which the most memory that this process ever had has grown."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    act()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


@pytest.mark.parametrize(
    ("start", "block"),
    [(OK, b"X-Fill: " + b"a" * 60000 + b"\r\n"), (OK, b"a" * 65536), (b"", b"a" * 65536), (OK, b" : \r\n" * 10000)],
    ids=["headers", "one header", "status", "empty names"],
)
def test_headers_without_end_are_an_error(served, start, block):
    server = served(flood(start, block))
    with web(20) as client:
        assert grown(lambda: problem(lambda: client.ask("GET", f"{server.url}/x"), server)) < 64


@pytest.mark.parametrize(
    "framing", [b"\r\n", b"Transfer-Encoding: chunked\r\n\r\n", b"Content-Length: 9999999999\r\n\r\n"]
)
def test_no_more_is_read_of_a_body_than_was_asked_for(served, framing):
    block = b"10000\r\n" + b"a" * 65536 + b"\r\n" if b"chunked" in framing else b"a" * 65536
    server = served(flood(OK + framing, block))
    with web(20) as client:
        read = {}
        assert grown(lambda: read.update(part=client.read(f"{server.url}/x", 0, MIB)[0])) < 32
        assert len(read["part"]) == MIB
        assert "more than 1000 bytes" in problem(lambda: client.page(f"{server.url}/list", 1000), server)


def test_a_connection_that_is_read_no_further_is_closed(served):
    """Not only at the deadline: a model may have a thousand shards, and each takes a connection."""
    ended = threading.Event()

    def script(lines):
        try:
            yield from flood(OK + b"\r\n")(lines)
        finally:
            ended.set()

    server = served(script)
    with web(20) as client:
        client.read(f"{server.url}/x", 0, 1000)
        assert ended.wait(5)


def test_a_chunk_size_without_end_is_an_error(served):
    server = served(flood(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"0" * 65536))
    with web(20) as client:
        assert grown(lambda: problem(lambda: client.read(f"{server.url}/x", 0, 100), server)) < 64


def test_the_body_of_a_redirect_is_not_read(served):
    server = served(flood(b"HTTP/1.1 302 Found\r\nLocation: /x\r\n\r\n"))
    with web(20) as client:
        assert "more than 8 redirects" in problem(lambda: client.ask("GET", f"{server.url}/x"), server)


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "x-gzip", "deflate", "br", "gzip, gzip", "identity, gzip"])
def test_a_compressed_body_is_refused_unread(served, encoding, bomb=gzip.compress(bytes(64 * MIB))):
    head = f"HTTP/1.1 206 P\r\nContent-Range: bytes 0-9/10\r\nContent-Encoding: {encoding}\r\n"
    server = served(sends(f"{head}Content-Length: {len(bomb)}\r\n\r\n".encode(), bomb))
    with web(20) as client:
        assert "compressed" in problem(lambda: client.read(f"{server.url}/x", 0, 10), server)
        assert "compressed" in problem(lambda: client.page(f"{server.url}/x", 10), server)


def test_a_page_that_is_identity_is_read(served):
    server = served(sends(OK + b"Content-Encoding: identity\r\nContent-Length: 2\r\n\r\n[]"))
    with web(20) as client:
        assert client.page(f"{server.url}/x", 10) == (b"[]", None)


# --- addresses and headers ---------------------------------------------------------------------------

BAD_TARGETS = [
    *("http://[::1/x", "http://h:99999/x", "http://h:-1/x", "http://h:0/x", f"http://h:{'9' * 5000}/x", "//[/x"),
    *(f"http://{'a' * 70}/x", "http://a..b/x", "http://.a/x", f"http://{'a.' * 200}b/x", "https://:80/x"),
    *("http://h/a b", "http://user:word@h/x", "http://h\\@evil/x", "http://h/\x00", "http://h/" + "a" * 5000),
    *("ftp://h/x", "file:///etc/passwd", "javascript:alert(1)", "data:text/plain,x", ""),
]


@pytest.mark.parametrize("target", BAD_TARGETS, ids=lambda target: target[:20] or "empty")
def test_a_redirect_to_an_odd_address_is_an_error(served, target):
    location = target.replace("\x00", "%00 ").encode("latin-1")
    server = served(sends(b"HTTP/1.1 302 Found\r\nLocation: " + location + b"\r\nContent-Length: 0\r\n\r\n"))
    with web(20) as client:
        assert "redirects to" in problem(lambda: client.ask("GET", f"{server.url}/x"), server)
        assert "redirects to" in problem(lambda: client.ask("HEAD", f"{server.url}/x", follow=False), server)
    assert len(server.asked) == 2, "the same answer was asked for again"


@pytest.mark.parametrize(
    "url", [*BAD_TARGETS, "http:///x", "http://", "http:x", "h/x"], ids=lambda url: url[:20] or "empty"
)
def test_an_odd_address_is_asked_of_nobody(url):
    with web(20) as client, pytest.raises(SourceError, match="should be an http"):
        client.ask("GET", url)


@FUZZ
@given(
    st.one_of(
        st.text(),
        st.text().map("http://".__add__),
        st.text().map("https://h/".__add__),
        st.text(alphabet="[]:@/?#.%\\").map("http://".__add__),
    )
)
def test_no_text_is_an_address_that_ends_in_a_traceback(text):
    with web(0.0) as client, pytest.raises(SourceError):
        client.ask("GET", text)
    assert len(shown(text)) <= SHOWN_CHARACTERS


@pytest.mark.parametrize(
    "value",
    ["²", "٣", "9" * 400, "9" * 5000, "-1", "1e3", "0x10", "bytes", "5, 7", "1.5", "", "NaN"],
    ids=lambda value: value[:8] or "empty",
)
@pytest.mark.parametrize("name", ["Content-Range", "Content-Length", "Retry-After"])
def test_numbers_of_any_form_are_no_traceback(served, name, value):
    forms = {"Content-Range": f"bytes 0-9/{value}", "Content-Length": value, "Retry-After": value}
    status = "503 Busy" if name == "Retry-After" else "206 Part"
    head = (
        f"HTTP/1.1 {status}\r\nContent-Range: bytes 0-9/10\r\n" if name != "Content-Range" else f"HTTP/1.1 {status}\r\n"
    )
    server = served(sends(f"{head}{name}: {forms[name]}\r\n\r\n".encode(), b"0123456789"))
    with web(20) as client:
        try:
            part, size = client.read(f"{server.url}/x", 0, 10)
        except SourceError as error:
            assert server.url in str(error)
        else:
            assert part == b"0123456789"[: len(part)] and size in (None, 10)


@pytest.mark.parametrize(
    "value",
    ["bytes 5-9/10", "bytes */10", "items 0-9/10", "bytes 0-9", "bytes 00000000000000000000-9/10", "bytes -1-9/10"],
)
def test_a_part_that_was_not_asked_for_is_refused(served, value):
    server = served(
        sends(f"HTTP/1.1 206 P\r\nContent-Range: {value}\r\nContent-Length: 10\r\n\r\n".encode(), b"0123456789")
    )
    with web(20) as client:
        assert "requested bytes from 0" in problem(lambda: client.read(f"{server.url}/x", 0, 10), server)


@pytest.mark.parametrize(
    ("value", "waits"),
    [("Sun, 06 Nov 1994 08:49:37 GMT", [0.0] * 3), ("Mon, 99 Foo 9999 99:99:99", [1.0, 2.0, 4.0]),
     ("Sun, 06 Nov 0001 08:49:37 +9999", None), ("7", [7.0] * 3), ("²", [1.0, 2.0, 4.0]), ("a" * 70000, None)],
    ids=["date", "no date", "no year", "number", "superscript", "long"],
)  # fmt: skip
def test_a_time_to_wait_of_any_form(served, value, waits):
    server = served(sends(f"HTTP/1.1 503 B\r\nRetry-After: {value}\r\nContent-Length: 0\r\n\r\n".encode()))
    slept = []
    with Web(sleep=slept.append, deadline=Deadline(60)) as client:
        problem(lambda: client.ask("GET", f"{server.url}/x"), server)
    assert waits is None or slept == waits


# --- secrets -----------------------------------------------------------------------------------------


def test_a_token_goes_to_no_other_machine_in_the_open(monkeypatch):
    sent = []
    client = Web("hf_secret", "http://hub.example:80")

    class Session:
        def request(self, method, url, headers, **_):
            sent.append((url, headers))
            raise OSError

        def close(self):
            pass

    client._session = Session()
    client.sleep = lambda seconds: None
    with pytest.raises(SourceError):
        client.ask("GET", "http://hub.example/x")
    client.token_origin = "https://hub.example:443"
    with pytest.raises(SourceError):
        client.ask("GET", "https://hub.example/x")
    assert {url: "Authorization" in headers for url, headers in sent} == {
        "http://hub.example/x": False, "https://hub.example/x": True,
    }  # fmt: skip


@settings(FUZZ, max_examples=200)
@given(st.text(), st.text(alphabet="abc:@/"))
def test_no_query_and_no_user_is_shown(query, rest):
    assert "SECRET" not in shown(f"https://h/x{rest.replace('?', '')}?{query}SECRET")
    assert "SECRET" not in shown(f"https://SECRET{rest.replace('/', '')}@h/x")
