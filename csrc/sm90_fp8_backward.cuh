// The epilogue of down_backward. A warpgroup has 64 tokens, and of each one 128 columns of dA: 256 of dz, two blocks of
// F, which lie in four lanes. The blocks along tokens, which wgrad wants, lie across both warpgroups; their largest
// values meet in shared memory.
//
// dz is made twice, first to find the largest of each block, then to be written: its values for 64 sums a thread do not
// fit into registers beside the sums. z comes and dz leaves by the tensor cores' own loads and stores of matrices; those
// that transpose make the copies along tokens, of pairs of tokens: a thread's two rows are tokens that follow each other.
#pragma once

#include "sm90_fp8_epilogues.cuh"

namespace sonicmoe::sm90 {

constexpr int kHalves = 2;                        // blocks of F in a warpgroup's rows
constexpr int kHalfBytes = kOperandBytes / 2;     // of z: 64 tokens of one block
constexpr int kBlocksAlong = 3 * kTile;           // gates, ups, p*a
constexpr int kTogether = 3;                      // the barrier of both warpgroups

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

__device__ __forceinline__ void clear_blocks(Blocks& blocks, int thread) {
  for (int i = thread; i < 2 * kBlocksAlong; i += kThreads) (&blocks.largest[0][0][0])[i] = 0;
}

// What the epilogue needs of this thread's two tokens, asked for before the products.
struct TokenInput {
  float z_scale[2][kHalves], score[2];
};

template <class Kind>
__device__ __forceinline__ TokenInput begin_gradient(const Fp8Gemm& p, const Maps& maps, Shared<Kind>& shared,
                                                     const Lane& me, const Unit& unit) {
  const int f = 2 * unit.column, first = unit.row + 64 * me.group;
  if (me.leads()) {
    store_wait_read<0>();
    barrier_expect(&shared.z_full[me.group], kOperandBytes);
    for (int half = 0; half < kHalves; ++half) {
      uint8_t* z = shared.out.at[me.group] + half * kHalfBytes;
      tensor_load(maps.z, &shared.z_full[me.group], z, f + half * kTile, first);
    }
  }
  TokenInput found;
#pragma unroll
  for (int below = 0; below < 2; ++below) {
    const int64_t row = first + me.token(below);
    found.score[below] = p.score[p.scatter[row]];
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      found.z_scale[below][half] = p.z_scale[row * (2 * p.width / kTile) + f / kTile + half];
    }
  }
  return found;
}

// ---- A thread's sums, sixteen columns at a time, of which it has two and two, for two tokens.

// The row of 16 bytes of z that this lane names to the matrix instructions: eight pairs of a token, for columns
// 8j and the eight after them, of upper tokens and of lower ones in turns.
__device__ __forceinline__ Address pairs_place(Address z, const Lane& me, int j) {
  const int token = me.warp * 16 + me.lane % 8 * 2 + me.lane / 8 % 2;
  return z + j / 8 * kHalfBytes + swizzled(token, 16 * (j % 8 + me.lane / 16));
}

// Calls use(next, below, b, gradient, dA without the score) for columns 8 (j + next) + 2 quad + b.
template <class Kind, class Use>
__device__ __forceinline__ void for_sixteen(const Fp8Gemm& p, const TokenInput& input, Address z, const Lane& me, int j,
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

// What a first look finds. By token and block of F: dz's largest and the part of <dA, a>. Along tokens, of this warp: the
// largest of one column in each quarter of them, number lane / 4 of the eight that the quarter has of this quad.
struct Survey {
  float row[2][kHalves] = {}, product[2][kHalves] = {}, column[3][4] = {};
  __device__ bool rare() const {
    float top = fmaxf(fmaxf(row[0][0], row[0][1]), fmaxf(row[1][0], row[1][1]));
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) top = fmaxf(top, column[2][quarter]);
    return infinite(top);
  }
};

__device__ __forceinline__ int column_of(const Lane& me, int quarter) {
  return 32 * quarter + me.lane / 8 * 8 + 2 * me.quad() + me.lane / 4 % 2;
}

