// Reads an optimizer's groups and state: the tensors of one step, and their settings.
//
// Handles only inputs for which SOFIM.step (sofim_fused/optimizer.py) needs no error or warning. Everything else, such
// as a wrong value or a tensor without state, falls back to Python.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/python_headers.h>

#include <optional>
#include <vector>

#include "gather/step_tensors.h"
#include "step/adaptive.h"
#include "step/solve.h"

namespace sofim {

// The tensor that a Python object is; nullptr if it is none. These three are here so that only one file includes torch's
// header for them, which takes 11 s to compile.
const at::Tensor* tensor_of(PyObject* object);
// Sets a parameter's gradient to None.
void drop_gradient(PyObject* param);
// A tensor as a Python object, a new reference.
PyObject* object_of(const at::Tensor& tensor);

// Settings that all groups share.
struct Options {
  Numerator numerator = Numerator::moment;
  bool adaptive = false;  // the groups' diagonals adapt
  bool rank_one = true;   // with a diagonal that adapts: some rho is a number, so that F has its term of rank one
  Fisher fisher = Fisher::model;
  std::optional<double> max_grad_norm;
  bool skip_nonfinite = false;

  bool reads_gradient() const { return sofim::reads_gradient(numerator); }
  bool guarded() const { return max_grad_norm || skip_nonfinite; }
};

// A hyperparameter that is a tensor on a device other than the CPU; its group's Hyper has NaN in its place.
struct DeviceScalar {
  size_t group;
  enum Name { kLr, kRho } name;
  at::Tensor value;
};

// An optional argument of a step: None, a number, or a tensor of one element.
struct OptionalScalar {
  bool there = false;
  double value = 0.0;
  at::Tensor device_scalar;  // defined: it has the value, on a device other than the CPU

  // False if Python has to check it. `anywhere`: a tensor may be on any device.
  bool read(PyObject* object, bool anywhere);
};

class ParamGroups {
 public:
  // `anywhere`: all tensors may be on any one device, and lr and rho on others. Otherwise all have to be on the CPU.
  // `adapts`: diagonals may adapt; otherwise read() leaves such steps to Python. `codes`: see StepTensors.
  explicit ParamGroups(bool anywhere = false, bool adapts = false, bool codes = false)
      : anywhere_(anywhere), adapts_(adapts), codes_(codes || !anywhere), tensors_(anywhere, codes) {}
  ~ParamGroups() { clear(); }
  ParamGroups(const ParamGroups&) = delete;
  ParamGroups& operator=(const ParamGroups&) = delete;

  // Returns false, with nothing changed, if Python has to take this step. What was read stays valid while Python's lock
  // is held and no Python code runs, or after hold(). `groups` and `state` may be of any type.
  // `consumed`: for each parameter, by its ordinal, whether its gradient has already entered its moment. Then only the
  // parameters for which it has are read, each also in the place of its gradient, and no other may have a gradient.
  bool read(PyObject* groups, PyObject* state, const std::vector<char>* consumed = nullptr);
  // Reads settings alone; they stay until the next clear().
  bool read_settings(PyObject* groups);
  // After read_settings(): reads one parameter that has a gradient, in the place of the one before. `place`: where its
  // entry in `state` may be, as PyDict_Next() has it; if it is elsewhere, it is looked up by its hash.
  bool read_one(PyObject* param, PyObject* state, size_t group, int64_t ordinal, Py_ssize_t place);
  // Keeps every tensor alive until clear().
  void hold() { tensors_.hold(); }
  // clear() drops everything that was read; clear_tensors() keeps the settings. Call them with Python's lock held.
  // Releasing tensors may run Python code, which must not call this object.
  void clear();
  void clear_tensors();

  StepTensors& tensors() { return tensors_; }
  const StepTensors& tensors() const { return tensors_; }
  const Options& options() const { return options_; }
  const std::vector<Hyper>& groups() const { return groups_; }
  const std::vector<DeviceScalar>& device_scalars() const { return device_scalars_; }
  size_t group_of(size_t i) const { return group_of_[i]; }
  const Hyper& hyper(size_t i) const { return groups_[group_of_[i]]; }
  // Of a step whose diagonal adapts.
  const AdaptiveHyper& adaptive(size_t i) const { return adaptive_of_group(group_of_[i]); }
  const AdaptiveHyper& adaptive_of_group(size_t group) const { return settings_[group].adaptive; }
  // Whether some tensor has L2 weight decay.
  bool l2() const;

 private:
  // A group's settings.
  struct Group {
    Hyper hyper;
    Diagonal diagonal = Diagonal::identity;
    AdaptiveHyper adaptive;
    std::optional<at::ScalarType> state_dtype;
    bool codes = false;  // moments are codes, of tensors that suit them
    bool kahan = true;
    bool master = false;  // bfloat16 weights are halves of float32 ones; else `kahan` is for them, too
    bool cut = false;     // if so: these have 24 bits
    PyObject* params = nullptr;
  };
  struct Entries;
  class States;

  bool read_everything(PyObject* groups, PyObject* state, const std::vector<char>* consumed);
  bool read_group(PyObject* dict, Group& group);
  bool read_rho(PyObject* object, Group& group);
  bool read_scalar(PyObject* object, DeviceScalar::Name name, double& value);
  bool add_param(PyObject* param, const Group& group, size_t index, States& states, int64_t ordinal,
                 const std::vector<char>* consumed);

  const bool anywhere_, adapts_, codes_;
  // Members, so that their memory is reused from step to step.
  StepTensors tensors_;
  Options options_;
  std::vector<Hyper> groups_;
  std::vector<Group> settings_;
  std::vector<DeviceScalar> device_scalars_;
  std::vector<size_t> group_of_;
};

}  // namespace sofim
