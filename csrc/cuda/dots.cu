// The pass dots: sums of products; no tensor is written.
#include "cuda/kernels.cuh"

namespace sofim::cuda {

int launch_dots(const Form& form, const Task& task, const Row* rows, const Group* groups, void* stream) {
  const auto run = [&](auto kernel) {
    return launch_pass<kMost>(kernel, false, task.tiles, task, rows, groups, stream);
  };
  if (task.l2) return run(&first<AnyWeights, Kind<Pass::dots, false, true>, kMost>);
  if (form.types == Types::float32) return run(&first<Float32Weights, Kind<Pass::dots>, kMost>);
  return run(&first<AnyWeights, Kind<Pass::dots>, kMost>);
}

}  // namespace sofim::cuda
