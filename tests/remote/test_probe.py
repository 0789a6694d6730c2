"""The probe as a host runs it: a program, against the real pynvml and a stand-in for NVIDIA's library.

Every case is one situation that a host has been seen in, or NVML's documentation promises. /proc and
/sys come from a small tree of the case's own where the situation lies there.
"""

from __future__ import annotations

import ast
import json
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.remote.probing import GPU_PCI, MIB, OTHERS, OURS, REMOTE, amd_card, the_note, the_problem

# `host`, a stand-in's /proc, /sys and NVML, is in conftest.py; tests/remote/probing.py has what it is.


# --- NVIDIA, as it should be -------------------------------------------------------------------


def test_rtx4090(host):
    found = host.probe()
    assert found["driver"] == {"nvidia": "580.159.04", "cuda": "13.0"}
    assert found["problems"] == []
    (gpu,) = found["gpus"]
    assert gpu == {
        "index": 0,
        "vendor": "nvidia",
        "uuid": "GPU-4090f00d-0000-4000-8000-000000000001",
        "name": "NVIDIA GeForce RTX 4090",
        "compute_capability": "8.9",
        "memory_total_bytes": 24564 * MIB,
        "memory_used_by_others_bytes": 450 * MIB,  # the driver's 449 MiB belong to nobody else
        "pci_bus_id": "0000:01:00.0",
        "pcie_generation": 4,
        "pcie_width": 16,
        "pcie_generation_now": 1,
        "pcie_width_now": 16,
        "unified_memory": False,
        "problem": None,
        "busy": None,
    }


def test_two_gpus_come_in_pci_bus_order_whatever_nvml_says(host):
    host.nvml("count=2", "device0.bus_id=00000000:C1:00.0", "device1.bus_id=00000000:21:00.0", "device1.cc=12.0")
    gpus = host.probe()["gpus"]
    assert [(g["index"], g["pci_bus_id"], g["compute_capability"]) for g in gpus] == [
        (0, "0000:21:00.0", "12.0"),
        (1, "0000:c1:00.0", "8.9"),
    ]


@pytest.mark.parametrize(
    ("name", "lines"),
    [("with memory info v2", []), ("with a driver that only has v1", ["device0.memory_v2=13"])],
)
def test_reserve_counts_the_same(host, name, lines):
    host.nvml("device0.used_mib=2000", *lines)
    assert host.probe()["gpus"][0]["memory_used_by_others_bytes"] == 2449 * MIB


# --- whose memory is it ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("situation", "used", "processes", "others", "problem"),
    [
        ("our_server_alone", 15000, "10:14990", 449 + 10, None),
        ("ours_and_a_stranger", 17000, "10:14000,20:2500", 449 + 3000, None),
        ("stranger_alone", 2500, "20:2400", 449 + 2500, None),
        ("stranger_of_unknown_size", 17000, "10:14000,20:?", 449 + 3000, None),
        ("ours_unknown_alone", 15000, "10:?", 449, "what no other process holds counts as ours"),
        ("ours_unknown_and_a_stranger", 15000, "10:?,20:2500", 449 + 2500, "counts as ours"),
        ("both_unknown", 15000, "10:?,20:?", 449 + 15000, "unknown use counts as others'"),
        ("ours_tells_more_than_is_used", 1000, "10:14990", 449, None),
        ("dead_process", 1000, "30:500", 449 + 1000, None),
    ],
)
def test_memory_of_others(host, *, situation, used, processes, others, problem):
    host.file("proc/10/cgroup", OURS)
    host.file("proc/20/cgroup", OTHERS)
    host.nvml(f"device0.used_mib={used}", f"device0.processes_list={processes}")
    found = host.probe()
    assert found["gpus"][0]["memory_used_by_others_bytes"] == others * MIB
    assert found["gpus"][0]["problem"] is None
    assert problem in the_note(found) if problem else found["notes"] == []


