// The kernels of sm90_fp8_gemm.h and their launches.
#include "sm90_fp8_kernel.cuh"
#include "sm90_fp8_maps.cuh"
#include "sm90_fp8_tokens.cuh"

#include <cmath>

namespace sonicmoe {
namespace {

using namespace sm90;

template <class Kind>
__global__ void __launch_bounds__(kThreads, 1) __cluster_dims__(2, 1, 1)
    grouped_gemm(const __grid_constant__ Fp8Gemm p, const __grid_constant__ Maps maps) {
  extern __shared__ uint8_t memory[];
  // Dynamic shared memory is only sure to begin at a multiple of 16 bytes, the swizzle counts in 1024.
  run_block<Kind>(p, maps, *reinterpret_cast<Shared<Kind>*>(memory + (-shared_address(memory) & 1023)));
}

// How many blocks a multiprocessor shall have registers for: a thread keeps 64 words of pairs, or else 128 numbers.
template <Item kItem>
constexpr int kTokenBlocks = kItem == Item::kBfloat ? 4 : kItem == Item::kHalf ? 3 : 2;

template <Item kItem>
__global__ void __launch_bounds__(32 * kTokenWarps, kTokenBlocks<kItem>) token_major(const Fp8Tokens p) {
  quantize_tokens_block<kItem>(p);
}

// ---- Host

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode encoder() {
  static const Encode found = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &result);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(entry) : nullptr;
  }();
  return found;
}

template <class Kind>
const char* run(const Fp8Gemm& p, void* stream) {
  constexpr int kBytes = sizeof(Shared<Kind>) + 1024;
  static_assert(kBytes <= 227 * 1024, "more shared memory than a multiprocessor has");
  Maps maps{};
  if (!make_maps(Kind(), p, maps)) return "the driver refused a tensor map";
  // Holds for the current device; to ask again is as cheap as to remember.
  cudaError_t error = cudaFuncSetAttribute(grouped_gemm<Kind>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error == cudaSuccess) {
    grouped_gemm<Kind><<<p.blocks / 2 * 2, kThreads, kBytes, static_cast<cudaStream_t>(stream)>>>(p, maps);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// What bounds nothing is not compared.
template <template <bool> class Kind>
const char* run_clamped(const Fp8Gemm& p, void* stream) {
  return std::isinf(p.clamp) ? run<Kind<false>>(p, stream) : run<Kind<true>>(p, stream);
}

template <Item kItem>
const char* run_tokens(const Fp8Tokens& p, void* stream) {
  const dim3 blocks((p.n_blocks + kTokenWarps - 1) / kTokenWarps, p.width / kTokenColumns);
  token_major<kItem><<<blocks, 32 * kTokenWarps, 0, static_cast<cudaStream_t>(stream)>>>(p);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

bool sm90::describe(CUtensorMap* map, const void* data, Item item, int64_t rows, int64_t columns, uint32_t box_rows,
                    int64_t apart) {
  if (encoder() == nullptr) return false;
  const int bytes = item_bytes(item);
  const auto type = item == Item::kByte     ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                    : item == Item::kHalf   ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                    : item == Item::kBfloat ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                            : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t stride[1] = {static_cast<cuuint64_t>(apart ? apart : columns) * bytes};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(128 / bytes), box_rows}, steps[2] = {1, 1};
  return encoder()(map, type, 2, const_cast<void*>(data), sizes, stride, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                   CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                   CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

const char* fp8_rows(const Fp8Gemm& p, void* stream) {
  return run_rows(p, [stream](auto kind, const Fp8Gemm& part) { return run<decltype(kind)>(part, stream); });
}
const char* fp8_up(const Fp8Gemm& p, void* stream) { return run_clamped<UpKind>(p, stream); }
const char* fp8_wgrad(const Fp8Gemm& p, void* stream) { return run<WgradKind>(p, stream); }
const char* fp8_down_backward(const Fp8Gemm& p, void* stream) {
  return p.dt_scale == nullptr ? run_clamped<WideDownBackwardKind>(p, stream) : run_clamped<DownBackwardKind>(p, stream);
}
const char* fp8_tokens(const Fp8Tokens& p, const std::string& kind, void* stream) {
  if (kind == "bfloat16") return run_tokens<Item::kBfloat>(p, stream);
  if (kind == "float16") return run_tokens<Item::kHalf>(p, stream);
  if (kind == "float32") return run_tokens<Item::kFloat>(p, stream);
  return kind == "float8_e4m3fn" ? run_tokens<Item::kByte>(p, stream) : "rows of another kind";
}

}  // namespace sonicmoe
