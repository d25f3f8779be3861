"""Converts a running ``torch.optim.SGD`` to SOFIM: groups, learning rates, momentum buffers.

With μ ``momentum``, τ ``dampening`` and γ ``lr``, SGD keeps b ← μ b + (1-τ) g and steps by γ b. SOFIM keeps
m ← β m + (1-β) g and steps by η m̂/(ρ + ‖m̂‖²). So β = μ, and

    m = b (1-μ)/(1-τ)        η = ρ γ (1-τ)/(1-μ)

give η m/ρ = γ b, now and after every further gradient. If ‖m̂‖² is far below ρ and m̂ is m, this is SGD's step. Without
momentum SGD has neither buffer nor dampening, and η = ρ γ. With τ = 0 the buffer is the sum Σ μᵗ⁻ⁱ gᵢ, and m is exactly
the moment that SOFIM would have after t updates. With τ ≠ 0 the first term, g₁, differs, because SGD never dampens it.

With ``nesterov=True``, for which τ = 0, SGD steps by γ (g + μ b). That is η/ρ times β m + (1-β) g: SOFIM's step with
``numerator="nesterov"``, likewise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sofim_fused import checks, from_torch
from sofim_fused.step import gather

# Options that have the same name in SGD. Its weight decay is L2.
COMMON = ("lr", "momentum", "weight_decay", "maximize")
FROM_SGD = ("params", *COMMON, "decoupled_weight_decay")
ONLY_SGD = ("dampening", "nesterov", "foreach", "differentiable", "fused")
_REMEDY = "set optimizer.state[param]['momentum_buffer'] = None to start it at zero"
_LEFT_BY_FUSED = (
    f", as torch's fused SGD leaves it when a GradScaler skips its first step: {_REMEDY}, or fill it with zeros "
    "(zero_())"
)


class Taken(NamedTuple):
    """The values of an SGD optimizer, checked, and not yet converted.

    Attributes:
        groups: new group dicts, with SGD's own values under SOFIM's names.
        defaults: the constructor's arguments, for groups that are added later, in the same form.
        dampenings: τ of each group, and at the end that of ``defaults``.
        options: arguments of the constructor for the whole optimizer, those of the caller included.
        buffers: the parameters that have a momentum buffer, with the buffer in place of the gradient.
        steps: how many updates SGD took, or ``None``.
    """

    groups: list[dict[str, Any]]
    defaults: dict[str, Any]
    dampenings: list[float]
    options: dict[str, Any]
    buffers: list[gather.Entry]
    steps: int | None


def taken(optimizer: torch.optim.SGD, steps: int | None, options: Mapping[str, Any]) -> Taken:
    """Read an SGD optimizer, without changing it.

    Args:
        optimizer: of class ``torch.optim.SGD``, or derived from it.
        steps: how many updates it took, at least 1; ``None``: not known.
        options: further arguments of SOFIM's constructor; names that come from SGD are refused.

    Raises:
        TypeError, ValueError: the optimizer or an argument is refused; the message says which and what to do.
    """
    if not isinstance(optimizer, torch.optim.SGD):
        raise TypeError(
            f"optimizer is of type {type(optimizer).__name__}: pass a torch.optim.SGD; "
            "from any other make SOFIM(model.parameters())"
        )
    from_torch.own_options(options, FROM_SGD, "SGD")
    checks.without_variances("", options.get("diagonal", "identity"))
    _check_steps(steps)
    groups, dampenings, buffers = [], [], []
    numerator = options["numerator"] if "numerator" in options else _numerator(optimizer.param_groups)
    ordinal = 0
    for index, group in enumerate(optimizer.param_groups):
        where = f"parameter group {index} of the SGD optimizer"
        from_torch.not_differentiable(where, group)
        checks.without_variances(f"{where}: ", group.get("diagonal", "identity"))
        dampenings.append(_dampening(where, group))
        if numerator == "nesterov" and group.get("nesterov") and dampenings[-1]:
            raise ValueError(
                f"{where}: dampening={group['dampening']!r} with nesterov=True, which SGD's constructor refuses: set "
                "group['dampening'] = 0 first, or pass numerator='moment' to go on without the look-ahead"
            )
        groups.append(_renamed(group))
        for place, param in enumerate(group["params"]):
            # Without momentum SGD does not use a buffer, but an older one may still be there.
            known = optimizer.state.get(param, {}) if group.get("momentum") else {}
            buffer = known.get("momentum_buffer")
            if buffer is not None:
                where = f"momentum buffer of parameter {place} of group {index}"
                from_torch.buffer(where, param, buffer, _REMEDY, _LEFT_BY_FUSED)
                buffers.append(gather.Entry(index, ordinal, param, buffer))
            ordinal += 1
    dampenings.append(_dampening("defaults of the SGD optimizer", optimizer.defaults))
    defaults = {name: _unwrapped(name, optimizer.defaults[name]) for name in COMMON if name in optimizer.defaults}
    return Taken(
        groups,
        {**defaults, "decoupled_weight_decay": False},
        dampenings,
        {**options, "numerator": numerator},
        buffers,
        steps,
    )


def _numerator(groups: Sequence[Mapping[str, Any]]) -> str:
    """SOFIM's ``numerator`` for SGD's ``nesterov``, to which groups without momentum are indifferent."""
    found = [bool(group.get("nesterov")) for group in groups if group.get("momentum")]
    if any(found) and not all(found):
        index = next(i for i, group in enumerate(groups) if group.get("momentum") and not group.get("nesterov"))
        raise ValueError(
            f"parameter group {index} of the SGD optimizer: nesterov={groups[index].get('nesterov')!r}, but another "
            "has True, and SOFIM's numerator holds for the whole optimizer: set group['nesterov'] alike in all groups "
            "with momentum, or pass numerator='nesterov' or numerator='moment'"
        )
    return "nesterov" if any(found) else "moment"


def _renamed(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group without options that only SGD has; keys that the user added are kept."""
    kept = {name: _unwrapped(name, value) for name, value in from_torch.kept(group, ONLY_SGD).items()}
    return {**kept, "decoupled_weight_decay": False}


