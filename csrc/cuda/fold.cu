// The operators fold and solve: from sums to coefficients, in two launches, between which sums of other ranks, for
// example, can be added. In a whole step the last block of a pass does the same (solve.cuh), with the same results.
// fold_scaled and solve_scaled do this with a diagonal that adapts.
#include "cuda/kernels.cuh"

namespace sofim::cuda {
namespace {

// The tensors of a launch: their groups' hyperparameters, and how many updates they have received.
struct Tensors {
  const AlgebraTask& task;
  int64_t* const* steps;
  const uint32_t* starts;

  __device__ explicit Tensors(const Arguments<AlgebraTask, kMost>& a)
      : task(a.task), steps(task.steps), starts(task.starts) {
    if (steps != nullptr) return;
    steps = reinterpret_cast<int64_t* const*>(a.more);
    starts = reinterpret_cast<const uint32_t*>(steps + task.tensors);
  }

  __device__ const Hyper& hyper(uint32_t group) const {
    if (task.scaled) return reinterpret_cast<const ScaledHyper*>(task.hyper)[group];
    return reinterpret_cast<const Hyper*>(task.hyper)[group];
  }

  __device__ uint32_t group_of(uint32_t tensor) const {
    uint32_t low = 0, high = task.group_count;  // starts[low] <= tensor < starts[high]
    while (high - low > 1) {
      const uint32_t middle = low + (high - low) / 2;
      if (starts[middle] <= tensor) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
  }

  // Of this update, which `steps` does not count yet.
  __device__ double correction(uint32_t tensor, const Hyper& hyper) const {
    return bias_correction(hyper.momentum, *steps[tensor] + 1);
  }

  __device__ double sum(Sum which, uint32_t tensor) const {
    return task.sums[which] == nullptr ? 0.0 : task.sums[which][tensor];
  }
  // Adds a tensor's part to a Fisher block.
  template <class Block>
  __device__ void add(Block& block, uint32_t tensor) const {
    const Hyper& its = hyper(group_of(tensor));
    const double corrects = correction(tensor, its);
    if constexpr (std::is_same_v<Block, AdaptiveBlock>) {
      block.add(its, corrects, {sum(kMM, tensor), sum(kMG, tensor), sum(kTrace, tensor)}, task.numerator);
    } else {
      block.add(its, corrects,
                {sum(kMM, tensor), sum(kMG, tensor), sum(kMW, tensor), sum(kGG, tensor), sum(kGW, tensor),
                 sum(kWW, tensor)},
                task.numerator);
    }
  }

  __device__ uint32_t fisher_blocks() const {
    return sofim::fisher_blocks(task.fisher, task.group_count, task.tensors);
  }

  // Stores a tensor's coefficients, and counts the update, unless it is skipped.
  __device__ void set(uint32_t tensor, const Update& update, bool skip) const {
    task.coefficients[tensor] = update.weight;
    task.coefficients[static_cast<size_t>(task.tensors) + tensor] = update.gradient;
    task.coefficients[2 * static_cast<size_t>(task.tensors) + tensor] = update.moment;
    if (!skip) *steps[tensor] += 1;
  }

  // How many numbers a Fisher block has: those of P are last, and only where the gradient is read.
  template <class Block>
  __device__ uint32_t numbers() const {
    constexpr uint32_t all = sizeof(Block) / sizeof(double);
    if (std::is_same_v<Block, AdaptiveBlock>) return all;
    return reads_gradient(task.numerator) ? all : std::is_same_v<Block, PlainBlock> ? 1 : 6;
  }
  // Calls f with each of a Fisher block's numbers, and with its place in task.blocks.
  template <class Block, class F>
  __device__ void each_place(Block& block, uint32_t which, uint32_t at, F f) const {
    const uint32_t rows = numbers<Block>();
    const size_t blocks = fisher_blocks();
    double* place = task.blocks + static_cast<size_t>(which) * rows * blocks + at;
    uint32_t row = 0;
    each_number(block, [&](double& x) {
      if (row++ >= rows) return;
      f(x, *place);
      place += blocks;
    });
  }
};

// The Fisher blocks' sums over the tensors of one class.
template <class Block>
__device__ void fold_class(const Tensors& tensors, uint32_t which, Shared& shared) {
  const AlgebraTask& task = tensors.task;
  const auto belongs = [&](uint32_t i) { return task.class_of == nullptr || task.class_of[i] == which; };
  const auto part = [&](uint32_t i, Block& block) {
    if (belongs(i)) tensors.add(block, i);
  };
  const auto set = [&](Block& block, uint32_t at) {
    tensors.each_place(block, which, at, [](double x, double& place) { place = x; });
  };
  if constexpr (!std::is_same_v<Block, AdaptiveBlock>) {
    const bool guarded = task.is_guarded;
    const double square = sum_of_squares(
        guarded ? task.tensors : 0, [&](uint32_t i) { return belongs(i) ? tensors.sum(kGG, i) : 0.0; }, shared);
    if (threadIdx.x == 0) task.squares[which] = square;
    __syncthreads();
  }
  if (task.fisher == Fisher::parameter) {
    for (uint32_t i = threadIdx.x; i < task.tensors; i += kThreads) {
      Block block;
      part(i, block);
      set(block, i);
    }
    return;
  }
  const uint32_t blocks = tensors.fisher_blocks();
  const Teams teams(task.tensors, blocks);
  for (uint32_t first = 0; first < blocks; first += teams.count()) {
    const uint32_t at = first + teams.team();
    const bool mine = at < blocks;
    const uint32_t begin = !mine || blocks == 1 ? 0 : tensors.starts[at];
    const uint32_t end = !mine ? 0 : blocks == 1 ? task.tensors : tensors.starts[at + 1];
    Block block = block_of<Block>(begin, end, teams, part, shared);
    if (mine && teams.thread() == 0) set(block, at);
  }
}

// A block per class.
__global__ void __launch_bounds__(kThreads) fold(const __grid_constant__ Arguments<AlgebraTask, kMost> a) {
  __shared__ Shared shared;
  const Tensors tensors(a);
  if (a.task.is_guarded) {
    fold_class<GuardedBlock>(tensors, blockIdx.x, shared);
  } else {
    fold_class<PlainBlock>(tensors, blockIdx.x, shared);
  }
}

__global__ void __launch_bounds__(kThreads) fold_scaled(const __grid_constant__ Arguments<AlgebraTask, kMost> a) {
  __shared__ Shared shared;
  fold_class<AdaptiveBlock>(Tensors(a), blockIdx.x, shared);
}

template <class Block>
__device__ Block block_at(const Tensors& tensors, uint32_t at) {
  Block block;
  tensors.each_place(block, 0, at, [](double& x, double place) { x = place; });
  return block;
}

// A thread per tensor.
__global__ void __launch_bounds__(kThreads) solve(const __grid_constant__ Arguments<AlgebraTask, kMost> a) {
  const Tensors tensors(a);
  const AlgebraTask& task = a.task;
  const uint32_t i = blockIdx.x * kThreads + threadIdx.x;
  const Guard guard = guard_of(task.is_guarded ? *task.squares : 0.0, task.guard);
  if (i == 0) {
    task.guarded[0] = guard.norm;
    task.guarded[1] = guard.gain;
    task.guarded[2] = guard.skip ? 1.0 : 0.0;
  }
  if (i >= task.tensors) return;
  const uint32_t group = tensors.group_of(i);
  const uint32_t at = fisher_block_of(task.fisher, group, i);
  const PlainBlock block = task.is_guarded ? block_at<GuardedBlock>(tensors, at).at_gain(guard.gain)
                                           : block_at<PlainBlock>(tensors, at);
  const Hyper& hyper = tensors.hyper(group);
  tensors.set(i, sherman_morrison(hyper, tensors.correction(i, hyper), block, task.numerator), guard.skip);
}

// A thread per tensor, and per Fisher block.
__global__ void __launch_bounds__(kThreads) solve_scaled(const __grid_constant__ Arguments<AlgebraTask, kMost> a) {
  const Tensors tensors(a);
  const AlgebraTask& task = a.task;
  const uint32_t i = blockIdx.x * kThreads + threadIdx.x;
  const bool rank_one = task.blocks != nullptr;
  if (rank_one && i < tensors.fisher_blocks()) {
    const AdaptiveBlock block = block_at<AdaptiveBlock>(tensors, i);
    task.signal[i] = block.signal();
  }
  if (i >= task.tensors) return;
  const uint32_t group = tensors.group_of(i);
  const uint32_t at = fisher_block_of(task.fisher, group, i);
  AdaptiveBlock block;
  if (rank_one) block = block_at<AdaptiveBlock>(tensors, at);
  const Hyper& hyper = tensors.hyper(group);
  const Update update =
      scaled_update(hyper, tensors.correction(i, hyper), task.numerator, rank_one ? &block : nullptr);
  tensors.set(i, update, task.skip != nullptr && *task.skip);
}

// fold_scaled and solve_scaled of a whole step.
__global__ void __launch_bounds__(kThreads) finish_scaled(const __grid_constant__ Arguments<FinishTask, kMost> a) {
  __shared__ Shared shared;
  const FinishTask& task = a.task;
  const bool table = task.rows != nullptr;
  const FinishRow* const rows = table ? task.rows : reinterpret_cast<const FinishRow*>(a.more);
  const Group* const groups =
      table ? task.groups : reinterpret_cast<const Group*>(a.more + task.tensors * sizeof(FinishRow));
  const bool skip = task.skip != nullptr && *task.skip;
  const auto correction = [&](uint32_t i, const Hyper& hyper) {
    return bias_correction(hyper.momentum, *rows[i].step + 1);
  };
  const auto part = [&](uint32_t i, AdaptiveBlock& block) {
    const Hyper hyper = hyper_of(groups[rows[i].group]);
    block.add(hyper, correction(i, hyper), {task.mm[i], task.mg[i], task.elements[i] + task.trace[i]}, task.numerator);
  };
  const auto set = [&](uint32_t i, const AdaptiveBlock& block) {
    const Hyper hyper = hyper_of(groups[rows[i].group]);
    const Update update = scaled_update(hyper, correction(i, hyper), task.numerator, &block);
    task.by_weight[i] = update.weight;
    task.by_gradient[i] = update.gradient;
    task.by_moment[i] = update.moment;
    if (!skip) *rows[i].step += 1;
  };
  if (task.fisher == Fisher::parameter) {
    for (uint32_t i = threadIdx.x; i < task.tensors; i += kThreads) {
      AdaptiveBlock block;
      part(i, block);
      task.signal[i] = block.signal();
      set(i, block);
    }
    return;
  }
  const uint32_t blocks = task.fisher == Fisher::group ? task.group_count : 1;
  const Teams teams(task.tensors, blocks);
  for (uint32_t first = 0; first < blocks; first += teams.count()) {
    const uint32_t at = first + teams.team();
    uint32_t begin = 0, end = 0;
    if (at < blocks) {
      begin = blocks == 1 ? 0 : first_of_group(rows, task.tensors, at);
      end = blocks == 1 ? task.tensors : first_of_group(rows, task.tensors, at + 1);
    }
    const AdaptiveBlock block = block_of<AdaptiveBlock>(begin, end, teams, part, shared);
    if (at < blocks && teams.thread() == 0) task.signal[at] = block.signal();
    for (uint32_t i = begin + teams.thread(); i < end; i += teams.threads()) set(i, block);
  }
}

int launch_algebra(void (*kernel)(Arguments<AlgebraTask, kMost>), uint32_t blocks, const AlgebraTask& task, Bytes steps,
                   Bytes starts, void* stream) {
  if (task.steps != nullptr) steps.size = starts.size = 0;
  return launch_kernel(kernel, false, blocks, task, steps, starts, stream);
}

}  // namespace

int launch_fold(const AlgebraTask& task, Bytes steps, Bytes starts, void* stream) {
  return launch_algebra(&fold, task.classes, task, steps, starts, stream);
}

int launch_solve(const AlgebraTask& task, Bytes steps, Bytes starts, void* stream) {
  const uint32_t blocks = task.tensors == 0 ? 1 : (task.tensors + kThreads - 1) / kThreads;
  return launch_algebra(&solve, blocks, task, steps, starts, stream);
}

int launch_fold_scaled(const AlgebraTask& task, Bytes steps, Bytes starts, void* stream) {
  return launch_algebra(&fold_scaled, task.classes, task, steps, starts, stream);
}

int launch_solve_scaled(const AlgebraTask& task, Bytes steps, Bytes starts, void* stream) {
  const uint32_t most = task.tensors > task.group_count ? task.tensors : task.group_count;
  return launch_algebra(&solve_scaled, most == 0 ? 1 : (most + kThreads - 1) / kThreads, task, steps, starts, stream);
}

int launch_finish_scaled(const FinishTask& task, const FinishRow* rows, const Group* groups, void* stream) {
  const bool table = task.rows != nullptr;
  return launch_kernel<FinishTask, kMost>(&finish_scaled, false, 1, task,
                                          {rows, table ? 0 : task.tensors * sizeof(FinishRow)},
                                          {groups, table ? 0 : task.group_count * sizeof(Group)}, stream);
}

}  // namespace sofim::cuda
