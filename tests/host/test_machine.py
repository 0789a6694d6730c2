"""The machine file: which values are read, which are refused, and the messages."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given

from llamafleet.host.machine import Machine, MachineError
from tests.mutations import FUZZ, broken

PROBE = Path(__file__).parents[2] / "llamafleet" / "remote" / "probe.py"

# The contract's own example (docs/architecture), with numbers.
FILE = {
    "schema": 1,
    "hostname": "box1",
    "os": {"id": "debian", "version": "13", "arch": "x86_64", "libc": "2.41"},
    "cpu": {"model": "i5-13400F", "sockets": 1, "physical_cores": 10, "logical_cores": 16,
            "performance_cores": 6, "numa_nodes": 1, "flags": ["avx2"]},
    "memory": {"total_bytes": 64_000, "available_bytes": 60_000, "swap_total_bytes": 0},
    "gpus": [{"index": 0, "uuid": "GPU-1", "name": "NVIDIA GeForce RTX 4090", "compute_capability": "8.9",
              "memory_total_bytes": 24_000, "memory_used_by_others_bytes": 500, "pci_bus_id": "0000:01:00.0",
              "pcie_generation": 4, "pcie_width": 16, "unified_memory": False}],
    "driver": {"nvidia": "580.159.04", "cuda": "13.0"},
    "disks": [{"path": "/var/lib/llamafleet", "free_bytes": 100_000}],
}  # fmt: skip


@pytest.fixture
def file():
    return copy.deepcopy(FILE)


def test_contract_example(file):
    machine = Machine.from_json(file)
    assert (machine.hostname, machine.os.version, machine.cpu.performance_cores) == ("box1", "13", 6)
    assert machine.cpu.flags == ("avx2",)
    assert machine.gpus[0].capacity_bytes == 23_500
    assert machine.usable_gpus == machine.gpus
    assert machine.disks[0].free_bytes == 100_000
    assert {gpu.vendor for gpu in machine.gpus} == {"nvidia"}


def test_written_and_read_again_it_is_the_same(file):
    machine = Machine.from_json(file)
    again = json.loads(json.dumps(machine.to_json()))
    assert Machine.from_json(again) == machine
    # All values of the file are kept.
    assert {key: again[key] for key in ("hostname", "driver", "disks")} == {
        key: file[key] for key in ("hostname", "driver", "disks")
    }
    assert file["gpus"][0].items() <= again["gpus"][0].items()


def test_a_newer_probe_may_print_more(file):
    file["gpus"][0]["temperature"] = 40
    file["weather"] = "fine"
    assert Machine.from_json(file) == Machine.from_json(FILE)


def test_lists_of_cpus_and_nodes_are_read_and_an_older_probe_prints_none(file):
    assert Machine.from_json(file).cpu.performance_cpus == ""
    file["cpu"] |= {"performance_cpus": "0-5,8-13,16", "numa_node_list": "0-1"}
    cpu = Machine.from_json(file).cpu
    assert (cpu.performance_cpus, cpu.numa_node_list) == ("0-5,8-13,16", "0-1")


def test_gpu_with_a_problem_has_no_capacity(file):
    file["gpus"][0]["problem"] = "fell off the bus"
    machine = Machine.from_json(file)
    assert (machine.gpus[0].capacity_bytes, machine.usable_gpus) == (0, ())
    assert {gpu.vendor for gpu in machine.gpus} == {"nvidia"}


def test_gpu_without_a_driver_still_has_a_vendor(file):
    file["gpus"] = []
    file["pci_gpus"] = [{"pci_bus_id": "0000:03:00.0", "vendor": "amd", "device_id": "0x744c"}]
    assert {gpu.vendor for gpu in Machine.from_json(file).pci_gpus} == {"amd"}


def without(part, key):
    return lambda file: (file[part] if part else file).pop(key)


def with_value(*path_and_value):
    *path, key, value = path_and_value

    def change(file):
        for step in path:
            file = file[step]
        file[key] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(None, "cpu"), "cpu: missing; should be an object"),
        (without("os", "libc"), "os.libc: missing; should be text"),
        (without(None, "schema"), "schema: missing; should be 1"),
        (with_value("schema", 2), "schema: should be 1, is 2"),
        (with_value("schema", True), "schema: should be 1, is True"),
        (with_value("gpus", {}), "gpus: should be a list of objects, is {}"),
        (with_value("gpus", "none"), "gpus: should be a list of objects, is 'none'"),
        (with_value("gpus", 0, []), "gpus[0]: should be an object, is []"),
        (with_value("gpus", 0, "pcie_width", "x16"),
         "gpus[0].pcie_width: should be a whole number from 0 to 1000000 or null, is 'x16'"),
        (with_value("gpus", 0, "unified_memory", 0), "gpus[0].unified_memory: should be true or false, is 0"),
        (with_value("gpus", 0, "memory_total_bytes", True),
         "gpus[0].memory_total_bytes: should be a whole number from 0 to 2**64, is True"),
        (with_value("gpus", 0, "memory_total_bytes", -1),
         "gpus[0].memory_total_bytes: should be a whole number from 0 to 2**64, is -1"),
        (with_value("gpus", 0, "memory_used_by_others_bytes", 24_001),
         "gpus[0].memory_used_by_others_bytes: should be at most memory_total_bytes (24000), is 24001"),
        (with_value("gpus", 0, "uuid", "GPU-1\nExecStartPre=/bin/sh"),
         "gpus[0].uuid: should be text without control characters, is 'GPU-1\\nExecStartPre=/bin/sh'"),
        (with_value("gpus", 0, "compute_capability", "eight"),
         "gpus[0].compute_capability: should be a version like \"12.8\" or null, is 'eight'"),
        (with_value("memory", "total_bytes", 1.5),
         "memory.total_bytes: should be a whole number from 0 to 2**64, is 1.5"),
        (with_value("memory", "total_bytes", float("nan")),
         "memory.total_bytes: should be a whole number from 0 to 2**64, is nan"),
        (with_value("cpu", "sockets", 10**9), "cpu.sockets: should be a whole number from 0 to 1000000, is 1000000000"),
        (with_value("cpu", "sockets", 10**5000),
         "cpu.sockets: should be a whole number from 0 to 1000000, is an int that is too large to print"),
        (with_value("cpu", "flags", [1]), "cpu.flags[0]: should be text, is 1"),
        (with_value("cpu", "flags", ["avx2"] * 1025), "cpu.flags: should have at most 1024 items, has 1025"),
        (with_value("cpu", "model", "\udcff"), "cpu.model: should be text, is '\\udcff'"),
        (with_value("cpu", "model", "x" * 4097), "cpu.model: should have at most 4096 characters, has 4097"),
        (with_value("cpu", "performance_cpus", "0-11\nExecStartPre=+/bin/sh"),
         "cpu.performance_cpus: should be a list like \"0-3,8\", or empty text, is '0-11\\nExecStartPre=+/bin/sh'"),
        (with_value("cpu", "performance_cpus", "0-"), "cpu.performance_cpus: should be a list like"),
        (with_value("cpu", "performance_cpus", "\u0660"), "cpu.performance_cpus: should be a list like"),
        (with_value("cpu", "numa_node_list", "0-1\n"), "cpu.numa_node_list: should be a list like"),
        (with_value("disks", [{"path": "/"}]),
         "disks[0].free_bytes: missing; should be a whole number from 0 to 2**64"),
        (with_value("driver", "cuda", 13), "driver.cuda: should be text or null, is 13"),
    ],
)  # fmt: skip
def test_refused_with_path_and_reason(file, change, message):
    change(file)
    with pytest.raises(MachineError) as error:
        Machine.from_json(file)
    assert str(error.value).startswith(f"machine.{message}")
    assert error.value.path == f"machine.{message.partition(':')[0]}"


def test_a_message_has_the_first_problem_and_the_number_of_others(file):
    file["gpus"] = [3] * 200
    with pytest.raises(MachineError) as error:
        Machine.from_json(file)
    assert str(error.value) == "machine.gpus[0]: should be an object, is 3 (and 199 more problems)"


def test_a_file_that_is_no_object_is_refused():
    with pytest.raises(MachineError, match=r"machine: should be an object, is \[\]"):
        Machine.from_json([])


@FUZZ
@given(broken(FILE))
def test_a_broken_file_is_read_or_refused_in_one_line(data):
    try:
        machine = Machine.from_json(data)
    except MachineError as error:
        assert str(error).startswith("machine") and ("should" in str(error) or "missing" in str(error))
        assert len(str(error)) < 400 and str(error).isprintable()
    else:
        assert Machine.from_json(json.loads(json.dumps(machine.to_json()))) == machine


def test_optional_values_may_be_null(file):
    file["gpus"][0] |= {"compute_capability": None, "pcie_generation": None, "pcie_width": None}
    file["driver"] = {"nvidia": None, "cuda": None}
    machine = Machine.from_json(file)
    assert (machine.gpus[0].compute_capability, machine.driver.nvidia) == (None, None)


def test_what_the_probe_prints_is_read():
    """`Machine` reads what probe.py prints on this machine."""
    result = subprocess.run([sys.executable, str(PROBE)], capture_output=True, text=True, check=True)
    printed = json.loads(result.stdout)
    machine = Machine.from_json(printed)
    assert machine.memory.total_bytes == printed["memory"]["total_bytes"]
    assert machine.python == printed["python"]
    # The required part of the contract comes out of the probe unabridged.
    assert FILE.keys() <= printed.keys()
    assert all(FILE[part].keys() <= printed[part].keys() for part in ("os", "cpu", "memory", "driver"))
