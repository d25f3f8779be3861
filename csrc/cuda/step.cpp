// sofim_fused._cuda: a whole step in one call, for optimizers whose tensors are all on one GPU. Like
// sofim_fused._C.Step, it handles only inputs that need no error or warning; everything else falls back to Python.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/utils/pybind.h>

#include <limits>
#include <optional>
#include <string>

#include "gather/param_groups.h"
#include "cuda/launch.h"
#include "cuda/scaled_step.h"

namespace sofim::cuda {
namespace {

namespace py = pybind11;

// A step of at most this many tiles takes one launch. On an H200 one launch instead of two saves 1 µs on the GPU and
// 6 µs on the host with 23 tiles, and costs 10 µs on the GPU with 1,622, as fewer blocks fit at once.
constexpr uint32_t kSingleUpTo = 256;

class Step {
 public:
  // One step, in one launch (`single`), in two (not `single`), or as its size suggests (none). Returns None, with
  // nothing changed, if Python has to take it; True for a plain step; for a guarded one a pair of 0-dimensional tensors
  // on the device: the gradients' norm before clipping (float64), and 1 if the step was skipped, else 0 (int64). The
  // gradients are `grad_scale` times too large, and if `found_inf` is not 0, not all of them are finite. `counter`: an
  // int64 tensor of one element or None. If it is on the device, a skipped step raises it, and the pair has None as its
  // second value. For a small model, another kernel to do so would take as long as a quarter of the step. With a
  // diagonal that adapts and the term of rank one, a third value is the signal of each Fisher block, and the other two
  // are None without a guard.
  py::object run(const py::handle& groups, const py::handle& state, const py::handle& grad_scale,
                 const py::handle& found_inf, std::optional<bool> single, std::optional<at::Tensor> counter) {
    if (busy_ || c10::impl::TorchDispatchModeTLS::any_modes_set()) return py::none();
    const Busy busy(*this);
    if (!param_groups_.read(groups.ptr(), state.ptr())) return py::none();
    OptionalScalar scale, found;
    if (!scale.read(grad_scale.ptr(), true) || !found.read(found_inf.ptr(), true)) return py::none();
    found.there &= found.device_scalar.defined() || found.value != 0.0;
    const bool guarded = options().guarded() || scale.there || found.there;
    StepTensors& tensors = param_groups_.tensors();
    if (tensors.size() == 0) return py::bool_(true);
    if (tensors.device().type() != kDevice) return py::none();
    if (options().adaptive && !ScaledStep::takes(tensors)) return py::none();
    const DeviceScope on(tensors.device());
    pack();
    set_guard(guarded, scale, found);
    Task& task = packed_.task;
    at::Tensor norm, skipped;
    if (guarded) {
      const auto options = at::TensorOptions(at::kDouble).device(tensors.device());
      norm = at::empty({}, options);
      const bool counts = counter && counter->device() == tensors.device() && counter->scalar_type() == at::kLong &&
                          counter->numel() == 1;
      if (!counts) counter = skipped = at::zeros({}, options.dtype(at::kLong));
      task.norm = norm.mutable_data_ptr<double>();
      task.skipped = counter->mutable_data_ptr<int64_t>();
    }
    if (options().adaptive) {
      tensors.bump_moments();
      tensors.bump_variances();
      tensors.bump_weights();
      tensors.bump_steps();
      if (guarded && !skipped.defined() && !counter->is_inference()) counter->unsafeGetTensorImpl()->bump_version();
      const at::Tensor signal = scaled_.run(param_groups_, packed_, task.norm, task.skipped, on);
      tensors.write_back(true, true);
      if (!guarded && !signal.defined()) return py::bool_(true);
      const auto given = [](const at::Tensor& x) { return x.defined() ? py::cast(x) : py::object(py::none()); };
      return py::make_tuple(given(norm), given(skipped), given(signal));
    }
    // Memory that a graph uses must not be used by eager steps as well, and is freed with the graph.
    Memory own;
    Memory& memory = on.captured() ? own : memory_;
    memory.serve(task, tensors.device(), on.stream());
    if (!guarded) task.skip = nullptr;
    memory.serve_table(task, packed_.rows, packed_.groups, tensors.device(), on.stream());
    tensors.bump_moments();
    tensors.bump_weights();
    tensors.bump_steps();
    if (guarded && !skipped.defined() && !counter->is_inference()) counter->unsafeGetTensorImpl()->bump_version();
    launch_all(single.value_or(task.tiles <= kSingleUpTo), on.stream());
    tensors.write_back(true, true);
    if (!guarded) return py::bool_(true);
    return py::make_tuple(norm, skipped.defined() ? py::cast(skipped) : py::none());
  }

 private:
  // Marks the object as busy: releasing tensors may run Python code, which may call it again.
  struct Busy {
    explicit Busy(Step& step) : step(step) { step.busy_ = true; }
    ~Busy() {
      step.param_groups_.clear();
      step.kept_.clear();
      step.busy_ = false;
    }
    Step& step;
  };

  const Options& options() const { return param_groups_.options(); }

  void pack() {
    const StepTensors& tensors = param_groups_.tensors();
    const size_t groups = param_groups_.groups().size();
    packed_.take(tensors, groups);
    for (size_t i = 0; i < tensors.size(); ++i) {
      packed_.rows[i].group = static_cast<uint32_t>(param_groups_.group_of(i));
    }
    for (size_t i = 0; i < groups; ++i) {
      packed_.groups[i].hyper = param_groups_.groups()[i];
      packed_.groups[i].decay = decay_of(param_groups_.groups()[i]);
    }
    for (const DeviceScalar& device_scalar : param_groups_.device_scalars()) {
      Group& group = packed_.groups[device_scalar.group];
      const bool lr = device_scalar.name == DeviceScalar::kLr;
      (lr ? group.lr : group.rho) = on_device(device_scalar.value, lr ? group.lr_double : group.rho_double);
    }
    packed_.form.gradient = options().reads_gradient();
    Task& task = packed_.task;
    task.l2 = param_groups_.l2();
    task.fisher = options().fisher;
    task.numerator = options().numerator;
  }

