#include "cpu/step.h"

#include <ATen/core/Tensor.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <unordered_map>

#include "cpu/blocks.h"
#include "gather/cpu_tensor.h"

namespace sofim {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
// A step over at least this many elements releases Python's lock. A smaller one ends before another thread would start.
constexpr int64_t kUnlockFrom = int64_t{1} << 21;

bool modes_are_set() { return c10::impl::TorchDispatchModeTLS::any_modes_set(); }

const at::Tensor& gradient_of(PyObject* param) {
  static const at::Tensor none;
  const at::Tensor* w = tensor_of(param);
  return w != nullptr ? w->unsafeGetTensorImpl()->grad() : none;
}

struct Unlocked {
  Unlocked() : thread(PyEval_SaveThread()) {}
  ~Unlocked() { PyEval_RestoreThread(thread); }
  Unlocked(const Unlocked&) = delete;
  PyThreadState* thread;
};

// Calls `work`, without Python's lock if there is much to do.
template <class Work>
void unlocked(ParamGroups& param_groups, Work work) {
  if (param_groups.tensors().tiling().elements() < kUnlockFrom) return work();
  param_groups.hold();
  const Unlocked unlocked;
  work();
}

}  // namespace

// Marks the object as busy: while a step runs without Python's lock, another thread may call it.
struct Step::Busy {
  explicit Busy(Step& step) : step(step) { step.busy_ = true; }
  ~Busy() {
    if (stays) return;
    step.param_groups_.clear();
    step.hook_groups_.clear_tensors();
    step.busy_ = false;
  }
  void stay() { stays = true; }  // until another Busy ends
  Step& step;
  bool stays = false;
};

PyObject* Step::run(PyObject* groups, PyObject* state, PyObject* grad_scale, PyObject* found_inf) {
  if (busy_ || modes_are_set()) Py_RETURN_NONE;
  const Busy busy(*this);
  if (!param_groups_.read(groups, state)) Py_RETURN_NONE;
  OptionalScalar scale, found;
  if (!scale.read(grad_scale, false) || !found.read(found_inf, false)) Py_RETURN_NONE;
  unscale_ = scale.there ? 1.0 / scale.value : 1.0;
  found_ = found.value != 0.0;
  if (tensors_.size() == 0) Py_RETURN_TRUE;
  const bool is_guarded = options().guarded() || scale.there || found_;
  signal_.clear();
  unlocked(param_groups_, [&] {
    options().adaptive ? adaptive_step(is_guarded) : is_guarded ? guarded_step() : plain_step();
  });
  if (!is_guarded && signal_.empty()) Py_RETURN_TRUE;
  return results(is_guarded);
}

PyObject* Step::results(bool is_guarded) const {
  PyObject *norm = Py_NewRef(Py_None), *skip = Py_NewRef(Py_None), *signal = Py_NewRef(Py_None);
  if (is_guarded) {
    at::Tensor value = cpu_tensor({}, at::kDouble);
    *value.mutable_data_ptr<double>() = guard_.norm;
    norm = object_of(value);
    skip = PyBool_FromLong(guard_.skip);
  }
  if (!signal_.empty()) {
    at::Tensor values = cpu_tensor({static_cast<int64_t>(signal_.size())}, at::kDouble);
    std::copy(signal_.begin(), signal_.end(), values.mutable_data_ptr<double>());
    signal = object_of(values);
  }
  return Py_BuildValue("(NNN)", norm, skip, signal);
}

// The stages of a step

// sofim_fused/step/schedule.py, plain().
void Step::plain_step() {
  find_corrections();
  solve(fold<PlainBlock>(accumulate()));
  apply();
}

std::vector<Products> Step::accumulate() {
  Mode mode;
  mode.weights = param_groups_.l2();
  mode.cross = options().reads_gradient();
  tensors_.key_random_bits(1);
  tensors_.bump_moments();
  return run_pass(Pass::accumulate, tensors_.records(), tensors_.tiling(), mode, scratch_);
}

void Step::apply() {
  Mode mode;
  mode.weights = param_groups_.l2();
  mode.cross = mode.gradient = options().reads_gradient();
  tensors_.bump_weights();
  run_pass(Pass::apply, tensors_.records(), tensors_.tiling(), mode, scratch_);
  tensors_.write_back(true, true);
  tensors_.advance();
}

