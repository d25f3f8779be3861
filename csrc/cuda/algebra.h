// What the operators that turn sums into coefficients have in common.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include <limits>
#include <optional>
#include <vector>

#include "cuda/launch.h"
#include "gather/op_arguments.h"

namespace sofim::cuda {

// The task of fold and solve, and the arguments that a launch needs besides.
class Algebra {
 public:
  // `like`: a tensor on the device where all have to be. `scaled`: with a diagonal that adapts.
  Algebra(const at::Tensor& like, at::TensorList steps, const at::Tensor& hyper, at::IntArrayRef sizes, int64_t fisher,
          int64_t numerator, bool guarded, bool scaled = false)
      : device_(like.device()) {
    TORCH_CHECK(device_.type() == kDevice, "sofim_fused: sums on ", kDevice, " are needed, these are on ", device_);
    const auto n = static_cast<int64_t>(steps.size());
    starts_.push_back(0);
    int64_t all = 0;
    for (const int64_t size : sizes) {
      TORCH_CHECK(size >= 0 && size <= n - all, "sofim_fused: sizes: they add up to more than the ", n, " steps");
      starts_.push_back(static_cast<uint32_t>(all += size));
    }
    TORCH_CHECK(all == n, "sofim_fused: sizes: they add up to ", all, ", but there are ", n, " steps");
    steps_.reserve(steps.size());
    for (int64_t i = 0; i < n; ++i) {
      TORCH_CHECK(steps[i].device() == device_ && steps[i].scalar_type() == at::kLong && steps[i].numel() == 1,
                  "sofim_fused: steps: one int64 each on ", device_, " is needed, tensor ", i, " is not");
      steps_.push_back(static_cast<int64_t*>(steps[i].mutable_data_ptr()));
    }
    TORCH_CHECK(fisher >= 0 && fisher <= 2, "sofim_fused: fisher: 0, 1 or 2 is needed, this is ", fisher);
    task_.tensors = static_cast<uint32_t>(n);
    task_.group_count = static_cast<uint32_t>(sizes.size());
    task_.scaled = scaled;
    const int64_t columns = (scaled ? sizeof(ScaledHyper) : sizeof(Hyper)) / sizeof(double);
    task_.hyper = doubles("hyper", hyper, {static_cast<int64_t>(sizes.size()), columns});
    task_.fisher = static_cast<Fisher>(fisher);
    task_.numerator = numerator_of(numerator);
    task_.is_guarded = guarded;
  }

  AlgebraTask& task() { return task_; }
  int64_t size() const { return task_.tensors; }
  int64_t fisher_blocks() const {
    return sofim::fisher_blocks(task_.fisher, task_.group_count, task_.tensors);
  }
  // How many numbers a Fisher block has.
  int64_t rows() const {
    if (task_.scaled) return sizeof(AdaptiveBlock) / sizeof(double);
    const int64_t crosses = task_.is_guarded ? 3 : 1;
    return (task_.is_guarded ? 6 : 1) + (reads_gradient(task_.numerator) ? crosses : 0);
  }

  // The address of a float64 tensor's numbers, made contiguous. It has to be of this shape and on the device.
  const double* doubles(const char* name, const at::Tensor& x, at::IntArrayRef shape) {
    TORCH_CHECK(x.device() == device_ && x.scalar_type() == at::kDouble && x.sizes() == shape, "sofim_fused: ", name,
                ": float64 ", shape, " on ", device_, " is needed, this is ", x.scalar_type(), " ", x.sizes(), " on ",
                x.device());
    kept_.push_back(x.contiguous());
    return static_cast<const double*>(kept_.back().const_data_ptr());
  }
  // The address of one number on the device, float32 or (is_double) float64; nullptr without one. Never waits for the
  // device of these tensors.
  const void* number(const char* name, const Vector& x, bool& is_double) {
    if (!x) return nullptr;
    TORCH_CHECK(x->numel() == 1, "sofim_fused: ", name, ": one number is needed, this has ", x->numel());
    at::Tensor value = x->detach();
    if (value.device() != device_ || (value.scalar_type() != at::kFloat && value.scalar_type() != at::kDouble)) {
      const auto options = at::TensorOptions(at::kDouble).device(device_);
      value = value.is_cpu() ? at::full({}, value.item().toDouble(), options)
                             : value.to(device_, at::kDouble, /*non_blocking=*/true);
    }
    is_double = value.scalar_type() == at::kDouble;
    kept_.push_back(value);
    return kept_.back().const_data_ptr();
  }
  at::Tensor made(at::IntArrayRef shape) const {
    return at::empty(shape, at::TensorOptions(at::kDouble).device(device_));
  }

  // Sets the class of each tensor, if there are several. The result has to live until the launch.
  at::Tensor classes(const Vector& class_of) {
    if (!class_of) return at::Tensor();
    TORCH_CHECK(class_of->device() == device_ && class_of->scalar_type() == at::kLong &&
                    class_of->sizes() == at::IntArrayRef{size()},
                "sofim_fused: class_of: an int64 vector of ", size(), " on ", device_, " is needed");
    at::Tensor numbers = class_of->contiguous();
    task_.class_of = static_cast<const int64_t*>(numbers.const_data_ptr());
    return numbers;
  }
  // Sets what decides about clipping and skipping.
  void set_guard(std::optional<double> max_norm, const Vector& grad_scale, const Vector& found_inf, bool skip_nonfinite,
                 GuardInputs& guard) {
    guard.limit = max_norm.value_or(std::numeric_limits<double>::infinity());
    guard.skip_nonfinite = skip_nonfinite;
    guard.grad_scale = number("grad_scale", grad_scale, guard.scale_double);
    guard.found_inf = number("found_inf", found_inf, guard.found_double);
  }

  at::Device device() const { return device_; }
  const std::vector<int64_t*>& steps() const { return steps_; }
  // The first tensor of each group, and their number.
  const std::vector<uint32_t>& starts() const { return starts_; }

  void run(decltype(launch_fold)& launch) {
    const DeviceScope on(device_);
    const Bytes steps = bytes_of(steps_), starts = bytes_of(starts_);
    at::Tensor table;
    if (!has_room<AlgebraTask>(largest_arguments(), steps.size + starts.size)) {
      const auto bytes = static_cast<int64_t>((steps.size + starts.size + 7) / 8 * 8);
      table = at::empty({bytes}, at::TensorOptions(at::kByte).device(device_));
      auto* const at = static_cast<unsigned char*>(table.mutable_data_ptr());
      check(fill(at, steps, starts, on.stream()));
      task_.steps = reinterpret_cast<int64_t* const*>(at);
      task_.starts = reinterpret_cast<const uint32_t*>(at + steps.size);
    }
    check(launch(task_, steps, starts, on.stream()));
  }

 private:
  const at::Device device_;
  AlgebraTask task_{};
  std::vector<int64_t*> steps_;
  std::vector<uint32_t> starts_;
  std::vector<at::Tensor> kept_;  // until the launch; the allocator then keeps the memory for this stream
};

}  // namespace sofim::cuda
