"""Parameters spread over ranks as plain tensors: FSDP1, ZeroRedundancyOptimizer, and a shard_group beside shards."""

from __future__ import annotations

import copy
import functools
import sys
import types
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

import sofim_fused.sharding
from bench.ranks import Ranks
from sofim_fused import SOFIM
from tests.distributed.support import CLOSE, Net, farthest, fsdp1, loss_of, needs_ranks, train

pytestmark = needs_ranks

STEPS = 10


def gathered(model: Any) -> list[Tensor]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        return [param.detach().clone() for param in model.parameters()]


def distance(model: Any, alone: nn.Module) -> float:
    """Between all elements of two models: in one vector, as a flat parameter has several parameters."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        ours = {
            name.replace("_fsdp_wrapped_module.", ""): p.detach().clone() for name, p in whole_parameters(model).items()
        }
    return max(float((ours[name] - p.detach()).norm() / p.detach().norm()) for name, p in alone.named_parameters())


def whole_parameters(model: nn.Module) -> dict[str, Tensor]:
    """While they are gathered; without ``use_orig_params`` they are views that no module calls a parameter."""
    found = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and not name.startswith("_"):
                found[f"{path}.{name}".removeprefix(".")] = value
    for name, param in model.named_parameters():
        if not name.endswith("_flat_param"):
            found[name] = param
    return found


def steps_beside(
    spread: Any, second: SOFIM, alone: nn.Module, first: SOFIM, rank: int, parts: int, steps: int = STEPS
) -> None:
    train(alone, first, range(steps))
    for step in range(steps):
        second.zero_grad()
        loss_of(spread, step, rank, parts).backward()
        second.step()
    norm, expected = second.grad_norm, first.grad_norm
    assert (norm is None) == (expected is None)
    if norm is not None:
        torch.testing.assert_close(norm, expected, rtol=1e-4, atol=0)


CASES: list[tuple[str, bool, dict[str, Any]]] = [
    ("FULL_SHARD", False, {}),
    ("FULL_SHARD", False, {"max_grad_norm": 0.1}),
    ("FULL_SHARD", True, {"fisher": "parameter"}),
    ("FULL_SHARD", True, {"fisher": "parameter", "max_grad_norm": 0.1, "numerator": "gradient"}),
    ("SHARD_GRAD_OP", True, {"skip_nonfinite": True, "numerator": "gradient"}),
    ("SHARD_GRAD_OP", False, {"backend": "reference", "max_grad_norm": 0.1, "weight_decay": 0.01}),
    ("NO_SHARD", True, {"max_grad_norm": 0.1}),
    ("NO_SHARD", True, {"fisher": "parameter"}),
]


def fsdp1_is_one_process(rank: int) -> list[float]:
    """FSDP1's parameters are found by themselves, whatever is asked of the step."""
    found = []
    for strategy, original, options in CASES:
        alone, spread = Net(), fsdp1(Net(), strategy, use_orig_params=original)
        settings = {"lr": 0.1, "rho": 1.0, **options}
        first, second = SOFIM(alone.parameters(), **settings), SOFIM(spread.parameters(), **settings)
        steps_beside(spread, second, alone, first, rank, 2)
        found.append(distance(spread, alone))
    return found


def test_fsdp1_is_one_process(two: Ranks) -> None:
    for found in two.run(fsdp1_is_one_process):
        assert max(found) <= CLOSE, dict(zip(map(str, CASES), found, strict=True))


def hybrid_shards(rank: int) -> list[float]:
    """HYBRID_SHARD: sums go along the shards only; the replicas hold the same."""
    from torch.distributed.device_mesh import init_device_mesh

    found = []
    for original in (False, True):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        alone = Net()
        spread = fsdp1(Net(), "HYBRID_SHARD", use_orig_params=original, device_mesh=mesh)
        settings: dict[str, Any] = {"lr": 0.1, "rho": 1.0, "max_grad_norm": 0.1}
        first, second = SOFIM(alone.parameters(), **settings), SOFIM(spread.parameters(), **settings)
        steps_beside(spread, second, alone, first, rank, 4)
        found.append(distance(spread, alone))
        with pytest.raises(ValueError, match="would count them several times"):
            SOFIM(spread.parameters(), shard_group=distributed.group.WORLD).step()
    return found


