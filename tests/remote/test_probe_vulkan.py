"""What the probe reads of Vulkan, from a stand-in for its loader; the real one is asked in tests/e2e/test_04_vulkan.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1]
PROGRAM = HERE.parent / "llamafleet" / "remote" / "probe_vulkan.py"


@pytest.fixture(scope="module")
def loader(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vulkan")
    options = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-Wl,-soname,libvulkan.so.1"]
    source = HERE / "fake_vulkan" / "fake_vulkan.c"
    subprocess.run(["cc", *options, "-o", str(folder / "libvulkan.so.1"), str(source)], check=True)
    return folder


def probe(folder, **environment):
    done = subprocess.run(
        [sys.executable, "-s", "-E", "-B", PROGRAM], capture_output=True, text=True, check=True,
        env={**os.environ, "LD_LIBRARY_PATH": str(folder), **environment},
    )  # fmt: skip
    return json.loads(done.stdout)


def test_devices_in_the_loaders_order_with_bus_and_memory(loader):
    found = probe(loader)
    assert found["problems"] == []
    assert found["devices"] == [
        # An integrated GPU has all the heaps, as ggml-vulkan counts them.
        {"index": 0, "name": "Intel Iris Xe", "kind": "integrated", "driver": "Intel open-source Mesa driver",
         "uuid": "10" * 16, "pci_bus_id": None, "memory_total_bytes": 28 << 30},
        {"index": 1, "name": "Intel Arc B580", "kind": "discrete", "driver": "Intel open-source Mesa driver",
         "uuid": "11" * 16, "pci_bus_id": "0000:3a:00.1", "memory_total_bytes": 12 << 30},
    ]  # fmt: skip


def test_a_loader_without_a_driver_is_named(loader):
    found = probe(loader, FAKE_VULKAN_FAILS="-9")  # VK_ERROR_INCOMPATIBLE_DRIVER
    assert found["devices"] == []
    assert found["problems"] == [
        "Vulkan: vkCreateInstance answers -9: is a driver for this GPU installed (mesa-vulkan-drivers)?"
    ]


def test_without_a_loader_there_is_nothing_to_tell(tmp_path):
    (tmp_path / "libvulkan.so.1").write_text("no library")  # found before any real one, and unusable
    assert probe(tmp_path) == {"devices": None, "problems": []}
