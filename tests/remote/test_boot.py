"""What a server of this host needs at a boot, from trees of /etc, /dev and /proc as hosts have them."""

from __future__ import annotations

import grp
import os
import stat
import types

import boot
import pytest

VIDEO = 44


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(boot, "ROOT", str(tmp_path))
    return tmp_path


@pytest.fixture
def node(root, monkeypatch):
    """Makes a device node that the tests may make: a file that counts as one, with this mode and group."""
    groups = {}
    real = os.stat

    def status(path, **more):
        found = real(path, **more)
        mode = stat.S_IFCHR | stat.S_IMODE(found.st_mode)
        return types.SimpleNamespace(st_mode=mode, st_gid=groups.get(str(path), 0))

    def made(name, mode, group=0):
        path = root / "dev" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        path.chmod(mode)
        groups[str(path)] = group

    monkeypatch.setattr(boot.os, "stat", status)
    return made


@pytest.fixture
def members(monkeypatch):
    """The members of the group `video`; other numbers have no name."""
    found = []

    def by_number(number):
        if number != VIDEO:
            raise KeyError(number)
        return types.SimpleNamespace(gr_name="video", gr_mem=found)

    monkeypatch.setattr(grp, "getgrgid", by_number)
    return found


def enable(root, unit, target="multi-user.target", folder="etc/systemd/system"):
    wants = root / folder / f"{target}.wants"
    wants.mkdir(parents=True, exist_ok=True)
    (wants / unit).symlink_to(f"/usr/lib/systemd/system/{unit}")


@pytest.mark.parametrize(
    ("unit", "kind"),
    [
        ("nvidia-fabricmanager.service", "gpu"),  # ollama/ollama#11963: CUDA says 802 until it is up
        ("nvidia-mig-manager.service", "gpu"),
        ("akmods.service", "gpu"),  # NixOS/nixpkgs#487054, ollama/ollama#7669: the module comes later than we
        ("dkms.service", "gpu"),
        ("tailscaled.service", "network"),  # nixos#12: the address comes with it
        ("wg-quick@wg0.service", "network"),
        ("openvpn-client@office\\x2dhq.service", "network"),
    ],
)
def test_a_unit_that_a_boot_starts_is_waited_for(root, unit, kind):
    assert boot.enabled_units() == {"gpu": [], "network": []}
    enable(root, unit)
    enable(root, "cron.service")
    assert boot.enabled_units() == {"gpu": [], "network": [], kind: [unit]}


def test_a_unit_that_runs_at_suspend_only_is_not_waited_for(root):
    enable(root, "nvidia-suspend.service", target="systemd-suspend.service")
    assert boot.enabled_units()["gpu"] == []


def test_nodes_that_all_may_open_need_no_group(node, members):
    node("nvidia0", 0o666)
    node("dri/renderD128", 0o666, VIDEO)
    assert boot.node_groups() == {"nvidia": [], "dri": []}


@pytest.mark.parametrize(
    ("name", "kind"), [("nvidia0", "nvidia"), ("nvmap", "nvidia"), ("kfd", "dri"), ("dri/card1", "dri")]
)
def test_the_group_of_a_node_that_others_may_not_open_is_found(node, members, name, kind):
    """ollama/ollama#2838, netdata/netdata#21359: nodes are 0660 root:video."""
    node(name, 0o660, VIDEO)
    assert boot.node_groups()[kind] == ["video"]


def test_a_group_without_a_name_is_its_number(node, members):
    node("nvidiactl", 0o660, 993)
    assert boot.node_groups()["nvidia"] == ["993"]


@pytest.mark.parametrize("mode", [0o600, 0o640], ids=oct)
def test_a_node_that_its_group_may_not_open_either_names_none(node, members, mode):
    node("nvidia0", mode, VIDEO)
    assert boot.node_groups()["nvidia"] == []


def test_root_s_group_is_no_way_out(node, members):
    node("nvidia0", 0o660, 0)
    assert boot.node_groups()["nvidia"] == []


def test_a_user_who_was_put_into_the_group_by_hand_needs_no_more(node, members):
    members.append("llamafleet")
    node("nvidia0", 0o660, VIDEO)
    assert boot.node_groups()["nvidia"] == []


def test_the_driver_tells_the_group_of_nodes_that_it_has_not_made(root, members):
    params = root / "proc/driver/nvidia/params"
    params.parent.mkdir(parents=True)
    params.write_text(f"ModifyDeviceFiles: 1\nDeviceFileUID: 0\nDeviceFileGID: {VIDEO}\nDeviceFileMode: {0o660}\n")
    assert boot.node_groups()["nvidia"] == ["video"]
    params.write_text(f"DeviceFileGID: {VIDEO}\nDeviceFileMode: {0o666}\n")
    assert boot.node_groups()["nvidia"] == []


@pytest.fixture
def gpus(root):
    for bus, minor in (("0000:01:00.0", 1), ("0000:41:00.0", 0), ("0001:C1:00.0", 2)):
        path = root / "proc/driver/nvidia/gpus" / bus / "information"
        path.parent.mkdir(parents=True)
        path.write_text(f"Model: \t\t NVIDIA L4\nBus Location: \t {bus}\nDevice Minor: \t {minor}\n")


def test_the_driver_counts_nodes_in_an_order_of_its_own(gpus):
    assert boot.minors() == {"0000:01:00.0": 1, "0000:41:00.0": 0, "0001:c1:00.0": 2}


def test_missing_nodes_of_all_gpus_are_made(gpus, tmp_path, monkeypatch):
    """NixOS/nixpkgs#73804: /dev/nvidia1 is missing. With -u the numbers are those of nvidia-uvm's nodes."""
    program = tmp_path / "nvidia-modprobe"
    calls = []
    monkeypatch.setattr(boot, "MODPROBE", str(program))
    monkeypatch.setattr(boot.subprocess, "run", lambda words: calls.append(words[1:]))
    boot.make_nodes()
    assert calls == []
    program.touch()
    boot.make_nodes()
    assert calls == [["-c255"], ["-c0", "-c1", "-c2"], ["-c0", "-u"]]
