// They run the sweeps of cpu/adaptive.h, as whole steps do, so that both have the same bits. Factors and sums of columns
// have their logical order between operators, those of elements of dimensions 1 and up; sweeps have that of memory.
#include "cpu/adaptive_ops.h"

#include <c10/util/Exception.h>
#include <c10/util/accumulate.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/adaptive.h"
#include "gather/cpu_tensor.h"

namespace sofim {
namespace {

using at::Tensor;
using at::TensorList;

Tensor doubles(const char* name, const Tensor& x, int64_t size) {
  TORCH_CHECK(x.device().is_cpu() && x.scalar_type() == at::kDouble && x.numel() == size, "sofim_fused: ", name, ": ",
              size, " float64 on the CPU are needed");
  return x.contiguous();
}

// x, or a copy of it without gaps between its elements.
Tensor dense(const Tensor& x) {
  return x.is_non_overlapping_and_dense() && !x.is_conj() && !x.is_neg() ? x : x.detach().contiguous().resolve_neg();
}

// A new tensor of x's elements which has them in the order that `strides` say.
Tensor in_order(const Tensor& x, at::IntArrayRef strides) {
  return x.new_empty_strided(x.sizes(), strides).copy_(x.detach());
}

// Running means, as a kernel takes them: a tensor whose elements lie in the order of its strides, without gaps.
class Running {
 public:
  Running(const char* name, size_t i, const Tensor& x, int64_t count, bool wide) : given_(x), stored_(x) {
    TORCH_CHECK(x.device().is_cpu() && x.numel() == count &&
                    x.scalar_type() == (wide ? at::kDouble : at::kFloat),
                "sofim_fused: tensor ", i, ": ", name, ": ", count, wide ? " float64" : " float32",
                " on the CPU are needed");
    stored_ = dense(x);
  }
  void* data() { return stored_.mutable_data_ptr(); }
  at::IntArrayRef strides() const { return stored_.strides(); }
  void write_back() {
    if (!stored_.is_same(given_)) given_.detach().copy_(stored_);
    if (!given_.is_inference()) given_.unsafeGetTensorImpl()->bump_version();
  }

 private:
  Tensor given_, stored_;
};

// One sweep over tensors whose factors are known.
class Sweep {
 public:
  Sweep(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_scales,
        std::optional<TensorList> lost_bits, std::optional<Counts> counts, const GivenScales& scales) {
    const size_t n = params.size();
    TORCH_CHECK(scales.variances.size() == n && scales.kinds.size() == n &&
                    (scales.variance_scales.empty() || scales.variance_scales.size() == n),
                "sofim_fused: the lists differ in length; params has ", n);
    const int64_t count = static_cast<int64_t>(n);
    const Tensor beta2 = doubles("beta2", scales.beta2, count), eps = doubles("eps", scales.eps, count),
                 root = doubles("root", scales.root, count);
    trace_ = doubles("trace", scales.trace, count);
    const Tensor rows64 = doubles("rows", scales.by_row, scales.by_row.numel()),
                 cols64 = doubles("cols", scales.by_col, scales.by_col.numel());
    const Tensor rows32 = rows64.to(at::kFloat), cols32 = cols64.to(at::kFloat);
    int64_t row = 0, col = 0;
    const auto part = [](const char* name, const Tensor& of, int64_t& from, at::IntArrayRef sizes) {
      const int64_t size = c10::multiply_integers(sizes);
      TORCH_CHECK(from + size <= of.numel(), "sofim_fused: ", name, ": more factors are needed than there are");
      from += size;
      return of.narrow(0, from - size, size).view(sizes);
    };
    factors_.reserve(2 * n);
    std::vector<Variances> variances;
    for (size_t i = 0; i < n; ++i) {
      const Diagonal diagonal = diagonal_of(scales.kinds[i]);
      const Tensor& w = params[i];
      const bool wide = w.scalar_type() == at::kDouble;
      Variances given{diagonal};
      if (has_rows(diagonal)) {
        TORCH_CHECK(w.dim() >= 2, "sofim_fused: tensor ", i, ": it has no rows");
        factors_.push_back(part("rows", wide ? rows64 : rows32, row, w.sizes().slice(0, 1)));
        given.rows = &factors_.back();
        if (diagonal == Diagonal::factored) {
          factors_.push_back(part("cols", wide ? cols64 : cols32, col, w.sizes().slice(1)));
          given.cols = &factors_.back();
        }
      } else if (diagonal == Diagonal::tensor) {
        factors_.push_back(part("rows", wide ? rows64 : rows32, row, {}));
        given.whole = &factors_.back();
      } else {
        given.whole = &scales.variances[i];
        if (!scales.variance_scales.empty() && given.whole->scalar_type() == at::kFloat8_e4m3fn) {
          given.scales = &scales.variance_scales[i];
        }
      }
      variances.push_back(given);
      mixes_.push_back({beta2.const_data_ptr<double>()[i], eps.const_data_ptr<double>()[i],
                        root.const_data_ptr<double>()[i]});
    }
    TORCH_CHECK(row == rows64.numel() && col == cols64.numel(), "sofim_fused: rows and cols: ", row, " and ", col,
                " factors are needed");
    tensors_.emplace(gathered(false, params, grads, exp_avgs, exp_avg_scales, lost_bits, counts, variances.data()));
    if (n > 0) {
      sweeps_.begin(&tensors_->record(0), tensors_->variances(), tensors_->tiling(), mixes_.data());
      sweeps_.take_factors(trace_.const_data_ptr<double>());
    }
    if (scales.gain) sweeps_.set_gain(*doubles("gain", *scales.gain, 1).const_data_ptr<double>());
    if (!scales.skip) return;
    TORCH_CHECK(scales.skip->device().is_cpu() && scales.skip->scalar_type() == at::kBool && scales.skip->numel() == 1,
                "sofim_fused: skip: one bool on the CPU is needed");
    skips_ = *scales.skip->const_data_ptr<bool>();
  }

