// sofim_fused._C: a whole step in one call, for optimizers whose tensors all lie on the CPU.
//
// It does what SOFIM.step (sofim_fused/optimizer.py) does, and only where nothing is to be said about it: whatever it
// does not expect, a wrong value or a tensor without state, it leaves to Python, unchanged.
#include <ATen/ATen.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <cmath>
#include <limits>
#include <optional>

#include "engine.h"

namespace sofim {
namespace {

namespace py = pybind11;

// Keys of group and state dicts.
struct Names {
  PyObject *params, *lr, *momentum, *rho, *weight_decay, *decoupled_weight_decay, *maximize, *state_dtype, *kahan,
      *numerator, *fisher, *max_grad_norm, *skip_nonfinite, *exp_avg, *step;
};

const Names& names() {
  static const Names names = [] {
    const auto name = [](const char* text) { return PyUnicode_InternFromString(text); };
    return Names{name("params"),       name("lr"),       name("momentum"),    name("rho"),
                 name("weight_decay"), name("decoupled_weight_decay"),        name("maximize"),
                 name("state_dtype"),  name("kahan"),    name("numerator"),   name("fisher"),
                 name("max_grad_norm"), name("skip_nonfinite"), name("exp_avg"), name("step")};
  }();
  return names;
}

// Values are read like this: false for anything that Python should look at.

PyObject* item(PyObject* dict, PyObject* key) { return PyDict_GetItemWithError(dict, key); }

bool is_tensor(PyObject* object) {
  return object != nullptr && (THPVariable_CheckExact(object) || THPVariable_Check(object));
}

// A float, or with `tensor` also a real one-element tensor on the CPU.
bool read_number(PyObject* object, bool tensor, double& value) {
  if (object == nullptr || PyBool_Check(object)) return false;
  if (PyFloat_Check(object)) {
    value = PyFloat_AS_DOUBLE(object);
    return true;
  }
  if (PyLong_Check(object)) {
    value = PyLong_AsDouble(object);
    if (value == -1.0 && PyErr_Occurred()) {
      PyErr_Clear();
      return false;
    }
    return true;
  }
  if (!tensor || !is_tensor(object)) return false;
  const at::Tensor& x = THPVariable_Unpack(object);
  if (!x.device().is_cpu() || x.numel() != 1 || x.is_complex() || x.scalar_type() == at::kBool) return false;
  value = x.item<double>();
  return true;
}

bool read_flag(PyObject* object, bool& value) {
  value = object == Py_True;
  return object == Py_True || object == Py_False;
}

bool in_range(double x, double low, double below) { return x >= low && x < below; }

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kSmallestRho = 1e-30;  // checks.SMALLEST_RHO

// A group's settings.
struct Group {
  Hyper hyper;
  std::optional<at::ScalarType> state_dtype;
  bool kahan = true;
  PyObject* params = nullptr;
};

bool read_group(PyObject* dict, Group& group) {
  const Names& n = names();
  if (!PyDict_Check(dict)) return false;
  Hyper& h = group.hyper;
  double weight_decay;
  bool decoupled, maximize;
  if (!read_number(item(dict, n.lr), true, h.lr) || !in_range(h.lr, 0.0, kInfinity)) return false;
  if (!read_number(item(dict, n.momentum), false, h.momentum) || !in_range(h.momentum, 0.0, 1.0)) return false;
  if (!read_number(item(dict, n.rho), true, h.rho) || !in_range(h.rho, kSmallestRho, kInfinity)) return false;
  if (!read_number(item(dict, n.weight_decay), false, weight_decay) || !in_range(weight_decay, 0.0, kInfinity)) {
    return false;
  }
  if (!read_flag(item(dict, n.decoupled_weight_decay), decoupled)) return false;
  if (!read_flag(item(dict, n.maximize), maximize)) return false;
  h.weight_decay = decoupled ? weight_decay : 0.0;
  h.l2 = decoupled ? 0.0 : weight_decay;
  h.sign = maximize ? -1.0 : 1.0;
  PyObject* kahan = item(dict, n.kahan);
  if (kahan != Py_None && !PyBool_Check(kahan)) return false;
  group.kahan = kahan != Py_False;
  PyObject* state_dtype = item(dict, n.state_dtype);
  if (state_dtype == nullptr) return false;
  if (state_dtype != Py_None) {
    if (!THPDtype_Check(state_dtype)) return false;
    group.state_dtype = reinterpret_cast<THPDtype*>(state_dtype)->scalar_type;
    if (*group.state_dtype != at::kFloat && *group.state_dtype != at::kBFloat16) return false;
  }
  group.params = item(dict, n.params);
  return group.params != nullptr && PyList_Check(group.params);
}

// What holds for the optimizer as a whole.
struct Whole {
  bool gradient_form = false;
  enum { kModel, kGroup, kParameter } fisher = kModel;
  std::optional<double> max_grad_norm;
  bool skip_nonfinite = false;

