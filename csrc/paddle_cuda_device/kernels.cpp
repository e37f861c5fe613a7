// The few Paddle kernels that the device has itself: what moves, fills, converts and adds. Paddle runs every other
// operator on the CPU, between two copies.
#include "paddle/phi/backends/custom/custom_context.h"
#include "paddle/phi/common/int_array.h"
#include "paddle/phi/common/scalar.h"
#include "paddle/phi/core/dense_tensor.h"
#include "paddle/phi/core/kernel_registry.h"

#include "elementwise.h"
#include "state.h"

namespace paddle_cuda_device {
namespace {

using phi::CustomContext;
using phi::DataType;
using phi::DenseTensor;
using Sizes = std::vector<int64_t>;

// A context's stream, and its device current for as long as this lives, to the end of the statement: Paddle leaves the
// caller's device as it is, and CUDA refuses another one's streams.
class StreamOf {
 public:
  explicit StreamOf(const CustomContext& context) : stream_(reinterpret_cast<cudaStream_t>(context.stream())) {
    const int device = context.GetPlace().GetDeviceId();
    cudaGetDevice(&before_);
    if (before_ == device) {
      before_ = -1;
    } else {
      cudaSetDevice(device);
    }
  }
  ~StreamOf() {
    if (before_ >= 0) cudaSetDevice(before_);
  }
  operator cudaStream_t() const { return stream_; }

