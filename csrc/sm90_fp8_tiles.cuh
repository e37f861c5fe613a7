// What the grouped FP8 GEMMs are made of: their kinds, what each keeps in shared memory, and which tile comes next.
#pragma once

#include "sm90_fp8_gemm.h"
#include "sm90_primitives.cuh"

#include <cstddef>

namespace sonicmoe::sm90 {

constexpr int kTile = 128;  // rows, depth of one step, and most often columns
constexpr int kOperandBytes = kTile * kTile;
constexpr int kStripBytes = kTile * 4;  // a scale for each row of an operand tile
constexpr int kMultipliers = 2;         // warpgroups
constexpr int kThreads = 128 * (1 + kMultipliers);
constexpr int kGroup = 8;               // units of rows that go through the columns together

enum class Item { kByte, kHalf, kBfloat, kFloat };
constexpr int item_bytes(Item item) { return item == Item::kByte ? 1 : item == Item::kFloat ? 4 : 2; }

// What a GEMM is made of.
//   kGather         tokens are gathered row by row; a unit's rows are tokens
//   kStrips         scales of both operands come with every step, one for each row and column
//   kAlone          a warpgroup makes every second tile, and all of it; a thread's two tokens, 8 rows apart, are such as
//                   follow each other
//   kColumns        of a tile
//   kRowTiles       tiles that a block makes at once, one below the other; kColumnTiles likewise side by side
//   kOutBytes       room for each warpgroup's results; kAlongBytes for what it makes of them for wgrad
//   kLoaderRegisters  of a thread that loads; the others share the rest
//   kClamp          swiglu's inputs are bounded
template <int kColumns_>
struct RowsKind {
  static constexpr bool kGather = false, kStrips = false, kAlone = false;
  static constexpr int kColumns = kColumns_, kRowTiles = 1, kColumnTiles = 1, kStages = 4, kLoaderRegisters = 40;
  static constexpr int kOutBytes = 24 * 1024, kAlongBytes = 0;
};
template <bool kClamp_>
struct UpKind {
  static constexpr bool kGather = true, kStrips = false, kAlone = false, kClamp = kClamp_;
  static constexpr int kColumns = kTile, kRowTiles = 1, kColumnTiles = 2, kStages = 4, kLoaderRegisters = 40;
  static constexpr int kOutBytes = 16 * 1024, kAlongBytes = 0;
};
template <bool kClamp_>
struct DownBackwardKind {  // for a wgrad in FP8
  static constexpr bool kGather = true, kStrips = false, kAlone = true;
  static constexpr bool kClamp = kClamp_, kWide = false;
  static constexpr int kColumns = kTile, kRowTiles = 1, kColumnTiles = 1, kStages = 3, kLoaderRegisters = 40;
  static constexpr int kOutBytes = 32 * 1024, kAlongBytes = 24 * 1024;
};
template <bool kClamp_>
struct WideDownBackwardKind {  // for a wgrad in 16 bits
  static constexpr bool kGather = true, kStrips = false, kAlone = true;
  static constexpr bool kClamp = kClamp_, kWide = true;
  static constexpr int kColumns = kTile, kRowTiles = 1, kColumnTiles = 1, kStages = 3, kLoaderRegisters = 40;
  static constexpr int kOutBytes = 32 * 1024, kAlongBytes = 24 * 1024;
};
struct WgradKind {
  static constexpr bool kGather = false, kStrips = true, kAlone = false;
  static constexpr int kColumns = kTile, kRowTiles = 2, kColumnTiles = 1, kStages = 3, kLoaderRegisters = 40;
  static constexpr int kOutBytes = 32 * 1024, kAlongBytes = 0;
};
template <class Kind>
constexpr int kTiles = Kind::kRowTiles * Kind::kColumnTiles;
// Sums of 64 rows and a tile's columns that a warpgroup has at once, registers of each, how many sets of 64 rows they are
// of, and of how many blocks of 128 columns of the weights.
template <class Kind>
constexpr int kSums = Kind::kAlone ? 2 : kTiles<Kind>;
template <class Kind>
constexpr int kSumSize = Kind::kColumns / 2;
template <class Kind>
constexpr int kRowSets = Kind::kAlone ? 2 : Kind::kRowTiles;
template <class Kind>
constexpr int kColumnSets = (Kind::kColumnTiles * Kind::kColumns + kTile - 1) / kTile;
// Steps of gathered tokens that one thread has asked for: fewer than stages, or each would only land when it is due.
template <class Kind>
constexpr int kInFlight = Kind::kStages > 3 ? 3 : Kind::kStages - 1;

struct Maps {
  CUtensorMap a, b, d, e, z, dt;
};

// Blocks along tokens in the epilogue of down_backward: the columns of dz's gates, of its ups, and of p*a.
struct Blocks {
  uint32_t largest[3][kTile];  // magnitudes, whose bits are in their order
  float inverse[3][kTile];     // of the scales
};

// What is known of each token where a warpgroup has 128: where its scales begin, and for the same epilogue its score and
// the scales of its two blocks of z and, inverted, of dz.
struct Tokens {
  uint32_t scales[kTile];
  float z_scale[2][kTile], inverse[2][kTile], score[kTile];
};

// A number that all lanes of a warp have, and of which the compiler shall know it: there are registers and instructions
// for such ones, beside those that the sums are short of.
template <class T>
__device__ __forceinline__ T uniform(T value) {
  return __shfl_sync(0xffffffff, value, 0);
}

template <class T, int kCount>
struct alignas(16) Array {
  T at[kCount];
};
template <class T>
struct Array<T, 0> {};

template <class Kind>
struct alignas(1024) Shared {
  static constexpr int kABytes = Kind::kRowTiles * kOperandBytes, kBBytes = Kind::kColumnTiles * Kind::kColumns * kTile;
  uint8_t a[Kind::kStages][kABytes];
  uint8_t b[Kind::kStages][kBBytes];
  Array<uint8_t[Kind::kOutBytes == 0 ? 1 : Kind::kOutBytes], Kind::kOutBytes == 0 ? 0 : kMultipliers> out;
  Array<uint8_t[Kind::kAlongBytes == 0 ? 1 : Kind::kAlongBytes], Kind::kAlongBytes == 0 ? 0 : kMultipliers> along;
  Array<float[Kind::kRowTiles * kTile], Kind::kStrips ? Kind::kStages : 0> a_strip;
  Array<float[kTile], Kind::kStrips ? Kind::kStages : 0> b_strip;
  Array<Blocks, Kind::kAlongBytes == 0 ? 0 : kMultipliers> blocks;
  Array<Tokens, Kind::kAlone ? kMultipliers : 0> tokens;
  uint64_t full[Kind::kStages];
  uint64_t empty[Kind::kStages];
  uint64_t z_full[kMultipliers];
  uint64_t turn[kMultipliers];
};

// The ring of stages as the loop that multiplies sees it: places worked out once.
template <class Kind>
struct Ring {
  Address base, my_turn, other_turn;  // of this warpgroup at the tensor cores, and of the other one
  Operand first_a, first_b;
  __device__ Ring(Shared<Kind>& shared, int group)
      : base(uniform(opaque(shared_address(&shared)))),
        my_turn(uniform(base + offsetof(Shared<Kind>, turn) + group * sizeof(uint64_t))),
        other_turn(uniform(base + offsetof(Shared<Kind>, turn) + (1 - group) * sizeof(uint64_t))),
        first_a(operand(base + offsetof(Shared<Kind>, a) + (Kind::kAlone ? 0 : group * (kOperandBytes / 2)))),
        first_b(operand(base + offsetof(Shared<Kind>, b))) {}
  __device__ Operand a(int s, int sum) const {
    constexpr int kApart = Kind::kAlone ? kOperandBytes / 2 : kOperandBytes;
    return further(first_a, s * Shared<Kind>::kABytes + sum / Kind::kColumnTiles * kApart);
  }
  __device__ Operand b(int s, int sum) const {
    return further(first_b, s * Shared<Kind>::kBBytes + sum % Kind::kColumnTiles * kOperandBytes);
  }
  __device__ Address full(int s) const { return base + offsetof(Shared<Kind>, full) + s * sizeof(uint64_t); }
  __device__ Address empty(int s) const { return base + offsetof(Shared<Kind>, empty) + s * sizeof(uint64_t); }
  __device__ Address a_strip(int s) const {
    return base + offsetof(Shared<Kind>, a_strip) + s * Kind::kRowTiles * kStripBytes;
  }
  __device__ Address b_strip(int s) const { return base + offsetof(Shared<Kind>, b_strip) + s * kStripBytes; }
};

// ---- Which tile

struct Unit {
  int expert, row, column;  // first row and column of this block's tile: of sorted rows and weights, or of D in wgrad
  int first_step, steps;    // along the summed dimension, in tiles
  int row_tiles;            // how many of kRowTiles there are
  bool alive;               // false for the spare block of a cluster at an edge: it works along and stores nothing
  bool apart;               // where tokens are gathered: the cluster's blocks have the same tokens and weights of their own
};

// All roles of a cluster walk through the same list: no messages, and the order of sums never changes. It remembers
// little and works out the rest: registers are dear. ``kWarps``: whole warps walk, and not one thread.
//
// What two blocks make at once lies side by side. Where tokens are gathered it lies one below the other, but side by side
// as well for an expert's last tile of tokens where that has no neighbour.
template <class Kind, bool kWarps = true>
class Units {
 public:
  __device__ Units(const Fp8Gemm& p, int rank) : p_(p), rank_(rank), next_(blockIdx.x / 2) { open(0); }

