// What the plugin uses of NCCL, by NCCL 2's ABI. Our own declarations: neither its header nor its library is there when
// the plugin is built. tests/paddle_device/stand_in_nccl.cpp defines the same functions for machines without a GPU.
#pragma once

#include <cuda_runtime.h>

using ncclComm_t = struct ncclComm*;
using ncclResult_t = int;  // 0 is success
struct ncclUniqueId {
  char internal[128];
};
enum ncclDataType_t : int {
  ncclInt8 = 0,
  ncclUint8 = 1,
  ncclInt32 = 2,
  ncclUint32 = 3,
  ncclInt64 = 4,
  ncclUint64 = 5,
  ncclFloat16 = 6,
  ncclFloat32 = 7,
  ncclFloat64 = 8,
  ncclBfloat16 = 9,
};
enum ncclRedOp_t : int { ncclSum = 0, ncclProd = 1, ncclMax = 2, ncclMin = 3, ncclAvg = 4 };

// X(name, parameters), each returns ncclResult_t
#define PADDLE_CUDA_DEVICE_NCCL(X)                                                                               \
  X(ncclGetUniqueId, (ncclUniqueId*))                                                                            \
  X(ncclCommInitRank, (ncclComm_t*, int, ncclUniqueId, int))                                                     \
  X(ncclCommDestroy, (ncclComm_t))                                                                               \
  X(ncclAllReduce, (const void*, void*, size_t, ncclDataType_t, ncclRedOp_t, ncclComm_t, cudaStream_t))          \
  X(ncclBroadcast, (const void*, void*, size_t, ncclDataType_t, int, ncclComm_t, cudaStream_t))                  \
  X(ncclReduce, (const void*, void*, size_t, ncclDataType_t, ncclRedOp_t, int, ncclComm_t, cudaStream_t))        \
  X(ncclAllGather, (const void*, void*, size_t, ncclDataType_t, ncclComm_t, cudaStream_t))                       \
  X(ncclReduceScatter, (const void*, void*, size_t, ncclDataType_t, ncclRedOp_t, ncclComm_t, cudaStream_t))      \
  X(ncclSend, (const void*, size_t, ncclDataType_t, int, ncclComm_t, cudaStream_t))                              \
  X(ncclRecv, (void*, size_t, ncclDataType_t, int, ncclComm_t, cudaStream_t))                                    \
  X(ncclGroupStart, ())                                                                                          \
  X(ncclGroupEnd, ())
