// The part that all grouped FP8 GEMMs share: how operands get into shared memory, and the sum.
//
// One warpgroup loads, two multiply. Most often each has 64 rows of a tile. A tile has 192 columns, or two tiles of 128
// are made from one load of what these have in common. Where storing takes about as long as multiplying, each warpgroup
// has tiles of its own, and stores while the other multiplies. Two blocks are a cluster and share what they both need of
// one operand, each loading one half of it for both: neighbours in columns share A; where tokens are gathered, which no
// bulk copy does, neighbours in tokens share the weights.
#pragma once

#include "sm90_fp8_tiles.cuh"

namespace sonicmoe::sm90 {

// ---- Loading

// One thread. Neighbours in columns: this block loads its half of A for both, and a B of its own.
template <class Kind>
__device__ void load_shared_rows(const Fp8Gemm& p, const Maps& maps, Shared<Kind>& shared, int rank) {
  constexpr int kHalfRows = Kind::kRowTiles * kTile / 2;
  Units<Kind, false> units(p, rank);
  Stage<Kind> stage;
  Unit unit;
  while (units.next(unit)) {
    const int a_row = unit.row + rank * kHalfRows;
    const int b_row = Kind::kStrips ? unit.column : unit.expert * p.b_rows + unit.column;
    const uint32_t a_strip_bytes = unit.row_tiles * kStripBytes;
    const uint32_t bytes = sizeof(shared.a[0]) + sizeof(shared.b[0]) + (Kind::kStrips ? a_strip_bytes + kStripBytes : 0);
#pragma unroll 1
    for (int step = unit.first_step; step < unit.first_step + unit.steps; ++step, stage.advance()) {
      const int s = stage.index;
      barrier_wait(&shared.empty[s], stage.round ^ 1);
      barrier_expect(&shared.full[s], bytes);
      uint8_t* half = shared.a[s] + rank * kHalfRows * kTile;
      tensor_load_multicast(maps.a, &shared.full[s], half, step * kTile, a_row, 3);
      tensor_load(maps.b, &shared.full[s], shared.b[s], step * kTile, b_row);
      if constexpr (Kind::kStrips) {
        const int64_t block = step;
        bulk_load(&shared.full[s], shared.a_strip.at[s], p.a_scale + block * p.height + unit.row, a_strip_bytes);
        bulk_load(&shared.full[s], shared.b_strip.at[s], p.b_scale + block * p.width + unit.column, kStripBytes);
      }
    }
  }
}

// Four warps. Each thread copies an eighth of eight tokens; the first one also loads this block's half of the weights for
// both, or its own weights.
template <class Kind>
__device__ void load_gathered_rows(const Fp8Gemm& p, const Maps& maps, Shared<Kind>& shared, int rank, int thread) {
  constexpr int kRows = 8, kApart = kTile / kRows;
  const int piece = thread % 8, first = thread / 8;
  // The swizzle depends on the row's last three bits, which all eight rows have in common.
  const int target = first * kTile + ((piece ^ (first % 8)) * 16);
  const int from = Kind::kAlone ? first % 8 * 2 + first / 8 : first;  // of each 16 tokens
  const Address base = uniform(opaque(shared_address(&shared)));
  const uint32_t pieces = p.depth / 16;
  Units<Kind> units(p, rank);
  Stage<Kind> stage, landing;
  int in_flight = 0;
  auto land = [&] {
    fence_for_async_reads();
    __syncwarp();
    if (thread % 32 == 0) barrier_arrive(base + offsetof(Shared<Kind>, full) + landing.index * sizeof(uint64_t));
    landing.advance();
  };
  Unit unit;
  while (units.next(unit)) {
    // Where each row's piece lies, in pieces: half the registers of an address, of which there are 2^32 at 64 GB.
    uint32_t place[kRows], real = 0;  // a bit for each row: pads are filled with zeros, whatever token 0 holds
    for (int i = 0; i < kRows; ++i) {
      const int row = unit.row + from + i * kApart;
      const bool is_real = p.scatter[row] < p.n_slots;
      real |= (is_real ? 1u : 0u) << i;
      place[i] = (is_real ? p.gather[row] : 0) * pieces + piece;
    }
    const int weight_row = unit.expert * p.width + unit.column;
    const uint8_t* source = static_cast<const uint8_t*>(p.a);
#pragma unroll 1
    for (int step = 0; step < unit.steps; ++step, stage.advance(), source += kTile) {
      const int s = stage.index;
      barrier_wait(base + offsetof(Shared<Kind>, empty) + s * sizeof(uint64_t), stage.round ^ 1);
      if (thread == 0) {
        barrier_expect(&shared.full[s], kTiles<Kind> * kOperandBytes);
        uint8_t* weights = shared.b[s];
        if (unit.apart) {
          for (int half = 0; half < 2 * kTiles<Kind>; ++half) {
            tensor_load(maps.b, &shared.full[s], weights + half * (kOperandBytes / 2), step * kTile,
                        weight_row + half * (kTile / 2));
          }
        } else {
          for (int tile = 0; tile < kTiles<Kind>; ++tile) {
            tensor_load_multicast(maps.b, &shared.full[s], weights + rank * (kOperandBytes / 2) + tile * kOperandBytes,
                                  step * kTile, weight_row + rank * (kTile / 2) + tile * kTile, 3);
          }
        }
      }
      const Address to = base + offsetof(Shared<Kind>, a) + s * Shared<Kind>::kABytes + target;
      const uint32_t real_now = opaque(real);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        async_copy(to + i * kApart * kTile, source + uint64_t{opaque(place[i])} * 16, real_now & 1u << i);
      }
      async_copy_commit();
      if (++in_flight == kInFlight<Kind>) {
        async_copy_wait<kInFlight<Kind> - 1>();
        land();
        --in_flight;
      }
    }
  }
  async_copy_wait<0>();
  for (; in_flight > 0; --in_flight) land();
}

