// The passes accumulate_scaled, apply_scaled and commit_scaled.
#include "cuda/scaled.cuh"

namespace sofim::cuda {
namespace {

int launch(void (*kernel)(Arguments<ScaledTask, kMost>), const ScaledTask& task, const Row* rows,
           const Scaling* scalings, void* stream) {
  const bool table = task.rows != nullptr;
  return launch_kernel(kernel, false, task.tiles, task, {rows, table ? 0 : task.tensors * sizeof(Row)},
                       {scalings, table ? 0 : task.tensors * sizeof(Scaling)}, stream);
}

}  // namespace

int launch_accumulate_scaled(Types types, const ScaledTask& task, const Row* rows, const Scaling* scalings,
                             void* stream) {
  return with(types == Types::float32, [&](auto all32) {
    return launch(&accumulate_scaled<all32>, task, rows, scalings, stream);
  });
}

int launch_apply_scaled(Types types, const ScaledTask& task, const Row* rows, const Scaling* scalings, void* stream) {
  return with(types == Types::float32, [&](auto all32) {
    return launch(&update_scaled<ScaledPass::apply, all32>, task, rows, scalings, stream);
  });
}

int launch_commit_scaled(Types types, const ScaledTask& task, const Row* rows, const Scaling* scalings, void* stream) {
  return with(types == Types::float32, [&](auto all32) {
    return launch(&update_scaled<ScaledPass::commit, all32>, task, rows, scalings, stream);
  });
}

}  // namespace sofim::cuda
