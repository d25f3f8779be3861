// A diagonal that adapts: from sums of squared gradients to D⁻¹, and from sums to coefficients, in float64.
// sofim_fused/backends/adaptive.py derives the formulas and evaluates them with PyTorch. Notation as there.
#pragma once

#include <cmath>
#include <cstdint>

#include "step/element.h"
#include "step/solve.h"

namespace sofim {

// The values of the option `diagonal`.
enum class Diagonal : uint8_t { identity, tensor, row, factored, element };

// Whether tensors of two dimensions or more have a running mean for each row.
inline bool has_rows(Diagonal diagonal) { return diagonal == Diagonal::row || diagonal == Diagonal::factored; }

// A parameter group's settings for a diagonal that adapts. Its Hyper has an infinite rho for None.
struct AdaptiveHyper {
  double beta2 = 0.99, eps = 1e-8;
};

// The least value of a column's share c/mean(c): COLUMN_FLOOR of sofim_fused/backends/adaptive.py.
constexpr double kColumnFloor = 0.1;

// How a new mean of g² enters a running one, and how that becomes s.
struct Mix {
  double beta2, eps;
  double root_of_correction;  // 1/√(1 - β₂^t)
  double gain = 1.0;          // what gradients are multiplied by

  // The new running mean, after a sum of g² over `count` elements. It saturates at the largest number of the dtype in
  // which it is stored: from infinity it could never decay, and no later step would move. A NaN stays one.
  template <class V>
  SOFIM_HD V enter(V running, V total, V count, V largest) const {
    // With an infinite norm the gain is zero, and so are the gradients that enter m.
    const V mean = gain == 0.0 ? V(0.0) : Ops<V>::divide(total, count) * V(gain) * V(gain);
    return Ops<V>::at_most(V(beta2) * running + V(1.0 - beta2) * mean, largest);
  }

  template <class V>
  SOFIM_HD V root(V running) const {
    return Ops<V>::root(running) * V(root_of_correction) + V(eps);  // not √(c₂v): the largest v has to stay finite
  }
};

// √max(c/mean(c), τ) of a column; 0/0 counts as 1.
template <class V>
SOFIM_HD V column_share(V running, double mean) {
  const V share = mean == 0.0 ? V(1.0) : Ops<V>::divide(running, V(mean));
  return Ops<V>::root(Ops<V>::at_least(share, V(kColumnFloor)));
}

// What F⁻¹ is applied to: factors of the new moment and of the gradient as it is in memory.
struct NumeratorTerms {
  double moment, gradient;
};

SOFIM_HD NumeratorTerms numerator_terms(const Hyper& h, double correction, Numerator numerator) {
  if (numerator == Numerator::moment) return {correction, 0.0};
  if (numerator == Numerator::gradient) return {0.0, h.sign};
  const LookAhead ahead(h.momentum, correction);
  return {ahead.by_moment, ahead.by_gradient * h.sign};
}

// Sums over one tensor, with v = gain·g: Σm²/s, Σmv/s, Σs.
struct ScaledProducts {
  double mm = 0.0, mg = 0.0, trace = 0.0;
};

// The sums over one Fisher block: T, Q, P and m̂ᵀD⁻¹m̂.
struct AdaptiveBlock {
  double trace = 0.0, square = 0.0, cross = 0.0, plain_square = 0.0;

  SOFIM_HD void add(const Hyper& h, double correction, const ScaledProducts& p, Numerator numerator) {
    const NumeratorTerms v = numerator_terms(h, correction, numerator);
    const double mm = correction * correction * p.mm;
    trace += p.trace;
    square += mm / h.rho;
    // A sum that was not taken is no part of v.
    cross += correction * (v.moment * p.mm + (v.gradient == 0.0 ? 0.0 : v.gradient * p.mg)) / h.rho;
    plain_square += mm;
  }

  // q, how much of the gradients points in one direction. A block without elements has none.
  SOFIM_HD double signal() const { return trace == 0.0 ? 0.0 : plain_square / trace; }
};

// The step of one tensor; `block`: nullptr if F has no term of rank one.
SOFIM_HD Update scaled_update(const Hyper& h, double correction, Numerator numerator, const AdaptiveBlock* block) {
  const NumeratorTerms v = numerator_terms(h, correction, numerator);
  double moment = v.moment;
  if (block != nullptr) {
    const double whole = block->trace + block->square;
    // v = m̂: a quotient, because the difference would cancel.
    moment = numerator == Numerator::moment ? correction * block->trace / whole
                                            : moment - correction * block->cross / whole;
  }
  return {1.0 - h.lr * h.weight_decay, finite(-h.lr * v.gradient), finite(-h.lr * moment)};
}

}  // namespace sofim
