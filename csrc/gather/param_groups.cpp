#include "gather/param_groups.h"

#include <ATen/core/Tensor.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/python_variable.h>

#include <iterator>
#include <limits>

#include "step/codes.h"

namespace sofim {
namespace {

// Keys of group and state dicts.
struct Names {
  PyObject *params, *lr, *momentum, *rho, *weight_decay, *decoupled_weight_decay, *maximize, *state_dtype, *kahan,
      *master_weight_bits, *master_bits, *diagonal, *beta2, *eps, *numerator, *fisher, *max_grad_norm, *skip_nonfinite, *exp_avg,
      *exp_avg_scale, *step, *row_var, *col_var, *variance, *variance_scale;
};

const Names& names() {
  static const Names names = [] {
    const auto name = [](const char* text) { return PyUnicode_InternFromString(text); };
    return Names{name("params"),       name("lr"),       name("momentum"),    name("rho"),
                 name("weight_decay"), name("decoupled_weight_decay"),        name("maximize"),
                 name("state_dtype"),  name("kahan"),    name("master_weight_bits"),
                 name("master_bits"),  name("diagonal"),              name("beta2"),
                 name("eps"),          name("numerator"),             name("fisher"),
                 name("max_grad_norm"),                  name("skip_nonfinite"),
                 name("exp_avg"),      name("exp_avg_scale"),         name("step"),     name("row_var"),     name("col_var"),
                 name("variance"),     name("variance_scale")};
  }();
  return names;
}

// The functions that read values return false for anything that Python should check.

PyObject* item(PyObject* dict, PyObject* key) { return PyDict_GetItemWithError(dict, key); }

bool is_tensor(PyObject* object) {
  return object != nullptr && (THPVariable_CheckExact(object) || THPVariable_Check(object));
}

// Whether a tensor is no subclass, and not traced or functionalized: those do not consist of their memory alone.
bool plain(const at::Tensor& x) {
  constexpr c10::DispatchKeySet others({c10::DispatchKey::Python, c10::DispatchKey::Functionalize,
                                        c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::FuncTorchGradWrapper});
  return !x.key_set().has_any(others);
}

bool read_number(PyObject* object, double& value) {
  if (object == nullptr || PyBool_Check(object)) return false;
  if (PyFloat_Check(object)) {
    value = PyFloat_AS_DOUBLE(object);
    return true;
  }
  if (!PyLong_Check(object)) return false;
  value = PyLong_AsDouble(object);
  if (value == -1.0 && PyErr_Occurred()) {
    PyErr_Clear();
    return false;
  }
  return true;
}

bool read_flag(PyObject* object, bool& value) {
  value = object == Py_True;
  return object == Py_True || object == Py_False;
}

// sofim_fused.blockwise.suits().
bool suits_codes(const at::Tensor& w) {
  constexpr int64_t smallest = 4096;  // blockwise.SMALLEST
  return w.dim() > 1 && w.numel() >= smallest && w.numel() / w.size(0) >= kBlockSize;
}

bool in_range(double x, double low, double below) { return x >= low && x < below; }

#if defined(SOFIM_EMULATED)
constexpr bool kEmulated = true;  // see tests/emulator: the CPU stands in for a GPU, whose memory is not read here
#else
constexpr bool kEmulated = false;
#endif
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kSmallestRho = 1e-30;  // checks.SMALLEST_RHO
constexpr double kSmallestEps = 1e-18, kLargestEps = 1e18;  // checks.SMALLEST_EPS, checks.LARGEST_EPS

// Reads a number, or a real tensor of one element. A tensor on another device is not read: it becomes `device_scalar`,
// and the value is NaN.
bool read_scalar(PyObject* object, bool anywhere, double& value, at::Tensor& device_scalar) {
  if (read_number(object, value)) return true;
  if (!is_tensor(object)) return false;
  const at::Tensor& x = THPVariable_Unpack(object);
  if (!plain(x) || x.numel() != 1 || x.is_complex() || x.scalar_type() == at::kBool) return false;
  if (!x.device().is_cpu() || kEmulated) {
    if (!anywhere || !has_addresses(x)) return false;
    value = kNaN;
    device_scalar = x;
    return true;
  }
  value = x.item<double>();
  return true;
}

bool same(PyObject* a, PyObject* b) {
  return a == b || (a != nullptr && b != nullptr && PyObject_RichCompareBool(a, b, Py_EQ) == 1);
}

bool is(PyObject* text, const char* value) {
  return text != nullptr && PyUnicode_Check(text) && PyUnicode_CompareWithASCIIString(text, value) == 0;
}

bool read_diagonal(PyObject* object, Diagonal& diagonal) {
  constexpr const char* values[] = {"identity", "tensor", "row", "factored", "element"};
  for (size_t i = 0; i < std::size(values); ++i) {
    diagonal = static_cast<Diagonal>(i);
    if (is(object, values[i])) return true;
  }
  return false;
}

bool read_whole(PyObject* groups, Options& whole) {
  const Names& n = names();
  PyObject* first = PyList_GET_ITEM(groups, 0);
  if (!PyDict_Check(first)) return false;
  for (PyObject* key : {n.numerator, n.fisher, n.max_grad_norm, n.skip_nonfinite}) {
    PyObject* value = item(first, key);
    for (Py_ssize_t i = 1; i < PyList_GET_SIZE(groups); ++i) {
      PyObject* other = PyList_GET_ITEM(groups, i);
      if (!PyDict_Check(other) || !same(item(other, key), value)) return false;
    }
  }
  PyObject* numerator = item(first, n.numerator);
  if (is(numerator, "moment")) {
    whole.numerator = Numerator::moment;
  } else if (is(numerator, "gradient")) {
    whole.numerator = Numerator::gradient;
  } else if (is(numerator, "nesterov")) {
    whole.numerator = Numerator::nesterov;
  } else {
    return false;
  }
  Diagonal diagonal;
  if (!read_diagonal(item(first, n.diagonal), diagonal)) return false;
  whole.adaptive = diagonal != Diagonal::identity;
  if (whole.adaptive) whole.rank_one = false;  // until a group with a finite rho is read
  PyObject* fisher = item(first, n.fisher);
  if (is(fisher, "model")) {
    whole.fisher = Fisher::model;
  } else if (is(fisher, "group")) {
    whole.fisher = Fisher::group;
  } else if (is(fisher, "parameter")) {
    whole.fisher = Fisher::parameter;
  } else {
    return false;
  }
  PyObject* limit = item(first, n.max_grad_norm);
  if (limit != Py_None) {
    double value;
    if (!read_number(limit, value) || !(value > 0.0)) return false;
    whole.max_grad_norm = value;
  }
  return read_flag(item(first, n.skip_nonfinite), whole.skip_nonfinite);
}

}  // namespace

// The entries of a parameter's state, nullptr for a missing one. Its dict nearly always has no other entries, and the
// keys are the interned strings: going through all of them takes less time than looking them up.
struct ParamGroups::Entries {
  PyObject *exp_avg = nullptr, *scale = nullptr, *step = nullptr, *lost = nullptr, *rows = nullptr, *cols = nullptr,
           *whole = nullptr, *whole_scale = nullptr;

