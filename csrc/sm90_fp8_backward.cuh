// The epilogue of down_backward. A warpgroup has 128 tokens in two halves, and of each token 128 columns of dA: 256 of dz,
// two blocks of F, which lie in four lanes. The blocks along tokens, which wgrad wants, lie across all of its warps;
// their largest values meet in shared memory.
//
// dz is made twice, first to find the largest of each block, then to be written: its values for 64 sums a thread do not
// fit into registers beside the sums. z comes and dz leaves by the tensor cores' own loads and stores of matrices; those
// that transpose make the copies along tokens, of pairs of tokens: a thread's two rows are tokens that follow each other.
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

// Eight magnitudes, the largest of each over the eight lanes that hold the same ones: of number lane / 4.
template <int kMask, int kCount>
__device__ __forceinline__ void fold_step(float (&v)[8], int lane) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float kept = lane & kMask ? v[kCount + i] : v[i], sent = lane & kMask ? v[i] : v[kCount + i];
    v[i] = fmaxf(kept, __shfl_xor_sync(0xffffffff, sent, kMask));
  }
}
__device__ __forceinline__ float fold_lanes(float (&v)[8], int lane) {
  fold_step<16, 4>(v, lane);
  fold_step<8, 2>(v, lane);
  fold_step<4, 1>(v, lane);
  return v[0];
}

__device__ __forceinline__ float quad_sum(float value) {
  value += __shfl_xor_sync(0xffffffff, value, 1);
  return value + __shfl_xor_sync(0xffffffff, value, 2);
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
  Tokens& tokens = shared.tokens.at[me.group];
  const int64_t row = unit.row + me.number();
  tokens.scales[me.number()] = static_cast<uint32_t>(p.gather[row]) * unit.steps;
  tokens.score[me.number()] = p.score[p.scatter[row]];
#pragma unroll
  for (int block = 0; block < kFBlocks; ++block) {
    tokens.z_scale[block][me.number()] = p.z_scale[row * (2 * p.width / kTile) + 2 * unit.column / kTile + block];
  }
  warpgroup_sync(1 + me.group);
}

// Of this thread's two tokens of one half.
struct Pair {
  float z_scale[2][kFBlocks], score[2];
};

__device__ __forceinline__ Pair pair_of(const Tokens& tokens, int first) {
  Pair found;
#pragma unroll
  for (int below = 0; below < 2; ++below) {
    found.score[below] = tokens.score[first + below];
#pragma unroll
    for (int block = 0; block < kFBlocks; ++block) found.z_scale[below][block] = tokens.z_scale[block][first + below];
  }
  return found;
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

// Calls use(next, below, b, gradient, dA without the score) for columns 8 (j + next) + 2 quad + b.
template <class Kind, class Use>
__device__ __forceinline__ void for_sixteen(const Fp8Gemm& p, const Pair& input, Address z, const Lane& me, int j,
                                            const float (&total)[64], Use use) {
  uint32_t pairs[4];
  load_matrices(pairs_place(z, me, j), pairs);
#pragma unroll
  for (int next = 0; next < 2; ++next) {
#pragma unroll
    for (int below = 0; below < 2; ++below) {
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        const uint32_t both = pairs[2 * next + below];
        const float2 code = from_e4m3(static_cast<uint16_t>(b ? both >> 16 : both));
        const float scale = input.z_scale[below][j / 8], da = total[4 * (j + next) + 2 * below + b];
        const float2 value = make_float2(code.x * scale, code.y * scale);
        use(next, below, b, swiglu_gradient<Kind::kClamp>(value, input.score[below] * da, p.clamp), da);
      }
    }
  }
}

// What a first look finds by token and block of F: dz's largest and the part of <dA, a>.
struct Survey {
  float row[2][kFBlocks] = {}, product[2][kFBlocks] = {};
};

// The column of which this lane has the largest, of the eight that each quarter of them has of its quad; see fold_lanes.
__device__ __forceinline__ int column_of(const Lane& me, int quarter) {
  return 32 * quarter + me.lane / 8 * 8 + 2 * me.quad() + me.lane / 4 % 2;
}

// An Inf as a NaN: see without_inf. One instruction and no comparison: 0 times a number adds nothing.
__device__ __forceinline__ float tamed(float value) { return fmaf(value, 0.0f, value); }

