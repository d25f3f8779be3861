"""From sums to coefficients: the Sherman-Morrison step as scalar algebra, in float64 and on the device.

Notation, per tensor i of a Fisher block: w the weight, g the gradient, m the first moment, β ``momentum``, ρ ``rho``,
η ``lr``, t the updates received so far including this one, c = 1/(1 - β^t), m̂ = c·m, v = s·κ·g + λ·w the gradient
that enters the moment, with s = -1 for ``maximize``, κ the clip factor, λ the L2 weight decay; and r the vector that
the inverse of the Fisher matrix is applied to: m̂ ("moment"), v ("gradient") or the look-ahead a·m + b·v ("nesterov")
with

    a = β/(1 - β^(t+1))        b = (1-β)/(1 - β^(t+1))        1 - β^(t+1) = (1-β) + β/c

The regularized Fisher matrix of a block is F = m̂ m̂ᵀ + D with D = diag(ρᵢ), and Sherman-Morrison gives, in a form that
never subtracts nearly equal numbers if r is m̂:

    S = Σ cᵢ²‖mᵢ‖²/ρᵢ        P = Σ cᵢ(mᵢ·rᵢ)/ρᵢ
    F⁻¹m̂ = cᵢmᵢ / (ρᵢ(1 + S))        F⁻¹r = (rᵢ - cᵢmᵢ P/(1 + S)) / ρᵢ

With one ρ and one β these are SOFIM's update (arXiv 2403.02833, Algorithm 1): m̂/(ρ + ‖m̂‖²).

A step uses this twice. ``fold`` turns each tensor's sums into its part of S and P and adds these up per Fisher block.
``solve`` turns the totals into the coefficients of the update. This module defines both, with PyTorch's operators;
``csrc/step/solve.h`` is the same in C++ and CUDA.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sofim_fused.backends.interface import (
    FISHER,
    Coefficients,
    GradientStep,
    GuardSettings,
    Settings,
    Sums,
    sum_dtype,
)
from sofim_fused.checks import NUMERATORS

FLOAT32_MAX = torch.finfo(torch.float32).max
TILE = 16_384  # elements summed at once; below the size at which torch splits one sum among threads
CANCELLED = 2.0**-46  # (2 ulp of float32 arithmetic)², above the error of float64 sums


class TorchSolve:
    """``fold`` and ``solve`` of :class:`sofim_fused.backends.interface.Passes` in pure PyTorch, for any device."""

    def fold(
        self,
        steps: Sequence[Tensor],
        settings: Settings,
        sums: Sums,
        guarded: bool,
        class_of: Tensor | None = None,
        classes: int = 1,
    ) -> tuple[Tensor, Tensor]:
        hyper = hyper_of(settings)
        rows = (guarded_rows if guarded else plain_rows)(hyper, sums, correction(steps, hyper.momentum), settings)
        rows = rows.unsqueeze(0)
        squares = None if sums.gg is None else sums.gg.unsqueeze(0)
        if class_of is not None and classes > 1:
            rows = by_class(rows, class_of, classes)
            squares = None if squares is None else by_class(squares, class_of, classes)
        blocks = added_up(rows, settings)
        # A plain step has no use for the second result, which can be anything of that shape.
        return blocks, squares.sum(-1) if guarded and squares is not None else blocks.sum((1, 2))

    def solve(
        self,
        steps: Sequence[Tensor],
        settings: Settings,
        blocks: Tensor,
        guard: GuardSettings | None,
        square: Tensor | None,
    ) -> tuple[Coefficients, Tensor | None, Tensor | None]:
        hyper = hyper_of(settings)
        corrections = correction(steps, hyper.momentum)
        if guard is None:
            advance(steps, None)
            return coefficients(settings, hyper, blocks, corrections), None, None
        assert square is not None
        norm, gain, skip = guard_of(square, guard)
        advance(steps, skip)
        update = coefficients(settings, hyper, at_gain(blocks, gain), corrections)
        return update._replace(gain=gain if guard.has_gain else None, skip=skip), norm, skip


class Hyper(NamedTuple):
    """The columns of :attr:`Settings.hyper` with one value per tensor; float64 vectors of n."""

    lr: Tensor
    momentum: Tensor
    rho: Tensor
    weight_decay: Tensor
    l2: Tensor
    sign: Tensor


def hyper_of(settings: Settings) -> Hyper:
    """Each tensor's hyperparameters: those of its group."""
    return Hyper(*settings.hyper.t().index_select(1, settings.group_of).unbind())


def correction(steps: Sequence[Tensor], momentum: Tensor) -> Tensor:
    """1/(1 - β^t) per tensor, t being its count in ``steps`` plus one; accurate to a few ulp, even for β near 1."""
    if not steps:
        return momentum.clone()
    counts = torch.stack(list(steps)).to(momentum.dtype) + 1
    return torch.expm1(counts * momentum.log()).neg_().reciprocal_()


