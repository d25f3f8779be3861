// A tile sixteen elements at a time, and what the passes do to each sixteen: for kernels.cpp and adaptive_kernels.h.
#pragma once

#include "cpu/kernels.h"
#include "cpu/lanes.h"

namespace sofim {
namespace {

// Storage types of weight, gradient, moment and lost bits, and the types of computation.
template <class Weight, class Gradient, class Moment, class Lost = Weight>
struct Types {
  using W = Weight;
  using G = Gradient;
  using M = Moment;
  using L = Lost;
  using T = std::conditional_t<std::is_same_v<W, double>, double, float>;
  using V = std::conditional_t<std::is_same_v<W, double>, Doubles, Floats>;
  static constexpr bool kNarrow = sizeof(W) == 2;
  static constexpr bool kSplits = std::is_same_v<W, BFloat16>;  // w may be half of a float32 (TensorRow::master)
  static constexpr bool kCuts = std::is_same_v<L, int8_t>;       // it is, and the float32 has 24 bits (TensorRow::cut)
  static constexpr bool kRounds = std::is_same_v<M, BFloat16>;
  // Half of the distance from 1 to the next W.
  static constexpr float kHalfEps = std::is_same_v<W, Half> ? 1.0f / 2048 : 1.0f / 256;
};

// Sixteen elements: their addresses, and the index of the first.
template <class Y>
struct Block {
  typename Y::W* w;
  const typename Y::G* g;
  typename Y::M* m;
  typename Y::L* lost;
  int64_t index;

  SOFIM_HD void advance(int64_t elements) {
    w += elements;
    g += elements;
    m += elements;
    if (lost != nullptr) lost += elements;
    index += elements;
  }
  // To the second one of a pair.
  SOFIM_HD void jump(int64_t elements) { advance(elements); }
};

// The weight, whole if it is kept in two halves (`master`). Kahan's lost bits are no part of it: they enter updates only.
template <class Y>
SOFIM_HD typename Y::V weight_of(const Block<Y>& b, bool master) {
  if constexpr (Y::kSplits) {
    if (Y::kCuts || master) return from_bits(joined(bits_of(load(b.w)), load_signed(b.lost)));
  }
  return load(b.w);
}
template <class Y>
SOFIM_HD Doubles wide_weight_of(const Block<Y>& b, bool master) {
  if constexpr (Y::kSplits) return widened(weight_of(b, master));
  return load_widened(b.w);
}

// What a pass reads or writes, besides reading m; the tail of a tile goes through copies of these.
struct Use {
  bool w, g, writes_m, writes_w;
};

// How many elements ahead memory is prefetched, if at all: the hardware's own prefetching stops at each page's end.
constexpr ptrdiff_t kAhead = 512;
// A tile of at least this many elements is processed from its start and from its middle alternately: that keeps more
// reads in flight.
constexpr int64_t kSplit = 2048;

template <class T>
SOFIM_HD void ask_for(const T* from, ptrdiff_t ahead) {
#if defined(__GNUC__)
  const auto address = reinterpret_cast<uintptr_t>(from) + static_cast<uintptr_t>(ahead) * sizeof(T);
  __builtin_prefetch(reinterpret_cast<const void*>(address));
#endif
}

// `pairs` pairs of blocks: those that start at `first`, and those `gap` elements after them. Each pair is `stride`
// elements after the one before. With `far`, memory is prefetched kAhead elements ahead; where that is index `bend` or
// more, `skip` elements further.
template <class B>
struct Run {
  B first;
  int64_t gap, pairs, stride;
  bool far;
  int64_t bend;
  ptrdiff_t skip;
};

// Calls `pass` for all blocks of a run, and adds to `sums`. Not inlined, so that it is compiled once. What it takes is
// small or passed by reference: for a tensor of a few hundred elements, a copy would take longer than the loop.
template <class Pass, class B>
SOFIM_NOINLINE void over_blocks(const Pass& given, const Run<B>& run, typename Pass::Sums& total) {
  const Pass pass = given;  // local copies, which no store to a tensor can change
  typename Pass::Sums sums = total;
  const Use use = pass.use();
  const bool far = run.far;
  const int64_t stride = run.stride;
  const auto take = [&](B& block, ptrdiff_t ahead) SOFIM_INLINE {
    if (far) {
      if (use.w) ask_for(block.w, ahead);
      if (use.g) ask_for(block.g, ahead);
      ask_for(block.m, ahead);
    }
    pass(block, sums);
    block.advance(stride);
  };
  B first = run.first, second = run.first;
  second.jump(run.gap);
  for (int64_t pairs = run.pairs; pairs > 0; --pairs) {
    const ptrdiff_t ahead = first.index + kAhead < run.bend ? kAhead : kAhead + run.skip;
    take(first, ahead);
    take(second, ahead);
  }
  total = sums;
}

// What the random bits of sixteen elements are a hash of: the key of the tensor's stretch, and their places.
SOFIM_HD Words keyed_places(uint32_t stretch, int64_t index) {
  return lane_places() + (stretch + static_cast<uint32_t>(index) * kWeyl);
}

// A tensor's factors in the type of computation, and the key of its random bits in this tile.
template <class Y>
struct Factors {
  using V = typename Y::V;
  using T = typename Y::T;

