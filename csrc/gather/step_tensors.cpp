#include "gather/step_tensors.h"

#include <ATen/core/Tensor.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <iterator>
#include <numeric>
#include <utility>
#include <vector>

#include "step/codes.h"
#include "step/element.h"

namespace sofim {
namespace {

// Whether elements that correspond lie in the same order; size-1 dimensions are ignored.
bool same_order(const at::Tensor& a, const at::Tensor& b) {
  const auto sizes = a.sizes(), left = a.strides(), right = b.strides();
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] > 1 && left[i] != right[i]) return false;
  }
  return true;
}

// Whether elements may share memory: strides that are not those of nested, disjoint blocks.
bool may_overlap(const at::Tensor& x) {
  if (x.is_non_overlapping_and_dense() || x.numel() == 0) return false;
  std::vector<std::pair<int64_t, int64_t>> steps;  // strides and sizes
  for (int64_t i = 0; i < x.dim(); ++i) {
    if (x.size(i) > 1) steps.emplace_back(x.stride(i), x.size(i));
  }
  std::sort(steps.begin(), steps.end());
  int64_t reach = 0;
  for (const auto& [stride, size] : steps) {
    if (stride <= reach) return true;
    reach += stride * (size - 1);
  }
  return false;
}

bool as_stored(const at::Tensor& x) { return !x.is_conj() && !x.is_neg(); }

// add() calls this and what follows several times for each tensor of each step. at::Tensor's own functions check the
// same things again each time.

inline bool has_memory(const at::Tensor& x) {
  const c10::TensorImpl* impl = x.unsafeGetTensorImpl();
  const c10::Storage& storage = impl->unsafe_storage();
  return storage && (storage.data() != nullptr || impl->numel() == 0);
}

// Whether a running mean has the shape of w from dimension `from` on; elements of a complex w are pairs.
bool shaped_like(const at::Tensor& x, const at::Tensor& w, int64_t from) {
  const auto sizes = w.sizes().slice(from);
  const size_t pairs = w.is_complex() ? 1 : 0;
  if (x.sizes().size() != sizes.size() + pairs || (pairs && x.sizes().back() != 2)) return false;
  return std::equal(sizes.begin(), sizes.end(), x.sizes().begin());
}

// The strides of running means of elements in the order of x; elements of a complex x are pairs.
c10::SmallVector<int64_t, 5> strides_of_elements(const at::Tensor& x) {
  const int64_t unit = x.is_complex() ? 2 : 1;
  c10::SmallVector<int64_t, 5> strides;
  for (const int64_t stride : x.strides()) strides.push_back(stride * unit);
  if (unit == 2) strides.push_back(1);
  return strides;
}

bool has_strides(const at::Tensor& x, at::IntArrayRef strides) {
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (x.size(d) > 1 && x.stride(d) != strides[d]) return false;
  }
  return true;
}

// Whether a tensor has the running means that its diagonal needs, and no others.
bool has_those_of(const Variances& given, const at::Tensor& w) {
  const auto defined = [](const at::Tensor* x) { return x != nullptr && x->defined(); };
  const bool rows = w.dim() >= 2 && has_rows(given.diagonal);
  const bool cols = rows && given.diagonal == Diagonal::factored;
  if (defined(given.rows) != rows || defined(given.cols) != cols || defined(given.whole) == rows) return false;
  if (rows) {
    return given.rows->dim() == 1 && given.rows->size(0) == w.size(0) && (!cols || shaped_like(*given.cols, w, 1));
  }
  const bool by_element = given.diagonal == Diagonal::element || given.diagonal == Diagonal::factored;
  return by_element ? shaped_like(*given.whole, w, 0) : given.whole->dim() == 0;
}

// Stands in for the memory of a tensor without elements: arithmetic on a null pointer would be undefined.
char nowhere[1];

