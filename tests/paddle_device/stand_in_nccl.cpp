// A stand-in for NCCL between processes of one machine, over the stand-in for CUDA: a message is a file.
//
// Every call is done when it returns. As with NCCL, a send outside a group waits for its receive; within one all are
// begun before any is waited for. It checks what a real run would hang on or corrupt: that both ends mean the same call,
// of the same size; that streams and addresses are the communicator's device's. Nobody waits longer than kPatience.
#include "nccl_abi.h"

#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr auto kPatience = std::chrono::seconds(60);
constexpr ncclResult_t kOk = 0, kCuda = 1, kTooLate = 2, kArgument = 4, kOtherCall = 5;

using Bytes = std::vector<char>;

struct Header {
  char call[24];
  size_t bytes;
};

// The current device is that of the communicator for as long as this lives.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    cudaGetDevice(&before_);
    cudaSetDevice(device);
  }
  ~OnDevice() { cudaSetDevice(before_); }

 private:
  int before_;
};

}  // namespace

struct ncclComm {
  std::string folder;
  int ranks, rank, device;
  std::vector<long> sent, received;  // by peer: the number of the next message

  std::string message(int from, int to, long number) const {
    return folder + "/" + std::to_string(from) + "." + std::to_string(to) + "." + std::to_string(number);
  }
};

namespace {

struct Move {
  bool send;
  ncclComm* comm;
  int peer;
  Bytes data;  // to be sent
  void* to = nullptr;
  size_t bytes = 0;
};
thread_local int depth = 0;
thread_local std::vector<Move> grouped;

template <class Condition>
bool wait_for(Condition condition) {
  const auto end = std::chrono::steady_clock::now() + kPatience;
  while (!condition()) {
    if (std::chrono::steady_clock::now() > end) return false;
    std::this_thread::sleep_for(std::chrono::microseconds(100));
  }
  return true;
}
bool there(const std::string& path) { return access(path.c_str(), F_OK) == 0; }

ncclResult_t put(ncclComm* comm, const char* call, int peer, const char* data, size_t bytes, std::string* name) {
  Header header{};
  std::snprintf(header.call, sizeof(header.call), "%s", call);
  header.bytes = bytes;
  *name = comm->message(comm->rank, peer, comm->sent[peer]++);
  const std::string unfinished = *name + ".part";
  {
    std::ofstream file(unfinished, std::ios::binary);
    file.write(reinterpret_cast<const char*>(&header), sizeof(header));
    file.write(data, static_cast<std::streamsize>(bytes));
    if (!file.flush()) return kTooLate;
  }
  return std::rename(unfinished.c_str(), name->c_str()) == 0 ? kOk : kTooLate;
}

ncclResult_t take(ncclComm* comm, const char* call, int peer, char* data, size_t bytes) {
  const std::string name = comm->message(peer, comm->rank, comm->received[peer]++);
  if (!wait_for([&] { return there(name); })) return kTooLate;
  std::ifstream file(name, std::ios::binary);
  Header header;
  file.read(reinterpret_cast<char*>(&header), sizeof(header));
  const bool same = file && std::string(header.call) == call && header.bytes == bytes;
  if (!same) {
    std::fprintf(stderr, "stand-in NCCL: rank %d waits for %s of %zu bytes from %d, which sent %s of %zu\n", comm->rank,
                 call, bytes, peer, header.call, header.bytes);
    return kOtherCall;
  }
  file.read(data, static_cast<std::streamsize>(bytes));
  std::remove(name.c_str());
  return file ? kOk : kOtherCall;
}

// A collective: ``mine`` goes to every rank, and all ranks' parts come back in their order.
ncclResult_t exchange(ncclComm* comm, const char* call, const Bytes& mine, std::vector<Bytes>* parts) {
  if (depth != 0) return kArgument;  // the plugin groups sends and receives alone
  std::string ignored;
  parts->assign(comm->ranks, mine);
  for (int peer = 0; peer < comm->ranks; ++peer) {
    if (peer == comm->rank) continue;
    if (const ncclResult_t result = put(comm, call, peer, mine.data(), mine.size(), &ignored)) return result;
  }
  for (int peer = 0; peer < comm->ranks; ++peer) {
    if (peer == comm->rank) continue;
    if (const ncclResult_t result = take(comm, call, peer, (*parts)[peer].data(), mine.size())) return result;
  }
  return kOk;
}

ncclResult_t run(std::vector<Move> moves) {
  std::vector<std::string> under_way;
  for (Move& move : moves) {
    if (!move.send) continue;
    under_way.emplace_back();
    const auto result = put(move.comm, "send", move.peer, move.data.data(), move.data.size(), &under_way.back());
    if (result != kOk) return result;
  }
  for (Move& move : moves) {
    if (move.send) continue;
    Bytes came(move.bytes);
    const OnDevice on(move.comm->device);
    if (const ncclResult_t result = take(move.comm, "send", move.peer, came.data(), came.size())) return result;
    if (cudaMemcpy(move.to, came.data(), came.size(), cudaMemcpyHostToDevice) != cudaSuccess) return kCuda;
  }
  for (const std::string& name : under_way) {
    if (!wait_for([&] { return !there(name); })) return kTooLate;
  }
  return kOk;
}

size_t item_bytes(ncclDataType_t type) {
  constexpr size_t kBytes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2};
  return type >= 0 && type < 10 ? kBytes[type] : 0;
}