  SOFIM_HD Factors(const Row& r, const Mode& mode, int64_t begin)
      : decay_m(static_cast<T>(r.decay.m)),
        decay_g(static_cast<T>(r.decay.g)),
        decay_w(static_cast<T>(r.decay.w)),
        update_w(static_cast<T>(r.update.weight)),
        update_g(static_cast<T>(r.update.gradient)),
        update_m(static_cast<T>(r.update.moment)),
        gain(static_cast<T>(mode.gain)),
        decays(mode.weights && r.decay.w != 0),
        master(r.master),
        stretch(stretch_key(r.key, begin)) {}

  // m' before it is stored. A zero decay.w adds no term: zero times an infinite weight would be NaN.
  SOFIM_HD V moment(const V& m, const V& v, const Block<Y>& b) const {
    const V blend = blended(m, v, V(decay_m), V(decay_g));
    return decays ? Ops<V>::multiply_add(V(decay_w), weight_of(b, master), blend) : blend;
  }

  // Stores m' and returns it as stored.
  SOFIM_HD V store_moment(typename Y::M* to, const V& moment, int64_t index) const {
    return store_moment(to, moment, keyed_places(stretch, index));
  }

  // The same, given keyed_places().
  SOFIM_HD V store_moment(typename Y::M* to, const V& moment, const Words& places) const {
    if constexpr (Y::kRounds) {
      const Words random = random_bits(places, Words(0u));
      const Words rounded = rounded_stochastically(bits_of(moment), random);
      store_upper(to, rounded);
      return from_bits(rounded);
    } else {
      store(to, moment);
      return moment;
    }
  }

  // Updates w and its lost bits. `with_v`, `with_m`: whether to add the terms of v and m.
  SOFIM_HD void update(const Block<Y>& b, const V& v, const V& m, bool with_v, bool with_m, const Words& places) const {
    V w = weight_of(b, master);
    if constexpr (Y::kNarrow && !Y::kCuts) {
      if (b.lost != nullptr && !master) w = with_lost_bits(w, load(b.lost), V(Y::kHalfEps));
    }
    w = w * V(update_w);
    if (with_v) w = Ops<V>::multiply_add(V(update_g), v, w);
    if (with_m) w = Ops<V>::multiply_add(V(update_m), m, w);
    if constexpr (Y::kCuts) {
      const Words bits = cut_stochastically(splittable(bits_of(w)), random_byte(places, Words(0u)));
      store_upper(b.w, shown_half(bits));
      store_bytes(b.lost, bits >> 8);
      return;
    } else if constexpr (Y::kSplits) {
      if (master) {
        const Words bits = splittable(bits_of(w));
        store_upper(b.w, shown_half(bits));
        store_lower(b.lost, bits);
        return;
      }
    }
    store(b.w, w);
    if constexpr (Y::kNarrow && !Y::kCuts) {
      if (b.lost != nullptr) {
        store(b.lost, lost_bits(w, load(b.w), V(std::numeric_limits<float>::max())));
      }
    }
  }

  T decay_m, decay_g, decay_w, update_w, update_g, update_m, gain;
  bool decays, master;
  uint32_t stretch;
};

// Calls `run` with the Types of a row whose weights and gradients have at most 32 bits; M: those of the moment.
template <class M, class Run>
void with_types_of(const Row& r, Run run) {
  const bool wide_g = r.g_type == Type::float32;
  switch (r.w_type) {
    case Type::float32:
      return run(Types<float, float, M>());
    case Type::bfloat16:
      if (r.cut) return wide_g ? run(Types<BFloat16, float, M, int8_t>()) : run(Types<BFloat16, BFloat16, M, int8_t>());
      return wide_g ? run(Types<BFloat16, float, M>()) : run(Types<BFloat16, BFloat16, M>());
    case Type::float16:
      return wide_g ? run(Types<Half, float, M>()) : run(Types<Half, Half, M>());
    case Type::float64:
    case Type::codes:  // of moments alone
      return;
  }
}

// Calls `run` with the Types of a row: the choice is made once per tile.
template <class Run>
void with_types(const Row& r, Run run) {
  if (r.w_type == Type::float64) return run(Types<double, double, double>());
  r.m_type == Type::float32 ? with_types_of<float>(r, run) : with_types_of<BFloat16>(r, run);
}

}  // namespace
}  // namespace sofim
