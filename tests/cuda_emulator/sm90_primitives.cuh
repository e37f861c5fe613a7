// Takes the place of csrc/sm90_primitives.cuh on a machine without a GPU: the same functions for threads that are
// fibers of one process. What a GPU may do late is done late: copies when they are waited for, products when their
// registers are, bulk stores when their source is to be written again, bulk loads at some time or other.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "codes.cuh"

#define __device__
#define __forceinline__ inline

using std::max;
using std::min;

struct Index {
  int x, y = 0;
};
struct alignas(8) float2 {
  float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
struct alignas(16) float4 {
  float x, y, z, w;
};

// A matrix in memory and the box that one copy moves.
struct CUtensorMap {
  uint8_t* data;
  int64_t bytes, rows, columns, apart;  // of one element; of the matrix; from one row to the next
  int box_rows;
};

namespace emulator {

struct Copy {
  void* target;
  const void* source;
  bool real;
};
struct Product {
  float* d;
  uint64_t a, b;
  bool add;
  int size;  // of d
};
struct Store {
  const CUtensorMap* map;
  const uint8_t* source;
  int x, y;
  bool add;  // float32
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  int rank, thread;
  bool done = false;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
  std::vector<Product> products;
  std::vector<Store> handed;  // not yet a group
  std::deque<std::vector<Store>> stores;
};

// A place where a known number of threads meet, again and again.
struct Meeting {
  int arrived = 0, generation = 0;
};

struct Barrier {
  int arrivals = 0, pending = 0, parity = 0;
  int64_t bytes = 0;
};

struct Warp {
  Meeting meeting;
  uint64_t value[32];
};

// One cluster of two blocks, run by one host thread.
struct Cluster {
  std::vector<Fiber> fibers;
  Fiber* current = nullptr;
  ucontext_t scheduler;
  bool progress = false;
  Meeting all, blocks[2], named[2][16];
  Warp warps[2][32];
  uint8_t* shared[2];
  std::map<void*, Barrier> barriers;
  std::vector<std::function<void()>> loads;  // under way
};
inline Cluster* cluster = nullptr;

template <class Condition>
void wait_until(Condition condition) {
  while (!condition()) swapcontext(&cluster->current->context, &cluster->scheduler);
  cluster->progress = true;
}

inline void arrive(Meeting& meeting, int size) {
  cluster->progress = true;
  if (++meeting.arrived == size) {
    meeting.arrived = 0;
    ++meeting.generation;
  }
}
inline void meet(Meeting& meeting, int size) {
  const int generation = meeting.generation;
  arrive(meeting, size);
  wait_until([&] { return meeting.generation != generation; });
}

inline Warp& warp() { return cluster->warps[cluster->current->rank][cluster->current->thread / 32]; }

inline uint64_t exchange(uint64_t value, int lane) {
  Warp& mine = warp();
  mine.value[cluster->current->thread % 32] = value;
  meet(mine.meeting, 32);
  const uint64_t found = mine.value[lane];
  meet(mine.meeting, 32);
  return found;
}

// The same place in the shared memory of the cluster's other blocks.
template <class T>
T* at_rank(T* pointer, int rank) {
  const auto offset = static_cast<uint8_t*>(static_cast<void*>(pointer)) - cluster->shared[cluster->current->rank];
  return reinterpret_cast<T*>(cluster->shared[rank] + offset);
}

inline void settle(Barrier& barrier) {
  cluster->progress = true;
  if (barrier.pending == 0 && barrier.bytes == 0) {
    barrier.pending = barrier.arrivals;
    barrier.parity ^= 1;
  }
}

inline void landed(uint64_t* barrier, int64_t bytes) {
  Barrier& found = cluster->barriers.at(barrier);
  found.bytes -= bytes;
  settle(found);
}

inline uint64_t swizzled(uint64_t address) { return address ^ ((address >> 7 & 7) << 4); }

inline void box_to_shared(const CUtensorMap& map, uint8_t* target, int x, int y) {
  for (int row = 0; row < map.box_rows; ++row) {
    for (int byte = 0; byte < 128; ++byte) {
      const int64_t column = x + byte / map.bytes;
      const bool inside = y + row >= 0 && y + row < map.rows && column >= 0 && column < map.columns;
      const int64_t from = ((y + row) * map.apart + column) * map.bytes + byte % map.bytes;
      auto to = reinterpret_cast<uint8_t*>(swizzled(reinterpret_cast<uint64_t>(target) + row * 128 + byte));
      *to = inside ? map.data[from] : 0;
    }
  }
}

inline void box_from_shared(const Store& store) {
  const CUtensorMap& map = *store.map;
  for (int row = 0; row < map.box_rows; ++row) {
    for (int byte = 0; byte < 128; byte += static_cast<int>(map.bytes)) {
      const int64_t column = store.x + byte / map.bytes;
      if (store.y + row >= map.rows || column >= map.columns) continue;
      const auto from = reinterpret_cast<const void*>(
          swizzled(reinterpret_cast<uint64_t>(store.source) + row * 128 + byte));
      uint8_t* to = map.data + ((store.y + row) * map.apart + column) * map.bytes;
      if (store.add) {
        *reinterpret_cast<float*>(to) += *static_cast<const float*>(from);
      } else {
        std::memcpy(to, from, map.bytes);
      }
    }
  }
}

// 32 values of one row of an operand; sixteen of them lie together.
inline void read_row(uint64_t tile, int row, float (&found)[32]) {
  for (int half = 0; half < 2; ++half) {
    const auto from = reinterpret_cast<const uint8_t*>(swizzled(tile * 16 + row * 128 + half * 16));
    for (int k = 0; k < 16; ++k) found[half * 16 + k] = e4m3_value(from[k]);
  }
}

// This thread's part of the product.
inline void multiply(const Product& p) {
  const int thread = cluster->current->thread % 128, lane = thread % 32;
  float a[2][32], b[32];
  for (int below = 0; below < 2; ++below) read_row(p.a, thread / 32 * 16 + lane / 4 + below * 8, a[below]);
  for (int n = 0; n < p.size / 2; ++n) {
    read_row(p.b, n / 2 * 8 + lane % 4 * 2 + n % 2, b);
    for (int below = 0; below < 2; ++below) {
      float& d = p.d[n / 2 * 4 + below * 2 + n % 2];
      float sum = p.add ? d : 0.0f;
      for (int k = 0; k < 32; ++k) sum += a[below][k] * b[k];
      d = sum;
    }
  }
}

}  // namespace emulator

inline Index threadIdx, blockIdx, gridDim;  // of the fiber that runs

inline void __syncthreads() { emulator::meet(emulator::cluster->blocks[emulator::cluster->current->rank], 384); }
inline void __syncwarp() { emulator::meet(emulator::warp().meeting, 32); }
inline float __shfl_xor_sync(uint32_t, float value, int mask) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = static_cast<uint32_t>(emulator::exchange(bits, emulator::cluster->current->thread % 32 ^ mask));
  std::memcpy(&value, &bits, 4);
  return value;
}
inline bool __any_sync(uint32_t, bool mine) {
  bool found = false;
  for (int lane = 0; lane < 32; ++lane) found |= emulator::exchange(mine, lane) != 0;
  return found;
}
inline uint32_t __shfl_xor_sync(uint32_t, uint32_t value, int mask) {
  return static_cast<uint32_t>(emulator::exchange(value, emulator::cluster->current->thread % 32 ^ mask));
}
template <class T>
T __ldg(const T* pointer) {
  return *pointer;
}
inline float __fdiv_rn(float a, float b) { return a / b; }
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline float __shfl_sync(uint32_t, float value, int lane) {
  return __uint_as_float(static_cast<uint32_t>(emulator::exchange(__float_as_uint(value), lane)));
}
template <class T>
T __shfl_sync(uint32_t, T value, int lane) {
  return static_cast<T>(emulator::exchange(static_cast<uint64_t>(value), lane));
}
inline uint32_t atomicMax(uint32_t* place, uint32_t value) {
  const uint32_t before = *place;
  *place = std::max(before, value);
  return before;
}
struct uint2 {
  uint32_t x, y;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<uint32_t>(bits)); }
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t both = x | static_cast<uint64_t>(y) << 32;
  uint32_t found = 0;
  for (int i = 0; i < 4; ++i) found |= static_cast<uint32_t>(both >> (selector >> 4 * i & 7) * 8 & 0xFF) << 8 * i;
  return found;
}

