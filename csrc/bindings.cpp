// sofim_fused._C: the Python module of the CPU part. PackedStep also gathers the tensors of steps on other devices.
//
// In Python's own C interface, because pybind11 takes 9 s to compile here, and each call of a step 0.3 µs longer. All
// arguments are positional.
#include <torch/csrc/Device.h>
#include <torch/csrc/python_headers.h>

#include <structmember.h>

#include <cstddef>
#include <exception>
#include <memory>
#include <new>

#include "cpu/parallel.h"
#include "cpu/step.h"
#include "gather/packed_step.h"

#define SOFIM_TEXT(x) SOFIM_QUOTED(x)
#define SOFIM_QUOTED(x) #x
#define SOFIM_JOIN(a, b) SOFIM_JOINED(a, b)
#define SOFIM_JOINED(a, b) a##b

namespace {

using sofim::PackedStep;
using sofim::Step;

// A Python object that owns a T. `call` is for types that can be called, `weak` for those that weak references may be
// made to.
template <class T>
struct Object {
  PyObject_HEAD
  vectorcallfunc call;
  PyObject* weak;
  T* value;
};

template <class T>
T& value_of(PyObject* object) {
  return *reinterpret_cast<Object<T>*>(object)->value;
}

struct Release {
  void operator()(PyObject* object) const { Py_DECREF(object); }
};
using Owned = std::unique_ptr<PyObject, Release>;

// Python's error indicator is set.
struct PythonError : std::exception {};

// The result of `body`; or, if it throws, nullptr and an exception in Python.
template <class Body>
PyObject* translated(Body body) noexcept {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  } catch (const std::exception& error) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_RuntimeError, error.what());
  } catch (...) {
    PyErr_SetString(PyExc_RuntimeError, "sofim_fused: an unknown exception");
  }
  return nullptr;
}

void require(bool accepted, const char* what) {
  if (accepted) return;
  PyErr_SetString(PyExc_TypeError, what);
  throw PythonError();
}

// Arguments

bool flag(PyObject* object) {
  require(PyBool_Check(object), "True or False is needed");
  return object == Py_True;
}

// A place in a list.
size_t place(PyObject* object) {
  const size_t value = PyLong_AsSize_t(object);
  if (value == static_cast<size_t>(-1) && PyErr_Occurred()) throw PythonError();
  return value;
}

// Results

PyObject* none() { Py_RETURN_NONE; }

// A method with `count` arguments.
template <class T, int count, PyObject* (*body)(T&, PyObject* const*)>
PyObject* method(PyObject* self, PyObject* const* arguments, Py_ssize_t given) {
  if (given != count) return PyErr_Format(PyExc_TypeError, "%d arguments are needed, not %zd", count, given);
  return translated([&] { return body(value_of<T>(self), arguments); });
}

template <class T, int count, PyObject* (*body)(T&, PyObject* const*)>
PyMethodDef method_def(const char* name, const char* text) {
  // Python's interface has one type for functions of all kinds; the flag says which kind this is.
  const auto function = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(method<T, count, body>));
  return {name, function, METH_FASTCALL, text};
}

template <PyObject* (*body)(const PackedStep&)>
PyGetSetDef attribute(const char* name) {
  const getter get = [](PyObject* self, void*) { return translated([&] { return body(value_of<PackedStep>(self)); }); };
  return {name, get, nullptr, nullptr, nullptr};
}

// Step

PyObject* call(PyObject* self, PyObject* const* arguments, size_t flags, PyObject* keywords) {
  const Py_ssize_t given = PyVectorcall_NARGS(flags);
  if (given < 2 || given > 5 || (keywords != nullptr && PyTuple_GET_SIZE(keywords) > 0)) {
    PyErr_SetString(PyExc_TypeError, "param_groups and state are needed, and at most grad_scale, found_inf and counter");
    return nullptr;
  }
  // The counter of skipped steps is for devices on which the step ends after the call.
  return translated([&] {
    return value_of<Step>(self).run(arguments[0], arguments[1], given > 2 ? arguments[2] : Py_None,
                                    given > 3 ? arguments[3] : Py_None);
  });
}

