// The threads of a CUDA launch as fibers of one host thread. They run in an order that is drawn anew every time round,
// some warps and blocks far behind others at times, and may be overtaken at any access to memory. What CUDA leaves
// undefined, and this takes for a mistake: threads of a warp at different warp operations, threads of a block at
// different barriers, or one that ends while others wait for it.
//
// Kernels are compiled with all that is in this header, so nothing of it is the scheduler's own.
#pragma once

#include <cstddef>
#include <cstdint>

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, gridDim, blockDim;  // of the fiber that runs

namespace emulator {

// What a test chooses.
struct Settings {
  int multiprocessors = 1;
  uint32_t seed = 0;
};
inline Settings settings;

struct Shape {
  unsigned blocks, threads;
  size_t shared_bytes;
  bool cooperative;
};
inline Shape last_shape{};

enum class End { kDone, kTrapped, kMistake };

// One launch, from its first thread to its last. Each of them makes the call.
End run(const Shape& shape, void (*call)(const void* kernel), const void* kernel);
// What was wrong with the last launch.
const char* mistake();

// For the fiber that runs.
[[noreturn]] void trap();
void* shared_memory();
void meet_block(const char* operation);
uint32_t arrive_at_grid();
void wait_for_grid(uint32_t arrival);
// What all threads of the warp, or of the block, have given; until they meet again.
const uint64_t* exchange_in_warp(unsigned lanes, uint64_t value, const char* operation);
const uint64_t* exchange_in_block(uint64_t value, const char* operation);

}  // namespace emulator
