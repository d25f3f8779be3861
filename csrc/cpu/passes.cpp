// The four passes over one tile, compiled once per instruction set. The protocol is in
// sofim_fused/backends/protocol.py, the arithmetic in element.h.
#include "passes.h"

#include "vector.h"

namespace sofim {
namespace {

// Storage types of weight, gradient and moment, and how they are computed with.
template <class Weight, class Gradient, class Moment>
struct Types {
  using W = Weight;
  using G = Gradient;
  using M = Moment;
  using T = std::conditional_t<std::is_same_v<W, double>, double, float>;
  using V = std::conditional_t<std::is_same_v<W, double>, Doubles, Floats>;
  static constexpr bool kNarrow = sizeof(W) == 2;
  static constexpr bool kRounds = std::is_same_v<M, BFloat16>;
  // Half of the distance from 1 to the next W.
  static constexpr float kHalfEps = std::is_same_v<W, Half> ? 1.0f / 2048 : 1.0f / 256;
};

// Sixteen elements: where they lie, and the index of the first.
template <class Y>
struct Block {
  typename Y::W* w;
  const typename Y::G* g;
  typename Y::M* m;
  typename Y::W* kahan;
  int64_t index;

  SOFIM_HD void advance(int64_t elements) {
    w += elements;
    g += elements;
    m += elements;
    if (kahan != nullptr) kahan += elements;
    index += elements;
  }
};

// What a pass touches; the tail goes through copies of these.
struct Use {
  bool w, g, writes_m, writes_w;
};

// How many elements ahead a `far` pass asks for memory: the hardware's own prefetching stops at the end of each page.
constexpr ptrdiff_t kAhead = 512;
// From so many elements on, a tile is worked on from its start and from its middle in turns: that keeps more reads
// under way.
constexpr int64_t kSplit = 2048;

template <class T>
SOFIM_HD void ask_for(const T* from, ptrdiff_t ahead) {
#if defined(__GNUC__)
  const auto address = reinterpret_cast<uintptr_t>(from) + static_cast<uintptr_t>(ahead) * sizeof(T);
  __builtin_prefetch(reinterpret_cast<const void*>(address));
#endif
}

// Calls body(block) for every sixteen elements. The last few run through the same instructions, on copies padded with
// zeros, which add nothing to a sum.
template <class Y, class Body>
SOFIM_HD void for_blocks(const Record& r, const Mode& mode, int64_t begin, int64_t size, Use use, Body body) {
  const bool far = mode.far;
  Block<Y> block{
      static_cast<typename Y::W*>(r.w) + begin,
      static_cast<const typename Y::G*>(r.g) + begin,
      static_cast<typename Y::M*>(r.m) + begin,
      r.kahan == nullptr ? nullptr : static_cast<typename Y::W*>(r.kahan) + begin,
      begin};
  const auto take = [&](Block<Y>& b, ptrdiff_t ahead) SOFIM_INLINE {
    if (far) {
      if (use.w) ask_for(b.w, ahead);
      if (use.g) ask_for(b.g, ahead);
      ask_for(b.m, ahead);
    }
    body(b);
    b.advance(kLanes);
  };
  const int64_t end = begin + size;
  if (size >= kSplit) {
    const int64_t half = size / 2 / kLanes * kLanes;
    // From the end of either run to where it begins in the next tile.
    const ptrdiff_t next = size < kTile ? 0 : mode.backwards ? -3 * half : half;
    Block<Y> second = block;
    second.advance(half);
    while (block.index < begin + half) {
      const ptrdiff_t ahead = block.index + kAhead < begin + half ? kAhead : kAhead + next;
      take(block, ahead);
      take(second, ahead);
    }
    block = second;
  }
  while (block.index + kLanes <= end) take(block, kAhead);
  const size_t rest = static_cast<size_t>(end - block.index);
  if (rest == 0) return;
  alignas(64) typename Y::W w[kLanes] = {};
  alignas(64) typename Y::G g[kLanes] = {};
  alignas(64) typename Y::M m[kLanes] = {};
  alignas(64) typename Y::W kahan[kLanes] = {};
  if (use.w) memcpy(w, block.w, rest * sizeof *w);
  if (use.g) memcpy(g, block.g, rest * sizeof *g);
  memcpy(m, block.m, rest * sizeof *m);
  if (block.kahan != nullptr && use.writes_w) memcpy(kahan, block.kahan, rest * sizeof *kahan);
  body(Block<Y>{w, g, m, block.kahan == nullptr ? nullptr : kahan, block.index});
  if (use.writes_m) memcpy(block.m, m, rest * sizeof *m);
  if (use.writes_w) {
    memcpy(block.w, w, rest * sizeof *w);
    if (block.kahan != nullptr) memcpy(block.kahan, kahan, rest * sizeof *kahan);
  }
}

// A tensor's factors in the type that is computed with, and the key of its random bits in this tile.
template <class Y>
struct Factors {
  using V = typename Y::V;
  using T = typename Y::T;

