// The passes over one tile, compiled once per instruction set. sofim_fused/backends/interface.py defines what they
// do, step/element.h has the arithmetic.
#include "cpu/kernels.h"

#include <array>

#include "cpu/adaptive_kernels.h"
#include "cpu/tile.h"

namespace sofim {
namespace {

// The passes, as over_tile() calls them: what they use, what they do to sixteen elements, and their sums, in the order
// of Sum.

// `cross`: includes the code for the sums of products with g and w, and for the gradient's part of the step.
template <class Y, bool cross>
struct Accumulate {
  using Sums = std::array<LaneSums, cross ? kMW + 1 : kMM + 1>;

  SOFIM_HD Accumulate(const Row& r, const Mode& mode, int64_t begin)
      : factors(r, mode, begin), weights(mode.weights), step(cross && mode.gradient) {}

  SOFIM_HD Use use() const { return {weights || step, true, true, step}; }

  SOFIM_HD void operator()(const Block<Y>& b, Sums& sums) const {
    const auto g = load(b.g);
    const auto m = factors.store_moment(b.m, factors.moment(load(b.m), g, b.w), b.index);
    const auto wide = widened(m);
    sums[kMM].add(wide, wide);
    if constexpr (cross) {
      sums[kMG].add(wide, widened(g));
      if (weights) sums[kMW].add(wide, widened(load(b.w)));
      if (step) factors.update(b, g, g, true, false);
    }
  }

  Factors<Y> factors;
  bool weights, step;
};

template <class Y, bool gradient>
struct Apply {
  using Sums = std::array<LaneSums, 0>;

  SOFIM_HD Apply(const Row& r, const Mode& mode, int64_t begin) : factors(r, mode, begin) {}

  SOFIM_HD Use use() const { return {true, gradient, false, true}; }

  SOFIM_HD void operator()(const Block<Y>& b, Sums&) const {
    const auto m = load(b.m);
    if constexpr (gradient) {
      factors.update(b, load(b.g), m, true, true);
    } else {
      factors.update(b, m, m, false, true);
    }
  }

  Factors<Y> factors;
};

template <class Y>
struct Dots {
  using Sums = std::array<LaneSums, kSums>;

  SOFIM_HD explicit Dots(const Mode& mode) : weights(mode.weights) {}

  SOFIM_HD Use use() const { return {weights, true, false, false}; }

  SOFIM_HD void operator()(const Block<Y>& b, Sums& sums) const {
    const Doubles m = widened(load(b.m)), g = widened(load(b.g));
    sums[kMM].add(m, m);
    sums[kMG].add(m, g);
    sums[kGG].add(g, g);
    if (weights) {
      const Doubles w = widened(load(b.w));
      sums[kMW].add(m, w);
      sums[kGW].add(g, w);
      sums[kWW].add(w, w);
    }
  }

  bool weights;
};

template <class Y>
struct Commit {
  using Sums = std::array<LaneSums, 0>;

  SOFIM_HD Commit(const Row& r, const Mode& mode, int64_t begin)
      : factors(r, mode, begin), scaled(mode.scaled), gradient(mode.gradient) {}

  SOFIM_HD Use use() const { return {true, true, true, true}; }

  SOFIM_HD void operator()(const Block<Y>& b, Sums&) const {
    auto v = load(b.g);
    if (scaled) v = v * typename Y::V(factors.gain);
    const auto m = factors.moment(load(b.m), v, b.w);
    factors.store_moment(b.m, m, b.index);
    factors.update(b, v, m, gradient, true);
  }

  Factors<Y> factors;
  bool scaled, gradient;
};

template <class Y, bool cross>
void accumulate(const Row& r, const Mode& mode, int64_t begin, int64_t size, double* sums) {
  const auto done = over_tile<Y>(Accumulate<Y, cross>(r, mode, begin), r, mode, begin, size);
  sums[kMM] = done[kMM].total();
  if constexpr (cross) {
    if (!mode.cross) return;
    sums[kMG] = done[kMG].total();
    if (mode.weights) sums[kMW] = done[kMW].total();
  }
}

void run_accumulate(const Row& r, const Mode& mode, int64_t begin, int64_t size, double* sums) {
  with_types(r, [&](auto types) {
    using Y = decltype(types);
    (mode.cross || mode.gradient ? accumulate<Y, true> : accumulate<Y, false>)(r, mode, begin, size, sums);
  });
}

void run_apply(const Row& r, const Mode& mode, int64_t begin, int64_t size, double*) {
  with_types(r, [&](auto types) {
    using Y = decltype(types);
    if (mode.gradient) {
      over_tile<Y>(Apply<Y, true>(r, mode, begin), r, mode, begin, size);
    } else {
      over_tile<Y>(Apply<Y, false>(r, mode, begin), r, mode, begin, size);
    }
  });
}

void run_dots(const Row& r, const Mode& mode, int64_t begin, int64_t size, double* sums) {
  with_types(r, [&](auto types) {
    using Y = decltype(types);
    const auto done = over_tile<Y>(Dots<Y>(mode), r, mode, begin, size);
    sums[kMM] = done[kMM].total();
    sums[kMG] = done[kMG].total();
    sums[kGG] = done[kGG].total();
    if (!mode.weights) return;
    sums[kMW] = done[kMW].total();
    sums[kGW] = done[kGW].total();
    sums[kWW] = done[kWW].total();
  });
}

void run_commit(const Row& r, const Mode& mode, int64_t begin, int64_t size, double*) {
  with_types(r, [&](auto types) {
    using Y = decltype(types);
    over_tile<Y>(Commit<Y>(r, mode, begin), r, mode, begin, size);
  });
}

}  // namespace

const Kernels& kernels() {
  static constexpr Kernels table{run_accumulate, run_apply,   run_dots, run_commit,
                                 run_scaled,     run_squares, run_rows, run_columns, run_shares};
  return table;
}

}  // namespace sofim
