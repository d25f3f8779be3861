"""Ranks of which one differs: bad or missing gradients, other parameters or settings, and a rank that is killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn

from bench.ranks import Ranks
from sofim_fused import SOFIM
from tests.distributed.support import (
    Net,
    fsdp,
    loss_of,
    mesh_of,
    needs_ranks,
    new_pair,
    restore,
    saved_state,
    train,
    whole,
)

pytestmark = needs_ranks


# Steps that are skipped, gradients that are missing


def one_bad_gradient(rank: int) -> tuple[int, bool]:
    """On the shard of one rank alone."""
    model = fsdp(Net(), mesh_of((distributed.get_world_size(),), ("shard",)))
    optimizer = SOFIM(model.parameters(), lr=0.1, skip_nonfinite=True)
    train(model, optimizer, range(2), rank, 2)
    before = [p.detach().to_local().clone() for p in model.parameters()]
    moments = [state["exp_avg"].to_local().clone() for state in optimizer.state.values()]
    loss_of(model, 2, rank, 2).backward()
    if rank == 1:
        model.first.weight.grad.to_local()[0, 0] = float("nan")
    optimizer.step()
    unchanged = all(torch.equal(p.detach().to_local(), old) for p, old in zip(model.parameters(), before, strict=True))
    states = optimizer.state.values()
    unchanged &= all(torch.equal(s["exp_avg"].to_local(), old) for s, old in zip(states, moments, strict=True))
    unchanged &= all(int(state["step"]) == 2 for state in states)
    return int(optimizer.skipped_steps), unchanged


def test_all_ranks_skip_a_step_that_is_bad_on_one(two: Ranks) -> None:
    assert two.run(one_bad_gradient) == [(1, True), (1, True)]


def infinity_on_one_rank(rank: int) -> list[tuple[int, float, bool]]:
    model = fsdp(Net(), mesh_of((distributed.get_world_size(),), ("shard",)))
    optimizer = SOFIM(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    seen = []
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step, rank, 2)).backward()
        if rank == 1 and step == 1:
            model.first.weight.grad.to_local()[0, 0] = float("inf")
        before = [p.detach().to_local().clone() for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        after = [p.detach().to_local() for p in model.parameters()]
        unchanged = all(torch.equal(new, old) for new, old in zip(after, before, strict=True))
        seen.append((int(optimizer.skipped_steps), scaler.get_scale(), unchanged))
    assert all(torch.isfinite(p).all() for p in after)
    return seen


def test_all_ranks_skip_what_a_scaler_finds_on_one(two: Ranks) -> None:
    first, second = two.run(infinity_on_one_rank)
    assert [skipped for skipped, _, _ in first] == [skipped for skipped, _, _ in second] == [0, 1, 1]
    assert [unchanged for _, _, unchanged in first] == [unchanged for _, _, unchanged in second] == [False, True, False]


def found_by_another_rank(rank: int) -> tuple[int, bool]:
    """What a scaler may say to one optimizer alone, of gradients that are finite."""
    from torch.distributed.tensor import Shard, distribute_tensor

    param = nn.Parameter(distribute_tensor(torch.ones(4), mesh_of((2,), ("shard",)), [Shard(0)]))
    optimizer = SOFIM([param], lr=0.5)
    param.grad = distribute_tensor(torch.ones(4), param.device_mesh, [Shard(0)])
    optimizer.found_inf = torch.tensor(float(rank == 1))
    optimizer.step()
    return int(optimizer.skipped_steps), torch.equal(whole(param), torch.ones(4))


def test_all_ranks_skip_what_only_one_was_told(two: Ranks) -> None:
    assert two.run(found_by_another_rank) == [(1, True), (1, True)]


def found_across_a_mesh(rank: int, diagonal: str) -> list[tuple[int, bool]]:
    """Each parameter is sharded over one of two axes alone, so that no message goes to all ranks."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = mesh_of((2, 2), ("rows", "columns"))
    found = []
    for teller in range(4):
        params, start = [], torch.ones(4, 4)
        for placements in ([Shard(0), Replicate()], [Replicate(), Shard(0)]):
            params.append(nn.Parameter(distribute_tensor(start, mesh, placements)))
            params[-1].grad = distribute_tensor(start, mesh, placements)
        optimizer = SOFIM(params, lr=0.5, diagonal=diagonal)  # type: ignore[arg-type]
        optimizer.found_inf = torch.tensor(float(rank == teller))
        optimizer.step()
        same = [torch.equal(whole(param), start) for param in params]  # of all: ranks that part wait for ever
        found.append((int(optimizer.skipped_steps), all(same)))
    return found


