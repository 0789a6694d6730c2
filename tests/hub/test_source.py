"""Sources of models, against a stand-in for the Hub: the requests, who gets the token, the messages."""

import pytest

from llamafleet.hub import http as web
from llamafleet.hub.http import SourceError
from llamafleet.hub.source import HttpSource, RemoteFile, Source, parse, read_header, resolve, siblings
from llamafleet.model.gguf import read_path
from sandbox import hub as stand_in
from sandbox import models

REPO = "acme/tiny-GGUF"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [models.tiny(folder), *sorted(p for p in (models.tiny(folder, shards=3).parent).glob("*-of-00003.gguf"))]


@pytest.fixture
def hub(files, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr(web.Web, "sleep", staticmethod(lambda seconds: None), raising=False)
    with stand_in.Hub() as hub:
        hub.add(REPO, "tiny.gguf", files[0])
        hub.add(REPO, "gated/tiny.gguf", files[0], gated=True)
        for shard in files[1:]:
            hub.add(REPO, f"split/{shard.name}", shard)
        yield hub


def test_sources_are_split_into_parts():
    assert parse("/srv/m.gguf") == Source("path", "/srv/m.gguf")
    assert parse("https://x/y.gguf") == Source("url", "https://x/y.gguf")
    assert parse("hf:o/r/f.gguf") == Source("hub", "f.gguf", "o/r", "main")
    assert parse("hf:o/r/Q4/f.gguf@abc") == Source("hub", "Q4/f.gguf", "o/r", "abc")
    assert parse("https://h.co/o/r/resolve/v1/a/f.gguf?download=true", "https://h.co") == Source(
        "hub", "a/f.gguf", "o/r", "v1"
    )


@pytest.mark.parametrize(
    "source", ["hf:o/r", "hf:o/f.gguf", "hf:o/r/../f.gguf", "hf:o/r//f", "hf:o/r/f@", "ftp:x", "http:///f"]
)
def test_bad_sources_are_refused_with_the_forms(source):
    with pytest.raises(SourceError, match=r"should be|should have a host name"):
        parse(source)


def test_a_hub_file_has_size_sha256_and_commit_and_is_pinned_to_it(hub, files):
    [file] = resolve(f"hf:{REPO}/tiny.gguf", endpoint=hub.url)
    entry = hub.find(REPO, "main", "tiny.gguf", None)
    assert (file.name, file.size_bytes, file.sha256, file.commit) == (
        "tiny.gguf",
        entry.size,
        entry.sha256,
        entry.commit,
    )
    assert file.url == f"{hub.url}/{REPO}/resolve/{entry.commit}/tiny.gguf"
    assert read_header([file]) == read_path(files[0])


def test_all_shards_are_resolved_at_one_commit(hub, files):
    resolved = resolve(f"hf:{REPO}/split/{files[1].name}", endpoint=hub.url)
    assert [file.name for file in resolved] == [shard.name for shard in files[1:]]
    assert len({file.commit for file in resolved}) == 1
    assert read_header(resolved) == read_path(files[1])


def test_a_split_model_is_named_by_its_first_shard(hub, files):
    with pytest.raises(SourceError, match="name the first shard"):
        resolve(f"hf:{REPO}/split/{files[2].name}", endpoint=hub.url)


def test_only_the_hub_itself_gets_the_token(hub):
    resolved = resolve(f"hf:{REPO}/gated/tiny.gguf", endpoint=hub.url, token=hub.token)
    read_header(resolved, token=hub.token)
    requests = hub.settled()
    assert {request.had_authorization for request in requests if request.server == "hub"} == {True}
    assert {request.had_authorization for request in requests if request.server == "cdn"} == {False}


def test_a_plain_url_never_gets_the_token(hub, files):
    url = f"{hub.url}/plain/{REPO}/tiny.gguf"
    resolved = resolve(url, endpoint="http://127.0.0.1:1", token="secret")
    assert resolved == (RemoteFile("tiny.gguf", url, files[0].stat().st_size),)
    read_header(resolved, token="secret")
    assert not any(request.had_authorization for request in hub.settled())


@pytest.mark.parametrize(
    ("source", "token", "message"),
    [
        ("gated/tiny.gguf", None, "HTTP 401, GatedRepo: accept the model's terms"),
        ("gated/tiny.gguf", "hf_outsider", "HTTP 403, GatedRepo: the token's account has no access"),
        ("tiny.gguf", "hf_wrong", "HTTP 401: accept"),
        ("Tiny.gguf", None, "HTTP 404, EntryNotFound: check owner, repository"),
        ("tiny.gguf@v9", None, "HTTP 404, RevisionNotFound"),
    ],
)
def test_a_refusal_says_status_code_and_next_step(hub, source, token, message):
    with pytest.raises(SourceError, match=message) as caught:
        resolve(f"hf:{REPO}/{source}", endpoint=hub.url, token=token)
    assert hub.url in str(caught.value)
    assert token is None or token not in str(caught.value)


def test_a_busy_server_is_waited_for_as_it_asks(hub):
    hub.fault(f"{REPO}/tiny.gguf", on="hub", times=2, status=429, retry_after="7")
    waits = []
    response = web.Web(sleep=waits.append).ask("HEAD", f"{hub.url}/{REPO}/resolve/main/tiny.gguf", follow=False)
    assert response.status_code == 302
    assert waits == [7, 7]


def test_a_longer_wait_than_the_limit_is_an_error(hub):
    hub.fault(f"{REPO}/tiny.gguf", on="hub", times=None, status=429, retry_after="3600")
    with pytest.raises(SourceError, match=r"HTTP 429 \(asks to wait 3600 s\)"):
        resolve(f"hf:{REPO}/tiny.gguf", endpoint=hub.url)
    assert len(hub.settled()) == 1


def test_a_broken_transfer_is_tried_again(hub, files):
    [file] = resolve(f"hf:{REPO}/tiny.gguf", endpoint=hub.url)
    hub.fault(f"{REPO}/tiny.gguf", times=2, cut_at=1000)
    assert HttpSource(file.url, web=web.Web(sleep=lambda s: None)).read(0, 5000) == files[0].read_bytes()[:5000]


def test_signed_queries_are_in_no_message(hub):
    [file] = resolve(f"hf:{REPO}/tiny.gguf", endpoint=hub.url)
    hub.fault(f"{REPO}/tiny.gguf", times=None, status=403)
    with pytest.raises(SourceError) as caught:
        read_header([file])
    assert "Signature" not in str(caught.value)


def test_reading_past_the_end_gives_what_is_there(hub, files):
    source = HttpSource(f"{hub.url}/plain/{REPO}/tiny.gguf")
    size = files[0].stat().st_size
    assert source.read(size - 3, 10) == files[0].read_bytes()[-3:]
    assert source.size == size
    assert source.read(size + 5, 10) == b""


def test_mirrors_are_asked_where_the_source_fails(hub, files):
    mirror = f"{hub.url}/plain/{REPO}/tiny.gguf"
    [file] = resolve(f"hf:{REPO}/none.gguf", endpoint=hub.url, mirrors=[mirror])
    assert file.url == mirror
    [file] = resolve(f"hf:{REPO}/tiny.gguf", endpoint=hub.url, mirrors=[mirror])
    assert file.mirrors == (mirror,)


def test_another_sha256_than_the_hub_s_is_refused(hub):
    with pytest.raises(SourceError, match="the settings say"):
        resolve(f"hf:{REPO}/tiny.gguf", endpoint=hub.url, sha256=["0" * 64])
    [file] = resolve(f"{hub.url}/plain/{REPO}/tiny.gguf", endpoint="http://h", sha256=["0" * 64])
    assert file.sha256 == "0" * 64


def test_siblings_of_a_hub_file(hub, files):
    sizes = siblings(f"hf:{REPO}/tiny.gguf", endpoint=hub.url)
    assert sizes["tiny.gguf"] == files[0].stat().st_size
    assert len(sizes) == 5
    assert siblings("/srv/m.gguf", endpoint=hub.url) == {}


def test_a_local_path(files, tmp_path):
    resolved = resolve(str(files[1]), endpoint="http://h")
    assert [file.url for file in resolved] == [shard.as_uri() for shard in files[1:]]
    assert read_header(resolved) == read_path(files[1])
    with pytest.raises(SourceError, match="there is no such file"):
        resolve(str(tmp_path / "none.gguf"), endpoint="http://h")


def test_a_server_that_cannot_be_reached():
    with pytest.raises(SourceError, match=r"127\.0\.0\.1:9/.*cannot be reached"):
        web.Web(sleep=lambda seconds: None).ask("GET", "http://127.0.0.1:9/x")