def test_hybrid_shards_of_fsdp1(four: Ranks) -> None:
    assert max(max(found) for found in four.run(hybrid_shards)) <= CLOSE


# With a shard_group besides


def fsdp1_and_a_group(rank: int) -> list[float]:
    """The same ranks once more: nothing is counted twice."""
    found = []
    for original, options in ((False, {}), (True, {"fisher": "parameter", "max_grad_norm": 0.1})):
        alone, spread = Net(), fsdp1(Net(), use_orig_params=original)
        settings = {"lr": 0.1, "rho": 1.0, **options}
        first = SOFIM(alone.parameters(), **settings)
        second = SOFIM(spread.parameters(), shard_group=distributed.group.WORLD, **settings)
        steps_beside(spread, second, alone, first, rank, 2)
        found.append(distance(spread, alone))
    return found


def test_a_shard_group_of_the_same_ranks_counts_nothing_twice(two: Ranks) -> None:
    assert max(max(found) for found in two.run(fsdp1_and_a_group)) <= CLOSE


def fsdp2_and_a_group(rank: int) -> float:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    alone, spread = Net(), fully_shard(Net(), mesh=init_device_mesh("cpu", (2,)))
    settings: dict[str, Any] = {"lr": 0.1, "rho": 1.0, "max_grad_norm": 0.1}
    first = SOFIM(alone.parameters(), **settings)
    second = SOFIM(spread.parameters(), shard_group=distributed.group.WORLD, **settings)
    steps_beside(spread, second, alone, first, rank, 2)
    return farthest(spread, alone)


def test_nor_beside_fsdp2(two: Ranks) -> None:
    assert max(two.run(fsdp2_and_a_group)) <= CLOSE


def stages(rank: int) -> list[float]:
    """Two models of which each is sharded over two ranks, as stages of a pipeline are; one Fisher matrix for both."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "shard"))
    stage, part = mesh.get_local_rank("stage"), mesh.get_local_rank("shard")
    found = []
    for kind in ("flat", "original", "fsdp2"):
        for group in (distributed.group.WORLD, mesh.get_group("stage")):
            for fisher in ("model", "parameter"):
                if kind == "flat" and fisher == "parameter":
                    continue
                settings: dict[str, Any] = {"lr": 0.1, "rho": 1.0, "fisher": fisher, "max_grad_norm": 0.1}
                parts = [Net(), Net(9)]
                first = SOFIM([p for net in parts for p in net.parameters()], **settings)
                own: Any = [Net(), Net(9)][stage]
                if kind == "fsdp2":
                    own = fully_shard(own, mesh=mesh["shard"])
                else:
                    own = fsdp1(own, use_orig_params=kind == "original", process_group=mesh.get_group("shard"))
                second = SOFIM(own.parameters(), shard_group=group, **settings)
                for step in range(STEPS):
                    first.zero_grad()
                    sum(loss_of(net, step) for net in parts).backward()  # type: ignore[union-attr]
                    first.step()
                    second.zero_grad()
                    loss_of(own, step, part, 2).backward()
                    second.step()
                torch.testing.assert_close(second.grad_norm, first.grad_norm, rtol=1e-4, atol=0)
                found.append(farthest(own, parts[stage]) if kind == "fsdp2" else distance(own, parts[stage]))
    return found


def test_stages_of_shards_with_either_group(four: Ranks) -> None:
    """The group of the stages, or all ranks: the elements of a stage are counted once."""
    for found in four.run(stages):
        assert max(found) <= CLOSE, found


def wrapped_after_a_step(rank: int) -> float:
    """With ``use_orig_params=True`` parameters stay the ones that they were, and become shards."""
    alone, spread = Net(), Net()
    settings: dict[str, Any] = {"lr": 0.1, "rho": 1.0, "max_grad_norm": 0.1}
    first, second = SOFIM(alone.parameters(), **settings), SOFIM(spread.parameters(), **settings)
    for model, optimizer in ((alone, first), (spread, second)):
        train(model, optimizer, range(1))
    wrapped = fsdp1(spread, use_orig_params=True)
    second.zero_grad()
    loss_of(wrapped, 0, rank, 2).backward()
    with pytest.raises(ValueError, match=r"was resized.*delete the parameter's state to start it anew"):
        second.step()
    for optimizer in (first, second):
        optimizer.state.clear()
    steps_beside(wrapped, second, alone, first, rank, 2)
    return distance(wrapped, alone)


def test_parameters_that_fsdp1_shards_after_a_step(two: Ranks) -> None:
    assert max(two.run(wrapped_after_a_step)) <= CLOSE


# Gradients that only some ranks have, steps that are skipped


def missing_and_bad(rank: int) -> list[tuple[int, float]]:
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    seen = []
    for original in (False, True):
        for scaled in (False, True):
            spread = fsdp1(Net(), use_orig_params=original)
            optimizer = SOFIM(spread.parameters(), lr=0.1, skip_nonfinite=not scaled)
            scaler = ShardedGradScaler("cpu", init_scale=8.0, enabled=scaled)
            for step in range(3):
                optimizer.zero_grad()
                scaler.scale(loss_of(spread, step, rank, 2)).backward()
                before = [p.detach().clone() for p in spread.parameters()]
                if rank == 1 and step == 1:
                    next(p for p in spread.parameters() if p.grad is not None and p.numel()).grad.view(-1)[0] = float(
                        "inf"
                    )
                scaler.step(optimizer)
                scaler.update()
                after = [p.detach() for p in spread.parameters()]
                unchanged = all(torch.equal(new, old) for new, old in zip(after, before, strict=True))
                assert unchanged == (step == 1)
            seen.append((int(optimizer.skipped_steps), scaler.get_scale()))
    return seen


def test_all_ranks_skip_what_is_bad_on_one(two: Ranks) -> None:
    # A scaler leaves the step out itself, and then it is not counted; its scale is halved on all ranks.
    expected = [(1, 1.0), (0, 4.0)] * 2
    assert two.run(missing_and_bad) == [expected, expected]


def without_gradients(rank: int) -> tuple[float, float]:
    """The second rank's shard has no gradient: the step is that of the elements which have one."""
    model = fsdp1(nn.Linear(4, 1, bias=False), auto_wrap_policy=None)
    (param,) = model.parameters()
    with torch.no_grad():
        param.fill_(1.0)
    optimizer = SOFIM([param], lr=0.5, rho=1.0, max_grad_norm=100.0)
    if rank == 0:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert optimizer.grad_norm is not None
    return float(param.detach()[0]), float(optimizer.grad_norm)