def test_a_gpu_that_others_hold_half_of_is_called_busy_by_their_names(host):
    host.file("proc/20/cgroup", OTHERS)
    host.file("proc/20/comm", "ollama\n")
    host.file("proc/10/cgroup", OURS)
    host.nvml("device0.used_mib=22000", "device0.processes_list=10:9000,20:12300,21:100")
    found = host.probe()
    assert found["gpus"][0]["problem"] is None
    assert the_problem(found) == (
        "GPU 0000:01:00.0: it is busy: other processes hold 12400 of 24564 MiB (ollama 20: 12300 MiB, process 21: 100 MiB): "
        "stop them, or leave the GPU to them by the setting gpus"
    )


def test_a_process_in_both_lists_counts_once(host):
    host.file("proc/10/cgroup", OURS)
    lines = ["device0.graphics_too=1", "device0.used_mib=5000", "device0.processes_list=10:2000"]
    host.nvml(*lines)
    assert host.probe()["gpus"][0]["memory_used_by_others_bytes"] == 3449 * MIB


@pytest.mark.parametrize(
    ("cgroup", "ours"),
    [
        ("0::/system.slice/llama-server-chat.service/inner", True),
        ("1:name=systemd:/system.slice/llama-server-chat.service", True),
        ("0::/system.slice/llamafleet-tune.service", True),
        ("0::/system.slice/llamafleet-verify-chat.service", True),
        ("0::/system.slice/llama-server.service", False),  # a distribution's, or someone's own
        ("0::/system.slice/x-llama-server-chat.service", False),
    ],
)
def test_which_units_are_ours(host, cgroup, ours):
    host.file("proc/10/cgroup", cgroup + "\n")
    host.nvml("device0.used_mib=1000", "device0.processes_list=10:1000")
    assert host.probe()["gpus"][0]["memory_used_by_others_bytes"] == (449 if ours else 1449) * MIB


# --- NVIDIA, odd answers -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("situation", "line", "words"),
    [
        ("driver_not_loaded", "init=9", ["kernel module is not loaded", "modprobe nvidia"]),
        ("library_of_another_version", "init=18", ["570.1.2", "reboot needed"]),
        ("no_permission", "init=4", ["no permission", "root"]),
        ("unknown_error", "init=999", ["could not start"]),
    ],
)
def test_nvml_cannot_start(host, situation, line, words):
    text = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.1.2  Wed Jan 1 2025\nGCC version: 12.2.0\n"
    host.file("proc/driver/nvidia/version", text)
    host.nvml(line)
    found = host.probe()
    assert found["gpus"] == []
    assert found["driver"] == {"nvidia": "570.1.2", "cuda": None}
    assert [word for word in words if word not in the_problem(found)] == []


def test_a_driver_without_hardware_is_no_problem(host):
    """An image that has NVIDIA's driver, on a machine without a GPU; not so in WSL, where no PCI bus shows the GPU."""
    host.nvml("init=9")
    assert host.probe()["problems"] == []
    host.file("dev/dxg")
    assert "kernel module is not loaded" in the_problem(host.probe())


def test_libraries_newer_than_the_loaded_module(host):
    line = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.1.2  Release Build\n"
    host.file("proc/driver/nvidia/version", line)
    assert "module 570.1.2 is loaded but the libraries are 580.159.04: reboot" in the_problem(host.probe())


def test_gpu_without_a_driver_is_not_taken_for_cpu_only(host):
    host.pci("0000:01:00.0", **GPU_PCI)
    found = host.probe(nvml=False)
    assert found["gpus"] == []
    [device] = found["pci_gpus"]
    assert [device[key] for key in ("pci_bus_id", "vendor", "device_id", "kind")] == [
        "0000:01:00.0", "nvidia", "0x2684", "gpu"
    ]  # fmt: skip
    assert any("libnvidia-ml.so.1 is not installed" in text for text in found["problems"])
    assert (
        device["problem"]
        == "no driver is bound to it: install NVIDIA's driver (such as nvidia-driver or nvidia-open), and reboot"
    )
    assert f"NVIDIA GPU 0x2684 at 0000:01:00.0: {device['problem']}" in found["problems"]