// ---- Multiplying

// A thread's place in its warpgroup's part of the tile; see product.
struct Lane {
  int group, warp, lane;
  __device__ explicit Lane(int thread) : group(uniform(thread / 128)), warp(uniform(thread % 128 / 32)), lane(thread % 32) {}
  __device__ int quad() const { return lane % 4; }
  __device__ int row() const { return warp * 16 + lane / 4; }     // and the row 8 further down
  __device__ int tile_row() const { return group * 64 + row(); }  // of the block's tile
  __device__ int number() const { return warp * 32 + lane; }
  __device__ bool leads() const { return number() == 0; }
  __device__ int token(int below) const { return warp * 16 + lane / 4 * 2 + below; }  // of 64, where rows are neighbours
};

// Scales of a tile's steps. Those in global memory are asked for long before they are used, some steps at a time: each
// lane of a group of lanes with the same rows holds those of one step. 128 rows or columns of weights have one in common.
template <class Kind>
struct TokenRowScales {
  static constexpr int kAtOnce = 4;  // lanes that hold the same rows
  const float *tokens, *weights;
  // Where the scales of a row begin, and of a column. ``below`` where rows are gathered; where there are two sets of
  // these, they lie in shared memory.
  uint32_t above, below, weight;
  Address gathered;
  int steps, lane;
  int weights_apart;  // of the two blocks of columns: no steps where the second one is not there
  float2 here[kRowSets<Kind> * kColumnSets<Kind>], next[kRowSets<Kind>];
  float next_weights[kColumnSets<Kind>];
  __device__ void ask(int first) {
    const int step = min(first + lane % kAtOnce, steps - 1);
#pragma unroll
    for (int i = 0; i < kRowSets<Kind>; ++i) {
      uint32_t first = above + step, second = below + step;
      if constexpr (Kind::kAlone) {
        const float2 both = load_two(gathered + i * 64 * sizeof(uint32_t));
        first = __float_as_uint(both.x) + step;
        second = __float_as_uint(both.y) + step;
      } else if constexpr (!Kind::kGather) {
        second = first + 8 * steps;
      }
      next[i] = make_float2(__ldg(tokens + first), __ldg(tokens + second));
    }
#pragma unroll
    for (int i = 0; i < kColumnSets<Kind>; ++i) next_weights[i] = __ldg(weights + weight + i * weights_apart + step);
  }
  __device__ float2 rows(int step, int set, Address) {
    if (set == 0 && step % kAtOnce == 0) {
#pragma unroll
      for (int i = 0; i < kRowSets<Kind> * kColumnSets<Kind>; ++i) {
        const float2 row = next[i / kColumnSets<Kind>];
        const float weight = next_weights[i % kColumnSets<Kind>];
        here[i] = make_float2(row.x * weight, row.y * weight);
      }
      ask(step + kAtOnce);
    }
    const int from = lane / kAtOnce * kAtOnce + step % kAtOnce;
    return make_float2(__shfl_sync(0xffffffff, here[set].x, from), __shfl_sync(0xffffffff, here[set].y, from));
  }
};
struct StripScales {
  int first;
  __device__ explicit StripScales(const Lane& me) : first(me.tile_row()) {}
  __device__ float2 rows(int, int tile, Address strip) const {
    const Address place = strip + tile * kStripBytes + first * 4;
    return make_float2(load_one(place), load_one(place + 32));
  }
};