 private:
  cudaStream_t stream_;
  int before_ = -1;
};

StreamOf stream_of(const CustomContext& context) { return StreamOf(context); }

void require(cudaError_t result, const char* what) {
  PADDLE_ENFORCE_EQ(result, cudaSuccess,
                    common::errors::External("%s: %s: %s", kName, what, cudaGetErrorString(result)));
}

Sizes sizes_of(const DenseTensor& tensor) { return common::vectorize<int64_t>(tensor.dims()); }
Sizes strides_of(const DenseTensor& tensor) { return common::vectorize<int64_t>(tensor.strides()); }

Walk walk_over(const Sizes& sizes, std::initializer_list<Sizes> strides) {
  PADDLE_ENFORCE_LE(sizes.size(), static_cast<size_t>(kMaxRank),
                    common::errors::InvalidArgument("%s: got a tensor of rank %d, need at most %d", kName,
                                                    sizes.size(), kMaxRank));
  Walk walk{};
  walk.rank = static_cast<int>(sizes.size());
  walk.n = 1;
  int t = 0;
  for (int d = 0; d < walk.rank; ++d) walk.n *= walk.sizes[d] = sizes[d];
  for (const Sizes& of_one : strides) {
    for (int d = 0; d < walk.rank; ++d) walk.strides[t][d] = of_one[d];
    ++t;
  }
  return walk;
}

// Strides by which a smaller tensor is read as one of ``sizes``, its dimensions being the last of those.
Sizes spread(const DenseTensor& tensor, const Sizes& sizes) {
  const Sizes own = sizes_of(tensor), strides = strides_of(tensor);
  Sizes found(sizes.size(), 0);
  for (size_t d = 0; d < own.size(); ++d) {
    if (own[d] != 1) found[sizes.size() - own.size() + d] = strides[d];
  }
  return found;
}

Number number_of(DataType type) {
  switch (type) {
    case DataType::FLOAT32: return Number::kFloat32;
    case DataType::FLOAT16: return Number::kFloat16;
    case DataType::BFLOAT16: return Number::kBFloat16;
    case DataType::FLOAT8_E4M3FN: return Number::kFloat8E4M3;
    case DataType::FLOAT64: return Number::kFloat64;
    case DataType::BOOL: return Number::kBool;
    case DataType::UINT8: return Number::kUInt8;
    case DataType::INT8: return Number::kInt8;
    case DataType::INT16: return Number::kInt16;
    case DataType::INT32: return Number::kInt32;
    case DataType::INT64: return Number::kInt64;
    default:
      PADDLE_THROW(common::errors::Unimplemented("%s: no cast from or to %s on this device; cast on the CPU", kName,
                                                 phi::DataTypeToString(type)));
  }
}

}  // namespace

template <typename T, typename Context>
void Contiguous(const Context& context, const DenseTensor& in, DenseTensor* out) {
  phi::DenseTensorMeta meta = in.meta();
  meta.strides = meta.calc_strides(meta.dims);
  meta.offset = 0;
  out->set_meta(meta);
  context.template Alloc<T>(out);
  const Walk walk = walk_over(sizes_of(in), {strides_of(in), strides_of(*out)});
  require(copy_items(walk, sizeof(T), in.data(), out->data(), stream_of(context)), "contiguous");
}

template <typename T, typename Context>
void StridedCopy(const Context& context, const DenseTensor& in, const Sizes& sizes, const Sizes& strides,
                 int64_t offset, DenseTensor* out) {
  phi::DenseTensorMeta meta = in.meta();
  meta.dims = common::make_ddim(sizes);
  meta.strides = common::make_ddim(strides);
  meta.offset = offset;
  out->set_meta(meta);
  const Sizes from = sizes_of(in).size() == sizes.size() ? strides_of(in) : spread(in, sizes);
  const Walk walk = walk_over(sizes, {from, strides});
  require(copy_items(walk, sizeof(T), in.data(), out->data(), stream_of(context)), "strided_copy");
}

template <typename T, typename Context>
void Empty(const Context& context, const phi::IntArray& shape, DataType type, DenseTensor* out) {
  out->Resize(common::make_ddim(shape.GetData()));
  context.Alloc(out, type);
}

template <typename T, typename Context>
void EmptyLike(const Context& context, const DenseTensor&, DataType, DenseTensor* out) {
  context.template Alloc<T>(out);
}

template <typename T, typename Context>
void FillWith(const Context& context, const phi::Scalar& value, DenseTensor* out) {
  const T item = value.to<T>();
  T* data = context.template Alloc<T>(out);
  require(fill_items(out->numel(), sizeof(T), &item, data, stream_of(context)), "fill");
}

template <typename T, typename Context>
void Full(const Context& context, const phi::IntArray& shape, const phi::Scalar& value, DataType, DenseTensor* out) {
  out->Resize(common::make_ddim(shape.GetData()));
  FillWith<T>(context, value, out);
}

template <typename T, typename Context>
void FullLike(const Context& context, const DenseTensor&, const phi::Scalar& value, DataType, DenseTensor* out) {
  FillWith<T>(context, value, out);
}

template <typename T, typename Context>
void AddKernel(const Context& context, const DenseTensor& x, const DenseTensor& y, DenseTensor* out) {
  // Before Alloc: out may be x, and its strides are those that it had.
  const Sizes sizes = sizes_of(*out), from_x = spread(x, sizes), from_y = spread(y, sizes);
  const void *x_data = x.data(), *y_data = y.data();
  T* data = context.template Alloc<T>(out);
  const Walk walk = walk_over(sizes, {from_x, from_y, strides_of(*out)});
  require(add(walk, number_of(phi::CppTypeToDataType<T>::Type()), x_data, y_data, data, stream_of(context)), "add");
}

template <typename T, typename Context>
void CastKernel(const Context& context, const DenseTensor& in, DataType type, DenseTensor* out) {
  const void* data = in.data();
  context.Alloc(out, type);
  const Number from = number_of(phi::CppTypeToDataType<T>::Type());
  require(cast(in.numel(), from, number_of(type), data, out->data(), stream_of(context)), "cast");
}

template <typename T, typename Context>
void FillKernel(const Context& context, const DenseTensor&, const phi::Scalar& value, DenseTensor* out) {
  FillWith<T>(context, value, out);
}

template <typename T, typename Context>
void Assign(const Context& context, const DenseTensor& in, DenseTensor* out) {
  const void* data = in.data();
  T* to = context.template Alloc<T>(out);
  if (to == data || in.numel() == 0) return;
  const size_t bytes = sizeof(T) * in.numel();
  require(cudaMemcpyAsync(to, data, bytes, cudaMemcpyDeviceToDevice, stream_of(context)), "assign");
}

// Into every ``strides``-apart place of ``out`` from ``first`` on.
template <typename T>
void copy_into(cudaStream_t stream, const DenseTensor& in, const Sizes& sizes, const Sizes& strides, T* first) {
  const Walk walk = walk_over(sizes, {strides_of(in), strides});
  require(copy_items(walk, sizeof(T), in.data(), first, stream), "concat");
}

template <typename T, typename Context>
void Concat(const Context& context, const std::vector<const DenseTensor*>& parts, const phi::Scalar& along,
            DenseTensor* out) {
  T* to = context.template Alloc<T>(out);
  const Sizes strides = strides_of(*out);
  int64_t axis = along.to<int64_t>();
  if (axis < 0) axis += static_cast<int64_t>(strides.size());
  for (const DenseTensor* part : parts) {
    if (part->numel() == 0) continue;
    copy_into<T>(stream_of(context), *part, sizes_of(*part), strides, to);
    to += strides[axis] * sizes_of(*part)[axis];
  }
}

template <typename T, typename Context>
void Stack(const Context& context, const std::vector<const DenseTensor*>& parts, int axis, DenseTensor* out) {
  T* to = context.template Alloc<T>(out);
  Sizes strides = strides_of(*out);
  if (axis < 0) axis += static_cast<int>(strides.size());
  const int64_t apart = strides[axis];
  strides.erase(strides.begin() + axis);
  for (const DenseTensor* part : parts) {
    copy_into<T>(stream_of(context), *part, sizes_of(*part), strides, to);
    to += apart;
  }
}

}  // namespace paddle_cuda_device

