// The CUDA version: two launches. In the first each block ranks the slots of its tile by expert and counts them; in the
// second each block sums the counts of the tiles before it, and every slot knows its place. Ranks come from ballots,
// never from atomics that race for a place, so the arrays are the same bits each time.
#include "deepep_topk_metadata.h"

#include <cuda_runtime.h>

#include <cstdio>

namespace sonicmoe {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;
// About one tile for each multiprocessor: every block reads the counts of all tiles, so more would cost more.
constexpr int kTargetTiles = 132;
// Slots of a tile for each thread, a power of two. In-tile numbers have 16 bits, which bounds it.
constexpr int kMaxPerThread = 16;

struct Cut {
  int tiles;
  int per_thread;
};

Cut cut(int64_t slots) {
  int per_thread = 1;
  while (per_thread < kMaxPerThread && slots > int64_t{kTargetTiles} * per_thread * kThreads) per_thread *= 2;
  const int64_t per_tile = int64_t{per_thread} * kThreads;
  return {static_cast<int>((slots + per_tile - 1) / per_tile), per_thread};
}

// Scratch: counts by (expert, tile), and each slot's numbers in its tile.
struct Scratch {
  int32_t* tile_count;  // [E][tiles]
  uint32_t* in_tile;    // [T*K] rank among the tile's slots of the same expert << 16 | number among its valid slots
  __host__ __device__ Scratch(int32_t* words, int experts, int tiles)
      : tile_count(words), in_tile(reinterpret_cast<uint32_t*>(words + static_cast<int64_t>(experts) * tiles)) {}
};

__device__ __forceinline__ int lane_id() { return threadIdx.x & 31; }

__device__ __forceinline__ int warp_sum(int value) {
  for (int step = 16; step; step >>= 1) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

__device__ __forceinline__ int inclusive_in_warp(int value) {
#pragma unroll
  for (int step = 1; step < 32; step <<= 1) {
    const int from_below = __shfl_up_sync(kAllLanes, value, step);
    if (lane_id() >= step) value += from_below;
  }
  return value;
}

// Odd, so that a warp reading one expert's counts of all warps meets 32 banks.
__host__ __device__ inline int rank_stride(int experts) { return experts | 1; }

template <int kPerThread>
__global__ void __launch_bounds__(kThreads, 1) rank_tiles(TopkProblem p, Cut c, int32_t* workspace) {
  // [kWarps][stride] slots of each expert by warp, then those of the warps before.
  extern __shared__ int32_t shared[];
  __shared__ int32_t valid_of_warp[kWarps];
  const int experts = p.n_experts, lane = lane_id(), warp = threadIdx.x / 32;
  const Scratch to(workspace, experts, c.tiles);
  const int stride = rank_stride(experts);
  for (int i = threadIdx.x; i < kWarps * stride; i += kThreads) shared[i] = 0;

  // A warp owns a contiguous part of the tile, so ranks within it grow with the slot.
  const int64_t slots = static_cast<int64_t>(p.n_tokens) * p.n_topk;
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) * kThreads + warp * 32) * kPerThread + lane;
  int expert[kPerThread];
  uint32_t number[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) expert[i] = begin + i * 32 < slots ? expert_of(p, begin + i * 32) : -1;
  __syncthreads();

  const unsigned below = (1u << lane) - 1;
  int32_t* mine = shared + warp * stride;
  int valid = 0;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const unsigned peers = __match_any_sync(kAllLanes, expert[i]);
    const unsigned here = __ballot_sync(kAllLanes, expert[i] >= 0);
    const int rank = expert[i] >= 0 ? mine[expert[i]] + __popc(peers & below) : 0;
    __syncwarp();
    if (expert[i] >= 0 && lane == __ffs(peers) - 1) mine[expert[i]] += __popc(peers);
    __syncwarp();
    number[i] = static_cast<uint32_t>(rank) << 16 | (valid + __popc(here & below));
    valid += __popc(here);
  }
  if (lane == 0) valid_of_warp[warp] = valid;
  __syncthreads();
  // An expert for each warp in turn, a lane for each warp's count.
  for (int e = warp; e < experts; e += kWarps) {
    int32_t* count = shared + lane * stride + e;
    const int own = *count, upto = inclusive_in_warp(own);
    *count = upto - own;
    if (lane == 31) to.tile_count[static_cast<int64_t>(e) * c.tiles + blockIdx.x] = upto;
  }
  const int valid_before = warp_sum(lane < warp ? valid_of_warp[lane] : 0);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    // The halves cannot carry into each other: a tile has at most 2^15 slots.
    const uint32_t earlier = expert[i] >= 0 ? static_cast<uint32_t>(mine[expert[i]]) << 16 : 0;
    if (begin + i * 32 < slots) to.in_tile[begin + i * 32] = number[i] + earlier + valid_before;
  }
}

