// What a block of the CUDA version does with a tile of slots, step by step, and what blocks tell each other. How the
// steps go together is in deepep_topk_metadata.cu.
#pragma once

#include <cuda_runtime.h>

#include "deepep_topk_metadata.h"

namespace sonicmoe {
namespace {

constexpr int kPlacers = 512;
constexpr int kPlacerWarps = kPlacers / 32;
constexpr int kThreads = 32 + kPlacers;
constexpr int kWarps = kThreads / 32;
// Two blocks fit on a multiprocessor, which halves the registers of each. A cooperative launch waits until there is
// room for all its blocks at once: with one on each multiprocessor, it would wait for any kernel that another stream
// has left running on a few of them, such as a dispatch.
constexpr int kBlocksPerMultiprocessor = 2;
constexpr unsigned kAllLanes = 0xffffffffu;
// A warp reads an expert's counts of all runs at once, four a lane.
constexpr int kMaxRuns = 128;
// Slots of a tile for each placer, a power of two. What they need lies in registers, which bounds it.
constexpr int kMaxPerThread = 8;

// Run r has tiles r*tiles to (r+1)*tiles - 1; a tile is per_thread*kPlacers slots. The last run may be shorter, but not
// without a slot.
struct Cut {
  int runs, tiles, per_thread;
};

// Division by a multiplication, exact for numbers under 2^31: factor is 2^(31 + shift) / divisor, rounded up.
struct Divisor {
  uint32_t factor, shift;
  explicit Divisor(uint32_t by) : shift(0) {
    while ((uint64_t{1} << shift) < by) ++shift;
    factor = static_cast<uint32_t>((uint64_t{1} << (31 + shift)) / by + 1);
  }
};

__device__ __forceinline__ uint32_t operator/(uint32_t number, const Divisor& by) {
  return __umulhi(number * 2, by.factor) >> by.shift;
}

struct Task {
  TopkProblem p;
  ScaleRows scales;
  Cut cut;
  Divisor topk, block;
  int32_t* run_count;  // [E][kMaxRuns] slots of each expert by run
};

// Works a value out here and now, though only an `if` that follows has a use for it: what stands there is then a store
// and no branch, and a thread's slots are worked out at once and not one after another.
template <typename Word>
__device__ __forceinline__ Word settled(Word value) {
  static_assert(sizeof(Word) == sizeof(int32_t));
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(reinterpret_cast<int32_t&>(value)));
#endif
  return value;
}

template <typename Word>
__device__ __forceinline__ void store_if(bool wanted, Word* to, int at, Word value) {
  const int place = settled(at);
  const Word word = settled(value);
  if (wanted) to[place] = word;
}

__device__ __forceinline__ int lane_id() { return threadIdx.x & 31; }
__device__ __forceinline__ int warp_id() { return threadIdx.x / 32; }
__device__ __forceinline__ int placer_warp() { return warp_id() - 1; }  // of the clerk: -1
// By a shuffle, so that the compiler knows: all lanes of a warp are told the same.
__device__ __forceinline__ bool is_placer_warp() { return __shfl_sync(kAllLanes, placer_warp(), 0) >= 0; }
__device__ __forceinline__ int warp_sum(int value) { return __reduce_add_sync(kAllLanes, value); }

// What a thread knows of its slots of a tile. Expert and place share a word: a tile has fewer than 2^16 slots.
template <int kPerThread>
struct Held {
  int key[kPerThread];  // the expert; once ranked, expert << 16 | place; negative for a slot that is not here
  float prob[kPerThread];
};

// A thread's words of a tile, `none` for those that are not here. All loads are under way at once, which they would not
// be with a branch for each, and hardly with a condition.
template <int kPerThread, typename Word>
__device__ __forceinline__ void load_words(const Word* from, uint32_t first, uint32_t slots, Word none,
                                           Word (&word)[kPerThread]) {
  from += first;
  if (first - lane_id() + kPerThread * 32 <= slots) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) word[i] = from[i * 32];
  } else {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) word[i] = first + i * 32 < slots ? from[i * 32] : none;
  }
}

// The same for stores.
template <int kPerThread, typename Word>
__device__ __forceinline__ void store_words(Word* to, uint32_t first, uint32_t slots, const Word (&word)[kPerThread]) {
  to += first;
  if (first - lane_id() + kPerThread * 32 <= slots) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) to[i * 32] = word[i];
  } else {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      if (first + i * 32 < slots) to[i * 32] = word[i];
    }
  }
}