// The address of a tensor that has_memory(). Two: at::Tensor::mutable_data_ptr() and const_data_ptr() differ for a
// tensor that shares its memory until it is written (torch._lazy_clone).
inline void* address_to_write(const at::Tensor& x) {
  const c10::TensorImpl* impl = x.unsafeGetTensorImpl();
  if (impl->numel() == 0) return nowhere;
  return static_cast<char*>(impl->unsafe_storage().mutable_data()) + impl->storage_offset() * impl->itemsize();
}
inline const void* address_to_read(const at::Tensor& x) {
  const c10::TensorImpl* impl = x.unsafeGetTensorImpl();
  if (impl->numel() == 0) return nowhere;
  return static_cast<const char*>(impl->unsafe_storage().data()) + impl->storage_offset() * impl->itemsize();
}

inline bool same_sizes(const at::Tensor& a, const at::Tensor& b) {
  const auto left = a.sizes(), right = b.sizes();
  if (left.size() != right.size()) return false;
  for (size_t i = 0; i < left.size(); ++i) {
    if (left[i] != right[i]) return false;
  }
  return true;
}

}  // namespace

c10::SmallVector<int64_t, 5> strides_of_columns(const at::Tensor& x) {
  const int64_t unit = x.is_complex() ? 2 : 1;
  c10::SmallVector<int64_t, 5> strides;
  for (int64_t d = 1; d < x.dim(); ++d) {
    const bool outside = x.size(0) > 1 && x.stride(d) > x.stride(0);
    strides.push_back((outside ? x.stride(d) / x.size(0) : x.stride(d)) * unit);
  }
  if (unit == 2) strides.push_back(1);
  return strides;
}

bool storage_type(at::ScalarType dtype, Type& type) {
  switch (dtype) {
    case at::kFloat:
    case at::kComplexFloat:
      type = Type::float32;
      return true;
    case at::kDouble:
    case at::kComplexDouble:
      type = Type::float64;
      return true;
    case at::kBFloat16:
      type = Type::bfloat16;
      return true;
    case at::kHalf:
      type = Type::float16;
      return true;
    default:
      return false;
  }
}

bool has_addresses(const at::Tensor& x) {
  const c10::DeviceType device = x.device().type();
  return x.layout() == at::kStrided && device != at::kMeta && device != at::kMPS && has_memory(x);
}

void StepTensors::clear() {
  members_.clear();
  means_.clear();
  kept_.clear();
  copied_.clear();
  variances_.clear();
  held_.clear();
  tiling_.clear();
  if (!unsure_.empty()) known_ = 0;  // shares_memory() was not called, or found an overlap: check everything again
  unsure_.clear();
}

const char* StepTensors::add(const at::Tensor& w, const at::Tensor& g, const at::Tensor& m, const at::Tensor& scales,
                             const at::Tensor& lost, const at::Tensor& step, int64_t ordinal,
                             const Variances* variances) {
  Row record{};
  if (const char* problem = fill(record, w, g, m, scales, lost, step, ordinal, variances)) return problem;
  const size_t place = members_.size() - 1;
  if (place == records_.size()) records_.emplace_back();
  if (!is_known(record, place)) {
    moved_ = true;
    unsure_.push_back(place);
  } else if (record.g != records_[place].g || record.g_type != records_[place].g_type) {  // another dtype ends elsewhere
    unsure_.push_back(place);
  }
  records_[place] = record;
  if (!variances_.empty()) {
    if (place >= known_variances_.size()) known_variances_.resize(place + 1);
    known_variances_[place] = variances_[place];
  }
  return nullptr;
}

