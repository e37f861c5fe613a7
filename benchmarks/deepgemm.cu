// DeepGEMM's grouped FP8 GEMMs for Hopper, launched on plain pointers: what fp8_gemms.py compares this package's with.
// Compiled from DeepGEMM's and CUTLASS's own headers for one shape, -DHIDDEN, -DINTERMEDIATE, -DEXPERTS, and a GPU with
// so many -DMULTIPROCESSORS.
#include <deep_gemm/impls/sm90_fp8_gemm_1d1d.cuh>
#include <deep_gemm/impls/sm90_fp8_gemm_1d2d.cuh>

#include <cuda.h>
#include <cuda_runtime.h>

namespace {

using namespace deep_gemm;

constexpr int kTile = 128, kMemory = 232448, kBarriers = 256, kThreads = 384;
constexpr int kH = HIDDEN, kI = INTERMEDIATE, kF = 2 * kI, kExperts = EXPERTS, kBlocks = MULTIPROCESSORS;

CUtensorMap describe(const void* data, CUtensorMapDataType type, int item, int64_t columns, int64_t rows,
                     int box_columns, int box_rows, int swizzle) {
  static const auto encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry);
  }();
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t stride[1] = {static_cast<cuuint64_t>(columns * item)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(swizzle ? swizzle / item : box_columns),
                             static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const auto mode = swizzle == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                    : swizzle == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                    : CU_TENSOR_MAP_SWIZZLE_NONE;
  CUtensorMap map{};
  encode(&map, type, 2, const_cast<void*>(data), sizes, stride, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, mode,
         CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return map;
}

template <class Kernel, class... Args>
int launch(Kernel kernel, int bytes, int cluster, void* stream, Args... args) {
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(kBlocks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

// y [m,N] = a [m,K] @ b[e] [N,K]^T; scales of a as [K/128,m], ``group`` the expert of each row.
template <int N, int K, int kColumns>
int rows(void* a, float* a_scale, void* b, float* b_scale, void* y, int* group, int m, void* stream) {
  constexpr int kSwizzle = kColumns * 2 % 128 == 0 ? 128 : 64;
  constexpr int kScales = K / kTile * 4 * (kTile % kColumns == 0 ? 1 : 2);
  constexpr int kFixed = kTile * kColumns * 2 + kBarriers + (kScales + 7) / 8 * 8;
  constexpr int kStage = kTile * kTile + kColumns * kTile + kTile * 4, kStages = (kMemory - kFixed) / kStage;
  const auto kernel =
      sm90_fp8_gemm_1d2d_impl<cute::UMMA::Major::K, 0, N, K, kExperts, kTile, kColumns, kTile, 128, 128, kSwizzle,
                              kStages, 128, 256, 2, true, kBlocks, GemmType::MGroupedContiguous, cutlass::bfloat16_t,
                              epilogue::transform::EpilogueIdentity>;
  return launch(kernel, kFixed + kStages * kStage, 2, stream, b_scale, group, static_cast<uint32_t>(m),
                static_cast<uint32_t>(N), static_cast<uint32_t>(K),
                describe(a, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, K, m, kTile, kTile, 128),
                describe(b, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, K, int64_t{kExperts} * N, kTile, kColumns, 128),
                describe(y, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, N, m, kColumns, kTile, kSwizzle),
                describe(a_scale, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 4, m, K / kTile, kTile, 1, 0));
}

// d[e] [P,Q] += l[e] @ r[e]^T, experts' operands [P,length] one behind the other, scales [sum/128,P]; ``first``: the
// first expert's length. ``maps``: room for two tensor maps a multiprocessor.
template <int P, int Q, int kColumns>
int wgrad(void* l, float* l_scale, void* r, float* r_scale, float* d, int* lengths, int first, int sum, void* maps,
          void* stream) {
  constexpr int kFixed = kTile * kColumns * 4 + kBarriers + 4 * static_cast<int>(sizeof(CUtensorMap));
  constexpr int kStage = kTile * kTile + kColumns * kTile + kTile * 4 + (kColumns * 4 + 127) / 128 * 128;
  constexpr int kStages = (kMemory - kFixed) / kStage;
  const auto kernel = sm90_fp8_gemm_1d1d_impl<P, Q, 0, kExperts, kTile, kColumns, kTile, 128, 128, kStages, 128, 256, 1,
                                              false, kBlocks, GemmType::KGroupedContiguous, float>;
  return launch(kernel, kFixed + kStages * kStage, 1, stream, static_cast<__nv_fp8_e4m3*>(l),
                static_cast<__nv_fp8_e4m3*>(r), lengths, static_cast<CUtensorMap*>(maps), static_cast<uint32_t>(P),
                static_cast<uint32_t>(Q), static_cast<uint32_t>(sum),
                describe(l, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, first, P, kTile, kTile, 128),
                describe(r, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, first, Q, kTile, kColumns, 128),
                describe(l_scale, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 4, P, sum / kTile, kTile, 1, 0),
                describe(r_scale, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 4, Q, sum / kTile, kColumns, 1, 0),
                describe(d, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 4, Q, int64_t{kExperts} * P, kColumns, 64, 0));
}

}  // namespace

#define ROWS(name, N, K, columns)                                                                                     \
  extern "C" int name##_##columns(void* a, float* a_scale, void* b, float* b_scale, void* y, int* group, int m,        \
                                  void* stream) {                                                                      \
    return rows<N, K, columns>(a, a_scale, b, b_scale, y, group, m, stream);                                           \
  }
#define WGRAD(name, P, Q, columns)                                                                                    \
  extern "C" int name##_##columns(void* l, float* l_scale, void* r, float* r_scale, float* d, int* lengths, int first, \
                                  int sum, void* maps, void* stream) {                                                 \
    return wgrad<P, Q, columns>(l, l_scale, r, r_scale, d, lengths, first, sum, maps, stream);                         \
  }
#define ALL_ROWS(name, N, K) ROWS(name, N, K, 128) ROWS(name, N, K, 160) ROWS(name, N, K, 192)
#define ALL_WGRADS(name, P, Q) WGRAD(name, P, Q, 120) WGRAD(name, P, Q, 128) WGRAD(name, P, Q, 152)

ALL_ROWS(up, kF, kH)
ALL_ROWS(down, kH, kI)
ALL_ROWS(down_backward, kI, kH)
ALL_ROWS(dx, kH, kF)
ALL_WGRADS(dw1, kF, kH)
ALL_WGRADS(dw2, kH, kI)
