// The calls of CUDA's driver that an artifact's programs make, on the memory of the host: no GPU is needed to follow them.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static int setting(const char *name, int otherwise) { const char *text = getenv(name); return text ? atoi(text) : otherwise; }

int cuInit(unsigned flags) { return setting("FAKE_CUDA_INIT", 0); }
int cuGetErrorName(int code, const char **text) { *text = code == 100 ? "CUDA_ERROR_NO_DEVICE" : code == 209 ? "CUDA_ERROR_NO_BINARY_FOR_GPU" : "CUDA_ERROR_UNKNOWN"; return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuDeviceGetName(char *name, int size, int device) { strncpy(name, "Pretended GPU", size); return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGetAttribute(int *value, int which, int device) {
  *value = which == 75 ? setting("FAKE_CUDA_MAJOR", 9) : which == 76 ? setting("FAKE_CUDA_MINOR", 0) : 1000 + which;
  return 0;
}
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuStreamCreate(void **stream, unsigned flags) { *stream = (void *)2; return 0; }
int cuStreamDestroy_v2(void *stream) { return 0; }
int cuStreamSynchronize(void *stream) { return 0; }
int cuMemAlloc_v2(uint64_t *address, size_t size) { *address = (uint64_t)(uintptr_t)malloc(size); return *address ? 0 : 2; }
int cuMemFree_v2(uint64_t address) { free((void *)(uintptr_t)address); return 0; }
int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t size, void *stream) { memcpy((void *)(uintptr_t)to, from, size); return 0; }
int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t size, void *stream) { memcpy(to, (void *)(uintptr_t)from, size); return 0; }
int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t size, void *stream) { memcpy((void *)(uintptr_t)to, (void *)(uintptr_t)from, size); return 0; }
// A module is its image; a function is where its module and its name lie. What a launch does, the test says.
typedef struct { const void *image; char name[256]; } function_t;
typedef void (*launch_t)(const function_t *, const unsigned *grid, const unsigned *block, unsigned shared, void *stream, void **arguments);
static launch_t on_launch;
void fake_on_launch(launch_t launch) { on_launch = launch; }
int cuModuleLoadData(void **module, const void *image) { *module = (void *)image; return setting("FAKE_CUDA_LOAD", 0); }
int cuModuleUnload(void *module) { return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) {
  function_t *found = malloc(sizeof *found);
  found->image = module;
  strncpy(found->name, name, sizeof found->name);
  *function = found;
  return setting("FAKE_CUDA_FUNCTION", 0);
}
int cuFuncSetAttribute(void *function, int which, int value) { return which == 8 && value <= setting("FAKE_CUDA_SHARED", 232448) ? 0 : 1; }
int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                   void *stream, void **arguments, void **extra) {
  const unsigned grid[3] = {gx, gy, gz}, block[3] = {bx, by, bz};
  if (setting("FAKE_CUDA_LAUNCH", 0)) return setting("FAKE_CUDA_LAUNCH", 0);
  if (on_launch) on_launch(function, grid, block, shared, stream, arguments);
  return 0;
}
int cuEventCreate(void **event, unsigned flags) { *event = malloc(sizeof(struct timespec)); return 0; }
int cuEventRecord(void *event, void *stream) { return clock_gettime(CLOCK_MONOTONIC, event); }
int cuEventSynchronize(void *event) { return 0; }
int cuEventDestroy_v2(void *event) { free(event); return 0; }
int cuEventElapsedTime(float *ms, void *start, void *end) {
  struct timespec *a = start, *b = end;
  *ms = (b->tv_sec - a->tv_sec) * 1e3f + (b->tv_nsec - a->tv_nsec) / 1e6f;
  return 0;
}
