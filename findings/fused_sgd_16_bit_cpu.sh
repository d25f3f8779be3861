#!/usr/bin/env bash
# torch 2.13.0, CPU: SGD(fused=True) does not update most elements of a bfloat16 or float16 parameter.
#
# Of n elements, only the last n % 16 are updated (with AVX2 or AVX-512): of 64 elements none changes, of 17 one does.
# There is no error and no warning, and float32 is right. So the fused SGD of this version is no baseline for the speed of
# 16-bit weights on a CPU: it skips most of the work.
#
# Output seen (AVX-512; number of elements that changed, where all of them should have):
#     torch 2.13.0+cpu
#     bfloat16 fused: 1 of 1, 0 of 16, 1 of 17, 0 of 64
#     float16  fused: 1 of 1, 0 of 16, 1 of 17, 0 of 64
#     float32  fused: 1 of 1, 16 of 16, 17 of 17, 64 of 64
#     bfloat16 plain: 1 of 1, 16 of 16, 17 of 17, 64 of 64
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q 'torch==2.13.0' numpy
"$folder/venv/bin/python" - <<'PYTHON'
import torch

print("torch", torch.__version__)
sizes = (1, 16, 17, 64)


def moved(dtype, size, fused):
    weight = torch.nn.Parameter(torch.ones(size, dtype=dtype))
    weight.grad = torch.ones(size, dtype=dtype)
    torch.optim.SGD([weight], lr=0.5, momentum=0.9, fused=fused).step()
    return int((weight != 1).sum())


def row(dtype, fused):
    counts = [moved(dtype, size, fused) for size in sizes]
    name = str(dtype).removeprefix("torch.")
    print(f"{name:8} {'fused' if fused else 'plain'}: " + ", ".join(f"{n} of {size}" for n, size in zip(counts, sizes)))
    return counts


vectorized = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
assert vectorized, "a CPU with AVX2 or AVX-512 is needed to see it"
for dtype in (torch.bfloat16, torch.float16):
    assert row(dtype, True) == [1, 0, 1, 0], "this has changed"
assert row(torch.float32, True) == list(sizes)
assert row(torch.bfloat16, False) == list(sizes)
PYTHON
