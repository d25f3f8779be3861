// The operators fold and solve: from sums to coefficients, in two launches, between which sums of other ranks, for
// example, can be added. In a whole step the last block of a pass does the same (solve.cuh), with the same results.
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
  __device__ Products products(uint32_t tensor) const {
    return {sum(kMM, tensor), sum(kMG, tensor), sum(kMW, tensor), sum(kGG, tensor), sum(kGW, tensor), sum(kWW, tensor)};
  }

  __device__ uint32_t fisher_blocks() const {
    return sofim::fisher_blocks(task.fisher, task.group_count, task.tensors);
  }
  // How many numbers a Fisher block has: those of P are last, and only where the gradient is read.
  template <class Block>
  __device__ uint32_t numbers() const {
    constexpr uint32_t all = sizeof(Block) / sizeof(double);
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
    if (!belongs(i)) return;
    const Hyper& hyper = task.hyper[tensors.group_of(i)];
    block.add(hyper, tensors.correction(i, hyper), tensors.products(i), task.numerator);
  };
  const auto set = [&](Block& block, uint32_t at) {
    tensors.each_place(block, which, at, [](double x, double& place) { place = x; });
  };
  const bool guarded = task.is_guarded;
  const double square = sum_of_squares(
      guarded ? task.tensors : 0, [&](uint32_t i) { return belongs(i) ? tensors.sum(kGG, i) : 0.0; }, shared);
  if (threadIdx.x == 0) task.squares[which] = square;
  __syncthreads();
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

template <class Block>
__device__ PlainBlock block_at(const Tensors& tensors, uint32_t at, double gain) {
  Block block;
  tensors.each_place(block, 0, at, [](double& x, double place) { x = place; });
  return at_gain(block, gain);
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
  const PlainBlock block = task.is_guarded ? block_at<GuardedBlock>(tensors, at, guard.gain)
                                           : block_at<PlainBlock>(tensors, at, guard.gain);
  const Hyper& hyper = task.hyper[group];
  const Update update = sherman_morrison(hyper, tensors.correction(i, hyper), block, task.numerator);
  task.coefficients[i] = update.weight;
  task.coefficients[static_cast<size_t>(task.tensors) + i] = update.gradient;
  task.coefficients[2 * static_cast<size_t>(task.tensors) + i] = update.moment;
  if (!guard.skip) *tensors.steps[i] += 1;
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

}  // namespace sofim::cuda
