"""Every GPU and accelerator on the PCI bus is used, left out with its reason, or the host is refused: the probe's program
on hosts as public reports have them, and what the planner makes of its answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import probe_files
import probe_pci
import pytest

from llamafleet.host.machine import Machine
from llamafleet.planner.backend import resolve_backend
from llamafleet.planner.devices import left_out
from llamafleet.planner.result import Plan, Refusal
from tests import planning
from tests.remote.probing import GPU_PCI, REMOTE, amd_card

AMD_PCI = {"vendor": "0x1002", "device": "0x74a1", "class": "0x120000"}
ARC = {"vendor": "0x8086", "device": "0x56a0", "class": "0x030000"}
BMC = {"vendor": "0x1a03", "device": "0x2000", "class": "0x030000"}
KERNEL = "6.12.1-test"
MODULE = f"lib/modules/{KERNEL}/updates/dkms/nvidia.ko.xz"
SECURE_BOOT = "sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"


def bound(host, bus_id, driver):
    """Bind the device to a driver, as sysfs shows it."""
    (host.root / f"sys/bus/pci/drivers/{driver}").mkdir(parents=True, exist_ok=True)
    (host.root / f"sys/bus/pci/devices/{bus_id}/driver").symlink_to(host.root / f"sys/bus/pci/drivers/{driver}")


def in_container(host, kind):
    host.file("run/systemd/container", kind + "\n")


def machine(host, **options):
    return Machine.from_json(host.probe(**options))


def choice(machine, **settings):
    """The backend, or the text of the refusal; and why devices are left out."""
    asked = planning.settings(**settings)
    backend = resolve_backend(machine, asked)
    if isinstance(backend, Refusal):
        return "; ".join([backend.reason, *backend.suggestions]), ()
    return backend, left_out(machine, backend, asked)


def refusal(machine, **settings):
    text, _ = choice(machine, **settings)
    assert text not in ("cuda", "hip", "vulkan", "cpu")
    return text


# --- which devices there are --------------------------------------------------------------------------------------


def test_an_mi300x_is_a_processing_accelerator_and_seen(host):
    """apache/cloudstack#11701: AMD's data-centre cards have PCI class 0x1200."""
    amd_card(host, "card1", "0000:05:00.0", mem_info_vram_total=str(192 * 2**30), mem_info_vram_used="0")
    host.pci("0000:05:00.0", **AMD_PCI)
    node = "sys/class/kfd/kfd/topology/nodes/1"
    host.file(f"{node}/properties", "location_id 1280\ndomain 0\ngfx_target_version 90402\n")
    found = machine(host, nvml=False)
    assert [(gpu.vendor, gpu.gfx, gpu.usable) for gpu in found.gpus] == [("amd", "gfx942", True)]
    assert choice(found) == ("hip", ())


def test_an_mi300x_without_its_driver_is_refused_by_name(host):
    """apache/cloudstack#11701, before amdgpu is loaded: no plan for the CPU."""
    host.pci("0000:05:00.0", **AMD_PCI)
    assert "AMD GPU 0x74a1 at 0000:05:00.0: no driver is bound to it" in refusal(machine(host, nvml=False))


def test_a_divided_accelerator_is_named(host):
    """In CPX mode each of the eight partitions is a device for HIP, at one bus address."""
    amd_card(host, "card1", "0000:05:00.0", mem_info_vram_total=str(192 * 2**30))
    for number in range(8):
        node = f"sys/class/kfd/kfd/topology/nodes/{number}"
        host.file(f"{node}/properties", "location_id 1280\ndomain 0\ngfx_target_version 90402\n")
    assert "divided into 8 compute partitions" in refusal(machine(host, nvml=False))