template <int kPerThread, typename Id>
__device__ __forceinline__ void load_ids(const Id* ids, int experts, uint32_t first, uint32_t slots,
                                         Held<kPerThread>& held) {
  Id id[kPerThread];
  load_words(ids, first, slots, Id{-1}, id);
  // Compared before it is narrowed, as in expert_of.
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) held.key[i] = id[i] >= 0 && id[i] < experts ? static_cast<int>(id[i]) : -1;
}

template <int kPerThread>
__device__ __forceinline__ void load_experts(const TopkProblem& p, uint32_t first, uint32_t slots,
                                             Held<kPerThread>& held) {
  if (p.wide_indices) {
    load_ids(static_cast<const int64_t*>(p.indices), p.n_experts, first, slots, held);
  } else {
    load_ids(static_cast<const int32_t*>(p.indices), p.n_experts, first, slots, held);
  }
}

template <int kPerThread>
__device__ __forceinline__ void load_probs(const float* probs, uint32_t first, uint32_t slots, Held<kPerThread>& held) {
  load_words(probs, first, slots, 0.0f, held.prob);
}

// Adds the slots to `count`, by expert: sums, in which no order shows.
template <int kPerThread>
__device__ __forceinline__ void count_experts(const Held<kPerThread>& held, int32_t* count) {
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    if (held.key[i] >= 0) atomicAdd(count + held.key[i], 1);
  }
}

// Some sums carried through one pass.
template <int kSums>
struct Sums {
  int of[kSums];
};

// One warp's exclusive sums over the experts: of(e) are an expert's numbers, put(e, numbers, sums) takes those of all
// before it. Returns the sums of all. So many times 32 experts go through the shuffles at once.
template <int kSums, typename Of, typename Put>
__device__ __forceinline__ Sums<kSums> sum_experts(int experts, Of of, Put put) {
  constexpr int kAtOnce = 2;
  Sums<kSums> before{};
#pragma unroll 1
  for (int first = lane_id(); first - lane_id() < experts; first += 32 * kAtOnce) {
    Sums<kSums> own[kAtOnce], upto[kAtOnce];
#pragma unroll
    for (int c = 0; c < kAtOnce; ++c) upto[c] = own[c] = first + c * 32 < experts ? of(first + c * 32) : Sums<kSums>{};
#pragma unroll
    for (int step = 1; step < 32; step <<= 1) {
#pragma unroll
      for (int c = 0; c < kAtOnce; ++c) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) {
          const int from_below = __shfl_up_sync(kAllLanes, upto[c].of[i], step);
          if (lane_id() >= step) upto[c].of[i] += from_below;
        }
      }
    }
#pragma unroll
    for (int c = 0; c < kAtOnce; ++c) {
      Sums<kSums> at;
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        at.of[i] = before.of[i] + upto[c].of[i] - own[c].of[i];
        before.of[i] += __shfl_sync(kAllLanes, upto[c].of[i], 31);
      }
      if (first + c * 32 < experts) put(first + c * 32, own[c], at);
    }
  }
  return before;
}

// Shared memory: this, then a table of kTables words for each expert, then [kPlacerWarps][E | 1] slots by warp.
template <int kPerThread>
struct Shared {
  uint32_t slot[kPerThread * kPlacers];    // in order by expert: token in the tile << 16 | number in the tile
  uint16_t expert[kPerThread * kPlacers];  // of the same
  int32_t valid_of_warp[kPlacerWarps];
  int32_t compact;  // valid slots before this run
  int32_t good, rows;  // the caller's counts are right; of all experts
};
// By expert: slots of the tile; where they begin in its order; the row of the first of them, and that less kHere; slots
// of all runs, and of those before this one; of its pads the first row, the first number, and how many.
enum Table { kCount, kHere, kNext, kBase, kTotal, kEarlier, kPadRow, kPadNumber, kPads, kTables };

// Odd, so that a warp that reads one expert's counts of all warps meets as many banks.
__host__ __device__ constexpr int counts_of_warp(int experts) { return experts | 1; }

// Makes the warps' counts of an expert the numbers of its slots in warps before each. Returns their sum.
__device__ __forceinline__ int sum_warps(int32_t* count, int stride) {
  constexpr int kAtOnce = 8;
  int upto = 0;
#pragma unroll 1
  for (int first = 0; first < kPlacerWarps; first += kAtOnce, count += kAtOnce * stride) {
    int own[kAtOnce];
#pragma unroll
    for (int w = 0; w < kAtOnce; ++w) own[w] = count[w * stride];
#pragma unroll
    for (int w = 0; w < kAtOnce; ++w) {
      count[w * stride] = upto;
      upto += own[w];
    }
  }
  return upto;
}

