"""The passes on the CPU: C++, compiled for each instruction set (``csrc/cpu``)."""

from __future__ import annotations

from functools import cache

import torch

from sofim_fused import native
from sofim_fused.backends.operators import NAMESPACE, OperatorPasses, register_fakes


def passes_for(device: torch.device) -> OperatorPasses | str:
    """The native passes for ``device``, or the reason why it has none."""
    if device.type != "cpu":
        return f"it runs on the CPU, not on {device.type}"
    loaded: OperatorPasses | str = torch.compiler.disable(_loaded)()  # loading modules from files cannot be traced
    return loaded


@cache
def _loaded() -> OperatorPasses | str:
    module = native.cpu()
    if isinstance(module, str):
        return module
    register_fakes(NAMESPACE)
    step = module.Step
    return OperatorPasses(
        "cpu",
        step,
        new_in_backward=step,
        new_sharded=step,
        any_order=True,
        blockwise=True,
        blockwise_variance=True,
    )