template <bool kRare>
__device__ __forceinline__ float tamed(float value) {
  if constexpr (kRare) return without_inf(value);
  return value;
}

template <class Kind, bool kRare>
__device__ __forceinline__ Survey survey(const Fp8Gemm& p, const TokenInput& input, Address z, const Lane& me,
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
        const int half = j / 8, n = 4 * pair + 2 * next + b;
        found.product[below][half] = fmaf(da, g.activated, found.product[below][half]);
        const float mine = fabsf(tamed<kRare>(g.gate)), other = fabsf(tamed<kRare>(g.up));
        found.row[below][half] = fmaxf(found.row[below][half], fmaxf(mine, other));
        if constexpr (!Kind::kWide) {
          gate[n] = fmaxf(gate[n], mine);
          up[n] = fmaxf(up[n], other);
          activated[n] = fmaxf(activated[n], fabsf(tamed<kRare>(input.score[below] * g.activated)));
        }
      });
    }
    if constexpr (!Kind::kWide) {
      found.column[0][quarter] = fold_lanes(gate, me.lane);
      found.column[1][quarter] = fold_lanes(up, me.lane);
      found.column[2][quarter] = fold_lanes(activated, me.lane);
    }
  }
  return found;
}

// Scales along tokens, of the largest that both warpgroups have put together, and room for the next unit's.
__device__ __forceinline__ void scale_blocks(const Fp8Gemm& p, Blocks& blocks, const Lane& me, const Unit& unit,
                                             int round) {
  const int64_t block = unit.row / kTile;
  for (int i = me.group * 128 + me.number(); i < kBlocksAlong; i += kMultipliers * 128) {
    const int kind = i / kTile, column = i % kTile;
    const float scale = block_scale(__uint_as_float(blocks.largest[round][kind][column]), p.pow2);
    blocks.inverse[kind][column] = __fdiv_rn(1.0f, scale);
    blocks.largest[round ^ 1][kind][column] = 0;
    if (!unit.alive) continue;
    if (kind == 2) {
      p.e_scale[block * p.width + unit.column + column] = scale;
    } else {
      p.dt_scale[block * 2 * p.width + 2 * (unit.column + column) + kind] = scale;
    }
  }
}

// Writes dz over z, and what wgrad reads to ``along``, or to global memory in 16 bits.
template <class Kind, bool kRare>
__device__ __forceinline__ void emit(const Fp8Gemm& p, const TokenInput& input, const float (&inverse)[2][kHalves],
                                     const Blocks* blocks, Address z, Address along, const Lane& me, const Unit& unit,
                                     const float (&total)[64]) {
  const int tokens = 64 * me.group + 16 * me.warp, named = me.lane / 8;
  uint32_t activated[4];
#pragma unroll
  for (int j = 0; j < 16; j += 2) {
    float gate[2][2][2], up[2][2][2], a[2][2][2];  // by next, below, b
    for_sixteen<Kind>(p, input, z, me, j, total, [&](int next, int below, int b, const Gradient& g, float) {
      gate[next][below][b] = tamed<kRare>(g.gate);
      up[next][below][b] = tamed<kRare>(g.up);
      a[next][below][b] = input.score[below] * g.activated;
    });
    uint32_t dz[4];
#pragma unroll
    for (int next = 0; next < 2; ++next) {
#pragma unroll
      for (int below = 0; below < 2; ++below) {
        const float by = inverse[below][j / 8];
        const float *g = gate[next][below], *u = up[next][below];
        dz[2 * next + below] = to_e4m3(g[0] * by, u[0] * by, g[1] * by, u[1] * by);
      }
    }
    store_matrices(pairs_place(z, me, j), dz);
    if constexpr (Kind::kWide) {
      if (!unit.alive) continue;
#pragma unroll
      for (int next = 0; next < 2; ++next) {
        const int column = unit.column + 8 * (j + next) + 2 * me.quad();
#pragma unroll
        for (int below = 0; below < 2; ++below) {
          const int64_t row = opaque(unit.row + 64 * me.group + me.token(below));
          const float *g = gate[next][below], *u = up[next][below], *v = a[next][below];
          *reinterpret_cast<uint2*>(static_cast<uint16_t*>(p.dt) + row * 2 * p.width + 2 * column) =
              make_uint2(two(g[0], u[0], p.half), two(g[1], u[1], p.half));
          *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(p.e) + row * p.width + column) = two(v[0], v[1], p.half);
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
          for (int b = 0; b < 2; ++b) a[next][below][b] = tamed<kRare>(a[next][below][b]);
        }
        activated[j % 4 + next] = along_tokens(2, a[next]);
      }
      const int f = 2 * (8 * (j + named / 2) + me.lane % 8) + named % 2;
      store_matrices_transposed(along + swizzled(f, tokens), copies);
      if (j % 4 == 2) {
        const int i = 8 * (j - 2 + named) + me.lane % 8;
        store_matrices_transposed(along + 2 * kOperandBytes + swizzled(i, tokens), activated);
      }
    }
  }
}