  bool guarded() const { return max_grad_norm || skip_nonfinite; }
};

bool same(PyObject* a, PyObject* b) {
  return a == b || (a != nullptr && b != nullptr && PyObject_RichCompareBool(a, b, Py_EQ) == 1);
}

bool is(PyObject* text, const char* value) {
  return text != nullptr && PyUnicode_Check(text) && PyUnicode_CompareWithASCIIString(text, value) == 0;
}

bool read_whole(PyObject* groups, Whole& whole) {
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
  whole.gradient_form = is(numerator, "gradient");
  if (!whole.gradient_form && !is(numerator, "moment")) return false;
  PyObject* fisher = item(first, n.fisher);
  if (is(fisher, "model")) {
    whole.fisher = Whole::kModel;
  } else if (is(fisher, "group")) {
    whole.fisher = Whole::kGroup;
  } else if (is(fisher, "parameter")) {
    whole.fisher = Whole::kParameter;
  } else {
    return false;
  }
  PyObject* limit = item(first, n.max_grad_norm);
  if (limit != Py_None) {
    double value;
    if (!read_number(limit, false, value) || !(value > 0.0)) return false;
    whole.max_grad_norm = value;
  }
  return read_flag(item(first, n.skip_nonfinite), whole.skip_nonfinite);
}

// Looks up parameters in the optimizer's state. Entries usually stand in the order in which they are asked for; then
// no hash is taken, which for a tensor is a call into Python.
class StateReader {
 public:
  explicit StateReader(PyObject* state) : state_(state) { next(); }

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
  Py_ssize_t place_ = 0;
  PyObject *key_ = nullptr, *value_ = nullptr;
};

// Subclasses and traced or functionalized tensors have ways of their own; memory is not all there is to them.
bool plain(const at::Tensor& x) {
  const c10::TensorImpl* impl = x.unsafeGetTensorImpl();
  return !impl->is_python_dispatch() && !impl->key_set().has(c10::DispatchKey::Functionalize) &&
         !impl->key_set().has(c10::DispatchKey::FuncTorchBatched) &&
         !impl->key_set().has(c10::DispatchKey::FuncTorchGradWrapper);
}

class Step {
 public:
  // One step. Returns None if Python has to take it, nothing being changed; True for a plain step; for a guarded one
  // the pair of the gradients' norm before clipping, a 0-dimensional float64 tensor, and whether the step was skipped.
  py::object run(const py::handle& groups, const py::handle& state) {
    if (busy_ || c10::impl::TorchDispatchModeTLS::any_modes_set()) return py::none();
    const Busy busy(*this);
    if (!gather(groups.ptr(), state.ptr())) {
      PyErr_Clear();  // Python meets the same error in its own checks
      return py::none();
    }
    // A step over fewer elements is done before another thread of Python's would have started.
    if (roster_.tiling().elements() < (int64_t{1} << 21)) {
      compute();
    } else {
      roster_.hold();
      const py::gil_scoped_release unlocked;
      compute();
    }
    if (!whole_.guarded() || roster_.size() == 0) return py::bool_(true);
    return py::make_tuple(at::scalar_tensor(norm_, at::kDouble), skipped_);
  }

