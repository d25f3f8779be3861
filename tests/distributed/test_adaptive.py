"""Diagonals that adapt, of parameters that are spread over ranks: sums of rows, columns and tensors cross ranks."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn

from bench.ranks import Ranks, all_reduced
from sofim_fused import SOFIM
from tests.distributed.support import (
    Net,
    farthest,
    fsdp,
    fsdp1,
    grouped,
    loss_of,
    mesh_of,
    needs_ranks,
    restore,
    same_on_all_ranks,
    saved_state,
    train,
)

pytestmark = needs_ranks

STEPS = 12
CLOSE = 2e-6
COMMON = {"lr": 0.02, "numerator": "nesterov"}
OPTIONS: dict[str, dict[str, Any]] = {
    "factored": {"diagonal": "factored", "rho": None, "max_grad_norm": 0.3},
    "factored-rank-one": {"diagonal": "factored", "rho": 0.3, "skip_nonfinite": True, "numerator": "moment"},
    "row-by-parameter": {"diagonal": "row", "rho": 0.3, "fisher": "parameter"},
    "tensor": {"diagonal": "tensor", "rho": 0.5, "fisher": "group"},
    "element": {"diagonal": "element", "rho": 0.2},
}


def on_fsdp(model: nn.Module, world: int) -> nn.Module:
    return fsdp(model, mesh_of((world,), ("shard",)))


def on_tensor_parallel(model: nn.Module, world: int) -> nn.Module:
    """Rows of one layer and columns of the other are spread."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = mesh_of((world,), ("tensor",))
    return parallelize_module(model, mesh, {"first": ColwiseParallel(), "second": RowwiseParallel()})


