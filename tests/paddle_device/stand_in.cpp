// See cuda_runtime.h beside this file. SONICMOE_STAND_IN_DEVICES (2) and SONICMOE_STAND_IN_BYTES (1 GiB each).
#include "cuda_runtime.h"

#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <set>

struct StandInStream {
  int device;
};
struct StandInEvent {
  int device;
  bool recorded;
};

namespace {

struct Block {
  int device;
  size_t bytes;
};

struct World {
  std::mutex mutex;
  std::map<const char*, Block> blocks;
  std::set<StandInStream*> streams;
  std::set<StandInEvent*> events;
  std::map<int, size_t> used;
};

World& world() {
  static World* one = new World;  // outlives every static that still frees something
  return *one;
}

thread_local int current = 0;
thread_local cudaError_t last = cudaSuccess;

cudaError_t said(cudaError_t error) {
  if (error != cudaSuccess) last = error;
  return error;
}

long number(const char* name, long otherwise) {
  const char* text = std::getenv(name);
  return text ? std::atol(text) : otherwise;
}

int devices() { return static_cast<int>(number("SONICMOE_STAND_IN_DEVICES", 2)); }
size_t capacity() { return static_cast<size_t>(number("SONICMOE_STAND_IN_BYTES", 1L << 30)); }

// Whole within one block of any device. An address past the end is what a bad stride makes.
bool on_device(const void* address, size_t bytes) {
  const char* at = static_cast<const char*>(address);
  auto it = world().blocks.upper_bound(at);
  if (it == world().blocks.begin()) return bytes == 0;
  --it;
  return at + bytes <= it->first + it->second.bytes;
}

bool stream_of_current(cudaStream_t stream) {
  if (stream == nullptr || stream == cudaStreamLegacy) return true;
  return world().streams.count(stream) && stream->device == current;
}

}  // namespace

#define LOCKED std::lock_guard<std::mutex> lock_(world().mutex)
#define NEED(what, error) \
  if (!(what)) return said(error)

extern "C" {

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorInvalidResourceHandle: return "invalid resource handle";
    case cudaErrorNotReady: return "device not ready";
  }
  return "unknown";
}
cudaError_t cudaGetLastError() {
  const cudaError_t found = last;
  last = cudaSuccess;
  return found;
}
cudaError_t cudaGetDeviceCount(int* n) {
  *n = devices();
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = current;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  NEED(device >= 0 && device < devices(), cudaErrorInvalidDevice);
  current = device;
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  NEED(device >= 0 && device < devices(), cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxGridDimX: *value = 2147483647; break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: *value = 65535; break;
    case cudaDevAttrMultiProcessorCount: *value = 132; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
  }
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* to, int device) {
  NEED(device >= 0 && device < devices(), cudaErrorInvalidDevice);
  *to = cudaDeviceProp{};
  std::snprintf(to->name, sizeof(to->name), "stand-in %d", device);
  to->major = 9;
  to->multiProcessorCount = 132;
  to->totalGlobalMem = capacity();
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  LOCKED;
  *stream = new StandInStream{current};
  world().streams.insert(*stream);
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  LOCKED;
  NEED(world().streams.erase(stream), cudaErrorInvalidResourceHandle);
  delete stream;
  return cudaSuccess;
}
cudaError_t standInCheckLaunch(cudaStream_t stream) {
  LOCKED;
  NEED(stream_of_current(stream), cudaErrorInvalidResourceHandle);
  return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t stream) { return standInCheckLaunch(stream); }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return standInCheckLaunch(stream); }
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  LOCKED;
  NEED(stream_of_current(stream) && world().events.count(event), cudaErrorInvalidResourceHandle);
  return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  const cudaError_t checked = standInCheckLaunch(stream);
  if (checked == cudaSuccess) function(data);
  return checked;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  LOCKED;
  *event = new StandInEvent{current, false};
  world().events.insert(*event);
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  LOCKED;
  NEED(world().events.erase(event), cudaErrorInvalidResourceHandle);
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  LOCKED;
  NEED(world().events.count(event) && stream_of_current(stream), cudaErrorInvalidResourceHandle);
  NEED(event->device == current, cudaErrorInvalidResourceHandle);
  event->recorded = true;
  return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  LOCKED;
  NEED(world().events.count(event), cudaErrorInvalidResourceHandle);
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return cudaEventQuery(event); }

