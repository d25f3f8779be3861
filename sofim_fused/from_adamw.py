"""Converts a running ``torch.optim.AdamW`` or ``Adam`` to SOFIM with a diagonal that adapts.

AdamW keeps m ← β₁ m + (1-β₁) g and v ← β₂ v + (1-β₂) g² for each element, and steps by γ m̂/(√v̂ + ε). These are
SOFIM's first moment, and its running mean of g² with ``diagonal="element"``; the step is the same with
``numerator="moment"`` and ``rho=None``. The other diagonals keep running means of g² over a row, a column or a tensor:
the means of v over these elements are exactly what SOFIM would have after the same gradients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sofim_fused import checks, checks_state_dict, from_torch
from sofim_fused.backends import sum_dtype
from sofim_fused.dtensor import is_sharded, local
from sofim_fused.step import gather

# Options that come from AdamW, by SOFIM's names; and those of its groups that SOFIM's do not have.
FROM_ADAMW = (
    "params",
    "lr",
    "betas",
    "momentum",
    "beta2",
    "eps",
    "weight_decay",
    "decoupled_weight_decay",
    "maximize",
)
ONLY_ADAMW = ("betas", "amsgrad", "foreach", "capturable", "differentiable", "fused")
_REMEDY = "delete the parameter's state to start it anew (del optimizer.state[param])"


class Known(NamedTuple):
    """The state of a parameter: where it is among all, with ``exp_avg`` in place of the gradient, and the rest."""

    entry: gather.Entry
    exp_avg_sq: Tensor
    step: int


class Taken(NamedTuple):
    """The values of an AdamW optimizer, checked.

    Attributes:
        groups: new group dicts, with SOFIM's names.
        defaults: the constructor's arguments, for groups that are added later, likewise.
        states: of the parameters that have any.
        capturable: whether its steps may be captured in a CUDA graph.
    """

    groups: list[dict[str, Any]]
    defaults: dict[str, Any]
    states: list[Known]
    capturable: bool


def taken(optimizer: torch.optim.Adam, diagonal: Any, options: Mapping[str, Any]) -> Taken:
    """Read an AdamW optimizer, without changing it.

    Args:
        optimizer: of class ``torch.optim.AdamW`` or ``torch.optim.Adam``, or derived from one of them.
        diagonal: SOFIM's, for groups that do not have one.
        options: further arguments of SOFIM's constructor; names that come from AdamW are refused.

    Raises:
        TypeError, ValueError: the optimizer or an argument is refused; the message says which and what to do.
    """
    if not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        way = "SOFIM.from_sgd() takes an SGD" if isinstance(optimizer, torch.optim.SGD) else "from any other make a new"
        raise TypeError(
            f"optimizer is of type {type(optimizer).__name__}: pass a torch.optim.AdamW or torch.optim.Adam; {way} "
            + ("" if isinstance(optimizer, torch.optim.SGD) else "AdaSOFIM(model.parameters())")
        )
    whose = type(optimizer).__name__
    from_torch.own_options(options, FROM_ADAMW, whose)
    groups, states = [], []
    ordinal = 0
    for index, group in enumerate(optimizer.param_groups):
        where = f"parameter group {index} of the {whose} optimizer"
        _check_switches(where, group)
        _check_diagonal("" if "diagonal" not in group else f"{where}: ", group.get("diagonal", diagonal))
        groups.append({**from_torch.kept(group, ONLY_ADAMW), **_renamed(where, group)})
        for place, param in enumerate(group["params"]):
            known = optimizer.state.get(param)
            if known:
                which = f"parameter {place} of group {index} of the {whose} optimizer"
                states.append(_state(which, gather.Entry(index, ordinal, param, param), known))
            ordinal += 1
    where = f"defaults of the {whose} optimizer"
    _check_switches(where, optimizer.defaults)
    capturable = any(bool(group.get("capturable")) for group in optimizer.param_groups)
    return Taken(groups, {"lr": optimizer.defaults["lr"], **_renamed(where, optimizer.defaults)}, states, capturable)


def _renamed(where: str, group: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a group under SOFIM's names, except for learning rates."""
    given = group["betas"]
    betas = tuple(map(from_torch.unwrapped, given)) if isinstance(given, (tuple, list)) else given
    momentum, beta2 = checks.betas(f"{where}: ", betas)
    return {
        "momentum": momentum,
        "beta2": beta2,
        "eps": from_torch.unwrapped(group["eps"]),
        "weight_decay": from_torch.unwrapped(group["weight_decay"]),
        "decoupled_weight_decay": True,
        "maximize": group.get("maximize", False),
    }


