// The sweeps of a step with a diagonal that adapts, but for squares: accumulate_scaled and apply_scaled, or
// commit_scaled. The arithmetic is in step/element.h and step/adaptive.h.
//
// What these sweeps do to an element takes several times the code of those in sweep.cuh. So there is one version of it
// for each type of computation, and how elements are stored is found out at run time, in one branch per 32 bytes.
#pragma once

#include <cuda_runtime.h>

#include <cfloat>
#include <cstring>
#include <type_traits>

#include "cuda/diagonal.cuh"
#include "cuda/kernels.cuh"
#include "cuda/storage.cuh"
#include "step/element.h"

namespace sofim::cuda {

enum class ScaledPass : uint8_t { accumulate, apply, commit };

constexpr int kScaledSums = kTrace + 1;
// Elements that a thread works on at a time: 32 bytes in the type of computation.
template <class T>
constexpr int kMany = 32 / sizeof(T);

// Elements on their way from memory or to it. `T` is the type of computation; those of 16 bits take the first half.
template <class T, int size>
__device__ __forceinline__ void fetch(Elements<T, size>& x, const void* from, int64_t at, Type type) {
  if constexpr (std::is_same_v<T, double>) {
    load(x, from, at, type);
  } else if (type == Type::float32) {
    load(x, from, at, type);
  } else {
    Elements<BFloat16, size> narrow;
    load(narrow, from, at, type);
    memcpy(&x, &narrow, sizeof narrow);
  }
}

template <class T, int size>
__device__ __forceinline__ void put(void* to, int64_t at, const Elements<T, size>& x, Type type) {
  if constexpr (std::is_same_v<T, double>) {
    store(to, at, x, type);
  } else if (type == Type::float32) {
    store(to, at, x, type);
  } else {
    Elements<BFloat16, size> narrow;
    memcpy(&narrow, &x, sizeof narrow);
    store(to, at, narrow, type);
  }
}

// The same of the rests of weights of 24 bits.
template <class T, int size>
__device__ __forceinline__ void fetch_rest(Elements<T, size>& x, const void* from, int64_t at) {
  if constexpr (!std::is_same_v<T, double> && size == 1) {
    Elements<BFloat16, size> narrow;
    load_rest(narrow, from, at, Type::bfloat16, true);
    memcpy(&x, &narrow, sizeof narrow);
  }
}

template <class T, int size>
__device__ __forceinline__ void put_rest(void* to, int64_t at, const Elements<T, size>& x) {
  if constexpr (!std::is_same_v<T, double> && size == 1) {
    Elements<BFloat16, size> narrow;
    memcpy(&narrow, &x, sizeof narrow);
    store_rest(to, at, narrow, Type::bfloat16, true);
  }
}

// From fetched elements to numbers, and back, rounding to nearest.
template <class T, int size>
__device__ __forceinline__ void widen(Elements<T, size>& x, Type type) {
  if constexpr (!std::is_same_v<T, double>) {
    if (type == Type::float32) return;
    Elements<BFloat16, size> narrow;
    memcpy(&narrow, &x, sizeof narrow);
#pragma unroll
    for (int j = 0; j < size; ++j) {
      const BFloat16 each = narrow.at[j];
      x.at[j] = type == Type::bfloat16 ? widened(each, type) : widened(Float16{each.bits}, type);
    }
  }
}

template <class T, int size>
__device__ __forceinline__ void round_to(Elements<T, size>& x, Type type) {
  if constexpr (!std::is_same_v<T, double>) {
    if (type == Type::float32) return;
    Elements<BFloat16, size> narrow;
#pragma unroll
    for (int j = 0; j < size; ++j) {
      if (type == Type::bfloat16) {
        narrow.at[j].bits = static_cast<uint16_t>(narrowed<BFloat16>(x.at[j]));
      } else {
        narrow.at[j].bits = static_cast<uint16_t>(narrowed<Float16>(x.at[j]));
      }
    }
    memcpy(&x, &narrow, sizeof narrow);
  }
}

// From the fetched halves of weights to whole ones, and back.
template <class T, int size>
__device__ __forceinline__ void join(Elements<T, size>& w, const Elements<T, size>& lost) {
  if constexpr (!std::is_same_v<T, double>) {
    Elements<BFloat16, size> shown, rest;
    memcpy(&shown, &w, sizeof shown);
    memcpy(&rest, &lost, sizeof rest);
#pragma unroll
    for (int j = 0; j < size; ++j) w.at[j] = whole(shown.at[j].bits, rest.at[j].bits);
  }
}
template <class T, int size>
__device__ __forceinline__ void halve(Elements<T, size>& w, Elements<T, size>& lost, bool cut, uint32_t stretch,
                                      uint32_t index) {
  if constexpr (!std::is_same_v<T, double>) {
    Elements<BFloat16, size> shown, rest;
#pragma unroll
    for (int j = 0; j < size; ++j) {
      split(w.at[j], shown.at[j], rest.at[j], cut, stretch, (index + static_cast<uint32_t>(j)) * kWeyl);
    }
    memcpy(&w, &shown, sizeof shown);
    memcpy(&lost, &rest, sizeof rest);
  }
}

// v ← β₂ v + (1 - β₂) g² of one element, and s.
template <class T>
struct ElementVariance {
  T beta2, rest, root, eps, largest;

