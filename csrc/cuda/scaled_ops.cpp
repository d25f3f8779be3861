// The operators of a step with a diagonal that adapts. sofim_fused/backends/interface.py documents them
// (AdaptivePasses); fake implementations are in sofim_fused/backends/operators.py.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>
#include <torch/library.h>

#include <limits>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda/algebra.h"
#include "cuda/launch.h"
#include "cuda/squares_plan.h"
#include "gather/op_arguments.h"

namespace sofim::cuda {
namespace {

using at::Tensor;
using at::TensorList;

at::TensorOptions doubles_on(at::Device device) { return at::TensorOptions(at::kDouble).device(device); }

// Copies of tensors that kernels cannot read or write where they are.
class Copies {
 public:
  // x, or a copy in the order of `strides`.
  Tensor in_order(const Tensor& x, at::IntArrayRef strides, bool written) {
    bool same = !x.is_conj() && !x.is_neg();
    for (int64_t i = 0; i < x.dim(); ++i) same &= x.size(i) <= 1 || x.stride(i) == strides[i];
    if (same || x.numel() == 0) return x;
    Tensor copy = at::empty_strided(x.sizes(), strides, x.options());
    copy.copy_(x.detach());
    if (written) copied_.emplace_back(x, copy);
    kept_.push_back(copy);
    return copy;
  }
  // x, or a copy in its logical order.
  Tensor contiguous(const Tensor& x, bool written) {
    std::vector<int64_t> strides(static_cast<size_t>(x.dim()));
    int64_t stride = 1;
    for (int64_t i = x.dim(); i-- > 0; stride *= x.size(i)) strides[static_cast<size_t>(i)] = stride;
    return in_order(x, strides, written);
  }

  void write_back() {
    c10::NoGradGuard no_grad;
    for (const auto& [original, copy] : copied_) original.detach().copy_(copy);
  }

 private:
  std::vector<std::pair<Tensor, Tensor>> copied_;
  std::vector<Tensor> kept_;
};

// The elements of x[0].
int64_t columns_of(const Tensor& x) {
  int64_t columns = 1;
  for (int64_t i = 1; i < x.dim(); ++i) columns *= x.size(i);
  return columns;
}

// Whether the kernels find the rows of a dense tensor: they follow each other. Column sums and factors are in logical
// order, so that they fit those of other ranks; so their tensors have to be in it too.
bool is_matrix(const Tensor& x, Diagonal diagonal) {
  if (!has_rows(diagonal) || x.is_contiguous()) return true;
  return diagonal == Diagonal::row && (x.size(0) <= 1 || x.stride(0) == columns_of(x));
}

void bump(const Tensor& x) {
  if (!x.is_inference()) x.unsafeGetTensorImpl()->bump_version();
}

const double* doubles(const char* name, const Vector& x, int64_t size, at::Device device) {
  if (!x) return nullptr;
  TORCH_CHECK(x->device() == device && x->scalar_type() == at::kDouble && x->numel() == size && x->is_contiguous(),
              "sofim_fused: ", name, ": ", size, " contiguous float64 on ", device, " are needed");
  return static_cast<const double*>(x->const_data_ptr());
}

// The scales of a step, as the operators get them.
struct GivenScales {
  const Tensor &by_row, &by_col, &beta2, &eps, &root;
  const Vector &gain, &skip;
};

// One sweep, and all that it needs.
class Sweep {
 public:
  Sweep(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_scales,
        std::optional<TensorList> lost_bits,
        TensorList variances, at::IntArrayRef kinds, std::optional<Counts> counts, bool writes_moments)
      : variances_(variances), writes_moments_(writes_moments) {
    const size_t n = params.size();
    TORCH_CHECK(exp_avgs.size() == n && variances.size() == n && kinds.size() == n,
                "sofim_fused: the lists differ in length; params has ", n);
    std::vector<Tensor> moments;
    for (size_t i = 0; i < n; ++i) {
      const Tensor& m = exp_avgs[i];
      const Diagonal diagonal = diagonal_of(kinds[i]);
      const bool in_place = !m.is_non_overlapping_and_dense() || is_matrix(m, diagonal);  // gathered() copies others
      moments.push_back(in_place ? m : copies_.contiguous(m, writes_moments));
    }
    tensors_.emplace(gathered(true, params, grads, moments, exp_avg_scales, lost_bits, counts));
    packed_.take(*tensors_, 0);
    scalings_.resize(n);
    for (size_t i = 0; i < n; ++i) scale(i, params[i], moments[i], diagonal_of(kinds[i]));
  }

