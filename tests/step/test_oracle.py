"""The oracle itself: it agrees with known numbers, and it notices when the update is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor

from sofim_fused import SOFIM
from sofim_fused.backends import Coefficients, Decay, adaptive, reference, solve
from sofim_fused.step.hyperparameters import Hyperparameters
from tests.step.support import TOLERANCES, distance
from tests.support.oracle import DENSE, Hyper, Oracle
from tests.support.problems import NUMERATORS, give, mixed_problem, shrink_a_column


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


def test_it_solves_an_adaptive_diagonal_by_hand() -> None:
    """First steps, where v̂ is the mean of g² and m̂ = g = v.

    Row: s = (2, 1) for rows (2, -2) and (1, 1), T = 6, q = (8/2 + 2/1)/6 = 1, so the step is ±1/(1 + 1/ρ).
    Factored: columns (3, 4) of one row have r = 12.5, shares 9/12.5 and 16/12.5, so that s = |g|.
    """
    for numerator in NUMERATORS:
        hyper = Hyper(lr=1.0, rho=0.5, diagonal="row", eps=0.0)
        (change,) = Oracle([torch.zeros(2, 2)], [hyper], [0], numerator).step([torch.tensor([[2.0, -2.0], [1.0, 1.0]])])
        torch.testing.assert_close(change, torch.tensor([[-1.0, 1.0], [-1.0, -1.0]]).double() / 3, rtol=1e-14, atol=0)
        oracle = Oracle([torch.zeros(1, 2)], [replace(hyper, rho=math.inf, diagonal="factored")], [0], numerator)
        (change,) = oracle.step([torch.tensor([[3.0, -4.0]])])
        torch.testing.assert_close(change, torch.tensor([[-1.0, 1.0]]).double(), rtol=1e-14, atol=0)
        torch.testing.assert_close(oracle.scale(0), torch.tensor([[3.0, 4.0]]).double(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("numerator", NUMERATORS)
def test_its_two_ways_agree_on_an_adaptive_diagonal(numerator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = mixed_problem(torch.float64, "decoupled", diagonal="mixed")
    dense, formula = (problem.oracle(numerator, "model", max_grad_norm=3.0) for _ in range(2))
    for _, grads in zip(range(4), problem.gradients(), strict=False):
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
LOOK_AHEADS: dict[str, Callable[[LookAhead, Tensor, Tensor], LookAhead]] = {
    "the moment's share missing": lambda right, momentum, correction: (0 * right[0], right[1]),
    "the gradient's share missing": lambda right, momentum, correction: (right[0], 0 * right[1]),
    "bias correction missing": lambda right, momentum, correction: (momentum, 1 - momentum),
    "bias correction of this step, not of the next": lambda right, momentum, correction: (
        momentum * correction,
        (1 - momentum) * correction,
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
        solve, "look_ahead", lambda momentum, correction: wrong(right(momentum, correction), momentum, correction)
    )
    assert deviation("nesterov", options) > 1e3
    assert deviation("gradient", options) <= 1


# The same for a diagonal that adapts.


def _blocks_times(place: int, factor: float) -> Callable[[pytest.MonkeyPatch], None]:
    """One of the sums T, Q, P and m̂ᵀD⁻¹m̂."""
    original = adaptive.TorchAdaptive.fold_scaled

    def fold_scaled(*args: Any) -> Tensor:
        blocks = original(*args).clone()
        blocks[:, place] *= factor
        return blocks

    return lambda patch: patch.setattr(adaptive.TorchAdaptive, "fold_scaled", fold_scaled)


def _attribute(owner: Any, name: str, value: Any) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(owner, name, value)


def _look_ahead_terms_swapped(patch: pytest.MonkeyPatch) -> None:
    original = adaptive.numerator_terms

    def swapped(settings: Any, momentum: Tensor, *rest: Any) -> Any:
        return original(settings, 1 - momentum if settings.numerator == 2 else momentum, *rest)

    patch.setattr(adaptive, "numerator_terms", swapped)


def _uncorrected_variances(patch: pytest.MonkeyPatch) -> None:
    original = adaptive.correction
    patch.setattr(adaptive, "correction", lambda steps, decay: torch.ones_like(original(steps, decay)))


def _gain_not_squared(patch: pytest.MonkeyPatch) -> None:
    original = adaptive._Mix.enter
    patch.setattr(
        adaptive._Mix,
        "enter",
        lambda self, *args: original(self._replace(gain=None if self.gain is None else self.gain.sqrt()), *args),
    )


def _gain_not_in_elements(patch: pytest.MonkeyPatch) -> None:
    original = reference._Diagonal.enter

    def enter(self: Any, i: int, g: Tensor, **when: bool) -> Any:
        return original(self, i, g / (self._scales.gain or torch.ones(())), **when)

    patch.setattr(reference._Diagonal, "enter", enter)


def _columns_lost(patch: pytest.MonkeyPatch) -> None:
    original = adaptive.TorchAdaptive.adapt

    def adapt(*args: Any) -> Any:
        scales, norm = original(*args)
        return scales._replace(cols=torch.ones_like(scales.cols)), norm

    patch.setattr(adaptive.TorchAdaptive, "adapt", adapt)


ADAPTIVE_MUTATIONS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], dict[str, Any]]] = {
    "T halved": (_blocks_times(0, 0.5), {}),
    "Q missing": (_blocks_times(1, 0.0), {}),
    "P missing": (_blocks_times(2, 0.0), {"numerator": "nesterov"}),
    "look-ahead terms swapped": (_look_ahead_terms_swapped, {"numerator": "nesterov"}),
    "no floor of columns": (_attribute(adaptive, "COLUMN_FLOOR", 1e-8), {}),
    "columns lost": (_columns_lost, {}),
    "no bias correction": (_uncorrected_variances, {}),
    "eps ignored": (_set("eps", 1e-30), {}),
    "beta2 ignored": (_set("beta2", 0.5), {}),
    "rho ignored": (_set("rho", None), {}),
    "gain not squared": (_gain_not_squared, {"max_grad_norm": 0.7}),
    "gain not in elements": (_gain_not_in_elements, {"max_grad_norm": 0.7}),
    "maximize ignored": (_set("maximize", False), {}),
    "weight decay ignored": (_set("weight_decay", 0.0), {}),
}


def adaptive_deviation(options: dict[str, Any]) -> float:
    problem = mixed_problem(torch.float64, "decoupled", diagonal="mixed")
    numerator = options.get("numerator", "moment")
    optimizer = SOFIM(problem.groups, backend="reference", **options)
    oracle = problem.oracle(numerator, "model", max_grad_norm=options.get("max_grad_norm"))
    for grads in islice(problem.gradients(), 6):
        shrink_a_column(grads)
        give(problem.params, grads)
        optimizer.step()
        oracle.step(grads)
    return distance(problem.params, oracle) / TOLERANCES[torch.float64]


@pytest.mark.parametrize("mutation", ADAPTIVE_MUTATIONS)
def test_it_notices_a_wrong_adaptive_update(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate, options = ADAPTIVE_MUTATIONS[mutation]
    assert adaptive_deviation(options) <= 1
    mutate(monkeypatch)
    assert adaptive_deviation(options) > 1e3
