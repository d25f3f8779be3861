#include "gather/op_arguments.h"

#include <c10/util/Exception.h>

namespace sofim {

using at::Tensor;
using at::TensorList;

const std::array<const char*, 14> schemas = {
    "accumulate(Tensor[] params, Tensor[] grads, Tensor(a!)[] exp_avgs, Tensor(b!)[] exp_avg_scales, Tensor[] lost_bits,"
    " Tensor[] steps, int[] ordinals, float[] moment, float[] gradient, float[]? weight, bool cross) -> Tensor",
    "accumulate_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(d!)[] exp_avg_scales,"
    " Tensor(c!)[] lost_bits,"
    " Tensor[] steps, int[] ordinals, float[] moment, float[] gradient, float[]? weight, bool cross,"
    " Tensor? step_weight, Tensor step_gradient) -> Tensor",
    "apply(Tensor(a!)[] params, Tensor[] grads, Tensor[] exp_avgs, Tensor[] exp_avg_scales, Tensor(b!)[] lost_bits,"
    " Tensor[] steps, int[] ordinals, Tensor moment, Tensor? weight, Tensor? gradient) -> ()",
    "dots(Tensor[] params, Tensor[] grads, Tensor[] exp_avgs, Tensor[] exp_avg_scales, Tensor[] lost_bits,"
    " bool weights) -> Tensor",
    "commit(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(d!)[] exp_avg_scales,"
    " Tensor(c!)[] lost_bits, Tensor[] steps, int[] ordinals, float[] decay_moment, float[] decay_gradient,"
    " float[]? decay_weight, Tensor moment,"
    " Tensor? weight, Tensor? gradient, Tensor? gain, Tensor? skip) -> ()",
    "fold(Tensor mm, Tensor? mg, Tensor? mw, Tensor? gg, Tensor? gw, Tensor? ww, Tensor[] steps, Tensor hyper,"
    " int[] sizes, int fisher, int numerator, bool guarded, Tensor? class_of, int classes)"
    " -> (Tensor blocks, Tensor squares)",
    "solve(Tensor blocks, Tensor? square, Tensor(a!)[] steps, Tensor hyper, int[] sizes, int fisher,"
    " int numerator, bool guarded, float? max_norm, Tensor? grad_scale, Tensor? found_inf, bool skip_nonfinite)"
    " -> (Tensor coefficients, Tensor guard)",
    // Of a diagonal that adapts. `kinds`: which diagonal each tensor has, as in enum class Diagonal.
    "squares(Tensor[] grads, int[] kinds) -> (Tensor total, Tensor rows, Tensor cols)",
    "adapt(Tensor[] steps, Tensor hyper, int[] sizes, int[] kinds, int[] heights, int[] widths,"
    " Tensor(a!)[] row_vars, Tensor(b!)[] col_vars, Tensor(c!)[] variances, Tensor total, Tensor rows, Tensor cols,"
    " bool guarded, Tensor? square, float? max_norm, Tensor? grad_scale, Tensor? found_inf, bool skip_nonfinite)"
    " -> (Tensor by_row, Tensor by_col, Tensor numbers, Tensor guard)",
    "accumulate_scaled(Tensor[] params, Tensor[] grads, Tensor(a!)[] exp_avgs, Tensor(c!)[] exp_avg_scales,"
    " Tensor(b!)[] variances, int[] kinds,"
    " Tensor[] steps, int[] ordinals, float[] moment, float[] gradient, Tensor by_row, Tensor by_col, Tensor trace,"
    " Tensor beta2, Tensor eps, Tensor root, Tensor? gain, Tensor? skip, Tensor(d!)[] variance_scales) -> Tensor",
    "apply_scaled(Tensor(a!)[] params, Tensor[] grads, Tensor[] exp_avgs, Tensor[] exp_avg_scales,"
    " Tensor(b!)[] lost_bits, Tensor[] variances, int[] kinds, Tensor[] steps, int[] ordinals, Tensor moment,"
    " Tensor? weight, Tensor? gradient, Tensor by_row, Tensor by_col, Tensor trace,"
    " Tensor beta2, Tensor eps, Tensor root, Tensor? gain, Tensor? skip, Tensor[] variance_scales) -> ()",
    "commit_scaled(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(e!)[] exp_avg_scales,"
    " Tensor(c!)[] lost_bits,"
    " Tensor(d!)[] variances, int[] kinds, Tensor[] steps, int[] ordinals, float[] decay_moment,"
    " float[] decay_gradient, Tensor moment, Tensor? weight, Tensor? gradient, Tensor by_row, Tensor by_col,"
    " Tensor trace, Tensor beta2, Tensor eps, Tensor root, Tensor? gain, Tensor? skip,"
    " Tensor(f!)[] variance_scales) -> ()",
    "fold_scaled(Tensor mm, Tensor mg, Tensor trace, Tensor[] steps, Tensor hyper, int[] sizes, int fisher,"
    " int numerator, Tensor? class_of, int classes) -> Tensor",
    "solve_scaled(Tensor? blocks, Tensor? skip, Tensor(a!)[] steps, Tensor hyper, int[] sizes, int fisher,"
    " int numerator) -> (Tensor coefficients, Tensor signal)",
};

Numerator numerator_of(int64_t index) {
  TORCH_CHECK(index >= 0 && index <= 2, "sofim_fused: numerator: 0, 1 or 2 is needed, this is ", index);
  return static_cast<Numerator>(index);
}

Diagonal diagonal_of(int64_t kind) {
  TORCH_CHECK(kind > 0 && kind <= static_cast<int64_t>(Diagonal::element), "sofim_fused: kinds: 1 to 4 are needed, ",
              "this is ", kind);
  return static_cast<Diagonal>(kind);
}

Type gradient_type(size_t i, const Tensor& g) {
  Type type;
  TORCH_CHECK(!g.is_complex() && storage_type(g.scalar_type(), type), "sofim_fused: gradient ", i,
              ": float32, float64, bfloat16 or float16 is needed, this is ", g.scalar_type());
  return type;
}

StepTensors gathered(bool anywhere, TensorList params, TensorList grads, TensorList exp_avgs, TensorList scales,
                     std::optional<TensorList> lost_bits, std::optional<Counts> counts, const Variances* variances) {
  const size_t n = params.size();
  TORCH_CHECK(grads.size() == n && exp_avgs.size() == n && (scales.empty() || scales.size() == n) &&
                  (!lost_bits || lost_bits->size() == n) &&
                  (!counts || (counts->steps.size() == n && counts->ordinals.size() == n)),
              "sofim_fused: the lists differ in length; params has ", n);
  StepTensors tensors(anywhere);
  const Tensor none;
  for (size_t i = 0; i < n; ++i) {
    const bool kept = lost_bits && (*lost_bits)[i].numel() > 0;
    const bool codes = !scales.empty() && exp_avgs[i].scalar_type() == at::kFloat8_e4m3fn;
    const char* wrong = tensors.add(params[i], grads[i], exp_avgs[i], codes ? scales[i] : none,
                                    kept ? (*lost_bits)[i] : none, counts ? counts->steps[i] : none,
                                    counts ? counts->ordinals[i] : 0, variances == nullptr ? nullptr : variances + i);
    TORCH_CHECK(wrong == nullptr, "sofim_fused: tensor ", i, ": ", wrong);
  }
  return tensors;
}

void set_decay(StepTensors& tensors, Floats moment, Floats gradient, std::optional<Floats> weight) {
  const size_t n = tensors.size();
  TORCH_CHECK(moment.size() == n && gradient.size() == n && (!weight || weight->size() == n),
              "sofim_fused: decay: one value per tensor, ", n, " are needed");
  for (size_t i = 0; i < n; ++i) tensors.record(i).decay = {moment[i], gradient[i], weight ? (*weight)[i] : 0.0};
}

}  // namespace sofim