  StepTensors& tensors() { return *tensors_; }

  void set_decay(Floats moment, Floats gradient) {
    sofim::set_decay(*tensors_, moment, gradient, std::nullopt);
    for (size_t i = 0; i < scalings_.size(); ++i) {
      scalings_[i].decay_m = moment[i];
      scalings_[i].decay_g = gradient[i];
    }
  }

  // Coefficients, one per tensor; a missing vector stands for the value that changes nothing.
  void set_update(const Vector& moment, const Vector& weight, const Vector& gradient) {
    update_[0] = moment;
    update_[1] = weight;
    update_[2] = gradient;
  }

  void run(decltype(launch_apply_scaled)& launch, const GivenScales& scales) {
    const auto n = static_cast<int64_t>(tensors_->size());
    if (n == 0) return;
    const at::Device device = tensors_->device();
    const DeviceScope on(device);
    static_cast<Task&>(task_) = packed_.task;
    memory_.serve(task_, device, on.stream());
    const auto given = [&](const char* name, const Vector& x, int64_t size) {
      return const_cast<double*>(doubles(name, x, size, device));  // a Task's members are written by other passes
    };
    task_.by_moment = given("moment", update_[0], n);
    task_.by_weight = given("weight", update_[1], n);
    task_.by_gradient = given("gradient", update_[2], n);
    task_.gain = given("gain", scales.gain, 1);
    TORCH_CHECK(!scales.skip || (scales.skip->device() == device && scales.skip->scalar_type() == at::kBool),
                "sofim_fused: skip: one bool on ", device, " is needed");
    task_.skip = scales.skip ? static_cast<bool*>(scales.skip->mutable_data_ptr()) : nullptr;
    task_.beta2 = given("beta2", scales.beta2, n);
    task_.eps = given("eps", scales.eps, n);
    task_.root = given("root", scales.root, n);
    const double* rows64 = given("rows", scales.by_row, rows_);
    const double* cols64 = given("cols", scales.by_col, cols_);
    // For arithmetic in float32.
    const Tensor by_row = scales.by_row.to(at::kFloat), by_col = scales.by_col.to(at::kFloat);
    const auto *rows32 = static_cast<const float*>(by_row.const_data_ptr()),
               *cols32 = static_cast<const float*>(by_col.const_data_ptr());
    for (size_t i = 0; i < scalings_.size(); ++i) {
      const bool wide = packed_.rows[i].w_type == Type::float64;
      const auto from = [&](const double* x64, const float* x32, int64_t at) -> const void* {
        if (at < 0) return nullptr;
        return wide ? static_cast<const void*>(x64 + at) : x32 + at;
      };
      scalings_[i].by_row = from(rows64, rows32, rows_at_[i]);
      scalings_[i].by_col = from(cols64, cols32, cols_at_[i]);
    }
    memory_.serve_table(task_, packed_.rows, scalings_, device, on.stream());
    check(launch(packed_.form.types, task_, packed_.rows.data(), scalings_.data(), on.stream()));
  }

  // Σm²/s, Σmv/s and Σs of the elements' own variances: float64 [3, tensors].
  Tensor sums() const {
    if (tensors_->size() == 0) return at::zeros({kTrace + 1, 0}, doubles_on(kDevice));
    return memory_.sums().narrow(0, 0, kTrace + 1).clone();
  }

  // Copies written copies back, and raises version counters.
  void finish(bool weights) {
    if (weights) tensors_->bump_weights();
    if (writes_moments_) {
      tensors_->bump_moments();
      for (size_t i = 0; i < scalings_.size(); ++i) {
        if (scalings_[i].v != nullptr) bump(variances_[i]);
      }
    }
    tensors_->write_back(weights, writes_moments_);
    copies_.write_back();
  }