const char* StepTensors::fill(Row& record, const at::Tensor& w, const at::Tensor& g, const at::Tensor& m,
                              const at::Tensor& scales, const at::Tensor& lost, const at::Tensor& step,
                              int64_t ordinal, const Variances* variances) {
  if (anywhere_ && members_.empty()) {
    device_ = w.device();
    if (!has_addresses(w)) return "parameter: not a dense tensor in memory";
  }
  const auto readable = [this](const at::Tensor& x) {
    return x.device() == device_ && x.layout() == at::kStrided && has_memory(x);
  };
  if (!readable(w)) return "parameter: not a dense tensor on the step's device";
  if (!readable(g)) return "gradient: not a dense tensor on the step's device";
  if (!readable(m)) return "exp_avg: not a dense tensor on the step's device";
  if (!storage_type(w.scalar_type(), record.w_type)) return "parameter: not float32, float64, bfloat16 or float16";
  if (!storage_type(g.scalar_type(), record.g_type) || g.is_complex() != w.is_complex() ||
      !(record.g_type == record.w_type || (record.g_type == Type::float32 && is_narrow(record.w_type)))) {
    return "gradient: of another dtype than its parameter";
  }
  const bool wide = record.w_type == Type::float64, codes = m.scalar_type() == at::kFloat8_e4m3fn;
  if (codes) {
    record.m_type = Type::codes;
    if (!codes_) return "exp_avg: codes of 8 bits, which this backend does not take";
    if (wide || w.is_complex() || w.dim() == 0) return "exp_avg: codes of 8 bits, of a parameter that has none";
    record.row_size = w.size(0) == 0 ? 1 : std::max<int64_t>(1, w.numel() / w.size(0));
    const int64_t blocks = (record.row_size + kBlockSize - 1) / kBlockSize;
    if (!scales.defined() || !readable(scales) || scales.scalar_type() != at::kFloat || scales.dim() != 2 ||
        scales.size(0) != w.size(0) || (w.numel() > 0 && scales.size(1) != blocks) || may_overlap(scales)) {
      return "exp_avg_scale: not float32 of a row for each of the parameter's, and a column for each block of a row";
    }
  } else if (scales.defined()) {
    return "exp_avg_scale: of a moment that is no codes";
  } else if (!storage_type(m.scalar_type(), record.m_type) || m.is_complex() != w.is_complex() ||
      !(wide ? record.m_type == Type::float64 : record.m_type == Type::float32 || record.m_type == Type::bfloat16)) {
    return "exp_avg: not float32 or bfloat16 (of a float64 parameter: float64)";
  }
  if (!same_sizes(g, w)) return "gradient: of another shape than its parameter";
  if (!same_sizes(m, w)) return "exp_avg: of another shape than its parameter";
  if (lost.defined()) {
    record.cut = record.w_type == Type::bfloat16 && lost.scalar_type() == at::kChar;
    record.master = record.cut || (record.w_type == Type::bfloat16 && lost.scalar_type() == at::kShort);
    if (!readable(lost) || !(record.master || lost.scalar_type() == w.scalar_type()) || !same_sizes(lost, w)) {
      return "lost bits: not a dense tensor on the step's device of its parameter's shape, and of its dtype, or int16 or"
             " int8 (of a bfloat16 parameter)";
    }
    if (!is_narrow(record.w_type)) return "lost bits: kept for a parameter that is not of 16 bits";
  }
  if (step.defined() && (!readable(step) || step.scalar_type() != at::kLong || step.numel() != 1)) {
    return "step: not a 0-dimensional int64 tensor on the step's device";
  }
  const at::Tensor none;
  const auto variance = [&](const at::Tensor* Variances::*name) -> const at::Tensor& {
    return variances == nullptr || variances->*name == nullptr ? none : *(variances->*name);
  };
  const at::Tensor &rows = variance(&Variances::rows), &cols = variance(&Variances::cols),
                   &whole = variance(&Variances::whole), &root_scales = variance(&Variances::scales);
  const bool roots = whole.defined() && whole.scalar_type() == at::kFloat8_e4m3fn;
  bool in_inference = w.is_inference() || m.is_inference() || (codes && scales.is_inference()) || (lost.defined() && lost.is_inference()) ||
                      (step.defined() && step.is_inference());
  if (variances != nullptr) {
    if (!has_those_of(*variances, w)) return "not the running means of g² that the diagonal needs";
    for (const at::Tensor* x : {&rows, &cols, &whole}) {
      if (!x->defined()) continue;
      const at::ScalarType dtype = wide ? at::kDouble : roots && x == &whole ? at::kFloat8_e4m3fn : at::kFloat;
      if (!readable(*x) || x->scalar_type() != dtype || x->is_neg()) {
        return "running means of g²: not float32 (of a float64 parameter: float64) on the step's device";
      }
      in_inference |= x->is_inference();
      if (may_overlap(*x)) return "running means of g² whose elements may share memory";
    }
    if (roots) {
      if (anywhere_) return "variance: codes of 8 bits, which are taken on the CPU alone";
      if (!codes || variances->diagonal != Diagonal::element) {
        return "variance: codes of 8 bits, of a parameter whose exp_avg is none, or that has other running means";
      }
      if (!root_scales.defined() || !readable(root_scales) || root_scales.scalar_type() != at::kFloat ||
          !same_sizes(root_scales, scales) || may_overlap(root_scales)) {
        return "variance_scale: not float32 of a row for each of the parameter's, and a column for each block of a row";
      }
      in_inference |= root_scales.is_inference();
    } else if (root_scales.defined()) {
      return "variance_scale: of a variance that is no codes";
    }
  }
  if (in_inference && !at::InferenceMode::is_enabled()) {
    return "an inference tensor, which cannot be updated outside of torch.inference_mode()";
  }

  // Blocks of codes follow the order of a contiguous tensor.
  const bool flat = m.is_contiguous() ? w.is_contiguous() && g.is_contiguous() &&
                                            (!lost.defined() || lost.is_contiguous())
                                      : !codes && m.is_non_overlapping_and_dense() && same_order(w, m) && same_order(g, m) &&
                                            (!lost.defined() || same_order(lost, m));
  const bool by_element = whole.defined() && whole.dim() > 0;
  const bool in_place = flat && as_stored(g) && as_stored(w) && as_stored(m);
  at::Tensor made;  // what copies are laid out like, if that is not m
  if (in_place) {
    record.w = address_to_write(w);
    record.g = address_to_read(g);
    record.m = address_to_write(m);
    if (lost.defined()) record.lost = address_to_write(lost);
  } else {
    for (const at::Tensor* x : {&w, &m, &lost}) {
      if (x->defined() && may_overlap(*x)) return "a parameter or its state whose elements may share memory";
    }
    if (codes ? !m.is_contiguous() : !m.is_non_overlapping_and_dense()) made = m.new_empty(m.sizes());
    const at::Tensor& order = made.defined() ? made : m;
    const auto copy_of = [&](const at::Tensor& x) {
      at::Tensor copy = x.new_empty_strided(order.sizes(), order.strides());
      copy.copy_(x.detach());
      return copy;
    };
    const auto written = [&](const at::Tensor& x, bool moment) {
      if (same_order(x, order) && as_stored(x) && x.is_non_overlapping_and_dense()) {
        return address_to_write(x);
      }
      copied_.push_back({x, copy_of(x), moment});
      return address_to_write(copied_.back().copy);
    };
    record.w = written(w, false);
    record.m = written(m, true);
    if (lost.defined()) record.lost = written(lost, false);
    if (same_order(g, order) && as_stored(g) && g.is_non_overlapping_and_dense()) {
      record.g = address_to_read(g);
    } else {
      kept_.push_back(copy_of(g));
      record.g = address_to_read(kept_.back());
    }
  }
  record.copied = !in_place;
  if (codes) {
    record.scales = static_cast<float*>(address_to_write(scales));
    if (!scales.is_contiguous()) {
      copied_.push_back({scales, scales.contiguous(), true});
      record.scales = static_cast<float*>(address_to_write(copied_.back().copy));
      record.copied = true;
    }
  }
  record.numel = w.numel() * (w.is_complex() ? 2 : 1);
  if (variances != nullptr) {
    const auto address = [&](const at::Tensor& x, at::IntArrayRef strides) {
      if (has_strides(x, strides) || x.numel() == 0) return address_to_write(x);
      copied_.push_back({x, x.new_empty_strided(x.sizes(), strides).copy_(x.detach()), true});
      record.copied = true;
      return address_to_write(copied_.back().copy);
    };
    const at::Tensor& order = made.defined() ? made : m;
    VarianceRow row;
    row.columns = row.inner = record.numel;
    row.by_element = by_element;
    if (rows.defined()) {
      row.count = rows.size(0);
      row.columns = row.inner = row.count == 0 ? 0 : record.numel / row.count;
      if (record.numel > 0 && row.count > 1) row.inner = order.stride(0) * (order.is_complex() ? 2 : 1);
      row.rows = address(rows, {1});
    }
    if (cols.defined()) row.cols = address(cols, strides_of_columns(order));
    if (whole.defined()) row.whole = address(whole, strides_of_elements(by_element ? order : whole));
    if (roots) row.scales = static_cast<float*>(address(root_scales, {root_scales.size(1), 1}));
    variances_.push_back(row);
  }
  record.step = step.defined() ? static_cast<int64_t*>(address_to_write(step)) : nullptr;
  record.ordinal = static_cast<uint32_t>(ordinal);
  const auto address = [](const void* at) { return reinterpret_cast<uintptr_t>(at); };
  record.aligned = (address(record.w) | address(record.g) | address(record.m) | address(record.lost)) % 16 == 0;
  members_.push_back({w.unsafeGetTensorImpl(), g.unsafeGetTensorImpl(), m.unsafeGetTensorImpl(),
                      codes ? scales.unsafeGetTensorImpl() : nullptr,
                      lost.defined() ? lost.unsafeGetTensorImpl() : nullptr,
                      step.defined() ? step.unsafeGetTensorImpl() : nullptr});
  if (variances != nullptr) {
    means_.push_back({rows.defined() ? rows.unsafeGetTensorImpl() : nullptr,
                      cols.defined() ? cols.unsafeGetTensorImpl() : nullptr,
                      whole.defined() ? whole.unsafeGetTensorImpl() : nullptr,
                      roots ? root_scales.unsafeGetTensorImpl() : nullptr});
  }
  tiling_.add(record.numel);
  return nullptr;
}

