"""Sources of models, against a stand-in for the Hub: the requests, who gets the token, the messages."""

import json

import pytest

from llamafleet.hub import http as web
from llamafleet.hub import listing
from llamafleet.hub.http import Deadline, SourceError
from llamafleet.hub.network import Network
from llamafleet.hub.source import (
    HttpSource,
    ModelFiles,
    RemoteFile,
    Source,
    parse,
    quantisations,
    read_header,
    resolve,
    siblings,
)
from llamafleet.model.gguf import GgufError, read_path
from llamafleet.model.gguf_cursor import Read
from sandbox import hub as stand_in
from sandbox import models
from tests.serving import dripping, raw, serving

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
    "source",
    [
        "hf:o",
        "hf:o/f.gguf",
        "hf:o/r:",
        "hf:o/r:Q4/f.gguf",
        "hf:o/r:(a|b)",
        "hf:o/r/../f.gguf",
        "hf:o/r//f",
        "hf:o/r/f@",
        "ftp:x",
        "http:///f",
    ],
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
        ("tiny.gguf", "hf_wrong", r"HTTP 401: the token \(hub_token_file or HF_TOKEN\) is not accepted"),
        ("Tiny.gguf", None, "HTTP 404, EntryNotFound: check owner, repository"),
        ("tiny.gguf@v9", None, "HTTP 404, RevisionNotFound"),
    ],
)
def test_a_refusal_says_status_code_and_next_step(hub, source, token, message):
    with pytest.raises(SourceError, match=message) as caught:
        resolve(f"hf:{REPO}/{source}", endpoint=hub.url, token=token)
    assert hub.url in str(caught.value)
    assert token is None or token not in str(caught.value)


@pytest.mark.parametrize("token", [None, "the hub's"])
def test_a_repository_that_is_not_there_is_not_taken_for_a_gated_one(hub, token):
    """The Hub answers 401 without a token, so as not to tell which private repositories there are, and 404 with one."""
    with pytest.raises(SourceError) as caught:
        resolve("hf:acme/typo/tiny.gguf", endpoint=hub.url, token=token and hub.token)
    if token:
        assert "HTTP 404, RepoNotFound: check owner, repository" in str(caught.value)
    else:
        assert "HTTP 401, RepoNotFound: there is no such repository, or it may be read with a token" in str(
            caught.value
        )
        assert "check owner and name" in str(caught.value) and "hub_token_file or HF_TOKEN" in str(caught.value)


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


# --- names of files ------------------------------------------------------------------------------

BAD_NAMES = [
    *(
        "m;touch${IFS}x;.gguf",
        "a b.gguf",
        "m(1).gguf",
        "m[1].gguf",
        "-m.gguf",
        ".gguf",
        "..gguf",
        "m.gguf.txt",
        "download",
    ),
    *("m\n.gguf", "m'.gguf", "$(x).gguf", "m".ljust(250, "m") + ".gguf", "m\u0301.gguf", "m%00.gguf", "\u0661.gguf"),
]


@pytest.mark.parametrize("name", BAD_NAMES, ids=lambda name: name[:20])
def test_a_name_that_no_host_may_store_is_refused_before_anything_is_asked(hub, name):
    with pytest.raises(SourceError, match=r"should have letters, digits|should be"):
        resolve(f"hf:{REPO}/{name}", endpoint=hub.url)
    address = stand_in.quote(name, safe="%") if name.isascii() else name
    with pytest.raises(SourceError, match=r"should have letters, digits|should be"):
        resolve(f"{hub.url}/plain/{REPO}/{address}?download=true", endpoint="http://h")
    assert hub.settled() == []


@pytest.mark.parametrize("name", ["tiny.GGUF", "T.gGuF", "a+b=c_d-e.f.gguf", "0.gguf", "_.gguf"])
def test_names_that_people_have_are_accepted(hub, files, name):
    hub.add(REPO, name, files[0])
    [file] = resolve(f"hf:{REPO}/{name}", endpoint=hub.url)
    [plain] = resolve(f"{hub.url}/plain/{REPO}/{stand_in.quote(name)}?a=b", endpoint="http://h", sha256=[file.sha256])
    assert file.name == plain.name == name
    assert ModelFiles((file,), read_path(files[0])).folder == f"{name[:-5]}-{file.sha256[:12]}"