PyObject* begin_sharded(Step& step, PyObject* const* arguments) {
  require(PyList_Check(arguments[3]), "class_of: a list is needed");
  return step.begin_sharded(arguments[0], arguments[1], flag(arguments[2]), arguments[3], place(arguments[4]));
}

PyObject* finish_sharded(Step& step, PyObject* const* arguments) {
  return step.finish_sharded(arguments[0], arguments[1], arguments[2], arguments[3]);
}

PyObject* cancel_sharded(Step& step, PyObject* const*) {
  step.cancel_sharded();
  return none();
}

PyObject* watch(Step& step, PyObject* const* arguments) {
  PyObject* groups = arguments[0];
  require(PyList_Check(groups), "groups: a list of lists is needed");
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(groups); ++i) {
    require(PyList_Check(PyList_GET_ITEM(groups, i)), "groups: a list of lists is needed");
  }
  step.watch(groups);
  return none();
}

PyObject* freeze_settings(Step& step, PyObject* const* arguments) {
  return PyBool_FromLong(step.freeze_settings(arguments[0], flag(arguments[1])));
}

PyObject* serve_hooks(Step& step, PyObject* const* arguments) {
  require(PyDict_Check(arguments[0]), "state: a dict is needed");
  require(PyByteArray_Check(arguments[1]), "progress: a bytearray is needed");
  step.serve_hooks(arguments[0], arguments[1]);
  return none();
}

PyObject* leave_hooks(Step& step, PyObject* const*) {
  step.leave_hooks();
  return none();
}

PyObject* take(Step& step, PyObject* const* arguments) {
  const size_t group = place(arguments[2]);
  const int64_t ordinal = static_cast<int64_t>(place(arguments[3]));
  return PyBool_FromLong(step.take(arguments[0], arguments[1], group, ordinal, flag(arguments[4])));
}

PyObject* sums_of(Step& step, PyObject* const* arguments) {
  const sofim::Products* p = step.sums_of(place(arguments[0]));
  return p == nullptr ? none() : Py_BuildValue("(ddd)", p->mm, p->mg, p->mw);
}

PyObject* allow_parts(Step& step, PyObject* const*) {
  step.allow_parts();
  return none();
}

PyObject* mark(Step& step, PyObject* const* arguments) {
  step.mark(arguments[0], place(arguments[1]));
  return none();
}

PyObject* fits(Step& step, PyObject* const* arguments) {
  return PyBool_FromLong(step.fits(arguments[0], place(arguments[1])));
}

PyObject* finish(Step& step, PyObject* const* arguments) {
  return PyBool_FromLong(step.finish(arguments[0], arguments[1], arguments[2]));
}

PyObject* forget(Step& step, PyObject* const*) {
  step.forget();
  return none();
}

