#include "cuda/scaled_step.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <cstring>
#include <limits>

namespace sofim::cuda {
namespace {

Diagonal diagonal_of(const VarianceRow& variance) {
  if (variance.by_element) return Diagonal::element;
  if (variance.rows == nullptr) return Diagonal::tensor;
  return variance.cols == nullptr ? Diagonal::row : Diagonal::factored;
}

}  // namespace

const unsigned char* ScaledStep::Table::at(size_t task, Bytes first, Bytes second, at::Device device, void* stream) {
  const size_t bytes = first.size + second.size;
  if (task + bytes <= static_cast<size_t>(largest_arguments()) / 16 * 16) return nullptr;
  if (!memory.defined() || memory.device() != device || memory.numel() < static_cast<int64_t>(bytes + 7)) {
    memory = at::empty({static_cast<int64_t>(bytes + 7)}, at::TensorOptions(at::kByte).device(device));
    filled.clear();
  }
  const bool same = filled.size() == bytes && std::memcmp(filled.data(), first.data, first.size) == 0 &&
                    (second.size == 0 || std::memcmp(filled.data() + first.size, second.data, second.size) == 0);
  if (!same) {
    check(fill(memory.mutable_data_ptr(), first, second, stream));
    filled.resize(bytes);
    std::memcpy(filled.data(), first.data, first.size);
    if (second.size > 0) std::memcpy(filled.data() + first.size, second.data, second.size);
  }
  return static_cast<const unsigned char*>(memory.const_data_ptr());
}

bool ScaledStep::takes(const StepTensors& tensors) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    const VarianceRow& variance = tensors.variances()[i];
    if (!variance.by_element && variance.inner != variance.columns && tensors.records()[i].numel > 0) return false;
  }
  return true;
}

// What does not depend on memory that is still to be allocated.
void ScaledStep::plan(const ParamGroups& param_groups, const Packed& packed) {
  const StepTensors& tensors = param_groups.tensors();
  const size_t n = tensors.size();
  squares_.clear();
  rows_ = packed.rows;
  adapt_.assign(n, AdaptRow());
  scalings_.assign(n, Scaling());
  finish_.assign(n, FinishRow());
  // Also the padding between members: tables are compared byte by byte.
  std::memset(static_cast<void*>(adapt_.data()), 0, n * sizeof(AdaptRow));
  std::memset(static_cast<void*>(scalings_.data()), 0, n * sizeof(Scaling));
  std::memset(static_cast<void*>(finish_.data()), 0, n * sizeof(FinishRow));
  diagonals_.clear();
  blocks_ = factors_ = 0;
  for (size_t i = 0; i < n; ++i) {
    const VarianceRow& variance = tensors.variances()[i];
    const Diagonal diagonal = diagonal_of(variance);
    Row& row = rows_[i];
    AdaptRow& adapt = adapt_[i];
    Scaling& scaling = scalings_[i];
    diagonals_.push_back(diagonal);
    squares_.add(row.g, row.g_type, diagonal, variance.count, variance.columns);
    const AdaptiveHyper& hyper = param_groups.adaptive(i);
    adapt.step = row.step;
    adapt.group = row.group;
    adapt.beta2 = hyper.beta2;
    adapt.eps = hyper.eps;
    adapt.float64 = row.w_type == Type::float64;
    adapt.row_count = static_cast<double>(variance.columns);
    adapt.col_count = static_cast<double>(variance.count);
    adapt.first = static_cast<uint32_t>(blocks_);
    scaling.cols = kOneRow;
    if (diagonal == Diagonal::element) {
      scaling.v = variance.whole;
      row.aligned &= reinterpret_cast<uintptr_t>(scaling.v) % 16 == 0;
    } else if (diagonal == Diagonal::tensor) {
      adapt.rows = 1;
      adapt.row_var = variance.whole;
    } else {
      adapt.rows = variance.count;
      adapt.row_var = variance.rows;
      scaling.cols = variance.columns;
      if (diagonal == Diagonal::factored) {
        adapt.cols = variance.columns;
        adapt.col_var = variance.cols;
      }
    }
    blocks_ += row_blocks(adapt.rows) + (adapt.cols > 0);
    // Factors begin at multiples of 16 bytes; those of float32 take half of the room.
    factors_ += (adapt.rows + 1) / 2 * 2 + (adapt.cols + 1) / 2 * 2;
    scaling.decay_m = packed.groups[row.group].decay.m;
    scaling.decay_g = packed.groups[row.group].decay.g;
    finish_[i].step = row.step;
    finish_[i].group = row.group;
  }
  TORCH_CHECK(squares_.fits() && blocks_ <= std::numeric_limits<int32_t>::max(),
              "sofim_fused: more elements than a launch can have");
}