// sofim_fused/step/schedule.py, guarded().
void Step::guarded_step() {
  find_corrections();
  const std::vector<Products> products = dots();
  double square = 0.0;
  for (const Products& p : products) square += p.gg;
  guard_ = guard_of(square, unscale_, options().max_grad_norm.value_or(kInfinity), found_, options().skip_nonfinite);
  if (guard_.skip) return;
  solve(at_gain(fold<GuardedBlock>(products)));
  commit();
}

std::vector<Products> Step::dots() {
  Mode mode;
  mode.weights = param_groups_.l2();
  return run_pass(Pass::dots, tensors_.records(), tensors_.tiling(), mode, scratch_);
}

std::vector<PlainBlock> Step::at_gain(const std::vector<GuardedBlock>& polynomials) const {
  std::vector<PlainBlock> blocks;
  for (const GuardedBlock& block : polynomials) blocks.push_back(block.at_gain(guard_.gain));
  return blocks;
}

void Step::commit() {
  tensors_.key_random_bits(1);
  tensors_.bump_moments();
  tensors_.bump_weights();
  Mode mode;
  mode.weights = param_groups_.l2();
  mode.gradient = options().reads_gradient();
  mode.scaled = guard_.gain != 1.0;
  mode.gain = guard_.gain;
  run_pass(Pass::commit, tensors_.records(), tensors_.tiling(), mode, scratch_);
  tensors_.write_back(true, true);
  tensors_.advance();
}

// sofim_fused/step/schedule.py, adaptive().
void Step::adaptive_step(bool is_guarded) {
  find_corrections();
  const size_t n = tensors_.size();
  mixes_.resize(n);
  LastCorrection correction;
  for (size_t i = 0; i < n; ++i) {
    const AdaptiveHyper& hyper = param_groups_.adaptive(i);
    mixes_[i] = {hyper.beta2, hyper.eps, std::sqrt(correction.of(hyper.beta2, tensors_.updates(i) + 1))};
  }
  sweeps_.begin(&tensors_.record(0), tensors_.variances(), tensors_.tiling(), mixes_.data());
  if (is_guarded) {
    const double limit = options().max_grad_norm.value_or(kInfinity);
    guard_ = guard_of(sweeps_.squares(), unscale_, limit, found_, options().skip_nonfinite);
    if (guard_.skip) return;
    sweeps_.set_gain(guard_.gain);
  }
  tensors_.key_random_bits(1);
  tensors_.bump_moments();
  tensors_.bump_variances();
  tensors_.bump_weights();
  Mode mode;
  mode.cross = mode.gradient = options().reads_gradient();
  const auto solve = [&](const std::vector<AdaptiveBlock>* blocks) {
    for (size_t i = 0; i < n; ++i) {
      tensors_.record(i).update = scaled_update(param_groups_.hyper(i), corrections_[i], options().numerator,
                                                blocks == nullptr ? nullptr : &(*blocks)[block_of(i)]);
    }
  };
  if (!options().rank_one) {
    solve(nullptr);
    mode.updates = true;
    sweeps_.enter(mode);
  } else {
    const std::vector<ScaledProducts> products = sweeps_.enter(mode);
    std::vector<AdaptiveBlock> blocks(fisher_blocks(options().fisher, param_groups_.groups().size(), n));
    for (size_t i = 0; i < n; ++i) {
      blocks[block_of(i)].add(param_groups_.hyper(i), corrections_[i], products[i], options().numerator);
    }
    solve(&blocks);
    for (const AdaptiveBlock& block : blocks) signal_.push_back(block.signal());
    sweeps_.apply(mode);
  }
  tensors_.write_back(true, true);
  tensors_.advance();
}

void Step::find_corrections() {
  corrections_.resize(tensors_.size());
  LastCorrection correction;
  for (size_t i = 0; i < tensors_.size(); ++i) {
    corrections_[i] = correction.of(param_groups_.hyper(i).momentum, tensors_.updates(i) + 1);
  }
}

size_t Step::block_of(size_t i) const {
  return fisher_block_of(options().fisher, param_groups_.group_of(i), i);
}

// Adds each tensor's part to its Fisher block, in the order of tensors.
template <class Block>
std::vector<Block> Step::fold(const std::vector<Products>& products, const std::vector<size_t>* class_of,
                              size_t classes) const {
  std::vector<Block> every(classes * blocks());
  for (size_t i = 0; i < tensors_.size(); ++i) {
    const size_t of = class_of == nullptr ? 0 : (*class_of)[tensors_.ordinal(i)];
    every[of * blocks() + block_of(i)].add(param_groups_.hyper(i), corrections_[i], products[i], options().numerator);
  }
  return every;
}