  SOFIM_HD Factors(const Record& r, const Mode& mode, int64_t begin)
      : decay_m(static_cast<T>(r.decay.m)),
        decay_g(static_cast<T>(r.decay.g)),
        decay_w(static_cast<T>(r.decay.w)),
        update_w(static_cast<T>(r.update.w)),
        update_g(static_cast<T>(r.update.g)),
        update_m(static_cast<T>(r.update.m)),
        gain(static_cast<T>(mode.gain)),
        decays(mode.weights && r.decay.w != 0),
        stretch(stretch_key(r.key, begin)) {}

  // m' before it is stored. A zero decay.w adds no term: zero times an infinite weight would be NaN.
  SOFIM_HD V moment(const V& m, const V& v, const typename Y::W* w) const {
    const V blend = blended(m, v, V(decay_m), V(decay_g));
    return decays ? Ops<V>::multiply_add(V(decay_w), load(w), blend) : blend;
  }

  // Stores m' and returns it as stored.
  SOFIM_HD V store_moment(typename Y::M* to, const V& moment, int64_t index) const {
    if constexpr (Y::kRounds) {
      const Words place = lane_places() + static_cast<uint32_t>(index) * kWeyl;
      const Words random = random_bits(Words(stretch), place);
      const Words rounded = rounded_stochastically(bits_of(moment), random);
      store_upper(to, rounded);
      return from_bits(rounded);
    } else {
      store(to, moment);
      return moment;
    }
  }

  // w, and what it lost when it was stored; v and m enter as far as `with_v` and `with_m` say.
  template <bool with_v, bool with_m>
  SOFIM_HD void update(const Block<Y>& b, const V& v, const V& m) const {
    V w = load(b.w);
    if constexpr (Y::kNarrow) {
      if (b.kahan != nullptr) w = with_lost_bits(w, load(b.kahan), V(Y::kHalfEps));
    }
    w = w * V(update_w);
    if constexpr (with_v) w = Ops<V>::multiply_add(V(update_g), v, w);
    if constexpr (with_m) w = Ops<V>::multiply_add(V(update_m), m, w);
    store(b.w, w);
    if constexpr (Y::kNarrow) {
      if (b.kahan != nullptr) {
        store(b.kahan, lost_bits(w, load(b.w), V(std::numeric_limits<float>::max())));
      }
    }
  }

