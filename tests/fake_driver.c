/* A driver library without a device: memory is malloc's, copies are memcpy, and every launch is
 * written to a log. Compiled with -DHIP it has HIP's names, else CUDA's.
 *
 * A "binary" is text: the line `BINARY` or `PTX`, then a line `symbol kinds` for every kernel,
 * where kinds has a letter per argument: p (pointer) or i (i32). Kernels whose symbol starts with
 * `double`, `add` or `count` are really executed, see `execute`.
 *
 * The fake_… functions are for tests: what the device is like, which call fails, and the log. */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef HIP
#define NAME(cuda, hip) hip
#else
#define NAME(cuda, hip) cuda
#endif
#define EXPORT __attribute__((visibility("default")))

enum { OK = 0, BAD_VALUE = 1, NO_MEMORY = 2, NO_BINARY = 209, BAD_IMAGE = 200, NOT_FOUND = 500 };

typedef struct {
    char symbol[128], kinds[64];
} kernel;

typedef struct {
    kernel* kernel;
    unsigned grid[3], block[3], shared;
    uint64_t arguments[64];
} launch;

typedef struct {
    int count;
    launch launches[512];
} graph;

static char *log_text, fail_name[64], arch_name[64] = "gfx90a:sramecc+:xnack-";
static size_t log_size, log_room, memory_total = (size_t)1 << 30, memory_used, host_used;
static int fail_at, fail_code, fail_count, lost, device_count = 1, capability = 80, refuses;
static int contexts, pushed, modules, graphs, streams, events, current, shared_limit = 163 << 10;
static graph* capturing;
static double clock_ms;
static int epoch; /* memory of a test before this one no longer counts */

static void note(const char* format, ...) {
    char line[4096];
    __builtin_va_list list;
    __builtin_va_start(list, format);
    int length = vsnprintf(line, sizeof line, format, list);
    __builtin_va_end(list);
    if (log_size + length + 2 > log_room) log_text = realloc(log_text, log_room = 2 * log_room + 8192);
    memcpy(log_text + log_size, line, length);
    log_size += length;
    log_text[log_size++] = '\n';
    log_text[log_size] = 0;
}

/* Whether this call of a function fails: the n-th one that fake_fail was told of. */
static int failing(const char* name) {
    if (lost) return lost;
    if (strcmp(name, fail_name) || ++fail_count != fail_at) return OK;
    if (fail_code >= 700) lost = fail_code;
    return fail_code;
}
#define ENTER(name)                                                                                \
    do {                                                                                           \
        int code = failing(name);                                                                  \
        if (code) return code;                                                                     \
    } while (0)

/* ---------------------------------------------------------------------------- for tests */

EXPORT void fake_reset(void) {
    free(log_text);
    log_text = NULL;
    log_size = log_room = 0;
    fail_name[0] = 0;
    fail_at = fail_code = fail_count = lost = refuses = current = 0;
    device_count = 1, capability = 80, memory_total = (size_t)1 << 30, shared_limit = 163 << 10;
    clock_ms = 0, epoch++;
    memory_used = host_used = 0;
    contexts = pushed = modules = graphs = streams = events = 0;
    strcpy(arch_name, "gfx90a:sramecc+:xnack-");
}
EXPORT void fake_fail(const char* name, int at, int code) {
    snprintf(fail_name, sizeof fail_name, "%s", name);
    fail_at = at, fail_code = code, fail_count = 0;
}
EXPORT void fake_device(int count, int compute_capability, const char* arch, size_t memory) {
    device_count = count, capability = compute_capability, memory_total = memory;
    snprintf(arch_name, sizeof arch_name, "%s", arch);
}
EXPORT void fake_refuse(int binaries) { refuses = binaries; }
EXPORT void fake_shared(int limit) { shared_limit = limit; }
EXPORT const char* fake_log(void) { return log_text ? log_text : ""; }
EXPORT void fake_clear_log(void) { log_size = 0, log_text ? (log_text[0] = 0) : 0; }
/* What is held: device memory, host memory, modules, graphs, streams, events, contexts, pushed. */
EXPORT void fake_held(int64_t* held) {
    int64_t all[] = {memory_used, host_used, modules, graphs, streams, events, contexts, pushed};
    memcpy(held, all, sizeof all);
}

