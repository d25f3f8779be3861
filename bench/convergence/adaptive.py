"""An experiment: SOFIM with a diagonal that adapts to the gradients, in plain PyTorch.

It is not part of the package and not fast; it shows which losses such an optimizer would reach.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["DIAGONALS", "NUMERATORS", "AdaptiveSOFIM"]

DIAGONALS = ("row", "factored", "element")
NUMERATORS = ("moment", "nesterov")


class AdaptiveSOFIM(Optimizer):
    r"""A step through F = m̂ m̂ᵀ/T + ρ D, or through D alone, where D is a diagonal of root mean squares of gradients.

    With running means of the gradient, m, and of its squares over each block of elements, v::

        m ← β m + (1-β) g                 m̂ = m / (1 - βᵗ)
        v ← β₂ v + (1-β₂) mean(g²)        s = √(v / (1 - β₂ᵗ)) + eps        D = diag(s)
        w ← (1 - lr λ) w - lr D⁻¹ n                                                        without ρ
        w ← (1 - lr λ) w - lr D⁻¹ (n - m̂ (m̂ᵀ D⁻¹ n) / (ρ T + m̂ᵀ D⁻¹ m̂))                   = lr ρ F⁻¹ n

    where T is the sum of s over all elements with a gradient, and the numerator n is the moment m̂ or the look-ahead
    (β m + (1-β) g) / (1 - βᵗ⁺¹) of Nesterov's method. A block of the diagonal is

    - ``"row"``: what one index of the first dimension selects; a tensor of one dimension is a single block,
    - ``"element"``: one element, which with ``"nesterov"`` and β₂ = 0.999 is about NAdam's step,
    - ``"factored"``: an element too, its s being the product of a row's and a column's,
      (√rᵢ + eps) √max(cⱼ / mean(c), floor), with r and c the running means of g² over rows and over columns, corrected
      as v is, and 0/0 = 1. Columns are all dimensions but the first. A tensor of one dimension has its own s for
      each element.

    Args:
        params: real parameters of one floating-point type on one device, in any number of groups.
        lr: of Adam's size: no element of D⁻¹ n is much larger than 1.
        momentum: β, from 0 on and below 1.
        beta2: β₂, in the same range.
        diagonal: a name of ``DIAGONALS``.
        numerator: a name of ``NUMERATORS``.
        rho: ρ > 0, without dimension; ``None``: no term of rank one.
        weight_decay: λ, of the decoupled kind.
        floor: of a column's share of the squares, which bounds the step of a tensor; only with ``"factored"``.
        eps: added to each root.

    State per parameter: ``exp_avg`` (of its shape), ``step`` (a number), and ``squares``, a list of tensors: of shape
    (rows,), or () for one dimension (``"row"``); (rows,) and (columns,) (``"factored"``); the parameter's
    (``"element"``). Squares of gradients beyond 1e19 in float32 overflow.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 4e-3,
        momentum: float = 0.9,
        beta2: float = 0.99,
        *,
        diagonal: str = "factored",
        numerator: str = "nesterov",
        rho: float | None = None,
        weight_decay: float = 0.0,
        floor: float = 0.1,
        eps: float = 1e-8,
    ) -> None:
        for name, value in (("lr", lr), ("weight_decay", weight_decay), ("eps", eps)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value}, expected a finite number from 0 on")
        for name, value in (("momentum", momentum), ("beta2", beta2)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} is {value}, expected a number from 0 on and below 1")
        if not 0 < floor <= 1:
            raise ValueError(f"floor is {floor}, expected a number above 0, and 1 at most")
        if rho is not None and not 0 < rho < math.inf:
            raise ValueError(f"rho is {rho}, expected a finite number above 0, or None for no term of rank one")
        if diagonal not in DIAGONALS:
            raise ValueError(f"diagonal is {diagonal!r}, expected one of {', '.join(DIAGONALS)}")
        if numerator not in NUMERATORS:
            raise ValueError(f"numerator is {numerator!r}, expected one of {', '.join(NUMERATORS)}")
        super().__init__(params, {"lr": lr, "momentum": momentum, "beta2": beta2, "weight_decay": weight_decay})
        self.diagonal, self.numerator, self.rho, self.floor, self.eps = diagonal, numerator, rho, floor, eps

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; nothing waits for the device.

        Args:
            closure: computes the loss and its gradients again, and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parts = [self._observe(group, params) for group in self.param_groups if (params := _with_gradients(group))]
        if self.rho is not None and parts:
            self._take_rank_one_off(parts)
        for part in parts:
            shrink = 1 - part.lr * part.weight_decay
            if shrink != 1:
                torch._foreach_mul_(part.params, shrink)
            torch._foreach_mul_(part.steps, -part.lr)
            torch._foreach_add_(part.params, part.steps)
        return loss

    def _observe(self, group: dict[str, Any], params: list[Tensor]) -> _Part:
        """A group's moments and squares brought up to date, and D⁻¹ n."""
        beta, beta2 = group["momentum"], group["beta2"]
        grads = [p.grad for p in params if p.grad is not None]
        states = [self.state[p] for p in params]
        for p, state in zip(params, states, strict=True):
            if not state:
                state["step"] = 0
                state["exp_avg"] = torch.zeros_like(p)
                state["squares"] = self._blank_squares(p)
            state["step"] += 1
        counts = [state["step"] for state in states]
        moments = [state["exp_avg"] for state in states]
        torch._foreach_lerp_(moments, grads, 1 - beta)
        self._observe_squares(grads, states, beta2)
        scales = self._scales(params, states, [1 - beta2**t for t in counts])
        if self.numerator == "nesterov":
            steps = list(torch._foreach_lerp(grads, moments, beta))
            torch._foreach_div_(steps, [1 - beta ** (t + 1) for t in counts])
        else:
            steps = list(torch._foreach_div(moments, [1 - beta**t for t in counts]))
        _divide(steps, scales)
        corrected = []
        if self.rho is not None:
            corrected = list(torch._foreach_div(moments, [1 - beta**t for t in counts]))
        return _Part(params, steps, scales, corrected, group["lr"], group["weight_decay"])

    def _per_element(self, tensor: Tensor) -> bool:
        return self.diagonal == "element" or (self.diagonal == "factored" and tensor.dim() < 2)

    def _blank_squares(self, p: Tensor) -> list[Tensor]:
        if self._per_element(p):
            return [torch.zeros_like(p)]
        if p.dim() < 2:
            return [p.new_zeros(())]
        rows = p.new_zeros(p.shape[0])
        return [rows, p.new_zeros(p[0].numel())] if self.diagonal == "factored" else [rows]

    def _observe_squares(self, grads: list[Tensor], states: list[dict[str, Any]], beta2: float) -> None:
        whole, factors = [], []  # of elements, beside their gradients; of blocks, beside the means of their squares
        for g, state in zip(grads, states, strict=True):
            if self._per_element(g):
                whole.append((state["squares"][0], g))
            elif g.dim() < 2:
                factors.append((state["squares"][0], g.square().mean()))
            else:
                matrix = g.flatten(1)
                for dim, squares in zip((1, 0), state["squares"], strict=False):
                    means = torch.linalg.vector_norm(matrix, dim=dim).square_().div_(matrix.shape[dim])
                    factors.append((squares, means))
        if whole:
            squares, gradients = map(list, zip(*whole, strict=True))
            torch._foreach_mul_(squares, beta2)
            torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        if factors:
            squares, means = map(list, zip(*factors, strict=True))
            torch._foreach_lerp_(squares, means, 1 - beta2)

    def _scales(self, params: list[Tensor], states: list[dict[str, Any]], corrections: list[float]) -> list[_Factors]:
        """Factors of each parameter's s, of shapes that broadcast to its own."""
        roots = list(torch._foreach_div([state["squares"][0] for state in states], corrections))
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, self.eps)
        scales: list[_Factors] = []
        for p, state, root in zip(params, states, roots, strict=True):
            if p.dim() < 2 or self._per_element(p):
                scales.append((root,))
                continue
            rows = root.view(-1, *[1] * (p.dim() - 1))
            if self.diagonal == "row":
                scales.append((rows,))
                continue
            columns = state["squares"][1]
            shares = (columns / columns.mean()).nan_to_num_(1.0).clamp_(min=self.floor).sqrt_()
            scales.append((rows, shares.view(1, *p.shape[1:])))
        return scales

    def _take_rank_one_off(self, parts: list[_Part]) -> None:
        """D⁻¹ n becomes ρ F⁻¹ n, with sums over all groups."""
        assert self.rho is not None
        trace, along, squared = [], [], []
        towards = []  # D⁻¹ m̂
        for part in parts:
            along += [torch.sum(m * n) for m, n in zip(part.corrected, part.steps, strict=True)]
            divided = [m.clone() for m in part.corrected]
            _divide(divided, part.scales)
            squared += [torch.sum(m * d) for m, d in zip(part.corrected, divided, strict=True)]
            towards.append(divided)
            for p, factors in zip(part.params, part.scales, strict=True):
                total = math.prod((factor.sum() for factor in factors), start=torch.ones_like(factors[0].sum()))
                trace.append(total * (p.numel() / math.prod(factor.numel() for factor in factors)))
        sums = (torch.stack(terms).sum() for terms in (trace, along, squared))
        total, along_sum, squared_sum = sums
        share = along_sum / (self.rho * total + squared_sum)
        for part, divided in zip(parts, towards, strict=True):
            torch._foreach_mul_(divided, share)
            torch._foreach_sub_(part.steps, divided)


_Factors = tuple[Tensor, ...]


class _Part(NamedTuple):
    """A group in a step: ``steps`` is what the weights change by, but for -lr; ``corrected`` is m̂, where it is used."""

    params: list[Tensor]
    steps: list[Tensor]
    scales: list[_Factors]
    corrected: list[Tensor]
    lr: float
    weight_decay: float


def _with_gradients(group: dict[str, Any]) -> list[Tensor]:
    return [p for p in group["params"] if p.grad is not None]


def _divide(tensors: list[Tensor], scales: list[_Factors]) -> None:
    for tensor, factors in zip(tensors, scales, strict=True):
        for factor in factors:
            tensor.div_(factor)
