"""The adaptive diagonal that the benchmark tries: every form of it beside matrices that are written out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from bench.convergence.adaptive import AdaptiveSOFIM

SHAPES = [(4, 3), (5,), (2, 3, 2), ()]
BETA, BETA2, LR, DECAY, FLOOR, EPS = 0.8, 0.9, 0.05, 0.3, 0.1, 1e-8
Array = NDArray[np.float64]
Mean = Callable[[list[Array]], Array]


def gradients(step: int) -> list[Array]:
    """Of sizes so different that the floor of the factored diagonal is reached."""
    generator = np.random.default_rng(step)
    found = [np.asarray(generator.standard_normal(shape)) for shape in SHAPES]
    found[0][:, 1] *= 1e-3
    found[0][2] *= 30
    found[2][:, :, 1] *= 1e-2
    return found


def running(values: list[Array], beta: float) -> Array:
    """The bias-corrected running mean, as the weighted sum that it is."""
    weights = [(1 - beta) * beta ** (len(values) - 1 - k) for k in range(len(values))]
    return np.asarray(sum(w * v for w, v in zip(weights, values, strict=True)) / (1 - beta ** len(values)))


def diagonal_of(history: list[Array], diagonal: str, floor: float) -> Array:
    """Of one tensor, written out, of its shape."""
    squares = running([g**2 for g in history], BETA2)
    if diagonal == "element" or (diagonal == "factored" and squares.ndim < 2):
        return np.asarray(np.sqrt(squares) + EPS)
    if squares.ndim < 2:
        return np.full(squares.shape, np.sqrt(squares.mean()) + EPS)
    matrix = squares.reshape(len(squares), -1)
    rows, columns = matrix.mean(1), matrix.mean(0)
    scale = np.empty_like(matrix)
    for i in range(matrix.shape[0]):
        for j in range(matrix.shape[1]):
            share = max(columns[j] / columns.mean(), floor) if diagonal == "factored" else 1.0
            scale[i, j] = (math.sqrt(rows[i]) + EPS) * math.sqrt(share)
    return scale.reshape(squares.shape)


def expected(
    start: list[Array], steps: int, diagonal: str, numerator: str, rho: float | None, floor: float = FLOOR
) -> list[Array]:
    """Weights after so many steps, each by a dense solve over all tensors."""
    weights = [w.copy() for w in start]
    histories: list[list[Array]] = [[] for _ in SHAPES]
    for t in range(1, steps + 1):
        for history, g in zip(histories, gradients(t), strict=True):
            history.append(g)
        moments = [running(history, BETA) for history in histories]
        wanted = moments
        if numerator == "nesterov":
            wanted = [
                (BETA * m * (1 - BETA**t) + (1 - BETA) * history[-1]) / (1 - BETA ** (t + 1))
                for m, history in zip(moments, histories, strict=True)
            ]
        scale = np.concatenate([diagonal_of(history, diagonal, floor).ravel() for history in histories])
        m, n = (np.concatenate([part.ravel() for part in parts]) for parts in (moments, wanted))
        if rho is None:
            change = LR * n / scale
        else:
            matrix = np.outer(m, m) / scale.sum() + rho * np.diag(scale)
            change = LR * rho * np.linalg.solve(matrix, n)
        at = 0
        for i, w in enumerate(weights):
            part = change[at : at + w.size].reshape(w.shape)
            weights[i] = np.asarray(w * (1 - LR * DECAY) - part)
            at += w.size
    return weights


def trained(steps: int, scale: float = 1.0, **settings: Any) -> tuple[list[Array], AdaptiveSOFIM]:
    """Weights and optimizer after as many steps, the tensors in two groups."""
    params = [nn.Parameter(torch.from_numpy(w)) for w in initial()]
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    settings = {"momentum": BETA, "beta2": BETA2, "floor": FLOOR, **settings}
    optimizer = AdaptiveSOFIM(groups, lr=LR, weight_decay=DECAY, **settings)
    for t in range(1, steps + 1):
        for p, g in zip(params, gradients(t), strict=True):
            p.grad = torch.from_numpy(np.asarray(scale * g))
        optimizer.step()
    return [p.detach().numpy() for p in params], optimizer


def initial() -> list[Array]:
    generator = np.random.default_rng(99)
    return [np.asarray(generator.standard_normal(shape)) for shape in SHAPES]


@pytest.mark.parametrize("rho", [None, 0.3])
@pytest.mark.parametrize("numerator", ["moment", "nesterov"])
@pytest.mark.parametrize("diagonal", ["row", "factored", "element"])
def test_steps_are_those_of_the_matrices(diagonal: str, numerator: str, rho: float | None) -> None:
    ours, _ = trained(4, diagonal=diagonal, numerator=numerator, rho=rho)
    for mine, theirs in zip(ours, expected(initial(), 4, diagonal, numerator, rho), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-10, atol=1e-12)


def test_the_floor_is_in_play() -> None:
    """Else the test above would say nothing of it."""
    a, b = (expected(initial(), 2, "factored", "moment", None, floor)[0] for floor in (FLOOR, 1e-8))
    assert np.abs(a - b).max() > 1e-3


@pytest.mark.parametrize("diagonal", ["row", "factored", "element"])
def test_a_scaled_loss_changes_nothing(diagonal: str) -> None:
    for mine, theirs in zip(trained(3, diagonal=diagonal)[0], trained(3, 1e4, diagonal=diagonal)[0], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4)  # but for eps


def test_element_with_a_moment_is_adam() -> None:
    ours, _ = trained(5, diagonal="element", numerator="moment")
    params = [nn.Parameter(torch.from_numpy(w)) for w in initial()]
    adam = torch.optim.AdamW(params, lr=LR, betas=(BETA, BETA2), eps=EPS, weight_decay=DECAY)
    for t in range(1, 6):
        for p, g in zip(params, gradients(t), strict=True):
            p.grad = torch.from_numpy(g)
        adam.step()
    for mine, p in zip(ours, params, strict=True):
        np.testing.assert_allclose(mine, p.detach().numpy(), rtol=1e-10)


def test_state_is_as_large_as_it_says() -> None:
    sizes = {}
    for diagonal in ("row", "factored", "element"):
        _, optimizer = trained(1, diagonal=diagonal)
        states = list(optimizer.state.values())
        assert [state["exp_avg"].shape for state in states] == [torch.Size(shape) for shape in SHAPES]
        sizes[diagonal] = [sum(squares.numel() for squares in state["squares"]) for state in states]
    assert sizes == {"row": [4, 1, 2, 1], "factored": [4 + 3, 5, 2 + 6, 1], "element": [12, 5, 12, 1]}


def test_zero_gradients_move_nothing_and_leave_no_nan() -> None:
    """LoRA's first gradients are zero in one of two factors, and bytes that a text has not have none at all."""
    for diagonal in ("row", "factored", "element"):
        p = nn.Parameter(torch.ones(3, 2))
        optimizer = AdaptiveSOFIM([p], lr=0.1, diagonal=diagonal, rho=0.3)
        p.grad = torch.zeros(3, 2)
        optimizer.step()
        assert p.tolist() == [[1.0, 1.0]] * 3
        p.grad = torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, -1.0]])
        optimizer.step()
        assert torch.isfinite(p).all()
        assert p[1].tolist() == [1.0, 1.0]
        assert (p[0] < 1).all()


