"""The download program against the Hub's stand-in and its faults, as its own process, as on a host.

Why a real process and a real curl: resumption, redirects and secrecy are curl's behaviour as much as ours.
"""

from __future__ import annotations

import contextlib
import email.message
import fcntl
import hashlib
import http.server
import json
import os
import random
import re
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import fetch
import fetch_answer
import fetch_spec
import network
import psutil
import pytest
from fetch_curl import Answer, read_answer
from fetch_spec import Failed
from hypothesis import given

from sandbox.hub import Hub
from tests import company, forked
from tests.mutations import FUZZ, broken
from tests.serving import Server, dripping, flood, raw, serving

PROGRAM = Path(__file__).parents[2] / "llamafleet" / "remote" / "fetch.py"
TOKEN = "hf_thisIsASecretThatNobodyMaySee"
BODY = b"GGUF" + random.Random(7).randbytes(3 * 2**20)
SHA = hashlib.sha256(BODY).hexdigest()
KEY = "org/model/x.gguf"


class Store(Hub):
    """The stand-in with files given as bytes, and a plain web server's address for mirrors."""

    folder: Path

    def publish(self, name: str, body: bytes, repo: str = "org/model", **how) -> str:
        path = self.folder / repo / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
        self.add(repo, name, path, **how)
        return f"{self.url}/{repo}/resolve/main/{name}"

    def mirror(self, name: str, body: bytes) -> str:
        self.publish(name, body, repo="mirror/model")
        return f"{self.url}/plain/mirror/model/{name}"

    def seen(self, server: str = "cdn", method: str = "GET") -> list:
        return [r for r in self.settled() if r.server == server and r.method == method]


@pytest.fixture
def hub(tmp_path):
    with Store(token=TOKEN) as store:
        store.folder = tmp_path / "published"
        yield store


@pytest.fixture
def url(hub):
    return hub.publish("x.gguf", BODY)


@pytest.fixture
def plain_server():
    """A server without ranges or HEAD: always 200 with everything, or, with `cut_at`, up to that byte."""

    class Handler(http.server.BaseHTTPRequestHandler):
        cut_at = None
        asked = 0

        def log_message(self, *_) -> None:
            pass

        def do_GET(self) -> None:
            Handler.asked += 1
            self.send_response(200)
            self.send_header("Content-Length", str(len(BODY)))
            self.end_headers()
            with contextlib.suppress(OSError):  # curl hangs up once it sees that the range is ignored
                self.wfile.write(BODY[: self.cut_at])

    with serving(Server(Handler)) as server:
        Handler.url = f"{server.url}/x.gguf"
        yield Handler


@pytest.fixture
def processes():
    started = []
    yield started
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()


class Job:
    """A spec in a folder, to be run as often as a test wants."""

    def __init__(self, folder: Path, processes: list) -> None:
        self.folder, self.processes = folder, processes
        self.models = folder / "models" / "m-0123"
        self.log = folder / "log"
        self.spec = {
            "directory": str(self.models), "owner": None, "curl_config": None, "reserve_bytes": 0,
            "token_origin": "https://huggingface.co", "attempts": 3, "retry_delay_s": 0.02, "files": [],
        }  # fmt: skip

    def want(self, *urls: str, name: str = "x.gguf", size: int | None = len(BODY), sha: str | None = SHA) -> Job:
        entry = {"name": name, "urls": list(urls), "size_bytes": size, "sha256": sha}
        self.spec["files"].append(entry if sha else {**entry, "unverified": True})
        return self

    def token(self, origin: str, token: str = TOKEN) -> None:
        config = self.folder / "token.curl"
        config.touch(mode=0o600)
        config.write_text(f'header = "Authorization: Bearer {token}"\n')
        self.spec |= {"curl_config": str(config), "token_origin": origin}

    def start(self) -> subprocess.Popen:
        with self.log.open("ab") as log:
            argv = [sys.executable, *self.words()]
            process = subprocess.Popen(argv, stdout=log, stderr=log, env=self.environment())
        self.processes.append(process)
        return process

    def run(self) -> int:
        with self.log.open("ab") as log:
            return forked.programs().run(self.words(), env=self.environment(), log=log, timeout=60).returncode

    def words(self) -> list[str]:
        path = self.folder / "spec.json"
        path.write_text(json.dumps(self.spec))
        return [str(PROGRAM), str(path)]

    def environment(self) -> dict[str, str]:
        return {**os.environ, "no_proxy": "127.0.0.1"}

    def text(self) -> str:
        return self.log.read_text()

    def last(self) -> str:
        return self.text().splitlines()[-1]

    def file(self, name: str = "x.gguf") -> Path:
        return self.models / name

    def partial(self, name: str = "x.gguf") -> Path:
        return self.models / f".{name}.partial"

    def size(self) -> int:
        return self.partial().stat().st_size if self.partial().exists() else 0

    def visible(self) -> list[str]:
        return sorted(p.name for p in self.models.iterdir() if not p.name.startswith(".") and p.suffix == ".gguf")


@pytest.fixture
def job(tmp_path, processes):
    return Job(tmp_path, processes)


