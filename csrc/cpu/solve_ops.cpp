// The algebra is that of step/solve.h; tensors are added to their Fisher block in the order of cpu/step.cpp.
#include "cpu/solve_ops.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <iterator>
#include <limits>
#include <vector>

#include "cpu/adaptive_ops.h"
#include "cpu/blocks.h"
#include "gather/cpu_tensor.h"
#include "step/adaptive.h"
#include "step/solve.h"

namespace sofim {
namespace {

using at::Tensor;
using at::TensorList;

Tensor checked(const char* name, const Tensor& x, at::ScalarType dtype, at::IntArrayRef sizes) {
  TORCH_CHECK(x.device().is_cpu() && x.scalar_type() == dtype && x.sizes() == sizes, "sofim_fused: ", name, ": ",
              at::toString(dtype), " of shape ", sizes, " on the CPU is needed");
  return x.contiguous();
}

// The arguments of both operators that describe the tensors of a step.
class Settings {
 public:
  // `columns`: of hyper, 6 or, with a diagonal that adapts, 8.
  Settings(TensorList steps, const Tensor& hyper, at::IntArrayRef sizes, int64_t fisher, int64_t numerator,
           int64_t columns = 6)
      : steps_(steps), sizes_(sizes), numerator_(numerator_of(numerator)) {
    int64_t n = 0;
    for (const int64_t size : sizes) {
      TORCH_CHECK(size >= 0, "sofim_fused: sizes: a group cannot have ", size, " tensors");
      n += size;
    }
    TORCH_CHECK(n == static_cast<int64_t>(steps.size()), "sofim_fused: sizes: ", n, " tensors in groups, but ",
                steps.size(), " steps");
    TORCH_CHECK(fisher >= 0 && fisher <= 2, "sofim_fused: fisher: 0, 1 or 2 is needed");
    fisher_ = static_cast<Fisher>(fisher);
    for (const Tensor& step : steps) {
      TORCH_CHECK(step.device().is_cpu() && step.scalar_type() == at::kLong && step.numel() == 1,
                  "sofim_fused: steps: 0-dimensional int64 tensors on the CPU are needed");
    }
    const int64_t groups = static_cast<int64_t>(sizes.size());
    const Tensor rows = checked("hyper", hyper, at::kDouble, {groups, columns});
    const double* row = rows.const_data_ptr<double>();
    for (int64_t i = 0; i < groups; ++i, row += columns) hyper_.push_back({row[0], row[1], row[2], row[3], row[4], row[5]});
  }

  int64_t tensors() const { return static_cast<int64_t>(steps_.size()); }
  Numerator numerator() const { return numerator_; }
  // The number of Fisher blocks.
  int64_t blocks() const {
    return fisher_blocks(fisher_, static_cast<int64_t>(sizes_.size()), tensors());
  }

  // Calls f(tensor, its hyperparameters, its bias correction, its Fisher block) for each tensor, in order.
  template <class F>
  void each(F f) const {
    LastCorrection corrections;
    int64_t i = 0;
    for (size_t group = 0; group < sizes_.size(); ++group) {
      const Hyper& h = hyper_[group];
      for (int64_t end = i + sizes_[group]; i < end; ++i) {
        const int64_t block = fisher_block_of(fisher_, static_cast<int64_t>(group), i);
        f(i, h, corrections.of(h.momentum, *steps_[i].const_data_ptr<int64_t>() + 1), block);
      }
    }
  }

 private:
  TensorList steps_;
  at::IntArrayRef sizes_;
  Fisher fisher_ = Fisher::model;
  Numerator numerator_;
  std::vector<Hyper> hyper_;
};

// One kind of sum, a number per tensor; all zero if it was not given.
class Column {
 public:
  Column(const char* name, const Vector& sums, int64_t n) {
    if (sums) values_ = checked(name, *sums, at::kDouble, {n});
  }
  double operator[](int64_t i) const { return values_.defined() ? values_.const_data_ptr<double>()[i] : 0.0; }

