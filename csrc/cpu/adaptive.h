// The sweeps of a step whose diagonal adapts, over all tensors of the step, and what happens between them
// (AdaptivePasses in sofim_fused/backends/interface.py). This needs no header of PyTorch but that of its threads.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/parallel.h"
#include "step/adaptive.h"

namespace sofim {

// The sums of g² over rows, and over columns in the order of their running means.
struct SquareSums {
  const double *rows, *cols;
};

// Lets sums of g² enter the running means of one tensor; writes the factors 1/s of rows, then those of columns, to
// `factors`, with room for kScalePadding more; returns Σs. `wide`: running means and factors are float64, else float32.
double adapt(const VarianceRow& variance, const Mix& mix, bool wide, const SquareSums& sums, void* factors, Scale& scale);

// One step: begin(); with a guard squares() and set_gain(); then enter(); and if that was asked not to update the
// weights, apply(). A sweep of a step that is taken pass by pass: begin(), take_factors(), set_gain(), enter() or apply().
// Keeps its memory from step to step, but nothing that it points to.
class AdaptiveSweeps {
 public:
  // Sets the tensors, one of `rows` and of `variances` each, and how g² enters the running means of each.
  void begin(Row* rows, const VarianceRow* variances, const Tiling& tiling, const Mix* mixes);
  // The sum of squares of all gradients as they are. enter() then uses these sums, and does not read gradients again
  // for its own.
  double squares();
  // After squares(): the sums of one tensor. Its memory is overwritten.
  SquareSums sums_of(size_t i) { return add_up(grids_[i], sums_.data() + sums_at_[i]); }
  // Of one tensor after squares(): the sum over all of its elements. To be called before sums_of().
  double sum_of(size_t i) const;
  // Takes what the tensors have as running means of rows, columns or all elements for their factors 1/s, which sums of
  // squares then need not be taken for; and Σs of each tensor.
  void take_factors(const double* traces);
  // What gradients are multiplied by from here on.
  void set_gain(double gain) { gain_ = gain; }
  // Updates running means and m; and w if mode.updates. Otherwise returns the sums of each tensor.
  std::vector<ScaledProducts> enter(Mode mode);
  // Updates w.
  void apply(Mode mode);

 private:
  // How sums of squares of one tensor are made and stored: its rows and columns are cut into tiles, each with places
  // for its own sums, which are added up in order. So they have the same bits for any number of threads.
  struct Grid {
    int64_t outer = 1, rows = 1, inner = 0;  // memory has the order [outer, rows, inner]
    int64_t band = 1, strip = 0;             // rows and columns of a tile
    int64_t bands = 1, strips = 1;           // how many tiles there are for each of `outer`
    bool by_column = false;                  // sums over columns are needed, too
    // Each row has one element in a place: then what this calls columns are the rows.
    bool swapped = false;

    int64_t padded() const { return (inner + kScalePadding - 1) / kScalePadding * kScalePadding; }
    size_t row_places() const { return static_cast<size_t>(outer * strips * rows); }
    size_t places() const { return row_places() + (by_column ? static_cast<size_t>(bands * outer * padded()) : 0); }
  };
  struct Tile {
    size_t place;  // in grids_
    int64_t outer, band, strip;
    int64_t before;  // elements of all tiles before this one
  };

  // Tensors that go through the sums of squares and the sweep after them before the next ones do: the ends of their parts
  // of all tensors, of squared_ and of tiles_.
  struct Batch {
    size_t tensors = 0, squared = 0, tiles = 0;
    int64_t elements = 0;  // in squared_
  };

  Grid grid_of(size_t i) const;
  // Adds a tensor to those that sum_squares() reads, with places for its sums.
  void add_grid(size_t i);
  // Makes room for the sums of all that were added.
  void place_sums();
  // Those of tiles_ [first, last).
  void sum_squares(size_t first, size_t last);
  void sum_squares(size_t i, const Grid& grid, const Tile& tile, double* sums) const;
  // Those of squared_ [first, last).
  void adapt(size_t first, size_t last);
  // Adds up a tensor's sums in their first places.
  static SquareSums add_up(const Grid& grid, double* sums);
  // Updates the running means of a tensor, and writes its factors; returns Σs. Adds up `sums` in their first places.
  double adapt(size_t i, const Grid& grid, double* sums, void* factors);
  // How many numbers the factors of a tensor take, in units of a double.
  size_t factors_of(size_t i) const;
  // Whether one thread does everything for a tensor while it is in the cache.
  bool is_small(size_t i) const;

  Row* rows_ = nullptr;
  const VarianceRow* variances_ = nullptr;
  const Tiling* tiling_ = nullptr;
  const Mix* mixes_ = nullptr;
  double gain_ = 1.0;
  bool has_factors_ = false;     // by take_factors()
  std::vector<Scale> scales_;    // by tensor
  std::vector<double> traces_;   // by tensor: Σs
  std::vector<size_t> factors_at_;  // by tensor
  // Of the tensors whose squares are summed before the sweep:
  std::vector<size_t> squared_;  // which they are
  std::vector<Grid> grids_;
  std::vector<size_t> sums_at_;
  std::vector<Tile> tiles_;
  std::vector<Batch> batches_;  // one after the other
  std::vector<double> sums_, factors_, scratch_;
};

}  // namespace sofim
