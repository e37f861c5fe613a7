// What happens to a warpgroup's sums, 64 rows of 128 or 192 columns in registers: see Lane and product for who holds what.
// Results leave through the warpgroup's own piece of shared memory, so the two never wait for each other.
#pragma once

#include "sm90_fp8_mainloop.cuh"

namespace sonicmoe::sm90 {

constexpr float kE4m3Max = 448.0f;
constexpr float kSmallestScale = 1.17549435e-38f;  // 2^-126: the inverse stays finite
constexpr float kLargest = 3.402823466e38f;

// Byte of column ``at`` in row ``row`` of a tile with rows of 128 bytes, in the swizzle of the bulk copies.
__device__ __forceinline__ int swizzled(int row, int at) { return row * 128 + (at ^ ((row % 8) * 16)); }

__device__ __forceinline__ float quad_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(0xffffffff, value, 1));
  return fmaxf(value, __shfl_xor_sync(0xffffffff, value, 2));
}

// The largest magnitude of some values. NaN does not count, Inf does: see without_inf.
template <int kCount>
__device__ __forceinline__ float largest_of(const float (&v)[kCount]) {
  float found = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) found = fmaxf(found, fabsf(v[i]));
  return found;
}

__device__ __forceinline__ bool infinite(float size) { return size > kLargest; }

// An Inf counts for no block's scale, and would saturate to a number: as a NaN it stays visible.
__device__ __forceinline__ float without_inf(float value) {
  return infinite(fabsf(value)) ? __int_as_float(0x7FFFFFFF) : value;
}

__device__ __forceinline__ float block_scale(float largest, bool pow2) {
  const float scale = fmaxf(__fdiv_rn(largest, kE4m3Max), kSmallestScale);
  if (!pow2) return scale;
  const uint32_t bits = __float_as_uint(scale);
  return __uint_as_float((bits + 0x7FFFFF) & 0x7F800000);
}

// Before shared memory is written again: the bulk stores have read it, all but the last ``kPending``.
template <int kPending = 0>
__device__ __forceinline__ void begin_output(const Lane& me) {
  if (me.leads()) store_wait_read<kPending>();
  warpgroup_sync(1 + me.group);
}

// All have written: true for the one thread that hands it to the bulk stores.
__device__ __forceinline__ bool end_output(const Lane& me) {
  fence_for_async_reads();
  warpgroup_sync(1 + me.group);
  return me.leads();
}

// ---- rows: y, rounded to 16 bits

__device__ inline void store_rows(const Fp8Gemm& p, const Maps& maps, uint8_t* out, const Lane& me, const Unit& unit,
                                  const float (&total)[1][96]) {
  constexpr int kPieceBytes = 64 * 128;  // 64 rows of 64 columns
  begin_output(me);
  // Lane l gives the place of row l % 16 in the left or the right one of two neighbouring groups of eight columns.
  const int lane = opaque(me.lane), row = me.warp * 16 + lane % 16;
#pragma unroll
  for (int j = 0; j < 24; j += 2) {
    const int column = 8 * j + lane / 16 * 8, at = column % 64 * 2;
    const float* v = total[0] + 4 * j;
    const uint32_t pairs[4] = {two(v[0], v[1], p.half), two(v[2], v[3], p.half), two(v[4], v[5], p.half),
                               two(v[6], v[7], p.half)};
    store_matrices(shared_address(out + column / 64 * kPieceBytes + swizzled(row, at)), pairs);
  }
  if (end_output(me)) {
    for (int piece = 0; piece < 3 && unit.alive; ++piece) {  // what lies behind the last column is not written
      tensor_store(maps.d, out + piece * kPieceBytes, unit.column + piece * 64, unit.row + me.group * 64);
    }
    store_commit();
  }
}

// ---- up: z and a = swiglu(z), both quantized

// Scale of the block of a quad's values, 32 a lane. Rare values are taken care of where there is one, for all lanes.
__device__ __forceinline__ float quad_scale(float (&v)[32], bool pow2) {
  float largest = largest_of(v);
  if (__any_sync(0xffffffff, infinite(largest))) {
#pragma unroll
    for (int i = 0; i < 32; ++i) v[i] = without_inf(v[i]);
    largest = largest_of(v);
  }
  return block_scale(quad_max(largest), pow2);
}

// A row's 128 values of z, of which each lane of a quad holds every fourth pair, as e4m3 into ``out``. Returns the scale.
__device__ __forceinline__ float quantize_z_row(const Fp8Gemm& p, uint8_t* out, const Lane& me, int row,
                                                float (&v)[32]) {
  const float scale = quad_scale(v, p.pow2), inverse = __fdiv_rn(1.0f, scale);
  row = opaque(row);
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    const uint32_t pair = to_e4m3(v[2 * j] * inverse, v[2 * j + 1] * inverse);
    *reinterpret_cast<uint16_t*>(out + swizzled(row, 8 * j + 2 * me.quad())) = static_cast<uint16_t>(pair);
  }
  return scale;
}