at::Tensor ScaledStep::run(const ParamGroups& param_groups, const Packed& packed, double* norm, int64_t* skipped,
                           const DeviceScope& on) {
  const Options& options = param_groups.options();
  const at::Device device = param_groups.tensors().device();
  plan(param_groups, packed);
  const Task& given = packed.task;
  const bool guarded = given.finish == Finish::guarded;
  const int64_t n = given.tensors, tiles = given.tiles;
  // Memory that a graph uses must not be used by eager steps as well, and is freed with the graph.
  Memory own;
  Memory& memory = on.captured() ? own : memory_;
  const auto doubles = at::TensorOptions(at::kDouble).device(device);
  const int64_t counters = squares_.counters() + 2 * n + 1;
  const int64_t numbers = squares_.numbers() + n + squares_.all_rows() + squares_.all_cols() + blocks_ + 4 * n +
                          3 * n + 3 * n + 3 * tiles + 2;
  const auto size_of = [&](const at::Tensor& x) { return x.defined() && x.device() == device ? x.numel() : -1; };
  if (memory.stream != on.stream() || size_of(memory.counters) != counters) {
    memory.counters = at::zeros({counters}, doubles.dtype(at::kInt));
  }
  if (memory.stream != on.stream() || size_of(memory.numbers) != numbers) {
    memory.numbers = at::empty({numbers}, doubles);
  }
  if (memory.stream != on.stream() || size_of(memory.factors) != factors_) {
    memory.factors = at::empty({factors_}, doubles);
  }
  memory.stream = on.stream();
  double* number = memory.numbers.mutable_data_ptr<double>();
  const auto taken = [&number](int64_t count) {
    double* const at = number;
    number += count;
    return at;
  };
  auto* const counter = static_cast<uint32_t*>(memory.counters.mutable_data_ptr());

  double* const for_squares = taken(squares_.numbers());
  double* const total = taken(n);
  double *const row_sums = taken(squares_.all_rows()), *const col_sums = taken(squares_.all_cols());
  SquaresTask squares = squares_.place(counter, for_squares, total, row_sums, col_sums);
  bool all_by_element = true;
  double* factor = static_cast<double*>(memory.factors.mutable_data_ptr());
  const double *row_sum = row_sums, *col_sum = col_sums;
  for (size_t i = 0; i < diagonals_.size(); ++i) {
    AdaptRow& adapt = adapt_[i];
    all_by_element &= diagonals_[i] == Diagonal::element;
    if (diagonals_[i] == Diagonal::element) continue;
    scalings_[i].by_row = adapt.by_row = factor;
    factor += (adapt.rows + 1) / 2 * 2;
    if (diagonals_[i] == Diagonal::tensor) {
      adapt.row_sums = total + i;
      continue;
    }
    adapt.row_sums = row_sum;
    row_sum += adapt.rows;
    if (diagonals_[i] != Diagonal::factored) continue;
    adapt.col_sums = col_sum;
    col_sum += adapt.cols;
    scalings_[i].by_col = adapt.by_col = factor;
    factor += (adapt.cols + 1) / 2 * 2;
  }

  AdaptTask adapt{};
  adapt.counters = counter + squares_.counters();
  adapt.slots = taken(blocks_);
  adapt.trace = taken(n);
  adapt.beta2 = taken(n);
  adapt.eps = taken(n);
  adapt.root = taken(n);
  adapt.total = total;
  adapt.norm = norm;
  adapt.gain = taken(1);
  adapt.skip = reinterpret_cast<bool*>(taken(1));
  adapt.skipped = skipped;
  double* const coefficients = taken(3 * n);
  if (!options.rank_one) {
    adapt.by_weight = coefficients;
    adapt.by_gradient = coefficients + n;
    adapt.by_moment = coefficients + 2 * n;
  }
  adapt.guard = given.guard;
  adapt.tensors = given.tensors;
  adapt.group_count = given.group_count;
  adapt.blocks = static_cast<uint32_t>(blocks_);
  adapt.numerator = options.numerator;
  adapt.is_guarded = guarded;

  ScaledTask sweep{};
  static_cast<Task&>(sweep) = given;
  sweep.counters = adapt.counters + n;
  sweep.sums = taken(3 * n);
  sweep.slots = taken(3 * tiles);
  sweep.by_weight = coefficients;
  sweep.by_gradient = reads_gradient(options.numerator) ? coefficients + n : nullptr;
  sweep.by_moment = coefficients + 2 * n;
  sweep.gain = guarded ? adapt.gain : nullptr;
  sweep.skip = guarded ? adapt.skip : nullptr;
  sweep.beta2 = adapt.beta2;
  sweep.eps = adapt.eps;
  sweep.root = adapt.root;

  const Bytes groups = bytes_of(packed.groups), none{nullptr, 0};
  if (guarded || !all_by_element) {
    squares.rows = reinterpret_cast<const SquaresRow*>(
        memory.squares.at(sizeof squares, bytes_of(squares_.rows()), none, device, on.stream()));
    check(launch_squares(squares, squares_.rows().data(), on.stream()));
  }
  const Bytes adapt_rows = bytes_of(adapt_);
  if (const unsigned char* at = memory.adapt.at(sizeof adapt, adapt_rows, groups, device, on.stream())) {
    adapt.rows = reinterpret_cast<const AdaptRow*>(at);
    adapt.groups = reinterpret_cast<const Group*>(at + adapt_rows.size);
  }
  check(launch_adapt(adapt, adapt_.data(), packed.groups.data(), on.stream()));
  const Bytes rows = bytes_of(rows_);
  sweep.rows = nullptr;
  if (const unsigned char* at = memory.sweep.at(sizeof sweep, rows, bytes_of(scalings_), device, on.stream())) {
    sweep.rows = reinterpret_cast<const Row*>(at);
    sweep.scalings = reinterpret_cast<const Scaling*>(at + rows.size);
  }
  const Types types = packed.form.types;
  if (!options.rank_one) {
    check(launch_commit_scaled(types, sweep, rows_.data(), scalings_.data(), on.stream()));
    return at::Tensor();
  }
  const int64_t blocks =
      fisher_blocks<int64_t>(options.fisher, static_cast<int64_t>(packed.groups.size()), n);
  at::Tensor signal = at::empty({blocks}, doubles);
  FinishTask finish{};
  finish.mm = sweep.sums;
  finish.mg = sweep.sums + n;
  finish.elements = sweep.sums + 2 * n;
  finish.trace = adapt.trace;
  finish.by_weight = coefficients;
  finish.by_gradient = coefficients + n;
  finish.by_moment = coefficients + 2 * n;
  finish.signal = signal.mutable_data_ptr<double>();
  finish.skip = sweep.skip;
  finish.tensors = given.tensors;
  finish.group_count = given.group_count;
  finish.fisher = options.fisher;
  finish.numerator = adapt.numerator;
  const Bytes finish_rows = bytes_of(finish_);
  if (const unsigned char* at = memory.finish.at(sizeof finish, finish_rows, groups, device, on.stream())) {
    finish.rows = reinterpret_cast<const FinishRow*>(at);
    finish.groups = reinterpret_cast<const Group*>(at + finish_rows.size);
  }
  check(launch_accumulate_scaled(types, sweep, rows_.data(), scalings_.data(), on.stream()));
  check(launch_finish_scaled(finish, finish_.data(), packed.groups.data(), on.stream()));
  check(launch_apply_scaled(types, sweep, rows_.data(), scalings_.data(), on.stream()));
  return signal;
}

}  // namespace sofim::cuda
