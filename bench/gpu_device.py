"""What PyTorch says of a device; imports nothing of the package, which may not be installed yet.

python -m bench.gpu_device cuda
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from bench.gpu_report import Row

ROOT = Path(__file__).parent.parent


def message(error: BaseException) -> str:
    """An error in one line, without the paths of this machine."""
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first.strip()}".replace(str(ROOT) + os.sep, "")[:300]


def information(device: torch.device) -> Row:
    """What figures depend on: names, versions, and sizes."""
    versions = {"torch": torch.__version__, "CUDA": str(torch.version.cuda), "Python": sys.version.split()[0]}
    try:
        versions["triton"] = str(importlib.import_module("triton").__version__)
    except Exception as error:  # a broken installation may raise anything
        versions["triton"] = message(error)
    cpu = torch.backends.cpu.get_cpu_capability().lower()
    if device.type != "cuda":
        name = "CPU, miniature models"
        return {"type": device.type, "name": name, "versions": versions, "cpu": cpu, "l2_bytes": 0, "more": {}}
    properties: Any = torch.cuda.get_device_properties(device)
    more = {
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory": f"{properties.total_memory / 2**30:.0f} GiB",
    }
    probe = torch.ones(2, device=device)
    assert float(probe.sum()) == 2
    return {
        "type": "cuda",
        "name": str(properties.name),
        "versions": versions,
        "cpu": cpu,
        "l2_bytes": int(properties.L2_cache_size),
        "more": more,
    }


if __name__ == "__main__":
    chosen = sys.argv[1]
    if chosen == "cuda" and not torch.cuda.is_available():
        sys.exit("PyTorch sees no CUDA device")
    print(json.dumps(information(torch.device(chosen, 0) if chosen == "cuda" else torch.device(chosen))))
