/* A stand-in for libvulkan.so.1 with an integrated GPU without a bus address and a discrete one with. The
 * layouts are those of the public vulkan_core.h; $FAKE_VULKAN_FAILS is what vkCreateInstance answers. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct Chain { int32_t type; struct Chain *next; } Chain;
typedef struct { Chain chain; uint32_t domain, bus, device, function; } PciBus;
typedef struct { Chain chain; int32_t id; char name[256], info[256]; uint8_t conformance[4]; } Driver;
typedef struct { Chain chain; uint8_t device_uuid[16], driver_uuid[16], luid[8]; uint32_t nodes, luid_valid; } Ids;
typedef struct { uint32_t api, driver, vendor, device; int32_t kind; char name[256]; } Properties;
typedef struct { Chain chain; Properties properties; } Properties2;
typedef struct { uint32_t flags, heap; } MemoryType;
typedef struct { uint64_t size; uint32_t flags; } Heap;
typedef struct { uint32_t type_count; MemoryType types[32]; uint32_t heap_count; Heap heaps[16]; } Memory;
typedef struct { Chain chain; Memory memory; } Memory2;
typedef struct { char name[256]; uint32_t version; } Extension;

static int gpus[2] = {0, 1};

int vkCreateInstance(const Chain *info, const void *allocator, void **out)
{
    const char *fails = getenv("FAKE_VULKAN_FAILS");
    (void)allocator;
    *out = gpus;
    return info->type != 1 ? -1 : fails ? atoi(fails) : 0;
}

int vkEnumeratePhysicalDevices(void *instance, uint32_t *count, void **out)
{
    (void)instance;
    for (uint32_t i = 0; out && i < *count; i++)
        out[i] = &gpus[i];
    *count = 2;
    return 0;
}

int vkEnumerateDeviceExtensionProperties(int *gpu, const char *layer, uint32_t *count, Extension *out)
{
    (void)layer;
    if (out)
        strcpy(out[0].name, *gpu ? "VK_EXT_pci_bus_info" : "VK_KHR_swapchain");
    *count = 1;
    return 0;
}

void vkGetPhysicalDeviceProperties2(int *gpu, Properties2 *out)
{
    out->properties.kind = *gpu ? 2 : 1;
    strcpy(out->properties.name, *gpu ? "Intel Arc B580" : "Intel Iris Xe");
    for (Chain *one = out->chain.next; one; one = one->next) {
        if (one->type == 1000212000)
            *(PciBus *)one = (PciBus){*one, 0, 0x3a, 0, 1};
        if (one->type == 1000196000)
            strcpy(((Driver *)one)->name, "Intel open-source Mesa driver");
        if (one->type == 1000071004)
            memset(((Ids *)one)->device_uuid, 0x10 + *gpu, 16);
    }
}

void vkGetPhysicalDeviceMemoryProperties2(int *gpu, Memory2 *out)
{
    (void)gpu;
    out->memory.heap_count = 2;
    out->memory.heaps[0] = (Heap){12ull << 30, 1};
    out->memory.heaps[1] = (Heap){16ull << 30, 0}; /* not on the device */
}
