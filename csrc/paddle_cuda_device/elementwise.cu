#include "elementwise.h"

#include <cstring>

namespace paddle_cuda_device {
namespace {

constexpr int kThreads = 256;

struct alignas(16) Item16 {
  uint64_t low, high;
};

// 16-bit floats as bits: the conversions are written out, so that host and device give the same numbers.
struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};
struct E4M3 {
  uint8_t bits;
};

__host__ __device__ inline float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
__host__ __device__ inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

__host__ __device__ inline float widen(BFloat x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
__host__ __device__ inline float widen(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  if (rest >= 0x400) return bits_to_float(sign | ((rest << 13) + (112u << 23)));
  const float magnitude = static_cast<float>(rest) * (1.0f / 16777216.0f);
  return sign ? -magnitude : magnitude;
}
__host__ __device__ inline float widen(E4M3 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x80) << 24, rest = x.bits & 0x7f;
  if (rest == 0x7f) return bits_to_float(sign | 0x7fc00000);
  if (rest >= 8) return bits_to_float(sign | ((rest << 20) + (120u << 23)));
  const float magnitude = static_cast<float>(rest) * (1.0f / 512.0f);
  return sign ? -magnitude : magnitude;
}
template <class T>
__host__ __device__ inline T widen(T x) {
  return x;
}

template <class T>
struct Narrow {
  template <class From>
  __host__ __device__ static T of(From x) {
    return static_cast<T>(x);
  }
};
template <>
struct Narrow<BFloat> {
  template <class From>
  __host__ __device__ static BFloat of(From wide) {
    const uint32_t bits = float_to_bits(static_cast<float>(wide));
    if ((bits & 0x7fffffff) > 0x7f800000) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  }
};
template <>
struct Narrow<Half> {
  template <class From>
  __host__ __device__ static Half of(From wide) {
    const uint32_t bits = float_to_bits(static_cast<float>(wide));
    const uint32_t sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00)};
    if (rest >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};  // rounds to 65536 or more
    if (rest < 0x38800000) {                                                // below the normal numbers
      const float scaled = bits_to_float(rest) * 16777216.0f;               // exact; rounding to whole is what is left
      uint32_t whole = static_cast<uint32_t>(scaled);
      const float over = scaled - static_cast<float>(whole);
      if (over > 0.5f || (over == 0.5f && (whole & 1))) ++whole;
      return {static_cast<uint16_t>(sign | whole)};
    }
    const uint32_t moved = rest - (112u << 23);
    return {static_cast<uint16_t>(sign | (moved + 0xfff + (moved >> 13 & 1)) >> 13)};
  }
};

template <>
struct Narrow<E4M3> {
  template <class From>
  __host__ __device__ static E4M3 of(From wide) {
    const uint32_t bits = float_to_bits(static_cast<float>(wide));
    const uint32_t sign = bits >> 24 & 0x80, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) return {static_cast<uint8_t>(sign | 0x7f)};
    if (rest >= 0x43e00000) return {static_cast<uint8_t>(sign | 0x7e)};  // 448 and more
    if (rest < 0x3c800000) {                                            // below 2^-6
      const float scaled = bits_to_float(rest) * 512.0f;
      uint32_t whole = static_cast<uint32_t>(scaled);
      const float over = scaled - static_cast<float>(whole);
      if (over > 0.5f || (over == 0.5f && (whole & 1))) ++whole;
      return {static_cast<uint8_t>(sign | whole)};
    }
    const uint32_t moved = rest - (120u << 23);
    return {static_cast<uint8_t>(sign | (moved + 0x7ffff + (moved >> 20 & 1)) >> 20)};
  }
};
template <>
struct Narrow<bool> {
  template <class From>
  __host__ __device__ static bool of(From x) {
    return x != static_cast<From>(0);
  }
};

template <int kTensors>
__host__ __device__ inline void place(const Walk& walk, int64_t i, int64_t* at) {
  for (int t = 0; t < kTensors; ++t) at[t] = 0;
  for (int d = walk.rank - 1; d >= 0; --d) {
    const int64_t whole = i / walk.sizes[d], rest = i - whole * walk.sizes[d];
    for (int t = 0; t < kTensors; ++t) at[t] += rest * walk.strides[t][d];
    i = whole;
  }
}