def test_intel_arc_is_used_through_vulkan(host, tmp_path):
    """ollama#1590, lemonade#3508: under `auto` the host was planned for its CPU without a word."""
    host.pci("0000:3a:00.1", **{**ARC, "device": "0xe20b"})
    bound(host, "0000:3a:00.1", "xe")
    library = tmp_path / "vulkan"
    library.mkdir()
    source = REMOTE.parents[1] / "tests/fake_vulkan/fake_vulkan.c"
    options = ["-std=gnu11", "-shared", "-fPIC", "-Wl,-soname,libvulkan.so.1", "-o", str(library / "libvulkan.so.1")]
    subprocess.run(["cc", *options, str(source)], check=True)
    command = [sys.executable, "-s", "-E", str(REMOTE / "probe.py"), "--root", str(host.root)]
    done = subprocess.run(
        command, env={**os.environ, "LD_LIBRARY_PATH": str(library)}, stdout=subprocess.PIPE, check=True
    )
    found = Machine.from_json(json.loads(done.stdout))
    backend, reasons = choice(found)
    assert backend == "vulkan"
    # The integrated GPU that Vulkan lists too is left out.
    assert reasons == (
        "GPU0 (Intel Iris Xe) is not used: it is integrated and shares the RAM, beside a card with memory of its own",
    )
    [plan] = planning.plans(found, [("Llama-3.2-3B",)], planning.settings({"context_tokens": 4096}))
    assert isinstance(plan, Plan) and [gpu.name for gpu in plan.gpus] == ["Intel Arc B580"]
    assert plan.environment == {"GGML_VK_VISIBLE_DEVICES": "1"}


def test_intel_arc_without_vulkan_is_refused_by_name(host, tmp_path):
    """ollama#1590: nothing that would list the card is installed yet."""
    (tmp_path / "libvulkan.so.1").write_text("no library")  # found before any real one, and unusable
    host.pci("0000:03:00.0", **ARC)
    bound(host, "0000:03:00.0", "i915")
    host.library = tmp_path / "libvulkan.so.1"
    text = refusal(machine(host))
    assert "Intel Arc A770 at 0000:03:00.0: it needs Vulkan, which is not installed: install" in text
    assert "mesa-vulkan-drivers" in text and 'backend = "cpu"' in text


@pytest.mark.parametrize(
    ("bus_id", "identifier", "kind"),
    [
        ("0000:00:02.0", "0xa780", "integrated"),
        ("0000:00:10.0", "0x46a6", "integrated"),  # given to a virtual machine
        ("0000:00:10.0", "0xe20b", "gpu"),  # a card, likewise
        ("0000:03:00.0", "0x56a5", "gpu"),
        ("0000:4d:00.0", "0x0bda", "gpu"),  # Data Center GPU Max
        ("0000:03:00.0", "0xf000", "gpu"),  # of a later generation
    ],
)
def test_intels_cards_are_told_from_integrated_gpus(host, monkeypatch, bus_id, identifier, kind):
    host.pci(bus_id, **{**ARC, "device": identifier})
    monkeypatch.setattr(probe_files, "ROOT", host.root)
    assert [one["kind"] for one in probe_pci.pci_gpus()] == [kind]


def test_intels_integrated_gpu_and_npu_are_left_out_and_said_so(host):
    host.pci("0000:00:02.0", vendor="0x8086", device="0x7d55", **{"class": "0x030000"})
    host.pci("0000:00:0b.0", vendor="0x8086", device="0x7d1d", **{"class": "0x120000"})
    backend, reasons = choice(machine(host, nvml=False))
    assert backend == "cpu"
    assert reasons == (
        "Intel integrated GPU 0x7d55 at 0000:00:02.0 is not used: it is integrated and shares the RAM; "
        'backend = "vulkan" uses it',
        "Intel NPU 0x7d1d at 0000:00:0b.0 is not used: llama.cpp uses no NPU",
    )


def test_a_servers_management_display_is_left_out_and_said_so(host):
    host.pci("0000:02:00.0", **BMC)
    host.pci("0000:07:00.0", vendor="0x1da3", device="0x1020", **{"class": "0x120000"})
    backend, reasons = choice(machine(host, nvml=False))
    assert backend == "cpu"
    assert reasons == (
        "ASPEED display 0x2000 at 0000:02:00.0 is not used: llama.cpp has no backend for this display chip",
        "Habana accelerator 0x1020 at 0000:07:00.0 is not used: llamafleet builds no backend of llama.cpp for it",
    )


