// The operators of the CUDA backend: the passes over lists of tensors, and from sums to coefficients.
// sofim_fused/backends/interface.py documents them; fake implementations are in sofim_fused/backends/operators.py.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>
#include <torch/library.h>

#include <limits>
#include <optional>

#include "cuda/algebra.h"
#include "cuda/launch.h"
#include "gather/op_arguments.h"

namespace sofim::cuda {
namespace {

using at::Tensor;
using at::TensorList;

// One pass, and all that it needs.
class Sweep {
 public:
  explicit Sweep(StepTensors& tensors) : tensors_(tensors) {
    packed_.take(tensors, tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) {
      packed_.rows[i].group = static_cast<uint32_t>(i);
      packed_.groups[i].decay = tensors.records()[i].decay;
    }
  }

  Form& form() { return packed_.form; }
  Task& task() { return packed_.task; }

  // Sets coefficients, one per tensor; a missing vector stands for the value that changes nothing.
  void set_update(const Vector& moment, const Vector& weight, const Vector& gradient) {
    by_moment_ = vector("moment", moment);
    by_weight_ = vector("weight", weight);
    by_gradient_ = vector("gradient", gradient);
  }
  void set_guard(const Vector& gain, const Vector& skip) {
    gain_ = number("gain", gain, at::kDouble, "float64");
    skip_ = number("skip", skip, at::kBool, "bool");
  }

  void run(decltype(launch_apply)& launch) {
    if (tensors_.size() == 0) return;
    const DeviceScope on(tensors_.device());
    Task& task = packed_.task;
    memory_.serve(task, tensors_.device(), on.stream());
    const auto given = [](const Vector& x) { return x ? static_cast<double*>(x->mutable_data_ptr()) : nullptr; };
    task.by_weight = given(by_weight_);
    task.by_gradient = given(by_gradient_);
    task.by_moment = given(by_moment_);
    task.gain = given(gain_);
    task.skip = skip_ ? static_cast<bool*>(skip_->mutable_data_ptr()) : nullptr;
    memory_.serve_table(task, packed_.rows, packed_.groups, tensors_.device(), on.stream());
    check(launch(packed_.form, task, packed_.rows.data(), packed_.groups.data(), on.stream()));
  }

  // Chosen sums of all tensors: float64 [rows, tensors].
  Tensor sums(at::ArrayRef<int64_t> rows) const {
    const auto options = at::TensorOptions(at::kDouble).device(kDevice);
    if (tensors_.size() == 0) return at::empty({static_cast<int64_t>(rows.size()), 0}, options);
    const Tensor all = memory_.sums();
    std::vector<Tensor> chosen;
    for (const int64_t row : rows) chosen.push_back(all.select(0, row));
    return at::stack(chosen);
  }

 private:
  Vector vector(const char* name, const Vector& x) const {
    if (!x) return x;
    TORCH_CHECK(x->device() == tensors_.device() && x->scalar_type() == at::kDouble && x->dim() == 1 &&
                    x->size(0) == static_cast<int64_t>(tensors_.size()),
                "sofim_fused: ", name, ": a float64 vector of ", tensors_.size(), " on ", tensors_.device(),
                " is needed");
    return x->contiguous();
  }
  Vector number(const char* name, const Vector& x, at::ScalarType type, const char* type_name) const {
    TORCH_CHECK(!x || (x->device() == tensors_.device() && x->scalar_type() == type && x->numel() == 1),
                "sofim_fused: ", name, ": one ", type_name, " on ", tensors_.device(), " is needed");
    return x;
  }

