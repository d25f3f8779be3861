"""Which gradients wait for others, so that one launch takes them all, and how much memory is kept for that."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from sofim_fused import SOFIM, in_backward
from tests.backends.support import launches
from tests.in_backward.support import NUMERATORS, Pair, backward, both_ways, in_backward_of, made, on_cpu
from tests.support.problems import give
from tests.support.runs import EMULATED, INTERPRETED, Run


def accumulates(optimizer: SOFIM, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The sizes of the tensors that the passes of an optimizer take, pass by pass, from now on."""
    sizes: list[list[int]] = []
    passes = optimizer._plan.passes_for(optimizer.param_groups[0]["params"][0].device)
    take = passes.accumulate

    def noted(tensors: Any, *args: Any) -> Any:
        sizes.append([g.numel() for g in tensors.grads])
        return take(tensors, *args)

    monkeypatch.setattr(passes, "accumulate", noted)
    return sizes


def counted(work: Callable[[], None]) -> int | None:
    """How many kernels are launched, where that is counted."""
    if EMULATED:
        return launches(work)
    work()
    return None


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("numerator", NUMERATORS)
def test_small_gradients_are_taken_together(
    numerator: str, by_hand: bool, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a pass has a launch to pay for."""
    count = 40 if INTERPRETED else 200 if EMULATED else 1000
    params = [nn.Parameter(torch.full((3,), float(i), device=run.device)) for i in range(count)]
    optimizer = made(params, run, numerator=numerator)
    sizes = accumulates(optimizer, monkeypatch)
    for step in range(2):
        optimizer.zero_grad()
        grads: list[Tensor | None] = [torch.full_like(p, 1e-3 * (step + 1)) for p in params]
        if by_hand:
            give(params, grads)
            optimizer.step()
        else:
            launched = counted(partial(backward, params, grads))
            assert launched == (1 if EMULATED else None)
        assert sizes == ([] if run.backend == "cpu" else [[3] * count] * (step + 1))
        if not by_hand:
            optimizer.step()


@on_cpu
@pytest.mark.parametrize("numerator", [*NUMERATORS, "nesterov"])
def test_large_gradients_do_not_wait(numerator: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_backward, "BATCH", 100)
    sizes = [30, 200, 5, 60, 60, 1, 100, 3]
    sweeps: list[list[int]] = []

    def start() -> tuple[list[dict[str, Any]], list[nn.Parameter]]:
        params = [nn.Parameter(torch.linspace(-1, 1, n)) for n in sizes]
        decayed = {"params": params[:3], "weight_decay": 0.1, "decoupled_weight_decay": False}  # of some sums alone
        return [decayed, {"params": params[3:]}], params

    def work(optimizer: SOFIM, params: list[nn.Parameter]) -> None:
        with monkeypatch.context() as patch:
            seen = accumulates(optimizer, patch)
            for step in range(3):
                optimizer.zero_grad()
                backward(params, [torch.linspace(0, step + 1, n) for n in sizes])
                optimizer.step()
        sweeps.extend(seen if optimizer._backward else [])

    assert both_ways(run, start, work, numerator=numerator)
    assert len(sweeps) == (0 if run.backend == "cpu" else 3 * 4)
    assert all(sum(sorted(sweep)[:-1]) < 100 for sweep in sweeps)  # none waits that need not


@pytest.mark.parametrize("numerator", NUMERATORS)
def test_released_gradients_are_gone(numerator: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any time there is one gradient, and where passes have launches what waits for one."""
    monkeypatch.setattr(in_backward, "BATCH", 250)
    seen: list[StorageWeakRef] = []
    most = 0

    def count(p: Tensor) -> None:
        nonlocal most
        assert p.grad is not None
        seen.append(StorageWeakRef(p.grad.untyped_storage()))
        most = max(most, sum(not storage.expired() for storage in seen))

    params = [nn.Parameter(torch.full((100,), float(i), device=run.device)) for i in range(12)]
    for p in params:
        p.register_post_accumulate_grad_hook(count)  # before the optimizer's
    optimizer = made(params, run, numerator=numerator, release_grads=True)
    for step in range(2):
        backward(params, [torch.full_like(p, 1e-3 * (step + 1)) for p in params])
        assert all(storage.expired() for storage in seen)
        assert all(p.grad is None for p in params)
        optimizer.step()
    assert len(seen) == 24
    assert most == (1 if run.backend == "cpu" else 3)


@on_cpu
def test_what_is_kept_does_not_grow_with_the_patterns_of_presence(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that are left out at random make a new one in nearly every step."""
    monkeypatch.setattr(in_backward, "INDICES", 8)
    generator = torch.Generator().manual_seed(4)
    pair = Pair(run, decay="l2", numerator="gradient")
    for _ in range(40):
        present = torch.rand(len(pair.params), generator=generator) < 0.6
        pair.backward([torch.ones_like(p) if there else None for p, there in zip(pair.params, present, strict=True)])
        pair.step()
        assert len(in_backward_of(pair.optimizer)._indices) <= 8
    assert pair.alike()
