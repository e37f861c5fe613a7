// Kernels by which the emulator itself is tried: what each operation gives, and mistakes that it must see.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <utility>

namespace {

constexpr unsigned kAll = 0xffffffffu;

// One row of results for each operation, a column for each thread.
__global__ void operations(int32_t* found, unsigned long long* least) {
  extern __shared__ int32_t dynamic[];
  const int thread = threadIdx.x;
  int32_t* to = found + thread;
  const auto put = [&](int64_t value) {
    __stcg(to, static_cast<int32_t>(value));
    to += blockDim.x;
  };
  put(dynamic[thread]);
  put(__ballot_sync(kAll, thread % 3 == 0));
  put(__any_sync(kAll, thread == 40));
  put(__all_sync(kAll, thread != 40));
  put(__reduce_add_sync(kAll, thread - 20));
  put(__reduce_add_sync(kAll, 0x80000000u + thread));
  put(__shfl_sync(kAll, thread, 39));
  put(__shfl_up_sync(kAll, thread, 3));
  put(__shfl_down_sync(kAll, thread, 3));
  put(__shfl_xor_sync(kAll, thread, 5));
  put(static_cast<int64_t>(__shfl_sync(kAll, thread + 0.5f, 2) * 2));
  put(__shfl_sync(kAll, int64_t{thread} << 32, 3) >> 32);
  put(__syncthreads_count(thread % 3 == 0));
  put(__syncthreads_or(thread == 40));
  put(__syncthreads_or(0));
  put(__syncthreads_and(thread != 40));
  put(__syncthreads_and(1));
  put(__popc(thread * 0x01010101u));
  put(__ffs(thread));
  put(__clz(thread));
  put(__umulhi(thread << 28, 48));
  __stcs(dynamic + thread, 7 * thread);
  __syncthreads();
  put(__ldg(dynamic + thread) + __ldcg(dynamic + (thread + 1) % blockDim.x));
  if (thread == 0) dynamic[0] = 0;
  __syncthreads();
  atomicAdd(dynamic, thread);
  atomicMin(least, 1000ull - thread);
  __syncthreads();
  put(dynamic[0]);
}

enum Case {
  kGood,
  kNoSyncthreads,
  kNoSyncwarp,
  kNoAtomic,
  kLatePublish,
  kThreadMissesBarrier,
  kLanesApart,
  kLaneMissesVote,
  kSomeLanes,
  kBarriersApart,
  kBlockMissesGrid,
  kWaitsWithoutArrival,
  kArrivesTwice,
  kWritesBehind,
  kWritesInFront,
  kTraps,
};

// Each thread adds what its neighbours in the warp, the block and the grid have put down, and the threads of its block.
__global__ void cooperate(Case which, int32_t* published, int32_t* found) {
  extern __shared__ int32_t dynamic[];
  const int thread = threadIdx.x, threads = blockDim.x, block = blockIdx.x, last = threads - 1;
  const auto grid = cooperative_groups::this_grid();
  int32_t *of_warp = dynamic, *of_block = dynamic + threads, *count = dynamic + 2 * threads;
  if (thread == 0) *count = 0;
  of_warp[thread] = 1 + thread;
  if (which != kNoSyncwarp) __syncwarp();
  int sum = of_warp[thread ^ 1];
  of_block[thread] = 1 + thread;
  if (which != kNoSyncthreads && (which != kThreadMissesBarrier || thread != last)) __syncthreads();
  sum += of_block[last - thread];
  if (which == kNoAtomic) {
    *count += 1;
  } else {
    atomicAdd(count, 1);
  }
  if (which == kLanesApart) thread % 2 ? __syncwarp() : static_cast<void>(__any_sync(kAll, 1));
  if (which == kLaneMissesVote && thread == 3) return;
  if (which == kLaneMissesVote) __any_sync(kAll, 1);
  if (which == kSomeLanes && thread < 16) __syncwarp(0xffff);
  if (which == kBarriersApart) thread < 32 ? __syncthreads() : static_cast<void>(__syncthreads_or(1));
  if (which == kWritesBehind) count[1 + block] = 0;
  if (which == kWritesInFront) dynamic[-1 - block] = 0;
  if (which == kBlockMissesGrid && block == 1) return;
  if (which == kTraps && block == 1 && thread == 5) {
    printf("thread %d traps\n", thread);
    __trap();
  }
  if (which != kLatePublish) published[block * threads + thread] = 1 + block;
  auto arrival = grid.barrier_arrive();
  if (which == kArrivesTwice) arrival = grid.barrier_arrive();
  if (which == kWaitsWithoutArrival) arrival = {};
  if (which == kLatePublish) published[block * threads + thread] = 1 + block;
  grid.barrier_wait(std::move(arrival));
  sum += published[(block + 1) % gridDim.x * threads + thread] + *count;
  grid.sync();
  found[block * threads + thread] = sum;
}

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), int blocks, int threads, int shared_bytes, bool cooperative,
                   Arguments... arguments) {
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = cooperative;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.attrs = &together;
  config.numAttrs = 1;
  cudaLaunchKernelEx(&config, kernel, arguments...);
  return cudaGetErrorString(cudaGetLastError());
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED const char* probe_operations(int32_t* found, unsigned long long* least, int threads) {
  return launch(operations, 1, threads, 4 * threads, false, found, least);
}

EXPORTED const char* probe_cooperation(int which, int blocks, int threads, int shared_bytes, bool cooperative,
                                       int32_t* published, int32_t* found) {
  return launch(cooperate, blocks, threads, shared_bytes, cooperative, static_cast<Case>(which), published, found);
}

// Shared memory that later launches may have; as the result what was said.
EXPORTED const char* probe_ask(int shared_bytes) {
  cudaFuncSetAttribute(cooperate, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  return cudaGetErrorString(cudaGetLastError());
}
