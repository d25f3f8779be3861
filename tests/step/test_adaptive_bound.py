"""No step with an adaptive diagonal is longer than docs/adaptive.md says, and some are nearly as long."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sofim_fused import SOFIM
from sofim_fused.backends import adaptive
from tests.support.oracle import FLOOR
from tests.support.problems import NUMERATORS
from tests.support.runs import once

pytestmark = once
ADAPTIVE = ["tensor", "row", "factored", "element"]
STEPS = 25
ROUNDING = 1 + 1e-5


def weights_of(numerator: str, beta: float, t: int) -> list[float]:
    """How much of each gradient is in v after t of them, the last one first."""
    if numerator == "gradient":
        return [1.0] + [0.0] * (t - 1)
    moment = [(1 - beta) * beta**age / (1 - beta**t) for age in range(t)]
    if numerator == "moment":
        return moment
    ahead = [beta * (1 - beta) * beta**age / (1 - beta ** (t + 1)) for age in range(t)]
    return [ahead[0] + (1 - beta) / (1 - beta ** (t + 1)), *ahead[1:]]


def variance_weights(beta2: float, t: int) -> list[float]:
    """How much of each squared gradient is in the corrected running mean."""
    return [(1 - beta2) * beta2**age / (1 - beta2**t) for age in range(t)]


def constant(numerator: str, beta: float, beta2: float, t: int) -> float:
    """C: v is at most C·√v̂ after t gradients, whatever they are, by Cauchy and Schwarz."""
    mixed = zip(weights_of(numerator, beta, t), variance_weights(beta2, t), strict=True)
    return math.sqrt(sum(a * a / b if b else math.inf for a, b in mixed if a))


def limit(numerator: str, beta: float, beta2: float) -> float:
    """C for many steps, if β² < β₂."""
    r = beta * beta / beta2
    if numerator == "gradient":
        return 1 / math.sqrt(1 - beta2)
    if numerator == "moment":
        return (1 - beta) / math.sqrt((1 - beta2) * (1 - r))
    return (1 - beta) / math.sqrt(1 - beta2) * math.sqrt((1 + beta) ** 2 + beta**2 * r / (1 - r))


def bound(diagonal: str, numerator: str, beta: float, beta2: float, t: int, rho: float | None = None) -> float:
    """The largest root mean square of a block's update, in units of lr; factored: of a row's."""
    floor = 1 / math.sqrt(FLOOR) if diagonal == "factored" else 1.0
    along = floor * constant(numerator, beta, beta2, t)
    if rho is None or numerator == "moment":
        return along
    return along * (1 + floor * constant("moment", beta, beta2, t) / (2 * math.sqrt(rho)))


def lengths(diagonal: str, change: Tensor) -> Tensor:
    """The root mean squares of the blocks of an update of a matrix."""
    if diagonal == "element":
        return change.abs()
    square = change.double().square()
    return (square.mean() if diagonal == "tensor" else square.mean(1)).sqrt()


def worst(numerator: str, beta: float, beta2: float, t: int) -> list[float]:
    """Sizes of t gradients of one direction for which Cauchy and Schwarz's inequality is an equation."""
    pairs = zip(weights_of(numerator, beta, t), variance_weights(beta2, t), strict=True)
    return [a / b for a, b in pairs][::-1]


