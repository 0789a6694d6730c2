"""What is left of earlier work: old things go, what somebody may need stays."""

from __future__ import annotations

import os

import pytest

from llamafleet.remote import common, prune

NOW = 1_800_000_000.0


@pytest.fixture
def host(tmp_path, monkeypatch):
    """Makes files of a given age in days, each in its folder; `left` prunes, and says what is still there."""
    for name in (
        "JOBS",
        "MODELS",
        "GATES",
        "STAGED",
        "GOOD",
        "UNITS",
        "OPT",
        "ETC",
        "VAR",
        "INSTANCES",
        "HELPERS",
        "RELEASES",
        "BUILDS",
    ):
        monkeypatch.setattr(prune, name, str(tmp_path / name))
        (tmp_path / name).mkdir()
    monkeypatch.setattr(prune, "running_jobs", lambda: {"build-running"})

    class Host:
        @staticmethod
        def put(path, days=0.0):
            file = tmp_path / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("x")
            os.utime(file, (NOW - days * prune.DAY,) * 2)
            os.utime(file.parent, (NOW - days * prune.DAY,) * 2)

        @staticmethod
        def left(folder):
            prune.prune(NOW)
            return sorted(os.listdir(tmp_path / folder))

    return Host


def test_old_jobs_go_whole_and_running_ones_stay(host):
    for end in ("log", "exit", "json"):
        host.put(f"JOBS/build-old.{end}", 31)
        host.put(f"JOBS/build-running.{end}", 31)
        host.put(f"JOBS/build-young.{end}", 29)
    host.put("JOBS/fetch-a.json", 40)
    host.put("JOBS/fetch-a.log", 1)  # it ended yesterday
    host.put("JOBS/notes.txt", 99)  # not ours
    assert host.left("JOBS") == [
        *(f"build-running.{end}" for end in ("exit", "json", "log")),
        *(f"build-young.{end}" for end in ("exit", "json", "log")),
        "fetch-a.json", "fetch-a.log", "notes.txt",
    ]  # fmt: skip


def test_of_many_jobs_of_a_kind_the_newest_stay(host):
    for number in range(prune.KEPT_JOBS + 5):
        host.put(f"JOBS/switch-{number:02}.log", number / 100)
        host.put(f"JOBS/watch-{number % 3}.log", number / 100)
    assert host.left("JOBS") == [*(f"switch-{number:02}.log" for number in range(prune.KEPT_JOBS)),
                                 *(f"watch-{number}.log" for number in range(3))]  # fmt: skip


def test_what_lay_in_the_way_goes_after_a_while_and_nobody_else_s_files_do(host):
    for folder in ("INSTANCES/m", "VAR", "GOOD/m"):
        host.put(f"{folder}/.plan.json.rejected", 31)
        host.put(f"{folder}/plan.json.rejected", 31)
        assert host.left(folder) == ["plan.json.rejected"]
    host.put("UNITS/.llama-server-m.service.rejected", 31)
    host.put("UNITS/.nginx.service.rejected", 31)
    assert host.left("UNITS") == [".nginx.service.rejected"]


def test_what_is_set_aside_stays_for_a_while_however_old_it_is(host, tmp_path):
    host.put("MODELS/m-1/m.gguf", 400)
    common.set_aside(str(tmp_path / "MODELS/m-1/m.gguf"))
    prune.prune()
    assert os.listdir(tmp_path / "MODELS/m-1") == [".m.gguf.rejected"]


def test_rejected_files_go_after_a_while_and_no_model_does(host):
    host.put("MODELS/m-1/.m.gguf.rejected", 31)
    host.put("MODELS/m-1/.n.gguf.rejected", 29)
    host.put("MODELS/m-1/m.gguf", 400)
    host.put("MODELS/m-1/.m.gguf.partial", 400)
    assert host.left("MODELS/m-1") == [".m.gguf.partial", ".n.gguf.rejected", "m.gguf"]


def test_records_of_instances_that_are_gone_go(host):
    for name in ("gone", "installed", "good"):
        host.put(f"GATES/{name}.json", 31)
        host.put(f"GATES/{name}.liveness.json", 31)
        host.put(f"GATES/liveness/{name}.json", 31)
    host.put("GATES/lately.json", 29)
    host.put("UNITS/llama-server-installed.service")
    host.put("GOOD/good/plan.json")
    assert host.left("GATES") == ["good.json", "good.liveness.json", "installed.json", "installed.liveness.json",
                                  "lately.json", "liveness"]  # fmt: skip
    assert host.left("GATES/liveness") == ["good.json", "installed.json"]


def test_what_a_killed_run_staged_goes_with_its_keys(host):
    host.put("STAGED/old/api-keys", 1.5)
    host.put("STAGED/new/api-keys", 0.5)
    host.put("MODELS/.preflight-old/tiny.gguf", 1.5)
    assert host.left("STAGED") == ["new"]
    assert host.left("MODELS") == []


def test_a_link_is_removed_and_not_followed(host, tmp_path):
    host.put("kept/file")
    (tmp_path / "STAGED/link").symlink_to(tmp_path / "kept")
    os.utime(tmp_path / "STAGED/link", (0, 0), follow_symlinks=False)
    assert host.left("STAGED") == [] and host.left("kept") == ["file"]


def test_on_a_bare_host_there_is_nothing_to_do(monkeypatch, tmp_path):
    for name in ("JOBS", "MODELS", "GATES", "STAGED"):
        monkeypatch.setattr(prune, name, str(tmp_path / "missing"))
    prune.prune(NOW)
    assert os.listdir(tmp_path) == []


def test_running_jobs_are_those_that_systemd_lists(monkeypatch):
    lines = (
        "llamafleet-job-build-1.service loaded active running x\nllamafleet-gate-a.service loaded active running x\n\n"
    )
    monkeypatch.setattr(common, "output_of", lambda command: lines)
    assert common.running_jobs() == {"build-1"}


def test_tunes_of_instances_that_are_gone_go_after_a_while(host):
    for name, days in (("gone", 31), ("young", 29), ("there", 99), ("kept", 99)):
        host.put(f"VAR/tune/{name}/trials.jsonl", days)
        host.put(f"VAR/tuned/{name}.json", days)
    host.put("UNITS/llama-server-there.service")
    host.put("GOOD/kept/plan.json")
    assert host.left("VAR/tune") == ["kept", "there", "young"]
    assert host.left("VAR/tuned") == ["kept.json", "there.json", "young.json"]


def test_archives_for_other_hosts_go_after_a_day(host):
    host.put("BUILDS/new.tar", 0.5)
    host.put("BUILDS/old.tar", 1.5)
    assert host.left("BUILDS") == ["new.tar"]
