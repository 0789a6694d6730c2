"""Containers, and chips whose driver tells little: what the probe's program says where process ids, PCI or the memory
are not told, against stand-ins for /proc, /sys and NVML."""

from __future__ import annotations

import json
import re

import pytest

from llamafleet.host.machine import Machine
from tests import planning
from tests.remote.probing import GPU_PCI, MIB, OURS, amd_card, the_note

UUID = "GPU-4090f00d-0000-4000-8000-000000000001"  # the stand-in's
UNIT = "llama-server-chat.service"


def in_container(host, kind="lxc"):
    """A container with process ids of its own, as `/proc/self/ns/pid` names them."""
    host.file("run/systemd/container", kind + "\n")
    folder = host.root / "proc/self/ns"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pid").symlink_to("pid:[4026532000]")


def our_server(host, gib, uuid=UUID, device="CUDA0", start="abc", overhead_mib=512):
    """A server of ours that runs as process 77, and logged so much on the device in its start `abc`."""
    host.file("proc/77/cgroup", OURS)
    plan = {"gate": {"gpus": [{"uuid": uuid, "device": device}]},
            "plan": {"ledger": [{"device": "GPU0", "overhead_bytes": overhead_mib * MIB}, {"device": "host"}]}}  # fmt: skip
    host.file("etc/llamafleet/instances/chat/plan.json", json.dumps(plan))
    log = {"start": start, "devices": {device: {"weights": gib * 2**30, "context": 1.0 * 2**30}}}
    host.file(f"run/llamafleet/devices-{UNIT}.json", json.dumps(log))
    folder = host.root / "run/systemd/units"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"invocation:{UNIT}").symlink_to("abc")


# --- whose memory is it ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("situation", "processes", "used_mib", "others_mib"),
    [
        ("NVML tells the host's ids", "4711:9000,4712:3000", 12200, 12200 - 9 * 1024 - 512),
        ("a stranger has our id by chance", "77:3000", 12200, 12200 - 9 * 1024 - 512),
        ("NVML lists nothing", "", 9500, 0),
    ],
)
def test_in_a_container_the_servers_own_log_tells_what_is_ours(host, situation, processes, used_mib, others_mib):
    """canonical/lxd#9755, NVIDIA/nvidia-docker#1483: our server's memory counted as others', so that each run planned
    for less."""
    in_container(host)
    our_server(host, gib=8)
    host.nvml(f"device0.used_mib={used_mib}", f"device0.processes_list={processes}")
    found = host.probe()
    assert found["gpus"][0]["memory_used_by_others_bytes"] == (449 + max(0, others_mib)) * MIB
    assert "cannot be seen here" in the_note(found) and "by our servers' own logs" in the_note(found)


@pytest.mark.parametrize("fault", ["an earlier start", "not running", "on the CPU", "damaged", "asleep"])
def test_what_no_log_of_a_running_server_says_is_not_ours(host, fault):
    in_container(host)
    our_server(host, gib=8, start="earlier" if fault == "an earlier start" else "abc")
    if fault == "not running":
        host.file("proc/77/cgroup", "0::/system.slice/ssh.service\n")
    if fault == "on the CPU":
        log = {"start": "abc", "devices": {"CPU": {"weights": 8.0 * 2**30}}}
        host.file(f"run/llamafleet/devices-{UNIT}.json", json.dumps(log))
    if fault == "damaged":
        host.file("etc/llamafleet/instances/chat/plan.json", '{"gate": [], "plan": 3}')
    used_mib = 5000 if fault == "asleep" else 9500  # of others: it has given back what it had
    host.nvml(f"device0.used_mib={used_mib}")
    found = host.probe()
    assert found["gpus"][0]["memory_used_by_others_bytes"] == (449 + used_mib) * MIB
    assert "count as others'" in the_note(found)


def test_our_own_process_without_bytes_is_not_others(host):
    """HAMi-core#112: NVML lists our own process with 0 bytes."""
    host.file("proc/10/cgroup", OURS)
    host.nvml("device0.used_mib=15000", "device0.processes_list=10:0")
    assert host.probe()["gpus"][0]["memory_used_by_others_bytes"] == 449 * MIB


def test_a_foreign_process_of_unknown_size_beside_ours_leaves_the_log(host):
    host.file("proc/77/cgroup", OURS)
    our_server(host, gib=8)
    host.nvml("device0.used_mib=12200", "device0.processes_list=77:?,20:?")
    found = host.probe()
    assert found["gpus"][0]["memory_used_by_others_bytes"] == (449 + 12200 - 9 * 1024 - 512) * MIB


