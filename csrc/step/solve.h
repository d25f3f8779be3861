// From sums to coefficients, in float64. sofim_fused/backends/solve.py derives the formulas and evaluates them with
// PyTorch; here they are evaluated for one tensor of a Fisher block at a time. Notation as there: β momentum, ρ rho,
// η lr, t updates so far including this one, S and P the sums over a Fisher block, κ the clip factor.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "step/element.h"

namespace sofim {

// What one Fisher matrix spans.
enum class Fisher : uint8_t { model, group, parameter };

// The number of Fisher blocks of a step. interface.py has the same for Python.
template <class T>
SOFIM_HD T fisher_blocks(Fisher fisher, T groups, T tensors) {
  return fisher == Fisher::model ? 1 : fisher == Fisher::group ? groups : tensors;
}

// The Fisher block of one tensor, given its place among the tensors and that of its group.
template <class T>
SOFIM_HD T fisher_block_of(Fisher fisher, T group, T tensor) {
  return fisher == Fisher::model ? 0 : fisher == Fisher::group ? group : tensor;
}

// What F⁻¹ is applied to, by its index in NUMERATORS of sofim_fused/checks.py: the bias-corrected moment, the gradient,
// or the look-ahead (β m + (1-β) v)/(1 - β^(t+1)) of Nesterov's method.
enum class Numerator : uint8_t { moment, gradient, nesterov };

// Whether the update has a term in the gradient, so that the second pass reads it.
SOFIM_HD constexpr bool reads_gradient(Numerator numerator) { return numerator != Numerator::moment; }

// A parameter group's hyperparameters.
struct Hyper {
  double lr = 0.0;
  double momentum = 0.0;
  double rho = 1.0;
  double weight_decay = 0.0;  // decoupled
  double l2 = 0.0;
  double sign = 1.0;  // -1 to maximize
};

// How a gradient and, with L2 decay, the weight enter the first moment.
SOFIM_HD Decay decay_of(const Hyper& h) {
  const double one_minus_beta = 1.0 - h.momentum;
  return {h.momentum, one_minus_beta * h.sign, one_minus_beta * h.l2};
}

// Dot products of one tensor's m, g and w.
struct Products {
  double mm = 0.0, mg = 0.0, mw = 0.0, gg = 0.0, gw = 0.0, ww = 0.0;
};

// 1/(1 - β^t).
SOFIM_HD double bias_correction(double momentum, int64_t update) {
  return -1.0 / expm1(static_cast<double>(update) * log(momentum));
}

// What the new moment and the gradient are multiplied by in the look-ahead. `correction`: 1/(1 - β^t).
struct LookAhead {
  double by_moment, by_gradient;

  SOFIM_HD LookAhead(double momentum, double correction) {
    const double later = (1.0 - momentum) + momentum / correction;  // 1 - β^(t+1)
    by_moment = momentum / later;
    by_gradient = (1.0 - momentum) / later;
  }
};

// bias_correction() for one tensor after another. It keeps the last value, which the next tensor usually shares.
class LastCorrection {
 public:
  double of(double momentum, int64_t update) {
    if (momentum != momentum_ || update != update_) value_ = bias_correction(momentum_ = momentum, update_ = update);
    return value_;
  }

 private:
  double momentum_ = -1.0, value_ = 0.0;
  int64_t update_ = 0;
};

// l2·x; without L2 decay 0, even if x is infinite.
SOFIM_HD double decayed(double l2, double x) { return l2 == 0.0 ? 0.0 : l2 * x; }

// The sums over one Fisher block. Plain step: `norm` is S and `cross` is P, of the new moment. Guarded step: the new
// moment depends on κ, which is not known yet, so that all of these are polynomials in κ, lowest power first; `scale`
// is what `norm` would be if nothing cancelled.
struct PlainBlock {
  double norm = 0.0, cross = 0.0;

  SOFIM_HD void add(const Hyper& h, double correction, const Products& p, Numerator numerator) {
    const double weight = correction / h.rho;
    norm += weight * correction * p.mm;
    double mr = h.sign * p.mg + decayed(h.l2, p.mw);
    if (numerator == Numerator::nesterov) {
      const LookAhead ahead(h.momentum, correction);
      mr = ahead.by_moment * p.mm + ahead.by_gradient * mr;
    }
    cross += weight * mr;
  }
};

struct GuardedBlock {
  double norm[3] = {}, scale[3] = {}, cross[3] = {};