def wait_until(happened, seconds: float = 15.0) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_fresh(hub, url, job):
    assert job.want(url).run() == 0, job.text()
    assert job.file().read_bytes() == BODY
    assert job.file().stat().st_mode & 0o777 == 0o644 and job.models.stat().st_mode & 0o777 == 0o755
    noted = json.loads((job.models / "x.gguf.verified").read_text())
    assert noted == {"size_bytes": len(BODY), "sha256": SHA, "mtime_ns": job.file().stat().st_mtime_ns}
    assert not job.partial().exists()
    assert re.search(r"^progress \d+ % of \d+ bytes, \d+ MiB/s, .* left \(x\.gguf\)$", job.text(), re.M)
    assert job.last().startswith("done 1 files")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_files_belong_to_the_owner(url, job):
    job.spec["owner"] = "nobody"
    assert job.want(url).run() == 0, job.text()
    assert {p.owner() for p in (job.models, job.file(), job.models / "x.gguf.verified")} == {"nobody"}


def test_second_run_asks_nothing(hub, url, job):
    assert job.want(url, size=None, sha=None).run() == 0, job.text()
    before, inode = len(hub.settled()), job.file().stat().st_ino
    assert job.run() == 0
    assert len(hub.settled()) == before and job.file().stat().st_ino == inode
    assert job.text().count("verifying") == 1, "the second run hashed again"


def test_resume_after_sigkill(hub, url, job):
    hub.fault(KEY, bytes_per_second=2 * 2**20)
    process = job.want(url).start()
    wait_until(lambda: job.size() > 2**19)
    assert job.visible() == []
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.3)
    kept = job.size()
    time.sleep(0.3)
    assert job.size() == kept, "curl outlived its parent and went on writing"
    assert job.run() == 0, job.text()
    assert job.file().read_bytes() == BODY
    assert [r.range for r in hub.seen()] == ["", f"bytes={kept}-"]
    assert hub.seen()[-1].bytes_sent == len(BODY) - kept, "bytes came twice"


def test_closed_connections_continue_to_the_byte(hub, url, job):
    for offset in (10**6, 2 * 10**6, 25 * 10**5):
        hub.fault(KEY, close_at=offset)
    assert job.want(url).run() == 0, job.text()
    assert job.file().read_bytes() == BODY
    assert [r.range for r in hub.seen()] == ["", "bytes=1000000-", "bytes=2000000-", "bytes=2500000-"]
    assert sum(r.bytes_sent for r in hub.seen()) == len(BODY)


def test_reset_connection_continues(hub, url, job):
    hub.fault(KEY, cut_at=2 * 10**6, bytes_per_second=10**7)
    assert job.want(url).run() == 0, job.text()
    assert job.file().read_bytes() == BODY and hub.seen()[-1].range.startswith("bytes=")


def test_attempts_with_progress_do_not_count(hub, url, job):
    for n in range(1, 9):
        hub.fault(KEY, close_at=n * 10**5)
    assert job.want(url).run() == 0, job.text()
    assert len(hub.seen()) == 9


def test_attempts_without_progress_are_bounded(hub, url, job):
    hub.fault(KEY, close_at=10**5, times=None)
    assert job.want(url).run() == 7
    assert len(hub.seen()) == 4 and job.size() == 10**5
    assert job.last().startswith("error: ") and "3 attempts without progress at byte 100000" in job.last()


def test_a_name_that_cannot_be_resolved_is_given_up_soon_and_leaves_no_file(job):
    job.spec["attempts"] = 10
    assert job.want("http://hub.invalid/x.gguf").run() == 7
    assert "Could not resolve host: hub.invalid" in job.last() and "check this host's DNS" in job.last()
    assert "gave up after 3 attempts" in job.last() and job.text().count("retry in") == 2
    assert not job.partial().exists()


def test_a_name_that_is_lost_in_mid_download_gets_every_attempt(hub, url, job):
    hub.fault(KEY, close_at=10**5, times=None)
    assert job.want(url, "http://hub.invalid/x.gguf").run() == 7
    job.spec["attempts"] = 5
    hub.heal()
    hub.fault(KEY, close_at=2 * 10**5, times=None)
    assert job.run() == 7
    assert "Could not resolve host: hub.invalid" in job.last() and job.last().count("gave up after 5 attempts") == 2
    assert job.size() == 2 * 10**5


def test_restarting_server_that_cuts_is_bounded(plain_server, job):
    plain_server.cut_at = 10**5
    assert job.want(plain_server.url).run() == 7
    assert plain_server.asked < 10


def test_stalled_server(hub, url, job):
    hub.fault(KEY, bytes_per_second=2**14)
    job.spec |= {"stall_bytes_per_s": 10**6, "stall_s": 1}
    assert job.want(url).run() == 0, job.text()
    assert "retry in" in job.text() and len(hub.seen()) == 2


def test_truncated_at_the_source(hub, url, job):
    hub.fault(KEY, ends_at=len(BODY) - 1000, times=None)
    assert job.want(url).run() == 4
    assert f"expected {len(BODY)} bytes, found {len(BODY) - 1000}" in job.last()
    assert job.visible() == [] and not job.partial().exists()


def test_corrupted_then_mirror(hub, url, job):
    hub.fault(KEY, corrupt_at=1000, times=None)
    assert job.want(url, hub.mirror("x.gguf", BODY)).run() == 0, job.text()
    assert job.file().read_bytes() == BODY and f"expected sha256 {SHA}" in job.text()
    assert hub.seen("hub")[-1].range == "", "the mirror was asked to continue bad bytes"