namespace sonicmoe::sm90 {

using emulator::cluster;

using Address = uintptr_t;
inline Address shared_address(const void* pointer) { return reinterpret_cast<Address>(pointer); }
template <class T>
T opaque(T value) {
  return value;
}
inline float load_one(Address place) { return *reinterpret_cast<const float*>(place); }
inline float2 load_two(Address place) { return *reinterpret_cast<const float2*>(place); }
inline void store_two(Address place, float x, float y) { *reinterpret_cast<float2*>(place) = {x, y}; }
inline uint32_t cluster_rank() { return cluster->current->rank; }
inline void cluster_sync() { emulator::meet(cluster->all, 768); }

inline void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  cluster->barriers[barrier] = {static_cast<int>(arrivals), static_cast<int>(arrivals), 0, 0};
}
inline void barrier_init_fence() {}
inline void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  emulator::Barrier& found = cluster->barriers.at(barrier);
  found.bytes += bytes;
  --found.pending;
  emulator::settle(found);
}
inline void barrier_arrive(uint64_t* barrier) {
  emulator::Barrier& found = cluster->barriers.at(barrier);
  --found.pending;
  emulator::settle(found);
}
inline void barrier_arrive(Address barrier) { barrier_arrive(reinterpret_cast<uint64_t*>(barrier)); }
inline void barrier_arrive_at(Address barrier, uint32_t rank) {
  barrier_arrive(emulator::at_rank(reinterpret_cast<uint64_t*>(barrier), rank));
}
inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  const emulator::Barrier& found = cluster->barriers.at(barrier);
  emulator::wait_until([&] { return found.parity != static_cast<int>(parity); });
}
inline void barrier_wait(Address barrier, uint32_t parity) {
  barrier_wait(reinterpret_cast<uint64_t*>(barrier), parity);
}
inline void pass(int number, int threads) {
  emulator::arrive(cluster->named[cluster->current->rank][number], threads);
}
inline void pass_when_all_have_come(int number, int threads) {
  emulator::meet(cluster->named[cluster->current->rank][number], threads);
}
inline void warpgroup_sync(int number) { emulator::meet(cluster->named[cluster->current->rank][number], 128); }