template <bool kClamp>
__device__ __forceinline__ float swiglu(float gate, float up, float clamp) {
  if constexpr (kClamp) {
    gate = at_most(gate, clamp);
    up = -at_most(-at_most(up, clamp), clamp);
  }
  return gate * sigmoid(gate) * up;
}

// The four lanes of a quad hold four bytes each, one of every fourth column; afterwards, of the columns that follow
// each other: lane q has byte q of lanes 0, 1, 2, 3.
__device__ __forceinline__ uint32_t transpose_quad(uint32_t mine, int quad) {
  uint32_t other = __shfl_xor_sync(0xffffffff, mine, 1);
  mine = quad & 1 ? __byte_perm(other, mine, 0x7351) : __byte_perm(mine, other, 0x6240);
  other = __shfl_xor_sync(0xffffffff, mine, 2);
  return quad & 2 ? __byte_perm(other, mine, 0x7632) : __byte_perm(mine, other, 0x5410);
}

// a of one row: 16 values from the left tile of z and 16 from the right one make its block of 128.
__device__ __forceinline__ float quantize_a_row(const Fp8Gemm& p, uint8_t* out, const Lane& me, int row,
                                                float (&v)[32]) {
  const float scale = quad_scale(v, p.pow2), inverse = __fdiv_rn(1.0f, scale);
  row = opaque(row);
#pragma unroll
  for (int g = 0; g < 8; ++g) {
    const uint32_t mine =
        to_e4m3(v[4 * g] * inverse, v[4 * g + 1] * inverse, v[4 * g + 2] * inverse, v[4 * g + 3] * inverse);
    const int column = 16 * g + 4 * me.quad();
    *reinterpret_cast<uint32_t*>(out + swizzled(row, column)) = transpose_quad(mine, me.quad());
  }
  return scale;
}

// Two tiles of z, side by side, and the tile of a that they make.
template <class Kind>
__device__ __forceinline__ void store_up(const Fp8Gemm& p, const Maps& maps, uint8_t* out, const Lane& me,
                                         const Unit& unit, const float (&total)[2][64]) {
  constexpr int kPieceBytes = kOperandBytes / 2;
  const int first = unit.row + me.group * 64;
  float a[2][32];  // of this thread's row, and of the one 8 further down
  begin_output(me);
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
    uint8_t* piece = out + tile * kPieceBytes;
    const int column = unit.column + tile * kTile;
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      float v[32];
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        v[2 * j] = total[tile][4 * j + 2 * below];
        v[2 * j + 1] = total[tile][4 * j + 2 * below + 1];
        a[below][16 * tile + j] = swiglu<Kind::kClamp>(v[2 * j], v[2 * j + 1], p.clamp);
      }
      const int64_t row = me.row() + 8 * below;
      const float scale = quantize_z_row(p, piece, me, row, v);
      if (unit.alive && me.quad() == 0) p.d_scale[(first + row) * (p.width / kTile) + column / kTile] = scale;
    }
    if (end_output(me)) {
      if (unit.alive) tensor_store(maps.d, piece, column, first);
      store_commit();
    }
  }
  if (p.e == nullptr) return;
  begin_output<1>(me);  // where the left tile of z was
#pragma unroll
  for (int below = 0; below < 2; ++below) {
    const int64_t row = me.row() + 8 * below;
    const float scale = quantize_a_row(p, out, me, row, a[below]);
    if (unit.alive && me.quad() == 0) p.e_scale[(first + row) * (p.width / 2 / kTile) + unit.column / 2 / kTile] = scale;
  }
  if (end_output(me)) {
    if (unit.alive) tensor_store(maps.e, out, unit.column / 2, first);
    store_commit();
  }
}

// ---- wgrad: into the caller's own memory

// Each element belongs to one thread of one launch, so the additions have no order that could differ.
__device__ inline void store_wgrad(const Fp8Gemm& p, const Lane& me, const Unit& unit, const float (&total)[2][64]) {
  if (!unit.alive || (p.add && unit.steps == 0)) return;
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
    if (tile >= unit.row_tiles) break;
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      const int in_matrix = unit.row + tile * kTile + me.tile_row() + 8 * below;
      const int64_t row = static_cast<int64_t>(unit.expert) * p.height + in_matrix;
      const int64_t first = row * p.d_columns + unit.column + 2 * me.quad();
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        const float x = total[tile][4 * j + 2 * below], y = total[tile][4 * j + 2 * below + 1];
        if (p.add) {
          add_two(static_cast<float*>(p.d) + first + 8 * j, x, y);
        } else if (p.wide) {
          *reinterpret_cast<float2*>(static_cast<float*>(p.d) + first + 8 * j) = make_float2(x, y);
        } else {
          *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(p.d) + first + 8 * j) = two(x, y, p.half);
        }
      }
    }
  }
}

}  // namespace sonicmoe::sm90
