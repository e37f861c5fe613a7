// What nobody overtakes, and the host's side: launches with the limits of a device, and what a test sets and asks.
#include "cuda_runtime.h"

#include <algorithm>
#include <map>

namespace emulator {

unsigned votes(unsigned lanes, bool vote, const char* operation) {
  const uint64_t* given = exchange_in_warp(lanes, vote, operation);
  unsigned found = 0;
  for (int i = 0; i < 32; ++i) found |= static_cast<unsigned>(given[i]) << i;
  return found;
}

unsigned sum(unsigned lanes, unsigned value, const char* operation) {
  const uint64_t* given = exchange_in_warp(lanes, value, operation);
  unsigned total = 0;
  for (int i = 0; i < 32; ++i) total += static_cast<unsigned>(given[i]);
  return total;
}

int votes_of_block(bool vote, const char* operation) {
  const uint64_t* given = exchange_in_block(vote, operation);
  return static_cast<int>(std::count(given, given + blockDim.x, 1u));
}

namespace {

// Of compute capability 9.0; registers are not known here.
constexpr unsigned kThreadsPerBlock = 1024, kThreadsPerMultiprocessor = 2048;
constexpr size_t kSharedUnasked = 48 * 1024, kSharedPerBlock = 227 * 1024, kSharedPerMultiprocessor = 228 * 1024;
constexpr size_t kSharedReserved = 1024;  // of each block

cudaError_t last_error = cudaSuccess;

std::map<const void*, size_t>& allowed_shared() {
  static std::map<const void*, size_t> allowed;
  return allowed;
}

cudaError_t keep(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

cudaError_t try_launch(const cudaLaunchConfig_t& config, const void* kernel, void (*call)(const void*),
                       const void* bound) {
  const dim3 &grid = config.gridDim, &block = config.blockDim;
  Shape shape{grid.x, block.x, config.dynamicSmemBytes, false};
  for (unsigned i = 0; i < config.numAttrs; ++i) shape.cooperative |= config.attrs[i].val.cooperative != 0;
  const bool flat = grid.y == 1 && grid.z == 1 && block.y == 1 && block.z == 1;
  if (!flat || grid.x == 0 || block.x == 0 || block.x > kThreadsPerBlock) return cudaErrorInvalidConfiguration;
  const auto allowed = allowed_shared().find(kernel);
  if (shape.shared_bytes > (allowed == allowed_shared().end() ? kSharedUnasked : allowed->second)) {
    return cudaErrorInvalidValue;
  }
  const size_t by_shared = kSharedPerMultiprocessor / (shape.shared_bytes + kSharedReserved);
  const size_t resident = std::min<size_t>(kThreadsPerMultiprocessor / block.x, by_shared) * settings.multiprocessors;
  if (shape.cooperative && grid.x > resident) return cudaErrorCooperativeLaunchTooLarge;
  switch (run(shape, call, bound)) {
    case End::kDone: return cudaSuccess;
    case End::kTrapped: return cudaErrorLaunchFailure;
    default: return cudaErrorUnknown;
  }
}

}  // namespace

cudaError_t allow_shared_memory(const void* kernel, int bytes) {
  if (bytes < 0 || static_cast<size_t>(bytes) > kSharedPerBlock) return keep(cudaErrorInvalidValue);
  allowed_shared()[kernel] = bytes;
  return cudaSuccess;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*call)(const void*), const void* bound) {
  return keep(try_launch(config, kernel, call, bound));
}

}  // namespace emulator

int atomicAdd(int* place, int value) {
  const int before = *place;
  *place += value;
  return before;
}

unsigned long long atomicMin(unsigned long long* place, unsigned long long value) {
  const unsigned long long before = *place;
  *place = std::min(before, value);
  return before;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = emulator::settings.multiprocessors;
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = emulator::last_error;
  emulator::last_error = cudaSuccess;
  return error;
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorLaunchFailure: return "unspecified launch failure";
    case cudaErrorCooperativeLaunchTooLarge: return "too many blocks in cooperative launch";
    default: return emulator::mistake();
  }
}

// For ctypes: the device that the next launches find, and the order of their threads.
extern "C" __attribute__((visibility("default"))) void emulator_configure(int multiprocessors, uint32_t seed) {
  emulator::settings = {multiprocessors, seed};
}

// Blocks and threads per block of the last launch.
extern "C" __attribute__((visibility("default"))) void emulator_last_launch(uint32_t (&shape)[2]) {
  shape[0] = emulator::last_shape.blocks;
  shape[1] = emulator::last_shape.threads;
}
