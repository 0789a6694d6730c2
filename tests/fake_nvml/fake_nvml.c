/* A stand-in for libnvidia-ml.so.1 that answers from a text file, so that the real pynvml and our
 * real probe run against it on a machine without a GPU.
 *
 * The state file is the one named by FAKE_NVML_STATE, else /etc/fake-nvml.state: `key=value` lines,
 * `#` starts a comment line. Unset keys have the defaults of an idle, healthy GPU.
 *   count=1  driver=580.159.04  cuda=13000
 *   CALL=N                 the call answers error N: init, driver_version, cuda_version, get_count
 *   deviceN.CALL=N         the same for a device: handle, pci, uuid_call, name_call, cc_call,
 *                          memory, memory_v2, processes, mig
 *   deviceN.{name,uuid,bus_id,cc,total_mib,reserved_mib,used_mib,gen,width,gen_now,width_now}
 *   deviceN.compute_mode=0   nvmlComputeMode_t: 2 prohibited, 3 for one process
 *   deviceN.processes_list=PID:MIB,PID:?     `?` is "not available"; used_mib should include them
 *   deviceN.mig_mode=1, deviceN.mig=K        MIG on, with K instances: sections deviceN.migM.*
 *   hang=CALL              that call never returns
 * The error numbers are nvmlReturn_t's. Struct layouts are those of NVIDIA's public nvml.h, as
 * pynvml declares them.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7 };
typedef unsigned long long u64;
typedef struct { char prefix[32]; int index; } Device;
typedef struct { u64 total, free, used; } Memory;
typedef struct { unsigned version; u64 total, reserved, free, used; } MemoryV2;
typedef struct { unsigned pid; u64 used; unsigned gpu_instance, compute_instance; } Process;
typedef struct {
    char bus_id_legacy[16];
    unsigned domain, bus, device, device_id, subsystem_id;
    char bus_id[32];
} Pci;

static Device devices[16];
static Device instances[16][8];

/* The value of a key, or NULL; valid until the next call. */
static const char *value(const char *prefix, const char *key)
{
    static char line[512];
    char wanted[128];
    const char *path = getenv("FAKE_NVML_STATE");
    FILE *file = fopen(path ? path : "/etc/fake-nvml.state", "r");
    const char *found = NULL;
    size_t length = (size_t)snprintf(wanted, sizeof wanted, "%s%s=", prefix, key);
    while (file && !found && fgets(line, sizeof line, file)) {
        line[strcspn(line, "\n")] = 0;
        if (strncmp(line, wanted, length) == 0)
            found = line + length;
    }
    if (file)
        fclose(file);
    return found;
}

static void text(const char *prefix, const char *key, const char *fallback, char *out, unsigned size)
{
    const char *found = value(prefix, key);
    snprintf(out, size, "%s", found ? found : fallback);
}

static u64 count_of(const char *prefix, const char *key, u64 fallback)
{
    const char *found = value(prefix, key);
    return found ? strtoull(found, NULL, 10) : fallback;
}

/* Hang if told so, else the call's settable return code. */
static int begin(const char *prefix, const char *call)
{
    const char *hang = value("", "hang");
    while (hang && strcmp(hang, call) == 0)
        pause();
    return (int)count_of(prefix, call, SUCCESS);
}

#define BEGIN(prefix, call)                 \
    do {                                    \
        int code = begin(prefix, call);     \
        if (code != SUCCESS)                \
            return code;                    \
    } while (0)

int nvmlInitWithFlags(unsigned flags) { (void)flags; BEGIN("", "init"); return SUCCESS; }
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(int code) { (void)code; return "an error of the stand-in"; }

int nvmlSystemGetDriverVersion(char *out, unsigned size)
{
    BEGIN("", "driver_version");
    text("", "driver", "580.159.04", out, size);
    return SUCCESS;
}

int nvmlSystemGetNVMLVersion(char *out, unsigned size)
{
    char driver[80];
    text("", "driver", "580.159.04", driver, sizeof driver);
    snprintf(out, size, "13.%s", driver);
    return SUCCESS;
}

int nvmlSystemGetCudaDriverVersion_v2(int *out)
{
    BEGIN("", "cuda_version");
    *out = (int)count_of("", "cuda", 13000);
    return SUCCESS;
}
int nvmlSystemGetCudaDriverVersion(int *out) { return nvmlSystemGetCudaDriverVersion_v2(out); }

int nvmlDeviceGetCount_v2(unsigned *out)
{
    BEGIN("", "get_count");
    *out = (unsigned)count_of("", "count", 1);
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, Device **out)
{
    if (index >= count_of("", "count", 1) || index >= 16)
        return INVALID_ARGUMENT;
    Device *device = &devices[index];
    snprintf(device->prefix, sizeof device->prefix, "device%u.", index);
    device->index = (int)index;
    BEGIN(device->prefix, "handle");
    *out = device;
    return SUCCESS;
}

int nvmlDeviceGetName(Device *device, char *out, unsigned size)
{
    BEGIN(device->prefix, "name_call");
    text(device->prefix, "name", "NVIDIA Stand-in", out, size);
    return SUCCESS;
}

