"""What the conversions of running optimizers share: values and tensors of ``torch.optim`` are read, or refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from sofim_fused import checks
from sofim_fused.dtensor import local, on_one_mesh

# Learning rates in groups: the optimizer's, and those that schedulers store there.
RATES = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")


def own_options(options: Mapping[str, Any], names: Iterable[str], whose: str) -> None:
    """Refuse arguments for values that the other optimizer has."""
    for name in names:
        if name in options:
            raise TypeError(
                f"{name} comes from the {whose} optimizer: leave it out, or set it in the groups afterwards"
            )


def not_differentiable(where: str, group: Mapping[str, Any]) -> None:
    """Refuse a group that is updated in a way that autograd can follow."""
    if group.get("differentiable"):
        raise ValueError(
            f"{where}: differentiable={group['differentiable']!r}: SOFIM updates in place: set "
            "group['differentiable'] = False first, or unroll the update in plain PyTorch"
        )


def kept(group: Mapping[str, Any], left_out: Iterable[str]) -> dict[str, Any]:
    """A group without some options; keys that the user added are kept, and lists of parameters are new ones."""
    found = {name: value for name, value in group.items() if name not in left_out}
    for name in ("params", "param_names"):
        if name in found:
            found[name] = list(found[name])
    return found


def unwrapped(value: Any) -> Any:
    """A number instead of a one-element tensor, which torch's optimizers accept where SOFIM takes only numbers."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta and not value.is_complex():
        return float(value.detach())
    return value


def scaled(value: Any, factor: float) -> Any:
    """A learning rate times ``factor``, a tensor as a new one; other values, which a user added, unchanged."""
    if isinstance(value, Tensor):
        return value.detach() * factor
    return float(value) * factor if isinstance(value, Real) and not isinstance(value, bool) else value


def buffer(where: str, param: Tensor, value: Any, remedy: str, nonfinite: str) -> None:
    """Check a tensor of the other optimizer's state that has its parameter's shape.

    Args:
        where: what it is, for messages.
        param: its parameter.
        value: the tensor, or whatever is in its place.
        remedy: how to do without it.
        nonfinite: what to say of one that has a NaN or an infinity.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{where} is of type {type(value).__name__}, not a tensor: {remedy}")
    where += f" ({checks.described(param)})"
    if value.layout != torch.strided:
        raise ValueError(
            f"{where} has the layout {value.layout}: SOFIM takes dense gradients (nn.Embedding(sparse=False)): "
            f"{remedy}, or replace it by its to_dense()"
        )
    if value.shape != param.shape:
        raise ValueError(f"{where} has the shape {tuple(value.shape)}, which is another model's: {remedy}")
    if value.device != param.device:
        raise ValueError(f"{where} is on {value.device}: move it to the parameter's device, or {remedy}")
    if value.dtype not in checks.DTYPES or value.is_complex() != param.is_complex():
        raise ValueError(f"{where} is {checks.short(value.dtype)}: it is damaged: {remedy}")
    if not on_one_mesh(param, value):
        raise checks.other_mesh(param, value, where, remedy)
    if not value.is_meta and not bool(local(value.detach()).isfinite().all()):
        raise ValueError(f"{where} holds NaN or infinity{nonfinite}")
