// The passes that this process uses, and one pass over all tensors of a step.
#pragma once

#include <vector>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "gather/step_tensors.h"
#include "step/solve.h"

namespace sofim {

// The instruction set's passes; set once, before anything else.
void use_kernels(const Kernels* kernels);

enum class Pass { accumulate, apply, dots, commit };

// Runs one pass over all tensors; returns its sums per tensor, none for apply and commit. `scratch` is
// memory for the sums of tiles.
std::vector<Products> run_pass(Pass pass, const StepTensors& tensors, Mode mode, std::vector<double>& scratch);

}  // namespace sofim
