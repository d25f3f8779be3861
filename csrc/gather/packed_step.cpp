#include "gather/packed_step.h"

#include <ATen/core/Tensor.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <algorithm>
#include <bitset>
#include <cstring>
#include <exception>
#include <iterator>

#include "gather/cpu_tensor.h"
#include "step/codes.h"

namespace sofim {
namespace {

// Columns of rows and of hyper.
enum { kW, kG, kM, kLost, kScales, kStep, kNumel, kRowSize, kOrdinal, kKind, kGroup, kFirst, kColumns };
enum { kLr, kMomentum, kRho, kWeightDecay, kL2, kSign, kDecayM, kDecayG, kDecayW, kHypers };
// Columns of means and of settings, of steps with a diagonal that adapts.
enum { kRowVar, kColVar, kWhole, kElement, kCount, kColumnsOfRow, kInner, kMeans };
enum { kBeta2, kEps, kSettings };

int64_t address(const void* pointer) { return static_cast<int64_t>(reinterpret_cast<uintptr_t>(pointer)); }

int64_t kind_of(const Row& r, int64_t addresses, bool by_element) {
  const bool codes = r.m_type == Type::codes;
  return static_cast<int64_t>(r.w_type) | int64_t{is_narrow(r.w_type) && r.g_type == Type::float32} << 2 |
         int64_t{r.m_type == Type::bfloat16} << 3 | int64_t{r.lost != nullptr && !r.cut} << 4 |
         int64_t{addresses % 16 != 0 || (codes && r.row_size % 16 != 0)} << 5 | int64_t{by_element} << 6 |
         int64_t{r.master} << 7 | int64_t{codes} << 8 | int64_t{codes && r.row_size % kBlockSize != 0} << 9;
}

// Replaces numbers, and returns whether any of them differ, bit for bit: an unchanged NaN is no change.
template <class T, size_t count>
bool replace(T* to, const T (&from)[count]) {
  // NOLINTNEXTLINE(bugprone-suspicious-memory-comparison)
  if (std::memcmp(from, to, sizeof from) == 0) return false;
  std::memcpy(to, from, sizeof from);
  return true;
}

// A tensor on the CPU that can be written inside and outside of inference mode.
at::Tensor memory(int64_t rows, int64_t columns, at::ScalarType dtype) {
  const c10::InferenceMode outside(false);
  return cpu_tensor({rows, columns}, dtype).zero_();
}

}  // namespace

// Marks the object as busy: releasing tensors may run Python code, which may call it again.
struct PackedStep::Busy {
  explicit Busy(PackedStep& packed) : packed(packed) { packed.busy_ = true; }
  ~Busy() { packed.busy_ = false; }
  PackedStep& packed;
};

std::optional<int> PackedStep::gather(PyObject* groups, PyObject* state) {
  if (busy_) return std::nullopt;
  const Busy busy(*this);
  param_groups_.clear();
  if (c10::impl::TorchDispatchModeTLS::any_modes_set()) return std::nullopt;
  try {
    if (!param_groups_.read(groups, state)) return std::nullopt;
  } catch (const std::exception&) {  // for example, a tensor without sizes; Python's own checks meet it too
    PyErr_Clear();
    param_groups_.clear();
    return std::nullopt;
  }
  param_groups_.hold();
  const int changed = fill_whole() | fill_rows() | fill_hyper() | (options_.adaptive ? fill_means() : 0);
  return changed;
}

void PackedStep::finish(bool weights, bool moments, bool steps) {
  if (busy_) return;
  const Busy busy(*this);
  StepTensors& tensors = param_groups_.tensors();
  tensors.write_back(weights, moments);
  if (weights) tensors.bump_weights();
  if (moments) {
    tensors.bump_moments();
    tensors.bump_variances();
  }
  if (steps) tensors.bump_steps();
  param_groups_.clear();
}

int PackedStep::fill_whole() {
  const StepTensors& tensors = param_groups_.tensors();
  const Options& whole = param_groups_.options();
  const bool l2 = param_groups_.l2();
  bool decoupled = false;
  for (size_t i = 0; i < tensors.size(); ++i) decoupled |= param_groups_.hyper(i).weight_decay != 0.0;
  std::optional<at::Device> device;
  if (tensors.size() > 0) device = tensors.device();
  const bool same = l2 == l2_ && decoupled == decoupled_ && device == device_ &&
                    whole.numerator == options_.numerator && whole.adaptive == options_.adaptive &&
                    whole.rank_one == options_.rank_one && whole.fisher == options_.fisher &&
                    whole.max_grad_norm.has_value() == options_.max_grad_norm.has_value() &&
                    whole.skip_nonfinite == options_.skip_nonfinite;
  l2_ = l2;
  decoupled_ = decoupled;
  device_ = device;
  options_ = whole;
  return same ? 0 : kLayout;
}

int PackedStep::fill_rows() {
  const StepTensors& tensors = param_groups_.tensors();
  const int64_t n = static_cast<int64_t>(tensors.size());
  int changed = 0;
  if (!rows_.defined() || n != size_) {
    rows_ = memory(n, kColumns, at::kLong);
    changed = kPointers | kLayout;
  }
  size_ = n;
  int64_t* to = rows_.mutable_data_ptr<int64_t>();
  int64_t first = 0;
  for (int64_t i = 0; i < n; ++i, to += kColumns) {
    const Row& r = tensors.records()[i];
    int64_t row[kColumns] = {};
    if (r.numel > 0) {
      row[kW] = address(r.w);
      row[kG] = address(r.g);
      row[kM] = address(r.m);
      row[kLost] = address(r.lost);
      row[kScales] = address(r.scales);
    }
    row[kStep] = address(tensors.count(i));
    row[kNumel] = r.numel;
    if (r.m_type == Type::codes) {
      row[kRowSize] = r.row_size;
      row[kNumel] = r.numel / r.row_size * ((r.row_size + kBlockSize - 1) / kBlockSize * kBlockSize);
    }
    row[kOrdinal] = tensors.ordinal(i);
    const VarianceRow* means = options_.adaptive ? tensors.variances() + i : nullptr;
    const bool by_element = means != nullptr && means->by_element;
    const int64_t variance = by_element && r.numel > 0 ? address(means->whole) : 0;
    row[kKind] = kind_of(r, row[kW] | row[kG] | row[kM] | row[kLost] | variance, by_element);
    row[kGroup] = static_cast<int64_t>(param_groups_.group_of(i));
    row[kFirst] = first;
    first += std::max<int64_t>(1, (row[kNumel] + tile_ - 1) / tile_);
    int64_t moved = 0, other = 0;
    for (int column = 0; column < kNumel; ++column) moved |= row[column] ^ to[column];
    for (int column = kNumel; column < kColumns; ++column) other |= row[column] ^ to[column];
    changed |= (moved | other) != 0 ? kPointers : 0;
    changed |= other != 0 ? kLayout : 0;
    std::copy(row, row + kColumns, to);
  }
  tiles_ = first;
  if (changed & kLayout) {
    std::bitset<1024> seen;  // a kind has 10 bits
    const int64_t* row = rows_.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < n; ++i) seen.set(static_cast<size_t>(row[i * kColumns + kKind]));
    kinds_.clear();
    for (size_t kind = 0; kind < seen.size(); ++kind) {
      if (seen.test(kind)) kinds_.push_back(static_cast<int64_t>(kind));
    }
  }
  return changed;
}

