// A diagonal that adapts: from sums of squared gradients to D⁻¹, and from sums to coefficients, in float64.
// sofim_fused/backends/adaptive.py derives the formulas and evaluates them with PyTorch. Notation as there.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "step/element.h"
#include "step/solve.h"

namespace sofim {

// The values of the option `diagonal`.
enum class Diagonal : uint8_t { identity, tensor, row, factored, element };

// A parameter group's settings for a diagonal that adapts. Its Hyper has an infinite rho for None.
struct AdaptiveHyper {
  double beta2 = 0.99, eps = 1e-8;
};

// The least value of a column's share c/mean(c): COLUMN_FLOOR of sofim_fused/backends/adaptive.py.
constexpr double kColumnFloor = 0.1;

// How a new mean of g² enters a running one, and how that becomes s.
struct Mix {
  double beta2, eps;
  double correction;          // 1/(1 - β₂^t)
  double gain_squared = 1.0;  // of the gain that gradients are multiplied by

  // Updates a running mean by a sum of g² over `count` elements; returns it as stored. It saturates: from infinity it
  // could never decay, and no later step would move. A NaN stays one.
  template <class T>
  SOFIM_HD double enter(T& running, double total, double count) const {
    constexpr double largest = sizeof(T) == sizeof(double) ? DBL_MAX : FLT_MAX;
    const double mean = total / count * gain_squared;
    const double mixed = beta2 * static_cast<double>(running) + (1.0 - beta2) * mean;
    running = static_cast<T>(mixed > largest ? largest : mixed);
    return static_cast<double>(running);
  }

  SOFIM_HD double root(double running) const { return sqrt(running * correction) + eps; }
};

// √max(c/mean(c), τ) of one column; 0/0 counts as 1.
SOFIM_HD double column_share(double running, double mean) {
  const double share = mean == 0.0 ? 1.0 : running / mean;
  return sqrt(share < kColumnFloor ? kColumnFloor : share);
}

// What F⁻¹ is applied to: factors of the new moment and of the gradient as it is in memory.
struct NumeratorTerms {
  double moment, gradient;
};

// `gradient_form`: the gradient. `look_ahead`: (β m + (1-β) g)/(1 - β^(t+1)). Otherwise m̂.
SOFIM_HD NumeratorTerms numerator_terms(const Hyper& h, double correction, bool gradient_form, bool look_ahead) {
  if (gradient_form) return {0.0, h.sign};
  if (!look_ahead) return {correction, 0.0};
  const double ahead = 1.0 / (1.0 - h.momentum + h.momentum / correction);  // without cancellation
  return {h.momentum * ahead, (1.0 - h.momentum) * ahead * h.sign};
}

// Sums over one tensor, with v = gain·g: Σm²/s, Σmv/s, Σs.
struct ScaledProducts {
  double mm = 0.0, mg = 0.0, trace = 0.0;
};

// The sums over one Fisher block: T, Q, P and m̂ᵀD⁻¹m̂.
struct AdaptiveBlock {
  double trace = 0.0, square = 0.0, cross = 0.0, plain_square = 0.0;

  SOFIM_HD void add(const Hyper& h, double correction, const NumeratorTerms& v, const ScaledProducts& p) {
    const double mm = correction * correction * p.mm;
    trace += p.trace;
    square += mm / h.rho;
    // A sum that was not taken is no part of v.
    cross += correction * (v.moment * p.mm + (v.gradient == 0.0 ? 0.0 : v.gradient * p.mg)) / h.rho;
    plain_square += mm;
  }

  // q, how much of the gradients points in one direction.
  SOFIM_HD double signal() const { return plain_square / trace; }
};

// The step of one tensor; `block`: nullptr if F has no term of rank one. `moment_form`: v = m̂.
SOFIM_HD Update scaled_update(const Hyper& h, double correction, const NumeratorTerms& v, bool moment_form,
                              const AdaptiveBlock* block) {
  double moment = v.moment;
  if (block != nullptr) {
    const double whole = block->trace + block->square;
    // v = m̂: a quotient, because the difference would cancel.
    moment = moment_form ? correction * block->trace / whole : moment - correction * block->cross / whole;
  }
  return {1.0 - h.lr * h.weight_decay, finite(-h.lr * v.gradient), finite(-h.lr * moment)};
}

}  // namespace sofim