  void set_guard(bool guarded, const OptionalScalar& scale, const OptionalScalar& found) {
    Task& task = packed_.task;
    task.finish = guarded ? Finish::guarded : Finish::plain;
    GuardInputs& guard = task.guard;
    guard.limit = options().max_grad_norm.value_or(std::numeric_limits<double>::infinity());
    guard.skip_nonfinite = options().skip_nonfinite;
    guard.grad_scale = given(scale, guard.scale_double);
    guard.found_inf = given(found, guard.found_double);
  }

  const void* given(const OptionalScalar& number, bool& wide) {
    if (!number.there) return nullptr;
    if (number.device_scalar.defined()) return on_device(number.device_scalar, wide);
    const auto options = at::TensorOptions(at::kDouble).device(param_groups_.tensors().device());
    kept_.push_back(at::full({}, number.value, options));
    return on_device(kept_.back(), wide);
  }

  // The address from which kernels can read a number, a float32 or (wide) a float64.
  const void* on_device(at::Tensor value, bool& wide) {
    const at::Device device = param_groups_.tensors().device();
    if (value.device() != device || (value.scalar_type() != at::kFloat && value.scalar_type() != at::kDouble)) {
      value = value.detach().to(device, at::kDouble, /*non_blocking=*/true);
      kept_.push_back(value);
    }
    wide = value.scalar_type() == at::kDouble;
    return value.const_data_ptr();
  }

  void launch_all(bool single, void* stream) {
    const Task& task = packed_.task;
    const Form& form = packed_.form;
    const Row* const rows = packed_.rows.data();
    const Group* const groups = packed_.groups.data();
    if (single && cooperates_) {
      const int blocks = step_blocks_once();
      const int error = blocks > 0 ? launch_step(form, task, rows, groups, blocks, stream) : 0;
      if (blocks > 0 && error == 0) return;
      if (!refused(error)) check(error);
      if (error != 0) {
        // Nothing has run: another process holds a part of the device.
        cooperates_ = false;
        const std::string text =
            std::string("a step in one launch was refused (") + error_text(error) + "); from now on it takes two";
        if (PyErr_WarnEx(PyExc_UserWarning, text.c_str(), 1) != 0) throw py::error_already_set();
      }
    }
    const bool guarded = task.finish == Finish::guarded;
    check((guarded ? launch_dots : launch_accumulate)(form, task, rows, groups, stream));
    check((guarded ? launch_commit : launch_apply)(form, task, rows, groups, stream));
  }

  // step_blocks() asks the driver, so that the answer for the last kernel is remembered.
  int step_blocks_once() {
    const Form& f = packed_.form;
    const Task& task = packed_.task;
    const int device = param_groups_.tensors().device().index();
    const int kernel = device * 64 + static_cast<int>(f.types) * 16 + f.gradient * 4 + is_small(task) * 2 +
                       (task.finish == Finish::guarded);
    if (kernel != kernel_) {
      check(step_blocks(f, task, &blocks_));
      kernel_ = kernel;
    }
    return blocks_;
  }

  // Members, so that their memory is reused from step to step.
  ParamGroups param_groups_{true, true};
  Packed packed_;
  Memory memory_;
  ScaledStep scaled_;
  std::vector<at::Tensor> kept_;
  int kernel_ = std::numeric_limits<int>::min(), blocks_ = 0;
  bool cooperates_ = true;
  bool busy_ = false;
};

}  // namespace
}  // namespace sofim::cuda

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using sofim::cuda::Step;
  m.doc() = "Native passes over the parameters of an optimizer on a GPU.";
#if defined(SOFIM_EMULATED)
  m.attr("emulated") = true;
  m.def("launches", [] { return emulator::launches.load(); }, "How many kernels were launched so far.");
  m.def("set_idle", [](bool idle) { emulator::idle = idle; }, pybind11::arg("idle"), "Whether kernels do nothing.");
#else
  m.attr("emulated") = false;
#endif
  m.attr("TILE") = sofim::cuda::kTile;
  m.attr("SMALL_ARGUMENTS") = sofim::cuda::kSmall;
  m.attr("ARGUMENTS") = sofim::cuda::largest_arguments();
  m.def("tiles_of", &sofim::cuda::tiles_of, pybind11::arg("numel"), "How many tiles a tensor of so many elements has.");
  m.def("fit", &sofim::cuda::fit, pybind11::arg("size"), pybind11::arg("tensors"), pybind11::arg("groups"),
        "Whether so many tensors and groups fit into kernel arguments of `size` bytes; else a table on the GPU is"
        " used.");
  pybind11::class_<Step>(m, "Step", "A whole step over tensors on a GPU; keeps its buffers from one to the next.")
      .def(pybind11::init<>())
      .def("__call__", &Step::run, pybind11::arg("param_groups"), pybind11::arg("state"),
           pybind11::arg("grad_scale") = pybind11::none(), pybind11::arg("found_inf") = pybind11::none(),
           pybind11::arg("single") = pybind11::none(), pybind11::arg("counter") = pybind11::none(),
           "Takes a step. Returns True after a plain one, (grad_norm, skipped) after a guarded one, and None, with"
           " nothing changed, if Python has to take it. If `counter` is on the GPU, `skipped` is None, and a skipped"
           " step raises the counter.");
}
