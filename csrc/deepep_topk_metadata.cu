// The CUDA version: one cooperative launch. Slots are cut into runs, one for each block, and runs into tiles. A block
// counts its run's slots by expert and publishes that; while others do so too, it ranks its first tile and puts it into
// its order by expert, which needs nobody's counts. Once all blocks have published, it sums the counts, and every slot
// knows its place. Ids and places stay in registers meanwhile. Ranks come from votes, never from atomics that race for
// a place, so the arrays are the same bits each time.
#include "deepep_topk_metadata.h"

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <utility>

namespace sonicmoe {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
// Two blocks fit on a multiprocessor, which halves the registers of each. A cooperative launch waits until there is
// room for all its blocks at once: with one on each multiprocessor, it would wait for any kernel that another stream
// has left running on a few of them, such as a dispatch.
constexpr int kBlocksPerMultiprocessor = 2;
constexpr unsigned kAllLanes = 0xffffffffu;
// A warp reads an expert's counts of all runs at once, four a lane.
constexpr int kMaxRuns = 128;
// Slots of a tile for each thread, a power of two. What they need lies in registers, which bounds it.
constexpr int kMaxPerThread = 4;

static_assert(kMaxExperts <= kThreads, "a thread looks after an expert");

// Run r has tiles r*tiles to (r+1)*tiles - 1; a tile is per_thread*kThreads slots. The last run may be shorter.
struct Cut {
  int runs, tiles, per_thread;
};

Cut cut(int64_t slots, int multiprocessors) {
  const int64_t most = std::min(kMaxRuns, multiprocessors);
  int per_thread = 1;
  while (per_thread < kMaxPerThread && slots > most * per_thread * kThreads) per_thread *= 2;
  const int64_t per_tile = int64_t{per_thread} * kThreads, all = (slots + per_tile - 1) / per_tile;
  const int64_t tiles = (all + most - 1) / most;
  return {static_cast<int>((all + tiles - 1) / tiles), static_cast<int>(tiles), per_thread};
}

// Division by a multiplication, exact for numbers under 2^31: factor is 2^(31 + shift) / divisor, rounded up.
struct Divisor {
  uint32_t factor, shift;
  explicit Divisor(uint32_t by) : shift(0) {
    while ((uint64_t{1} << shift) < by) ++shift;
    factor = static_cast<uint32_t>((uint64_t{1} << (31 + shift)) / by + 1);
  }
};

__device__ __forceinline__ uint32_t operator/(uint32_t number, const Divisor& by) {
  return __umulhi(number * 2, by.factor) >> by.shift;
}

struct Task {
  TopkProblem p;
  ScaleRows scales;
  Cut cut;
  Divisor topk, block;
  int32_t* run_count;  // [E][kMaxRuns] slots of each expert by run
};

__device__ __forceinline__ int lane_id() { return threadIdx.x & 31; }
__device__ __forceinline__ int warp_id() { return threadIdx.x / 32; }
__device__ __forceinline__ int warp_sum(int value) { return __reduce_add_sync(kAllLanes, value); }

// What a thread knows of its slots of a tile. Expert and place share a word: a tile has fewer than 2^16 slots.
template <int kPerThread>
struct Held {
  int key[kPerThread];  // the expert; once ranked, expert << 16 | place; negative for a slot that is not here
  float prob[kPerThread];
};

// All loads are under way at once, which they would not be with a branch for each.
template <int kPerThread, typename Id>
__device__ __forceinline__ void load_ids(const Id* ids, int experts, uint32_t first, uint32_t slots,
                                         Held<kPerThread>& held) {
  Id id[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) id[i] = first + i * 32 < slots ? ids[first + i * 32] : Id{-1};
  // Compared before it is narrowed, as in expert_of.
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) held.key[i] = id[i] >= 0 && id[i] < experts ? static_cast<int>(id[i]) : -1;
}

template <int kPerThread>
__device__ __forceinline__ void load_experts(const TopkProblem& p, uint32_t first, uint32_t slots,
                                             Held<kPerThread>& held) {
  if (p.wide_indices) {
    load_ids(static_cast<const int64_t*>(p.indices), p.n_experts, first, slots, held);
  } else {
    load_ids(static_cast<const int32_t*>(p.indices), p.n_experts, first, slots, held);
  }
}

// Adds the slots to `count`, by expert: sums, in which no order shows.
template <int kPerThread>
__device__ __forceinline__ void count_experts(const Held<kPerThread>& held, int32_t* count) {
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    if (held.key[i] >= 0) atomicAdd(count + held.key[i], 1);
  }
}

