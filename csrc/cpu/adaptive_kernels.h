// The sweeps of a step whose diagonal adapts, over one tile. sofim_fused/backends/interface.py defines what they do.
#pragma once

#include <algorithm>
#include <array>
#include <numeric>

#include "cpu/kernels.h"
#include "cpu/lanes.h"
#include "cpu/tile.h"

namespace sofim {
namespace {

// Elements whose factors are written at a time.
constexpr int64_t kStretch = 256;
// Where those of the other half of a tile begin.
constexpr int64_t kOtherHalf = kStretch + kLanes;

// Sixteen elements, the factors 1/s of their rows and columns, and their running means. Where elements have their own s,
// a factor is 1, and 0 behind the end of a tensor.
template <class Y>
struct ScaledBlock : Block<Y> {
  const typename Y::T* inverse;
  typename Y::T* variance;

  SOFIM_HD void advance(int64_t elements) {
    Block<Y>::advance(elements);
    inverse += elements;
    if (variance != nullptr) variance += elements;
  }
  SOFIM_HD void jump(int64_t elements) {
    const typename Y::T* const theirs = inverse + (elements < kStretch ? elements : kOtherHalf);
    advance(elements);
    inverse = theirs;
  }
};

// How g² enters the running means of elements.
template <class V, class T>
struct RunningMeans {
  SOFIM_HD explicit RunningMeans(const Scale& scale)
      : beta2(static_cast<T>(scale.beta2)),
        one_minus_beta2(static_cast<T>(1.0 - scale.beta2)),
        roots(scale.roots) {}

  // The new mean, from the old one, or its root.
  SOFIM_HD V enter(V mean, V v) const {
    const V largest(std::numeric_limits<T>::max());
    if (roots) mean = Ops<V>::at_most(mean * mean, largest);
    return Ops<V>::at_most(Ops<V>::multiply_add(v * V(one_minus_beta2), v, mean * V(beta2)), largest);
  }

  T beta2, one_minus_beta2;
  bool roots;
};

// The three sweeps in one, because their code is nearly the same and there are fifteen kinds of storage to compile it for.
template <class Y>
struct Scaled {
  using Sums = std::array<LaneSums, kScaledSums>;
  using V = typename Y::V;
  using T = typename Y::T;

  SOFIM_HD Scaled(const Row& r, const Mode& mode, int64_t begin)
      : factors(r, mode, begin),
        means(*r.scale),
        eps(static_cast<T>(r.scale->eps)),
        root(static_cast<T>(r.scale->root)),
        reads(mode.enters || mode.gradient),
        enters(mode.enters && !(mode.entered && means.roots)),
        blends(mode.enters && !mode.entered),
        updates(mode.updates),
        gains(mode.scaled),
        gradient(mode.gradient),
        cross(mode.cross) {}

  SOFIM_HD Use use() const { return {updates, reads, blends, updates}; }

  SOFIM_HD void operator()(const ScaledBlock<Y>& b, Sums& sums) const {
    V v(T(0)), m = load(b.m), inverse = load(b.inverse);
    if (reads) v = load(b.g);
    if (gains) v = v * V(factors.gain);
    if (blends) {
      m = factors.moment(m, v, b);
      const V stored = factors.store_moment(b.m, m, b.index);
      if (!updates) m = stored;
    }
    if (b.variance != nullptr) {
      V mean = load(b.variance), of_mean = mean;
      if (enters) mean = means.enter(mean, v);
      if (enters || !means.roots) of_mean = Ops<V>::root(mean);
      if (enters) store(b.variance, means.roots ? of_mean : mean);
      const V s = Ops<V>::multiply_add(of_mean, V(root), V(eps));
      if (!updates) sums[kTrace].add(widened(s), widened(inverse));
      inverse = Ops<V>::divide(inverse, s);
    }
    m = m * inverse;
    if (updates) {
      factors.update(b, v * inverse, m, gradient, true, keyed_places(factors.stretch, b.index));
    } else {
      // m itself, which no register holds any more.
      const Doubles scaled = widened(m);
      sums[kScaledMM].add(widened(load(b.m)), scaled);
      if (cross) sums[kScaledMG].add(widened(v), scaled);
    }
  }

  Factors<Y> factors;
  RunningMeans<V, T> means;
  T eps, root;
  bool reads, enters, blends, updates, gains, gradient, cross;
};

// Writes the factors 1/s of elements one after the other, for a few hundred of them at a time: rows that are no multiple
// of sixteen long then need no code of their own.
template <class T, class V>
class Inverses {
 public:
  SOFIM_HD Inverses(const Scale& scale, int64_t index)
      : rows_(static_cast<const T*>(scale.rows)),
        cols_(static_cast<const T*>(scale.cols)),
        count_(scale.count),
        inner_(scale.inner) {
    if (rows_ == nullptr) return;
    const int64_t run = index / inner_, outer = run / count_;
    column_ = index - run * inner_;
    row_ = run - outer * count_;
    if (cols_ != nullptr) cols_ += outer * inner_;
  }