size_t Step::blocks() const {
  return fisher_blocks(options().fisher, param_groups_.groups().size(), tensors_.size());
}

// Each tensor's coefficients from the totals of its Fisher block.
void Step::solve(const std::vector<PlainBlock>& blocks) {
  for (size_t i = 0; i < tensors_.size(); ++i) {
    tensors_.record(i).update =
        sherman_morrison(param_groups_.hyper(i), corrections_[i], blocks[block_of(i)], options().numerator);
  }
}

// In two halves

PyObject* Step::begin_sharded(PyObject* groups, PyObject* state, bool is_guarded, PyObject* class_of, size_t classes) {
  if (busy_ || modes_are_set()) Py_RETURN_NONE;
  Busy busy(*this);
  if (!param_groups_.read(groups, state) || options().adaptive || tensors_.size() == 0) Py_RETURN_NONE;
  std::vector<size_t> numbers(static_cast<size_t>(PyList_GET_SIZE(class_of)));
  for (size_t i = 0; i < numbers.size(); ++i) {
    numbers[i] = PyLong_AsSize_t(PyList_GET_ITEM(class_of, static_cast<Py_ssize_t>(i)));
    if (numbers[i] >= classes) {
      if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "class_of: a class is not below `classes`");
      return nullptr;
    }
  }
  if (tensors_.ordinal(tensors_.size() - 1) >= numbers.size()) {
    PyErr_SetString(PyExc_ValueError, "class_of: a class for each parameter is needed");
    return nullptr;
  }
  param_groups_.hold();
  at::Tensor totals, squares = cpu_tensor({static_cast<int64_t>(classes)}, at::kDouble);
  double* const square = squares.mutable_data_ptr<double>();
  std::fill_n(square, classes, 0.0);
  {
    const Unlocked unlocked;
    find_corrections();
    const std::vector<Products> products = is_guarded ? dots() : accumulate();
    for (size_t i = 0; i < products.size() && is_guarded; ++i) square[numbers[tensors_.ordinal(i)]] += products[i].gg;
    const Numerator numerator = options().numerator;
    const auto stored = [&](auto every) { totals = tensor_of(every, classes, numerator); };
    is_guarded ? stored(fold<GuardedBlock>(products, &numbers, classes))
               : stored(fold<PlainBlock>(products, &numbers, classes));
  }
  busy.stay();
  half_ = true;
  half_guarded_ = is_guarded;
  return Py_BuildValue("(NN)", object_of(totals), object_of(squares));
}

PyObject* Step::finish_sharded(PyObject* blocks, PyObject* square, PyObject* grad_scale, PyObject* found_inf) {
  if (!half_) {
    PyErr_SetString(PyExc_RuntimeError, "no step was begun");
    return nullptr;
  }
  half_ = false;
  const Busy busy(*this);
  const at::Tensor* totals = tensor_of(blocks);
  OptionalScalar sum, scale, found;
  if (totals == nullptr || !sum.read(square, false) || !scale.read(grad_scale, false) ||
      !found.read(found_inf, false)) {
    PyErr_SetString(PyExc_TypeError, "a tensor of totals and numbers, or tensors of one element, are needed");
    return nullptr;
  }
  signal_.clear();
  const Numerator numerator = options().numerator;
  if (!half_guarded_) {
    solve(blocks_of<PlainBlock>(*totals, this->blocks(), numerator));
    const Unlocked unlocked;
    apply();
  } else {
    const double unscale = scale.there ? 1.0 / scale.value : 1.0, limit = options().max_grad_norm.value_or(kInfinity);
    guard_ = guard_of(sum.value, unscale, limit, found.value != 0.0, options().skip_nonfinite);
    if (!guard_.skip) {
      solve(at_gain(blocks_of<GuardedBlock>(*totals, this->blocks(), numerator)));
      const Unlocked unlocked;
      commit();
    }
  }
  if (!half_guarded_) Py_RETURN_TRUE;
  return results(true);
}

void Step::cancel_sharded() {
  if (!half_) return;
  half_ = false;
  const Busy busy(*this);
}

// Gradient by gradient

void Step::watch(PyObject* groups) {
  watched_.clear();
  watched_group_.clear();
  ends_.clear();
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(groups); ++i) {
    PyObject* group = PyList_GET_ITEM(groups, i);
    for (Py_ssize_t j = 0; j < PyList_GET_SIZE(group); ++j) watched_.push_back(PyList_GET_ITEM(group, j));
    ends_.push_back(watched_.size());
    watched_group_.resize(watched_.size(), static_cast<size_t>(i));
  }
}

