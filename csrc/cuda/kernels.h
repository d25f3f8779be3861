// What the CUDA passes take, without a header of CUDA's or PyTorch's, and how a step is packed into it.
//
// A launch carries all that it needs in its arguments: a row per tensor, a record per parameter group, and a task that
// says where sums and coefficients go. Where they do not fit, a few small launches before it carry them to a table in
// the device's memory (fill), so that nothing is ever copied from the host's.
#pragma once

#include <cstddef>
#include <cstdint>

#include "step/row.h"
#include "step/solve.h"

namespace sofim::cuda {

constexpr int kThreads = 256;    // of a block
constexpr int64_t kTile = 4096;  // elements that a block works on; a power of two, so that they share their index's upper half
constexpr int kBlocks = 2;       // on one multiprocessor, or more, which limits registers to 128 per thread at most
constexpr int kSmall = 4096;     // bytes of arguments that every version takes
constexpr int kLarge = 32764;    // bytes of arguments that CUDA takes from 12.1 on

// One tensor. w, g, m and kahan lie in memory in one and the same order, without gaps.
struct alignas(16) Row {
  void* w;
  const void* g;
  void* m;
  void* kahan;    // nullptr: none is kept
  int64_t* step;  // the updates that it has received
  int64_t numel;
  uint32_t first;  // of its tiles
  uint32_t ordinal;
  uint32_t group;
  Type w_type, g_type, m_type;
  bool aligned;  // all four addresses are multiples of 16
};

// One parameter group.
struct Group {
  Hyper hyper;
  Decay decay;
  const void* lr;  // numbers in the device's memory, or nullptr: `hyper` has them
  const void* rho;
  bool lr_double, rho_double;  // float64 there, else float32
};

// What follows the sums of the tensors: nothing, or the coefficients of a step, plain or guarded.
enum class Finish : uint8_t { none, plain, guarded };

// What is to be done, the same for all tensors. Addresses are in the device's memory.
struct alignas(16) Task {
  const Row* rows;  // nullptr: they follow in the arguments, and behind them the groups
  const Group* groups;
  uint32_t* counters;   // [tensors + 1], zero before and after a launch
  double* slots;        // [kSums, tiles]
  double* sums;         // [kSums, tensors]
  double* corrections;  // [tensors], if there is something to finish
  double* by_weight;    // [tensors] each, or nullptr: 1, 0 and 0
  double* by_gradient;
  double* by_moment;
  double* gain;  // or nullptr: 1
  bool* skip;    // or nullptr: false
  double* norm;      // what a guarded step saw: the true gradients' norm
  int64_t* skipped;  // counts the guarded steps that were skipped
  const void* grad_scale;  // what the gradients were multiplied by, or nullptr: 1
  const void* found_inf;   // not 0: the step is to be skipped; or nullptr
  double limit;            // of that norm
  uint32_t tensors, group_count, tiles;
  Finish finish;
  Fisher fisher;
  bool gradient_form, skip_nonfinite;
  bool scale_double, found_double;  // float64 there, else float32
};

// What a kernel is compiled for.
enum class Pass : uint8_t { accumulate, apply, dots, commit };
enum class Types : uint8_t {
  float32,  // all weights are
  narrow,   // all weights are bfloat16 or float16, and so are their gradients
  any,
};
struct Form {
  Types types = Types::any;
  bool l2 = false;        // some decay.w is not zero: accumulate, dots and commit take w for it
  bool gradient = false;  // accumulate: also m·g, and m·w if l2; apply and commit: the term by_gradient·v
  bool step = false;      // accumulate: w takes its step by by_weight and by_gradient
};

// The arguments of a launch, `size` bytes at most.
template <int size>
struct Arguments {
  Task task;
  alignas(16) unsigned char more[(size - sizeof(Task)) / 16 * 16];
};

static_assert(sizeof(Arguments<kLarge>) <= kLarge, "arguments begin with the task");

// Host functions

SOFIM_HD constexpr uint32_t tiles_of(int64_t numel) {
  return static_cast<uint32_t>(numel <= kTile ? 1 : (numel + kTile - 1) / kTile);
}

// Bytes of arguments that this build takes.
int largest_arguments();

// Whether rows and groups fit into arguments of so many bytes.
constexpr bool fit(int size, size_t rows, size_t groups) {
  return sizeof(Task) + rows * sizeof(Row) + groups * sizeof(Group) <= static_cast<size_t>(size) / 16 * 16;
}

// Whether a launch with this task takes no more than kSmall bytes.
constexpr bool is_small(const Task& task) {
  return task.rows != nullptr || fit(kSmall, task.tensors, task.group_count);
}

// Launches return 0, or an error for error_text(). `rows` and `groups` are in the host's memory and are taken over at
// once; if the task has tables of its own, they are not looked at. `stream` is a cudaStream_t of the current device.

// One pass. What task.finish says follows the sums of accumulate and dots.
int launch(Pass pass, const Form& form, const Task& task, const Row* rows, const Group* groups, void* stream);
// A whole step in one launch: accumulate and apply, or dots and commit. `blocks`: as step_blocks() says.
int launch_step(const Form& form, const Task& task, const Row* rows, const Group* groups, int blocks, void* stream);
// How many blocks of such a launch the current device can run at once; 0: it has to be two launches, as for Types::any.
int step_blocks(const Form& form, const Task& task, int* blocks);
// Copies rows and groups to a table in the device's memory: the rows, and behind them the groups.
int fill(void* table, const Row* rows, size_t row_count, const Group* groups, size_t group_count, void* stream);
// Whether the error means that blocks cannot wait for each other, and nothing has run.
bool refused(int error);
const char* error_text(int error);

}  // namespace sofim::cuda