def test_a_ryzens_gpu_beside_a_card_is_left_out_and_said_so(host):
    """ollama#10204: every desktop with socket AM5 has an integrated Radeon."""
    host.pci("0000:01:00.0", **GPU_PCI)
    amd_card(host, "card1", "0000:0e:00.0", mem_info_vram_total=str(2**29), mem_info_gtt_total=str(2**34))
    backend, reasons = choice(machine(host))
    assert backend == "cuda"
    assert reasons == (
        "GPU1 (AMD GPU 0x744c) is not used: it is integrated and shares the RAM, beside a card with memory of its own",
    )


def test_a_ryzens_gpu_beside_a_radeon_is_left_out_too(host):
    """ollama#10204 with a Radeon: both are HIP's, and one plan over both would take the card's memory for the RAM."""
    amd_card(host, "card0", "0000:03:00.0", mem_info_vram_total=str(24 * 2**30), unique_id="abc")
    amd_card(host, "card1", "0000:0e:00.0", mem_info_vram_total=str(2**29), mem_info_gtt_total=str(2**34))
    found = machine(host, nvml=False)
    [plan] = planning.plans(found, [("Llama-3.1-8B",)], planning.settings({"context_tokens": 8192}))
    assert (plan.backend, [gpu.pci_bus_id for gpu in plan.gpus]) == ("hip", ["0000:03:00.0"])
    # The reserve of a GPU, not that of a memory that is shared with the host.
    assert (plan.ledger[0].capacity_bytes, plan.ledger[0].reserve_bytes) == (24 * 2**30, 2**30)
    assert [why for why in plan.why if why.startswith("GPU1 (AMD GPU 0x744c) is not used: it is integrated")]
    assert any("0000:0e:00.0" in note for note in found.notes)


def test_a_ryzens_gpu_does_not_stand_in_for_a_card_that_is_lost(host):
    host.pci("0000:01:00.0", **GPU_PCI)
    amd_card(host, "card1", "0000:0e:00.0", mem_info_vram_total=str(2**29), mem_info_gtt_total=str(2**34))
    text = refusal(machine(host, nvml=False))
    assert "NVIDIA GPU 0x2684 at 0000:01:00.0" in text and "name the GPUs to use in gpus" in text
    assert choice(machine(host, nvml=False), gpus=["0000:0e:00.0"])[0] == "hip"


def test_one_of_two_cards_off_the_bus_is_named_in_the_plan(host):
    """One of two cards is lost: NVML counts one, PCI shows two, the second of which answers with ones alone."""
    host.pci("0000:01:00.0", **GPU_PCI)
    host.pci("0000:02:00.0", **GPU_PCI)
    (host.root / "sys/bus/pci/devices/0000:02:00.0/config").write_bytes(b"\xff" * 64)
    found = machine(host)
    [plan] = planning.plans(found, [("Llama-3.2-3B",)], planning.settings({"context_tokens": 4096}))
    said = "does not answer on the PCI bus (fallen off the bus): check power, cables and riser, then reboot"
    assert [text for text in plan.why if "is not used" in text] == [
        f"NVIDIA GPU 0x2684 at 0000:02:00.0 is not used: it {said}"
    ]
    assert plan.problems == (f"NVIDIA GPU 0x2684 at 0000:02:00.0: it {said}",)
    assert plan.to_json()["problems"] == list(plan.problems)


def test_a_virtual_function_is_left_out(host):
    host.pci("0000:41:00.0", **GPU_PCI)
    host.pci("0000:41:00.4", **GPU_PCI)
    (host.root / "sys/bus/pci/devices/0000:41:00.4/physfn").symlink_to(host.root / "sys/bus/pci/devices/0000:41:00.0")
    host.nvml("device0.bus_id=00000000:41:00.0")
    assert choice(machine(host)) == (
        "cuda", ("NVIDIA GPU 0x2684 at 0000:41:00.4 is not used: it is a virtual function, for virtual machines",)
    )  # fmt: skip


