"""Parameters spread over ranks: FSDP2, HSDP, tensor parallel, ZeRO, DDP, and gradients taken in the backward pass."""

from __future__ import annotations

import contextlib
import functools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from bench.ranks import Ranks, all_reduced
from sofim_fused import SOFIM
from tests.distributed.support import (
    CLOSE,
    Net,
    farthest,
    fsdp,
    grouped,
    loss_of,
    mesh_of,
    needs_ranks,
    same_on_all_ranks,
    train,
    whole,
)

pytestmark = needs_ranks

STEPS = 20  # a wrong sum shows in the first
MANY_STEPS = 200  # in one case per kind of numerator: drift shows in many
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
CASES += [(2, "nesterov", "model", "plain"), (2, "nesterov", "group", "l2"), (2, "nesterov", "parameter", "guarded")]
CASES += [(4, *form, list(KINDS)[(i + i // 3) % 3]) for i, form in enumerate(FORMS)]


@pytest.mark.parametrize(("world", "numerator", "fisher", "kind"), CASES)
def test_fsdp2_is_one_process(
    world: int, numerator: str, fisher: str, kind: str, request: pytest.FixtureRequest
) -> None:
    ranks: Ranks = request.getfixturevalue("two" if world == 2 else "four")
    options = {"numerator": numerator, "fisher": fisher, **KINDS[kind]}
    steps = MANY_STEPS if (world, fisher, kind) == (2, "group", "guarded") else STEPS
    found = ranks.run(against_one_process, "fsdp", options, steps)
    assert max(distance for distance, _ in found) <= CLOSE
    blocks = {"model": 1, "group": 2, "parameter": 7}[fisher]
    forms = 1 if numerator == "moment" else 2
    values = forms * blocks if kind == "plain" else 3 * (1 + forms) * blocks + 2
    assert {tuple(sent) for _, sent in found} == {(8 * values,) * steps}  # one message per step


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
    train(alone, first, range(STEPS))
    sent = all_reduced(lambda: train(spread, second, range(STEPS), mesh.get_local_rank("data"), 2))
    pairs = zip(map(whole, params), map(whole, twins), strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs), len(sent)


@pytest.mark.parametrize("options", [{}, {"numerator": "gradient", "fisher": "parameter", "max_grad_norm": 0.3}])
def test_tensor_parallel_inside_of_fsdp2(options: dict[str, Any], four: Ranks) -> None:
    found = four.run(on_two_axes, options)
    assert max(distance for distance, _ in found) <= CLOSE
    assert {messages for _, messages in found} == {2 * STEPS}  # one along each axis


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
    train(alone, first, range(STEPS))
    train(spread, second, range(STEPS))
    second.consolidate_state_dict(to=0)
    if rank == 0:  # all of it, whoever held it
        whole_state = pickle.loads(pickle.dumps(second.state_dict()))
        assert sorted(whole_state["state"]) == list(range(len(params)))
    else:
        whole_state = None
    (whole_state,) = shared([whole_state])
    spread.load_state_dict({name: value + 0.1 for name, value in spread.state_dict().items()})
    alone.load_state_dict(spread.state_dict())
    third = ZeroRedundancyOptimizer(params, optimizer_class=ours, **settings)
    third.load_state_dict(whole_state)
    train(alone, first, range(STEPS, 2 * STEPS))
    train(spread, third, range(STEPS, 2 * STEPS))
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


# In the backward pass


def in_backward(rank: int, options: dict[str, Any], batches: int) -> float:
    """Beside plain steps of the same shards; gradients of several backward passes add up."""
    mesh = mesh_of((distributed.get_world_size(),), ("shard",))
    plain, overlapped = fsdp(Net(), mesh), fsdp(Net(), mesh)
    settings = {"lr": 0.1, "rho": 1.0, **{name: options[name] for name in options if name != "release_grads"}}
    first = SOFIM(grouped(plain), **settings)
    second = SOFIM(grouped(overlapped), in_backward=True, **options, lr=0.1, rho=1.0)
    for step in range(0, 10 * batches, batches):
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
