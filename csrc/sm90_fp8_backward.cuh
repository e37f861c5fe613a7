// The epilogue of down_backward. The product is dA transposed: a thread's rows are columns of dA, its columns tokens.
// So the blocks along tokens, which wgrad wants, lie in a quad; and those along F lie in one warpgroup, whose 64 rows
// are 128 columns of dz.
//
// dz is made twice, first to find the largest of each block, then to be written: its values for 64 sums a thread do not
// fit into registers beside the sums. z comes and dz leaves as matrices of pairs, gate and up, that the tensor cores'
// load and store instructions transpose; the order of a tile's tokens (token_of_column) gives each thread four that
// follow each other, one word of the copies along tokens.
#pragma once

#include "sm90_fp8_epilogues.cuh"

namespace sonicmoe::sm90 {

struct Gradient {
  float gate, up, activated;
};

// dz of one pair of z's columns, and swiglu's value there; ``da`` carries the score.
template <bool kClamp>
__device__ __forceinline__ Gradient swiglu_gradient(float2 z, float da, float clamp) {
  float gate = z.x, up = z.y;
  if constexpr (kClamp) {
    gate = gate > clamp ? clamp : gate;
    up = up > clamp ? clamp : up < -clamp ? -clamp : up;
  }
  const float chance = sigmoid(gate), silu = gate * chance, slope = fmaf(silu, 1.0f - chance, chance);
  Gradient found{da * up * slope, da * silu, silu * up};
  if constexpr (kClamp) {  // no gradient where a bound holds; times 0, so that a NaN stays
    if (!(z.x <= clamp)) found.gate *= 0.0f;
    if (!(fabsf(z.y) <= clamp)) found.up *= 0.0f;
  }
  return found;
}

// Eight values folded over the eight lanes that hold the same ones; afterwards v[0] is that from number lane / 4.
template <int kMask, int kCount, class Fold>
__device__ __forceinline__ void fold_step(float (&v)[8], int lane, Fold fold) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float kept = lane & kMask ? v[kCount + i] : v[i], sent = lane & kMask ? v[i] : v[kCount + i];
    v[i] = fold(kept, __shfl_xor_sync(0xffffffff, sent, kMask));
  }
}
template <class Fold>
__device__ __forceinline__ void fold_lanes(float (&v)[8], int lane, Fold fold) {
  fold_step<16, 4>(v, lane, fold);
  fold_step<8, 2>(v, lane, fold);
  fold_step<4, 1>(v, lane, fold);
}

// What the epilogue needs of token ``me.number()``, asked for before the products.
struct TokenInput {
  float z_scale, score;
};

// First of this warpgroup's 128 columns of dz.
__device__ __forceinline__ int first_column(const Unit& unit, const Lane& me) {
  return 2 * (unit.column + 64 * me.group);
}

template <class Kind>
__device__ __forceinline__ TokenInput begin_gradient(const Fp8Gemm& p, const Maps& maps, Shared<Kind>& shared,
                                                     const Lane& me, const Unit& unit) {
  const int f = first_column(unit, me);
  if (me.leads()) {
    store_wait_read<0>();
    barrier_expect(&shared.z_full[me.group], kOperandBytes);
    tensor_load(maps.z, &shared.z_full[me.group], shared.out.at[me.group], f, unit.row);
  }
  const int64_t row = unit.row + me.number();
  return {p.z_scale[row * (2 * p.width / kTile) + f / kTile], p.score[p.scatter[row]]};
}

// ---- A thread's sums: sixteen tokens at a time, of which it has four that follow each other, for two rows 8 apart.

constexpr int kSixteens = kTile / 16;

__device__ __forceinline__ float sum_of(const float (&total)[64], int sixteen, int token, int below) {
  return total[8 * sixteen + 4 * (token / 2) + 2 * below + token % 2];
}

// Which row of 16 bytes of z this lane names to the matrix instructions: half of the pairs of its warp, and a token.
__device__ __forceinline__ Address pairs_place(Address z, const Lane& me, int sixteen) {
  const int half = me.lane / 8 % 2, token = me.lane / 16 * 2 + me.lane % 8 / 2 * 4 + me.lane % 2;
  return z + sixteen * 16 * 128 + swizzled(token, 32 * me.warp + 16 * half);
}

