"""Parameters spread over ranks: FSDP2, HSDP, tensor parallel, ZeRO, DDP, and checkpoints from one to another."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from bench.ranks import Ranks, all_reduced
from sofim_fused import SOFIM
from tests.support.runs import EMULATED, INTERPRETED

pytestmark = [
    pytest.mark.skipif(EMULATED or INTERPRETED, reason="processes of their own have no stand-ins"),
    pytest.mark.skipif(not distributed.is_available(), reason="PyTorch was built without torch.distributed"),
]

STEPS = 200
ROWS = 8  # a batch, split over the ranks
CLOSE = 1e-6


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    ranks = Ranks(4)
    yield ranks
    ranks.close()


# Models, batches, ways to spread


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


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "guarded": {"max_grad_norm": 0.3, "skip_nonfinite": True},
    "l2": {"weight_decay": 0.01, "decoupled_weight_decay": False, "max_grad_norm": 0.3},
}
LAYOUTS = {
    "fsdp": ((-1,), ("shard",)),
    "hsdp": ((2, -1), ("replicate", "shard")),
}


def against_one_process(rank: int, layout: str, options: dict[str, Any], steps: int) -> tuple[float, list[int]]:
    world = distributed.get_world_size()
    shape, names = LAYOUTS[layout]
    mesh = mesh_of(
        tuple(world // 2 if size == -1 and len(shape) == 2 else world if size == -1 else size for size in shape), names
    )
    alone, spread = Net(), fsdp(Net(), mesh, ("first", "second") if layout == "hsdp" else ())
    settings = {"lr": 0.1, "rho": 1.0, **options}
    first, second = SOFIM(grouped(alone), **settings), SOFIM(grouped(spread), **settings)
    train(alone, first, range(steps))
    sent = all_reduced(lambda: train(spread, second, range(steps), rank, world))
    if "max_grad_norm" in options:
        assert first.grad_norm is not None
        assert second.grad_norm is not None
        torch.testing.assert_close(second.grad_norm, first.grad_norm, rtol=1e-4, atol=0)
        assert same_on_all_ranks(second.grad_norm)
    return farthest(spread, alone), sent


FORMS = [(numerator, fisher) for numerator in ("moment", "gradient") for fisher in ("model", "group", "parameter")]
# All of it on two ranks; on four, which take turns on few cores, each form with one kind of step.
CASES = [(2, *form, kind) for form in FORMS for kind in KINDS]
CASES += [(4, *form, list(KINDS)[(i + i // 3) % 3]) for i, form in enumerate(FORMS)]


@pytest.mark.parametrize(("world", "numerator", "fisher", "kind"), CASES)
def test_fsdp2_is_one_process(
    world: int, numerator: str, fisher: str, kind: str, request: pytest.FixtureRequest
) -> None:
    ranks: Ranks = request.getfixturevalue("two" if world == 2 else "four")
    options = {"numerator": numerator, "fisher": fisher, **KINDS[kind]}
    found = ranks.run(against_one_process, "fsdp", options, STEPS)
    assert max(distance for distance, _ in found) <= CLOSE
    blocks = {"model": 1, "group": 2, "parameter": 7}[fisher]
    forms = 1 if numerator == "moment" else 2
    values = forms * blocks if kind == "plain" else 3 * (1 + forms) * blocks + 2
    assert {tuple(sent) for _, sent in found} == {(8 * values,) * STEPS}  # one message per step


@pytest.mark.parametrize("kind", ["plain", "guarded"])
def test_replicas_send_nothing(kind: str, four: Ranks) -> None:
    """HSDP: two replicas of two shards each."""
    found = four.run(against_one_process, "hsdp", KINDS[kind], STEPS)
    assert max(distance for distance, _ in found) <= CLOSE
    assert {len(sent) for _, sent in found} == {STEPS}


# Tensor parallel, and both


def on_two_axes(rank: int, options: dict[str, Any]) -> tuple[float, int]:
    """Tensor parallel inside of FSDP2: tensors sharded along both axes, along one, and replicas."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = mesh_of((2, 2), ("data", "tensor"))
    alone, spread = Net(12), Net(12)  # tensor parallelism takes what it can divide
    parallelize_module(spread, mesh["tensor"], {"first": ColwiseParallel(), "second": RowwiseParallel()})
    for module in (spread.first, spread.second, spread.last):
        fully_shard(module, mesh=mesh["data"])
    settings = {"lr": 0.1, "rho": 1.0, **options}
    params = [p for name, p in spread.named_parameters() if name != "scale"]
    twins = [p for name, p in alone.named_parameters() if name != "scale"]
    first, second = SOFIM(twins, **settings), SOFIM(params, **settings)
    train(alone, first, range(50))
    sent = all_reduced(lambda: train(spread, second, range(50), mesh.get_local_rank("data"), 2))
    pairs = zip(map(whole, params), map(whole, twins), strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs), len(sent)


