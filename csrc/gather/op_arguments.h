// The operators' arguments: lists of tensors, and what they may hold (sofim_fused/backends/interface.py).
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <optional>

#include "gather/step_tensors.h"

namespace sofim {

using Vector = std::optional<at::Tensor>;
using Floats = c10::ArrayRef<double>;

struct Counts {
  at::TensorList steps;
  at::IntArrayRef ordinals;
};

// The operators, of whichever device.
void define_operators(torch::Library& m);

// `anywhere`: see StepTensors.
StepTensors gathered(bool anywhere, at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
                std::optional<at::TensorList> kahans, std::optional<Counts> counts);

// How gradients enter the moments.
void set_decay(StepTensors& tensors, Floats moment, Floats gradient, std::optional<Floats> weight);

}  // namespace sofim