// Four sums carried through one pass.
struct Sums {
  int rows, slots, before, mine;
};

// Exclusive sums over the block's threads in `value`, and the sums of all as the result. `of_warp` holds kWarps.
__device__ Sums block_exclusive_sums(Sums& value, Sums* of_warp) {
  const int lane = lane_id(), warp = threadIdx.x / 32;
  const Sums own = value;
  Sums sum{inclusive_in_warp(own.rows), inclusive_in_warp(own.slots), inclusive_in_warp(own.before),
           inclusive_in_warp(own.mine)};
  if (lane == 31) of_warp[warp] = sum;
  __syncthreads();
  const Sums w = of_warp[lane];
  const bool earlier = lane < warp;
  value = {warp_sum(earlier ? w.rows : 0) + sum.rows - own.rows, warp_sum(earlier ? w.slots : 0) + sum.slots - own.slots,
           warp_sum(earlier ? w.before : 0) + sum.before - own.before,
           warp_sum(earlier ? w.mine : 0) + sum.mine - own.mine};
  return {warp_sum(w.rows), warp_sum(w.slots), warp_sum(w.before), warp_sum(w.mine)};
}

// The caller sized the outputs by counts that the ids do not have. Nothing may be written then, and going on would
// compute on garbage: stop the device with a message.
__device__ void reject(const TopkProblem& p, int slots, int rows) {
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    printf("sonicmoe: tokens_per_expert sum to %d slots in %d rows, but dispatched_indices hold %d slots in %d rows\n",
           p.n_slots, p.n_rows, slots, rows);
    __trap();
  }
}

__device__ void copy_scale_row(const ScaleRows& scales, int64_t token, int64_t row) {
  const uint32_t* from = scales.source + token * scales.words;
  uint32_t* to = scales.sorted + row * scales.words;
  for (int w = lane_id(); w < scales.words; w += 32) to[w] = from[w];
}

// One slot of a tile, at its place in the tile's order by expert.
struct Staged {
  uint16_t slot, compact, expert;
};

template <int kPerThread>
__global__ void __launch_bounds__(kThreads, 1)
    place_tiles(TopkProblem p, Cut c, int32_t* workspace, ScaleRows scales) {
  extern __shared__ Staged staged[];       // [slots_per_tile]
  __shared__ int32_t total[kMaxExperts];   // slots of each expert
  __shared__ int32_t before[kMaxExperts];  // of these, in earlier tiles
  __shared__ int32_t here[kMaxExperts];    // in this tile; then where they begin in `staged`
  __shared__ int32_t base[kMaxExperts];    // row of the expert's first slot here, less where it is staged
  __shared__ int32_t pad_row[kMaxExperts], pad_number[kMaxExperts];
  __shared__ Sums of_warp[kWarps];
  const int experts = p.n_experts, lane = lane_id(), warp = threadIdx.x / 32, tile = blockIdx.x;
  const Scratch from(workspace, experts, c.tiles);

  // What the dispatcher gave does not depend on the first launch: load it while that one still runs.
  const int64_t all_slots = static_cast<int64_t>(p.n_tokens) * p.n_topk;
  const int64_t begin = static_cast<int64_t>(tile) * kPerThread * kThreads;
  int expert[kPerThread];
  float prob[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int64_t s = begin + i * kThreads + threadIdx.x;
    expert[i] = s < all_slots ? expert_of(p, s) : -1;
    prob[i] = expert[i] >= 0 ? p.probs[s] : 0.0f;
  }
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
  uint32_t number[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int64_t s = begin + i * kThreads + threadIdx.x;
    number[i] = s < all_slots ? from.in_tile[s] : 0;
  }

  for (int e = warp; e < experts; e += kWarps) {
    const int32_t* count = from.tile_count + static_cast<int64_t>(e) * c.tiles;
    int earlier = 0, all = 0;
    for (int t = lane; t < c.tiles; t += 32) {
      const int n = count[t];
      all += n;
      earlier += t < tile ? n : 0;
      if (t == tile) here[e] = n;
    }
    earlier = warp_sum(earlier);
    all = warp_sum(all);
    if (lane == 0) {
      before[e] = earlier;
      total[e] = all;
    }
  }
  __syncthreads();

  // Prefix sums over the experts, one a thread.
  const int e = threadIdx.x;
  const bool has = e < experts;
  const int my_slots = has ? total[e] : 0, my_rows = padded(my_slots, p.block), my_before = has ? before[e] : 0;
  Sums at{my_rows, my_slots, my_before, has ? here[e] : 0};
  const Sums all = block_exclusive_sums(at, of_warp);
  if (all.slots != p.n_slots || all.rows != p.n_rows) {
    reject(p, all.slots, all.rows);
    return;
  }
  if (has) {
    here[e] = at.mine;
    base[e] = at.rows + my_before - at.mine;
    pad_row[e] = at.rows + my_slots;
    pad_number[e] = at.rows - at.slots;
    if (tile == 0) p.expert_offset[e] = at.rows;
  }
  if (tile == 0 && e == 0) p.expert_offset[experts] = all.rows;
  __syncthreads();

  // In slot order: all that is indexed by slot, and the slots into their order by expert.
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int in_tile = i * kThreads + threadIdx.x;
    if (begin + in_tile >= all_slots) break;
    const uint32_t s = static_cast<uint32_t>(begin + in_tile);
    const uint32_t token = s / static_cast<uint32_t>(p.n_topk);
    const int compact = all.before + static_cast<int>(number[i] & 0xffff);
    if (s == token * p.n_topk) p.slot_offset[token] = compact;
    if (s == all_slots - 1) p.slot_offset[p.n_tokens] = compact + (expert[i] >= 0);
    if (expert[i] >= 0) {
      const int position = here[expert[i]] + static_cast<int>(number[i] >> 16);
      place_by_slot(p, s, prob[i], compact, base[expert[i]] + position);
      staged[position] = {static_cast<uint16_t>(in_tile), static_cast<uint16_t>(number[i] & 0xffff),
                          static_cast<uint16_t>(expert[i])};
    }
  }
  __syncthreads();

  // In row order: what is indexed by row, so that a warp writes runs and not single words all over the place.
  for (int i = threadIdx.x; i < all.mine; i += kThreads) {
    const Staged s = staged[i];
    const uint32_t token = static_cast<uint32_t>(begin + s.slot) / static_cast<uint32_t>(p.n_topk);
    place_by_row(p, static_cast<int32_t>(token), all.before + s.compact, base[s.expert] + i);
  }
  for (int i = warp; i < all.mine && scales.words; i += kWarps) {
    const Staged s = staged[i];
    copy_scale_row(scales, static_cast<uint32_t>(begin + s.slot) / static_cast<uint32_t>(p.n_topk), base[s.expert] + i);
  }

  // Pads, experts dealt out over the blocks.
  for (int other = tile; other < experts; other += c.tiles) {
    const int pads = padded(total[other], p.block) - total[other];
    for (int j = threadIdx.x; j < pads; j += kThreads) place_pad(p, pad_number[other] + j, pad_row[other] + j);
    for (int j = warp; j < pads && scales.words; j += kWarps) copy_scale_row(scales, 0, pad_row[other] + j);
  }
}

