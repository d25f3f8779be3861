"""Accelerate: plain training, accumulation, DDP, FSDP2, and ``in_backward`` in all of them but DDP."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, GradientAccumulationPlugin

from bench.ranks import Ranks
from sofim_fused import SOFIM, AdaSOFIM
from sofim_fused.integrations.accelerate import AcceleratedSOFIM, prepare
from tests.clients.support import Net, distance, loss_of, same_bits, trained, weights

STEPS = 4


def accelerator_of(parts: int = 1, sharded: bool = False, **options: Any) -> Accelerator:
    """Accelerate 1.15 shards models on accelerators only; for CPUs its state is told that it does."""
    AcceleratorState._reset_state()
    plugin = GradientAccumulationPlugin(num_steps=parts, sync_with_dataloader=False)
    accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=plugin, **options)
    if sharded:
        plugin_2 = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=50)
        shared = accelerator.state._shared_state
        shared["distributed_type"], shared["fsdp_plugin"] = DistributedType.FSDP, plugin_2
    return accelerator


def run(accelerator: Accelerator, model: Any, optimizer: Any, steps: range, parts: int = 1, clip: float = 0.0) -> None:
    """As Accelerate's documentation has it."""
    for step in steps:
        for part in range(parts):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, step, part, parts))
                if clip and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()


@pytest.mark.parametrize("cls", [SOFIM, AdaSOFIM])
def test_weights_are_those_of_a_loop(cls: type[SOFIM]) -> None:
    accelerator = accelerator_of()
    model = Net()
    model, optimizer = accelerator.prepare(model, cls(model.parameters()))
    run(accelerator, model, optimizer, range(STEPS))
    assert same_bits(weights(model), weights(trained(lambda net: cls(net.parameters()), STEPS)))


@pytest.mark.parametrize("options", [{}, {"release_grads": True}], ids=["kept", "released"])
def test_accumulation_in_backward(options: dict[str, Any]) -> None:
    accelerator = accelerator_of(parts=2)
    model = Net()
    model, optimizer = prepare(accelerator, model, SOFIM(model.parameters(), in_backward=True, **options))
    run(accelerator, model, optimizer, range(STEPS), parts=2)
    plain = weights(trained(lambda net: SOFIM(net.parameters()), STEPS, parts=2))
    assert distance(weights(model), plain) < 1e-6
    assert options or same_bits(weights(model), plain)


def test_clipping() -> None:
    """In the step, and by Accelerate."""
    inside, outside = accelerator_of(), None
    model = Net()
    model, optimizer = prepare(inside, model, SOFIM(model.parameters(), max_grad_norm=0.1))
    run(inside, model, optimizer, range(STEPS))
    outside, clipped = accelerator_of(), Net()
    clipped, plain = prepare(outside, clipped, SOFIM(clipped.parameters()))
    run(outside, clipped, plain, range(STEPS), clip=0.1)
    assert distance(weights(model), weights(clipped)) < 1e-4
    assert distance(weights(model), weights(trained(lambda net: SOFIM(net.parameters()), STEPS))) > 1e-2


def test_the_wrapper_shows_the_results_of_a_step() -> None:
    accelerator = accelerator_of()
    model = Net()
    model, optimizer = prepare(accelerator, model, AdaSOFIM(model.parameters(), rho=1.0, max_grad_norm=1.0))
    assert isinstance(optimizer, AcceleratedSOFIM)
    assert accelerator._optimizers == [optimizer]
    assert optimizer.grad_norm is None
    run(accelerator, model, optimizer, range(1))
    reference = Net()
    loss_of(reference, 0).backward()
    norm = torch.nn.utils.get_total_norm([param.grad for param in reference.parameters() if param.grad is not None])
    assert float(optimizer.grad_norm) == pytest.approx(float(norm), rel=1e-6)
    assert optimizer.signal.shape == (1,)
    assert int(optimizer.skipped_steps) == 0


def test_bf16() -> None:
    accelerator = accelerator_of(mixed_precision="bf16")
    model = Net()
    model, optimizer = prepare(accelerator, model, SOFIM(model.parameters(), max_grad_norm=0.1))
    run(accelerator, model, optimizer, range(STEPS))
    full = weights(trained(lambda net: SOFIM(net.parameters(), max_grad_norm=0.1), STEPS))
    assert 0 < distance(weights(model), full) < 2e-2


