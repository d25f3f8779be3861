// A pass over all tensors of a step, by several threads.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "cpu/kernels.h"
#include "gather/tiling.h"
#include "step/solve.h"

namespace sofim {

// The instruction set's passes; set once, before anything else.
void use_kernels(const Kernels* kernels);
// Throws std::runtime_error if none was set.
const Kernels& kernels_in_use();

enum class Pass { accumulate, apply, dots, commit };

// Runs one pass over all tensors; returns its sums per tensor, none for apply and commit. `scratch` is memory for the
// sums of tiles. Throws std::runtime_error if no instruction set was chosen.
std::vector<Products> run_pass(Pass pass, const Row* rows, const Tiling& tiling, Mode mode,
                               std::vector<double>& scratch);

// Runs a pass's kernel over every tile. Each thread gets consecutive tiles with about the same number of elements, the
// same ones in each pass, and processes them in the mode's order: a second pass that runs backwards begins with what
// the pass before it has left in the cache. `sums` has room for `width` numbers per tile.
void sweep(Kernel kernel, const Row* rows, const Tiling& tiling, const Mode& mode, double* sums, int width);

// The same for tensors [from, to), with a function of the tensor, the tile's number, its first element in the tensor, and
// its size.
using TileFunction = std::function<void(size_t tensor, int64_t tile, int64_t begin, int64_t size)>;
void for_each_tile(const Tiling& tiling, size_t from, size_t to, bool backwards, const TileFunction& call);

// Among how many threads so many elements are divided.
int64_t parts_of(int64_t elements);
// Whether a step's tensors are too many for a core's caches, so that memory is prefetched.
bool is_large(const Tiling& tiling);

}  // namespace sofim
