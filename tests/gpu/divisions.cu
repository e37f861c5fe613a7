// Counts the floats for which a short division differs from the processor's own: of those that it may be given, all.
#include <cstdio>

#include "../../csrc/sm90_fp8_epilogues.cuh"

using namespace sonicmoe::sm90;

__global__ void compare(unsigned long long* wrong) {
  const uint32_t apart = gridDim.x * blockDim.x;
  for (uint32_t bits = blockIdx.x * blockDim.x + threadIdx.x; bits < 0x7F800000; bits += apart) {
    const float size = __uint_as_float(bits), scale = block_scale(size, false);
    if (scale != fmaxf(__fdiv_rn(size, kE4m3Max), kSmallestScale)) atomicAdd(&wrong[0], 1);
    // A scale is no smaller than this one, and no larger than the largest number's.
    if (size < kSmallestScale || size > __fdiv_rn(kLargest, kE4m3Max)) continue;
    if (inverse_of(size) != __fdiv_rn(1.0f, size)) atomicAdd(&wrong[1], 1);
  }
}

int main() {
  unsigned long long* wrong;
  if (cudaMallocManaged(&wrong, 2 * sizeof(*wrong)) != cudaSuccess) return 1;
  wrong[0] = wrong[1] = 0;
  compare<<<1024, 256>>>(wrong);
  if (cudaDeviceSynchronize() != cudaSuccess) return 1;
  std::printf("%llu %llu\n", wrong[0], wrong[1]);
}
