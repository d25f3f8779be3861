// A whole step in one call, for optimizers whose tensors all lie on the CPU; or a step gradient by gradient.
//
// It does what SOFIM.step (sofim_fused/optimizer.py) does, but handles only inputs that need no error or warning:
// everything else falls back to Python, unchanged.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/python_headers.h>

#include <cstdint>
#include <vector>

#include "cpu/adaptive.h"
#include "cpu/gradient_record.h"
#include "cpu/parallel.h"
#include "gather/param_groups.h"

namespace sofim {

class Step {
 public:
  ~Step() { leave_hooks(); }

  // One step. Returns None, with nothing changed, if Python has to take it; True for a step without results; for a
  // guarded one the pair of the gradients' norm before clipping, a 0-dimensional float64 tensor, and whether the step
  // was skipped. If the diagonal adapts and F has its term of rank one, a third value is the signal of each Fisher
  // block, a float64 vector (None if the step was skipped); the others are None without a guard. The gradients are
  // `grad_scale` times too large, and if `found_inf` is not 0, not all of them are finite. The result is a new
  // reference, or nullptr with an exception in Python.
  PyObject* run(PyObject* groups, PyObject* state, PyObject* grad_scale, PyObject* found_inf);

  // A step of which other ranks hold a part, in two halves; what lies between them is sofim_fused/step/sharded.py.

  // The first half: sums over this rank's tensors, float64 [classes, numbers, Fisher blocks] as fold() has them, and for
  // a guarded step the sum of all squares, [classes]. Nothing but moments is changed, and by a guarded step nothing.
  // `class_of`: a list with a class for each parameter. None, with nothing changed, if Python has to take the step, and
  // nullptr with an exception in Python. After tensors were returned, finish_sharded() or cancel_sharded() has to follow.
  PyObject* begin_sharded(PyObject* groups, PyObject* state, bool is_guarded, PyObject* class_of, size_t classes);
  // The second half, from the totals over ranks: [numbers, Fisher blocks] and, for a guarded step, the sum of squares.
  // `grad_scale` and `found_inf` as for run(). The result is that of run().
  PyObject* finish_sharded(PyObject* blocks, PyObject* square, PyObject* grad_scale, PyObject* found_inf);
  void cancel_sharded();

  // A step whose gradients come one by one (sofim_fused/in_backward.py): freeze_settings(), take() for each of them,
  // finish(). Each returns false, with nothing changed, if Python has to do it.

  // The parameters of the following steps: a list with a list for each group. None of them is kept alive. The address of a freed one may be used
  // again: in_backward.py says how that is noticed.
  void watch(PyObject* groups);
  // Copies the settings that apply to all gradients of a step. `release`: the user frees each gradient after it was
  // taken. Also false if the parameters are not those watched.
  bool freeze_settings(PyObject* groups, bool release);
  // After freeze_settings(): take_from_hook() takes gradients, until leave_hooks() or forget(). `state` is the
  // optimizer's. `progress` is a bytearray with a byte for each parameter, kWhole if its gradient was taken, 0 if not.
  void serve_hooks(PyObject* state, PyObject* progress);
  void leave_hooks();
  // What in_backward.InBackward.on_gradient does with a parameter's only gradient of a step. False, with nothing
  // changed, if that has to do it.
  bool take_from_hook(PyObject* param, size_t ordinal);
  // From now on, take() accepts gradients that are parts of a larger block of memory. DistributedDataParallel may own
  // that, which Python checks first.
  void allow_parts() { parts_ = true; }
  // Records a parameter's current gradient, or that it has none, as take() does: finish() compares with the record.
  void mark(PyObject* param, size_t ordinal);
  // Whether a parameter's gradient is the recorded one, as far as can be seen.
  bool fits(PyObject* param, size_t ordinal) const;
  // Adds one gradient to its moment; if the step has a term in the gradient, also updates the weight by it; if the
  // diagonal adapts, takes all of the parameter's step. `again`: this parameter had another gradient taken in this step;
  // they add up.
  bool take(PyObject* param, PyObject* state, size_t group, int64_t ordinal, bool again);
  // The sums of a parameter whose gradient was taken (mg and mw only if they are needed), else nullptr.
  const Products* sums_of(size_t ordinal) const;
  // The rest of the step, with the settings of `groups`. Also false if a parameter has a gradient that was not taken,
  // if a gradient was changed since, or if the parameters of `current`, the optimizer's own groups, are not those
  // watched.
  bool finish(PyObject* groups, PyObject* state, PyObject* current);
  // Discards all records of gradients that were taken.
  void forget();

 private:
  struct Busy;
  static constexpr char kWhole = 2;  // in_backward._WHOLE

  const Options& options() const { return param_groups_.options(); }
  bool are_watched(PyObject* groups) const;
  bool all_fit() const;
  // Where a parameter's entry in the optimizer's state probably is, as PyDict_Next() has it.
  Py_ssize_t place_in_state(PyObject* param, PyObject* state, int64_t ordinal);

  // The stages of a step, over what param_groups_ has gathered.
  void plain_step();
  void guarded_step();
  void adaptive_step(bool is_guarded);
  // The results of a step as Python takes them; see run().
  PyObject* results(bool is_guarded) const;
  // What take() does, with one tensor in hook_groups_.
  void take_part(size_t place, bool again);
  void take_whole();
  void find_corrections();
  template <class Block>
  std::vector<Block> fold(const std::vector<Products>& products, const std::vector<size_t>* class_of = nullptr,
                          size_t classes = 1) const;
  size_t blocks() const;
  // The two sweeps of a plain and of a guarded step.
  std::vector<Products> accumulate();
  void apply();
  std::vector<Products> dots();
  void commit();
  std::vector<PlainBlock> at_gain(const std::vector<GuardedBlock>& polynomials) const;
  void solve(const std::vector<PlainBlock>& blocks);
  size_t block_of(size_t i) const;

  // Members, so that their memory is reused from step to step.
  ParamGroups param_groups_{false, true};
  StepTensors& tensors_ = param_groups_.tensors();
  ParamGroups hook_groups_;
  // By ordinal:
  std::vector<PyObject*> watched_;
  std::vector<size_t> watched_group_;
  std::vector<size_t> ends_;  // by group: the ordinal after its last one
  std::vector<Py_ssize_t> places_;
  std::vector<char> consumed_;
  std::vector<GradientRecord> records_;
  std::vector<Products> products_;
  std::vector<double> corrections_;  // by tensor of the step
  std::vector<Mix> mixes_;           // the same, if the diagonal adapts
  std::vector<double> signal_;       // by Fisher block
  AdaptiveSweeps sweeps_;
  std::vector<double> scratch_;
  double unscale_ = 1.0;  // times the gradients: the true gradients
  bool found_ = false;
  Guard guard_;  // of the last guarded step
  PyObject *state_ = nullptr, *progress_ = nullptr;  // own references; those of serve_hooks()
  bool busy_ = false;
  bool half_ = false, half_guarded_ = false;  // between begin_sharded() and finish_sharded()
  bool searched_ = false;  // for places_, since freeze_settings()
  bool release_ = false;
  bool parts_ = false;
};

}  // namespace sofim
