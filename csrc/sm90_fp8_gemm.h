// Grouped FP8 GEMMs for Hopper: the problem as the host states it.
//
//   D[row, col] = sum over blocks b of 128 of  scale_a[row, b] * scale_b[col, b] * (A[row, b] . B[col, b])
//
// Both operands are e4m3 with the summed dimension contiguous. A block's 128 products are summed by the tensor cores
// and that partial sum is added to a float32 total, so the tensor cores' shorter sums never grow long.
//
//   rows           y [M,N] = A [M,K] @ B[e] [N,K]^T                 rows in sorted order, E segments of them
//   up             z, a = x [T,K] gathered @ W1[e] [F,K]^T          z and swiglu(z), both quantized 1x128
//   down_backward  dA = dout [T,K] gathered @ W2t[e] [I,K]^T        dz quantized along F; dz and p*a once more for
//                                                                   wgrad, quantized along tokens or in 16 bits;
//                                                                   and parts of ds = <dA, a>
//   wgrad          D[e] [P,Q] = (+=) L [P,M] @ R [Q,M]^T            the sum over segment e, both scaled along tokens
//
// Segments begin and end at multiples of 128 rows. N, K, I, P, Q are multiples of 128, F is 2I. Pad rows count as zeros.
#pragma once

#include <cstdint>
#include <string>

namespace sonicmoe {

struct Fp8Gemm {
  const void* a;            // rows [M,K], up and down_backward [T,K], wgrad [P,M]
  const float* a_scale;     // [.., K/128]; wgrad [M/128,P]
  const void* b;            // [E,N,K] with N the width; wgrad [Q,M]
  const float* b_scale;     // [E,N/128,K/128]; wgrad [M/128,Q]
  const int32_t* offset;    // [E+1] first row of each segment
  const int32_t* gather;    // [M] sorted row -> token
  const int32_t* scatter;   // [M] sorted row -> slot; a pad's is n_slots or more
  const float* score;       // [M] by slot
  void* d;                  // rows [M,N] of 16 bits; up z [M,F]; down_backward dz [M,F]; wgrad [E,P,Q]
  float* d_scale;           // [M,F/128]
  void* e;                  // up a [M,I], or nullptr if z alone is wanted; down_backward p*a [I,M]
  float* e_scale;           // up [M,I/128]; down_backward [M/128,I]
  const void* z;            // down_backward [M,F]
  const float* z_scale;     // [M,F/128]
  void* dt;                 // down_backward dz once more: e4m3 [F,M], or of 16 bits [M,F]
  float* dt_scale;          // [M/128,F]; nullptr for 16 bits, and e is then p*a [M,I] of 16 bits
  float* parts;             // down_backward [M,I/64]
  int32_t n_rows;           // M
  int32_t n_slots;          // S
  int32_t n_experts;        // E
  int32_t height;           // wgrad P
  int32_t d_columns;        // rows, wgrad: from one row of D to the next; more than the width for some of its columns
  int32_t d_rows;           // wgrad: from one expert of D to the next; more than the height for some of its rows
  int32_t width;            // N: rows N, up F, down_backward I, wgrad Q
  int32_t b_rows;           // from one expert of B to the next; more than the width for some of an expert's rows
  int32_t depth;            // K
  int32_t blocks;           // how many thread blocks run at a time: the device's multiprocessors
  float clamp;              // bound on swiglu's inputs, infinity for none
  bool pow2;                // scales are rounded up to powers of two
  bool half;                // results of 16 bits are float16 and not bfloat16
  bool wide;                // wgrad: D is float32 and not of 16 bits
  bool add;                 // wgrad: += (float32) and not =
};

// data [C,M], scale [M/128,C]: rows [T,C], of which row m of M is row gather[m], and 0 where it is a pad, quantized along
// M. One more operand of wgrad.
struct Fp8Tokens {
  const void* rows;        // the first of ``apart`` numbers each: bfloat16, float16, float32 or e4m3
  const float* row_scale;  // of e4m3: [T,apart/128]
  const int32_t* gather;   // as above
  const int32_t* scatter;
  uint8_t* data;
  float* scale;
  int32_t n_blocks;        // M/128
  int32_t n_slots;         // S
  int32_t width;           // C, a multiple of 128
  int32_t apart;
  bool pow2;
};

// Nothing but a launch on ``stream``. They return nullptr, or what went wrong.
const char* fp8_rows(const Fp8Gemm& problem, void* stream);
const char* fp8_up(const Fp8Gemm& problem, void* stream);
const char* fp8_down_backward(const Fp8Gemm& problem, void* stream);
const char* fp8_wgrad(const Fp8Gemm& problem, void* stream);
// ``kind`` of rows: "bfloat16", "float16", "float32" or "float8_e4m3fn".
const char* fp8_tokens(const Fp8Tokens& problem, const std::string& kind, void* stream);

}  // namespace sonicmoe
