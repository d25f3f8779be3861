// Launches of a whole step with a diagonal that adapts: squares, adapt and commit_scaled; or, with the term of rank one,
// squares, adapt, accumulate_scaled, finish_scaled and apply_scaled. Without a guard, tensors that have a variance for
// each element need no squares.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/squares_plan.h"
#include "gather/param_groups.h"

namespace sofim::cuda {

class ScaledStep {
 public:
  // Whether the kernels find the rows of all tensors: they follow each other in memory. The operators copy others.
  static bool takes(const StepTensors& tensors);
  // Takes a step. `packed` has the rows of its tensors, its groups and its guard; `norm` and `skipped` are needed if it
  // is guarded. Returns the signal of each Fisher block, undefined without the term of rank one.
  at::Tensor run(const ParamGroups& param_groups, const Packed& packed, double* norm, int64_t* skipped,
                 const DeviceScope& on);

 private:
  // A table in the device's memory, filled again if its bytes have changed.
  struct Table {
    at::Tensor memory;
    std::vector<unsigned char> filled;
    // The address of the table, or nullptr if the bytes fit into arguments with a task of this size.
    const unsigned char* at(size_t task, Bytes first, Bytes second, at::Device device, void* stream);
  };
  struct Memory {
    at::Tensor counters, numbers, factors;
    void* stream = nullptr;
    Table squares, adapt, sweep, finish;
  };

  void plan(const ParamGroups& param_groups, const Packed& packed);

  // Members, so that their memory is reused from step to step.
  Memory memory_;
  SquaresPlan squares_;
  std::vector<AdaptRow> adapt_;
  std::vector<Scaling> scalings_;
  std::vector<Row> rows_;
  std::vector<FinishRow> finish_;
  std::vector<Diagonal> diagonals_;
  int64_t blocks_ = 0, factors_ = 0;
};

}  // namespace sofim::cuda