// Some sums carried through one pass.
template <int kSums>
struct Sums {
  int of[kSums];
};

// Exclusive sums over the experts, a thread each, in `value`; as the result the sums of all, in warps with experts.
template <int kSums>
__device__ __forceinline__ Sums<kSums> sum_experts(Sums<kSums>& value, Sums<kSums>* of_warp, int experts) {
  const bool takes_part = warp_id() * 32 < experts;
  Sums<kSums> upto = value, all{};
  if (takes_part) {
#pragma unroll
    for (int step = 1; step < 32; step <<= 1) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        const int from_below = __shfl_up_sync(kAllLanes, upto.of[i], step);
        if (lane_id() >= step) upto.of[i] += from_below;
      }
    }
    if (lane_id() == 31) of_warp[warp_id()] = upto;
  }
  if (experts > 32) {
    __syncthreads();
  } else {
    __syncwarp();
  }
  if (takes_part) {
    const bool is_sum = lane_id() * 32 < experts;
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      const int other = is_sum ? of_warp[lane_id()].of[i] : 0;
      value.of[i] = warp_sum(lane_id() < warp_id() ? other : 0) + upto.of[i] - value.of[i];
      all.of[i] = warp_sum(other);
    }
  }
  return all;
}

// Shared memory: this, then a table of kTables words for each expert, then [kWarps][E | 1] slots by warp.
template <int kPerThread>
struct Shared {
  uint32_t slot[kPerThread * kThreads];    // in order by expert: token in the tile << 16 | number in the tile
  uint16_t expert[kPerThread * kThreads];  // of the same
  int32_t valid_of_warp[kWarps];
  Sums<1> sums_of_tile[kWarps];
  Sums<3> sums_of_all[kWarps];
  int32_t compact;  // valid slots before this run
  int32_t good, rows;  // the caller's counts are right; of all experts
};
enum Table { kCount, kHere, kBase, kTotal, kEarlier, kPadRow, kPadNumber, kTables };

template <int kPerThread>
size_t shared_bytes(int experts) {
  return sizeof(Shared<kPerThread>) + sizeof(int32_t) * (kTables * experts + kWarps * (experts | 1));
}

// Ranks the tile's slots among their warp's of the same expert, in `key`; then warp_count is, for each warp and expert,
// where its first of these lies in the tile's order. Barriers: one, in the middle.
template <int kPerThread>
__device__ __forceinline__ void rank_tile(int experts, Held<kPerThread>& held, int32_t* warp_count,
                                          const int32_t* here, int32_t* valid_of_warp) {
  unsigned peers[kPerThread];
  int valid = 0;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    peers[i] = __ballot_sync(kAllLanes, held.key[i] >= 0);
    valid += __popc(peers[i]);
  }
  if (lane_id() == 0) valid_of_warp[warp_id()] = valid;
  // One vote for each bit of an expert's number: faster than __match_any_sync.
#pragma unroll 1
  for (int bit = 1; bit < experts; bit <<= 1) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const bool set = held.key[i] & bit;
      const unsigned vote = __ballot_sync(kAllLanes, set);
      peers[i] &= set ? vote : ~vote;
    }
  }
  const int stride = experts | 1;  // odd, so that a warp reading one expert's counts of all warps meets 32 banks
  const unsigned below = (1u << lane_id()) - 1;
  int32_t* mine = warp_count + warp_id() * stride;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const bool is_valid = held.key[i] >= 0;
    const int rank = is_valid ? mine[held.key[i]] + __popc(peers[i] & below) : 0;
    __syncwarp();
    if (is_valid && (peers[i] & below) == 0) mine[held.key[i]] = rank + __popc(peers[i]);
    __syncwarp();
    held.key[i] = held.key[i] << 16 | rank;
  }
  __syncthreads();
  // An expert for each warp in turn, a lane for each warp's count.
#pragma unroll 2
  for (int e = warp_id(); e < experts; e += kWarps) {
    int32_t* count = warp_count + lane_id() * stride + e;
    const int own = *count;
    int upto = own;
#pragma unroll
    for (int step = 1; step < 32; step <<= 1) {
      const int from_below = __shfl_up_sync(kAllLanes, upto, step);
      if (lane_id() >= step) upto += from_below;
    }
    *count = here[e] + upto - own;
  }
}

