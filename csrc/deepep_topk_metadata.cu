// The CUDA version: one cooperative launch. Slots are cut into runs, one for each block, and runs into tiles. A block
// counts its slots by expert and publishes the counts of its run. While others do so, it puts its first tile into its
// order by expert, which needs nobody's counts. Once all blocks have published, it sums the counts, and every slot knows
// its place. Ids and places stay in registers meanwhile. Ranks come from votes, never from atomics that race for a
// place, so the arrays are the same bits each time.
//
// A block's first warp, the clerk, holds no slots: it meets the other blocks while the rest, the placers, deal with
// theirs. Two kernels do all this. In the one for at most 32 experts and runs of one tile each warp sums over the experts
// for itself; in the other, for everything, the clerk does so for its block.
#include "deepep_topk_metadata_few.cuh"
#include "deepep_topk_metadata_steps.cuh"

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <utility>

namespace sonicmoe {
namespace {

Cut cut(int64_t slots, int multiprocessors) {
  const int64_t most = std::min(kMaxRuns, multiprocessors);
  int per_thread = 1;
  while (per_thread < kMaxPerThread && slots > most * per_thread * kPlacers) per_thread *= 2;
  const int64_t per_tile = int64_t{per_thread} * kPlacers, all = (slots + per_tile - 1) / per_tile;
  const int64_t tiles = (all + most - 1) / most;
  return {static_cast<int>((all + tiles - 1) / tiles), static_cast<int>(tiles), per_thread};
}

template <int kPerThread>
size_t shared_bytes(int experts) {
  return sizeof(Shared<kPerThread>) + sizeof(int32_t) * (kTables * experts + kPlacerWarps * counts_of_warp(experts));
}

// The caller sized the outputs by counts that the ids do not have. What follows from them may not be written then, and
// going on would compute on garbage: stop the device with a message.
__device__ void reject(const TopkProblem& p, int slots, int rows) {
  printf("sonicmoe: tokens_per_expert sum to %d slots in %d rows, but dispatched_indices hold %d slots in %d rows\n",
         p.n_slots, p.n_rows, slots, rows);
  __trap();
}

// kOneTile: a run is no more than that. There is less code to fetch then, and less to hold in registers.
template <int kPerThread, bool kOneTile>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor) build_metadata(Task task) {
  extern __shared__ int32_t dynamic[];
  auto& shared = *reinterpret_cast<Shared<kPerThread>*>(dynamic);
  const TopkProblem& p = task.p;
  const auto grid = cooperative_groups::this_grid();
  const int experts = p.n_experts, stride = counts_of_warp(experts);
  int32_t* const tables = dynamic + sizeof(shared) / sizeof(int32_t);
  int32_t *const of_tile = tables + kCount * experts, *const here = tables + kHere * experts;
  int32_t *const next = tables + kNext * experts, *const base = tables + kBase * experts;
  int32_t *const total = tables + kTotal * experts, *const earlier = tables + kEarlier * experts;
  int32_t *const pad_row = tables + kPadRow * experts, *const pad_number = tables + kPadNumber * experts;
  int32_t* const pads = tables + kPads * experts;
  int32_t *const warp_count = tables + kTables * experts, *const mine = warp_count + placer_warp() * stride;
  const bool is_placer = is_placer_warp();
  const uint32_t slots = static_cast<uint32_t>(p.n_tokens) * p.n_topk;
  // By the caller's counts, which are looked into later; arrays of this size have room for what is written till then.
  const bool all_valid = p.n_slots == slots;
  constexpr uint32_t kTile = kPerThread * kPlacers;
  // A warp owns a contiguous part of a tile, so ranks within it grow with the slot.
  const uint32_t in_tile = placer_warp() * kPerThread * 32 + lane_id();
  const uint32_t run = blockIdx.x * (kOneTile ? 1 : task.cut.tiles) * kTile;
  // The last run may have fewer: a tile behind all slots could have numbers that Divisor does not take.
  const int tiles = kOneTile ? 1 : min(task.cut.tiles, static_cast<int>((slots - run + kTile - 1) / kTile));

  Held<kPerThread> held;
  int32_t* const of_later_tiles = next;  // which has no other use yet
  if (tiles > 1) {
    for (int e = threadIdx.x; e < experts; e += kThreads) of_later_tiles[e] = 0;
    __syncthreads();
#pragma unroll 1
    for (int tile = 1; tile < tiles && is_placer; ++tile) {
      load_experts(p, run + tile * kTile + in_tile, slots, held);
      count_experts(held, of_later_tiles);
    }
  }

  cooperative_groups::grid_group::arrival_token arrival{};
  int compact = 0;  // the valid slots of this run so far
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    const uint32_t begin = run + tile * kTile, first = begin + in_tile;
    if (is_placer) {
      if (all_valid) load_probs(p.probs, first, slots, held);  // which nobody waits for here
      load_experts(p, first, slots, held);
#pragma unroll 1
      for (int e = lane_id(); e < experts; e += 32) mine[e] = 0;
      __syncwarp();
      const int valid = rank_slots(experts, held, mine);
      if (lane_id() == 0) shared.valid_of_warp[placer_warp()] = valid;
    }
    __syncthreads();
#pragma unroll 1
    for (int e = threadIdx.x; e < experts; e += kThreads) {
      if (tile > 0) next[e] += of_tile[e];
      const int count = of_tile[e] = sum_warps(warp_count + e, stride);
      if (tile == 0) publish(task, e, count + (tiles > 1 ? of_later_tiles[e] : 0));
    }
    if (tile == 0) {
      arrival = grid.barrier_arrive();  // the block's threads meet here, as below
    } else {
      __syncthreads();
    }
    // Where an expert's slots begin in the tile's order: for the clerk as it is, for a placer added to its own.
    int32_t* const begins = is_placer ? mine : here;
    sum_experts<1>(experts, [&](int e) { return Sums<1>{of_tile[e]}; }, [&](int e, const Sums<1>&, const Sums<1>& at) {
      begins[e] = at.of[0] + (is_placer ? begins[e] : 0);
      if (!is_placer && tile > 0) base[e] = next[e] - at.of[0];
    });
    __syncwarp();
    const int of_warp = lane_id() < kPlacerWarps ? shared.valid_of_warp[lane_id()] : 0;
    const int valid_before = warp_sum(lane_id() < placer_warp() ? of_warp : 0), valid = warp_sum(of_warp);
    if (is_placer) stage_tile(task, begin, first, valid_before, mine, held, shared);
    if (is_placer && all_valid) place_all_slots(task, begin, in_tile, slots, held);

    if (tile == 0) {
      grid.barrier_wait(std::move(arrival));
      sum_runs<4>(task, total, earlier);
      __syncthreads();
      if (!is_placer) {
        int before_run = 0;
        const Sums<2> all = sum_experts<2>(experts, [&](int e) {
          before_run += earlier[e];
          const int filled = static_cast<int>((total[e] + p.block - 1) / task.block) * p.block;
          return Sums<2>{filled, filled - total[e]};
        }, [&](int e, const Sums<2>& own, const Sums<2>& at) {
          const int row = at.of[0] + earlier[e];
          next[e] = row;
          base[e] = row - here[e];
          pads[e] = own.of[1];
          pad_row[e] = at.of[0] + own.of[0] - own.of[1];
          pad_number[e] = at.of[1];
        });
        before_run = warp_sum(before_run);
        if (lane_id() == 0) {
          const int rows = all.of[0], valid_slots = rows - all.of[1];
          const bool good = valid_slots == p.n_slots && (p.bounded ? rows <= p.n_rows : rows == p.n_rows);
          if (blockIdx.x == 0 && !good) reject(p, valid_slots, rows);
          shared.good = good;
          shared.compact = before_run;
          shared.rows = rows;
        }
      }
    }
    if (is_placer && !all_valid) load_probs(p.probs, first, slots, held);
    __syncthreads();
    if (!shared.good) return;
    if (is_placer) {
      if (!all_valid) {
        place_slots(task, first, slots, shared.compact + compact + valid_before, held, [](int, bool, int) {});
      }
      place_rows(task, begin, shared.compact + compact, valid_before, valid, held, base, shared);
    }
    compact += valid;
  }
  if (threadIdx.x == 0 && blockIdx.x + 1 == task.cut.runs) p.slot_offset[p.n_tokens] = shared.compact + compact;
  if (blockIdx.x == 0) {
    for (int e = threadIdx.x; e <= experts; e += kThreads) {
      p.expert_offset[e] = e < experts ? pad_row[e] - total[e] : shared.rows;
    }
  }

