"""What llamafleet writes for nginx, by a real nginx: which files it gives to whom."""

import contextlib
import hashlib
import http.client
import json
import os
import random
import socket
import ssl
import subprocess
import time

import fetch
import pieces
import pytest
from fetch_spec import read_spec

from llamafleet.fleet import site_server
from llamafleet.fleet.site_server import SharedFile
from sandbox import programs
from tasks.lib.site_access import self_signed
from tasks.lib.templates import render

NGINX = programs.find("nginx")
needs_nginx = pytest.mark.skipif(not NGINX, reason="no nginx here: python -m sandbox.programs")
TOKEN = "T" * 42 + "-"
BODY = b"GGUF" + random.Random(3).randbytes(20 * 2**20)
SHA, LATER = hashlib.sha256(BODY).hexdigest(), "ab" * 32


def values(**changes):
    asked = {"address": "10.0.0.1", "port": 7627, "token": TOKEN, "allowed": ["10.0.0.2"],
             "files": [SharedFile(SHA, "/var/lib/llamafleet/models/x-0123/x.gguf")]}  # fmt: skip
    return site_server.values(**{**asked, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"address": "example.org"},
        {"allowed": ["all"]},
        {"token": "short"},
        {"token": 'a"; } ' + "a" * 40},
        {"files": [SharedFile(SHA, "/srv/a b.gguf")]},
        {"files": [SharedFile(SHA, "/srv/$document_root/x.gguf")]},
        {"files": [SharedFile(SHA, "/srv/../etc/shadow")]},
        {"files": [SharedFile("x", "/srv/x.gguf")]},
    ],
)
def test_what_nginx_would_read_otherwise_is_refused(changes):
    with pytest.raises(ValueError, match=r"."):
        values(**changes)


def test_a_file_of_two_instances_is_named_once_and_ipv6_has_brackets():
    twice = [SharedFile(SHA, "/a/x.gguf"), SharedFile(SHA, "/b/x.gguf")]
    text = render(site_server.TEMPLATE, values(files=twice, address="fd00::1", allowed=["fd00:0::2", "10.0.0.2"]))
    assert text.count(f"location = /{SHA} {{") == 1
    assert "listen [fd00::1]:7627 ssl;" in text
    assert [line.split()[1] for line in text.splitlines() if " allow " in line] == ["10.0.0.2;", "fd00::2;"]


class Site:
    """A host with the file, served by nginx at a loopback address."""

    def __init__(self, folder, allowed):
        self.folder, (self.certificate, key) = folder, self_signed(["127.0.0.1"])
        (folder / "share").mkdir()
        (folder / "x.gguf").write_bytes(BODY)
        (folder / "share" / f"{SHA}.pieces").write_text(pieces.text(*pieces_of(folder / "x.gguf")))
        for name, text in (("certificate", self.certificate), ("key", key)):
            (folder / name).write_text(text)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        files = [SharedFile(SHA, f"{folder}/x.gguf"), SharedFile(LATER, f"{folder}/later.gguf")]
        text = render(site_server.TEMPLATE, values(address="127.0.0.1", port=self.port, allowed=allowed, files=files))
        for there, here in ((pieces.LISTS, "share"), (pieces.CREDENTIALS, "."), (pieces.SERVER_RUN, ".")):
            text = text.replace(f"{there}/", f"{folder}/{here}/")
        (folder / "nginx.conf").write_text(text)

    def ask(self, path, token=TOKEN, method="GET", **headers):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=self.certificate)
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=60, context=context)
        with contextlib.closing(connection):
            connection.request(method, path, headers={"Authorization": f"Bearer {token}", **headers})
            answer = connection.getresponse()
            return answer.status, answer.read()


def pieces_of(path):
    digest, sums = pieces.of(str(path))
    return digest, path.stat().st_size, sums


@contextlib.contextmanager
def nginx(site):
    user = ["-g", "user root;"] if os.geteuid() == 0 else []  # the test's folder is its owner's alone
    log = (site.folder / "log").open("w")
    process = subprocess.Popen([NGINX, "-c", site.folder / "nginx.conf", *user], stdout=log, stderr=log)
    try:
        end = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", site.port), 1):
                break
            assert process.poll() is None and time.monotonic() < end, (site.folder / "log").read_text()
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait(20)
        log.close()


@pytest.fixture
def site(tmp_path):
    made = Site(tmp_path, ["127.0.0.1"])
    with nginx(made):
        yield made


@needs_nginx
def test_the_named_files_alone_are_given_to_who_has_the_token(site):
    assert site.ask(f"/{SHA}", Range="bytes=4-103") == (206, BODY[4:104])
    assert pieces.read(site.ask(f"/{SHA}.pieces")[1], SHA, len(BODY)) == pieces_of(site.folder / "x.gguf")[2]
    assert [site.ask(f"/{SHA}", token)[0] for token in ("", TOKEN.lower(), TOKEN[:-1])] == [401] * 3
    outside = ["/", "/x.gguf", f"/{SHA}/", f"/{SHA}/../key", "/key", "/nginx.conf", f"/{SHA}.pieces/../nginx.conf"]
    assert [status for status, _ in map(site.ask, outside)] == [404] * len(outside)
    assert [site.ask(f"/{SHA}", method=method)[0] for method in ("PUT", "POST", "DELETE", "HEAD")] == [405] * 4


@needs_nginx
def test_a_file_that_comes_later_is_given_without_a_reload(site):
    assert site.ask(f"/{LATER}")[0] == 404
    (site.folder / "later.gguf").write_bytes(b"GGUF")
    assert site.ask(f"/{LATER}") == (200, b"GGUF")


@needs_nginx
def test_a_host_that_is_not_of_the_site_gets_nothing(tmp_path):
    site = Site(tmp_path, ["127.0.0.2"])
    with nginx(site):
        assert site.ask(f"/{SHA}")[0] == 403


@needs_nginx
def test_the_download_program_takes_the_file_from_it(site, tmp_path):
    access = tmp_path / "access"
    access.touch(mode=0o600)
    access.write_text(json.dumps({"token": TOKEN, "certificate": site.certificate}))
    host = {"name": "h1", "address": "127.0.0.1", "port": site.port}
    spec = {"directory": str(tmp_path / "models"), "reserve_bytes": 0,
            "files": [{"name": "x.gguf", "urls": [], "size_bytes": len(BODY), "sha256": SHA}],
            "peers": {"hosts": [host], "access": str(access), "seconds": 60}}  # fmt: skip
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    fetch.fetch(read_spec(str(tmp_path / "spec.json")))
    assert (tmp_path / "models/x.gguf").read_bytes() == BODY
