"""torch.distributed.checkpoint: a state dict that is taken before the first step, and gradients that are still there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from bench.ranks import Ranks
from sofim_fused import SOFIM
from tests.runs import EMULATED, INTERPRETED
from tests.test_distributed import Net, fsdp, loss_of, mesh_of

pytestmark = [
    pytest.mark.skipif(EMULATED or INTERPRETED, reason="nothing of it is the kernels'"),
    pytest.mark.skipif(not distributed.is_available(), reason="PyTorch was built without torch.distributed"),
]

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "reference": {"backend": "reference", "weight_decay": 0.1},
    "gradient": {"numerator": "gradient", "weight_decay": 0.1, "decoupled_weight_decay": False},
    "tensor lr": {"lr": torch.tensor(0.1)},
    "guarded": {"max_grad_norm": 0.1, "skip_nonfinite": True},
    "in_backward": {"in_backward": True},
    "release": {"in_backward": True, "release_grads": True, "numerator": "gradient"},
}


def made(model: nn.Module, options: dict[str, Any]) -> SOFIM:
    return SOFIM(model.parameters(), **{"lr": 0.1, "rho": 1.0, **options})


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


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("narrow", [False, True])
def test_a_state_dict_before_the_first_step_changes_nothing(kind: str, narrow: bool) -> None:
    """Torch takes a step with lr=0 and gradients of zero there, to have the state made."""
    if narrow and OPTIONS[kind].get("in_backward") and "numerator" in OPTIONS[kind]:
        narrow = False  # refused for 16-bit parameters
    results = []
    for early in (False, True):
        model = Net()
        if narrow:
            model = nn.Sequential(Cast(), model.bfloat16(), Widen())  # type: ignore[assignment]
        results.append(trained(model, made(model, OPTIONS[kind]), early))
    assert same(*results)


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


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


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
