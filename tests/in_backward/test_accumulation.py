"""Several backward passes for one step, and gradients that no hook has seen."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import islice, product
from typing import Any

import pytest
import torch
from torch import Tensor

from sofim_fused import SOFIM
from tests.in_backward.support import NARROW, NUMERATORS, Pair, backward, both_ways, on_cpu, three_batches
from tests.support.problems import give, mixed_problem, same_bits, snapshot
from tests.support.runs import Run

# Several backward passes for one step


def accumulated(pair: Pair, batches: Sequence[Sequence[Tensor | None]]) -> None:
    """All but the last one inside of the block."""
    pair.zero_grad()
    with pair.optimizer.accumulate_grads():
        for grads in batches[:-1]:
            backward(pair.params, grads)
    backward(pair.params, batches[-1])
    for grads in batches:
        backward(pair.plain_params, grads)


@pytest.mark.parametrize("decay", ["none", "l2"])
@pytest.mark.parametrize(
    ("numerator", "release", "dtype"),
    [
        ("moment", False, torch.float64),
        ("moment", False, NARROW),
        ("gradient", False, torch.float32),
        ("nesterov", False, (torch.float32, torch.complex64)),
        ("moment", True, torch.float64),
        ("moment", True, (torch.float32, torch.complex64)),
    ],
    ids=str,
)
def test_micro_batches_add_up(numerator: str, release: bool, dtype: Any, decay: str, run: Run) -> None:
    """Some parameters have gradients in the first, the second or the last micro-batch alone, or in none.

    What is released adds up in the moment, where it is rounded; L2 decay counts once all the same.
    """
    pair = Pair(run, dtype, decay, release=release, numerator=numerator)
    generator = torch.Generator().manual_seed(9)
    met = set()
    for step in range(run.steps(6)):
        batches: list[list[Tensor | None]] = []
        for batch in range(3):
            present = [(i + step) % 5 == 0 or (i + step) % 5 == batch + 1 for i in range(len(pair.params))]
            batches.append(
                [
                    torch.randn(p.shape, generator=generator).to(p) if there else None
                    for p, there in zip(pair.params, present, strict=True)
                ]
            )
        met |= {tuple(g is not None for g in grads) for grads in zip(*batches, strict=True)}
        accumulated(pair, batches)
        assert not release or all(p.grad is None for p in pair.params)
        pair.step()
    assert len(met) == 5
    assert pair.alike(1e-6 if release else None)


@on_cpu
@pytest.mark.parametrize("release", [False, True])
def test_blocks_may_be_nested(release: bool, run: Run) -> None:
    pair = Pair(run, torch.float64, release=release)
    first, second, third = three_batches(pair)
    with pair.optimizer.accumulate_grads():
        with pair.optimizer.accumulate_grads():
            backward(pair.params, first)
        backward(pair.params, second)
    backward(pair.params, third)
    for grads in (first, second, third):
        backward(pair.plain_params, grads)
    pair.step()
    assert pair.alike(1e-6)


@on_cpu
@pytest.mark.parametrize("release", [False, True])
def test_an_exception_ends_a_block(release: bool, run: Run) -> None:
    pair = Pair(run, torch.float64, release=release)
    first, second, third = three_batches(pair)

    def fail() -> None:
        with pair.optimizer.accumulate_grads():
            backward(pair.params, first)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    backward(pair.params, second)
    for grads in (first, second):
        backward(pair.plain_params, grads)
    pair.step()
    pair.backward(third)
    pair.step()
    assert pair.alike(1e-6)


@on_cpu
@pytest.mark.parametrize("release", [False, True])
def test_a_block_may_hold_the_last_pass_too(release: bool, run: Run) -> None:
    pair = Pair(run, torch.float64, "l2", release=release)
    for grads in three_batches(pair)[:2]:
        with pair.optimizer.accumulate_grads():
            backward(pair.params, grads)
        backward(pair.plain_params, grads)
    pair.step()
    assert pair.alike(1e-6)


@on_cpu
@pytest.mark.parametrize("same", [True, False])
def test_micro_batches_after_which_gradients_are_set_by_hand(same: bool, run: Run) -> None:
    pair = Pair(run, torch.float64, "l2", release=True)
    first, second, third = three_batches(pair)
    with pair.optimizer.accumulate_grads():
        backward(pair.params, first)
    first_again = [None if g is None else 2 * g for g in first]  # of these parameters alone, or of others too
    for grads in (first_again, second)[: 1 if same else 2]:
        for p, g in zip(pair.params, grads, strict=True):
            p.grad = g if p.grad is None else p.grad if g is None else p.grad + g
    for grads in (first, first_again, second)[: 2 if same else 3]:
        backward(pair.plain_params, grads)
    pair.step()
    pair.backward(third)
    pair.step()
    assert all(p.grad is None for p in pair.params)
    assert pair.alike(1e-6)


@on_cpu
def test_released_parts_are_not_enough_for_the_gradient_form(run: Run) -> None:
    pair = Pair(run, release=True, numerator="gradient")
    first, second, _ = three_batches(pair)
    with pytest.raises(ValueError, match="release_grads=True and numerator='gradient'"):  # noqa: SIM117
        with pair.optimizer.accumulate_grads():
            pytest.fail("the block was entered")
    for grads in (first, second):  # and all else goes on
        pair.backward(grads)
        pair.step()
    assert pair.alike()


@on_cpu
def test_a_block_of_a_plain_optimizer_does_nothing(run: Run) -> None:
    """So that one training loop serves both."""
    pair = Pair(run)
    first, _, _ = three_batches(pair)
    with pair.plain.accumulate_grads(), pair.plain.accumulate_grads():
        backward(pair.plain_params, first)
        pair.plain.step()
    backward(pair.params, first)
    pair.optimizer.step()
    assert pair.alike()


@on_cpu
@pytest.mark.parametrize("release", [False, True])
def test_no_step_inside_a_block(release: bool, run: Run) -> None:
    pair = Pair(run, torch.float64, release=release)
    first, second, _ = three_batches(pair)
    with pair.optimizer.accumulate_grads():
        backward(pair.params, first)
        before = snapshot(pair.optimizer)
        with pytest.raises(RuntimeError, match=r"step\(\) inside accumulate_grads\(\): leave the block"):
            pair.optimizer.step()
        assert same_bits(before, snapshot(pair.optimizer))
    backward(pair.params, second)
    for grads in (first, second):
        backward(pair.plain_params, grads)
    pair.step()
    assert pair.alike(1e-6)


@on_cpu
@pytest.mark.parametrize("release", [False, True])
def test_no_micro_batch_after_the_last(release: bool, run: Run) -> None:
    pair = Pair(run, release=release)
    first, second, _ = three_batches(pair)
    pair.backward(first)
    before = snapshot(pair.optimizer)
    with pytest.raises(RuntimeError, match=r"a second gradient .* before step\(\)"):  # noqa: SIM117
        with pair.optimizer.accumulate_grads():
            backward(pair.params, second)
    assert same_bits(before, snapshot(pair.optimizer))
    pair.step()
    assert pair.alike()


@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("numerator", NUMERATORS)
def test_a_second_pass_without_a_step(numerator: str, release: bool, run: Run) -> None:
    """It is refused at its first gradient, and the step goes on with those of the first."""
    pair = Pair(run, numerator=numerator, release=release)
    batches = list(islice(pair.problem.gradients(), 3, 6))
    for grads in batches:
        pair.backward(grads)
        before = snapshot(pair.optimizer)
        with pytest.raises(RuntimeError, match=r"Call step\(\) after each backward\(\).*accumulate_grads\(\)"):
            backward(pair.params, grads)
        assert same_bits(before, snapshot(pair.optimizer))
        pair.step()
    assert pair.alike()


@on_cpu
@pytest.mark.parametrize("numerator", NUMERATORS)
def test_passes_over_different_parameters_make_one_step(numerator: str, run: Run) -> None:
    """As with two losses, or ``backward(inputs=...)``: each parameter has one gradient."""
    pair = Pair(run, decay="l2", numerator=numerator)
    for grads in pair.gradients(4):
        pair.zero_grad()
        parts: list[list[Tensor | None]] = [
            [g if (i < 4) == first else None for i, g in enumerate(grads)] for first in (True, False)
        ]
        backward(pair.params, parts[0])
        backward(pair.params, grads, inputs=[p for i, p in enumerate(pair.params) if i >= 4 and grads[i] is not None])
        give(pair.plain_params, grads)
        pair.step()
    assert pair.alike()


# Gradients that no hook has seen


def by_hand(optimizer: SOFIM, params: list[Tensor], grads: list[Tensor | None]) -> None:
    optimizer.zero_grad()
    give(params, grads)
    optimizer.step()


def half_by_hand(optimizer: SOFIM, params: list[Tensor], grads: list[Tensor | None]) -> None:
    optimizer.zero_grad()
    backward(params, [g if i % 2 else None for i, g in enumerate(grads)])
    give(params[::2], grads[::2])
    optimizer.step()


def from_autograd_grad(optimizer: SOFIM, params: list[Tensor], grads: list[Tensor | None]) -> None:
    loss = torch.stack([(p * g).sum() for p, g in zip(params, grads, strict=True) if g is not None]).sum()
    give(params, torch.autograd.grad(loss, params, allow_unused=True))
    optimizer.step()


def by_hand_first(optimizer: SOFIM, params: list[Tensor], grads: list[Tensor | None]) -> None:
    """What a backward pass finds is added to it."""
    optimizer.zero_grad()
    give(
        params,
        [
            None if g is None or i % 3 else torch.empty_like(p).copy_(g)
            for i, (p, g) in enumerate(zip(params, grads, strict=True))
        ],
    )
    backward(params, grads)
    optimizer.step()


def unfrozen_later(optimizer: SOFIM, params: list[Tensor], grads: list[Tensor | None]) -> None:
    """Parameters that were frozen when the optimizer was made."""
    for p in params:
        p.requires_grad_(True)
    optimizer.zero_grad()
    backward(params, grads)
    optimizer.step()


def not_zeroed(optimizer: SOFIM, params: list[Tensor], grads: list[Tensor | None]) -> None:
    """Some of the old gradients are added to, others are met again by themselves."""
    backward(params, grads)
    optimizer.step()


def set_to_zero(optimizer: SOFIM, params: list[Tensor], grads: list[Tensor | None]) -> None:
    optimizer.zero_grad(set_to_none=False)
    backward(params, grads)
    optimizer.step()


def two_steps_in_a_row(optimizer: SOFIM, params: list[Tensor], grads: list[Tensor | None]) -> None:
    optimizer.zero_grad()
    backward(params, grads)
    optimizer.step()
    optimizer.step()


def frozen_now_and_then(optimizer: SOFIM, params: list[Tensor], grads: list[Tensor | None]) -> None:
    """Its old gradient counts as one, as for every optimizer of PyTorch's."""
    backward(params, [g if p.requires_grad else None for p, g in zip(params, grads, strict=True)])
    optimizer.step()
    params[2].requires_grad_(not params[2].requires_grad)


