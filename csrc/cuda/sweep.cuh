// One pass over the elements of a chunk: kTile elements of one tensor, or its last ones. The arithmetic of an element
// is in step/element.h.
#pragma once

#include <cuda_runtime.h>

#include <cfloat>
#include <type_traits>

#include "cuda/kernels.h"
#include "cuda/reduce.cuh"
#include "cuda/storage.cuh"
#include "step/element.h"

namespace sofim::cuda {

// A pass, and what is known about it at compile time (see Form). `gradient`: accumulate also sums m·g; apply reads g,
// for the term by_gradient·v. `l2`: accumulate and dots have code for L2 decay, which is used if the task has l2.
// `step`: accumulate also updates w. Whether commit has the term by_gradient·v is known at run time only.
template <Pass pass_, bool gradient_ = false, bool l2_ = false, bool step_ = false>
struct Kind {
  static constexpr Pass pass = pass_;
  static constexpr bool gradient = gradient_, l2 = l2_;
  static constexpr bool sums = pass == Pass::accumulate || pass == Pass::dots;
  static constexpr bool writes_m = pass == Pass::accumulate || pass == Pass::commit;
  static constexpr bool writes_w = pass == Pass::apply || pass == Pass::commit || step_;  // and reads it
  static constexpr bool reads_g = pass != Pass::apply || gradient;

  // Whether the pass computes a sum. `decays`: with L2 decay.
  static SOFIM_HD constexpr bool takes(int sum, bool decays) {
    if (!sums) return false;
    const bool weights = l2 && decays;
    if (pass == Pass::accumulate) return sum == kMM || (gradient && (sum == kMG || (weights && sum == kMW)));
    return weights || sum == kMM || sum == kMG || sum == kGG;
  }
};

// A tensor's factors in the type of computation.
template <class S>
struct Factors {
  using T = typename S::T;
  T decay_m = 1, decay_g = 0, decay_w = 0, by_weight = 1, by_gradient = 0, by_moment = 0, gain = 1;
  uint32_t stretch = 0;  // keys the random bits (stretch_key)
};

// The sums of one thread.
template <class K>
struct Sums {
  double at[kSums] = {};

  // Products of float32 are exact in float64.
  __device__ __forceinline__ void add(Sum sum, double a, double b) {
    if (K::takes(sum, true)) at[sum] = fma(a, b, at[sum]);
  }
};

// A chunk of a tensor, with everything that a sweep over it needs.
struct Chunk {
  const Task& task;
  const Row& row;
  const Group* groups;
  uint32_t tensor;
  int64_t begin;
  bool l2, gradient;  // of the task

  __device__ __forceinline__ Chunk(
      const Task& task, const Row& row, const Group* groups, uint32_t tensor, uint32_t tile)
      : task(task),
        row(row),
        groups(groups),
        tensor(tensor),
        begin(static_cast<int64_t>(tile - row.first) * kTile),
        l2(task.l2),
        gradient(reads_gradient(task.numerator)) {}

  // Whether all of it can be loaded in vectors.
  __device__ __forceinline__ bool full() const { return row.aligned && !row.cut && row.numel - begin >= kTile; }

  template <class S, class K>
  __device__ __forceinline__ Factors<S> factors() const {
    using T = typename S::T;
    Factors<S> f;
    if constexpr (K::writes_m) {
      const Decay& decay = groups[row.group].decay;
      f.decay_m = static_cast<T>(decay.m);
      f.decay_g = static_cast<T>(decay.g);
      if constexpr (K::l2 || K::pass == Pass::commit) {
        if (l2) f.decay_w = static_cast<T>(decay.w);
      }
    }
    if constexpr ((K::writes_m && S::kRounds) || (K::writes_w && S::kCuts)) {
      if (K::writes_m || row.cut) {
        int64_t update = K::pass == Pass::accumulate ? 1 : 0;
        if constexpr (S::kCuts) {  // not from a cache that this block filled before the step was counted
          update += __ldcg(reinterpret_cast<const long long*>(row.step));
        } else {
          update += *row.step;
        }
        f.stretch = stretch_key(tensor_key(row.ordinal, update), begin);
      }
    }
    if constexpr (K::writes_w) {
      if (task.by_weight != nullptr) f.by_weight = static_cast<T>(load_cg(task.by_weight + tensor));
      if (has_gradient_term<K>() && task.by_gradient != nullptr) {
        f.by_gradient = static_cast<T>(load_cg(task.by_gradient + tensor));
      }
      if (task.by_moment != nullptr) f.by_moment = static_cast<T>(load_cg(task.by_moment + tensor));
    }
    if constexpr (K::pass == Pass::commit) {
      if (task.gain != nullptr) f.gain = static_cast<T>(load_cg(task.gain));
    }
    return f;
  }