def test_steps_that_a_scaler_skips() -> None:
    """Accelerate takes a step as skipped if the optimizer was not called; SOFIM is called, and decides itself."""
    accelerator_of()
    for amp_fused in (True, False):
        (param,) = params = [torch.nn.Parameter(torch.ones(3))]
        sofim = SOFIM(params, amp_fused=amp_fused)
        wrapper = AcceleratedOptimizer(sofim, scaler=torch.amp.GradScaler("cpu", init_scale=8.0))
        wrapper.scaler.scale(param.sum() * float("inf")).backward()
        wrapper.step()
        assert torch.equal(param.detach(), torch.ones(3))
        assert int(sofim.skipped_steps) == amp_fused
        assert wrapper.step_was_skipped == (not amp_fused)


@pytest.mark.parametrize("in_backward", [False, True])
def test_resuming_gives_the_same_bits(tmp_path: Path, in_backward: bool) -> None:
    def fresh() -> tuple[Accelerator, Any, Any]:
        accelerator = accelerator_of()
        model = Net()
        return accelerator, *prepare(accelerator, model, AdaSOFIM(model.parameters(), in_backward=in_backward))

    accelerator, model, optimizer = fresh()
    run(accelerator, model, optimizer, range(2))
    accelerator.save_state(str(tmp_path))
    run(accelerator, model, optimizer, range(2, 4))
    again, resumed, loaded = fresh()
    again.load_state(str(tmp_path))
    run(again, resumed, loaded, range(2, 4))
    assert same_bits(weights(resumed), weights(model))


def test_clipping_in_backward_is_refused() -> None:
    accelerator = accelerator_of()
    model = Net()
    model, optimizer = prepare(accelerator, model, SOFIM(model.parameters(), in_backward=True))
    with pytest.raises(RuntimeError, match=r"clip_grad_norm_\(max_norm=0\.1\) with in_backward=True"):
        run(accelerator, model, optimizer, range(1), clip=0.1)
    norm = accelerator.clip_grad_norm_(model.parameters(), float("inf"))
    assert float(norm) > 0
    optimizer.step()  # the gradients are as the backward pass left them
    optimizer.zero_grad()
    assert accelerator.clip_grad_norm_(model.parameters(), float("inf")) is None
    assert same_bits(weights(model), weights(trained(lambda net: SOFIM(net.parameters()), 1)))


# On two ranks


def on_rank(**options: Any) -> Accelerator:
    """As if its launcher had started two processes on this machine; the process group is there already."""
    os.environ.update(MASTER_ADDR="localhost", LOCAL_WORLD_SIZE=os.environ["WORLD_SIZE"])
    return accelerator_of(**options)


def run_sharded(rank: int, parts: int, options: dict[str, Any], released: bool) -> float:
    """How far the weights are from those of one process; both ranks take the same batches."""
    accelerator = on_rank(parts=parts, sharded=True)
    model = Net()
    model, optimizer = prepare(accelerator, model, SOFIM(model.parameters(), **options))
    assert {type(param).__name__ for param in model.parameters()} == {"DTensor"}
    for part in range(parts):  # the first step
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, 0, part, parts))
            gone = [param.grad is None for param in model.parameters() if param.numel()]
            assert all(gone) if released else not any(gone)
            optimizer.step()
            optimizer.zero_grad()
    run(accelerator, model, optimizer, range(1, STEPS), parts)
    if "max_grad_norm" in options:
        assert float(optimizer.grad_norm) > 0
    plain = {name: value for name, value in options.items() if name not in ("in_backward", "release_grads")}
    theirs = weights(trained(lambda net: SOFIM(net.parameters(), **plain), STEPS, parts))
    return distance(weights(model), theirs)


@pytest.mark.parametrize("parts", [1, 2])
def test_fsdp2_in_backward(two: Ranks, parts: int) -> None:
    """Gradients are released from the first step on: Accelerate puts other parameters in the groups."""
    for options in ({}, {"release_grads": True}):
        found = two.run(run_sharded, parts, {"in_backward": True, **options}, bool(options))
        assert max(found) < 1e-6


def test_fsdp2(two: Ranks) -> None:
    assert max(two.run(run_sharded, 2, {"max_grad_norm": 0.1}, False)) < 1e-6


def replicated(rank: int, in_backward: bool) -> float:
    accelerator = on_rank()
    model = Net()
    model, optimizer = prepare(accelerator, model, SOFIM(model.parameters(), in_backward=in_backward))
    assert type(model).__name__ == "DistributedDataParallel"
    for step in range(STEPS):
        accelerator.backward(loss_of(model, step, rank, 2))
        optimizer.step()
        optimizer.zero_grad()
    return distance(weights(model), weights(trained(lambda net: SOFIM(net.parameters()), STEPS)))


def test_ddp(two: Ranks) -> None:
    assert max(two.run(replicated, False)) < 1e-6
    for good, text in two.outcomes(replicated, True):
        assert not good
        assert "in_backward=True under DistributedDataParallel is impossible" in text
