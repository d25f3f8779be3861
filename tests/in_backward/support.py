"""Shared by tests of ``in_backward=True``: an optimizer that takes gradients in backward passes, beside a plain one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sofim_fused import SOFIM, in_backward
from tests.support.oracle import real64
from tests.support.problems import Problem, give, give_state, mixed_problem, same_bits
from tests.support.runs import Run, once

DOUBLE = (torch.float64, torch.complex128)
NUMERATORS = ["moment", "gradient"]  # whose steps differ in what they do when; the values of all: test_steps.py
FISHERS = ["model", "group", "parameter"]
EXACT = ("cpu", "reference")  # backends that take a step in parts to the bit

on_cpu = pytest.mark.parametrize("run", [pytest.param(Run(name, "cpu"), id=name, marks=once) for name in EXACT])
"""For tests that have no more to find on other backends."""


def backward(params: Sequence[Tensor], grads: Sequence[Tensor | None], **options: Any) -> None:
    """A backward pass in which these are the parameters' gradients, to the bit."""
    terms = [
        ((p * g.conj()).real if p.is_complex() else p * g).sum().double()
        for p, g in zip(params, grads, strict=True)
        if g is not None
    ]
    if terms:
        torch.stack(terms).sum().backward(**options)


def hooks(params: Sequence[Tensor]) -> list[int]:
    """How many hooks each parameter has for its gradient."""
    return [len(getattr(p, "_post_accumulate_grad_hooks", None) or ()) for p in params]


def made(params: Any, run: Run, **options: Any) -> SOFIM:
    """An optimizer that takes gradients in the backward pass."""
    return SOFIM(params, backend=run.backend, in_backward=True, **options)


def plain(params: Any, run: Run, **options: Any) -> SOFIM:
    """One that does not. On a CPU its first step is a native one too: the passes' may differ in a last bit."""
    optimizer = SOFIM(params, backend=run.backend, **options)
    if run.backend == "cpu":
        give_state(optimizer)
    return optimizer


def both_ways(
    run: Run,
    start: Callable[[], tuple[Any, Any]],
    work: Callable[[SOFIM, Any], None],
    *,
    release: bool = False,
    tolerance: float | None = None,
    **options: Any,
) -> bool:
    """Whether ``work`` comes to the same with and without ``in_backward``.

    ``start`` makes what an optimizer takes, and what ``work`` takes besides the optimizer.
    """
    optimizers = []
    for make, more in ((made, {"release_grads": release}), (plain, {})):
        params, model = start()
        optimizer = make(params, run, **options, **more)
        work(optimizer, model)
        optimizers.append(optimizer)
    return alike(optimizers[0], optimizers[1], tolerance)


def in_backward_of(optimizer: SOFIM) -> in_backward.InBackward:
    assert optimizer._backward is not None
    return optimizer._backward


class Pair:
    """A problem twice: for an optimizer that takes gradients in the backward pass, and for a plain one."""

    def __init__(
        self,
        run: Run,
        dtype: torch.dtype | Sequence[torch.dtype] = torch.float32,
        decay: str = "none",
        *,
        release: bool = False,
        layouts: Sequence[str] = (),
        **options: Any,
    ) -> None:
        self.run = run
        problems = [mixed_problem(dtype, decay, layouts=layouts or run.layouts, device=run.device) for _ in range(2)]
        self.problem: Problem = problems[0]
        self.params, self.plain_params = (problem.params for problem in problems)
        self.optimizer = made(problems[0].groups, run, release_grads=release, **copy.deepcopy(options))
        self.plain = plain(problems[1].groups, run, **copy.deepcopy(options))
        if run.ready:
            give_state(self.optimizer)
            give_state(self.plain)

    @property
    def both(self) -> tuple[tuple[SOFIM, list[Tensor]], tuple[SOFIM, list[Tensor]]]:
        return (self.optimizer, self.params), (self.plain, self.plain_params)

    def gradients(self, count: int) -> Iterator[list[Tensor | None]]:
        return islice(self.problem.gradients(), self.run.steps(count))

    def set(self, **settings: Any) -> None:
        for group in self.optimizer.param_groups + self.plain.param_groups:
            group.update(copy.deepcopy(settings))

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()
        self.plain.zero_grad()

    def backward(self, grads: Sequence[Tensor | None]) -> None:
        """The gradients, and no others: in a backward pass, and as they are for the plain optimizer."""
        self.zero_grad()
        backward(self.params, grads)
        give(self.plain_params, grads)

    def step(self) -> None:
        self.optimizer.step()
        self.plain.step()

    def moments(self) -> list[Tensor]:
        return [s["exp_avg"].clone() for s in self.optimizer.state.values() if "exp_avg" in s]

    def alike(self, tolerance: float | None = None) -> bool:
        """Whether all parameters and states are equal: to the bit where the backend is exact, unless ``tolerance``."""
        exact = self.run.backend in EXACT and self.run.device == "cpu"  # on a GPU products and sums are fused, or not
        return alike(self.optimizer, self.plain, tolerance or (None if exact else 1e-6))