RELEASED = [by_hand, half_by_hand, from_autograd_grad, by_hand_first, unfrozen_later]
NEEDING_OLD_ONES = [not_zeroed, set_to_zero, two_steps_in_a_row, frozen_now_and_then]


@on_cpu
@pytest.mark.parametrize("numerator", NUMERATORS)
@pytest.mark.parametrize(
    ("take_step", "release"),
    [*product(RELEASED, [False, True]), *product(NEEDING_OLD_ONES, [False])],
)
def test_gradients_that_no_hook_has_seen(
    take_step: Callable[[SOFIM, list[Tensor], list[Tensor | None]], None], numerator: str, release: bool, run: Run
) -> None:
    batches = list(islice(mixed_problem(torch.float32).gradients(), 6))

    def start() -> tuple[list[dict[str, Any]], list[Tensor]]:
        problem = mixed_problem(torch.float32, "l2")
        for p in problem.params:
            p.requires_grad_(take_step is not unfrozen_later)
        return problem.groups, problem.params

    def work(optimizer: SOFIM, params: list[Tensor]) -> None:
        for grads in copy.deepcopy(batches):
            take_step(optimizer, params, grads)

    assert both_ways(run, start, work, release=release, numerator=numerator)


class _Wide(torch.autograd.Function):
    """Of a narrow parameter, with a gradient of float32."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, grad: Tensor) -> Tensor:
        ctx.save_for_backward(grad)
        return torch.zeros((), device=p.device)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0], None


wide_of: Callable[[Tensor, Tensor], Tensor] = _Wide.apply


@on_cpu
@pytest.mark.parametrize("release", [False, True])
def test_wide_gradients_of_narrow_parameters(release: bool, run: Run) -> None:
    """From a backward pass, and by hand."""
    pair = Pair(run, NARROW, release=release, state_dtype=torch.bfloat16)
    for count, grads in enumerate(pair.gradients(6)):
        wide = [None if g is None else g.float() * 1.001 for g in grads]
        give(pair.plain_params, wide)
        give(pair.params, wide)  # which lets gradients be wide
        if count % 2:
            pair.optimizer.zero_grad()
            losses = [wide_of(p, g) for p, g in zip(pair.params, wide, strict=True) if g is not None]
            torch.stack(losses).sum().backward()
            assert release or [p.grad is None for p in pair.params] == [g is None for g in grads]
            assert release or all(p.grad is None or p.grad.dtype == torch.float32 for p in pair.params)
        pair.step()
    assert pair.alike()


@on_cpu
@pytest.mark.parametrize("release", [False, True])
def test_a_step_without_gradients_does_nothing(release: bool, run: Run) -> None:
    pair = Pair(run, decay="decoupled", release=release)
    pair.optimizer.step()
    assert not pair.optimizer.state
    (grads,) = pair.gradients(1)
    pair.backward(grads)
    pair.step()
    pair.zero_grad()
    pair.step()
    assert pair.alike()


@on_cpu
def test_gradients_are_taken_before_anything_is_done_to_them(run: Run) -> None:
    """Nothing waits beyond the backward pass. What is done is refused, as a plain step would see it."""
    pair = Pair(run, numerator="gradient")
    for grads in pair.gradients(3):
        pair.backward(grads)
        for p in pair.params:
            if p.grad is not None:
                p.grad.fill_(float("nan"))
        pair.optimizer.zero_grad()
        with pytest.raises(RuntimeError, match=r"was removed between backward\(\) and step\(\)"):
            pair.optimizer.step()
        pair.step()
    assert pair.alike()
