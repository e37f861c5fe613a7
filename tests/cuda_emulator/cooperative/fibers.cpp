// The scheduler: fibers take turns until nobody can go on. Each is started once by setcontext; from then on they change
// places by _setjmp and _longjmp, which leave the signal mask alone, so that a turn costs no system call.
#include "fibers.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace emulator {
namespace {

// No power of two: the caches keep few lines of one place in many stacks.
constexpr size_t kStackBytes = 64 * 1024 + 832;
constexpr size_t kCanaryBytes = 1024;
constexpr uint8_t kUndefined = 0xFF, kCanary = 0x5C;
constexpr unsigned kLanes = 32, kAllLanes = 0xffffffffu;
// Of a launch that is not cooperative: blocks that run beside each other.
constexpr size_t kBlocksAtOnce = 4;
// A thread is overtaken at one of so many accesses to memory.
constexpr unsigned kAccesses = 64;
constexpr const char* kGridArrive = "barrier_arrive";
constexpr const char* kGridWait = "barrier_wait";

struct Fiber;

// Where all threads of a warp or a block meet, or the blocks of a grid, again and again.
struct Meeting {
  explicit Meeting(int size = 0) : size(size), given{std::vector<uint64_t>(size), std::vector<uint64_t>(size)} {}
  int size, arrived = 0;
  uint32_t round = 0;
  const char* operation = nullptr;  // of those who have arrived
  std::vector<Fiber*> waiting;
  std::vector<uint64_t> given[2];  // by members, in even and in odd rounds
};

struct Warp {
  Meeting meeting{kLanes};
  int rank = 0;
};

// A block's shared memory, canaries on both sides.
class SharedMemory {
 public:
  explicit SharedMemory(size_t bytes) : bytes_(bytes) {
    const size_t all = (bytes + 3 * kCanaryBytes - 1) / kCanaryBytes * kCanaryBytes;
    memory_.reset(static_cast<uint8_t*>(std::aligned_alloc(kCanaryBytes, all)));
    std::memset(memory_.get(), kCanary, all);
    std::memset(begin(), kUndefined, bytes);
  }
  uint8_t* begin() const { return memory_.get() + kCanaryBytes; }
  bool intact() const {
    const uint8_t *front = memory_.get(), *behind = begin() + bytes_;
    const auto good = [](uint8_t byte) { return byte == kCanary; };
    return std::all_of(front, front + kCanaryBytes, good) && std::all_of(behind, behind + kCanaryBytes, good);
  }