template <class Item>
struct Copy {
  Walk walk;
  const Item* in;
  Item* out;
  __host__ __device__ int64_t size() const { return walk.n; }
  __host__ __device__ void operator()(int64_t i) const {
    int64_t at[2];
    place<2>(walk, i, at);
    out[at[1]] = in[at[0]];
  }
};

template <class Item>
struct Fill {
  int64_t n;
  Item value;
  Item* out;
  __host__ __device__ int64_t size() const { return n; }
  __host__ __device__ void operator()(int64_t i) const { out[i] = value; }
};

template <class T>
struct Add {
  Walk walk;
  const T *x, *y;
  T* out;
  __host__ __device__ int64_t size() const { return walk.n; }
  __host__ __device__ void operator()(int64_t i) const {
    int64_t at[3];
    place<3>(walk, i, at);
    out[at[2]] = Narrow<T>::of(widen(x[at[0]]) + widen(y[at[1]]));
  }
};

template <class From, class To>
struct Cast {
  int64_t n;
  const From* in;
  To* out;
  __host__ __device__ int64_t size() const { return n; }
  __host__ __device__ void operator()(int64_t i) const { out[i] = Narrow<To>::of(widen(in[i])); }
};

template <class Body>
__global__ void run(const Body body) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < body.size(); i += step) body(i);
}

template <class Body>
cudaError_t launch(const Body& body, cudaStream_t stream) {
  if (body.size() == 0) return cudaSuccess;
  const int64_t blocks = (body.size() + kThreads - 1) / kThreads;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks < 65536 ? blocks : 65536));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, run<Body>, body);
}

template <class Use>
cudaError_t with_item(int bytes, Use use) {
  switch (bytes) {
    case 1: return use(uint8_t{});
    case 2: return use(uint16_t{});
    case 4: return use(uint32_t{});
    case 8: return use(uint64_t{});
    case 16: return use(Item16{});
  }
  return cudaErrorInvalidValue;
}

template <class Use>
cudaError_t with_number(Number type, Use use) {
  switch (type) {
    case Number::kFloat32: return use(float{});
    case Number::kFloat16: return use(Half{});
    case Number::kBFloat16: return use(BFloat{});
    case Number::kFloat8E4M3: return use(E4M3{});
    case Number::kFloat64: return use(double{});
    case Number::kBool: return use(bool{});
    case Number::kUInt8: return use(uint8_t{});
    case Number::kInt8: return use(int8_t{});
    case Number::kInt16: return use(int16_t{});
    case Number::kInt32: return use(int32_t{});
    case Number::kInt64: return use(int64_t{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t copy_items(const Walk& walk, int item_bytes, const void* in, void* out, cudaStream_t stream) {
  return with_item(item_bytes, [&](auto item) {
    using Item = decltype(item);
    return launch(Copy<Item>{walk, static_cast<const Item*>(in), static_cast<Item*>(out)}, stream);
  });
}

cudaError_t fill_items(int64_t n, int item_bytes, const void* value, void* out, cudaStream_t stream) {
  return with_item(item_bytes, [&](auto item) {
    memcpy(&item, value, sizeof(item));
    return launch(Fill<decltype(item)>{n, item, static_cast<decltype(item)*>(out)}, stream);
  });
}

cudaError_t add(const Walk& walk, Number type, const void* x, const void* y, void* out, cudaStream_t stream) {
  return with_number(type, [&](auto number) {
    using T = decltype(number);
    return launch(Add<T>{walk, static_cast<const T*>(x), static_cast<const T*>(y), static_cast<T*>(out)}, stream);
  });
}

cudaError_t cast(int64_t n, Number from, Number to, const void* in, void* out, cudaStream_t stream) {
  return with_number(from, [&](auto source) {
    return with_number(to, [&](auto target) {
      using From = decltype(source);
      using To = decltype(target);
      return launch(Cast<From, To>{n, static_cast<const From*>(in), static_cast<To*>(out)}, stream);
    });
  });
}

}  // namespace paddle_cuda_device