PyMethodDef step_methods[] = {
    method_def<Step, 5, begin_sharded>(
        "begin_sharded",
        "begin_sharded($self, param_groups, state, guarded, class_of, classes, /)\n--\n\n"
        "The first half of a step of which other ranks hold a part: the Fisher blocks of each class, float64 [classes, k,"
        " B], and the sum of squares of each, [classes]. None, with nothing changed, if Python has to take the step."),
    method_def<Step, 4, finish_sharded>(
        "finish_sharded",
        "finish_sharded($self, blocks, square, grad_scale, found_inf, /)\n--\n\n"
        "The second half, from the totals over ranks, [k, B] and a number; the result is that of a whole step."),
    method_def<Step, 0, cancel_sharded>("cancel_sharded",
                                        "cancel_sharded($self, /)\n--\n\nThere will be no second half."),
    method_def<Step, 1, watch>("watch",
                               "watch($self, groups, /)\n--\n\n"
                               "Sets the parameters of the steps that follow, one list for each group."),
    method_def<Step, 2, freeze_settings>(
        "freeze_settings",
        "freeze_settings($self, param_groups, release, /)\n--\n\n"
        "Copies the settings for the gradients that are taken next; False if Python has to take them."),
    method_def<Step, 2, serve_hooks>(
        "serve_hooks",
        "serve_hooks($self, state, progress, /)\n--\n\n"
        "Lets each Hook take its gradient without Python, until leave_hooks() or forget(). A gradient that was taken is"
        " a 2 in `progress`, which has a byte for each parameter, 0 at first."),
    method_def<Step, 0, leave_hooks>("leave_hooks",
                                     "leave_hooks($self, /)\n--\n\nFrom now on each Hook calls Python."),
    method_def<Step, 5, take>(
        "take",
        "take($self, param, state, group, ordinal, again, /)\n--\n\n"
        "Adds a parameter's gradient to its moment; False, with nothing changed, if Python has to do so."),
    method_def<Step, 1, sums_of>(
        "sums_of",
        "sums_of($self, ordinal, /)\n--\n\n"
        "The sums (mm, mg, mw) of a parameter whose gradient was taken in this step, else None."),
    method_def<Step, 0, allow_parts>(
        "allow_parts",
        "allow_parts($self, /)\n--\n\nLets take() accept gradients that are parts of a larger memory block."),
    method_def<Step, 2, mark>(
        "mark",
        "mark($self, param, ordinal, /)\n--\n\n"
        "Records a parameter's current gradient as the one that was taken, as take() does."),
    method_def<Step, 2, fits>(
        "fits",
        "fits($self, param, ordinal, /)\n--\n\n"
        "Whether a parameter's gradient is still the recorded one, as far as can be seen."),
    method_def<Step, 3, finish>(
        "finish",
        "finish($self, param_groups, state, current, /)\n--\n\n"
        "Takes the rest of the step; False, with nothing changed, if Python has to do so."),
    method_def<Step, 0, forget>("forget",
                                "forget($self, /)\n--\n\nDiscards all records: no gradient was taken."),
    {},
};

template <class T>
void destroy(PyObject* object) {
  PyTypeObject* type = Py_TYPE(object);
  if (reinterpret_cast<Object<T>*>(object)->weak != nullptr) PyObject_ClearWeakRefs(object);
  delete &value_of<T>(object);
  type->tp_free(object);
  Py_DECREF(type);
}

// Hook

// A parameter's hook. It holds no more than a weak reference to the Step, which holds the optimizer's state, whose keys
// are parameters, which hold their hooks.
struct Hook {
  PyObject_HEAD
  vectorcallfunc call;
  PyObject* python;  // called with the parameter where Step leaves the gradient to Python
  PyObject* step;    // a weak reference; nullptr: none
  PyObject* weak;
  size_t ordinal;
};

// The Step, a new reference; nullptr if there is none.
PyObject* step_of(const Hook& hook) {
  if (hook.step == nullptr) return nullptr;
#if PY_VERSION_HEX >= 0x030D0000
  PyObject* step = nullptr;
  if (PyWeakref_GetRef(hook.step, &step) < 0) PyErr_Clear();
  return step;
#else
  PyObject* step = PyWeakref_GET_OBJECT(hook.step);
  return step == Py_None ? nullptr : Py_NewRef(step);
#endif
}

PyObject* on_gradient(PyObject* self, PyObject* const* arguments, size_t flags, PyObject* keywords) {
  if (PyVectorcall_NARGS(flags) != 1 || (keywords != nullptr && PyTuple_GET_SIZE(keywords) > 0)) {
    PyErr_SetString(PyExc_TypeError, "one argument is needed: the parameter");
    return nullptr;
  }
  return translated([&]() -> PyObject* {
    const Hook& hook = *reinterpret_cast<const Hook*>(self);
    if (const Owned step{step_of(hook)}) {
      if (value_of<Step>(step.get()).take_from_hook(arguments[0], hook.ordinal)) return none();
    }
    return PyObject_CallOneArg(hook.python, arguments[0]);
  });
}

PyObject* new_hook(PyTypeObject* type, PyObject* arguments, PyObject* keywords) {
  static const char* const names[] = {"python", nullptr};
  PyObject* python;
  if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "O:Hook", const_cast<char**>(names), &python)) return nullptr;
  auto* hook = reinterpret_cast<Hook*>(type->tp_alloc(type, 0));
  if (hook == nullptr) return nullptr;
  hook->call = on_gradient;
  hook->python = Py_NewRef(python);
  return reinterpret_cast<PyObject*>(hook);
}

