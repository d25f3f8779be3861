// The kernels, as templates, and how one is launched. Each .cu file here has those of one pass.
//
// A block works on one chunk, kTile elements of one tensor. A pass with sums writes one float64 per chunk and sum to a
// slot. The block that is the last to end a chunk of a tensor adds up that tensor's slots, in their order; the one that
// ends the last tensor computes the step's coefficients. The result does not depend on which block that is, and the
// host never waits.
#pragma once

#include <cuda_runtime.h>

#include <cstring>
#include <type_traits>

#include "cuda/kernels.h"
#include "cuda/reduce.cuh"
#include "cuda/solve.cuh"
#include "cuda/sweep.cuh"

namespace sofim::cuda {

#if defined(CUDART_VERSION) && CUDART_VERSION >= 12010
constexpr int kMost = kLarge;
#else
constexpr int kMost = kSmall;
#endif

// The tensor that a chunk belongs to, by binary search. As each tensor has at least one chunk, its number is at most
// the chunk's, and the same holds for numbers counted from the end: if all have one chunk each, there is nothing to
// search. Each row that is read costs a memory latency.
__device__ __forceinline__ uint32_t tensor_of(const Task& task, const Row* rows, uint32_t tile) {
  const uint32_t more = task.tiles - task.tensors;
  uint32_t low = tile > more ? tile - more : 0, high = tile < task.tensors ? tile + 1 : task.tensors;
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

// One chunk of a pass with sums, and the work that follows the last chunk of a tensor, and of the step.
template <class Set, class K>
__device__ __forceinline__ void first_sweep(
    const Task& task, const Row* rows, const Group* groups, uint32_t tile, Shared& shared) {
  const uint32_t tensor = tensor_of(task, rows, tile);
  const Row row = rows[tensor];  // a copy, which no store can change
  Sums<K> sums;
  Set::sweep(Chunk(task, row, groups, tensor, tile), sums);
  const bool l2 = task.l2;
  const auto takes = [=](int sum) { return K::takes(sum, l2); };
  const bool writes = threadIdx.x < kSums && takes(static_cast<int>(threadIdx.x));
  const uint32_t tiles = tiles_of(row.numel);
  double* const place = tiles == 1 ? task.sums + tensor : task.slots + tile;
  const size_t stride = tiles == 1 ? task.tensors : task.tiles;
  double total = block_total(sums.at, takes, shared);
  if (writes) place[threadIdx.x * stride] = total;
  if (tiles > 1) {
    if (!is_last_block(task.counters + tensor, tiles, shared)) return;
    Sums<K> slots;
    for (uint32_t i = threadIdx.x; i < tiles; i += kThreads) {
#pragma unroll
      for (int sum = 0; sum < kSums; ++sum) {
        if (!takes(sum)) continue;
        slots.at[sum] += load_cg(task.slots + static_cast<size_t>(sum) * task.tiles + row.first + i);
      }
    }
    total = block_total(slots.at, takes, shared);
    if (writes) task.sums[static_cast<size_t>(threadIdx.x) * task.tensors + tensor] = total;
  }
  if (task.finish == Finish::none) {
    __syncthreads();
    return;
  }
  if (is_last_block(task.counters + task.tensors, task.tensors, shared)) finish(task, rows, groups, shared);
}

// One chunk of a pass that updates.
template <class Set, class K>
__device__ __forceinline__ void second_sweep(const Task& task, const Row* rows, const Group* groups, uint32_t tile) {
  const uint32_t tensor = tensor_of(task, rows, tile);
  const Row row = rows[tensor];
  Sums<K> none;
  Set::sweep(Chunk(task, row, groups, tensor, tile), none);
}

__device__ __forceinline__ bool skipped(const Task& task) {
  return task.skip != nullptr && __ldcg(reinterpret_cast<const unsigned char*>(task.skip)) != 0;
}

template <class TaskOf, int size>
__device__ __forceinline__ const Row* rows_of(const Arguments<TaskOf, size>& a) {
  return a.task.rows != nullptr ? a.task.rows : reinterpret_cast<const Row*>(a.more);
}
template <int size>
__device__ __forceinline__ const Group* groups_of(const Arguments<Task, size>& a) {
  return a.task.rows != nullptr ? a.task.groups
                                : reinterpret_cast<const Group*>(a.more + a.task.tensors * sizeof(Row));
}

// The least number of blocks of a pass that fit on a multiprocessor, which limits their registers. While one waits for
// its first elements or stores its sums, the others keep the memory busy. On an H200 that gained more than reading
// twice as many vectors ahead, and more than was lost by the few registers that kernels for many types spill.
template <class K>
constexpr int blocks_of() {
  if (!K::sums) return 4;
  if (K::l2 || K::writes_w) return kBlocks;
  return K::gradient ? 4 : 5;
}

namespace {  // so that no two files have a kernel of the same name

template <class Set, class K, int size>
__global__ void __launch_bounds__(kThreads, blocks_of<K>()) first(const __grid_constant__ Arguments<Task, size> a) {
  __shared__ Shared shared;
  first_sweep<Set, K>(a.task, rows_of(a), groups_of(a), blockIdx.x, shared);
}

// Begins with the last chunk, which the sweep before has left in the cache.
template <class Set, class K, int size>
__global__ void __launch_bounds__(kThreads, blocks_of<K>()) second(const __grid_constant__ Arguments<Task, size> a) {
  if (skipped(a.task)) return;
  second_sweep<Set, K>(a.task, rows_of(a), groups_of(a), a.task.tiles - 1 - blockIdx.x);
}

}  // namespace

// Launches

template <class F>
int with(bool x, F f) {
  return x ? f(std::true_type()) : f(std::false_type());
}

// What a launch returns. An error is cleared; otherwise the next call that asks CUDA for its last error would get it.
inline int outcome(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return static_cast<int>(error);
}

// Launches a kernel with a task and two arrays of bytes behind it, such as rows and groups. `together`: all blocks run
// at once and may wait for each other.
template <class T, int size>
int launch_kernel(void (*kernel)(Arguments<T, size>), bool together, uint32_t blocks, const T& task, Bytes first,
                  Bytes second, void* stream) {
  static thread_local Arguments<T, size> arguments;
  arguments.task = task;
  if (first.size > 0) std::memcpy(arguments.more, first.data, first.size);
  if (second.size > 0) std::memcpy(arguments.more + first.size, second.data, second.size);
  void* pointers[] = {&arguments};
  const auto on = static_cast<cudaStream_t>(stream);
  return outcome((together ? cudaLaunchCooperativeKernel(kernel, dim3(blocks), dim3(kThreads), pointers, 0, on)
                           : cudaLaunchKernel(kernel, dim3(blocks), dim3(kThreads), pointers, 0, on)));
}

// The same for a pass: rows and groups are part of the arguments, unless the task has a table.
template <int size>
int launch_pass(void (*kernel)(Arguments<Task, size>), bool together, uint32_t blocks, const Task& task,
                const Row* rows, const Group* groups, void* stream) {
  const bool table = task.rows != nullptr;
  return launch_kernel(kernel, together, blocks, task, {rows, table ? 0 : task.tensors * sizeof(Row)},
                       {groups, table ? 0 : task.group_count * sizeof(Group)}, stream);
}

}  // namespace sofim::cuda