  // `kept`: the name of the bits that the parameter lost, or nullptr. `codes`: whether its moment may be codes.
  Entries(PyObject* known, PyObject* kept, bool adapts, bool codes) {
    const Names& n = names();
    PyObject *key, *value;
    for (Py_ssize_t place = 0; PyDict_Next(known, &place, &key, &value);) {
      if (key == n.exp_avg) exp_avg = value;
      if (key == n.exp_avg_scale) scale = value;
      if (key == n.step) step = value;
      if (key == kept) lost = value;
      if (!adapts) continue;
      if (key == n.row_var) rows = value;
      if (key == n.col_var) cols = value;
      if (key == n.variance) whole = value;
      if (key == n.variance_scale) whole_scale = value;
    }
    if (adapts && rows == nullptr && whole == nullptr) {
      rows = item(known, n.row_var);
      cols = item(known, n.col_var);
      whole = item(known, n.variance);
    }
    if (exp_avg == nullptr) exp_avg = item(known, n.exp_avg);
    if (codes && scale == nullptr) scale = item(known, n.exp_avg_scale);
    if (codes && adapts && whole_scale == nullptr) whole_scale = item(known, n.variance_scale);
    if (step == nullptr) step = item(known, n.step);
    if (lost == nullptr && kept != nullptr) lost = item(known, kept);
  }
};

// Looks up parameters in the optimizer's state. Its entries usually have the order in which they are looked up; then no
// hash is computed, which for a tensor is a call into Python.
class ParamGroups::States {
 public:
  // `place`: of the entry that is looked up first, as PyDict_Next() has it.
  explicit States(PyObject* state, Py_ssize_t place = 0) : state_(state), place_(place) { next(); }

