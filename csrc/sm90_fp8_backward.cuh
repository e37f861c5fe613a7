// The epilogue of down_backward. A warpgroup has 128 tokens in two halves, and of each token 128 columns of dA: 256 of dz,
// two blocks of F, which lie in four lanes. The blocks along tokens, which wgrad wants, lie across all of its warps;
// their largest values meet in shared memory.
//
// A first look at a half makes dz and p*a, and finds the largest of each block; a second one writes them. In between they
// are bfloat16, in the places of what they were made of: dz's pairs in the sums' registers, p*a in z's shared memory.
// That costs nothing beside e4m3's own rounding, which is 32 times as coarse. z comes and dz leaves by the tensor cores'
// own loads and stores of matrices; those that transpose make the copies along tokens, of pairs of tokens: a thread's two
// rows are tokens that follow each other.
//
// The code for one half runs twice, and the halves change places in between: code for both would be too long to stay
// in the instruction cache.
#pragma once

#include "sm90_fp8_epilogues.cuh"

namespace sonicmoe::sm90 {

constexpr int kFBlocks = 2;                    // blocks of F in a warpgroup's rows
constexpr int kHalfBytes = kOperandBytes / 2;  // of z: 64 tokens of one block of F
constexpr int kBlocksAlong = 3 * kTile;        // gates, ups, p*a

struct Gradient {
  float gate, up, activated;
};

// dz of one pair of z's columns, and swiglu's value there; ``da`` carries the score.
template <bool kClamp>
__device__ __forceinline__ Gradient swiglu_gradient(float2 z, float da, float clamp) {
  float gate = z.x, up = z.y;
  if constexpr (kClamp) {
    gate = at_most(gate, clamp);
    up = -at_most(-at_most(up, clamp), clamp);
  }
  const float chance = sigmoid(gate), silu = gate * chance, slope = fmaf(silu, 1.0f - chance, chance);
  Gradient found{da * up * slope, da * silu, silu * up};
  if constexpr (kClamp) {  // no gradient where a bound holds; times 0, so that a NaN stays
    found.gate *= z.x <= clamp ? 1.0f : 0.0f;
    found.up *= fabsf(z.y) <= clamp ? 1.0f : 0.0f;
  }
  return found;
}

// Some pairs of magnitudes, the largest of each over the eight lanes that hold the same ones. kCount of them are left.
template <int kMask, int kCount, int kAll>
__device__ __forceinline__ void fold_step(uint32_t (&v)[kAll], int lane) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const uint32_t kept = lane & kMask ? v[kCount + i] : v[i], sent = lane & kMask ? v[i] : v[kCount + i];
    v[i] = larger_two(kept, __shfl_xor_sync(0xffffffff, sent, kMask));
  }
}
// Of eight, this lane gets number lane / 4; of four, number lane / 8.
__device__ __forceinline__ uint32_t fold_lanes(uint32_t (&v)[8], int lane) {
  fold_step<16, 4>(v, lane);
  fold_step<8, 2>(v, lane);
  fold_step<4, 1>(v, lane);
  return v[0];
}
__device__ __forceinline__ uint32_t fold_lanes(uint32_t (&v)[4], int lane) {
  fold_step<16, 2>(v, lane);
  fold_step<8, 1>(v, lane);
  return larger_two(v[0], __shfl_xor_sync(0xffffffff, v[0], 4));
}

__device__ __forceinline__ void clear_blocks(Blocks (&blocks)[kMultipliers], int thread) {
  for (int i = thread; i < kMultipliers * kBlocksAlong; i += kThreads) {
    (&blocks[i / kBlocksAlong].largest[0][0])[i % kBlocksAlong] = 0;
  }
}

// z of a unit, once the stores from the same memory have read it, and what its tokens have.
template <class Kind>
__device__ __forceinline__ void ask_for_z(const Fp8Gemm& p, const Maps& maps, Shared<Kind>& shared, const Lane& me,
                                          const Unit& unit) {
  if (me.leads()) {
    store_wait_read<0>();
    barrier_expect(&shared.z_full[me.group], kFBlocks * kOperandBytes);
    for (int block = 0; block < kFBlocks; ++block) {
      uint8_t* z = shared.out.at[me.group] + block * kOperandBytes;
      tensor_load(maps.z, &shared.z_full[me.group], z, 2 * unit.column + block * kTile, unit.row);
    }
  }
  // All are asked for before the first is written: the compiler takes each write for a change of what is yet to be read.
  Tokens& tokens = shared.tokens.at[me.group];
  const int64_t row = unit.row + me.number();
  const float* z_scale = p.z_scale + row * (2 * p.width / kTile) + 2 * unit.column / kTile;
  const int token = p.gather[row], slot = p.scatter[row];
  const float z_scales[kFBlocks] = {z_scale[0], z_scale[1]}, score = p.score[slot];
  tokens.scales[me.number()] = static_cast<uint32_t>(token) * unit.steps;
  tokens.score[me.number()] = score;
#pragma unroll
  for (int block = 0; block < kFBlocks; ++block) tokens.z_scale[block][me.number()] = z_scales[block];
  warpgroup_sync(1 + me.group);
}

