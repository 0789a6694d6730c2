"""Whether a host's disks hold what a run brings, decided before anything is compiled or downloaded."""

from __future__ import annotations

import dataclasses

import pytest

from llamafleet.host.backends import TRAITS
from llamafleet.host.left import Left, Space
from llamafleet.hub.source import ModelFiles, RemoteFile
from llamafleet.remote.common import BUILD, MODELS, RELEASES
from llamafleet.service import disks
from llamafleet.service.changes import changes_needed
from llamafleet.service.desired import Desired
from tests import planning
from tests.service.test_desired import decide, survey

GIB = 2**30
SIZE = 12 * GIB


def space(free, device="1", mount="/", **more):
    return Space(place=mount, device=device, free_bytes=int(free), mount=mount, **more)


def everywhere(free):
    return dict.fromkeys((BUILD, RELEASES, "/usr", "/var/cache", MODELS, "/mnt/big"), space(free))


def decided(spaces, *, model_bytes=(), installed=(), size=SIZE, **asked):
    """What is decided for a model of that size; `installed` are differences of what is there."""
    settings = planning.settings({"source": "hf:a/b/m.gguf", "context_tokens": 4096}, **asked)
    model = ModelFiles((RemoteFile("m.gguf", "https://x/m.gguf", size, "a" * 64),), planning.header("Qwen3-8B"))
    folder = f"{MODELS}/{model.folder}"
    sizes = {path.replace("FOLDER", folder): bytes_ for path, bytes_ in dict(model_bytes).items()}
    read = survey(left=Left(spaces=spaces, model_bytes=sizes), **dict(installed))
    outcome = decide(settings, read, {"m0": model})
    assert isinstance(outcome, Desired), outcome
    return outcome, folder


def refusal(spaces, **asked):
    """The whole text; empty where the host is not left out."""
    outcome, _ = decided(spaces, **asked)
    found = disks.refusal(outcome, changes_needed(outcome, outcome.installed))
    return str(found) if found else ""


def test_a_disk_that_holds_all_is_no_reason():
    assert refusal(everywhere(14 * GIB)) == ""


def test_a_disk_that_holds_the_model_alone_is_one():
    """Model, build and release on one disk are added up; what must stay free is counted once."""
    assert refusal(everywhere(13 * GIB)) == (
        "disks: 13.0 GiB are free on the file system at /, 13.1 GiB are needed (the model m.gguf 12.0 GiB at "
        "/var/lib/llamafleet/models, compiling llama.cpp 0.1 GiB at /var/lib/llamafleet/build, the release of llama.cpp "
        "0.0 GiB at /opt/llamafleet/releases; 1.0 GiB stay free): free 0.1 GiB; or take a smaller quantisation, or a disk "
        "with more room (models_dir)"
    )


def test_each_disk_is_judged_by_what_it_gets():
    spaces = {**everywhere(GIB), MODELS: space(13 * GIB, device="2", mount="/var/lib/llamafleet/models")}
    assert refusal(spaces) == ""
    text = refusal({**spaces, BUILD: space(2**20, device="3", mount="/var")})
    assert "0.0 GiB are free on the file system at /var" in text and "models_dir" not in text


def test_a_model_on_another_disk_needs_no_room_here():
    spaces = {**everywhere(GIB), "/mnt/big": space(13 * GIB, device="2", mount="/mnt/big")}
    assert refusal(spaces, models_dir="/mnt/big") == ""
    assert "12.0 GiB at /mnt/big" in refusal({**spaces, "/mnt/big": space(GIB, device="2")}, models_dir="/mnt/big")


def test_a_download_goes_on_from_where_it_was_cut_off():
    spaces = everywhere(3 * GIB)
    assert "free" in refusal(spaces)
    assert refusal(spaces, model_bytes={"FOLDER/m.gguf": 11 * GIB}) == ""


def test_models_that_no_instance_uses_are_named_the_largest_first():
    old = {f"{MODELS}/a-1/a.gguf": 2 * GIB, f"{MODELS}/b-1/b-1.gguf": 3 * GIB, f"{MODELS}/b-1/b-2.gguf": 3 * GIB}
    text = refusal(everywhere(GIB), model_bytes={**old, "FOLDER/m.gguf": GIB})
    assert f"no instance uses {MODELS}/b-1 (6.0 GiB), {MODELS}/a-1 (2.0 GiB);" in text