void destroy_hook(PyObject* object) {
  PyTypeObject* type = Py_TYPE(object);
  auto* hook = reinterpret_cast<Hook*>(object);
  PyObject_GC_UnTrack(object);
  if (hook->weak != nullptr) PyObject_ClearWeakRefs(object);
  Py_CLEAR(hook->python);
  Py_CLEAR(hook->step);
  type->tp_free(object);
  Py_DECREF(type);
}

int visit_hook(PyObject* object, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(object));
  Py_VISIT(reinterpret_cast<Hook*>(object)->python);
  return 0;
}

int clear_hook(PyObject* object) {
  Py_CLEAR(reinterpret_cast<Hook*>(object)->python);
  return 0;
}

// place(step, ordinal); place(None, 0) leaves everything to Python.
PyObject* place_hook(PyObject* self, PyObject* const* arguments, Py_ssize_t given) {
  if (given != 2) return PyErr_Format(PyExc_TypeError, "2 arguments are needed, not %zd", given);
  return translated([&] {
    auto& hook = *reinterpret_cast<Hook*>(self);
    hook.ordinal = place(arguments[1]);
    PyObject* step = nullptr;
    if (arguments[0] != Py_None) {
      require(Py_TYPE(arguments[0])->tp_dealloc == destroy<Step>, "step: a Step or None is needed");
      step = PyWeakref_NewRef(arguments[0], nullptr);
      if (step == nullptr) throw PythonError();
    }
    Py_XSETREF(hook.step, step);
    return none();
  });
}

PyMethodDef hook_methods[] = {
    {"place", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(place_hook)), METH_FASTCALL,
     "place($self, step, ordinal, /)\n--\n\n"
     "Sets the Step that takes the gradient, which is not kept alive, and the parameter's place there; or None and 0."},
    {},
};

PyMemberDef hook_members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(Hook, call), READONLY, nullptr},
    {"__weaklistoffset__", T_PYSSIZET, offsetof(Hook, weak), READONLY, nullptr},
    {"python", T_OBJECT_EX, offsetof(Hook, python), READONLY, "The callable that is called where Step takes nothing."},
    {},
};

// PackedStep

PyObject* gather(PackedStep& packed, PyObject* const* arguments) {
  const std::optional<int> changed = packed.gather(arguments[0], arguments[1]);
  return changed ? PyLong_FromLong(*changed) : none();
}

PyObject* finish_packed(PackedStep& packed, PyObject* const* arguments) {
  const bool weights = flag(arguments[0]), moments = flag(arguments[1]), steps = flag(arguments[2]);
  packed.finish(weights, moments, steps);
  return none();
}

PyMethodDef packed_methods[] = {
    method_def<PackedStep, 2, gather>(
        "gather",
        "gather($self, param_groups, state, /)\n--\n\n"
        "Gathers and validates a step's tensors. Returns what differs from the last time, or None, with nothing"
        " changed, if Python has to take the step."),
    method_def<PackedStep, 3, finish_packed>(
        "finish",
        "finish($self, weights, moments, steps, /)\n--\n\n"
        "Writes copies back, raises the version counters of what was written, and releases all tensors."),
    {},
};

// A list of one object for each of `values`.
template <class Values, class Make>
PyObject* list_of(const Values& values, Make make) {
  Owned list(PyList_New(static_cast<Py_ssize_t>(values.size())));
  for (size_t i = 0; list && i < values.size(); ++i) {
    PyObject* made = make(values[i]);
    if (made == nullptr) return nullptr;
    PyList_SET_ITEM(list.get(), static_cast<Py_ssize_t>(i), made);
  }
  return list.release();
}

PyObject* kinds(const PackedStep& packed) { return list_of(packed.kinds(), PyLong_FromLongLong); }

PyObject* scalars(const PackedStep& packed) {
  return list_of(packed.scalars(), [](const auto& scalar) {
    const auto& [group, column, tensor] = scalar;
    return Py_BuildValue("(LLN)", static_cast<long long>(group), static_cast<long long>(column),
                         sofim::object_of(tensor));
  });
}

PyObject* device(const PackedStep& packed) { return packed.device() ? THPDevice_New(*packed.device()) : none(); }

