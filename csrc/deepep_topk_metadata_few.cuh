// The steps where there are at most 32 experts, and runs of one tile. In every warp, lane e knows what there is to know
// of expert e: what a slot needs of its expert comes from a lane, and each warp sums over the experts for itself.
#pragma once

#include "deepep_topk_metadata_steps.cuh"

namespace sonicmoe {
namespace {

constexpr int kFewExperts = 32;

// A slot of the tile in a word: token in the tile << 17 | number in the tile << 5 | expert.
constexpr int kTokenShift = 17, kNumberShift = 5;

template <int kPerThread>
struct SharedOfFew {
  static_assert(kPerThread * kPlacers <= 1 << (kTokenShift - kNumberShift) && kFewExperts <= 1 << kNumberShift);
  uint32_t slot[kPerThread * kPlacers];  // in order by expert
  int32_t warp_count[kPlacerWarps][counts_of_warp(kFewExperts)];  // slots by warp; then those of the warps before
  int32_t of_tile[kFewExperts], total[kFewExperts], earlier[kFewExperts];
};

template <typename Word>
__device__ __forceinline__ Word of_lane(Word value, int lane) {
  return __shfl_sync(kAllLanes, value, lane);
}

// The sum of a number over this lane and those below.
__device__ __forceinline__ int sum_of_lanes_upto(int number) {
#pragma unroll
  for (int step = 1; step < 32; step <<= 1) {
    const int from_below = __shfl_up_sync(kAllLanes, number, step);
    if (lane_id() >= step) number += from_below;
  }
  return number;
}

// Finds the lanes whose slots are of this lane's expert. Returns how many slots of the warp are. For a lane without an
// expert that is none, and nobody asks for its lanes.
template <int kPerThread>
__device__ __forceinline__ int find_lanes(int experts, const Held<kPerThread>& held, unsigned (&lanes)[kPerThread]) {
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) lanes[i] = __ballot_sync(kAllLanes, held.key[i] >= 0);
  // One vote for each bit of an expert's number, as in rank_slots.
#pragma unroll 1
  for (int bit = 1; bit < experts; bit <<= 1) {
    const unsigned unset = lane_id() & bit ? 0u : kAllLanes;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) lanes[i] &= __ballot_sync(kAllLanes, held.key[i] & bit) ^ unset;
  }
  int count = 0;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) count += __popc(lanes[i]);
  return lane_id() < experts ? count : 0;
}

// Makes the warps' counts of an expert the numbers of its slots in warps before each, and publishes the sum. Half a
// placer warp does so for an expert, with a lane for each warp; it reads and writes counts that no other thread does.
template <int kPerThread>
__device__ __forceinline__ void sum_warps_of_few(const Task& task, SharedOfFew<kPerThread>& shared) {
  static_assert(kPlacerWarps == 16 && kFewExperts == 2 * kPlacerWarps);
  const int warp = lane_id() % kPlacerWarps, expert = placer_warp() * 2 + lane_id() / kPlacerWarps;
  int32_t* const count = &shared.warp_count[warp][expert];
  const int own = *count;
  int upto = own;
#pragma unroll
  for (int step = 1; step < kPlacerWarps; step <<= 1) {
    const int from_below = __shfl_up_sync(kAllLanes, upto, step);
    if (warp >= step) upto += from_below;
  }
  if (warp == kPlacerWarps - 1) {
    if (expert < task.p.n_experts) publish(task, expert, upto);
    shared.of_tile[expert] = upto;
  }
  *count = upto - own;
}