/* ------------------------------------------------------------------------------ devices */

EXPORT int NAME(cuInit, hipInit)(unsigned flags) { return OK; }
EXPORT int NAME(cuDriverGetVersion, hipDriverGetVersion)(int* version) {
    *version = NAME(12040, 60342131);
    return OK;
}
EXPORT int NAME(cuDeviceGetCount, hipGetDeviceCount)(int* count) {
    *count = device_count;
    return device_count ? OK : 100;
}
EXPORT int NAME(cuDeviceGet, hipDeviceGet)(int* device, int ordinal) {
    *device = ordinal;
    return ordinal < device_count ? OK : 101;
}
EXPORT int NAME(cuDeviceGetName, hipDeviceGetName)(char* name, int length, int device) {
    snprintf(name, length, "Fake GPU %d", device);
    return OK;
}
EXPORT int NAME(cuDeviceTotalMem_v2, hipDeviceTotalMem)(size_t* bytes, int device) {
    *bytes = memory_total;
    return OK;
}
EXPORT int NAME(cuDeviceGetAttribute, hipDeviceGetAttribute)(int* value, int attribute, int device) {
    *value = attribute == 75 ? capability / 10 : attribute == 76 ? capability % 10 : shared_limit;
    return OK;
}
#ifdef HIP
EXPORT int hipGetDevicePropertiesR0600(char* properties, int device) {
    strcpy(properties, "Fake GPU");
    strcpy(properties + 1160, arch_name);
    return OK;
}
EXPORT int hipGetDevice(int* device) {
    *device = current;
    return OK;
}
EXPORT int hipSetDevice(int device) {
    current = device;
    return OK;
}
EXPORT const char* hipGetErrorName(int code) { return code == 2 ? "hipErrorOutOfMemory" : "hipErrorFake"; }
EXPORT const char* hipGetErrorString(int code) { return code == 2 ? "out of memory" : "fake"; }
#else
EXPORT int cuDevicePrimaryCtxRetain(void** context, int device) {
    contexts++;
    *context = (void*)(uintptr_t)(device + 1);
    return OK;
}
EXPORT int cuDevicePrimaryCtxRelease_v2(int device) {
    contexts--;
    return OK;
}
EXPORT int cuCtxPushCurrent_v2(void* context) {
    pushed++;
    return context ? OK : BAD_VALUE;
}
EXPORT int cuCtxPopCurrent_v2(void** context) {
    pushed--;
    return OK;
}
EXPORT int cuGetErrorName(int code, const char** text) {
    *text = code == 2     ? "CUDA_ERROR_OUT_OF_MEMORY"
            : code == 209 ? "CUDA_ERROR_NO_BINARY_FOR_GPU"
            : code == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS"
            : code == 719 ? "CUDA_ERROR_LAUNCH_FAILED"
                          : "CUDA_ERROR_FAKE";
    return OK;
}
EXPORT int cuGetErrorString(int code, const char** text) {
    *text = code == 2 ? "out of memory" : code == 700 ? "an illegal memory access" : "a fake error";
    return OK;
}
#endif

/* ------------------------------------------------------------------------------- memory */

typedef struct {
    size_t size;
    int epoch;
    char rest[256 - sizeof(size_t) - sizeof(int)];
} header;

