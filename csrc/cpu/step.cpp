// sofim_fused._C: a whole step in one call, for optimizers whose tensors all lie on the CPU.
//
// It does what SOFIM.step (sofim_fused/optimizer.py) does, and only where nothing is to be said about it: whatever it
// does not expect, a wrong value or a tensor without state, it leaves to Python, unchanged. For the passes on other
// devices, PackedStep gathers the tensors of a step in the same way.
#include <ATen/core/Tensor.h>
#include <ATen/ops/scalar_tensor.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "cpu/run_pass.h"
#include "gather/param_groups.h"
#include "gather/packed_step.h"

namespace sofim {
namespace {

namespace py = pybind11;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// What a gradient was like when it was taken, to notice by the end of the step that something was done to it since. Most
// of what writes to a tensor raises its version counter; all-reduces, `.data` and NumPy do not, and are seen in a few
// elements. No gradient is kept alive.
class Mark {
 public:
  void set(const at::Tensor& grad) {
    forget();
    if (!grad.defined()) return;
    there_ = true;
    grad_ = c10::weak_intrusive_ptr<c10::TensorImpl>(grad.getIntrusivePtr());
    version_ = version(grad);
    data_ = data(grad);
    elements_ = bits(grad, data_, shift_ = kFew);
    if (elements_ == 0) elements_ = bits(grad, data_, shift_ = kMany);  // zeros stay zeros under many a change
  }

  // While the weak reference is held, no other tensor can have its address.
  bool fits(const at::Tensor& grad) const {
    if (!grad.defined() || !there_) return grad.defined() == there_;
    return grad_._unsafe_get_target() == grad.unsafeGetTensorImpl() && version(grad) == version_ &&
           data(grad) == data_ && bits(grad, data_, shift_) == elements_;
  }

  void forget() {
    if (there_) grad_.reset();
    there_ = false;
  }

 private:
  static constexpr int kFew = 3, kMany = 6;  // powers of two

  // Parts of one larger memory share their counter: a write to another one is none to this.
  static int64_t version(const at::Tensor& x) {
    const bool shared = x.has_storage() && x.storage().nbytes() > x.nbytes();
    return shared || x.is_inference() ? 0 : static_cast<int64_t>(x.unsafeGetTensorImpl()->version_counter().current_version());
  }

  // Null where there is nothing to look at.
  static const void* data(const at::Tensor& x) {
    const bool readable = x.device().is_cpu() && x.layout() == at::kStrided && x.has_storage() &&
                          !x.key_set().has(c10::DispatchKey::Python) && x.numel() > 0;
    return readable ? x.const_data_ptr() : nullptr;
  }

  // The bits of 2 to the `shift` elements, evenly apart (or of all, if there are no more), as one number; 0 if all of
  // them are.
  static uint64_t bits(const at::Tensor& x, const void* data, int shift) {
    if (data == nullptr) return 0;
    switch (x.element_size()) {
      case 2: return sum<uint16_t>(x, data, shift);
      case 4: return sum<uint32_t>(x, data, shift);
      case 8: return sum<uint64_t>(x, data, shift);
      case 16: return sum<uint64_t, 2>(x, data, shift);
      default: return 0;
    }
  }

  template <class Word, int words = 1>
  static uint64_t sum(const at::Tensor& x, const void* data, int shift) {
    const auto* start = static_cast<const char*>(data);  // maybe at no multiple of an element's size
    const bool dense = x.is_non_overlapping_and_dense();  // every place in its memory is an element
    const int64_t size = x.numel();
    uint64_t result = 0;
    for (int64_t i = 0; i < int64_t{1} << shift; ++i) {
      int64_t offset = (size * i) >> shift;
      if (!dense) {
        offset = 0;
        for (int64_t d = 0; d < x.dim(); ++d) offset += ((x.size(d) * i) >> shift) * x.stride(d);
      }
      for (int j = 0; j < words; ++j) {
        Word word;
        std::memcpy(&word, start + (offset * words + j) * static_cast<int64_t>(sizeof(Word)), sizeof(Word));
        result += word * (kOdd + 2 * static_cast<uint64_t>(i + j));
      }
    }
    return result;
  }