def test_wrong_sha256(hub, url, job):
    assert job.want(url, sha="0" * 64).run() == 4
    assert f"expected sha256 {'0' * 64}, found {SHA}" in job.last()
    assert job.visible() == [] and not job.partial().exists()
    assert len(hub.seen()) == 1


def test_bad_partial_of_an_earlier_run_is_healed(hub, url, job):
    job.models.mkdir(parents=True)
    job.partial().write_bytes(b"GGUF" + bytes(1000))  # what a power cut can leave: right length, no data
    assert job.want(url).run() == 0, job.text()
    assert job.file().read_bytes() == BODY
    assert [r.range for r in hub.seen()] == ["bytes=1004-", ""]


def test_partial_larger_than_expected(url, job):
    job.models.mkdir(parents=True)
    job.partial().write_bytes(BODY + b"more")
    assert job.want(url).run() == 0, job.text()
    assert job.file().read_bytes() == BODY


def test_complete_partial_needs_no_request(hub, url, job):
    job.models.mkdir(parents=True)
    job.partial().write_bytes(BODY)
    assert job.want(url).run() == 0, job.text()
    assert hub.settled() == [] and job.file().read_bytes() == BODY


def test_partial_past_the_end_of_the_source(hub, url, job):
    hub.publish("x.gguf", BODY[:5000])  # replaced by a shorter file: 416
    job.models.mkdir(parents=True)
    job.partial().write_bytes(BODY[:6000])
    assert job.want(url, size=None, sha=hashlib.sha256(BODY[:5000]).hexdigest()).run() == 0, job.text()
    assert job.file().read_bytes() == BODY[:5000]


def test_server_ignores_range(plain_server, job):
    job.models.mkdir(parents=True)
    job.partial().write_bytes(BODY[:5000])
    assert job.want(plain_server.url).run() == 0, job.text()
    assert job.file().read_bytes() == BODY and "does not continue at byte 5000" in job.text()


def test_server_sends_too_much(hub, job):
    assert job.want(hub.publish("x.gguf", BODY + bytes(10**6))).run() == 4
    assert "sends more than the expected" in job.last() and job.visible() == []


def test_gated_without_token(hub, job):
    assert job.want(hub.publish("x.gguf", BODY, gated=True)).run() == 5
    for part in ("401", "restricted", f"{hub.url}/org/model,", "accept the licence", "hub_token_file"):
        assert part in job.last()
    assert len(hub.settled()) == 1, "a refusal was repeated"


def test_gated_with_a_token_without_access(hub, job):
    job.token(hub.url, hub.outsider_token)
    assert job.want(hub.publish("x.gguf", BODY, gated=True)).run() == 5
    assert "403" in job.last() and "the token is not enough" in job.last()
    assert hub.outsider_token not in job.text()


def test_not_found(hub, url, job):
    assert job.want(url.replace("x.gguf", "y.gguf")).run() == 6
    assert job.last().startswith(f"error: {url.replace('x.gguf', 'y.gguf')} answered 404 (Entry not found)")


def test_not_found_then_mirror(hub, url, job):
    mirror = hub.mirror("x.gguf", BODY)
    assert job.want(url.replace("x.gguf", "y.gguf"), mirror).run() == 0, job.text()


def test_too_many_requests_waits_as_told(hub, url, job):
    hub.fault(KEY, on="hub", status=429, retry_after="1")
    hub.fault(KEY, on="hub", status=503)
    began = time.monotonic()
    assert job.want(url).run() == 0, job.text()
    assert time.monotonic() - began > 1.0 and "retry in 1.0 s" in job.text() and "answered 503" in job.text()


def test_no_space_counts_all_shards(hub, url, job):
    free = os.statvfs(job.folder).f_bavail * os.statvfs(job.folder).f_frsize
    job.spec["reserve_bytes"] = free * 2
    job.want(url).want(hub.publish("y.gguf", BODY), name="y.gguf")
    assert job.run() == 3
    assert f"{2 * len(BODY)} bytes are needed" in job.last() and "are missing" in job.last()
    assert str(job.models) in job.last() and hub.settled() == []


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], check=False)
    if mounted.returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    yield place
    subprocess.run(["umount", place], check=True)


def test_disk_fills_up_under_way(plain_server, job, small_disk):
    job.models = small_disk / "m"
    job.spec["directory"] = str(job.models)
    assert job.want(plain_server.url, plain_server.url, size=None).run() == 3  # no size told: no check before
    assert "No space left on device" in job.last() and str(job.models) in job.last()
    assert plain_server.asked == 1 and job.visible() == [], "a mirror does not help against a full disk"


def test_page_instead_of_model(hub, job):
    page = hub.publish("x.gguf", b"<!DOCTYPE html><title>Sign in</title>" + bytes(5000))
    assert job.want(page, size=None, sha=None).run() == 8
    assert "not a GGUF file: it begins with b'<!DOCTYPE" in job.last() and not job.partial().exists()


def test_split_model(hub, job):
    bodies = {f"m-0000{n}-of-00003.gguf": BODY + bytes([n]) for n in (1, 2, 3)}
    for name, body in bodies.items():
        digest = hashlib.sha256(body).hexdigest()
        job.want(hub.publish(name, body), name=name, size=len(body), sha=digest)
    assert job.run() == 0, job.text()
    assert {name: job.file(name).read_bytes() for name in bodies} == bodies
    assert f"of {3 * len(BODY) + 3} bytes" in job.text() and job.last().startswith("done 3 files")


