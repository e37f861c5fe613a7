// Takes the place of CUDA's header of this name: the grid, whose blocks meet.
#pragma once

#include "fibers.h"

namespace cooperative_groups {

class grid_group {
 public:
  // The number of this thread's arrivals; 0 is none.
  struct arrival_token {
    uint32_t number = 0;
  };
  arrival_token barrier_arrive() const { return {emulator::arrive_at_grid()}; }
  void barrier_wait(arrival_token&& token) const { emulator::wait_for_grid(token.number); }
  void sync() const { barrier_wait(barrier_arrive()); }
};

inline grid_group this_grid() { return {}; }

}  // namespace cooperative_groups