 private:
  size_t bytes_;
  std::unique_ptr<uint8_t, decltype(&std::free)> memory_{nullptr, &std::free};
};

struct Block {
  Block(unsigned number, const Shape& shape)
      : number(number),
        meeting(static_cast<int>(shape.threads)),
        warps((shape.threads + kLanes - 1) / kLanes),
        shared(shape.shared_bytes) {}
  unsigned number;
  Meeting meeting;
  std::vector<Warp> warps;
  SharedMemory shared;
};

struct Fiber {
  Block* block;
  unsigned thread;
  bool started = false, done = false;
  jmp_buf place;
  const char* waits_at = nullptr;
  uint32_t grid_arrivals = 0, grid_waits = 0;
  Warp& warp() const { return block->warps[thread / kLanes]; }
};

// Blocks that run beside each other, all of them in a cooperative launch.
struct Wave {
  const Shape& shape;
  void (*call)(const void* kernel);
  const void* kernel;
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;
  std::vector<Fiber*> ready;
  Meeting grid;
  bool trapped = false;
};
Wave* wave = nullptr;
Fiber* current = nullptr;  // null while the scheduler runs
jmp_buf scheduler;
std::string wrong;  // of the launch; the first such thing
std::minstd_rand when_overtaken;
unsigned accesses_left = 0;

// Stacks are kept: a page that was touched once costs nothing more.
char* stack(size_t number) {
  static std::vector<std::unique_ptr<char[]>> stacks;
  while (stacks.size() <= number) stacks.emplace_back(new char[kStackBytes]);
  return stacks[number].get();
}

[[noreturn]] void leave() { _longjmp(scheduler, 1); }

[[gnu::noinline]] void pause() {
  if (_setjmp(current->place) == 0) leave();
}

void enter() {
  wave->call(wave->kernel);
  current->done = true;
  leave();
}

[[gnu::noinline]] void resume(Fiber& fiber) {
  if (_setjmp(scheduler) != 0) {
    current = nullptr;
    return;
  }
  current = &fiber;
  threadIdx.x = fiber.thread;
  blockIdx.x = fiber.block->number;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  ucontext_t start;
  getcontext(&start);
  start.uc_stack.ss_sp = stack(&fiber - wave->fibers.data());
  start.uc_stack.ss_size = kStackBytes;
  start.uc_link = nullptr;
  makecontext(&start, enter, 0);
  setcontext(&start);
}

std::string place(const Fiber& fiber) {
  return "block " + std::to_string(fiber.block->number) + " thread " + std::to_string(fiber.thread);
}

// The launch is over; no thread of it runs again.
[[noreturn]] void report(const std::string& what) {
  wrong = what;
  leave();
}

uint32_t arrive(Meeting& meeting, const char* operation) {
  if (meeting.arrived > 0 && std::strcmp(meeting.operation, operation) != 0) {
    report(place(*current) + " is at " + operation + " while others are at " + meeting.operation);
  }
  meeting.operation = operation;
  const uint32_t round = meeting.round;
  if (++meeting.arrived == meeting.size) {
    meeting.arrived = 0;
    ++meeting.round;
    wave->ready.insert(wave->ready.end(), meeting.waiting.begin(), meeting.waiting.end());
    meeting.waiting.clear();
  }
  return round;
}

void wait_for(Meeting& meeting, uint32_t round, const char* operation) {
  if (meeting.round != round) return;
  meeting.waiting.push_back(current);
  current->waits_at = operation;
  pause();
}

void meet(Meeting& meeting, const char* operation) { wait_for(meeting, arrive(meeting, operation), operation); }

const uint64_t* exchange(Meeting& meeting, unsigned member, uint64_t value, const char* operation) {
  std::vector<uint64_t>& given = meeting.given[meeting.round % 2];
  given[member] = value;
  meet(meeting, operation);
  return given.data();
}

// Who waits where, for ever.
std::string deadlock() {
  std::map<std::string, std::vector<const Fiber*>> at;
  for (const Fiber& fiber : wave->fibers) at[fiber.done ? "the end" : fiber.waits_at].push_back(&fiber);
  std::string text = "deadlock:";
  for (const auto& [where, fibers] : at) {
    text += (text.back() == ':' ? " " : ", ") + std::to_string(fibers.size()) + " threads at " + where + " (" +
            place(*fibers.front()) + ")";
  }
  return text;
}

// Of those who can go on, the warps of the first rank have a turn each; ranks are drawn anew every now and then. So a
// block or a warp can be far behind others for as long as these do not wait for it.
void take_turns(std::mt19937& order) {
  std::vector<Fiber*>& ready = wave->ready;
  std::vector<Fiber*> turn;
  for (int rounds = 0; !ready.empty(); --rounds) {
    if (rounds == 0) {
      rounds = 1 << order() % 8;
      for (Block& block : wave->blocks) {
        const int of_block = order() % 4;
        for (Warp& warp : block.warps) warp.rank = 2 * of_block + (order() % 4 == 0);
      }
    }
    int first = ready.front()->warp().rank;
    for (const Fiber* fiber : ready) first = std::min(first, fiber->warp().rank);
    const auto has_turn = [&](const Fiber* fiber) { return fiber->warp().rank == first; };
    const auto others = std::partition(ready.begin(), ready.end(), has_turn);
    turn.assign(ready.begin(), others);
    ready.erase(ready.begin(), others);
    std::shuffle(turn.begin(), turn.end(), order);
    for (Fiber* fiber : turn) {
      resume(*fiber);
      if (!wrong.empty()) return;
    }
  }
}

End run_wave(Wave& mine, std::mt19937& order) {
  wave = &mine;
  for (Block& block : mine.blocks) {
    for (unsigned thread = 0; thread < mine.shape.threads; ++thread) mine.fibers.push_back({&block, thread});
  }
  for (Fiber& fiber : mine.fibers) mine.ready.push_back(&fiber);
  take_turns(order);
  for (const Block& block : mine.blocks) {
    if (wrong.empty() && !block.shared.intact()) {
      wrong = "block " + std::to_string(block.number) + " wrote outside of its " +
              std::to_string(mine.shape.shared_bytes) + " bytes of shared memory";
    }
  }
  // Others may go on for a while after a trap, and in vain wait for who has met it.
  const bool all_done = std::all_of(mine.fibers.begin(), mine.fibers.end(), [](const Fiber& f) { return f.done; });
  if (wrong.empty() && !mine.trapped && !all_done) wrong = deadlock();
  wave = nullptr;
  return !wrong.empty() ? End::kMistake : mine.trapped ? End::kTrapped : End::kDone;
}

// At any access a thread may be overtaken by others.
void access() {
  if (current == nullptr || accesses_left-- > 0) return;
  accesses_left = when_overtaken() % (2 * kAccesses);
  wave->ready.push_back(current);
  pause();
}

}  // namespace