@pytest.mark.parametrize("container", [False, True])
def test_an_amd_gpu_tells_our_memory_in_our_own_proc(host, container):
    """The Vulkan backend is unknown to amdkfd, and in a container its process ids are not ours."""
    if container:
        in_container(host, "podman")
    amd_card(host, "card1", "0000:03:00.0", mem_info_vram_total=str(24 * 2**30), mem_info_vram_used=str(9 * 2**30))
    host.file("proc/77/cgroup", OURS)
    client = "drm-driver: amdgpu\ndrm-client-id: 5\ndrm-pdev: 0000:03:00.0\ndrm-memory-vram:\t7340032 KiB\n"
    host.file("proc/77/fdinfo/9", client)
    host.file("proc/77/fdinfo/10", client)  # the same client by another descriptor
    host.file("proc/77/fdinfo/11", client.replace("03:00.0", "04:00.0").replace("id: 5", "id: 6"))
    if container:
        host.file("sys/class/kfd/kfd/proc/77/vram_", str(2**30))  # a stranger's, by a number that is ours here
    assert host.probe(nvml=False)["gpus"][0]["memory_used_by_others_bytes"] == 2 * 2**30


# --- its share of the machine -----------------------------------------------------------------------------------------


def cores(host, count):
    host.file("sys/devices/system/cpu/online", f"0-{count - 1}")
    for number in range(count):
        host.file(f"sys/devices/system/cpu/cpu{number}/topology/core_cpus_list", str(number))
        host.file(f"sys/devices/system/cpu/cpu{number}/topology/physical_package_id", "0")


