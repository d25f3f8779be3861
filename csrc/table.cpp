#include "table.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <algorithm>
#include <cstring>
#include <exception>

namespace sofim {
namespace {

// Columns of rows and of hyper.
enum { kW, kG, kM, kKahan, kStep, kNumel, kOrdinal, kKind, kGroup, kFirst, kColumns };
enum { kLr, kMomentum, kRho, kWeightDecay, kL2, kSign, kDecayM, kDecayG, kDecayW, kHypers };

int64_t address(const void* pointer) { return static_cast<int64_t>(reinterpret_cast<uintptr_t>(pointer)); }

int64_t kind_of(const Record& r, int64_t addresses) {
  return static_cast<int64_t>(r.w_type) | int64_t{is_narrow(r.w_type) && r.g_type == Type::float32} << 2 |
         int64_t{r.m_type == Type::bfloat16} << 3 | int64_t{r.kahan != nullptr} << 4 |
         int64_t{addresses % 16 != 0} << 5;
}

// A tensor on the CPU that any mode may read and write.
at::Tensor memory(int64_t rows, int64_t columns, at::ScalarType dtype) {
  const c10::InferenceMode outside(false);
  return at::zeros({rows, columns}, at::TensorOptions(dtype).device(at::kCPU));
}

}  // namespace

// What lets go of tensors may run Python code, and that may come back here.
struct Table::Busy {
  explicit Busy(Table& table) : table(table) { table.busy_ = true; }
  ~Busy() { table.busy_ = false; }
  Table& table;
};

std::optional<int> Table::gather(PyObject* groups, PyObject* state) {
  if (busy_) return std::nullopt;
  const Busy busy(*this);
  reader_.clear();
  if (c10::impl::TorchDispatchModeTLS::any_modes_set()) return std::nullopt;
  try {
    if (!reader_.read(groups, state)) return std::nullopt;
  } catch (const std::exception&) {  // what has no sizes, say; Python meets it too
    PyErr_Clear();
    reader_.clear();
    return std::nullopt;
  }
  reader_.hold();
  const int changed = fill_whole() | fill_rows() | fill_hyper();
  return changed;
}

void Table::finish(bool weights, bool moments, bool steps) {
  if (busy_) return;
  const Busy busy(*this);
  Roster& roster = reader_.roster();
  roster.write_back(weights, moments);
  if (weights) roster.bump_weights();
  if (moments) roster.bump_moments();
  if (steps) roster.bump_steps();
  reader_.clear();
}

int Table::fill_whole() {
  const Roster& roster = reader_.roster();
  const Whole& whole = reader_.whole();
  const bool l2 = reader_.l2();
  bool decoupled = false;
  for (size_t i = 0; i < roster.size(); ++i) decoupled |= reader_.hyper(i).weight_decay != 0.0;
  std::optional<at::Device> device;
  if (roster.size() > 0) device = roster.device();
  const bool same = l2 == l2_ && decoupled == decoupled_ && device == device_ &&
                    whole.gradient_form == whole_.gradient_form && whole.fisher == whole_.fisher &&
                    whole.max_grad_norm.has_value() == whole_.max_grad_norm.has_value() &&
                    whole.skip_nonfinite == whole_.skip_nonfinite;
  l2_ = l2;
  decoupled_ = decoupled;
  device_ = device;
  whole_ = whole;
  return same ? 0 : kLayout;
}

int Table::fill_rows() {
  const Roster& roster = reader_.roster();
  const int64_t n = static_cast<int64_t>(roster.size());
  int changed = 0;
  if (!rows_.defined() || n != size_) {
    rows_ = memory(n, kColumns, at::kLong);
    changed = kPointers | kLayout;
  }
  size_ = n;
  int64_t* to = rows_.mutable_data_ptr<int64_t>();
  int64_t first = 0;
  for (int64_t i = 0; i < n; ++i, to += kColumns) {
    const Record& r = roster.records()[i];
    int64_t row[kColumns] = {};
    if (r.numel > 0) {
      row[kW] = address(r.w);
      row[kG] = address(r.g);
      row[kM] = address(r.m);
      row[kKahan] = address(r.kahan);
    }
    row[kStep] = address(roster.count(i));
    row[kNumel] = r.numel;
    row[kOrdinal] = roster.ordinal(i);
    row[kKind] = kind_of(r, row[kW] | row[kG] | row[kM] | row[kKahan]);
    row[kGroup] = static_cast<int64_t>(reader_.group_of(i));
    row[kFirst] = first;
    first += std::max<int64_t>(1, (r.numel + tile_ - 1) / tile_);
    int64_t moved = 0, other = 0;
    for (int column = 0; column < kNumel; ++column) moved |= row[column] ^ to[column];
    for (int column = kNumel; column < kColumns; ++column) other |= row[column] ^ to[column];
    changed |= (moved | other) != 0 ? kPointers : 0;
    changed |= other != 0 ? kLayout : 0;
    std::copy(row, row + kColumns, to);
  }
  tiles_ = first;
  if (changed & kLayout) {
    uint64_t seen = 0;  // a kind has 6 bits
    const int64_t* row = rows_.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < n; ++i) seen |= uint64_t{1} << row[i * kColumns + kKind];
    kinds_.clear();
    for (int64_t kind = 0; kind < 64; ++kind) {
      if (seen >> kind & 1) kinds_.push_back(kind);
    }
  }
  return changed;
}

int Table::fill_hyper() {
  const std::vector<Hyper>& groups = reader_.groups();
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
    // Bits, of which another NaN is no change. NOLINTNEXTLINE(bugprone-suspicious-memory-comparison)
    if (changed != 0 || std::memcmp(row, to, sizeof row) != 0) {
      changed |= kValues;
      std::memcpy(to, row, sizeof row);
    }
    to += kHypers;
  }
  scalars_.clear();
  for (const Distant& d : reader_.distant()) {
    scalars_.emplace_back(d.group, d.name == Distant::kLr ? kLr : kRho, d.value);
  }
  return changed;
}

}  // namespace sofim
