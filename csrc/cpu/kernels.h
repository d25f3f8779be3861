// The passes over a tile on a CPU: what they take and return. This needs no header of PyTorch.
#pragma once

#include <cstdint>

#include "gather/tiling.h"
#include "step/adaptive.h"
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
  // Of `scaled`, the sweep with a diagonal that adapts; at least one of them. With both, w is updated by the new m
  // before its rounding; with `enters` alone, sums are taken of m as stored, those with v if `cross`.
  bool enters = false;   // g enters m, and the running means of elements
  bool updates = false;  // w is updated
  bool entered = false;  // m has them already, as stored: what is left of `enters` is the running means
};

// D⁻¹ of one tensor in a step (Scales in sofim_fused/backends/interface.py), in the type of its computation. It is a
// factor per row times a factor per column, or follows from each element's own running mean.
struct Scale {
  const void* rows = nullptr;
  const void* cols = nullptr;          // with kScalePadding more that may be read; nullptr: 1
  int64_t count = 1, inner = 1;        // of rows, and of elements of a row that lie together: see VarianceRow
  void* variance = nullptr;    // not nullptr: of each element
  float* variance_scales = nullptr;  // not nullptr: `variance` is codes of the roots, and these are their scales
  bool roots = false;                // `variance` is the roots, of the elements that the row's m has
  double beta2 = 0.0, eps = 0.0, root = 1.0;
};
constexpr int64_t kScalePadding = 16;

// How many numbers a tile's sums take, in the order of Sum. A sum that the pass does not compute has its place, which
// is not written: that of mw in dots without `weights`.
constexpr int sums_of_accumulate(const Mode& mode) { return mode.cross ? mode.weights ? kMW + 1 : kMG + 1 : kMM + 1; }
constexpr int sums_of_dots(const Mode& mode) { return mode.weights ? kWW + 1 : kGG + 1; }

// The sums of `scaled`, of one tile: Σm²/s, Σmv/s, and Σs where each element has its own s.
enum ScaledSum { kScaledMM, kScaledMG, kTrace };
constexpr int kScaledSums = kTrace + 1;

// One pass over elements [begin, begin + size) of a tensor, begin a multiple of kTile and size at most kTile. apply and
// commit write no sums. `scaled` is one kernel for the three sweeps accumulate_scaled, apply_scaled and commit_scaled.
using Kernel = void (*)(const Row& record, const Mode& mode, int64_t begin, int64_t size, double* sums);

// A part of a gradient's rows and columns, to sum squares over.
struct SquaresTile {
  const void* g;
  Type type;
  int64_t rows, columns;
  int64_t stride;    // elements from one row to the next
  int64_t readable;  // elements from g to the end of the tensor
  double* by_row;    // receives a sum for each row
  double* by_col;    // receives a sum for each column, and something in the next kScalePadding; nullptr: no sums
  bool prefetch;     // as Mode::prefetch
};

// Running means over rows or columns of one tensor.
struct Means {
  void* running;         // float64 if `wide`, else float32
  void* factors;         // of the same dtype, with room for kScalePadding more
  const double* totals;  // the sums of g² that enter them
  int64_t count;         // of means
  bool wide;
  double elements;  // that each is a mean of
  Mix mix;
};

// The passes for one instruction set.
struct Kernels {
  Kernel accumulate, apply, dots, commit, scaled;
  void (*squares)(const SquaresTile& tile);
  // Updates running means of rows, or one of a whole tensor; writes factors 1/s; returns Σs.
  double (*rows)(const Means& means);
  // Updates running means of columns; returns their sum.
  double (*columns)(const Means& means);
  // Writes the factors 1/s of columns from the mean of all of them; returns Σs.
  double (*shares)(const Means& means, double mean);
};

// The passes for the instruction set that kernels.cpp was compiled for.
const Kernels& kernels();

}  // namespace sofim
