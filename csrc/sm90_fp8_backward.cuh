// The epilogue of down_backward. The product is dA transposed: a thread's rows are columns of dA, its columns tokens.
// So the blocks along tokens, which wgrad wants, lie in a quad; and those along F lie in one warpgroup, whose 64 rows
// are 128 columns of dz.
//
// dz is made twice, first to find the largest of each block, then to be written: its values for 64 sums a thread do not
// fit into registers beside the sums.
#pragma once

#include "sm90_fp8_epilogues.cuh"

namespace sonicmoe::sm90 {

struct Gradient {
  float gate, up, activated;
};

// dz of one pair of z's columns, and swiglu's value there; ``da`` carries the score.
__device__ __forceinline__ Gradient swiglu_gradient(float2 z, float da, float clamp) {
  const float gate = z.x > clamp ? clamp : z.x, up = z.y > clamp ? clamp : z.y < -clamp ? -clamp : z.y;
  const float sigmoid = __fdividef(1.0f, 1.0f + __expf(-gate)), silu = gate * sigmoid;
  Gradient found;
  found.activated = silu * up;
  found.gate = da * up * (sigmoid * (1.0f + gate * (1.0f - sigmoid)));
  found.up = da * silu;
  // No gradient where a bound holds; times 0, so that a NaN stays.
  if (!(z.x <= clamp)) found.gate *= 0.0f;
  if (!(fabsf(z.y) <= clamp)) found.up *= 0.0f;
  return found;
}

// 32 values, of tokens 8 (n / 2) + 2 quad + n % 2, folded over the eight lanes that hold the same tokens. Afterwards
// v[0..3] are those from n = first_of(lane) on.
template <int kMask, class Fold>
__device__ __forceinline__ void fold_step(float (&v)[32], int lane, Fold fold) {
#pragma unroll
  for (int i = 0; i < kMask; ++i) {
    const float kept = lane & kMask ? v[kMask + i] : v[i], sent = lane & kMask ? v[i] : v[kMask + i];
    v[i] = fold(kept, __shfl_xor_sync(0xffffffff, sent, kMask));
  }
}
template <class Fold>
__device__ __forceinline__ void fold_rows(float (&v)[32], int lane, Fold fold) {
  fold_step<16>(v, lane, fold);
  fold_step<8>(v, lane, fold);
  fold_step<4>(v, lane, fold);
}
__device__ __forceinline__ int first_of(int lane) { return lane & 28; }

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
    store_wait_read();
    barrier_expect(&shared.z_full[me.group], kOperandBytes);
    tensor_load(maps.z, &shared.z_full[me.group], shared.out[me.group], f, unit.row);
  }
  const int64_t row = unit.row + me.number();
  return {p.z_scale[row * (2 * p.width / kTile) + f / kTile], p.score[p.scatter[row]]};
}

// The largest magnitudes of this thread's blocks along tokens: of two pairs of F, 8 rows apart.
struct Largest {
  float gate[2] = {0.0f, 0.0f}, up[2] = {0.0f, 0.0f}, activated[2] = {0.0f, 0.0f};
};

__device__ __forceinline__ Gradient gradient_at(const Fp8Gemm& p, const Tokens& tokens, const uint8_t* z, int token,
                                                int row, float da) {
  const uint16_t pair = *reinterpret_cast<const uint16_t*>(z + swizzled(token, 2 * row));
  const float scale = tokens.z_scale[token], score = tokens.score[token];
  const float2 value = from_e4m3(pair);
  return swiglu_gradient(make_float2(value.x * scale, value.y * scale), score * da, p.clamp);
}

// By token: the largest of this warp's part of dz's block, and its part of <dA, a>. By row, if wanted: ``Largest``.
template <bool kAlongTokens>
__device__ __forceinline__ Largest survey(const Fp8Gemm& p, Tokens& tokens, const uint8_t* z, const Lane& me,
                                          const float (&total)[64]) {
  Largest found;
  float largest[32], product[32];
  const int quad = fresh(me.quad());
#pragma unroll
  for (int n = 0; n < 32; ++n) {
    const int token = 8 * (n / 2) + 2 * quad + n % 2;
    largest[n] = product[n] = 0.0f;
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      const float da = total[4 * (n / 2) + 2 * below + n % 2];
      const Gradient g = gradient_at(p, tokens, z, token, me.row() + 8 * below, da);
      const float gate = finite_magnitude(g.gate), up = finite_magnitude(g.up);
      largest[n] = fmaxf(largest[n], fmaxf(gate, up));
      product[n] = fmaf(da, g.activated, product[n]);
      if constexpr (kAlongTokens) {
        found.gate[below] = fmaxf(found.gate[below], gate);
        found.up[below] = fmaxf(found.up[below], up);
        const float activated = finite_magnitude(tokens.score[token] * g.activated);
        found.activated[below] = fmaxf(found.activated[below], activated);
      }
    }
  }
  fold_rows(largest, me.lane, [](float a, float b) { return fmaxf(a, b); });
  fold_rows(product, me.lane, [](float a, float b) { return a + b; });
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int n = first_of(me.lane) + i, token = 8 * (n / 2) + 2 * quad + n % 2;
    tokens.largest[me.warp][token] = largest[i];
    tokens.product[me.warp][token] = product[i];
  }
  return found;
}

