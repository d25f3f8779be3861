"""The oracle itself: it agrees with known numbers, and it notices when the update is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sofim_fused import SOFIM
from sofim_fused.backends import Coefficients, Decay, solve
from sofim_fused.step.hyperparameters import Hyperparameters
from tests.step.support import TOLERANCES, distance
from tests.support.oracle import DENSE, Hyper, Oracle
from tests.support.problems import NUMERATORS, give, mixed_problem


def test_it_solves_what_can_be_solved_by_hand() -> None:
    """m̂ = (3, 4), ρ = 2: the moment form gives m̂/27, and so do the others: in the first step v is m̂."""
    grad = torch.tensor([3.0, 4.0])
    for numerator in NUMERATORS:
        oracle = Oracle([torch.zeros(2)], [Hyper(lr=1.0, rho=2.0)], [0], numerator)
        (change,) = oracle.step([grad])
        torch.testing.assert_close(change, -grad.double() / 27, rtol=1e-14, atol=0)


@pytest.mark.parametrize("numerator", NUMERATORS)
def test_its_two_ways_agree(numerator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense solve and the textbook formula, on either side of the size where it changes over."""
    generator = torch.Generator().manual_seed(4)
    sizes = (DENSE // 2, DENSE // 3)
    weights = [torch.randn(n, generator=generator) for n in sizes]
    hypers = [Hyper(rho=0.5, momentum=0.8), Hyper(rho=2.0, momentum=0.3, weight_decay=0.1, decoupled=False)]
    dense, formula = (Oracle(weights, hypers, [0, 0], numerator, max_grad_norm=3.0) for _ in range(2))
    for _ in range(4):
        grads: list[Tensor | None] = [torch.randn(n, generator=generator) for n in sizes]
        dense.step(grads)
        with monkeypatch.context() as patch:
            patch.setattr("tests.support.oracle.DENSE", 0)
            formula.step(grads)
    for a, b in zip(dense.weights, formula.weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


# Mutations of the update, in pure PyTorch, which defines it. Each must throw the optimizer off the oracle; the row
# without one must not.


def _coefficients(change: Callable[[Coefficients], Coefficients]) -> Callable[[pytest.MonkeyPatch], None]:
    original = solve.coefficients
    return lambda patch: patch.setattr(solve, "coefficients", lambda *args: change(original(*args)))


def _negated_moment(c: Coefficients) -> Coefficients:
    return c._replace(moment=-c.moment)


def _no_bias_correction(patch: pytest.MonkeyPatch) -> None:
    original = solve.correction
    patch.setattr(solve, "correction", lambda *args: torch.ones_like(original(*args)))


def _one_step_behind(patch: pytest.MonkeyPatch) -> None:
    original = solve.correction
    patch.setattr(solve, "correction", lambda steps, momentum: original([step + 1 for step in steps], momentum))


def _swapped(first: str, second: str) -> Callable[[pytest.MonkeyPatch], None]:
    original = Hyperparameters.refresh

    def refresh(self: Hyperparameters, groups: Any) -> Decay:
        return original(self, [{**g, first: g[second], second: g[first]} for g in groups])

    return lambda patch: patch.setattr(Hyperparameters, "refresh", refresh)


def _set(name: str, value: Any) -> Callable[[pytest.MonkeyPatch], None]:
    original = Hyperparameters.refresh
    return lambda patch: patch.setattr(
        Hyperparameters, "refresh", lambda self, groups: original(self, [{**g, name: value} for g in groups])
    )


def _no_rank_one_term(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(solve, "per_tensor", lambda blocks, settings: torch.zeros_like(blocks))


def _blocks_not_added(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(solve, "added_up", lambda rows, settings: rows)


def _steps_not_counted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(solve, "advance", lambda steps, skip: None)


MUTATIONS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "wrong sign of the rank-one term": _coefficients(_negated_moment),
    "rank-one term missing": _no_rank_one_term,
    "bias correction missing": _no_bias_correction,
    "bias correction of another step": _one_step_behind,
    "step counts do not advance": _steps_not_counted,
    "rho and lr swapped": _swapped("lr", "rho"),
    "momentum ignored": _set("momentum", 0.0),
    "maximize ignored": _set("maximize", False),
    "weight decay ignored": _set("weight_decay", 0.0),
    "coupled taken for decoupled decay": _set("decoupled_weight_decay", True),
    "tensors of a block not added up": _blocks_not_added,
}


LookAhead = tuple[Tensor, Tensor]
LOOK_AHEADS: dict[str, Callable[[LookAhead, solve.Hyper, Tensor], LookAhead]] = {
    "the moment's share missing": lambda right, hyper, correction: (0 * right[0], right[1]),
    "the gradient's share missing": lambda right, hyper, correction: (right[0], 0 * right[1]),
    "bias correction missing": lambda right, hyper, correction: (hyper.momentum, 1 - hyper.momentum),
    "bias correction of this step, not of the next": lambda right, hyper, correction: (
        hyper.momentum * correction,
        (1 - hyper.momentum) * correction,
    ),
}


def deviation(numerator: str, options: dict[str, Any]) -> float:
    """How far the optimizer strays from the oracle, in multiples of the matrix's tolerance."""
    problem = mixed_problem(torch.float64, "l2")
    optimizer = SOFIM(problem.groups, numerator=numerator, backend="reference", **options)
    oracle = problem.oracle(numerator, "model", **options)
    for _, grads in zip(range(6), problem.gradients(), strict=False):
        give(problem.params, grads)
        optimizer.step()
        oracle.step(grads)
    return distance(problem.params, oracle) / TOLERANCES[torch.float64]


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.2}], ids=["plain", "guarded"])
@pytest.mark.parametrize("numerator", NUMERATORS)
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_it_notices_a_wrong_update(
    mutation: str, numerator: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert deviation(numerator, options) <= 1
    MUTATIONS[mutation](monkeypatch)
    assert deviation(numerator, options) > 1e3


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.2}], ids=["plain", "guarded"])
@pytest.mark.parametrize("mutation", LOOK_AHEADS)
def test_it_notices_a_wrong_look_ahead(mutation: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong = solve.look_ahead, LOOK_AHEADS[mutation]
    monkeypatch.setattr(
        solve, "look_ahead", lambda hyper, correction: wrong(right(hyper, correction), hyper, correction)
    )
    assert deviation("nesterov", options) > 1e3
    assert deviation("gradient", options) <= 1
