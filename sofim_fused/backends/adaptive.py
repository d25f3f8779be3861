"""A diagonal that adapts: from sums of squared gradients to D, and from sums to the coefficients of the step.

The Fisher matrix of a block of parameters is F = m̂ m̂ᵀ/T + diag(ρᵢ sᵢ). Here s is the root of a running mean of g²
over blocks of elements, so that D = diag(s) adapts to the scale of the gradients as Adam's denominator does; T = Σ s
over the Fisher block, so that ρ has no dimension, and scaling the loss changes nothing. The step is ηᵢ ρᵢ (F⁻¹v)ᵢ,
which is Adam's η v/s if the term of rank one is left out (ρ infinite). With β₂ ``beta2``, t the number of this update,
c = 1/(1 - β^t), c₂ = 1/(1 - β₂^t), and means over the elements of a tensor, a row, a column, or one element:

    v ← β₂ v + (1 - β₂) mean(g²)      s = √(c₂ v) + eps
    factored: sᵢⱼ = (√(c₂ rᵢ) + eps)·√max(cⱼ/mean(c), τ)     r, c the running means over rows and columns; 0/0 = 1

Sherman-Morrison gives, with Q = Σ m̂ᵀs⁻¹m̂/ρ and P = Σ m̂ᵀs⁻¹v/ρ over the block (ρ of each tensor):

    Δw = -η s⁻¹ (v - m̂ P/(T + Q))          v = m̂:  -η s⁻¹ m̂ T/(T + Q)

v is m̂ ("moment"), the gradient ("gradient"), or the look-ahead (β m + (1-β) g)/(1 - β^(t+1)) ("nesterov"). The signal
q = m̂ᵀD⁻¹m̂/T, without ρ, says how much of the gradients points in one direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sofim_fused.backends.interface import (
    NUMERATORS,
    Coefficients,
    GuardSettings,
    ScaledSums,
    Scales,
    Settings,
    Squares,
    StepTensors,
    Variance,
)
from sofim_fused.backends.solve import (
    added_up,
    advance,
    by_class,
    correction,
    finite,
    guard_of,
    look_ahead,
    ordered_sum,
    per_tensor,
)

COLUMN_FLOOR = 0.1
"""τ, the least value of a column's share c/mean(c): with it, a tensor's step is bounded (docs/adaptive.md)."""


class TorchAdaptive:
    """``adapt``, ``fold_scaled`` and ``solve_scaled`` of :class:`sofim_fused.backends.interface.AdaptivePasses`.

    In pure PyTorch, for any device.
    """

    def adapt(
        self,
        tensors: StepTensors,
        settings: Settings,
        squares: Squares,
        guard: GuardSettings | None,
        square: Tensor | None,
    ) -> tuple[Scales, Tensor | None]:
        hyper = adaptive_hyper_of(settings)
        norm = gain = skip = None
        if guard is not None:
            assert square is not None
            norm, gain, skip = guard_of(square, guard)
            if not guard.has_gain:
                gain = None
        corrections = correction(tensors.steps, hyper.beta2)
        rows, cols, traces = [], [], []
        given = _ByTensor(tensors.variances, squares)
        each = zip(tensors.variances, hyper.beta2.unbind(), corrections.unbind(), hyper.eps.unbind(), strict=True)
        for i, (variance, beta2, correct, eps) in enumerate(each):
            mix = _Mix(beta2, correct, eps, gain, skip)
            factors = _factors(variance, tensors.params[i].numel(), given, i, mix)
            rows.append(factors.rows)
            cols.append(factors.cols)
            traces.append(factors.trace)
        none = squares.total.new_empty(0)
        scales = Scales(
            rows=torch.cat([none, *(part for part in rows if part is not None)]),
            cols=torch.cat([none, *(part for part in cols if part is not None)]),
            trace=torch.stack(traces) if traces else none,
            beta2=hyper.beta2,
            eps=hyper.eps,
            root=corrections.sqrt(),
            gain=gain,
            skip=skip,
        )
        return scales, norm

    def fold_scaled(
        self,
        steps: Sequence[Tensor],
        settings: Settings,
        sums: ScaledSums,
        class_of: Tensor | None = None,
        classes: int = 1,
    ) -> Tensor:
        hyper = adaptive_hyper_of(settings)
        corrections = correction(steps, hyper.momentum)
        m, g = numerator_terms(settings, hyper.momentum, corrections, hyper.sign)
        square = corrections.square() * sums.mm
        cross = corrections * (m * sums.mm + g * sums.mg)
        rows = torch.stack((sums.trace, square / hyper.rho, cross / hyper.rho, square)).unsqueeze(0)
        if class_of is not None and classes > 1:
            rows = by_class(rows, class_of, classes)
        return added_up(rows, settings)

    def solve_scaled(
        self, steps: Sequence[Tensor], settings: Settings, blocks: Tensor | None, skip: Tensor | None
    ) -> tuple[Coefficients, Tensor | None]:
        hyper = adaptive_hyper_of(settings)
        corrections = correction(steps, hyper.momentum)
        m, g = numerator_terms(settings, hyper.momentum, corrections, hyper.sign)
        signal = None
        if blocks is not None:
            traces, *sums, squares = blocks.unbind()
            trace, square, cross = (per_tensor(row, settings) for row in (traces, *sums))
            moment = NUMERATORS[settings.numerator] == "moment"
            # v = m̂: a quotient, because the difference would cancel.
            m = corrections * trace / (trace + square) if moment else m - corrections * cross / (trace + square)
            signal = torch.where(traces == 0, 0.0, squares / traces)  # a block without elements has none
        advance(steps, skip)
        return Coefficients(
            moment=finite(-hyper.lr * m),
            weight=1 - hyper.lr * hyper.weight_decay if settings.scales_weight else None,
            gradient=None if NUMERATORS[settings.numerator] == "moment" else finite(-hyper.lr * g),
        ), signal


class AdaptiveHyper(NamedTuple):
    """The columns of :attr:`Settings.hyper` with one value per tensor; float64 vectors of n. There is no L2 decay."""

    lr: Tensor
    momentum: Tensor
    rho: Tensor
    weight_decay: Tensor
    l2: Tensor
    sign: Tensor
    beta2: Tensor
    eps: Tensor


def adaptive_hyper_of(settings: Settings) -> AdaptiveHyper:
    """Each tensor's hyperparameters: those of its group."""
    return AdaptiveHyper(*settings.hyper.t().index_select(1, settings.group_of).unbind())