inline void tensor_load(const CUtensorMap& map, uint64_t* barrier, void* target, int x, int y) {
  cluster->loads.push_back([=, &map] {
    emulator::box_to_shared(map, static_cast<uint8_t*>(target), x, y);
    emulator::landed(barrier, map.box_rows * 128);
  });
}
inline void tensor_load_multicast(const CUtensorMap& map, uint64_t* barrier, void* target, int x, int y,
                                  uint16_t mask) {
  for (int rank = 0; rank < 2; ++rank) {
    if (mask >> rank & 1) tensor_load(map, emulator::at_rank(barrier, rank), emulator::at_rank(target, rank), x, y);
  }
}
inline void bulk_load(uint64_t* barrier, void* target, const void* source, uint32_t bytes) {
  cluster->loads.push_back([=] {
    std::memcpy(target, source, bytes);
    emulator::landed(barrier, bytes);
  });
}
inline void hand_over(const CUtensorMap& map, Address source, int x, int y, bool add) {
  cluster->current->handed.push_back({&map, reinterpret_cast<const uint8_t*>(source), x, y, add});
}
inline void tensor_store(const CUtensorMap& map, Address source, int x, int y) { hand_over(map, source, x, y, false); }
inline void tensor_store(const CUtensorMap& map, const void* source, int x, int y) {
  tensor_store(map, shared_address(source), x, y);
}
inline void tensor_add(const CUtensorMap& map, Address source, int x, int y) { hand_over(map, source, x, y, true); }
inline void store_commit() {
  cluster->current->stores.push_back(std::move(cluster->current->handed));
  cluster->current->handed.clear();
}
template <int kPending>
void store_wait_read() {
  auto& groups = cluster->current->stores;
  for (; static_cast<int>(groups.size()) > kPending; groups.pop_front()) {
    for (const emulator::Store& store : groups.front()) emulator::box_from_shared(store);
  }
}
inline void store_wait() { store_wait_read<0>(); }

inline void async_copy(Address target, const void* source, uint32_t real) {
  cluster->current->open.push_back({reinterpret_cast<void*>(target), source, real != 0});
}
inline void async_copy_commit() {
  cluster->current->groups.push_back(std::move(cluster->current->open));
  cluster->current->open.clear();
}
template <int kPending>
void async_copy_wait() {
  auto& groups = cluster->current->groups;
  for (; static_cast<int>(groups.size()) > kPending; groups.pop_front()) {
    for (const emulator::Copy& copy : groups.front()) {
      if (copy.real) {
        std::memcpy(copy.target, copy.source, 16);
      } else {
        std::memset(copy.target, 0, 16);
      }
    }
  }
}
inline void fence_for_async_reads() {}

template <int kCount>
void registers_up() {}
template <int kCount>
void registers_down() {}