  __device__ bool next(Unit& unit) {
    while (next_ >= pairs() + singles()) {
      if (expert_ + 1 == p_.n_experts) return false;
      next_ -= pairs() + singles();
      open(expert_ + 1);
    }
    unit.expert = expert_;
    unit.first_step = 0;
    unit.steps = p_.depth / kTile;
    unit.apart = Kind::kGather && next_ >= pairs();
    int row, column;
    if (unit.apart) {
      row = row_tiles() - 1;
      column = 2 * (next_ - pairs()) + rank_;
    } else {
      const int group = next_ / (kGroup * column_units()), inside = next_ - group * kGroup * column_units();
      const int size = min(row_units() - group * kGroup, kGroup);
      row = (group * kGroup + inside % size) * kHigh + (Kind::kGather ? rank_ : 0);
      column = inside / size;
      if constexpr (!Kind::kGather) column = 2 * column + rank_;
    }
    next_ += gridDim.x / 2;
    unit.alive = column * kAcross < p_.width;
    if (!unit.alive) --column;
    unit.row_tiles = Kind::kGather ? 1 : min(row_tiles() - row, Kind::kRowTiles);
    unit.row = begin_ + row * kTile;
    unit.column = column * kAcross;
    if constexpr (kWarps) {  // what divisions gave
      unit.row = uniform(unit.row);
      unit.column = uniform(unit.column);
    }
    if constexpr (Kind::kStrips) {
      unit.row = row * kTile;
      unit.first_step = begin_ / kTile;
      unit.steps = (end_ - begin_) / kTile;
    }
    return true;
  }