@pytest.mark.parametrize("options", [{}, {"numerator": "gradient", "fisher": "parameter", "max_grad_norm": 0.3}])
def test_tensor_parallel_inside_of_fsdp2(options: dict[str, Any], four: Ranks) -> None:
    found = four.run(on_two_axes, options)
    assert max(distance for distance, _ in found) <= CLOSE
    assert {messages for _, messages in found} == {2 * 50}  # one along each axis


class Block(nn.Module):
    """A layer as sequence parallelism cuts it: the norm sees a part of the sequence on each rank."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.norm = nn.LayerNorm(8)
        self.widen = nn.Linear(8, 16)
        self.narrow = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.narrow(self.widen(self.norm(x)).relu())
        return out


def sequence_parallel(rank: int, options: dict[str, Any]) -> float:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    mesh = mesh_of((2,), ("tensor",))
    alone, spread = Block(), Block()
    plan = {
        "norm": SequenceParallel(),
        "widen": ColwiseParallel(input_layouts=Shard(1)),
        "narrow": RowwiseParallel(output_layouts=Replicate()),
    }
    parallelize_module(spread, mesh, plan)
    models = (alone, spread)
    optimizers = [SOFIM(model.parameters(), lr=0.5, rho=1.0, **options) for model in models]
    partial = 0
    for step in range(20):
        x = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(step))
        for model, optimizer, part in zip(models, optimizers, (x, x.chunk(2, 1)[rank]), strict=True):
            optimizer.zero_grad()
            (model(part) - x).square().mean().backward()
            partial += any(place.is_partial() for place in getattr(model.norm.weight.grad, "placements", ()))
            optimizer.step()
    assert partial in (0, 20)
    assert partial or options.get("release_grads")
    return farthest(spread, alone)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"numerator": "gradient", "max_grad_norm": 0.3},
        {"in_backward": True},
        {"in_backward": True, "numerator": "gradient", "release_grads": True},
    ],
)
def test_gradients_that_are_parts_of_a_sum(options: dict[str, Any], two: Ranks) -> None:
    """Those of replicated parameters, each rank having seen a part of the sequence."""
    assert max(two.run(sequence_parallel, options)) <= CLOSE


# Whole parameters on every rank


def replicas(rank: int, options: dict[str, Any], steps: int) -> bool:
    model = Net()
    parallel = nn.parallel.DistributedDataParallel(model)
    train(parallel, SOFIM(grouped(model), lr=0.1, **options), range(steps), rank, distributed.get_world_size())
    return all(same_on_all_ranks(p.detach()) for p in model.parameters())


@pytest.mark.parametrize("options", [{}, {"numerator": "gradient", "max_grad_norm": 0.3}], ids=["plain", "guarded"])
def test_replicas_under_ddp_stay_the_same_to_the_bit(options: dict[str, Any], two: Ranks) -> None:
    assert two.run(replicas, options, 1000) == [True, True]


# Whole parameters on some ranks


def zero_redundancy(rank: int, options: dict[str, Any], few: bool) -> tuple[float, int, int]:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    alone, spread = Net(), Net()
    if few:  # more ranks than parameters
        params, twins = list(spread.first.parameters()), list(alone.first.parameters())
    else:
        params, twins = list(spread.parameters()), list(alone.parameters())
    settings = {"lr": 0.1, "rho": 1.0, **options}
    first = SOFIM(twins, **settings)
    ours = functools.partial(SOFIM, shard_group=distributed.group.WORLD)
    second = ZeroRedundancyOptimizer(params, optimizer_class=ours, **settings)
    train(alone, first, range(50))
    train(spread, second, range(50))
    second.consolidate_state_dict(to=0)
    if rank == 0:  # all of it, whoever held it
        whole_state = pickle.loads(pickle.dumps(second.state_dict()))
        assert sorted(whole_state["state"]) == list(range(len(params)))
    else:
        whole_state = None
    (whole_state,) = shared([whole_state])
    spread.load_state_dict({name: value + 1 for name, value in spread.state_dict().items()})
    alone.load_state_dict(spread.state_dict())
    third = ZeroRedundancyOptimizer(params, optimizer_class=ours, **settings)
    third.load_state_dict(whole_state)
    train(alone, first, range(50, 100))
    train(spread, third, range(50, 100))
    held = sum(len(group["params"]) for group in second.optim.param_groups)
    return farthest(spread, alone), held, len(second.optim.state)


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("fisher", ["model", "parameter"])
@pytest.mark.parametrize("kind", ["plain", "guarded"])
def test_zero_redundancy_is_one_process(kind: str, fisher: str, few: bool, four: Ranks) -> None:
    """The gradients are the same on all ranks; sums are added in another order."""
    found = four.run(zero_redundancy, {"fisher": fisher, "numerator": "gradient", **KINDS[kind]}, few)
    assert max(distance for distance, _, _ in found) <= CLOSE
    assert sum(held for _, held, _ in found) == (2 if few else 7)
    assert all(held == states for _, held, states in found)
    assert (0 in [held for _, held, _ in found]) == few


def pipeline(rank: int, options: dict[str, Any]) -> tuple[float, list[int]]:
    """Two stages of a model, each sharded over two ranks; gradients are made up."""
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = mesh_of((2, 2), ("stage", "shard"))
    stage = mesh.get_local_rank("stage")
    shapes = [(5, 3), (7,), (4, 4), (9,)]
    mine = range(2 * stage, 2 * stage + 2)
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    alone = [nn.Parameter(value.clone()) for value in values]
    spread = [nn.Parameter(distribute_tensor(values[i], mesh["shard"], [Shard(0)])) for i in mine]
    settings = {"lr": 0.1, "rho": 1.0, **options}
    first = SOFIM(alone, **settings)
    second = SOFIM(spread, shard_group=mesh.get_group("stage"), **settings)

    def steps(params: list[nn.Parameter], ordinals: range, optimizer: SOFIM) -> None:
        for step in range(20):
            generator = torch.Generator().manual_seed(step)
            grads = [torch.randn(shape, generator=generator) for shape in shapes]
            for param, i in zip(params, ordinals, strict=True):
                param.grad = grads[i] if optimizer is first else distribute_tensor(grads[i], mesh["shard"], [Shard(0)])
            optimizer.step()

    steps(alone, range(4), first)
    sent = all_reduced(lambda: steps(spread, mine, second))
    pairs = zip(spread, (alone[i] for i in mine), strict=True)
    if "max_grad_norm" in options:
        assert second.grad_norm is not None
        assert same_on_all_ranks(second.grad_norm)
    return max(float((whole(a) - b).norm() / b.norm()) for a, b in pairs), sent


@pytest.mark.parametrize("kind", ["plain", "guarded"])
@pytest.mark.parametrize("fisher", ["model", "parameter"])
def test_pipeline_stages_of_shards(fisher: str, kind: str, four: Ranks) -> None:
    found = four.run(pipeline, {"fisher": fisher, "numerator": "gradient", **KINDS[kind]})
    assert max(distance for distance, _ in found) <= CLOSE
    # Along the shards; and between the stages, where a tensor's own matrix has nothing to ask for but the norm.
    blocks = 1 if fisher == "model" else 2
    within = 8 * (2 * blocks if kind == "plain" else 9 * blocks + 2)
    between = within if fisher == "model" else 16 if kind == "guarded" else None
    assert {tuple(sent) for _, sent in found} == {tuple(x for x in (within, between) if x is not None) * 20}


def shared(objects: list[Any]) -> list[Any]:
    distributed.broadcast_object_list(objects, 0)
    return objects


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


# In the backward pass


def in_backward(rank: int, options: dict[str, Any], batches: int) -> float:
    """Beside plain steps of the same shards; gradients of several backward passes add up."""
    mesh = mesh_of((distributed.get_world_size(),), ("shard",))
    plain, overlapped = fsdp(Net(), mesh), fsdp(Net(), mesh)
    settings = {"lr": 0.1, "rho": 1.0, **{name: options[name] for name in options if name != "release_grads"}}
    first = SOFIM(grouped(plain), **settings)
    second = SOFIM(grouped(overlapped), in_backward=True, **options, lr=0.1, rho=1.0)
    for step in range(0, 30 * batches, batches):
        for optimizer in (first, second):
            optimizer.zero_grad()
        for i in range(batches):
            loss_of(plain, step + i, rank, 2).backward()
            with contextlib.ExitStack() as stack:
                if i + 1 < batches:
                    stack.enter_context(second.accumulate_grads())
                loss_of(overlapped, step + i, rank, 2).backward()
        if options.get("release_grads"):
            assert all(p.grad is None for p in overlapped.parameters())
        first.step()
        before = [p._version for p in overlapped.parameters()]
        second.step()
        assert all(p._version > old for p, old in zip(overlapped.parameters(), before, strict=True))
    return farthest(overlapped, plain)


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("fisher", ["model", "parameter"])
@pytest.mark.parametrize(
    "options", [{}, {"numerator": "gradient"}, {"release_grads": True}], ids=["moment", "gradient", "release"]
)
def test_in_backward_of_shards(options: dict[str, Any], fisher: str, batches: int, two: Ranks) -> None:
    """FSDP2's hooks see gradients that were reduced over the ranks."""
    assert max(two.run(in_backward, {"fisher": fisher, **options}, batches)) <= CLOSE