def by_class(parts: Tensor, class_of: Tensor, classes: int) -> Tensor:
    """Tensors' parts, ``[1, ..., n]``, apart by class: ``[classes, ..., n]``, 0 where a tensor is of another class."""
    numbers = torch.arange(classes, device=class_of.device).view(-1, *[1] * (parts.dim() - 1))
    return torch.where(class_of == numbers, parts, 0.0)  # a product with zero would keep NaN


def look_ahead(momentum: Tensor, correction: Tensor) -> tuple[Tensor, Tensor]:
    """A and b of ``numerator="nesterov"`` per tensor: what the new moment and the gradient are multiplied by."""
    later = (1 - momentum) + momentum / correction
    return momentum / later, (1 - momentum) / later


# Plain step: m is already updated, and its sums are known.


def plain_rows(hyper: Hyper, sums: Sums, correction: Tensor, settings: Settings) -> Tensor:
    """Each tensor's part of S (and of P, if r contains v), ``[1 or 2, n]``, from ``accumulate``'s sums."""
    weight = correction / hyper.rho
    rows = [weight * correction * sums.mm]
    if settings.reads_gradient:
        assert sums.mg is not None
        mv = hyper.sign * sums.mg
        mr = mv if sums.mw is None else mv + _decayed(hyper.l2, sums.mw)
        if NUMERATORS[settings.numerator] == "nesterov":
            by_moment, by_gradient = look_ahead(hyper.momentum, correction)
            mr = by_moment * sums.mm + by_gradient * mr
        rows.append(weight * mr)
    return torch.stack(rows)


# Guarded step: nothing is written yet, and the clip factor κ is not known. The sums of the new moment are polynomials
# in κ; their coefficients are added up over the block, so that one reduction is enough.


def guarded_rows(hyper: Hyper, sums: Sums, correction: Tensor, settings: Settings) -> Tensor:
    """Each tensor's part of polynomials in κ, from ``dots``' sums, ``[6 or 9, n]``: coefficients of 1, κ and κ².

    The first is S, the last P (if r contains v). The second is what S would be if nothing cancelled in
    β m + (1-β) v: the scale of S's rounding error.
    """
    assert sums.mg is not None
    assert sums.gg is not None
    beta = hyper.momentum
    one_minus_beta = 1 - beta
    zero = torch.zeros_like(sums.gg)
    mv = [zero, hyper.sign * sums.mg, zero]
    vv = [zero, zero, sums.gg]
    still = beta * sums.mm.sqrt()
    if sums.mw is not None and sums.gw is not None and sums.ww is not None:
        mv[0] = _decayed(hyper.l2, sums.mw)
        vv[0] = _decayed(hyper.l2.square(), sums.ww)
        vv[1] = 2 * hyper.sign * _decayed(hyper.l2, sums.gw)
        still = still + one_minus_beta * vv[0].sqrt()
    moving = one_minus_beta * sums.gg.sqrt()
    weight = correction / hyper.rho
    square = weight * correction
    mm = [2 * beta * one_minus_beta * a + one_minus_beta.square() * b for a, b in zip(mv, vv, strict=True)]
    rows = [square * x for x in mm]
    rows[0] = rows[0] + square * beta.square() * sums.mm
    rows += [square * still.square(), square * 2 * still * moving, square * moving.square()]
    if settings.reads_gradient:
        mr = [beta * a + one_minus_beta * b for a, b in zip(mv, vv, strict=True)]
        if NUMERATORS[settings.numerator] == "nesterov":
            mm[0] = mm[0] + beta.square() * sums.mm
            by_moment, by_gradient = look_ahead(hyper.momentum, correction)
            mr = [by_moment * a + by_gradient * b for a, b in zip(mm, mr, strict=True)]
        rows += [weight * x for x in mr]
    return torch.stack(rows)


def added_up(rows: Tensor, settings: Settings) -> Tensor:
    """Add the columns of ``[..., n]`` that share a Fisher block, in a fixed order: ``[..., blocks]``."""
    fisher = FISHER[settings.fisher]
    if fisher == "parameter":
        return rows
    if fisher == "model":
        return rows.sum(-1, keepdim=True)
    return torch.stack([part.sum(-1) for part in rows.split(settings.sizes, dim=-1)], dim=-1)


def ordered_sum(x: Tensor) -> Tensor:
    """The sum of a vector, 0-dimensional, added in the same order for any number of threads."""
    if x.numel() <= TILE:
        return x.sum()
    whole = x.numel() // TILE * TILE
    rows = x.narrow(0, 0, whole).view(-1, TILE).sum(1)
    return ordered_sum(torch.cat((rows, x.narrow(0, whole, x.numel() - whole).sum().view(1))))


def guard_of(square: Tensor, guard: GuardSettings) -> tuple[Tensor, Tensor, Tensor | None]:
    """The true gradients' norm, the gain κ, and whether to skip the step (``None``: it cannot be skipped)."""
    norm = square.sqrt()
    if guard.grad_scale is None:
        gain = clip_factor(norm, guard.max_norm)
    else:
        unscale = on_device_of(norm, guard.grad_scale).reciprocal()
        norm = norm * unscale
        gain = clip_factor(norm, guard.max_norm) * unscale
    skip = torch.isfinite(norm).logical_not() if guard.skip_nonfinite else None
    if guard.found_inf is not None:
        found = on_device_of(norm, guard.found_inf) != 0
        skip = found if skip is None else skip | found
    return norm, gain, skip


