"""The Hub stand-in, as a downloader sees it: raw http.client, so that no client library hides a fault."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from sandbox.hub import Hub
from sandbox.hub_data import byte_range

REPO, FILE = "acme/tiny-GGUF", "sub/tiny model.gguf"
KEY = f"{REPO}/{FILE}"
DATA = bytes(range(256)) * 4000  # 1,024,000 bytes
RESOLVE = f"/{REPO}/resolve/main/sub/tiny%20model.gguf"


class Answer:
    def __init__(self, response: http.client.HTTPResponse, body: bytes) -> None:
        self.status, self.headers, self.body = response.status, response.headers, body


def ask(base: str, path: str, method: str = "GET", **headers: str) -> Answer:
    """One request, redirects not followed; keyword `if_range` becomes the header If-Range."""
    parts = urlsplit(base)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    try:
        connection.request(method, path, headers={k.replace("_", "-"): v for k, v in headers.items()})
        response = connection.getresponse()
        return Answer(response, response.read())
    finally:
        connection.close()


def link(hub: Hub, path: str = RESOLVE, **headers: str) -> tuple[str, str]:
    """Base and path of the CDN address that the hub redirects to."""
    location = urlsplit(ask(hub.url, path, **headers).headers["Location"])
    return f"{location.scheme}://{location.netloc}", f"{location.path}?{location.query}"


def download(hub: Hub, **headers: str) -> Answer:
    base, path = link(hub)
    return ask(base, path, **headers)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    file = tmp_path / "tiny.gguf"
    file.write_bytes(DATA)
    with Hub() as hub:
        hub.add(REPO, FILE, file)
        yield hub


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_resolve_redirects_to_another_origin_and_tells_size_and_hash(hub: Hub, method: str) -> None:
    answer = ask(hub.url, RESOLVE, method)
    assert answer.status == 302
    assert answer.headers["X-Linked-Size"] == str(len(DATA))
    assert answer.headers["X-Linked-Etag"] == f'"{hashlib.sha256(DATA).hexdigest()}"'
    assert re.fullmatch("[0-9a-f]{40}", answer.headers["X-Repo-Commit"])
    assert answer.headers["Accept-Ranges"] == "bytes"
    assert answer.headers["Location"].startswith(hub.cdn_url)
    assert urlsplit(hub.cdn_url).port != urlsplit(hub.url).port


def test_the_cdn_sends_the_file_and_the_same_under_the_commit(hub: Hub) -> None:
    whole = download(hub)
    assert (whole.status, whole.body) == (200, DATA)
    commit = ask(hub.url, RESOLVE, "HEAD").headers["X-Repo-Commit"]
    base, path = link(hub, RESOLVE.replace("/main/", f"/{commit}/"))
    assert ask(base, path).body == DATA
    assert (hub.settled()[1].server, hub.settled()[1].bytes_sent) == ("cdn", len(DATA))


@pytest.mark.parametrize(
    ("wanted", "status", "content_range", "body"),
    [
        ("bytes=0-9", 206, "bytes 0-9/1024000", DATA[:10]),
        ("bytes=1023990-", 206, "bytes 1023990-1023999/1024000", DATA[-10:]),
        ("bytes=1023990-9999999", 206, "bytes 1023990-1023999/1024000", DATA[-10:]),
        ("bytes=-10", 206, "bytes 1023990-1023999/1024000", DATA[-10:]),
        ("bytes=1024000-", 416, "bytes */1024000", b"Requested Range Not Satisfiable"),
        ("bytes=5-2", 200, None, DATA),
        ("lines=1-2", 200, None, DATA),
    ],
)
def test_ranges(hub: Hub, wanted: str, status: int, content_range: str | None, body: bytes) -> None:
    answer = download(hub, Range=wanted)
    assert (answer.status, answer.headers["Content-Range"], answer.body) == (status, content_range, body)
    assert hub.settled()[-1].range == wanted


def test_a_range_is_only_heeded_while_the_file_is_the_same(hub: Hub) -> None:
    etag = download(hub, Range="bytes=0-0").headers["ETag"]
    assert download(hub, Range="bytes=5-9", if_range=etag).body == DATA[5:10]
    assert download(hub, Range="bytes=5-9", if_range='"another"').body == DATA


def test_plain_addresses_need_no_redirect(hub: Hub) -> None:
    answer = ask(hub.url, f"/plain/{REPO}/sub/tiny%20model.gguf", Range="bytes=7-8")
    assert (answer.status, answer.body) == (206, DATA[7:9])


def test_a_link_expires_and_cannot_be_forged(hub: Hub) -> None:
    base, path = link(hub)
    assert ask(base, path[:-1] + ("0" if path[-1] != "0" else "1")).status == 403
    assert ask(base, re.sub(r"Expires=\d+", "Expires=9999999999", path)).status == 403
    hub.link_seconds = -1
    base, path = link(hub)
    refused = ask(base, path)
    assert refused.status == 403
    assert b"expired" in refused.body


def test_a_token_that_reaches_the_cdn_is_refused_and_recorded(hub: Hub) -> None:
    base, path = link(hub, Authorization=f"Bearer {hub.token}")
    assert ask(base, path, Authorization=f"Bearer {hub.token}").status == 400
    assert [(r.server, r.had_authorization, r.status) for r in hub.settled()] == [
        ("hub", True, 302),
        ("cdn", True, 400),
    ]


def test_who_may_read_what(hub: Hub, tmp_path: Path) -> None:
    hub.add("acme/gated", "m.gguf", tmp_path / "tiny.gguf", gated=True)
    hub.add("acme/private", "m.gguf", tmp_path / "tiny.gguf", private=True)

    def answer(repo: str, token: str, path: str = "m.gguf", revision: str = "main") -> tuple[int, str | None]:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        got = ask(hub.url, f"/{repo}/resolve/{revision}/{path}", "HEAD", **headers)
        return got.status, got.headers["X-Error-Code"]

    assert answer("acme/gated", "") == (401, "GatedRepo")
    assert answer("acme/gated", hub.outsider_token) == (403, "GatedRepo")
    assert answer("acme/gated", hub.token) == (302, None)
    assert answer("acme/private", "") == (401, "RepoNotFound")
    assert answer("acme/private", hub.outsider_token) == (404, "RepoNotFound")
    assert answer("acme/private", hub.token) == (302, None)
    assert answer("acme/gated", "hf_expired") == (401, None)
    assert answer("acme/none", "") == (401, "RepoNotFound")
    assert answer(REPO, "", "none.gguf") == (404, "EntryNotFound")
    assert answer(REPO, "", FILE.replace(" ", "%20"), "v9") == (404, "RevisionNotFound")


def test_listings_have_the_hubs_shape(hub: Hub) -> None:
    sha256 = hashlib.sha256(DATA).hexdigest()
    (entry,) = json.loads(ask(hub.url, f"/api/models/{REPO}/tree/main?recursive=true").body)
    assert (entry["type"], entry["path"], entry["size"]) == ("file", FILE, len(DATA))
    assert entry["lfs"] == {"oid": sha256, "size": len(DATA), "pointerSize": 135}
    model = json.loads(ask(hub.url, f"/api/models/{REPO}/revision/main?blobs=true").body)
    assert model["sha"] == ask(hub.url, RESOLVE, "HEAD").headers["X-Repo-Commit"]
    assert model["siblings"][0]["lfs"]["sha256"] == sha256
    assert json.loads(ask(hub.url, f"/api/models/{REPO}").body) == model


def test_too_many_requests_twice_then_well(hub: Hub) -> None:
    hub.fault(KEY, on="hub", status=429, retry_after="1", times=2)
    answers = [ask(hub.url, RESOLVE) for _ in range(3)]
    assert [a.status for a in answers] == [429, 429, 302]
    assert answers[0].headers["Retry-After"] == "1"


def test_the_cdn_breaks_with_503_for_every_path_until_healed(hub: Hub) -> None:
    hub.fault("*", status=503, times=None)
    assert {download(hub).status for _ in range(3)} == {503}
    hub.heal()
    assert download(hub).status == 200


@pytest.mark.parametrize("offset", ["cut_at", "close_at"])
def test_a_transfer_dies_once_and_can_be_resumed(hub: Hub, offset: str) -> None:
    hub.fault(KEY, **{offset: 300_000})
    error = ConnectionResetError if offset == "cut_at" else http.client.IncompleteRead
    with pytest.raises(error):
        download(hub)
    assert hub.settled()[-1].bytes_sent == 300_000
    assert DATA[:300_000] + download(hub, Range="bytes=300000-").body == DATA


def test_a_fault_waits_for_the_transfer_that_meets_it(hub: Hub) -> None:
    hub.fault(KEY, close_at=300_000)
    assert download(hub, Range="bytes=0-299999").body == DATA[:300_000]
    with pytest.raises(http.client.IncompleteRead):
        download(hub, Range="bytes=299999-300001")


def test_a_transfer_that_always_dies_at_the_same_byte_never_passes_it(hub: Hub) -> None:
    hub.fault(KEY, close_at=300_000, times=None)
    for wanted, expected in (("bytes=0-", DATA[:300_000]), ("bytes=300000-", b"")):
        with pytest.raises(http.client.IncompleteRead) as caught:
            download(hub, Range=wanted)
        assert caught.value.partial == expected
    assert download(hub, Range="bytes=0-299999").body == DATA[:300_000]


def test_a_truncated_file_looks_complete_on_the_cdn_but_not_to_the_hub(hub: Hub) -> None:
    hub.fault(KEY, ends_at=1000, times=None)
    answer = download(hub)
    assert (answer.headers["Content-Length"], answer.body) == ("1000", DATA[:1000])
    assert ask(hub.url, RESOLVE, "HEAD").headers["X-Linked-Size"] == str(len(DATA))


def test_one_byte_is_corrupted_with_the_length_unchanged(hub: Hub) -> None:
    hub.fault(KEY, corrupt_at=777_777)
    body = download(hub).body
    assert [i for i, (a, b) in enumerate(zip(body, DATA, strict=True)) if a != b] == [777_777]
    assert download(hub).body == DATA


def test_a_slow_transfer_takes_its_time(hub: Hub) -> None:
    hub.fault(KEY, bytes_per_second=200_000)
    started = time.monotonic()
    assert len(download(hub, Range="bytes=0-99999").body) == 100_000
    assert time.monotonic() - started > 0.4


def test_stopping_does_not_wait_for_a_slow_transfer(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(DATA)
    with ThreadPoolExecutor(1) as pool:
        with Hub() as hub:
            hub.add(REPO, FILE, tmp_path / "f")
            hub.fault(KEY, bytes_per_second=1000)
            transfer = pool.submit(download, hub)
            while len(hub.requests) < 2:
                time.sleep(0.01)
            started = time.monotonic()
        assert time.monotonic() - started < 30  # the transfer would take 1000 s
        with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
            transfer.result()


def test_a_large_sparse_file_takes_a_second_of_one_core_for_200_megabytes_at_most(tmp_path: Path) -> None:
    size = 256 << 20
    with (tmp_path / "large").open("wb") as stream:
        os.truncate(stream.fileno(), size)
    with Hub() as hub:
        hub.add(REPO, "large", tmp_path / "large")
        ask(hub.url, f"/plain/{REPO}/large", "HEAD")  # hashes the file, once
        began = time.process_time()  # the machine has other work too
        assert received_bytes(f"{hub.url}/plain/{REPO}/large") == size
        seconds = time.process_time() - began
    assert size / seconds > 200e6


def received_bytes(url: str) -> int:
    total, buffer = 0, bytearray(1 << 20)
    with urllib.request.urlopen(url, timeout=30) as response:
        while count := response.readinto(buffer):
            total += count
    return total


def test_one_connection_serves_many_requests(hub: Hub) -> None:
    parts = urlsplit(hub.url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    for method in ("HEAD", "GET", "HEAD"):
        connection.request(method, RESOLVE)
        response = connection.getresponse()
        response.read()
        assert (response.status, response.will_close) == (302, False)
    connection.close()


def test_the_command_serves_a_folder_and_stops_on_sigterm(tmp_path: Path) -> None:
    file = tmp_path / REPO / FILE
    file.parent.mkdir(parents=True)
    file.write_bytes(DATA)
    command = [sys.executable, "-m", "sandbox.hub", "--root", str(tmp_path)]
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            assert ask(url, RESOLVE, "HEAD").headers["X-Linked-Size"] == str(len(DATA))
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 0


def test_an_unknown_fault_is_refused(hub: Hub) -> None:
    with pytest.raises(TypeError, match="explode_at"):
        hub.fault(KEY, explode_at=1)


@pytest.mark.parametrize(
    ("header", "span"),
    [
        ("", None),
        ("bytes=-", None),
        ("bytes=0-0", (0, 1)),
        ("bytes=-200", (0, 100)),
        ("bytes=-0", (100, 100)),
    ],
)
def test_byte_range(header: str, span: tuple[int, int] | None) -> None:
    assert byte_range(header, 100) == span
