#!/usr/bin/env bash
# torch 2.13.0, torch.distributed over gloo: all_gather and all_reduce refuse int16 and float8, and take int8 and float16.
#
# The error is "Invalid scalar type", raised by the collective itself. So a 16-bit integer state, sharded over ranks, trains
# and is saved by each rank, and fails only when a full state dict is gathered; the same bits as float16, or as pairs of
# int8, can be sent.
#
# Output seen:
#     torch 2.13.0+cpu
#     all_gather: int8 sent, uint8 sent, int16 Invalid scalar type, int32 sent, float16 sent, bfloat16 sent, float8_e4m3fn Invalid scalar type
#     all_reduce: int8 sent, uint8 sent, int16 Invalid scalar type, int32 sent, float16 sent, bfloat16 sent, float8_e4m3fn Invalid scalar type
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q 'torch==2.13.0' numpy
"$folder/venv/bin/python" - "$folder/store" <<'PYTHON'
import sys

import torch
from torch import distributed

print("torch", torch.__version__)
distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
names = ("int8", "uint8", "int16", "int32", "float16", "bfloat16", "float8_e4m3fn")


def outcome(collective, name):
    x = torch.zeros(4, dtype=torch.uint8).to(getattr(torch, name))
    try:
        distributed.all_gather([torch.empty_like(x)], x) if collective == "all_gather" else distributed.all_reduce(x)
    except RuntimeError as error:
        return "Invalid scalar type" if "Invalid scalar type" in str(error) else str(error).splitlines()[0]
    return "sent"


for collective in ("all_gather", "all_reduce"):
    found = {name: outcome(collective, name) for name in names}
    print(f"{collective}: " + ", ".join(f"{name} {what}" for name, what in found.items()))
    assert [name for name in names if found[name] != "sent"] == ["int16", "float8_e4m3fn"], "this has changed"
distributed.destroy_process_group()
PYTHON