def begun(optimizer: SOFIM) -> list[Tensor]:
    """What :func:`tests.support.problems.snapshot` has, without state that was made ahead."""
    states = {p: known for p, known in optimizer.state.items() if int(known["step"])}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [x for p in params for _, x in [("", p.detach()), *sorted(states.get(p, {}).items())]]


def alike(left: SOFIM, right: SOFIM, tolerance: float | None = None) -> bool:
    """Whether they are equal: to the bit, or to a tolerance, of each tensor's norm (for float64 a millionth of it)."""
    mine, theirs = begun(left), begun(right)
    if tolerance is None:
        return same_bits(mine, theirs)
    assert [x.dtype for x in mine] == [x.dtype for x in theirs]
    for a, b in zip(mine, theirs, strict=True):
        bound = tolerance * (1e-6 if b.dtype in DOUBLE else 1.0) * real64(b).norm()
        if not (real64(a) - real64(b)).norm() <= bound:
            return False
    return True


NARROW = (torch.bfloat16, torch.float32, torch.float16)


class Reluctant:
    """The native part of a step, which leaves some of it to the passes."""

    def __init__(self, native: Any, what: str) -> None:
        self._native = native
        self._what = what

    def __getattr__(self, name: str) -> Any:
        return getattr(self._native, name)

    def freeze_settings(self, *args: Any) -> bool:
        return self._what != "freeze_settings" and bool(self._native.freeze_settings(*args))

    def take(self, param: Tensor, state: Any, group: int, ordinal: int, again: bool) -> bool:
        refused = self._what == "take" or (self._what == "half" and ordinal % 2 == 0)
        return not refused and bool(self._native.take(param, state, group, ordinal, again))

    def finish(self, *args: Any) -> bool:
        return self._what != "finish" and bool(self._native.finish(*args))


def three_batches(pair: Pair) -> list[list[Tensor | None]]:
    return list(islice(pair.problem.gradients(), 3, 6))


class Shared(nn.Module):
    """Two blocks, each of which may be checkpointed, a layer that both have, and one behind them."""

    def __init__(self, reentrant: bool | None = None, tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, 6)
        self.order = [(0, 1), (0, 2)] if tied else [(0,), (1, 2)]
        self.reentrant = reentrant

    def block(self, x: Tensor, index: int) -> Tensor:
        for layer in self.order[index]:
            x = self.layers[layer](x).tanh()
        return x

    def forward(self, x: Tensor) -> Tensor:
        for index in range(2):
            if self.reentrant is None:
                x = self.block(x, index)
            else:
                x = checkpoint(self.block, x, index, use_reentrant=self.reentrant)
        out: Tensor = self.head(x)
        return out


def loss_of(model: nn.Module, step: int) -> Tensor:
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step), requires_grad=True)
    loss: Tensor = model(x).square().sum()
    return loss


def shared(*args: Any) -> Callable[[], tuple[Any, Shared]]:
    def start() -> tuple[Any, Shared]:
        model = Shared(*args)
        return model.parameters(), model

    return start
