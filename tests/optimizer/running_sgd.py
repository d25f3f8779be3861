"""A running SGD, its twin with parameters of its own, and how close SOFIM has to follow."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sofim_fused import SOFIM
from tests.support.problems import give

SGD = torch.optim.SGD
LARGE = 1e12  # ρ far above any ‖m̂‖² here, so that SOFIM's step is SGD's
Group = dict[str, Any]


def gradients(params: Sequence[Tensor], seed: int = 1) -> Iterator[list[Tensor]]:
    """A drift plus noise, independent of the parameters' values."""
    generator = torch.Generator().manual_seed(seed)

    def normal(p: Tensor) -> Tensor:
        x = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        return torch.complex(x, 0.5 * x) if p.is_complex() else x

    drifts = [normal(p) for p in params]
    while True:
        yield [torch.empty_like(p).copy_(0.3 * (d + normal(p))) for p, d in zip(params, drifts, strict=True)]


def of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def vectors(*sizes: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(n, generator=generator, dtype=torch.float64).to(dtype)) for n in sizes]


def advance(optimizer: torch.optim.Optimizer, grads: Iterator[list[Tensor]], steps: int) -> None:
    for _ in range(steps):
        give(of(optimizer), next(grads))
        optimizer.step()


def running(
    groups: Sequence[Group], steps: int = 5, **arguments: Any
) -> tuple[torch.optim.SGD, torch.optim.SGD, Iterator[list[Tensor]]]:
    """An SGD optimizer that has taken steps, its twin with parameters of its own, and the gradients that follow."""
    optimizer = SGD(list(groups), **{"lr": 0.05, **arguments})
    grads = gradients(of(optimizer))
    advance(optimizer, grads, steps)
    for p in of(optimizer):
        p.grad = None
    return optimizer, copy.deepcopy(optimizer), grads


def follow(
    ours: SOFIM,
    theirs: torch.optim.SGD,
    grads: Iterator[list[Tensor]],
    steps: int = 20,
    after: Callable[[], None] = lambda: None,
) -> None:
    """Hold SOFIM's path to SGD's.

    With the same buffers a step of SOFIM is SGD's divided by 1 + ‖m̂‖²/ρ (with ``nesterov``, its part along m̂ is).
    Gradients do not depend on the weights, and L2 decay, the only feedback, shrinks what they differ by. So after all
    steps the paths are apart by less than max ‖m̂‖²/ρ times SGD's length of path, and by the rounding of each step, some
    ulp of weights and steps.
    """
    length, ratio, size = 0.0, 0.0, 0.0
    for _ in range(steps):
        given = next(grads)
        before = [p.detach().clone() for p in of(theirs)]
        for optimizer in (ours, theirs):
            give(of(optimizer), [g.clone() for g in given])
            optimizer.step()
        moved = [p.detach() - old for p, old in zip(of(theirs), before, strict=True)]
        length += math.sqrt(sum(float(x.abs().square().sum()) for x in moved))
        size = max(size, math.sqrt(sum(float(x.abs().square().sum()) for x in before)))
        moment = sum(float(ours.state[p]["exp_avg"].abs().square().sum()) for p in of(ours))
        ratio = max(ratio, moment / min(float(group["rho"]) for group in ours.param_groups))
        after()
    apart = math.sqrt(
        sum(float((p - q).detach().abs().square().sum()) for p, q in zip(of(ours), of(theirs), strict=True))
    )
    ulp = torch.finfo(torch.float64).eps
    bound = ratio * length + 8 * steps * ulp * (size + length)
    assert bound < 1e-9 * length  # or the test would say little
    assert apart <= bound


def two_groups() -> list[Group]:
    a, b, c = vectors(5, 33, 7)
    return [
        {"params": [a, b], "momentum": 0.95, "weight_decay": 0.02},
        {"params": [c], "lr": 0.3, "momentum": 0.5, "dampening": 0.25, "maximize": True},
    ]


def one_group(dtype: torch.dtype = torch.float64) -> list[Group]:
    return [{"params": vectors(5, 33, dtype=dtype)}]


RUNNING: dict[str, Callable[[], tuple[torch.optim.SGD, torch.optim.SGD, Iterator[list[Tensor]]]]] = {
    "momentum": lambda: running(one_group(), momentum=0.9),
    "no momentum": lambda: running(one_group(), dampening=0.5, weight_decay=0.1),
    "dampening": lambda: running(one_group(), momentum=0.9, dampening=0.3),
    "dampening as momentum": lambda: running(one_group(), momentum=0.9, dampening=0.9),
    "negative dampening": lambda: running(one_group(), momentum=0.5, dampening=-1.0),
    "L2": lambda: running(one_group(), momentum=0.9, weight_decay=0.1),
    "maximize": lambda: running(one_group(), momentum=0.9, weight_decay=0.1, maximize=True),
    "nesterov": lambda: running(one_group(), momentum=0.9, weight_decay=0.1, nesterov=True),
    "nesterov, maximize": lambda: running(one_group(), 1, momentum=0.5, maximize=True, nesterov=True),
    "nesterov, a group without momentum": lambda: running(
        [{**two_groups()[0], "momentum": 0.0}, {"params": vectors(7)}], momentum=0.9, nesterov=True
    ),
    "two groups": lambda: running(two_groups()),
    "groups with and without": lambda: running([{**two_groups()[0], "momentum": 0.0}, two_groups()[1]]),
    "lr as a tensor": lambda: running(two_groups(), lr=torch.tensor([0.05], dtype=torch.float64)),
    "fused": lambda: running(one_group(), momentum=0.9, weight_decay=0.1, fused=True),
    "foreach": lambda: running(one_group(), momentum=0.9, weight_decay=0.1, foreach=True),
    "complex": lambda: running(one_group(torch.complex128), momentum=0.9, weight_decay=0.1),
    "one step": lambda: running(one_group(), 1, momentum=0.9),
    "a long run": lambda: running(one_group(), 400, momentum=0.9),
}
