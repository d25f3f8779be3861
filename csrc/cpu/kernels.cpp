// The passes over one tile, compiled once per instruction set. sofim_fused/backends/interface.py defines what they
// do, step/element.h has the arithmetic.
#include "cpu/kernels.h"

#include <array>

#include "cpu/adaptive_kernels.h"
#include "cpu/codes.h"
#include "cpu/tile.h"

namespace sofim {
namespace {

// The pairs of blocks of a tile: the `count` blocks that start at `first` and `stride` elements apart, and those `gap`
// elements after them. With `far`, memory is prefetched kAhead elements ahead; where that is `bend` or more elements
// after the first, `skip` elements further.
template <class Y>
struct Pairs {
  Block<Y> first;
  int64_t gap, count, stride;
  bool far;
  int64_t bend;
  ptrdiff_t skip;
  uint32_t key;  // stretch_key()
};

// Calls `pass` for all blocks, and adds to `sums`. Not inlined, so that it is compiled once. What it takes is passed by
// reference: for a tensor of a few hundred elements, a copy would take longer than the loop.
//
// over_blocks() for passes that are limited by the number of instructions: one counter leads to all addresses, because
// pointers of their own for each tensor and each half would not fit into registers.
template <class Y, class Pass>
SOFIM_NOINLINE void over_pairs(const Pass& given, const Pairs<Y>& pairs, typename Pass::Sums& total) {
  const Pass pass = given;  // local copies, which no store to a tensor can change
  typename Pass::Sums sums = total;
  const Use use = pass.use();
  const Block<Y> first = pairs.first;
  const bool far = pairs.far;
  const int64_t gap = pairs.gap, stride = pairs.stride, end = pairs.count * stride;
  Words places = keyed_places(pairs.key, first.index), other_places = keyed_places(pairs.key, first.index + gap);
  const uint32_t step = static_cast<uint32_t>(stride) * kWeyl;
  const auto block = [&](int64_t i) SOFIM_INLINE {
    Block<Y> b = first;
    b.advance(i);
    return b;
  };
  const auto prefetch = [&](int64_t i) SOFIM_INLINE {
    if (use.w) ask_for(first.w, i);
    if (use.g) ask_for(first.g, i);
    ask_for(first.m, i);
  };
  for (int64_t i = 0; i < end; i += stride) {
    if (far) {
      const int64_t ahead = i + kAhead < pairs.bend ? i + kAhead : i + kAhead + pairs.skip;
      prefetch(ahead);
      prefetch(ahead + gap);
    }
    pass(block(i), places, sums);
    pass(block(i + gap), other_places, sums);
    places = places + step;
    other_places = other_places + step;
  }
  total = sums;
}

// Calls `pass` for every sixteen elements of a tile, and returns its sums. The tail, less than a pair of blocks, goes
// through the same instructions on copies padded with zeros, which add nothing to a sum.
template <class Y, class Pass>
SOFIM_HD typename Pass::Sums over_tile(const Pass& pass, const Row& r, const Mode& mode, int64_t begin, int64_t size) {
  constexpr int64_t kPair = 2 * kLanes;
  typename Pass::Sums sums;
  const int64_t count = size / kPair, half = count * kLanes;
  Pairs<Y> pairs{
      {static_cast<typename Y::W*>(r.w) + begin,
       static_cast<const typename Y::G*>(r.g) + begin,
       static_cast<typename Y::M*>(r.m) + (begin - r.first),
       r.lost == nullptr ? nullptr : static_cast<typename Y::L*>(r.lost) + begin,
       begin},
      kLanes, count, kPair, mode.prefetch, size, 0, Y::kRounds || Y::kCuts ? stretch_key(r.key, begin) : 0};
  if (size >= kSplit) {
    pairs.gap = half;
    pairs.stride = kLanes;
    pairs.bend = half;
    // The distance from the end of either half to the start of that half in the next tile.
    pairs.skip = size < kTile ? 0 : mode.backwards ? -3 * half : half;
  }
  if (count > 0) over_pairs(pass, pairs, sums);
  const size_t rest = static_cast<size_t>(size - 2 * half);
  if (rest == 0) return sums;
  Block<Y>& block = pairs.first;
  block.advance(2 * half);
  const Use use = pass.use();
  alignas(64) typename Y::W w[kPair] = {};
  alignas(64) typename Y::G g[kPair] = {};
  alignas(64) typename Y::M m[kPair] = {};
  alignas(64) typename Y::L lost[kPair] = {};
  if (use.w) memcpy(w, block.w, rest * sizeof *w);
  if (use.g) memcpy(g, block.g, rest * sizeof *g);
  memcpy(m, block.m, rest * sizeof *m);
  if (block.lost != nullptr && use.w) memcpy(lost, block.lost, rest * sizeof *lost);
  const Pairs<Y> tail{
      {w, g, m, block.lost == nullptr ? nullptr : lost, block.index}, kLanes, 1, kPair, false, 0, 0, pairs.key};
  over_pairs(pass, tail, sums);
  if (use.writes_m) memcpy(block.m, m, rest * sizeof *m);
  if (use.writes_w) {
    memcpy(block.w, w, rest * sizeof *w);
    if (block.lost != nullptr) memcpy(block.lost, lost, rest * sizeof *lost);
  }
  return sums;
}

// The passes, as over_tile() calls them: what they use, what they do to sixteen elements given their keyed_places(), and
// their sums, in the order of Sum.

// `cross`: includes the code for the sums of products with g and w, and for the gradient's part of the step. `entered`:
// the gradient has entered m, which is as stored.
template <class Y, bool cross, bool entered = false>
struct Accumulate {
  using Sums = std::array<LaneSums, cross ? kMW + 1 : kMM + 1>;