def test_no_gpu_and_no_library_is_no_problem(host):
    host.pci("0000:00:02.0", vendor="0x8086", device="0x1234", **{"class": "0x020000"})  # a network card
    found = host.probe(nvml=False)
    assert (found["gpus"], found["pci_gpus"], found["problems"]) == ([], [], [])


def test_unified_memory_is_the_hosts(host):
    others = ("MemFree", "Buffers", "Cached", "Active", "Inactive", "Shmem", "Slab", "SwapTotal")
    lines = ["MemTotal: 125000000 kB", "MemAvailable: 100000000 kB", *(f"{name}: 8 kB" for name in others)]
    host.file("proc/meminfo", "\n".join(lines) + "\n")
    host.file("proc/10/cgroup", OURS)
    host.nvml("device0.memory=3", "device0.processes_list=10:1024", "device0.gen=0")
    (gpu,) = host.probe()["gpus"]
    assert (gpu["unified_memory"], gpu["problem"], gpu["pcie_generation"]) == (True, None, None)
    assert gpu["memory_total_bytes"] == 125000000 * 1024
    assert gpu["memory_used_by_others_bytes"] == 25000000 * 1024 - 1024 * MIB


def test_lost_gpu_leaves_the_others(host):
    host.pci("0000:01:00.0", **GPU_PCI)
    host.pci("0000:02:00.0", **GPU_PCI)
    host.nvml("count=2", "device1.handle=15")
    found = host.probe()
    good, lost = found["gpus"]
    assert (good["problem"], good["memory_total_bytes"]) == (None, 24564 * MIB)
    assert "fallen off the bus" in lost["problem"]
    assert lost["pci_bus_id"] == "0000:02:00.0"  # by elimination
    assert lost["memory_total_bytes"] == 0
    assert "GPU 0000:02:00.0: the GPU has fallen off the bus" in the_problem(found)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("device0.handle=4", "no permission"),
        ("device0.pci=15", "fallen off the bus"),
        ("device0.name_call=999", "NVML:"),
        ("device0.cc_call=15", "fallen off the bus"),
        ("device0.memory=15", "fallen off the bus"),
        ("device0.memory=16", "needs a reset"),
        ("get_count=999", "number of GPUs"),
    ],
)
def test_a_call_that_fails_is_a_named_problem(host, line, words):
    host.nvml(line)
    found = host.probe()
    assert words in the_problem(found)
    assert all(gpu["problem"] for gpu in found["gpus"])


def test_process_list_denied_counts_all_as_others(host):
    host.nvml("device0.processes=4", "device0.used_mib=1000")
    assert host.probe()["gpus"][0]["memory_used_by_others_bytes"] == 1449 * MIB