template <class Kind>
__device__ __forceinline__ Survey survey(const Fp8Gemm& p, const Pair& input, Blocks* blocks, Address z, const Lane& me,
                                         const float (&total)[64]) {
  Survey found;
#pragma unroll
  for (int quarter = 0; quarter < 4; ++quarter) {
    float gate[8], up[8], activated[8];
#pragma unroll
    for (int n = 0; n < 8; ++n) gate[n] = up[n] = activated[n] = 0.0f;
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      const int j = 4 * quarter + 2 * pair;
      for_sixteen<Kind>(p, input, z, me, j, total, [&](int next, int below, int b, const Gradient& g, float da) {
        const int block = j / 8, n = 4 * pair + 2 * next + b;
        found.product[below][block] = fmaf(da, g.activated, found.product[below][block]);
        const float mine = fabsf(tamed(g.gate)), other = fabsf(tamed(g.up));
        found.row[below][block] = fmaxf(found.row[below][block], fmaxf(mine, other));
        if constexpr (!Kind::kWide) {
          gate[n] = fmaxf(gate[n], mine);
          up[n] = fmaxf(up[n], other);
          activated[n] = fmaxf(activated[n], fabsf(tamed(input.score[below] * g.activated)));
        }
      });
    }
    if constexpr (!Kind::kWide) {
      const int column = column_of(me, quarter);
      atomicMax(&blocks->largest[0][column], __float_as_uint(fold_lanes(gate, me.lane)));
      atomicMax(&blocks->largest[1][column], __float_as_uint(fold_lanes(up, me.lane)));
      atomicMax(&blocks->largest[2][column], __float_as_uint(fold_lanes(activated, me.lane)));
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
    blocks.inverse[kind][column] = __fdiv_rn(1.0f, scale);
    blocks.largest[kind][column] = 0;
    if (!unit.alive) continue;
    if (kind == 2) {
      p.e_scale[block * p.width + unit.column + column] = scale;
    } else {
      p.dt_scale[block * 2 * p.width + 2 * (unit.column + column) + kind] = scale;
    }
  }
}

// Of one half and one block of F, dz over z, and what wgrad reads to ``along``, or to global memory in 16 bits.
template <class Kind, int kBlock>
__device__ __forceinline__ void emit(const Fp8Gemm& p, const Tokens& tokens, int half, const Blocks* blocks, Address z,
                                     Address along, const Lane& me, const Unit& unit, const float (&total)[64]) {
  const int first = 64 * half + me.token(0), of_warp = 64 * half + 16 * me.warp, named = me.lane / 8;
  const Pair mine = pair_of(tokens, first);
  const float inverse[2] = {tokens.inverse[kBlock][first], tokens.inverse[kBlock][first + 1]};
  uint32_t activated[4];
#pragma unroll
  for (int j = 8 * kBlock; j < 8 * kBlock + 8; j += 2) {
    float gate[2][2][2], up[2][2][2], a[2][2][2];  // by next, below, b
    for_sixteen<Kind>(p, mine, z, me, j, total, [&](int next, int below, int b, const Gradient& g, float) {
      gate[next][below][b] = tamed(g.gate);
      up[next][below][b] = tamed(g.up);
      a[next][below][b] = mine.score[below] * g.activated;
    });
    uint32_t dz[4];
#pragma unroll
    for (int next = 0; next < 2; ++next) {
#pragma unroll
      for (int below = 0; below < 2; ++below) {
        const float by = inverse[below], *g = gate[next][below], *u = up[next][below];
        dz[2 * next + below] = to_e4m3(g[0] * by, u[0] * by, g[1] * by, u[1] * by);
      }
    }
    store_matrices(pairs_place(z, me, j), dz);
    if constexpr (Kind::kWide) {
      uint2 wide[2][2];
      uint32_t wide_a[2][2];
#pragma unroll
      for (int next = 0; next < 2; ++next) {
#pragma unroll
        for (int below = 0; below < 2; ++below) {
          const float *g = gate[next][below], *u = up[next][below], *v = a[next][below];
          wide[next][below] = make_uint2(two(g[0], u[0], p.half), two(g[1], u[1], p.half));
          wide_a[next][below] = two(v[0], v[1], p.half);
        }
      }
      if (!unit.alive) continue;
#pragma unroll
      for (int below = 0; below < 2; ++below) {
        const int64_t at = int64_t{opaque(unit.row + first + below)} * p.width + unit.column + 2 * me.quad();
#pragma unroll
        for (int next = 0; next < 2; ++next) {
          reinterpret_cast<uint2*>(static_cast<uint16_t*>(p.dt) + 2 * at)[4 * (j + next)] = wide[next][below];
          reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(p.e) + at)[4 * (j + next)] = wide_a[next][below];
        }
      }
    } else {
      uint32_t copies[4];  // gates and ups, of the first eight columns and of the others
#pragma unroll
      for (int next = 0; next < 2; ++next) {
        const int column = 8 * (j + next) + 2 * me.quad();
        const auto along_tokens = [&](int kind, const float(&v)[2][2]) {
          const float2 by = *reinterpret_cast<const float2*>(&blocks->inverse[kind][column]);
          return to_e4m3(v[0][0] * by.x, v[1][0] * by.x, v[0][1] * by.y, v[1][1] * by.y);
        };
        copies[2 * next] = along_tokens(0, gate[next]);
        copies[2 * next + 1] = along_tokens(1, up[next]);
#pragma unroll
        for (int below = 0; below < 2; ++below) {
#pragma unroll
          for (int b = 0; b < 2; ++b) a[next][below][b] = tamed(a[next][below][b]);
        }
        activated[j % 4 + next] = along_tokens(2, a[next]);
      }
      const int f = 2 * (8 * (j % 8 + named / 2) + me.lane % 8) + named % 2;
      store_matrices_transposed(along + swizzled(f, of_warp), copies);
      if (j % 4 == 2) {
        const int i = 8 * (j % 8 - 2 + named) + me.lane % 8;
        store_matrices_transposed(along + kOperandBytes + swizzled(i, of_warp), activated);
      }
    }
  }
}