  static constexpr uint64_t kOdd = 0x9E3779B97F4A7C15u;

  c10::weak_intrusive_ptr<c10::TensorImpl> grad_{c10::intrusive_ptr<c10::TensorImpl>()};
  const void* data_ = nullptr;
  int64_t version_ = 0;
  uint64_t elements_ = 0;
  int shift_ = kFew;
  bool there_ = false;
};

class Step {
 public:
  // One step. Returns None if Python has to take it, nothing being changed; True for a plain step; for a guarded one
  // the pair of the gradients' norm before clipping, a 0-dimensional float64 tensor, and whether the step was skipped.
  // The gradients are `grad_scale` times too large, and if `found_inf` is not 0, not all of them are finite. The last
  // argument, a counter of skipped steps, is for steps that end after their call has returned.
  py::object run(const py::handle& groups, const py::handle& state, const py::handle& grad_scale,
                 const py::handle& found_inf, const py::handle&) {
    if (busy_ || c10::impl::TorchDispatchModeTLS::any_modes_set()) return py::none();
    const Busy busy(*this);
    if (!param_groups_.read(groups.ptr(), state.ptr())) return py::none();
    OptionalScalar scale, found;
    if (!scale.read(grad_scale.ptr(), false) || !found.read(found_inf.ptr(), false)) return py::none();
    unscale_ = scale.there ? 1.0 / scale.value : 1.0;
    found_ = found.value != 0.0;
    guarded_ = options().guarded() || scale.there || found_;
    unlocked(param_groups_, [this] { compute(); });
    if (!guarded_ || tensors_.size() == 0) return py::bool_(true);
    return py::make_tuple(at::scalar_tensor(norm_, at::kDouble), skipped_);
  }

  // A step whose gradients come one by one (sofim_fused/in_backward.py): freeze_settings(), take() each of them, finish(). Each answers
  // false if Python has to do it, nothing being changed.

  // The parameters of the steps that follow, by group; none of them is kept alive, and addresses of those that are gone
  // may come again: see in_backward.py for how that is noticed.
  void watch(const std::vector<py::list>& groups) {
    watched_.clear();
    ends_.clear();
    for (const py::list& group : groups) {
      for (const py::handle& param : group) watched_.push_back(param.ptr());
      ends_.push_back(watched_.size());
    }
  }

  // Takes over what holds for all gradients of a step. `release`: the user lets go of each one when it was taken. Also
  // false if the parameters are others than those watched.
  bool freeze_settings(const py::handle& groups, bool release) {
    forget();
    release_ = release;
    return !busy_ && are_watched(groups.ptr()) && hook_groups_.read_settings(groups.ptr()) && !hook_groups_.options().guarded();
  }

  // From now on takes gradients that are parts of a larger memory too. They may be DistributedDataParallel's, for which
  // Python has to look before.
  void allow_parts() { parts_ = true; }

  // Notes what is now in the place of a parameter's gradient, as take() does: finish() will look for that.
  void mark(const py::handle& param, size_t ordinal) {
    if (ordinal < marks_.size()) marks_[ordinal].set(gradient_of(param));
  }

  // Whether a parameter's gradient is what it was when it was taken, as far as can be seen.
  bool fits(const py::handle& param, size_t ordinal) const {
    return ordinal < marks_.size() && marks_[ordinal].fits(gradient_of(param));
  }