def test_complete_file_without_record_is_adopted(hub, url, job):
    job.models.mkdir(parents=True)
    job.file().write_bytes(BODY)
    assert job.want(url).run() == 0
    assert hub.settled() == [] and (job.models / "x.gguf.verified").exists()


def test_wrong_file_without_record_is_set_aside(hub, url, job):
    job.models.mkdir(parents=True)
    job.file().write_bytes(b"GGUF and nothing more")
    assert job.want(url).run() == 0, job.text()
    assert job.file().read_bytes() == BODY
    assert (job.models / ".x.gguf.rejected").read_bytes() == b"GGUF and nothing more"
    assert re.search(
        r"^note: .* set aside as \S*/\.x\.gguf\.rejected \(\d+ bytes\), removed after 30 days", job.text(), re.M
    )


def test_changed_file_is_noticed(hub, url, job):
    job.want(url).run()
    job.file().write_bytes(BODY[:-1] + b"!")
    assert job.run() == 0, job.text()
    assert job.file().read_bytes() == BODY


def test_redirect_shows_the_cdn_no_token(hub, job):
    hub.fault(KEY, bytes_per_second=2 * 2**20)  # the CDN is the same host, another port
    job.token(hub.url)
    gated = hub.publish("x.gguf", BODY, gated=True)
    process = job.want(gated, size=None, sha=None).start()
    wait_until(lambda: job.size() > 2**18)
    ours = psutil.Process(process.pid)  # not every process: what else runs on this machine is none of ours
    seen = [line for one in [ours, *ours.children(recursive=True)] for line in arguments_and_environment(one.pid)]
    assert any(line.startswith(b"curl\0") for line in seen), "looked at the wrong moment"
    assert not any(TOKEN.encode() in line or b"Signature=" in line for line in seen)
    assert process.wait(30) == 0, job.text()
    assert job.file().read_bytes() == BODY
    assert all(r.had_authorization for r in hub.settled() if r.server == "hub")
    assert hub.seen() and not any(r.had_authorization for r in hub.settled() if r.server == "cdn")
    assert TOKEN not in job.text() and "Signature" not in job.text()
    assert "no sha256 is known" not in job.text(), "the Hub's own checksum was not taken"


def arguments_and_environment(pid: int) -> list[bytes]:
    try:
        return [Path(f"/proc/{pid}/{name}").read_bytes() for name in ("cmdline", "environ")]
    except OSError:
        return []  # ended meanwhile


@pytest.mark.parametrize("location", ["http://[::1/x.gguf", "http://127.0.0.1:99999/x.gguf", "//[/x.gguf"])
def test_a_hostile_redirect_is_an_error_and_no_traceback(job, redirecting, location):
    redirecting.location = location
    job.token(redirecting.url.rsplit("/", 1)[0])  # with a token redirects are read by us, not by curl
    assert job.want(redirecting.url).run() == 7, job.text()
    assert job.last().startswith("error: ") and "is not a safe address; not followed" in job.last()
    assert "Traceback" not in job.text()