 private:
  Tensor values_;
};

template <class Block>
Tensor folded(const Settings& settings, const std::vector<Products>& products, const int64_t* class_of,
              int64_t classes) {
  std::vector<Block> blocks(classes * settings.blocks());
  settings.each([&](int64_t i, const Hyper& h, double correction, int64_t block) {
    const int64_t of = class_of == nullptr ? 0 : class_of[i];
    blocks[of * settings.blocks() + block].add(h, correction, products[i], settings.numerator());
  });
  return tensor_of(blocks, classes, settings.numerator());
}

template <class Block>
std::vector<Block> read_blocks(const Settings& settings, const Tensor& numbers) {
  return blocks_of<Block>(numbers, settings.blocks(), settings.numerator());
}

double number(const char* name, const Vector& x, double otherwise) {
  return x ? *checked(name, *x, at::kDouble, {}).const_data_ptr<double>() : otherwise;
}

// Each tensor's class, or an undefined tensor if it was not given.
Tensor checked_classes(const Vector& class_of, int64_t n, int64_t classes) {
  TORCH_CHECK(classes >= 1, "sofim_fused: classes: 1 or more are needed");
  if (!class_of) return Tensor();
  Tensor numbers = checked("class_of", *class_of, at::kLong, {n});
  for (int64_t i = 0; i < n; ++i) {
    const int64_t number = numbers.const_data_ptr<int64_t>()[i];
    TORCH_CHECK(number >= 0 && number < classes, "sofim_fused: class_of: ", number, " is not from 0 to ", classes - 1);
  }
  return numbers;
}

void write(Tensor& coefficients, int64_t i, const Update& update) {
  const int64_t n = coefficients.size(1);
  double* const to = coefficients.mutable_data_ptr<double>();
  to[i] = update.weight;
  to[n + i] = update.gradient;
  to[2 * n + i] = update.moment;
}

void advance(TensorList steps, bool skip) {
  for (const Tensor& step : steps) {
    if (!skip) ++*step.mutable_data_ptr<int64_t>();
    step.unsafeGetTensorImpl()->bump_version();
  }
}

// The numbers of an AdaptiveBlock in the order in which they are stored.
constexpr double AdaptiveBlock::* kNumbers[] = {&AdaptiveBlock::trace, &AdaptiveBlock::square, &AdaptiveBlock::cross,
                                                &AdaptiveBlock::plain_square};
constexpr int64_t kNumberCount = std::size(kNumbers);

}  // namespace

std::tuple<Tensor, Tensor> fold(const Tensor& mm, const Vector& mg, const Vector& mw, const Vector& gg,
                                const Vector& gw, const Vector& ww, TensorList steps, const Tensor& hyper,
                                at::IntArrayRef sizes, int64_t fisher, int64_t numerator, bool guarded,
                                const Vector& class_of, int64_t classes) {
  const Settings settings(steps, hyper, sizes, fisher, numerator);
  const int64_t n = settings.tensors();
  TORCH_CHECK(mg || !(reads_gradient(settings.numerator()) || guarded), "sofim_fused: mg is needed");
  TORCH_CHECK(gg || !guarded, "sofim_fused: gg is needed");
  const Tensor numbers = checked_classes(class_of, n, classes);
  const int64_t* const class_numbers = numbers.defined() ? numbers.const_data_ptr<int64_t>() : nullptr;
  const Column columns[] = {{"mm", mm, n}, {"mg", mg, n}, {"mw", mw, n}, {"gg", gg, n}, {"gw", gw, n}, {"ww", ww, n}};
  std::vector<Products> products;
  products.reserve(n);
  Tensor squares = cpu_tensor({classes}, at::kDouble);
  double* square = squares.mutable_data_ptr<double>();
  std::fill_n(square, classes, 0.0);  // a plain step leaves them: what an operator returns has to be defined
  for (int64_t i = 0; i < n; ++i) {
    products.push_back({columns[0][i], columns[1][i], columns[2][i], columns[3][i], columns[4][i], columns[5][i]});
    if (guarded) square[class_numbers == nullptr ? 0 : class_numbers[i]] += products.back().gg;
  }
  Tensor blocks = guarded ? folded<GuardedBlock>(settings, products, class_numbers, classes)
                          : folded<PlainBlock>(settings, products, class_numbers, classes);
  return {blocks, squares};
}

std::tuple<Tensor, Tensor> solve(const Tensor& blocks, const Vector& square, TensorList steps, const Tensor& hyper,
                                 at::IntArrayRef sizes, int64_t fisher, int64_t numerator, bool guarded,
                                 std::optional<double> max_norm, const Vector& grad_scale, const Vector& found_inf,
                                 bool skip_nonfinite) {
  const Settings settings(steps, hyper, sizes, fisher, numerator);
  const int64_t n = settings.tensors();
  TORCH_CHECK(square || !guarded, "sofim_fused: square is needed");
  Guard guard;
  std::vector<PlainBlock> totals;
  if (guarded) {
    const double unscale = grad_scale ? 1.0 / number("grad_scale", grad_scale, 1.0) : 1.0;
    const double limit = max_norm.value_or(std::numeric_limits<double>::infinity());
    const bool found = number("found_inf", found_inf, 0.0) != 0.0;
    guard = guard_of(number("square", square, 0.0), unscale, limit, found, skip_nonfinite);
    for (const GuardedBlock& block : read_blocks<GuardedBlock>(settings, blocks)) {
      totals.push_back(block.at_gain(guard.gain));
    }
  } else {
    totals = read_blocks<PlainBlock>(settings, blocks);
  }
  Tensor coefficients = cpu_tensor({3, n}, at::kDouble);
  settings.each([&](int64_t i, const Hyper& h, double correction, int64_t block) {
    write(coefficients, i, sherman_morrison(h, correction, totals[block], settings.numerator()));
  });
  advance(steps, guard.skip);
  Tensor seen = cpu_tensor({3}, at::kDouble);
  double* numbers = seen.mutable_data_ptr<double>();
  numbers[0] = guard.norm;
  numbers[1] = guard.gain;
  numbers[2] = guard.skip ? 1.0 : 0.0;
  return {coefficients, seen};
}

Tensor fold_scaled(const Tensor& mm, const Tensor& mg, const Tensor& trace, TensorList steps, const Tensor& hyper,
                   at::IntArrayRef sizes, int64_t fisher, int64_t numerator, const Vector& class_of, int64_t classes) {
  const Settings settings(steps, hyper, sizes, fisher, numerator, 8);
  const int64_t n = settings.tensors(), count = settings.blocks();
  const Tensor numbers = checked_classes(class_of, n, classes);
  const Column by_mm("mm", mm, n), by_mg("mg", mg, n), by_trace("trace", trace, n);
  std::vector<AdaptiveBlock> blocks(classes * count);
  settings.each([&](int64_t i, const Hyper& h, double correction, int64_t block) {
    const int64_t of = numbers.defined() ? numbers.const_data_ptr<int64_t>()[i] : 0;
    blocks[of * count + block].add(h, correction, {by_mm[i], by_mg[i], by_trace[i]}, settings.numerator());
  });
  Tensor result = cpu_tensor({classes, kNumberCount, count}, at::kDouble);
  double* to = result.mutable_data_ptr<double>();
  for (int64_t of = 0; of < classes; ++of) {
    for (const auto number : kNumbers) {
      for (int64_t b = 0; b < count; ++b) *to++ = blocks[of * count + b].*number;
    }
  }
  return result;
}

std::tuple<Tensor, Tensor> solve_scaled(const Vector& blocks, const Vector& skip, TensorList steps,
                                        const Tensor& hyper, at::IntArrayRef sizes, int64_t fisher,
                                        int64_t numerator) {
  const Settings settings(steps, hyper, sizes, fisher, numerator, 8);
  const int64_t count = blocks ? settings.blocks() : 0;
  std::vector<AdaptiveBlock> totals(count);
  if (blocks) {
    const Tensor values = checked("blocks", *blocks, at::kDouble, {kNumberCount, count});
    const double* from = values.const_data_ptr<double>();
    for (const auto number : kNumbers) {
      for (AdaptiveBlock& block : totals) block.*number = *from++;
    }
  }
  const bool skips = skip && *checked("skip", *skip, at::kBool, {}).const_data_ptr<bool>();
  Tensor coefficients = cpu_tensor({3, settings.tensors()}, at::kDouble), signal = cpu_tensor({count}, at::kDouble);
  settings.each([&](int64_t i, const Hyper& h, double correction, int64_t block) {
    write(coefficients, i, scaled_update(h, correction, settings.numerator(), blocks ? &totals[block] : nullptr));
  });
  double* to = signal.mutable_data_ptr<double>();
  for (const AdaptiveBlock& block : totals) *to++ = block.signal();
  advance(steps, skips);
  return {coefficients, signal};
}

}  // namespace sofim