def test_mig_instances_are_devices(host):
    host.nvml(
        "device0.mig_mode=1", "device0.mig=2", "device0.cc=9.0",
        "device0.mig0.uuid=MIG-a", "device0.mig0.total_mib=10000", "device0.mig0.name=NVIDIA H100 1g.10gb",
        "device0.mig1.uuid=MIG-b", "device0.mig1.total_mib=20000",
    )  # fmt: skip
    found = host.probe()
    assert [(g["index"], g["uuid"], g["memory_total_bytes"] // MIB) for g in found["gpus"]] == [
        (0, "MIG-a", 10000),
        (1, "MIG-b", 20000),
    ]
    assert {(g["mig"], g["compute_capability"], g["problem"]) for g in found["gpus"]} == {(True, "9.0", None)}


def test_mig_without_instances(host):
    host.nvml("device0.mig_mode=1")
    found = host.probe()
    assert "no MIG instance" in found["gpus"][0]["problem"]


@pytest.mark.parametrize("call", ["init", "handle", "device0.memory"])
def test_a_hung_driver_is_given_up(host, call):
    host.pci("0000:01:00.0", **GPU_PCI)
    host.nvml(f"hang={call.removeprefix('device0.')}")
    begin = time.monotonic()
    found = host.probe("--driver-seconds", "1.5")
    assert time.monotonic() - begin < 60
    assert any("no answer within 1.5 s" in text for text in found["problems"])
    assert len(found["pci_gpus"]) == 1
    assert processes_with(str(host.root)) == []


def processes_with(text):
    """Command lines of running processes that contain the text."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if text in line:
            found.append(line)
    return found


# --- AMD and Intel -----------------------------------------------------------------------------


def test_amd_card(host):
    amd_card(host, "card1", "0000:03:00.0", mem_info_vram_total=str(24 * 2**30), unique_id="abc",
             mem_info_vram_used=str(9 * 2**30), mem_info_gtt_total=str(32 * 2**30), max_link_width="16",
             max_link_speed="16.0 GT/s PCIe")  # fmt: skip
    node = "sys/class/kfd/kfd/topology/nodes/1"
    host.file(
        f"{node}/properties", "location_id 768\ndomain 0\ngfx_target_version 110000\nsimd_count 192\nsimd_per_cu 2\n"
    )
    host.file(f"{node}/gpu_id", "4711\n")
    host.file("sys/class/kfd/kfd/proc/10/vram_4711", str(7 * 2**30))
    host.file("sys/class/kfd/kfd/proc/20/vram_4711", str(1 * 2**30))
    host.file("proc/10/cgroup", OURS)
    host.file("proc/20/cgroup", OTHERS)
    found = host.probe(nvml=False)
    (gpu,) = found["gpus"]
    assert found["problems"] == []
    assert (gpu["vendor"], gpu["uuid"], gpu["gfx"], gpu["compute_units"]) == ("amd", "GPU-abc", "gfx1100", 96)
    assert (gpu["memory_total_bytes"], gpu["memory_used_by_others_bytes"]) == (24 * 2**30, 2 * 2**30)
    assert (gpu["pcie_generation"], gpu["pcie_width"], gpu["unified_memory"]) == (4, 16, False)


def test_amd_apu_is_marked_unified(host):
    amd_card(host, "card0", "0000:c4:00.0", mem_info_vram_total=str(2**29), mem_info_gtt_total=str(2**34))
    found = host.probe(nvml=False)
    (gpu,) = found["gpus"]
    assert (gpu["unified_memory"], gpu["memory_total_bytes"]) == (True, 2**29 + 2**34)
    assert "shares the host's RAM" in the_note(found)


def test_amd_without_its_driver(host):
    amd_card(host, "card0", "0000:c4:00.0")
    assert "amdgpu tells no memory size" in the_problem(host.probe(nvml=False))


def test_intel_is_listed_and_no_problem(host):
    host.pci("0000:00:02.0", vendor="0x8086", device="0xa780", **{"class": "0x030000"})
    found = host.probe(nvml=False)
    assert [gpu["vendor"] for gpu in found["pci_gpus"]] == ["intel"]
    assert (found["gpus"], found["problems"]) == ([], [])


# --- processor, memory, system -----------------------------------------------------------------


def topology(host, cores, online):
    """`cores`: (first CPU, siblings) of each core."""
    host.file("sys/devices/system/cpu/online", online)
    for siblings in cores:
        first, _, last = siblings.partition("-")
        for number in range(int(first), int(last or first) + 1):
            folder = f"sys/devices/system/cpu/cpu{number}/topology"
            host.file(f"{folder}/core_cpus_list", siblings)
            host.file(f"{folder}/physical_package_id", "0")


I5_13400F = ["0-1", "2-3", "4-5", "6-7", "8-9", "10-11", "12", "13", "14", "15"]  # 6 + 4


def test_hybrid_intel_has_performance_cores(host):
    topology(host, I5_13400F, "0-15")
    host.file("sys/devices/cpu_core/cpus", "0-11\n")
    cpu = host.probe(nvml=False)["cpu"]
    assert (cpu["physical_cores"], cpu["performance_cores"], cpu["sockets"]) == (10, 6, 1)
    assert cpu["performance_cpus"] == "0-11"


def test_arm_cores_of_different_capacity(host):
    topology(host, ["0", "1", "2", "3", "4"], "0-4")
    for number, capacity in enumerate(["1010", "380", "380", "1010", "1024"]):
        host.file(f"sys/devices/system/cpu/cpu{number}/cpu_capacity", capacity)
    cpu = host.probe(nvml=False)["cpu"]
    assert (cpu["performance_cores"], cpu["performance_cpus"]) == (3, "0,3-4")


def test_favoured_cores_of_a_uniform_processor_are_no_others(host):
    topology(host, ["0-1", "2-3"], "0-3")
    for number, megahertz in enumerate([5100, 5100, 4700, 4700]):
        host.file(f"sys/devices/system/cpu/cpu{number}/cpufreq/cpuinfo_max_freq", f"{megahertz}000")
    cpu = host.probe(nvml=False)["cpu"]
    assert (cpu["performance_cores"], cpu["performance_cpus"]) == (2, "")


@pytest.mark.parametrize(
    ("situation", "files", "cores", "fast", "cpus"),
    [
        ("v2, some of both kinds", {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpuset.cpus.effective": "8-13\n"},
         4, 2, "8-11"),
        ("v2, efficiency cores alone", {"proc/self/cgroup": "0::/box\n",
                                        "sys/fs/cgroup/box/cpuset.cpus.effective": "12-15\n",
                                        "sys/fs/cgroup/cpuset.cpus.effective": "0-15\n"}, 4, 4, ""),
        ("v1", {"proc/self/cgroup": "3:cpuset:/box\n0::/\n",
                "sys/fs/cgroup/cpuset/box/cpuset.effective_cpus": "0-3,15\n"}, 3, 2, "0-3"),
    ],
)  # fmt: skip
def test_a_containers_cpus_are_all_there_are(host, situation, files, cores, fast, cpus):
    topology(host, I5_13400F, "0-15")
    host.file("sys/devices/cpu_core/cpus", "0-11\n")
    for path, text in files.items():
        host.file(path, text)
    found = host.probe(nvml=False)
    told = [found["cpu"][key] for key in ("physical_cores", "performance_cores", "performance_cpus")]
    assert told == [cores, fast, cpus]
    assert "of 0-15; the limit counts" in the_note(found)


def test_the_login_sessions_own_cpus_do_not_bind_a_service(host):
    topology(host, I5_13400F, "0-15")
    host.file("proc/self/cgroup", "0::/user.slice/user-1000.slice\n")
    host.file("sys/fs/cgroup/user.slice/cpuset.cpus.effective", "12-15\n")
    host.file("sys/fs/cgroup/cpuset.cpus.effective", "0-15\n")
    found = host.probe(nvml=False)
    assert (found["cpu"]["physical_cores"], found["problems"]) == (10, [])


def test_numa_nodes_of_memory_alone_are_left_out(host):
    host.file("sys/devices/system/node/has_cpu", "0-1,3\n")
    host.file("sys/devices/system/node/has_memory", "0-2\n")  # 2: a GPU's memory; 3: no memory is plugged there
    cpu = host.probe(nvml=False)["cpu"]
    assert (cpu["numa_nodes"], cpu["numa_node_list"]) == (2, "0-1")


def test_a_kernel_that_knows_no_numa_has_one_node(host):
    cpu = host.probe(nvml=False)["cpu"]
    assert (cpu["numa_nodes"], cpu["numa_node_list"]) == (1, "")


@pytest.mark.parametrize(
    ("situation", "files"),
    [
        ("v2", {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "1073741824\n",
                "sys/fs/cgroup/memory.current": "536870912\n",
                "sys/fs/cgroup/memory.stat": "anon 1\ninactive_file 268435456\n"}),
        ("v1", {"proc/self/cgroup": "4:memory:/box/a\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/box/memory.limit_in_bytes": "1073741824\n",
                "sys/fs/cgroup/memory/box/memory.usage_in_bytes": "536870912\n",
                "sys/fs/cgroup/memory/box/memory.stat": "total_inactive_file 268435456\n"}),
    ],
)  # fmt: skip
def test_container_limit_counts_as_the_total(host, situation, files):
    for path, text in files.items():
        host.file(path, text)
    found = host.probe(nvml=False)
    assert found["memory"]["total_bytes"] == found["memory"]["cgroup_limit_bytes"] == 2**30
    assert found["memory"]["available_bytes"] == 2**30 - 2**28
    assert "a cgroup limits this host to 1073741824" in the_note(found)


def test_the_login_sessions_own_limit_does_not_bind_a_service(host):
    host.file("proc/self/cgroup", "0::/user.slice/user-1000.slice/session-1.scope\n")
    host.file("sys/fs/cgroup/user.slice/user-1000.slice/memory.max", "1073741824\n")
    assert host.probe(nvml=False)["memory"]["cgroup_limit_bytes"] is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('NAME="Ubuntu"\nVERSION_ID="24.04"\nID=ubuntu\nID_LIKE=debian\nVERSION_CODENAME=noble\n',
         ("ubuntu", "24.04", "noble", ["debian"])),
        ("NAME='Rocky Linux'\nID=\"rocky\"\nID_LIKE=\"rhel centos fedora\"\nVERSION_ID=\"9.4\"\n",
         ("rocky", "9.4", None, ["rhel", "centos", "fedora"])),
        ("ID=debian\nVERSION_CODENAME=forky\n", ("debian", "", "forky", [])),
        ("", ("unknown", "", None, [])),
    ],
)  # fmt: skip
def test_os_release(host, text, expected):
    host.file("etc/os-release", text)
    found = host.probe(nvml=False)["os"]
    assert (found["id"], found["version"], found["version_codename"], found["id_like"]) == expected


@pytest.mark.parametrize("line", ["UBUNTU_CODENAME=noble", "DEBIAN_CODENAME=noble"])
def test_a_derivative_says_what_it_is_made_from(host, line):
    """Linux Mint, Pop!_OS, LMDE: their own code names say nothing to NVIDIA."""
    host.file("etc/os-release", f"ID=linuxmint\nID_LIKE=ubuntu\nVERSION_CODENAME=xia\n{line}\n")
    found = host.probe(nvml=False)["os"]
    assert (found["version_codename"], found["base_codename"]) == ("xia", "noble")


def test_this_machine_by_another_route():
    """No stand-in: what the probe says of the real machine against the machine's own tools."""

    def output(*command):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    missing = "/var/lib/llamafleet-is-not-here/models"
    command = [sys.executable, str(REMOTE / "probe.py"), "--paths", "/", missing]
    found = json.loads(output(*command))
    assert found["schema"] == 1
    if not [text for text in found["notes"] if text.startswith("processor: a cgroup")]:
        assert found["cpu"]["logical_cores"] == int(output("getconf", "_NPROCESSORS_ONLN"))
        pairs = {line for line in output("lscpu", "-p=socket,core").splitlines() if not line.startswith("#")}
        assert found["cpu"]["physical_cores"] == len(pairs)
    nodes = {line for line in output("lscpu", "-p=node").splitlines() if not line.startswith("#")} - {""}
    assert found["cpu"]["numa_nodes"] == (len(nodes) or 1)
    assert f"glibc {found['os']['libc']}" == output("getconf", "GNU_LIBC_VERSION")
    assert found["os"]["id"] == output("sh", "-c", ". /etc/os-release; echo $ID")
    assert found["os"]["arch"] == platform.machine() == output("uname", "-m")
    if found["memory"]["cgroup_limit_bytes"] is None:
        kilobytes = output("awk", "/^MemTotal:/ {print $2}", "/proc/meminfo")
        assert found["memory"]["total_bytes"] == int(kilobytes) * 1024
    assert 0 < found["memory"]["available_bytes"] <= found["memory"]["total_bytes"]
    root, absent = found["disks"]
    assert absent["path"] == missing
    assert root["free_bytes"] == pytest.approx(shutil.disk_usage("/").free, abs=1024 * MIB)
    assert absent["free_bytes"] == pytest.approx(shutil.disk_usage("/var").free, abs=1024 * MIB)
    if not Path("/proc/driver/nvidia").exists():
        assert [gpu for gpu in found["gpus"] if gpu["vendor"] == "nvidia"] == []


@pytest.mark.parametrize("name", sorted(path.name for path in REMOTE.glob("*.py")))
def test_python_3_8_can_parse_it(name):
    ast.parse((REMOTE / name).read_text(), feature_version=(3, 8))
