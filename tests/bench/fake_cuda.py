"""A stand-in for libcuda.so.1, as far as bench/gpu_proof/card.py asks it."""

import subprocess

# The driver's library, with a card of 24 GiB: the context of a process takes 300 MiB; what is free when it ends or
# holds goes into a file.
LIBCUDA = r"""
#include <stddef.h>
#include <stdlib.h>
static size_t total = 24576ul << 20, used;
int cuInit(unsigned flags) { return getenv("NO_DEVICE") ? 100 : (int)flags; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal + 5; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = &used; used = 300ul << 20; return device != 5; }
int cuCtxSetCurrent(void *context) { return context != &used; }
int cuMemGetInfo_v2(size_t *free, size_t *all) { *free = total - used; *all = total; return 0; }
int cuMemAlloc_v2(unsigned long long *place, size_t size)
{
    size = (size + (2ul << 20) - 1) & ~((2ul << 20) - 1);
    if (size > total - used) return 2;
    used += size; *place = used; return 0;
}
"""


def build(folder):
    """Compile it into the folder, which is returned."""
    (folder / "cuda.c").write_text(LIBCUDA)
    command = ["cc", "-shared", "-fPIC", "-Wall", "-Werror", "-o", str(folder / "libcuda.so.1"), str(folder / "cuda.c")]
    subprocess.run(command, check=True)
    return folder
