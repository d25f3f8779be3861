// The interface of the CUDA kernels: what their launches take. It includes no header of CUDA or PyTorch.
//
// A launch has all that it needs in its arguments: a row per tensor, a record per parameter group, and a task that says
// where sums and coefficients go. If they do not fit, a few small launches before it write them to a table in the
// device's memory (fill), so that nothing is ever copied from the host's memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include "step/adaptive.h"
#include "step/solve.h"
#include "step/tensor_row.h"

namespace sofim::cuda {

constexpr int kThreads = 256;    // of a block
constexpr int64_t kTile = 4096;  // elements of a chunk; a power of two: they share the upper half of their index
constexpr int kBlocks = 2;       // at least, on one multiprocessor, which limits registers to 128 per thread
constexpr int kSmall = 4096;     // bytes of arguments that every version takes
constexpr int kLarge = 32764;    // bytes of arguments that CUDA takes from 12.1 on

// One tensor, and its place among all.
struct alignas(16) Row : TensorRow {
  uint32_t first;  // of its chunks
  uint32_t group;
};
static_assert(sizeof(Row) == 64, "a launch's arguments hold the rows of as many tensors as possible");

// One parameter group.
struct Group {
  Hyper hyper;
  Decay decay;
  const void* lr;  // numbers in the device's memory, or nullptr: `hyper` has them
  const void* rho;
  bool lr_double, rho_double;  // float64 there, else float32
};

// What a launch computes after the sums of the tensors: nothing, or the coefficients of a step, plain or guarded.
enum class Finish : uint8_t { none, plain, guarded };

// What decides about clipping and skipping, besides the sums. Addresses are in the device's memory.
struct GuardInputs {
  const void* grad_scale = nullptr;  // what the gradients were multiplied by, or nullptr: 1
  const void* found_inf = nullptr;   // not 0: the step is skipped; or nullptr
  double limit = 0.0;                // of the norm of the gradients
  bool skip_nonfinite = false;       // skip the step if the norm is not finite
  bool scale_double = false, found_double = false;  // they are float64, else float32
};

// What a pass does, the same for all tensors. Addresses are in the device's memory.
struct alignas(16) Task {
  const Row* rows;  // nullptr: they follow in the arguments, and behind them the groups
  const Group* groups;
  uint32_t* counters;   // [tensors + 1], zero before and after a launch
  double* slots;        // [kSums, tiles]
  double* sums;         // [kSums, tensors]
  double* corrections;  // [tensors]; used by Finish::plain and guarded
  double* by_weight;    // [tensors] each, or nullptr: 1, 0 and 0
  double* by_gradient;
  double* by_moment;
  double* gain;      // or nullptr: 1
  bool* skip;        // or nullptr: false
  double* norm;      // of a guarded step: the norm of the gradients before clipping
  int64_t* skipped;  // the count of skipped steps
  GuardInputs guard;
  uint32_t tensors, group_count, tiles;
  Finish finish;
  Fisher fisher;
  bool l2;  // some decay.w is not zero: accumulate, dots and commit read w for it
  Numerator numerator;
};

constexpr int64_t kOneRow = int64_t(1) << 62;

// A row of Settings.hyper of sofim_fused/backends/interface.py, with a diagonal that adapts.
struct ScaledHyper : Hyper, AdaptiveHyper {};
static_assert(sizeof(ScaledHyper) == 8 * sizeof(double), "it has eight columns");

// accumulate_scaled returns Σm²/s, Σmv/s and Σs, in the place of other sums: ScaledSums of interface.py.
constexpr Sum kTrace = kMW;

// Of a step with a diagonal that adapts, what its sweeps need to know about one tensor.
struct alignas(16) Scaling {
  void* v;             // the running means of g² of its elements, of w's order, float64 for a float64 w, else float32;
                       // or nullptr, and D⁻¹ is a factor per row times a factor per column
  const void* by_row;  // [rows], of the type of computation
  const void* by_col;  // [cols], in the order of memory; or nullptr: 1
  int64_t cols;        // elements of a row; kOneRow: all elements are in it
  double decay_m, decay_g;  // of the first moment
};

// What a sweep of such a step does, besides.
struct alignas(16) ScaledTask : Task {
  const Scaling* scalings;           // nullptr: they follow the rows in the arguments, in the place of the groups
  const double *beta2, *eps, *root;  // [tensors] each: see Scales in sofim_fused/backends/interface.py
};

// One tensor whose g² are summed, as a matrix (squares.cu). Of a tensor without row_var, the rows mean nothing.
struct alignas(16) SquaresRow {
  const void* g;
  double* rows;       // [n_rows]: sums over rows; or nullptr: not needed
  double* cols;       // [n_cols]; or nullptr
  double* row_slots;  // [col_tiles, n_rows], if there are several
  double* col_slots;  // [row_tiles, n_cols], if there are several
  int64_t n_rows, n_cols, numel;
  uint32_t first;      // of its tiles
  uint32_t row_tiles, col_tiles;
  uint32_t counters;   // the first of its counters: 1, and if it has rows, row_tiles + col_tiles·(groups + 1)
  uint16_t width;      // columns of a tile, the last one's excepted
  uint8_t lanes;       // of a warp, for one row; a power of two
  Type type;
  bool vectors;        // rows begin at multiples of 16 bytes
};

constexpr int kColumns = 512;  // of a tile at most: each lane adds up sixteen of them
constexpr int kTurns = 8;      // a warp's rows in a tile, one after the other: 64 rows with that many columns
constexpr uint32_t kGroup = 32;  // tiles whose column sums one block adds up

// Plans the tiles of g, of so many rows and columns; all but its place among others, and where results go.
SquaresRow squares_row(const void* g, Type type, int64_t n_rows, int64_t n_cols);
// The same for a tensor whose rows and columns are not added up: it is cut into rows of any length.
SquaresRow squares_row(const void* g, Type type, int64_t numel);
// How many counters a tensor has, zero before and after each launch.
constexpr uint32_t counters_of(const SquaresRow& row) {
  return 1 + row.row_tiles + row.col_tiles * ((row.row_tiles + kGroup - 1) / kGroup + 1);
}
constexpr uint64_t all_tiles(const SquaresRow& row) { return uint64_t(row.row_tiles) * row.col_tiles; }

struct alignas(16) SquaresTask {
  const SquaresRow* rows;  // nullptr: they follow in the arguments
  uint32_t* counters;
  double* slots;  // [tiles]
  double* total;  // [tensors]
  uint32_t tensors, tiles;
};

// One tensor whose running means of g² are updated, and become factors of D⁻¹ (adapt.cu).
struct alignas(16) AdaptRow {
  void* row_var;  // [rows], or the variance of a tensor that is one block
  void* col_var;  // [cols], in the order of memory
  int64_t* step;
  const double *row_sums, *col_sums;  // of g² as they are
  void *by_row, *by_col;              // the factors
  int64_t rows, cols;                 // 0: it has none
  double row_count, col_count;        // elements of a row, and of a column, of the whole parameter
  double beta2, eps;                  // unless the task has `hyper`
  uint32_t first;                     // of its blocks
  uint32_t group;
  bool float64;                       // the running means are, else float32
};

constexpr int64_t kAdaptRows = 2048;  // rows per block
// Blocks for a tensor's rows; one more has its columns.
SOFIM_HD constexpr uint32_t row_blocks(int64_t rows) {
  return static_cast<uint32_t>(rows <= kAdaptRows ? 1 : (rows + kAdaptRows - 1) / kAdaptRows);
}

struct alignas(16) AdaptTask {
  const AdaptRow* rows;  // nullptr: they follow in the arguments, and behind them the groups
  const Group* groups;
  const ScaledHyper* hyper;            // [groups], or nullptr
  uint32_t* counters;                  // [tensors], zero before and after a launch
  double* slots;                       // [blocks]
  double *trace, *beta2, *eps, *root;  // [tensors] each, results
  const double* square;                // of a guarded step: the sum of all g²; or nullptr: it is that of total
  const double* total;                 // [tensors]
  double *norm, *gain;                 // results of a guarded step
  double* skips;                       // 1 if it is skipped, else 0; or nullptr
  bool* skip;                          // the same; or nullptr
  int64_t* skipped;                    // the count of skipped steps; or nullptr
  // Results, or nullptr: coefficients, [tensors] each, without the term of rank one. Updates are counted then.
  double *by_weight, *by_gradient, *by_moment;
  GuardInputs guard;
  uint32_t tensors, group_count, blocks;
  Numerator numerator;
  bool is_guarded;
  bool wide;  // all factors are float64; else each has the dtype of the running means
};

// A tensor of FinishTask.
struct alignas(16) FinishRow {
  int64_t* step;
  uint32_t group;
};

// With the term of rank one, from the sums of all tensors to the coefficients of a step, in one block (fold.cu).
struct alignas(16) FinishTask {
  const FinishRow* rows;  // nullptr: they follow in the arguments, and behind them the groups
  const Group* groups;
  const double *mm, *mg, *elements, *trace;  // [tensors] each: Σm²/s, Σmv/s, and Σs in two parts
  double *by_weight, *by_gradient, *by_moment;
  double* signal;  // [Fisher blocks]
  const bool* skip;
  uint32_t tensors, group_count;
  Fisher fisher;
  Numerator numerator;
};

// What the operators fold and solve do (fold.cu), and those of a diagonal that adapts. Addresses are in the device's
// memory.
struct alignas(16) AlgebraTask {
  int64_t* const* steps;      // [tensors]; nullptr: they follow in the arguments, and behind them `starts`
  const uint32_t* starts;     // [groups + 1]: the first tensor of each group, and their number
  const double* hyper;        // [groups] of Hyper or ScaledHyper
  const double* sums[kSums];  // [tensors] each, or nullptr: 0
  const bool* skip;           // of a diagonal that adapts: whether the step is skipped; nullptr: it is not
  double* signal;             // [Fisher blocks], likewise
  const int64_t* class_of;    // [tensors]: the class of each; or nullptr: 0
  double* blocks;             // [classes, numbers of a block, Fisher blocks]
  double* squares;            // [classes]; solve: nullptr if the step is not guarded
  double* coefficients;       // [3, tensors]: of weight, gradient and moment
  double* guarded;            // [3]: norm, gain, and 1 if the step is skipped, else 0
  GuardInputs guard;
  uint32_t tensors, group_count, classes;
  Fisher fisher;
  Numerator numerator;
  bool is_guarded, scaled;
};

// What is known about a pass at compile time: each combination selects a kernel.
enum class Pass : uint8_t { accumulate, apply, dots, commit };
enum class Types : uint8_t {
  float32,  // all weights are
  narrow,   // all weights are bfloat16 or float16, and so are their gradients
  any,
};
struct Form {
  Types types = Types::any;
  bool gradient = false;  // accumulate also sums m·g, and m·w if task.l2; apply reads g, for the term by_gradient·v
  bool step = false;      // accumulate also updates w, by by_weight and by_gradient; it sums as with `gradient`
};

// The arguments of a launch, `size` bytes at most: a task, and what follows it.
template <class T, int size>
struct Arguments {
  T task;
  alignas(16) unsigned char more[(size - sizeof(T)) / 16 * 16];
};

static_assert(sizeof(Arguments<Task, kLarge>) <= kLarge, "arguments begin with the task");

// Host functions

// Bytes in the host's memory.
struct Bytes {
  const void* data;
  size_t size;
};

SOFIM_HD constexpr uint32_t tiles_of(int64_t numel) {
  return static_cast<uint32_t>(numel <= kTile ? 1 : (numel + kTile - 1) / kTile);
}

// Bytes of arguments that this build takes.
int largest_arguments();

// Whether arguments of `size` bytes have room for a task and `more` bytes.
template <class T>
constexpr bool has_room(int size, size_t more) {
  return sizeof(T) + more <= static_cast<size_t>(size) / 16 * 16;
}

// Whether so many rows and groups fit into arguments of `size` bytes.
constexpr bool fit(int size, size_t rows, size_t groups) {
  return has_room<Task>(size, rows * sizeof(Row) + groups * sizeof(Group));
}

// Whether a launch with this task takes no more than kSmall bytes.
constexpr bool is_small(const Task& task) {
  return task.rows != nullptr || fit(kSmall, task.tensors, task.group_count);
}

// Launches return 0, or an error for error_text(). The host's memory is copied before they return; rows and groups are
// not read if the task has a table. `stream` is a cudaStream_t of the current device.

// One pass each. accumulate and dots also do what task.finish says, after their sums.
int launch_accumulate(const Form& form, const Task& task, const Row* rows, const Group* groups, void* stream);
int launch_apply(const Form& form, const Task& task, const Row* rows, const Group* groups, void* stream);
int launch_dots(const Form& form, const Task& task, const Row* rows, const Group* groups, void* stream);
int launch_commit(const Form& form, const Task& task, const Row* rows, const Group* groups, void* stream);
// The same of a step with a diagonal that adapts.
int launch_accumulate_scaled(Types types, const ScaledTask& task, const Row* rows, const Scaling* scalings,
                             void* stream);
int launch_apply_scaled(Types types, const ScaledTask& task, const Row* rows, const Scaling* scalings, void* stream);
int launch_commit_scaled(Types types, const ScaledTask& task, const Row* rows, const Scaling* scalings, void* stream);
int launch_squares(const SquaresTask& task, const SquaresRow* rows, void* stream);
int launch_adapt(const AdaptTask& task, const AdaptRow* rows, const Group* groups, void* stream);
int launch_finish_scaled(const FinishTask& task, const FinishRow* rows, const Group* groups, void* stream);
int launch_fold_scaled(const AlgebraTask& task, Bytes steps, Bytes starts, void* stream);
int launch_solve_scaled(const AlgebraTask& task, Bytes steps, Bytes starts, void* stream);
// A whole step in one launch: accumulate and apply, or dots and commit. `blocks`: as step_blocks() says.
int launch_step(const Form& form, const Task& task, const Row* rows, const Group* groups, int blocks, void* stream);
// How many blocks of such a launch the current device can run at once. 0: the step needs two launches, like Types::any.
int step_blocks(const Form& form, const Task& task, int* blocks);
// The operators. `steps` and `starts` are in the host's memory, and not read if the task has a table.
int launch_fold(const AlgebraTask& task, Bytes steps, Bytes starts, void* stream);
int launch_solve(const AlgebraTask& task, Bytes steps, Bytes starts, void* stream);
// Copies `first` and, behind it, `second` to a table in the device's memory. The table's size is theirs, rounded up to
// a multiple of 8 bytes.
int fill(void* table, Bytes first, Bytes second, void* stream);
// Whether the error means that the device cannot run so many blocks at once, and that nothing has run.
bool refused(int error);
const char* error_text(int error);

}  // namespace sofim::cuda
