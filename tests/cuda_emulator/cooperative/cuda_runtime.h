// Takes the place of CUDA's header of this name on a machine without a GPU: the few things that our cooperative kernels
// use, for threads that are fibers. What a device refuses is refused here.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

// ---- What a thread sees --------------------------------------------------------------------------------------------

using std::max;
using std::min;

struct alignas(8) int2 {
  int x, y;
};
inline int2 make_int2(int x, int y) { return {x, y}; }
struct alignas(16) int4 {
  int x, y, z, w;
};
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

namespace emulator {

template <class T>
uint64_t pack(T value) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "CUDA has no such shuffle");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

// The value of another lane; this thread's own where there is none.
template <class T>
T shuffle(unsigned lanes, T value, int from, const char* operation) {
  const uint64_t* given = exchange_in_warp(lanes, pack(value), operation);
  if (from >= 0 && from < 32) std::memcpy(&value, given + from, sizeof(T));
  return value;
}

inline int lane() { return static_cast<int>(threadIdx.x % 32); }
unsigned votes(unsigned lanes, bool vote, const char* operation);
unsigned sum(unsigned lanes, unsigned value, const char* operation);
int votes_of_block(bool vote, const char* operation);

}  // namespace emulator

inline void __syncwarp(unsigned mask = 0xffffffffu) { emulator::exchange_in_warp(mask, 0, "__syncwarp"); }
inline unsigned __ballot_sync(unsigned mask, int vote) { return emulator::votes(mask, vote != 0, "__ballot_sync"); }
inline int __any_sync(unsigned mask, int vote) { return emulator::votes(mask, vote != 0, "__any_sync") != 0; }
inline int __all_sync(unsigned mask, int vote) { return emulator::votes(mask, vote != 0, "__all_sync") == 0xffffffffu; }
inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  return emulator::sum(mask, value, "__reduce_add_sync");
}
inline int __reduce_add_sync(unsigned mask, int value) {
  return static_cast<int>(emulator::sum(mask, static_cast<unsigned>(value), "__reduce_add_sync"));
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return emulator::shuffle(mask, value, lane & 31, "__shfl_sync");
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta) {
  return emulator::shuffle(mask, value, emulator::lane() - static_cast<int>(delta), "__shfl_up_sync");
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  return emulator::shuffle(mask, value, emulator::lane() + static_cast<int>(delta), "__shfl_down_sync");
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return emulator::shuffle(mask, value, emulator::lane() ^ bits, "__shfl_xor_sync");
}

inline void __syncthreads() { emulator::meet_block("__syncthreads"); }
inline int __syncthreads_count(int vote) { return emulator::votes_of_block(vote != 0, "__syncthreads_count"); }
inline int __syncthreads_or(int vote) { return emulator::votes_of_block(vote != 0, "__syncthreads_or") != 0; }
inline int __syncthreads_and(int vote) {
  return emulator::votes_of_block(vote != 0, "__syncthreads_and") == static_cast<int>(blockDim.x);
}
inline void __threadfence() {}  // all see a store at once here
[[noreturn]] inline void __trap() { emulator::trap(); }

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }

template <class T>
T __ldcg(const T* place) {
  return *place;
}
template <class T>
T __ldg(const T* place) {
  return *place;
}
template <class T>
void __stcg(T* place, std::decay_t<T> value) {
  *place = value;
}
template <class T>
void __stcs(T* place, std::decay_t<T> value) {
  *place = value;
}
int atomicAdd(int* place, int value);
unsigned long long atomicMin(unsigned long long* place, unsigned long long value);

// ---- What the host calls -------------------------------------------------------------------------------------------

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
  cudaErrorCooperativeLaunchTooLarge = 720,
  cudaErrorUnknown = 999,  // the emulator's own: a mistake that it has found
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative = 2 };

using cudaStream_t = struct CUstream_st*;
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
union cudaLaunchAttributeValue {
  char pad[64];
  int cooperative;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream);
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);

namespace emulator {

cudaError_t allow_shared_memory(const void* kernel, int bytes);
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*call)(const void*), const void* bound);

template <class... Parameters>
struct Bound {
  void (*kernel)(Parameters...);
  std::tuple<Parameters...> arguments;
  static void call(const void* bound) {
    const auto& mine = *static_cast<const Bound*>(bound);
    std::apply(mine.kernel, mine.arguments);
  }
};

}  // namespace emulator

template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int bytes) {
  return emulator::allow_shared_memory(reinterpret_cast<const void*>(kernel), bytes);
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  using Bound = emulator::Bound<Parameters...>;
  const Bound bound{kernel, {std::forward<Arguments>(arguments)...}};
  return emulator::launch(*config, reinterpret_cast<const void*>(kernel), &Bound::call, &bound);
}
