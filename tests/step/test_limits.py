"""What holds for every input: exactness over extreme scales, the bound on a step, and what leaves a step unchanged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from sofim_fused import SOFIM
from tests.support.problems import NUMERATORS, give

SCHEDULES: list[dict[str, Any]] = [{}, {"skip_nonfinite": True}]


def solve_exactly(rho: Fraction, hat: Sequence[Fraction]) -> list[Fraction]:
    """x of (m̂m̂ᵀ + ρI) x = m̂ by Gaussian elimination over the rationals: no rounding at any scale."""
    size = len(hat)
    rows = [[a * b + (rho if i == j else 0) for j, b in enumerate(hat)] + [a] for i, a in enumerate(hat)]
    for k in range(size):
        for i in range(k + 1, size):
            factor = rows[i][k] / rows[k][k]
            rows[i] = [x - factor * y for x, y in zip(rows[i], rows[k], strict=True)]
    x = [Fraction(0)] * size
    for k in reversed(range(size)):
        x[k] = (rows[k][size] - sum(rows[k][j] * x[j] for j in range(k + 1, size))) / rows[k][k]
    return x


@pytest.mark.parametrize("options", SCHEDULES, ids=["plain", "guarded"])
@pytest.mark.parametrize("rho", [10.0**k for k in range(-8, 5)])
def test_moment_form_over_extreme_scales(rho: float, options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(5)
    for exponent in range(-10, 7):
        p = torch.nn.Parameter(torch.zeros(5))
        optimizer = SOFIM([p], lr=0.5, rho=rho, **options)
        moment = [Fraction(0)] * 5
        beta = Fraction(0.9)
        for step in (1, 2, 3):
            direction = torch.randn(5, generator=generator)
            p.grad = direction / direction.norm() * 10.0**exponent
            with torch.no_grad():
                p.zero_()  # so that the new weight is the change itself
            optimizer.step()
            moment = [beta * m + (1 - beta) * Fraction(g) for m, g in zip(moment, p.grad.tolist(), strict=True)]
            hat = [m / (1 - beta**step) for m in moment]
            expected = torch.tensor([-0.5 * float(x) for x in solve_exactly(Fraction(rho), hat)], dtype=torch.float64)
            error = (p.detach().double() - expected).norm() / expected.norm()
            assert error <= 1e-6, (rho, exponent, step, error)


@pytest.mark.parametrize("options", SCHEDULES, ids=["plain", "guarded"])
@pytest.mark.parametrize("rho", [1e-6, 0.04, 1.0, 1e3])
def test_every_step_stays_within_the_trust_region(rho: float, options: dict[str, Any]) -> None:
    """‖Δw‖ ≤ η/(2√ρ), reached where ‖m̂‖² = ρ; √K times that over K blocks."""
    lr = 0.5
    bound = lr / (2 * rho**0.5)
    for blocks, fisher in ((1, "model"), (3, "parameter")):
        largest = 0.0
        for norm in [rho**0.5 * 10.0**k for k in (-9, -3, -1, 0, 1, 3, 9)]:
            params = [torch.nn.Parameter(torch.zeros(4, dtype=torch.float64)) for _ in range(3)]
            optimizer = SOFIM(params, lr=lr, rho=rho, fisher=fisher, **options)
            for p in params:
                p.grad = torch.full((4,), norm / 2 / (1 if fisher == "parameter" else 3**0.5), dtype=torch.float64)
            optimizer.step()
            change = torch.cat([p.detach() for p in params]).norm().item()
            assert change <= bound * blocks**0.5 * (1 + 1e-12)
            largest = max(largest, change)
        assert largest == pytest.approx(bound * blocks**0.5, rel=1e-12)


@pytest.mark.parametrize("options", SCHEDULES, ids=["plain", "guarded"])
@pytest.mark.parametrize(("dtype", "rho"), [(torch.float32, 1.0), (torch.float64, 1e-8)], ids=str)
def test_the_trust_region_holds_where_the_moment_cancels(
    dtype: torch.dtype, rho: float, options: dict[str, Any]
) -> None:
    """g = -9m leaves of the moment what rounding leaves; the step must not be that divided by ρ."""
    generator = torch.Generator().manual_seed(8)
    for exponent in range(11):
        p = torch.nn.Parameter(torch.zeros(100, dtype=dtype))
        optimizer = SOFIM([p], lr=0.5, rho=rho, **options)
        p.grad = torch.randn(100, generator=generator, dtype=torch.float64).to(dtype) * rho**0.5 * 10.0**exponent
        optimizer.step()
        with torch.no_grad():
            p.zero_()
        p.grad = -9 * optimizer.state[p]["exp_avg"]
        optimizer.step()
        assert p.detach().double().norm() <= 0.5 / (2 * rho**0.5) * (1 + 1e-6), exponent


@pytest.mark.parametrize("options", SCHEDULES, ids=["plain", "guarded"])
@pytest.mark.parametrize("numerator", NUMERATORS)
def test_extreme_settings_leave_zero_gradients_alone(numerator: str, options: dict[str, Any]) -> None:
    """Coefficients beyond float32's range: infinity times a zero moment would be NaN."""
    for settings in ({"lr": 1e10, "rho": 1e-30}, {"momentum": 1 - 1e-12, "rho": 1e-30, "lr": 1e20}):
        p = torch.nn.Parameter(torch.ones(3))
        optimizer = SOFIM([p], numerator=numerator, **settings, **options)
        p.grad = torch.zeros(3)
        optimizer.step()
        assert torch.equal(p.detach(), torch.ones(3))