  // Takes one gradient into its moment, and of the gradient form's step the part that is known. `again`: another one of
  // this parameter was taken in this step; they add up.
  bool take(const py::handle& param, const py::handle& state, size_t group, int64_t ordinal, bool again) {
    if (busy_ || c10::impl::TorchDispatchModeTLS::any_modes_set()) return false;
    const Busy busy(*this);
    if (!hook_groups_.read_one(param.ptr(), state.ptr(), group, ordinal)) return false;
    if (hook_groups_.options().gradient_form && is_narrow(hook_groups_.tensors().records()[0].w_type)) return false;
    const at::Tensor& grad = gradient_of(param);
    if (!parts_ && grad.storage().nbytes() > grad.nbytes()) return false;
    const size_t place = static_cast<size_t>(ordinal);
    if (consumed_.size() <= place) {
      consumed_.resize(place + 1);
      products_.resize(place + 1);
      marks_.resize(place + 1);
    }
    StepTensors& tensors = hook_groups_.tensors();
    Row& record = tensors.record(0);
    if (again) record.decay = {1.0, record.decay.g, 0.0};
    Mode mode;
    mode.weights = record.decay.w != 0.0;
    mode.cross = mode.gradient = hook_groups_.options().gradient_form;
    if (mode.gradient) {
      record.update = gradient_part(hook_groups_.hyper(0));
    }
    unlocked(hook_groups_, [&] {
      tensors.key_random_bits(1);
      tensors.bump_moments();
      if (mode.gradient) tensors.bump_weights();
      products_[place] = run_pass(Pass::accumulate, tensors, mode, scratch_)[0];
      tensors.write_back(mode.gradient, true);
    });
    consumed_[place] = true;
    release_ ? marks_[place].forget() : marks_[place].set(gradient_of(param));
    return true;
  }

  // The sums m·m, m·g and m·w of a parameter that was taken, else None.
  py::object sums_of(size_t ordinal) const {
    if (ordinal >= consumed_.size() || !consumed_[ordinal]) return py::none();
    const Products& p = products_[ordinal];
    return py::make_tuple(p.mm, p.mg, p.mw);
  }

  // The rest of the step, with the settings of `groups`. Also false if a parameter has a gradient that was not taken, if
  // something was done to one that was, or if the parameters of `current`, the optimizer's own groups, are others.
  bool finish(const py::handle& groups, const py::handle& state, const py::handle& current) {
    if (busy_ || c10::impl::TorchDispatchModeTLS::any_modes_set()) return false;
    if (!are_watched(current.ptr()) || !all_fit()) return false;
    const Busy busy(*this);
    if (!param_groups_.read(groups.ptr(), state.ptr(), &consumed_)) return false;
    unlocked(param_groups_, [this] {
      correct();
      std::vector<Products> products;
      for (size_t i = 0; i < tensors_.size(); ++i) products.push_back(products_[tensors_.ordinal(i)]);
      set_updates(blocks<PlainBlock>(products));
      for (size_t i = 0; i < tensors_.size() && options().gradient_form; ++i) {
        tensors_.record(i).update = {1.0, 0.0, tensors_.record(i).update.moment};
      }
      mode_ = Mode();
      tensors_.bump_weights();
      run_pass(Pass::apply, tensors_, mode_, scratch_);
      tensors_.write_back(true, false);
      tensors_.advance();
    });
    forget();
    return true;
  }

  // No gradient was taken.
  void forget() {
    consumed_.assign(consumed_.size(), false);
    for (Mark& mark : marks_) mark.forget();
  }

 private:
  // While a step runs without Python's lock, another thread may ask for one.
  struct Busy {
    explicit Busy(Step& step) : step(step) { step.busy_ = true; }
    ~Busy() {
      step.param_groups_.clear();
      step.hook_groups_.clear_tensors();
      step.busy_ = false;
    }
    Step& step;
  };

  // Without Python's lock, unless there is so little to do that no other thread of Python's would have started.
  template <class Work>
  static void unlocked(ParamGroups& param_groups, Work work) {
    if (param_groups.tensors().tiling().elements() < (int64_t{1} << 21)) return work();
    param_groups.hold();
    const py::gil_scoped_release released;
    work();
  }

  void compute() {
    mode_ = Mode();
    mode_.weights = param_groups_.l2();
    correct();
    if (tensors_.size() == 0) return;
    guarded_ ? guarded() : plain_step();
  }

  void correct() {
    corrections_.resize(tensors_.size());
    LastCorrection correction;
    for (size_t i = 0; i < tensors_.size(); ++i) {
      corrections_[i] = correction.of(param_groups_.hyper(i).momentum, tensors_.updates(i) + 1);
    }
  }

  // accumulate, then apply: sofim_fused/step/schedule.py, plain().
  void plain_step() {
    mode_.cross = options().gradient_form;
    tensors_.key_random_bits(1);
    tensors_.bump_moments();
    const auto products = run_pass(Pass::accumulate, tensors_, mode_, scratch_);
    set_updates(blocks<PlainBlock>(products));
    tensors_.bump_weights();
    mode_.gradient = options().gradient_form;
    run_pass(Pass::apply, tensors_, mode_, scratch_);
    tensors_.write_back(true, true);
    tensors_.advance();
  }