 private:
  // Tiles of a unit one below the other, which is what a cluster makes; columns that a block makes, and a unit has.
  static constexpr int kHigh = Kind::kGather ? 2 : Kind::kRowTiles;
  static constexpr int kAcross = Kind::kColumnTiles * Kind::kColumns, kWide = Kind::kGather ? kAcross : 2 * kAcross;

  __device__ int row_tiles() const { return (Kind::kStrips ? p_.height : end_ - begin_) / kTile; }
  __device__ int row_units() const { return Kind::kGather ? row_tiles() / 2 : (row_tiles() + kHigh - 1) / kHigh; }
  __device__ int column_units() const { return (p_.width + kWide - 1) / kWide; }
  __device__ int pairs() const { return row_units() * column_units(); }
  // Of an expert's last tile of tokens, if it has no neighbour.
  __device__ int singles() const { return Kind::kGather && row_tiles() % 2 != 0 ? (column_units() + 1) / 2 : 0; }

  __device__ void open(int expert) {
    expert_ = expert;
    begin_ = p_.offset[expert];
    end_ = p_.offset[expert + 1];
    if constexpr (kWarps) {
      begin_ = uniform(begin_);
      end_ = uniform(end_);
    }
  }

  const Fp8Gemm& p_;
  int rank_, next_, expert_, begin_, end_;  // next_: among the expert's units
};

// A place in the ring of stages, and how often it has come round.
template <class Kind>
struct Stage {
  int index = 0;
  uint32_t round = 0, turn = 0;  // turn: of the warpgroups that multiply
  __device__ void advance() {
    if (++index == Kind::kStages) {
      index = 0;
      round ^= 1;
    }
  }
  __device__ void skip(int steps) {
    index += steps;
    round ^= index / Kind::kStages & 1;
    index %= Kind::kStages;
  }
};

template <class Kind>
__device__ void make_barriers(Shared<Kind>& shared) {
  for (int s = 0; s < Kind::kStages; ++s) {
    // One for the bulk copies; four for the warps that gather.
    barrier_init(&shared.full[s], Kind::kGather ? 1 + 4 : 1);
    // The warps of both blocks that read the stage: each block writes into the other's stages.
    barrier_init(&shared.empty[s], 2 * (Kind::kAlone ? 1 : kMultipliers) * 4);
  }
  for (int group = 0; group < kMultipliers; ++group) {
    barrier_init(&shared.z_full[group], 1);
    barrier_init(&shared.turn[group], 4);
  }
  barrier_init_fence();
}

}  // namespace sonicmoe::sm90