  StepTensors& tensors_;
  Packed packed_;
  Memory memory_;
  Vector by_weight_, by_gradient_, by_moment_, gain_, skip_;
};

Tensor accumulated(StepTensors& tensors, Sweep& sweep, bool weights, bool cross) {
  sweep.task().l2 = weights;
  sweep.form().gradient = cross;
  const bool step = sweep.form().step;
  tensors.bump_moments();
  if (step) tensors.bump_weights();
  sweep.run(launch_accumulate);
  tensors.write_back(step, true);
  if (!cross) return sweep.sums({kMM});
  return weights ? sweep.sums({kMM, kMG, kMW}) : sweep.sums({kMM, kMG});
}

Tensor accumulate(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_scales,
                  TensorList lost_bits, TensorList steps,
                  at::IntArrayRef ordinals, Floats moment, Floats gradient, std::optional<Floats> weight, bool cross) {
  StepTensors tensors = gathered(true, params, grads, exp_avgs, exp_avg_scales, lost_bits, Counts{steps, ordinals});
  set_decay(tensors, moment, gradient, weight);
  Sweep sweep(tensors);
  return accumulated(tensors, sweep, weight.has_value(), cross);
}

Tensor accumulate_step(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_scales,
                       TensorList lost_bits, TensorList steps,
                       at::IntArrayRef ordinals, Floats moment, Floats gradient, std::optional<Floats> weight,
                       bool cross, const Vector& step_weight, const Tensor& step_gradient) {
  StepTensors tensors = gathered(true, params, grads, exp_avgs, exp_avg_scales, lost_bits, Counts{steps, ordinals});
  set_decay(tensors, moment, gradient, weight);
  Sweep sweep(tensors);
  sweep.set_update(std::nullopt, step_weight, step_gradient);
  sweep.form().step = true;
  return accumulated(tensors, sweep, weight.has_value(), cross);
}

void apply(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_scales,
           TensorList lost_bits, TensorList steps, at::IntArrayRef ordinals, const Tensor& moment, const Vector& weight, const Vector& gradient) {
  StepTensors tensors = gathered(true, params, grads, exp_avgs, exp_avg_scales, lost_bits, Counts{steps, ordinals});
  Sweep sweep(tensors);
  sweep.set_update(moment, weight, gradient);
  sweep.form().gradient = gradient.has_value();
  tensors.bump_weights();
  sweep.run(launch_apply);
  tensors.write_back(true, false);
}

Tensor dots(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_scales,
            TensorList lost_bits, bool weights) {
  StepTensors tensors = gathered(true, params, grads, exp_avgs, exp_avg_scales, lost_bits, std::nullopt);
  Sweep sweep(tensors);
  sweep.task().l2 = weights;
  sweep.run(launch_dots);
  return weights ? sweep.sums({kMM, kMG, kMW, kGG, kGW, kWW}) : sweep.sums({kMM, kMG, kGG});
}

void commit(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_scales,
            TensorList lost_bits, TensorList steps,
            at::IntArrayRef ordinals, Floats decay_moment, Floats decay_gradient, std::optional<Floats> decay_weight,
            const Tensor& moment, const Vector& weight, const Vector& gradient, const Vector& gain,
            const Vector& skip) {
  StepTensors tensors = gathered(true, params, grads, exp_avgs, exp_avg_scales, lost_bits, Counts{steps, ordinals});
  set_decay(tensors, decay_moment, decay_gradient, decay_weight);
  Sweep sweep(tensors);
  sweep.set_update(moment, weight, gradient);
  sweep.set_guard(gain, skip);
  sweep.task().l2 = decay_weight.has_value();
  sweep.task().numerator = gradient ? Numerator::gradient : Numerator::moment;
  tensors.bump_moments();
  tensors.bump_weights();
  sweep.run(launch_commit);
  tensors.write_back(true, true);
}

std::tuple<Tensor, Tensor> fold(const Tensor& mm, const Vector& mg, const Vector& mw, const Vector& gg,
                                const Vector& gw, const Vector& ww, TensorList steps, const Tensor& hyper,
                                at::IntArrayRef sizes, int64_t fisher, int64_t numerator, bool guarded,
                                const Vector& class_of, int64_t classes) {
  Algebra algebra(mm, steps, hyper, sizes, fisher, numerator, guarded);
  AlgebraTask& task = algebra.task();
  const int64_t n = algebra.size();
  TORCH_CHECK(classes >= 1 && classes <= std::numeric_limits<int32_t>::max(), "sofim_fused: classes: ", classes,
              ", but one at least is needed");
  TORCH_CHECK(!reads_gradient(task.numerator) || guarded || mg, "sofim_fused: mg: this numerator needs it");
  TORCH_CHECK(!guarded || (mg && gg), "sofim_fused: mg, gg: a guarded step needs both");
  const auto sum = [&](const char* name, const Vector& x) { return x ? algebra.doubles(name, *x, {n}) : nullptr; };
  task.sums[kMM] = algebra.doubles("mm", mm, {n});
  task.sums[kMG] = sum("mg", mg);
  task.sums[kMW] = sum("mw", mw);
  task.sums[kGG] = sum("gg", gg);
  task.sums[kGW] = sum("gw", gw);
  task.sums[kWW] = sum("ww", ww);
  const Tensor class_numbers = algebra.classes(class_of);
  task.classes = static_cast<uint32_t>(classes);
  Tensor blocks = algebra.made({classes, algebra.rows(), algebra.fisher_blocks()}), squares = algebra.made({classes});
  task.blocks = blocks.mutable_data_ptr<double>();
  task.squares = squares.mutable_data_ptr<double>();
  algebra.run(launch_fold);
  return {blocks, squares};
}

std::tuple<Tensor, Tensor> solve(const Tensor& blocks, const Vector& square, TensorList steps, const Tensor& hyper,
                                 at::IntArrayRef sizes, int64_t fisher, int64_t numerator, bool guarded,
                                 std::optional<double> max_norm, const Vector& grad_scale, const Vector& found_inf,
                                 bool skip_nonfinite) {
  Algebra algebra(blocks, steps, hyper, sizes, fisher, numerator, guarded);
  AlgebraTask& task = algebra.task();
  // solve does not write it; fold, which has the same type of task, does.
  task.blocks = const_cast<double*>(algebra.doubles("blocks", blocks, {algebra.rows(), algebra.fisher_blocks()}));
  TORCH_CHECK(!guarded || square, "sofim_fused: square: a guarded step needs it");
  if (guarded) task.squares = const_cast<double*>(algebra.doubles("square", square->reshape({1}), {1}));
  if (guarded) {
    algebra.set_guard(max_norm, grad_scale, found_inf, skip_nonfinite, task.guard);
  } else {
    task.guard.limit = std::numeric_limits<double>::infinity();
  }
  Tensor coefficients = algebra.made({3, algebra.size()}), guard = algebra.made({3});
  task.coefficients = coefficients.mutable_data_ptr<double>();
  task.guarded = guard.mutable_data_ptr<double>();
  for (const Tensor& step : steps) {
    if (!step.is_inference()) step.unsafeGetTensorImpl()->bump_version();
  }
  algebra.run(launch_solve);
  return {coefficients, guard};
}

}  // namespace

#if defined(SOFIM_EMULATED)
TORCH_LIBRARY(sofim_fused_emulated, m) {
  for (const char* schema : schemas) m.def(schema);
}
TORCH_LIBRARY_IMPL(sofim_fused_emulated, CPU, m) {
#else
TORCH_LIBRARY_IMPL(sofim_fused, CUDA, m) {
#endif
  m.impl("accumulate", accumulate);
  m.impl("accumulate_step", accumulate_step);
  m.impl("apply", apply);
  m.impl("dots", dots);
  m.impl("commit", commit);
  m.impl("fold", fold);
  m.impl("solve", solve);
}

}  // namespace sofim::cuda
