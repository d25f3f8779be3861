// The tensors of a step packed into rows of addresses and numbers, so that one launch can work on all of them.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "gather/param_groups.h"

namespace sofim {

// sofim_fused/backends/triton/pack.py documents the columns of rows and hyper, and triton/step.py documents this class
// as Python sees it.
class PackedStep {
 public:
  // `tile`: elements per tile.
  explicit PackedStep(int64_t tile) : tile_(tile) {}

  // Returns what differs from the last gather that succeeded, as bits of Change; or std::nullopt, with nothing changed,
  // if Python has to take this step.
  std::optional<int> gather(PyObject* groups, PyObject* state);
  // Writes copies back, raises version counters and drops all tensors.
  void finish(bool weights, bool moments, bool steps);

  enum Change { kPointers = 1, kValues = 2, kLayout = 4 };

  // Results of the last gather that succeeded.
  int64_t size() const { return size_; }
  int64_t tiles() const { return tiles_; }
  const std::vector<int64_t>& kinds() const { return kinds_; }
  const at::Tensor& rows() const { return rows_; }
  const at::Tensor& hyper() const { return hyper_; }
  // Of a step whose diagonal adapts.
  const at::Tensor& means() const { return means_; }
  const at::Tensor& settings() const { return settings_; }
  const std::vector<std::tuple<int64_t, int64_t, at::Tensor>>& scalars() const { return scalars_; }
  const std::optional<at::Device>& device() const { return device_; }
  const Options& options() const { return options_; }
  bool l2() const { return l2_; }
  bool decoupled() const { return decoupled_; }

 private:
  struct Busy;

  int fill_whole();
  int fill_rows();
  int fill_hyper();
  int fill_means();

  const int64_t tile_;
  ParamGroups param_groups_{true, true, true};
  bool busy_ = false;
  int64_t size_ = 0;
  int64_t tiles_ = 0;
  std::vector<int64_t> kinds_;
  at::Tensor rows_, hyper_, means_, settings_;
  std::vector<std::tuple<int64_t, int64_t, at::Tensor>> scalars_;
  std::optional<at::Device> device_;
  Options options_;
  bool l2_ = false;
  bool decoupled_ = false;
};

}  // namespace sofim