  StepTensors& tensors() { return *tensors_; }
  AdaptiveSweeps& sweeps() { return sweeps_; }
  // Whether there is nothing to do but to raise version counters.
  bool is_idle() const { return skips_ || tensors_->size() == 0; }

 private:
  std::optional<StepTensors> tensors_;
  AdaptiveSweeps sweeps_;
  std::vector<Mix> mixes_;
  std::vector<Tensor> factors_;
  Tensor trace_;
  bool skips_ = false;
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> squares(TensorList grads, at::IntArrayRef kinds) {
  const size_t n = grads.size();
  TORCH_CHECK(kinds.size() == n, "sofim_fused: the lists differ in length; grads has ", n);
  static char columns_wanted;
  std::vector<Tensor> kept;
  std::vector<Row> rows(n);
  std::vector<VarianceRow> variances(n);
  std::vector<Mix> mixes(n);
  Tiling tiling;
  int64_t all_rows = 0, all_cols = 0;
  for (size_t i = 0; i < n; ++i) {
    TORCH_CHECK(grads[i].device().is_cpu() && grads[i].layout() == at::kStrided, "sofim_fused: gradient ", i,
                ": a dense tensor on the CPU is needed");
    kept.push_back(dense(grads[i]));
    const Tensor& g = kept.back();
    rows[i].g = g.const_data_ptr();
    rows[i].g_type = rows[i].w_type = gradient_type(i, g);
    rows[i].numel = g.numel();
    tiling.add(g.numel());
    VarianceRow& variance = variances[i];
    variance.columns = variance.inner = g.numel();
    const Diagonal diagonal = diagonal_of(kinds[i]);
    if (!has_rows(diagonal)) continue;
    TORCH_CHECK(g.dim() >= 2, "sofim_fused: gradient ", i, ": it has no rows");
    variance.count = g.size(0);
    variance.columns = variance.inner = variance.count == 0 ? 0 : g.numel() / variance.count;
    if (g.numel() > 0 && variance.count > 1) variance.inner = g.stride(0);
    all_rows += variance.count;
    if (diagonal != Diagonal::factored) continue;
    variance.cols = &columns_wanted;
    all_cols += c10::multiply_integers(g.sizes().slice(1));
  }
  Tensor total = cpu_tensor({static_cast<int64_t>(n)}, at::kDouble), by_row = cpu_tensor({all_rows}, at::kDouble),
         by_col = cpu_tensor({all_cols}, at::kDouble);
  double *to_total = total.mutable_data_ptr<double>(), *to_row = by_row.mutable_data_ptr<double>(),
         *to_col = by_col.mutable_data_ptr<double>();
  AdaptiveSweeps sweeps;
  sweeps.begin(rows.data(), variances.data(), tiling, mixes.data());
  sweeps.squares();
  int64_t col = 0;
  for (size_t i = 0; i < n; ++i) {
    to_total[i] = sweeps.sum_of(i);
    const VarianceRow& variance = variances[i];
    if (!has_rows(diagonal_of(kinds[i]))) continue;
    const SquareSums sums = sweeps.sums_of(i);
    to_row = std::copy_n(sums.rows, variance.count, to_row);
    if (variance.cols == nullptr) continue;
    const Tensor& g = kept[i];
    const at::IntArrayRef sizes = g.sizes().slice(1);
    if (variance.count == 0) {  // no element, but columns
      const int64_t columns = c10::multiply_integers(sizes);
      std::fill_n(to_col + col, columns, 0.0);
      col += columns;
      continue;
    }
    Tensor ordered = by_col.new_empty_strided(sizes, strides_of_columns(g));
    std::copy_n(sums.cols, variance.columns, ordered.mutable_data_ptr<double>());
    by_col.narrow(0, col, variance.columns).view(sizes).copy_(ordered);
    col += variance.columns;
  }
  return {total, by_row, by_col};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> adapt(
    TensorList steps, const Tensor& hyper, at::IntArrayRef sizes, at::IntArrayRef kinds, at::IntArrayRef heights,
    at::IntArrayRef widths, TensorList row_vars, TensorList col_vars, TensorList variances, const Tensor& total,
    const Tensor& rows, const Tensor& cols, bool guarded, const Vector& square, std::optional<double> max_norm,
    const Vector& grad_scale, const Vector& found_inf, bool skip_nonfinite) {
  const size_t n = steps.size();
  const int64_t count = static_cast<int64_t>(n);
  TORCH_CHECK(kinds.size() == n && heights.size() == n && widths.size() == n && row_vars.size() == n &&
                  col_vars.size() == n && variances.size() == n &&
                  c10::sum_integers(sizes) == count,
              "sofim_fused: the lists differ in length; steps has ", n);
  TORCH_CHECK(!guarded || square, "sofim_fused: square: a guarded step needs it");
  const Tensor settings = doubles("hyper", hyper, static_cast<int64_t>(sizes.size()) * 8),
               totals = doubles("total", total, count);
  Guard guard;
  if (guarded) {
    const auto number = [](const char* name, const Vector& x, double otherwise) {
      return x ? *doubles(name, *x, 1).const_data_ptr<double>() : otherwise;
    };
    guard = guard_of(number("square", square, 0.0), grad_scale ? 1.0 / number("grad_scale", grad_scale, 1.0) : 1.0,
                     max_norm.value_or(std::numeric_limits<double>::infinity()),
                     number("found_inf", found_inf, 0.0) != 0.0, skip_nonfinite);
  }
  struct Each {
    Diagonal diagonal;
    VarianceRow variance;
    Mix mix;
    bool wide;
    at::IntArrayRef sizes, strides;  // of columns
  };
  std::vector<Each> tensors;
  std::vector<Running> running;
  running.reserve(2 * n);
  Tensor numbers = cpu_tensor({4, count}, at::kDouble), seen = cpu_tensor({3}, at::kDouble);
  double* const trace = numbers.mutable_data_ptr<double>();
  int64_t all_rows = 0, row_sums = 0, all_cols = 0, most = 0;
  LastCorrection correction;
  size_t group = 0;
  int64_t end = sizes.empty() ? 0 : sizes[0];
  for (int64_t i = 0; i < count; ++i) {
    while (i >= end) end += sizes[++group];
    TORCH_CHECK(steps[i].device().is_cpu() && steps[i].scalar_type() == at::kLong && steps[i].numel() == 1,
                "sofim_fused: steps: 0-dimensional int64 tensors on the CPU are needed");
    const double* const of_group = settings.const_data_ptr<double>() + 8 * group;
    const double beta2 = of_group[6];
    Each each{diagonal_of(kinds[i]), {}, {}, false, {}, {}};
    each.mix = {beta2, of_group[7], std::sqrt(correction.of(beta2, *steps[i].const_data_ptr<int64_t>() + 1)), guard.gain};
    each.variance.columns = widths[i];
    const auto take = [&](const char* name, const Tensor& x, int64_t numel) {
      each.wide = x.scalar_type() == at::kDouble;
      running.emplace_back(name, i, x, numel, each.wide);
      return running.back().data();
    };
    if (each.diagonal == Diagonal::tensor) {
      each.variance.whole = take("variance", variances[i], 1);
      all_rows += 1;
    } else if (has_rows(each.diagonal)) {
      each.variance.count = row_vars[i].numel();
      each.variance.rows = take("row_var", row_vars[i], each.variance.count);
      all_rows += each.variance.count;
      row_sums += each.variance.count;
      if (each.diagonal == Diagonal::factored) {
        const bool wide = each.wide;
        TORCH_CHECK(heights[i] == each.variance.count && (heights[i] == 0 || widths[i] == col_vars[i].numel()),
                    "sofim_fused: tensor ", i, ": heights and widths are not those of row_var and col_var");
        each.variance.columns = col_vars[i].numel();
        each.variance.cols = take("col_var", col_vars[i], each.variance.columns);
        TORCH_CHECK(wide == each.wide, "sofim_fused: tensor ", i, ": row_var and col_var differ in dtype");
        each.sizes = col_vars[i].sizes();
        each.strides = running.back().strides();
        all_cols += each.variance.columns;
      }
    }
    most = std::max(most, each.variance.count + (each.variance.cols == nullptr ? 0 : each.variance.columns));
    trace[count + i] = beta2;
    trace[2 * count + i] = each.mix.eps;
    trace[3 * count + i] = each.mix.root_of_correction;
    tensors.push_back(each);
  }
  const Tensor given_rows = doubles("rows", rows, row_sums), given_cols = doubles("cols", cols, all_cols);
  Tensor by_row = cpu_tensor({all_rows}, at::kDouble), by_col = cpu_tensor({all_cols}, at::kDouble);
  double* const of_guard = seen.mutable_data_ptr<double>();
  of_guard[0] = guard.norm;
  of_guard[1] = guard.gain;
  of_guard[2] = guard.skip ? 1.0 : 0.0;
  std::vector<double> memory(static_cast<size_t>(most + kScalePadding));
  int64_t row = 0, row_sum = 0, col = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Each& each = tensors[i];
    trace[i] = 0.0;
    if (each.diagonal == Diagonal::element) continue;
    const VarianceRow& variance = each.variance;
    double* const to_rows = by_row.mutable_data_ptr<double>() + row;
    if (guard.skip) {  // the sweeps do nothing
      std::fill_n(to_rows, variance.count, 0.0);
      row += variance.count;
      continue;
    }
    SquareSums sums{given_rows.const_data_ptr<double>() + row_sum, nullptr};
    if (each.diagonal == Diagonal::tensor) sums.rows = totals.const_data_ptr<double>() + i;
    Tensor ordered;
    if (variance.cols != nullptr) {
      ordered = in_order(given_cols.narrow(0, col, variance.columns).view(each.sizes), each.strides);
      sums.cols = ordered.const_data_ptr<double>();
    }
    Scale scale;
    trace[i] = adapt(variance, each.mix, each.wide, sums, memory.data(), scale);
    const auto widen = [&](const void* from, int64_t number, double* to) {
      if (each.wide) std::copy_n(static_cast<const double*>(from), number, to);
      else std::copy_n(static_cast<const float*>(from), number, to);
    };
    widen(scale.rows, variance.count, to_rows);
    row += variance.count;
    if (each.diagonal != Diagonal::tensor) row_sum += variance.count;
    if (variance.cols == nullptr) continue;
    widen(scale.cols, variance.columns, ordered.mutable_data_ptr<double>());
    by_col.narrow(0, col, variance.columns).view(each.sizes).copy_(ordered);
    col += variance.columns;
  }
  if (guard.skip) std::fill_n(by_col.mutable_data_ptr<double>(), all_cols, 0.0);
  for (Running& each : running) each.write_back();
  return {by_row, by_col, numbers, seen};
}

Tensor accumulate_scaled(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_scales,
                         TensorList variances, at::IntArrayRef kinds, TensorList steps, at::IntArrayRef ordinals, Floats moment,
                         Floats gradient, const Tensor& by_row, const Tensor& by_col, const Tensor& trace,
                         const Tensor& beta2, const Tensor& eps, const Tensor& root, const Vector& gain,
                         const Vector& skip, TensorList variance_scales) {
  Sweep sweep(params, grads, exp_avgs, exp_avg_scales, std::nullopt, Counts{steps, ordinals},
              {variances, kinds, by_row, by_col, trace, beta2, eps, root, gain, skip, variance_scales});
  StepTensors& tensors = sweep.tensors();
  set_decay(tensors, moment, gradient, std::nullopt);
  tensors.key_random_bits(1);
  tensors.bump_moments();
  tensors.bump_variances();
  const size_t n = tensors.size();
  std::vector<ScaledProducts> products(n);
  if (!sweep.is_idle()) {
    Mode mode;
    mode.cross = true;
    products = sweep.sweeps().enter(mode);
    tensors.write_back(false, true);
  }
  Tensor result = cpu_tensor({kScaledSums, static_cast<int64_t>(n)}, at::kDouble);
  double* const to = result.mutable_data_ptr<double>();
  for (size_t i = 0; i < n; ++i) {
    to[i] = products[i].mm;
    to[n + i] = products[i].mg;
    to[2 * n + i] = products[i].trace;
  }
  return result;
}

void apply_scaled(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_scales,
                  TensorList lost_bits, TensorList variances,
                  at::IntArrayRef kinds, TensorList steps, at::IntArrayRef ordinals, const Tensor& moment,
                  const Vector& weight, const Vector& gradient, const Tensor& by_row, const Tensor& by_col,
                  const Tensor& trace, const Tensor& beta2, const Tensor& eps, const Tensor& root, const Vector& gain,
                  const Vector& skip, TensorList variance_scales) {
  Sweep sweep(params, grads, exp_avgs, exp_avg_scales, lost_bits, Counts{steps, ordinals},
              {variances, kinds, by_row, by_col, trace, beta2, eps, root, gain, skip, variance_scales});
  Mode mode;
  set_update(sweep.tensors(), mode, moment, weight, gradient);
  sweep.tensors().key_random_bits(0);
  sweep.tensors().bump_weights();
  if (sweep.is_idle()) return;
  sweep.sweeps().apply(mode);
  sweep.tensors().write_back(true, false);
}

void commit_scaled(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_scales,
                   TensorList lost_bits, TensorList variances,
                   at::IntArrayRef kinds, TensorList steps, at::IntArrayRef ordinals, Floats decay_moment,
                   Floats decay_gradient, const Tensor& moment, const Vector& weight, const Vector& gradient,
                   const Tensor& by_row, const Tensor& by_col, const Tensor& trace, const Tensor& beta2,
                   const Tensor& eps, const Tensor& root, const Vector& gain, const Vector& skip, TensorList variance_scales) {
  Sweep sweep(params, grads, exp_avgs, exp_avg_scales, lost_bits, Counts{steps, ordinals},
              {variances, kinds, by_row, by_col, trace, beta2, eps, root, gain, skip, variance_scales});
  StepTensors& tensors = sweep.tensors();
  Mode mode;
  set_decay(tensors, decay_moment, decay_gradient, std::nullopt);
  set_update(tensors, mode, moment, weight, gradient);
  tensors.key_random_bits(0);
  tensors.bump_moments();
  tensors.bump_variances();
  tensors.bump_weights();
  if (sweep.is_idle()) return;
  mode.updates = true;
  sweep.sweeps().enter(mode);
  tensors.write_back(true, true);
}

}  // namespace sofim
