/* In libggml-vulkan's place: a backend that is there when it is asked for its devices, and lost, without a word,
 * when the service starts, as where a driver is not ready at boot. The planned device would end llama-server
 * ("invalid device"), so that one argument is passed over too; the kernel shows the command line as it was. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

static int lost;

__attribute__((constructor)) static void start(int argc, char **argv)
{
    for (int i = 1; i < argc; i++)
        lost |= strcmp(argv[i], "--alias") == 0; /* the service's own command line has it */
    for (int i = 1; lost && i + 1 < argc; i++)
        if (strcmp(argv[i], "--device") == 0)
            argv[i + 1] = "none";
}

void *ggml_backend_vk_reg(void)
{
    char path[4096];
    Dl_info here;
    if (lost || !dladdr((void *)start, &here))
        return 0;
    snprintf(path, sizeof path, "%.*s/real.so", (int)(strrchr(here.dli_fname, '/') - here.dli_fname), here.dli_fname);
    void *real = dlopen(path, RTLD_NOW);
    void *(*get)(void) = real ? (void *(*)(void))dlsym(real, "ggml_backend_vk_reg") : 0;
    return get ? get() : 0;
}
