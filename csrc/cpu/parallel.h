// A pass over all tensors of a step, by several threads.
#pragma once

#include <vector>

#include "cpu/kernels.h"
#include "gather/tiling.h"
#include "step/solve.h"

namespace sofim {

// The instruction set's passes; set once, before anything else.
void use_kernels(const Kernels* kernels);

enum class Pass { accumulate, apply, dots, commit };

// Runs one pass over all tensors; returns its sums per tensor, none for apply and commit. `scratch` is memory for the
// sums of tiles. Throws std::runtime_error if no instruction set was chosen.
std::vector<Products> run_pass(Pass pass, const Row* rows, const Tiling& tiling, Mode mode,
                               std::vector<double>& scratch);

// Runs a pass's kernel over every tile. Each thread gets consecutive tiles with about the same number of elements, the
// same ones in each pass, and processes them in the mode's order: a second pass that runs backwards begins with what
// the pass before it has left in the cache. `sums` has room for `width` numbers per tile.
void sweep(Kernel kernel, const Row* rows, const Tiling& tiling, const Mode& mode, double* sums, int width);

}  // namespace sofim
