"""The passes on an NVIDIA GPU in CUDA C++, compiled ahead of time (``csrc/cuda``): no warm-up, cheap launches.

A whole step takes one launch, or two. Everything that a launch needs to know is in its arguments.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sofim_fused import native
from sofim_fused.backends.interface import NativeStep
from sofim_fused.backends.operators import NAMESPACE, OperatorPasses, register_fakes

CAPABILITY = (8, 0)  # the lowest that setup.py compiles for: the first with bfloat16

SINGLE_LAUNCH: bool | None = None
"""One launch per step (``True``), two (``False``), or one for small models (``None``). Read at each step.

Models of several dtypes, of float64, or with float32 gradients of 16-bit weights take two in any case."""


def passes_for(device: torch.device) -> OperatorPasses | str:
    """The passes for ``device``, or the reason why it has none."""
    found: OperatorPasses | str = torch.compiler.disable(_passes_for)(device)
    return found


@cache
def _passes_for(device: torch.device) -> OperatorPasses | str:
    if device.type not in ("cpu", "cuda"):
        return f"it runs on NVIDIA's GPUs, not on {device.type}"
    module = native.cuda()
    if isinstance(module, str):
        return module
    if module.emulated:
        return _passes(module) if device.type == "cpu" else "it was built to be emulated on the CPU"
    if device.type == "cpu":
        return "it runs on GPUs"
    if not torch.cuda.is_available():
        return "PyTorch finds no GPU"
    if torch.cuda.get_device_capability(device) < CAPABILITY:
        return f"it needs compute capability {'.'.join(map(str, CAPABILITY))}, that of A100, or above"
    return _passes(module)


@cache
def _passes(module: Any) -> OperatorPasses:
    def new_step() -> NativeStep:
        step = module.Step()

        def take(
            groups: list[dict[str, Any]],
            state: MutableMapping[Tensor, Any],
            grad_scale: Any,
            found_inf: Any,
            counter: Tensor | None,
        ) -> Any:
            return step(groups, state, grad_scale, found_inf, SINGLE_LAUNCH, counter)

        return take

    namespace = f"{NAMESPACE}_emulated" if module.emulated else NAMESPACE
    register_fakes(namespace)
    return OperatorPasses("cuda", new_step, namespace, module.emulated, device="CPU" if module.emulated else "CUDA")