__device__ __forceinline__ void exchange_halves(float (&total)[2][64]) {
#pragma unroll
  for (int i = 0; i < 64; ++i) {
    const float kept = total[0][i];
    total[0][i] = total[1][i];
    total[1][i] = kept;
  }
}

// ---- A thread's sums, sixteen columns at a time, of which it has two and two, for two tokens.

// The row of 16 bytes of a half's z that this lane names to the matrix instructions: eight pairs of a token, for
// columns 8j and the eight after them, of upper tokens and of lower ones in turns.
__device__ __forceinline__ Address pairs_place(Address z, const Lane& me, int j) {
  const int token = me.warp * 16 + me.lane % 8 * 2 + me.lane / 8 % 2;
  return z + j / 8 * kOperandBytes + swizzled(token, 16 * (j % 8 + me.lane / 16));
}

// What a first look finds by token and block of F: the largest of dz's pairs and the part of <dA, a>.
struct Survey {
  uint32_t row[2][kFBlocks] = {};
  float product[2][kFBlocks] = {};
};

// The column of which this lane has the largest, of the eight that each quarter of them has of its quad; see fold_lanes.
__device__ __forceinline__ int column_of(const Lane& me, int quarter) {
  return 32 * quarter + me.lane / 8 * 8 + 2 * me.quad() + me.lane / 4 % 2;
}

// ``values`` are the sums, and then the pairs of dz.
template <class Kind>
__device__ __forceinline__ Survey survey(const Fp8Gemm& p, const Tokens& tokens, Blocks* blocks, Address z, const Lane& me,
                                         int first, float (&values)[64]) {
  const Address z_scales = opaque(shared_address(&tokens.z_scale[0][first]));
  const float2 scores = load_two(opaque(shared_address(&tokens.score[first])));
  Survey found;
#pragma unroll
  for (int quarter = 0; quarter < 4; ++quarter) {
    const int block = quarter / 2;
    const float2 scales = load_two(z_scales + block * sizeof(tokens.z_scale[0]));
    uint32_t along[8] = {}, along_a[4] = {};  // the largest of pairs of dz by column, and of p*a by two columns
#pragma unroll
    for (int j = 4 * quarter; j < 4 * quarter + 4; j += 2) {
      uint32_t pairs[4];
      load_matrices(pairs_place(z, me, j), pairs);
#pragma unroll
      for (int next = 0; next < 2; ++next) {
#pragma unroll
        for (int below = 0; below < 2; ++below) {
          float& low = values[4 * (j + next) + 2 * below];
          float* const sums[2] = {&low, &low + 1};
          uint32_t& both = pairs[2 * next + below];
          float a[2];
#pragma unroll
          for (int b = 0; b < 2; ++b) {
            const float2 code = from_e4m3(static_cast<uint16_t>(b ? both >> 16 : both));
            const float scale = below ? scales.y : scales.x, score = below ? scores.y : scores.x, da = *sums[b];
            const float2 value = make_float2(code.x * scale, code.y * scale);
            const Gradient g = swiglu_gradient<Kind::kClamp>(value, score * da, p.clamp);
            found.product[below][block] = fmaf(da, g.activated, found.product[below][block]);
            a[b] = score * g.activated;
            const uint32_t dz = tamed_two(two(g.gate, g.up, false));
            found.row[below][block] = larger_two(found.row[below][block], dz);
            uint32_t& largest = along[j % 4 * 2 + 2 * next + b];
            largest = larger_two(largest, dz);
            *sums[b] = __uint_as_float(dz);
          }
          both = tamed_two(two(a[0], a[1], false));
          along_a[j % 4 + next] = larger_two(along_a[j % 4 + next], both);
        }
      }
      store_matrices(pairs_place(z, me, j), pairs);
    }
    if constexpr (!Kind::kWide) {
      const int column = column_of(me, quarter);
      const uint32_t dz = fold_lanes(along, me.lane), a = fold_lanes(along_a, me.lane);
      atomicMax(&blocks->largest[0][column], __float_as_uint(fabsf(low_of(dz))));
      atomicMax(&blocks->largest[1][column], __float_as_uint(fabsf(high_of(dz))));
      atomicMax(&blocks->largest[2][column], __float_as_uint(fabsf(me.lane & 4 ? high_of(a) : low_of(a))));
    }
  }
  return found;
}