PyObject* numerator(const PackedStep& packed) {
  const char* const names[] = {"moment", "gradient", "nesterov"};
  return PyUnicode_FromString(names[static_cast<int>(packed.options().numerator)]);
}

PyObject* fisher(const PackedStep& packed) {
  const char* const names[] = {"model", "group", "parameter"};
  return PyUnicode_FromString(names[static_cast<int>(packed.options().fisher)]);
}

PyObject* max_grad_norm(const PackedStep& packed) {
  const std::optional<double>& limit = packed.options().max_grad_norm;
  return limit ? PyFloat_FromDouble(*limit) : none();
}

PyObject* size(const PackedStep& packed) { return PyLong_FromLongLong(packed.size()); }
PyObject* tiles(const PackedStep& packed) { return PyLong_FromLongLong(packed.tiles()); }
PyObject* rows(const PackedStep& packed) { return sofim::object_of(packed.rows()); }
PyObject* hyper(const PackedStep& packed) { return sofim::object_of(packed.hyper()); }
PyObject* means(const PackedStep& packed) { return sofim::object_of(packed.means()); }
PyObject* settings(const PackedStep& packed) { return sofim::object_of(packed.settings()); }
PyObject* adaptive(const PackedStep& packed) { return PyBool_FromLong(packed.options().adaptive); }
PyObject* rank_one(const PackedStep& packed) { return PyBool_FromLong(packed.options().rank_one); }
PyObject* skip_nonfinite(const PackedStep& packed) { return PyBool_FromLong(packed.options().skip_nonfinite); }
PyObject* l2(const PackedStep& packed) { return PyBool_FromLong(packed.l2()); }
PyObject* decoupled(const PackedStep& packed) { return PyBool_FromLong(packed.decoupled()); }

PyGetSetDef packed_attributes[] = {
    attribute<size>("size"),
    attribute<means>("means"),
    attribute<settings>("settings"),
    attribute<adaptive>("adaptive"),
    attribute<rank_one>("rank_one"),
    attribute<tiles>("tiles"),
    attribute<kinds>("kinds"),
    attribute<rows>("rows"),
    attribute<hyper>("hyper"),
    attribute<scalars>("scalars"),
    attribute<device>("device"),
    attribute<numerator>("numerator"),
    attribute<fisher>("fisher"),
    attribute<max_grad_norm>("max_grad_norm"),
    attribute<skip_nonfinite>("skip_nonfinite"),
    attribute<l2>("l2"),
    attribute<decoupled>("decoupled"),
    {},
};

// Types

// An object of `type` that owns what `make` returns.
template <class T, class Make>
PyObject* new_object(PyTypeObject* type, vectorcallfunc call, Make make) {
  return translated([&]() -> PyObject* {
    std::unique_ptr<T> value = make();
    auto* object = reinterpret_cast<Object<T>*>(type->tp_alloc(type, 0));
    if (object == nullptr) return nullptr;
    object->call = call;
    object->value = value.release();
    return reinterpret_cast<PyObject*>(object);
  });
}

PyObject* new_step(PyTypeObject* type, PyObject* arguments, PyObject* keywords) {
  static const char* const names[] = {nullptr};
  if (!PyArg_ParseTupleAndKeywords(arguments, keywords, ":Step", const_cast<char**>(names))) return nullptr;
  return new_object<Step>(type, call, [] { return std::make_unique<Step>(); });
}

PyObject* new_packed_step(PyTypeObject* type, PyObject* arguments, PyObject* keywords) {
  static const char* const names[] = {"tile", nullptr};
  long long tile;
  if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "L:PackedStep", const_cast<char**>(names), &tile)) {
    return nullptr;
  }
  if (tile < 1) {
    PyErr_SetString(PyExc_ValueError, "tile: at least 1 element is needed");
    return nullptr;
  }
  return new_object<PackedStep>(type, nullptr, [&] { return std::make_unique<PackedStep>(tile); });
}

PyMemberDef step_members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(Object<Step>, call), READONLY, nullptr},
    {"__weaklistoffset__", T_PYSSIZET, offsetof(Object<Step>, weak), READONLY, nullptr},
    {},
};

