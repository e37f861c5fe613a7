// Paddle's custom device interface over the CUDA runtime: devices, streams, events, copies, properties.
//
// A test rig: it lets stock Paddle, which knows no GPU, hold tensors in GPU memory. See docs/paddle_gpu.md.
#include "paddle/phi/backends/device_ext.h"
#include "paddle/phi/backends/device_base.h"

#include <cstdio>
#include <cstring>

#include "collectives.h"
#include "state.h"

namespace paddle_cuda_device {
namespace {

C_Status done(cudaError_t result, const char* what) {
  if (result == cudaSuccess) return C_SUCCESS;
  std::fprintf(stderr, "%s: %s: %s\n", kName, what, cudaGetErrorString(result));
  cudaGetLastError();
  return C_FAILED;
}

#define DONE(call) return done((call), #call)
#define REQUIRE(call)                                     \
  do {                                                    \
    const cudaError_t required_ = (call);                 \
    if (required_ != cudaSuccess) DONE(required_);        \
  } while (0)

cudaStream_t raw(C_Stream stream) { return reinterpret_cast<cudaStream_t>(stream); }
cudaEvent_t raw(C_Event event) { return reinterpret_cast<cudaEvent_t>(event); }

// Work goes to the device that Paddle names, whichever is current in the calling thread.
class On {
 public:
  explicit On(C_Device device) {
    cudaGetDevice(&before_);
    result = device->id == before_ ? cudaSuccess : cudaSetDevice(device->id);
    if (device->id == before_) before_ = -1;
  }
  ~On() {
    if (before_ >= 0) cudaSetDevice(before_);
  }
  cudaError_t result;

 private:
  int before_ = -1;
};

#define ON(device)  \
  On on_((device)); \
  REQUIRE(on_.result)

C_Status initialize() {
  int n = 0;
  DONE(cudaGetDeviceCount(&n));
}
C_Status finalize() { return C_SUCCESS; }
C_Status nothing(const C_Device) { return C_SUCCESS; }
C_Status set_device(const C_Device device) { DONE(cudaSetDevice(device->id)); }
C_Status get_device(const C_Device device) { DONE(cudaGetDevice(&device->id)); }

C_Status create_stream(const C_Device device, C_Stream* stream) {
  ON(device);
  count(kStreams);
  DONE(cudaStreamCreateWithFlags(reinterpret_cast<cudaStream_t*>(stream), cudaStreamDefault));
}
C_Status destroy_stream(const C_Device device, C_Stream stream) {
  ON(device);
  count(kStreams, -1);
  DONE(cudaStreamDestroy(raw(stream)));
}
C_Status query_stream(const C_Device device, C_Stream stream) {
  ON(device);
  const cudaError_t result = cudaStreamQuery(raw(stream));
  if (result == cudaErrorNotReady) {
    cudaGetLastError();
    return C_WARNING;
  }
  DONE(result);
}

struct HostCall {
  C_Device_st device;
  C_Stream stream;
  C_Callback function;
  void* user_data;
};
void run_host_call(void* data) {
  auto* call = static_cast<HostCall*>(data);
  C_Status status = C_SUCCESS;
  call->function(&call->device, call->stream, call->user_data, &status);
  delete call;
}
C_Status stream_add_callback(const C_Device device, C_Stream stream, C_Callback function, void* user_data) {
  ON(device);
  DONE(cudaLaunchHostFunc(raw(stream), run_host_call, new HostCall{*device, stream, function, user_data}));
}

C_Status create_event(const C_Device device, C_Event* event) {
  ON(device);
  count(kEvents);
  DONE(cudaEventCreateWithFlags(reinterpret_cast<cudaEvent_t*>(event), cudaEventDisableTiming));
}
C_Status destroy_event(const C_Device device, C_Event event) {
  ON(device);
  count(kEvents, -1);
  DONE(cudaEventDestroy(raw(event)));
}
C_Status record_event(const C_Device device, C_Stream stream, C_Event event) {
  ON(device);
  DONE(cudaEventRecord(raw(event), raw(stream)));
}
C_Status query_event(const C_Device device, C_Event event) {
  ON(device);
  const cudaError_t result = cudaEventQuery(raw(event));
  if (result == cudaErrorNotReady) {
    cudaGetLastError();
    return C_WARNING;
  }
  DONE(result);
}

C_Status synchronize_device(const C_Device device) {
  ON(device);
  count(kSynchronizeDevice);
  DONE(cudaDeviceSynchronize());
}
C_Status synchronize_stream(const C_Device device, C_Stream stream) {
  ON(device);
  count(kSynchronizeStream);
  DONE(cudaStreamSynchronize(raw(stream)));
}
C_Status synchronize_event(const C_Device device, C_Event event) {
  ON(device);
  count(kSynchronizeEvent);
  DONE(cudaEventSynchronize(raw(event)));
}
C_Status stream_wait_event(const C_Device device, C_Stream stream, C_Event event) {
  ON(device);
  DONE(cudaStreamWaitEvent(raw(stream), raw(event), 0));
}

C_Status allocate(const C_Device device, void** address, size_t bytes) {
  ON(device);
  const cudaError_t result = take_block(device->id, address, bytes);
  if (result == cudaErrorMemoryAllocation) {  // Paddle tries again with less, or says it in its own words
    cudaGetLastError();
    return C_FAILED;
  }
  DONE(result);
}
C_Status deallocate(const C_Device device, void* address, size_t bytes) {
  ON(device);
  DONE(release_block(device->id, address, bytes));
}
C_Status allocate_host(const C_Device device, void** address, size_t bytes) {
  ON(device);
  DONE(cudaMallocHost(address, bytes));
}
C_Status deallocate_host(const C_Device device, void* address, size_t) {
  ON(device);
  DONE(cudaFreeHost(address));
}
C_Status memory_set(const C_Device device, void* address, unsigned char value, size_t bytes) {
  ON(device);
  DONE(cudaMemset(address, value, bytes));
}

C_Status copy_to_device(const C_Device device, void* to, const void* from, size_t bytes) {
  ON(device);
  count(kCopyToDevice);
  DONE(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice));
}
C_Status copy_to_host(const C_Device device, void* to, const void* from, size_t bytes) {
  ON(device);
  count(kCopyToHost);
  DONE(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost));
}
// Without a stream Paddle means "in order with all that was queued": so does the legacy stream, and the host goes on.
C_Status copy_on_device(const C_Device device, void* to, const void* from, size_t bytes) {
  ON(device);
  DONE(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, cudaStreamLegacy));
}
C_Status copy_between(const C_Device to_device, const C_Device from_device, void* to, const void* from, size_t bytes) {
  ON(from_device);
  DONE(cudaMemcpyPeer(to, to_device->id, from, from_device->id, bytes));
}
C_Status copy_to_device_async(const C_Device device, C_Stream stream, void* to, const void* from, size_t bytes) {
  ON(device);
  count(kCopyToDeviceAsync);
  DONE(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, raw(stream)));
}
C_Status copy_to_host_async(const C_Device device, C_Stream stream, void* to, const void* from, size_t bytes) {
  ON(device);
  count(kCopyToHostAsync);
  DONE(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, raw(stream)));
}
C_Status copy_on_device_async(const C_Device device, C_Stream stream, void* to, const void* from, size_t bytes) {
  ON(device);
  DONE(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, raw(stream)));
}
C_Status copy_between_async(const C_Device to_device, const C_Device from_device, C_Stream stream, void* to,
                            const void* from, size_t bytes) {
  ON(from_device);
  DONE(cudaMemcpyPeerAsync(to, to_device->id, from, from_device->id, bytes, raw(stream)));
}

