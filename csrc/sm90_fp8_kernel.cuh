// One thread block of a grouped FP8 GEMM, from its barriers to its last tile.
#pragma once

#include "sm90_fp8_backward.cuh"
#include "sm90_fp8_epilogues.cuh"

namespace sonicmoe::sm90 {

// Scales of this thread's rows, where rows are tokens.
template <class Kind>
__device__ __forceinline__ TokenRowScales<Kind> token_row_scales(const Fp8Gemm& p, const Lane& me, const Unit& unit) {
  const int first = unit.row + (Kind::kNeighbours ? me.group * 64 + me.token(0) : me.tile_row());
  const int second = first + (Kind::kNeighbours ? 1 : 8);
  TokenRowScales<Kind> scales;
  scales.tokens = p.a_scale;
  scales.weights = p.b_scale;
  scales.steps = unit.steps;
  scales.lane = me.lane;
  // A scale stands for 128 bytes, so there are fewer than 2^32.
  scales.above = static_cast<uint32_t>(Kind::kGather ? p.gather[first] : first) * unit.steps;
  if constexpr (Kind::kGather) scales.below = static_cast<uint32_t>(p.gather[second]) * unit.steps;
  scales.weight = static_cast<uint32_t>(unit.expert * (p.b_rows / kTile) + unit.column / kTile) * unit.steps;
  scales.both = unit.row_tiles == 2;
  scales.ask(0);
  return scales;
}

template <class Kind>
__device__ void multiply(const Fp8Gemm& p, const Maps& maps, Shared<Kind>& shared, int rank, const Lane& me) {
  const Ring<Kind> ring(shared, me.group);
  Units<Kind> units(p, rank);
  Stage<Kind> stage;
  Unit unit;
  float total[kTiles<Kind>][64];
  if constexpr (Kind::kStrips) {
    StripScales scales(me);
    while (units.next(unit)) {
      sum_steps(ring, me, stage, unit, scales, total);
      store_wgrad(p, me, unit, total);
    }
  } else {
    TokenInput input;
    bool more = units.next(unit);
    TokenRowScales<Kind> scales;
    if (more) scales = token_row_scales<Kind>(p, me, unit);
    for (int round = 0; more; round ^= 1) {
      if constexpr (Kind::kNeighbours) input = begin_gradient(p, maps, shared, me, unit);
      sum_steps(ring, me, stage, unit, scales, total);
      // The next unit's scales are under way while this one is stored.
      const Unit done = unit;
      more = units.next(unit);
      if (more) scales = token_row_scales<Kind>(p, me, unit);
      if constexpr (Kind::kNeighbours) {
        store_gradient(p, maps, shared, me, done, input, round, total[0]);
      } else if constexpr (Kind::kGather) {
        store_up<Kind>(p, maps, shared.out.at[me.group], me, done, total);
      } else {
        store_rows(p, maps, shared.out.at[me.group], me, done, total);
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
  if constexpr (Kind::kAlongBytes != 0) clear_blocks(shared.blocks.at[0], thread);
  __syncthreads();
  cluster_sync();
  if (thread < 128) {
    registers_down<kLoader>();
    if constexpr (Kind::kGather) {
      load_gathered_rows(p, maps, shared, rank, thread);
    } else if (thread == 0) {
      load_shared_rows(p, maps, shared, rank);
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