// As rank_slots and stage_tile. `lanes` are those whose slots are of this lane's expert, `next` is where the first of
// the warp's slots of that goes.
template <bool kAllValid, int kPerThread>
__device__ __forceinline__ void stage_tile_of_few(const Task& task, uint32_t begin, uint32_t in_tile, int valid_before,
                                                  int next, const unsigned (&lanes)[kPerThread],
                                                  Held<kPerThread>& held, SharedOfFew<kPerThread>& shared) {
  const uint32_t first = begin + in_tile, first_token = begin / task.topk;
  const unsigned below = (1u << lane_id()) - 1;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int expert = held.key[i];  // of a slot that is not here -1: it asks some lane, and makes no use of the answer
    const unsigned peers = of_lane(lanes[i], expert);
    held.key[i] = expert << 16 | (of_lane(next, expert) + __popc(peers & below));
    next += __popc(lanes[i]);
  }
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const bool is_valid = held.key[i] >= 0;
    uint32_t number = in_tile + i * 32;
    if (!kAllValid) {
      const unsigned among = __ballot_sync(kAllLanes, is_valid);
      number = valid_before + __popc(among & below);
      valid_before += __popc(among);
    }
    const uint32_t token = (first + i * 32) / task.topk - first_token;
    store_if(is_valid, shared.slot, held.key[i] & 0xffff,
             token << kTokenShift | number << kNumberShift | (held.key[i] >> 16));
  }
}

// Of the lane's expert, once the runs' counts are summed: all its slots, its first row, and that behind its pads.
struct RowsOfLane {
  int total, first, end;
};

__device__ __forceinline__ RowsOfLane rows_of_lane(const Task& task, const int32_t* total) {
  RowsOfLane rows{lane_id() < task.p.n_experts ? total[lane_id()] : 0, 0, 0};
  const int filled = static_cast<int>((rows.total + task.p.block - 1) / task.block) * task.p.block;
  rows.end = sum_of_lanes_upto(filled);
  rows.first = rows.end - filled;
  return rows;
}

// As place_slots, unless place_all_slots has done that, and place_rows. `base` is the row of the tile's first slot of
// the lane's expert, less its place in the tile's order.
template <bool kAllValid, int kPerThread>
__device__ __forceinline__ void place_tile_of_few(const Task& task, uint32_t begin, uint32_t in_tile, uint32_t slots,
                                                  int compact, int valid_before, int valid, int base,
                                                  const Held<kPerThread>& held,
                                                  const SharedOfFew<kPerThread>& shared) {
  const TopkProblem& p = task.p;
  const uint32_t first = begin + in_tile;
  int row[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) row[i] = of_lane(base, held.key[i] >> 16) + (held.key[i] & 0xffff);
  if (kAllValid) {
    int32_t* const to = p.s_reverse_scatter_idx + first;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      if (held.key[i] >= 0) to[i * 32] = row[i];
    }
  } else {
    place_slots(task, first, slots, compact + valid_before, held, [&](int i, bool is_valid, int mine) {
      store_if(is_valid, p.s_reverse_scatter_idx, mine, row[i]);
    });
  }
  // In row order, as place_rows does it.
  const int first_token = begin / task.topk;
  uint32_t slot[kPerThread];
  int place[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    place[i] = (i * kPlacerWarps + placer_warp()) * 32 + lane_id();
    // Where a tile is not full, its last row is written again, which costs less than a condition everywhere else.
    if (kAllValid) place[i] = min(place[i], valid - 1);
    slot[i] = shared.slot[place[i]];
  }
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) row[i] = of_lane(base, slot[i] % kFewExperts) + place[i];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const bool is_here = kAllValid || place[i] < valid;
    const uint32_t number = slot[i] >> kNumberShift & ((1u << (kTokenShift - kNumberShift)) - 1);
    store_if(is_here, p.x_gather_idx, row[i], first_token + static_cast<int>(slot[i] >> kTokenShift));
    store_if(is_here, p.s_scatter_idx, row[i], compact + static_cast<int>(number));
  }
#pragma unroll 1
  for (int i = placer_warp(); i < valid && task.scales.words; i += kPlacerWarps) {
    const uint32_t of = shared.slot[i];
    const int token = first_token + static_cast<int>(of >> kTokenShift);
    copy_scale_row(task.scales, token, of_lane(base, of % kFewExperts) + i);
  }
}

}  // namespace
}  // namespace sonicmoe
