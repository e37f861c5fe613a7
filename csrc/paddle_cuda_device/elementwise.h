// Elementwise kernels over strided tensors. Plain structs, so that what registers them need not be compiled by nvcc.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace paddle_cuda_device {

constexpr int kMaxRank = 9;

// Where element i of a walk in row-major order over ``sizes`` lies, in elements, for up to three tensors.
struct Walk {
  int64_t n;
  int rank;
  int64_t sizes[kMaxRank];
  int64_t strides[3][kMaxRank];
};

enum class Number { kFloat32, kFloat16, kBFloat16, kFloat8E4M3, kFloat64, kBool, kUInt8, kInt8, kInt16, kInt32, kInt64 };

// out[walk 1] = in[walk 0], items of 1, 2, 4, 8 or 16 bytes.
cudaError_t copy_items(const Walk& walk, int item_bytes, const void* in, void* out, cudaStream_t stream);
// n items of 1, 2, 4, 8 or 16 bytes become the one at ``value`` on the host.
cudaError_t fill_items(int64_t n, int item_bytes, const void* value, void* out, cudaStream_t stream);
// out[walk 2] = x[walk 0] + y[walk 1], rounded once from float32 (from their own type for the wider ones).
cudaError_t add(const Walk& walk, Number type, const void* x, const void* y, void* out, cudaStream_t stream);
// n contiguous numbers of one type to another, rounded to nearest even; e4m3 saturates.
cudaError_t cast(int64_t n, Number from, Number to, const void* in, void* out, cudaStream_t stream);

}  // namespace paddle_cuda_device