// Four numbers that are kept by token, for this lane's tokens of sixteen.
__device__ __forceinline__ float4 four_of(const float (&kept)[kTile], int sixteen, int quad) {
  return *reinterpret_cast<const float4*>(&kept[16 * sixteen + 4 * quad]);
}

// Calls use(token, below, gradient, dA without the score, score) for the lane's eight sums of sixteen tokens.
template <class Kind, class Use>
__device__ __forceinline__ void for_sixteen(const Fp8Gemm& p, const Tokens& tokens, Address z, const Lane& me,
                                            int sixteen, const float (&total)[64], Use use) {
  uint32_t pairs[4];
  load_matrices_transposed(pairs_place(z, me, sixteen), pairs);
  const float4 scales = four_of(tokens.z_scale, sixteen, me.quad()), scores = four_of(tokens.score, sixteen, me.quad());
  const float scale[4] = {scales.x, scales.y, scales.z, scales.w}, score[4] = {scores.x, scores.y, scores.z, scores.w};
#pragma unroll
  for (int token = 0; token < 4; ++token) {
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      const uint32_t two_tokens = pairs[token / 2 * 2 + below];
      const float2 code = from_e4m3(static_cast<uint16_t>(token % 2 ? two_tokens >> 16 : two_tokens));
      const float da = sum_of(total, sixteen, token, below);
      const float2 value = make_float2(code.x * scale[token], code.y * scale[token]);
      use(token, below, swiglu_gradient<Kind::kClamp>(value, score[token] * da, p.clamp), da, score[token]);
    }
  }
}

// The largest magnitudes of this thread's blocks along tokens: of two pairs of F, 8 rows apart.
struct Largest {
  float gate[2] = {0.0f, 0.0f}, up[2] = {0.0f, 0.0f}, activated[2] = {0.0f, 0.0f};
  __device__ float all() const {
    const float v[6] = {gate[0], gate[1], up[0], up[1], activated[0], activated[1]};
    return largest_of(v);
  }
};

template <bool kRare>
__device__ __forceinline__ Gradient tamed(Gradient g) {
  if constexpr (kRare) return {without_inf(g.gate), without_inf(g.up), g.activated};
  return g;
}

// By token: the largest of this warp's part of dz's block, and its part of <dA, a>. By row: ``Largest``.
template <class Kind, bool kRare>
__device__ __forceinline__ Largest survey(const Fp8Gemm& p, Tokens& tokens, Address z, const Lane& me,
                                          const float (&total)[64]) {
  Largest found;
#pragma unroll
  for (int half = 0; half < kSixteens; half += 2) {
    float largest[8], product[8];
#pragma unroll
    for (int n = 0; n < 8; ++n) largest[n] = product[n] = 0.0f;
#pragma unroll
    for (int sixteen = half; sixteen < half + 2; ++sixteen) {
      for_sixteen<Kind>(p, tokens, z, me, sixteen, total,
                        [&](int token, int below, const Gradient& raw, float da, float score) {
                          const int n = sixteen % 2 * 4 + token;
                          product[n] = fmaf(da, raw.activated, product[n]);
                          const Gradient g = tamed<kRare>(raw);
                          const float gate = fabsf(g.gate), up = fabsf(g.up);
                          largest[n] = fmaxf(largest[n], fmaxf(gate, up));
                          if constexpr (Kind::kWide) {
                            found.gate[0] = fmaxf(found.gate[0], fmaxf(gate, up));  // for all() alone
                          } else {
                            const float a = score * g.activated;
                            found.gate[below] = fmaxf(found.gate[below], gate);
                            found.up[below] = fmaxf(found.up[below], up);
                            found.activated[below] =
                                fmaxf(found.activated[below], fabsf(kRare ? without_inf(a) : a));
                          }
                        });
    }
    fold_lanes(largest, me.lane, [](float a, float b) { return fmaxf(a, b); });
    fold_lanes(product, me.lane, [](float a, float b) { return a + b; });
    const int n = me.lane / 4, token = 16 * half + n / 4 * 16 + 4 * me.quad() + n % 4;
    tokens.largest[me.warp][token] = largest[0];
    tokens.product[me.warp][token] = product[0];
  }
  return found;
}