def test_an_encoded_slash_is_no_folder(hub):
    with pytest.raises(SourceError, match="should have letters"):
        resolve(f"{hub.url}/plain/{REPO}/a%2Ftiny.gguf", endpoint="http://h")


def test_a_mirror_may_name_its_file_as_it_likes(hub, files):
    hub.add(REPO, "download", files[0])
    [file] = resolve(f"hf:{REPO}/none.gguf", endpoint=hub.url, mirrors=[f"{hub.url}/plain/{REPO}/download?id=7"])
    assert file.name == "none.gguf" and file.sha256 is None
    assert "HTTP 404" in file.failed


# --- checksums ---------------------------------------------------------------------------------------


def test_sums_of_a_split_model_are_given_in_order(hub, files):
    url = f"{hub.url}/plain/{REPO}/split/{files[1].name}"
    sums = [hub.find(REPO, "main", f"split/{file.name}", None).sha256 for file in files[1:]]
    assert [file.sha256 for file in resolve(url, endpoint="http://h", sha256=sums)] == sums
    assert [file.sha256 for file in resolve(url, endpoint="http://h", sha256=sums[:1])] == [sums[0], None, None]
    with pytest.raises(SourceError, match=r"sha256: 2 are given, the model has 3 files: give one for each"):
        resolve(url, endpoint="http://h", sha256=sums[:2])
    with pytest.raises(SourceError, match=f"the Hub's sha256 is {sums[2]}, the settings say {'0' * 64}"):
        resolve(f"hf:{REPO}/split/{files[1].name}", endpoint=hub.url, sha256=[*sums[:2], "0" * 64])


# --- lists of a repository -----------------------------------------------------------------------------


def listed(answer, monkeypatch=None, path="hf:o/r/x.gguf", headers=""):
    """What `siblings` makes of a list, which is an object or bytes."""
    body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    head = f"HTTP/1.1 200 OK\r\n{headers}Content-Length: {len(body)}\r\n\r\n".encode()
    with serving(raw(lambda _: iter([head, body]))) as server:
        return siblings(path, endpoint=server.url)


@pytest.mark.parametrize(
    "answer",
    [5, None, "x", {}, {"error": "no"}, True, b"", b"[", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000,
     b"[" + b"9" * 5000 + b"]", b'[{"path": "a.gguf", "size": ' + b"9" * 5000 + b"}]"],
    ids=lambda answer: repr(answer)[:12],
)  # fmt: skip
def test_what_is_no_list_is_an_error_that_names_the_address(answer):
    with pytest.raises(SourceError, match=r"http://127\.0\.0\.1:\d+/api/models/o/r/tree/main: should be a JSON list"):
        listed(answer)


@pytest.mark.parametrize(
    "entry",
    [5, None, [], "x.gguf", {}, {"path": 5, "size": 1}, {"path": "x.gguf"}, {"path": "x.gguf", "size": "12"},
     {"path": "x.gguf", "size": -1}, {"path": "x.gguf", "size": True}, {"path": "x.gguf", "size": 1.5},
     {"path": "x.gguf", "size": 10**30}, {"path": ["x.gguf"], "size": 1}, {"path": "README.md", "size": 1}],
    ids=repr,
)  # fmt: skip
def test_entries_of_another_form_are_left_out(entry):
    assert listed([entry, {"path": "y.gguf", "size": 7}, {"path": "z.GGUF", "size": 0}]) == {"y.gguf": 7, "z.GGUF": 0}


def test_a_name_that_is_listed_twice_is_an_error():
    with pytest.raises(SourceError, match=r"lists 'y\.gguf' twice"):
        listed([{"path": "y.gguf", "size": 7}, {"path": "y.gguf", "size": 8}])


