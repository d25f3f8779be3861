"""Moments in 8 bits of parameters that are spread over ranks along dimension 0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from bench.ranks import Ranks
from sofim_fused import SOFIM
from tests.distributed.support import fsdp, mesh_of, needs_ranks, restore, saved_state, whole

pytestmark = needs_ranks

F8 = torch.float8_e4m3fn
ELEMENT: dict[str, Any] = {"diagonal": "element", "rho": None}


class Rows(nn.Module):
    """33 rows, which neither two nor four divide, of two blocks; a tensor that stays in float32; a bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(200, 33)
        self.last = nn.Linear(33, 3)


def begun(rank: int, world: int, steps: int, **options: Any) -> tuple[nn.Module, SOFIM]:
    model: nn.Module = Rows()
    if world > 1:
        model = fsdp(model, mesh_of((world,), ("shard",)))
    optimizer = SOFIM(model.parameters(), lr=0.1, state_dtype=F8, backend="reference", **options)
    step(model, optimizer, steps)
    return model, optimizer


def step(model: nn.Module, optimizer: SOFIM, steps: int) -> None:
    from torch.distributed.tensor import DTensor, distribute_tensor

    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        for p in model.parameters():
            grad = torch.randn(p.shape, generator=generator)
            p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if isinstance(p, DTensor) else grad
        optimizer.step()


def as_integers(x: Tensor) -> Tensor:
    """All of a tensor; gloo does not send numbers of 8 bits, so they are sent as integers."""
    from torch.distributed.tensor import DTensor

    if x.dtype != F8:
        return whole(x)
    if not isinstance(x, DTensor):
        return x.view(torch.uint8).clone()
    local = DTensor.from_local(
        x.to_local().view(torch.uint8), x.device_mesh, x.placements, shape=x.shape, stride=x.stride()
    )
    return local.full_tensor()


def state_of(model: nn.Module, optimizer: SOFIM) -> list[Tensor]:
    return [as_integers(value) for p in model.parameters() for _, value in sorted(optimizer.state[p].items())]


def sharded(rank: int, options: dict[str, Any]) -> list[list[int]]:
    model, optimizer = begun(rank, 2, 2, **options)
    (first, *_) = model.parameters()
    known = optimizer.state[first]
    assert known["exp_avg"].placements == known["exp_avg_scale"].placements == first.placements  # type: ignore[attr-defined]
    assert tuple(known["exp_avg_scale"].shape) == (33, 2)
    alone, reference = begun(0, 1, 2, **options)
    # The rounding goes by an element's place in its shard, so only the first rank's rows have the same codes.
    here = len(known["exp_avg"].to_local())
    theirs = reference.state[next(alone.parameters())]
    if rank == 0:
        mine = known["exp_avg"].to_local().view(torch.uint8)
        off = (mine.int() - theirs["exp_avg"][:here].view(torch.uint8).int()).abs()
        assert int(off.max()) <= 1
        assert int((off > 0).sum()) <= 2  # sums over ranks differ by rounding errors
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        # Steps of about lr, of moments that are off by at most an eighth.
        torch.testing.assert_close(whole(p), q.detach(), rtol=0, atol=0.03 if "diagonal" in options else 2e-3)
    return [[here, *known["exp_avg_scale"].to_local().shape]]


@pytest.mark.parametrize(
    "options", [{}, {"diagonal": "factored", "rho": None}, ELEMENT, {"max_grad_norm": 0.5}], ids=str
)
def test_scales_lie_where_their_rows_do(options: dict[str, Any], two: Ranks) -> None:
    assert two.run(sharded, options) == [[[17, 17, 2]], [[16, 16, 2]]]


def save(rank: int, path: str) -> list[Tensor]:
    from torch.distributed import checkpoint

    model, optimizer = begun(rank, 4, 2, **ELEMENT)
    checkpoint.save(saved_state(model, optimizer), checkpoint_id=path)
    return state_of(model, optimizer)


def load(rank: int, path: str) -> list[Tensor]:
    world = distributed.get_world_size() if distributed.is_initialized() else 1
    model, optimizer = begun(rank, world, 1, **ELEMENT)
    restore(model, optimizer, path, alone=world == 1)
    found = state_of(model, optimizer)
    step(model, optimizer, 1)
    return found


def test_a_checkpoint_of_four_ranks_is_the_same_on_two_and_on_one(four: Ranks, two: Ranks, tmp_path: Path) -> None:
    path = str(tmp_path / "checkpoint")
    expected = four.run(save, path)[0]
    assert sum(x.dtype == torch.uint8 and bool(x.any()) for x in expected) == 2  # of first and second moments
    for found in (two.run(load, path)[0], load(0, path)):
        assert [i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if not torch.equal(a, b)] == []


def other_dimension(rank: int) -> str:
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = mesh_of((2,), ("shard",))
    param = nn.Parameter(distribute_tensor(torch.ones(32, 256), mesh, [Shard(1)]))
    SOFIM([nn.Parameter(distribute_tensor(torch.ones(4, 256), mesh, [Shard(1)]))], state_dtype=F8)  # float32
    with pytest.raises(ValueError, match="ranks have parts of rows: shard it along dimension 0") as caught:
        SOFIM([param], state_dtype=F8, backend="reference")
    return str(caught.value)


def test_parts_of_rows_are_refused(two: Ranks) -> None:
    for message in two.run(other_dimension):
        assert message.startswith("parameter 0 of group 0 (shape (32, 256), float32, cpu): state_dtype=torch.float8")