int PackedStep::fill_hyper() {
  const std::vector<Hyper>& groups = param_groups_.groups();
  const int64_t n = static_cast<int64_t>(groups.size());
  int changed = 0;
  if (!hyper_.defined() || hyper_.size(0) != n) {
    hyper_ = memory(n, kHypers, at::kDouble);
    changed = kValues | kLayout;
  }
  double* to = hyper_.mutable_data_ptr<double>();
  for (const Hyper& h : groups) {
    const Decay decay = decay_of(h);
    const double row[kHypers] = {h.lr,   h.momentum, h.rho,   h.weight_decay, h.l2,
                                 h.sign, decay.m,    decay.g, decay.w};
    // Compares bits: an unchanged NaN is no change. NOLINTNEXTLINE(bugprone-suspicious-memory-comparison)
    if (changed != 0 || std::memcmp(row, to, sizeof row) != 0) {
      changed |= kValues;
      std::memcpy(to, row, sizeof row);
    }
    to += kHypers;
  }
  scalars_.clear();
  for (const DeviceScalar& d : param_groups_.device_scalars()) {
    scalars_.emplace_back(d.group, d.name == DeviceScalar::kLr ? kLr : kRho, d.value);
  }
  return changed;
}

int PackedStep::fill_means() {
  const StepTensors& tensors = param_groups_.tensors();
  int changed = 0;
  if (!means_.defined() || means_.size(0) != size_) {
    means_ = memory(size_, kMeans, at::kLong);
    changed = kPointers | kLayout;
  }
  int64_t* to = means_.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < size_; ++i, to += kMeans) {
    const VarianceRow& r = tensors.variances()[i];
    const int64_t addresses[] = {address(r.rows), address(r.cols), address(r.whole)};
    const int64_t sizes[] = {int64_t{r.by_element}, r.count, r.columns, r.inner};
    static_assert(kWhole + 1 == std::size(addresses) && kMeans == std::size(addresses) + std::size(sizes));
    if (replace(to, addresses)) changed |= kPointers;
    if (replace(to + kElement, sizes)) changed |= kPointers | kLayout;
  }
  const int64_t groups = hyper_.size(0);
  if (!settings_.defined() || settings_.size(0) != groups) {
    settings_ = memory(groups, kSettings, at::kDouble);
    changed |= kValues;
  }
  double* values = settings_.mutable_data_ptr<double>();
  for (int64_t i = 0; i < groups; ++i, values += kSettings) {
    const AdaptiveHyper& h = param_groups_.adaptive_of_group(static_cast<size_t>(i));
    const double row[] = {h.beta2, h.eps};
    static_assert(kSettings == std::size(row));
    if (replace(values, row)) changed |= kValues;
  }
  return changed;
}

}  // namespace sofim
