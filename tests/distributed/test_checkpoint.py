"""torch.distributed.checkpoint: state dicts before the first step, gradients that are still there, FSDP1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from bench.ranks import Ranks
from sofim_fused import SOFIM
from tests.distributed.support import Net, fsdp, fsdp1, loss_of, mesh_of, needs_ranks, train

pytestmark = needs_ranks

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "reference": {"backend": "reference", "weight_decay": 0.1},
    "gradient": {"numerator": "gradient", "weight_decay": 0.1, "decoupled_weight_decay": False},
    "tensor lr": {"lr": torch.tensor(0.1)},
    "guarded": {"max_grad_norm": 0.1, "skip_nonfinite": True},
    "in_backward": {"in_backward": True},
    "release": {"in_backward": True, "release_grads": True, "numerator": "gradient"},
}


ADAPTIVE: dict[str, dict[str, Any]] = {
    "factored": {"diagonal": "factored", "numerator": "nesterov"},
    "row, with a term of rank one": {"diagonal": "row", "rho": 0.5, "fisher": "group"},
    "element, guarded": {"diagonal": "element", "max_grad_norm": 0.1, "skip_nonfinite": True},
}


def made(model: nn.Module, options: dict[str, Any]) -> SOFIM:
    return SOFIM(model.parameters(), **{"lr": 0.1, **options})


def bits(model: nn.Module, optimizer: SOFIM) -> list[Tensor]:
    """Parameters and state, as this rank holds them."""
    held = [p.detach() for p in model.parameters()]
    held += [value for p in model.parameters() for _, value in sorted(optimizer.state[p].items())]
    return [getattr(x, "_local_tensor", x).clone() for x in held]


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def trained(model: nn.Module, optimizer: SOFIM, early: bool, rank: int = 0, parts: int = 1) -> list[Tensor]:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, get_state_dict

    if early:
        before = [p.detach().clone() for p in model.parameters()]
        norm = optimizer.grad_norm
        state = get_optimizer_state_dict(model, optimizer)["state"]
        assert all(int(known["step"]) == 0 for known in state.values())  # type: ignore[index,call-overload]
        assert len(state) == len(before)
        get_state_dict(model, optimizer)
        assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
        assert all(p.grad is None for p in model.parameters())
        assert optimizer.grad_norm is norm
        assert int(optimizer.skipped_steps) == 0
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step, rank, parts).backward()
        optimizer.step()
    return bits(model, optimizer)


@pytest.mark.parametrize("kind", [*OPTIONS, *ADAPTIVE])
@pytest.mark.parametrize("narrow", [False, True])
def test_a_state_dict_before_the_first_step_changes_nothing(kind: str, narrow: bool) -> None:
    """Torch takes a step with lr=0 and gradients of zero there, to have the state made."""
    options = (OPTIONS | ADAPTIVE)[kind]
    if narrow and options.get("in_backward") and "numerator" in options:
        narrow = False  # refused for 16-bit parameters
    results = []
    for early in (False, True):
        model = Net()
        if narrow:
            model = nn.Sequential(Cast(), model.bfloat16(), Widen())  # type: ignore[assignment]
        results.append(trained(model, made(model, options), early))
    assert same(*results)


@pytest.mark.parametrize("kind", ADAPTIVE)
def test_a_state_dict_before_the_first_step_has_the_means_of_squares(kind: str) -> None:
    """So that a checkpoint can be loaded into an optimizer that has taken no step."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model, other = Net(), Net()
    optimizer, fresh = (made(net, ADAPTIVE[kind]) for net in (model, other))
    early = get_optimizer_state_dict(other, fresh)["state"]
    expected = {"factored": {"row_var", "col_var"}, "row": {"row_var"}, "element": {"variance"}}
    found = set(early["first.weight"]) - {"exp_avg", "step"}  # type: ignore[index,call-overload]
    assert found == expected[ADAPTIVE[kind]["diagonal"]]
    trained(model, optimizer, False)
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, fresh, get_optimizer_state_dict(model, optimizer))
    assert same(bits(other, fresh), bits(model, optimizer))
    assert same(trained(other, fresh, False), trained(model, optimizer, False))


class Cast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.bfloat16()