  // The entry of `param` if it is the next one in the dict.
  PyObject* in_turn(PyObject* param) {
    if (key_ != param) return nullptr;
    PyObject* found = value_;
    next();
    return found;
  }

  PyObject* find(PyObject* param) const { return item(state_, param); }

 private:
  void next() {
    if (!PyDict_Next(state_, &place_, &key_, &value_)) key_ = value_ = nullptr;
  }

  PyObject* state_;
  Py_ssize_t place_;
  PyObject *key_ = nullptr, *value_ = nullptr;
};

bool OptionalScalar::read(PyObject* object, bool anywhere) {
  there = object != Py_None;
  if (!there || read_scalar(object, anywhere, value, device_scalar)) return true;
  PyErr_Clear();
  return false;
}

const at::Tensor* tensor_of(PyObject* object) { return is_tensor(object) ? &THPVariable_Unpack(object) : nullptr; }

void drop_gradient(PyObject* param) { THPVariable_Unpack(param).mutable_grad().reset(); }

PyObject* object_of(const at::Tensor& tensor) { return THPVariable_Wrap(tensor); }

bool ParamGroups::read(PyObject* groups, PyObject* state, const std::vector<char>* consumed) {
  clear();
  if (read_everything(groups, state, consumed)) return true;
  PyErr_Clear();  // Python meets the same error in its own checks
  clear();
  return false;
}

bool ParamGroups::read_settings(PyObject* groups) {
  clear();
  bool good = PyList_Check(groups) && PyList_GET_SIZE(groups) > 0 && read_whole(groups, options_);
  for (Py_ssize_t i = 0; good && i < PyList_GET_SIZE(groups); ++i) {
    settings_.emplace_back();
    good = read_group(PyList_GET_ITEM(groups, i), settings_.back());
    groups_.push_back(settings_.back().hyper);
  }
  if (good) return true;
  PyErr_Clear();
  clear();
  return false;
}

bool ParamGroups::read_one(PyObject* param, PyObject* state, size_t group, int64_t ordinal, Py_ssize_t place) {
  clear_tensors();
  if (group >= settings_.size() || !PyDict_Check(state)) return false;
  States states(state, place);
  if (add_param(param, settings_[group], group, states, ordinal, nullptr) && tensors_.size() == 1 &&
      !tensors_.shares_memory()) {
    return true;
  }
  PyErr_Clear();
  clear_tensors();
  return false;
}

void ParamGroups::clear() {
  clear_tensors();
  options_ = Options();
  groups_.clear();
  settings_.clear();
  device_scalars_.clear();
}

void ParamGroups::clear_tensors() {
  tensors_.clear();
  group_of_.clear();
}

bool ParamGroups::l2() const {
  for (const size_t group : group_of_) {
    if (groups_[group].l2 != 0.0) return true;
  }
  return false;
}

bool ParamGroups::read_everything(PyObject* groups, PyObject* state, const std::vector<char>* consumed) {
  if (!PyList_Check(groups) || PyList_GET_SIZE(groups) == 0 || !PyDict_Check(state)) return false;
  if (!read_whole(groups, options_) || (options_.adaptive && !adapts_)) return false;
  States states(state);
  int64_t ordinal = 0;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(groups); ++i) {
    Group group;
    if (!read_group(PyList_GET_ITEM(groups, i), group)) return false;
    for (Py_ssize_t j = 0; j < PyList_GET_SIZE(group.params); ++j, ++ordinal) {
      PyObject* param = PyList_GET_ITEM(group.params, j);
      if (!add_param(param, group, groups_.size(), states, ordinal, consumed)) return false;
    }
    groups_.push_back(group.hyper);
    if (options_.adaptive) settings_.push_back(group);
  }
  return !tensors_.shares_memory();  // Python updates such tensors one after the other, or raises an error
}

