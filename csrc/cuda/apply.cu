// The pass apply: weights are updated.
#include "cuda/kernels.cuh"

namespace sofim::cuda {

int launch_apply(const Form& form, const Task& task, const Row* rows, const Group* groups, void* stream) {
  return with(form.types == Types::float32, [&](auto float32) {
    using Set = std::conditional_t<float32, Float32Weights, AnyWeights>;
    return with(form.gradient, [&](auto gradient) {
      return launch_pass<kMost>(&second<Set, Kind<Pass::apply, gradient>, kMost>, false, task.tiles, task, rows, groups,
                                stream);
    });
  });
}

}  // namespace sofim::cuda
