// See cuda_runtime.h.
#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

struct Grid {
  void sync() const { emulator::Runner::here().wait(emulator::Wait::grid); }
};
inline Grid this_grid() { return {}; }

}  // namespace cooperative_groups