 private:
  // While a step runs without Python's lock, another thread may ask for one.
  struct Busy {
    explicit Busy(Step& step) : step(step) { step.busy_ = true; }
    ~Busy() {
      step.roster_.clear();
      step.busy_ = false;
    }
    Step& step;
  };

  bool gather(PyObject* groups, PyObject* state) {
    groups_.clear();
    group_of_.clear();
    whole_ = Whole();
    if (!PyList_Check(groups) || PyList_GET_SIZE(groups) == 0 || !PyDict_Check(state)) return false;
    if (!read_whole(groups, whole_)) return false;
    StateReader reader(state);
    int64_t ordinal = 0;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(groups); ++i) {
      Group group;
      if (!read_group(PyList_GET_ITEM(groups, i), group)) return false;
      for (Py_ssize_t j = 0; j < PyList_GET_SIZE(group.params); ++j, ++ordinal) {
        if (!enrol(PyList_GET_ITEM(group.params, j), group, reader, ordinal)) return false;
      }
      groups_.push_back(group.hyper);
    }
    return true;
  }

  bool enrol(PyObject* param, const Group& group, StateReader& reader, int64_t ordinal) {
    if (!is_tensor(param)) return false;
    const at::Tensor& w = THPVariable_Unpack(param);
    const at::Tensor& g = w.grad();
    PyObject* known = reader.in_turn(param);
    if (!g.defined()) return plain(w);
    if (known == nullptr) known = reader.find(param);
    if (known == nullptr || !PyDict_Check(known)) return false;
    PyObject* exp_avg = item(known, names().exp_avg);
    PyObject* step = item(known, names().step);
    if (!is_tensor(exp_avg) || !is_tensor(step)) return false;
    const at::Tensor& m = THPVariable_Unpack(exp_avg);
    const at::Tensor& t = THPVariable_Unpack(step);
    if (!plain(w) || !plain(g) || !plain(m) || !plain(t)) return false;
    const at::ScalarType natural = c10::promoteTypes(w.scalar_type(), at::kFloat);
    if (m.scalar_type() != group.state_dtype.value_or(natural)) return false;
    if (group.state_dtype && natural != at::kFloat) return false;
    const bool keeps = group.kahan && (w.scalar_type() == at::kBFloat16 || w.scalar_type() == at::kHalf);
    at::Tensor none;
    const at::Tensor* kahan = &none;
    if (keeps) {
      PyObject* kept = item(known, names().kahan);
      if (!is_tensor(kept)) return false;
      kahan = &THPVariable_Unpack(kept);
      if (!plain(*kahan) || kahan->numel() != w.numel()) return false;
    }
    if (roster_.add(w, g, m, *kahan, t, ordinal) != nullptr) return false;
    const Hyper& h = group.hyper;
    const double taken = 1.0 - h.momentum;
    roster_.record(roster_.size() - 1).decay = {h.momentum, taken * h.sign, taken * h.l2};
    group_of_.push_back(groups_.size());
    return true;
  }

  void compute() {
    mode_ = Mode();
    for (size_t i = 0; i < roster_.size(); ++i) mode_.weights |= hyper(i).l2 != 0.0;
    corrections_.resize(roster_.size());
    double momentum = -1.0;
    int64_t update = 0;
    for (size_t i = 0; i < roster_.size(); ++i) {
      const bool same = i > 0 && hyper(i).momentum == momentum && roster_.updates(i) + 1 == update;
      momentum = hyper(i).momentum;
      update = roster_.updates(i) + 1;
      corrections_[i] = same ? corrections_[i - 1] : bias_correction(momentum, update);
    }
    if (roster_.size() == 0) return;
    whole_.guarded() ? guarded() : plain_step();
  }

