// New tensors on the CPU. at::empty and at::zeros do the same, but their headers take seconds to compile.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>

namespace sofim {

// A contiguous tensor; its elements are not initialized.
inline at::Tensor cpu_tensor(at::IntArrayRef sizes, at::ScalarType dtype) { return at::detail::empty_cpu(sizes, dtype); }

}  // namespace sofim