C_Status device_count(size_t* count) {
  int n = 0;
  REQUIRE(cudaGetDeviceCount(&n));
  *count = n < kMaxDevices ? n : kMaxDevices;
  return C_SUCCESS;
}
C_Status device_list(size_t* devices) {
  size_t n = 0;
  const C_Status status = device_count(&n);
  for (size_t i = 0; i < n; ++i) devices[i] = i;
  return status;
}
C_Status memory_stats(const C_Device device, size_t* total, size_t* free) {
  ON(device);
  DONE(cudaMemGetInfo(free, total));
}
C_Status min_chunk_size(const C_Device, size_t* bytes) {
  *bytes = 512;
  return C_SUCCESS;
}

template <cudaDeviceAttr kAttribute>
C_Status attribute(const C_Device device, size_t* value) {
  int found = 0;
  REQUIRE(cudaDeviceGetAttribute(&found, kAttribute, device->id));
  *value = found;
  return C_SUCCESS;
}
C_Status compute_capability(const C_Device device, size_t* value) {
  int major = 0, minor = 0;
  REQUIRE(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device->id));
  REQUIRE(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device->id));
  *value = 10 * major + minor;
  return C_SUCCESS;
}
C_Status properties(const C_Device device, void* into) {
  cudaDeviceProp found;
  REQUIRE(cudaGetDeviceProperties(&found, device->id));
  auto* to = static_cast<phi::DeviceProp*>(into);
  to->name = found.name;
  to->deviceMajor = found.major;
  to->deviceMinor = found.minor;
  to->totalGlobalMem = found.totalGlobalMem;
  to->multiProcessorCount = found.multiProcessorCount;
  to->isMultiGpuBoard = found.isMultiGpuBoard != 0;
  to->integrated = found.integrated != 0;
  return C_SUCCESS;
}
C_Status runtime_version(const C_Device, size_t* version) {
  int found = 0;
  REQUIRE(cudaRuntimeGetVersion(&found));
  *version = found;
  return C_SUCCESS;
}
C_Status driver_version(const C_Device, size_t* version) {
  int found = 0;
  REQUIRE(cudaDriverGetVersion(&found));
  *version = found;
  return C_SUCCESS;
}
C_Status grid_size(const C_Device device, std::array<unsigned int, 3>* size) {
  const cudaDeviceAttr sides[3] = {cudaDevAttrMaxGridDimX, cudaDevAttrMaxGridDimY, cudaDevAttrMaxGridDimZ};
  for (int i = 0; i < 3; ++i) {
    int found = 0;
    REQUIRE(cudaDeviceGetAttribute(&found, sides[i], device->id));
    (*size)[i] = found;
  }
  return C_SUCCESS;
}
C_Status yes(const C_Device, bool* supported) {
  *supported = true;
  return C_SUCCESS;
}

