#include "cpu/parallel.h"

#include <ATen/Parallel.h>

#include <algorithm>

namespace sofim {
namespace {

// Elements for which waking up another thread pays.
constexpr int64_t kGrain = 8192;

}  // namespace

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
