// One thread block of a grouped FP8 GEMM, from its barriers to its last tile.
#pragma once

#include "sm90_fp8_backward.cuh"
#include "sm90_fp8_epilogues.cuh"

namespace sonicmoe::sm90 {

// Scales of this thread's rows, where rows are tokens.
template <class Kind>
__device__ __forceinline__ TokenRowScales<Kind> token_row_scales(const Fp8Gemm& p, const Shared<Kind>& shared,
                                                                 const Lane& me, const Unit& unit) {
  const int first = unit.row + me.tile_row();
  TokenRowScales<Kind> scales;
  scales.tokens = p.a_scale;
  scales.weights = p.b_scale;
  scales.steps = unit.steps;
  scales.lane = me.lane;
  // A scale stands for 128 bytes, so there are fewer than 2^32.
  if constexpr (Kind::kAlone) {
    scales.gathered = shared_address(&shared.tokens.at[me.group].scales[me.token(0)]);
  } else {
    scales.above = static_cast<uint32_t>(Kind::kGather ? p.gather[first] : first) * unit.steps;
    if constexpr (Kind::kGather) scales.below = static_cast<uint32_t>(p.gather[first + 8]) * unit.steps;
  }
  scales.weight = static_cast<uint32_t>(unit.expert * (p.b_rows / kTile) + unit.column / kTile) * unit.steps;
  const bool last_columns = unit.column / kTile + 1 == p.width / kTile;
  scales.weights_apart = kColumnSets<Kind> == 2 && last_columns ? 0 : unit.steps;
  scales.ask(0);
  return scales;
}

// The next unit of this warpgroup.
template <class Kind>
__device__ __forceinline__ bool next_own(Units<Kind>& units, const Lane& me, bool first, Stage<Kind>& stage, Unit& unit) {
  if constexpr (Kind::kAlone) {
    if (!first || me.group == 1) {  // the other one's
      if (!units.next(unit)) return false;
      stage.skip(unit.steps);
    }
  }
  return units.next(unit);
}

template <class Kind>
__device__ void multiply(const Fp8Gemm& p, const Maps& maps, Shared<Kind>& shared, int rank, const Lane& me) {
  const Ring<Kind> ring(shared, me.group);
  Units<Kind> units(p, rank);
  Stage<Kind> stage;
  Unit unit;
  float total[kSums<Kind>][kSumSize<Kind>];
  if constexpr (Kind::kStrips) {
    StripScales scales(me);
    while (units.next(unit)) {
      sum_steps(ring, me, stage, unit, scales, total);
      hand_over(p, ring, me, unit, total);
    }
  } else {
    bool more = next_own(units, me, true, stage, unit);
    TokenRowScales<Kind> scales;
    if constexpr (Kind::kAlone) {
      for (; more; more = next_own(units, me, false, stage, unit)) {
        ask_for_z(p, maps, shared, me, unit);
        scales = token_row_scales<Kind>(p, shared, me, unit);
        sum_steps_alone(ring, me, stage, unit, scales, total);
        store_gradient(p, maps, shared, me, unit, stage.turn ^ 1, total);  // z has come as often as it was our turn
      }
    } else {
      if (more) scales = token_row_scales<Kind>(p, shared, me, unit);
      while (more) {
        sum_steps(ring, me, stage, unit, scales, total);
        // The next unit's scales are under way while this one is stored.
        const Unit done = unit;
        more = units.next(unit);
        if (more) scales = token_row_scales<Kind>(p, shared, me, unit);
        if constexpr (Kind::kGather) {
          store_up<Kind>(p, maps, shared.out.at[me.group], me, done, total);
        } else {
          store_rows(p, maps, shared.out.at[me.group], me, done, total);
        }
      }
    }
  }
  if (me.leads()) store_wait();
}

template <class Kind>
__device__ void run_block(const Fp8Gemm& p, const Maps& maps, Shared<Kind>& shared) {
  // A block begins with 168 for each thread; who asks for more than others gave back waits for ever.
  constexpr int kLoader = Kind::kLoaderRegisters, kMultiplier = (3 * 168 - kLoader) / 2;
  static_assert(kLoader % 8 == 0 && kMultiplier % 8 == 0, "registers come in eights");
  const int rank = static_cast<int>(cluster_rank()), thread = threadIdx.x;
  if (thread == 0) make_barriers(shared);
  if constexpr (Kind::kAlongBytes != 0) clear_blocks(shared.blocks.at, thread);
  __syncthreads();
  cluster_sync();
  if (thread < 128) {
    registers_down<kLoader>();
    if constexpr (Kind::kGather) {
      load_gathered_rows(p, maps, shared, rank, thread);
    } else {
      const int group = uniform(thread / 32) - 1;
      if (thread == 0) load_shared_rows(p, maps, shared, rank);
      if constexpr (Kind::kStrips) {
        if (group >= 0 && group < kMultipliers) store_wgrad(p, maps, shared, rank, group, thread % 32);
      }
    }
  } else {
    registers_up<kMultiplier>();
    multiply(p, maps, shared, rank, Lane(thread - 128));
  }
  __syncwarp();
  // The neighbour may still write here, or tell us that it has read.
  cluster_sync();
}

}  // namespace sonicmoe::sm90
