// The passes as operators over lists of tensors, for torch.compile and for schedules written in Python.
// sofim_fused/backends/interface.py documents them; fake implementations are in sofim_fused/backends/operators.py.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <optional>

#include "cpu/adaptive_ops.h"
#include "cpu/parallel.h"
#include "cpu/solve_ops.h"
#include "gather/cpu_tensor.h"
#include "gather/op_arguments.h"

namespace sofim {
namespace {

using at::Tensor;
using at::TensorList;

// Sets one coefficient of every tensor; without a vector, it keeps the value that leaves w as it is.
template <class Set>
void set_each(StepTensors& tensors, const char* name, const Vector& vector, Set set) {
  if (!vector) return;
  TORCH_CHECK(vector->device().is_cpu() && vector->scalar_type() == at::kDouble && vector->dim() == 1 &&
                  vector->size(0) == static_cast<int64_t>(tensors.size()),
              "sofim_fused: ", name, ": a float64 vector of ", tensors.size(), " on the CPU is needed");
  const Tensor values = vector->contiguous();
  const double* value = values.const_data_ptr<double>();
  for (size_t i = 0; i < tensors.size(); ++i) set(tensors.record(i), value[i]);
}

// Chosen sums of all tensors: float64 [rows, tensors].
Tensor table(const std::vector<Products>& products, std::initializer_list<double Products::*> rows) {
  const int64_t n = static_cast<int64_t>(products.size());
  Tensor result = cpu_tensor({static_cast<int64_t>(rows.size()), n}, at::kDouble);
  double* to = result.mutable_data_ptr<double>();
  for (double Products::* row : rows) {
    for (const Products& p : products) *to++ = p.*row;
  }
  return result;
}

Tensor accumulated(StepTensors& tensors, Mode& mode, bool cross) {
  mode.cross = cross;
  tensors.key_random_bits(1);
  tensors.bump_moments();
  if (mode.gradient) tensors.bump_weights();
  std::vector<double> scratch;
  const auto products = run_pass(Pass::accumulate, tensors.records(), tensors.tiling(), mode, scratch);
  tensors.write_back(mode.gradient, true);
  if (!cross) return table(products, {&Products::mm});
  if (!mode.weights) return table(products, {&Products::mm, &Products::mg});
  return table(products, {&Products::mm, &Products::mg, &Products::mw});
}

Tensor accumulate(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_scales,
                  TensorList lost_bits, TensorList steps,
                  at::IntArrayRef ordinals, Floats moment, Floats gradient, std::optional<Floats> weight, bool cross) {
  StepTensors tensors = gathered(false, params, grads, exp_avgs, exp_avg_scales, lost_bits, Counts{steps, ordinals});
  Mode mode;
  mode.weights = weight.has_value();
  set_decay(tensors, moment, gradient, weight);
  return accumulated(tensors, mode, cross);
}

Tensor accumulate_step(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_scales,
                       TensorList lost_bits, TensorList steps,
                       at::IntArrayRef ordinals, Floats moment, Floats gradient, std::optional<Floats> weight,
                       bool cross, const Vector& step_weight, const Tensor& step_gradient) {
  StepTensors tensors = gathered(false, params, grads, exp_avgs, exp_avg_scales, lost_bits, Counts{steps, ordinals});
  Mode mode;
  mode.weights = weight.has_value();
  set_decay(tensors, moment, gradient, weight);
  set_update(tensors, mode, std::nullopt, step_weight, step_gradient);
  return accumulated(tensors, mode, cross);
}

void apply(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_scales,
           TensorList lost_bits, TensorList steps, at::IntArrayRef ordinals, const Tensor& moment, const Vector& weight, const Vector& gradient) {
  StepTensors tensors = gathered(false, params, grads, exp_avgs, exp_avg_scales, lost_bits, Counts{steps, ordinals});
  Mode mode;
  set_update(tensors, mode, moment, weight, gradient);
  tensors.key_random_bits(0);
  tensors.bump_weights();
  std::vector<double> scratch;
  run_pass(Pass::apply, tensors.records(), tensors.tiling(), mode, scratch);
  tensors.write_back(true, false);
}

Tensor dots(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_scales,
            TensorList lost_bits, bool weights) {
  StepTensors tensors = gathered(false, params, grads, exp_avgs, exp_avg_scales, lost_bits, std::nullopt);
  Mode mode;
  mode.weights = weights;
  std::vector<double> scratch;
  const auto products = run_pass(Pass::dots, tensors.records(), tensors.tiling(), mode, scratch);
  if (!weights) return table(products, {&Products::mm, &Products::mg, &Products::gg});
  return table(products, {&Products::mm, &Products::mg, &Products::mw, &Products::gg, &Products::gw, &Products::ww});
}

void commit(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_scales,
            TensorList lost_bits, TensorList steps,
            at::IntArrayRef ordinals, Floats decay_moment, Floats decay_gradient, std::optional<Floats> decay_weight,
            const Tensor& moment, const Vector& weight, const Vector& gradient, const Vector& gain,
            const Vector& skip) {
  StepTensors tensors = gathered(false, params, grads, exp_avgs, exp_avg_scales, lost_bits, Counts{steps, ordinals});
  Mode mode;
  mode.weights = decay_weight.has_value();
  set_decay(tensors, decay_moment, decay_gradient, decay_weight);
  set_update(tensors, mode, moment, weight, gradient);
  if (gain) {
    mode.scaled = true;
    mode.gain = gain->item<double>();
  }
  tensors.key_random_bits(0);
  tensors.bump_moments();
  tensors.bump_weights();
  if (skip && skip->item<bool>()) return;
  std::vector<double> scratch;
  run_pass(Pass::commit, tensors.records(), tensors.tiling(), mode, scratch);
  tensors.write_back(true, true);
}

}  // namespace

void set_update(StepTensors& tensors, Mode& mode, const Vector& moment, const Vector& weight, const Vector& gradient) {
  mode.gradient = gradient.has_value();
  set_each(tensors, "moment", moment, [](Row& r, double x) { r.update.moment = x; });
  set_each(tensors, "weight", weight, [](Row& r, double x) { r.update.weight = x; });
  set_each(tensors, "gradient", gradient, [](Row& r, double x) { r.update.gradient = x; });
}

TORCH_LIBRARY(sofim_fused, m) {
  for (const char* schema : schemas) m.def(schema);
}

TORCH_LIBRARY_IMPL(sofim_fused, CPU, m) {
  m.impl("accumulate", accumulate);
  m.impl("accumulate_step", accumulate_step);
  m.impl("apply", apply);
  m.impl("dots", dots);
  m.impl("commit", commit);
  m.impl("fold", fold);
  m.impl("solve", solve);
  m.impl("squares", squares);
  m.impl("adapt", adapt);
  m.impl("accumulate_scaled", accumulate_scaled);
  m.impl("apply_scaled", apply_scaled);
  m.impl("commit_scaled", commit_scaled);
  m.impl("fold_scaled", fold_scaled);
  m.impl("solve_scaled", solve_scaled);
}

}  // namespace sofim