// Puts the tile's slots into their order by expert.
template <int kPerThread>
__device__ __forceinline__ void stage_tile(const Task& task, uint32_t begin, uint32_t first, int valid_before,
                                           Held<kPerThread>& held, const int32_t* warp_begins,
                                           Shared<kPerThread>& shared) {
  const uint32_t first_token = begin / task.topk;
  const unsigned below = (1u << lane_id()) - 1;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const unsigned among = __ballot_sync(kAllLanes, held.key[i] >= 0);
    if (held.key[i] >= 0) {
      const int expert = held.key[i] >> 16;
      held.key[i] += warp_begins[expert];
      const int place = held.key[i] & 0xffff;
      shared.slot[place] = ((first + i * 32) / task.topk - first_token) << 16 | (valid_before + __popc(among & below));
      shared.expert[place] = static_cast<uint16_t>(expert);
    }
    valid_before += __popc(among);
  }
}

// Puts this run's count of an expert where every block finds it.
__device__ __forceinline__ void publish(const Task& task, int expert, int count) {
  int32_t* to = task.run_count + expert * kMaxRuns + blockIdx.x;
  *to = count;
  // Readers take four at a time.
  if (blockIdx.x + 1 == task.cut.runs) {
#pragma unroll 1
    for (int run = task.cut.runs; run % 4; ++run) *++to = 0;
  }
}

// Sums each expert's counts: of all runs, and of those before this one.
__device__ __forceinline__ void sum_runs(const Task& task, int32_t* total, int32_t* earlier) {
  constexpr int kAtOnce = 2;
  const int experts = task.p.n_experts, first = lane_id() * 4, before = static_cast<int>(blockIdx.x) - first;
#pragma unroll 1
  for (int e = warp_id(); e < experts; e += kAtOnce * kWarps) {
    int4 n[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      n[i] = make_int4(0, 0, 0, 0);
      if (e + i * kWarps < experts && first < task.cut.runs) {
        n[i] = __ldcg(reinterpret_cast<const int4*>(task.run_count + (e + i * kWarps) * kMaxRuns + first));
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (e + i * kWarps >= experts) break;
      const int of_all = warp_sum(n[i].x + n[i].y + n[i].z + n[i].w);
      const int of_earlier = warp_sum((before > 0 ? n[i].x : 0) + (before > 1 ? n[i].y : 0) +
                                      (before > 2 ? n[i].z : 0) + (before > 3 ? n[i].w : 0));
      if (lane_id() == 0) {
        total[e + i * kWarps] = of_all;
        earlier[e + i * kWarps] = of_earlier;
      }
    }
  }
}

// The caller sized the outputs by counts that the ids do not have. Nothing may be written then, and going on would
// compute on garbage: stop the device with a message.
__device__ void reject(const TopkProblem& p, int slots, int rows) {
  printf("sonicmoe: tokens_per_expert sum to %d slots in %d rows, but dispatched_indices hold %d slots in %d rows\n",
         p.n_slots, p.n_rows, slots, rows);
  __trap();
}

__device__ __forceinline__ void copy_scale_row(const ScaleRows& scales, int64_t token, int64_t row) {
  const uint32_t* from = scales.source + token * scales.words;
  uint32_t* to = scales.sorted + row * scales.words;
#pragma unroll 1
  for (int w = lane_id(); w < scales.words; w += 32) to[w] = from[w];
}

// Writes a staged tile's entries. `compact` valid slots come before the tile, `valid_before` before the warp in it.
template <int kPerThread>
__device__ __forceinline__ void place_tile(const Task& task, uint32_t begin, uint32_t first, uint32_t slots,
                                           int compact, int valid_before, int valid, const Held<kPerThread>& held,
                                           const int32_t* base, const Shared<kPerThread>& shared) {
  const TopkProblem& p = task.p;
  // In slot order: all that is indexed by slot.
  const unsigned below = (1u << lane_id()) - 1;
  int before = compact + valid_before;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const unsigned among = __ballot_sync(kAllLanes, held.key[i] >= 0);
    const int number = before + __popc(among & below);
    const uint32_t slot = first + i * 32, token = slot / task.topk;
    if (held.key[i] >= 0) {
      const int row = base[held.key[i] >> 16] + (held.key[i] & 0xffff);
      place_by_slot(p, static_cast<int32_t>(slot), held.prob[i], number, row);
    }
    if (slot < slots && slot == token * p.n_topk) p.slot_offset[token] = number;
    before += __popc(among);
  }
  if (threadIdx.x == 0 && begin < slots && slots - begin <= kPerThread * kThreads) {
    p.slot_offset[p.n_tokens] = compact + valid;
  }
  // In row order: what is indexed by row, so that a warp writes runs and not single words all over the place.
  const int first_token = begin / task.topk;
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    const int i = k * kThreads + threadIdx.x;
    if (i < valid) {
      const uint32_t slot = shared.slot[i];
      place_by_row(p, first_token + static_cast<int>(slot >> 16), compact + static_cast<int>(slot & 0xffff),
                   base[shared.expert[i]] + i);
    }
  }