ncclResult_t read(ncclComm* comm, const void* from, size_t bytes, cudaStream_t stream, Bytes* into) {
  const OnDevice on(comm->device);
  into->resize(bytes);
  if (standInCheckLaunch(stream) != cudaSuccess) return kCuda;
  return cudaMemcpy(into->data(), from, bytes, cudaMemcpyDeviceToHost) == cudaSuccess ? kOk : kCuda;
}
ncclResult_t write(ncclComm* comm, void* to, const char* from, size_t bytes) {
  const OnDevice on(comm->device);
  return cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice) == cudaSuccess ? kOk : kCuda;
}

struct Bf16 {
  uint16_t bits;
  operator float() const {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof(value));
    return value;
  }
  explicit Bf16(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, sizeof(wide));
    bits = static_cast<uint16_t>((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
  }
};

template <class T, class Wide = T>
void fold(const std::vector<Bytes>& parts, ncclRedOp_t op, Bytes* into) {
  const size_t count = parts[0].size() / sizeof(T);
  into->resize(parts[0].size());
  auto* out = reinterpret_cast<T*>(into->data());
  for (size_t i = 0; i < count; ++i) {
    Wide value = reinterpret_cast<const T*>(parts[0].data())[i];
    for (size_t rank = 1; rank < parts.size(); ++rank) {
      const Wide other = reinterpret_cast<const T*>(parts[rank].data())[i];
      if (op == ncclSum || op == ncclAvg) value += other;
      if (op == ncclProd) value *= other;
      if (op == ncclMax && other > value) value = other;
      if (op == ncclMin && other < value) value = other;
    }
    if (op == ncclAvg) value /= static_cast<Wide>(parts.size());
    out[i] = T(value);
  }
}

ncclResult_t reduced(ncclComm* comm, const char* call, const void* from, size_t count, ncclDataType_t type,
                     ncclRedOp_t op, cudaStream_t stream, Bytes* result) {
  Bytes mine;
  std::vector<Bytes> parts;
  if (const ncclResult_t failed = read(comm, from, count * item_bytes(type), stream, &mine)) return failed;
  if (const ncclResult_t failed = exchange(comm, call, mine, &parts)) return failed;
  switch (type) {
    case ncclInt8: fold<int8_t>(parts, op, result); return kOk;
    case ncclUint8: fold<uint8_t>(parts, op, result); return kOk;
    case ncclInt32: fold<int32_t>(parts, op, result); return kOk;
    case ncclUint32: fold<uint32_t>(parts, op, result); return kOk;
    case ncclInt64: fold<int64_t>(parts, op, result); return kOk;
    case ncclUint64: fold<uint64_t>(parts, op, result); return kOk;
    case ncclFloat16: fold<_Float16, float>(parts, op, result); return kOk;
    case ncclFloat32: fold<float>(parts, op, result); return kOk;
    case ncclFloat64: fold<double>(parts, op, result); return kOk;
    case ncclBfloat16: fold<Bf16, float>(parts, op, result); return kOk;
  }
  return kArgument;
}

}  // namespace

extern "C" {

const char* ncclGetErrorString(ncclResult_t result) {
  switch (result) {
    case kOk: return "no error";
    case kCuda: return "unhandled cuda error";
    case kTooLate: return "no answer from another rank";
    case kArgument: return "invalid argument";
    case kOtherCall: return "another rank made another call";
  }
  return "unknown";
}

ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  const char* parent = std::getenv("TMPDIR");
  std::snprintf(id->internal, sizeof(id->internal), "%s/nccl-XXXXXX", parent ? parent : "/tmp");
  return mkdtemp(id->internal) == nullptr ? kArgument : kOk;
}