bool StepTensors::is_known(const Row& record, size_t place) const {
  if (place >= known_) return false;
  const Row& before = records_[place];
  if (record.w != before.w || record.m != before.m || record.scales != before.scales || record.lost != before.lost ||
      record.step != before.step || record.numel != before.numel || record.w_type != before.w_type ||
      record.m_type != before.m_type || record.master != before.master || record.cut != before.cut ||
      record.copied || before.copied) {
    return false;
  }
  if (variances_.empty()) return known_variances_.empty();
  if (place >= known_variances_.size()) return false;
  const VarianceRow &now = variances_[place], &then = known_variances_[place];
  return now.rows == then.rows && now.cols == then.cols && now.whole == then.whole && now.scales == then.scales && now.count == then.count &&
         now.columns == then.columns && now.inner == then.inner;
}

StepTensors::Range StepTensors::range_of(const c10::TensorImpl* x) {
  if (x == nullptr || x->numel() == 0) return {0, 0};
  int64_t elements = 1;
  for (int64_t i = 0; i < x->dim(); ++i) elements += (x->size(i) - 1) * x->stride(i);
  const auto begin = reinterpret_cast<uintptr_t>(x->data());
  return {begin, begin + static_cast<uintptr_t>(elements) * x->itemsize()};
}

bool StepTensors::shares_memory() {
  if (known_ != size()) {
    known_ = size();
    moved_ = true;
  }
  if (moved_) {
    known_variances_.resize(variances_.size());
    overlap_ = sort_written();
    moved_ = false;
    unsure_.resize(size());
    std::iota(unsure_.begin(), unsure_.end(), size_t{0});
  }
  if (overlap_) return true;
  for (const size_t i : unsure_) {
    const Row& record = records_[i];
    const c10::TensorImpl* g = members_[i].g;
    // Each element of a gradient that is its own w is read before it is written, by the thread that writes it.
    if (g == members_[i].w || (record.g == record.w && record.g_type == record.w_type)) continue;
    const c10::Storage& storage = g->unsafe_storage();
    const bool alone = c10::raw::intrusive_ptr::use_count(members_[i].g) == 1 && storage.use_count() == 1 &&
                       storage.resizable();
    if (!alone && is_written(range_of(g))) return true;
  }
  unsure_.clear();
  return false;
}

