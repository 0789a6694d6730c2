"""The GPUs that are planned from Vulkan's devices and the kernel's drivers: which, by which number, with which memory."""

from __future__ import annotations

import dataclasses

import pytest

from llamafleet.host.machine import Machine
from llamafleet.host.vulkan import SOFTWARE, advice, gpus
from tests import planning

GIB = 1 << 30


def device(index, kind="discrete", bus=None, name="Intel Arc", gib=16, **other):
    return {"index": index, "name": name, "kind": kind, "driver": "mesa", "uuid": f"{index:032x}",
            "pci_bus_id": bus, "memory_total_bytes": gib * GIB, **other}  # fmt: skip


def machine(*devices, known=()):
    """A host with GPUs of these sizes (MiB) that NVML lists, and these devices of Vulkan."""
    plain = planning.machine(list(known)).to_json()
    return Machine.from_json({**plain, "vulkan": list(devices)})


def test_a_gpu_of_the_kernels_driver_keeps_its_memory_and_gets_vulkans_number():
    # Vulkan lists the second card first: the loader need not know about bus order.
    host = machine(known=[24564, 12282])
    buses = [gpu.pci_bus_id for gpu in host.gpus]
    host = machine(device(0, bus=buses[1], gib=99), device(1, bus=buses[0], gib=99), known=[24564, 12282])
    matched = gpus(host, None)
    assert [(gpu.pci_bus_id, gpu.vulkan_index) for gpu in matched] == [(buses[0], 1), (buses[1], 0)]
    assert [gpu.memory_total_bytes for gpu in matched] == [gpu.memory_total_bytes for gpu in host.gpus]


def test_the_environment_names_vulkans_numbers_in_the_plans_order():
    buses = [gpu.pci_bus_id for gpu in machine(known=[24564, 24564]).gpus]
    host = machine(device(0, bus=buses[1]), device(1, bus=buses[0]), known=[24564, 24564])
    settings = planning.settings({"context_tokens": 131072}, backend="vulkan")
    [plan] = planning.plans(host, [("gpt-oss-120b",)], settings)
    assert len(plan.gpus) == 2
    assert plan.environment == {"GGML_VK_VISIBLE_DEVICES": "1,0"}


def test_a_gpu_that_only_vulkan_lists_is_planned_with_vulkans_figures():
    [gpu] = gpus(machine(device(0, bus="0000:03:00.0")), None)
    assert (gpu.name, gpu.memory_total_bytes, gpu.unified_memory) == ("Intel Arc", 16 * GIB, False)
    assert gpu.vendor not in ("nvidia", SOFTWARE)


def test_an_integrated_gpu_shares_the_hosts_memory():
    [gpu] = gpus(machine(device(0, "integrated")), None)
    assert gpu.unified_memory is True


def test_software_is_taken_only_where_it_is_named():
    host = machine(device(0, bus="0000:03:00.0"), device(1, "cpu", name="llvmpipe"))
    assert [gpu.vulkan_index for gpu in gpus(host, None)] == [0]
    [gpu] = gpus(host, (1,))
    assert (gpu.vendor, gpu.unified_memory, gpu.name) == (SOFTWARE, True, "llvmpipe")


def test_two_drivers_for_one_gpu_are_one_gpu():
    host = machine(device(0, bus="0000:03:00.0"), device(1, bus="0000:03:00.0"))
    assert [gpu.vulkan_index for gpu in gpus(host, None)] == [0]


def test_a_gpu_with_a_problem_is_not_used_through_vulkan_either():
    host = machine(known=[24564])
    [gpu] = host.gpus
    host = dataclasses.replace(
        machine(device(0, bus=gpu.pci_bus_id), known=[24564]), gpus=(dataclasses.replace(gpu, problem="lost"),)
    )
    assert gpus(host, None) == ()


def test_without_a_loader_the_kernels_gpus_are_taken_in_bus_order():
    host = planning.machine([24564, 12282])
    assert gpus(host, None) == host.usable_gpus and advice(host) == ()


@pytest.mark.parametrize(
    ("devices", "suggestion"),
    [
        ((), "install a Vulkan driver for the GPU (mesa-vulkan-drivers): Vulkan lists no device"),
        ((device(0, "cpu", name="llvmpipe"),), "name devices in vulkan_devices: Vulkan lists 0 (llvmpipe, cpu)"),
    ],
)
def test_a_refusal_says_what_vulkan_lists(devices, suggestion):
    settings = planning.settings({}, backend="vulkan")
    [refusal] = planning.plans(machine(*devices), [("Llama-3.2-3B",)], settings)
    assert refusal.fits is False and refusal.suggestions[0] == suggestion


def test_memory_that_a_device_shares_counts_for_the_units_limit():
    settings = planning.settings({}, backend="vulkan", vulkan_devices=[0])
    host = machine(device(0, "cpu", name="llvmpipe", gib=planning.machine().memory.total_bytes // GIB))
    [plan] = planning.plans(host, [("Llama-3.2-3B",)], settings)
    assert plan.host_bytes == sum(row.used_bytes for row in plan.ledger) > plan.ledger[-1].used_bytes