// ``between``: done when the first of the products is under way.
template <class Kind, class Between>
__device__ __forceinline__ void multiply_stage(const Ring<Kind>& ring, int s, int sum, float (&part)[kSumSize<Kind>],
                                               Between between) {
  const Operand a = ring.a(s, sum), b = ring.b(s, sum);
  pin(part);
  product_fence();
#pragma unroll
  for (int k = 0; k < kTile / 32; ++k) {
    product(part, further(a, 32 * k), further(b, 32 * k), k > 0);
    if (k == 0) between();
  }
  product_commit();
}

// This warp has read the stage. One lane for each of the cluster's blocks.
template <class Kind>
__device__ __forceinline__ void release(const Ring<Kind>& ring, const Lane& me, int s) {
  __syncwarp();
  if (me.lane < 2) barrier_arrive_at(ring.empty(s), me.lane);
}

template <class Kind>
__device__ __forceinline__ void wait_for_turn(const Ring<Kind>& ring, const Lane& me, const Stage<Kind>& stage) {
  barrier_wait(ring.my_turn, stage.turn ^ (me.group == 0));
}
template <class Kind>
__device__ __forceinline__ void give_turn(const Ring<Kind>& ring, const Lane& me, Stage<Kind>& stage) {
  if (me.lane == 0) barrier_arrive(ring.other_turn);
  stage.turn ^= 1;
}

