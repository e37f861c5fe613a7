// What the plugin knows of each device and what it counts. See docs/paddle_gpu.md.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <atomic>
#include <cstdint>

namespace paddle_cuda_device {

constexpr char kName[] = "sonicmoe_gpu";
constexpr int kMaxDevices = 16;

// A wait is whatever stops the host until the device has got somewhere. Copies between the host and a device are
// counted apart: those that Paddle asks to be done on return are waits as well.
enum Counter : int {
  kSynchronizeDevice,
  kSynchronizeStream,
  kSynchronizeEvent,
  kCopyToDevice,
  kCopyToHost,
  kCopyToDeviceAsync,
  kCopyToHostAsync,
  kAllocations,  // that reached the driver
  kReleases,
  kStreams,  // alive
  kEvents,   // alive
  kCounters,
};

struct State {
  std::array<std::atomic<int64_t>, kCounters> counters{};
  std::array<std::atomic<int64_t>, kMaxDevices> bytes_in_use{};
  std::array<std::atomic<int64_t>, kMaxDevices> bytes_held{};
};

State& state();

inline void count(Counter counter, int64_t by = 1) { state().counters[counter] += by; }

// A block of at least ``bytes`` on the current device; blocks that were released before are taken first.
cudaError_t take_block(int device, void** address, size_t bytes);
cudaError_t release_block(int device, void* address, size_t bytes);
// Back to the driver: all blocks of the device that nobody uses.
cudaError_t trim(int device);

}  // namespace paddle_cuda_device