@pytest.fixture
def redirecting():
    """A server that sends everybody to `location`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        location = ""

        def log_message(self, *_) -> None:
            pass

        def do_HEAD(self) -> None:
            self.send_response(302)
            self.send_header("Location", Handler.location)
            self.end_headers()

    with serving(Server(Handler)) as server:
        Handler.url = f"{server.url}/x.gguf"
        yield Handler


def test_token_is_not_shown_to_a_mirror(hub, url, job, tmp_path):
    with Store() as other:
        other.folder = tmp_path / "elsewhere"
        job.token(hub.url)
        job.want(url.replace("x.gguf", "y.gguf"), other.mirror("x.gguf", BODY))
        assert job.run() == 0, job.text()
        assert other.settled() and not any(r.had_authorization for r in other.settled())


@pytest.mark.parametrize("with_token", [True, False])
def test_expired_signature_is_renewed(hub, url, job, with_token):
    hub.fault(KEY, close_at=10**6)
    hub.link_seconds = 1.5
    job.spec["retry_delay_s"] = 2.0  # by then the first address has expired
    if with_token:
        job.token(hub.url)
    assert job.want(url).run() == 0, job.text()
    assert [r.range for r in hub.seen()] == ["", "bytes=1000000-"]
    assert len({r.path for r in hub.seen()}) == 2, "the old signature was used again"


def test_storage_that_always_refuses_is_given_up(hub, url, job):
    hub.link_seconds = -1
    assert job.want(url).run() == 5
    assert "3 attempts without progress" in job.last() and "Signature" not in job.text()


def test_nobody_listens(job):
    assert job.want("http://127.0.0.1:9/x.gguf").run() == 7
    assert "run again to continue" in job.last()


def test_an_address_that_curl_cannot_read_is_not_repeated(job):
    assert job.want("http://a%20b/x.gguf").run() == 7
    assert "retry in" not in job.text() and "http://a%20b/x.gguf" in job.last()


def test_second_download_waits_and_names_the_first(hub, url, job):
    job.models.mkdir(parents=True)
    with (job.models / ".fetch.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        held.write(f"{os.getpid()}\n")
        held.flush()
        process = job.want(url).start()
        wait_until(lambda: f"another download (pid {os.getpid()}) holds" in job.text())
        assert hub.settled() == []
    assert process.wait(30) == 0, job.text()


def test_terminated_says_so_and_leaves_no_curl(hub, url, job):
    hub.fault(KEY, bytes_per_second=2**18)
    process = job.want(url, hub.mirror("x.gguf", BODY)).start()  # a mirror: stopping is no failed address
    wait_until(lambda: job.size() > 0)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.terminate()
    assert process.wait(10) == 143 and children
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    assert job.last().startswith("error: stopped by signal 15") and job.partial().exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"directory": "models"}, "directory"),
        ({"filez": []}, "filez"),
        ({"files": []}, "files"),
        ({"files": [{"name": "../x.gguf", "urls": ["https://h/x"]}]}, "files[0].name"),
        ({"files": [{"name": "-x.gguf", "urls": ["https://h/x"]}]}, "files[0].name"),
        ({"files": [{"name": "x.gguf", "urls": ["file:etc/passwd"]}]}, "files[0].urls"),
        ({"files": [{"name": "x.gguf", "urls": ["file:///etc/passwd"]}]}, "files[0].sha256"),
        ({"files": [{"name": "x.gguf", "urls": ['https://h/"\nurl = "']}]}, "files[0].urls"),
        ({"files": [{"name": "x.gguf", "urls": ["http://[::1/x"]}]}, "files[0].urls"),
        ({"files": [{"name": "x.gguf", "urls": ["https://h:99999/x"]}]}, "files[0].urls"),
        ({"token_origin": "https://h:99999"}, "token_origin"),
        ({"token_origin": "https://[::1"}, "token_origin"),
        ({"files": [{"name": "x.gguf", "urls": ["https://h/x"], "sha256": "12"}]}, "files[0].sha256"),
        ({"owner": "nobody-of-that-name"}, "owner"),
        ({"curl_config": "/nonexistent"}, "curl_config"),
    ],
)
def test_bad_spec_names_the_key(job, change, named):
    job.want("https://h.invalid/x.gguf")
    job.spec |= change
    assert job.run() == 2
    assert job.last().startswith("error: spec") and named in job.last() and not job.models.exists()


def test_token_file_open_to_others_is_refused(hub, url, job):
    job.token(hub.url)
    Path(job.spec["curl_config"]).chmod(0o644)
    assert job.want(url).run() == 2
    assert "0600" in job.last() and TOKEN not in job.text()


def test_a_token_goes_over_https_or_to_this_machine(job):
    for origin in ("http://hub.example", "http://10.0.0.7:80", "http://127.0.0.1.example", "http://localhost.example"):
        job.spec["files"] = []
        job.token(origin)
        assert job.want("https://h.invalid/x.gguf").run() == 2
        assert "token_origin should be an https address" in job.last() and origin in job.last()
    assert TOKEN not in job.text()


def test_a_token_may_come_by_standard_input(hub, job):
    job.token(hub.url)
    with open(job.spec["curl_config"]) as secret:
        job.spec["curl_config"] = "/dev/stdin"
        (job.folder / "spec.json").write_text(json.dumps(job.want(hub.publish("x.gguf", BODY, gated=True)).spec))
        done = subprocess.run([sys.executable, str(PROGRAM), str(job.folder / "spec.json")], stdin=secret,
                              capture_output=True, text=True, env={**os.environ, "no_proxy": "127.0.0.1"})  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert job.file().read_bytes() == BODY and TOKEN not in done.stdout


# --- checksums -------------------------------------------------------------------------------------


def test_without_a_sum_nothing_is_asked(hub, url, job):
    job.want(url)
    del job.spec["files"][0]["sha256"]
    assert job.run() == 2
    assert "files[0].sha256 should be 64 hex digits; or say that the file is `unverified`" in job.last()
    job.spec["files"][0] |= {"sha256": None, "unverified": "yes"}
    assert job.run() == 2
    assert hub.settled() == [] and not job.models.exists()


def test_an_unverified_file_that_changed_on_the_host_is_not_taken_for_the_model(plain_server, job):
    assert job.want(plain_server.url, sha=None).run() == 0, job.text()
    assert "note: no sha256 is known for x.gguf, as the settings allow" in job.text()
    job.file().write_bytes(BODY[:-1] + b"!")
    assert job.run() == 0, job.text()
    assert job.file().read_bytes() == BODY and (job.models / ".x.gguf.rejected").exists()


# --- hostile servers -------------------------------------------------------------------------------


@pytest.fixture
def served():
    running = []

    def start(script):
        running.append(serving(raw(script)))
        return running[-1].__enter__()

    yield start
    for server in running:
        server.__exit__(None, None, None)


SENDS = b"HTTP/1.1 200 OK\r\nContent-Length: 3145732\r\n\r\n"


def test_a_byte_now_and_then_is_no_progress(served, job):
    """Every connection ends as stalled, with some new bytes: that does not go on for ever."""

    def script(lines):
        start = re.search(r"Range: bytes=(\d+)-", lines)
        yield f"HTTP/1.1 206 P\r\nContent-Range: bytes {start[1]}-9/9\r\n\r\n".encode() if start else SENDS + b"GGUF"
        yield from dripping()(lines)

    server = served(script)
    job.spec |= {"stall_bytes_per_s": 1000, "stall_s": 1}
    assert job.want(f"{server.url}/x.gguf").run() == 7
    assert "gave up after 3 attempts without progress" in job.last() and 4 < job.size() < 1000


def test_a_download_has_an_end_in_time(hub, url, job):
    hub.fault(KEY, bytes_per_second=2**17, times=None)
    job.spec["seconds"] = 1.0
    began = time.monotonic()
    assert job.want(url).run() == 7
    assert time.monotonic() - began < 30
    assert "the download took longer than 1 s" in job.last() and job.size() > 0
    job.spec["seconds"] = 600
    hub.heal()
    assert job.run() == 0, job.text()


@pytest.mark.parametrize("with_token", [True, False], ids=["asked", "downloaded"])
@pytest.mark.parametrize("block", [b"X-Fill: " + b"a" * 6000 + b"\r\n", b"A: b\r\n" * 1000], ids=["long", "many"])
def test_headers_without_end_are_given_up(served, job, with_token, block):
    server = served(flood(b"HTTP/1.1 200 OK\r\n", block))
    if with_token:
        job.token(server.url)
    began = time.monotonic()
    assert job.want(f"{server.url}/x.gguf").run() == 7
    assert time.monotonic() - began < 60
    assert f"{server.url}/x.gguf" in job.last() and "header" in job.last().lower()
    assert len(server.asked) == 1, "it was asked for again"


ODD = [
    *("Content-Length: \u00b2", f"Content-Length: {'9' * 5000}", "Content-Length: -1", f"X-Linked-Size: {'9' * 400}"),
    *(
        "X-Linked-Size: \u00b3",
        f"X-Linked-ETag: {'a' * 9000}",
        "Location: http://[::1",
        "Content-Range: bytes */\u00b2",
    ),
]


@pytest.mark.parametrize("status", [200, 206, 302, 416, 429, 503], ids=str)
def test_headers_of_any_form_are_an_error_or_none_of_our_business(served, job, status):
    """In this process: an exception other than Failed would be a traceback on a host."""
    odd = iter([*ODD, f"Retry-After: {'9' * 5000}" if status < 429 else "Retry-After: 0"])
    lines = []
    server = served(lambda _: iter([f"HTTP/1.1 {status} X\r\n{lines[-1]}\r\n\r\n".encode("latin-1"), b"GGUF"]))
    job.token(server.url)  # then redirects and headers are read by us
    job.want(f"{server.url}/x.gguf", size=None, sha=None).spec["attempts"] = 1
    (job.folder / "spec.json").write_text(json.dumps(job.spec))
    for line in odd:
        lines.append(line)
        with contextlib.suppress(Failed):
            fetch.fetch(fetch_spec.read_spec(str(job.folder / "spec.json")))
        if job.models.exists():
            shutil.rmtree(job.models)
    assert len(server.asked) >= len(lines) == len(ODD) + 1


@pytest.mark.parametrize(
    ("value", "expected"),
    [("7", 7.0), ("99999", 300.0), ("\u00b2", None), ("9" * 5000, None), ("-5", None), ("", None), ("soon", None),
     ("Mon, 99 Foo 9999 99:99:99 GMT", None), ("Sun, 06 Nov 1994 08:49:37 GMT", 0.0),
     ("Sun, 06 Nov 0001 08:49:37 +9999", None)],
    ids=lambda value: repr(value)[:12],
)  # fmt: skip
def test_a_time_to_wait_of_any_form(value, expected):
    headers = email.message.Message()
    headers["Retry-After"] = value
    assert fetch_answer.retry_after_s(Answer(0, "", 503, headers)) in (expected, 0.0)
    if expected:
        assert fetch_answer.retry_after_s(Answer(0, "", 503, headers)) == expected


def test_the_first_error_is_said_not_the_last():
    with tempfile.TemporaryFile() as headers, tempfile.TemporaryFile() as errors:
        errors.write(b"Warning: some option\ncurl: (60) SSL certificate problem: expired\nMore details here: https://curl.se/"
                     b"docs/sslcerts.html\n\ncurl failed to verify the legitimacy of the server?sig=SECRET\n")  # fmt: skip
        answer = read_answer(60, headers, errors)
    assert answer.curl_text == "curl: (60) SSL certificate problem: expired"
    with tempfile.TemporaryFile() as headers, tempfile.TemporaryFile() as errors:
        errors.write(b"curl: (6) Could not resolve host: a\ncurl: (23) Failed writing body\n")
        assert read_answer(23, headers, errors).curl_text == "curl: (6) Could not resolve host: a"


def test_a_certificate_that_nobody_trusts_is_said_first(job, tls_server):
    assert job.want(f"{tls_server}/x.gguf").run() == 7
    assert "SSL certificate problem" in job.last() and "sslcerts.html" not in job.last()


@pytest.fixture
def tls_server(tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                    "-days", "2", "-subj", "/CN=127.0.0.1", "-keyout", key, "-out", certificate],
                   check=True, capture_output=True)  # fmt: skip
    server = Server()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    with serving(server):
        yield server.url.replace("http:", "https:")


def test_the_reserve_holds_where_no_size_was_told(served, job, small_disk):
    """Of the 1 MiB of the disk a quarter stays free, and the run says so."""
    server = served(flood(b"HTTP/1.1 200 OK\r\n\r\nGGUF", b"a" * 16384))
    job.models = small_disk / "m"
    job.spec |= {"directory": str(job.models), "reserve_bytes": 2**18}
    assert job.want(f"{server.url}/x.gguf", size=None).run() == 3
    assert "262144 bytes stay free" in job.last() and str(job.partial()) in job.last()
    left = os.statvfs(small_disk)
    assert 2**18 <= left.f_bavail * left.f_frsize < 2**18 + 2**17
    assert job.size() > 2**18


def test_the_reserve_holds_where_others_fill_the_disk(hub, job, small_disk):
    job.models = small_disk / "m"
    job.spec |= {"directory": str(job.models), "reserve_bytes": 2**17}
    body = BODY[: 2**19]
    hub.fault(KEY, bytes_per_second=2**18)
    process = job.want(hub.publish("x.gguf", body), size=len(body), sha=hashlib.sha256(body).hexdigest()).start()
    wait_until(lambda: job.size() > 2**16)
    (small_disk / "others").write_bytes(bytes(2**18 + 2**17))
    assert process.wait(30) == 3
    assert "131072 bytes stay free" in job.last() and job.visible() == []
    (small_disk / "others").unlink()
    assert job.run() == 0, job.text()


# --- specs -----------------------------------------------------------------------------------------

SPEC = {
    "directory": "/nonexistent/models/m", "owner": None, "curl_config": None, "reserve_bytes": 0, "attempts": 3,
    "token_origin": "https://huggingface.co", "retry_delay_s": 0.02, "stall_s": 1, "seconds": 9.5,
    "files": [{"name": "x.gguf", "urls": ["https://h/x?Signature=SECRET"], "size_bytes": 5, "sha256": SHA}],
}  # fmt: skip


@FUZZ
@given(broken(SPEC))
def test_a_broken_spec_is_refused_by_key_without_a_query(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "broken.json"
    try:
        text = json.dumps(data)
    except (ValueError, TypeError, RecursionError):
        return  # nothing that JSON can say
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        fetch_spec.read_spec(str(path))
    except Failed as failure:
        assert failure.code == 2 and str(failure).startswith("spec")
        assert "SECRET" not in str(failure) and len(str(failure)) < 700


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, '{"attempts": ' + "9" * 5000 + "}", "", "\ud800", "null"])
def test_a_text_that_is_no_spec(tmp_path, text):
    (tmp_path / "spec.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(Failed, match=r"^spec"):
        fetch_spec.read_spec(str(tmp_path / "spec.json"))


def test_a_spec_of_any_length_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch_spec, "SPEC_LIMIT_BYTES", 1000)
    (tmp_path / "spec.json").write_text(" " * 2000)
    with pytest.raises(Failed, match="it has more than 1000 bytes"):
        fetch_spec.read_spec(str(tmp_path / "spec.json"))


@pytest.mark.parametrize("whole", [False, True], ids=["the rest", "the whole file"])
def test_a_rest_without_its_range_is_taken_if_the_sum_is_right(job, whole):
    """huggingface/hf-hub#132, text-embeddings-inference#895: 206 without Content-Range, which curl itself refuses."""
    asked = []

    def answer(request):
        ranges = [line.split("=")[1] for line in request.split("\n") if line.lower().startswith("range")]
        first = int(ranges[0].split("-")[0]) if ranges else 0
        asked.append(first)
        body = BODY if whole else BODY[first:]
        status = "206 Partial Content" if ranges else "200 OK"
        cut = 1_000_000 if not first else len(body)  # the first transfer breaks off
        yield f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body[: cut if not whole else None]

    job.models.mkdir(parents=True)
    job.partial().write_bytes(BODY[:500_000])
    with serving(raw(answer)) as server:
        assert job.want(f"{server.url}/x.gguf").run() == 0, job.text()
    assert job.file().read_bytes() == BODY
    assert asked == ([500_000, 500_000, 0] if whole else [500_000, 500_000])


