// From sums of g² to running means and to D⁻¹: factors per row and per column, in one launch for all tensors. Each
// block has kAdaptRows rows of one tensor, or its columns; the last one of a tensor computes its Σs.
#include "cuda/kernels.cuh"

namespace sofim::cuda {
namespace {

// The block's tensor, and which of its blocks it is.
__device__ __forceinline__ uint32_t tensor_of(const AdaptTask& task, const AdaptRow* rows) {
  uint32_t low = 0, high = task.tensors;
  while (high - low > 1) {
    const uint32_t middle = low + (high - low) / 2;
    if (rows[middle].first <= blockIdx.x) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

__device__ __forceinline__ void set_factor(void* to, int64_t i, double x, bool float64) {
  if (float64) {
    static_cast<double*>(to)[i] = x;
  } else {
    static_cast<float*>(to)[i] = static_cast<float>(x);
  }
}

struct Adapting {
  const AdaptRow& row;
  Mix mix;
  bool skip, wide;

  // A running mean, as it is stored.
  __device__ __forceinline__ double mean(const void* means, int64_t i) const {
    if (row.float64) return static_cast<const double*>(means)[i];
    return static_cast<double>(static_cast<const float*>(means)[i]);
  }
  // `old` after a sum of g² has entered it, unless the step is skipped.
  __device__ __forceinline__ double entered(void* means, int64_t i, double old, double sum, double count) const {
    if (skip) return old;
    if (count == 0.0) count = 1.0;  // of sums that are 0
    const double entered = mix.enter(old, sum, count, row.float64 ? DBL_MAX : static_cast<double>(FLT_MAX));
    if (row.float64) return static_cast<double*>(means)[i] = entered;
    return static_cast<double>(static_cast<float*>(means)[i] = static_cast<float>(entered));
  }

  // Calls take(i, mean) for each of the thread's means from `begin` to `end`. `sums`: what enters them before; nullptr:
  // nothing does. A thread loads several together, and so waits for memory once.
  template <class Take>
  __device__ __forceinline__ void each(void* means, const double* sums, double count, int64_t begin, int64_t end,
                                       const Take& take) const {
    constexpr int kAtOnce = 8;
    for (int64_t first = begin + threadIdx.x; first < end; first += kThreads * kAtOnce) {
      double old[kAtOnce], sum[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int64_t i = first + j * kThreads;
        old[j] = i < end ? mean(means, i) : 0.0;
        sum[j] = i < end && sums != nullptr ? load_cg(sums + i) : 0.0;
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int64_t i = first + j * kThreads;
        if (i < end) take(i, sums == nullptr ? old[j] : entered(means, i, old[j], sum[j], count));
      }
    }
  }

  // Σs over the thread's part of the rows of block `part`, without columns.
  __device__ __forceinline__ double rows(uint32_t part) const {
    const int64_t begin = part * kAdaptRows, end = begin + kAdaptRows < row.rows ? begin + kAdaptRows : row.rows;
    double sum = 0.0;
    each(row.row_var, row.row_sums, row.row_count, begin, end, [&](int64_t i, double mean) {
      const double s = mix.root(mean);
      set_factor(row.by_row, i, 1.0 / s, wide);
      sum += s;
    });
    return sum;
  }

  // The same of all columns.
  __device__ __forceinline__ double columns(Shared& shared) const {
    double part[1] = {};
    each(row.col_var, row.col_sums, row.col_count, 0, row.cols, [&](int64_t, double mean) { part[0] += mean; });
    const double total = block_total(part, [](int) { return true; }, shared);
    if (threadIdx.x == 0) shared.gain = total / static_cast<double>(row.cols);
    __syncthreads();
    const double of_all = shared.gain;
    double sum = 0.0;
    each(row.col_var, nullptr, 0.0, 0, row.cols, [&](int64_t i, double mean) {
      const double share = column_share(mean, of_all);
      set_factor(row.by_col, i, 1.0 / share, wide);
      sum += share;
    });
    return sum;
  }
};

__global__ void __launch_bounds__(kThreads, 2) adapt(const __grid_constant__ Arguments<AdaptTask, kMost> a) {
  __shared__ Shared shared;
  const AdaptTask& task = a.task;
  const AdaptRow* const table = task.rows != nullptr ? task.rows : reinterpret_cast<const AdaptRow*>(a.more);
  const uint32_t tensor = tensor_of(task, table), part = blockIdx.x - table[tensor].first;
  const AdaptRow row = table[tensor];
  double square = 0.0;
  if (task.is_guarded) {
    if (task.square != nullptr) {
      square = *task.square;
    } else {  // each block adds up all of them, in the same order
      const double sum = sum_of_squares(task.tensors, [&](uint32_t i) { return load_cg(task.total + i); }, shared);
      if (threadIdx.x == 0) shared.gain = sum;
      __syncthreads();
      square = shared.gain;
    }
  }
  const Guard guard = guard_of(square, task.guard);
  const int64_t update = *row.step + 1;
  const double beta2 = task.hyper != nullptr ? task.hyper[row.group].beta2 : row.beta2;
  const double eps = task.hyper != nullptr ? task.hyper[row.group].eps : row.eps;
  const double correction = bias_correction(beta2, update);
  if (blockIdx.x == 0 && threadIdx.x == 0 && task.is_guarded) {
    *task.norm = guard.norm;
    *task.gain = guard.gain;
    if (task.skips != nullptr) *task.skips = guard.skip ? 1.0 : 0.0;
    if (task.skip != nullptr) *task.skip = guard.skip;
    if (task.skipped != nullptr && guard.skip) *task.skipped += 1;
  }
  if (part == 0 && threadIdx.x == 0) {
    task.beta2[tensor] = beta2;
    task.eps[tensor] = eps;
    task.root[tensor] = sqrt(correction);
  }
  const Adapting adapting{row, {beta2, eps, sqrt(correction), guard.gain}, guard.skip, task.wide || row.float64};
  const uint32_t of_rows = row_blocks(row.rows), blocks = of_rows + (row.cols > 0 ? 1 : 0);
  __syncthreads();
  const double each[1] = {part < of_rows ? adapting.rows(part) : adapting.columns(shared)};
  __syncthreads();
  const double total = block_total(each, [](int) { return true; }, shared);
  double trace = total * row.row_count;
  if (blocks > 1) {
    if (threadIdx.x == 0) task.slots[blockIdx.x] = total;
    if (!is_last_block(task.counters + tensor, blocks, shared)) return;
  }
  if (threadIdx.x != 0) return;
  if (blocks > 1) {
    double sum = 0.0;
    for (uint32_t i = 0; i < of_rows; ++i) sum += load_cg(task.slots + row.first + i);
    trace = sum * (row.cols > 0 ? load_cg(task.slots + row.first + of_rows) : row.row_count);
  }
  task.trace[tensor] = trace;
  if (task.by_moment == nullptr) return;
  const Group* const groups = task.rows != nullptr
                                  ? task.groups
                                  : reinterpret_cast<const Group*>(a.more + task.tensors * sizeof(AdaptRow));
  const Hyper hyper = hyper_of(groups[row.group]);
  const double of_moment = bias_correction(hyper.momentum, update);
  const Update step = scaled_update(hyper, of_moment, task.numerator, nullptr);
  task.by_weight[tensor] = step.weight;
  task.by_gradient[tensor] = step.gradient;
  task.by_moment[tensor] = step.moment;
  if (!guard.skip) *row.step = update;
}

}  // namespace

int launch_adapt(const AdaptTask& task, const AdaptRow* rows, const Group* groups, void* stream) {
  const bool table = task.rows != nullptr;
  return launch_kernel<AdaptTask, kMost>(&adapt, false, task.blocks, task,
                                         {rows, table ? 0 : task.tensors * sizeof(AdaptRow)},
                                         {groups, table ? 0 : task.group_count * sizeof(Group)}, stream);
}

}  // namespace sofim::cuda
