// The sweep squares: sums of g² over tensors, rows and columns. Nothing but g is read, once.
//
// A block works on a tile of a matrix, 64 rows of kColumns columns, or more rows if they are short. A warp adds up a
// row at a time, or several if they are short, and each of its lanes sixteen columns. Sums of one tile alone are final;
// others go to slots, which the last block of a row of tiles, or of kGroup tiles above each other, adds up in their
// order.
#include "cuda/kernels.cuh"

namespace sofim::cuda {
namespace {

constexpr int kPerLane = kColumns / kWarp;  // columns of a lane

struct SquaresShared {
  double cols[kWarps][kPerLane][kWarp];
  Shared shared;
};

// The part of one thread: the sums of its columns, and of all of them.
struct Lane {
  double cols[kPerLane] = {};
  double all = 0.0;
};

// bench/kernels_cuda.py knows it by its name.
__device__ __forceinline__ void set_row_sum(double* row_sums, int at, double sum) { row_sums[at] = sum; }

struct Tile {
  const SquaresRow& row;
  uint32_t row_tile, col_tile;
  int64_t first_row, first_col;
  int width;  // columns

  __device__ __forceinline__ Tile(const SquaresRow& row, uint32_t index)
      : row(row),
        row_tile(index / row.col_tiles),
        col_tile(index % row.col_tiles),
        first_row(static_cast<int64_t>(row_tile) * height()),
        first_col(static_cast<int64_t>(col_tile) * row.width) {
    const int64_t left = row.n_cols - first_col;
    width = static_cast<int>(left < row.width ? left : row.width);
  }

  __device__ __forceinline__ int rows_at_once() const { return kWarps * (kWarp / row.lanes); }
  __device__ __forceinline__ int height() const { return kTurns * rows_at_once(); }
  __device__ __forceinline__ int rows() const {
    const int64_t left = row.n_rows - first_row;
    return static_cast<int>(left < height() ? left : height());
  }
  // Whether all of its rows are whole: the last row of a tensor without row_var may not be.
  __device__ __forceinline__ bool whole() const { return (first_row + height()) * row.n_cols <= row.numel; }

  // `size`: elements of a vector; 1 for any address.
  template <class G, int size>
  __device__ __forceinline__ void sweep(Lane& mine, double* row_sums) const {
    constexpr int kPieces = kPerLane / size;
    constexpr bool kAhead = sizeof(G) <= 4;  // loads of the next turn are on their way; of float64 registers hold one
    const int lanes = row.lanes, lane = static_cast<int>(threadIdx.x) % lanes, all = rows(), next = rows_at_once();
    const int place = static_cast<int>(threadIdx.x) / lanes;
    const Type type = row.type;
    const auto fetch = [&](int first, Elements<G, size>(&gs)[kPieces]) {
      const int64_t begin = (first_row + first + place) * row.n_cols + first_col;
      const int limit = size > 1 || row.numel - begin > width ? width : static_cast<int>(row.numel - begin);
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        const int col = (piece * lanes + lane) * size;
        gs[piece] = {};
        if (first + place < all && col < limit) load(gs[piece], row.g, begin + col, type);
      }
    };
    Elements<G, size> ahead[kPieces];
    if constexpr (kAhead) fetch(0, ahead);
#pragma unroll 1
    for (int first = 0; first < all; first += next) {
      const int at = first + place;
      Elements<G, size> gs[kPieces];
      if constexpr (kAhead) {
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) gs[piece] = ahead[piece];
        fetch(first + next, ahead);
      } else {
        fetch(first, gs);
      }
      double sum = 0.0;
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
#pragma unroll
        for (int j = 0; j < size; ++j) {
          const double g = widened(gs[piece].at[j], type);
          mine.cols[piece * size + j] = fma(g, g, mine.cols[piece * size + j]);
          sum = fma(g, g, sum);
        }
      }
      mine.all += sum;
      if (row_sums == nullptr) continue;
      for (int distance = lanes / 2; distance > 0; distance /= 2) {
        sum += __shfl_xor_sync(0xFFFFFFFFu, sum, distance);
      }
      if (lane == 0 && at < all) set_row_sum(row_sums, at, sum);
    }
  }

  // The sum of a column, from those of all lanes.
  __device__ __forceinline__ double column(const SquaresShared& shared, int col, int size) const {
    const int lanes = row.lanes, lane = col / size % lanes;
    const int place = col / (lanes * size) * size + col % size;
    double sum = 0.0;
    for (int warp = 0; warp < kWarps; ++warp) {
      for (int at = lane; at < kWarp; at += lanes) sum += shared.cols[warp][place][at];
    }
    return sum;
  }
};