# State


def placements(rank: int) -> bool:
    model = fsdp(Net().bfloat16(), mesh_of((2,), ("shard",)))
    optimizer = SOFIM(model.parameters(), lr=0.1)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return all(
        (state[name].placements, state[name].device_mesh) == (p.placements, p.device_mesh)
        for p, state in optimizer.state.items()
        for name in ("exp_avg", "kahan")
    ) and all(state["exp_avg"].dtype == torch.float32 for state in optimizer.state.values())


def test_state_lies_where_its_parameter_does(two: Ranks) -> None:
    assert two.run(placements) == [True, True]


def written_versions(rank: int) -> bool:
    model = fsdp(Net(), mesh_of((2,), ("shard",)))
    optimizer = SOFIM(model.parameters(), lr=0.1)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = [p._version for p in model.parameters()]
    optimizer.step()
    return all(p._version > old for p, old in zip(model.parameters(), before, strict=True))


def test_versions_of_what_was_written(two: Ranks) -> None:
    assert two.run(written_versions) == [True, True]


def copies(rank: int, path: str) -> list[str]:
    from torch.distributed.tensor import Shard, distribute_tensor

    param = nn.Parameter(distribute_tensor(torch.ones(4), mesh_of((2,), ("shard",)), [Shard(0)]))
    optimizer = SOFIM([param], lr=0.1)
    param.grad = distribute_tensor(torch.ones(4), param.device_mesh, [Shard(0)])
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    (other,) = twin.param_groups[0]["params"]
    other.grad = param.grad
    for one in (optimizer, twin):
        one.step()
    assert torch.equal(whole(other), whole(param))
    plain = SOFIM([nn.Parameter(torch.ones(2))], shard_group=distributed.group.WORLD)
    assert copy.deepcopy(plain)._shard_group is distributed.group.WORLD
    with pytest.raises(TypeError, match="save state_dict"):
        pickle.dumps(plain)
    return []


