#!/usr/bin/env bash
# Triton 3.9.0: each launch of a kernel, also of one that was compiled long ago, compares every constant of its module.
#
# A kernel may read `tl.constexpr` constants of its module. Triton has to notice if one of them changes, and does so not
# once but in each launch: in Python, for each constant that the kernel or a function called by it reads. It costs about a
# microsecond per constant; for a kernel that names its columns and modes by 20 constants, that is more than all the
# rest of the launch. Calling the compiled kernel, which the first launch returns (`compiled[(x, y, z)](*arguments)`, with
# constants among the arguments), leaves this out. No GPU is needed to see it: here a driver that launches nothing stands in.
#
# Output seen:
#     triton 3.9.0
#     1 constant: 1 comparison per launch, 5 us
#     40 constants: 40 comparisons per launch, 47 us
#     the same, called as a compiled kernel: 0 comparisons per launch, 1 us
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q 'torch==2.13.0' 'triton==3.9.0' numpy
cat > "$folder/kernels.py" <<'PYTHON'
import triton
import triton.language as tl

A = tl.constexpr(0)


@triton.jit
def one(x, SIZE: tl.constexpr):
    tl.store(x + tl.arange(0, SIZE), A)


PYTHON
"$folder/venv/bin/python" >> "$folder/kernels.py" <<'PYTHON'
print("\n".join(f"C{i} = tl.constexpr({i})" for i in range(40)))
print("\n\n@triton.jit\ndef total():\n    return " + " + ".join(f"C{i}" for i in range(40)))
print("\n\n@triton.jit\ndef many(x, SIZE: tl.constexpr):\n    tl.store(x + tl.arange(0, SIZE), total())")
PYTHON
cat > "$folder/launches.py" <<'PYTHON'
import time
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.language.core import constexpr

launched = []
triton.runtime.driver.set_active(
    SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        launcher_cls=lambda source, metadata: lambda *launch: launched.append(launch),
        utils=SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 200_000},
            load_binary=lambda *arguments: (1, 1, 0, 0, 1024),
            unload_module=lambda module: None,
        ),
    )
)
from kernels import many, one

compared, compare = 0, constexpr.__ne__


def counting(self, other):
    global compared
    compared += 1
    return compare(self, other)


def tell(name, launch, expected):
    global compared
    launch()  # the first compiles
    launched.clear()
    compared, constexpr.__ne__ = 0, counting
    launch()
    constexpr.__ne__ = compare
    assert len(launched) == 1 and compared == expected, (len(launched), compared)
    times = []
    for _ in range(20):
        began = time.perf_counter()
        for _ in range(200):
            launch()
        times.append((time.perf_counter() - began) / 200)
    print(f"{name}: {compared} comparison{'s' * (compared != 1)} per launch, {min(times) * 1e6:.0f} us")


x = torch.zeros(128)
print(f"triton {triton.__version__}")
tell("1 constant", lambda: one[(1,)](x, SIZE=128), 1)
tell("40 constants", lambda: many[(1,)](x, SIZE=128), 40)
compiled = many[(1,)](x, SIZE=128)
tell("the same, called as a compiled kernel", lambda: compiled[(1, 1, 1)](x, 128), 0)
PYTHON
cd "$folder"
TRITON_CACHE_DIR="$folder/cache" venv/bin/python launches.py
