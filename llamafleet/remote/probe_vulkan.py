"""Ask Vulkan's loader about its devices, and print one JSON object.

Contract: runs on the host with any Python >= 3.8 and the standard library alone. Reads only. A program of its
own because a driver can hang or crash in its first call: the probe runs it with a deadline. Prints

    {"devices": null | [{"index", "name", "kind", "driver", "uuid", "pci_bus_id": null | "0000:01:00.0",
                         "memory_total_bytes"}], "problems": [...]}

with null where Vulkan is not installed. `index` counts as GGML_VK_VISIBLE_DEVICES does: every device that
vkEnumeratePhysicalDevices lists (ggml_vk_instance_init). Structures, names and numbers are vulkan_core.h's.
"""

from __future__ import annotations

import ctypes
import json
import signal
import sys
from ctypes import POINTER, Structure, byref, c_char, c_char_p, c_int32, c_uint8, c_uint32, c_uint64, c_void_p
from typing import Any, Dict, List

LIBRARY = "libvulkan.so.1"
KINDS = {1: "integrated", 2: "discrete", 3: "virtual", 4: "cpu"}
DEVICE_LOCAL = 1
LIFETIME_SECONDS = 120  # the probe gives up on us after 20 s; were it killed itself, we still end
# VkStructureType
APPLICATION, INSTANCE = 0, 1
PROPERTIES_2, MEMORY_2, IDS, DRIVER, PCI_BUS = 1000059001, 1000059006, 1000071004, 1000196000, 1000212000


class Application(Structure):
    _fields_ = [("type", c_int32), ("next", c_void_p), ("name", c_char_p), ("version", c_uint32),
                ("engine", c_char_p), ("engine_version", c_uint32), ("api_version", c_uint32)]  # fmt: skip


class Instance(Structure):
    _fields_ = [("type", c_int32), ("next", c_void_p), ("flags", c_uint32), ("application", POINTER(Application)),
                ("layers", c_uint32), ("layer_names", c_void_p),
                ("extensions", c_uint32), ("extension_names", c_void_p)]  # fmt: skip


class PciBus(Structure):
    _fields_ = [("type", c_int32), ("next", c_void_p), ("domain", c_uint32), ("bus", c_uint32),
                ("device", c_uint32), ("function", c_uint32)]  # fmt: skip


class Driver(Structure):
    _fields_ = [("type", c_int32), ("next", c_void_p), ("id", c_int32), ("name", c_char * 256),
                ("info", c_char * 256), ("conformance", c_uint8 * 4)]  # fmt: skip


class Ids(Structure):
    _fields_ = [("type", c_int32), ("next", c_void_p), ("device_uuid", c_uint8 * 16), ("driver_uuid", c_uint8 * 16),
                ("luid", c_uint8 * 8), ("nodes", c_uint32), ("luid_valid", c_uint32)]  # fmt: skip


class Properties(Structure):
    # After the name: cache UUID, limits and sparse properties, 544 bytes of which nothing is read; with room.
    _fields_ = [("type", c_int32), ("next", c_void_p), ("api_version", c_uint32), ("driver_version", c_uint32),
                ("vendor", c_uint32), ("device", c_uint32), ("kind", c_int32), ("name", c_char * 256),
                ("rest", c_uint64 * 128)]  # fmt: skip


class MemoryType(Structure):
    _fields_ = [("flags", c_uint32), ("heap", c_uint32)]


class Heap(Structure):
    _fields_ = [("size", c_uint64), ("flags", c_uint32)]


class Memory(Structure):
    _fields_ = [("type", c_int32), ("next", c_void_p), ("type_count", c_uint32), ("types", MemoryType * 32),
                ("heap_count", c_uint32), ("heaps", Heap * 16)]  # fmt: skip


class Extension(Structure):
    _fields_ = [("name", c_char * 256), ("version", c_uint32)]


def main() -> int:
    signal.alarm(LIFETIME_SECONDS)  # ends the process even inside a library's call
    found: Dict[str, Any] = {"devices": None, "problems": []}
    try:
        vulkan = ctypes.CDLL(LIBRARY)
    except OSError:
        vulkan = None
    if vulkan is not None:
        try:
            found["devices"] = devices(vulkan)
        except VulkanError as error:
            found = {"devices": [], "problems": [f"Vulkan: {error}"]}
    json.dump(found, sys.stdout)
    print()
    return 0


class VulkanError(Exception):
    """A call failed; the text has its name and VkResult."""


def call(library: Any, name: str, *arguments: Any) -> None:
    """A call that gives a VkResult: 0 and positive ones are successes."""
    code = getattr(library, name)(*arguments)
    if code < 0:
        raise VulkanError(f"{name} answers {code}: is a driver for this GPU installed (mesa-vulkan-drivers)?")


def devices(vulkan: Any) -> List[Dict[str, Any]]:
    """All physical devices in the loader's order. Raises VulkanError."""
    # 1.2: what ggml-vulkan asks for at least; the loader knows what a device can really do.
    application = Application(APPLICATION, None, b"llamafleet", 1, None, 0, (1 << 22) | (2 << 12))
    instance = c_void_p()
    call(vulkan, "vkCreateInstance", byref(Instance(INSTANCE, None, 0, ctypes.pointer(application), 0, None, 0, None)),
         None, byref(instance))  # fmt: skip
    count = c_uint32()
    call(vulkan, "vkEnumeratePhysicalDevices", instance, byref(count), None)
    handles = (c_void_p * count.value)()
    call(vulkan, "vkEnumeratePhysicalDevices", instance, byref(count), handles)
    return [device(vulkan, index, c_void_p(handles[index])) for index in range(count.value)]


def device(vulkan: Any, index: int, handle: c_void_p) -> Dict[str, Any]:
    """What one device is."""
    bus = PciBus(PCI_BUS, None)
    has_bus = b"VK_EXT_pci_bus_info" in extensions(vulkan, handle)
    driver = Driver(DRIVER, ctypes.addressof(bus) if has_bus else None)
    ids = Ids(IDS, ctypes.addressof(driver))
    told = Properties(PROPERTIES_2, ctypes.addressof(ids))
    vulkan.vkGetPhysicalDeviceProperties2(handle, byref(told))
    memory = Memory(MEMORY_2, None)
    vulkan.vkGetPhysicalDeviceMemoryProperties2(handle, byref(memory))
    heaps = [memory.heaps[number] for number in range(memory.heap_count)]
    kind = KINDS.get(told.kind, "other")
    return {
        "index": index,
        "name": told.name.decode("utf-8", "replace"),
        "kind": kind,
        "driver": driver.name.decode("utf-8", "replace"),
        "uuid": bytes(ids.device_uuid).hex(),
        "pci_bus_id": f"{bus.domain:04x}:{bus.bus:02x}:{bus.device:02x}.{bus.function}" if has_bus else None,
        # As ggml_backend_vk_get_device_memory counts it.
        "memory_total_bytes": sum(heap.size for heap in heaps if kind == "integrated" or heap.flags & DEVICE_LOCAL),
    }


def extensions(vulkan: Any, handle: c_void_p) -> List[bytes]:
    count = c_uint32()
    call(vulkan, "vkEnumerateDeviceExtensionProperties", handle, None, byref(count), None)
    listed = (Extension * count.value)()
    call(vulkan, "vkEnumerateDeviceExtensionProperties", handle, None, byref(count), listed)
    return [one.name for one in listed]


if __name__ == "__main__":
    sys.exit(main())