  // Each row's end is written beyond, by less than sixteen elements, which the next row overwrites.
  SOFIM_HD void fill(T* to, int64_t count) {
    if (rows_ == nullptr) return;
    while (count > 0) {
      const int64_t part = inner_ - column_ < count ? inner_ - column_ : count;
      const V row(rows_[row_]);
      if (cols_ == nullptr) {
        for (int64_t i = 0; i < part; i += kLanes) store(to + i, row);
      } else {
        for (int64_t i = 0; i < part; i += kLanes) store(to + i, load(cols_ + column_ + i) * row);
      }
      to += part;
      count -= part;
      column_ += part;
      if (column_ < inner_) continue;
      column_ = 0;
      if (++row_ < count_) continue;
      row_ = 0;
      if (cols_ != nullptr) cols_ += inner_;
    }
  }

 private:
  const T *rows_, *cols_;
  int64_t count_, inner_, row_ = 0, column_ = 0;
};

// As over_tile().
template <class Y>
typename Scaled<Y>::Sums over_scaled_tile(const Scaled<Y>& pass, const Row& r, const Mode& mode, int64_t begin,
                                          int64_t size) {
  using T = typename Y::T;
  constexpr int64_t kPair = 2 * kLanes;
  alignas(64) T inverse[2 * kOtherHalf];
  const Scale& scale = *r.scale;
  if (scale.rows == nullptr) std::fill_n(inverse, std::size(inverse), T(1));
  typename Scaled<Y>::Sums sums;
  const int64_t pairs = size / kPair, half = pairs * kLanes;
  Run<ScaledBlock<Y>> run;
  ScaledBlock<Y>& block = run.first;
  block.w = static_cast<typename Y::W*>(r.w) + begin;
  block.g = static_cast<const typename Y::G*>(r.g) + begin;
  block.m = static_cast<typename Y::M*>(r.m) + (begin - r.first);
  block.lost = r.lost == nullptr ? nullptr : static_cast<typename Y::L*>(r.lost) + begin;
  block.index = begin;
  block.inverse = inverse;
  block.variance = nullptr;
  if (scale.variance != nullptr) block.variance = static_cast<T*>(scale.variance) + begin - (scale.roots ? r.first : 0);
  const bool split = size >= kSplit;
  run.gap = split ? half : kLanes;
  run.stride = split ? kLanes : kPair;
  run.far = mode.prefetch;
  run.bend = begin + (split ? half : size);
  // The distance from the end of either half to the start of that half in the next tile.
  run.skip = !split || size < kTile ? 0 : mode.backwards ? -3 * half : half;
  Inverses<T, typename Y::V> of_first(scale, begin), of_second(scale, begin + half);
  const int64_t end = split ? half : 2 * half;
  for (int64_t done = 0; done < end; done += kStretch) {
    const int64_t part = std::min(kStretch, end - done);
    of_first.fill(inverse, part);
    block.inverse = inverse;
    run.pairs = split ? part / kLanes : part / kPair;
    if (split) of_second.fill(inverse + kOtherHalf, part);
    over_blocks(pass, run, sums);
    block.advance(part);
  }
  block.advance(2 * half - end);
  const size_t rest = static_cast<size_t>(size - 2 * half);
  if (rest == 0) return sums;
  Inverses<T, typename Y::V>(scale, begin + 2 * half).fill(inverse, static_cast<int64_t>(rest));
  std::fill(inverse + rest, inverse + kPair, T(0));
  const Use use = pass.use();
  alignas(64) typename Y::W w[kPair] = {};
  alignas(64) typename Y::G g[kPair] = {};
  alignas(64) typename Y::M m[kPair] = {};
  alignas(64) typename Y::L lost[kPair] = {};
  alignas(64) T variance[kPair];
  std::fill_n(variance, kPair, T(1));  // so that s is not 0
  if (use.w) memcpy(w, block.w, rest * sizeof *w);
  if (use.g) memcpy(g, block.g, rest * sizeof *g);
  memcpy(m, block.m, rest * sizeof *m);
  if (block.lost != nullptr && use.w) memcpy(lost, block.lost, rest * sizeof *lost);
  if (block.variance != nullptr) memcpy(variance, block.variance, rest * sizeof *variance);
  Run<ScaledBlock<Y>> tail = run;
  tail.first.w = w;
  tail.first.g = g;
  tail.first.m = m;
  if (block.lost != nullptr) tail.first.lost = lost;
  if (block.variance != nullptr) tail.first.variance = variance;
  tail.first.inverse = inverse;
  tail.stride = kPair;
  tail.gap = kLanes;
  tail.pairs = 1;
  tail.far = false;
  over_blocks(pass, tail, sums);
  if (use.writes_m) memcpy(block.m, m, rest * sizeof *m);
  if (mode.enters && block.variance != nullptr) memcpy(block.variance, variance, rest * sizeof *variance);
  if (use.writes_w) {
    memcpy(block.w, w, rest * sizeof *w);
    if (block.lost != nullptr) memcpy(block.lost, lost, rest * sizeof *lost);
  }
  return sums;
}

void scaled(const Row& r, const Mode& mode, int64_t begin, int64_t size, double* sums) {
  with_types(r, [&](auto types) {
    using Y = decltype(types);
    const auto done = over_scaled_tile<Y>(Scaled<Y>(r, mode, begin), r, mode, begin, size);
    if (mode.updates) return;
    for (int i = 0; i < kScaledSums; ++i) sums[i] = done[i].total();
  });
}

// Sums of squares over rows and columns

// Sixteen lanes of all bits for the first `count`, else 0.
template <class V>
SOFIM_HD V lanes_before(int64_t count) {
  using T = std::conditional_t<std::is_same_v<V, Doubles>, double, float>;
  alignas(64) T lanes[kLanes];
  memset(lanes, 0, sizeof lanes);
  memset(lanes, 0xFF, static_cast<size_t>(count) * sizeof(T));
  return load(lanes);
}

template <class T>
SOFIM_HD Pack<T> masked(const Pack<T>& x, const Pack<T>& lanes) {
  return Pack<T>(typename Pack<T>::Indices(), [&](auto i) SOFIM_INLINE { return x.part[i] & lanes.part[i]; });
}

SOFIM_HD double added_up(const Doubles& x) {
  LaneSums lanes;
  lanes.add(x, Doubles(1.0));
  return lanes.total();
}

template <class G>
using Wide = std::conditional_t<std::is_same_v<G, double>, Doubles, Floats>;

// The rows `first`, `first` + `gap`, ..., which share the reads and writes of the columns' sums. They are far from each
// other, because more memory is read at a time from several places than from one. `lanes`: of the last columns, which do
// not fill a vector.
template <class G, int... r>
SOFIM_NOINLINE void squares_of_rows(const SquaresTile& t, int64_t first, int64_t gap, const Wide<G>& lanes,
                                    std::integer_sequence<int, r...>) {
  constexpr int rows = sizeof...(r);
  const G* const g = static_cast<const G*>(t.g) + first * t.stride;
  const int64_t apart = gap * t.stride;
  Doubles sum[rows] = {((void)r, Doubles(0.0))...};
  const auto add = [&](int64_t column, auto values) SOFIM_INLINE {
    const Doubles x[rows] = {widened(values(g + r * apart + column))...};
    ((sum[r] = Ops<Doubles>::multiply_add(x[r], x[r], sum[r])), ...);
    if (t.by_col == nullptr) return;
    Doubles col = load(t.by_col + column);
    ((col = Ops<Doubles>::multiply_add(x[r], x[r], col)), ...);
    store(t.by_col + column, col);
  };
  const int64_t whole = t.columns / kLanes * kLanes, rest = t.columns - whole;
  // Behind the end of a row, the one after it.
  const ptrdiff_t next = t.rows == 1 ? kAhead : kAhead - t.columns + t.stride;
  for (int64_t column = 0; column < whole; column += kLanes) {
    if (t.prefetch) (ask_for(g + r * apart + column, column + kAhead < t.columns ? kAhead : next), ...);
    add(column, [](const G* from) SOFIM_INLINE { return load(from); });
  }
  if (rest > 0 && first * t.stride + (rows - 1) * apart + whole + kLanes <= t.readable) {
    add(whole, [&](const G* from) SOFIM_INLINE { return masked(load(from), lanes); });
  } else if (rest > 0) {
    add(whole, [&](const G* from) {
      alignas(64) G copy[kLanes] = {};
      memcpy(copy, from, static_cast<size_t>(rest) * sizeof(G));
      return load(copy);
    });
  }
  ((t.by_row[first + r * gap] = added_up(sum[r])), ...);
}

// Places from which a tile is read at a time; and how many of them have room for their sums in registers.
constexpr int kPlaces = 4;
constexpr int kRows = Doubles::kParts <= 2 ? kPlaces : 2;

// Adds up the rows' sums, and the columns' in an order that kRows does not change.
template <class G>
void squares_of(const SquaresTile& t) {
  if (t.rows < kPlaces && t.by_col == nullptr && t.columns >= kSplit) {  // long rows: each from its quarters
    const int64_t quarter = t.columns / (kPlaces * kLanes) * kLanes;
    for (int64_t row = 0; row < t.rows; ++row) {
      double sums[kPlaces + 1] = {};
      SquaresTile part = t;
      part.g = static_cast<const G*>(t.g) + row * t.stride;
      part.readable = t.readable - row * t.stride;
      part.rows = kPlaces;
      part.columns = part.stride = quarter;
      part.by_row = sums;
      squares_of<G>(part);
      part.g = static_cast<const G*>(part.g) + kPlaces * quarter;
      part.readable -= kPlaces * quarter;
      part.rows = 1;
      part.columns = t.columns - kPlaces * quarter;
      part.by_row = sums + kPlaces;
      squares_of<G>(part);
      t.by_row[row] = std::accumulate(sums, sums + kPlaces + 1, 0.0);
    }
    return;
  }
  if (t.by_col != nullptr) std::fill_n(t.by_col, (t.columns + kLanes - 1) / kLanes * kLanes, 0.0);
  const auto lanes = lanes_before<Wide<G>>(t.columns % kLanes);
  const int64_t gap = t.rows / kPlaces;
  for (int64_t row = 0; row < gap; ++row) {
    for (int place = 0; place < kPlaces; place += kRows) {
      squares_of_rows<G>(t, row + place * gap, gap, lanes, std::make_integer_sequence<int, kRows>());
    }
  }
  for (int64_t row = gap * kPlaces; row < t.rows; ++row) {
    squares_of_rows<G>(t, row, 1, lanes, std::make_integer_sequence<int, 1>());
  }
}

void run_squares(const SquaresTile& tile) {
  switch (tile.type) {
    case Type::float64:
      return squares_of<double>(tile);
    case Type::float32:
      return squares_of<float>(tile);
    case Type::bfloat16:
      return squares_of<BFloat16>(tile);
    case Type::float16:
      return squares_of<Half>(tile);
    case Type::codes:  // of moments alone
      return;
  }
}

// Running means and their factors

// Calls `run` with every sixteen running means, the sums that enter them, the place of their factors, and which lanes
// are means. The tail goes through copies; factors have room for whole vectors.
template <class T, class Run>
SOFIM_HD void over_means(const Means& means, Run run) {
  T* const running = static_cast<T*>(means.running);
  T* const factors = static_cast<T*>(means.factors);
  int64_t i = 0;
  for (; i + kLanes <= means.count; i += kLanes) {
    run(running + i, means.totals + i, factors + i, [](const Doubles& x) SOFIM_INLINE { return x; });
  }
  const size_t rest = static_cast<size_t>(means.count - i);
  if (rest == 0) return;
  alignas(64) T few[kLanes] = {};
  alignas(64) double totals[kLanes] = {};
  memcpy(few, running + i, rest * sizeof(T));
  memcpy(totals, means.totals + i, rest * sizeof(double));
  const Doubles lanes = lanes_before<Doubles>(static_cast<int64_t>(rest));
  run(few, totals, factors + i, [&](const Doubles& x) SOFIM_INLINE { return masked(x, lanes); });
  memcpy(running + i, few, rest * sizeof(T));
}

template <class T>
SOFIM_HD Doubles entered(const Means& means, T* running, const double* totals) {
  const Doubles largest(static_cast<double>(std::numeric_limits<T>::max()));
  const Doubles mixed =
      means.mix.enter(Doubles(widened(load(running))), load(totals), Doubles(means.elements), largest);
  store(running, mixed);
  return widened(load(running));
}

template <class T>
double rows_of(const Means& means) {
  Doubles trace(0.0);
  over_means<T>(means, [&](T* running, const double* totals, T* factors, auto only) SOFIM_INLINE {
    const Doubles s = means.mix.root(entered(means, running, totals));
    store(factors, Ops<Doubles>::divide(Doubles(1.0), s));
    trace = trace + only(s);
  });
  return added_up(trace);
}

template <class T>
double columns_of(const Means& means) {
  Doubles sum(0.0);
  over_means<T>(means, [&](T* running, const double* totals, T*, auto only) SOFIM_INLINE {
    sum = sum + only(entered(means, running, totals));
  });
  return added_up(sum);
}

template <class T>
double shares_of(const Means& means, double mean) {
  Doubles sum(0.0);
  over_means<T>(means, [&](T* running, const double*, T* factors, auto only) SOFIM_INLINE {
    const Doubles share = column_share(Doubles(widened(load(running))), mean);
    store(factors, Ops<Doubles>::divide(Doubles(1.0), share));
    sum = sum + only(share);
  });
  return added_up(sum);
}

double run_rows(const Means& means) { return means.wide ? rows_of<double>(means) : rows_of<float>(means); }
double run_columns(const Means& means) { return means.wide ? columns_of<double>(means) : columns_of<float>(means); }
double run_shares(const Means& means, double mean) {
  return means.wide ? shares_of<double>(means, mean) : shares_of<float>(means, mean);
}

}  // namespace
}  // namespace sofim