@pytest.mark.parametrize("diagonal", ["identity", "factored"])
def test_ranks_that_no_message_joins_skip_what_only_one_was_told(four: Ranks, diagonal: str) -> None:
    assert four.run(found_across_a_mesh, diagonal) == [[(1, True)] * 4] * 4


def missing_gradients(rank: int, fisher: str) -> float:
    """The second rank's shards of one layer have no gradients; its moments and weights there stay."""
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = mesh_of((2,), ("shard",))
    torch.manual_seed(1)
    values = [torch.randn(4, 3), torch.randn(6)]
    grads = [torch.randn(4, 3), torch.randn(6)]
    params = [nn.Parameter(distribute_tensor(x, mesh, [Shard(0)])) for x in values]
    optimizer = SOFIM(params, lr=0.1, rho=0.5, fisher=fisher)
    for p, g in zip(params, grads, strict=True):
        p.grad = distribute_tensor(g, mesh, [Shard(0)])
    if rank == 1:
        params[0].grad = None
    optimizer.step()
    seen = grads[0].clone()
    seen[2:] = 0
    squares = [float(seen.double().square().sum()), float(grads[1].double().square().sum())]
    if fisher == "model":
        squares = [sum(squares)] * 2
    expected = [w - 0.1 * g / (0.5 + s) for w, g, s in zip(values, (seen, grads[1]), squares, strict=True)]
    return max(float((whole(p) - e).abs().max()) for p, e in zip(params, expected, strict=True))


@pytest.mark.parametrize("fisher", ["model", "parameter"])
def test_gradients_that_only_some_ranks_have(fisher: str, two: Ranks) -> None:
    assert max(two.run(missing_gradients, fisher)) < 1e-6


def no_gradient_at_all(rank: int, options: dict[str, Any]) -> float:
    """On one rank, of all of its shards."""
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = mesh_of((2,), ("shard",))
    param = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    optimizer = SOFIM([param], lr=0.5, rho=1.0, **options)
    if rank == 0:
        param.grad = distribute_tensor(torch.ones(4), mesh, [Shard(0)], src_data_rank=None)
    optimizer.step()
    expected = torch.tensor([1 - 0.5 / 3] * 2 + [1.0] * 2)
    return float((whole(param) - expected).abs().max())


@pytest.mark.parametrize("options", [{}, {"skip_nonfinite": True}, {"in_backward": True}])
def test_a_rank_without_gradients_takes_part(options: dict[str, Any], two: Ranks) -> None:
    assert max(two.run(no_gradient_at_all, options)) < 1e-6


def loaded_by_one_rank(rank: int, options: dict[str, Any]) -> None:
    """The other one, which has no parameter, has nothing to load."""
    params = [nn.Parameter(torch.ones(3))] if rank == 0 else []
    optimizer = SOFIM(params, shard_group=distributed.group.WORLD, **options)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        if rank == 0:
            optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("options", [{}, {"skip_nonfinite": True}])
def test_a_rank_that_loads_alone_waits_for_no_other(options: dict[str, Any], two: Ranks) -> None:
    two.run(loaded_by_one_rank, options)


# Refusals


def refused(rank: int) -> list[str]:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    mesh = mesh_of((2,), ("shard",))
    messages = []

    def message(work: Callable[[], Any], kind: type[Exception]) -> None:
        with pytest.raises(kind) as caught:
            work()
        messages.append(str(caught.value))

    partial = nn.Parameter(DTensor.from_local(torch.ones(2), mesh, [Partial()]))
    message(lambda: SOFIM([partial]), ValueError)
    param = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    plain = nn.Parameter(torch.ones(4))
    message(lambda: SOFIM([plain], shard_group=3), TypeError)
    message(lambda: SOFIM([plain], in_backward=True, shard_group=distributed.group.WORLD), ValueError)
    elsewhere = nn.Parameter(
        DTensor.from_local(torch.ones(2 - 2 * rank), only_rank_0(), [Replicate()], run_check=False)
    )
    if rank == 1:
        message(lambda: SOFIM([elsewhere]), ValueError)
    optimizer = SOFIM([param], lr=0.1)
    other_mesh = DeviceMesh("cpu", [1, 0])
    param.grad = distribute_tensor(torch.ones(4), other_mesh, [Shard(0)])
    message(optimizer.step, ValueError)
    assert not optimizer.state
    param.grad = distribute_tensor(torch.ones(4), mesh, [Shard(0)])
    optimizer.step()
    before = whole(param)
    good = optimizer.state[param]["exp_avg"]
    for wrong in (torch.ones(4), distribute_tensor(torch.ones(4), mesh, [Replicate()])):
        optimizer.state[param]["exp_avg"] = wrong
        message(optimizer.step, ValueError)
    optimizer.state[param]["exp_avg"] = good
    saved = SOFIM([plain])
    plain.grad = torch.ones(4)
    saved.step()
    message(lambda: optimizer.load_state_dict(saved.state_dict()), ValueError)
    message(lambda: saved.load_state_dict(optimizer.state_dict()), ValueError)
    assert torch.equal(whole(param), before)
    return messages