End run(const Shape& shape, void (*call)(const void* kernel), const void* kernel) {
  last_shape = shape;
  wrong.clear();
  gridDim.x = shape.blocks;
  blockDim.x = shape.threads;
  std::mt19937 order(settings.seed);
  when_overtaken.seed(settings.seed + 1);
  std::vector<unsigned> numbers(shape.blocks);
  for (unsigned i = 0; i < shape.blocks; ++i) numbers[i] = i;
  std::shuffle(numbers.begin(), numbers.end(), order);
  End end = End::kDone;
  for (size_t first = 0; first < numbers.size() && end == End::kDone;) {
    const size_t blocks = shape.cooperative ? numbers.size() : std::min(kBlocksAtOnce, numbers.size() - first);
    Wave mine{shape, call, kernel, {}, {}, {}, Meeting(static_cast<int>(blocks))};
    for (const size_t upto = first + blocks; first < upto; ++first) mine.blocks.emplace_back(numbers[first], shape);
    end = run_wave(mine, order);
  }
  std::fflush(stdout);  // what the kernel printed
  return end;
}

const char* mistake() { return wrong.c_str(); }

void trap() {
  wave->trapped = true;
  current->done = true;
  leave();
}

void* shared_memory() { return current->block->shared.begin(); }

void meet_block(const char* operation) { meet(current->block->meeting, operation); }

const uint64_t* exchange_in_warp(unsigned lanes, uint64_t value, const char* operation) {
  if (lanes != kAllLanes) report(place(*current) + " is at " + operation + " of some lanes: only all can meet here");
  return exchange(current->warp().meeting, current->thread % kLanes, value, operation);
}

const uint64_t* exchange_in_block(uint64_t value, const char* operation) {
  return exchange(current->block->meeting, current->thread, value, operation);
}

// As in CUDA, a block meets before its first thread arrives for it, and after that thread has waited.
uint32_t arrive_at_grid() {
  if (!wave->shape.cooperative) report("the blocks meet, but the launch is not cooperative");
  if (current->grid_arrivals != current->grid_waits) report(place(*current) + " arrives twice without a wait");
  meet_block(kGridArrive);
  if (current->thread == 0) arrive(wave->grid, kGridArrive);
  return ++current->grid_arrivals;
}

void wait_for_grid(uint32_t arrival) {
  if (arrival != current->grid_arrivals || arrival == current->grid_waits) {
    report(place(*current) + " waits for the grid without its last arrival");
  }
  ++current->grid_waits;
  if (current->thread == 0) wait_for(wave->grid, arrival - 1, kGridWait);
  meet_block(kGridWait);
}

}  // namespace emulator

// What kernels call before each access: they are compiled for the thread sanitizer, whose own library is left out.
#define ACCESS(kind) \
  extern "C" void __tsan_##kind(void*) { emulator::access(); }
#define ACCESSES(bytes)                                                        \
  ACCESS(read##bytes) ACCESS(write##bytes) ACCESS(unaligned_read##bytes) ACCESS(unaligned_write##bytes)
ACCESS(read1)
ACCESS(write1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
extern "C" void __tsan_read_range(void*, size_t) { emulator::access(); }
extern "C" void __tsan_write_range(void*, size_t) { emulator::access(); }
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit(void*) {}