  // dots, then commit: sofim_fused/step/schedule.py, guarded().
  void guarded() {
    const auto products = run_pass(Pass::dots, tensors_, mode_, scratch_);
    double square = 0.0;
    for (const Products& p : products) square += p.gg;
    norm_ = std::sqrt(square) * unscale_;
    skipped_ = found_ || (options().skip_nonfinite && !std::isfinite(norm_));
    if (skipped_) return;
    const double limit = options().max_grad_norm.value_or(kInfinity);
    const double gain = (norm_ > limit ? limit / norm_ : 1.0) * unscale_;
    std::vector<PlainBlock> known;
    for (const GuardedBlock& block : blocks<GuardedBlock>(products)) known.push_back(block.at_gain(gain));
    set_updates(known);
    tensors_.key_random_bits(1);
    tensors_.bump_moments();
    tensors_.bump_weights();
    mode_.gradient = options().gradient_form;
    mode_.scaled = gain != 1.0;
    mode_.gain = gain;
    run_pass(Pass::commit, tensors_, mode_, scratch_);
    tensors_.write_back(true, true);
    tensors_.advance();
  }

  static const at::Tensor& gradient_of(const py::handle& param) {
    static const at::Tensor none;
    return THPVariable_Check(param.ptr()) ? THPVariable_Unpack(param.ptr()).unsafeGetTensorImpl()->grad() : none;
  }