// Totals of this warpgroup, [64, columns of a tile] of each of its sums, where both warpgroups make each tile.
template <class Kind, class Scales>
__device__ __forceinline__ void sum_steps(const Ring<Kind>& ring, const Lane& me, Stage<Kind>& stage, const Unit& unit,
                                          Scales& scales, float (&total)[kSums<Kind>][kSumSize<Kind>]) {
  constexpr bool kWide = Kind::kColumns > kTile;  // a tile has columns of two blocks of weights
#pragma unroll
  for (int sum = 0; sum < kSums<Kind>; ++sum) {
#pragma unroll
    for (int i = 0; i < kSumSize<Kind>; ++i) total[sum][i] = 0.0f;
  }
  if (unit.steps == 0) return;
  const bool both = kSums<Kind> == 2 && (Kind::kRowTiles == 1 || unit.row_tiles == 2);
  float part[kSumSize<Kind>];
  float2 row, right, column[Kind::kStrips ? 16 : 1];
  auto begin = [&](int step, int sum) {
    const int s = stage.index;
    if (sum == 0) barrier_wait(ring.full(s), stage.round);
    // To add up takes long where columns have scales of their own. The warpgroups begin in turns there, or the tensor
    // cores would finish both at once, and wait while both add up. Elsewhere the turns cost more than they save.
    if constexpr (Kind::kStrips) wait_for_turn(ring, me, stage);
    multiply_stage(ring, s, sum, part, [&] {
      if constexpr (Kind::kStrips) give_turn(ring, me, stage);
    });
    row = scales.rows(step, sum, Kind::kStrips ? ring.a_strip(s) : 0);
    if constexpr (kWide) right = scales.rows(step, 1, 0);
    // In registers before the products are waited for, and there for the other tile: a load of them takes as long from
    // shared memory as half of a tile's operands do.
    if constexpr (Kind::kStrips) {
      if (sum == 0) {
        const Address mine = ring.b_strip(s) + opaque(me.lane) % 4 * sizeof(float2);
#pragma unroll
        for (int j = 0; j < 16; ++j) column[j] = load_two(mine + j * 32);
      }
    }
  };
  auto finish = [&](int sum, bool last) {
    product_wait();
    pin(part);
    if (last) release(ring, me, stage.index);
    float(&to)[kSumSize<Kind>] = total[sum];
    // Tiles of 192 begin at a block of columns or in the middle of one.
    const float2 middle = kWide && unit.column % kTile != 0 ? right : row;
#pragma unroll
    for (int j = 0; j < Kind::kColumns / 8; ++j) {
      const float2 here = j < 8 || !kWide ? row : j < 16 ? middle : right;
      float2 by = make_float2(1.0f, 1.0f);
      if constexpr (Kind::kStrips) by = column[j];
      to[4 * j] = fmaf(part[4 * j] * by.x, here.x, to[4 * j]);
      to[4 * j + 1] = fmaf(part[4 * j + 1] * by.y, here.x, to[4 * j + 1]);
      to[4 * j + 2] = fmaf(part[4 * j + 2] * by.x, here.y, to[4 * j + 2]);
      to[4 * j + 3] = fmaf(part[4 * j + 3] * by.y, here.y, to[4 * j + 3]);
    }
  };
  begin(0, 0);
#pragma unroll 1
  for (int step = 0;;) {
    finish(0, !both);
    if (both) {
      begin(step, 1);
      finish(kSums<Kind> - 1, true);
    }
    stage.advance();
    if (++step == unit.steps) break;
    begin(step, 0);
  }
}

// total [128,128] of this warpgroup alone, in halves of rows.
template <class Kind>
__device__ __forceinline__ void sum_steps_alone(const Ring<Kind>& ring, const Lane& me, Stage<Kind>& stage,
                                                const Unit& unit, TokenRowScales<Kind>& scales, float (&total)[2][64]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < 64; ++i) total[half][i] = 0.0f;
  }
  float part[64];
  // The first products of a tile come after the last ones of the other warpgroup's, so that nobody waits for a stage more
  // than one round ahead.
  wait_for_turn(ring, me, stage);
#pragma unroll 1
  for (int step = 0; step < unit.steps; ++step, stage.advance()) {
    barrier_wait(ring.full(stage.index), stage.round);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      multiply_stage(ring, stage.index, half, part, [] {});
      if (half == 1 && step == unit.steps - 1) give_turn(ring, me, stage);
      const float2 row = scales.rows(step, half, 0);
      product_wait();
      pin(part);
      if (half == 1) release(ring, me, stage.index);
#pragma unroll
      for (int i = 0; i < 64; ++i) total[half][i] = fmaf(part[i], i % 4 < 2 ? row.x : row.y, total[half][i]);
    }
  }
}

}  // namespace sonicmoe::sm90