ncclResult_t ncclCommInitRank(ncclComm_t* comm, int ranks, ncclUniqueId id, int rank) {
  auto* made = new ncclComm{id.internal, ranks, rank, 0, std::vector<long>(ranks), std::vector<long>(ranks)};
  cudaGetDevice(&made->device);
  std::ofstream(made->folder + "/rank." + std::to_string(rank)).put('\n');
  *comm = made;
  std::vector<Bytes> devices;
  const char* mine = reinterpret_cast<const char*>(&made->device);
  if (const ncclResult_t failed = exchange(made, "init", Bytes(mine, mine + sizeof(int)), &devices)) return failed;
  for (int peer = 0; peer < ranks; ++peer) {  // NCCL: "Duplicate GPU detected"
    int device;
    std::memcpy(&device, devices[peer].data(), sizeof(device));
    if (peer != rank && device == made->device) return kArgument;
  }
  return kOk;
}

ncclResult_t ncclCommDestroy(ncclComm_t comm) {
  std::remove((comm->folder + "/rank." + std::to_string(comm->rank)).c_str());
  rmdir(comm->folder.c_str());  // the last rank's does it
  delete comm;
  return kOk;
}

ncclResult_t ncclAllReduce(const void* send, void* recv, size_t count, ncclDataType_t type, ncclRedOp_t op,
                           ncclComm_t comm, cudaStream_t stream) {
  Bytes result;
  const ncclResult_t failed = reduced(comm, "all reduce", send, count, type, op, stream, &result);
  return failed ? failed : write(comm, recv, result.data(), result.size());
}
ncclResult_t ncclReduce(const void* send, void* recv, size_t count, ncclDataType_t type, ncclRedOp_t op, int root,
                        ncclComm_t comm, cudaStream_t stream) {
  Bytes result;
  const ncclResult_t failed = reduced(comm, "reduce", send, count, type, op, stream, &result);
  return failed || comm->rank != root ? failed : write(comm, recv, result.data(), result.size());
}
ncclResult_t ncclReduceScatter(const void* send, void* recv, size_t count, ncclDataType_t type, ncclRedOp_t op,
                               ncclComm_t comm, cudaStream_t stream) {
  Bytes result;
  const size_t bytes = count * item_bytes(type);
  const auto failed = reduced(comm, "reduce scatter", send, count * comm->ranks, type, op, stream, &result);
  return failed ? failed : write(comm, recv, result.data() + comm->rank * bytes, bytes);
}
ncclResult_t ncclBroadcast(const void* send, void* recv, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                           cudaStream_t stream) {
  Bytes mine;
  std::vector<Bytes> parts;
  const void* from = comm->rank == root ? send : recv;
  if (const ncclResult_t failed = read(comm, from, count * item_bytes(type), stream, &mine)) return failed;
  if (const ncclResult_t failed = exchange(comm, "broadcast", mine, &parts)) return failed;
  return write(comm, recv, parts[root].data(), parts[root].size());
}
ncclResult_t ncclAllGather(const void* send, void* recv, size_t count, ncclDataType_t type, ncclComm_t comm,
                           cudaStream_t stream) {
  Bytes mine;
  std::vector<Bytes> parts;
  if (const ncclResult_t failed = read(comm, send, count * item_bytes(type), stream, &mine)) return failed;
  if (const ncclResult_t failed = exchange(comm, "all gather", mine, &parts)) return failed;
  for (int rank = 0; rank < comm->ranks; ++rank) {
    char* to = static_cast<char*>(recv) + rank * mine.size();
    if (const ncclResult_t failed = write(comm, to, parts[rank].data(), mine.size())) return failed;
  }
  return kOk;
}

ncclResult_t ncclSend(const void* from, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                      cudaStream_t stream) {
  if (peer < 0 || peer >= comm->ranks) return kArgument;
  Move move{true, comm, peer};
  if (const ncclResult_t failed = read(comm, from, count * item_bytes(type), stream, &move.data)) return failed;
  if (depth == 0) return run({std::move(move)});
  grouped.push_back(std::move(move));
  return kOk;
}
ncclResult_t ncclRecv(void* to, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream) {
  if (peer < 0 || peer >= comm->ranks) return kArgument;
  {
    const OnDevice on(comm->device);
    if (standInCheckLaunch(stream) != cudaSuccess) return kCuda;
  }
  Move move{false, comm, peer, {}, to, count * item_bytes(type)};
  if (depth == 0) return run({std::move(move)});
  grouped.push_back(std::move(move));
  return kOk;
}
ncclResult_t ncclGroupStart() {
  ++depth;
  return kOk;
}
ncclResult_t ncclGroupEnd() {
  if (depth == 0) return kArgument;
  if (--depth != 0) return kOk;
  std::vector<Move> moves;
  moves.swap(grouped);
  return run(std::move(moves));
}
}
