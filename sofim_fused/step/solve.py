"""Sums to coefficients: the Sherman-Morrison step as scalar algebra, in float64 and on the device.

Notation, per tensor i of a Fisher block: w the weight, g the gradient, m the first moment, β ``momentum``, ρ ``rho``,
η ``lr``, t the updates received so far including this one, c = 1/(1 - β^t), m̂ = c·m, and v the vector that the
Fisher matrix is applied to: m̂ ("moment") or the gradient s·κ·g + λ·w ("gradient"), with s = -1 for ``maximize``, κ the
clip factor, λ the L2 weight decay. The regularized Fisher matrix of a block is F = m̂ m̂ᵀ + D with D = diag(ρᵢ), and
Sherman-Morrison gives, in a form that never subtracts nearly equal numbers where v is m̂:

    S = Σ cᵢ²‖mᵢ‖²/ρᵢ        P = Σ cᵢ(mᵢ·vᵢ)/ρᵢ
    F⁻¹m̂ = cᵢmᵢ / (ρᵢ(1 + S))        F⁻¹v = (vᵢ - cᵢmᵢ P/(1 + S)) / ρᵢ

With one ρ and one β these are SOFIM's update (arXiv 2403.02833, Algorithm 1): m̂/(ρ + ‖m̂‖²).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sofim_fused.backends import Coefficients, Decay, GradientStep, Sums, sum_dtype

Group = Mapping[str, Any]

FLOAT32_MAX = torch.finfo(torch.float32).max
CANCELLED = 2.0**-46  # (2 ulp of float32 arithmetic)², above the error of float64 sums


class Solver:
    """Hyperparameters of the n tensors of one device as float64 vectors, and the algebra over them.

    Args:
        device: where the vectors live.
        sizes: how many of the tensors belong to each parameter group; tensors are in the order of groups.
        numerator: ``"moment"`` or ``"gradient"``.
        fisher: ``"model"``, ``"group"`` or ``"parameter"``.
    """

    def __init__(self, device: torch.device, sizes: Sequence[int], numerator: str, fisher: str) -> None:
        self.device = device
        self.sizes = list(sizes)
        self.numerator = numerator
        self.fisher = fisher
        dtype = sum_dtype(device)
        with torch.inference_mode(False):  # or no later step could write to them
            self._vectors = {name: torch.zeros(sum(sizes), dtype=dtype, device=device) for name in _VECTORS}
            self._block_of = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
        self._written: dict[tuple[str, int], float] = {}
        self._decay: Decay | None = None
        self._decay_key: tuple[tuple[float, float, float], ...] = ()
        self._shrinks = False
        for block, part in enumerate(self._block_of.split(self.sizes)):
            part.fill_(block)  # a kernel's argument, where a list would be copied and waited for

    def serves(self, sizes: Sequence[int], numerator: str, fisher: str) -> bool:
        """Whether these scalars were made for such tensors and such a method."""
        return (self.sizes, self.numerator, self.fisher) == (list(sizes), numerator, fisher)

    def refresh(self, groups: Sequence[Group]) -> Decay:
        """Take over the groups' hyperparameters as they are now; return how gradients enter the moments.

        Values on the host are written only when they changed, and as kernel arguments; tensors on the device are copied
        there. So nothing here waits for the device.
        """
        start = 0
        for index, (group, size) in enumerate(zip(groups, self.sizes, strict=True)):
            for name, read in _VECTORS.items() if size else ():
                self._write(name, index, self._vectors[name].narrow(0, start, size), read(group))
            start += size
        present = [(group, size) for group, size in zip(groups, self.sizes, strict=True) if size]
        self._shrinks = any(_decoupled(group) for group, _ in present)
        key = tuple(entering(group) for group, _ in present)
        if self._decay is None or key != self._decay_key:
            rows = [row for row, (_, size) in zip(key, present, strict=True) for _ in range(size)]
            self._decay_key, self._decay = key, decay_of(rows, self.numerator == "gradient")
        return self._decay

    def _write(self, name: str, index: int, part: Tensor, value: float | Tensor) -> None:
        if isinstance(value, Tensor) and value.device.type == "cpu":
            value = float(value.detach())
        if isinstance(value, Tensor):
            part.fill_(value.detach().reshape(()).to(part.device))
            self._written.pop((name, index), None)
        elif self._written.get((name, index)) != value:
            part.fill_(value)
            self._written[name, index] = value

    def correction(self, steps: Sequence[Tensor]) -> Tensor:
        """1/(1 - β^t) per tensor, t being one more than its count in ``steps``; a few ulp off at most, β near 1 too."""
        if not steps:
            return self._vectors["momentum"].clone()
        counts = torch.stack(list(steps)).to(sum_dtype(self.device)) + 1
        return torch.expm1(counts * self._vectors["momentum"].log()).neg_().reciprocal_()

    # Plain step: m is already updated, and its sums are known.

    def plain_rows(self, sums: Sums, correction: Tensor) -> Tensor:
        """Each tensor's part of S (and of P, for the gradient form), ``[1 or 2, n]``, from ``accumulate``'s sums."""
        v = self._vectors
        weight = correction / v["rho"]
        rows = [weight * correction * sums.mm]
        if self.numerator == "gradient":
            assert sums.mg is not None
            mv = v["sign"] * sums.mg
            rows.append(weight * (mv if sums.mw is None else mv + _decayed(v["l2"], sums.mw)))
        return torch.stack(rows)

    # Guarded step: nothing is written yet, and the clip factor κ is not known. The sums of the moment that is to come
    # are polynomials in κ; their coefficients are added up over the block, so that one reduction serves everything.

    def guarded_rows(self, sums: Sums, correction: Tensor) -> Tensor:
        """Each tensor's part of polynomials in κ, from ``dots``' sums, ``[6 or 9, n]``: coefficients of 1, κ and κ².

        The first is S, the last (gradient form) P. The second is what S would be if nothing cancelled in
        β m + (1-β) v: the scale of S's rounding error.
        """
        assert sums.mg is not None
        assert sums.gg is not None
        v = self._vectors
        beta = v["momentum"]
        one_minus_beta = 1 - beta
        zero = torch.zeros_like(sums.gg)
        mv = [zero, v["sign"] * sums.mg, zero]
        vv = [zero, zero, sums.gg]
        still = beta * sums.mm.sqrt()
        if sums.mw is not None and sums.gw is not None and sums.ww is not None:
            mv[0] = _decayed(v["l2"], sums.mw)
            vv[0] = _decayed(v["l2"].square(), sums.ww)
            vv[1] = 2 * v["sign"] * _decayed(v["l2"], sums.gw)
            still = still + one_minus_beta * vv[0].sqrt()
        moving = one_minus_beta * sums.gg.sqrt()
        weight = correction / v["rho"]
        square = weight * correction
        rows = [
            square * (2 * beta * one_minus_beta * a + one_minus_beta.square() * b) for a, b in zip(mv, vv, strict=True)
        ]
        rows[0] = rows[0] + square * beta.square() * sums.mm
        rows += [square * still.square(), square * 2 * still * moving, square * moving.square()]
        if self.numerator == "gradient":
            rows += [weight * (beta * a + one_minus_beta * b) for a, b in zip(mv, vv, strict=True)]
        return torch.stack(rows)

    @staticmethod
    def at_gain(blocks: Tensor, gain: Tensor) -> Tensor:
        """:meth:`guarded_rows`' polynomials, added up, at κ = ``gain``: S (and P) per block, ``[1 or 2, blocks]``."""
        constant, linear, square = blocks.view(-1, 3, blocks.shape[-1]).unbind(1)
        # A norm that overflows makes κ zero and the other coefficients infinite.
        norm, scale, *cross = torch.where(gain == 0, constant, constant + gain * (linear + gain * square)).unbind()
        # Where the terms of the moment cancel, S is their rounding error: as large as the moment's own, or the step,
        # which is proportional to that moment, would leave the trust region.
        return torch.stack((torch.maximum(norm, CANCELLED * scale), *cross))

    def coefficients(self, blocks: Tensor, correction: Tensor) -> Coefficients:
        """The second pass's coefficients from S (and P) per block, ``[1 or 2, blocks]``."""
        v = self._vectors
        norm, *cross = blocks.unbind()
        shrink = correction / (v["rho"] * (1 + self._per_tensor(norm)))
        if self.numerator == "moment":
            return Coefficients(moment=_finite(-v["lr"] * shrink), weight=self._shrunk())
        moment = v["lr"] * shrink * self._per_tensor(cross[0])
        return Coefficients(_finite(moment), *self.gradient_step())

    def gradient_step(self) -> GradientStep:
        """The gradient form's part of the update that is known before any sum is."""
        v = self._vectors
        rate = v["lr"] / v["rho"]
        weight = self._shrunk()
        assert self._decay is not None
        if self._decay.weight is not None:
            weight = (1 if weight is None else weight) - rate * v["l2"]
        return GradientStep(weight=weight, gradient=_finite(-rate * v["sign"]))

    def _shrunk(self) -> Tensor | None:
        return 1 - self._vectors["lr"] * self._vectors["weight_decay"] if self._shrinks else None

    def fold(self, rows: Tensor) -> Tensor:
        """Add the columns of ``[..., n]`` that share a Fisher block, in a fixed order: ``[..., blocks]``."""
        if self.fisher == "parameter":
            return rows
        if self.fisher == "model":
            return rows.sum(-1, keepdim=True)
        return torch.stack([part.sum(-1) for part in rows.split(self.sizes, dim=-1)], dim=-1)

    def _per_tensor(self, blocks: Tensor) -> Tensor:
        """The value of each tensor's block."""
        return blocks.index_select(0, self._block_of) if self.fisher == "group" else blocks