def test_a_rest_without_its_range_is_not_taken_where_no_sum_shows_it(job):
    asked = []

    def answer(request):
        ranges = [line.split("=")[1] for line in request.split("\n") if line.lower().startswith("range")]
        asked.append(ranges)
        body, status = (BODY[700:], "206 Partial Content") if ranges else (BODY, "200 OK")
        if request.startswith("HEAD"):
            yield f"HTTP/1.1 200 OK\r\nContent-Length: {len(BODY)}\r\n\r\n".encode()
        else:
            yield f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body

    job.models.mkdir(parents=True)
    job.partial().write_bytes(BODY[:500])
    with serving(raw(answer)) as server:
        assert job.want(f"{server.url}/x.gguf", sha=None).run() == 0, job.text()
    assert job.file().read_bytes() == BODY and asked[-1] == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("hops", [1, 7])
def test_redirects_of_every_kind_are_followed_without_the_token(hub, job, url, status, hops):
    """huggingface/huggingface_hub#4698: a mirror that leads to another origin."""
    seen = []

    def leads(request):
        number = int(re.search(r"hop=([0-9]+)", request)[1])
        seen.append((number, "Authorization" in request))
        there = f"{hub.url}/plain/org/model/x.gguf?email=a@b" if number == hops else f"?hop={number + 1}"
        yield f"HTTP/1.1 {status} Moved\r\nLocation: {there}\r\nContent-Length: 0\r\n\r\n".encode()

    with serving(raw(leads)) as mirror:
        job.token(mirror.url)
        assert job.want(f"{mirror.url}/x.gguf?hop=1").run() == 0, job.text()
    assert job.file().read_bytes() == BODY and {token for _, token in seen} == {True}
    assert not any(request.had_authorization for request in hub.settled())


