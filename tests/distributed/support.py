"""Shared by tests on ranks: a model, its batches, and ways to spread it over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from sofim_fused import SOFIM
from tests.support.runs import EMULATED, INTERPRETED

needs_ranks = [
    pytest.mark.skipif(EMULATED or INTERPRETED, reason="processes of their own have no stand-ins"),
    pytest.mark.skipif(not distributed.is_available(), reason="PyTorch was built without torch.distributed"),
]
"""Marks of a module whose tests run on ranks (the fixtures ``two`` and ``four``)."""

ROWS = 8  # a batch, split over the ranks
CLOSE = 1e-6


class Net(nn.Module):
    """Sizes that two and four do not divide, and a tensor with fewer rows than there are ranks."""

    def __init__(self, hidden: int = 13) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(7, hidden)
        self.second = nn.Linear(hidden, 10)
        self.last = nn.Linear(10, 3)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.second(self.first(x).tanh()).tanh()) * self.scale
        return out


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(ROWS, 7, generator=generator), torch.randn(ROWS, 3, generator=generator)


def loss_of(model: nn.Module, step: int, rank: int = 0, parts: int = 1) -> Tensor:
    x, y = (part.chunk(parts)[rank] for part in batch(step))
    return (model(x) - y).square().mean()


def grouped(model: Net, **settings: Any) -> list[dict[str, Any]]:
    """Two groups that differ in all that may differ inside of a Fisher matrix."""
    later = [*model.last.parameters(), model.scale]
    return [
        {"params": [*model.first.parameters(), *model.second.parameters()]},
        {"params": later, "lr": 0.05, "momentum": 0.8, "rho": 2.0, **settings},
    ]


def fsdp(model: nn.Module, mesh: Any, layers: Sequence[str] = ()) -> nn.Module:
    """Sharded with FSDP2, some layers apart from the others: each has collectives of its own, which take time."""
    from torch.distributed.fsdp import fully_shard

    for name in layers:
        fully_shard(getattr(model, name), mesh=mesh)
    return fully_shard(model, mesh=mesh)


def mesh_of(shape: tuple[int, ...], names: tuple[str, ...]) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def whole(x: Tensor) -> Tensor:
    full = getattr(x, "full_tensor", None)
    return (x if full is None else full()).detach().clone()


def farthest(ours: nn.Module, theirs: nn.Module) -> float:
    """The largest relative distance of a parameter."""
    pairs = list(zip(map(whole, ours.parameters()), map(whole, theirs.parameters()), strict=True))
    assert all(torch.isfinite(b).all() for _, b in pairs)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, rank: int = 0, parts: int = 1
) -> list[float]:
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(model, step, rank, parts)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def same_on_all_ranks(value: Tensor) -> bool:
    every = [torch.empty_like(value) for _ in range(distributed.get_world_size())]
    distributed.all_gather(every, value)
    return all(torch.equal(one, every[0]) for one in every)


def fsdp1(model: nn.Module, strategy: str = "FULL_SHARD", **options: Any) -> Any:
    """Two layers apart, and the rest with the whole model: three flat parameters."""
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    options.setdefault("auto_wrap_policy", ModuleWrapPolicy({nn.Linear}))
    return FullyShardedDataParallel(
        model, sharding_strategy=ShardingStrategy[strategy], device_id=torch.device("cpu"), **options
    )


def saved_state(model: nn.Module, optimizer: SOFIM) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights, states = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": states}


def restore(model: nn.Module, optimizer: SOFIM, path: str, alone: bool = False) -> None:
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import set_state_dict

    state = saved_state(model, optimizer)
    checkpoint.load(state, checkpoint_id=path, no_dist=alone)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def new_pair(rank: int, world: int, options: dict[str, Any]) -> tuple[nn.Module, SOFIM]:
    model = Net()
    if world > 1:
        model = fsdp(model, mesh_of((world,), ("shard",)))
    return model, SOFIM(model.parameters(), lr=0.1, **options)