def entering(group: Group) -> tuple[float, float, float]:
    """What of a group's settings says how a gradient enters the moment: β, the sign, and the L2 decay."""
    return float(group["momentum"]), _sign(group), _l2(group)


def decay_of(rows: Sequence[tuple[float, float, float]], cross: bool) -> Decay:
    """How gradients enter the moments, from :func:`entering` for each; ``cross``: with sums of products with g."""
    return Decay(
        moment=[beta for beta, _, _ in rows],
        gradient=[(1 - beta) * sign for beta, sign, _ in rows],
        weight=[(1 - beta) * l2 for beta, _, l2 in rows] if any(l2 for _, _, l2 in rows) else None,
        cross=cross,
    )


def _decayed(l2: Tensor, sums: Tensor) -> Tensor:
    """l2·sums, and 0 where there is no L2 decay: a weight may be infinite there, and zero times infinity is NaN."""
    return torch.where(l2 == 0, 0.0, l2 * sums)


def _finite(coefficients: Tensor) -> Tensor:
    # As a float32 a larger one would be infinite, and its product with a zero moment NaN.
    return coefficients.clamp_(-FLOAT32_MAX, FLOAT32_MAX)


def clip_factor(norm: Tensor, max_norm: float | None) -> Tensor:
    """min(1, max_norm/norm), and 1 for a zero norm or no limit; 0-dimensional."""
    one = torch.ones_like(norm)
    return one if max_norm is None else torch.where(norm > float(max_norm), float(max_norm) / norm, one)


def advance(steps: Sequence[Tensor], skip: Tensor | None) -> None:
    """Count one more update of each tensor, unless ``skip`` (0-dimensional bool) holds."""
    if skip is None:
        torch._foreach_add_(list(steps), 1)
    else:  # a list: one tensor for all would be read back
        torch._foreach_add_(list(steps), [skip.logical_not().to(torch.int64)] * len(steps))


def _sign(group: Group) -> float:
    return -1.0 if group["maximize"] else 1.0


def _l2(group: Group) -> float:
    return 0.0 if group["decoupled_weight_decay"] else float(group["weight_decay"])


def _decoupled(group: Group) -> float:
    return float(group["weight_decay"]) if group["decoupled_weight_decay"] else 0.0


def _number(value: Any) -> float | Tensor:
    return value if isinstance(value, Tensor) else float(value)


_VECTORS: dict[str, Callable[[Group], float | Tensor]] = {
    "lr": lambda group: _number(group["lr"]),
    "rho": lambda group: _number(group["rho"]),
    "momentum": lambda group: _number(group["momentum"]),
    "weight_decay": _decoupled,
    "l2": _l2,
    "sign": _sign,
}
