"""A file from several hosts of a site, some of which are slow, dead, damaged or lie: real servers with TLS on loopback.

Why real servers: who is left, what is kept and that no token goes astray show on the wire only.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import random
import re
import ssl
import time
from pathlib import Path

import fetch
import fetch_peers
import fetch_source
import pieces
import pytest
from fetch_spec import ASK_AGAIN, BAD_SPEC, NOT_GGUF, Failed, read_spec

from tasks.lib.site_access import self_signed
from tests.serving import Server, raw, serving

PIECE = 64 * 1024
BODY = b"GGUF" + random.Random(5).randbytes(20 * PIECE + 1000)
SHA = hashlib.sha256(BODY).hexdigest()
TOKEN = "t" * 43
HUB_TOKEN = "hf_thisIsASecretThatNobodyMaySee"


CERTIFICATE, KEY = self_signed(["127.0.0.1"])


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 20

    def log_message(self, *_):
        pass

    def do_GET(self):
        peer = self.server
        peer.asked.append((self.path, self.headers.get("Range")))
        peer.tokens.append(self.headers.get("Authorization"))
        if peer.is_dead:
            self.close_connection = True
            return
        name = self.path[1:].removesuffix(".pieces")
        body = peer.listed if self.path.endswith(".pieces") else peer.body
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" or name != peer.name or body is None:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        first, end = 0, len(body)
        if found := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or ""):
            first, end = int(found[1]), min(int(found[2]) + 1, len(body))
        self.send_response(206 if found else 200)
        self.send_header("Content-Length", str(end - first + (peer.longer if found else 0)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.send(body[first:end], counted=bool(found))

    def send(self, data: bytes, counted: bool) -> None:
        peer = self.server
        for at in range(0, len(data), 4096):
            block = data[at : at + 4096]
            if counted:
                peer.sent += len(block)
                if peer.dies_at is not None and peer.sent > peer.dies_at:
                    peer.is_dead = True
                    self.connection.close()
                    return
                time.sleep(len(block) / peer.bytes_per_s if peer.bytes_per_s else 0)
            self.wfile.write(block)
        if counted:
            peer.pieces += 1


class Peer(Server):
    """Serves BODY as a host of the site does. What it does wrong is set before it is asked."""

    def __init__(self, body=BODY, sums=None, **faults):
        super().__init__(Handler)
        self.body, self.name, self.tokens, self.sent, self.pieces, self.is_dead = body, SHA, [], 0, 0, False
        self.dies_at, self.bytes_per_s, self.longer = None, None, 0
        sums = sums or cut(body)
        self.listed = pieces.text(SHA, len(BODY), sums).encode()
        vars(self).update(faults)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(PAIR)
        self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

    def handle_error(self, request, client_address):
        pass  # who has had enough hangs up


def cut(body: bytes) -> list[str]:
    return [hashlib.sha256(body[at : at + PIECE]).hexdigest() for at in range(0, len(body), PIECE)]


PAIR = ""


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch, tmp_path):
    monkeypatch.setattr(pieces, "PIECE_BYTES", PIECE)
    monkeypatch.setattr(fetch_source, "STALL_S", 2.0)
    pair = tmp_path / "pair.pem"
    pair.write_text(KEY + CERTIFICATE)
    monkeypatch.setitem(globals(), "PAIR", str(pair))


class Job:
    def __init__(self, folder: Path, capsys) -> None:
        self.folder, self.capsys, self.text = folder, capsys, ""
        self.access = {"token": TOKEN, "certificate": CERTIFICATE}
        self.file, self.partial = folder / "models/x.gguf", folder / "models/.x.gguf.partial"
        self.spec = {"directory": str(folder / "models"), "reserve_bytes": 0, "files": [
            {"name": "x.gguf", "urls": ["http://127.0.0.1:9/x.gguf"], "size_bytes": len(BODY), "sha256": SHA}
        ]}  # fmt: skip

    def run(self, *ports: int, seconds: float = 30.0) -> int:
        """The exit code of a job that asks peers h0, h1, ... at these ports."""
        access = self.folder / "access"
        access.touch(mode=0o600)
        access.write_text(json.dumps(self.access))
        hosts = [{"name": f"h{number}", "address": "127.0.0.1", "port": port} for number, port in enumerate(ports)]
        peers = {"hosts": hosts, "access": str(access), "seconds": seconds}
        path = self.folder / "spec.json"
        path.write_text(json.dumps({**self.spec, "peers": peers}))
        code = 0
        try:
            fetch.fetch(read_spec(str(path)))
        except Failed as failure:
            code = failure.code
            self.failure = str(failure)
        self.text = self.capsys.readouterr().out
        return code

    def left(self) -> dict[str, str]:
        """By peer that was left, the kind of its fault."""
        return {name: kind for kind, name in re.findall(r"^told: left (\w+) (\w+): .", self.text, re.M)}

    def is_whole(self) -> bool:
        return self.file.exists() and self.file.read_bytes() == BODY and not self.partial.exists()


@pytest.fixture
def job(tmp_path, capsys):
    return Job(tmp_path, capsys)


@pytest.fixture
def start():
    with contextlib.ExitStack() as stack:
        yield lambda *peers: [stack.enter_context(serving(peer)).server_port for peer in peers]


def test_a_file_comes_from_several_peers_at_once(job, start):
    several = [Peer(bytes_per_s=2e6) for _ in range(3)]
    assert job.run(*start(*several)) == 0, job.failure
    assert (job.is_whole(), job.left()) == (True, {})
    assert all(peer.pieces >= 2 for peer in several)
    assert sum(peer.pieces for peer in several) <= 21 + 3
    assert json.loads((job.folder / "models/x.gguf.verified").read_text())["sha256"] == SHA


def test_one_peer_is_enough(job, start):
    [port] = start(Peer())
    assert (job.run(port), job.is_whole()) == (0, True)


def test_only_the_token_of_the_run_goes_to_peers(job, start):
    config = job.folder / "token.curl"
    config.touch(mode=0o600)
    config.write_text(f'header = "Authorization: Bearer {HUB_TOKEN}"\n')
    job.spec |= {"curl_config": str(config), "token_origin": "https://127.0.0.1"}
    peer = Peer()
    assert job.run(*start(peer)) == 0
    assert set(peer.tokens) == {f"Bearer {TOKEN}"}


def test_a_peer_with_another_certificate_is_shown_no_token(job, start):
    peer = Peer()
    job.access["certificate"] = self_signed(["127.0.0.1"])[0]
    assert (job.run(*start(peer)), job.left(), peer.tokens) == (ASK_AGAIN, {"h0": "unreachable"}, [])


def test_a_certificate_for_another_address_is_not_taken(job, start):
    certificate, key = self_signed(["127.0.0.2"])
    Path(PAIR).write_text(key + certificate)
    job.access["certificate"] = certificate
    peer = Peer()
    assert (job.run(*start(peer)), peer.tokens) == (ASK_AGAIN, [])


def test_a_peer_that_damages_bytes_is_left_and_named(job, start):
    damaged = bytes(byte ^ 1 for byte in BODY)  # every piece, so that it surely is given one of those
    peers = [Peer(bytes_per_s=2e6), Peer(damaged, sums=cut(BODY), bytes_per_s=2e6)]
    assert job.run(*start(*peers)) == 0
    assert (job.is_whole(), job.left()) == (True, {"h1": "damaged"})
    assert peers[1].pieces == 1


def test_a_peer_whose_list_is_of_another_file_is_left_only_if_no_other_brings_the_file(job, start):
    lie = BODY[:-1] + bytes([BODY[-1] ^ 1])
    assert job.run(*start(Peer(), Peer(lie), Peer())) == 0
    assert (job.is_whole(), job.left()) == (True, {})


@pytest.mark.parametrize("liars", [1, 2])
def test_peers_that_agree_on_a_wrong_file_are_named_and_the_others_bring_it(job, start, liars):
    lie = BODY[:-1] + bytes([BODY[-1] ^ 1])
    ports = start(*(Peer(lie) for _ in range(liars)), Peer())
    assert job.run(*ports) == 0
    assert (job.is_whole(), job.left()) == (True, {f"h{number}": "damaged" for number in range(liars)})


def test_a_killed_peer_costs_seconds(job, start):
    peers = [Peer(bytes_per_s=1e6), Peer(bytes_per_s=1e6, dies_at=2.5 * PIECE)]
    began = time.monotonic()
    assert job.run(*start(*peers)) == 0
    assert (job.is_whole(), job.left()) == (True, {"h1": "gone"})
    assert time.monotonic() - began < 20


def test_what_an_only_peer_brought_before_it_died_is_kept_for_the_next_one(job, start):
    first, second = Peer(dies_at=5.5 * PIECE), Peer()
    ports = start(first, second)
    assert (job.run(ports[0]), job.left(), job.file.exists()) == (ASK_AGAIN, {"h0": "gone"}, False)
    assert job.partial.read_bytes() == BODY[: 5 * PIECE]
    assert (job.run(ports[1]), job.is_whole()) == (0, True)
    assert second.pieces == 16


def test_a_damaged_beginning_is_fetched_anew_and_a_sound_one_is_kept(job, start):
    job.partial.parent.mkdir()
    job.partial.write_bytes(BODY[: 3 * PIECE] + b"?" * 2 * PIECE)
    peer = Peer()
    assert (job.run(*start(peer)), job.is_whole()) == (0, True)
    assert peer.pieces == 18


def test_a_slow_peer_holds_nobody_up(job, start):
    peers = [Peer(), Peer(bytes_per_s=4000.0)]  # 16 s a piece
    began = time.monotonic()
    assert (job.run(*start(*peers)), job.is_whole(), job.left()) == (0, True, {})
    assert time.monotonic() - began < 15


def test_peers_that_are_not_there_are_named(job, start):
    with serving(Server()) as gone:
        port = gone.server_port
    assert (job.run(port), job.left()) == (ASK_AGAIN, {"h0": "unreachable"})
    assert (job.run(port, *start(Peer())), job.is_whole(), job.left()) == (0, True, {"h0": "unreachable"})


@pytest.mark.parametrize(
    ("faults", "kind", "why"),
    [
        ({"name": "0" * 64}, "unreachable", "it answered 404"),
        ({"listed": b"[" * 1000}, "damaged", "its list of pieces: "),
        ({"listed": b"x" * 100000}, "damaged", "its list of pieces has more than "),
        ({"longer": 1 << 40}, "unreachable", f"bytes for a range of {PIECE}"),
        ({"is_dead": True}, "unreachable", "without response"),
    ],
)
def test_a_peer_that_answers_otherwise_is_left(job, start, faults, kind, why):
    assert (job.run(*start(Peer(**faults))), job.left()) == (ASK_AGAIN, {"h0": kind})
    assert why in job.text


def test_a_peer_that_never_ends_its_list_is_left(job, start, monkeypatch):
    monkeypatch.setattr(fetch_peers, "LISTS_S", 1.0)

    def drips(_):
        yield b"HTTP/1.1 200 OK\r\n"
        while True:
            yield b"a"
            yield 0.2

    plain = raw(drips)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(PAIR)
    plain.socket = context.wrap_socket(plain.socket, server_side=True, do_handshake_on_connect=False)
    with serving(plain):
        assert (job.run(plain.server_address[1]), job.left()) == (ASK_AGAIN, {"h0": "unreachable"})


def test_after_its_time_what_came_is_kept_and_others_are_asked(job, start):
    [port] = start(Peer(bytes_per_s=3e5))
    assert (job.run(port, seconds=1.5), job.left()) == (ASK_AGAIN, {})
    kept = job.partial.stat().st_size
    assert kept % PIECE == 0 and 0 < kept < len(BODY)
    assert BODY.startswith(job.partial.read_bytes())


def test_a_file_that_is_no_model_does_not_stay(job, start):
    text = b"<!DOCTYPE html>" * 1000
    entry = job.spec["files"][0]
    entry["size_bytes"], entry["sha256"] = len(text), hashlib.sha256(text).hexdigest()
    peer = Peer(text, name=entry["sha256"], listed=pieces.text(entry["sha256"], len(text), cut(text)).encode())
    assert (job.run(*start(peer)), job.partial.exists(), job.file.exists()) == (NOT_GGUF, False, False)


def test_an_archive_of_a_build_is_no_model_and_comes_as_well(job, start):
    text, name = b"an archive" * 1000, f"{'0' * 16}-{'a' * 64}.tar"
    entry = job.spec["files"][0]
    entry |= {"name": name, "urls": [], "size_bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    peer = Peer(text, name=entry["sha256"], listed=pieces.text(entry["sha256"], len(text), cut(text)).encode())
    assert job.run(*start(peer)) == 0, job.failure
    assert (job.folder / "models" / name).read_bytes() == text


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"hosts": []}, "peers.hosts should be a list of 1 to 16 hosts"),
        ({"hosts": [{"name": "a", "address": "example.org", "port": 1}]}, "address should be an IP address"),
        ({"hosts": [{"name": "a", "address": "127.0.0.1", "port": 0}]}, "port should be a port"),
        ({"hosts": [{"name": "a b", "address": "127.0.0.1", "port": 1}]}, "name should be 1 to 253"),
        ({"hosts": [{"name": "a", "address": "127.0.0.1", "port": 1}] * 2}, "hosts of different names"),
        ({"seconds": True}, "peers.seconds should be a number"),
        ({"access": "/nonexistent"}, "peers.access should be the path of a readable file"),
        ({"more": 1}, "an object of hosts, access and seconds"),
    ],
)
def test_bad_peers_are_refused(job, tmp_path, change, problem):
    job.run(1, seconds=0.1)
    spec = json.loads((tmp_path / "spec.json").read_text())
    (tmp_path / "spec.json").write_text(json.dumps({**spec, "peers": {**spec["peers"], **change}}))
    with pytest.raises(Failed, match=re.escape(problem)) as refused:
        read_spec(str(tmp_path / "spec.json"))
    assert refused.value.code == BAD_SPEC


@pytest.mark.parametrize("access", [[], {"token": TOKEN}, {"token": "short", "certificate": "x"}, {"token": 1}])
def test_a_bad_access_is_refused_without_showing_it(job, access):
    job.access = access
    assert job.run(1) == BAD_SPEC
    assert "should have a token and a certificate" in job.failure
    assert "short" not in job.failure


def test_a_file_of_unknown_sum_is_taken_from_no_peer(job):
    job.spec["files"][0] |= {"sha256": None, "unverified": True}
    assert (job.run(1), "peers are not believed" in job.failure) == (BAD_SPEC, True)
