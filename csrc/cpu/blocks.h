// Fisher blocks as tensors: what ranks add up, and what operators take and return.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <vector>

#include "gather/cpu_tensor.h"
#include "step/solve.h"

namespace sofim {

// A Fisher block's numbers in the order in which they are stored. Those of `cross` come last, and only where the
// gradient is read.
inline std::vector<double*> numbers_of(PlainBlock& b, Numerator numerator) {
  if (!reads_gradient(numerator)) return {&b.norm};
  return {&b.norm, &b.cross};
}
inline std::vector<double*> numbers_of(GuardedBlock& b, Numerator numerator) {
  std::vector<double*> all = {&b.norm[0], &b.norm[1], &b.norm[2], &b.scale[0], &b.scale[1], &b.scale[2]};
  if (reads_gradient(numerator)) all.insert(all.end(), {&b.cross[0], &b.cross[1], &b.cross[2]});
  return all;
}

// The blocks of each class, one class after the other, as float64 [classes, numbers, blocks].
template <class Block>
at::Tensor tensor_of(std::vector<Block>& blocks, size_t classes, Numerator numerator) {
  const size_t count = blocks.size() / classes;
  Block none;
  const size_t numbers = numbers_of(none, numerator).size();
  at::Tensor result = cpu_tensor({static_cast<int64_t>(classes), static_cast<int64_t>(numbers),
                                  static_cast<int64_t>(count)}, at::kDouble);
  double* to = result.mutable_data_ptr<double>();
  for (size_t of = 0; of < classes; ++of, to += numbers * count) {
    for (size_t b = 0; b < count; ++b) {
      size_t row = 0;
      for (const double* number : numbers_of(blocks[of * count + b], numerator)) to[row++ * count + b] = *number;
    }
  }
  return result;
}

// `count` blocks, from float64 [numbers, blocks].
template <class Block>
std::vector<Block> blocks_of(const at::Tensor& tensor, size_t count, Numerator numerator) {
  Block none;
  const std::vector<int64_t> sizes = {static_cast<int64_t>(numbers_of(none, numerator).size()),
                                      static_cast<int64_t>(count)};
  TORCH_CHECK(tensor.device().is_cpu() && tensor.scalar_type() == at::kDouble && tensor.sizes() == sizes,
              "sofim_fused: blocks: Double of shape ", at::IntArrayRef(sizes), " on the CPU is needed");
  const at::Tensor values = tensor.contiguous();
  const double* from = values.const_data_ptr<double>();
  std::vector<Block> blocks(count);
  for (size_t b = 0; b < count; ++b) {
    size_t row = 0;
    for (double* number : numbers_of(blocks[b], numerator)) *number = from[row++ * count + b];
  }
  return blocks;
}

}  // namespace sofim