// Inverse scales of this thread's blocks along tokens.
struct Inverses {
  float gate[2], up[2], activated[2];
};

// Pairs of 16 bits, for a wgrad in 16 bits: dz [M,F] and p*a [M,I], of two tokens. Two lanes whose rows are neighbours
// trade tokens, so that each has both rows of one token.
__device__ __forceinline__ void store_wide(const Fp8Gemm& p, const Unit& unit, const Lane& me, int f, int i, int token,
                                           int row, const uint32_t (&pair)[2], const float (&a)[2]) {
  const int64_t first = unit.row + token;
  auto dz = static_cast<uint16_t*>(p.dt) + f + 2 * row, pa = static_cast<uint16_t*>(p.e) + i + row;
  const bool odd = me.lane & 4;
  const float other = __shfl_xor_sync(0xffffffff, odd ? a[0] : a[1], 4);
  if (!unit.alive) return;
  *reinterpret_cast<uint32_t*>(dz + first * 2 * p.width) = pair[0];
  *reinterpret_cast<uint32_t*>(dz + (first + 1) * 2 * p.width) = pair[1];
  const uint32_t mine = odd ? two(other, a[1], p.half) : two(a[0], other, p.half);
  *reinterpret_cast<uint32_t*>(pa - odd + (first + odd) * p.width) = mine;
}

// Writes dz over z, and what wgrad reads behind it, or to global memory in 16 bits.
template <class Kind, bool kRare>
__device__ __forceinline__ void emit(const Fp8Gemm& p, const Tokens& tokens, Address z, const Lane& me,
                                     const Unit& unit, const Inverses& inverses, const float (&total)[64]) {
  const int f = first_column(unit, me), i = unit.column + 64 * me.group;
  const Address dz_t = z + kOperandBytes, pa_t = dz_t + kOperandBytes;
  // The rows that this lane names: of dz_t gates and ups in turns, of pa_t two sixteens of tokens in turns.
  const int part = me.lane / 8 % 2, row = 16 * me.warp + me.lane / 16 * 8 + me.lane % 8;
  uint32_t activated[2][2];  // by row and sixteen
#pragma unroll
  for (int sixteen = 0; sixteen < kSixteens; ++sixteen) {
    const float4 by = four_of(tokens.inverse, sixteen, me.quad());
    const float inverse[4] = {by.x, by.y, by.z, by.w};
    float gate[2][4], up[2][4], a[2][4];
    uint32_t pair[2][4];
    for_sixteen<Kind>(p, tokens, z, me, sixteen, total,
                      [&](int token, int below, const Gradient& raw, float, float score) {
                        const Gradient g = tamed<kRare>(raw);
                        pair[below][token] = to_e4m3(g.gate * inverse[token], g.up * inverse[token]);
                        gate[below][token] = Kind::kWide ? raw.gate : g.gate * inverses.gate[below];
                        up[below][token] = Kind::kWide ? raw.up : g.up * inverses.up[below];
                        const float activated = score * g.activated;
                        a[below][token] = Kind::kWide
                                              ? activated
                                              : (kRare ? without_inf(activated) : activated) * inverses.activated[below];
                      });
    const uint32_t dz[4] = {pair[0][0] | pair[0][1] << 16, pair[1][0] | pair[1][1] << 16,
                            pair[0][2] | pair[0][3] << 16, pair[1][2] | pair[1][3] << 16};
    store_matrices_transposed(pairs_place(z, me, sixteen), dz);
    if constexpr (Kind::kWide) {
#pragma unroll
      for (int below = 0; below < 2; ++below) {
#pragma unroll
        for (int token = 0; token < 4; token += 2) {
          const uint32_t pairs[2] = {two(gate[below][token], up[below][token], p.half),
                                     two(gate[below][token + 1], up[below][token + 1], p.half)};
          const float mine[2] = {a[below][token], a[below][token + 1]};
          store_wide(p, unit, me, f, i, 16 * sixteen + 4 * me.quad() + token, me.row() + 8 * below, pairs, mine);
        }
      }
    } else {
      uint32_t along[4];  // gates and ups of the upper row, then of the one below
#pragma unroll
      for (int below = 0; below < 2; ++below) {
        along[2 * below] = to_e4m3(gate[below][0], gate[below][1], gate[below][2], gate[below][3]);
        along[2 * below + 1] = to_e4m3(up[below][0], up[below][1], up[below][2], up[below][3]);
        activated[below][sixteen % 2] = to_e4m3(a[below][0], a[below][1], a[below][2], a[below][3]);
      }
      store_matrices(dz_t + swizzled(2 * row + part, 16 * sixteen), along);
      if (sixteen % 2 == 1) {
        const uint32_t both[4] = {activated[0][0], activated[0][1], activated[1][0], activated[1][1]};
        store_matrices(pa_t + swizzled(row, 16 * (sixteen - 1 + part)), both);
      }
    }
  }
}