  // accumulate, then apply: sofim_fused/schedule.py, plain().
  void plain_step() {
    mode_.cross = whole_.gradient_form;
    roster_.key_random_bits(1);
    roster_.bump_moments();
    const auto products = run_pass(Pass::accumulate, roster_, mode_, scratch_);
    set_updates(blocks<PlainBlock>(products));
    roster_.bump_weights();
    mode_.gradient = whole_.gradient_form;
    run_pass(Pass::apply, roster_, mode_, scratch_);
    roster_.write_back(true, true);
    roster_.advance();
  }

  // dots, then commit: sofim_fused/schedule.py, guarded().
  void guarded() {
    const auto products = run_pass(Pass::dots, roster_, mode_, scratch_);
    double square = 0.0;
    for (const Products& p : products) square += p.gg;
    norm_ = std::sqrt(square);
    skipped_ = whole_.skip_nonfinite && !std::isfinite(square);
    if (skipped_) return;
    const double limit = whole_.max_grad_norm.value_or(kInfinity);
    const double gain = norm_ > limit ? limit / norm_ : 1.0;
    std::vector<PlainBlock> known;
    for (const GuardedBlock& block : blocks<GuardedBlock>(products)) known.push_back(block.at_gain(gain));
    set_updates(known);
    roster_.key_random_bits(1);
    roster_.bump_moments();
    roster_.bump_weights();
    mode_.gradient = whole_.gradient_form;
    mode_.scaled = gain != 1.0;
    mode_.gain = gain;
    run_pass(Pass::commit, roster_, mode_, scratch_);
    roster_.write_back(true, true);
    roster_.advance();
  }

  const Hyper& hyper(size_t i) const { return groups_[group_of_[i]]; }

  size_t block_of(size_t i) const {
    return whole_.fisher == Whole::kModel ? 0 : whole_.fisher == Whole::kGroup ? group_of_[i] : i;
  }

  // Weights tensors into Fisher blocks, in the order of tensors.
  template <class Block>
  std::vector<Block> blocks(const std::vector<Products>& products) const {
    std::vector<Block> result(whole_.fisher == Whole::kModel   ? 1
                              : whole_.fisher == Whole::kGroup ? groups_.size()
                                                               : roster_.size());
    for (size_t i = 0; i < roster_.size(); ++i) result[block_of(i)].add(hyper(i), corrections_[i], products[i]);
    return result;
  }

  void set_updates(const std::vector<PlainBlock>& blocks) {
    for (size_t i = 0; i < roster_.size(); ++i) {
      const Update u = sherman_morrison(hyper(i), corrections_[i], blocks[block_of(i)], whole_.gradient_form);
      roster_.record(i).update = {u.weight, u.gradient, u.moment};
    }
  }

  // Kept from step to step for their memory alone.
  Roster roster_;
  Whole whole_;
  Mode mode_;
  std::vector<Hyper> groups_;
  std::vector<size_t> group_of_;
  std::vector<double> corrections_;
  std::vector<double> scratch_;
  double norm_ = 0.0;
  bool skipped_ = false;
  bool busy_ = false;
};

}  // namespace
}  // namespace sofim

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using sofim::Step;
  m.doc() = "Native passes over the parameters of an optimizer.";
  m.def(
      "use_kernels",
      [](uintptr_t address) { sofim::use_kernels(reinterpret_cast<const sofim::Kernels*>(address)); },
      "Choose the passes of an instruction set: the attribute `kernels` of its module.");
  pybind11::class_<Step>(m, "Step", "A whole step over tensors on the CPU; keeps memory from one to the next.")
      .def(pybind11::init<>())
      .def("__call__", &Step::run, pybind11::arg("param_groups"), pybind11::arg("state"),
           "Takes a step: True if plain, (grad_norm, skipped) if guarded, None if it cannot and has changed nothing.");
}