// Numbers the warp's slots of the same expert, in `key`, and counts them in `mine`. Returns how many are valid.
template <int kPerThread>
__device__ __forceinline__ int rank_slots(int experts, Held<kPerThread>& held, int32_t* mine) {
  unsigned peers[kPerThread];
  int valid = 0;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    peers[i] = __ballot_sync(kAllLanes, held.key[i] >= 0);
    valid += __popc(peers[i]);
  }
  // One vote for each bit of an expert's number: faster than __match_any_sync.
#pragma unroll 1
  for (int bit = 1; bit < experts; bit <<= 1) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const bool set = held.key[i] & bit;
      peers[i] &= ~(__ballot_sync(kAllLanes, set) ^ (set ? kAllLanes : 0u));
    }
  }
  const unsigned below = (1u << lane_id()) - 1;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const bool is_valid = held.key[i] >= 0;
    const int rank = is_valid ? mine[held.key[i]] + __popc(peers[i] & below) : 0;
    __syncwarp();
    if (is_valid && (peers[i] & below) == 0) mine[held.key[i]] = rank + __popc(peers[i]);
    __syncwarp();
    held.key[i] = held.key[i] << 16 | rank;
  }
  return valid;
}

// What `table` holds for each slot's expert, in `found`; for a slot that is not here, of some expert.
template <int kPerThread>
__device__ __forceinline__ void look_up(const Held<kPerThread>& held, const int32_t* table, int (&found)[kPerThread]) {
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) found[i] = table[max(held.key[i], 0) >> 16];
}

// Puts the tile's slots into their order by expert, and `key` on their places in it. `mine` is where the warp's first
// slot of each expert goes.
template <int kPerThread>
__device__ __forceinline__ void stage_tile(const Task& task, uint32_t begin, uint32_t first, int valid_before,
                                           const int32_t* mine, Held<kPerThread>& held, Shared<kPerThread>& shared) {
  const uint32_t first_token = begin / task.topk;
  const unsigned below = (1u << lane_id()) - 1;
  int begins[kPerThread];
  look_up(held, mine, begins);
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const bool is_valid = held.key[i] >= 0;
    const unsigned among = __ballot_sync(kAllLanes, is_valid);
    held.key[i] += begins[i];
    const uint32_t token = (first + i * 32) / task.topk - first_token;
    const int place = settled(held.key[i] & 0xffff), expert = settled(held.key[i] >> 16);
    const uint32_t slot = settled(token << 16 | (valid_before + __popc(among & below)));
    if (is_valid) {
      shared.slot[place] = slot;
      shared.expert[place] = static_cast<uint16_t>(expert);
    }
    valid_before += __popc(among);
  }
}

__device__ __forceinline__ void copy_scale_row(const ScaleRows& scales, int64_t token, int64_t row) {
  const uint32_t* from = scales.source + token * scales.words;
  uint32_t* to = scales.sorted + row * scales.words;
#pragma unroll 1
  for (int w = lane_id(); w < scales.words; w += 32) to[w] = from[w];
}

// Where every slot is valid, its number is its own: what is indexed by it waits for nobody.
template <int kPerThread>
__device__ __forceinline__ void place_all_slots(const Task& task, uint32_t begin, uint32_t in_tile, uint32_t slots,
                                                const Held<kPerThread>& held) {
  const TopkProblem& p = task.p;
  const uint32_t end = min(begin + kPerThread * kPlacers, slots), topk = p.n_topk;
  int32_t number[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) number[i] = static_cast<int32_t>(begin + in_tile + i * 32);
  store_words(p.score_src_idx, begin + in_tile, slots, number);
  store_words(p.scores, begin + in_tile, slots, held.prob);
  // The tokens that begin in this tile.
#pragma unroll 1
  for (uint32_t token = (begin + topk - 1) / task.topk + threadIdx.x - 32; token * topk < end; token += kPlacers) {
    p.slot_offset[token] = static_cast<int32_t>(token * topk);
  }
}

