#include "cpu/adaptive.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <utility>

namespace sofim {
namespace {

// The size of a tile whose squares are summed, and its columns where these have sums of their own: few enough for a
// core's nearest cache, and enough for memory to be read in order.
constexpr int64_t kSquares = 131072;
constexpr int64_t kStrip = 3072;
// Rows and columns that are worth waking up another thread for.
constexpr size_t kFactorGrain = 4096;
// Each thread sums the squares of so many elements before its sweep over them begins: few enough to be read again from
// its own cache, and enough for the threads' waiting for each other not to matter.
constexpr int64_t kBatch = 1 << 18;

// Adds `count` vectors of n numbers to the first one.
void add_up(double* at, int64_t n, int64_t count) {
  for (int64_t k = 1; k < count; ++k) {
    const double* const more = at + k * n;
    for (int64_t i = 0; i < n; ++i) at[i] += more[i];
  }
}

double elements(int64_t count) { return static_cast<double>(std::max<int64_t>(count, 1)); }

}  // namespace

void AdaptiveSweeps::begin(Row* rows, const VarianceRow* variances, const Tiling& tiling, const Mix* mixes) {
  rows_ = rows;
  variances_ = variances;
  tiling_ = &tiling;
  mixes_ = mixes;
  gain_ = 1.0;
  has_factors_ = false;
  const size_t n = tiling.size();
  scales_.resize(n);
  traces_.assign(n, 0.0);
  squared_.clear();
  grids_.clear();
  sums_at_.clear();
  tiles_.clear();
  for (size_t i = 0; i < n; ++i) {
    const VarianceRow& variance = variances[i];
    Scale& scale = scales_[i] = Scale();
    scale.count = variance.count;
    scale.inner = variance.inner;
    if (variance.by_element) {
      scale.variance = variance.whole;
      scale.variance_scales = variance.scales;
      scale.beta2 = mixes[i].beta2;
      scale.eps = mixes[i].eps;
      scale.root = mixes[i].root_of_correction;
    }
    rows[i].scale = &scale;
  }
}

double AdaptiveSweeps::squares() {
  for (size_t i = 0; i < tiling_->size(); ++i) add_grid(i);
  place_sums();
  sum_squares(0, tiles_.size());
  double sum = 0.0;
  for (size_t i = 0; i < squared_.size(); ++i) sum += sum_of(i);
  return sum;
}

double AdaptiveSweeps::sum_of(size_t i) const {
  const double* row = sums_.data() + sums_at_[i];
  double total = 0.0;
  for (size_t place = 0; place < grids_[i].row_places(); ++place) total += row[place];
  return total;
}

void AdaptiveSweeps::take_factors(const double* traces) {
  const size_t n = tiling_->size();
  size_t places = 0;
  factors_at_.clear();
  for (size_t i = 0; i < n; ++i) {
    factors_at_.push_back(places);
    places += factors_of(i);
  }
  factors_.resize(places);
  for (size_t i = 0; i < n; ++i) {
    const VarianceRow& variance = variances_[i];
    if (variance.by_element) continue;
    const size_t size = rows_[i].w_type == Type::float64 ? 8 : 4, rows = static_cast<size_t>(variance.count) * size;
    char* const factors = reinterpret_cast<char*>(factors_.data() + factors_at_[i]);
    memcpy(factors, variance.rows == nullptr ? variance.whole : variance.rows, rows);
    scales_[i].rows = factors;
    traces_[i] = traces[i];
    if (variance.cols == nullptr) continue;
    memcpy(factors + rows, variance.cols, static_cast<size_t>(variance.columns) * size);
    scales_[i].cols = factors + rows;
  }
  has_factors_ = true;
}

std::vector<ScaledProducts> AdaptiveSweeps::enter(Mode mode) {
  const size_t n = tiling_->size();
  const bool are_squared = n > 0 && squared_.size() == n, in_one_go = are_squared || has_factors_;
  batches_.assign(1, {});
  if (!in_one_go) {
    const int64_t largest = kBatch * at::get_num_threads();
    for (size_t i = 0; i < n; ++i) {
      if (variances_[i].by_element || is_small(i)) continue;
      Batch& last = batches_.back();
      if (last.elements > 0 && last.elements + rows_[i].numel > largest) {
        last.tensors = i;
        batches_.push_back({});
      }
      add_grid(i);
      Batch& batch = batches_.back();
      batch.elements += rows_[i].numel;
      batch.squared = squared_.size();
      batch.tiles = tiles_.size();
    }
    place_sums();
  }
  batches_.back().tensors = n;
  // Factors are kept if they are used outside of the thread that computes them.
  std::vector<size_t>& kept = factors_at_;
  if (!has_factors_) {
    kept.assign(n, 0);
    size_t places = 0;
    const auto keep = [&](size_t i) {
      kept[i] = places;
      places += factors_of(i);
    };
    if (mode.updates) {
      for (const size_t i : squared_) keep(i);
    } else {
      for (size_t i = 0; i < n; ++i) keep(i);
    }
    factors_.resize(places);
  }
  mode.enters = true;
  mode.prefetch = is_large(*tiling_);
  mode.backwards = true;
  mode.scaled = gain_ != 1.0;
  mode.gain = gain_;
  const Kernels& kernels = kernels_in_use();
  const int width = mode.updates ? 0 : kScaledSums;
  scratch_.resize(static_cast<size_t>(tiling_->tiles() * width));
  if (are_squared) adapt(0, n);
  Batch before;
  for (const Batch& batch : batches_) {
    sum_squares(before.tiles, batch.tiles);
    adapt(before.squared, batch.squared);
    const auto sweep = [&](size_t i, int64_t tile, int64_t begin, int64_t size) {
      double* const sums = scratch_.data() + tile * width;
      if (in_one_go || variances_[i].by_element || !is_small(i)) {
        return kernels.scaled(rows_[i], mode, begin, size, sums);
      }
      static thread_local std::vector<double> memory;
      const Grid grid = grid_of(i);
      memory.resize(std::max(memory.size(), grid.places() + factors_of(i)));
      for (int64_t outer = 0; outer < grid.outer; ++outer) sum_squares(i, grid, {0, outer, 0, 0, 0}, memory.data());
      void* const factors = mode.updates ? memory.data() + grid.places() : factors_.data() + kept[i];
      traces_[i] = adapt(i, grid, memory.data(), factors);
      kernels.scaled(rows_[i], mode, begin, size, sums);
    };
    for_each_tile(*tiling_, before.tensors, batch.tensors, mode.backwards, sweep);
    before = batch;
  }
  std::vector<ScaledProducts> products(mode.updates ? 0 : n);
  for (size_t i = 0; i < products.size(); ++i) {
    ScaledProducts& p = products[i];
    p.trace = traces_[i];
    for (int64_t tile = tiling_->first(i); tile < tiling_->first(i + 1); ++tile) {
      const double* sums = scratch_.data() + tile * width;
      p.mm += sums[kScaledMM];
      if (mode.cross) p.mg += sums[kScaledMG];
      if (variances_[i].by_element) p.trace += sums[kTrace];
    }
  }
  return products;
}

void AdaptiveSweeps::apply(Mode mode) {
  mode.updates = true;
  mode.prefetch = is_large(*tiling_);
  mode.backwards = batches_.size() > 1;  // begins with what enter() has left in the cache
  mode.scaled = gain_ != 1.0;
  mode.gain = gain_;
  sweep(kernels_in_use().scaled, rows_, *tiling_, mode, nullptr, 0);
}

bool AdaptiveSweeps::is_small(size_t i) const { return rows_[i].numel > 0 && rows_[i].numel <= kTile; }

size_t AdaptiveSweeps::factors_of(size_t i) const {
  const VarianceRow& variance = variances_[i];
  const int64_t count = variance.count + (variance.cols == nullptr ? 0 : variance.columns) + kScalePadding;
  return static_cast<size_t>(rows_[i].w_type == Type::float64 ? count : (count + 1) / 2);
}

AdaptiveSweeps::Grid AdaptiveSweeps::grid_of(size_t i) const {
  const VarianceRow& variance = variances_[i];
  const int64_t numel = rows_[i].numel;
  Grid grid;
  grid.rows = variance.count;
  grid.inner = variance.inner;
  grid.by_column = variance.cols != nullptr;
  if (grid.inner == 1 && variance.count > 1) {
    grid.swapped = grid.by_column = true;
    grid.rows = variance.columns;
    grid.inner = variance.count;
  } else if (grid.inner > 0) {
    grid.outer = variance.columns / grid.inner;
  }
  grid.band = grid.rows;
  grid.strip = grid.inner;
  if (numel <= kSquares) return grid;
  // Strips of about the same width, whole vectors, so that their sums do not overlap.
  const int64_t widest = grid.by_column ? kStrip : std::max(kStrip, kSquares / grid.rows);
  const auto pieces = [&](int64_t width) { return (grid.inner + width - 1) / width; };
  grid.strip = (grid.inner + pieces(widest) - 1) / pieces(widest);
  grid.strip = std::min(grid.inner, (grid.strip + kScalePadding - 1) / kScalePadding * kScalePadding);
  grid.strips = pieces(grid.strip);
  grid.band = std::max<int64_t>(kSquares / grid.strip, 1);
  grid.bands = (grid.rows + grid.band - 1) / grid.band;
  return grid;
}

void AdaptiveSweeps::add_grid(size_t i) {
  const Grid grid = grid_of(i);
  const size_t place = grids_.size();
  int64_t before = 0;
  if (!tiles_.empty()) {
    const Grid& last = grids_[tiles_.back().place];
    before = tiles_.back().before + last.band * last.strip;
  }
  for (int64_t outer = 0; outer < grid.outer; ++outer) {
    for (int64_t band = 0; band < grid.bands; ++band) {
      for (int64_t strip = 0; strip < grid.strips; ++strip) {
        tiles_.push_back({place, outer, band, strip, before});
        before += grid.band * grid.strip;
      }
    }
  }
  sums_at_.push_back(place == 0 ? 0 : sums_at_.back() + grids_.back().places());
  squared_.push_back(i);
  grids_.push_back(grid);
}

void AdaptiveSweeps::place_sums() {
  if (!squared_.empty()) sums_.resize(sums_at_.back() + grids_.back().places());
}

void AdaptiveSweeps::sum_squares(size_t first, size_t last) {
  if (first == last) return;
  const Tile& end_tile = tiles_[last - 1];
  const Grid& end_grid = grids_[end_tile.place];
  const int64_t before = tiles_[first].before;
  const int64_t elements = end_tile.before + end_grid.band * end_grid.strip - before;
  const int64_t parts = parts_of(elements);
  const auto run = [&](int64_t begin, int64_t end) {
    const auto from = tiles_.begin() + static_cast<ptrdiff_t>(first);
    const auto to = tiles_.begin() + static_cast<ptrdiff_t>(last);
    const auto boundary = [&](int64_t part) {
      if (part == parts) return to;
      return std::lower_bound(from, to, before + elements / parts * part,
                              [](const Tile& tile, int64_t element) { return tile.before < element; });
    };
    for (auto tile = boundary(begin); tile != boundary(end); ++tile) {
      const size_t k = tile->place;
      sum_squares(squared_[k], grids_[k], *tile, sums_.data() + sums_at_[k]);
    }
  };
  if (parts == 1) return run(0, 1);
  at::parallel_for(0, parts, 1, run);
}

void AdaptiveSweeps::sum_squares(size_t i, const Grid& grid, const Tile& tile, double* sums) const {
  const Row& row = rows_[i];
  const int64_t first = tile.band * grid.band, column = tile.strip * grid.strip;
  const int64_t at = (tile.outer * grid.rows + first) * grid.inner + column;
  const int64_t bytes = row.g_type == Type::float64 ? 8 : is_narrow(row.g_type) ? 2 : 4;
  SquaresTile part;
  part.g = static_cast<const char*>(row.g) + at * bytes;
  part.type = row.g_type;
  part.rows = std::min(grid.band, grid.rows - first);
  part.columns = std::min(grid.strip, grid.inner - column);
  part.stride = grid.inner;
  part.readable = row.numel - at;
  part.by_row = sums + (tile.outer * grid.strips + tile.strip) * grid.rows + first;
  part.prefetch = is_large(*tiling_);
  part.by_col = nullptr;
  if (grid.by_column) {
    part.by_col = sums + grid.row_places() + (tile.band * grid.outer + tile.outer) * grid.padded() + column;
  }
  kernels_in_use().squares(part);
}

void AdaptiveSweeps::adapt(size_t first, size_t last) {
  size_t work = 0;
  for (size_t k = first; k < last; ++k) work += factors_of(squared_[k]);
  const auto run = [&](int64_t begin, int64_t end) {
    for (size_t k = static_cast<size_t>(begin); k < static_cast<size_t>(end); ++k) {
      const size_t i = squared_[k];
      if (variances_[i].by_element) continue;
      traces_[i] = adapt(i, grids_[k], sums_.data() + sums_at_[k], factors_.data() + factors_at_[i]);
    }
  };
  const int64_t begin = static_cast<int64_t>(first), end = static_cast<int64_t>(last);
  if (work < kFactorGrain || end - begin < 2) return run(begin, end);
  at::parallel_for(begin, end, 1, run);
}

SquareSums AdaptiveSweeps::add_up(const Grid& grid, double* sums) {
  double *by_row = sums, *by_column = sums + grid.row_places();
  sofim::add_up(by_row, grid.rows, grid.outer * grid.strips);
  if (grid.by_column) {
    const int64_t inner = grid.inner, padded = grid.padded();
    sofim::add_up(by_column, grid.outer * padded, grid.bands);
    for (int64_t outer = 1; outer < grid.outer; ++outer) {
      std::copy_n(by_column + outer * padded, inner, by_column + outer * inner);
    }
  }
  if (grid.swapped) std::swap(by_row, by_column);
  return {by_row, by_column};
}

double AdaptiveSweeps::adapt(size_t i, const Grid& grid, double* sums, void* factors) {
  Mix mix = mixes_[i];
  mix.gain = gain_;
  return sofim::adapt(variances_[i], mix, rows_[i].w_type == Type::float64, add_up(grid, sums), factors, scales_[i]);
}

double adapt(const VarianceRow& variance, const Mix& mix, bool wide, const SquareSums& sums, void* factors,
             Scale& scale) {
  const Kernels& kernels = kernels_in_use();
  const int64_t width = variance.columns;
  const Means rows{variance.rows == nullptr ? variance.whole : variance.rows, factors, sums.rows, variance.count, wide,
                   elements(width), mix};
  scale.rows = factors;
  const double trace = kernels.rows(rows);
  if (variance.cols == nullptr) return trace * static_cast<double>(width);
  void* const of_columns = static_cast<char*>(factors) + variance.count * (wide ? 8 : 4);
  scale.cols = of_columns;
  const Means columns{variance.cols, of_columns, sums.cols, width, wide, elements(variance.count), mix};
  return trace * kernels.shares(columns, kernels.columns(columns) / elements(width));
}

}  // namespace sofim