using Operand = uint64_t;
inline Operand operand(Address tile) { return tile / 16; }
inline Operand further(Operand tile, int bytes) { return tile + bytes / 16; }
// A warp's lanes do these together.
inline void product_fence() { emulator::meet(emulator::warp().meeting, 32); }
inline void product_commit() { emulator::meet(emulator::warp().meeting, 32); }
template <int kSize>
void product(float (&d)[kSize], uint64_t a, uint64_t b, bool add) {
  cluster->current->products.push_back({d, a, b, add, kSize});
}
inline void product_wait() {
  for (const emulator::Product& product : cluster->current->products) emulator::multiply(product);
  cluster->current->products.clear();
}
template <int kCount>
void pin(float (&)[kCount]) {}

// One 16-bit value: of row or column ``at`` in the row of 16 bytes that lane 8m + r names.
inline uint16_t* matrix_value(Address row, int matrix, int r, int at) {
  return reinterpret_cast<uint16_t*>(emulator::exchange(row, 8 * matrix + r)) + at;
}
inline void store_matrices(Address row, const uint32_t (&v)[4]) {
  const int lane = cluster->current->thread % 32;
  for (int matrix = 0; matrix < 4; ++matrix) {
    std::memcpy(matrix_value(row, matrix, lane / 4, lane % 4 * 2), &v[matrix], 4);
  }
}
inline void store_matrices_transposed(Address row, const uint32_t (&v)[4]) {
  const int lane = cluster->current->thread % 32;
  for (int matrix = 0; matrix < 4; ++matrix) {
    for (int k = 0; k < 2; ++k) {
      *matrix_value(row, matrix, lane % 4 * 2 + k, lane / 4) = static_cast<uint16_t>(v[matrix] >> 16 * k);
    }
  }
}
inline void load_matrices(Address row, uint32_t (&v)[4]) {
  const int lane = cluster->current->thread % 32;
  for (int matrix = 0; matrix < 4; ++matrix) {
    std::memcpy(&v[matrix], matrix_value(row, matrix, lane / 4, lane % 4 * 2), 4);
  }
}

inline float at_most(float x, float bound) { return x > bound ? bound : x; }
inline float near_inverse(float x) { return 1.0f / x; }
inline float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

inline uint32_t to_e4m3(float low, float high) {
  return emulator::e4m3_code(low) | static_cast<uint32_t>(emulator::e4m3_code(high)) << 8;
}
inline uint32_t to_e4m3(float a, float b, float c, float d) { return to_e4m3(a, b) | to_e4m3(c, d) << 16; }
inline float2 from_e4m3(uint16_t pair) { return {emulator::e4m3_value(pair & 0xFF), emulator::e4m3_value(pair >> 8)}; }

inline float2 from_half(uint32_t pair) {
  _Float16 halves[2];
  std::memcpy(halves, &pair, 4);
  return {static_cast<float>(halves[0]), static_cast<float>(halves[1])};
}
inline uint16_t sixteen(float value, bool half) {
  uint16_t found;
  if (half) {
    const auto narrow = static_cast<_Float16>(value);
    std::memcpy(&found, &narrow, 2);
    return found;
  }
  const uint32_t bits = __float_as_uint(value);
  return std::isnan(value) ? 0x7FC0 : static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
inline uint32_t two(float low, float high, bool half) {
  return sixteen(low, half) | static_cast<uint32_t>(sixteen(high, half)) << 16;
}
inline float low_of(uint32_t pair) { return __uint_as_float(pair << 16); }
inline float high_of(uint32_t pair) { return __uint_as_float(pair & 0xFFFF0000); }
inline float2 as_pair(uint32_t pair, bool half) {
  return half ? from_half(pair) : float2{low_of(pair), high_of(pair)};
}
inline uint32_t tamed(uint32_t pair, bool half) {
  auto tame = [](float x) { return std::isinf(x) ? std::nanf("") : x; };
  const float2 v = as_pair(pair, half);
  return two(tame(v.x), tame(v.y), half);
}
inline uint32_t tamed_two(uint32_t pair) { return tamed(pair, false); }
inline uint32_t tamed_halves(uint32_t pair) { return tamed(pair, true); }
inline uint32_t larger(uint32_t x, uint32_t y, bool half) {  // fmax knows no NaN where there is a number; any sign will do
  const float2 v = as_pair(x, half), w = as_pair(y, half);
  return two(std::fmax(std::fabs(v.x), std::fabs(w.x)), -std::fmax(std::fabs(v.y), std::fabs(w.y)), half);
}
inline uint32_t larger_two(uint32_t x, uint32_t y) { return larger(x, y, false); }
inline uint32_t larger_halves(uint32_t x, uint32_t y) { return larger(x, y, true); }

}  // namespace sonicmoe::sm90
