// A diagonal that adapts: from sums of g² to D, and from sums to the coefficients of the step, in float64.
// sofim_fused/backends/adaptive.py derives the formulas and evaluates them with PyTorch. Notation as there.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "step/element.h"
#include "step/solve.h"

namespace sofim {

constexpr double kColumnFloor = 0.1;  // COLUMN_FLOOR of sofim_fused/backends/adaptive.py

// How the elements of a tensor are grouped: which running means of g² it has.
enum class Diagonal : uint8_t { tensor, row, factored, element };

// A parameter group's hyperparameters. Without the term of rank one, rho is infinite.
struct AdaptiveHyper : Hyper {
  double beta2 = 0.99;
  double eps = 1e-8;
};

// What F⁻¹ is applied to: m·(the new moment) + g·(the gradient as it is in memory).
struct NumeratorTerms {
  double m, g;
};

// `numerator`: an index of NUMERATORS of sofim_fused/backends/interface.py: moment, gradient, nesterov.
SOFIM_HD NumeratorTerms numerator_terms(const Hyper& h, double correction, uint8_t numerator) {
  if (numerator == 0) return {correction, 0.0};
  if (numerator == 1) return {0.0, h.sign};
  const double ahead = 1.0 / (1.0 - h.momentum + h.momentum / correction);  // 1/(1 - β^(t+1)), without cancellation
  return {h.momentum * ahead, (1.0 - h.momentum) * ahead * h.sign};
}

// x, or the largest finite number of V if x is above it: a variance could never decay from infinity, and no later step
// would move. A NaN stays one.
SOFIM_HD double saturated(double x, double largest) { return x > largest ? largest : x; }

// How a new mean of g² enters a running mean v over a block of elements, and how that becomes s.
struct Mixing {
  double beta2, eps;
  double correction;  // 1/(1 - β₂^t)
  double gain;        // κ

  SOFIM_HD double mixed(double v, double sum, double count, double largest) const {
    const double mean = sum / (count > 1.0 ? count : 1.0) * (gain * gain);
    return saturated(beta2 * v + (1.0 - beta2) * mean, largest);
  }
  SOFIM_HD double root(double v) const { return sqrt(v * correction) + eps; }
};

// √max(c/mean(c), τ): how much larger a column's s is than that of its row. 0/0 = 1.
SOFIM_HD double column_share(double c, double mean) {
  const double share = mean == 0.0 ? 1.0 : c / mean;
  return sqrt(share < kColumnFloor ? kColumnFloor : share);
}

// v ← β₂ v + (1 - β₂) g² of one element, and 1/s. V: float or double.
template <class V>
struct ElementVariance {
  V beta2, rest, root, eps, largest;

  SOFIM_HD V entered(V v, V g) const {
    const V x = Ops<V>::multiply_add(g, g * rest, v * beta2);
    return x > largest ? largest : x;  // a NaN stays one
  }
  SOFIM_HD V scale(V v) const { return Ops<V>::multiply_add(Ops<V>::root(v), root, eps); }
  SOFIM_HD V inverse(V v) const { return V(1) / scale(v); }
};

// The sums over one Fisher block: T, Q, P, and m̂ᵀD⁻¹m̂.
struct ScaledBlock {
  double trace = 0.0, square = 0.0, cross = 0.0, signal = 0.0;

  // Of one tensor Σm²/s, Σmv/s and Σs.
  SOFIM_HD void add(const Hyper& h, double correction, uint8_t numerator, double mm, double mg, double s) {
    const NumeratorTerms terms = numerator_terms(h, correction, numerator);
    const double whole = correction * correction * mm;
    trace += s;
    square += whole / h.rho;
    cross += correction * (terms.m * mm + terms.g * mg) / h.rho;
    signal += whole;
  }
};

// The step of one tensor: w' = w·weight + (v·gradient + m'·moment)/s with v = κg. `block`: nullptr without the term of
// rank one.
SOFIM_HD Update scaled_update(const Hyper& h, double correction, uint8_t numerator, const ScaledBlock* block) {
  const NumeratorTerms terms = numerator_terms(h, correction, numerator);
  double m = terms.m;
  if (block != nullptr) {
    const double all = block->trace + block->square;
    // A quotient where v = m̂, because the difference would cancel.
    m = numerator == 0 ? correction * block->trace / all : m - correction * block->cross / all;
  }
  return {1.0 - h.lr * h.weight_decay, numerator == 0 ? 0.0 : finite(-h.lr * terms.g), finite(-h.lr * m)};
}

}  // namespace sofim