def numerator_terms(settings: Settings, momentum: Tensor, correction: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
    """The vector v as factors of the new moment and of the gradient as it is in memory, per tensor."""
    kind = NUMERATORS[settings.numerator]
    if kind == "moment":
        return correction, torch.zeros_like(correction)
    if kind == "gradient":
        return torch.zeros_like(correction), sign
    m, g = look_ahead(momentum, correction)
    return m, g * sign


class _Mix(NamedTuple):
    """How a new mean of g² enters a running one of one tensor, and how that becomes s. All are 0-dimensional."""

    beta2: Tensor
    correction: Tensor
    eps: Tensor
    gain: Tensor | None
    skip: Tensor | None

    def enter(self, running: Tensor, total: Tensor, count: int) -> Tensor:
        """Update a running mean by a sum of g² over ``count`` elements, in place; return it as stored, in float64."""
        old = running.to(total.dtype)
        # Saturated, not infinite: from infinity it could never decay, and no later step would move.
        new = self.entered(old, total.reshape(running.shape), count).clamp(max=torch.finfo(running.dtype).max)
        torch._foreach_copy_([running], [new if self.skip is None else torch.where(self.skip, old, new)])
        return running.to(total.dtype)

    def entered(self, running: Tensor, total: Tensor, count: int) -> Tensor:
        """A running mean after it was updated by a sum of g² over ``count`` elements, in float64."""
        mean = total / max(count, 1)
        if self.gain is not None:
            # With an infinite norm the gain is zero, and so are the gradients that enter m.
            mean = torch.where(self.gain == 0, 0.0, mean * self.gain * self.gain)
        return self.beta2 * running + (1 - self.beta2) * mean

    def root(self, running: Tensor) -> Tensor:
        return running.sqrt() * self.correction.sqrt() + self.eps  # not √(c₂v): the largest v has to stay finite


class _Factors(NamedTuple):
    rows: Tensor | None
    cols: Tensor | None
    trace: Tensor


def _factors(variance: Variance, numel: int, given: _ByTensor, i: int, mix: _Mix) -> _Factors:
    """Update one tensor's running means, and return the factors of its D⁻¹, as vectors, and Σs over this rank's part.

    ``numel``: how many elements this rank has of it.
    """
    count, columns = variance.shape
    if variance.by_element:
        return _Factors(None, None, torch.zeros_like(mix.beta2))
    if variance.row_var is None:
        assert variance.variance is not None
        s = mix.root(mix.enter(variance.variance, given.total[i], columns))
        return _Factors(s.reciprocal().view(1), None, s * numel)
    s = mix.root(mix.enter(variance.row_var, given.rows[i], columns))
    if variance.col_var is None:
        return _Factors(s.reciprocal(), None, ordered_sum(s) * (numel // max(variance.row_var.numel(), 1)))
    running = mix.enter(variance.col_var, given.cols[i], count).reshape(-1)
    if given.col_var is not None:
        mean = mix.entered(given.col_var[i] / max(columns, 1), given.total[i], count * columns)
    else:
        mean = ordered_sum(running) / max(running.numel(), 1)
    share = torch.where(mean == 0, 1.0, running / mean).clamp(min=COLUMN_FLOOR).sqrt()
    return _Factors(s.reciprocal(), share.reciprocal(), ordered_sum(s) * ordered_sum(share))


class _ByTensor:
    """The sums of :class:`Squares` by tensor; ``None`` where a tensor has none."""

    def __init__(self, variances: Sequence[Variance], squares: Squares) -> None:
        self.total = squares.total.unbind()
        self.col_var = squares.col_var
        self.rows = split(squares.rows, [variance.row_var for variance in variances])
        self.cols = split(squares.cols, [variance.col_var for variance in variances])


def split(joined: Tensor, like: Sequence[Tensor | None]) -> list[Tensor]:
    """Parts of a vector, one with as many elements as each of ``like``; empty where that is ``None``."""
    return list(joined.split([0 if part is None else part.numel() for part in like]))


def split_rows(scales: Scales, variances: Sequence[Variance]) -> list[Tensor]:
    """The row factors of each tensor: ``[rows]``, ``[1]``, or empty where each element has its own variance."""
    counts = [
        0 if variance.by_element else 1 if variance.row_var is None else variance.row_var.numel()
        for variance in variances
    ]
    return list(scales.rows.split(counts))