def sequences(numerator: str, beta: float, beta2: float) -> dict[str, list[Tensor]]:
    """Gradients of a matrix, step by step."""
    generator = torch.Generator().manual_seed(6)
    normal = [torch.randn(3, 4, generator=generator) for _ in range(STEPS)]
    direction = normal[0]
    return {
        "the worst": [size * direction for size in worst(numerator, beta, beta2, STEPS)],
        "a burst after zeros": [torch.zeros(3, 4)] * (STEPS - 1) + [direction],
        "a burst after noise": [1e-6 * x for x in normal[1:]] + [direction],
        "constant": [torch.diag(torch.tensor([1.0, 1e-3, 1e-3, 1e-6]))[:3]] * STEPS,
        "a row and a column": [torch.tensor([[1.0], [1e-3], [0.0]]) * torch.tensor([1.0, 1e-2, 1e-4, 0.0])] * STEPS,
        "alternating": [(-1.0) ** i * direction for i in range(STEPS)],
        "noise": normal,
        "a loss that grows": [1.3**i * x for i, x in enumerate(normal)],
        "a loss that shrinks": [0.5**i * x for i, x in enumerate(normal)],
        "elements in turn": [torch.eye(12)[i % 12].view(3, 4) * 1e3 ** (i // 12) for i in range(STEPS)],
    }


def updates(gradients: list[list[Tensor]], **options: Any) -> Iterator[tuple[int, list[Tensor], SOFIM]]:
    """The count of each step and the change of each of several matrices, in units of lr."""
    params = [nn.Parameter(torch.zeros_like(each[0])) for each in gradients]
    optimizer = SOFIM(params, lr=1.0, **options)
    for t, grads in enumerate(zip(*gradients, strict=True), 1):
        with torch.no_grad():
            for p, g in zip(params, grads, strict=True):
                p.zero_()
                p.grad = g.clone()
        optimizer.step()
        yield t, [p.detach().clone() for p in params], optimizer


def test_the_constants_of_the_document() -> None:
    for beta2, expected in ((0.99, (2.345, 10.0, 2.694)), (0.999, (7.270, 31.62, 8.415))):
        for numerator, value in zip(NUMERATORS, expected, strict=True):
            assert limit(numerator, 0.9, beta2) == pytest.approx(value, rel=5e-4)
            assert constant(numerator, 0.9, beta2, 20_000) == pytest.approx(value, rel=5e-4)
            assert constant(numerator, 0.9, beta2, 1) == pytest.approx(1.0)
            steps = [constant(numerator, 0.9, beta2, t) for t in range(1, 300)]
            assert steps == sorted(steps)


@pytest.mark.parametrize("rho", [None, 0.01])
@pytest.mark.parametrize(("beta", "beta2"), [(0.9, 0.99), (0.95, 0.9)])
@pytest.mark.parametrize("numerator", NUMERATORS)
@pytest.mark.parametrize("diagonal", ADAPTIVE)
def test_no_step_is_longer(diagonal: str, numerator: str, beta: float, beta2: float, rho: float | None) -> None:
    """And without the term of rank one, the worst gradients come to nearly as much."""
    cases = sequences(numerator, beta, beta2)
    largest = 0.0
    options: dict[str, Any] = {"numerator": numerator, "momentum": beta, "beta2": beta2, "rho": rho, "eps": 1e-18}
    fisher = "model" if beta < beta2 else "parameter"
    for t, changes, _ in updates([*cases.values()], diagonal=diagonal, fisher=fisher, **options):
        most = bound(diagonal, numerator, beta, beta2, t, rho)
        for name, change in zip(cases, changes, strict=True):
            assert lengths(diagonal, change).max() <= most * ROUNDING, (name, t)
            largest = max(largest, lengths(diagonal, change).max().item() / most)
    if rho is None and diagonal != "factored":
        assert largest >= 0.999


@pytest.mark.parametrize("rho", [1.0, 0.01])
@pytest.mark.parametrize("diagonal", ADAPTIVE)
def test_the_bound_that_knows_no_constant(diagonal: str, rho: float) -> None:
    """With the moment as numerator and the term of rank one: Σsu²/Σs over a Fisher block is at most lr²ρ/4."""
    cases = sequences("moment", 0.9, 0.99)
    largest = 0.0
    for t, changes, optimizer in updates([*cases.values()], diagonal=diagonal, fisher="parameter", rho=rho):
        q = optimizer.signal
        assert q is not None
        assert (q >= 0).all()
        # u = D⁻¹m̂/(1 + q/ρ), and Σs(D⁻¹m̂)²/Σs is q.
        weighted = q.sqrt() / (1 + q / rho)
        assert (weighted <= math.sqrt(rho) / 2 * ROUNDING).all()
        largest = max(largest, weighted.max().item() / (math.sqrt(rho) / 2))
        assert (
            q <= (constant("moment", 0.9, 0.99, t) ** 2) / (FLOOR if diagonal == "factored" else 1) * ROUNDING
        ).all()
        if diagonal == "tensor":  # where s is one number, and the weights are equal
            lengths_of = torch.stack([change.double().square().mean().sqrt() for change in changes])
            torch.testing.assert_close(lengths_of, weighted, rtol=1e-4, atol=1e-9)
    assert largest >= 0.9


@given(st.randoms(use_true_random=False))
def test_random_sizes_of_gradients(choice: random.Random) -> None:
    """Over many orders of magnitude, with random settings."""
    beta, beta2 = choice.choice([0.0, 0.5, 0.9, 0.99]), choice.choice([0.0, 0.5, 0.9, 0.99, 0.9999])
    numerator, diagonal = choice.choice(NUMERATORS), choice.choice(ADAPTIVE)
    rho = choice.choice([None, 10.0 ** choice.uniform(-3, 1)])
    generator = torch.Generator().manual_seed(choice.randrange(1 << 30))
    decades = choice.choice([0.0, 1.0, 6.0])

    def sizes(*shape: int) -> Tensor:
        return 10 ** (decades * torch.randn(shape, generator=generator, dtype=torch.float64).clamp(-1, 1))

    def gradient() -> Tensor:
        size = (sizes(1, 1) * sizes(3, 1) * sizes(1, 4) * sizes(3, 4)).sqrt()
        return (size * torch.randn(3, 4, generator=generator)).float()

    gradients = [[gradient() for _ in range(12)] for _ in range(4)]
    options: dict[str, Any] = {"numerator": numerator, "momentum": beta, "beta2": beta2, "rho": rho, "eps": 1e-18}
    for t, changes, _ in updates(gradients, diagonal=diagonal, **options):
        most = bound(diagonal, numerator, beta, beta2, t, rho)
        assert max(lengths(diagonal, change).max().item() for change in changes) <= most * ROUNDING


@pytest.mark.parametrize("diagonal", ADAPTIVE)
def test_tiny_gradients_too(diagonal: str) -> None:
    """Whose squares are below float32's range: the smallest eps that is allowed is large enough."""
    sizes = (1e-12, 1e-18, 1e-20, 1e-22, 1e-25, 1e-35)
    kinds = [each[-12:] for each in sequences("gradient", 0.9, 0.99).values()]
    cases = [[size * g for g in each] for each in kinds for size in sizes]
    for t, changes, _ in updates(cases, diagonal=diagonal, numerator="gradient", rho=None, eps=1e-18):
        most = bound(diagonal, "gradient", 0.9, 0.99, t)
        assert max(lengths(diagonal, change).max().item() for change in changes) <= most * ROUNDING


def test_without_the_floor_nothing_bounds_a_factored_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A constant diagonal gradient: the floor is what keeps its steps short."""
    gradient = [[torch.diag(torch.tensor([1.0, 1e-3]))] * STEPS]
    options: dict[str, Any] = {"diagonal": "factored", "rho": None, "backend": "reference"}
    *_, (_, (change,), _) = updates(gradient, **options)
    assert lengths("row", change).max() <= 1 / math.sqrt(FLOOR)
    monkeypatch.setattr(adaptive, "COLUMN_FLOOR", 1e-8)
    *_, (_, (change,), _) = updates(gradient, **options)
    assert lengths("row", change).max() > 500