static int take(void** address, size_t size, size_t* used) {
    header* made = aligned_alloc(256, sizeof(header) + (size + 255) / 256 * 256);
    made->size = size, made->epoch = epoch;
    memset(made + 1, 0xCD, size);
    *used += size;
    *address = made + 1;
    return OK;
}
static int give(void* address, size_t* used) {
    header* made = (header*)address - 1;
    if (made->epoch == epoch) *used -= made->size;
    memset(address, 0xDD, made->size);
    free(made);
    return OK;
}
EXPORT int NAME(cuMemGetInfo_v2, hipMemGetInfo)(size_t* unused, size_t* total) {
    ENTER("memory_info");
    *unused = memory_total - memory_used;
    *total = memory_total;
    return OK;
}
EXPORT int NAME(cuMemAlloc_v2, hipMalloc)(void** address, size_t size) {
    ENTER("allocate");
    if (memory_used + size > memory_total) return NO_MEMORY;
    note("allocate %zu", size);
    return take(address, size, &memory_used);
}
EXPORT int NAME(cuMemFree_v2, hipFree)(void* address) {
    ENTER("free");
    return give(address, &memory_used);
}
EXPORT int NAME(cuMemHostAlloc, hipHostMalloc)(void** address, size_t size, unsigned flags) {
    ENTER("host_allocate");
    return take(address, size, &host_used);
}
EXPORT int NAME(cuMemFreeHost, hipHostFree)(void* address) {
    ENTER("host_free");
    return give(address, &host_used);
}
static int copied(const char* name, void* to, const void* from, size_t size) {
    ENTER(name);
    note("%s %zu", name, size);
    memcpy(to, from, size);
    return OK;
}
EXPORT int NAME(cuMemcpyHtoDAsync_v2, hipMemcpyHtoDAsync)(void* to, void* from, size_t size, void* s) {
    return copied("upload", to, from, size);
}
EXPORT int NAME(cuMemcpyDtoHAsync_v2, hipMemcpyDtoHAsync)(void* to, void* from, size_t size, void* s) {
    return copied("download", to, from, size);
}
EXPORT int NAME(cuMemcpyDtoDAsync_v2, hipMemcpyDtoDAsync)(void* to, void* from, size_t size, void* s) {
    return copied("copy", to, from, size);
}
EXPORT int NAME(cuMemsetD8Async, hipMemsetD8Async)(void* to, unsigned char value, size_t size, void* s) {
    ENTER("fill");
    memset(to, value, size);
    return OK;
}

/* --------------------------------------------------------------------- streams and events */

EXPORT int NAME(cuStreamCreate, hipStreamCreateWithFlags)(void** stream, unsigned flags) {
    streams++;
    *stream = (void*)(uintptr_t)0x5000;
    return OK;
}
EXPORT int NAME(cuStreamDestroy_v2, hipStreamDestroy)(void* stream) {
    streams--;
    return OK;
}
EXPORT int NAME(cuStreamSynchronize, hipStreamSynchronize)(void* stream) {
    ENTER("synchronize");
    return OK;
}
EXPORT int NAME(cuEventCreate, hipEventCreateWithFlags)(void** event, unsigned flags) {
    events++;
    *event = calloc(1, sizeof(double));
    return OK;
}
EXPORT int NAME(cuEventRecord, hipEventRecord)(void* event, void* stream) {
    ENTER("event_record");
    *(double*)event = clock_ms;
    return OK;
}
EXPORT int NAME(cuEventSynchronize, hipEventSynchronize)(void* event) { return OK; }
EXPORT int NAME(cuEventElapsedTime, hipEventElapsedTime)(float* ms, void* start, void* end) {
    *ms = *(double*)end - *(double*)start;
    return OK;
}
EXPORT int NAME(cuEventDestroy_v2, hipEventDestroy)(void* event) {
    events--;
    free(event);
    return OK;
}

/* ------------------------------------------------------------------------------- modules */

EXPORT int NAME(cuModuleLoadData, hipModuleLoadData)(void** module, const char* image) {
    ENTER("module_load");
    if (!strncmp(image, "BINARY", 6) && refuses) return NO_BINARY;
    if (strncmp(image, "BINARY", 6) && strncmp(image, "PTX", 3)) return BAD_IMAGE;
    modules++;
    note("module %.*s", (int)strcspn(image, "\n"), image);
    *module = strdup(image);
    return OK;
}
EXPORT int NAME(cuModuleUnload, hipModuleUnload)(void* module) {
    modules--;
    free(module);
    return OK;
}
EXPORT int NAME(cuModuleGetFunction, hipModuleGetFunction)(void** function, char* module, const char* symbol) {
    ENTER("module_function");
    for (char* line = strchr(module, '\n'); line; line = strchr(line + 1, '\n')) {
        kernel found = {0};
        sscanf(line + 1, "%127s %63s", found.symbol, found.kinds);
        if (strcmp(found.symbol, symbol)) continue;
        *function = memcpy(malloc(sizeof found), &found, sizeof found); /* as long as we live */
        return OK;
    }
    return NOT_FOUND;
}
#ifndef HIP
EXPORT int cuFuncSetAttribute(kernel* function, int attribute, int value) {
    note("attribute %s %d %d", function->symbol, attribute, value);
    return OK;
}
#endif