// A pointer as slots take it.
template <class Function>
void* slot(Function* function) {
  return reinterpret_cast<void*>(function);
}

void* text(const char* text) { return const_cast<char*>(text); }

PyType_Slot step_slots[] = {
    {Py_tp_doc, text("Step()\n--\n\nA whole step over tensors on the CPU; keeps its buffers from one to the next.\n\n"
                     "Called with (param_groups, state, grad_scale=None, found_inf=None, counter=None), by position, it"
                     " takes a step. Returns True after a plain one, (grad_norm, skipped) after a guarded one, and"
                     " None, with nothing changed, if Python has to take it.")},
    {Py_tp_new, slot(new_step)},
    {Py_tp_dealloc, slot(destroy<Step>)},
    {Py_tp_call, slot(PyVectorcall_Call)},
    {Py_tp_members, step_members},
    {Py_tp_methods, step_methods},
    {0, nullptr},
};

PyType_Slot hook_slots[] = {
    {Py_tp_doc, text("Hook(python)\n--\n\nA hook for a parameter's register_post_accumulate_grad_hook(): a Step takes the"
                     " gradient, or, where it cannot, the callable `python`, with the parameter as its argument.")},
    {Py_tp_new, slot(new_hook)},
    {Py_tp_dealloc, slot(destroy_hook)},
    {Py_tp_traverse, slot(visit_hook)},
    {Py_tp_clear, slot(clear_hook)},
    {Py_tp_call, slot(PyVectorcall_Call)},
    {Py_tp_members, hook_members},
    {Py_tp_methods, hook_methods},
    {0, nullptr},
};

PyType_Slot packed_slots[] = {
    {Py_tp_doc, text("PackedStep(tile)\n--\n\nThe tensors of a step packed into one table;"
                     " sofim_fused.backends.triton.step.PackedStep documents it.")},
    {Py_tp_new, slot(new_packed_step)},
    {Py_tp_dealloc, slot(destroy<PackedStep>)},
    {Py_tp_methods, packed_methods},
    {Py_tp_getset, packed_attributes},
    {0, nullptr},
};

PyType_Spec step_spec = {"sofim_fused." SOFIM_TEXT(TORCH_EXTENSION_NAME) ".Step", sizeof(Object<Step>), 0,
                         Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL, step_slots};
PyType_Spec hook_spec = {"sofim_fused." SOFIM_TEXT(TORCH_EXTENSION_NAME) ".Hook", sizeof(Hook), 0,
                         Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_HAVE_GC, hook_slots};
PyType_Spec packed_spec = {"sofim_fused." SOFIM_TEXT(TORCH_EXTENSION_NAME) ".PackedStep", sizeof(Object<PackedStep>), 0,
                           Py_TPFLAGS_DEFAULT, packed_slots};

PyObject* use_kernels(PyObject*, PyObject* address) {
  void* kernels = PyLong_AsVoidPtr(address);
  if (kernels == nullptr && PyErr_Occurred()) return nullptr;
  sofim::use_kernels(static_cast<const sofim::Kernels*>(kernels));
  return none();
}

PyMethodDef functions[] = {
    {"use_kernels", use_kernels, METH_O,
     "use_kernels(address, /)\n--\n\nChoose the passes of an instruction set: the attribute `kernels` of its module."},
    {},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, SOFIM_TEXT(TORCH_EXTENSION_NAME), "Native passes over the parameters of an optimizer.",
    -1, functions, nullptr, nullptr, nullptr, nullptr};

bool add(PyObject* module, const char* name, PyObject* object) {
  if (object != nullptr && PyModule_AddObject(module, name, object) == 0) return true;
  Py_XDECREF(object);
  return false;
}

}  // namespace

PyMODINIT_FUNC SOFIM_JOIN(PyInit_, TORCH_EXTENSION_NAME)() {
  Owned module(PyModule_Create(&definition));
  if (!module || !add(module.get(), "Step", PyType_FromSpec(&step_spec)) ||
      !add(module.get(), "Hook", PyType_FromSpec(&hook_spec)) ||
      !add(module.get(), "PackedStep", PyType_FromSpec(&packed_spec))) {
    return nullptr;
  }
  return module.release();
}