class Widen(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float()


def spread_over_two(rank: int) -> dict[str, bool]:
    found = {}
    for kind, options in OPTIONS.items():
        results = []
        for early in (False, True):
            model = fsdp(Net(), mesh_of((2,), ("shard",)))
            results.append(trained(model, made(model, options), early, rank, 2))
        found[kind] = same(*results)
    return found


def test_nor_of_shards(two: Ranks) -> None:
    assert two.run(spread_over_two) == [dict.fromkeys(OPTIONS, True)] * 2


def test_state_that_is_set_before_the_first_step() -> None:
    """set_optimizer_state_dict takes the same hidden step, and what was saved takes its place."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model, other = Net(), Net()
    optimizer = made(model, {"max_grad_norm": 0.1})
    trained(model, optimizer, False)
    other.load_state_dict(model.state_dict())
    resumed = made(other, {"max_grad_norm": 0.1})
    set_optimizer_state_dict(other, resumed, get_optimizer_state_dict(model, optimizer))
    assert resumed.grad_norm is None
    assert same(bits(other, resumed), bits(model, optimizer))
    assert same(trained(other, resumed, False), trained(model, optimizer, False))


def resume(model: nn.Module, optimizer: torch.optim.Optimizer, path: str) -> None:
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    weights, states = get_state_dict(model, optimizer)
    saved = {"model": weights, "optimizer": states}
    checkpoint.load(saved, checkpoint_id=path, no_dist=not distributed.is_initialized())
    set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])


def save(model: nn.Module, optimizer: torch.optim.Optimizer, path: str) -> None:
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights, states = get_state_dict(model, optimizer)
    alone = not distributed.is_initialized()
    checkpoint.save({"model": weights, "optimizer": states}, checkpoint_id=path, no_dist=alone)


@pytest.mark.parametrize("in_backward", [False, True])
def test_resuming_where_a_gradient_is_set(in_backward: bool, tmp_path: Path) -> None:
    """Torch makes no state then, and loads none; ours is made for its state dict."""
    path = str(tmp_path / "checkpoint")
    model, other = Net(), Net()
    optimizer = made(model, {})
    trained(model, optimizer, False)
    save(model, optimizer, path)
    resumed = made(other, {})
    loss_of(other, 7).backward()
    grads = [p.grad for p in other.parameters()]
    if in_backward:  # made after the gradients, which no hook has seen
        resumed = made(other, {"in_backward": True})
    resume(other, resumed, path)
    assert all(p.grad is grad for p, grad in zip(other.parameters(), grads, strict=True))
    assert same(bits(other, resumed), bits(model, optimizer))
    assert same(trained(other, resumed, False), trained(model, optimizer, False))


def test_torch_loses_the_state_of_other_optimizers_there(tmp_path: Path) -> None:
    """What docs/distributed.md warns of: should torch mend it, that goes."""
    path = str(tmp_path / "checkpoint")
    model, other = Net(), Net()
    optimizer = torch.optim.Adam(model.parameters())
    loss_of(model, 0).backward()
    optimizer.step()
    save(model, optimizer, path)
    resumed = torch.optim.Adam(other.parameters())
    loss_of(other, 0).backward()
    resume(other, resumed, path)
    assert optimizer.state
    assert not resumed.state


def test_a_plain_state_dict_makes_no_state() -> None:
    model = Net()
    optimizer = made(model, {})
    assert not optimizer.state_dict()["state"]
    assert not optimizer.state


def test_a_learning_rate_of_zero_is_a_step_of_its_own() -> None:
    """What a user asks for is done: moments and counts go on."""
    model = Net()
    optimizer = made(model, {"lr": 0.0})
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(int(state["step"]) == 1 for state in optimizer.state.values())


def test_a_scheduler_may_have_wrapped_the_step() -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = Net()
    optimizer = made(model, {})
    torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    called = []
    optimizer.register_step_pre_hook(lambda *_: called.append(1))
    state = get_optimizer_state_dict(model, optimizer)["state"]
    assert called == [1]
    assert all(int(known["step"]) == 0 for known in state.values())  # type: ignore[index,call-overload]


# FSDP1


def flat(original: bool) -> tuple[Any, SOFIM]:
    model = fsdp1(Net(), use_orig_params=original)
    return model, made(model, {"max_grad_norm": 0.1})


def fsdp1_checkpoint(rank: int, path: str) -> list[float]:
    """Saved, loaded into new ones, and gone on: beside a training without any of it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    found = []
    for original in (False, True):
        for options in (StateDictOptions(), StateDictOptions(full_state_dict=True)):
            model, optimizer = flat(original)
            plain, beside = flat(original)
            get_state_dict(model, optimizer, options=options)  # before the first step
            for each, theirs in ((model, optimizer), (plain, beside)):
                train(each, theirs, range(4), rank, 2)
            weights, states = get_state_dict(model, optimizer, options=options)
            assert len(states["state"]) == 7
            if options.full_state_dict:  # sharded ones, as FSDP1 makes them, cannot be loaded from a file
                torch.save((weights, states), f"{path}/{original}-{rank}")
                weights, states = torch.load(f"{path}/{original}-{rank}")
            model, optimizer = flat(original)
            set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states, options=options)
            for each, theirs in ((model, optimizer), (plain, beside)):
                train(each, theirs, range(4, 8), rank, 2)
            pairs = zip(model.parameters(), plain.parameters(), strict=True)
            found.append(max(float((a - b).detach().abs().max()) for a, b in pairs if a.numel()))
    return found


def test_checkpoints_of_fsdp1(two: Ranks, tmp_path: Path) -> None:
    assert two.run(fsdp1_checkpoint, str(tmp_path)) == [[0.0] * 4] * 2
