"""Nyström-SGD: stochastic gradients preconditioned by a Nyström approximation of the Hessian."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["NystromSGD"]


class NystromSGD(Optimizer):
    """A gradient step through the inverse of a Nyström approximation of the Hessian H, plus ρ times the identity.

    Every ``period`` steps m columns C = H[:, I] are taken for randomly chosen weights I, by Hessian-vector products on
    the step's mini-batch. With the eigenvalues Λ and vectors U of the m x m block H[I, I]::

        B = C U |Λ|⁺ Uᵀ Cᵀ = Z Zᵀ        Z = C U |Λ|^(-1/2), d x rank
        w ← w - lr (Z Zᵀ + ρ I)⁻¹ g      = w - (lr/ρ) (g - Z (ρ I + Zᵀ Z)⁻¹ Zᵀ g)

    so that no matrix is formed but Z and some of m x m. The absolute value keeps B positive semidefinite where the loss
    is not convex; where it is, B is the usual Nyström approximation.

    Source: D. Singh, H. Tankaria, M. Yamada, "Nys-Newton: Nyström-Approximated Curvature for Stochastic Optimization",
    arXiv:2110.08577.

    Args:
        params: real parameters of one floating-point type on one device, in any number of groups (which share all
            settings).
        lr: learning rate.
        rho: what is added to each eigenvalue.
        columns: m, at most so many as there are weights.
        period: steps for which a curvature is kept.
        generator: on the CPU, that chooses the columns; ``None``: PyTorch's own.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.1,
        rho: float = 1.0,
        columns: int = 10,
        period: int = 20,
        generator: torch.Generator | None = None,
    ) -> None:
        if not 0 <= lr < math.inf:
            raise ValueError(f"lr is {lr}, expected a finite number from 0 on")
        if not 0 < rho < math.inf:
            raise ValueError(f"rho is {rho}, expected a finite number above 0")
        if columns < 1:
            raise ValueError(f"columns is {columns}, expected 1 at least")
        if period < 1:
            raise ValueError(f"period is {period}, expected 1 at least")
        super().__init__(params, {"lr": lr, "rho": rho})
        self.columns = columns
        self.period = period
        self.generator = generator
        self.steps = 0
        self.factor: Tensor | None = None
        """Z, (d, rank)."""

    @property
    def needs_graph(self) -> bool:
        """Whether the next step takes columns: gradients must then come from ``create_graph=True``."""
        return self.steps % self.period == 0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Take a step with the gradients in ``.grad``.

        Raises:
            ValueError: a closure was given, or a gradient is missing.
            RuntimeError: columns are due, and the gradients have no graph to take them from.
        """
        if closure is not None:
            raise ValueError("a closure would be evaluated once only: call it, then step()")
        params = [p for group in self.param_groups for p in group["params"]]
        grads = []
        for i, p in enumerate(params):
            if p.grad is None:
                raise ValueError(f"parameter {i} of shape {tuple(p.shape)} has no gradient")
            grads.append(p.grad)
        group = self.param_groups[0]
        if self.needs_graph:
            if not any(g.requires_grad for g in grads):
                raise RuntimeError("columns of the Hessian are due: take gradients with create_graph=True")
            self.factor = self._factor(params, grads)
        self.steps += 1
        g = torch.cat([g.detach().reshape(-1) for g in grads])
        z, rho = self.factor, group["rho"]
        assert z is not None
        small = (z.T @ z).double()
        small.diagonal().add_(rho)
        inner = torch.linalg.solve(small, (z.T @ g).double()).to(g)
        g = torch.addmv(g, z, inner, alpha=-1.0)
        start = 0
        for p in params:
            p.add_(g[start : start + p.numel()].view(p.shape), alpha=-group["lr"] / rho)
            start += p.numel()

    def _factor(self, params: list[Tensor], grads: list[Tensor]) -> Tensor:
        ends = list(itertools.accumulate(p.numel() for p in params))
        chosen = torch.randperm(ends[-1], generator=self.generator)[: self.columns].tolist()
        columns = torch.empty(len(chosen), ends[-1], dtype=params[0].dtype, device=params[0].device)
        for row, index in zip(columns, chosen, strict=True):
            tensor = bisect.bisect_right(ends, index)
            with torch.enable_grad():
                one = grads[tensor].reshape(-1)[index - ends[tensor]]
            # What the loss is linear in has no second derivative, and no graph.
            parts: Iterable[Tensor] = (
                torch.autograd.grad(one, params, retain_graph=True, materialize_grads=True)
                if one.requires_grad
                else map(torch.zeros_like, params)
            )
            torch.cat([part.reshape(-1) for part in parts], out=row)
        block = columns[:, chosen].double()
        values, vectors = torch.linalg.eigh((block + block.T) / 2)
        size = values.abs()
        kept = size > size.max() * len(chosen) * torch.finfo(columns.dtype).eps
        scaled = vectors[:, kept] / size[kept].sqrt()
        factor: Tensor = columns.T @ scaled.to(columns)
        return factor