def test_a_rank_without_gradients_takes_part(two: Ranks) -> None:
    first, second = two.run(without_gradients)
    assert first == pytest.approx((1 - 0.5 / 3, 2**0.5))  # the flat parameter has two elements on each rank
    assert second == pytest.approx((1.0, 2**0.5))


# Refusals


def refused(rank: int) -> None:
    flat = fsdp1(Net())
    optimizer = SOFIM(flat.parameters(), fisher="parameter")
    loss_of(flat, 0, rank, 2).backward()
    with pytest.raises(ValueError, match=r"use_orig_params=True"):
        optimizer.step()
    assert not optimizer.state
    with pytest.raises(ValueError, match=r"in_backward=True under FullyShardedDataParallel is impossible"):
        SOFIM(flat.parameters(), in_backward=True)
    late = Net()  # wrapped after the optimizer was made: seen with the first gradient
    optimizer = SOFIM(late.parameters(), in_backward=True)
    wrapped = fsdp1(late, use_orig_params=True)
    loss_of(wrapped, 0, rank, 2).backward()  # FSDP1 hands views of the flat parameter to the model: no hook runs
    with pytest.raises(ValueError, match=r"in_backward=True under FullyShardedDataParallel is impossible"):
        optimizer.step()
    copied = copy.deepcopy(SOFIM(wrapped.parameters(), max_grad_norm=1.0))  # of shards that no module has
    for p in copied.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"no module .* pass shard_group="):
        copied.step()
    lost = nn.Parameter(torch.ones(3))
    lost._fsdp_flattened = True  # type: ignore[attr-defined]
    lost.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"no module .* pass shard_group="):
        SOFIM([lost]).step()
    assert torch.equal(lost, torch.ones(3))
    SOFIM([lost], shard_group=distributed.group.WORLD).step()


def test_what_is_refused(two: Ranks) -> None:
    two.run(refused)


# ZeroRedundancyOptimizer


