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

// Of four values in each lane of a quad, value q of all lanes together for lane q.
template <class Combine>
__device__ __forceinline__ float fold_quad(const float (&v)[4], int quad, Combine combine) {
  const bool upper = quad & 2, odd = quad & 1;
  float two_of[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    two_of[i] = combine(upper ? v[2 + i] : v[i], __shfl_xor_sync(0xffffffff, upper ? v[i] : v[2 + i], 2));
  }
  return combine(odd ? two_of[1] : two_of[0], __shfl_xor_sync(0xffffffff, odd ? two_of[0] : two_of[1], 1));
}
__device__ __forceinline__ float quad_max(const float (&v)[4], int quad) {
  return fold_quad(v, quad, [](float x, float y) { return fmaxf(x, y); });
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

// Rounded as divisions are, where what comes out is a normal number: what a first guess leaves is divided again. The
// compiler's divisions look for all other numbers too, and are several times as long.
__device__ __forceinline__ float over_e4m3_max(float size) {
  constexpr float kBy = 1.0f / kE4m3Max;
  const float near = size * kBy;
  return fmaf(fmaf(-kE4m3Max, near, size), kBy, near);
}
__device__ __forceinline__ float inverse_of(float scale) {
  const float near = near_inverse(scale);
  return fmaf(fmaf(-scale, near, 1.0f), near, near);
}

__device__ __forceinline__ float block_scale(float largest, bool pow2) {
  const float scale = fmaxf(over_e4m3_max(largest), kSmallestScale);
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

constexpr int kPieceBytes = 64 * 128;  // that a bulk store moves: 64 rows of 128 bytes

// ---- rows: y, rounded to 16 bits

template <int kSize>
__device__ __forceinline__ void store_rows(const Fp8Gemm& p, const Maps& maps, uint8_t* out, const Lane& me,
                                           const Unit& unit, const float (&total)[1][kSize]) {
  constexpr int kPieces = kSize / 32;
  begin_output(me);
  // Lane l gives the place of row l % 16 in the left or the right one of two neighbouring groups of eight columns.
  const int lane = opaque(me.lane), row = me.warp * 16 + lane % 16;
#pragma unroll
  for (int j = 0; j < 8 * kPieces; j += 2) {
    const int column = 8 * j + lane / 16 * 8, at = column % 64 * 2;
    const float* v = total[0] + 4 * j;
    const uint32_t pairs[4] = {two(v[0], v[1], p.half), two(v[2], v[3], p.half), two(v[4], v[5], p.half),
                               two(v[6], v[7], p.half)};
    store_matrices(shared_address(out + column / 64 * kPieceBytes + swizzled(row, at)), pairs);
  }
  if (end_output(me)) {
    for (int piece = 0; piece < kPieces && unit.alive; ++piece) {  // what lies behind the last column is not written
      tensor_store(maps.d, out + piece * kPieceBytes, unit.column + piece * 64, unit.row + me.group * 64);
    }
    store_commit();
  }
}

// ---- up: z and a = swiglu(z), both quantized

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
  mine = __byte_perm(mine, __shfl_xor_sync(0xffffffff, mine, 1), quad & 1 ? 0x3715 : 0x6240);
  return __byte_perm(mine, __shfl_xor_sync(0xffffffff, mine, 2), quad & 2 ? 0x3276 : 0x5410);
}

// A thread's part of two tiles of z, and of the tile of a that they make: of its row, and of the one 8 further down.
struct Activated {
  float a[2][32];
  float largest_z[4], largest_a[2];  // magnitudes, by 2 * below + tile and by below
  bool rare;                         // some lane has an Inf, which is a NaN in all that follows
};

template <bool kRare>
__device__ __forceinline__ float tamed(float value) {
  return kRare ? without_inf(value) : value;
}

template <bool kRare>
__device__ __forceinline__ void find_largest(const float (&z)[2][64], Activated& found) {
#pragma unroll
  for (int below = 0; below < 2; ++below) {
    float a[32];
#pragma unroll
    for (int i = 0; i < 32; ++i) a[i] = tamed<kRare>(found.a[below][i]);
    found.largest_a[below] = largest_of(a);
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      float v[32];
#pragma unroll
      for (int i = 0; i < 32; ++i) v[i] = tamed<kRare>(z[tile][i / 2 * 4 + 2 * below + i % 2]);
      found.largest_z[2 * below + tile] = largest_of(v);
    }
  }
}

