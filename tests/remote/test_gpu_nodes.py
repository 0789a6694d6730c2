"""Which groups open a host's GPUs: ollama#2838, netdata#21359 (nodes of mode 0660 and group video)."""

from __future__ import annotations

import os
import types

import gpu_nodes
import probe_files
import pytest


@pytest.fixture
def nodes(tmp_path, monkeypatch):
    """Make nodes of /dev: files with a mode, whose groups are given by hand, since only root may change them."""
    monkeypatch.setattr(probe_files, "ROOT", tmp_path)
    groups = {}

    def stat(path):
        found = list(os.stat(path))
        found[5] = groups[os.path.relpath(path, tmp_path / "dev")]
        return os.stat_result(found)

    monkeypatch.setattr(gpu_nodes, "stat", stat)
    monkeypatch.setattr(gpu_nodes, "name_of", {0: "root", 44: "video", 104: "render"}.get)

    def make(**nodes):
        for name, (mode, group) in nodes.items():
            path = tmp_path / "dev" / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            path.chmod(mode)
            groups[name.replace("__", "/")] = group
        return tmp_path

    return make


def test_nodes_for_everybody_need_no_group(nodes):
    nodes(nvidia0=(0o666, 0), nvidiactl=(0o666, 44))
    assert gpu_nodes.groups(gpu_nodes.NVIDIA) == [] and gpu_nodes.problems(gpu_nodes.NVIDIA) == []


def test_nvidias_nodes_of_a_group_give_that_group(nodes):
    nodes(nvidia0=(0o660, 44), nvidia1=(0o660, 44), nvidiactl=(0o666, 0))
    assert gpu_nodes.groups(gpu_nodes.NVIDIA) == ["video"] and gpu_nodes.problems(gpu_nodes.NVIDIA) == []
    assert gpu_nodes.groups(gpu_nodes.OTHERS) == []


def test_other_nodes_give_theirs(nodes):
    nodes(kfd=(0o660, 104), dri__renderD128=(0o660, 104), dri__card0=(0o660, 44))
    assert gpu_nodes.groups(gpu_nodes.OTHERS) == ["render"]


def test_the_group_that_the_driver_will_give_its_nodes_is_known_before(nodes):
    folder = nodes() / "proc/driver/nvidia"
    folder.mkdir(parents=True)
    (folder / "params").write_text("ModifyDeviceFiles: 1\nDeviceFileUID: 0\nDeviceFileGID: 44\nDeviceFileMode: 432\n")
    assert gpu_nodes.groups(gpu_nodes.NVIDIA) == ["video"]
    (folder / "params").write_text("DeviceFileGID: 0\nDeviceFileMode: 438\n")
    assert gpu_nodes.groups(gpu_nodes.NVIDIA) == []


@pytest.mark.parametrize(("mode", "group"), [(0o600, 44), (0o660, 0), (0o660, gpu_nodes.NOBODY), (0o640, 44)])
def test_a_node_that_no_group_opens_is_a_problem_with_the_way_out(nodes, mode, group):
    nodes(nvidia0=(mode, group))
    [text] = gpu_nodes.problems(gpu_nodes.NVIDIA)
    assert text.startswith(f"no permission: /dev/nvidia0 has mode {mode:04o}") and "udev rule" in text
    assert gpu_nodes.groups(gpu_nodes.NVIDIA) == []


def test_a_group_without_a_name_is_a_number():
    assert gpu_nodes.name_of(4_000_123) == "4000123"


def test_a_group_that_the_user_was_put_into_by_hand_is_not_named_again(nodes, monkeypatch):
    """Its server runs: naming the group would restart it."""
    nodes(nvidia0=(0o660, 44))
    monkeypatch.setattr(gpu_nodes, "has_our_user", lambda group: group == 44)
    assert gpu_nodes.groups(gpu_nodes.NVIDIA) == []


def test_who_is_in_a_group_is_read_from_the_host(monkeypatch):
    members = types.SimpleNamespace(gr_mem=["root", "llamafleet"])
    monkeypatch.setattr(gpu_nodes.grp, "getgrgid", {44: members, 45: types.SimpleNamespace(gr_mem=[])}.__getitem__)
    assert [gpu_nodes.has_our_user(group) for group in (44, 45, 46)] == [True, False, False]
