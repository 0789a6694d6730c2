"""Room on the disks of a host, from its own tables of mounts."""

from __future__ import annotations

import os

import common
import disks
import pytest


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """Writes /etc/fstab and the table of what is mounted."""

    def written(fstab="", mounted=("/",)):
        (tmp_path / "fstab").write_text(fstab)
        rows = [f"{n} 1 0:{n} / {path} rw shared:1 - ext4 /dev/vda rw\n" for n, path in enumerate(mounted)]
        (tmp_path / "mountinfo").write_text("".join(rows))

    monkeypatch.setattr(disks, "FSTAB", str(tmp_path / "fstab"))
    monkeypatch.setattr(disks, "MOUNTS", str(tmp_path / "mountinfo"))
    written()
    return written


def test_a_path_that_is_not_there_has_the_room_of_the_folder_above(tmp_path, tables):
    path = str(tmp_path / "a/b/c")
    found = disks.spaces([path, str(tmp_path)])
    one, other = found[path], found[str(tmp_path)]
    assert one["place"] == str(tmp_path) and one["device"] == other["device"]
    assert 0 < one["free_bytes"] <= os.statvfs(tmp_path).f_blocks * os.statvfs(tmp_path).f_frsize
    assert (one["mount"], one["unmounted"], one["read_only"]) == ("/", None, False)


def test_a_link_has_the_room_of_what_it_leads_to(tmp_path, tables):
    (tmp_path / "models").symlink_to("/dev/shm")
    found = disks.spaces([str(tmp_path / "models/x")])[str(tmp_path / "models/x")]
    assert found["place"] == "/dev/shm" and found["device"] == str(os.stat("/dev/shm").st_dev)


@pytest.mark.parametrize(
    ("mounted", "missing"),
    [(("/",), "/mnt/big disk"), (("/", "/mnt/big\\040disk"), None), (("/", "/mnt"), "/mnt/big disk")],
)
def test_a_disk_of_fstab_that_is_not_mounted_is_named(tables, mounted, missing):
    tables("# a remark\nUUID=1 / ext4 defaults 0 1\nUUID=2 none swap sw 0 0\n/dev/sdb1 /mnt/big\\040disk ext4 nofail 0 2\n"
           "x:/y /srv/nfs/ nfs noauto 0 0\n", mounted)  # fmt: skip
    assert disks.spaces(["/mnt/big disk/models"])["/mnt/big disk/models"]["unmounted"] == missing
    assert disks.spaces(["/mnt/big disks"])["/mnt/big disks"]["unmounted"] is None
    assert disks.spaces(["/srv/nfs/models"])["/srv/nfs/models"]["unmounted"] == "/srv/nfs"


def test_a_download_that_was_cut_off_counts_as_far_as_it_came(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "MODELS", str(tmp_path))
    (tmp_path / "m-1").mkdir()
    for name, size in ((".m.gguf.partial", 7), ("n.gguf", 5), ("n.gguf.verified", 99), (".o.gguf.rejected", 99)):
        (tmp_path / "m-1" / name).write_bytes(b"x" * size)
    assert disks.model_bytes() == {f"{tmp_path}/m-1/m.gguf": 7, f"{tmp_path}/m-1/n.gguf": 5}