// Elsewhere that takes the number of valid slots before: it is `number` for the warp's first. ``also(i, valid, mine)`` is
// told that of each slot.
template <int kPerThread, class Also>
__device__ __forceinline__ void place_slots(const Task& task, uint32_t first, uint32_t slots, int number,
                                            const Held<kPerThread>& held, Also also) {
  const TopkProblem& p = task.p;
  const unsigned below = (1u << lane_id()) - 1;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const bool is_valid = held.key[i] >= 0;
    const unsigned among = __ballot_sync(kAllLanes, is_valid);
    const int mine = number + __popc(among & below);
    const uint32_t slot = first + i * 32, token = slot / task.topk;
    also(i, is_valid, mine);
    store_if(is_valid, p.score_src_idx, mine, static_cast<int32_t>(slot));
    store_if(is_valid, p.scores, mine, held.prob[i]);
    store_if(slot < slots && slot == token * p.n_topk, p.slot_offset, token, mine);
    number += __popc(among);
  }
}

// Writes a staged tile's rows. `compact` valid slots come before the tile, `valid_before` before the warp in it.
template <int kPerThread>
__device__ __forceinline__ void place_rows(const Task& task, uint32_t begin, int compact, int valid_before, int valid,
                                           const Held<kPerThread>& held, const int32_t* base,
                                           const Shared<kPerThread>& shared) {
  const TopkProblem& p = task.p;
  // In slot order: the row of each slot.
  const unsigned below = (1u << lane_id()) - 1;
  int number = compact + valid_before, row[kPerThread];
  look_up(held, base, row);
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const bool is_valid = held.key[i] >= 0;
    const unsigned among = __ballot_sync(kAllLanes, is_valid);
    store_if(is_valid, p.s_reverse_scatter_idx, number + __popc(among & below), row[i] + (held.key[i] & 0xffff));
    number += __popc(among);
  }
  // In row order: what is indexed by row, so that a warp writes runs and not single words all over the place.
  const int first_token = begin / task.topk, mine = placer_warp() * 32 + lane_id();
  uint32_t slot[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int place = i * kPlacers + mine, expert = place < valid ? shared.expert[place] : 0;
    slot[i] = shared.slot[place];
    row[i] = base[expert] + place;
  }
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const bool is_here = i * kPlacers + mine < valid;
    store_if(is_here, p.x_gather_idx, row[i], first_token + static_cast<int>(slot[i] >> 16));
    store_if(is_here, p.s_scatter_idx, row[i], compact + static_cast<int>(slot[i] & 0xffff));
  }
#pragma unroll 1
  for (int i = placer_warp(); i < valid && task.scales.words; i += kPlacerWarps) {
    copy_scale_row(task.scales, first_token + static_cast<int>(shared.slot[i] >> 16), base[shared.expert[i]] + i);
  }
}

// Puts this run's count of an expert where every block finds it.
__device__ __forceinline__ void publish(const Task& task, int expert, int count) {
  int32_t* to = task.run_count + expert * kMaxRuns + blockIdx.x;
  *to = count;
  // Readers take four at a time.
  if (blockIdx.x + 1 == task.cut.runs) {
#pragma unroll 1
    for (int run = task.cut.runs; run % 4; ++run) *++to = 0;
  }
}

// Sums each expert's counts: of all runs, and of those before this one. A warp reads those of kAtOnce experts at once.
template <int kAtOnce>
__device__ __forceinline__ void sum_runs(const Task& task, int32_t* total, int32_t* earlier) {
  const int experts = task.p.n_experts, first = lane_id() * 4, before = static_cast<int>(blockIdx.x) - first;
#pragma unroll 1
  for (int e = warp_id(); e < experts; e += kAtOnce * kWarps) {
    int4 n[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      n[i] = make_int4(0, 0, 0, 0);
      if (e + i * kWarps < experts && first < task.cut.runs) {
        n[i] = __ldcg(reinterpret_cast<const int4*>(task.run_count + (e + i * kWarps) * kMaxRuns + first));
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (e + i * kWarps >= experts) break;
      const int of_all = warp_sum(n[i].x + n[i].y + n[i].z + n[i].w);
      const int of_earlier = warp_sum((before > 0 ? n[i].x : 0) + (before > 1 ? n[i].y : 0) +
                                      (before > 2 ? n[i].z : 0) + (before > 3 ? n[i].w : 0));
      if (lane_id() == 0) {
        total[e + i * kWarps] = of_all;
        earlier[e + i * kWarps] = of_earlier;
      }
    }
  }
}

}  // namespace
}  // namespace sonicmoe
