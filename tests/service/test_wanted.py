"""What lies on a host is what was planned: whatever is done by hand to any path of ours is named, set right by one run,
and then nothing differs. The server restarts only where it does not run as planned."""

import itertools
import os
import shutil
import tempfile

import pytest

from llamafleet.host.installed import Place as Found
from llamafleet.remote import common
from llamafleet.remote.common import FOLDERS
from llamafleet.service import wanted
from llamafleet.service.wanted import Place
from tests.service.drifting import UNIT, Host


@pytest.mark.parametrize(
    ("place", "found", "phrase"),
    [
        (Place("/x", "folder"), None, "is missing"),
        (Place("/x", "file", needed=False), None, ""),
        (Place("/x", "file", 0o644), Found("file", 0o644, 0, 0), ""),
        (Place("/x", "file", 0o644), Found("file", 0o666, 0, 0), "has mode 0666 instead of 0644"),
        (Place("/x", "file", 0o755, wanted.READ_WRITE), Found("file", 0o644, 0, 0), ""),
        (Place("/x", "file", 0o755, wanted.READ_WRITE), Found("file", 0o600, 0, 0), "has mode 0600 instead of 0755"),
        (Place("/x", "file", 0o644), Found("file", 0o644, 12, 0), "belongs to 12:0 instead of root"),
        (Place("/x", "file", 0o644), Found("file", 0o600, 0, 5), "has mode 0600 instead of 0644 and belongs to 0:5 instead of root"),
        (Place("/x", "file"), Found("link", 0o777, 0, 0), "is a link instead of a file"),
        (Place("/x", "link"), Found("folder", 0o755, 0, 0), "is a folder instead of a link"),
        (Place("/x", "file"), Found("other", 0o644, 0, 0), "is something else instead of a file"),
        (Place("/x", "file or link"), Found("link", 0o777, 0, 0), ""),
    ],
)  # fmt: skip
def test_a_difference_in_words(place, found, phrase):
    assert wanted.difference(place, found) == phrase


def test_the_list_has_every_folder_and_each_file_of_an_instance_once():
    one = wanted.Instance("m0", ("api-keys",), True)
    places = wanted.places([one], "h1", "k1", ["llama-server"], ["/var/lib/llamafleet/models/a/a.gguf"])
    paths = [place.path for place in places]
    assert len(paths) == len(set(paths)) and set(FOLDERS) <= set(paths)
    assert {f"/etc/systemd/system/{UNIT}", "/etc/llamafleet/instances/m0/api-keys"} <= set(paths)
    assert paths.index("/etc/llamafleet") < paths.index("/etc/llamafleet/instances/m0/plan.json")


# --- everything that can be done to a path ----------------------------------------------------------


def deleted(path):
    shutil.rmtree(path) if os.path.isdir(path) and not os.path.islink(path) else os.unlink(path)


def emptied(path):
    with open(path, "w"):
        pass


def edited(path):
    """Another byte in its middle."""
    with open(path, "r+b") as file:
        middle = os.path.getsize(path) // 2
        file.seek(middle)
        byte = file.read(1)
        file.seek(middle)
        file.write(b"#" if byte != b"#" else b";")


def read_by_nobody(path):
    os.chmod(path, 0)


def changed_by_everybody(path):
    os.chmod(path, 0o777)


def given_away(path):
    os.chown(path, 12, 34, follow_symlinks=False)


def a_folder(path):
    deleted(path)
    os.mkdir(path)


def a_link_to_it(path):
    os.rename(path, path + ".moved")
    os.symlink(path + ".moved", path)


def a_link_to_nothing(path):
    deleted(path)
    os.symlink("/nonexistent", path)


def a_file(path):
    deleted(path)
    emptied(path)


HARMS = {
    "file": (deleted, emptied, edited, read_by_nobody, changed_by_everybody, given_away, a_folder, a_link_to_it,
             a_link_to_nothing),
    "folder": (deleted, changed_by_everybody, given_away, a_file, a_link_to_nothing, a_link_to_it),
    "link": (deleted, a_folder, a_link_to_nothing),
}  # fmt: skip
OPT, ETC, VAR, UNITS = "/opt/llamafleet", "/etc/llamafleet", "/var/lib/llamafleet", "/etc/systemd/system"


def is_fine(path, harm):
    """Whether a harm is none."""
    if harm is a_link_to_it:  # what it leads to counts
        return common.may_lead_elsewhere(path)
    if path == "/run/llamafleet":  # whoever needs it first makes it
        return harm in (deleted, a_link_to_nothing)
    # A run notes plan.json without the list of sums, so not every sum in it counts.
    return path.endswith("/manifest.json") and harm is edited


def restarts(path):
    """Whether a server that runs as it should may have been started from something else, or loses what it runs from."""
    return path == f"{UNITS}/{UNIT}" or path in (OPT, ETC, VAR) or path.startswith(f"{OPT}/releases")


def cases(host):
    """Each path with each harm."""
    kinds = dict(sorted(host.paths().items()))
    return [(path, harm) for path, kind in kinds.items() for harm in HARMS[kind] if not is_fine(path, harm)]


def check(host, path, harm):
    """Do it, see it named, and set right by one run."""
    before = host.systemd.pid
    harm(host.root + path)
    changes = host.changes()
    named = [*changes.of_host(), *changes.of_instance("m0")]
    assert named and changes.any, f"{harm.__name__} {path}: not seen"
    host.run()
    after = host.changes()
    left = [*after.of_host(), *after.of_instance("m0")]
    assert not left and not after.any and not after.note, f"{harm.__name__} {path}: {named} left {left}"
    assert host.systemd.serving and host.systemd.watching, f"{harm.__name__} {path}"
    if not restarts(path):
        assert host.systemd.pid == before, f"{harm.__name__} {path}: restarted: {named}"
    return named


@pytest.fixture
def host(monkeypatch):
    """In memory where there is such a place: much is written and synced there."""
    if os.geteuid():
        pytest.skip("files are given away, which root alone may do")
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        yield Host(monkeypatch, folder)


@pytest.mark.long
def test_every_harm_to_every_path_is_named_and_set_right(host):
    done = [(path, harm, check(host, path, harm)) for path, harm in cases(host)]
    assert len(done) > 200
    for path, harm, named in done:
        print(f"{harm.__name__} {path}: {'; '.join(named)}")


def test_a_harm_to_each_path_is_named_and_set_right(host):
    """Of each path another harm, so that every kind is among them."""
    by_path = {path: [harm for _, harm in group] for path, group in itertools.groupby(cases(host), lambda one: one[0])}
    for number, (path, harms) in enumerate(by_path.items()):
        check(host, path, harms[number % len(harms)])