template <bool kClamp>
__device__ __forceinline__ void activate(const float (&z)[2][64], float clamp, Activated& found) {
#pragma unroll
  for (int i = 0; i < 128; i += 2) {
    const int tile = i / 64, at = i % 64;
    found.a[at / 2 % 2][16 * tile + at / 4] = swiglu<kClamp>(z[tile][at], z[tile][at + 1], clamp);
  }
  find_largest<false>(z, found);
  const float largest[6] = {found.largest_z[0], found.largest_z[1], found.largest_z[2],
                            found.largest_z[3], found.largest_a[0], found.largest_a[1]};
  found.rare = __any_sync(0xffffffff, infinite(largest_of(largest)));
  if (found.rare) find_largest<true>(z, found);
}

// A row of a tile of z to where ``at`` is its first byte's place; see store_up.
template <bool kRare>
__device__ __forceinline__ void quantize_z(uint8_t* piece, int at, float inverse, const float* z) {
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    const uint32_t pair = to_e4m3(tamed<kRare>(z[4 * j]) * inverse, tamed<kRare>(z[4 * j + 1]) * inverse);
    *reinterpret_cast<uint16_t*>(piece + (at ^ (j / 2 * 16)) + j % 2 * 8) = static_cast<uint16_t>(pair);
  }
}
// A row of a likewise.
template <bool kRare>
__device__ __forceinline__ void quantize_a(uint8_t* piece, int at, float inverse, const float (&a)[32], int quad) {
#pragma unroll
  for (int g = 0; g < 8; ++g) {
    float v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = tamed<kRare>(a[4 * g + i]) * inverse;
    *reinterpret_cast<uint32_t*>(piece + (at ^ (g * 16))) = transpose_quad(to_e4m3(v[0], v[1], v[2], v[3]), quad);
  }
}

// Two tiles of z, side by side, and the tile of a that they make.
template <class Kind>
__device__ __forceinline__ void store_up(const Fp8Gemm& p, const Maps& maps, uint8_t* out, const Lane& me,
                                         const Unit& unit, const float (&z)[2][64]) {
  constexpr int kPieceBytes = kOperandBytes / 2, kBelow = 8 * kTile;  // bytes
  const int first = unit.row + me.group * 64, quad = me.quad();
  Activated found;
  activate<Kind::kClamp>(z, p.clamp, found);
  // Each lane of a quad has the scale of one row and tile of z, and two of them that of the row's a.
  const float(&a)[2] = found.largest_a;
  const float z_scale = block_scale(quad_max(found.largest_z, quad), p.pow2);
  const float a_scale = block_scale(quad_max({a[0], a[0], a[1], a[1]}, quad), p.pow2);
  const float z_inverse = inverse_of(z_scale), a_inverse = inverse_of(a_scale);
  if (unit.alive) {
    const int64_t row = first + me.row() + quad / 2 * 8;
    p.d_scale[row * (p.width / kTile) + unit.column / kTile + quad % 2] = z_scale;
    if (p.e != nullptr && quad % 2 == 0) p.e_scale[row * (p.width / 2 / kTile) + unit.column / 2 / kTile] = a_scale;
  }
  // The first byte's place in a row; that of another column differs in bits that are zeros there.
  const int lane = opaque(me.lane), at = swizzled(me.warp * 16 + lane / 4, 0), of_quad = lane / 4 * 4;
  begin_output(me);
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
    uint8_t* piece = out + tile * kPieceBytes;
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      const float inverse = __shfl_sync(0xffffffff, z_inverse, of_quad + 2 * below + tile);
      if (found.rare) {
        quantize_z<true>(piece + below * kBelow, at + 2 * quad, inverse, z[tile] + 2 * below);
      } else {
        quantize_z<false>(piece + below * kBelow, at + 2 * quad, inverse, z[tile] + 2 * below);
      }
    }
    if (end_output(me)) {
      if (unit.alive) tensor_store(maps.d, piece, unit.column + tile * kTile, first);
      store_commit();
    }
  }
  if (p.e == nullptr) return;
  begin_output<1>(me);  // where the left tile of z was
#pragma unroll
  for (int below = 0; below < 2; ++below) {
    const float inverse = __shfl_sync(0xffffffff, a_inverse, of_quad + 2 * below);
    if (found.rare) {
      quantize_a<true>(out + below * kBelow, at + 4 * quad, inverse, found.a[below], quad);
    } else {
      quantize_a<false>(out + below * kBelow, at + 4 * quad, inverse, found.a[below], quad);
    }
  }
  if (end_output(me)) {
    if (unit.alive) tensor_store(maps.e, out, unit.column / 2, first);
    store_commit();
  }
}