def convert(
    given: Taken, groups: Sequence[dict[str, Any]], defaults: dict[str, Any], state: MutableMapping[Tensor, Any]
) -> None:
    """Give a new optimizer the state of AdamW's, and learning rates of its own.

    Args:
        given: the values that the optimizer was created from.
        groups: its parameter groups, whose values its constructor has checked.
        defaults: its constructor's arguments.
        state: its state.
    """
    with torch.inference_mode(False), torch.no_grad():  # otherwise nothing could write to the new tensors
        for values in (*groups, defaults):
            values.update({name: from_torch.scaled(values[name], 1.0) for name in from_torch.RATES if name in values})
        for entry, exp_avg_sq, step in given.states:
            group = groups[entry.group]
            gather.ensure_state(entry, group, state)
            known = state[entry.param]
            gather.store_moment(entry.param, known, entry.grad.detach())
            known["step"].fill_(step)
            squares = torch.view_as_real(exp_avg_sq) if exp_avg_sq.is_complex() else exp_avg_sq
            for name in gather.variance_shapes(entry.param, group["diagonal"]):
                gather.store_variance(entry.param, known, name, _means(squares.detach(), name, known[name]))


def _means(squares: Tensor, name: str, made: Tensor) -> Tensor:
    """The running means called ``name`` from those of the elements: over rows, columns, the tensor, or as they are.

    ``made``: a tensor for them. If it is a ``DTensor``, so are they, spread over ranks like it.
    """
    if squares.shape == made.shape:
        return squares
    dims = list(range(squares.dim()))
    over = dims if name == "variance" else dims[1:] if name == "row_var" else [0]
    # Not mean(), which of a DTensor would be the mean of what the ranks have, however unequal that is.
    sums = squares.sum(over, dtype=sum_dtype(squares.device))
    means = sums / max(1, math.prod(squares.shape[dim] for dim in over))
    return means.redistribute(placements=made.placements) if is_sharded(made) else means  # type: ignore[attr-defined]


# Refusals


def _check_switches(where: str, group: Mapping[str, Any]) -> None:
    from_torch.not_differentiable(where, group)
    if group.get("amsgrad"):
        raise ValueError(
            f"{where}: amsgrad={group['amsgrad']!r}: the largest second moments so far have no counterpart in SOFIM: "
            "set amsgrad to False there first to go on with the present ones"
        )
    if group["weight_decay"] and not group.get("decoupled_weight_decay"):
        raise ValueError(
            f"{where}: weight_decay={group['weight_decay']!r} is added to the gradient (L2), which a diagonal that "
            "adapts would divide by the size of the gradients: set weight_decay to 0 or decoupled_weight_decay to True "
            "there first, as AdamW has it"
        )


def _check_diagonal(where: str, diagonal: Any) -> None:
    if isinstance(diagonal, str) and diagonal == "identity":
        raise ValueError(
            f"{where}diagonal='identity' has no use for the second moments of AdamW, and with AdamW's learning rates "
            "its steps would have another size: take a diagonal that adapts, or make a new SOFIM(model.parameters())"
        )


def _state(which: str, entry: gather.Entry, known: Any) -> Known:
    where = f"state of {which}"
    if not isinstance(known, Mapping):
        raise TypeError(f"{where} is of type {type(known).__name__}, not a dict: {_REMEDY}")
    lost = [name for name in ("exp_avg", "exp_avg_sq", "step") if name not in known]
    if lost:
        raise ValueError(
            f"{where} has the entries {sorted(map(str, known))} and lacks {' and '.join(lost)}: it is damaged, or of "
            f"another optimizer: {_REMEDY}"
        )
    param = entry.param
    for name in ("exp_avg", "exp_avg_sq"):
        from_torch.buffer(f"{name} of {which}", param, known[name], _REMEDY, f": {_REMEDY}")
    square = known["exp_avg_sq"]
    values = local(square.detach())
    values = torch.view_as_real(values) if values.is_complex() else values
    if not values.is_meta and bool((values < 0).any()):
        raise ValueError(f"exp_avg_sq of {which} has negative elements: it is damaged: {_REMEDY}")
    return Known(entry._replace(grad=known["exp_avg"]), square, _count(which, known["step"]))


def _count(which: str, step: Any) -> int:
    count = step
    if isinstance(step, Tensor):
        if step.numel() != 1 or step.is_meta or step.is_complex():
            raise ValueError(f"step of {which} is {checks.described(step)}, expected one number: {_REMEDY}")
        count = local(step.detach()).item()
    if not isinstance(count, Real) or isinstance(count, bool) or not checks_state_dict.is_count(count):
        raise ValueError(f"step of {which} is {count!r}, expected a count of updates: {_REMEDY}")
    return int(float(count))
