// The operators of a step with a diagonal that adapts, for tensors on the CPU (AdaptivePasses in
// sofim_fused/backends/interface.py). ops.cpp registers them.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "cpu/kernels.h"
#include "gather/op_arguments.h"

namespace sofim {

// What a sweep takes of `adapt`, in the order of its results, and which diagonal each tensor has.
struct GivenScales {
  at::TensorList variances;
  at::IntArrayRef kinds;
  const at::Tensor &by_row, &by_col, &trace, &beta2, &eps, &root;
  const Vector &gain, &skip;
  at::TensorList variance_scales;  // of the variances that are codes, and any tensors of others; or none at all
};

// Sets the coefficients of each tensor's update; without a vector, they keep the value that leaves w as it is. Throws
// c10::Error for a vector of another length. (ops.cpp)
void set_update(StepTensors& tensors, Mode& mode, const Vector& moment, const Vector& weight, const Vector& gradient);

std::tuple<at::Tensor, at::Tensor, at::Tensor> squares(at::TensorList grads, at::IntArrayRef kinds);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> adapt(
    at::TensorList steps, const at::Tensor& hyper, at::IntArrayRef sizes, at::IntArrayRef kinds,
    at::IntArrayRef heights, at::IntArrayRef widths, at::TensorList row_vars, at::TensorList col_vars,
    at::TensorList variances, const at::Tensor& total, const at::Tensor& rows, const at::Tensor& cols, bool guarded,
    const Vector& square, std::optional<double> max_norm, const Vector& grad_scale, const Vector& found_inf,
    bool skip_nonfinite);

at::Tensor accumulate_scaled(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
                             at::TensorList exp_avg_scales, at::TensorList variances, at::IntArrayRef kinds,
                             at::TensorList steps, at::IntArrayRef ordinals, Floats moment, Floats gradient, const at::Tensor& by_row,
                             const at::Tensor& by_col, const at::Tensor& trace, const at::Tensor& beta2,
                             const at::Tensor& eps, const at::Tensor& root, const Vector& gain, const Vector& skip, at::TensorList variance_scales);

void apply_scaled(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
                  at::TensorList exp_avg_scales, at::TensorList lost_bits, at::TensorList variances,
                  at::IntArrayRef kinds, at::TensorList steps, at::IntArrayRef ordinals,
                  const at::Tensor& moment, const Vector& weight, const Vector& gradient, const at::Tensor& by_row,
                  const at::Tensor& by_col, const at::Tensor& trace, const at::Tensor& beta2, const at::Tensor& eps,
                  const at::Tensor& root, const Vector& gain, const Vector& skip, at::TensorList variance_scales);

void commit_scaled(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
                   at::TensorList exp_avg_scales, at::TensorList lost_bits, at::TensorList variances,
                   at::IntArrayRef kinds, at::TensorList steps, at::IntArrayRef ordinals,
                   Floats decay_moment, Floats decay_gradient, const at::Tensor& moment, const Vector& weight,
                   const Vector& gradient, const at::Tensor& by_row, const at::Tensor& by_col, const at::Tensor& trace,
                   const at::Tensor& beta2, const at::Tensor& eps, const at::Tensor& root, const Vector& gain,
                   const Vector& skip, at::TensorList variance_scales);

// In solve_ops.cpp, with the other algebra.
at::Tensor fold_scaled(const at::Tensor& mm, const at::Tensor& mg, const at::Tensor& trace, at::TensorList steps,
                       const at::Tensor& hyper, at::IntArrayRef sizes, int64_t fisher, int64_t numerator,
                       const Vector& class_of, int64_t classes);

std::tuple<at::Tensor, at::Tensor> solve_scaled(const Vector& blocks, const Vector& skip, at::TensorList steps,
                                                const at::Tensor& hyper, at::IntArrayRef sizes, int64_t fisher,
                                                int64_t numerator);

}  // namespace sofim
