"""What SOFIM should compute, written down a second time: float64, dense where possible, sharing no code with SOFIM.

Up to ``DENSE`` elements a Fisher block is solved as a matrix, ``(m̂m̂ᵀ/T + diag(ρs)) x = v``; above, by the textbook
Sherman-Morrison difference. With the identity for a diagonal, s and T are 1; with one that adapts, s is the root of a
running mean of g², T is the sum of s over the block, and the step is x times ρ. Complex tensors are their real views.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

DENSE = 500
FLOOR = 0.1  # of a column's share of g², in the factored diagonal


@dataclass(frozen=True)
class Hyper:
    """One tensor's hyperparameters; with a diagonal that adapts, ``rho`` may be infinite, as SOFIM's ``None``."""

    lr: float = 0.5
    momentum: float = 0.9
    rho: float = 1.0
    weight_decay: float = 0.0
    decoupled: bool = True
    maximize: bool = False
    diagonal: str = "identity"
    beta2: float = 0.99
    eps: float = 1e-8


@dataclass
class Oracle:
    """Weights, moments and step counts of some tensors, and the step that they should take.

    Attributes:
        weights: float64, any shapes.
        hypers: one per tensor.
        blocks: the Fisher block that each tensor belongs to.
        kept: per tensor, the part of its weight that is kept beside it (Kahan). L2 decay enters moment and sums
            without it.
        variances: per tensor, the running means of g² by the names that they have in SOFIM's state.
        signal: of each Fisher block, m̂ᵀD⁻¹m̂/T.
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
    exact_variances: list[dict[str, Tensor]] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)
    variances: list[dict[str, Tensor]] = field(default_factory=list)
    signal: dict[int, float] = field(default_factory=dict)
    norm: float = 0.0
    skipped: int = 0

    def __post_init__(self) -> None:
        self.dims = [w.dim() for w in self.weights]  # a real view has one more
        doubles = (torch.float64, torch.complex128)
        self.largest = [torch.finfo(torch.float64 if w.dtype in doubles else torch.float32).max for w in self.weights]
        self.weights = [real64(w) for w in self.weights]
        self.moments = self.moments or [torch.zeros_like(w) for w in self.weights]
        self.steps = self.steps or [0] * len(self.weights)
        self.variances = self.variances or [{} for _ in self.weights]

    def step(
        self,
        grads: Sequence[Tensor | None],
        stored: Sequence[Tensor] | None = None,
        stored_variances: Sequence[dict[str, Tensor]] | None = None,
    ) -> list[Tensor]:
        """Take one step; a tensor with the gradient ``None`` takes no part. Returns the change of each weight.

        With ``stored``, moments as they were rounded, the Fisher matrix is made of these; :attr:`exact` has the others.
        With ``stored_variances``, its diagonal is made of these; :attr:`exact_variances` has the others.
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
            self._enter(i, seen[i].square())
        self.exact = list(self.moments)
        if stored is not None:
            self.moments = [real64(m) for m in stored]
        self.exact_variances = list(self.variances)
        if stored_variances is not None:
            self.variances = list(stored_variances)
        for block in sorted({self.blocks[i] for i in present}):
            self._solve([i for i in present if self.blocks[i] == block], seen)
        return [w - old for w, old in zip(self.weights, before, strict=True)]

    def _enter(self, i: int, square: Tensor) -> None:
        """Let the squares of a tensor's gradient enter its running means."""
        hyper, matrix = self.hypers[i], self.dims[i] >= 2
        means = {}
        if hyper.diagonal == "element" or (hyper.diagonal == "factored" and not matrix):
            means["variance"] = square
        elif hyper.diagonal == "tensor" or (hyper.diagonal == "row" and not matrix):
            means["variance"] = square.sum() / max(square.numel(), 1)
        elif hyper.diagonal in ("row", "factored"):
            count = square.shape[0]
            means["row_var"] = square.flatten(1).sum(1) / max(square.numel() // max(count, 1), 1)
            if hyper.diagonal == "factored":
                means["col_var"] = square.sum(0) / max(count, 1)
        known = self.variances[i] or {name: torch.zeros_like(mean) for name, mean in means.items()}
        self.variances[i] = {
            name: (hyper.beta2 * known[name] + (1 - hyper.beta2) * mean).clamp(max=self.largest[i])
            for name, mean in means.items()
        }

    def scale(self, i: int) -> Tensor:
        """The diagonal s of a tensor, of its shape."""
        shape, hyper, known = self.weights[i].shape, self.hypers[i], self.variances[i]
        if hyper.diagonal == "identity":
            return torch.ones(shape, dtype=torch.float64)
        unbiased = math.sqrt(1 - hyper.beta2 ** self.steps[i])
        if "variance" in known:
            return (known["variance"].sqrt() / unbiased + hyper.eps).expand(shape)
        rows = known["row_var"].sqrt() / unbiased + hyper.eps
        s = rows.view(-1, *[1] * (len(shape) - 1)).expand(shape)
        if "col_var" in known and known["col_var"].numel():
            mean = known["col_var"].mean()
            share = known["col_var"] / mean if mean else torch.ones_like(known["col_var"])
            s = s * share.clamp(min=FLOOR).sqrt()
        return s

    def _solve(self, members: list[int], seen: dict[int, Tensor]) -> None:
        hats = [self.moments[i] / (1 - self.hypers[i].momentum ** self.steps[i]) for i in members]
        hat = torch.cat([x.reshape(-1) for x in hats])
        mixed = [self._mixture(i) for i in members]
        parts = [a * self.moments[i] + b * seen[i] for i, (a, b) in zip(members, mixed, strict=True)]
        right = torch.cat([x.reshape(-1) for x in parts])
        s = torch.cat([self.scale(i).reshape(-1) for i in members])
        rho = torch.cat(
            [torch.full((self.weights[i].numel(),), self.hypers[i].rho, dtype=torch.float64) for i in members]
        )
        adapts = self.hypers[members[0]].diagonal != "identity"
        trace = s.sum().item() or 1.0 if adapts else 1.0
        if adapts:
            self.signal[self.blocks[members[0]]] = (hat @ (hat / s)).item() / trace
        if bool(rho.isinf().any()):
            step = right / s
        elif hat.numel() <= DENSE:
            step = torch.linalg.solve(torch.outer(hat, hat) / trace + torch.diag(rho * s), right)
            step = step * rho if adapts else step
        else:
            d = rho * s
            step = right / d - hat / d * (hat @ (right / d)) / trace / (1 + hat @ (hat / d) / trace)
            step = step * rho if adapts else step
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
