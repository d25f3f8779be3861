// The pass commit: gradients times the gain enter the moments, and weights are updated.
#include "cuda/kernels.cuh"

namespace sofim::cuda {

int launch_commit(const Form& form, const Task& task, const Row* rows, const Group* groups, void* stream) {
  return with(form.types == Types::float32, [&](auto float32) {
    using Set = std::conditional_t<float32, Float32Weights, AnyWeights>;
    return launch_pass<kMost>(&second<Set, Kind<Pass::commit>, kMost>, false, task.tiles, task, rows, groups, stream);
  });
}

}  // namespace sofim::cuda