#define ANY_TYPE                                                                                                 \
  bool, uint8_t, int8_t, int16_t, int, int64_t, float, double, phi::float16, phi::bfloat16, phi::float8_e4m3fn, \
      phi::float8_e5m2

PD_REGISTER_PLUGIN_KERNEL(contiguous, sonicmoe_gpu, ALL_LAYOUT, paddle_cuda_device::Contiguous, ANY_TYPE) {}
PD_REGISTER_PLUGIN_KERNEL(strided_copy, sonicmoe_gpu, ALL_LAYOUT, paddle_cuda_device::StridedCopy, ANY_TYPE) {}
PD_REGISTER_PLUGIN_KERNEL(empty, sonicmoe_gpu, ALL_LAYOUT, paddle_cuda_device::Empty, ANY_TYPE) {}
PD_REGISTER_PLUGIN_KERNEL(empty_like, sonicmoe_gpu, ALL_LAYOUT, paddle_cuda_device::EmptyLike, ANY_TYPE) {}
PD_REGISTER_PLUGIN_KERNEL(full, sonicmoe_gpu, ALL_LAYOUT, paddle_cuda_device::Full, bool, uint8_t, int8_t, int16_t,
                          int, int64_t, float, double, phi::float16, phi::bfloat16) {}
PD_REGISTER_PLUGIN_KERNEL(full_like, sonicmoe_gpu, ALL_LAYOUT, paddle_cuda_device::FullLike, bool, uint8_t, int8_t,
                          int16_t, int, int64_t, float, double, phi::float16, phi::bfloat16) {}
PD_REGISTER_PLUGIN_KERNEL(add, sonicmoe_gpu, ALL_LAYOUT, paddle_cuda_device::AddKernel, int, int64_t, float, double,
                          phi::float16, phi::bfloat16) {}
PD_REGISTER_PLUGIN_KERNEL(cast, sonicmoe_gpu, ALL_LAYOUT, paddle_cuda_device::CastKernel, bool, uint8_t, int8_t,
                          int16_t, int, int64_t, float, double, phi::float16, phi::bfloat16, phi::float8_e4m3fn) {}
PD_REGISTER_PLUGIN_KERNEL(fill, sonicmoe_gpu, ALL_LAYOUT, paddle_cuda_device::FillKernel, bool, uint8_t, int8_t, int16_t,
                          int, int64_t, float, double, phi::float16, phi::bfloat16) {}
PD_REGISTER_PLUGIN_KERNEL(assign, sonicmoe_gpu, ALL_LAYOUT, paddle_cuda_device::Assign, ANY_TYPE) {}
PD_REGISTER_PLUGIN_KERNEL(concat, sonicmoe_gpu, ALL_LAYOUT, paddle_cuda_device::Concat, ANY_TYPE) {}
PD_REGISTER_PLUGIN_KERNEL(stack, sonicmoe_gpu, ALL_LAYOUT, paddle_cuda_device::Stack, ANY_TYPE) {}