  // Saturated: from infinity it could never decay. A NaN stays one.
  __device__ __forceinline__ T entered(T v, T g) const {
    const T x = Ops<T>::multiply_add(g, g * rest, v * beta2);
    return x > largest ? largest : x;
  }
  __device__ __forceinline__ T scale(T v) const { return Ops<T>::multiply_add(Ops<T>::root(v), root, eps); }
};

// A chunk of a tensor: kTile elements, or its last ones. `all32`: all weights and gradients are float32.
template <ScaledPass pass, bool all32>
struct ScaledChunk {
  static constexpr bool sums = pass == ScaledPass::accumulate;
  static constexpr bool writes_m = pass != ScaledPass::apply;
  static constexpr bool writes_w = pass != ScaledPass::accumulate;

  const ScaledTask& task;
  const Row& row;
  const Scaling& scaling;
  uint32_t tensor;
  int64_t begin;
  bool by_element;       // each element has its own variance
  bool gradient;         // the update has the term by_gradient·v
  bool narrow, rounds;   // w has 16 bits, m has
  bool still;            // the step is skipped: nothing may be written

  __device__ __forceinline__ ScaledChunk(
      const ScaledTask& task, const Row& row, const Scaling& scaling, uint32_t tensor, uint32_t tile, bool still)
      : task(task),
        row(row),
        scaling(scaling),
        tensor(tensor),
        begin(static_cast<int64_t>(tile - row.first) * kTile),
        by_element(scaling.v != nullptr),
        gradient(pass == ScaledPass::accumulate || task.by_gradient != nullptr),
        narrow(!all32 && is_narrow_type(row.w_type)),
        rounds(row.m_type == Type::bfloat16),
        still(still) {}

  // Whether it can be loaded in pieces of `many` elements, none of which ends in another row than it begins.
  __device__ __forceinline__ bool full(int many) const {
    return row.aligned && !row.cut && row.numel - begin >= kTile && (by_element || scaling.cols % many == 0);
  }

  __device__ __forceinline__ void sweep(double (&sum)[kScaledSums]) const {
    if constexpr (!all32) {
      if (row.w_type == Type::float64) {
        return full(kMany<double>) ? sweep<double, kMany<double>>(sum) : sweep<double, 1>(sum);
      }
    }
    return full(kMany<float>) ? sweep<float, kMany<float>>(sum) : sweep<float, 1>(sum);
  }

