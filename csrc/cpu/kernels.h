// The passes over a tile on a CPU: what they take and return, without a header of PyTorch's.
#pragma once

#include <cstdint>

#include "gather/tiling.h"
#include "step/tensor_row.h"

namespace sofim {

// What holds for every tensor of a pass.
struct Mode {
  bool weights = false;   // some decay.w is not zero: accumulate and dots read w
  bool cross = false;     // accumulate also sums m·g, and m·w if `weights`
  bool gradient = false;  // w takes the term update.gradient·v (in accumulate: and no other)
  bool scaled = false;    // commit: v = gain·g, else v = g
  double gain = 1.0;
  bool prefetch = false;        // too many elements for a core's caches
  bool backwards = false;  // the order in which a thread takes its tiles
};

// How many places a tile's sums take, in the order of Sum. A pass does not write the place of a sum that it does not
// take: dots that of mw, without `weights`.
constexpr int sums_of_accumulate(const Mode& mode) { return mode.cross ? mode.weights ? kMW + 1 : kMG + 1 : kMM + 1; }
constexpr int sums_of_dots(const Mode& mode) { return mode.weights ? kWW + 1 : kGG + 1; }

// One pass over elements [begin, begin + size) of a tensor, begin a multiple of kTile and size at most kTile. apply and
// commit write no sums.
using Kernel = void (*)(const Row& record, const Mode& mode, int64_t begin, int64_t size, double* sums);

// The passes for one instruction set.
struct Kernels {
  Kernel accumulate, apply, dots, commit;
};

// Those of the instruction set that kernels.cpp was compiled for.
const Kernels& kernels();

}  // namespace sofim