// Scales along tokens, of the largest that all warps have put together; these are zeros again for the next unit.
__device__ __forceinline__ void scale_blocks(const Fp8Gemm& p, Blocks& blocks, const Lane& me, const Unit& unit) {
  const int64_t block = unit.row / kTile;
  const int column = me.number();
#pragma unroll
  for (int kind = 0; kind < 3; ++kind) {
    const float scale = block_scale(__uint_as_float(blocks.largest[kind][column]), p.pow2);
    blocks.inverse[kind][column] = inverse_of(scale);
    blocks.largest[kind][column] = 0;
    if (kind == 2) {
      p.e_scale[block * p.width + unit.column + column] = scale;
    } else {
      p.dt_scale[block * 2 * p.width + 2 * (unit.column + column) + kind] = scale;
    }
  }
}

// For a wgrad in 16 bits: one half's dz and p*a of one block of F, of eight columns and this thread's ones among them.
__device__ __forceinline__ void emit_wide(const Fp8Gemm& p, uint8_t* along, const Lane& me, int token, int column,
                                          uint2 dz, uint32_t pa) {
  if (p.half) {
    dz = make_uint2(two(low_of(dz.x), high_of(dz.x), true), two(low_of(dz.y), high_of(dz.y), true));
    pa = two(low_of(pa), high_of(pa), true);
  }
  token = opaque(token);  // places of all columns at once would take too many registers
  const int f = 2 * column;  // rows of 128 bytes: two of dz, then one of p*a
  uint8_t* place = along + f / 64 * kHalfBytes + swizzled(token, f % 64 * 2 + 8 * me.quad());
  *reinterpret_cast<uint2*>(place) = dz;
  *reinterpret_cast<uint32_t*>(along + kOperandBytes + swizzled(token, 2 * column + 4 * me.quad())) = pa;
}

// Of one half and one block of F, dz to where z was, and what wgrad reads to ``along``: in FP8 next to the other half's.
template <class Kind, int kBlock>
__device__ __forceinline__ void emit(const Fp8Gemm& p, const Tokens& tokens, int half, const Blocks* blocks, Address z,
                                     uint8_t* along, const Lane& me, const float (&values)[64]) {
  const int first = 64 * half + me.token(0), of_warp = 64 * half + 16 * me.warp, named = me.lane / 8;
  const float inverse[2] = {tokens.inverse[kBlock][first], tokens.inverse[kBlock][first + 1]};
  const Address copies_place = opaque(shared_address(along));
  uint32_t activated[4];
#pragma unroll
  for (int j = 8 * kBlock; j < 8 * kBlock + 8; j += 2) {
    uint32_t a[4], dz[4], copies[4];  // copies of gates and ups, of the first eight columns and of the others
    load_matrices(pairs_place(z, me, j), a);
#pragma unroll
    for (int next = 0; next < 2; ++next) {
      float gate[2][2], up[2][2];  // by below, b
#pragma unroll
      for (int below = 0; below < 2; ++below) {
        const float* pairs = values + 4 * (j + next) + 2 * below;
        const uint2 both = make_uint2(__float_as_uint(pairs[0]), __float_as_uint(pairs[1]));
        if constexpr (Kind::kWide) {
          emit_wide(p, along, me, me.token(below), 8 * (j % 8 + next), both, a[2 * next + below]);
        }
        gate[below][0] = low_of(both.x), gate[below][1] = low_of(both.y);
        up[below][0] = high_of(both.x), up[below][1] = high_of(both.y);
        const float by = inverse[below], *g = gate[below], *u = up[below];
        dz[2 * next + below] = to_e4m3(g[0] * by, u[0] * by, g[1] * by, u[1] * by);
      }
      if constexpr (!Kind::kWide) {
        const int column = 8 * (j + next) + 2 * me.quad();
        const auto along_tokens = [&](int kind, float above0, float below0, float above1, float below1) {
          const float2 by = *reinterpret_cast<const float2*>(&blocks->inverse[kind][column]);
          return to_e4m3(above0 * by.x, below0 * by.x, above1 * by.y, below1 * by.y);
        };
        const uint32_t above = a[2 * next], below = a[2 * next + 1];
        copies[2 * next] = along_tokens(0, gate[0][0], gate[1][0], gate[0][1], gate[1][1]);
        copies[2 * next + 1] = along_tokens(1, up[0][0], up[1][0], up[0][1], up[1][1]);
        activated[j % 4 + next] = along_tokens(2, low_of(above), low_of(below), high_of(above), high_of(below));
      }
    }
    store_matrices(pairs_place(z, me, j), dz);
    if constexpr (!Kind::kWide) {
      const int f = 2 * (8 * (j % 8 + named / 2) + me.lane % 8) + named % 2;
      store_matrices_transposed(copies_place + swizzled(f, of_warp), copies);
      if (j % 4 == 2) {
        const int i = 8 * (j % 8 - 2 + named) + me.lane % 8;
        store_matrices_transposed(copies_place + kOperandBytes + swizzled(i, of_warp), activated);
      }
    }
  }
}