cudaError_t cudaMalloc(void** address, size_t bytes) {
  LOCKED;
  NEED(world().used[current] + bytes <= capacity(), cudaErrorMemoryAllocation);
  *address = std::aligned_alloc(512, (bytes + 511) / 512 * 512);
  NEED(*address, cudaErrorMemoryAllocation);
  std::memset(*address, 0xff, bytes);  // NaN in every float type: nobody may count on zeros
  world().blocks[static_cast<char*>(*address)] = {current, bytes};
  world().used[current] += bytes;
  return cudaSuccess;
}
cudaError_t cudaFree(void* address) {
  LOCKED;
  auto found = world().blocks.find(static_cast<char*>(address));
  NEED(found != world().blocks.end(), cudaErrorInvalidValue);
  world().used[found->second.device] -= found->second.bytes;
  world().blocks.erase(found);
  std::free(address);
  return cudaSuccess;
}
cudaError_t cudaMallocHost(void** address, size_t bytes) {
  *address = std::malloc(bytes);
  return *address ? cudaSuccess : said(cudaErrorMemoryAllocation);
}
cudaError_t cudaFreeHost(void* address) {
  std::free(address);
  return cudaSuccess;
}
cudaError_t cudaMemset(void* address, int value, size_t bytes) {
  LOCKED;
  NEED(on_device(address, bytes), cudaErrorInvalidValue);
  std::memset(address, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  LOCKED;
  NEED(kind == cudaMemcpyHostToDevice || on_device(from, bytes), cudaErrorInvalidValue);
  NEED(kind == cudaMemcpyDeviceToHost || on_device(to, bytes), cudaErrorInvalidValue);
  std::memmove(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  const cudaError_t checked = standInCheckLaunch(stream);
  return checked == cudaSuccess ? cudaMemcpy(to, from, bytes, kind) : checked;
}
cudaError_t cudaMemcpyPeer(void* to, int, const void* from, int, size_t bytes) {
  return cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToDevice);
}
cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, cudaStream_t) {
  return cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToDevice);
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  LOCKED;
  *total = capacity();
  *free = capacity() - world().used[current];
  return cudaSuccess;
}
}

// The driver's part, for sonicmoe/cuda_driver.py.
extern "C" {

int cuInit(unsigned) { return cudaSuccess; }
int cuPointerGetAttribute(void* to, int attribute, const void* address) {
  LOCKED;
  if (attribute != 2 || !on_device(address, 1)) return cudaErrorInvalidValue;
  *static_cast<unsigned*>(to) = 2;
  return cudaSuccess;
}
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  return cudaDeviceGetAttribute(value, static_cast<cudaDeviceAttr>(attribute), device);
}
int cuCtxGetDevice(int* device) { return cudaGetDevice(device); }
int cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = reinterpret_cast<void*>(static_cast<intptr_t>(device + 1));
  return cudaSuccess;
}
int cuCtxSetCurrent(void* context) { return cudaSetDevice(static_cast<int>(reinterpret_cast<intptr_t>(context)) - 1); }
int cuEventCreate(cudaEvent_t* event, unsigned flags) { return cudaEventCreateWithFlags(event, flags); }
int cuEventRecord(cudaEvent_t event, cudaStream_t stream) { return cudaEventRecord(event, stream); }
int cuStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
  return cudaStreamWaitEvent(stream, event, flags);
}
int cuEventDestroy_v2(cudaEvent_t event) { return cudaEventDestroy(event); }
}
