"""What SOFIM should compute, written down a second time: float64, dense where possible, sharing no code with SOFIM.

Up to ``DENSE`` elements a Fisher block is solved as a matrix, ``(m̂m̂ᵀ + diag(ρ)) x = v``; above, by the textbook
Sherman-Morrison difference. Complex tensors are their real views.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

DENSE = 500


@dataclass(frozen=True)
class Hyper:
    """One tensor's hyperparameters."""

    lr: float = 0.5
    momentum: float = 0.9
    rho: float = 1.0
    weight_decay: float = 0.0
    decoupled: bool = True
    maximize: bool = False


@dataclass
class Oracle:
    """Weights, moments and step counts of some tensors, and the step that they should take.

    Attributes:
        weights: float64, any shapes.
        hypers: one per tensor.
        blocks: the Fisher block that each tensor belongs to.
        kept: per tensor, the part of its weight that is kept beside it (Kahan). L2 decay enters moment and sums
            without it.
    """

    weights: list[Tensor]
    hypers: list[Hyper]
    blocks: list[int]
    numerator: str = "moment"
    max_grad_norm: float | None = None
    skip_nonfinite: bool = False
    moments: list[Tensor] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    exact: list[Tensor] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)
    norm: float = 0.0
    skipped: int = 0

    def __post_init__(self) -> None:
        self.weights = [real64(w) for w in self.weights]
        self.moments = self.moments or [torch.zeros_like(w) for w in self.weights]
        self.steps = self.steps or [0] * len(self.weights)

    def step(self, grads: Sequence[Tensor | None], stored: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Take one step; a tensor with the gradient ``None`` takes no part. Returns the change of each weight.

        With ``stored``, moments as they were rounded, the Fisher matrix is made of these; :attr:`exact` has the others.
        """
        before = [w.clone() for w in self.weights]
        present = [i for i, g in enumerate(grads) if g is not None]
        given = {i: real64(g) for i in present if (g := grads[i]) is not None}
        everything = torch.cat([given[i].reshape(-1) for i in present])
        self.norm = everything.norm().item()
        if self.skip_nonfinite and not bool(everything.isfinite().all()):
            self.skipped += 1
            return [torch.zeros_like(w) for w in self.weights]
        gain = 1.0
        if self.max_grad_norm is not None and self.norm > self.max_grad_norm:
            gain = self.max_grad_norm / self.norm
        seen = {}
        for i in present:
            hyper = self.hypers[i]
            seen[i] = given[i] * gain * (-1 if hyper.maximize else 1)
            if not hyper.decoupled:
                visible = self.weights[i] - self.kept[i] if self.kept else self.weights[i]
                seen[i] = seen[i] + hyper.weight_decay * visible
            self.moments[i] = hyper.momentum * self.moments[i] + (1 - hyper.momentum) * seen[i]
            self.steps[i] += 1
        self.exact = list(self.moments)
        if stored is not None:
            self.moments = [real64(m) for m in stored]
        for block in sorted({self.blocks[i] for i in present}):
            self._solve([i for i in present if self.blocks[i] == block], seen)
        return [w - old for w, old in zip(self.weights, before, strict=True)]

    def _solve(self, members: list[int], seen: dict[int, Tensor]) -> None:
        hats = [self.moments[i] / (1 - self.hypers[i].momentum ** self.steps[i]) for i in members]
        hat = torch.cat([x.reshape(-1) for x in hats])
        mixed = [self._mixture(i) for i in members]
        parts = [a * self.moments[i] + b * seen[i] for i, (a, b) in zip(members, mixed, strict=True)]
        right = torch.cat([x.reshape(-1) for x in parts])
        rho = torch.cat(
            [torch.full((self.weights[i].numel(),), self.hypers[i].rho, dtype=torch.float64) for i in members]
        )
        if hat.numel() <= DENSE:
            step = torch.linalg.solve(torch.outer(hat, hat) + torch.diag(rho), right)
        else:
            step = right / rho - hat / rho * (hat @ (right / rho)) / (1 + hat @ (hat / rho))
        for i, part in zip(members, step.split([self.weights[i].numel() for i in members]), strict=True):
            hyper = self.hypers[i]
            update = part.reshape(self.weights[i].shape)
            if self.kept and not hyper.decoupled:
                update = update + self._mixture(i)[1] * hyper.weight_decay * self.kept[i] / hyper.rho
            shrink = 1 - hyper.lr * hyper.weight_decay if hyper.decoupled else 1.0
            self.weights[i] = self.weights[i] * shrink - hyper.lr * update

    def _mixture(self, i: int) -> tuple[float, float]:
        """What F⁻¹ is applied to: so many times a tensor's new moment, plus so many times its gradient."""
        beta, t = self.hypers[i].momentum, self.steps[i]
        return {
            "moment": (1 / (1 - beta**t), 0.0),
            "gradient": (0.0, 1.0),
            "nesterov": (beta / (1 - beta ** (t + 1)), (1 - beta) / (1 - beta ** (t + 1))),
        }[self.numerator]


def real64(x: Tensor) -> Tensor:
    """A float64 copy on the CPU; of a complex tensor, of its real view."""
    x = x.detach().cpu().resolve_conj()
    return (torch.view_as_real(x) if x.is_complex() else x).to(torch.float64, copy=True)
