// sofim_fused._C: the Python module of the CPU part. PackedStep also gathers the tensors of steps on other devices.
#include <torch/csrc/utils/pybind.h>

#include <memory>

#include "cpu/parallel.h"
#include "cpu/step.h"
#include "gather/packed_step.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using sofim::Step;
  using sofim::PackedStep;
  m.doc() = "Native passes over the parameters of an optimizer.";
  m.def(
      "use_kernels",
      [](uintptr_t address) { sofim::use_kernels(reinterpret_cast<const sofim::Kernels*>(address)); },
      "Choose the passes of an instruction set: the attribute `kernels` of its module.");
  pybind11::class_<Step>(m, "Step", "A whole step over tensors on the CPU; keeps its buffers from one to the next.")
      .def(pybind11::init<>())
      .def("__call__", &Step::run, pybind11::arg("param_groups"), pybind11::arg("state"),
           pybind11::arg("grad_scale") = pybind11::none(), pybind11::arg("found_inf") = pybind11::none(),
           pybind11::arg("counter") = pybind11::none(),
           "Takes a step. Returns True after a plain one, (grad_norm, skipped) after a guarded one, and None, with"
           " nothing changed, if Python has to take it.")
      .def("watch", &Step::watch, pybind11::arg("groups"),
           "Sets the parameters of the steps that follow, one list for each group.")
      .def("freeze_settings", &Step::freeze_settings, pybind11::arg("param_groups"), pybind11::arg("release"),
           "Copies the settings for the gradients that are taken next; False if Python has to take them.")
      .def("take", &Step::take, pybind11::arg("param"), pybind11::arg("state"), pybind11::arg("group"),
           pybind11::arg("ordinal"), pybind11::arg("again"),
           "Adds a parameter's gradient to its moment; False, with nothing changed, if Python has to do so.")
      .def("sums_of", &Step::sums_of, pybind11::arg("ordinal"),
           "The sums (mm, mg, mw) of a parameter whose gradient was taken in this step, else None.")
      .def("allow_parts", &Step::allow_parts, "Lets take() accept gradients that are parts of a larger memory block.")
      .def("mark", &Step::mark, pybind11::arg("param"), pybind11::arg("ordinal"),
           "Records a parameter's current gradient as the one that was taken, as take() does.")
      .def("fits", &Step::fits, pybind11::arg("param"), pybind11::arg("ordinal"),
           "Whether a parameter's gradient is still the recorded one, as far as can be seen.")
      .def("finish", &Step::finish, pybind11::arg("param_groups"), pybind11::arg("state"), pybind11::arg("current"),
           "Takes the rest of the step; False, with nothing changed, if Python has to do so.")
      .def("forget", &Step::forget, "Discards all records: no gradient was taken.");
  pybind11::class_<PackedStep>(
      m, "PackedStep",
      "The tensors of a step packed into one table; sofim_fused.backends.triton.step.PackedStep documents it.")
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
          "Gathers and validates a step's tensors. Returns what differs from the last time, or None, with nothing"
          " changed, if Python has to take the step.")
      .def("finish", &PackedStep::finish, pybind11::arg("weights"), pybind11::arg("moments"), pybind11::arg("steps"),
           "Writes copies back, raises the version counters of what was written, and releases all tensors.")
      .def_property_readonly("size", &PackedStep::size)
      .def_property_readonly("tiles", &PackedStep::tiles)
      .def_property_readonly("kinds", &PackedStep::kinds)
      .def_property_readonly("rows", &PackedStep::rows)
      .def_property_readonly("hyper", &PackedStep::hyper)
      .def_property_readonly("scalars", &PackedStep::scalars)
      .def_property_readonly("device", &PackedStep::device)
      .def_property_readonly("numerator",
                             [](const PackedStep& packed) {
                               const char* const names[] = {"moment", "gradient", "nesterov"};
                               return names[static_cast<int>(packed.options().numerator)];
                             })
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