  // Whether the update of w has the term by_gradient·v.
  template <class K>
  __device__ __forceinline__ bool has_gradient_term() const {
    return K::pass == Pass::commit ? gradient : K::gradient;
  }

  template <class W, int size>
  __device__ __forceinline__ void load_lost(Elements<W, size>& lost, int64_t at, bool cut) const {
    if constexpr (std::is_same_v<W, Loose>) {
      load_rest(lost, row.lost, at, row.w_type, cut);
    } else {
      load(lost, row.lost, at, row.w_type);
    }
  }
  template <class W, int size>
  __device__ __forceinline__ void store_lost(const Elements<W, size>& lost, int64_t at, bool cut) const {
    if constexpr (std::is_same_v<W, Loose>) {
      store_rest(row.lost, at, lost, row.w_type, cut);
    } else {
      store(row.lost, at, lost, row.w_type);
    }
  }

  // Works on `size` elements at a time: S::kVector for a full chunk, else 1.
  template <class S, class K, int size>
  __device__ __forceinline__ void sweep(Sums<K>& sums) const {
    using T = typename S::T;
    constexpr bool kFull = size > 1;
    constexpr int kBatch = kFull ? S::kBatch : 4;
    const Factors<S> f = factors<S, K>();
    const int64_t rest = row.numel - begin;
    const int left = static_cast<int>(rest < kTile ? rest : kTile);
    const bool keeps = S::kNarrow && row.lost != nullptr;
    const bool master = S::kSplits && keeps && row.master, cut = S::kCuts && master && row.cut;
    const bool rounds = S::kLoose ? row.m_type == Type::bfloat16 : S::kRounds;
    const bool decays = f.decay_w != 0;  // a zero factor adds no term: zero times an infinite weight is NaN
    const bool half = S::kLoose ? row.w_type == Type::float16 : std::is_same_v<typename S::W, Float16>;
    const float half_eps = half ? 1.0f / 2048 : 1.0f / 256;

    // The weight, whole if it is kept in two halves. Kahan's lost bits enter its update only.
    const auto weight_of = [&](const typename S::W& w, const typename S::W& lost) -> T {
      if constexpr (S::kSplits) {
        if (master) return whole(w.bits, lost.bits);
      }
      return widened(w, row.w_type);
    };

#pragma unroll 1
    for (int start = 0; start < (kFull ? static_cast<int>(kTile) : left); start += kThreads * size * kBatch) {
      Elements<typename S::W, size> ws[kBatch], lost[kBatch];
      Elements<typename S::G, size> gs[kBatch];
      Elements<typename S::M, size> ms[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int at = start + (i * kThreads + static_cast<int>(threadIdx.x)) * size;
        if (!kFull && at >= left) continue;
        load(ms[i], row.m, begin + at, row.m_type);
        if constexpr (K::reads_g) load(gs[i], row.g, begin + at, row.g_type);
        if constexpr (K::writes_w) {
          load(ws[i], row.w, begin + at, row.w_type);
        } else if constexpr (K::sums && K::l2) {
          ws[i] = {};  // otherwise the compiler would keep what an earlier iteration loaded in registers
          if (l2) load(ws[i], row.w, begin + at, row.w_type);
        }
        if constexpr (K::writes_w && S::kNarrow) {
          if (keeps) load_lost(lost[i], begin + at, cut);
        } else if constexpr (K::sums && K::l2 && S::kSplits) {
          lost[i] = {};
          if (l2 && master) load_lost(lost[i], begin + at, cut);
        }
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int at = start + (i * kThreads + static_cast<int>(threadIdx.x)) * size;
        if (!kFull && at >= left) continue;
#pragma unroll
        for (int j = 0; j < size; ++j) {
          T moment = widened(ms[i].at[j], row.m_type), v = 0, weight = 0;
          if constexpr (K::reads_g) v = widened(gs[i].at[j], row.g_type);
          if constexpr (K::writes_w) weight = weight_of(ws[i].at[j], lost[i].at[j]);
          if constexpr (K::pass == Pass::dots) {
            sums.add(kMM, moment, moment);
            sums.add(kMG, moment, v);
            sums.add(kGG, v, v);
          }
          if constexpr (K::writes_m) {
            if constexpr (K::pass == Pass::commit) v = v * f.gain;
            moment = blended(moment, v, f.decay_m, f.decay_g);
            if (decays) moment = Ops<T>::multiply_add(f.decay_w, weight_of(ws[i].at[j], lost[i].at[j]), moment);
            T kept = moment;
            if (S::kRounds && rounds) {
              const uint32_t place = (static_cast<uint32_t>(begin) + static_cast<uint32_t>(at + j)) * kWeyl;
              const float value = static_cast<float>(moment);
              const uint32_t bits = rounded_stochastically(bits_of(value), random_bits(f.stretch, place));
              keep_upper(bits, ms[i].at[j]);
              kept = from_bits(bits);
            } else {
              narrow(moment, ms[i].at[j], Type::float32);
            }
            if constexpr (K::pass == Pass::accumulate) {
              sums.add(kMM, kept, kept);
              sums.add(kMG, kept, v);
            }
          }
          if constexpr (K::writes_w) {
            if constexpr (K::sums && K::l2) {
              if (l2) sums.add(kMW, widened(ms[i].at[j], row.m_type), weight);
            }
            if constexpr (S::kNarrow) {
              if (keeps && !master) weight = with_lost_bits(weight, widened(lost[i].at[j], row.w_type), half_eps);
            }
            weight = weight * f.by_weight;
            if (has_gradient_term<K>()) weight = Ops<T>::multiply_add(f.by_gradient, v, weight);
            if constexpr (!K::sums) weight = Ops<T>::multiply_add(f.by_moment, moment, weight);
            if constexpr (S::kSplits) {
              const uint32_t place = (static_cast<uint32_t>(begin) + static_cast<uint32_t>(at + j)) * kWeyl;
              if (master) split(weight, ws[i].at[j], lost[i].at[j], cut, f.stretch, place);
            }
            if (!master) narrow(weight, ws[i].at[j], row.w_type);
            if constexpr (S::kNarrow) {
              if (keeps && !master) {
                narrow(lost_bits(weight, widened(ws[i].at[j], row.w_type), FLT_MAX), lost[i].at[j], row.w_type);
              }
            }
          }
        }
        if constexpr (K::takes(kMW, true) && !K::writes_w) {
          if (l2) {  // asked once per vector
#pragma unroll
            for (int j = 0; j < size; ++j) {
              const T weight = weight_of(ws[i].at[j], lost[i].at[j]);
              sums.add(kMW, widened(ms[i].at[j], row.m_type), weight);
              if constexpr (K::pass == Pass::dots) {
                sums.add(kGW, widened(gs[i].at[j], row.g_type), weight);
                sums.add(kWW, weight, weight);
              }
            }
          }
        }
        if constexpr (K::writes_m) store(row.m, begin + at, ms[i], row.m_type);
        if constexpr (K::writes_w) store(row.w, begin + at, ws[i], row.w_type);
        if constexpr (K::writes_w && S::kNarrow) {
          if (keeps) store_lost(lost[i], begin + at, cut);
        }
      }
    }
  }
};

// Which storage types a kernel serves (Types). A branch per chunk chooses the code for those of its tensor.

struct Float32Weights {
  template <class K>
  static __device__ __forceinline__ void sweep(const Chunk& chunk, Sums<K>& sums) {
    if (chunk.row.m_type == Type::float32) return stored<Storage<float, float, float>>(chunk, sums);
    return stored<Storage<float, float, BFloat16>>(chunk, sums);
  }

