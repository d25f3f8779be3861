"""The convergence benchmark's baseline, Nyström-SGD, and the convex problem whose factors are predicted."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bench.convergence import convex
from bench.convergence.contenders import CONFIGURATIONS, CONTENDERS, scaled
from bench.convergence.nystrom import NystromSGD

# Nyström-SGD, against matrices that it never forms


def small_problem(convex_loss: bool) -> tuple[list[nn.Parameter], Any]:
    """Two tensors and a loss of both, with its whole Hessian in reach."""
    torch.manual_seed(0)
    inputs, targets = torch.randn(40, 5, dtype=torch.float64), torch.randn(40, 3, dtype=torch.float64)
    params = [nn.Parameter(torch.randn(shape, dtype=torch.float64) / 2) for shape in ((5, 3), (3,))]

    def loss(weight: Tensor, bias: Tensor) -> Tensor:
        out = inputs @ weight + bias
        return ((out if convex_loss else out.tanh() * out) - targets).square().mean()

    return params, loss


def flat_hessian(params: list[nn.Parameter], loss: Any) -> Tensor:
    shapes, sizes = [p.shape for p in params], [p.numel() for p in params]

    def of_flat(flat: Tensor) -> Tensor:
        return loss(*(part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)))

    flat = torch.cat([p.detach().reshape(-1) for p in params])
    return torch.autograd.functional.hessian(of_flat, flat)


def with_graph(params: list[nn.Parameter], loss: Any) -> None:
    for p, g in zip(params, torch.autograd.grad(loss(*params), params, create_graph=True), strict=True):
        p.grad = g


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


@pytest.mark.parametrize("convex_loss", [True, False])
@pytest.mark.parametrize("columns", [1, 4, 18, 50])
def test_nystrom_is_the_dense_construction(convex_loss: bool, columns: int) -> None:
    params, loss = small_problem(convex_loss)
    hessian, before = flat_hessian(params, loss), flat(params)
    optimizer = NystromSGD(params, lr=0.3, rho=0.2, columns=columns, generator=torch.Generator().manual_seed(3))
    chosen = torch.randperm(18, generator=torch.Generator().manual_seed(3))[:columns]
    with_graph(params, loss)
    gradient = flat([p.grad for p in params])
    optimizer.step()

    values, vectors = np.linalg.eigh(hessian[chosen][:, chosen].numpy())
    assert (values > 0).all() or not convex_loss
    inverse = vectors @ np.diag(1 / np.abs(values)) @ vectors.T
    approximation = hessian[:, chosen].numpy() @ inverse @ hessian[chosen].numpy()
    step = np.linalg.solve(approximation + 0.2 * np.eye(18), gradient.numpy())
    torch.testing.assert_close(flat(params), before - 0.3 * torch.from_numpy(step), rtol=1e-8, atol=1e-10)


def test_nystrom_with_all_columns_is_a_regularized_newton_step() -> None:
    params, loss = small_problem(convex_loss=True)
    hessian, before = flat_hessian(params, loss), flat(params)
    with_graph(params, loss)
    gradient = flat([p.grad for p in params])
    NystromSGD(params, lr=1.0, rho=0.01, columns=18).step()
    newton = torch.linalg.solve(hessian + 0.01 * torch.eye(18, dtype=torch.float64), gradient)
    torch.testing.assert_close(flat(params), before - newton, rtol=1e-8, atol=1e-10)


def test_nystrom_keeps_a_curvature_for_its_period() -> None:
    params, loss = small_problem(convex_loss=False)
    optimizer = NystromSGD(params, lr=0.01, columns=3, period=3)
    factors, due = [], []
    for _ in range(5):
        due.append(optimizer.needs_graph)
        if optimizer.needs_graph:
            with_graph(params, loss)
        else:
            optimizer.zero_grad()
            loss(*params).backward()
        optimizer.step()
        factors.append(optimizer.factor)
    assert due == [True, False, False, True, False]
    assert factors[0] is factors[2]
    assert factors[3] is factors[4]
    assert factors[0] is not factors[3]


def test_nystrom_where_the_loss_is_linear_is_gradient_descent() -> None:
    """Columns that are zero, one of them without a graph, carry no curvature."""
    a, b = (nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64)) for _ in range(2))
    loss = (3 * a).sum() + b.square().sum() * 0 + b.sum()
    for p, g in zip((a, b), torch.autograd.grad(loss, (a, b), create_graph=True), strict=True):
        p.grad = g
    optimizer = NystromSGD([a, b], lr=0.5, rho=2.0, columns=4)
    optimizer.step()
    assert optimizer.factor is not None
    assert optimizer.factor.shape == (4, 0)
    assert a.tolist() == [1 - 0.75, 2 - 0.75]
    assert b.tolist() == [1 - 0.25, 2 - 0.25]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0, expected a finite number from 0 on"),
        ({"lr": math.nan}, "lr is nan"),
        ({"rho": 0.0}, "rho is 0.0, expected a finite number above 0"),
        ({"rho": math.inf}, "rho is inf"),
        ({"columns": 0}, "columns is 0, expected 1 at least"),
        ({"period": 0}, "period is 0, expected 1 at least"),
    ],
)
def test_nystrom_refuses_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NystromSGD([nn.Parameter(torch.ones(1))], **settings)


def test_nystrom_refuses_what_it_cannot_step_with() -> None:
    params, loss = small_problem(convex_loss=True)
    optimizer = NystromSGD(params)
    with pytest.raises(ValueError, match=r"parameter 0 of shape \(5, 3\) has no gradient"):
        optimizer.step()
    loss(*params).backward()
    before = flat(params)
    with pytest.raises(RuntimeError, match="take gradients with create_graph=True"):
        optimizer.step()
    with pytest.raises(ValueError, match="call it, then step"):
        optimizer.step(lambda: None)
    assert torch.equal(flat(params), before)
    assert optimizer.needs_graph


# The convex problem


def test_the_minimiser_and_its_hessian() -> None:
    given = convex.problem()
    gradient = torch.func.grad(given.loss)(given.minimiser)
    assert float(gradient.norm()) < 1e-14
    torch.manual_seed(0)
    v = torch.randn(650, dtype=torch.float64)
    _, product = torch.func.jvp(torch.func.grad(given.loss), (given.minimiser,), (v,))
    torch.testing.assert_close(given.hessian(given.minimiser) @ v, product, rtol=1e-10, atol=1e-12)
    assert float(given.spectrum[0]) == pytest.approx(convex.PENALTY)  # of what the softmax does not see


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("sofim", {"lr/rho": 4.0, "rho": 0.1}),
        ("sofim", {"lr/rho": 24.0, "rho": 10.0}),
        ("sofim-parameter", {"lr/rho": 9.6, "rho": 0.3}),
        ("sofim-gradient", {"lr/rho": 2.0, "rho": 1.0}),
        ("sgd", {"lr": 1.28, "momentum": 0.9}),
        ("sgd", {"lr": 0.32, "momentum": 0.95}),
    ],
)
def test_predicted_factors_are_seen(name: str, settings: dict[str, float]) -> None:
    """Second-order terms vanish at the minimiser: SOFIM's rate is that of SGD-momentum, or of gradient descent."""
    distances = convex.descend(convex.Job(name, settings, 0, 500, None))["distances"]
    predicted = convex.predicted(CONTENDERS[name], settings, convex.problem().spectrum)
    seen = convex.seen(distances)
    assert predicted is not None
    assert seen is not None
    assert 1 - seen == pytest.approx(1 - predicted, rel=0.1)


def test_steps_that_grow_are_predicted_too() -> None:
    spectrum = convex.problem().spectrum
    factor = convex.predicted(CONTENDERS["sofim-gradient"], {"lr/rho": 3.0, "rho": 1.0}, spectrum)
    assert factor is not None
    assert factor > 1
    assert convex.predicted(CONTENDERS["adamw"], {}, spectrum) is None


def test_factors_apply_to_rates_alone() -> None:
    for kind in ("full", "batches"):
        for contender in CONTENDERS.values():
            made = scaled(contender, convex.FACTORS[kind]).grid  # type: ignore[index]
            assert len(made) == CONFIGURATIONS
            for ours, theirs in zip(made, contender.grid, strict=True):
                changed = {name for name in ours if ours[name] != theirs[name]}
                assert changed <= {"lr", "lr/rho"}