@pytest.mark.parametrize("options", SCHEDULES, ids=["plain", "guarded"])
@pytest.mark.parametrize("numerator", NUMERATORS)
def test_an_infinite_weight_stays_the_only_one(numerator: str, options: dict[str, Any]) -> None:
    """In a group without L2 decay its value is nobody's business, though another group's weights are read."""
    masked, other = torch.nn.Parameter(torch.tensor([1.0, -float("inf")])), torch.nn.Parameter(torch.ones(3))
    groups = [
        {"params": [masked]},
        {"params": [other], "weight_decay": 0.1, "decoupled_weight_decay": False},
    ]
    optimizer = SOFIM(groups, numerator=numerator, **options)
    for _ in range(2):
        masked.grad, other.grad = torch.tensor([1.0, 0.0]), torch.ones(3)
        optimizer.step()
    assert masked[0].isfinite()
    assert masked[1] == -float("inf")
    assert other.isfinite().all()


@pytest.mark.parametrize("distance", [1e-3, 1e-9, 1e-15])
def test_bias_correction_near_one(distance: float) -> None:
    """1 - β^t loses its digits where β is near 1 unless it is taken as -expm1(t log β)."""
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    beta = 1 - distance
    optimizer = SOFIM([p], lr=1.0, momentum=beta, rho=1.0)
    moment = Fraction(0)
    for step in range(1, 4):
        p.grad = torch.tensor([0.1 * step], dtype=torch.float64)
        with torch.no_grad():
            p.zero_()
        optimizer.step()
        exact = Fraction(beta)
        moment = exact * moment + (1 - exact) * Fraction(p.grad.item())
        hat = moment / (1 - exact**step)
        assert p.item() == pytest.approx(-float(hat / (1 + hat**2)), rel=1e-13)


def run(
    options: dict[str, Any],
    shapes: Sequence[tuple[int, ...]] = ((3, 4), (6,), (2, 2)),
    transform: Callable[[list[Tensor]], list[Tensor]] = lambda x: x,
    scale: float = 1.0,
    steps: int = 7,
) -> list[Tensor]:
    """Train from fixed weights on a fixed sequence of gradients, both passed through ``transform``."""
    generator = torch.Generator().manual_seed(11)
    start = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    params = [torch.nn.Parameter(p) for p in transform(start)]
    optimizer = SOFIM(params, **options)
    for _ in range(steps):
        grads = [scale * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        give(params, transform(grads))
        optimizer.step()
    return [p.detach() for p in params]


def close(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-11, atol=1e-13) for a, b in zip(left, right, strict=True))


FORMS = list(product(NUMERATORS, ["model", "group", "parameter"]))


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("max_grad_norm", [None, 2.0])
@pytest.mark.parametrize(("numerator", "fisher"), FORMS)
def test_units_of_the_loss_do_not_matter(
    numerator: str, fisher: str, max_grad_norm: float | None, decoupled: bool
) -> None:
    """(g, √ρ, η, max_grad_norm) times a, λ divided by it (decoupled) or multiplied (L2): the same weights."""
    a, decay = 37.5, 0.03
    base = {"numerator": numerator, "fisher": fisher, "decoupled_weight_decay": decoupled}
    here = {**base, "lr": 0.2, "rho": 0.6, "weight_decay": decay, "max_grad_norm": max_grad_norm}
    there = {
        **base,
        "lr": 0.2 * a,
        "rho": 0.6 * a**2,
        "weight_decay": decay / a if decoupled else decay * a,
        "max_grad_norm": None if max_grad_norm is None else max_grad_norm * a,
    }
    assert close(run(here), run(there, scale=a))
    assert not close(run(here), run({**there, "lr": 0.2}, scale=a))


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.5}], ids=["plain", "guarded"])
@pytest.mark.parametrize(("numerator", "fisher"), FORMS)
def test_order_of_parameters_does_not_matter(numerator: str, fisher: str, options: dict[str, Any]) -> None:
    options = {"numerator": numerator, "fisher": fisher, "lr": 0.2, **options}
    assert close(run(options)[::-1], run(options, transform=lambda tensors: tensors[::-1]))


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.5}], ids=["plain", "guarded"])
@pytest.mark.parametrize(("numerator", "fisher"), FORMS)
def test_splitting_a_tensor_matters_only_to_fisher_parameter(
    numerator: str, fisher: str, options: dict[str, Any]
) -> None:
    options = {"numerator": numerator, "fisher": fisher, "lr": 0.2, **options}
    whole = torch.cat([p.reshape(-1) for p in run(options)])
    halves = run(options, transform=lambda tensors: [half for x in tensors for half in x.reshape(-1).chunk(2)])
    assert close([whole], [torch.cat(halves)]) == (fisher != "parameter")


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.5}], ids=["plain", "guarded"])
@pytest.mark.parametrize("numerator", NUMERATORS)
def test_rotating_the_space_rotates_the_weights(numerator: str, options: dict[str, Any]) -> None:
    """With one block over the model the method knows lengths and angles only."""
    rotation, _ = torch.linalg.qr(torch.randn(9, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    options = {"numerator": numerator, "lr": 0.2, "weight_decay": 0.1, **options}
    (straight,) = run(options, shapes=[(9,)])
    (turned,) = run(options, shapes=[(9,)], transform=lambda tensors: [rotation @ x for x in tensors])
    assert close([rotation @ straight], [turned])


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize(("numerator", "fisher"), FORMS)
def test_maximize_is_negated_gradients(numerator: str, fisher: str, decoupled: bool) -> None:
    options = {
        "numerator": numerator,
        "fisher": fisher,
        "lr": 0.2,
        "weight_decay": 0.1,
        "decoupled_weight_decay": decoupled,
    }
    assert close(run({**options, "maximize": True}), run(options, scale=-1.0))