bool Step::freeze_settings(PyObject* groups, bool release) {
  forget();
  release_ = release;
  searched_ = false;
  if (busy_ || !are_watched(groups) || !hook_groups_.read_settings(groups)) return false;
  const Options& options = hook_groups_.options();
  return !options.guarded() && !(options.adaptive && options.rank_one);
}

void Step::mark(PyObject* param, size_t ordinal) {
  if (ordinal < records_.size()) records_[ordinal].set(gradient_of(param));
}

bool Step::fits(PyObject* param, size_t ordinal) const {
  return ordinal < records_.size() && records_[ordinal].fits(gradient_of(param));
}

void Step::serve_hooks(PyObject* state, PyObject* progress) {
  Py_XSETREF(state_, Py_NewRef(state));
  Py_XSETREF(progress_, Py_NewRef(progress));
}

void Step::leave_hooks() {
  Py_CLEAR(state_);
  Py_CLEAR(progress_);
}

bool Step::take_from_hook(PyObject* param, size_t ordinal) {
  const auto place = static_cast<Py_ssize_t>(ordinal);
  const auto nothing_taken = [&] {
    return progress_ != nullptr && place < PyByteArray_GET_SIZE(progress_) && ordinal < watched_group_.size() &&
           PyByteArray_AS_STRING(progress_)[place] == 0;
  };
  if (!nothing_taken() || !take(param, state_, watched_group_[ordinal], static_cast<int64_t>(ordinal), false)) {
    return false;
  }
  if (nothing_taken()) PyByteArray_AS_STRING(progress_)[place] = kWhole;  // otherwise another thread has ended the step
  if (release_) drop_gradient(param);
  return true;
}

bool Step::take(PyObject* param, PyObject* state, size_t group, int64_t ordinal, bool again) {
  if (busy_ || modes_are_set()) return false;
  const Busy busy(*this);
  if (!hook_groups_.read_one(param, state, group, ordinal, place_in_state(param, state, ordinal))) return false;
  const Numerator numerator = hook_groups_.options().numerator;
  const Row& given = hook_groups_.tensors().records()[0];
  const bool rounds_twice = reads_gradient(numerator) && is_narrow(given.w_type) && (!given.master || given.cut);
  const bool whole = hook_groups_.options().adaptive;  // then nothing is left for finish()
  if (whole ? again : rounds_twice) return false;
  const at::Tensor& grad = gradient_of(param);
  if (!parts_ && grad.storage().nbytes() > grad.nbytes()) return false;
  const size_t place = static_cast<size_t>(ordinal);
  if (consumed_.size() <= place) {
    consumed_.resize(place + 1);
    products_.resize(place + 1);
    records_.resize(place + 1);
  }
  whole ? unlocked(hook_groups_, [this] { take_whole(); }) : take_part(place, again);
  consumed_[place] = true;
  release_ ? records_[place].forget() : records_[place].set(gradient_of(param));
  return true;
}

// Looking a tensor up by its hash calls Python, so the places of all parameters are found at once and then checked.
Py_ssize_t Step::place_in_state(PyObject* param, PyObject* state, int64_t ordinal) {
  if (!PyDict_Check(state)) return 0;
  const auto i = static_cast<size_t>(ordinal);
  PyObject *key, *value;
  for (;;) {
    Py_ssize_t place = i < places_.size() ? places_[i] : 0;
    const Py_ssize_t found = place;
    if (PyDict_Next(state, &place, &key, &value) && key == param) return found;
    if (searched_) return 0;
    searched_ = true;
    std::unordered_map<PyObject*, Py_ssize_t> all;
    place = 0;
    for (Py_ssize_t at = 0; PyDict_Next(state, &place, &key, &value); at = place) all.emplace(key, at);
    places_.assign(watched_.size(), 0);
    for (size_t j = 0; j < watched_.size(); ++j) {
      if (const auto it = all.find(watched_[j]); it != all.end()) places_[j] = it->second;
    }
  }
}

// The gradient enters its moment, and its term in the step the weight.
void Step::take_part(size_t place, bool again) {
  const Numerator numerator = hook_groups_.options().numerator;
  StepTensors& tensors = hook_groups_.tensors();
  Row& row = tensors.record(0);
  if (again) row.decay = {1.0, row.decay.g, 0.0};
  Mode mode;
  mode.weights = row.decay.w != 0.0;
  mode.cross = mode.gradient = reads_gradient(numerator);
  if (mode.gradient) {
    const Hyper& hyper = hook_groups_.hyper(0);
    const bool ahead = numerator == Numerator::nesterov;
    row.update = gradient_part(hyper, ahead ? bias_correction(hyper.momentum, tensors.updates(0) + 1) : 1.0, numerator);
  }
  unlocked(hook_groups_, [&] {
    tensors.key_random_bits(1);
    tensors.bump_moments();
    if (mode.gradient) tensors.bump_weights();
    products_[place] = run_pass(Pass::accumulate, tensors.records(), tensors.tiling(), mode, scratch_)[0];
    tensors.write_back(mode.gradient, true);
  });
}

