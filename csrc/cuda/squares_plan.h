// The tiles of squares over all tensors of a step, and the memory that they need.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "cuda/kernels.h"
#include "step/adaptive.h"

namespace sofim::cuda {

class SquaresPlan {
 public:
  void clear() { *this = SquaresPlan(); }

  // Adds a gradient of `n_rows` rows and `n_cols` columns, which follow each other in memory.
  void add(const void* g, Type type, Diagonal diagonal, int64_t n_rows, int64_t n_cols) {
    const bool by_row = has_rows(diagonal);
    SquaresRow row = by_row ? squares_row(g, type, n_rows, n_cols) : squares_row(g, type, n_rows * n_cols);
    row.first = static_cast<uint32_t>(tiles_);
    row.counters = static_cast<uint32_t>(counters_);
    tiles_ += all_tiles(row);
    counters_ += counters_of(row);
    diagonals_.push_back(diagonal);
    rows_.push_back(row);
    if (!by_row) return;
    all_rows_ += n_rows;
    slots_ += row.col_tiles > 1 ? row.col_tiles * n_rows : 0;
    if (diagonal != Diagonal::factored) return;
    all_cols_ += n_cols;
    slots_ += row.row_tiles > 1 ? row.row_tiles * n_cols : 0;
  }

  bool fits() const { return tiles_ <= std::numeric_limits<int32_t>::max(); }
  // How many counters there are, and numbers that are not results.
  int64_t counters() const { return static_cast<int64_t>(counters_); }
  int64_t numbers() const { return static_cast<int64_t>(tiles_) + slots_; }
  // How many rows and columns have sums.
  int64_t all_rows() const { return all_rows_; }
  int64_t all_cols() const { return all_cols_; }

  // Sets where results and the rest go; returns the launch's task.
  SquaresTask place(uint32_t* counters, double* numbers, double* total, double* by_row, double* by_col) {
    SquaresTask task{};
    task.counters = counters;
    task.slots = numbers;
    task.total = total;
    task.tensors = static_cast<uint32_t>(rows_.size());
    task.tiles = static_cast<uint32_t>(tiles_);
    double* slot = numbers + tiles_;
    const auto taken = [](double*& from, int64_t count) {
      double* const at = from;
      from += count;
      return at;
    };
    for (size_t i = 0; i < rows_.size(); ++i) {
      SquaresRow& row = rows_[i];
      if (diagonals_[i] != Diagonal::row && diagonals_[i] != Diagonal::factored) continue;
      row.rows = taken(by_row, row.n_rows);
      if (row.col_tiles > 1) row.row_slots = taken(slot, row.col_tiles * row.n_rows);
      if (diagonals_[i] != Diagonal::factored) continue;
      row.cols = taken(by_col, row.n_cols);
      if (row.row_tiles > 1) row.col_slots = taken(slot, row.row_tiles * row.n_cols);
    }
    return task;
  }

  const std::vector<SquaresRow>& rows() const { return rows_; }

 private:
  std::vector<SquaresRow> rows_;
  std::vector<Diagonal> diagonals_;
  uint64_t tiles_ = 0, counters_ = 0;
  int64_t slots_ = 0, all_rows_ = 0, all_cols_ = 0;
};

}  // namespace sofim::cuda
