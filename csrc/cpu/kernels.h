// The passes over a tile on a CPU: what they take and return. This needs no header of PyTorch.
#pragma once

#include <cstdint>

#include "gather/tiling.h"
#include "step/tensor_row.h"

namespace sofim {

// The options of a pass, the same for every tensor.
struct Mode {
  bool weights = false;   // some decay.w is not zero: accumulate and dots read w
  bool cross = false;     // accumulate also sums m·g, and m·w if `weights`
  bool gradient = false;  // the update of w has the term update.gradient·v (accumulate: and none of m)
  bool scaled = false;    // commit: v = gain·g, else v = g
  double gain = 1.0;
  bool prefetch = false;   // the elements are too many for a core's caches
  bool backwards = false;  // each thread processes its tiles in reverse order
};

// How many numbers a tile's sums take, in the order of Sum. A sum that the pass does not compute has its place, which
// is not written: that of mw in dots without `weights`.
constexpr int sums_of_accumulate(const Mode& mode) { return mode.cross ? mode.weights ? kMW + 1 : kMG + 1 : kMM + 1; }
constexpr int sums_of_dots(const Mode& mode) { return mode.weights ? kWW + 1 : kGG + 1; }

// One pass over elements [begin, begin + size) of a tensor, begin a multiple of kTile and size at most kTile. apply and
// commit write no sums.
using Kernel = void (*)(const Row& record, const Mode& mode, int64_t begin, int64_t size, double* sums);

// The passes for one instruction set.
struct Kernels {
  Kernel accumulate, apply, dots, commit;
};

// The passes for the instruction set that kernels.cpp was compiled for.
const Kernels& kernels();

}  // namespace sofim