def _unwrapped(name: str, value: Any) -> Any:
    """A number instead of a one-element tensor, which SGD accepts for these options and SOFIM does not."""
    return from_torch.unwrapped(value) if name in ("momentum", "dampening", "weight_decay") else value


def convert(
    given: Taken, groups: Sequence[dict[str, Any]], defaults: dict[str, Any], state: MutableMapping[Tensor, Any]
) -> None:
    """Convert a new optimizer's learning rates to SOFIM's, and SGD's buffers to its state.

    Args:
        given: the values that the optimizer was created from.
        groups: its parameter groups, whose values its constructor has checked.
        defaults: its constructor's arguments.
        state: its state; for each buffer, :func:`sofim_fused.step.gather.ensure_state` creates its entries.
    """
    with torch.inference_mode(False), torch.no_grad():  # otherwise nothing could write to the new tensors
        for values, dampening in zip([*groups, defaults], given.dampenings, strict=True):
            rho = values["rho"].detach() if isinstance(values["rho"], Tensor) else values["rho"]
            factor = float(rho) * (1 - dampening) / (1 - float(values["momentum"]))
            values.update(
                {name: from_torch.scaled(values[name], factor) for name in from_torch.RATES if name in values}
            )
        for entry in given.buffers:
            group = groups[entry.group]
            momentum = float(group["momentum"])
            gather.ensure_state(entry, group, state)
            known = state[entry.param]
            dtype = torch.float32 if "exp_avg_scale" in known else known["exp_avg"].dtype
            wide = entry.grad.detach().to(torch.promote_types(entry.grad.dtype, dtype))
            gather.store_moment(entry.param, known, wide * ((1 - momentum) / (1 - given.dampenings[entry.group])))
            known["step"].fill_(settled(momentum) if given.steps is None else given.steps)


def settled(momentum: float) -> int:
    """The smallest count t ≥ 1 at which the bias correction 1/(1 - βᵗ) is 1 in float64: βᵗ ≤ 2⁻⁵⁴."""
    return max(1, math.ceil(54 * math.log(2) / -math.log(momentum))) if momentum else 1


# Refusals


def _check_steps(steps: Any) -> None:
    if steps is None:
        return
    if not isinstance(steps, Integral) or isinstance(steps, bool):
        raise TypeError(f"steps={steps!r}: pass how many updates SGD took, an int, or None if that is not known")
    if not 1 <= int(steps) < 2**62:
        raise ValueError(f"steps={steps!r}: it must be at least 1 and less than 2**62; pass None if it is not known")


def _dampening(where: str, group: Mapping[str, Any]) -> float:
    """τ of a group; SGD without momentum does not use it."""
    if not group.get("momentum"):
        return 0.0
    value = _unwrapped("dampening", group.get("dampening", 0.0))
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{where}: dampening={value!r}: pass a float")
    if not -math.inf < float(value) < 1:
        raise ValueError(
            f"{where}: dampening={value!r}: gradients do not enter the buffer, or with the wrong sign: set it below 1"
        )
    return float(value)