#pragma unroll 1
  for (int i = warp_id(); i < valid && task.scales.words; i += kWarps) {
    copy_scale_row(task.scales, first_token + static_cast<int>(shared.slot[i] >> 16), base[shared.expert[i]] + i);
  }
}

template <int kPerThread>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor) build_metadata(Task task) {
  extern __shared__ int32_t dynamic[];
  auto& shared = *reinterpret_cast<Shared<kPerThread>*>(dynamic);
  const TopkProblem& p = task.p;
  const auto grid = cooperative_groups::this_grid();
  const int experts = p.n_experts, e = threadIdx.x;
  int32_t* const tables = dynamic + sizeof(shared) / sizeof(int32_t);
  int32_t *const of_tile = tables + kCount * experts, *const here = tables + kHere * experts;
  int32_t *const total = tables + kTotal * experts, *const earlier = tables + kEarlier * experts;
  int32_t *const pad_row = tables + kPadRow * experts, *const pad_number = tables + kPadNumber * experts;
  int32_t *const base = tables + kBase * experts, *const warp_count = tables + kTables * experts;
  const bool has = e < experts;
  const uint32_t slots = static_cast<uint32_t>(p.n_tokens) * p.n_topk;
  constexpr uint32_t kTile = kPerThread * kThreads;
  // A warp owns a contiguous part of a tile, so ranks within it grow with the slot.
  const uint32_t in_tile = warp_id() * kPerThread * 32 + lane_id();
  const uint32_t run = blockIdx.x * task.cut.tiles * kTile;

  Held<kPerThread> held;
  int32_t* const of_later_tiles = base;  // which has no other use yet
  if (task.cut.tiles > 1) {
    if (has) of_later_tiles[e] = 0;
    __syncthreads();
#pragma unroll 1
    for (int tile = 1; tile < task.cut.tiles; ++tile) {
      load_experts(p, run + tile * kTile + in_tile, slots, held);
      count_experts(held, of_later_tiles);
    }
  }

  cooperative_groups::grid_group::arrival_token arrival{};
  int next = 0, compact = 0;  // the row of my expert's next slot, and the valid slots of this run so far
#pragma unroll 1
  for (int tile = 0; tile < task.cut.tiles; ++tile) {
    const uint32_t begin = run + tile * kTile, first = begin + in_tile;
#pragma unroll 1
    for (int i = e; i < kWarps * (experts | 1); i += kThreads) warp_count[i] = 0;
    if (has) of_tile[e] = 0;
    load_experts(p, first, slots, held);
    __syncthreads();
    count_experts(held, of_tile);
    __syncthreads();
    const int count = has ? of_tile[e] : 0;
    if (tile == 0 && has) publish(task, e, count + (task.cut.tiles > 1 ? of_later_tiles[e] : 0));
    Sums<1> at{count};
    sum_experts(at, shared.sums_of_tile, experts);
    if (has) here[e] = at.of[0];
    if (tile == 0) arrival = grid.barrier_arrive();
    rank_tile(experts, held, warp_count, here, shared.valid_of_warp);
    __syncthreads();
    const int of_warp = shared.valid_of_warp[lane_id()];
    const int valid_before = warp_sum(lane_id() < warp_id() ? of_warp : 0), valid = warp_sum(of_warp);
    stage_tile(task, begin, first, valid_before, held, warp_count + warp_id() * (experts | 1), shared);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) held.prob[i] = first + i * 32 < slots ? p.probs[first + i * 32] : 0.0f;

    if (tile == 0) {
      grid.barrier_wait(std::move(arrival));
      sum_runs(task, total, earlier);
      __syncthreads();
      const int my_slots = has ? total[e] : 0, my_earlier = has ? earlier[e] : 0;
      const int my_rows = static_cast<int>((my_slots + p.block - 1) / task.block) * p.block;
      Sums<3> at{my_rows, my_slots, my_earlier};
      const Sums<3> all = sum_experts(at, shared.sums_of_all, experts);
      const bool fits = p.bounded ? all.of[0] <= p.n_rows : all.of[0] == p.n_rows, good = fits && all.of[1] == p.n_slots;
      if (has && good) {
        pad_row[e] = at.of[0] + my_slots;
        pad_number[e] = at.of[0] - at.of[1];
        if (blockIdx.x == 0) p.expert_offset[e] = at.of[0];
      }
      if (e == 0) {
        shared.good = good;
        shared.compact = all.of[2];
        shared.rows = all.of[0];
        if (blockIdx.x == 0) {
          if (!good) reject(p, all.of[1], all.of[0]);
          p.expert_offset[experts] = all.of[0];
        }
      }
      next = at.of[0] + my_earlier;
    }
    if (has) base[e] = next - here[e];
    next += count;
    __syncthreads();
    if (!shared.good) return;
    place_tile(task, begin, first, slots, shared.compact + compact, valid_before, valid, held, base, shared);
    compact += valid;
  }

  // Pads, experts dealt out over the blocks. Behind the last expert's rows lie those that nobody needed.