template <class Kind>
__device__ __forceinline__ void store_gradient(const Fp8Gemm& p, const Maps& maps, Shared<Kind>& shared, const Lane& me,
                                               const Unit& unit, const TokenInput& input, int round,
                                               const float (&total)[64]) {
  uint8_t* out = shared.out.at[me.group];  // z until each pair is replaced by its gradient
  const Address z = opaque(shared_address(out));
  barrier_wait(&shared.z_full[me.group], round);

  Survey found = survey<Kind, false>(p, input, z, me, total);
  const bool rare = __any_sync(0xffffffff, found.rare());
  if (rare) found = survey<Kind, true>(p, input, z, me, total);

  const int f = 2 * unit.column, first = unit.row + 64 * me.group;
  float inverse[2][kHalves];
#pragma unroll
  for (int below = 0; below < 2; ++below) {
    const int64_t row = first + me.token(below);
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const float scale = block_scale(quad_max(found.row[below][half]), p.pow2);
      const float product = quad_sum(found.product[below][half]);
      inverse[below][half] = __fdiv_rn(1.0f, scale);
      if (unit.alive && me.quad() == 0) {
        p.d_scale[row * (2 * p.width / kTile) + f / kTile + half] = scale;
        p.parts[row * (p.width / 64) + unit.column / 64 + half] = product;
      }
    }
  }
  const Blocks* blocks = nullptr;
  Address along = 0;
  if constexpr (!Kind::kWide) {
    Blocks& mine = shared.blocks.at[0];
#pragma unroll
    for (int kind = 0; kind < 3; ++kind) {
#pragma unroll
      for (int quarter = 0; quarter < 4; ++quarter) {
        atomicMax(&mine.largest[round][kind][column_of(me, quarter)], __float_as_uint(found.column[kind][quarter]));
      }
    }
    multipliers_sync(kTogether);
    scale_blocks(p, mine, me, unit, round);
    multipliers_sync(kTogether);
    blocks = &mine;
    along = opaque(shared_address(shared.along.at));
  }
  if (rare) {
    emit<Kind, true>(p, input, inverse, blocks, z, along, me, unit, total);
  } else {
    emit<Kind, false>(p, input, inverse, blocks, z, along, me, unit, total);
  }
  fence_for_async_reads();
  if constexpr (Kind::kWide) {
    warpgroup_sync(1 + me.group);
  } else {
    multipliers_sync(kTogether);
  }
  if (!me.leads()) return;
  if (unit.alive) {
    for (int half = 0; half < kHalves; ++half) tensor_store(maps.d, out + half * kHalfBytes, f + half * kTile, first);
    if constexpr (!Kind::kWide) {
      tensor_store(maps.dt, shared.along.at[me.group], unit.row, f + me.group * kTile);
      if (me.group == 0) tensor_store(maps.e, shared.along.at[2], unit.row, unit.column);
    }
  }
  store_commit();
}

}  // namespace sonicmoe::sm90
