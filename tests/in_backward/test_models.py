"""``in_backward=True`` with shared layers, activation checkpoints, threads and torch.compile."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sofim_fused import SOFIM
from tests.in_backward.support import (
    EXACT,
    NUMERATORS,
    Pair,
    Shared,
    alike,
    backward,
    both_ways,
    loss_of,
    made,
    on_cpu,
    plain,
    shared,
)
from tests.support.problems import same_bits, snapshot
from tests.support.runs import Run


@on_cpu
@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("numerator", NUMERATORS)
@pytest.mark.parametrize(("reentrant", "tied"), [(None, True), (False, True), (False, False), (True, False)], ids=str)
def test_shared_layers_and_checkpoints(
    reentrant: bool | None, tied: bool, numerator: str, release: bool, run: Run
) -> None:
    def work(optimizer: SOFIM, model: Shared) -> None:
        for step in range(4):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()

    assert both_ways(run, shared(reentrant, tied), work, release=release, numerator=numerator)


@on_cpu
@pytest.mark.parametrize("release", [False, True])
def test_a_shared_layer_in_reentrant_checkpoints(release: bool, run: Run) -> None:
    """It has two gradients in one backward pass, which cannot be told from those of two passes, but may add up."""
    model = Shared(reentrant=True)
    optimizer = made(model.parameters(), run, release_grads=release)
    with pytest.raises(RuntimeError, match=r"re-entrant checkpointing: pass use_reentrant=False"):
        loss_of(model, 0).backward()
    assert optimizer.state

    def work(optimizer: SOFIM, model: Shared) -> None:
        for step in range(3):
            optimizer.zero_grad()
            with optimizer.accumulate_grads():
                loss_of(model, step).backward()
            optimizer.step()

    assert both_ways(run, shared(True), work, release=release, tolerance=1e-6, weight_decay=0.1)


@on_cpu
@pytest.mark.parametrize("numerator", NUMERATORS)
def test_a_graph_of_the_backward_pass(numerator: str, run: Run) -> None:
    """``create_graph=True``: gradients have a history, and gradient mode is on where they are taken."""

    def work(optimizer: SOFIM, model: Shared) -> None:
        for step in range(3):
            optimizer.zero_grad()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a cycle that keeps the graph
                loss_of(model, step).backward(create_graph=True)
            optimizer.step()
        assert not any(x.requires_grad for known in optimizer.state.values() for x in known.values())

    assert both_ways(run, shared(), work, numerator=numerator, weight_decay=0.1)


@on_cpu
@pytest.mark.parametrize("numerator", NUMERATORS)
def test_the_backward_pass_raises_version_counters(numerator: str, run: Run) -> None:
    """So that autograd notices what it would need as it was."""
    pair = Pair(run, numerator=numerator)
    for grads in pair.gradients(2):
        pair.backward(grads)
        pair.step()
    grads = [torch.ones_like(p) for p in pair.params]
    states = [pair.optimizer.state[p]["exp_avg"] for p in pair.params if p in pair.optimizer.state]
    before = [x._version for x in states], [p._version for p in pair.params]
    pair.backward(grads)
    assert all(x._version > old for x, old in zip(states, before[0], strict=True))
    assert all((p._version > old) == (numerator != "moment") for p, old in zip(pair.params, before[1], strict=True))
    between = [p._version for p in pair.params]
    pair.step()
    assert all(p._version > old for p, old in zip(pair.params, between, strict=True))


@on_cpu
@pytest.mark.parametrize("numerator", NUMERATORS)
def test_threads(numerator: str, run: Run) -> None:
    """Two optimizers in two threads; their large gradients are taken without Python's lock."""

    def work(seed: int, results: dict[int, list[Tensor]]) -> None:
        generator = torch.Generator().manual_seed(seed)
        params = [nn.Parameter(torch.randn(n, generator=generator)) for n in (3, (1 << 21) + 1, 50)]
        optimizer = made(params, run, numerator=numerator, release_grads=True)
        for _ in range(3):
            backward(params, [1e-3 * torch.randn(p.shape, generator=generator) for p in params])
            optimizer.step()
        results[seed] = snapshot(optimizer)

    together: dict[int, list[Tensor]] = {}
    threads = [threading.Thread(target=work, args=(seed, together)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone: dict[int, list[Tensor]] = {}
    for seed in range(2):
        work(seed, alone)
        assert same_bits(together[seed], alone[seed])


@on_cpu
@pytest.mark.parametrize("what", ["step", "all of it"])
@pytest.mark.parametrize("numerator", NUMERATORS)
def test_compiled(numerator: str, what: str, run: Run) -> None:
    """A step, or a function that runs the backward pass too."""

    def work(optimizer: SOFIM, model: Shared) -> None:
        torch._dynamo.reset()
        step: Callable[[], None] = optimizer.step
        if what == "step" and optimizer._backward:
            step = torch.compile(step, backend="eager")

        def train_on(x: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = model(x).square().sum()
            loss.backward()
            step()
            return loss

        train = torch.compile(train_on, backend="eager") if what != "step" and optimizer._backward else train_on
        for count in range(4):
            train(torch.linspace(-1, count, 12).view(2, 6))

    assert both_ways(run, shared(), work, numerator=numerator)


@pytest.mark.parametrize("numerator", NUMERATORS)
def test_a_model_that_is_moved_before_its_first_step(numerator: str, run: Run) -> None:
    """To a GPU, after the optimizer was made. (On a CPU it goes nowhere.)"""
    here = run if run.device == "cpu" else run._replace(backend="auto")
    optimizers = []
    for make in (made, plain):
        model = Shared()
        optimizer = make(model.parameters(), here, numerator=numerator)
        model.to(run.device)
        for count in range(2):
            optimizer.zero_grad()
            model(torch.linspace(-1, count, 12, device=run.device).view(2, 6)).square().sum().backward()
            optimizer.step()
        optimizers.append(optimizer)
    assert alike(optimizers[0], optimizers[1], None if run.backend in EXACT else 1e-6)
