#include "gather/tiling.h"

#include <algorithm>

namespace sofim {

void Tiling::clear() {
  first_.resize(1);
  elements_.resize(1);
}

void Tiling::add(int64_t numel) {
  first_.push_back(first_.back() + (numel + kTile - 1) / kTile);
  elements_.push_back(elements_.back() + numel);
}

int64_t Tiling::tile_at(int64_t element) const {
  if (element >= elements()) return tiles();
  const size_t i = std::upper_bound(elements_.begin(), elements_.end(), element) - elements_.begin() - 1;
  return first_[i] + (element - elements_[i] + kTile - 1) / kTile;
}

size_t Tiling::tensor_of(int64_t tile) const {
  return std::upper_bound(first_.begin(), first_.end(), tile) - first_.begin() - 1;
}

}  // namespace sofim