 private:
  void scale(size_t i, const Tensor& w, const Tensor& m, Diagonal diagonal) {
    Scaling& scaling = scalings_[i];
    Row& row = packed_.rows[i];
    scaling.cols = has_rows(diagonal) ? columns_of(w) : kOneRow;
    rows_at_.push_back(diagonal == Diagonal::element ? -1 : rows_);
    cols_at_.push_back(diagonal == Diagonal::factored ? cols_ : -1);
    if (diagonal == Diagonal::element) {
      const Tensor& v = variances_[i];
      const auto dtype = row.w_type == Type::float64 ? at::kDouble : at::kFloat;
      TORCH_CHECK(v.device() == w.device() && v.scalar_type() == dtype && v.sizes() == w.sizes(),
                  "sofim_fused: tensor ", i, ": variance: ", dtype, " of its parameter's shape is needed");
      const Tensor order = m.is_non_overlapping_and_dense() ? m : at::empty(m.sizes(), m.options());
      const Tensor stored = copies_.in_order(v, order.strides(), writes_moments_);
      scaling.v = stored.mutable_data_ptr();
      row.aligned &= reinterpret_cast<uintptr_t>(scaling.v) % 16 == 0;
      return;
    }
    rows_ += has_rows(diagonal) ? w.size(0) : 1;
    if (diagonal == Diagonal::factored) cols_ += scaling.cols;
  }