@pytest.mark.parametrize(
    ("situation", "files", "told", "threads"),
    [
        ("docker --cpus=2.5", {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000"}, "2.5", 2),
        ("half a core", {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000"}, "0.5", 1),
        ("CPUQuota= of system.slice", {"proc/self/cgroup": "0::/user.slice/user-0.slice\n",
                                       "sys/fs/cgroup/system.slice/cpu.max": "400000 100000"}, "4", 4),
        ("cgroup v1", {"proc/self/cgroup": "4:cpu,cpuacct:/box\n", "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "300000",
                       "sys/fs/cgroup/cpu/box/cpu.cfs_period_us": "100000"}, "3", 3),
    ],
)  # fmt: skip
def test_a_quota_counts_as_the_hosts_cores(host, situation, files, told, threads):
    cores(host, 8)
    for path, text in files.items():
        host.file(path, text)
    found = host.probe(nvml=False)
    assert the_note(found) == f"processor: a cgroup limits this host to {told} of 8 cores (CPU quota); it counts"
    assert (found["cpu"]["physical_cores"], found["cpu"]["performance_cores"]) == (threads, threads)
    [plan] = planning.plans(
        Machine.from_json(found), [("Llama-3.2-3B",)], planning.settings({"context_tokens": 4096}, ram_reserve_mib=0)
    )
    assert plan.threads == threads and the_note(found) in plan.why


@pytest.mark.parametrize(
    "files",
    [
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000"},
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "1600000 100000"},
        {"proc/self/cgroup": "4:cpu:/\n", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
         "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"},
    ],
)  # fmt: skip
def test_no_quota_and_one_of_more_than_all_cores_limit_nothing(host, files):
    cores(host, 8)
    for path, text in files.items():
        host.file(path, text)
    found = host.probe(nvml=False)
    assert (found["cpu"]["physical_cores"], found["notes"]) == (8, [])


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("sys/fs/cgroup/system.slice/memory.max", "1073741824"),  # MemoryMax= of the slice that services are in
        ("sys/fs/cgroup/system.slice/memory.high", "1073741824"),
        ("sys/fs/cgroup/memory.max", "1073741824"),
    ],
)
def test_a_limit_of_memory_counts_as_the_ram(host, path, text):
    host.file("proc/self/cgroup", "0::/user.slice/user-0.slice/session-1.scope\n")
    host.file("sys/fs/cgroup/system.slice/memory.max", "max")
    host.file(path, text)
    assert host.probe(nvml=False)["memory"]["total_bytes"] == 2**30


def test_a_limit_of_swap_counts_as_the_swap(host):
    meminfo = (host.root / "proc/meminfo").read_text()
    host.file("proc/meminfo", re.sub(r"SwapTotal:\s+\d+", "SwapTotal: 8388608", meminfo))
    host.file("proc/self/cgroup", "0::/\n")
    assert host.probe(nvml=False)["memory"]["swap_total_bytes"] == 8 * 2**30
    host.file("sys/fs/cgroup/memory.swap.max", "4096")
    assert host.probe(nvml=False)["memory"]["swap_total_bytes"] == 4096


@pytest.mark.parametrize(
    ("path", "text", "kind"),
    [
        ("run/systemd/container", "systemd-nspawn", "systemd-nspawn"),
        ("proc/1/environ", "A=1\0container=lxc\0", "lxc"),
        ("run/.containerenv", "", "podman"),
        (".dockerenv", "", "docker"),
        ("etc/hostname", "", None),
    ],
)
def test_the_kind_of_container_is_named(host, path, text, kind):
    host.file(path, text)
    assert host.probe(nvml=False)["container"] == kind


# --- Jetson, GB10 -----------------------------------------------------------------------------------------------------


def test_gb10_without_pci_info_is_used(host):
    """vllm-cli#11: NVML does not support PCI info there, and the GPU was "GPU0 (): Not Supported"."""
    host.nvml("device0.pci=3", "device0.memory=3", "device0.gen=0", "device0.width=0", "device0.name=NVIDIA GB10",
              "device0.cc=12.1")  # fmt: skip
    found = host.probe()
    [gpu] = found["gpus"]
    assert (gpu["name"], gpu["problem"], gpu["compute_capability"]) == ("NVIDIA GB10", None, "12.1")
    assert (gpu["pci_bus_id"], gpu["unified_memory"], found["problems"]) == ("", True, [])


def test_gb10_gets_its_bus_id_where_pci_shows_it(host):
    host.pci("000f:01:00.0", **GPU_PCI)
    host.nvml("device0.pci=3", "device0.memory=3")
    found = host.probe()
    assert (found["gpus"][0]["pci_bus_id"], found["problems"]) == ("000f:01:00.0", [])


def test_a_nonsensical_bus_id_is_none(host):
    host.nvml("device0.bus_id=nonsense")
    found = host.probe()
    assert (found["gpus"][0]["pci_bus_id"], found["gpus"][0]["problem"]) == ("", None)


JETSON = {
    "proc/device-tree/compatible": "nvidia,p3737-0000+p3701-0005\0nvidia,tegra234\0",
    "proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\0",
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic\n",
    "dev/nvidia0": "",
}


def jetson(host):
    for path, text in JETSON.items():
        host.file(path, text)


@pytest.mark.parametrize("call", ["pci", "uuid_call", "name_call", "cc_call", "memory", "processes"])
def test_a_jetson_whose_nvml_supports_nearly_nothing(host, call):
    """ultralytics#20680: each call that is not supported must not lose the GPU."""
    jetson(host)
    host.nvml("device0.memory=3", f"device0.{call}=3", "device0.gen=0")
    [gpu] = host.probe()["gpus"]
    assert (gpu["problem"], gpu["unified_memory"]) == (None, True)
    assert gpu["compute_capability"] == ("8.7" if call == "cc_call" else "8.9")
    assert gpu["name"] == ("NVIDIA Jetson AGX Orin Developer Kit" if call == "name_call" else "NVIDIA GeForce RTX 4090")


@pytest.mark.parametrize("lines", [["init=9"], ["count=0"], None], ids=["cannot_start", "lists_none", "no_library"])
def test_a_jetson_without_nvml_is_known_by_its_device_tree(host, lines):
    jetson(host)
    host.nvml(*(lines or []))
    found = host.probe(nvml=lines is not None)
    [gpu] = found["gpus"]
    assert (gpu["name"], gpu["compute_capability"]) == ("NVIDIA Jetson AGX Orin Developer Kit", "8.7")
    assert gpu["unified_memory"] and gpu["problem"] is None and found["problems"] == []
    assert found["driver"]["nvidia"] == ("36.4.3" if lines != ["count=0"] else "580.159.04")
    machine = Machine.from_json({**found, "driver": {"nvidia": "36.4.3", "cuda": "12.6"}})
    [plan] = planning.plans(
        machine, [("Llama-3.2-3B",)], planning.settings({"context_tokens": 4096}, ram_reserve_mib=0)
    )
    assert plan.backend == "cuda" and plan.environment["CUDA_VISIBLE_DEVICES"] == "0"


def test_a_container_on_a_jetson_that_was_given_no_gpu(host):
    jetson(host)
    (host.root / "dev/nvidia0").unlink()
    assert "--runtime nvidia" in host.probe(nvml=False)["gpus"][0]["problem"]
