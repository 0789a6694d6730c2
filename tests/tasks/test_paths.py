"""A path as source: the operator's file is sent, the host's is used, and nothing is taken for the other."""

import io
import os
import subprocess
import types
from pathlib import Path

import pytest

from llamafleet.model.gguf import read_path
from llamafleet.remote import checkout, receive_part
from llamafleet.remote.common import MODELS
from llamafleet.service.desired import Desired
from llamafleet.sources import SourceError
from sandbox import models
from tasks import model
from tasks.lib import builds, host_lock, lookups, paths, remote
from tests import planning
from tests.service.test_desired import decide, survey


class LocalConnector:
    pass


@pytest.fixture(autouse=True)
def forget(monkeypatch, tmp_path):
    lookups._known.clear()
    lookups._locks.clear()
    monkeypatch.setattr(builds, "record_path", lambda: tmp_path / "state" / "known-builds.json")
    monkeypatch.setattr(paths, "PRIVATE", ("/private/",))
    monkeypatch.setattr(host_lock, "check", lambda host: None)


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A host whose / is a folder; its commands run here, with paths there."""
    root = tmp_path / "host"
    root.mkdir()
    one = types.SimpleNamespace(name="box1", root=root, connector=object(), lines=[], asked=[])
    one.log = lambda text, *_: one.lines.append(text)

    def run(host, command):
        host.asked.append(command.purpose)
        if "receive_part.py" in command.purpose:
            return receive(host, command)
        words = [f"{root}{word}" if word.startswith("/") else word for word in command.words]
        done = subprocess.run(words, capture_output=True, text=True)
        out = done.stdout.replace(str(root), "")
        return done.returncode == 0, out.splitlines(), done.stderr.splitlines()

    def receive(host, command):
        verb, path, *rest = command.words[
            command.words.index(next(w for w in command.words if "receive_part" in w)) + 1 :
        ]
        seen = io.StringIO()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.stdout", seen)
            patch.setattr("sys.stderr", seen)
            code = receive_part.main([verb, f"{root}{path}", *rest], io.BytesIO((command.stdin or "").encode()))
        lines = seen.getvalue().splitlines()
        return code == 0, lines, lines

    monkeypatch.setattr(remote, "run", run)
    return one


@pytest.fixture
def file(tmp_path):
    return models.tiny(tmp_path)


def put(host, file, content=None):
    """The file at its path on the host, too."""
    there = Path(f"{host.root}{file}")
    there.parent.mkdir(parents=True)
    there.write_bytes(file.read_bytes() if content is None else content)
    return there


def instance(file, **more):
    return planning.settings({"source": str(file), "context_tokens": 1024, **more}).models[0]


def test_a_file_of_this_machine_is_read_here_and_known_by_its_sum(host, file):
    found = paths.model(host, instance(file))
    [one] = found.files
    assert found.header == read_path(file) and one.place == "operator" and one.size_bytes == file.stat().st_size
    assert one.sha256 == subprocess.run(["sha256sum", file], capture_output=True, text=True).stdout.split()[0]
    [sent] = paths.sent_files(found, "/models/m")
    assert (sent.local, sent.path) == (str(file), f"/models/m/.{file.name}.partial")


def test_a_sum_is_calculated_once_for_each_state_of_the_file(file, tmp_path, monkeypatch):
    first = paths.sum_of(file)
    monkeypatch.setattr(paths.hashlib, "file_digest", lambda *_: pytest.fail("read again"))
    assert paths.sum_of(file) == first
    monkeypatch.undo()
    file.write_bytes(file.read_bytes() + b"x")
    assert paths.sum_of(file, tmp_path / "state" / "known-sums.json") != first
    assert oct((tmp_path / "state" / "known-sums.json").stat().st_mode & 0o777) == "0o600"


def test_a_file_of_the_host_is_read_there(host, file):
    put(host, file)
    header = read_path(file)
    size = file.stat().st_size
    file.unlink()
    found = paths.model(host, instance(file))
    [one] = found.files
    assert (one.place, one.size_bytes, one.sha256, one.url) == ("host", size, None, file.as_uri())
    assert found.header.metadata == header.metadata and found.header.tensors == header.tensors
    assert list(paths.sent_files(found, "/m")) == []


def test_of_equal_files_the_host_s_is_used_and_of_others_the_operator_s_is_sent(host, file):
    there = put(host, file)
    assert paths.model(host, instance(file)).files[0].place == "host"
    there.write_bytes(file.read_bytes() + b"older")
    lookups._known.clear()
    assert paths.model(host, instance(file)).files[0].place == "operator"


def test_a_host_s_file_that_changes_is_another_model(host, file):
    there = put(host, file)
    before = paths.model(host, instance(file)).folder
    assert paths.model(host, instance(file)).folder == before
    os.utime(there, (1, 1))
    assert paths.model(host, instance(file)).folder != before


def test_where_this_machine_is_the_host_nothing_is_sent(host, file):
    put(host, file)
    host.connector = LocalConnector()
    file.write_bytes(b"another one here, which is the same machine in truth")
    assert paths.model(host, instance(file)).files[0].place == "host"


def test_a_file_that_nobody_has_is_named(host):
    with pytest.raises(SourceError, match=r"m0: source: /srv/m.gguf: neither your machine nor the host has this file"):
        paths.model(host, instance("/srv/m.gguf"))


def test_a_folder_that_jobs_do_not_see_is_named(host, file):
    put(host, Path("/private/m.gguf"), file.read_bytes())
    with pytest.raises(SourceError, match=r"/private/m.gguf: the host's jobs have a /tmp of their own"):
        paths.model(host, instance("/private/m.gguf"))


def test_all_shards_go_along(host, tmp_path):
    first = models.tiny(tmp_path, shards=3)
    found = paths.model(host, instance(first))
    assert len(list(paths.sent_files(found, "/m"))) == 3 and len({file.sha256 for file in found.files}) == 3
    with pytest.raises(SourceError, match="should name the first shard"):
        paths.model(host, instance(str(first).replace("00001-of", "00002-of")))


def test_sending_goes_on_where_it_was_cut(host, file, monkeypatch):
    monkeypatch.setattr(paths, "PART_BYTES", 1000)
    [sent] = paths.sent_files(paths.model(host, instance(file)), f"{MODELS}/m")
    there = Path(f"{host.root}{sent.path}")
    there.parent.mkdir(parents=True)
    there.write_bytes(file.read_bytes()[:2500])
    host.asked.clear()
    assert paths.send(None, host, (sent,), 0)
    assert there.read_bytes() == file.read_bytes()
    assert len(host.asked) == 1 + -(-(file.stat().st_size - 2500) // 1000)


def test_a_full_disk_is_said_before_anything_is_sent(host, file):
    [sent] = paths.sent_files(paths.model(host, instance(file)), f"{MODELS}/m")
    with pytest.raises(remote.RemoteError, match="No space left"):
        paths.send(None, host, (sent,), 2**62)


@pytest.mark.parametrize(("place", "urls", "unverified"), [("operator", [], None), ("host", ["file"], True)])
def test_the_host_is_asked_for_what_is_there(host, file, place, urls, unverified):
    if place == "host":
        put(host, file)
    settings = planning.settings({"source": str(file), "context_tokens": 1024})
    made = paths.model(host, settings.models[0])
    outcome = decide(settings, survey(), {"m0": made})
    assert isinstance(outcome, Desired), outcome
    [one] = model.spec(outcome, outcome.servings[0].instance, outcome.servings[0].model, with_token=False)["files"]
    assert [url.partition(":")[0] for url in one["urls"]] == urls and one.get("unverified") is unverified
    [note] = outcome.inputs.notes
    assert note.endswith({"operator": "your machine's file is sent", "host": "the host's own file is used"}[place])


@pytest.fixture
def repository(tmp_path):
    folder = tmp_path / "llama.cpp"
    git = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@example.net"]
    subprocess.run(["git", "init", "--quiet", str(folder)], check=True)
    (folder / "file").write_text("one")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--message", "one"], check=True)
    subprocess.run([*git, "tag", "b1"], check=True)
    return folder, subprocess.run(
        [*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_a_repository_of_this_machine_is_sent_as_one_commit(host, repository, tmp_path):
    folder, head = repository
    assert paths.is_ours(host, str(folder)) and paths.commit(host, str(folder), "b1") == head
    assert paths.send_commit(None, host, str(folder), head, "/jobs/checkout.pack")
    assert checkout.main([str(tmp_path / "src"), f"{host.root}/jobs/checkout.pack", head]) == 0
    assert (tmp_path / "src" / "file").read_text() == "one"


def test_a_repository_of_the_host_is_asked_there(host, repository):
    folder, head = repository
    there = Path(f"{host.root}{folder}")
    there.parent.mkdir(parents=True)
    folder.rename(there)
    assert not paths.is_ours(host, str(folder)) and paths.commit(host, str(folder), "b1") == head
    with pytest.raises(lookups.LookupFailed, match=r"neither on your machine nor usable on the host: .*'b2'"):
        paths.commit(host, str(folder), "b2")


def test_a_ref_that_our_repository_lacks_is_named(host, repository):
    with pytest.raises(lookups.LookupFailed, match=r"llama_cpp_repository: .*no tag, branch or commit 'b2'"):
        paths.commit(host, str(repository[0]), "b2")


def test_git_that_is_missing_here_is_named_with_the_way_out(host, repository, tmp_path, monkeypatch):
    folder, head = repository
    monkeypatch.setenv("PATH", str(tmp_path))
    says = "git is missing on this machine, where you run llamafleet: install it"
    with pytest.raises(lookups.LookupFailed, match=says):
        paths._our_commit(str(folder), "b1")
    with pytest.raises(remote.RemoteError, match=says):
        paths.send_commit(None, host, str(folder), head, "/jobs/checkout.pack")