def test_a_card_that_a_virtual_machine_has_is_left_out_or_refused(host):
    """A Proxmox host: vfio-pci holds one of the cards, or the only one."""
    for bus_id in ("0000:01:00.0", "0000:02:00.0"):
        host.pci(bus_id, **GPU_PCI)
    bound(host, "0000:02:00.0", "vfio-pci")
    said = "vfio-pci holds it for virtual machines"
    backend, [reason] = choice(machine(host))
    assert backend == "cuda" and said in reason
    text = refusal(machine(host, nvml=False), gpus=["0000:02:00.0"])
    assert said in text and 'backend = "cpu"' in text


# --- why a driver does not list a GPU -----------------------------------------------------------------------------


def diagnosis(host, **options):
    host.pci("0000:01:00.0", **GPU_PCI)
    host.file("proc/sys/kernel/osrelease", KERNEL)
    return refusal(machine(host, **options))


def test_a_driver_upgraded_since_the_boot_says_reboot(host):
    """lyulyul/shine-cluster#30: the operator read "no driver lists it"."""
    host.file("proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.1.2  Wed Jan 1 2025\n")
    host.pci("0000:01:00.0", **GPU_PCI)
    bound(host, "0000:01:00.0", "nvidia")
    host.nvml("init=18")
    found = machine(host)
    assert len(found.problems) == 1  # said once
    text = refusal(found)
    assert "the loaded kernel module is 570.1.2 but libnvidia-ml.so.1 is" in text and "reboot needed" in text


def test_secure_boot_is_named(host):
    """NVIDIA/ubuntu-packaging-nvidia-driver#3: the module is there, and the kernel refuses it."""
    host.file(MODULE)
    place = host.root / SECURE_BOOT
    place.parent.mkdir(parents=True)
    place.write_bytes(b"\x06\0\0\0\x01")
    text = diagnosis(host, nvml=False)
    assert "Secure Boot is on and does not let the kernel load the module nvidia" in text and "mokutil --import" in text
    place.write_bytes(b"\x06\0\0\0\0")
    assert "modprobe nvidia" in diagnosis(host, nvml=False)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"lib/modules/6.9.0-other/kernel/a.ko": ""}, [f"the running kernel {KERNEL} are gone", "reboot"]),
        ({f"lib/modules/{KERNEL}/modules.dep": "", "lib/modules/6.9.0-other/extra/nvidia.ko.zst": ""},
         ["was built for kernel 6.9.0-other", f"headers of {KERNEL}"]),
        ({f"lib/modules/{KERNEL}/modules.dep": ""}, ["install NVIDIA's driver"]),
        ({"sys/module/nvidia/version": "580"}, ["is loaded and does not take it"]),
        ({"dev/kmsg": "4,1,1,-;Lockdown: modprobe: unsigned module loading is restricted\n"},
         ["the kernel logged: Lockdown: modprobe: unsigned module loading"]),
    ],
    ids=["kernel_updated", "module_of_another_kernel", "no_driver", "too_old_for_it", "kernel_log"],
)  # fmt: skip
def test_why_no_driver_is_bound(host, files, words):
    for path, content in files.items():
        host.file(path, content)
    text = diagnosis(host, nvml=False)
    assert [word for word in words if word not in text] == []


def test_nouveau_is_named(host):
    host.pci("0000:01:00.0", **GPU_PCI)
    bound(host, "0000:01:00.0", "nouveau")
    text = diagnosis(host, nvml=False)
    assert "nouveau drives it: install NVIDIA's driver" in text and "reboot" in text


def test_a_kernel_without_mode_setting_is_named(host):
    host.file("proc/cmdline", "root=/dev/sda1 nomodeset quiet")
    host.pci("0000:03:00.0", vendor="0x1002", device="0x744c", **{"class": "0x030000"})
    assert "started with nomodeset" in refusal(machine(host, nvml=False))


