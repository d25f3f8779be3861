#!/usr/bin/env bash
# torch 2.13.0: the header that declares THPVariable_Unpack is nearly all of torch/extension.h.
#
# C++ that takes tensors from Python objects by hand, to avoid the compile time of torch/extension.h, needs two small
# inline functions, THPVariable_Check and THPVariable_Unpack. The header that declares them,
# torch/csrc/autograd/python_variable.h, preprocesses to 84 % of the lines of torch/extension.h. The class at::Tensor
# itself (ATen/core/Tensor.h) needs 35 %. And the header of one operator, ATen/ops/empty.h, is larger than that of
# operator registration, torch/library.h. So an extension of several files parses least if one of them includes
# python_variable.h, and hands at::Tensor to the others, which include ATen/core/Tensor.h alone.
#
# Output seen (g++ 12.2, Python 3.11):
#     torch 2.13.0+cpu, lines after the preprocessor, and relative to torch/extension.h
#     torch/extension.h                        419808  1.00
#     torch/csrc/autograd/python_variable.h    354260  0.84
#     ATen/ops/empty.h                         231517  0.55
#     torch/csrc/utils/pybind.h                201528  0.48
#     torch/library.h                          191861  0.46
#     ATen/core/Tensor.h                       148982  0.35
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q 'torch==2.13.0' numpy
cat > "$folder/lines.py" <<'PYTHON'
import pathlib
import subprocess
import sys
import sysconfig

import torch

include = pathlib.Path(torch.__file__).parent / "include"
paths = [include, include / "torch/csrc/api/include", sysconfig.get_paths()["include"]]
source = pathlib.Path(sys.argv[1]) / "one.cpp"
HEADERS = (
    "torch/extension.h",
    "torch/csrc/autograd/python_variable.h",
    "ATen/ops/empty.h",
    "torch/csrc/utils/pybind.h",
    "torch/library.h",
    "ATen/core/Tensor.h",
)
lines = {}
print(f"torch {torch.__version__}, lines after the preprocessor, and relative to torch/extension.h")
for header in HEADERS:
    source.write_text(f"#include <{header}>\n")
    command = ["g++", "-std=c++20", "-E", *(f"-I{path}" for path in paths), str(source)]
    lines[header] = subprocess.run(command, check=True, capture_output=True).stdout.count(b"\n")
    print(f"{header:40} {lines[header]:6}  {lines[header] / lines[HEADERS[0]]:.2f}")
whole, variable, empty, _, library, tensor = (lines[header] for header in HEADERS)
if not (variable > 0.75 * whole and tensor < 0.45 * whole and empty > library):
    sys.exit("this has changed")
PYTHON
"$folder/venv/bin/python" "$folder/lines.py" "$folder"
