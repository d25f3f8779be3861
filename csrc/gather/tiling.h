// The tensors of a step cut into tiles, for the passes on a CPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace sofim {

// Elements that are summed in one go. A tile never spans two tensors, and its place in a tensor never changes, so that
// sums do not depend on the number of threads.
constexpr int64_t kTile = 32768;

// Tiles are numbered from 0 over all tensors; those of one tensor are consecutive.
class Tiling {
 public:
  void clear();
  void add(int64_t numel);

  // The number of tensors.
  size_t size() const { return first_.size() - 1; }
  int64_t tiles() const { return first_.back(); }
  int64_t elements() const { return elements_.back(); }
  int64_t numel(size_t i) const { return elements_[i + 1] - elements_[i]; }
  // The elements of all tensors before tensor i.
  int64_t before(size_t i) const { return elements_[i]; }
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

}  // namespace sofim