// The step of a tensor whose diagonal adapts, by which no other tensor's is affected: F has no term of rank one.
// sofim_fused/step/schedule.py, adaptive_alone().
void Step::take_whole() {
  StepTensors& tensors = hook_groups_.tensors();
  const Hyper& hyper = hook_groups_.hyper(0);
  const AdaptiveHyper& adaptive = hook_groups_.adaptive(0);
  const Numerator numerator = hook_groups_.options().numerator;
  const int64_t update = tensors.updates(0) + 1;
  const Mix mix{adaptive.beta2, adaptive.eps, std::sqrt(bias_correction(adaptive.beta2, update))};
  sweeps_.begin(&tensors.record(0), tensors.variances(), tensors.tiling(), &mix);
  tensors.key_random_bits(1);
  tensors.bump_moments();
  tensors.bump_variances();
  tensors.bump_weights();
  tensors.record(0).update = scaled_update(hyper, bias_correction(hyper.momentum, update), numerator, nullptr);
  Mode mode;
  mode.cross = mode.gradient = reads_gradient(numerator);
  mode.updates = true;
  sweeps_.enter(mode);
  tensors.write_back(true, true);
  tensors.advance();
}

const Products* Step::sums_of(size_t ordinal) const {
  return ordinal < consumed_.size() && consumed_[ordinal] ? &products_[ordinal] : nullptr;
}

bool Step::finish(PyObject* groups, PyObject* state, PyObject* current) {
  if (busy_ || modes_are_set()) return false;
  if (!are_watched(current) || !all_fit()) return false;
  const Busy busy(*this);
  if (!param_groups_.read(groups, state, &consumed_)) return false;
  if (options().adaptive) {  // take() has taken all of it
    forget();
    return true;
  }
  unlocked(param_groups_, [this] {
    find_corrections();
    std::vector<Products> products;
    for (size_t i = 0; i < tensors_.size(); ++i) products.push_back(products_[tensors_.ordinal(i)]);
    solve(fold<PlainBlock>(products));
    for (size_t i = 0; i < tensors_.size() && options().reads_gradient(); ++i) {  // take() applied the other terms
      tensors_.record(i).update = {1.0, 0.0, tensors_.record(i).update.moment};
    }
    tensors_.key_random_bits(1);
    tensors_.bump_weights();
    run_pass(Pass::apply, tensors_.records(), tensors_.tiling(), Mode(), scratch_);
    tensors_.write_back(true, false);
    tensors_.advance();
  });
  forget();
  return true;
}

void Step::forget() {
  leave_hooks();
  consumed_.assign(consumed_.size(), false);
  for (GradientRecord& record : records_) record.forget();
}

// Compares addresses alone, and reads nothing there: a parameter may have been freed.
bool Step::are_watched(PyObject* groups) const {
  static PyObject* const params = PyUnicode_InternFromString("params");
  if (!PyList_Check(groups) || static_cast<size_t>(PyList_GET_SIZE(groups)) != ends_.size()) return false;
  size_t ordinal = 0;
  for (size_t i = 0; i < ends_.size(); ++i) {
    PyObject* group = PyList_GET_ITEM(groups, i);
    PyObject* list = PyDict_Check(group) ? PyDict_GetItem(group, params) : nullptr;
    if (list == nullptr || !PyList_Check(list)) return false;
    if (static_cast<size_t>(PyList_GET_SIZE(list)) != ends_[i] - ordinal) return false;
    for (Py_ssize_t j = 0; ordinal < ends_[i]; ++j, ++ordinal) {
      if (watched_[ordinal] != PyList_GET_ITEM(list, j)) return false;
    }
  }
  return true;
}

// To be called only if none of the parameters in watched_ was freed.
bool Step::all_fit() const {
  for (size_t i = 0; i < consumed_.size(); ++i) {
    if (consumed_[i] && !(i < watched_.size() && records_[i].fits(gradient_of(watched_[i])))) return false;
  }
  return true;
}

}  // namespace sofim