def zero_redundancy(rank: int) -> tuple[list[float], list[float]]:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    pairs = [distributed.new_group([0, 1]), distributed.new_group([2, 3])]
    distances, norms = [], []
    for group, options in (
        (None, {}),
        (None, {"max_grad_norm": 0.1}),
        (pairs[rank // 2], {"numerator": "gradient", "max_grad_norm": 0.1}),
        (None, {"fisher": "parameter", "skip_nonfinite": True}),
    ):
        alone, spread = Net(), Net()
        settings = {"lr": 0.1, "rho": 1.0, **options}
        first = SOFIM(alone.parameters(), **settings)
        second = ZeroRedundancyOptimizer(
            list(spread.parameters()), optimizer_class=SOFIM, process_group=group, **settings
        )
        train(alone, first, range(STEPS))
        train(spread, second, range(STEPS))
        distances.append(farthest(spread, alone))
        if first.grad_norm is not None:
            norms.append(float(second.optim.grad_norm / first.grad_norm))
    with pytest.raises(ValueError, match="in_backward=True under ZeroRedundancyOptimizer is impossible"):
        ZeroRedundancyOptimizer(Net().parameters(), optimizer_class=functools.partial(SOFIM, in_backward=True), lr=0.1)
    return distances, norms


def test_zero_redundancy_is_found_without_a_shard_group(four: Ranks) -> None:
    for distances, norms in four.run(zero_redundancy):
        assert max(distances) <= CLOSE, distances
        assert norms == pytest.approx([1.0] * 3, rel=1e-4)


# Parts of a model that nothing marks


def warnings_of(shapes: list[list[int]], rank: int) -> list[str]:
    """Of optimizers made and stepped in turn, after which the ranks have forgotten each other's."""
    distributed.barrier()
    texts = []
    for sizes in shapes:
        param = [nn.Parameter(torch.ones(size)) for size in sizes]
        for p in param:
            p.grad = torch.ones_like(p)
        optimizer = SOFIM(param)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                optimizer.step()
        texts += [str(warning.message) for warning in caught if warning.category is UserWarning]
        assert all(p[0] < 1 for p in param)
    distributed.barrier()
    store = distributed.distributed_c10d._get_default_store()
    assert store.check([f"sofim_fused/{rank}"])
    store.delete_key(f"sofim_fused/{rank}")
    sofim_fused.sharding._warned.clear()
    return texts


def other_shapes(rank: int) -> dict[str, list[str]]:
    return {
        "replicas": warnings_of([[3, 4], [5]], rank),
        "one more on a rank": warnings_of([[3, 4], [5]][: 1 + rank], rank),
        "parts": warnings_of([[3 + rank], [7 + rank]], rank),
    }


def test_parts_of_other_shapes_are_asked_about(two: Ranks) -> None:
    """Once, by the later rank or by both, and no rank waits for another."""
    first, second = two.run(other_shapes)
    for found in (first, second):
        assert not any(texts for name, texts in found.items() if name != "parts")
        assert len(found["parts"]) <= 1
    texts = first["parts"] + second["parts"]
    assert texts
    assert all("other shapes on rank" in text and "pass shard_group=" in text for text in texts)


# DeepSpeed, of which a stand-in has what is looked at


def beneath_deepspeed(rank: int) -> None:
    module = types.ModuleType("deepspeed")
    sys.modules["deepspeed"] = module
    try:

        class DeepSpeedZeroOptimizer:
            def __init__(self, optimizer: SOFIM) -> None:
                self.optimizer = optimizer
                self.dp_process_group = distributed.group.WORLD

        DeepSpeedZeroOptimizer.__module__ = "deepspeed.runtime.zero.stage_1_and_2"
        param = nn.Parameter(torch.ones(3))
        param.grad = torch.ones(3)
        wrapper = DeepSpeedZeroOptimizer(SOFIM([param]))
        with pytest.raises(ValueError, match=r"DeepSpeed \(DeepSpeedZeroOptimizer\) .* pass shard_group="):
            wrapper.optimizer.step()
        assert torch.equal(param, torch.ones(3))
        wrapper = DeepSpeedZeroOptimizer(SOFIM([param], lr=1.0, shard_group=distributed.group.WORLD))
        wrapper.optimizer.step()
        assert torch.allclose(param, torch.full((3,), 1 - 1 / 7))
    finally:
        del sys.modules["deepspeed"]


def test_deepspeed_is_asked_for_the_group(two: Ranks) -> None:
    two.run(beneath_deepspeed)
