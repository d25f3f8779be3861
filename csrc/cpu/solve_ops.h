// From sums to coefficients: the operators `fold` and `solve` of sofim_fused/backends/interface.py, for tensors on the
// CPU. ops.cpp registers them.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "gather/op_arguments.h"

namespace sofim {

std::tuple<at::Tensor, at::Tensor> fold(const at::Tensor& mm, const Vector& mg, const Vector& mw, const Vector& gg,
                                        const Vector& gw, const Vector& ww, at::TensorList steps,
                                        const at::Tensor& hyper, at::IntArrayRef sizes, int64_t fisher,
                                        int64_t numerator, bool guarded, const Vector& class_of, int64_t classes);

std::tuple<at::Tensor, at::Tensor> solve(const at::Tensor& blocks, const Vector& square, at::TensorList steps,
                                         const at::Tensor& hyper, at::IntArrayRef sizes, int64_t fisher,
                                         int64_t numerator, bool guarded, std::optional<double> max_norm,
                                         const Vector& grad_scale, const Vector& found_inf, bool skip_nonfinite);

}  // namespace sofim
