"""Diagonals that adapt, without the term of rank one: a hook takes the whole step of its tensor."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from sofim_fused import SOFIM
from tests.in_backward.support import EXACT, backward, both_ways
from tests.support.runs import Run

SHAPES = ((6, 5), (3, 2, 3, 3), (7,), ())
CASES: dict[str, dict[str, Any]] = {
    "factored": {"diagonal": "factored", "numerator": "nesterov", "weight_decay": 0.1},
    "row": {"diagonal": "row", "numerator": "moment", "state_dtype": torch.bfloat16},
    "tensor": {"diagonal": "tensor", "numerator": "gradient"},
    "element": {"diagonal": "element", "numerator": "nesterov", "maximize": True},
}


def start(device: str) -> tuple[list[dict[str, Any]], list[nn.Parameter]]:
    generator = torch.Generator().manual_seed(3)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in SHAPES]
    return [{"params": params[:2]}, {"params": params[2:], "lr": 0.02, "beta2": 0.9}], params


def gradients(count: int, device: torch.device) -> list[list[torch.Tensor | None]]:
    generator = torch.Generator().manual_seed(4)
    steps: list[list[torch.Tensor | None]] = [
        [torch.randn(shape, generator=generator).to(device) for shape in SHAPES] for _ in range(count)
    ]
    steps[2][1] = None
    return steps


def work(optimizer: SOFIM, params: list[nn.Parameter]) -> None:
    for count, grads in enumerate(gradients(5, params[0].device)):
        if count == 3:  # as schedulers do
            for group in optimizer.param_groups:
                group["lr"] /= 2
        optimizer.zero_grad()
        before = [p.detach().clone() for p in params]
        backward(params, grads)
        if optimizer._backward is not None:  # weights have changed before step()
            changed = [not torch.equal(p, old) for p, old in zip(params, before, strict=True)]
            assert changed == [g is not None for g in grads]
        optimizer.step()


@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_equals_a_plain_optimizer(case: str, release: bool, run: Run) -> None:
    tolerance = None if run.backend in EXACT else 1e-5
    assert both_ways(
        run, partial(start, run.device), work, release=release, tolerance=tolerance, rho=None, lr=0.01, **CASES[case]
    )


def test_gradients_add_up_unless_they_are_released(run: Run) -> None:
    def accumulate(optimizer: SOFIM, params: list[nn.Parameter]) -> None:
        device = params[0].device
        for first, second in zip(gradients(4, device), gradients(4, device), strict=True):
            optimizer.zero_grad()
            with optimizer.accumulate_grads():
                backward(params, first)
            backward(params, second)
            optimizer.step()

    options = {"diagonal": "factored", "rho": None, "lr": 0.01}
    assert both_ways(
        run, partial(start, run.device), accumulate, tolerance=None if run.backend in EXACT else 1e-5, **options
    )
    released = SOFIM(start(run.device)[0], in_backward=True, release_grads=True, backend=run.backend, **options)
    with pytest.raises(ValueError, match="needs the square of the whole gradient"), released.accumulate_grads():
        pass


def test_a_finite_rho_is_refused() -> None:
    params = [nn.Parameter(torch.ones(2))]
    with pytest.raises(ValueError, match=r"rho=0.5 is impossible: the term of rank one needs all gradients"):
        SOFIM(params, in_backward=True, diagonal="row", rho=0.5)
    optimizer = SOFIM(params, in_backward=True, diagonal="row")
    optimizer.param_groups[0]["rho"] = 0.5
    with pytest.raises(ValueError, match=r"rho=0.5 is impossible"):
        backward(params, [torch.ones(2)])
    assert not optimizer.state
