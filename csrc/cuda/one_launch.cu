// Whole steps in one launch.
#include "cuda/one_launch.cuh"

namespace sofim::cuda {
namespace {

// Calls run(kernel) with the kernel of a whole step. For float32 weights there is also one with small arguments: CUDA
// copies the declared size at each launch, which a small model's step would notice.
template <class F>
int with_step(const Form& form, const Task& task, F run) {
  return with(form.types == Types::float32, [&](auto float32) {
    using Set = std::conditional_t<float32, Float32Weights, NarrowWeights>;
    const auto sized = [&](auto first, auto second) {
      using First = decltype(first);
      using Second = decltype(second);
      if constexpr (float32 && kMost != kSmall) {
        if (is_small(task)) return run(&both<Set, First, Second, kSmall>);
      }
      return run(&both<Set, First, Second, kMost>);
    };
    if (task.finish == Finish::guarded) return sized(Kind<Pass::dots, false, true>(), Kind<Pass::commit>());
    return with(form.gradient, [&](auto gradient) {
      return sized(Kind<Pass::accumulate, gradient, true>(), Kind<Pass::apply, gradient>());
    });
  });
}

}  // namespace

int launch_step(const Form& form, const Task& task, const Row* rows, const Group* groups, int blocks, void* stream) {
  const uint32_t some = task.tiles < static_cast<uint32_t>(blocks) ? task.tiles : static_cast<uint32_t>(blocks);
  return with_step(form, task, [&](auto kernel) {
    return launch_pass(kernel, true, some, task, rows, groups, stream);
  });
}

int step_blocks(const Form& form, const Task& task, int* blocks) {
  *blocks = 0;
  if (form.types == Types::any) return 0;
  int device, possible, multiprocessors, each;
  if (const auto error = cudaGetDevice(&device)) return outcome(error);
  if (const auto error = cudaDeviceGetAttribute(&possible, cudaDevAttrCooperativeLaunch, device)) return outcome(error);
  if (possible == 0) return 0;
  if (const auto error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device)) {
    return outcome(error);
  }
  return with_step(form, task, [&](auto kernel) {
    const auto error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kThreads, 0);
    if (error == cudaSuccess) *blocks = multiprocessors * each;
    return outcome(error);
  });
}

bool refused(int error) {
  return error == cudaErrorCooperativeLaunchTooLarge || error == cudaErrorNotSupported;
}

}  // namespace sofim::cuda
