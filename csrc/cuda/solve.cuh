// From sums to coefficients on the device: what the last block of a pass does before the second sweep, and what the
// operators fold and solve do (fold.cu). The algebra itself is in step/solve.h.
#pragma once

#include <cuda_runtime.h>

#include "cuda/kernels.h"
#include "cuda/reduce.cuh"
#include "step/adaptive.h"
#include "step/solve.h"

namespace sofim::cuda {

__device__ inline double number(const void* from, bool is_double) {
  return is_double ? *static_cast<const double*>(from) : static_cast<double>(*static_cast<const float*>(from));
}

__device__ inline Guard guard_of(double square, const GuardInputs& in) {
  const double unscale = in.grad_scale == nullptr ? 1.0 : 1.0 / number(in.grad_scale, in.scale_double);
  const bool found = in.found_inf != nullptr && number(in.found_inf, in.found_double) != 0.0;
  return sofim::guard_of(square, unscale, in.limit, found, in.skip_nonfinite);
}

// The sum of square(i) over all tensors, in thread 0; others get 0.
template <class Square>
__device__ double sum_of_squares(uint32_t tensors, Square square, Shared& shared) {
  double each[1] = {};
  for (uint32_t i = threadIdx.x; i < tensors; i += kThreads) each[0] += square(i);
  return block_total(each, [](int) { return true; }, shared);
}

// Calls f with each number of a Fisher block, in the order of the rows that fold returns.
template <class F>
__device__ __forceinline__ void each_number(PlainBlock& block, F f) {
  f(block.norm);
  f(block.cross);
}
template <class F>
__device__ __forceinline__ void each_number(GuardedBlock& block, F f) {
  for (double& x : block.norm) f(x);
  for (double& x : block.scale) f(x);
  for (double& x : block.cross) f(x);
}

template <class F>
__device__ __forceinline__ void each_number(AdaptiveBlock& block, F f) {
  f(block.trace);
  f(block.square);
  f(block.cross);
  f(block.plain_square);
}

__device__ inline PlainBlock at_gain(const PlainBlock& block, double) { return block; }
__device__ inline PlainBlock at_gain(const GuardedBlock& block, double gain) { return block.at_gain(gain); }

// The sum of part(i, block) over tensors [begin, end), which are those of a team's Fisher block: every thread of the
// team gets it. All threads of the block have to call this, a team without a Fisher block with an empty range.
template <class Block, class Part>
__device__ Block block_of(uint32_t begin, uint32_t end, const Teams& teams, Part part, Shared& shared) {
  Block block;
  for (uint32_t i = begin + teams.thread(); i < end; i += teams.threads()) part(i, block);
  teams.add_up([&](auto f) { each_number(block, f); }, shared);
  return block;
}

// At the end of a pass

__device__ inline Hyper hyper_of(const Group& group) {
  Hyper hyper = group.hyper;
  if (group.lr != nullptr) hyper.lr = number(group.lr, group.lr_double);
  if (group.rho != nullptr) hyper.rho = number(group.rho, group.rho_double);
  return hyper;
}

__device__ inline Products products_of(const Task& task, uint32_t tensor) {
  const auto sum = [&](Sum which) { return load_cg(task.sums + static_cast<size_t>(which) * task.tensors + tensor); };
  const bool guarded = task.finish == Finish::guarded;
  Products p;
  p.mm = sum(kMM);
  const bool reads = guarded || reads_gradient(task.numerator);
  if (reads) p.mg = sum(kMG);
  if (task.l2 && reads) p.mw = sum(kMW);
  if (guarded) p.gg = sum(kGG);
  if (guarded && task.l2) p.gw = sum(kGW);
  if (guarded && task.l2) p.ww = sum(kWW);
  return p;
}

// The first tensor whose group is `group` or a later one. Tensors are in the order of their groups.
template <class RowOf>
__device__ inline uint32_t first_of_group(const RowOf* rows, uint32_t tensors, uint32_t group) {
  uint32_t low = 0, high = tensors;
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    if (rows[middle].group < group) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

__device__ inline void set_guard(const Task& task, Shared& shared) {
  const double* const gg = task.sums + static_cast<size_t>(kGG) * task.tensors;
  const double square = sum_of_squares(task.tensors, [&](uint32_t i) { return load_cg(gg + i); }, shared);
  if (threadIdx.x == 0) {
    const Guard guard = guard_of(square, task.guard);
    *task.gain = shared.gain = guard.gain;
    *task.skip = shared.skip = guard.skip;
    *task.norm = guard.norm;
    if (guard.skip) *task.skipped += 1;
  }
  __syncthreads();
}

__device__ inline void set_update(
    const Task& task, const Row& row, const Hyper& hyper, uint32_t tensor, const PlainBlock& block, bool skip) {
  const Update update = sherman_morrison(hyper, task.corrections[tensor], block, task.numerator);
  task.by_weight[tensor] = update.weight;
  task.by_gradient[tensor] = update.gradient;
  task.by_moment[tensor] = update.moment;
  if (!skip) *row.step += 1;
}

// Computes the coefficients of every tensor from the sums of all of them, and counts the update, unless it is skipped.
template <class Block>
__device__ void set_updates(
    const Task& task, const Row* rows, const Group* groups, double gain, bool skip, Shared& shared) {
  for (uint32_t i = threadIdx.x; i < task.tensors; i += kThreads) {
    task.corrections[i] = bias_correction(groups[rows[i].group].hyper.momentum, *rows[i].step + 1);
  }
  __syncthreads();
  const auto part = [&](uint32_t i, Block& block) {
    block.add(hyper_of(groups[rows[i].group]), task.corrections[i], products_of(task, i), task.numerator);
  };
  const auto set = [&](uint32_t i, const PlainBlock& block) {
    set_update(task, rows[i], hyper_of(groups[rows[i].group]), i, block, skip);
  };
  if (task.fisher == Fisher::parameter) {
    for (uint32_t i = threadIdx.x; i < task.tensors; i += kThreads) {
      Block block;
      part(i, block);
      set(i, at_gain(block, gain));
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
    const PlainBlock block = at_gain(block_of<Block>(begin, end, teams, part, shared), gain);
    for (uint32_t i = begin + teams.thread(); i < end; i += teams.threads()) set(i, block);
  }
}

// What follows the last sum of a pass. Not inlined: it runs once per step, and inlined it would cost the sweeps
// registers. (It is a template, because the compiler objects to `inline` together with `__noinline__`.)
template <int = 0>
__device__ __noinline__ void finish(const Task& task, const Row* rows, const Group* groups, Shared& shared) {
  if (task.finish == Finish::plain) return set_updates<PlainBlock>(task, rows, groups, 1.0, false, shared);
  set_guard(task, shared);
  set_updates<GuardedBlock>(task, rows, groups, shared.gain, shared.skip, shared);
}

}  // namespace sofim::cuda