def test_only_so_many_files_and_bytes_are_read(monkeypatch):
    monkeypatch.setattr(listing, "LISTED_FILES", 10)
    with pytest.raises(SourceError, match="after 10 others"):
        listed([{"path": f"{n}.gguf", "size": 7} for n in range(11)])
    monkeypatch.setattr(listing, "LISTING_LIMIT_BYTES", 100)
    with pytest.raises(SourceError, match="a list of more than 100 bytes"):
        listed(b"[" + b" " * 100)


def pages(*bodies):
    """A server of pages: each is a list and what the header Link has of the next one."""

    def script(line):
        number = int(line.split()[1][len("/page") :]) if "/page" in line else 0
        entries, link = bodies[min(number, len(bodies) - 1)]
        body = json.dumps(entries).encode()
        follow = f"Link: {link.replace('HERE', server.url)}\r\n" if link else ""
        yield f"HTTP/1.1 200 OK\r\n{follow}Content-Length: {len(body)}\r\n\r\n".encode() + body

    server = raw(script)
    return server


def test_a_list_of_several_pages_is_read_to_its_end():
    first, last = {"path": "a.gguf", "size": 1}, {"path": "b.gguf", "size": 2}
    asked = pages(([first], '<HERE/page1>; rel="next"'), ([], "</page2>;rel=next"), ([last], ""))
    with serving(asked) as server:
        assert siblings("hf:o/r/x.gguf", endpoint=server.url) == {"a.gguf": 1, "b.gguf": 2}


@pytest.mark.parametrize("link", ['<HERE/page1>; rel="next"', "<>; rel=next", "</>;rel=next"])
def test_pages_without_end_are_an_error(link):
    with serving(pages(([], link))) as server:
        with pytest.raises(SourceError, match=f"{server.url}.*on more than {listing.LISTING_PAGES} pages"):
            siblings("hf:o/r/x.gguf", endpoint=server.url)
        assert len(server.asked) == listing.LISTING_PAGES


@pytest.mark.parametrize(
    "target", ["http://127.0.0.1:1/x", "https://evil.example/x", "http://[::1", "file:///etc/passwd", "http://h:99999/"]
)
def test_a_list_does_not_go_on_elsewhere(target):
    with serving(pages(([], f"<{target}>; rel=next"))) as server:
        with pytest.raises(SourceError, match="its list goes on at"):
            siblings("hf:o/r/x.gguf", endpoint=server.url)
        assert len(server.asked) == 1


def test_of_odd_names_in_a_list_none_is_a_model():
    names = [*BAD_NAMES, "a/../b.gguf", "@.gguf", "x@y.gguf", "good.gguf"]
    body = json.dumps([{"path": name, "size": 5} for name in names]).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with serving(raw(lambda _: iter([head, body]))) as server:
        found = quantisations("hf:o/r", endpoint=server.url)
    assert found == {"hf:o/r/good.gguf": 5, "hf:o/r/a/../b.gguf": 5}


# --- what a server says of a file ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ("X-Linked-Size: 12\r\n", (12, None, None)),
        ("X-Linked-Size: \u00b2\r\n", (None, None, None)),
        (f"X-Linked-Size: {'9' * 5000}\r\n", (None, None, None)),
        ("X-Linked-Size: -5\r\n", (None, None, None)),
        ("X-Linked-Size: 0\r\n", (None, None, None)),
        (f'X-Linked-Etag: "{"a" * 64}"\r\n', (None, "a" * 64, None)),
        (f'X-Linked-Etag: "{"a" * 65}"\r\n', (None, None, None)),
        (f"X-Repo-Commit: {'c' * 40}\r\n", (None, None, "c" * 40)),
        ("X-Repo-Commit: ../../../other/repo\r\n", (None, None, None)),
        (f"X-Repo-Commit: {'c' * 5000}\r\n", (None, None, None)),
    ],
    ids=lambda one: one[:24] if isinstance(one, str) else "",
)
def test_headers_of_a_file_of_any_form(headers, expected):
    with serving(raw(lambda _: iter([f"HTTP/1.1 200 OK\r\n{headers}\r\n".encode("latin-1")]))) as server:
        [file] = resolve("hf:o/r/x.gguf", endpoint=server.url)
    assert (file.size_bytes, file.sha256, file.commit) == expected


