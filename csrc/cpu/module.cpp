// The Python module of one instruction set. It has only the address of its passes, for sofim_fused._C.use_kernels.
#include <Python.h>

#include "cpu/kernels.h"

#define SOFIM_JOIN(a, b) a##b
#define SOFIM_INIT(name) SOFIM_JOIN(PyInit_, name)

static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC SOFIM_INIT(TORCH_EXTENSION_NAME)() {
  PyObject* module = PyModule_Create(&definition);
  if (module == nullptr) return nullptr;
  PyObject* address = PyLong_FromVoidPtr(const_cast<sofim::Kernels*>(&sofim::kernels()));
  if (address == nullptr || PyModule_AddObject(module, "kernels", address) < 0) {
    Py_XDECREF(address);
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