bool ParamGroups::read_group(PyObject* dict, Group& group) {
  const Names& n = names();
  if (!PyDict_Check(dict)) return false;
  Hyper& h = group.hyper;
  double weight_decay;
  bool decoupled, maximize;
  if (!read_diagonal(item(dict, n.diagonal), group.diagonal)) return false;
  if ((group.diagonal != Diagonal::identity) != options_.adaptive) return false;
  if (!read_scalar(item(dict, n.lr), DeviceScalar::kLr, h.lr)) return false;
  if (!read_number(item(dict, n.momentum), h.momentum) || !in_range(h.momentum, 0.0, 1.0)) return false;
  if (!read_rho(item(dict, n.rho), group)) return false;
  if (!read_number(item(dict, n.weight_decay), weight_decay) || !in_range(weight_decay, 0.0, kInfinity)) return false;
  if (!read_flag(item(dict, n.decoupled_weight_decay), decoupled)) return false;
  if (!read_flag(item(dict, n.maximize), maximize)) return false;
  if (options_.adaptive) {
    AdaptiveHyper& a = group.adaptive;
    if (!decoupled && weight_decay != 0.0) return false;
    if (!read_number(item(dict, n.beta2), a.beta2) || !in_range(a.beta2, 0.0, 1.0)) return false;
    if (!read_number(item(dict, n.eps), a.eps) || !in_range(a.eps, kSmallestEps, kLargestEps)) return false;
  }
  h.weight_decay = decoupled ? weight_decay : 0.0;
  h.l2 = decoupled ? 0.0 : weight_decay;
  h.sign = maximize ? -1.0 : 1.0;
  PyObject* kahan = item(dict, n.kahan);
  if (kahan != Py_None && kahan != Py_True && kahan != Py_False) return false;
  group.kahan = kahan != Py_False;
  PyObject* bits = item(dict, n.master_weight_bits);
  if (is(bits, "auto")) {
    group.master = kahan == Py_None;
  } else if (bits != Py_None) {
    if (bits == nullptr || !PyLong_CheckExact(bits) || kahan == Py_True) return false;
    const long count = PyLong_AsLong(bits);
    if (count != 32 && count != 24) return false;
    group.master = true;
    group.cut = count == 24;
  }
  PyObject* state_dtype = item(dict, n.state_dtype);
  if (state_dtype == nullptr) return false;
  if (state_dtype != Py_None) {
    if (!THPDtype_Check(state_dtype)) return false;
    group.state_dtype = reinterpret_cast<THPDtype*>(state_dtype)->scalar_type;
    if (*group.state_dtype == at::kFloat8_e4m3fn) {
      if (!codes_) return false;
      group.codes = true;
      group.state_dtype = at::kFloat;  // of tensors that do not suit codes
    } else if (*group.state_dtype != at::kFloat && *group.state_dtype != at::kBFloat16) {
      return false;
    }
  }
  group.params = item(dict, n.params);
  return group.params != nullptr && PyList_Check(group.params);
}

// With a diagonal that adapts rho may be None: infinite, without a term of rank one. In one Fisher block all are, or
// none is.
bool ParamGroups::read_rho(PyObject* object, Group& group) {
  if (!options_.adaptive) return read_scalar(object, DeviceScalar::kRho, group.hyper.rho);
  const bool infinite = object == Py_None;
  if (infinite) {
    group.hyper.rho = kInfinity;
  } else if (!read_scalar(object, DeviceScalar::kRho, group.hyper.rho)) {
    return false;
  }
  if (options_.fisher == Fisher::model && !groups_.empty() && infinite == options_.rank_one) return false;
  options_.rank_one |= !infinite;
  return true;
}