def test_all_shards_of_a_model_share_one_deadline(files):
    shards = [RemoteFile(f"m-{n:05d}-of-00300.gguf", "", 10**6) for n in range(1, 301)]
    head = b"HTTP/1.1 206 P\r\nContent-Range: bytes 0-999999/1000000\r\nContent-Length: 1000000\r\n\r\nGGUF"
    with serving(raw(dripping(head))) as server:
        urls = [RemoteFile(file.name, f"{server.url}/{file.name}", file.size_bytes) for file in shards]
        with pytest.raises(SourceError, match="took longer"):
            read_header(urls, deadline=Deadline(0.4))
    assert len(server.asked) == 1


def test_limits_of_a_header_are_for_all_shards_together(files, monkeypatch):
    counts = []
    monkeypatch.setattr("llamafleet.model.gguf.Read", lambda: counts.append(Read()) or counts[-1])
    read_path(files[1])
    for limit, needed in (("HEADER_LIMIT_BYTES", counts[0].header_bytes), ("KEPT_LIMIT_BYTES", counts[0].kept_bytes)):
        monkeypatch.setattr(f"llamafleet.model.gguf_cursor.{limit}", needed)
        read_path(files[1])
        monkeypatch.setattr(f"llamafleet.model.gguf_cursor.{limit}", needed - 1)
        with pytest.raises(GgufError, match=f"00003-of-00003.gguf: has .*more than {needed - 1} bytes"):
            read_path(files[1])
        monkeypatch.undo()


def test_tensors_of_all_shards_are_counted_together(files, monkeypatch):
    tensors = len(read_path(files[1]).tensors)
    monkeypatch.setattr("llamafleet.model.gguf.TENSOR_LIMIT", tensors - 1)
    with pytest.raises(GgufError, match=r"00003-of-00003\.gguf: has \d+ tensors by its header, \d+ at most"):
        read_path(files[1])


# --- repositories, mirrors, other hubs -----------------------------------------------------------------


@pytest.fixture
def zoo(hub, files):
    """A repository with several quantisations, one of them split."""
    for name in ("m-BF16.gguf", "m-Q4_K_M.gguf", "m-Q8_0.gguf", "mmproj-m-Q4_K_M.gguf"):
        hub.add("acme/zoo-GGUF", name, files[0])
    for number, shard in enumerate(files[1:], 1):
        hub.add("acme/zoo-GGUF", f"UD-Q2_K/m-UD-Q2_K-0000{number}-of-00003.gguf", shard)
    return hub


@pytest.mark.parametrize(
    ("source", "chosen"),
    [
        ("hf:acme/zoo-GGUF", "hf:acme/zoo-GGUF/m-Q4_K_M.gguf"),
        ("hf:acme/zoo-GGUF:Q8_0", "hf:acme/zoo-GGUF/m-Q8_0.gguf"),
        ("hf:acme/zoo-GGUF:UD-Q2_K", "hf:acme/zoo-GGUF/UD-Q2_K/m-UD-Q2_K-00001-of-00003.gguf"),
        ("/acme/zoo-GGUF/tree/main/UD-Q2_K", "hf:acme/zoo-GGUF/UD-Q2_K/m-UD-Q2_K-00001-of-00003.gguf"),
    ],
)
def test_of_a_repository_the_file_is_chosen_and_named(zoo, source, chosen):
    resolved = resolve(source if source.startswith("hf:") else zoo.url + source, endpoint=zoo.url)
    assert resolved[0].chosen == chosen and all(file.sha256 and file.commit for file in resolved)
    assert [one.name for one in resolved] == [one.name for one in resolve(chosen, endpoint=zoo.url)]


def test_a_quantisation_that_is_not_there_is_answered_by_those_that_are(zoo):
    with pytest.raises(SourceError, match=r"no model file of the quantisation Q6_K; it has .*m-Q8_0\.gguf") as caught:
        resolve("hf:acme/zoo-GGUF:Q6_K", endpoint=zoo.url)
    assert "-00002-of-" not in str(caught.value)


