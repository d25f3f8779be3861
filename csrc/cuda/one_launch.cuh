// The kernel of a whole step: both sweeps, and between them a barrier for all blocks.
#pragma once

#include <cooperative_groups.h>

#include "cuda/kernels.cuh"

namespace sofim::cuda {
namespace {

// The barrier waits for every block, so that all of them have to run at once. A block works on the same chunks in both
// sweeps, in the second one in reverse order.
template <class Set, class First, class Second, int size>
__global__ void __launch_bounds__(kThreads, kBlocks) both(const __grid_constant__ Arguments<Task, size> a) {
  __shared__ Shared shared;
  const Row* const rows = rows_of(a);
  const Group* const groups = groups_of(a);
  uint32_t tile = blockIdx.x;
  for (; tile < a.task.tiles; tile += gridDim.x) {
    first_sweep<Set, First>(a.task, rows, groups, tile, shared);
    __syncthreads();
  }
  cooperative_groups::this_grid().sync();
  if (skipped(a.task)) return;
  while (tile >= gridDim.x) {
    tile -= gridDim.x;
    second_sweep<Set, Second>(a.task, rows, groups, tile);
  }
}

}  // namespace
}  // namespace sofim::cuda