__device__ __forceinline__ void swept(const Tile& tile, bool vectors, Lane& mine, double* row_sums) {
  const Type type = tile.row.type;
  if (!vectors) {
    if (type == Type::float64) return tile.sweep<double, 1>(mine, row_sums);
    return tile.sweep<Loose, 1>(mine, row_sums);
  }
  if (type == Type::float32) return tile.sweep<float, 4>(mine, row_sums);
  if (type == Type::float64) return tile.sweep<double, 2>(mine, row_sums);
  if (type == Type::bfloat16) return tile.sweep<BFloat16, 8>(mine, row_sums);
  return tile.sweep<Float16, 8>(mine, row_sums);
}

__device__ __forceinline__ uint32_t tensor_of(const SquaresTask& task, const SquaresRow* rows, uint32_t tile) {
  uint32_t low = 0, high = task.tensors;
  while (high - low > 1) {
    const uint32_t middle = low + (high - low) / 2;
    if (rows[middle].first <= tile) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

__global__ void __launch_bounds__(kThreads, 2) squares(const __grid_constant__ Arguments<SquaresTask, kMost> a) {
  __shared__ SquaresShared all;
  Shared& shared = all.shared;
  const SquaresTask& task = a.task;
  const SquaresRow* const table = task.rows != nullptr ? task.rows : reinterpret_cast<const SquaresRow*>(a.more);
  const uint32_t tensor = tensor_of(task, table, blockIdx.x);
  const SquaresRow& row = table[tensor];
  const Tile tile(row, blockIdx.x - row.first);
  const bool vectors = row.vectors && tile.whole();
  double* row_sums = row.rows == nullptr  ? nullptr
                     : row.col_tiles == 1 ? row.rows + tile.first_row
                                          : row.row_slots + tile.col_tile * row.n_rows + tile.first_row;
  Lane mine;
  swept(tile, vectors, mine, row_sums);
  uint32_t* const counters = task.counters + row.counters;

  if (row.cols != nullptr) {
    const int size = !vectors ? 1 : type_size(row.type) == 4 ? 4 : 16 / type_size(row.type);
    for (int i = 0; i < kPerLane; ++i) all.cols[threadIdx.x / kWarp][i][threadIdx.x % kWarp] = mine.cols[i];
    __syncthreads();
    double* const to = (row.row_tiles == 1 ? row.cols : row.col_slots + tile.row_tile * row.n_cols) + tile.first_col;
    for (int col = threadIdx.x; col < tile.width; col += kThreads) to[col] = tile.column(all, col, size);
  }
  const double each[1] = {mine.all};
  const double total = block_total(each, [](int) { return true; }, shared);
  const uint32_t tiles = row.row_tiles * row.col_tiles;
  if (threadIdx.x == 0) *(tiles == 1 ? task.total + tensor : task.slots + blockIdx.x) = total;
  if (tiles == 1) return;

  if (row.rows != nullptr && row.col_tiles > 1 && is_last_block(counters + 1 + tile.row_tile, row.col_tiles, shared)) {
    for (int at = threadIdx.x; at < tile.rows(); at += kThreads) {
      double sum = 0.0;
#pragma unroll 8
      for (uint32_t i = 0; i < row.col_tiles; ++i) sum += load_cg(row.row_slots + i * row.n_rows + tile.first_row + at);
      row.rows[tile.first_row + at] = sum;
    }
  }
  if (row.cols != nullptr && row.row_tiles > 1) {
    const uint32_t groups = (row.row_tiles + kGroup - 1) / kGroup, group = tile.row_tile / kGroup;
    const uint32_t begin = group * kGroup, end = begin + kGroup < row.row_tiles ? begin + kGroup : row.row_tiles;
    uint32_t* const of_groups = counters + 1 + row.row_tiles + tile.col_tile * (groups + 1);
    // Adds up every `step`-th row of slots from `from` on.
    const auto add_up = [&](uint32_t from, uint32_t to, uint32_t step, double* result) {
      for (int col = threadIdx.x; col < tile.width; col += kThreads) {
        const int64_t at = tile.first_col + col;
        double sum = 0.0;
#pragma unroll 8
        for (uint32_t i = from; i < to; i += step) sum += load_cg(row.col_slots + i * row.n_cols + at);
        result[at] = sum;
      }
    };
    if (is_last_block(of_groups + group, end - begin, shared)) {
      // The sum of a group takes the place of its first tile's.
      add_up(begin, end, 1, groups == 1 ? row.cols : row.col_slots + begin * row.n_cols);
      if (groups > 1 && is_last_block(of_groups + groups, groups, shared)) {
        add_up(0, row.row_tiles, kGroup, row.cols);
      }
    }
  }
  if (is_last_block(counters, tiles, shared)) {
    double part[1] = {};
    for (uint32_t i = threadIdx.x; i < tiles; i += kThreads) part[0] += load_cg(task.slots + row.first + i);
    const double sum = block_total(part, [](int) { return true; }, shared);
    if (threadIdx.x == 0) task.total[tensor] = sum;
  }
}

}  // namespace

SquaresRow squares_row(const void* g, Type type, int64_t n_rows, int64_t n_cols) {
  const auto parts = [](int64_t all, int64_t each) { return all <= each ? 1 : (all + each - 1) / each; };
  const int64_t vector = 16 / type_size(type);
  SquaresRow row{};
  row.g = g;
  row.type = type;
  row.n_rows = n_rows;
  row.n_cols = n_cols;
  row.numel = n_rows * n_cols;
  row.vectors = reinterpret_cast<uintptr_t>(g) % 16 == 0 && n_cols % vector == 0;
  int64_t width = n_cols > 0 ? n_cols : 1;
  if (width > kColumns) {  // tiles of about the same width
    constexpr int64_t step = 128;
    width = parts(parts(width, parts(width, kColumns)), step) * step;
  }
  row.width = static_cast<uint16_t>(width);
  row.col_tiles = static_cast<uint32_t>(parts(n_cols, width));
  const int64_t pieces = row.vectors ? parts(width, vector) : width;
  row.lanes = 1;
  while (row.lanes < kWarp && row.lanes < pieces) row.lanes *= 2;
  row.row_tiles = static_cast<uint32_t>(parts(n_rows, kTurns * kWarps * (kWarp / row.lanes)));
  return row;
}

SquaresRow squares_row(const void* g, Type type, int64_t numel) {
  const int64_t cols = numel < kColumns ? numel : kColumns;
  SquaresRow row = squares_row(g, type, cols > 0 ? (numel + cols - 1) / cols : 0, cols);
  row.numel = numel;  // the last of its rows may be shorter
  return row;
}

int launch_squares(const SquaresTask& task, const SquaresRow* rows, void* stream) {
  return launch_kernel<SquaresTask, kMost>(&squares, false, task.tiles, task,
                                           {rows, task.rows != nullptr ? 0 : task.tensors * sizeof(SquaresRow)},
                                           {nullptr, 0}, stream);
}

}  // namespace sofim::cuda