bool StepTensors::sort_written() {
  sorted_.clear();
  const auto add = [this](const c10::TensorImpl* x) {
    const Range range = range_of(x);
    if (range.begin < range.end) sorted_.push_back(range);
  };
  for (const Member& member : members_) {
    for (const c10::TensorImpl* x : {member.w, member.m, member.scales, member.lost, member.step}) add(x);
  }
  for (const MeansOfMember& means : means_) {
    for (const c10::TensorImpl* x : {means.rows, means.cols, means.whole, means.scales}) add(x);
  }
  std::sort(sorted_.begin(), sorted_.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
  for (size_t i = 1; i < sorted_.size(); ++i) {
    if (sorted_[i].begin < sorted_[i - 1].end) return true;
  }
  return false;
}

bool StepTensors::is_written(const Range& range) const {
  const auto after = std::partition_point(sorted_.begin(), sorted_.end(),
                                          [&](const Range& written) { return written.begin < range.end; });
  return range.begin < range.end && after != sorted_.begin() && std::prev(after)->end > range.begin;
}

void StepTensors::key_random_bits(int64_t ahead) {
  for (size_t i = 0; i < size(); ++i) {
    const Row& record = records_[i];
    if (record.m_type == Type::bfloat16 || record.m_type == Type::codes || record.cut) {
      records_[i].key = tensor_key(records_[i].ordinal, updates(i) + ahead);
    }
  }
}

void StepTensors::advance() {
  for (size_t i = 0; i < size(); ++i) ++*records_[i].step;
  bump_steps();
}

void StepTensors::bump_weights() {
  for (Member& member : members_) {
    member.w->bump_version();
    if (member.lost != nullptr) member.lost->bump_version();
  }
}

void StepTensors::bump_moments() {
  for (Member& member : members_) {
    member.m->bump_version();
    if (member.scales != nullptr) member.scales->bump_version();
  }
}

void StepTensors::bump_variances() {
  for (const MeansOfMember& means : means_) {
    for (c10::TensorImpl* x : {means.rows, means.cols, means.whole, means.scales}) {
      if (x != nullptr) x->bump_version();
    }
  }
}

void StepTensors::bump_steps() {
  for (Member& member : members_) member.step->bump_version();
}

void StepTensors::write_back(bool weights, bool moments) {
  c10::NoGradGuard no_grad;
  for (Copied& copied : copied_) {
    if (copied.moment ? moments : weights) copied.original.detach().copy_(copied.copy);
  }
}

void StepTensors::hold() {
  const auto add = [this](c10::TensorImpl* x) {
    if (x != nullptr) held_.push_back(c10::intrusive_ptr<c10::TensorImpl>::reclaim_copy(x));
  };
  for (const Member& member : members_) {
    for (c10::TensorImpl* x : {member.w, member.g, member.m, member.scales, member.lost, member.step}) add(x);
  }
  for (const MeansOfMember& means : means_) {
    for (c10::TensorImpl* x : {means.rows, means.cols, means.whole, means.scales}) add(x);
  }
}

}  // namespace sofim