def only_rank_0() -> Any:
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh("cpu", [0])


def test_what_is_refused(two: Ranks) -> None:
    for messages in two.run(refused):
        expected = [
            "Partial",
            "shard_group=3: pass a process group",
            "averaged over the ranks",
            "DeviceMesh",
            "a plain tensor",
            "redistribute",
            *["spreads it"] * 2,
        ]
        if len(messages) > len(expected):  # the second rank
            expected.insert(3, "this rank is not part of")
        for text, words in zip(messages, expected, strict=True):
            assert words in text


def different_counts(rank: int) -> None:
    model = Net()
    params = list(model.parameters())[: 3 + rank]
    optimizer = SOFIM([{"params": [p]} for p in params], fisher="group", shard_group=distributed.group.WORLD)
    for p in params:
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in params]
    try:
        optimizer.step()
    finally:
        assert not optimizer.state
        assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))


def test_ranks_with_different_groups_raise(two: Ranks) -> None:
    """In place of wrong sums, or of waiting for ever."""
    for good, text in two.outcomes(different_counts):
        assert not good
        assert "the ranks of a process group have different sums to add up (Fisher blocks: 3, 4)" in text


def different_numerators(rank: int) -> None:
    (p,) = list(Net().parameters())[:1]
    numerator = ("gradient", "nesterov")[rank]  # of which there are as many sums
    optimizer = SOFIM([p], numerator=numerator, shard_group=distributed.group.WORLD)  # type: ignore[arg-type]
    p.grad = torch.ones_like(p)
    optimizer.step()


def test_ranks_with_different_numerators_raise(two: Ranks) -> None:
    for good, text in two.outcomes(different_numerators):
        assert not good
        assert "different sums to add up (numerator: gradient, nesterov)" in text


def different_shards(rank: int) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = mesh_of((2,), ("shard",))
    params = [nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)])) for _ in range(2)]
    optimizer = SOFIM(params[: 1 + rank])
    for p in params:
        p.grad = distribute_tensor(torch.ones(4), mesh, [Shard(0)])
    optimizer.step()


def test_ranks_with_different_parameters_raise(two: Ranks) -> None:
    """The sums would be of parts of them."""
    for good, text in two.outcomes(different_shards):
        assert not good
        assert "different sums to add up (sharded parameters: 1, 2)" in text


# A rank that is lost


def train_until_killed(rank: int, folder: str, victim: int, at: int) -> None:
    from torch.distributed import checkpoint

    model, optimizer = new_pair(rank, 2, {"max_grad_norm": 0.3})
    for step in range(100):
        train(model, optimizer, range(step, step + 1), rank, 2)
        if step % 5 == 4:
            checkpoint.save(saved_state(model, optimizer), checkpoint_id=f"{folder}/{step}")
        if rank == victim and step == at:
            optimizer._plan.rank_sums(optimizer).total = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore


def resume(rank: int, folder: str, last: int) -> list[float]:
    model, optimizer = new_pair(rank, 2, {"max_grad_norm": 0.3})
    restore(model, optimizer, f"{folder}/{last}")
    return train(model, optimizer, range(last + 1, last + 8), rank, 2)


def undisturbed(rank: int, last: int) -> list[float]:
    model, optimizer = new_pair(rank, 2, {"max_grad_norm": 0.3})
    return train(model, optimizer, range(last + 8), rank, 2)[last + 1 :]


def test_a_rank_that_is_killed_in_a_step(two: Ranks, tmp_path: Path) -> None:
    """The other ends with an error in the time that the process group allows, and the last checkpoint goes on."""
    ranks = Ranks(2, timeout=10.0)
    try:
        started = time.monotonic()
        (survivor, text), (victim, _) = ranks.outcomes(train_until_killed, str(tmp_path), 1, 12)
        assert time.monotonic() - started < 60
        assert not victim
        assert not survivor
        assert "all_reduce" in text or "Connection" in text
    finally:
        ranks.close()
    last = max(int(path.name) for path in tmp_path.iterdir() if (path / ".metadata").exists())
    assert last == 9
    assert two.run(resume, str(tmp_path), last) == two.run(undisturbed, last)