  const T decay_m, decay_g, decay_w, update_w, update_g, update_m, gain;
  const bool decays;
  const uint32_t stretch;
};

template <class Y, bool weights, bool cross, bool step>
void accumulate(const Record& r, const Mode& mode, int64_t begin, int64_t size, double* sums) {
  const Factors<Y> factors(r, mode, begin);
  Lanes mm, mg, mw;
  for_blocks<Y>(r, mode, begin, size, Use{weights || step, true, true, step}, [&](const Block<Y>& b) SOFIM_INLINE {
    const auto g = load(b.g);
    const auto m = factors.store_moment(b.m, factors.moment(load(b.m), g, b.w), b.index);
    const auto wide = widened(m);
    mm.add(wide, wide);
    if constexpr (cross) {
      mg.add(wide, widened(g));
      if constexpr (weights) mw.add(wide, widened(load(b.w)));
    }
    if constexpr (step) factors.template update<true, false>(b, g, g);
  });
  sums[kMM] = mm.total();
  if constexpr (cross) sums[kMG] = mg.total();
  if constexpr (cross && weights) sums[kMW] = mw.total();
}

template <class Y, bool gradient>
void apply(const Record& r, const Mode& mode, int64_t begin, int64_t size, double*) {
  const Factors<Y> factors(r, mode, begin);
  for_blocks<Y>(r, mode, begin, size, Use{true, gradient, false, true}, [&](const Block<Y>& b) SOFIM_INLINE {
    const auto m = load(b.m);
    if constexpr (gradient) {
      factors.template update<true, true>(b, load(b.g), m);
    } else {
      factors.template update<false, true>(b, m, m);
    }
  });
}

template <class Y, bool weights>
void dots(const Record& r, const Mode& mode, int64_t begin, int64_t size, double* sums) {
  Lanes mm, mg, gg, mw, gw, ww;
  for_blocks<Y>(r, mode, begin, size, Use{weights, true, false, false}, [&](const Block<Y>& b) SOFIM_INLINE {
    const Doubles m = widened(load(b.m)), g = widened(load(b.g));
    mm.add(m, m);
    mg.add(m, g);
    gg.add(g, g);
    if constexpr (weights) {
      const Doubles w = widened(load(b.w));
      mw.add(m, w);
      gw.add(g, w);
      ww.add(w, w);
    }
  });
  sums[kMM] = mm.total();
  sums[kMG] = mg.total();
  sums[kGG] = gg.total();
  if constexpr (weights) {
    sums[kMW] = mw.total();
    sums[kGW] = gw.total();
    sums[kWW] = ww.total();
  }
}

template <class Y, bool gradient>
void commit(const Record& r, const Mode& mode, int64_t begin, int64_t size, double*) {
  const Factors<Y> factors(r, mode, begin);
  const bool scaled = mode.scaled;
  for_blocks<Y>(r, mode, begin, size, Use{true, true, true, true}, [&](const Block<Y>& b) SOFIM_INLINE {
    auto v = load(b.g);
    if (scaled) v = v * typename Y::V(factors.gain);
    const auto m = factors.moment(load(b.m), v, b.w);
    factors.store_moment(b.m, m, b.index);
    factors.template update<gradient, true>(b, v, m);
  });
}

// From a record's types to a kernel's, once per tile.
template <class Run>
void with_types(const Record& r, Run run) {
  const bool wide_g = r.g_type == Type::float32, wide_m = r.m_type == Type::float32;
  switch (r.w_type) {
    case Type::float64:
      return run(Types<double, double, double>());
    case Type::float32:
      return wide_m ? run(Types<float, float, float>()) : run(Types<float, float, BFloat16>());
    case Type::bfloat16:
      if (wide_g) return wide_m ? run(Types<BFloat16, float, float>()) : run(Types<BFloat16, float, BFloat16>());
      return wide_m ? run(Types<BFloat16, BFloat16, float>()) : run(Types<BFloat16, BFloat16, BFloat16>());
    case Type::float16:
      if (wide_g) return wide_m ? run(Types<Half, float, float>()) : run(Types<Half, float, BFloat16>());
      return wide_m ? run(Types<Half, Half, float>()) : run(Types<Half, Half, BFloat16>());
  }
}

void run_accumulate(const Record& r, const Mode& mode, int64_t begin, int64_t size, double* sums) {
  with_types(r, [&](auto types) {
    using Y = decltype(types);
    const auto run = [&](auto weights, auto cross) {
      (mode.gradient ? accumulate<Y, weights, cross, true> : accumulate<Y, weights, cross, false>)(
          r, mode, begin, size, sums);
    };
    if (mode.weights) {
      mode.cross ? run(std::true_type(), std::true_type()) : run(std::true_type(), std::false_type());
    } else {
      mode.cross ? run(std::false_type(), std::true_type()) : run(std::false_type(), std::false_type());
    }
  });
}

void run_apply(const Record& r, const Mode& mode, int64_t begin, int64_t size, double* sums) {
  with_types(r, [&](auto types) {
    using Y = decltype(types);
    (mode.gradient ? apply<Y, true> : apply<Y, false>)(r, mode, begin, size, sums);
  });
}

void run_dots(const Record& r, const Mode& mode, int64_t begin, int64_t size, double* sums) {
  with_types(r, [&](auto types) {
    using Y = decltype(types);
    (mode.weights ? dots<Y, true> : dots<Y, false>)(r, mode, begin, size, sums);
  });
}

void run_commit(const Record& r, const Mode& mode, int64_t begin, int64_t size, double* sums) {
  with_types(r, [&](auto types) {
    using Y = decltype(types);
    (mode.gradient ? commit<Y, true> : commit<Y, false>)(r, mode, begin, size, sums);
  });
}

}  // namespace

const Kernels& kernels() {
  static constexpr Kernels table{run_accumulate, run_apply, run_dots, run_commit};
  return table;
}

}  // namespace sofim