  template <class T, int size>
  __device__ __forceinline__ void sweep(double (&sum)[kScaledSums]) const {
    constexpr bool kIs32 = std::is_same_v<T, float>;
    const Type w_type = kIs32 && all32 ? Type::float32 : row.w_type;
    const Type g_type = kIs32 && all32 ? Type::float32 : row.g_type;
    const bool keeps = kIs32 && narrow && row.lost != nullptr;
    const bool master = keeps && row.master, cut = size == 1 && master && row.cut;
    const T half_eps = w_type == Type::float16 ? T(1) / 2048 : T(1) / 256;
    const auto given = [&](const double* from, T missing) {
      return from == nullptr ? missing : static_cast<T>(load_cg(from));
    };
    const auto mine = [&](const double* from) { return from == nullptr ? nullptr : from + tensor; };
    const T gain = given(task.gain, T(1)), decay_m = static_cast<T>(scaling.decay_m),
            decay_g = static_cast<T>(scaling.decay_g), by_weight = given(mine(task.by_weight), T(1)),
            by_gradient = given(mine(task.by_gradient), T(0)), by_moment = given(mine(task.by_moment), T(0));
    ElementVariance<T> variance{};
    if (by_element) {
      const double beta2 = load_cg(task.beta2 + tensor);  // 1 - β₂ cancels: not in float32
      variance = {static_cast<T>(beta2), static_cast<T>(1.0 - beta2), given(task.root + tensor, T(0)),
                  given(task.eps + tensor, T(0)), kIs32 ? T(FLT_MAX) : T(DBL_MAX)};
    }
    const Inverse<T> diagonal(scaling, begin);
    uint32_t stretch = 0;
    if (kIs32 && ((writes_m && rounds) || (writes_w && cut))) {
      stretch = stretch_key(tensor_key(row.ordinal, *row.step + (sums ? 1 : 0)), begin);
    }
    const int64_t rest = row.numel - begin;
    const int left = static_cast<int>(rest < kTile ? rest : kTile);

#pragma unroll 1
    for (int at = static_cast<int>(threadIdx.x) * size; at < left; at += kThreads * size) {
      const int64_t place = begin + at;
      Elements<T, size> m, g, w, lost, v, inverse;
      if constexpr (size == 1) g = lost = v = inverse = {};  // compilers cannot see that they are set where needed
      fetch(m, row.m, place, row.m_type);
      if (gradient || writes_m) fetch(g, row.g, place, g_type);
      if constexpr (writes_w) fetch(w, row.w, place, w_type);
      if (keeps) {
        if (cut) {
          fetch_rest(lost, row.lost, place);
        } else {
          fetch(lost, row.lost, place, w_type);
        }
      }
      if (by_element) {
        load(v, scaling.v, place, Type());
      } else {
        diagonal.at(at, inverse);
      }
      widen(m, row.m_type);
      if (gradient || writes_m) {
        widen(g, g_type);
#pragma unroll
        for (int j = 0; j < size; ++j) g.at[j] = g.at[j] * gain;
      }
      if (by_element) {
#pragma unroll
        for (int j = 0; j < size; ++j) {
          if (writes_m && !still) v.at[j] = variance.entered(v.at[j], g.at[j]);
          const T scale = variance.scale(v.at[j]);
          inverse.at[j] = T(1) / scale;
          if (sums) sum[kTrace] += scale;
        }
        if (writes_m && !still) store(scaling.v, place, v, Type());
      }
      if constexpr (writes_m) {
        if (!still) {
          Elements<T, size> stored;
#pragma unroll
          for (int j = 0; j < size; ++j) stored.at[j] = m.at[j] = blended(m.at[j], g.at[j], decay_m, decay_g);
          if (kIs32 && rounds) {
            Elements<BFloat16, size> rounded;
#pragma unroll
            for (int j = 0; j < size; ++j) {
              const uint32_t index = (static_cast<uint32_t>(place) + static_cast<uint32_t>(j)) * kWeyl;
              const uint32_t bits = rounded_stochastically(bits_of(static_cast<float>(m.at[j])),
                                                           random_bits(stretch, index));
              keep_upper(bits, rounded.at[j]);
              if (sums) m.at[j] = from_bits(bits);  // sums are those of the moment as stored
            }
            memcpy(&stored, &rounded, sizeof rounded);
          }
          put(row.m, place, stored, row.m_type);
        }
      }
      if constexpr (sums) {
#pragma unroll
        for (int j = 0; j < size; ++j) {
          const T scaled = m.at[j] * inverse.at[j];
          sum[kMM] = fma(static_cast<double>(m.at[j]), static_cast<double>(scaled), sum[kMM]);
          sum[kMG] = fma(static_cast<double>(g.at[j]), static_cast<double>(scaled), sum[kMG]);
        }
      }
      if constexpr (writes_w) {
        if (master) {
          join(w, lost);
        } else {
          widen(w, w_type);
        }
        if (keeps && !master) {
          widen(lost, w_type);
#pragma unroll
          for (int j = 0; j < size; ++j) w.at[j] = with_lost_bits(w.at[j], lost.at[j], half_eps);
        }
#pragma unroll
        for (int j = 0; j < size; ++j) {
          T step = by_moment * m.at[j];
          if (gradient) step = Ops<T>::multiply_add(by_gradient, g.at[j], step);
          w.at[j] = Ops<T>::multiply_add(inverse.at[j], step, w.at[j] * by_weight);
        }
        Elements<T, size> rounded = w;
        if (master) {
          halve(rounded, lost, cut, stretch, static_cast<uint32_t>(place));
          if (cut) {
            put_rest(row.lost, place, lost);
          } else {
            put(row.lost, place, lost, w_type);
          }
        } else {
          round_to(rounded, w_type);
        }
        put(row.w, place, rounded, w_type);
        if (keeps && !master) {
          widen(rounded, w_type);
#pragma unroll
          for (int j = 0; j < size; ++j) lost.at[j] = lost_bits(w.at[j], rounded.at[j], T(FLT_MAX));
          round_to(lost, w_type);
          put(row.lost, place, lost, w_type);
        }
      }
    }
  }