// All that leaves of one block of F.
template <class Kind, int kBlock>
__device__ __forceinline__ void store_block(const Fp8Gemm& p, const Maps& maps, Shared<Kind>& shared, const Lane& me,
                                            const Unit& unit, float (&total)[2][64]) {
  uint8_t* out = shared.out.at[me.group];
  const Address z = opaque(shared_address(out));
  const Tokens& tokens = shared.tokens.at[me.group];
  const Blocks* blocks = nullptr;
  Address along = 0;
  if constexpr (!Kind::kWide) {
    if (kBlock > 0) begin_output(me);  // the block before is where this one's copies shall be
    blocks = &shared.blocks.at[me.group];
    along = opaque(shared_address(shared.along.at[me.group]));
  }
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    emit<Kind, kBlock>(p, tokens, half, blocks, z + half * kHalfBytes, along, me, unit, total[0]);
    exchange_halves(total);
  }
  if (!end_output(me)) return;
  if (unit.alive) {
    const int f = 2 * unit.column + kBlock * kTile;
    tensor_store(maps.d, out + kBlock * kOperandBytes, f, unit.row);
    if constexpr (!Kind::kWide) {
      const uint8_t* copies = shared.along.at[me.group];
      tensor_store(maps.dt, copies, unit.row, f);
      tensor_store(maps.e, copies + kOperandBytes, unit.row, unit.column + kBlock * (kTile / 2));
    }
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
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    const int first = 64 * half + me.token(0);
    const Pair pair = pair_of(tokens, first);
    const Survey found = survey<Kind>(p, pair, blocks, z + half * kHalfBytes, me, total[0]);
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      const int64_t row = unit.row + first + below;
#pragma unroll
      for (int block = 0; block < kFBlocks; ++block) {
        const float scale = block_scale(quad_max(found.row[below][block]), p.pow2);
        const float product = quad_sum(found.product[below][block]);
        if (me.quad() != 0) continue;
        tokens.inverse[block][first + below] = __fdiv_rn(1.0f, scale);
        if (!unit.alive) continue;
        p.d_scale[row * (2 * p.width / kTile) + 2 * unit.column / kTile + block] = scale;
        p.parts[row * (p.width / 64) + unit.column / 64 + block] = product;
      }
    }
    exchange_halves(total);
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
