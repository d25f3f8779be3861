#include "cpu/parallel.h"

#include <ATen/Parallel.h>

#include <algorithm>

namespace sofim {
namespace {

// Elements for which waking up another thread pays.
constexpr int64_t kGrain = 8192;

}  // namespace

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

void sweep(Kernel kernel, const Row* records, const Tiling& tiling, const Mode& mode, double* sums, int width) {
  if (tiling.tiles() == 0) return;
  const auto stretch = [&](int64_t begin, int64_t end) {
    if (begin >= end) return;
    const bool forwards = !mode.backwards;
    size_t tensor = tiling.tensor_of(forwards ? begin : end - 1);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t tile = forwards ? i : begin + end - 1 - i;
      while (tile >= tiling.first(tensor + 1)) ++tensor;
      while (tile < tiling.first(tensor)) --tensor;
      const Row& record = records[tensor];
      const int64_t start = (tile - tiling.first(tensor)) * kTile;
      kernel(record, mode, start, std::min(kTile, record.numel - start), sums + tile * width);
    }
  };
  const int64_t elements = tiling.elements();
  const int64_t parts = std::clamp<int64_t>(elements / kGrain, 1, at::get_num_threads());
  if (parts == 1) return stretch(0, tiling.tiles());
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    const auto boundary = [&](int64_t part) {
      return part == parts ? tiling.tiles() : tiling.tile_at(elements / parts * part);
    };
    stretch(boundary(begin), boundary(end));
  });
}

}  // namespace sofim
