// Sums over the threads of a block, and over the blocks of a launch. The order of the additions never depends on which
// block or thread is the fastest.
#pragma once

#include <cuda_runtime.h>

#include "cuda/kernels.h"

namespace sofim::cuda {

constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr int kNumbers = 9;  // the most that one reduction adds up: the coefficients of a GuardedBlock

// The shared memory of a block.
struct Shared {
  double warp[kNumbers][kWarps];
  double gain;
  bool last, skip;
};

// Reads what other blocks have written in this launch: from L2, as L1 is not coherent.
__device__ __forceinline__ double load_cg(const double* from) { return __ldcg(from); }

__device__ __forceinline__ double warp_total(double x) {
  for (int width = kWarp / 2; width > 0; width /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, width);
  return x;
}

// The totals over a block's threads of those `numbers` for which takes(i) holds; thread i returns the i-th, others 0.
// Two calls need a barrier between them.
template <int numbers, class Takes>
__device__ __forceinline__ double block_total(const double (&each)[numbers], Takes takes, Shared& shared) {
  static_assert(numbers <= kNumbers, "there is room for them");
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int i = 0; i < numbers; ++i) {
    if (!takes(i)) continue;
    const double total = warp_total(each[i]);
    if (lane == 0) shared.warp[i][warp] = total;
  }
  __syncthreads();
  double total = 0.0;
  if (threadIdx.x < numbers && takes(static_cast<int>(threadIdx.x))) {
    for (int i = 0; i < kWarps; ++i) total += shared.warp[threadIdx.x][i];
  }
  return total;
}

// atomicInc() with acquire and release semantics: what this block wrote before is visible to blocks that call this
// later, and what earlier ones wrote is visible to this one. __threadfence() before and after it would order all memory
// accesses twice.
__device__ __forceinline__ uint32_t atomic_inc_acq_rel(uint32_t* counter, uint32_t most) {
#ifdef SOFIM_EMULATED
  __threadfence();
  const uint32_t before = atomicInc(counter, most);
  __threadfence();
#else
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(most) : "memory");
#endif
  return before;
}

// Whether this is the last of `all` blocks to call this. Then what the others wrote can be read, and the counter is
// zero again, for the next launch. All threads of a block have to call it.
__device__ __forceinline__ bool is_last_block(uint32_t* counter, uint32_t all, Shared& shared) {
  __syncthreads();
  if (threadIdx.x == 0) shared.last = atomic_inc_acq_rel(counter, all - 1) == all - 1;
  __syncthreads();
  return shared.last;
}

// Divides the threads of a block into teams of neighbouring warps. Each team works on one Fisher block at a time.
struct Teams {
  uint32_t warps;  // of each team, a power of two

  // As many warps per Fisher block as there are, but not so many that some would have no tensor. Each tensor needs a
  // chain of loads and divisions, and a warp waits for one of these after the other: with one warp alone, this took
  // half of the step of a model of 1,000 small tensors.
  __device__ Teams(uint32_t tensors, uint32_t blocks) : warps(1) {
    while (warps * kWarp < tensors && 2 * warps * blocks <= kWarps) warps *= 2;
  }
  __device__ uint32_t count() const { return kWarps / warps; }
  __device__ uint32_t threads() const { return warps * kWarp; }
  __device__ uint32_t team() const { return threadIdx.x / threads(); }
  __device__ uint32_t thread() const { return threadIdx.x % threads(); }

  // Adds up numbers over the threads of each team: all of its threads get the totals. All threads of the block have to
  // call it. each(f) calls f with a reference to each number. The order of the additions depends on `warps` alone.
  template <class Each>
  __device__ void add_up(Each each, Shared& shared) const {
    each([](double& x) { x = warp_total(x); });
    if (warps == 1) return;
    const uint32_t warp = threadIdx.x / kWarp, first = warp / warps * warps;
    if (threadIdx.x % kWarp == 0) {
      int at = 0;
      each([&](double& x) { shared.warp[at++][warp] = x; });
    }
    __syncthreads();
    int at = 0;
    each([&](double& x) {
      x = 0.0;
      for (uint32_t i = 0; i < warps; ++i) x += shared.warp[at][first + i];
      ++at;
    });
    __syncthreads();  // before the next numbers take their place
  }
};

}  // namespace sofim::cuda
