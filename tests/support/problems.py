"""Small problems that contain what models contain: many layouts, groups, late, rare and frozen parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sofim_fused import SOFIM
from sofim_fused.step import gather
from tests.support.oracle import Hyper, Oracle


def _sliced(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Every other column of a wider tensor: gaps in memory."""
    return torch.empty(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2]


def _offset(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor that begins one element after its storage: aligned to its element size only."""
    size = int(torch.tensor(shape).prod())
    return torch.empty(size + 1, dtype=dtype)[1:].view(*shape)


# What a parameter can look like in memory.
LAYOUTS: dict[str, Callable[[torch.dtype], Tensor]] = {
    "matrix": lambda dtype: torch.empty(7, 5, dtype=dtype),
    "scalar": lambda dtype: torch.empty((), dtype=dtype),
    "vector": lambda dtype: torch.empty(17, dtype=dtype),
    "transposed": lambda dtype: torch.empty(6, 4, dtype=dtype).t(),
    "channels-last": lambda dtype: torch.empty(2, 3, 4, 5, dtype=dtype).to(memory_format=torch.channels_last),
    "sliced": lambda dtype: _sliced((3, 4), dtype),
    "offset": lambda dtype: _offset((9,), dtype),
    "empty": lambda dtype: torch.empty(0, 3, dtype=dtype),
    "one-element": lambda dtype: torch.empty(1, 1, dtype=dtype),
}
# What matters besides if rows and columns do.
ROWS_AND_COLUMNS: dict[str, Callable[[torch.dtype], Tensor]] = {
    "one-row": lambda dtype: torch.empty(1, 6, dtype=dtype),
    "one-column": lambda dtype: torch.empty(6, 1, dtype=dtype),
    "no-columns": lambda dtype: torch.empty(2, 0, dtype=dtype),
    "permuted": lambda dtype: torch.empty(3, 2, 4, dtype=dtype).permute(2, 0, 1),
}


def make_parameter(
    layout: str, dtype: torch.dtype, generator: torch.Generator, device: str = "cpu"
) -> torch.nn.Parameter:
    """A parameter of a layout, filled with normal values."""
    with torch.device(device):
        x = {**LAYOUTS, **ROWS_AND_COLUMNS}[layout](dtype)
    x.copy_(torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.real.dtype))
    if x.is_complex():
        x.imag.copy_(torch.randn(x.shape, generator=generator, dtype=torch.float64))
    return torch.nn.Parameter(x)


@dataclass
class Problem:
    """Parameters in groups, their hyperparameters, and any number of gradients.

    Attributes:
        groups: group dicts as the optimizer takes them.
        hypers: per tensor, as the oracle takes them.
    """

    groups: list[dict[str, Any]]
    hypers: list[Hyper]
    group_of: list[int]
    generator: torch.Generator

    @property
    def params(self) -> list[Tensor]:
        """All parameters, in the order of groups."""
        return [p for group in self.groups for p in group["params"]]

    def gradients(self, scale: float = 0.3) -> Iterator[list[Tensor | None]]:
        """Gradients, step by step: a drift plus noise. The last parameter of each group gets them late or rarely."""
        drifts = [torch.randn(p.shape, generator=self.generator, dtype=torch.float64) for p in self.params]
        last = {self.group_of.index(g) + self.group_of.count(g) - 1: g for g in set(self.group_of)}
        step = 0
        while True:
            grads: list[Tensor | None] = []
            for i, (p, drift) in enumerate(zip(self.params, drifts, strict=True)):
                noise = torch.randn(p.shape, generator=self.generator, dtype=torch.float64)
                grad = ((drift + noise) * scale).to(p.real.dtype)
                present = i not in last or (step >= 3 if last[i] == 0 else step % 3 == last[i] % 3)
                grads.append(self._shaped(p, grad, step) if present else None)
            yield grads
            step += 1

    @staticmethod
    def _shaped(p: Tensor, grad: Tensor, step: int) -> Tensor:
        """The gradient in the parameter's dtype, sometimes with other strides than the parameter's."""
        full = torch.complex(grad, 0.5 * grad) if p.is_complex() else grad
        shaped = torch.empty_like(p).copy_(full)
        if step % 2 and p.dim() >= 2:
            return shaped.transpose(0, 1).contiguous().transpose(0, 1)
        return shaped.conj() if p.is_complex() and step % 3 == 1 else shaped

    def oracle(self, numerator: str, fisher: str, **options: Any) -> Oracle:
        """An oracle of this problem that starts with the parameters' current values."""
        blocks = {"model": [0] * len(self.params), "group": self.group_of, "parameter": list(range(len(self.params)))}
        return Oracle([p.detach() for p in self.params], self.hypers, list(blocks[fisher]), numerator, **options)


def mixed_problem(
    dtype: torch.dtype | Sequence[torch.dtype],
    decay: str = "none",
    seed: int = 0,
    layouts: Sequence[str] = (),
    device: str = "cpu",
    diagonal: str = "identity",
    rank_one: bool = True,
) -> Problem:
    """Three groups of different hyperparameters over all layouts.

    Args:
        dtype: of all parameters, or several that the parameters take in turn.
        decay: ``"none"``, ``"decoupled"`` or ``"l2"`` weight decay, different in each group.
        seed: of values and gradients.
        layouts: a choice of :data:`LAYOUTS` and :data:`ROWS_AND_COLUMNS`; all of the former by default.
        device: where the parameters lie.
        diagonal: of all groups; ``"mixed"``: another one of those that adapt in each.
        rank_one: whether ``rho`` is finite.
    """
    generator = torch.Generator().manual_seed(seed)
    dtypes = [dtype] if isinstance(dtype, torch.dtype) else list(dtype)
    params = [
        make_parameter(name, dtypes[i % len(dtypes)], generator, device) for i, name in enumerate(layouts or LAYOUTS)
    ]
    weight_decay = 0.0 if decay == "none" else 0.02
    base = Hyper(lr=0.05, momentum=0.9, rho=0.7, weight_decay=weight_decay, decoupled=decay != "l2")
    hypers = [
        base,
        Hyper(0.03, 0.5, 1.5, 3 * weight_decay, decay != "l2", maximize=True),
        Hyper(0.08, 0.0, 0.4, weight_decay / 2, decay != "l2"),
    ]
    if diagonal != "identity":
        kinds = ("factored", "element", "row") if diagonal == "mixed" else (diagonal,) * 3
        hypers = [
            replace(
                hyper, diagonal=kind, beta2=beta2, eps=eps, rho=hyper.rho / 2 if rank_one else math.inf, decoupled=True
            )
            for hyper, kind, beta2, eps in zip(hypers, kinds, (0.95, 0.99, 0.7), (1e-8, 0.05, 1e-3), strict=True)
        ]
    group_of = [min(i * 3 // len(params), 2) for i in range(len(params))]
    groups = [
        {
            "params": [p for p, g in zip(params, group_of, strict=True) if g == index],
            "lr": hyper.lr,
            "momentum": hyper.momentum,
            "rho": None if math.isinf(hyper.rho) else hyper.rho,
            "weight_decay": hyper.weight_decay,
            "decoupled_weight_decay": hyper.decoupled,
            "maximize": hyper.maximize,
            **({} if diagonal == "identity" else {name: getattr(hyper, name) for name in ("diagonal", "beta2", "eps")}),
        }
        for index, hyper in enumerate(hypers)
    ]
    return Problem(groups, [hypers[g] for g in group_of], group_of, generator)


def shrink_a_column(grads: Sequence[Tensor | None]) -> None:
    """Make the first column of each matrix so small that its share of g² is below the floor."""
    for g in grads:
        if g is not None and g.dim() >= 2 and g.numel():
            g[:, 0] *= 2.0**-10


def give(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    """Set the gradients as a backward pass would, float32 ones of 16-bit parameters included."""
    for p, g in zip(params, grads, strict=True):
        if g is not None and g.dtype != p.dtype:
            p.grad_dtype = None
        p.grad = g


def give_state(optimizer: SOFIM) -> None:
    """Create every parameter's state, as a first step with all gradients would."""
    ordinal = 0
    for index, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            gather.ensure_state(gather.Entry(index, ordinal, p, p), group, optimizer.state)
            ordinal += 1


def snapshot(optimizer: SOFIM) -> list[Tensor]:
    """Copies of every tensor that a step may change: parameters and state, in a fixed order."""
    tensors = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            tensors.append(p.detach().clone())
            known = optimizer.state.get(p, {})
            tensors += [known[name].clone() for name in sorted(known) if isinstance(known[name], Tensor)]
    return tensors


def same_bits(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    """Whether two lists of tensors are equal bit by bit, NaN included."""
    if len(left) != len(right):
        return False
    return all(
        a.dtype == b.dtype and a.shape == b.shape and _bytes(a) == _bytes(b) for a, b in zip(left, right, strict=True)
    )


def _bytes(x: Tensor) -> bytes:
    return bytes(x.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tobytes())


NUMERATORS = ("moment", "gradient", "nesterov")

# Kinds of steps.
GUARDED: dict[str, Any] = {"max_grad_norm": 0.5, "skip_nonfinite": True}
OPTIONS: list[dict[str, Any]] = [{}, {"numerator": "gradient"}, GUARDED, {"numerator": "nesterov", **GUARDED}]


def ready_problem(
    backend: str, sizes: Sequence[int], device: str = "cpu", **options: Any
) -> tuple[SOFIM, list[torch.nn.Parameter]]:
    """An optimizer of a backend, and its parameters, vectors of these sizes that have gradients."""
    generator = torch.Generator().manual_seed(11)
    params = [torch.nn.Parameter(torch.randn(n, generator=generator).to(device)) for n in sizes]
    optimizer = SOFIM(params, lr=0.1, backend=backend, **options)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(device)
    return optimizer, params