@pytest.mark.parametrize(
    ("code", "token", "says"),
    [
        ("RepoNotFound", False, "there is no such repository, or it is private: check owner and name"),
        ("GatedRepo", False, "no token was sent: accept the licence on"),
        ("RepoNotFound", True, "there is no such repository, or it is private: check owner and name"),
        ("", False, "check the address; for a gated model accept the licence on"),
    ],
)
def test_a_mistyped_name_is_told_from_a_gated_one(job, code, token, says):
    """bmaltais/model-shelf#106: the Hub answers 401 for both."""

    def refuses(_):
        yield f"HTTP/1.1 401 Unauthorized\r\nX-Error-Code: {code}\r\nContent-Length: 0\r\n\r\n".encode()

    with serving(raw(refuses)) as server:
        if token:
            job.token(server.url)
        assert job.want(f"{server.url}/o/r/resolve/main/x.gguf").run() == 5
    assert says in job.last()


def test_a_proxy_that_wants_a_password_says_so(job, monkeypatch):
    def refuses(_):
        yield b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n"

    with serving(raw(refuses)) as proxy:
        monkeypatch.setenv("https_proxy", proxy.url)
        assert job.want("https://hub.example/x.gguf").run() == 7
    assert "the proxy asks for a name and a password, which is not supported" in job.last()