def test_a_host_on_which_nothing_is_to_be_written_may_be_full():
    outcome, folder = decided(everywhere(0))
    there = {"models": {f"{folder}/m.gguf": "a" * 64}, "releases": {outcome.build.key: {}}}
    assert refusal(everywhere(0), installed=there) == ""
    assert "0.0 GiB are free" in refusal(everywhere(0), installed={**there, "releases": {}})


def test_of_a_split_model_the_files_that_are_missing_count():
    outcome, _ = decided(everywhere(0))
    files = tuple(RemoteFile(f"m-{n}.gguf", "https://x/m.gguf", SIZE, "a" * 64) for n in (1, 2))
    serving = dataclasses.replace(outcome.servings[0], model=ModelFiles(files, planning.header("Qwen3-8B")))
    first = f"{serving.folder}/m-1.gguf"
    there = dataclasses.replace(outcome.installed, models={first: "a" * 64})
    assert list(disks.missing_bytes(serving.folder, serving.model, there)) == [SIZE]
    assert list(disks.missing_bytes(serving.folder, serving.model, outcome.installed)) == [SIZE, SIZE]


def test_a_file_of_the_host_s_own_may_take_no_space():
    outcome, _ = decided(everywhere(0))
    file = RemoteFile("m.gguf", "file:///srv/m.gguf", SIZE, "a" * 64, place="host")
    serving = dataclasses.replace(outcome.servings[0], model=ModelFiles((file,), planning.header("Qwen3-8B")))
    assert list(disks.missing_bytes(serving.folder, serving.model, outcome.installed)) == []


@pytest.mark.parametrize("size", [None, 0])
def test_a_size_that_is_not_known_is_no_reason(size):
    assert refusal(everywhere(2 * GIB), size=size) == ""


def test_a_host_that_does_not_tell_is_not_left_out():
    assert refusal({}) == ""


def test_a_disk_that_is_not_mounted_is_not_replaced_by_the_one_below():
    spaces = {**everywhere(100 * GIB), "/mnt/big": space(100 * GIB, unmounted="/mnt/big")}
    assert refusal(spaces, models_dir="/mnt/big") == (
        "disks: /mnt/big: nothing is mounted at /mnt/big, where /etc/fstab has a disk: mount it (mount /mnt/big), or the "
        "model m.gguf would be written to another one"
    )
    assert refusal(spaces) == ""  # nothing is written there


def test_a_disk_that_may_not_be_written_to_is_said():
    text = refusal(dict.fromkeys(everywhere(0), space(100 * GIB, read_only=True)))
    assert text == "disks: the file system at / is mounted read-only: see dmesg there, and mount it for writing"


def test_packages_and_a_toolkit_are_counted():
    outcome, _ = decided(everywhere(14 * GIB))
    changes = changes_needed(outcome, outcome.installed)
    with_both = dataclasses.replace(changes, packages=("cmake",), toolkit=True)
    assert disks.refusal(outcome, changes) is None
    text = str(disks.refusal(outcome, with_both))
    assert "the CUDA toolkit 3.0 GiB at /usr, its packages 2.0 GiB at /var/cache, packages 0.1 GiB at /usr" in text


def test_every_place_that_a_run_fills_is_asked_for():
    settings = planning.settings({}, models_dir="/mnt/big", build_cache="/mnt/builds")
    assert set(disks.paths(settings)) == {BUILD, RELEASES, "/usr", "/var/cache", MODELS, "/mnt/big", "/mnt/builds"}


def test_every_backend_has_the_sizes_of_its_build():
    assert set(TRAITS) == set(disks.TREE_BYTES) == set(disks.RELEASE_BYTES)


def test_a_build_cache_gets_what_is_compiled():
    spaces = {**everywhere(20 * GIB), "/mnt/builds": space(2**20, device="2", mount="/mnt/builds")}
    assert "0.0 GiB are free on the file system at /mnt/builds" in refusal(spaces, build_cache="/mnt/builds")
    assert refusal(spaces) == ""
