// Paddle's collective interface (xccl_*) over NCCL, which is looked for when the first of them is called.
//
// SONICMOE_NCCL names the library, libnccl.so.2 if it is not set. What only moves travels as bytes, so that every type
// of Paddle's does; sums know the types that NCCL adds.
#include "paddle/phi/backends/device_ext.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "collectives.h"
#include "nccl_abi.h"
#include "state.h"

namespace paddle_cuda_device {
namespace {

#define NCCL_MEMBER(name, parameters) ncclResult_t(*name) parameters = nullptr;
struct Nccl {
  bool found = false;
  const char*(*ncclGetErrorString)(ncclResult_t) = nullptr;
  PADDLE_CUDA_DEVICE_NCCL(NCCL_MEMBER)
};
#undef NCCL_MEMBER

Nccl load() {
  Nccl made;
  const char* named = std::getenv("SONICMOE_NCCL");
  const char* file = named != nullptr && *named ? named : "libnccl.so.2";
  void* library = dlopen(file, RTLD_NOW | RTLD_LOCAL);
  const char* missing = library == nullptr ? dlerror() : nullptr;
  const auto take = [&](auto& member, const char* symbol) {
    if (missing != nullptr) return;
    member = reinterpret_cast<std::decay_t<decltype(member)>>(dlsym(library, symbol));
    if (member == nullptr) missing = symbol;
  };
#define NCCL_TAKE(name, parameters) take(made.name, #name);
  PADDLE_CUDA_DEVICE_NCCL(NCCL_TAKE)
#undef NCCL_TAKE
  take(made.ncclGetErrorString, "ncclGetErrorString");
  made.found = missing == nullptr;
  if (!made.found) {
    std::fprintf(stderr, "%s: no NCCL for paddle.distributed: %s: %s; set SONICMOE_NCCL to the path of libnccl.so.2\n",
                 kName, file, missing);
  }
  return made;
}

const Nccl& nccl() {
  static const Nccl one = load();
  return one;
}

C_Status done(ncclResult_t result, const char* what) {
  if (result == 0) return C_SUCCESS;
  std::fprintf(stderr, "%s: %s: %s\n", kName, what, nccl().ncclGetErrorString(result));
  return C_FAILED;
}
#define CALL(name, ...) return nccl().found ? done(nccl().name(__VA_ARGS__), #name) : C_FAILED

ncclComm_t raw(C_CCLComm comm) { return reinterpret_cast<ncclComm_t>(comm); }
cudaStream_t raw(C_Stream stream) { return reinterpret_cast<cudaStream_t>(stream); }

// 0 for what Paddle may add to its list of types.
size_t item_bytes(C_DataType type) {
  switch (type) {
    case BOOL:
    case UINT8:
    case INT8: return 1;
    case UINT16:
    case INT16:
    case FLOAT16:
    case BFLOAT16: return 2;
    case UINT32:
    case INT32:
    case FLOAT32: return 4;
    case UINT64:
    case INT64:
    case FLOAT64:
    case COMPLEX64: return 8;
    case COMPLEX128: return 16;
    default: return 0;
  }
}
bool moves(C_DataType type) {
  if (item_bytes(type) != 0) return true;
  std::fprintf(stderr, "%s: a collective of a type unknown here, number %d of Paddle's C_DataType\n", kName, type);
  return false;
}
#define MOVES(type) \
  if (!moves(type)) return C_ERROR

bool adds(C_DataType type, C_CCLReduceOp op, ncclDataType_t* to_type, ncclRedOp_t* to_op) {
  switch (type) {
    case INT8: *to_type = ncclInt8; break;
    case UINT8: *to_type = ncclUint8; break;
    case INT32: *to_type = ncclInt32; break;
    case UINT32: *to_type = ncclUint32; break;
    case INT64: *to_type = ncclInt64; break;
    case UINT64: *to_type = ncclUint64; break;
    case FLOAT16: *to_type = ncclFloat16; break;
    case FLOAT32: *to_type = ncclFloat32; break;
    case FLOAT64: *to_type = ncclFloat64; break;
    case BFLOAT16: *to_type = ncclBfloat16; break;
    default:
      std::fprintf(stderr, "%s: NCCL reduces no tensor of type number %d of Paddle's C_DataType\n", kName, type);
      return false;
  }
  switch (op) {
    case SUM: *to_op = ncclSum; return true;
    case AVG: *to_op = ncclAvg; return true;
    case MAX: *to_op = ncclMax; return true;
    case MIN: *to_op = ncclMin; return true;
    case PRODUCT: *to_op = ncclProd; return true;
  }
  std::fprintf(stderr, "%s: reduction %d is unknown here\n", kName, op);
  return false;
}
#define ADDS(type, op)      \
  ncclDataType_t type_;     \
  ncclRedOp_t op_;          \
  if (!adds((type), (op), &type_, &op_)) return C_ERROR

C_Status unique_id_size(size_t* size) {
  *size = sizeof(ncclUniqueId);
  return C_SUCCESS;
}
C_Status unique_id(C_CCLRootId* to) {
  if (to->sz != sizeof(ncclUniqueId)) return C_ERROR;
  CALL(ncclGetUniqueId, static_cast<ncclUniqueId*>(to->data));
}
// On the current device: Paddle sets that of the group's place before.
C_Status init_rank(size_t ranks, C_CCLRootId* id, size_t rank, C_CCLComm* comm) {
  if (id->sz != sizeof(ncclUniqueId)) return C_ERROR;
  ncclUniqueId given;
  std::memcpy(&given, id->data, sizeof(given));
  CALL(ncclCommInitRank, reinterpret_cast<ncclComm_t*>(comm), static_cast<int>(ranks), given, static_cast<int>(rank));
}
C_Status destroy_comm(C_CCLComm comm) { CALL(ncclCommDestroy, raw(comm)); }

C_Status all_reduce(void* send, void* recv, size_t count, C_DataType type, C_CCLReduceOp op, C_CCLComm comm,
                    C_Stream stream) {
  ADDS(type, op);
  CALL(ncclAllReduce, send, recv, count, type_, op_, raw(comm), raw(stream));
}
C_Status reduce(void* send, void* recv, size_t count, C_DataType type, C_CCLReduceOp op, size_t root, C_CCLComm comm,
                C_Stream stream) {
  ADDS(type, op);
  CALL(ncclReduce, send, recv, count, type_, op_, static_cast<int>(root), raw(comm), raw(stream));
}
C_Status reduce_scatter(void* send, void* recv, size_t count, C_DataType type, C_CCLReduceOp op, C_CCLComm comm,
                        C_Stream stream) {
  ADDS(type, op);
  CALL(ncclReduceScatter, send, recv, count, type_, op_, raw(comm), raw(stream));
}
C_Status broadcast(void* buffer, size_t count, C_DataType type, size_t root, C_CCLComm comm, C_Stream stream) {
  MOVES(type);
  CALL(ncclBroadcast, buffer, buffer, count * item_bytes(type), ncclUint8, static_cast<int>(root), raw(comm),
       raw(stream));
}
C_Status all_gather(void* send, void* recv, size_t count, C_DataType type, C_CCLComm comm, C_Stream stream) {
  MOVES(type);
  CALL(ncclAllGather, send, recv, count * item_bytes(type), ncclUint8, raw(comm), raw(stream));
}
C_Status send_to(void* from, size_t count, C_DataType type, size_t rank, C_CCLComm comm, C_Stream stream) {
  MOVES(type);
  CALL(ncclSend, from, count * item_bytes(type), ncclUint8, static_cast<int>(rank), raw(comm), raw(stream));
}
C_Status recv_from(void* to, size_t count, C_DataType type, size_t rank, C_CCLComm comm, C_Stream stream) {
  MOVES(type);
  CALL(ncclRecv, to, count * item_bytes(type), ncclUint8, static_cast<int>(rank), raw(comm), raw(stream));
}
C_Status group_start() { CALL(ncclGroupStart); }
C_Status group_end() { CALL(ncclGroupEnd); }

// One group: sends and receives that wait for each other must be under way together. What is empty is left out on both
// sides, for one's count is the other's.
C_Status all_to_all(const void** send, const size_t* send_count, const C_DataType* send_type, void** recv,
                    const size_t* recv_count, const C_DataType* recv_type, size_t, size_t ranks, C_CCLComm comm,
                    C_Stream stream) {
  C_Status status = group_start();
  if (status != C_SUCCESS) return status;
  for (size_t peer = 0; peer < ranks && status == C_SUCCESS; ++peer) {
    if (send_count[peer] != 0) {
      status = send_to(const_cast<void*>(send[peer]), send_count[peer], send_type[peer], peer, comm, stream);
    }
    if (recv_count[peer] != 0 && status == C_SUCCESS) {
      status = recv_from(recv[peer], recv_count[peer], recv_type[peer], peer, comm, stream);
    }
  }
  const C_Status ended = group_end();  // also after a failure, or the thread would stay in the group
  return status == C_SUCCESS ? ended : status;
}

}  // namespace

void fill_collectives(C_DeviceInterface* to) {
  to->xccl_get_unique_id_size = unique_id_size;
  to->xccl_get_unique_id = unique_id;
  to->xccl_comm_init_rank = init_rank;
  to->xccl_destroy_comm = destroy_comm;
  to->xccl_all_reduce = all_reduce;
  to->xccl_broadcast = broadcast;
  to->xccl_reduce = reduce;
  to->xccl_all_gather = all_gather;
  to->xccl_reduce_scatter = reduce_scatter;
  to->xccl_group_start = group_start;
  to->xccl_group_end = group_end;
  to->xccl_send = send_to;
  to->xccl_recv = recv_from;
  to->xccl_all_to_all = all_to_all;
}

}  // namespace paddle_cuda_device
