"""What jobs of a site's hosts are asked: which token goes where, and what is served to whom."""

import base64
import json
from types import SimpleNamespace

import pytest
import share
from fetch_spec import read_spec

from llamafleet.fleet.site_server import SharedFile
from llamafleet.host.answers import Job
from llamafleet.hub.network import Network
from tasks.lib import jobs, remote, site_actions
from tasks.lib.site_access import Access
from tasks.lib.site_actions import OnHost

SHA = "ab" * 32
HUB = jobs.Secret("/run/llamafleet/hub-token.curl", 'header = "Authorization: Bearer hf_secret"\n')
SPEC = {"directory": "/var/lib/llamafleet/models/x-0123", "owner": None, "curl_config": HUB.path, "reserve_bytes": 0,
        "token_origin": "https://huggingface.co",
        "files": [{"name": "x.gguf", "urls": ["https://huggingface.co/x"], "size_bytes": 9, "sha256": SHA}]}  # fmt: skip


def ended(code, *tail):
    return Job("ended", code, tail[-1] if tail else "", list(tail), f"exit code {code}")


@pytest.fixture
def box(monkeypatch):
    """A host whose jobs end as `ends` says; `jobs` has what each was asked: command, spec, secret, network."""
    one = SimpleNamespace(name="h1", ends=[], jobs=[], lines=[], sent={})
    one.log = lambda text, *_: one.lines.append(text)
    one.log_styled = lambda text, **_: one.lines.append(text)

    def run(host, command):
        text = command.stdin.partition("\n")[2]
        host.sent[command.words[-1]] = json.loads(base64.b64decode(json.loads(text)[0][1]))
        return True, [], []

    def follow(state, host, job, command, secret=None, network=None):
        host.jobs.append((job, command, host.sent[jobs.spec_path(job)], secret, network))
        return host.ends.pop(0)

    monkeypatch.setattr(remote, "run", run)
    monkeypatch.setattr(remote, "space_left", lambda *_: "")
    monkeypatch.setattr(jobs, "ended", follow)
    return one


@pytest.fixture
def on_host(box):
    access = Access.made({"h1": "10.0.0.1", "h2": "10.0.0.2", "h3": "10.0.0.3"}, 7627)
    shared = [SharedFile(SHA, "/var/lib/llamafleet/models/x-0123/x.gguf")]
    return OnHost(None, box, "x-0123", SPEC, access, shared, HUB, Network(proxy="http://proxy:3128"))


def test_the_origin_is_asked_with_its_own_secret_and_network(box, on_host):
    box.ends = [ended(0, "done")]
    assert on_host.from_origin().is_there
    [(job, command, spec, secret, network)] = box.jobs
    assert (job, spec, secret, network) == ("fetch-x-0123", SPEC, HUB, Network(proxy="http://proxy:3128"))
    assert command[-2:] == [remote.helper("fetch.py"), jobs.spec_path(job)]


def test_peers_are_asked_with_the_token_of_the_run_alone_and_without_proxy(box, on_host, tmp_path):
    box.ends = [ended(0, "done")]
    on_host.from_peers(("h3", "h2"), 60.0)
    [(_, _, spec, secret, network)] = box.jobs
    assert (network, spec["curl_config"], "hf_secret" in secret.text) == (None, None, False)
    # What is sent is what fetch.py reads.
    access = tmp_path / "access"
    access.touch(mode=0o600)
    access.write_text(secret.text)
    assert spec["peers"]["access"] == secret.path
    spec["peers"]["access"] = str(access)
    (tmp_path / "spec").write_text(json.dumps(spec))
    peers = read_spec(str(tmp_path / "spec")).peers
    assert [(one.name, one.address, one.port) for one in peers.hosts] == [
        ("h3", "10.0.0.3", 7627),
        ("h2", "10.0.0.2", 7627),
    ]
    assert (peers.seconds, peers.token) == (60.0, on_host.access.token)


def test_peers_that_bring_no_more_are_no_failure_and_a_full_disk_is(box, on_host):
    box.ends = [
        ended(9, "told: left gone h2: it ended at byte 4", "error: x.gguf: byte 4 of 9"),
        ended(3, "error: full"),
    ]
    outcome = on_host.from_peers(("h2",), 60.0)
    assert (outcome.asks_again, outcome.left, box.lines) == (True, (("gone", "h2", "it ended at byte 4"),), [])
    assert not on_host.from_peers(("h2",), 60.0).asks_again
    assert "fetch-x-0123 failed (exit code 3): error: full" in box.lines[0]


def test_the_server_is_asked_for_the_model_s_files_and_other_hosts_may_draw(box, on_host):
    box.ends = [ended(0, "serving 1 files")]
    assert on_host.serve()
    [(job, command, spec, secret, _)] = box.jobs
    assert (job, command[-3:]) == ("share-x-0123", ["serve", jobs.spec_path(job), secret.path])
    assert (spec["address"], spec["port"]) == ("10.0.0.1", 7627)
    assert spec["allowed"] == ["10.0.0.2", "10.0.0.3"]
    assert spec["files"] == [{"path": "/var/lib/llamafleet/models/x-0123/x.gguf", "sha256": SHA, "size_bytes": 9}]
    sent = json.loads(secret.text)
    assert set(sent) == set(share.SECRETS)
    assert "listen 10.0.0.1:7627 ssl;" in sent["nginx.conf"]
    assert on_host.access.key not in json.dumps(spec)


def test_a_host_that_cannot_serve_says_why_and_goes_on(box, on_host):
    box.ends = [ended(1, "error: /usr/sbin/nginx is not there: install the package nginx")]
    assert not on_host.serve()
    assert box.lines == ["does not serve x-0123 to the site: /usr/sbin/nginx is not there: install the package nginx"]


def test_a_host_that_does_not_take_the_spec_is_an_error_with_its_words(box, on_host, monkeypatch):
    monkeypatch.setattr(site_actions.remote, "run", lambda *_: (False, [], ["No space left on device"]))
    with pytest.raises(remote.RemoteError, match=r"fetch-x-0123: .*No space left"):
        on_host.from_origin()