bool ParamGroups::read_scalar(PyObject* object, DeviceScalar::Name name, double& value) {
  at::Tensor device_scalar;
  if (!sofim::read_scalar(object, anywhere_, value, device_scalar)) return false;
  if (device_scalar.defined()) {
    device_scalars_.push_back({groups_.size(), name, device_scalar});
    return true;
  }
  return in_range(value, name == DeviceScalar::kRho ? kSmallestRho : 0.0, kInfinity);
}

bool ParamGroups::add_param(PyObject* param, const Group& group, size_t index, States& states, int64_t ordinal,
                            const std::vector<char>* consumed) {
  if (!is_tensor(param)) return false;
  const at::Tensor& w = THPVariable_Unpack(param);
  const at::Tensor& given = w.unsafeGetTensorImpl()->grad();
  PyObject* known = states.in_turn(param);
  const bool was_consumed =
      consumed != nullptr && static_cast<size_t>(ordinal) < consumed->size() && (*consumed)[ordinal];
  if (!given.defined() && !was_consumed) return plain(w) || !w.requires_grad();  // frozen ones may be of any kind
  if (consumed != nullptr && !was_consumed) return false;
  const at::Tensor& g = was_consumed ? w : given;
  if (known == nullptr) known = states.find(param);
  if (known == nullptr || !PyDict_Check(known)) return false;
  const bool narrow = w.scalar_type() == at::kBFloat16 || w.scalar_type() == at::kHalf;
  const bool master = group.master && w.scalar_type() == at::kBFloat16, keeps = master || (group.kahan && narrow);
  const bool adapts = group.diagonal != Diagonal::identity;
  const Entries entries(known, master ? names().master_bits : keeps ? names().kahan : nullptr, adapts, group.codes);
  if (!is_tensor(entries.exp_avg) || !is_tensor(entries.step) || (keeps && !is_tensor(entries.lost))) return false;
  const at::Tensor none;
  const at::Tensor& m = THPVariable_Unpack(entries.exp_avg);
  const at::Tensor& t = THPVariable_Unpack(entries.step);
  const at::Tensor& lost = keeps ? THPVariable_Unpack(entries.lost) : none;
  if (!plain(w) || !plain(g) || !plain(m) || !plain(t) || (keeps && !plain(lost))) return false;
  if (master && lost.scalar_type() != (group.cut ? at::kChar : at::kShort)) return false;
  if (keeps && !master && lost.scalar_type() != w.scalar_type()) return false;
  const at::ScalarType natural = narrow ? at::kFloat : w.scalar_type();
  // Of a part of a sharded parameter it is the whole shape that says whether codes suit it, which is not known here.
  const bool codes = group.codes && m.scalar_type() == at::kFloat8_e4m3fn;
  if (!codes && (m.scalar_type() != group.state_dtype.value_or(natural) || (group.codes && suits_codes(w)))) return false;
  if (codes && (!is_tensor(entries.scale) || !plain(THPVariable_Unpack(entries.scale)))) return false;
  const at::Tensor& scales = codes ? THPVariable_Unpack(entries.scale) : none;
  if (group.state_dtype && natural != at::kFloat) return false;
  Variances variances{group.diagonal};
  if (adapts) {
    const auto unpacked = [&](PyObject* object, const at::Tensor*& tensor) {
      if (object == nullptr) return true;
      if (!is_tensor(object)) return false;
      tensor = &THPVariable_Unpack(object);
      return plain(*tensor);
    };
    if (!unpacked(entries.rows, variances.rows) || !unpacked(entries.cols, variances.cols) ||
        !unpacked(entries.whole, variances.whole)) {
      return false;
    }
    if (codes && group.diagonal == Diagonal::element) {
      if (variances.whole == nullptr || variances.whole->scalar_type() != at::kFloat8_e4m3fn ||
          entries.whole_scale == nullptr || !unpacked(entries.whole_scale, variances.scales)) {
        return false;
      }
    }
  }
  if (tensors_.add(w, g, m, scales, lost, t, ordinal, adapts ? &variances : nullptr) != nullptr) return false;
  tensors_.record(tensors_.size() - 1).decay = decay_of(group.hyper);
  group_of_.push_back(index);
  return true;
}

}  // namespace sofim
