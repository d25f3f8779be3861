// One parallel region over all tiles of all tensors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu/kernels.h"

namespace sofim {

// The tensors of a step cut into tiles. Tiles are numbered through; those of a tensor are neighbours.
class Tiling {
 public:
  void clear();
  void add(int64_t numel);

  int64_t tiles() const { return first_.back(); }
  int64_t elements() const { return elements_.back(); }
  // The tiles of tensor i are [first(i), first(i + 1)).
  int64_t first(size_t i) const { return first_[i]; }
  // The first tile that begins at or after element `element` of all.
  int64_t tile_at(int64_t element) const;
  // The tensor that a tile belongs to.
  size_t tensor_of(int64_t tile) const;

 private:
  std::vector<int64_t> first_{0};
  std::vector<int64_t> elements_{0};
};

// Runs a pass over every tile. Threads get stretches of neighbouring tiles of about the same number of elements, the
// same ones in each pass; each thread takes its own in the mode's order, so that a second pass backwards meets first
// what the pass before it left in the cache. `sums` has room for `width` numbers per tile.
void sweep(Kernel kernel, const Row* records, const Tiling& tiling, const Mode& mode, double* sums, int width);

}  // namespace sofim