int nvmlDeviceGetUUID(Device *device, char *out, unsigned size)
{
    char fallback[64];
    BEGIN(device->prefix, "uuid_call");
    snprintf(fallback, sizeof fallback, "GPU-00000000-0000-0000-0000-%012d", device->index);
    text(device->prefix, "uuid", fallback, out, size);
    return SUCCESS;
}

int nvmlDeviceGetIndex(Device *device, unsigned *out) { *out = (unsigned)device->index; return SUCCESS; }

int nvmlDeviceGetPciInfo_v3(Device *device, Pci *out)
{
    char fallback[32];
    BEGIN(device->prefix, "pci");
    memset(out, 0, sizeof *out);
    snprintf(fallback, sizeof fallback, "00000000:%02X:00.0", device->index + 1);
    text(device->prefix, "bus_id", fallback, out->bus_id, sizeof out->bus_id);
    snprintf(out->bus_id_legacy, sizeof out->bus_id_legacy, "%.12s", out->bus_id + 4);
    sscanf(out->bus_id, "%x:%x:%x", &out->domain, &out->bus, &out->device);
    out->device_id = (unsigned)count_of(device->prefix, "device_id", 0x268410de);
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo_v2(Device *device, MemoryV2 *out)
{
    BEGIN(device->prefix, "memory");
    BEGIN(device->prefix, "memory_v2");
    out->total = count_of(device->prefix, "total_mib", 24564) << 20;
    out->reserved = count_of(device->prefix, "reserved_mib", 0) << 20;
    out->used = count_of(device->prefix, "used_mib", 0) << 20;
    out->free = out->total - out->reserved - out->used;
    return SUCCESS;
}

/* Newer drivers: `used` includes the reserve. */
int nvmlDeviceGetMemoryInfo(Device *device, Memory *out)
{
    u64 reserved = count_of(device->prefix, "reserved_mib", 0) << 20;
    BEGIN(device->prefix, "memory");
    out->total = count_of(device->prefix, "total_mib", 24564) << 20;
    out->used = reserved + (count_of(device->prefix, "used_mib", 0) << 20);
    out->free = out->total - out->used;
    return SUCCESS;
}

int nvmlDeviceGetCudaComputeCapability(Device *device, int *major, int *minor)
{
    char found[16];
    BEGIN(device->prefix, "cc_call");
    text(device->prefix, "cc", "8.9", found, sizeof found);
    return sscanf(found, "%d.%d", major, minor) == 2 ? SUCCESS : NOT_SUPPORTED;
}

int nvmlDeviceGetComputeMode(Device *device, int *out)
{
    *out = (int)count_of(device->prefix, "compute_mode", 0);
    return SUCCESS;
}

#define LINK(function, key, fallback)                                        \
    int function(Device *device, unsigned *out)                              \
    {                                                                        \
        *out = (unsigned)count_of(device->prefix, key, fallback);            \
        return *out ? SUCCESS : NOT_SUPPORTED;                               \
    }
LINK(nvmlDeviceGetMaxPcieLinkGeneration, "gen", 4)
LINK(nvmlDeviceGetMaxPcieLinkWidth, "width", 16)
LINK(nvmlDeviceGetCurrPcieLinkGeneration, "gen_now", 1)
LINK(nvmlDeviceGetCurrPcieLinkWidth, "width_now", 16)

int nvmlDeviceGetMigMode(Device *device, unsigned *current, unsigned *pending)
{
    BEGIN(device->prefix, "mig_call");
    if (!value(device->prefix, "mig_mode"))
        return NOT_SUPPORTED; /* as consumer GPUs answer */
    *current = *pending = (unsigned)count_of(device->prefix, "mig_mode", 0);
    return SUCCESS;
}

int nvmlDeviceGetMaxMigDeviceCount(Device *device, unsigned *out)
{
    (void)device;
    *out = 7;
    return SUCCESS;
}

int nvmlDeviceGetMigDeviceHandleByIndex(Device *device, unsigned index, Device **out)
{
    if (index >= count_of(device->prefix, "mig", 0) || index >= 8)
        return NOT_FOUND;
    Device *instance = &instances[device->index][index];
    snprintf(instance->prefix, sizeof instance->prefix, "device%d.mig%u.", device->index, index);
    instance->index = device->index;
    *out = instance;
    return SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v3(Device *device, unsigned *count, Process *out)
{
    char list[400];
    unsigned found = 0, room = *count;
    BEGIN(device->prefix, "processes");
    text(device->prefix, "processes_list", "", list, sizeof list);
    for (char *item = strtok(list, ","); item; item = strtok(NULL, ",")) {
        char *colon = strchr(item, ':');
        if (out && found < room && colon) {
            memset(&out[found], 0, sizeof out[found]);
            out[found].pid = (unsigned)strtoul(item, NULL, 10);
            out[found].used = colon[1] == '?' ? ~0ULL : strtoull(colon + 1, NULL, 10) << 20;
        }
        found++;
    }
    *count = found;
    return found > room ? INSUFFICIENT_SIZE : SUCCESS;
}

int nvmlDeviceGetGraphicsRunningProcesses_v3(Device *device, unsigned *count, Process *out)
{
    if (!value(device->prefix, "graphics_too")) {
        *count = 0;
        return SUCCESS;
    }
    return nvmlDeviceGetComputeRunningProcesses_v3(device, count, out);
}