  SOFIM_HD Accumulate(const Row& r, const Mode& mode, int64_t begin)
      : factors(r, mode, begin), weights(mode.weights), step(cross && mode.gradient) {}

  SOFIM_HD Use use() const { return {weights || step, cross || !entered, !entered, step}; }

  SOFIM_HD void operator()(const Block<Y>& b, const Words& places, Sums& sums) const {
    typename Y::V g, m = load(b.m);
    if constexpr (cross || !entered) g = load(b.g);
    if constexpr (!entered) m = factors.store_moment(b.m, factors.moment(m, g, b), places);
    const auto wide = widened(m);
    sums[kMM].add(wide, wide);
    if constexpr (cross) {
      sums[kMG].add(wide, widened(g));
      if (weights) sums[kMW].add(wide, wide_weight_of(b, factors.master));
      if (step) factors.update(b, g, g, true, false, places);
    }
  }

  Factors<Y> factors;
  bool weights, step;
};

// The gradient enters m, without sums.
template <class Y>
struct Enter {
  using Sums = std::array<LaneSums, 0>;

  SOFIM_HD Enter(const Row& r, const Mode& mode, int64_t begin) : factors(r, mode, begin), scaled(mode.scaled) {}

  SOFIM_HD Use use() const { return {factors.decays, true, true, false}; }

  SOFIM_HD void operator()(const Block<Y>& b, const Words& places, Sums&) const {
    auto v = load(b.g);
    if (scaled) v = v * typename Y::V(factors.gain);
    factors.store_moment(b.m, factors.moment(load(b.m), v, b), places);
  }

  Factors<Y> factors;
  bool scaled;
};

// The gradient enters the roots of running means of its squares, which a row has in the place of m.
template <class Y>
struct EnterRoots {
  using Sums = std::array<LaneSums, 0>;
  using V = typename Y::V;

  SOFIM_HD EnterRoots(const Row& r, const Mode& mode)
      : means(*r.scale), gain(static_cast<typename Y::T>(mode.gain)), scaled(mode.scaled) {}

  SOFIM_HD Use use() const { return {false, true, true, false}; }

  SOFIM_HD void operator()(const Block<Y>& b, const Words&, Sums&) const {
    V v = load(b.g);
    if (scaled) v = v * V(gain);
    store(b.m, Ops<V>::root(means.enter(load(b.m), v)));
  }