 private:
  static __device__ __forceinline__ bool is_narrow_type(Type type) {
    return type == Type::bfloat16 || type == Type::float16;
  }
};

namespace {

__device__ __forceinline__ const Scaling* scalings_of(const Arguments<ScaledTask, kMost>& a) {
  return a.task.rows != nullptr ? a.task.scalings
                                : reinterpret_cast<const Scaling*>(a.more + a.task.tensors * sizeof(Row));
}

// A step that is skipped has sums all the same, of the moments as they are.
template <bool all32>
__global__ void __launch_bounds__(kThreads, kBlocks)
    accumulate_scaled(const __grid_constant__ Arguments<ScaledTask, kMost> a) {
  __shared__ Shared shared;
  const ScaledTask& task = a.task;
  const uint32_t tile = blockIdx.x, tensor = tensor_of(task, rows_of(a), tile);
  const Row row = rows_of(a)[tensor];
  const Scaling scaling = scalings_of(a)[tensor];
  double sums[kScaledSums] = {};
  ScaledChunk<ScaledPass::accumulate, all32>(task, row, scaling, tensor, tile, skipped(task)).sweep(sums);
  const auto takes = [](int) { return true; };
  const bool writes = threadIdx.x < kScaledSums;
  const uint32_t tiles = tiles_of(row.numel);
  double* const result = task.sums + tensor + static_cast<size_t>(threadIdx.x) * task.tensors;
  const double total = block_total(sums, takes, shared);
  if (writes) *(tiles == 1 ? result : task.slots + tile + static_cast<size_t>(threadIdx.x) * task.tiles) = total;
  if (tiles == 1 || !is_last_block(task.counters + tensor, tiles, shared)) return;
  double slots[kScaledSums] = {};
  for (uint32_t i = threadIdx.x; i < tiles; i += kThreads) {
#pragma unroll
    for (int sum = 0; sum < kScaledSums; ++sum) {
      slots[sum] += load_cg(task.slots + static_cast<size_t>(sum) * task.tiles + row.first + i);
    }
  }
  const double all = block_total(slots, takes, shared);
  if (writes) *result = all;
}

// apply_scaled or commit_scaled.
template <ScaledPass pass, bool all32>
__global__ void __launch_bounds__(kThreads, all32 ? 3 : kBlocks)
    update_scaled(const __grid_constant__ Arguments<ScaledTask, kMost> a) {
  const ScaledTask& task = a.task;
  if (skipped(task)) return;
  const uint32_t tile = task.tiles - 1 - blockIdx.x, tensor = tensor_of(task, rows_of(a), tile);
  const Row row = rows_of(a)[tensor];
  const Scaling scaling = scalings_of(a)[tensor];
  double none[kScaledSums];
  ScaledChunk<pass, all32>(task, row, scaling, tensor, tile, false).sweep(none);
}

}  // namespace
}  // namespace sofim::cuda
