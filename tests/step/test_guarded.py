"""Clipping and skipping inside the step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sofim_fused import SOFIM
from tests.support.problems import NUMERATORS, Problem, give, mixed_problem, same_bits, snapshot

BAD = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("decay", ["none", "decoupled", "l2"])
@pytest.mark.parametrize("numerator", NUMERATORS)
def test_clipping_equals_clip_grad_norm(numerator: str, decay: str) -> None:
    """PyTorch's divides by norm + 1e-6, hence the tolerance."""
    inside, before = mixed_problem(torch.float32, decay), mixed_problem(torch.float32, decay)
    clipping = SOFIM(inside.groups, numerator=numerator, max_grad_norm=0.8)
    plain = SOFIM(before.groups, numerator=numerator)
    clipped = 0
    for _, ours, theirs in zip(range(20), inside.gradients(), before.gradients(), strict=False):
        give(inside.params, ours)
        clipping.step()
        give(before.params, theirs)
        norm = torch.nn.utils.clip_grad_norm_(before.params, 0.8)
        plain.step()
        assert clipping.grad_norm is not None
        assert clipping.grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)
        clipped += norm.item() > 0.8
    assert clipped > 10
    for a, b in zip(inside.params, before.params, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_an_infinite_limit_only_measures() -> None:
    problem, other = mixed_problem(torch.float64), mixed_problem(torch.float64)
    measuring, plain = SOFIM(problem.groups, max_grad_norm=float("inf")), SOFIM(other.groups)
    assert measuring.grad_norm is None
    for _, ours, theirs in zip(range(5), problem.gradients(), other.gradients(), strict=False):
        give(problem.params, ours)
        give(other.params, theirs)
        measuring.step()
        plain.step()
        expected = torch.cat([torch.view_as_real(torch.complex(g, g * 0)).reshape(-1) for g in ours if g is not None])
        assert measuring.grad_norm is not None
        assert measuring.grad_norm.item() == pytest.approx(expected.norm().item(), rel=1e-12)
    for a, b in zip(problem.params, other.params, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_zero_gradients_under_clipping() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.zeros(3)
    SOFIM([p], max_grad_norm=1.0).step()
    assert torch.equal(p.detach(), torch.ones(3))


def spoiled(grads: list[Tensor | None], tensor: int, element: int, value: float) -> list[Tensor | None]:
    """The gradients with one element replaced."""
    grads = [None if g is None else g.clone() for g in grads]
    target = grads[tensor]
    assert target is not None
    target.reshape(-1)[element] = value  # a clone of a dense gradient, so that the view reaches it
    return grads


def warmed_up(problem: Problem, **options: Any) -> tuple[SOFIM, list[Tensor | None]]:
    """An optimizer with state for every tensor, and gradients for a next step in which every tensor takes part."""
    optimizer = SOFIM(problem.groups, skip_nonfinite=True, **options)
    give(problem.params, [torch.randn_like(p) for p in problem.params])
    optimizer.step()
    for _, grads in zip(range(3), problem.gradients(), strict=False):
        give(problem.params, grads)
        optimizer.step()
    return optimizer, [torch.randn_like(p) for p in problem.params]


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}], ids=["alone", "clipping"])
@pytest.mark.parametrize("numerator", NUMERATORS)
@pytest.mark.parametrize(
    ("dtype", "state_dtype"),
    [
        (torch.float32, None),
        (torch.float64, None),
        (torch.bfloat16, None),
        (torch.float16, torch.bfloat16),
        (torch.complex64, None),
        ((torch.bfloat16, torch.float32, torch.complex64, torch.float64), None),
    ],
    ids=str,
)
def test_a_bad_element_anywhere_changes_nothing(
    dtype: torch.dtype | tuple[torch.dtype, ...],
    state_dtype: torch.dtype | None,
    numerator: str,
    options: dict[str, Any],
) -> None:
    problem = mixed_problem(dtype, "l2", layouts=["matrix", "scalar", "channels-last", "offset"])
    optimizer, grads = warmed_up(problem, numerator=numerator, state_dtype=state_dtype, **options)
    before = snapshot(optimizer)
    count = 0
    for tensor, grad in enumerate(grads):
        assert grad is not None
        for element in {0, grad.numel() // 2, grad.numel() - 1}:
            for bad in BAD:
                give(problem.params, spoiled([g.contiguous() for g in grads if g is not None], tensor, element, bad))
                optimizer.step()
                count += 1
                assert same_bits(before, snapshot(optimizer)), (tensor, element, bad)
                assert int(optimizer.skipped_steps) == count
                assert optimizer.grad_norm is not None
                assert not optimizer.grad_norm.isfinite()
    give(problem.params, grads)
    optimizer.step()
    assert not same_bits(before, snapshot(optimizer))
    assert int(optimizer.skipped_steps) == count


@pytest.mark.parametrize("numerator", NUMERATORS)
def test_a_skipped_first_step_leaves_no_trace(numerator: str) -> None:
    """The moment starts at zero, not at whatever the memory held, and the first real step counts as the first."""
    problem, other = mixed_problem(torch.float32), mixed_problem(torch.float32)
    skipping = SOFIM(problem.groups, numerator=numerator, skip_nonfinite=True)
    steady = SOFIM(other.groups, numerator=numerator, skip_nonfinite=True)
    give(problem.params, [torch.full_like(p, float("nan")) for p in problem.params])
    skipping.step()
    for _, ours, theirs in zip(range(4), problem.gradients(), other.gradients(), strict=False):
        give(problem.params, ours)
        give(other.params, theirs)
        skipping.step()
        steady.step()
    assert all(torch.equal(a, b) for a, b in zip(problem.params, other.params, strict=True))
    assert int(skipping.skipped_steps) == 1
    assert int(steady.skipped_steps) == 0


def test_without_the_option_a_nan_goes_through() -> None:
    """What the caller did not ask to hide must show."""
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.tensor([1.0, float("nan"), 1.0])
    optimizer = SOFIM([p], max_grad_norm=1.0)
    optimizer.step()
    assert p.isnan().all()
    assert int(optimizer.skipped_steps) == 0


def test_a_norm_that_overflows_clips_to_zero() -> None:
    """As clip_grad_norm_ does; only float64 gradients above 1e154 come to this."""
    p = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    p.grad = torch.full((2,), 1e200, dtype=torch.float64)
    SOFIM([p], max_grad_norm=1.0).step()
    assert torch.equal(p.detach(), torch.ones(2, dtype=torch.float64))


def test_large_finite_gradients_are_not_skipped() -> None:
    """Squares of float32 values overflow float32, not float64."""
    p = torch.nn.Parameter(torch.zeros(3))
    p.grad = torch.full((3,), 3e38)
    optimizer = SOFIM([p], skip_nonfinite=True)
    optimizer.step()
    assert int(optimizer.skipped_steps) == 0
    assert int(optimizer.state[p]["step"]) == 1
    assert p.isfinite().all()
