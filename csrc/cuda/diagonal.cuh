// D⁻¹ of the elements of a chunk, where it is a factor per row times a factor per column: never a tensor in memory.
#pragma once

#include <cuda_runtime.h>

#include "cuda/kernels.h"
#include "cuda/storage.cuh"

namespace sofim::cuda {

// bench/kernels_cuda.py finds these by their names: what they read is not counted among the bytes of a pass.

template <class T>
__device__ __forceinline__ T factor(const void* from, int64_t at) {
  SOFIM_IN_MEMORY(from);
  return static_cast<const T*>(from)[at];
}

// `size` factors in a row. `vectors`: their addresses are multiples of 16.
template <int size, class T>
__device__ __forceinline__ void factors_at(Elements<T, size>& x, const void* from, int64_t at, bool vectors) {
  if constexpr (size * sizeof(T) >= 16) {
    if (vectors) return load(x, from, at, Type());
  }
#pragma unroll
  for (int j = 0; j < size; ++j) x.at[j] = factor<T>(from, at + j);
}

template <class T>
class Inverse {
 public:
  // For elements from `begin` on, kTile at most.
  __device__ __forceinline__ Inverse(const Scaling& scaling, int64_t begin)
      : by_row_(scaling.by_row), by_col_(scaling.by_col), cols_(scaling.cols > 0 ? scaling.cols : 1) {
    constexpr int64_t most = int64_t(1) << 32;
    row_ = begin < most && cols_ < most ? static_cast<uint32_t>(begin) / static_cast<uint32_t>(cols_) : begin / cols_;
    col_ = begin - row_ * cols_;
    inverse_ = 1.0f / static_cast<float>(cols_);
    vectors_ = reinterpret_cast<uintptr_t>(by_col_) % 16 == 0;
  }

  // Of the elements from begin + `at` on, which are all in one row.
  template <int size>
  __device__ __forceinline__ void at(int at, Elements<T, size>& x) const {
    int64_t row = row_, col = col_ + at;
    if (col >= cols_) {
      // Less than kTile, as col_ is less than cols_; so its quotient in float32 is exact.
      const int past = static_cast<int>(col - cols_);
      const int more = static_cast<int>((static_cast<float>(past) + 0.5f) * inverse_);
      row += 1 + more;
      col = past - more * static_cast<int>(cols_);
    }
    const T by_row = factor<T>(by_row_, row);
    if (by_col_ != nullptr) factors_at(x, by_col_, col, vectors_);
#pragma unroll
    for (int j = 0; j < size; ++j) x.at[j] = by_col_ == nullptr ? by_row : by_row * x.at[j];
  }

 private:
  const void *by_row_, *by_col_;
  int64_t cols_, row_, col_;  // the first element's row and column
  float inverse_;             // 1/cols
  bool vectors_;
};

}  // namespace sofim::cuda