  // Compares addresses alone; what was freed is not touched.
  bool are_watched(PyObject* groups) const {
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

  // To be called when all of watched_ are there.
  bool all_fit() const {
    for (size_t i = 0; i < consumed_.size(); ++i) {
      if (consumed_[i] && !(i < watched_.size() && marks_[i].fits(gradient_of(watched_[i])))) return false;
    }
    return true;
  }

  const Options& options() const { return param_groups_.options(); }

  size_t block_of(size_t i) const {
    return options().fisher == Fisher::model ? 0 : options().fisher == Fisher::group ? param_groups_.group_of(i) : i;
  }

  // Weights tensors into Fisher blocks, in the order of tensors.
  template <class Block>
  std::vector<Block> blocks(const std::vector<Products>& products) const {
    std::vector<Block> result(options().fisher == Fisher::model   ? 1
                              : options().fisher == Fisher::group ? param_groups_.groups().size()
                                                               : tensors_.size());
    for (size_t i = 0; i < tensors_.size(); ++i) result[block_of(i)].add(param_groups_.hyper(i), corrections_[i], products[i]);
    return result;
  }

  void set_updates(const std::vector<PlainBlock>& blocks) {
    for (size_t i = 0; i < tensors_.size(); ++i) {
      tensors_.record(i).update =
          sherman_morrison(param_groups_.hyper(i), corrections_[i], blocks[block_of(i)], options().gradient_form);
    }
  }

  // Kept from step to step for their memory alone.
  ParamGroups param_groups_;
  StepTensors& tensors_ = param_groups_.tensors();
  ParamGroups hook_groups_;
  // By ordinal:
  std::vector<PyObject*> watched_;
  std::vector<size_t> ends_;  // by group: the ordinal after its last one
  std::vector<char> consumed_;
  std::vector<Mark> marks_;
  std::vector<Products> products_;
  Mode mode_;
  std::vector<double> corrections_;
  std::vector<double> scratch_;
  double unscale_ = 1.0;  // what makes the true gradients of those that are there
  double norm_ = 0.0;
  bool guarded_ = false, found_ = false, skipped_ = false;
  bool busy_ = false;
  bool release_ = false;
  bool parts_ = false;
};

}  // namespace
}  // namespace sofim

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using sofim::Step;
  using sofim::PackedStep;
  m.doc() = "Native passes over the parameters of an optimizer.";
  m.def(
      "use_kernels",
      [](uintptr_t address) { sofim::use_kernels(reinterpret_cast<const sofim::Kernels*>(address)); },
      "Choose the passes of an instruction set: the attribute `kernels` of its module.");
  pybind11::class_<Step>(m, "Step", "A whole step over tensors on the CPU; keeps memory from one to the next.")
      .def(pybind11::init<>())
      .def("__call__", &Step::run, pybind11::arg("param_groups"), pybind11::arg("state"),
           pybind11::arg("grad_scale") = pybind11::none(), pybind11::arg("found_inf") = pybind11::none(),
           pybind11::arg("counter") = pybind11::none(),
           "Takes a step: True if plain, (grad_norm, skipped) if guarded, None if it cannot and has changed nothing.")
      .def("watch", &Step::watch, pybind11::arg("groups"),
           "Names the parameters of the steps that follow, a list of them for each group.")
      .def("freeze_settings", &Step::freeze_settings, pybind11::arg("param_groups"), pybind11::arg("release"),
           "Takes over what holds for the gradients that are taken next; False if it cannot.")
      .def("take", &Step::take, pybind11::arg("param"), pybind11::arg("state"), pybind11::arg("group"),
           pybind11::arg("ordinal"), pybind11::arg("again"),
           "Takes a parameter's gradient into its moment; False if it cannot and has changed nothing.")
      .def("sums_of", &Step::sums_of, pybind11::arg("ordinal"),
           "The sums (mm, mg, mw) of a parameter whose gradient was taken in this step, else None.")
      .def("allow_parts", &Step::allow_parts, "Lets take() take gradients that are parts of a larger memory.")
      .def("mark", &Step::mark, pybind11::arg("param"), pybind11::arg("ordinal"),
           "Notes what is now in the place of a taken gradient, as take() does.")
      .def("fits", &Step::fits, pybind11::arg("param"), pybind11::arg("ordinal"),
           "Whether a parameter's gradient is what it was when it was taken, as far as can be seen.")
      .def("finish", &Step::finish, pybind11::arg("param_groups"), pybind11::arg("state"), pybind11::arg("current"),
           "Takes the rest of the step; False if it cannot and has changed nothing.")
      .def("forget", &Step::forget, "Starts anew: no gradient was taken.");
  pybind11::class_<PackedStep>(m, "PackedStep",
                          "The tensors of a step as one table; see its twin, sofim_fused.backends.table.PackedStep.")
      .def(pybind11::init([](int64_t tile) {
             if (tile < 1) throw pybind11::value_error("tile: at least 1 element is needed");
             return std::make_unique<PackedStep>(tile);
           }),
           pybind11::arg("tile"))
      .def(
          "gather",
          [](PackedStep& packed, const pybind11::handle& groups, const pybind11::handle& state) {
            return packed.gather(groups.ptr(), state.ptr());
          },
          pybind11::arg("param_groups"), pybind11::arg("state"),
          "Gathers and validates a step's tensors: what differs from the last time, or None, nothing being changed.")
      .def("finish", &PackedStep::finish, pybind11::arg("weights"), pybind11::arg("moments"), pybind11::arg("steps"),
           "Takes copies home, raises the version counters of what was written, and lets go of all tensors.")
      .def_property_readonly("size", &PackedStep::size)
      .def_property_readonly("tiles", &PackedStep::tiles)
      .def_property_readonly("kinds", &PackedStep::kinds)
      .def_property_readonly("rows", &PackedStep::rows)
      .def_property_readonly("hyper", &PackedStep::hyper)
      .def_property_readonly("scalars", &PackedStep::scalars)
      .def_property_readonly("device", &PackedStep::device)
      .def_property_readonly("gradient_form", [](const PackedStep& packed) { return packed.options().gradient_form; })
      .def_property_readonly("fisher",
                             [](const PackedStep& packed) {
                               const char* const names[] = {"model", "group", "parameter"};
                               return names[static_cast<int>(packed.options().fisher)];
                             })
      .def_property_readonly("max_grad_norm", [](const PackedStep& packed) { return packed.options().max_grad_norm; })
      .def_property_readonly("skip_nonfinite", [](const PackedStep& packed) { return packed.options().skip_nonfinite; })
      .def_property_readonly("l2", &PackedStep::l2)
      .def_property_readonly("decoupled", &PackedStep::decoupled);
}
