// Rows of tokens gathered into sorted order and quantized along it: the operands of wgrad that no epilogue makes.
//
// A warp makes 128 rows of 64 columns, 32 at a time, and a lane has 16 rows of 8 columns of these: a row's bytes are one
// load, and a column's codes one store. Nothing passes between warps. Rows that several experts get come from the L2
// cache: blocks that run at the same time have the same columns.
#pragma once

#include "sm90_fp8_epilogues.cuh"

namespace sonicmoe::sm90 {

constexpr int kTokenColumns = 64, kTokenWarps = 4;  // of a warp; in a block

template <Item kItem>
constexpr int kItemBytes = item_bytes(kItem);

// Eight numbers of each of 16 rows, as they lie in memory. Two of 16 bits are looked at in one instruction.
template <Item kItem>
struct EightColumns {
  static constexpr int kWords = 2 * kItemBytes<kItem>;
  static constexpr bool kPairs = kItemBytes<kItem> == 2, kHalf = kItem == Item::kHalf;
  uint32_t word[16][kWords];
  float of_row[kItem == Item::kByte ? 16 : 1];  // the scale of codes

  // A pad is 0, whatever its token holds.
  __device__ void load(int i, const uint8_t* source, bool real) {
    if constexpr (kWords == 2) {
      const uint2 found = real ? __ldg(reinterpret_cast<const uint2*>(source)) : make_uint2(0, 0);
      word[i][0] = found.x;
      word[i][1] = found.y;
    } else {
#pragma unroll
      for (int w = 0; w < kWords; w += 4) {
        const uint4 found = real ? __ldg(reinterpret_cast<const uint4*>(source) + w / 4) : make_uint4(0, 0, 0, 0);
        word[i][w] = found.x;
        word[i][w + 1] = found.y;
        word[i][w + 2] = found.z;
        word[i][w + 3] = found.w;
      }
    }
    if constexpr (kPairs) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) word[i][w] = kHalf ? tamed_halves(word[i][w]) : tamed_two(word[i][w]);
    }
  }

  static __device__ float2 pair(uint32_t two) {
    return kHalf ? from_half(two) : make_float2(low_of(two), high_of(two));
  }

  // With NaN for an Inf, which counts for no scale and would saturate to a number.
  __device__ float at(int i, int c) const {
    const uint32_t here = word[i][c * kItemBytes<kItem> / 4];
    if constexpr (kPairs) return c % 2 ? pair(here).y : pair(here).x;
    float value = __uint_as_float(here);
    if constexpr (kItem == Item::kByte) {
      const float2 codes = from_e4m3(static_cast<uint16_t>(here >> c % 4 / 2 * 16));
      value = (c % 2 ? codes.y : codes.x) * of_row[i];
    }
    return fmaf(value, 0.0f, value);
  }

  // Magnitudes; a NaN gives way to a number.
  __device__ void largest(float (&found)[8]) const {
    if constexpr (kPairs) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        uint32_t most = word[0][w];
#pragma unroll
        for (int i = 1; i < 16; ++i) most = kHalf ? larger_halves(most, word[i][w]) : larger_two(most, word[i][w]);
        found[2 * w] = fabsf(pair(most).x);
        found[2 * w + 1] = fabsf(pair(most).y);
      }
    } else {
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        found[c] = 0.0f;
#pragma unroll
        for (int i = 0; i < 16; ++i) found[c] = fmaxf(found[c], fabsf(at(i, c)));
      }
    }
  }
};

// Eight lanes, 4 apart, have eight values each: the largest of value v for the lane that is v among them, by the order of
// ``column_of``.
__device__ __forceinline__ float largest_of_eight(const float (&v)[8], int lane) {
  float four[4], two_of[2];
  const bool third = lane & 16, second = lane & 8, first = lane & 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    four[i] = fmaxf(third ? v[4 + i] : v[i], __shfl_xor_sync(0xffffffff, third ? v[i] : v[4 + i], 16));
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    two_of[i] = fmaxf(second ? four[2 + i] : four[i], __shfl_xor_sync(0xffffffff, second ? four[i] : four[2 + i], 8));
  }
  return fmaxf(first ? two_of[1] : two_of[0], __shfl_xor_sync(0xffffffff, first ? two_of[0] : two_of[1], 4));
}
__device__ __forceinline__ int column_of(int lane) { return lane / 16 * 4 + lane / 8 % 2 * 2 + lane / 4 % 2; }
__device__ __forceinline__ int lane_of(int column) { return column / 4 * 16 + column / 2 % 2 * 8 + column % 2 * 4; }

// ``block`` of 128 rows, ``columns`` and the 63 behind.
template <Item kItem>
__device__ __forceinline__ void quantize_tokens(const Fp8Tokens& p, int block, uint32_t columns, int lane) {
  const int first = block * kTile + lane / 4 * 16;
  const uint32_t row_bytes = p.apart * kItemBytes<kItem>, scales = p.apart / kTile;
  uint32_t token[16], real = 0;  // a bit for each row
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    token[i] = p.gather[first + i];
    real |= (p.scatter[first + i] < p.n_slots ? 1u : 0u) << i;
  }
  real = opaque(real);  // one register, and not the sixteen slots
#pragma unroll 1
  for (uint32_t column = columns + lane % 4 * 8; column < columns + kTokenColumns; column += 32) {
    const uint8_t* source = static_cast<const uint8_t*>(p.rows) + column * kItemBytes<kItem>;
    const float* row_scale = p.row_scale + column / kTile;
    EightColumns<kItem> rows;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const bool is_real = real >> i & 1;
      rows.load(i, source + uint64_t{token[i]} * row_bytes, is_real);
      if constexpr (kItem == Item::kByte) {
        rows.of_row[i] = is_real ? __ldg(row_scale + uint64_t{token[i]} * scales) : 0.0f;
      }
    }
    float largest[8];
    rows.largest(largest);
    const float scale = block_scale(largest_of_eight(largest, lane), p.pow2), inverse = inverse_of(scale);
    p.scale[static_cast<int64_t>(block) * p.width + column + column_of(lane)] = scale;
    const int64_t n_rows = static_cast<int64_t>(p.n_blocks) * kTile;
    uint8_t* target = p.data + column * n_rows + first;
#pragma unroll
    for (int c = 0; c < 8; ++c, target += n_rows) {
      const float by = __shfl_sync(0xffffffff, inverse, lane % 4 + lane_of(c));
      uint32_t codes[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        codes[i] = to_e4m3(rows.at(4 * i, c) * by, rows.at(4 * i + 1, c) * by, rows.at(4 * i + 2, c) * by,
                           rows.at(4 * i + 3, c) * by);
      }
      *reinterpret_cast<uint4*>(target) = make_uint4(codes[0], codes[1], codes[2], codes[3]);
    }
  }
}

// A block of threads, of which each warp has 128 rows of its own.
template <Item kItem>
__device__ __forceinline__ void quantize_tokens_block(const Fp8Tokens& p) {
  const int block = blockIdx.x * kTokenWarps + threadIdx.x / 32;
  if (block < p.n_blocks) quantize_tokens<kItem>(p, block, blockIdx.y * kTokenColumns, threadIdx.x % 32);
}

}  // namespace sonicmoe::sm90
