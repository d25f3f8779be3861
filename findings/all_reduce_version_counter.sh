#!/usr/bin/env bash
# torch 2.13.0: an all-reduce writes to its tensor without raising the tensor's version counter.
#
# Autograd notices that a tensor it needs for the backward pass was changed in place by the tensor's version counter, and
# raises an error. torch.distributed.all_reduce changes its tensor in place, but the counter stays as it was. So
#     y = x.exp(); all_reduce(y); y.sum().backward()
# gives a wrong gradient without an error: exp's backward pass multiplies by the sum over the ranks instead of by y.
# broadcast does the same; all_reduce_coalesced raises the counter, and backward() then raises an error. Code that watches
# version counters to see whether somebody wrote to a tensor misses these writes.
#
# Output seen (2 ranks, gloo, x = 0 on rank 0 and x = 1 on rank 1):
#     torch 2.13.0+cpu
#     all_reduce: counter 0 -> 0; rank 0 gets the gradient 3.7183, exp(x) is 1.0000
#     broadcast: counter 0 -> 0
#     all_reduce_coalesced: counter 0 -> 1
#     mul_: counter 0 -> 1
#     backward() after all_reduce_coalesced: one of the variables needed for gradient computation has been modified
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q 'torch==2.13.0' numpy
cat > "$folder/ranks.py" <<'PYTHON'
import math
import sys
import warnings

import torch
from torch import distributed

warnings.filterwarnings("ignore")
CALLS = {
    "all_reduce": distributed.all_reduce,
    "broadcast": lambda y: distributed.broadcast(y, src=0),
    "all_reduce_coalesced": lambda y: distributed.all_reduce_coalesced([y]),
    "mul_": lambda y: y.mul_(1.0),
}


def run(rank, store):
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    counters = {}
    for name, call in CALLS.items():
        x = torch.tensor([float(rank)], requires_grad=True)
        y = x.exp()
        before = y._version
        with torch.no_grad():
            call(y)
        counters[name] = (before, y._version)
        text = f"{name}: counter {before} -> {y._version}"
        if name == "all_reduce":
            y.sum().backward()
            text += f"; rank {rank} gets the gradient {x.grad.item():.4f}, exp(x) is {math.exp(rank):.4f}"
            assert abs(x.grad.item() - (1 + math.e)) < 1e-5, "this has changed"
        if rank == 0:
            print(text)
        if name == "all_reduce_coalesced":
            try:
                y.sum().backward()
            except RuntimeError as error:
                refused = str(error)
    if rank == 0:
        print(f"backward() after all_reduce_coalesced: {refused.split(' by an ')[0]}")
    assert counters == {
        "all_reduce": (0, 0),
        "broadcast": (0, 0),
        "all_reduce_coalesced": (0, 1),
        "mul_": (0, 1),
    }, f"this has changed: {counters}"
    distributed.destroy_process_group()


if __name__ == "__main__":
    print("torch", torch.__version__, flush=True)
    torch.multiprocessing.spawn(run, (sys.argv[1],), nprocs=2)
PYTHON
cd "$folder"
OMP_NUM_THREADS=1 "$folder/venv/bin/python" ranks.py "$folder/store"
