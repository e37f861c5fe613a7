// One thread block of a grouped FP8 GEMM, from its barriers to its last tile.
#pragma once

#include "sm90_fp8_backward.cuh"
#include "sm90_fp8_epilogues.cuh"

namespace sonicmoe::sm90 {

template <class Kind>
__device__ void multiply(const Fp8Gemm& p, const Maps& maps, Shared<Kind>& shared, int rank, const Lane& me) {
  uint8_t* out = shared.out[me.group];
  const int blocks = p.depth / kTile;
  const Ring<Kind> ring(shared, me.group);
  Units<Kind> units(p, rank);
  Stage<Kind> stage;
  Unit unit;
  uint32_t round = 0;
  float total[64];
  while (units.next(unit)) {
    if constexpr (Kind::kStrips) {
      sum_steps(ring, me, stage, unit.steps, StripScales(me), total);
      store_wgrad(p, me, unit, total);
    } else if constexpr (Kind::kTransposed) {
      const TokenInput input = begin_gradient(p, maps, shared, me, unit);
      const int64_t column = unit.expert * (p.width / kTile) + unit.column / kTile;
      sum_steps(ring, me, stage, unit.steps, WeightRowScales(p.b_scale + column * blocks, blocks, me), total);
      store_gradient(p, maps, shared, me, unit, input, round, total);
      round ^= 1;
    } else {
      const int64_t first = unit.row + me.tile_row();
      const int64_t above = Kind::kGather ? p.gather[first] : first;
      const int64_t below = Kind::kGather ? p.gather[first + 8] : first + 8;
      const int64_t column = unit.expert * (p.width / kTile) + unit.column / kTile;
      const float *a_above = p.a_scale + above * blocks, *a_below = p.a_scale + below * blocks;
      const float* b = p.b_scale + column * blocks;
      sum_steps(ring, me, stage, unit.steps, TokenRowScales(a_above, a_below, b, blocks, me), total);
      if constexpr (Kind::kColumnTiles == 1) {
        store_rows(p, maps, out, me, unit, total);
      } else {
        float a[2][32];
        store_z<Kind>(p, maps, out, me, unit, 0, total, a);
        b += blocks;
        sum_steps(ring, me, stage, unit.steps, TokenRowScales(a_above, a_below, b, blocks, me), total);
        store_z<Kind>(p, maps, out, me, unit, 1, total, a);
        if (p.e != nullptr) store_a(p, maps, out, me, unit, a);
      }
    }
  }
  if (me.leads()) store_wait();
}

template <class Kind>
__device__ void run_block(const Fp8Gemm& p, const Maps& maps, Shared<Kind>& shared) {
  const int rank = static_cast<int>(cluster_rank()), thread = threadIdx.x;
  if (thread == 0) make_barriers(shared);
  __syncthreads();
  cluster_sync();
  if (thread < 128) {
    registers_down<Kind::kGather ? 56 : 40>();
    if constexpr (Kind::kGather) {
      load_gathered_rows(p, maps, shared, rank, thread);
    } else if (thread == 0) {
      load_shared_rows(p, maps, shared, rank);
    }
  } else {
    registers_up<Kind::kGather ? 224 : 232>();
    multiply(p, maps, shared, rank, Lane(thread - 128));
  }
  __syncwarp();
  // The neighbour may still write here, or tell us that it has read.
  cluster_sync();
}

}  // namespace sonicmoe::sm90
