// Runs the FP8 GEMMs' own code on the CPU: each thread of a cluster is a fiber, and a scheduler lets them run in an order
// that is drawn anew every time round, until all are done. If nobody can go on, that is a deadlock, and it says so.
#include "sm90_fp8_kernel.cuh"
#include "sm90_fp8_maps.cuh"
#include "sm90_fp8_tokens.cuh"

#include <cmath>

namespace emulator {
namespace {

constexpr size_t kStackBytes = 96 * 1024;

struct Work {
  void (*run)(const void* arguments, int rank);
  const void* arguments;
};
Work work;

void enter() {
  Fiber* mine = cluster->current;
  work.run(work.arguments, mine->rank);
  mine->done = true;
  cluster->progress = true;
  swapcontext(&mine->context, &cluster->scheduler);
}

// False if the threads wait for each other for ever.
bool run_cluster(int number, int threads) {
  for (int rank = 0; rank < 2; ++rank) {
    for (int thread = 0; thread < threads; ++thread) {
      Fiber& fiber = cluster->fibers.emplace_back();
      fiber.rank = rank;
      fiber.thread = thread;
    }
  }
  for (Fiber& fiber : cluster->fibers) {
    fiber.stack = std::make_unique<char[]>(kStackBytes);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  std::vector<Fiber*> waiting;
  for (Fiber& fiber : cluster->fibers) waiting.push_back(&fiber);
  std::mt19937 order(number + 1);
  while (!waiting.empty()) {
    std::shuffle(waiting.begin(), waiting.end(), order);
    cluster->progress = false;
    for (Fiber* fiber : waiting) {
      cluster->current = fiber;
      threadIdx.x = fiber->thread;
      blockIdx.x = 2 * number + fiber->rank;
      swapcontext(&cluster->scheduler, &fiber->context);
    }
    if (!cluster->progress && cluster->loads.empty()) return false;
    // About half of the loads that are under way arrive, in any order.
    std::vector<std::function<void()>> loads;
    loads.swap(cluster->loads);
    std::shuffle(loads.begin(), loads.end(), order);
    for (size_t i = 0; i < loads.size(); ++i) {
      if (order() % 2 == 0) {
        loads[i]();
      } else {
        cluster->loads.push_back(loads[i]);
      }
    }
    waiting.erase(std::remove_if(waiting.begin(), waiting.end(), [](Fiber* fiber) { return fiber->done; }),
                  waiting.end());
  }
  return true;
}

}  // namespace
}  // namespace emulator

namespace sonicmoe {
namespace {

using namespace sm90;

template <class Kind>
struct Arguments {
  const Fp8Gemm* problem;
  const Maps* maps;
  Shared<Kind>* shared[2];
};

template <class Kind>
void block(const void* given, int rank) {
  const auto& arguments = *static_cast<const Arguments<Kind>*>(given);
  run_block<Kind>(*arguments.problem, *arguments.maps, *arguments.shared[rank]);
}

template <class Kind>
const char* run(const Fp8Gemm& p) {
  Maps maps{};
  if (!make_maps(Kind(), p, maps)) return "refused a tensor map";
  gridDim.x = p.blocks / 2 * 2;
  for (int number = 0; number < p.blocks / 2; ++number) {
    emulator::Cluster mine;
    Arguments<Kind> arguments{&p, &maps, {}};
    for (int rank = 0; rank < 2; ++rank) {
      void* memory = std::aligned_alloc(1024, sizeof(Shared<Kind>));
      std::memset(memory, 0xFF, sizeof(Shared<Kind>));  // NaN in every format
      mine.shared[rank] = static_cast<uint8_t*>(memory);
      arguments.shared[rank] = static_cast<Shared<Kind>*>(memory);
    }
    emulator::cluster = &mine;
    emulator::work = {block<Kind>, &arguments};
    const bool done = emulator::run_cluster(number, kThreads);
    for (uint8_t* memory : mine.shared) std::free(memory);
    if (!done) return "deadlock";
  }
  return nullptr;
}

// Two blocks that know nothing of each other take a cluster's place.
template <Item kItem>
const char* run_tokens(const Fp8Tokens& p) {
  const int blocks = (p.n_blocks + kTokenWarps - 1) / kTokenWarps;
  if (blocks == 0 || p.width == 0) return "invalid argument";  // as a grid of nothing is
  for (blockIdx.y = 0; blockIdx.y < p.width / kTokenColumns; ++blockIdx.y) {
    for (int number = 0; number < (blocks + 1) / 2; ++number) {
      emulator::Cluster mine;
      emulator::cluster = &mine;
      emulator::work = {[](const void* given, int) { quantize_tokens_block<kItem>(*static_cast<const Fp8Tokens*>(given)); },
                        &p};
      if (!emulator::run_cluster(number, 32 * kTokenWarps)) return "deadlock";
    }
  }
  return nullptr;
}

// What bounds nothing is not compared.
template <template <bool> class Kind>
const char* run_clamped(const Fp8Gemm& p) {
  return std::isinf(p.clamp) ? run<Kind<false>>(p) : run<Kind<true>>(p);
}

}  // namespace

bool sm90::describe(CUtensorMap* map, const void* data, Item item, int64_t rows, int64_t columns, uint32_t box_rows,
                    int64_t apart) {
  const int64_t bytes = item_bytes(item);
  if (apart == 0) apart = columns;
  *map = {static_cast<uint8_t*>(const_cast<void*>(data)), bytes, rows, columns, apart, static_cast<int>(box_rows)};
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && apart * bytes % 16 == 0 && rows > 0 && box_rows <= 256;
}

const char* fp8_rows(const Fp8Gemm& p, void*) {
  return run_rows(p, [](auto kind, const Fp8Gemm& part) { return run<decltype(kind)>(part); });
}
const char* fp8_up(const Fp8Gemm& p, void*) { return run_clamped<UpKind>(p); }
const char* fp8_wgrad(const Fp8Gemm& p, void*) { return run<WgradKind>(p); }
const char* fp8_down_backward(const Fp8Gemm& p, void*) {
  return p.dt_scale == nullptr ? run_clamped<WideDownBackwardKind>(p) : run_clamped<DownBackwardKind>(p);
}
const char* fp8_tokens(const Fp8Tokens& p, const std::string& kind, void*) {
  if (kind == "bfloat16") return run_tokens<Item::kBfloat>(p);
  if (kind == "float16") return run_tokens<Item::kHalf>(p);
  return kind == "float32" ? run_tokens<Item::kFloat>(p) : run_tokens<Item::kByte>(p);
}

}  // namespace sonicmoe