  RunningMeans<V, typename Y::T> means;
  typename Y::T gain;
  bool scaled;
};

template <class Y, bool gradient>
struct Apply {
  using Sums = std::array<LaneSums, 0>;

  SOFIM_HD Apply(const Row& r, const Mode& mode, int64_t begin) : factors(r, mode, begin) {}

  SOFIM_HD Use use() const { return {true, gradient, false, true}; }

  SOFIM_HD void operator()(const Block<Y>& b, const Words& places, Sums&) const {
    const auto m = load(b.m);
    if constexpr (gradient) {
      factors.update(b, load(b.g), m, true, true, places);
    } else {
      factors.update(b, m, m, false, true, places);
    }
  }

  Factors<Y> factors;
};

template <class Y>
struct Dots {
  using Sums = std::array<LaneSums, kSums>;

  SOFIM_HD Dots(const Row& r, const Mode& mode) : weights(mode.weights), master(r.master) {}

  SOFIM_HD Use use() const { return {weights, true, false, false}; }

  SOFIM_HD void operator()(const Block<Y>& b, const Words&, Sums& sums) const {
    const Doubles m = load_widened(b.m), g = load_widened(b.g);
    sums[kMM].add(m, m);
    sums[kMG].add(m, g);
    sums[kGG].add(g, g);
    if (weights) {
      const Doubles w = wide_weight_of(b, master);
      sums[kMW].add(m, w);
      sums[kGW].add(g, w);
      sums[kWW].add(w, w);
    }
  }

  bool weights, master;
};

template <class Y>
struct Commit {
  using Sums = std::array<LaneSums, 0>;

  SOFIM_HD Commit(const Row& r, const Mode& mode, int64_t begin)
      : factors(r, mode, begin), scaled(mode.scaled), gradient(mode.gradient) {}

  SOFIM_HD Use use() const { return {true, true, true, true}; }

  SOFIM_HD void operator()(const Block<Y>& b, const Words& places, Sums&) const {
    auto v = load(b.g);
    if (scaled) v = v * typename Y::V(factors.gain);
    const auto m = factors.moment(load(b.m), v, b);
    factors.store_moment(b.m, m, places);
    factors.update(b, v, m, gradient, true, places);
  }