def test_a_download_by_a_proxy_and_a_company_s_own_authority(job, hub, monkeypatch, tmp_path):
    """ollama/ollama#5446: a job's variables are enough for curl; without them the company's server is not trusted."""
    hub.publish("x.gguf", BODY)
    authority = company.Authority(tmp_path)
    port = int(hub.url.rpartition(":")[2])
    with (
        company.front(authority.context("hub.example"), port) as front,
        company.proxy({"hub.example": front.server_address[1]}) as proxy,
    ):
        job.want("https://hub.example/plain/org/model/x.gguf")
        for name, value in network.variables(proxy.url, (), None).items():
            monkeypatch.setenv(name, value)
        assert job.run() == 7 and "SSL certificate problem" in job.last() and "with ca_file" in job.last()
        for name, value in network.variables(None, (), str(authority.certificate)).items():
            monkeypatch.setenv(name, value)
        assert job.run() == 0, job.text()
    assert job.file().read_bytes() == BODY and set(proxy.asked) == {"hub.example:443"}


# --- files that need no network --------------------------------------------------------------------


@pytest.fixture
def here(tmp_path):
    """A model of this host's own, in a folder of somebody's."""
    file = tmp_path / "own models" / "x.gguf"
    file.parent.mkdir()
    file.write_bytes(BODY)
    file.chmod(0o644)
    return file


def test_a_file_of_this_host_is_used_where_it_lies(job, here):
    free = os.statvfs(job.folder).f_bavail * os.statvfs(job.folder).f_frsize
    job.spec["reserve_bytes"] = free - 2**20  # no room for another copy
    assert job.want(here.as_uri(), size=None, sha=None).run() == 0, job.text()
    assert os.path.samefile(job.file(), here) and (job.models / "x.gguf.verified").exists()
    assert job.run() == 0 and "(0 fetched)" in job.last()


def test_a_file_that_is_not_ours_is_copied_and_stays_as_it_is(job, here):
    here.chmod(0o600)
    assert job.want(here.as_uri()).run() == 0, job.text()
    assert not os.path.samefile(job.file(), here) and job.file().read_bytes() == BODY
    assert oct(here.stat().st_mode & 0o777) == "0o600" and oct(job.file().stat().st_mode & 0o777) == "0o644"


@pytest.mark.parametrize(
    ("damage", "code", "says"),
    [("gone", 6, "No such file or directory"), ("shorter", 4, "was changed meanwhile"), ("other", 4, "expected sha256"),
     ("page", 8, "is not a GGUF file")],
)  # fmt: skip
def test_a_file_of_this_host_that_is_not_the_one_is_an_error(job, here, damage, code, says):
    sha = None if damage == "page" else SHA
    if damage == "gone":
        here.unlink()
    else:
        here.write_bytes({"shorter": BODY[:-1], "other": BODY[:-1] + b"!", "page": b"<html>" + BODY[6:]}[damage])
    assert job.want(here.as_uri(), sha=sha).run() == code, job.text()
    assert says in job.last() and not job.file().exists() and not job.partial().exists()


def test_what_the_operator_sent_is_checked_and_put_in_place(job):
    job.models.mkdir(parents=True)
    job.partial().write_bytes(BODY)
    assert job.want().run() == 0, job.text()
    assert job.file().read_bytes() == BODY and job.want and job.run() == 0


def test_what_was_damaged_on_its_way_is_sent_anew(job):
    job.models.mkdir(parents=True)
    job.partial().write_bytes(BODY[:-1] + b"!")
    assert job.want().run() == 4
    assert "what was sent is deleted: run again" in job.last() and not job.partial().exists()
    assert job.run() == 6 and "run again to send it" in job.last()


@pytest.mark.parametrize("urls", [[], ["file://host/x"], ["file:///x?y"]])
def test_no_file_without_an_address_or_a_sum(job, urls):
    job.want(*urls, sha=None)
    assert job.run() == 2