#pragma unroll 1
  for (int other = blockIdx.x; other <= experts; other += task.cut.runs) {
    const bool behind = other == experts;
    const int pads = behind ? p.n_rows - shared.rows : padded(total[other], p.block) - total[other];
    const int row = behind ? shared.rows : pad_row[other], number = behind ? row - p.n_slots : pad_number[other];
#pragma unroll 1
    for (int j = e; j < pads; j += kThreads) place_pad(p, number + j, row + j);
    for (int j = warp_id(); j < pads && task.scales.words; j += kWarps) copy_scale_row(task.scales, 0, row + j);
  }
}

__global__ void __launch_bounds__(kThreads) check_rows(TopkProblem p, unsigned long long* verdict) {
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; t < p.n_tokens;
       t += static_cast<int64_t>(gridDim.x) * kThreads) {
    RowFault fault = check_row(p, static_cast<int32_t>(t));
    if (fault != kRowGood) atomicMin(verdict, static_cast<unsigned long long>(t * 4 + fault));
  }
}

template <int kPerThread>
void launch_tiles(const Task& task, cudaStream_t stream) {
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(task.cut.runs);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared_bytes<kPerThread>(task.p.n_experts);
  config.stream = stream;
  config.attrs = &together;
  config.numAttrs = 1;
  // More has to be asked for.
  if (config.dynamicSmemBytes > 48 * 1024) {
    cudaFuncSetAttribute(build_metadata<kPerThread>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                         static_cast<int>(config.dynamicSmemBytes));
  }
  cudaLaunchKernelEx(&config, build_metadata<kPerThread>, task);
}

const char* last_error() {
  cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

}  // namespace

int64_t workspace_words(int32_t n_experts) { return int64_t{n_experts} * kMaxRuns; }

const char* launch(const TopkProblem& p, const ScaleRows& scales, int32_t* workspace, void* stream) {
  const int64_t slots = static_cast<int64_t>(p.n_tokens) * p.n_topk;
  if (slots == 0) return "";  // the caller has zeroed the offsets
  if (reinterpret_cast<uintptr_t>(workspace) % sizeof(int4)) return "workspace: need an address that 16 divides";
  int device = 0, multiprocessors = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  const Cut c = cut(slots, multiprocessors);
  const Task task{p, scales, c, Divisor(p.n_topk), Divisor(p.block), workspace};
  auto s = static_cast<cudaStream_t>(stream);
  switch (c.per_thread) {
    case 1: launch_tiles<1>(task, s); break;
    case 2: launch_tiles<2>(task, s); break;
    default: launch_tiles<kMaxPerThread>(task, s);
  }
  return last_error();
}

const char* launch_check(const TopkProblem& p, int64_t* verdict, void* stream) {
  auto s = static_cast<cudaStream_t>(stream);
  cudaMemsetAsync(verdict, 0xff, sizeof(int64_t), s);
  const int blocks = (p.n_tokens + kThreads - 1) / kThreads;
  if (blocks) {
    check_rows<<<blocks < 1024 ? blocks : 1024, kThreads, 0, s>>>(p, reinterpret_cast<unsigned long long*>(verdict));
  }
  return last_error();
}

}  // namespace sonicmoe