void fill(C_DeviceInterface* to) {
  to->initialize = initialize;
  to->finalize = finalize;
  to->init_device = nothing;
  to->deinit_device = nothing;
  to->set_device = set_device;
  to->get_device = get_device;
  to->create_stream = create_stream;
  to->destroy_stream = destroy_stream;
  to->query_stream = query_stream;
  to->stream_add_callback = stream_add_callback;
  to->create_event = create_event;
  to->record_event = record_event;
  to->destroy_event = destroy_event;
  to->query_event = query_event;
  to->synchronize_device = synchronize_device;
  to->synchronize_stream = synchronize_stream;
  to->synchronize_event = synchronize_event;
  to->stream_wait_event = stream_wait_event;
  to->device_memory_allocate = allocate;
  to->device_memory_deallocate = deallocate;
  to->device_memory_set = memory_set;
  to->host_memory_allocate = allocate_host;
  to->host_memory_deallocate = deallocate_host;
  to->memory_copy_h2d = copy_to_device;
  to->memory_copy_d2h = copy_to_host;
  to->memory_copy_d2d = copy_on_device;
  to->memory_copy_p2p = copy_between;
  to->async_memory_copy_h2d = copy_to_device_async;
  to->async_memory_copy_d2h = copy_to_host_async;
  to->async_memory_copy_d2d = copy_on_device_async;
  to->async_memory_copy_p2p = copy_between_async;
  to->get_device_count = device_count;
  to->get_device_list = device_list;
  to->device_memory_stats = memory_stats;
  to->device_min_chunk_size = min_chunk_size;
  to->get_compute_capability = compute_capability;
  to->get_device_properties = properties;
  to->get_runtime_version = runtime_version;
  to->get_driver_version = driver_version;
  to->get_multi_process = attribute<cudaDevAttrMultiProcessorCount>;
  to->get_max_threads_per_mp = attribute<cudaDevAttrMaxThreadsPerMultiProcessor>;
  to->get_max_threads_per_block = attribute<cudaDevAttrMaxThreadsPerBlock>;
  to->get_max_grid_dim_size = grid_size;
  to->is_float16_supported = yes;
  to->is_bfloat16_supported = yes;
}

}  // namespace
}  // namespace paddle_cuda_device

extern "C" {

__attribute__((visibility("default"))) void InitPlugin(CustomRuntimeParams* params) {
  PADDLE_CUSTOM_RUNTIME_CHECK_VERSION(params);
  params->device_type = const_cast<char*>(paddle_cuda_device::kName);
  params->sub_device_type = const_cast<char*>("cuda");
  std::memset(params->interface, 0, sizeof(C_DeviceInterface));
  params->interface->size = sizeof(C_DeviceInterface);
  paddle_cuda_device::fill(params->interface);
  paddle_cuda_device::fill_collectives(params->interface);
}

// For tests, through ctypes.
__attribute__((visibility("default"))) int64_t paddle_cuda_device_counter(int which) {
  using namespace paddle_cuda_device;
  return which >= 0 && which < kCounters ? state().counters[which].load() : -1;
}
__attribute__((visibility("default"))) int64_t paddle_cuda_device_bytes_in_use(int device) {
  return paddle_cuda_device::state().bytes_in_use[device].load();
}
__attribute__((visibility("default"))) int64_t paddle_cuda_device_bytes_held(int device) {
  return paddle_cuda_device::state().bytes_held[device].load();
}
__attribute__((visibility("default"))) int paddle_cuda_device_trim(int device) {
  return static_cast<int>(paddle_cuda_device::trim(device));
}
}
