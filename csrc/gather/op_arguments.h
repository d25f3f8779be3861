// The operators' schemas, and the validation of their lists of tensors (sofim_fused/backends/interface.py).
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>

#include "gather/step_tensors.h"
#include "step/solve.h"

namespace sofim {

using Vector = std::optional<at::Tensor>;
using Floats = c10::ArrayRef<double>;

struct Counts {
  at::TensorList steps;
  at::IntArrayRef ordinals;
};

// The operators' schemas, which all devices share. Text, because torch/library.h takes long to compile.
extern const std::array<const char*, 14> schemas;

// Collects and validates lists of tensors. Throws c10::Error if their lengths differ or a tensor is not accepted.
// `anywhere`: see StepTensors. `scales`: of the moments that are codes, and any tensors of others; or none at all.
// `variances`: one for each tensor if their diagonals adapt, else nullptr.
StepTensors gathered(bool anywhere, at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
                     at::TensorList scales, std::optional<at::TensorList> lost_bits, std::optional<Counts> counts,
                     const Variances* variances = nullptr);

// The numerator of an index; throws c10::Error if there is none.
Numerator numerator_of(int64_t index);

// The diagonal of an index in `kinds`; throws c10::Error if there is none.
Diagonal diagonal_of(int64_t kind);

// How gradient i is stored, a real tensor; throws c10::Error if no pass reads such a one.
Type gradient_type(size_t i, const at::Tensor& g);

// Sets how each gradient enters its moment.
void set_decay(StepTensors& tensors, Floats moment, Floats gradient, std::optional<Floats> weight);

}  // namespace sofim