def sum_of(numbers: Tensor) -> Tensor:
    """The sum of a vector; on a CPU added up one by one, as in a native step, which then has the same bits."""
    return numbers.cumsum(0)[-1] if numbers.device.type == "cpu" and len(numbers) else numbers.sum()


def on_device_of(like: Tensor, value: Tensor | float) -> Tensor:
    """A number, or a one-element tensor, as a 0-dimensional tensor of ``like``'s dtype on its device."""
    if not isinstance(value, Tensor):
        return like.new_full((), value)
    # A non-blocking copy to the CPU would be read before it has arrived.
    return value.detach().reshape(()).to(like.device, like.dtype, non_blocking=like.device.type != "cpu")


def clip_factor(norm: Tensor, max_norm: float | None) -> Tensor:
    """min(1, max_norm/norm), and 1 for a zero norm or no limit; 0-dimensional."""
    one = torch.ones_like(norm)
    return one if max_norm is None else torch.where(norm > float(max_norm), float(max_norm) / norm, one)


def at_gain(blocks: Tensor, gain: Tensor) -> Tensor:
    """:func:`guarded_rows`' polynomials, added up, at κ = ``gain``: S (and P) per block, ``[1 or 2, blocks]``."""
    constant, linear, square = blocks.unflatten(0, (len(blocks) // 3, 3)).unbind(1)
    # If the norm overflows, κ is zero and the other coefficients are infinite.
    norm, scale, *cross = torch.where(gain == 0, constant, constant + gain * (linear + gain * square)).unbind()
    # Where the terms of the moment cancel, S is only their rounding error. It has to be at least as large as that of
    # the moment itself: otherwise the step, which is proportional to the moment, would leave the trust region.
    return torch.stack((torch.maximum(norm, CANCELLED * scale), *cross))


def coefficients(settings: Settings, hyper: Hyper, blocks: Tensor, correction: Tensor) -> Coefficients:
    """The second pass's coefficients from S (and P) per block, ``[1 or 2, blocks]``."""
    norm, *cross = blocks.unbind()
    shrink = correction / (hyper.rho * (1 + per_tensor(norm, settings)))
    if not settings.reads_gradient:
        weight = 1 - hyper.lr * hyper.weight_decay if settings.scales_weight else None
        return Coefficients(moment=finite(-hyper.lr * shrink), weight=weight)
    moment = hyper.lr * shrink * per_tensor(cross[0], settings)
    if NUMERATORS[settings.numerator] == "nesterov":
        by_moment, _ = look_ahead(hyper.momentum, correction)
        moment = hyper.lr * (shrink * per_tensor(cross[0], settings) - by_moment / hyper.rho)
    return Coefficients(finite(moment), *_gradient_step(settings, hyper, correction))


def gradient_step(settings: Settings, steps: Sequence[Tensor]) -> GradientStep:
    """The gradient's part of the update, which does not depend on any sum; ``steps`` are not advanced yet."""
    hyper = hyper_of(settings)
    return _gradient_step(settings, hyper, correction(steps, hyper.momentum))


def _gradient_step(settings: Settings, hyper: Hyper, correction: Tensor) -> GradientStep:
    rate = hyper.lr / hyper.rho
    if NUMERATORS[settings.numerator] == "nesterov":
        rate = rate * look_ahead(hyper.momentum, correction)[1]
    weight = 1 - hyper.lr * hyper.weight_decay - _decayed(hyper.l2, rate) if settings.scales_weight else None
    return GradientStep(weight=weight, gradient=finite(-rate * hyper.sign))


def per_tensor(blocks: Tensor, settings: Settings) -> Tensor:
    """The value of each tensor's block."""
    return blocks.index_select(0, settings.group_of) if FISHER[settings.fisher] == "group" else blocks


def _decayed(l2: Tensor, x: Tensor) -> Tensor:
    """l2·x, and 0 where there is no L2 decay: x may be infinite there, and zero times infinity is NaN."""
    return torch.where(l2 == 0, 0.0, l2 * x)


def finite(coefficients: Tensor) -> Tensor:
    """Coefficients limited to the range of float32, in place."""
    # Beyond the range of float32, a coefficient would become infinite, and its product with a zero moment NaN.
    return coefficients.clamp_(-FLOAT32_MAX, FLOAT32_MAX)


def advance(steps: Sequence[Tensor], skip: Tensor | None) -> None:
    """Count one more update of each tensor, unless ``skip`` (0-dimensional bool) holds."""
    if not steps:
        return
    if skip is None:
        torch._foreach_add_(list(steps), 1)
    else:  # a list: torch would read the value of a single tensor back to the host
        torch._foreach_add_(list(steps), [skip.logical_not().to(torch.int64)] * len(steps))


def no_sums(device: torch.device) -> Sums:
    """The sums of no tensors."""
    none = torch.zeros(0, dtype=sum_dtype(device), device=device)
    return Sums(*[none] * len(Sums._fields))
