"""What a job may use and write."""

from __future__ import annotations

import json
import os

import pytest

from llamafleet.remote import job_limits

KINDS = ("build", "checkout", "fetch", "packages", "share", "toolkit", "switch", "refresh", "watch", "another")
GIB = 1 << 30


def value(directives, name):
    found = [one.partition("=")[2] for one in directives if one.startswith(name + "=")]
    assert len(found) <= 1, found
    return found[0] if found else None


@pytest.mark.parametrize("kind", KINDS)
def test_every_job_has_an_end_and_bounds(kind):
    found = job_limits.limits(kind)
    assert 600 <= int(value(found, "RuntimeMaxSec")) <= 8 * 86400 and int(value(found, "TasksMax")) > 0
    assert int(value(found, "MemoryMax")) >= GIB and value(found, "PrivateTmp") == "yes"


@pytest.mark.parametrize("kind", ["build", "checkout", "fetch", "packages", "share", "toolkit"])
def test_work_that_can_wait_gives_way_to_services(kind):
    found = job_limits.limits(kind)
    assert (value(found, "Nice"), value(found, "CPUWeight"), value(found, "IOWeight")) == ("10", "20", "20")
    assert int(value(found, "OOMScoreAdjust")) > 0


@pytest.mark.parametrize(
    ("kind", "paths"),
    [
        ("build", {"/opt/llamafleet/releases", "/var/lib/llamafleet/build", "/mnt/b", "/var/cache"}),
        ("checkout", {"/var/lib/llamafleet/src"}),
        ("fetch", {"/var/lib/llamafleet/models"}),
        ("share", set()),
        ("switch", {"/etc/systemd/system", "/etc/llamafleet", "/var/lib/llamafleet"}),
    ],
)
def test_a_job_writes_its_own_folders_and_its_log(kind, paths):
    found = job_limits.limits(kind, "/mnt/b")
    assert value(found, "ProtectSystem") == "strict" and value(found, "NoNewPrivileges") == "yes"
    writable = {word.strip('"').lstrip("-") for word in value(found, "ReadWritePaths").split()}
    assert paths | {"/var/lib/llamafleet/jobs", "/run/llamafleet"} <= writable
    assert not {"/", "/etc", "/usr", "/opt", "/var", "/run"} & writable


def test_a_download_that_takes_a_file_of_the_host_can_give_it_a_second_name(tmp_path, monkeypatch):
    """A folder that may be written to is a mount of its own, between which there are no hard links."""
    monkeypatch.setattr(job_limits, "JOBS", str(tmp_path))
    for name, url in (("fetch-a", "file:///srv/a.gguf"), ("fetch-b", "https://h/b.gguf")):
        (tmp_path / f"{name}.json").write_text(json.dumps({"files": [{"urls": [url]}]}))
    found = job_limits.for_job("fetch-a")
    assert value(found, "ReadWritePaths") is None and value(found, "ProtectSystem") == "full"
    assert value(found, "ProtectHome") == "read-only" and value(found, "NoNewPrivileges") == "yes"
    found = job_limits.for_job("fetch-b")
    assert value(found, "ReadWritePaths") and (value(found, "ProtectSystem"), value(found, "ProtectHome")) == (
        "strict",
        "yes",
    )


MEMINFO = "MemTotal: 65536000 kB\nMemAvailable: {} kB\nMapped: {} kB\nHugePages_Total: 0\n"


@pytest.mark.parametrize(
    ("available_gib", "mapped_gib", "gib"),
    [(40, 0, 39.5), (40, 30, 9.5), (2, 30, 1), (0.2, 0, 1)],  # a model that a server has mapped counts as free there
)
def test_a_build_has_the_memory_that_nothing_else_uses(tmp_path, available_gib, mapped_gib, gib):
    (tmp_path / "meminfo").write_text(MEMINFO.format(int(available_gib * 2**20), int(mapped_gib * 2**20)))
    assert job_limits.free_bytes(str(tmp_path / "meminfo")) == pytest.approx(gib * GIB, rel=0.01)


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    for name in ("JOBS", "BUILD", "SOURCE", "RELEASES"):
        monkeypatch.setattr(job_limits, name, str(tmp_path / name))
    (tmp_path / "JOBS").mkdir()
    return tmp_path


def test_a_build_may_write_to_the_cache_of_its_specification(jobs):
    (jobs / "JOBS/build-k1.json").write_text(json.dumps({"build_cache": str(jobs / "cache")}))
    assert str(jobs / "cache") in value(job_limits.for_job("build-k1"), "ReadWritePaths")
    assert {"BUILD", "SOURCE", "RELEASES", "cache"} <= set(os.listdir(jobs))


@pytest.mark.parametrize("text", [None, "{", "[1]", '{"build_cache": null}'])
def test_a_build_without_a_cache(jobs, text):
    if text:
        (jobs / "JOBS/build-k1.json").write_text(text)
    assert len(value(job_limits.for_job("build-k1"), "ReadWritePaths").split()) == 6
    assert not (jobs / "cache").exists()


def test_a_folder_of_any_name_is_one_word():
    assert '"-/mnt/a b\\\\c\\"d"' in value(job_limits.limits("build", '/mnt/a b\\c"d'), "ReadWritePaths")


def test_a_download_writes_to_the_disk_that_the_settings_name_and_where_its_folder_leads(tmp_path, monkeypatch):
    monkeypatch.setattr(job_limits, "JOBS", str(tmp_path))
    folder, old = tmp_path / "m-1", tmp_path / "old/m-1"
    old.mkdir(parents=True)
    folder.symlink_to(old)
    spec = {"directory": str(folder), "store": str(tmp_path / "big/m-1")}
    (tmp_path / "fetch-m-1.json").write_text(json.dumps(spec))
    paths = value(job_limits.for_job("fetch-m-1"), "ReadWritePaths")
    assert {f'"-{tmp_path}/big"', f'"-{old}"', '"-/var/lib/llamafleet/models"'} <= set(paths.split())
    assert (tmp_path / "big").is_dir()  # what is missing when the job starts would stay read-only
    (tmp_path / "fetch-m-1.json").write_text(json.dumps({"directory": str(tmp_path / "m-2")}))
    assert str(tmp_path / "big") not in value(job_limits.for_job("fetch-m-1"), "ReadWritePaths")


def test_the_folder_of_a_build_that_a_site_brings_is_made_for_its_job(tmp_path, monkeypatch):
    """A job may write to folders that are there when it starts."""
    monkeypatch.setattr(job_limits, "JOBS", str(tmp_path))
    monkeypatch.setattr(job_limits, "BUILDS", str(tmp_path / "builds"))
    (tmp_path / "fetch-build-1.json").write_text(json.dumps({"directory": str(tmp_path / "builds"), "files": []}))
    assert str(tmp_path / "builds") in value(job_limits.for_job("fetch-build-1"), "ReadWritePaths")
    assert (tmp_path / "builds").is_dir()