def test_a_list_of_presets_is_no_model(zoo, files):
    zoo.add("acme/zoo-GGUF", "preset.ini", files[0])
    with pytest.raises(SourceError, match="a list of presets"):
        resolve("hf:acme/zoo-GGUF", endpoint=zoo.url)
    assert resolve("hf:acme/zoo-GGUF/m-Q8_0.gguf", endpoint=zoo.url)


def test_a_repository_that_cannot_be_read_leaves_its_mirror(zoo):
    resolved = resolve("hf:acme/gone-GGUF:Q8_0", endpoint=zoo.url, mirrors=["hf:acme/zoo-GGUF/m-Q8_0.gguf"])
    assert [(file.name, file.chosen, file.mirrors) for file in resolved] == [("m-Q8_0.gguf", "", ())]
    assert "RepoNotFound" in resolved[0].failed


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_mirror_that_leads_to_the_hub_is_followed_without_the_token(hub, files, status):
    """huggingface/huggingface_hub#4698: such an answer has none of the Hub's headers. Its list names the Hub's pages."""

    def leads(request):
        path = request.split(" ")[1]
        yield (f"HTTP/1.1 {status} Moved\r\nLocation: {hub.url}{path}\r\nContent-Length: 9\r\n\r\nMoved on.").encode()

    with serving(raw(leads)) as mirror:
        resolved = resolve(f"hf:{REPO}/tiny.gguf", endpoint=mirror.url, token="hf_secret")
        assert read_header(resolved, token="hf_secret") == read_path(files[0])
        assert resolve(f"{mirror.url}/{REPO}/tree/main/split", endpoint=mirror.url)[0].chosen
    [file] = resolved
    entry = hub.find(REPO, "main", "tiny.gguf", None)
    assert (file.size_bytes, file.sha256, file.commit) == (entry.size, entry.sha256, entry.commit)
    assert file.url.startswith(f"{mirror.url}/{REPO}/resolve/{entry.commit}/")
    assert hub.settled() and not any(request.had_authorization for request in hub.settled())


def test_a_mirror_s_list_goes_on_at_the_mirror():
    """A mirror passes on the addresses of the Hub's own pages."""
    link = '<https://huggingface.co/api/models/o/r/tree/main?cursor=2>; rel="next"'
    bodies = [([{"path": "a.gguf", "size": 1}], link), ([{"path": "b.gguf", "size": 2}], "")]

    def answer(request):
        body, link = bodies["cursor=2" in request.split(" ")[1]]
        text = json.dumps(body).encode()
        yield b"HTTP/1.1 200 OK\r\nLink: %s\r\nContent-Length: %d\r\n\r\n" % (link.encode(), len(text)) + text

    with serving(raw(answer)) as server:
        assert siblings("hf:o/r/a.gguf", endpoint=server.url) == {"a.gguf": 1, "b.gguf": 2}


@pytest.mark.parametrize(
    ("repo", "message"),
    [(REPO, "so the model is gated: accept its terms"), ("acme/typo", "there is no such repository, or it is private")],
    ids=["gated", "mistyped"],
)
def test_a_mistyped_name_is_told_from_a_gated_one_without_the_hub_s_word(hub, repo, message):
    """bmaltais/model-shelf#106: both are 401, and a mirror does not say which."""

    def without_code(request):
        path = request.split(" ")[1]
        if "/api/" in path and REPO in path:
            body = json.dumps([{"path": "gated/tiny.gguf", "size": 9}]).encode()
            yield b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        else:
            yield b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n"

    with serving(raw(without_code)) as mirror, pytest.raises(SourceError, match=message) as caught:
        resolve(f"hf:{repo}/gated/tiny.gguf", endpoint=mirror.url)
    assert "HTTP 401" in str(caught.value)


def test_a_mistyped_repository_is_not_called_gated(hub):
    """bmaltais/model-shelf#106."""
    with pytest.raises(SourceError, match="RepoNotFound") as caught:
        resolve("hf:acme/typo/tiny.gguf", endpoint=hub.url)
    assert "terms" not in str(caught.value) and "gated" not in str(caught.value)