def test_copies(two: Ranks, tmp_path: Path) -> None:
    two.run(copies, str(tmp_path))


# Checkpoints


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


def save_then_go_on(rank: int, options: dict[str, Any], path: str) -> list[float]:
    from torch.distributed import checkpoint

    model, optimizer = new_pair(rank, 4, options)
    train(model, optimizer, range(20), rank, 4)
    checkpoint.save(saved_state(model, optimizer), checkpoint_id=path)
    return mean_losses(train(model, optimizer, range(20, 40), rank, 4))


def load_and_go_on(rank: int, options: dict[str, Any], path: str) -> list[float]:
    world = distributed.get_world_size() if distributed.is_initialized() else 1
    model, optimizer = new_pair(rank, world, options)
    train(model, optimizer, range(100, 103), rank, world)  # what is there is replaced
    restore(model, optimizer, path, alone=world == 1)
    return mean_losses(train(model, optimizer, range(20, 40), rank, world))


def mean_losses(losses: list[float]) -> list[float]:
    """Over the ranks: each saw a part of the batch."""
    values = torch.tensor(losses, dtype=torch.float64)
    if distributed.is_initialized():
        distributed.all_reduce(values)
        values /= distributed.get_world_size()
    return values.tolist()


@pytest.mark.parametrize(
    "options",
    [{}, {"numerator": "gradient", "fisher": "parameter"}, {"state_dtype": torch.bfloat16, "max_grad_norm": 0.3}],
    ids=["plain", "gradient", "bfloat16"],
)
def test_a_checkpoint_of_four_ranks_goes_on_on_two_and_on_one(
    options: dict[str, Any], four: Ranks, two: Ranks, tmp_path: Path
) -> None:
    path = str(tmp_path / "checkpoint")
    losses = four.run(save_then_go_on, options, path)[0]
    # The rounding of a bfloat16 moment goes by the place of an element in its shard.
    rel = 1e-5 if "state_dtype" not in options else 2e-2
    for found in (two.run(load_and_go_on, options, path)[0], load_and_go_on(0, options, path)):
        assert found == pytest.approx(losses, rel=rel)


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
            optimizer._rank_sums().total = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore


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