__device__ __forceinline__ void store_pair(uint8_t* tile, int row, int at, float low, float high) {
  *reinterpret_cast<uint16_t*>(tile + swizzled(row, at)) = static_cast<uint16_t>(to_e4m3(low, high));
}

// Pairs of 16 bits, for a wgrad in 16 bits: dz [M,F] and p*a [M,I]. Two lanes whose rows are neighbours trade tokens, so
// that each has both rows of one token.
__device__ __forceinline__ void store_wide(const Fp8Gemm& p, const Unit& unit, const Lane& me, int f, int i, int token,
                                           int row, const Gradient& left, const Gradient& right, float2 score) {
  const int64_t first = unit.row + token;
  auto dz = static_cast<uint16_t*>(p.dt) + f + 2 * row, pa = static_cast<uint16_t*>(p.e) + i + row;
  const bool odd = me.lane & 4;
  const float a = score.x * left.activated, b = score.y * right.activated;
  const float other = __shfl_xor_sync(0xffffffff, odd ? a : b, 4);
  if (!unit.alive) return;
  *reinterpret_cast<uint32_t*>(dz + first * 2 * p.width) = two(left.gate, left.up, p.half);
  *reinterpret_cast<uint32_t*>(dz + (first + 1) * 2 * p.width) = two(right.gate, right.up, p.half);
  *reinterpret_cast<uint32_t*>(pa - odd + (first + odd) * p.width) = odd ? two(other, b, p.half) : two(a, other, p.half);
}

template <class Kind>
__device__ inline void store_gradient(const Fp8Gemm& p, const Maps& maps, Shared<Kind>& shared, const Lane& me,
                                      const Unit& unit, const TokenInput& input, uint32_t z_round,
                                      const float (&total)[64]) {
  uint8_t* dz = shared.out[me.group];  // z until each pair is replaced by its gradient
  uint8_t *dz_t = dz + kOperandBytes, *pa_t = dz_t + kOperandBytes;
  Tokens& tokens = shared.tokens[me.group];
  const int f = first_column(unit, me), i = unit.column + 64 * me.group, mine = me.number();
  tokens.z_scale[mine] = input.z_scale;
  tokens.score[mine] = input.score;
  barrier_wait(&shared.z_full[me.group], z_round);
  warpgroup_sync(1 + me.group);

  const Largest largest = survey<!Kind::kWide>(p, tokens, dz, me, total);
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
  float gate[2], up[2], activated[2];  // inverse scales along tokens
#pragma unroll
  for (int below = 0; below < (Kind::kWide ? 0 : 2); ++below) {
    const float gate_scale = block_scale(quad_max(largest.gate[below]), p.pow2);
    const float up_scale = block_scale(quad_max(largest.up[below]), p.pow2);
    const float activated_scale = block_scale(quad_max(largest.activated[below]), p.pow2);
    gate[below] = __fdiv_rn(1.0f, gate_scale);
    up[below] = __fdiv_rn(1.0f, up_scale);
    activated[below] = __fdiv_rn(1.0f, activated_scale);
    if (unit.alive && me.quad() == 0) {
      const int64_t block = unit.row / kTile;
      const int row = me.row() + 8 * below;
      *reinterpret_cast<float2*>(p.dt_scale + block * 2 * p.width + f + 2 * row) = make_float2(gate_scale, up_scale);
      p.e_scale[block * p.width + i + row] = activated_scale;
    }
  }
  warpgroup_sync(1 + me.group);  // for the inverse scales by token

  const int quad = fresh(me.quad());
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    const int token = 8 * j + 2 * quad;
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      const int row = me.row() + 8 * below;
      const Gradient left = gradient_at(p, tokens, dz, token, row, total[4 * j + 2 * below]);
      const Gradient right = gradient_at(p, tokens, dz, token + 1, row, total[4 * j + 2 * below + 1]);
      const float2 inverse = *reinterpret_cast<const float2*>(&tokens.inverse[token]);
      const float2 score = *reinterpret_cast<const float2*>(&tokens.score[token]);
      store_pair(dz, token, 2 * row, scaled(left.gate, inverse.x), scaled(left.up, inverse.x));
      store_pair(dz, token + 1, 2 * row, scaled(right.gate, inverse.y), scaled(right.up, inverse.y));
      if constexpr (Kind::kWide) {
        store_wide(p, unit, me, f, i, token, row, left, right, score);
        continue;
      }
      store_pair(dz_t, 2 * row, token, scaled(left.gate, gate[below]), scaled(right.gate, gate[below]));
      store_pair(dz_t, 2 * row + 1, token, scaled(left.up, up[below]), scaled(right.up, up[below]));
      store_pair(pa_t, row, token, scaled(score.x * left.activated, activated[below]),
                 scaled(score.y * right.activated, activated[below]));
    }
  }
  if (end_output(me)) {
    if (unit.alive) {
      tensor_store(maps.d, dz, f, unit.row);
      if constexpr (!Kind::kWide) {
        tensor_store(maps.dt, dz_t, unit.row, f);
        tensor_store(maps.e, pa_t, unit.row, i);
      }
    }
    store_commit();
  }
}

}  // namespace sonicmoe::sm90