  SOFIM_HD void add(const Hyper& h, double correction, const Products& p, Numerator numerator) {
    const double beta = h.momentum, one_minus_beta = 1.0 - beta;
    const double weight = correction / h.rho, square = weight * correction;
    const double mv[3] = {decayed(h.l2, p.mw), h.sign * p.mg, 0.0};
    const double vv[3] = {decayed(h.l2 * h.l2, p.ww), 2.0 * h.sign * decayed(h.l2, p.gw), p.gg};
    const double still = beta * sqrt(p.mm) + one_minus_beta * sqrt(vv[0]), moving = one_minus_beta * sqrt(p.gg);
    norm[0] += square * beta * beta * p.mm;
    for (int power = 0; power < 3; ++power) {
      const double mm = 2.0 * beta * one_minus_beta * mv[power] + one_minus_beta * one_minus_beta * vv[power];
      double mr = beta * mv[power] + one_minus_beta * vv[power];
      if (numerator == Numerator::nesterov) {
        const LookAhead ahead(beta, correction);
        mr = ahead.by_moment * (power == 0 ? mm + beta * beta * p.mm : mm) + ahead.by_gradient * mr;
      }
      norm[power] += square * mm;
      cross[power] += weight * mr;
    }
    scale[0] += square * still * still;
    scale[1] += square * 2.0 * still * moving;
    scale[2] += square * moving * moving;
  }

  SOFIM_HD PlainBlock at_gain(double gain) const {
    PlainBlock result;
    // (2 ulp of float32)²: where the moment's terms cancel, the sum is no smaller than the moment's own rounding.
    const double floor = 0x1p-46 * at(scale, gain);
    result.norm = at(norm, gain);
    if (result.norm < floor) result.norm = floor;
    result.cross = at(cross, gain);
    return result;
  }

 private:
  // At κ = 0 the other coefficients may be infinite: the norm has overflowed.
  static SOFIM_HD double at(const double* p, double gain) {
    return gain == 0.0 ? p[0] : p[0] + gain * (p[1] + gain * p[2]);
  }
};

// The gradients' norm before clipping, the factor κ that unscales and clips them, and whether the step is skipped.
struct Guard {
  double norm = 0.0, gain = 1.0;
  bool skip = false;
};

// `square`: the sum of squares of all gradients as they are. `unscale`: times these: the true gradients. `limit`: the
// norm to clip to, or infinity. `found`: not all gradients are finite.
SOFIM_HD Guard guard_of(double square, double unscale, double limit, bool found, bool skip_nonfinite) {
  Guard guard;
  guard.norm = sqrt(square) * unscale;
  guard.gain = (guard.norm > limit ? limit / guard.norm : 1.0) * unscale;
  guard.skip = found || (skip_nonfinite && !(fabs(guard.norm) <= DBL_MAX));
  return guard;
}

// w' = w·weight + g·(κ·gradient) + m'·moment.
struct Update {
  double weight = 1.0, gradient = 0.0, moment = 0.0;
};

// Limits a coefficient to the range of float32. Beyond it, it would become infinite, and its product with zero NaN.
SOFIM_HD double finite(double x) { return x > FLT_MAX ? FLT_MAX : x < -FLT_MAX ? -FLT_MAX : x; }

// The gradient's part of the step, which does not depend on any sum. Only for numerators that read the gradient.
SOFIM_HD Update gradient_part(const Hyper& h, double correction, Numerator numerator) {
  double rate = h.lr / h.rho;
  if (numerator == Numerator::nesterov) rate *= LookAhead(h.momentum, correction).by_gradient;
  return {1.0 - h.lr * h.weight_decay - decayed(h.l2, rate), finite(-rate * h.sign), 0.0};
}

// The Sherman-Morrison step of one tensor.
SOFIM_HD Update sherman_morrison(const Hyper& h, double correction, const PlainBlock& block, Numerator numerator) {
  const double shrink = correction / (h.rho * (1.0 + block.norm));
  if (!reads_gradient(numerator)) return {1.0 - h.lr * h.weight_decay, 0.0, finite(-h.lr * shrink)};
  Update update = gradient_part(h, correction, numerator);
  if (numerator == Numerator::nesterov) {
    const double by_moment = LookAhead(h.momentum, correction).by_moment;
    update.moment = finite(h.lr * (shrink * block.cross - by_moment / h.rho));
  } else {
    update.moment = finite(h.lr * shrink * block.cross);
  }
  return update;
}

}  // namespace sofim
