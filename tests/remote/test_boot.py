"""What a server of this host needs at a boot, from trees of /etc, /dev and /proc as hosts have them."""

from __future__ import annotations

import boot
import pytest


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(boot, "ROOT", str(tmp_path))
    return tmp_path


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