// ---- wgrad: into the caller's own memory

// 64 rows of 128 columns in pieces for bulk stores, of 16 bits.
__device__ __forceinline__ void put_narrow(Address out, const Lane& me, const float (&v)[64], bool half) {
  const int lane = opaque(me.lane), row = me.warp * 16 + lane % 16;
#pragma unroll
  for (int j = 0; j < 16; j += 2) {
    const int column = 8 * j + lane / 16 * 8, at = column % 64 * 2;
    const float* w = v + 4 * j;
    const uint32_t pairs[4] = {two(w[0], w[1], half), two(w[2], w[3], half), two(w[4], w[5], half), two(w[6], w[7], half)};
    store_matrices(out + column / 64 * kPieceBytes + swizzled(row, at), pairs);
  }
}
// In float32.
__device__ __forceinline__ void put_wide(Address out, const Lane& me, const float (&v)[64]) {
  const int lane = opaque(me.lane), row = me.warp * 16 + lane / 4, first = swizzled(row, lane % 4 / 2 * 16) + lane % 2 * 8;
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    const Address to = out + j / 4 * kPieceBytes + (first ^ (j % 4 * 32));
    store_two(to, v[4 * j], v[4 * j + 1]);
    store_two(to + 8 * 128, v[4 * j + 2], v[4 * j + 3]);
  }
}

// Of 16 bits there is room for both tiles of a warpgroup, of float32 for one. A warp that has nothing else to do hands
// what is there to the bulk stores, and the warpgroup goes on. They meet at barriers that warps pass, which have no
// rounds to remember, and the warp walks through the tiles by itself: the sums leave no registers for places.
constexpr int kMeeting = 128 + 32;
template <class Kind>
struct Room {
  int group, number;
  __device__ Room(const Fp8Gemm& p, int group, int tile) : group(group), number(p.wide ? 0 : tile) {}
  __device__ Address in(Address shared) const {
    return shared + offsetof(Shared<Kind>, out) + group * Kind::kOutBytes + number * 2 * kPieceBytes;
  }
  __device__ int free() const { return 1 + 2 * group + number; }
  __device__ int full() const { return free() + 2 * kMultipliers; }
};

__device__ __forceinline__ bool is_stored(const Fp8Gemm& p, const Unit& unit, int tile) {
  return tile < unit.row_tiles && !(p.add && unit.steps == 0);
}

template <class Kind>
__device__ __forceinline__ void hand_over(const Fp8Gemm& p, const Ring<Kind>& ring, const Lane& me, const Unit& unit,
                                          const float (&total)[2][64]) {
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
    if (!is_stored(p, unit, tile)) return;
    const Room<Kind> room(p, me.group, tile);
    const Address place = room.in(opaque(ring.base));
    pass_when_all_have_come(room.free(), kMeeting);
    if (p.wide) {
      put_wide(place, me, total[tile]);
    } else {
      put_narrow(place, me, total[tile], p.half);
    }
    fence_for_async_reads();
    pass(room.full(), kMeeting);
  }
}

// The warp that stores what warpgroup ``group`` has made. Each element comes once in a launch, so the additions have no
// order that could differ.
template <class Kind>
__device__ void store_wgrad(const Fp8Gemm& p, const Maps& maps, const Shared<Kind>& shared, int rank, int group, int lane) {
  const int columns = p.wide ? 32 : 64;  // of a piece
  for (int tile = 0; tile < (p.wide ? 1 : 2); ++tile) pass(Room<Kind>(p, group, tile).free(), kMeeting);
  Units<Kind> units(p, rank);
  Unit unit;
  while (units.next(unit)) {
#pragma unroll 1
    for (int tile = 0; tile < 2 && is_stored(p, unit, tile); ++tile) {
      const Room<Kind> room(p, group, tile);
      const int row = unit.expert * p.d_rows + unit.row + tile * kTile + group * 64;
      Address piece = room.in(shared_address(&shared));
      pass_when_all_have_come(room.full(), kMeeting);
      if (lane == 0) {
#pragma unroll 1
        for (int column = 0; column < kTile && unit.alive; column += columns, piece += kPieceBytes) {
          if (p.add) {
            tensor_add(maps.d, piece, unit.column + column, row);
          } else {
            tensor_store(maps.d, piece, unit.column + column, row);
          }
        }
        store_commit();
        store_wait_read<0>();
      }
      __syncwarp();
      pass(room.free(), kMeeting);
    }
  }
  if (lane == 0) store_wait();
}

}  // namespace sonicmoe::sm90
