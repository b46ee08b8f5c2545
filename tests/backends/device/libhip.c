// The calls of HIP's runtime that an artifact for AMD's GPUs makes, on the memory of the host, as the header that Triton brings
// declares them: the compiler refuses what is not so.
#define __HIP_PLATFORM_AMD__ 1
#include <hip/hip_runtime_api.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static int setting(const char *name, int otherwise) { const char *text = getenv(name); return text ? atoi(text) : otherwise; }

hipError_t hipInit(unsigned flags) { return setting("FAKE_HIP_INIT", 0); }
const char *hipGetErrorName(hipError_t code) { return code == hipErrorNoDevice ? "hipErrorNoDevice" : code == hipErrorNoBinaryForGpu ? "hipErrorNoBinaryForGpu" : "hipErrorUnknown"; }
hipError_t hipDeviceGet(hipDevice_t *device, int index) { *device = index; return 0; }
hipError_t hipDeviceGetName(char *name, int size, hipDevice_t device) { strncpy(name, "Pretended Instinct", size); return 0; }
hipError_t hipDriverGetVersion(int *version) { *version = 60443482; return 0; }
hipError_t hipDeviceGetAttribute(int *value, hipDeviceAttribute_t which, int device) {
  *value = which == hipDeviceAttributeComputeCapabilityMajor ? 9 : which == hipDeviceAttributeComputeCapabilityMinor ? 4
           : which == hipDeviceAttributeMultiprocessorCount ? 304 : which == hipDeviceAttributeMaxSharedMemoryPerBlock ? 65536
           : which == hipDeviceAttributeL2CacheSize ? 4194304 : which == hipDeviceAttributeClockRate ? 2100000
           : which == hipDeviceAttributeMemoryClockRate ? 1300000 : -1;
  return 0;
}
// hip_runtime_api.h calls it hipGetDeviceProperties, by a macro.
hipError_t hipGetDeviceProperties(hipDeviceProp_t *properties, int device) {
  const char *arch = getenv("FAKE_HIP_ARCH");
  memset(properties, 0, sizeof *properties);
  strcpy(properties->gcnArchName, arch ? arch : "gfx942:sramecc+:xnack-");
  return 0;
}
// The device of a thread; without one, the stand-in refuses.
static __thread int current = -1;
hipError_t hipSetDevice(int device) { current = device; return 0; }
hipError_t hipStreamCreateWithFlags(hipStream_t *stream, unsigned flags) { *stream = (hipStream_t)2; return 0; }
hipError_t hipStreamDestroy(hipStream_t stream) { return 0; }
hipError_t hipStreamSynchronize(hipStream_t stream) { return 0; }
hipError_t hipMalloc(void **address, size_t size) { *address = malloc(size); return *address ? 0 : hipErrorOutOfMemory; }
hipError_t hipFree(void *address) { free(address); return 0; }
hipError_t hipMemcpyHtoDAsync(hipDeviceptr_t to, const void *from, size_t size, hipStream_t stream) {
  if (current < 0) return hipErrorInvalidContext;
  memcpy(to, from, size);
  return 0;
}
hipError_t hipMemcpyDtoHAsync(void *to, hipDeviceptr_t from, size_t size, hipStream_t stream) { memcpy(to, from, size); return 0; }
hipError_t hipMemcpyDtoDAsync(hipDeviceptr_t to, hipDeviceptr_t from, size_t size, hipStream_t stream) { memcpy(to, from, size); return 0; }
// A module is its image; a function is where its module and its name lie. What a launch does, the test says.
typedef struct { const void *image; char name[256]; } function_t;
typedef void (*launch_t)(const function_t *, const unsigned *grid, const unsigned *block, unsigned shared, void *stream, void **arguments);
static launch_t on_launch;
void fake_on_launch(launch_t launch) { on_launch = launch; }
hipError_t hipModuleLoadData(hipModule_t *module, const void *image) { *module = (hipModule_t)image; return setting("FAKE_HIP_LOAD", 0); }
hipError_t hipModuleUnload(hipModule_t module) { return 0; }
hipError_t hipModuleGetFunction(hipFunction_t *function, hipModule_t module, const char *name) {
  function_t *found = malloc(sizeof *found);
  found->image = module;
  strncpy(found->name, name, sizeof found->name);
  *function = (hipFunction_t)found;
  return 0;
}
hipError_t hipModuleLaunchKernel(hipFunction_t function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                                 unsigned shared, hipStream_t stream, void **arguments, void **extra) {
  const unsigned grid[3] = {gx, gy, gz}, block[3] = {bx, by, bz};
  if (current < 0) return hipErrorInvalidContext;
  if (shared > 65536) return hipErrorInvalidValue;
  if (on_launch) on_launch((const function_t *)function, grid, block, shared, stream, arguments);
  return 0;
}
hipError_t hipEventCreateWithFlags(hipEvent_t *event, unsigned flags) { *event = malloc(sizeof(struct timespec)); return 0; }
hipError_t hipEventRecord(hipEvent_t event, hipStream_t stream) { return clock_gettime(CLOCK_MONOTONIC, (struct timespec *)event); }
hipError_t hipEventSynchronize(hipEvent_t event) { return 0; }
hipError_t hipEventDestroy(hipEvent_t event) { free(event); return 0; }
hipError_t hipEventElapsedTime(float *ms, hipEvent_t start, hipEvent_t end) {
  struct timespec *a = (struct timespec *)start, *b = (struct timespec *)end;
  *ms = (b->tv_sec - a->tv_sec) * 1e3f + (b->tv_nsec - a->tv_nsec) / 1e6f;
  return 0;
}