  template <class S, class K>
  static __device__ __forceinline__ void stored(const Chunk& chunk, Sums<K>& sums) {
    return chunk.full() ? chunk.sweep<S, K, S::kVector>(sums) : chunk.sweep<S, K, 1>(sums);
  }
};

struct NarrowWeights {
  template <class K>
  static __device__ __forceinline__ void sweep(const Chunk& chunk, Sums<K>& sums) {
    if (!chunk.full()) return chunk.sweep<Storage<Loose, Loose, Loose>, K, 1>(sums);
    if (chunk.row.w_type == Type::bfloat16) return full<BFloat16, BFloat16>(chunk, sums);
    return full<Float16, Float16>(chunk, sums);
  }

  template <class W, class G, class K>
  static __device__ __forceinline__ void full(const Chunk& chunk, Sums<K>& sums) {
    if (chunk.row.m_type == Type::float32) return in_vectors<Storage<W, G, float>>(chunk, sums);
    return in_vectors<Storage<W, G, BFloat16>>(chunk, sums);
  }

  template <class S, class K>
  static __device__ __forceinline__ void in_vectors(const Chunk& chunk, Sums<K>& sums) {
    return chunk.sweep<S, K, S::kVector>(sums);
  }
};

struct AnyWeights {
  template <class K>
  static __device__ __forceinline__ void sweep(const Chunk& chunk, Sums<K>& sums) {
    const Row& row = chunk.row;
    if (row.w_type == Type::float64) return Float32Weights::stored<Storage<double, double, double>>(chunk, sums);
    if (!chunk.full()) return chunk.sweep<Storage<Loose, Loose, Loose>, K, 1>(sums);
    if (row.w_type == Type::float32) return Float32Weights::sweep(chunk, sums);
    if (row.g_type != Type::float32) return NarrowWeights::sweep(chunk, sums);
    if (row.w_type == Type::bfloat16) return NarrowWeights::full<BFloat16, float>(chunk, sums);
    return NarrowWeights::full<Float16, float>(chunk, sums);
  }
};

}  // namespace sofim::cuda