/* Compute what the few kernels compute that are real ones: the last argument is a count. */
static void execute(const launch* l) {
    const char* symbol = l->kernel->symbol;
    const uint64_t* a = l->arguments;
    float *x = (float*)a[0], *y = (float*)a[1], *z = (float*)a[2];
    int32_t count;
    if (!strncmp(symbol, "double", 6)) { /* y = 2 x */
        memcpy(&count, &a[2], 4);
        for (int i = 0; i < count; i++) y[i] = 2 * x[i];
    } else if (!strncmp(symbol, "add", 3)) { /* z = x + y */
        memcpy(&count, &a[3], 4);
        for (int i = 0; i < count; i++) z[i] = x[i] + y[i];
    } else if (!strncmp(symbol, "count", 5)) { /* x += 1 */
        memcpy(&count, &a[1], 4);
        for (int i = 0; i < count; i++) x[i] += 1;
    }
    /* Variants that tests tune say how long they take: …_5us. */
    const char* cost = strrchr(symbol, '_');
    if (cost && strstr(cost, "us")) clock_ms += atof(cost + 1) / 1e3;
}
static void run(const launch* l) {
    char text[64 * 17 + 1] = "";
    const char* kinds = l->kernel->kinds;
    for (int i = 0; kinds[i]; i++)
        sprintf(text + strlen(text), kinds[i] == 'p' ? " %016llx" : " %08llx",
                (unsigned long long)(kinds[i] == 'p' ? l->arguments[i] : (uint32_t)l->arguments[i]));
    note("launch %s grid %u,%u,%u block %u,%u,%u shared %u arguments%s", l->kernel->symbol, l->grid[0],
         l->grid[1], l->grid[2], l->block[0], l->block[1], l->block[2], l->shared, text);
    execute(l);
}
EXPORT int NAME(cuLaunchKernel, hipModuleLaunchKernel)(kernel* function, unsigned gx, unsigned gy, unsigned gz,
                                                       unsigned bx, unsigned by, unsigned bz, unsigned shared,
                                                       void* stream, void** arguments, void** extra) {
    ENTER("launch");
    launch l = {function, {gx, gy, gz}, {bx, by, bz}, shared, {0}};
    for (int i = 0; function->kinds[i]; i++)
        memcpy(&l.arguments[i], arguments[i], function->kinds[i] == 'p' ? 8 : 4);
    if (capturing)
        capturing->launches[capturing->count++] = l;
    else
        run(&l);
    return OK;
}

/* -------------------------------------------------------------------------------- graphs */

EXPORT int NAME(cuStreamBeginCapture_v2, hipStreamBeginCapture)(void* stream, int mode) {
    ENTER("capture_begin");
    capturing = calloc(1, sizeof *capturing);
    return OK;
}
EXPORT int NAME(cuStreamEndCapture, hipStreamEndCapture)(void* stream, void** made) {
    *made = capturing;
    capturing = NULL;
    return OK;
}
EXPORT int NAME(cuGraphInstantiateWithFlags, hipGraphInstantiateWithFlags)(void** made, graph* from,
                                                                           unsigned long long flags) {
    ENTER("graph_instantiate");
    note("graph of %d", from->count);
    graphs++;
    *made = memcpy(malloc(sizeof *from), from, sizeof *from);
    return OK;
}
EXPORT int NAME(cuGraphLaunch, hipGraphLaunch)(graph* executable, void* stream) {
    ENTER("graph_launch");
    note("replay");
    for (int i = 0; i < executable->count; i++) run(&executable->launches[i]);
    return OK;
}
EXPORT int NAME(cuGraphDestroy, hipGraphDestroy)(graph* old) {
    free(old);
    return OK;
}
EXPORT int NAME(cuGraphExecDestroy, hipGraphExecDestroy)(graph* old) {
    graphs--;
    free(old);
    return OK;
}