def on_two_axes(model: nn.Module, world: int) -> nn.Module:
    """Both at once: no rank has a whole row or a whole column of the second layer."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = mesh_of((2, world // 2), ("shard", "tensor"))
    parallelize_module(model, mesh["tensor"], {"first": ColwiseParallel(), "second": RowwiseParallel()})
    return fsdp(model, mesh["shard"])


def on_hybrid(model: nn.Module, world: int) -> nn.Module:
    return fsdp(model, mesh_of((2, world // 2), ("copies", "parts")), ("first", "second"))


def distance(rank: int, spread_by: Any, options: dict[str, Any]) -> float:
    world = distributed.get_world_size()
    hidden = 12  # tensor parallelism divides it evenly
    alone, spread = Net(hidden), spread_by(Net(hidden), world)
    settings = {**COMMON, **options}
    rho = {"rho": None if options["rho"] is None else options["rho"] * 1.5}
    first, second = (SOFIM(grouped(model, **rho), **settings) for model in (alone, spread))
    parts = 1 if spread_by is on_tensor_parallel else 2 if spread_by is on_two_axes else world
    part = rank // 2 if spread_by is on_two_axes else rank
    train(alone, first, range(STEPS))
    train(spread, second, range(STEPS), part if parts > 1 else 0, parts)
    if second.signal is not None:
        assert same_on_all_ranks(second.signal)
    return farthest(spread, alone)


TWO = [(on_fsdp, name) for name in OPTIONS] + [(on_tensor_parallel, name) for name in OPTIONS]
FOUR = [(on_two_axes, "factored"), (on_two_axes, "factored-rank-one"), (on_two_axes, "tensor"), (on_hybrid, "factored")]


@pytest.mark.parametrize(("spread_by", "kind"), TWO)
def test_two_ranks_are_one_process(spread_by: Any, kind: str, two: Ranks) -> None:
    assert max(two.run(distance, spread_by, OPTIONS[kind])) <= CLOSE


@pytest.mark.parametrize(("spread_by", "kind"), FOUR)
def test_four_ranks_are_one_process(spread_by: Any, kind: str, four: Ranks) -> None:
    assert max(four.run(distance, spread_by, OPTIONS[kind])) <= CLOSE


def sent(rank: int, spread_by: Any, options: dict[str, Any]) -> list[int]:
    world = distributed.get_world_size()
    spread = spread_by(Net(12), world)
    optimizer = SOFIM(spread.parameters(), **{**COMMON, **options})
    return all_reduced(lambda: train(spread, optimizer, range(1)))


def test_what_is_sent(two: Ranks) -> None:
    """As docs/distributed.md has it. The model has 3 matrices among its 7 tensors, with 7, 12 and 10 columns."""
    for name, expected in (
        ("factored", [16, 8 * (7 + 29)]),
        ("factored-rank-one", [16, 8 * (7 + 29), 32]),
        ("row-by-parameter", [8 * 7, 32 * 7]),
        ("tensor", [8 * 7, 32]),
        ("element", [32]),
    ):
        assert two.run(sent, on_fsdp, OPTIONS[name]) == [expected] * 2
    # Of the first layer both tensors are divided, of the second its weight: 12 columns each in a row of 10.
    found = two.run(sent, on_tensor_parallel, {"diagonal": "factored", "rho": None})
    assert found == [[8 * (2 + 7 + 2 + 10)]] * 2


def zero_redundancy(rank: int, options: dict[str, Any]) -> float:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    alone, spread = Net(), Net()
    settings = {**COMMON, **options}
    first = SOFIM(alone.parameters(), **settings)
    second = ZeroRedundancyOptimizer(spread.parameters(), optimizer_class=functools.partial(SOFIM), **settings)
    train(alone, first, range(STEPS))
    train(spread, second, range(STEPS))
    return farthest(spread, alone)


@pytest.mark.parametrize("kind", ["factored", "factored-rank-one"])
def test_whole_parameters_on_ranks(kind: str, two: Ranks) -> None:
    assert max(two.run(zero_redundancy, OPTIONS[kind])) <= CLOSE


def flat(rank: int) -> float:
    alone, spread = Net(), fsdp1(Net(), use_orig_params=True)
    settings = {**COMMON, **OPTIONS["element"]}
    first, second = SOFIM(alone.parameters(), **settings), SOFIM(spread.parameters(), **settings)
    train(alone, first, range(STEPS))
    train(spread, second, range(STEPS), rank, 2)
    refused = SOFIM(spread.parameters(), **{**COMMON, **OPTIONS["factored"]})
    with pytest.raises(ValueError, match=r"flat parameter .* diagonal='factored' shard the model with fully_shard"):
        refused.step()
    assert not refused.state
    from torch.distributed.fsdp import FullyShardedDataParallel

    with FullyShardedDataParallel.summon_full_params(spread):
        pairs = list(zip(spread.parameters(), alone.parameters(), strict=True))
        return max(float((a - b).norm() / b.norm()) for a, b in pairs) if torch.isfinite(pairs[0][0]).all() else 1.0


def test_flat_parameters_have_no_rows(two: Ranks) -> None:
    assert max(two.run(flat)) <= CLOSE


def placements(rank: int) -> list[str]:
    spread = on_tensor_parallel(Net(12), 2)
    optimizer = SOFIM(spread.parameters(), **{**COMMON, **OPTIONS["factored"]})
    train(spread, optimizer, range(1))
    return [
        f"{name}: {state[name].placements[0]!r}"
        for layer in (spread.first, spread.second)
        for state in [optimizer.state[layer.weight]]
        for name in ("row_var", "col_var")
    ]


def test_variances_are_spread_as_their_parameters(two: Ranks) -> None:
    expected = [
        "row_var: Shard(dim=0)",
        "col_var: Replicate()",
        "row_var: Replicate()",
        "col_var: Shard(dim=0)",
    ]
    assert two.run(placements) == [expected] * 2


def begin(rank: int, path: str) -> list[float]:
    from torch.distributed import checkpoint

    spread = on_fsdp(Net(), distributed.get_world_size())
    optimizer = SOFIM(spread.parameters(), **{**COMMON, **OPTIONS["factored-rank-one"]})
    world = distributed.get_world_size()
    train(spread, optimizer, range(4), rank, world)
    checkpoint.save(saved_state(spread, optimizer), checkpoint_id=path)
    return train(spread, optimizer, range(4, 8), rank, world)


def resume(rank: int, path: str) -> list[float]:
    world = distributed.get_world_size()
    spread = on_fsdp(Net(), world)
    optimizer = SOFIM(spread.parameters(), **{**COMMON, **OPTIONS["factored-rank-one"]})
    restore(spread, optimizer, path)
    return train(spread, optimizer, range(4, 8), rank, world)


def mean_losses(losses: list[list[float]]) -> list[float]:
    """By step, over ranks: each has another part of the batch."""
    return [sum(step) / len(step) for step in zip(*losses, strict=True)]


def test_a_checkpoint_of_four_ranks_goes_on_on_two(four: Ranks, two: Ranks, tmp_path: Path) -> None:
    path = str(tmp_path / "saved")
    before, after = four.run(begin, path), two.run(resume, path)
    assert mean_losses(after) == pytest.approx(mean_losses(before), rel=1e-5)


def taken_over(rank: int, spread_by: Any, diagonal: Any) -> tuple[float, float]:
    """AdamW for a few steps, then SOFIM from its state; beside the same in one process."""
    world = distributed.get_world_size()
    alone, spread = Net(12), spread_by(Net(12), world)
    parts, part = (
        (1, 0) if spread_by is on_tensor_parallel else (2, rank // 2) if spread_by is on_two_axes else (world, rank)
    )
    first, second = (torch.optim.AdamW(model.parameters(), lr=0.02) for model in (alone, spread))
    for model, optimizer, mine in ((alone, first, (0, 1)), (spread, second, (part, parts))):
        for step in range(4):
            optimizer.zero_grad()
            loss_of(model, step, *mine).backward()
            optimizer.step()
    before = farthest(spread, alone)
    ours = [SOFIM.from_adamw(optimizer, diagonal=diagonal) for optimizer in (first, second)]
    train(alone, ours[0], range(4, STEPS))
    train(spread, ours[1], range(4, STEPS), part, parts)
    return before, farthest(spread, alone)


@pytest.mark.parametrize(
    ("spread_by", "diagonal"),
    [(on_fsdp, "tensor"), (on_fsdp, "factored"), (on_tensor_parallel, "row"), (on_tensor_parallel, "factored")],
)
def test_adamw_s_second_moments_are_reduced_over_ranks(spread_by: Any, diagonal: str, two: Ranks) -> None:
    for before, after in two.run(taken_over, spread_by, diagonal):
        assert before <= CLOSE
        assert after <= 10 * CLOSE


def test_adamw_s_second_moments_on_two_axes(four: Ranks) -> None:
    assert max(after for _, after in four.run(taken_over, on_two_axes, "factored")) <= 10 * CLOSE


def groups_apart(rank: int) -> list[float]:
    """Each rank has parameters of one group alone, and only one of the groups has a finite ρ."""
    tensors = [nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4)), nn.Parameter(torch.linspace(0, 2, 12).view(4, 3))]
    groups = [
        {"params": [p] if owner == rank else [], "rho": rho}
        for owner, (p, rho) in enumerate(zip(tensors, (None, 0.3), strict=True))
    ]
    settings: dict[str, Any] = {**COMMON, "diagonal": "row", "fisher": "group"}
    optimizer = SOFIM(groups, shard_group=distributed.group.WORLD, **settings)
    alone = nn.Parameter(tensors[rank].detach().clone())
    twin = SOFIM([alone], **settings, rho=groups[rank]["rho"])
    for _ in range(3):
        tensors[rank].grad = tensors[rank].detach().sin()
        alone.grad = alone.detach().sin()
        optimizer.step()
        twin.step()
    return [(tensors[rank] - alone).abs().max().item(), len([] if optimizer.signal is None else optimizer.signal)]


def test_ranks_with_groups_of_their_own(two: Ranks) -> None:
    """All of them send what the term of rank one needs, or none of them does."""
    for distance, blocks in two.run(groups_apart):
        assert distance <= CLOSE
        assert blocks == 2
