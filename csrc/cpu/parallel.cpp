#include "cpu/parallel.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <stdexcept>

namespace sofim {
namespace {

// Elements that are worth waking up another thread for.
constexpr int64_t kGrain = 8192;

// From this many elements on, memory is prefetched. With fewer, that would fetch what another thread is writing.
constexpr int64_t kPrefetchFrom = 1 << 20;

const Kernels* used = nullptr;

Kernel kernel_of(Pass pass) {
  const Kernels& kernels = kernels_in_use();
  switch (pass) {
    case Pass::accumulate:
      return kernels.accumulate;
    case Pass::apply:
      return kernels.apply;
    case Pass::dots:
      return kernels.dots;
    case Pass::commit:
      break;
  }
  return kernels.commit;
}

// Each thread gets consecutive tiles of tensors [from, to) with about the same number of elements.
template <class Call>
void over_tiles(const Tiling& tiling, size_t from, size_t to, bool backwards, const Call& call) {
  const int64_t first = tiling.first(from), last = tiling.first(to);
  if (first == last) return;
  const auto stretch = [&](int64_t begin, int64_t end) {
    if (begin >= end) return;
    const bool forwards = !backwards;
    size_t tensor = tiling.tensor_of(forwards ? begin : end - 1);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t tile = forwards ? i : begin + end - 1 - i;
      while (tile >= tiling.first(tensor + 1)) ++tensor;
      while (tile < tiling.first(tensor)) --tensor;
      call(tensor, tile, (tile - tiling.first(tensor)) * kTile);
    }
  };
  const int64_t before = tiling.before(from), elements = tiling.before(to) - before, parts = parts_of(elements);
  if (parts == 1) return stretch(first, last);
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    const auto boundary = [&](int64_t part) {
      return part == parts ? last : tiling.tile_at(before + elements / parts * part);
    };
    stretch(boundary(begin), boundary(end));
  });
}

}  // namespace

void use_kernels(const Kernels* kernels) { used = kernels; }

const Kernels& kernels_in_use() {
  if (used == nullptr) {
    throw std::runtime_error(
        "sofim_fused: no instruction set was chosen; import sofim_fused before its operators");
  }
  return *used;
}

int64_t parts_of(int64_t elements) { return std::clamp<int64_t>(elements / kGrain, 1, at::get_num_threads()); }

bool is_large(const Tiling& tiling) { return tiling.elements() >= kPrefetchFrom; }

std::vector<Products> run_pass(Pass pass, const Row* rows, const Tiling& tiling, Mode mode,
                               std::vector<double>& scratch) {
  mode.prefetch = is_large(tiling);
  mode.backwards = pass == Pass::apply || pass == Pass::commit;
  const bool dots = pass == Pass::dots, cross = dots || mode.cross;
  const int width = dots ? sums_of_dots(mode) : pass == Pass::accumulate ? sums_of_accumulate(mode) : 0;
  scratch.resize(tiling.tiles() * width);
  sweep(kernel_of(pass), rows, tiling, mode, scratch.data(), width);
  if (width == 0) return {};
  std::vector<Products> products(tiling.size());
  for (size_t i = 0; i < tiling.size(); ++i) {
    Products& p = products[i];
    for (int64_t tile = tiling.first(i); tile < tiling.first(i + 1); ++tile) {
      const double* sums = scratch.data() + tile * width;
      p.mm += sums[kMM];
      if (cross) p.mg += sums[kMG];
      if (cross && mode.weights) p.mw += sums[kMW];
      if (!dots) continue;
      p.gg += sums[kGG];
      if (!mode.weights) continue;
      p.gw += sums[kGW];
      p.ww += sums[kWW];
    }
  }
  return products;
}

void sweep(Kernel kernel, const Row* rows, const Tiling& tiling, const Mode& mode, double* sums, int width) {
  over_tiles(tiling, 0, tiling.size(), mode.backwards, [&](size_t tensor, int64_t tile, int64_t start) {
    const Row& row = rows[tensor];
    kernel(row, mode, start, std::min(kTile, row.numel - start), sums + tile * width);
  });
}

void for_each_tile(const Tiling& tiling, size_t from, size_t to, bool backwards, const TileFunction& call) {
  over_tiles(tiling, from, to, backwards, [&](size_t tensor, int64_t tile, int64_t begin) {
    call(tensor, tile, begin, std::min(kTile, tiling.numel(tensor) - begin));
  });
}

}  // namespace sofim
