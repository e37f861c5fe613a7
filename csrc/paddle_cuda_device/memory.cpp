// Device memory: blocks are kept by size when they are released, and handed out again.
//
// Paddle's own allocator asks for large chunks and cuts them up, so a request here is rare. A block that comes back may
// still be read by work under way on any stream; an event behind everything that was queued on the device tells when it
// is free to be taken by another stream. No wait on the host: a block whose event has not come yet is passed over.
#include "state.h"

#include <map>
#include <mutex>
#include <vector>

namespace paddle_cuda_device {
namespace {

constexpr size_t kRound = 512;

struct Free {
  void* address;
  cudaEvent_t released;
};

struct Pool {
  std::mutex mutex;
  std::multimap<size_t, Free> free;
};

Pool& pool(int device) {
  static std::array<Pool, kMaxDevices> pools;
  return pools[device];
}

size_t rounded(size_t bytes) { return bytes == 0 ? kRound : (bytes + kRound - 1) / kRound * kRound; }

}  // namespace

State& state() {
  static State one;
  return one;
}

cudaError_t take_block(int device, void** address, size_t bytes) {
  const size_t size = rounded(bytes);
  Pool& p = pool(device);
  {
    std::lock_guard<std::mutex> lock(p.mutex);
    auto [first, end] = p.free.equal_range(size);
    for (auto it = first; it != end; ++it) {
      if (cudaEventQuery(it->second.released) != cudaSuccess) {
        cudaGetLastError();  // "not ready" is no error to be found by somebody else
        continue;
      }
      *address = it->second.address;
      cudaEventDestroy(it->second.released);
      p.free.erase(it);
      state().bytes_in_use[device] += size;
      return cudaSuccess;
    }
  }
  cudaError_t result = cudaMalloc(address, size);
  if (result == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    trim(device);
    result = cudaMalloc(address, size);
  }
  if (result != cudaSuccess) return result;
  count(kAllocations);
  state().bytes_held[device] += size;
  state().bytes_in_use[device] += size;
  return cudaSuccess;
}

cudaError_t release_block(int device, void* address, size_t bytes) {
  const size_t size = rounded(bytes);
  cudaEvent_t released;
  cudaError_t result = cudaEventCreateWithFlags(&released, cudaEventDisableTiming);
  if (result != cudaSuccess) return result;
  // The legacy stream waits for all streams that Paddle makes here: they are made without cudaStreamNonBlocking.
  result = cudaEventRecord(released, cudaStreamLegacy);
  if (result != cudaSuccess) {
    cudaEventDestroy(released);
    return result;
  }
  Pool& p = pool(device);
  std::lock_guard<std::mutex> lock(p.mutex);
  p.free.emplace(size, Free{address, released});
  state().bytes_in_use[device] -= size;
  return cudaSuccess;
}

cudaError_t trim(int device) {
  Pool& p = pool(device);
  std::lock_guard<std::mutex> lock(p.mutex);
  cudaError_t result = cudaSuccess;
  for (auto& [size, block] : p.free) {
    cudaEventDestroy(block.released);
    const cudaError_t freed = cudaFree(block.address);  // waits for what still reads the block
    if (freed != cudaSuccess) result = freed;
    count(kReleases);
    state().bytes_held[device] -= size;
  }
  p.free.clear();
  return result;
}

}  // namespace paddle_cuda_device
