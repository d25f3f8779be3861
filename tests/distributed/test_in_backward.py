"""Ranks on which something changes after the optimizer was made, with ``in_backward=True`` and without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import distributed, nn

from bench.ranks import Ranks
from sofim_fused import SOFIM
from tests.distributed.support import CLOSE, Net, farthest, fsdp, loss_of, mesh_of, needs_ranks, train

pytestmark = needs_ranks


def refusal(work: Callable[[], object]) -> str:
    """What a piece of work is refused with; empty: it is not."""
    try:
        work()
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


# Replicas


def wrapped_later(rank: int, options: dict[str, Any], bucket_view: bool, warm: bool) -> tuple[str, str, bool]:
    """A module is wrapped after a step was taken; ``warm``: and had a backward pass before the one that counts."""
    model = Net()
    optimizer = SOFIM(model.parameters(), lr=0.1, in_backward=True, **options)
    train(model, optimizer, range(1))  # the same batch on both ranks
    parallel = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=bucket_view)
    if warm:  # its gradients stay where they are
        with optimizer.accumulate_grads():
            loss_of(parallel, 1, rank, 2).backward()
    optimizer.zero_grad(set_to_none=not warm)
    weights = [p.detach().clone() for p in model.parameters()]

    def backward() -> None:
        loss_of(parallel, 2, rank, 2).backward()

    early = refusal(backward)
    late = "" if early else refusal(optimizer.step)
    return early, late, all(torch.equal(p.detach(), w) for p, w in zip(model.parameters(), weights, strict=True))


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("bucket_view", [False, True])
def test_a_module_that_is_replicated_after_a_step_is_refused(bucket_view: bool, warm: bool, two: Ranks) -> None:
    """In step(), or before anything was taken where gradients lie in DistributedDataParallel's memory."""
    for early, late, unchanged in two.run(wrapped_later, {}, bucket_view, warm):
        said, silent = (early, late) if bucket_view and warm else (late, early)
        assert said.startswith("ValueError: in_backward=True under DistributedDataParallel is impossible")
        assert silent == ""
        assert unchanged


@pytest.mark.parametrize("bucket_view", [False, True])
def test_gradients_that_replicas_released_are_gone(bucket_view: bool, two: Ranks) -> None:
    """DistributedDataParallel puts others in their place, or notices itself that they are missing."""
    for early, late, unchanged in two.run(wrapped_later, {"release_grads": True}, bucket_view, False):
        assert early or late
        assert unchanged


def averaged_by_hand(rank: int, options: dict[str, Any]) -> tuple[str, int]:
    model = Net()
    optimizer = SOFIM(model.parameters(), lr=0.1, in_backward=True, **options)
    loss_of(model, 0, rank, 2).backward()
    versions = [p.grad._version for p in model.parameters() if p.grad is not None]
    for p in model.parameters():
        distributed.all_reduce(p.grad)
    unseen = [p.grad._version for p in model.parameters() if p.grad is not None] == versions
    return refusal(optimizer.step), unseen


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_an_all_reduce_by_hand_is_refused(backend: str, two: Ranks) -> None:
    """It raises no version counter; a few elements tell."""
    for said, unseen in two.run(averaged_by_hand, {"backend": backend}):
        assert "was replaced or changed between backward() and step()" in said
        assert unseen


# Parameters that are exchanged for shards


def sharded_later(rank: int, options: dict[str, Any], begun: bool) -> float:
    """Its groups are given the ``DTensor``s, as FSDP2's users do who make the optimizer first."""
    alone, spread = Net(), Net()
    settings = {"lr": 0.1, "rho": 1.0, **options}
    plain = {name: value for name, value in settings.items() if name not in ("in_backward", "release_grads")}
    first, second = SOFIM(alone.parameters(), **plain), SOFIM(spread.parameters(), **settings)
    if begun:
        train(alone, first, range(2))
        train(spread, second, range(2))
        first.state.clear()
        second.state.clear()
    fsdp(spread, mesh_of((2,), ("shard",)))
    second.param_groups[0]["params"] = list(spread.parameters())
    train(alone, first, range(2, 12))
    train(spread, second, range(2, 12), rank, 2)
    return farthest(spread, alone)


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_grad_norm": 0.3},
        {"numerator": "gradient", "fisher": "parameter", "backend": "reference"},
        {"in_backward": True},
        {"in_backward": True, "numerator": "nesterov"},
        {"in_backward": True, "release_grads": True, "backend": "reference"},
    ],
    ids=str,
)
def test_parameters_that_are_sharded_after_the_optimizer_was_made(
    options: dict[str, Any], begun: bool, two: Ranks
) -> None:
    assert max(two.run(sharded_later, options, begun)) <= CLOSE


def gathered_later(rank: int, options: dict[str, Any]) -> float:
    """The other way round: whole parameters where there were shards."""
    alone, spread, later = Net(), fsdp(Net(), mesh_of((2,), ("shard",))), Net()
    settings = {"lr": 0.1, "rho": 1.0, **options}
    first, second = SOFIM(alone.parameters(), lr=0.1, rho=1.0), SOFIM(spread.parameters(), **settings)
    train(spread, second, range(2), rank, 2)
    second.state.clear()
    second.param_groups[0]["params"] = list(later.parameters())
    if rank == 0:  # which the other one must not be waited for
        train(alone, first, range(2, 6))
        train(later, second, range(2, 6))
    distributed.barrier()
    return farthest(later, alone)


@pytest.mark.parametrize("options", [{}, {"in_backward": True}], ids=str)
def test_shards_that_are_gathered_later(options: dict[str, Any], two: Ranks) -> None:
    assert max(two.run(gathered_later, options)) <= CLOSE


def clipped_shards(rank: int, options: dict[str, Any]) -> tuple[str, float]:
    alone, spread = Net(), fsdp(Net(), mesh_of((2,), ("shard",)))
    first = SOFIM(alone.parameters(), lr=0.1)
    second = SOFIM(spread.parameters(), lr=0.1, in_backward=True, **options)
    loss_of(alone, 0).backward()
    loss_of(spread, 0, rank, 2).backward()
    nn.utils.clip_grad_norm_(spread.parameters(), 1e-6)
    said = refusal(second.step)
    first.step()
    second.step()
    return said, farthest(spread, alone)


def changed_shards(rank: int, options: dict[str, Any]) -> tuple[str, float]:
    """Through what this rank holds of them, on which the whole tensor's version counter does not count."""
    alone, spread = Net(), fsdp(Net(), mesh_of((2,), ("shard",)))
    first = SOFIM(alone.parameters(), lr=0.1)
    second = SOFIM(spread.parameters(), lr=0.1, in_backward=True, **options)
    loss_of(alone, 0).backward()
    loss_of(spread, 0, rank, 2).backward()
    for p in spread.parameters():
        if p.grad is not None:
            p.grad.to_local().mul_(0.5)
    said = refusal(second.step)
    first.step()
    second.step()
    return said, farthest(spread, alone)


@pytest.mark.parametrize("work", [clipped_shards, changed_shards])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_changed_gradients_of_shards_are_refused(backend: str, work: Callable[..., Any], two: Ranks) -> None:
    """A second step() takes them as they came."""
    for said, distance in two.run(work, {"backend": backend}):
        assert "was replaced or changed between backward() and step()" in said
        assert distance <= CLOSE