  TensorList variances_;
  const bool writes_moments_;
  Copies copies_;
  std::optional<StepTensors> tensors_;
  Packed packed_;
  ScaledTask task_{};
  std::vector<Scaling> scalings_;
  std::vector<int64_t> rows_at_, cols_at_;  // where a tensor's factors begin; -1: it has none
  int64_t rows_ = 0, cols_ = 0;
  Memory memory_;
  Vector update_[3];
};

// A table in the device's memory with these bytes, if they do not fit into arguments with a task T; else undefined.
template <class T>
Tensor table_of(Bytes bytes, at::Device device, void* stream) {
  if (has_room<T>(largest_arguments(), bytes.size)) return Tensor();
  const Tensor table =
      at::empty({static_cast<int64_t>((bytes.size + 7) / 8 * 8)}, at::TensorOptions(at::kByte).device(device));
  check(fill(table.mutable_data_ptr(), bytes, {nullptr, 0}, stream));
  return table;
}

std::tuple<Tensor, Tensor, Tensor> squares(TensorList grads, at::IntArrayRef kinds) {
  const size_t n = grads.size();
  TORCH_CHECK(kinds.size() == n, "sofim_fused: the lists differ in length; grads has ", n);
  const at::Device device = n == 0 ? at::Device(kDevice) : grads[0].device();
  const auto options = doubles_on(device);
  Copies copies;
  SquaresPlan plan;
  for (size_t i = 0; i < n; ++i) {
    TORCH_CHECK(grads[i].device() == device && device.type() == kDevice, "sofim_fused: gradient ", i, ": it is on ",
                grads[i].device(), ", ", device, " is needed");
    const Diagonal diagonal = diagonal_of(kinds[i]);
    const bool in_place =
        grads[i].is_non_overlapping_and_dense() && !grads[i].is_neg() && is_matrix(grads[i], diagonal);
    const Tensor g = in_place ? grads[i] : copies.contiguous(grads[i], false);
    const int64_t columns = columns_of(g);
    plan.add(g.const_data_ptr(), gradient_type(i, g), diagonal, g.dim() > 0 ? g.size(0) : 1, columns);
  }
  TORCH_CHECK(plan.fits(), "sofim_fused: more elements than a launch can have");
  Tensor total = at::empty({static_cast<int64_t>(n)}, options), by_row = at::empty({plan.all_rows()}, options),
         by_col = at::empty({plan.all_cols()}, options);
  if (n == 0) return {total, by_row, by_col};
  const DeviceScope on(device);
  const Tensor counters = at::zeros({plan.counters()}, options.dtype(at::kInt));
  const Tensor numbers = at::empty({plan.numbers()}, options);
  const auto at = [](const Tensor& x) { return x.mutable_data_ptr<double>(); };
  SquaresTask task = plan.place(static_cast<uint32_t*>(counters.mutable_data_ptr()), at(numbers), at(total), at(by_row),
                                at(by_col));
  const Tensor table = table_of<SquaresTask>(bytes_of(plan.rows()), device, on.stream());
  task.rows = table.defined() ? static_cast<const SquaresRow*>(table.const_data_ptr()) : nullptr;
  check(launch_squares(task, plan.rows().data(), on.stream()));
  return {total, by_row, by_col};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> adapt(
    TensorList steps, const Tensor& hyper, at::IntArrayRef sizes, at::IntArrayRef kinds, at::IntArrayRef heights,
    at::IntArrayRef widths, TensorList row_vars, TensorList col_vars, TensorList variances, const Tensor& total,
    const Tensor& rows, const Tensor& cols, bool guarded, const Vector& square, std::optional<double> max_norm,
    const Vector& grad_scale, const Vector& found_inf, bool skip_nonfinite) {
  const size_t n = steps.size();
  TORCH_CHECK(kinds.size() == n && heights.size() == n && widths.size() == n && row_vars.size() == n &&
                  col_vars.size() == n && variances.size() == n,
              "sofim_fused: the lists differ in length; steps has ", n);
  Algebra algebra(hyper, steps, hyper, sizes, 0, 0, guarded, true);
  const at::Device device = algebra.device();
  const auto options = doubles_on(device);
  AdaptTask task{};
  TORCH_CHECK(!guarded || square, "sofim_fused: square: a guarded step needs it");
  if (guarded) {
    task.square = algebra.doubles("square", square->reshape({1}), {1});
    algebra.set_guard(max_norm, grad_scale, found_inf, skip_nonfinite, task.guard);
  }
  Copies copies;
  const auto running = [&](const char* name, size_t i, const Tensor& x, int64_t count, AdaptRow& row) {
    const bool right = x.device() == device && x.numel() == count &&
                       (x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble);
    TORCH_CHECK(right, "sofim_fused: tensor ", i, ": ", name, ": ", count, " float32 or float64 on ", device,
                " are needed");
    row.float64 = x.scalar_type() == at::kDouble;
    bump(x);
    return copies.contiguous(x, true).mutable_data_ptr();
  };
  std::vector<AdaptRow> table;
  int64_t all_rows = 0, all_cols = 0;
  size_t group = 0;
  uint64_t blocks = 0;
  for (size_t i = 0; i < n; ++i) {
    const Diagonal diagonal = diagonal_of(kinds[i]);
    while (i >= algebra.starts()[group + 1]) ++group;
    AdaptRow row{};
    row.group = static_cast<uint32_t>(group);
    row.step = algebra.steps()[i];
    row.first = static_cast<uint32_t>(blocks);
    row.row_count = static_cast<double>(widths[i]);
    row.col_count = static_cast<double>(heights[i]);
    if (diagonal == Diagonal::tensor) {
      row.rows = 1;
      row.row_var = running("variance", i, variances[i], 1, row);
    } else if (diagonal != Diagonal::element) {
      row.rows = row_vars[i].numel();
      row.row_var = running("row_var", i, row_vars[i], row.rows, row);
      if (diagonal == Diagonal::factored) {
        row.cols = col_vars[i].numel();
        const bool float64 = row.float64;
        row.col_var = running("col_var", i, col_vars[i], row.cols, row);
        TORCH_CHECK(float64 == row.float64, "sofim_fused: tensor ", i, ": row_var and col_var differ in dtype");
      }
    }
    all_rows += row.rows;
    all_cols += row.cols;
    blocks += row_blocks(row.rows) + (row.cols > 0);
    table.push_back(row);
  }
  TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "sofim_fused: more rows than a launch can have");
  int64_t summed_rows = 0;
  for (const AdaptRow& row : table) summed_rows += has_rows(diagonal_of(kinds[&row - table.data()])) ? row.rows : 0;
  const double* at_total = doubles("total", total, static_cast<int64_t>(n), device);
  const double* row_sums = doubles("rows", rows, summed_rows, device);
  const double* col_sums = doubles("cols", cols, all_cols, device);
  Tensor by_row = at::empty({all_rows}, options), by_col = at::empty({all_cols}, options),
         numbers = at::empty({4, static_cast<int64_t>(n)}, options), guard = at::empty({3}, options);
  if (n == 0) return {by_row, by_col, numbers, guard};
  double *to_row = by_row.mutable_data_ptr<double>(), *to_col = by_col.mutable_data_ptr<double>();
  for (size_t i = 0; i < n; ++i) {
    AdaptRow& row = table[i];
    const Diagonal diagonal = diagonal_of(kinds[i]);
    row.by_row = to_row;
    row.by_col = to_col;
    to_row += row.rows;
    to_col += row.cols;
    if (diagonal == Diagonal::tensor) row.row_sums = at_total + i;
    if (!has_rows(diagonal)) continue;
    row.row_sums = row_sums;
    row.col_sums = col_sums;
    row_sums += row.rows;
    col_sums += row.cols;
  }
  const DeviceScope on(device);
  const Tensor counters = at::zeros({static_cast<int64_t>(n)}, options.dtype(at::kInt));
  const Tensor slots = at::empty({static_cast<int64_t>(blocks)}, options);
  task.hyper = reinterpret_cast<const ScaledHyper*>(algebra.task().hyper);
  task.counters = static_cast<uint32_t*>(counters.mutable_data_ptr());
  task.slots = slots.mutable_data_ptr<double>();
  task.trace = numbers.mutable_data_ptr<double>();
  task.beta2 = task.trace + n;
  task.eps = task.beta2 + n;
  task.root = task.eps + n;
  task.norm = guard.mutable_data_ptr<double>();
  task.gain = task.norm + 1;
  task.skips = task.norm + 2;
  task.tensors = static_cast<uint32_t>(n);
  task.blocks = static_cast<uint32_t>(blocks);
  task.is_guarded = guarded;
  task.wide = true;
  const Tensor kept = table_of<AdaptTask>(bytes_of(table), device, on.stream());
  task.rows = kept.defined() ? static_cast<const AdaptRow*>(kept.const_data_ptr()) : nullptr;
  check(launch_adapt(task, table.data(), nullptr, on.stream()));
  copies.write_back();
  return {by_row, by_col, numbers, guard};
}

static void check_no_codes(TensorList variance_scales) {
  TORCH_CHECK(variance_scales.empty(), "sofim_fused: variance_scales: second moments in 8 bits are taken on the CPU alone");
}

Tensor accumulate_scaled(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_scales,
                         TensorList variances,
                         at::IntArrayRef kinds, TensorList steps, at::IntArrayRef ordinals, Floats moment,
                         Floats gradient, const Tensor& by_row, const Tensor& by_col, const Tensor& trace,
                         const Tensor& beta2, const Tensor& eps, const Tensor& root, const Vector& gain,
                         const Vector& skip, TensorList variance_scales) {
  check_no_codes(variance_scales);
  Sweep sweep(params, grads, exp_avgs, exp_avg_scales, std::nullopt, variances, kinds, Counts{steps, ordinals}, true);
  sweep.set_decay(moment, gradient);
  sweep.run(launch_accumulate_scaled, {by_row, by_col, beta2, eps, root, gain, skip});
  sweep.finish(false);
  Tensor sums = sweep.sums();
  sums.select(0, kTrace).add_(trace);
  return sums;
}

void apply_scaled(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_scales,
                  TensorList lost_bits, TensorList variances,
                  at::IntArrayRef kinds, TensorList steps, at::IntArrayRef ordinals, const Tensor& moment,
                  const Vector& weight, const Vector& gradient, const Tensor& by_row, const Tensor& by_col, const Tensor&,
                  const Tensor& beta2, const Tensor& eps, const Tensor& root, const Vector& gain, const Vector& skip, TensorList variance_scales) {
  check_no_codes(variance_scales);
  Sweep sweep(params, grads, exp_avgs, exp_avg_scales, lost_bits, variances, kinds, Counts{steps, ordinals}, false);
  sweep.set_update(moment, weight, gradient);
  sweep.run(launch_apply_scaled, {by_row, by_col, beta2, eps, root, gain, skip});
  sweep.finish(true);
}

void commit_scaled(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_scales,
                   TensorList lost_bits, TensorList variances,
                   at::IntArrayRef kinds, TensorList steps, at::IntArrayRef ordinals, Floats decay_moment,
                   Floats decay_gradient, const Tensor& moment, const Vector& weight, const Vector& gradient,
                   const Tensor& by_row, const Tensor& by_col, const Tensor&, const Tensor& beta2, const Tensor& eps,
                   const Tensor& root, const Vector& gain, const Vector& skip, TensorList variance_scales) {
  check_no_codes(variance_scales);
  Sweep sweep(params, grads, exp_avgs, exp_avg_scales, lost_bits, variances, kinds, Counts{steps, ordinals}, true);
  sweep.set_decay(decay_moment, decay_gradient);
  sweep.set_update(moment, weight, gradient);
  sweep.run(launch_commit_scaled, {by_row, by_col, beta2, eps, root, gain, skip});
  sweep.finish(true);
}

Tensor fold_scaled(const Tensor& mm, const Tensor& mg, const Tensor& trace, TensorList steps, const Tensor& hyper,
                   at::IntArrayRef sizes, int64_t fisher, int64_t numerator, const Vector& class_of, int64_t classes) {
  Algebra algebra(mm, steps, hyper, sizes, fisher, numerator, false, true);
  AlgebraTask& task = algebra.task();
  const int64_t n = algebra.size();
  TORCH_CHECK(classes >= 1 && classes <= std::numeric_limits<int32_t>::max(), "sofim_fused: classes: ", classes,
              ", but one at least is needed");
  task.sums[kMM] = algebra.doubles("mm", mm, {n});
  task.sums[kMG] = algebra.doubles("mg", mg, {n});
  task.sums[kTrace] = algebra.doubles("trace", trace, {n});
  const Tensor class_numbers = algebra.classes(class_of);
  task.classes = static_cast<uint32_t>(classes);
  Tensor blocks = algebra.made({classes, algebra.rows(), algebra.fisher_blocks()});
  task.blocks = blocks.mutable_data_ptr<double>();
  algebra.run(launch_fold_scaled);
  return blocks;
}

std::tuple<Tensor, Tensor> solve_scaled(const Vector& blocks, const Vector& skip, TensorList steps,
                                        const Tensor& hyper, at::IntArrayRef sizes, int64_t fisher,
                                        int64_t numerator) {
  Algebra algebra(hyper, steps, hyper, sizes, fisher, numerator, false, true);
  AlgebraTask& task = algebra.task();
  const int64_t count = blocks ? algebra.fisher_blocks() : 0;
  // solve_scaled does not write it; fold_scaled, which has the same type of task, does.
  if (blocks) task.blocks = const_cast<double*>(algebra.doubles("blocks", *blocks, {algebra.rows(), count}));
  if (skip) {
    TORCH_CHECK(skip->device() == algebra.device() && skip->scalar_type() == at::kBool && skip->numel() == 1,
                "sofim_fused: skip: one bool on ", algebra.device(), " is needed");
    task.skip = static_cast<const bool*>(skip->const_data_ptr());
  }
  Tensor coefficients = algebra.made({3, algebra.size()}), signal = algebra.made({count});
  task.coefficients = coefficients.mutable_data_ptr<double>();
  task.signal = signal.mutable_data_ptr<double>();
  for (const Tensor& step : steps) bump(step);
  algebra.run(launch_solve_scaled);
  return {coefficients, signal};
}

}  // namespace

#if defined(SOFIM_EMULATED)
TORCH_LIBRARY_IMPL(sofim_fused_emulated, CPU, m) {
#else
TORCH_LIBRARY_IMPL(sofim_fused, CUDA, m) {
#endif
  m.impl("squares", squares);
  m.impl("adapt", adapt);
  m.impl("accumulate_scaled", accumulate_scaled);
  m.impl("apply_scaled", apply_scaled);
  m.impl("commit_scaled", commit_scaled);
  m.impl("fold_scaled", fold_scaled);
  m.impl("solve_scaled", solve_scaled);
}

}  // namespace sofim::cuda
