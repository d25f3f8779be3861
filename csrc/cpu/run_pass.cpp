#include "cpu/run_pass.h"

#include <c10/util/Exception.h>

namespace sofim {
namespace {

const Kernels* used = nullptr;

// From so many elements on, memory is asked for ahead. In fewer, that would fetch what another thread is writing.
constexpr int64_t kPrefetchFrom = 1 << 20;

Kernel kernel_of(Pass pass) {
  TORCH_CHECK(used != nullptr, "sofim_fused: no instruction set was chosen; import sofim_fused before its operators");
  switch (pass) {
    case Pass::accumulate:
      return used->accumulate;
    case Pass::apply:
      return used->apply;
    case Pass::dots:
      return used->dots;
    case Pass::commit:
      return used->commit;
  }
  TORCH_INTERNAL_ASSERT(false);
}

}  // namespace

void use_kernels(const Kernels* kernels) { used = kernels; }

std::vector<Products> run_pass(Pass pass, const StepTensors& tensors, Mode mode, std::vector<double>& scratch) {
  const Tiling& tiling = tensors.tiling();
  mode.prefetch = tiling.elements() >= kPrefetchFrom;
  mode.backwards = pass == Pass::apply || pass == Pass::commit;
  const bool dots = pass == Pass::dots, cross = dots || mode.cross;
  const int width = dots ? sums_of_dots(mode) : pass == Pass::accumulate ? sums_of_accumulate(mode) : 0;
  scratch.resize(tiling.tiles() * width);
  sweep(kernel_of(pass), tensors.records(), tiling, mode, scratch.data(), width);
  if (width == 0) return {};
  std::vector<Products> products(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    Products& p = products[i];
    for (int64_t tile = tiling.first(i); tile < tiling.first(i + 1); ++tile) {
      const double* sums = scratch.data() + tile * width;
      p.mm += sums[kMM];
      if (cross) p.mg += sums[kMG];
      if (cross && mode.weights) p.mw += sums[kMW];
      if (!dots) continue;
      p.gg += sums[kGG];
      if (!mode.weights) continue;
      p.gw += sums[kGW];
      p.ww += sums[kWW];
    }
  }
  return products;
}

}  // namespace sofim