__global__ void __launch_bounds__(kThreads) check_rows(TopkProblem p, unsigned long long* verdict) {
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; t < p.n_tokens;
       t += static_cast<int64_t>(gridDim.x) * kThreads) {
    RowFault fault = check_row(p, static_cast<int32_t>(t));
    if (fault != kRowGood) atomicMin(verdict, static_cast<unsigned long long>(t * 4 + fault));
  }
}

// Blocks may use more than 48 KB of shared memory only if the kernel says so.
template <typename Kernel>
void allow_shared(Kernel kernel, size_t bytes) {
  if (bytes > 16 * 1024) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  }
}

template <int kPerThread>
void launch_both(const TopkProblem& p, const Cut& c, int32_t* workspace, const ScaleRows& scales, cudaStream_t stream) {
  const size_t bytes = sizeof(int32_t) * kWarps * rank_stride(p.n_experts);
  allow_shared(rank_tiles<kPerThread>, bytes);
  rank_tiles<kPerThread><<<c.tiles, kThreads, bytes, stream>>>(p, c, workspace);

  // The second launch may start while the first one runs; it waits for its results by itself.
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(c.tiles);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kPerThread * kThreads * sizeof(Staged);
  allow_shared(place_tiles<kPerThread>, config.dynamicSmemBytes);
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = 1;
  cudaLaunchKernelEx(&config, place_tiles<kPerThread>, p, c, workspace, scales);
}

const char* last_error() {
  cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

}  // namespace

int64_t workspace_words(int32_t n_tokens, int32_t n_topk, int32_t n_experts) {
  const int64_t slots = static_cast<int64_t>(n_tokens) * n_topk;
  return static_cast<int64_t>(cut(slots).tiles) * n_experts + slots;
}

const char* launch(const TopkProblem& p, const ScaleRows& scales, int32_t* workspace, void* stream) {
  const Cut c = cut(static_cast<int64_t>(p.n_tokens) * p.n_topk);
  if (c.tiles == 0) return "";  // no slots: the caller has zeroed the offsets
  auto s = static_cast<cudaStream_t>(stream);
  switch (c.per_thread) {
    case 1: launch_both<1>(p, c, workspace, scales, s); break;
    case 2: launch_both<2>(p, c, workspace, scales, s); break;
    case 4: launch_both<4>(p, c, workspace, scales, s); break;
    case 8: launch_both<8>(p, c, workspace, scales, s); break;
    default: launch_both<kMaxPerThread>(p, c, workspace, scales, s);
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
