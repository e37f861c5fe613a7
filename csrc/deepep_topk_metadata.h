// Routing metadata from a dispatcher's top-k: the algorithm, shared by the host and the CUDA version.
//
// A slot is a flat index s = t*K + k of the [T,K] ids; it is valid when 0 <= id < E. Valid slots have two numbers:
// compact (order of s) and row (order of expert, then s; each non-empty expert filled to a multiple of `block`).
// Slots are cut into tiles, contiguous runs of s. Any cut gives the same arrays: a slot's row is
//     padded start of its expert + slots of that expert in earlier tiles + those before it in its own tile,
// so both versions only have to count per tile, sum the counts, and place.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SONICMOE_HD __host__ __device__ __forceinline__
#else
#define SONICMOE_HD inline
#endif

namespace sonicmoe {

constexpr int kMaxExperts = 1024;
constexpr int kMaxTopk = 32;

// Everything a version reads and writes. Index arrays are int32: T*K must stay under 2^31.
struct TopkProblem {
  const void* indices;   // [T,K] int32 or int64
  const float* probs;    // [T,K]
  bool wide_indices;     // indices are int64
  int32_t n_tokens;      // T
  int32_t n_topk;        // K
  int32_t n_experts;     // E
  int32_t block;         // rows that a non-empty expert is filled to a multiple of
  int32_t n_slots;       // S, by the caller's counts
  int32_t n_rows;        // M, by the caller's counts; or the most that there can be
  bool bounded;          // the latter: rows behind the last segment are pads too (device only)
  int32_t* expert_offset;          // [E+1]
  int32_t* x_gather_idx;           // [M]
  int32_t* s_scatter_idx;          // [M]
  int32_t* s_reverse_scatter_idx;  // [S]
  int32_t* slot_offset;            // [T+1]
  float* scores;                   // [M]
  int32_t* score_src_idx;          // [S]
};

// Rows of dispatch scales that follow the tokens into sorted order; 4-byte words, so that float32 scales and packed
// UE8M0 words travel alike.
struct ScaleRows {
  const uint32_t* source;  // [T, words]
  uint32_t* sorted;        // [M, words]
  int32_t words;           // 0: no scales
};

SONICMOE_HD int64_t id_of(const TopkProblem& p, int64_t slot) {
  return p.wide_indices ? static_cast<const int64_t*>(p.indices)[slot]
                        : static_cast<int64_t>(static_cast<const int32_t*>(p.indices)[slot]);
}

// The expert of a slot, or -1 for an id that is not on this rank. An int64 id is compared before it is narrowed.
SONICMOE_HD int32_t expert_of(const TopkProblem& p, int64_t slot) {
  const int64_t id = id_of(p, slot);
  return id >= 0 && id < p.n_experts ? static_cast<int32_t>(id) : -1;
}

SONICMOE_HD int32_t padded(int32_t count, int32_t block) { return (count + block - 1) / block * block; }

// Pads are numbered in row order behind the last slot, where scores are 0.
SONICMOE_HD void place_pad(const TopkProblem& p, int32_t pad, int32_t row) {
  p.x_gather_idx[row] = 0;
  p.s_scatter_idx[row] = p.n_slots + pad;
  p.scores[p.n_slots + pad] = 0.0f;
}

// What a broken promise of the dispatcher is, row by row; the lowest row is reported. 0: none.
enum RowFault : int32_t { kRowGood = 0, kRowTwice = 1, kRowRange = 2 };

SONICMOE_HD RowFault check_row(const TopkProblem& p, int32_t token) {
  const int64_t first = static_cast<int64_t>(token) * p.n_topk;
  RowFault fault = kRowGood;
  for (int32_t k = 0; k < p.n_topk; ++k) {
    if (id_of(p, first + k) < -1) return kRowRange;
    const int32_t expert = expert_of(p, first + k);
    for (int32_t j = 0; j < k && expert >= 0; ++j) {
      if (expert_of(p, first + j) == expert) fault = kRowTwice;
    }
  }
  return fault;
}

// ---- Device side, defined in the .cu -------------------------------------------------------------------------------

// int32 words of scratch that a launch needs, at an address that 16 divides; the only place that knows.
int64_t workspace_words(int32_t n_experts);
// One launch on `stream`. Returns an empty string, or what is wrong.
const char* launch(const TopkProblem& p, const ScaleRows& scales, int32_t* workspace, void* stream);
// row * 4 + fault of the lowest faulty row into `*verdict` (device memory), -1 if all rows are good.
const char* launch_check(const TopkProblem& p, int64_t* verdict, void* stream);

}  // namespace sonicmoe
