// One parallel region over all tiles of all tensors.
#pragma once

#include "cpu/kernels.h"
#include "gather/tiling.h"

namespace sofim {

// Runs a pass over every tile. Threads get stretches of neighbouring tiles of about the same number of elements, the
// same ones in each pass; each thread takes its own in the mode's order, so that a second pass backwards meets first
// what the pass before it left in the cache. `sums` has room for `width` numbers per tile.
void sweep(Kernel kernel, const Row* records, const Tiling& tiling, const Mode& mode, double* sums, int width);

}  // namespace sofim
