"""A host's /proc, /sys and drivers for tests of the probe: files of the case's own, and a stand-in for NVML."""

import json
import os
from pathlib import Path

from tests import forked
from tests.fake_nvml import RTX4090

REMOTE = Path(__file__).parents[2] / "llamafleet" / "remote"
MIB = 1024 * 1024
GPU_PCI = {"vendor": "0x10de", "device": "0x2684", "class": "0x030000"}
OURS = "0::/system.slice/llama-server-chat.service\n"
OTHERS = "0::/system.slice/ollama.service\n"


class Host:
    """A host's /proc, /sys and NVML, as far as a case needs them."""

    def __init__(self, folder, library):
        self.root, self.state, self.library = folder / "root", folder / "state", library
        self.state.write_text(RTX4090.read_text())
        for name in ("meminfo", "cpuinfo"):
            self.file(f"proc/{name}", Path("/proc", name).read_text())

    def file(self, path, text=""):
        place = self.root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
        if path.startswith("dev/"):
            place.chmod(0o666)

    def pci(self, bus_id, **values):
        for name, text in values.items():
            self.file(f"sys/bus/pci/devices/{bus_id}/{name}", text + "\n")

    def nvml(self, *lines):
        """These lines first: the stand-in takes the first that it finds."""
        self.state.write_text("\n".join([*lines, RTX4090.read_text()]))

    def probe(self, *arguments, nvml=True):
        environment = dict(os.environ, FAKE_NVML_STATE=str(self.state))
        if nvml:
            environment["LD_LIBRARY_PATH"] = str(self.library.parent)
        result = forked.programs(environment.get("LD_LIBRARY_PATH")).run(
            [REMOTE / "probe.py", "--root", self.root, *arguments], env=environment
        )
        assert (result.returncode, result.stderr) == (0, ""), result.stderr
        return json.loads(result.stdout)


def the_problem(found):
    """The only problem; more or fewer is an error of its own."""
    (problem,) = found["problems"]
    return problem


def the_note(found):
    """The only note, and no problem."""
    assert found["problems"] == []
    (note,) = found["notes"]
    return note


def amd_card(host, card, bus_id, **files):
    """A card as amdgpu shows it: /sys/class/drm/cardN/device is a link to the PCI device."""
    host.pci(bus_id, vendor="0x1002", device="0x744c", **{"class": "0x030000"}, **files)
    (host.root / f"sys/class/drm/{card}").mkdir(parents=True)
    (host.root / f"sys/class/drm/{card}/device").symlink_to(host.root / f"sys/bus/pci/devices/{bus_id}")