  Factors<Y> factors;
  bool scaled, gradient;
};

template <class Y, bool cross, bool entered = false>
void accumulate(const Row& r, const Mode& mode, int64_t begin, int64_t size, double* sums) {
  const auto done = over_tile<Y>(Accumulate<Y, cross, entered>(r, mode, begin), r, mode, begin, size);
  sums[kMM] = done[kMM].total();
  if constexpr (cross) {
    if (!mode.cross) return;
    sums[kMG] = done[kMG].total();
    if (mode.weights) sums[kMW] = done[kMW].total();
  }
}

// For a row that over_codes() has decoded: the gradient enters m, and the second moment if that is codes, too. They then
// are as stored. Sums are of that, and it is known when all of a block is: then its elements, still in the cache, are gone
// through again, without asking for more.
template <class Encode>
void enter(const Row& r, Mode& mode, int64_t begin, int64_t size, Encode encode) {
  with_types_of<float>(r, [&](auto types) {
    using Y = decltype(types);
    over_tile<Y>(Enter<Y>(r, mode, begin), r, mode, begin, size);
    if (r.scale == nullptr || !r.scale->roots) return;
    Row roots = r;
    roots.m = r.scale->variance;
    over_tile<Y>(EnterRoots<Y>(r, mode), roots, mode, begin, size);
  });
  encode(true);
  mode.entered = true;
  mode.prefetch = false;
}

void accumulate_entered(const Row& r, const Mode& mode, int64_t begin, int64_t size, double* sums) {
  with_types_of<float>(r, [&](auto types) {
    using Y = decltype(types);
    (mode.cross || mode.gradient ? accumulate<Y, true, true> : accumulate<Y, false, true>)(r, mode, begin, size, sums);
  });
}

void run_accumulate(const Row& r, const Mode& mode, int64_t begin, int64_t size, double* sums) {
  if (r.m_type == Type::codes) {
    return over_codes(r, mode, begin, size, sums, sums_of_accumulate(mode),
                      [](const Row& part, Mode now, int64_t from, int64_t elements, double* more, auto encode) {
                        enter(part, now, from, elements, encode);
                        accumulate_entered(part, now, from, elements, more);
                      });
  }
  with_types(r, [&](auto types) {
    using Y = decltype(types);
    (mode.cross || mode.gradient ? accumulate<Y, true> : accumulate<Y, false>)(r, mode, begin, size, sums);
  });
}

void apply(const Row& r, const Mode& mode, int64_t begin, int64_t size) {
  with_types(r, [&](auto types) {
    using Y = decltype(types);
    if (mode.gradient) {
      over_tile<Y>(Apply<Y, true>(r, mode, begin), r, mode, begin, size);
    } else {
      over_tile<Y>(Apply<Y, false>(r, mode, begin), r, mode, begin, size);
    }
  });
}

void run_apply(const Row& r, const Mode& mode, int64_t begin, int64_t size, double*) {
  if (r.m_type != Type::codes) return apply(r, mode, begin, size);
  over_codes(r, mode, begin, size, nullptr, 0,
             [](const Row& part, const Mode& now, int64_t from, int64_t elements, double*, auto) {
               apply(part, now, from, elements);
             });
}

void dots(const Row& r, const Mode& mode, int64_t begin, int64_t size, double* sums) {
  with_types(r, [&](auto types) {
    using Y = decltype(types);
    const auto done = over_tile<Y>(Dots<Y>(r, mode), r, mode, begin, size);
    sums[kMM] = done[kMM].total();
    sums[kMG] = done[kMG].total();
    sums[kGG] = done[kGG].total();
    if (!mode.weights) return;
    sums[kMW] = done[kMW].total();
    sums[kGW] = done[kGW].total();
    sums[kWW] = done[kWW].total();
  });
}

void run_dots(const Row& r, const Mode& mode, int64_t begin, int64_t size, double* sums) {
  if (r.m_type != Type::codes) return dots(r, mode, begin, size, sums);
  over_codes(r, mode, begin, size, sums, sums_of_dots(mode),
             [](const Row& part, const Mode& now, int64_t from, int64_t elements, double* more, auto) {
               dots(part, now, from, elements, more);
             });
}

void commit(const Row& r, const Mode& mode, int64_t begin, int64_t size) {
  with_types(r, [&](auto types) {
    using Y = decltype(types);
    over_tile<Y>(Commit<Y>(r, mode, begin), r, mode, begin, size);
  });
}

// w is updated by m before that is stored.
void run_commit(const Row& r, const Mode& mode, int64_t begin, int64_t size, double*) {
  if (r.m_type != Type::codes) return commit(r, mode, begin, size);
  over_codes(r, mode, begin, size, nullptr, 0,
             [](const Row& part, const Mode& now, int64_t from, int64_t elements, double*, auto encode) {
               commit(part, now, from, elements);
               encode(false);
             });
}

// The sweeps with a diagonal that adapts. Without sums, w is updated by m before that is stored.
void run_scaled(const Row& r, const Mode& mode, int64_t begin, int64_t size, double* sums) {
  if (r.m_type != Type::codes) return scaled(r, mode, begin, size, sums);
  over_codes(r, mode, begin, size, sums, mode.updates ? 0 : kScaledSums,
             [](const Row& part, Mode now, int64_t from, int64_t elements, double* more, auto encode) {
               if (now.enters && !now.updates) enter(part, now, from, elements, encode);
               scaled(part, now, from, elements, more);
               if (now.enters && now.updates) encode(false);
             });
}

}  // namespace

const Kernels& kernels() {
  static constexpr Kernels table{run_accumulate, run_apply,   run_dots, run_commit,
                                 run_scaled,     run_squares, run_rows, run_columns, run_shares};
  return table;
}

}  // namespace sofim