def test_the_kernels_own_line_about_a_lost_gpu_is_given(host):
    host.file("dev/kmsg", "4,1,1,-;NVRM: Xid (PCI:0000:09:00): 13, of another\n"
                          "4,1,2,-;NVRM: Xid (PCI:0000:01:00): 79, GPU has fallen off the bus.\n")  # fmt: skip
    host.pci("0000:01:00.0", **GPU_PCI)
    bound(host, "0000:01:00.0", "nvidia")
    host.nvml("count=0")
    text = refusal(machine(host))
    assert "nvidia drives it and does not list it" in text
    assert "the kernel logged: NVRM: Xid (PCI:0000:01:00): 79, GPU has fallen off the bus." in text


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["init=4"], "no permission to open /dev/nvidia*"),
        (["device0.handle=19"], "the GPU is busy"),
        (["device0.compute_mode=2"], "its compute mode is Prohibited"),
        (["device0.compute_mode=3", "device0.processes_list=20:900"], "it is busy: its compute mode is Exclusive_Process"),
        (["device0.memory=15"], "fallen off the bus"),
    ],
)  # fmt: skip
def test_what_nvml_says_is_in_the_refusal(host, lines, words):
    host.pci("0000:01:00.0", **GPU_PCI)
    bound(host, "0000:01:00.0", "nvidia")
    host.nvml(*lines)
    assert words in refusal(machine(host))


# --- containers ---------------------------------------------------------------------------------------------------


def nvidia_minor(host, bus_id, minor):
    host.pci(bus_id, **GPU_PCI)
    host.file(f"proc/driver/nvidia/gpus/{bus_id}/information", f"Model: \t NVIDIA\nDevice Minor: \t {minor}\n")


def test_a_container_that_was_given_one_of_two_cards(host):
    """Proxmox and LXC: /sys shows the whole machine's devices, also those that the container may not open."""
    in_container(host, "lxc")
    nvidia_minor(host, "0000:01:00.0", 0)
    nvidia_minor(host, "0000:02:00.0", 1)
    for node in ("nvidiactl", "nvidia0"):
        host.file(f"dev/{node}")
    found = machine(host)
    backend, [reason] = choice(found)
    assert backend == "cuda" and found.container == "lxc" and found.problems == ()
    assert "0000:02:00.0 is not used: it is not given to this container (lxc), which has no /dev/nvidia1" in reason


def test_a_container_that_was_given_no_card_is_refused_with_the_way_out(host):
    in_container(host, "docker")
    nvidia_minor(host, "0000:01:00.0", 0)
    text = refusal(machine(host, nvml=False))
    assert "not given to this container (docker)" in text and "--gpus" in text and 'backend = "cpu"' in text


def test_a_container_without_amds_compute_node(host):
    in_container(host, "podman")
    amd_card(host, "card0", "0000:03:00.0", mem_info_vram_total=str(24 * 2**30))
    host.file("sys/bus/pci/devices/0000:03:00.0/drm/renderD128/dev")
    host.file("dev/dri/renderD128")
    assert "which has no /dev/kfd" in refusal(machine(host, nvml=False))


def test_a_container_that_was_given_the_second_of_two_radeons(host):
    """/sys lists both; HIP counts what it may open."""
    in_container(host, "lxc")
    for number, bus_id in enumerate(("0000:03:00.0", "0000:04:00.0")):
        amd_card(host, f"card{number}", bus_id, mem_info_vram_total=str(24 * 2**30), unique_id=str(number))
        host.file(f"sys/bus/pci/devices/{bus_id}/drm/renderD{128 + number}/dev")
    host.file("dev/dri/renderD129")
    host.file("dev/kfd")
    found = machine(host, nvml=False)
    [plan] = planning.plans(found, [("Llama-3.2-3B",)], planning.settings({"context_tokens": 4096}))
    assert plan.environment == {"HIP_VISIBLE_DEVICES": "0"} and plan.gpus[0].pci_bus_id == "0000:04:00.0"
    assert any("0000:03:00.0 is not used: it is not given to this container (lxc)" in reason for reason in plan.why)