// All that leaves of one block of F: of the second half, which comes first, and of the first one.
template <class Kind, int kBlock>
__device__ __forceinline__ void store_block(const Fp8Gemm& p, const Maps& maps, Shared<Kind>& shared, const Lane& me,
                                            const Unit& unit, float (&values)[2][64]) {
  const int group = opaque(me.group);
  uint8_t *out = shared.out.at[group], *along = shared.along.at[group];
  const int f = 2 * unit.column + kBlock * kTile, i = unit.column + kBlock * (kTile / 2);
#pragma unroll 1
  for (int half = 1; half >= 0; --half) {
    if (half == 0) {
#pragma unroll
      for (int i = kBlock * 32; i < kBlock * 32 + 32; ++i) values[0][i] = values[1][i];
    }
    if (Kind::kWide || (kBlock > 0 && half == 1)) begin_output(me);  // what lay there before has left
    const Blocks* blocks = nullptr;
    if constexpr (!Kind::kWide) blocks = &shared.blocks.at[me.group];
    const Address z = opaque(shared_address(out)) + half * kHalfBytes;
    emit<Kind, kBlock>(p, shared.tokens.at[me.group], half, blocks, z, along, me, values[0]);
    if constexpr (Kind::kWide) {
      if (!end_output(me)) continue;
      const int row = unit.row + 64 * half;
      tensor_store(maps.dt, along, f, row);
      tensor_store(maps.dt, along + kHalfBytes, f + 64, row);
      tensor_store(maps.e, along + kOperandBytes, i, row);
      store_commit();
    }
  }
  if (!end_output(me)) return;
  tensor_store(maps.d, out + kBlock * kOperandBytes, f, unit.row);
  if constexpr (!Kind::kWide) {
    tensor_store(maps.dt, along, unit.row, f);
    tensor_store(maps.e, along + kOperandBytes, unit.row, i);
  }
  store_commit();
}

template <class Kind>
__device__ __forceinline__ void store_gradient(const Fp8Gemm& p, const Maps& maps, Shared<Kind>& shared, const Lane& me,
                                               const Unit& unit, int round, float (&total)[2][64]) {
  // z until each pair is replaced by its gradient
  const Address z = opaque(shared_address(shared.out.at[me.group]));
  Tokens& tokens = shared.tokens.at[me.group];
  Blocks* blocks = nullptr;
  if constexpr (!Kind::kWide) blocks = &shared.blocks.at[me.group];
  barrier_wait(&shared.z_full[me.group], round);
  if (!unit.alive) {  // z may be the neighbour's dz by now
    warpgroup_sync(1 + me.group);  // and nobody writes about the next unit's tokens before all have read about this one's
    return;
  }
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    if (half > 0) exchange_halves(total);
    const int first = 64 * half + me.token(0);
    const Survey found = survey<Kind>(p, tokens, blocks, z + half * kHalfBytes, me, first, total[0]);
    // Each lane of a quad has what there is of one token and block.
    const int quad = opaque(me.lane) % 4;
    float largest[4], product[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t pair = found.row[i / 2][i % 2];
      largest[i] = fmaxf(fabsf(low_of(pair)), fabsf(high_of(pair)));
      product[i] = found.product[i / 2][i % 2];
    }
    const float scale = block_scale(quad_max(largest, quad), p.pow2);
    const float sum = fold_quad(product, quad, [](float x, float y) { return x + y; });
    const int token = first + quad / 2, block = quad % 2;
    const int64_t row = unit.row + token;
    tokens.inverse[block][token] = inverse_of(scale);
    p.d_scale[row * (2 * p.width / kTile) + 2 * unit.column / kTile + block] = scale;
    p.parts[row * (p.width / 64) + unit.column / 64 + block] = sum;
  }
  warpgroup_sync(1 + me.group);
  if constexpr (!Kind::kWide) {
    scale_blocks(p, *blocks, me, unit);
    warpgroup_sync(1 + me.group);
  }
  store_block<Kind, 0>(p, maps, shared, me, unit, total);
  store_block<Kind, 1>(p, maps, shared, me, unit, total);
}

}  // namespace sonicmoe::sm90
