// The pass accumulate: gradients enter the moments, and sums are taken over the moments as stored.
#include "cuda/kernels.cuh"

namespace sofim::cuda {

int launch_accumulate(const Form& form, const Task& task, const Row* rows, const Group* groups, void* stream) {
  const auto run = [&](auto kernel) {
    return launch_pass<kMost>(kernel, false, task.tiles, task, rows, groups, stream);
  };
  constexpr auto pass = Pass::accumulate;
  // For L2 decay there is one kernel, which computes the sums of all forms.
  if (task.l2 && !form.step) return run(&first<AnyWeights, Kind<pass, true, true>, kMost>);
  return with(form.types == Types::float32, [&](auto float32) {
    using Set = std::conditional_t<float32, Float32Weights, AnyWeights>;
    if (form.step) return run(&first<Set, Kind<pass, true, true, true>, kMost>);
    if (form.gradient) return run(&first<Set, Kind<pass, true>, kMost>);
    return run(&first<Set, Kind<pass>, kMost>);
  });
}

}  // namespace sofim::cuda