def test_a_parameter_without_a_gradient_stands_still() -> None:
    kept, moved = (nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    optimizer = AdaptiveSOFIM([kept, moved], lr=0.1, weight_decay=0.5)
    moved.grad = torch.ones(2, 2)
    optimizer.step()
    assert kept.tolist() == [[1.0, 1.0]] * 2
    assert kept not in optimizer.state
    kept.grad = torch.ones(2, 2)  # its own first step, whose corrections are those of t = 1
    optimizer.step()
    np.testing.assert_allclose(kept.detach().numpy(), 0.95 - 0.1, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0, expected a finite number from 0 on"),
        ({"lr": math.nan}, "lr is nan"),
        ({"weight_decay": math.inf}, "weight_decay is inf"),
        ({"momentum": 1.0}, "momentum is 1.0, expected a number from 0 on and below 1"),
        ({"beta2": -0.1}, "beta2 is -0.1"),
        ({"floor": 0.0}, "floor is 0.0, expected a number above 0"),
        ({"rho": 0.0}, "rho is 0.0, expected a finite number above 0, or None"),
        ({"diagonal": "tensor"}, "diagonal is 'tensor', expected one of row, factored, element"),
        ({"numerator": "gradient"}, "numerator is 'gradient', expected one of moment, nesterov"),
    ],
)
def test_refuses_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaptiveSOFIM([nn.Parameter(torch.ones(1))], **settings)