def test_a_mistyped_file_is_answered_by_the_nearest_names(zoo):
    with pytest.raises(SourceError, match=r"EntryNotFound: .*; the repository has m-Q4_K_M\.gguf, "):
        resolve("hf:acme/zoo-GGUF/m-Q4_KM.gguf", endpoint=zoo.url)


def test_modelscope_is_read_by_its_own_list(files):
    """ModelScope has other addresses and no headers with sums: its list has both."""
    data, asked = files[0].read_bytes(), []
    listed = {"Data": {"Files": [
        {"Path": "m-Q4_K_M.gguf", "Size": len(data), "Sha256": "a" * 64, "Type": "blob"},
        {"Path": "README.md", "Size": 3, "Sha256": "b" * 64, "Type": "blob"},
    ]}}  # fmt: skip

    def answer(request):
        line, *headers = request.split("\n")
        asked.append(line.split(" ")[1])
        body, status = json.dumps(listed).encode(), "200 OK"
        if "/resolve/" in line:
            first, last = next(one for one in headers if one.lower().startswith("range")).split("=")[1].split("-")
            body, status = data[int(first) : int(last) + 1], "206 Part"
        yield f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body

    with serving(raw(answer)) as proxy:  # a name that only the proxy knows
        way = Network(proxy=proxy.url)
        endpoint = "http://www.modelscope.cn"
        for source in ("hf:o/r", "hf:o/r:Q4_K_M", "hf:o/r/m-Q4_K_M.gguf", f"{endpoint}/models/o/r/summary"):
            [file] = resolve(source, endpoint=endpoint, network=way)
            assert (file.name, file.size_bytes, file.sha256) == ("m-Q4_K_M.gguf", len(data), "a" * 64)
            assert file.url == f"{endpoint}/models/o/r/resolve/master/m-Q4_K_M.gguf"
        assert read_header([file], network=way) == read_path(files[0])
        with pytest.raises(SourceError, match=r"has no such file; it has m-Q4_K_M\.gguf"):
            resolve("hf:o/r/m-Q4KM.gguf", endpoint=endpoint, network=way)
    assert asked[0] == f"{endpoint}/api/v1/models/o/r/repo/files?Revision=master&Recursive=true"


@pytest.mark.parametrize("length", ["named", "unnamed"])
@pytest.mark.parametrize("whole", [False, True], ids=["the part", "the whole file"])
def test_a_part_without_its_range_is_taken_for_what_it_is(files, length, whole):
    """huggingface/hf-hub#132, text-embeddings-inference#895: 206 without Content-Range."""
    data = files[0].read_bytes()

    def answer(request):
        headers = request.split("\n")
        first, last = next(one for one in headers if one.lower().startswith("range")).split("=")[1].split("-")
        body = data if whole else data[int(first) : int(last) + 1]
        size = f"Content-Length: {len(body)}\r\n" if length == "named" else "Connection: close\r\n"
        yield f"HTTP/1.1 206 Partial Content\r\n{size}\r\n".encode() + body

    with serving(raw(answer)) as server, web.Web() as client:
        for offset, count in ((0, 100), (64, 1000), (1000, 5000)):
            part, _ = client.read(f"{server.url}/m.gguf", offset, count)
            assert part == data[offset : offset + count]


def test_several_ranges_at_once_are_refused(files):
    def answer(_):
        yield b"HTTP/1.1 206 Part\r\nContent-Type: multipart/byteranges; boundary=x\r\nContent-Length: 4\r\n\r\n--x\n"

    with serving(raw(answer)) as server, web.Web() as client, pytest.raises(SourceError, match="several ranges"):
        client.read(f"{server.url}/m.gguf", 64, 10)


def test_a_plain_server_that_tells_no_range_tells_the_size_at_head(files):
    data = files[0].read_bytes()

    def answer(request):
        if request.startswith("HEAD"):
            yield f"HTTP/1.1 200 OK\r\nContent-Length: {len(data)}\r\n\r\n".encode()
        else:
            yield b"HTTP/1.1 206 Partial Content\r\nContent-Length: 1\r\n\r\nG"

    with serving(raw(answer)) as server:
        [file] = resolve(f"{server.url}/m.gguf", endpoint="https://h")
    assert file.size_bytes == len(data)