template <class Kind>
__device__ __forceinline__ void store_gradient(const Fp8Gemm& p, const Maps& maps, Shared<Kind>& shared, const Lane& me,
                                               const Unit& unit, const TokenInput& input, uint32_t z_round,
                                               const float (&total)[64]) {
  uint8_t* dz = shared.out.at[me.group];  // z until each pair is replaced by its gradient
  const Address z = opaque(shared_address(dz));
  Tokens& tokens = shared.tokens.at[me.group];
  const int f = first_column(unit, me), i = unit.column + 64 * me.group, mine = me.number();
  tokens.z_scale[mine] = input.z_scale;
  tokens.score[mine] = input.score;
  barrier_wait(&shared.z_full[me.group], z_round);
  warpgroup_sync(1 + me.group);

  Largest largest = survey<Kind, false>(p, tokens, z, me, total);
  const bool rare = __any_sync(0xffffffff, infinite(largest.all()));
  if (rare) largest = survey<Kind, true>(p, tokens, z, me, total);
  warpgroup_sync(1 + me.group);
  {
    float top = 0.0f, product = 0.0f;
    for (int warp = 0; warp < 4; ++warp) {
      top = fmaxf(top, tokens.largest[warp][mine]);
      product += tokens.product[warp][mine];
    }
    const float scale = block_scale(top, p.pow2);
    tokens.inverse[mine] = __fdiv_rn(1.0f, scale);
    const int64_t row = unit.row + mine;
    if (unit.alive) {
      p.d_scale[row * (2 * p.width / kTile) + f / kTile] = scale;
      p.parts[row * (p.width / 64) + i / 64] = product;
    }
  }
  Inverses inverses;
#pragma unroll
  for (int below = 0; below < (Kind::kWide ? 0 : 2); ++below) {
    const float gate = block_scale(quad_max(largest.gate[below]), p.pow2);
    const float up = block_scale(quad_max(largest.up[below]), p.pow2);
    const float activated = block_scale(quad_max(largest.activated[below]), p.pow2);
    inverses.gate[below] = __fdiv_rn(1.0f, gate);
    inverses.up[below] = __fdiv_rn(1.0f, up);
    inverses.activated[below] = __fdiv_rn(1.0f, activated);
    if (unit.alive && me.quad() == 0) {
      const int64_t block = unit.row / kTile;
      const int row = me.row() + 8 * below;
      *reinterpret_cast<float2*>(p.dt_scale + block * 2 * p.width + f + 2 * row) = make_float2(gate, up);
      p.e_scale[block * p.width + i + row] = activated;
    }
  }
  warpgroup_sync(1 + me.group);  // for the inverse scales by token

  if (rare) {
    emit<Kind, true>(p, tokens, z, me, unit, inverses, total);
  } else {
    emit<Kind, false>(p, tokens, z, me, unit, inverses, total);
  }
  if (end_output(me)) {
    if (unit.alive) {
      tensor_store(maps.d, dz, f, unit.row);
      if constexpr (!Kind::kWide) {
        tensor_store(maps.dt, dz + kOperandBytes, unit.row, f);
        tensor_store(maps.e, dz + 2 * kOperandBytes, unit.row, i);
      }
    }
    store_commit();
  }
}

}  // namespace sonicmoe::sm90