  // Every pad is a row without a slot, of an expert or behind the last.
  if (p.n_rows == p.n_slots) return;
  // Pads, experts dealt out over the blocks. Behind the last expert's rows lie those that nobody needed.
#pragma unroll 1
  for (int other = blockIdx.x; other <= experts; other += task.cut.runs) {
    const bool behind = other == experts;
    const int more = behind ? p.n_rows - shared.rows : pads[other];
    const int row = behind ? shared.rows : pad_row[other], number = behind ? row - p.n_slots : pad_number[other];
#pragma unroll 1
    for (int j = threadIdx.x; j < more; j += kThreads) place_pad(p, number + j, row + j);
    for (int j = warp_id(); j < more && task.scales.words; j += kWarps) copy_scale_row(task.scales, 0, row + j);
  }
}

// The same for at most 32 experts and runs of one tile. Nobody waits for the clerk's sums, and a run's counts are out
// before its slots are ranked. kAllValid: all slots are, by the caller's counts, which are looked into later, as above.
template <int kPerThread, bool kAllValid>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor) build_metadata_of_few(Task task) {
  extern __shared__ int32_t dynamic[];
  auto& shared = *reinterpret_cast<SharedOfFew<kPerThread>*>(dynamic);
  const TopkProblem& p = task.p;
  const auto grid = cooperative_groups::this_grid();
  const int experts = p.n_experts, expert = lane_id();
  const bool is_placer = is_placer_warp();
  const uint32_t slots = static_cast<uint32_t>(p.n_tokens) * p.n_topk;
  const uint32_t begin = blockIdx.x * kPerThread * kPlacers, in_tile = placer_warp() * kPerThread * 32 + lane_id();

  Held<kPerThread> held;
  unsigned lanes[kPerThread];
  if (is_placer) {
    if (kAllValid) load_probs(p.probs, begin + in_tile, slots, held);  // which nobody waits for here
    load_experts(p, begin + in_tile, slots, held);
    shared.warp_count[placer_warp()][expert] = find_lanes(experts, held, lanes);
  }
  __syncthreads();
  if (is_placer) sum_warps_of_few(task, shared);
  auto arrival = grid.barrier_arrive();  // the block's threads meet here, as below
  const int of_tile = shared.of_tile[expert], before = is_placer ? shared.warp_count[placer_warp()][expert] : 0;
  const int upto = sum_of_lanes_upto(of_tile), valid = of_lane(upto, 31), here = upto - of_tile;
  const int valid_before = kAllValid ? 0 : warp_sum(before);
  if (is_placer) {
    stage_tile_of_few<kAllValid>(task, begin, in_tile, valid_before, here + before, lanes, held, shared);
    if (kAllValid) place_all_slots(task, begin, in_tile, slots, held);
  }

  grid.barrier_wait(std::move(arrival));
  sum_runs<2>(task, shared.total, shared.earlier);
  if (is_placer && !kAllValid) load_probs(p.probs, begin + in_tile, slots, held);
  __syncthreads();
  const RowsOfLane own = rows_of_lane(task, shared.total);
  const int earlier = expert < experts ? shared.earlier[expert] : 0;
  const int valid_slots = warp_sum(own.total), rows = of_lane(own.end, 31);
  const int compact = kAllValid ? static_cast<int>(begin) : warp_sum(earlier);
  if (valid_slots != p.n_slots || (p.bounded ? rows > p.n_rows : rows != p.n_rows)) {
    if (blockIdx.x == 0 && threadIdx.x == 0) reject(p, valid_slots, rows);
    return;
  }
  if (is_placer) {
    const int base = own.first + earlier - here;
    place_tile_of_few<kAllValid>(task, begin, in_tile, slots, compact, valid_before, valid, base, held, shared);
  } else if (blockIdx.x == 0) {
    if (expert < experts) p.expert_offset[expert] = own.first;
    if (expert == 0) {
      p.expert_offset[experts] = rows;
      p.slot_offset[p.n_tokens] = valid_slots;
    }
  }

  // Pads, as above.
  if (p.n_rows == p.n_slots) return;
#pragma unroll 1
  for (int other = blockIdx.x; other <= experts; other += task.cut.runs) {
    const bool behind = other == experts;
    const int row = behind ? rows : of_lane(own.first + own.total, other);
    const int more = (behind ? p.n_rows : of_lane(own.end, other)) - row;
    const int number = row - warp_sum(expert <= other ? own.total : 0);
#pragma unroll 1
    for (int j = threadIdx.x; j < more; j += kThreads) place_pad(p, number + j, row + j);
    for (int j = warp_id(); j < more && task.scales.words; j += kWarps) copy_scale_row(task.scales, 0, row + j);
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
  // Runs are only cut into tiles where threads have as many slots as they can hold.
  constexpr bool kNeverTiles = kPerThread < kMaxPerThread;
  const bool few = task.p.n_experts <= kFewExperts && task.cut.tiles == 1;
  const bool all_valid = task.p.n_slots == int64_t{task.p.n_tokens} * task.p.n_topk;
  const auto kernel = few && all_valid      ? build_metadata_of_few<kPerThread, true>
                      : few                 ? build_metadata_of_few<kPerThread, false>
                      : task.cut.tiles == 1 ? build_metadata<kPerThread, true>
                                            : build_metadata<kPerThread, kNeverTiles>;
  config.dynamicSmemBytes = few ? sizeof(SharedOfFew<kPerThread>) : shared_bytes<kPerThread>(task.p.n_experts);
  config.stream = stream;
  config.attrs = &together;
  config.numAttrs = 1;
  // More has to be asked for.
  if (config.dynamicSmemBytes > 48 * 1024) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                         static_cast<int>(config.dynamicSmemBytes));
  }
  cudaLaunchKernelEx(&config, kernel, task);
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
    case 4: launch_tiles<4>(task, s); break;
    default: launch_tiles<kMaxPerThread>(task, s);
  }
  return last_error();
}

const char* launch_check(const TopkProblem& p, int64_t* verdict, void* stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(std::min<int64_t>((int64_t{p.n_tokens} + kThreads - 1) / kThreads, 1024));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaMemsetAsync(verdict, 0xff, sizeof(int64_t), config.stream);
  if (p.n_tokens) cudaLaunchKernelEx(&config, check_rows, p, reinterpret_cast<unsigned long long*>(verdict));
  return last_error();
}

}  // namespace sonicmoe
