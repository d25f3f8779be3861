"""``SOFIM.from_sgd``: a running ``torch.optim.SGD`` goes on as SOFIM, under schedules too."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

from sofim_fused import SOFIM, from_sgd
from tests.optimizer.running_sgd import (
    LARGE,
    RUNNING,
    SGD,
    advance,
    follow,
    gradients,
    of,
    one_group,
    running,
    two_groups,
)
from tests.support.oracle import Hyper, Oracle, real64
from tests.support.problems import give

# How SGD goes on


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", RUNNING)
def test_where_rho_is_large_sgd_s_path_goes_on(name: str, backend: str) -> None:
    theirs, twin, grads = RUNNING[name]()
    follow(SOFIM.from_sgd(theirs, rho=LARGE, backend=backend), twin, grads)


def test_a_model_goes_on_as_under_sgd() -> None:
    """With gradients that do depend on the weights."""
    losses = []
    for swap in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        optimizer: torch.optim.Optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        for step in range(40):
            if swap and step == 20:
                assert isinstance(optimizer, SGD)
                optimizer = SOFIM.from_sgd(optimizer, rho=LARGE)
            x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            optimizer.zero_grad()
            loss = (model(x) - x[:, :3].sin()).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[:40] == pytest.approx(losses[40:], rel=1e-6)
    assert losses[39] < 0.5 * losses[0]


def test_with_the_number_of_steps_bias_correction_goes_on() -> None:
    """Without dampening, SGD's buffers hold what SOFIM's moments would, after as many updates."""
    count = 3
    theirs, _, grads = running(two_groups()[:1], count)
    seen = [real64(p) for p in of(SGD(two_groups()[:1]))]  # the same parameters, before these steps
    moments, replay = [torch.zeros_like(w) for w in seen], gradients(of(theirs))
    rerun = SGD([{**two_groups()[0], "lr": 0.05}])
    for _ in range(count):
        given = next(replay)
        for i, (p, g) in enumerate(zip(of(rerun), given, strict=True)):
            moments[i] = 0.95 * moments[i] + (1 - 0.95) * (g + 0.02 * real64(p))
        give(of(rerun), given)
        rerun.step()
    hyper = Hyper(lr=0.7 * 0.05 / (1 - 0.95), momentum=0.95, rho=0.7, weight_decay=0.02, decoupled=False)
    oracle = Oracle([p.detach() for p in of(theirs)], [hyper] * 2, [0, 0], moments=moments, steps=[count] * 2)
    ours = SOFIM.from_sgd(theirs, rho=0.7, steps=count)
    for _ in range(10):
        given = next(grads)
        give(of(ours), given)
        ours.step()
        oracle.step(given)
    for p, w in zip(of(ours), oracle.weights, strict=True):
        torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=1e-14)
    assert [int(ours.state[p]["step"]) for p in of(ours)] == [count + 10] * 2


@pytest.mark.parametrize("dampening", [0.0, 0.6])
def test_at_a_moderate_rho_the_steps_are_sofim_s(dampening: float) -> None:
    """From moments that the buffers gave, without bias correction."""
    theirs, _, grads = running(one_group(), momentum=0.8, dampening=dampening)
    moments = [real64(theirs.state[p]["momentum_buffer"]) * 0.2 / (1 - dampening) for p in of(theirs)]
    hyper = Hyper(lr=0.5 * 0.05 * (1 - dampening) / 0.2, momentum=0.8, rho=0.5, decoupled=False)
    oracle = Oracle([p.detach() for p in of(theirs)], [hyper] * 2, [0, 0], moments=moments, steps=[10_000] * 2)
    ours = SOFIM.from_sgd(theirs, rho=0.5)
    for _ in range(10):
        given = next(grads)
        give(of(ours), given)
        ours.step()
        oracle.step(given)
    for p, w in zip(of(ours), oracle.weights, strict=True):
        torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("momentum", [1e-30, 0.1, 0.25, 0.5, 0.8, 0.9, 0.99, 0.999])
def test_the_count_where_nothing_is_left_to_correct(momentum: float) -> None:
    """The smallest t with 1 - βᵗ = 1 in float64, in exact arithmetic: half of the gap below 1 is 2⁻⁵⁴."""
    count = from_sgd.settled(momentum)
    exact, gap = Fraction(momentum), Fraction(1, 2**54)
    assert count == 1 or exact ** (count - 1) > gap
    assert exact**count <= gap
    assert from_sgd.settled(0.0) == 1
    assert from_sgd.settled(math.nextafter(1.0, 0.0)) < 2**62


def test_a_parameter_without_a_buffer_starts_as_any() -> None:
    """One that had no gradient under SGD: its own count, bias correction from the start."""
    theirs, _, _ = running(one_group(), 0, momentum=0.9)
    early, late = of(theirs)
    given = torch.linspace(-1, 1, early.numel(), dtype=torch.float64)
    for _ in range(2):
        early.grad = given.clone()
        theirs.step()
    theirs.state[late]["momentum_buffer"] = None
    ours = SOFIM.from_sgd(theirs, rho=0.5, steps=2)
    assert set(ours.state) == {early}
    hyper = Hyper(lr=0.5 * 0.05 / (1 - 0.9), momentum=0.9, rho=0.5, decoupled=False)
    moments = [given * (1 - 0.9) * 1.9, torch.zeros(late.numel(), dtype=torch.float64)]
    oracle = Oracle([early.detach(), late.detach()], [hyper] * 2, [0, 0], moments=moments, steps=[2, 0])
    for _ in range(3):
        grads = [given.clone(), torch.ones_like(late)]
        give(of(ours), grads)
        ours.step()
        oracle.step(grads)
    for p, w in zip(of(ours), oracle.weights, strict=True):
        torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=0)
    assert [int(ours.state[p]["step"]) for p in of(ours)] == [5, 3]


def test_a_buffer_that_sgd_no_longer_uses_is_left() -> None:
    theirs, twin, grads = running(one_group(), momentum=0.9)
    for optimizer in (theirs, twin):
        optimizer.param_groups[0]["momentum"] = 0.0
    ours = SOFIM.from_sgd(theirs, rho=LARGE)
    assert not ours.state
    follow(ours, twin, grads)


# Schedules


def continued(make: Callable[..., Any], optimizer: SOFIM, old: Any, rate: float) -> Any:
    """As docs/from_sgd.md says: a new scheduler from the old one's last epoch, then the learning rates as they were."""
    rates = copy.deepcopy([group["lr"] for group in optimizer.param_groups])
    scheduler = make(optimizer, rate, old.last_epoch - 1)
    for group, lr in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = lr
    return scheduler


SCHEDULERS: dict[str, Callable[..., Any]] = {
    "StepLR": lambda o, rate, last: lr_scheduler.StepLR(o, 3, 0.5, last_epoch=last),
    "MultiStepLR": lambda o, rate, last: lr_scheduler.MultiStepLR(o, [2, 6, 9], 0.5, last_epoch=last),
    "LambdaLR": lambda o, rate, last: lr_scheduler.LambdaLR(o, lambda n: 1 / (n + 1), last_epoch=last),
    "LinearLR": lambda o, rate, last: lr_scheduler.LinearLR(o, 0.25, total_iters=12, last_epoch=last),
    "ExponentialLR": lambda o, rate, last: lr_scheduler.ExponentialLR(o, 0.9, last_epoch=last),
    "CosineAnnealingLR": lambda o, rate, last: lr_scheduler.CosineAnnealingLR(o, 30, 0.01 * rate, last_epoch=last),
    "CosineAnnealingWarmRestarts": lambda o, rate, last: lr_scheduler.CosineAnnealingWarmRestarts(
        o, 7, eta_min=0.01 * rate, last_epoch=last
    ),
    "OneCycleLR": lambda o, rate, last: lr_scheduler.OneCycleLR(
        o, 0.2 * rate, total_steps=40, cycle_momentum=False, last_epoch=last
    ),
    "CyclicLR": lambda o, rate, last: lr_scheduler.CyclicLR(
        o, 0.02 * rate, 0.2 * rate, step_size_up=4, cycle_momentum=False, last_epoch=last
    ),
}


@pytest.mark.parametrize("lr", [0.05, torch.tensor(0.05, dtype=torch.float64)], ids=["float", "tensor"])
@pytest.mark.parametrize("steps", [0, 1, 3, 6, 7])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_schedule_goes_on(name: str, steps: int, lr: float | Tensor) -> None:
    make = SCHEDULERS[name]
    theirs = SGD(one_group(), lr=copy.deepcopy(lr), momentum=0.75)
    twin, grads = copy.deepcopy(theirs), gradients(of(theirs))
    old, going_on = (make(optimizer, 1.0, -1) for optimizer in (theirs, twin))
    for _ in range(steps):
        given = next(grads)
        for optimizer, scheduler in ((theirs, old), (twin, going_on)):
            give(of(optimizer), [g.clone() for g in given])
            optimizer.step()
            scheduler.step()
    ours = SOFIM.from_sgd(theirs, rho=LARGE)
    rate = LARGE / (1 - 0.75)
    new = continued(make, ours, old, rate)
    assert new.last_epoch == going_on.last_epoch
    seen = []

    def both() -> None:
        new.step()
        going_on.step()
        seen.append(float(ours.param_groups[0]["lr"]) / rate)
        assert seen[-1] == pytest.approx(float(twin.param_groups[0]["lr"]), rel=1e-13)

    if steps:
        follow(ours, twin, grads, after=both)
        assert len(set(seen)) > 1
        assert type(ours.param_groups[0]["lr"]) is type(lr)
    else:
        advance(ours, grads, 1)
        twin.step()
        both()


def test_a_one_cycle_schedule_keeps_its_momentum() -> None:
    """The two schedules stay in proportion; the first step is SGD's, later ones lack its lr/(1 - momentum)."""
    theirs = SGD(one_group(), lr=0.05, momentum=0.9)
    make = lr_scheduler.OneCycleLR
    old, grads = make(theirs, 0.2, total_steps=20), gradients(of(theirs))
    for _ in range(4):
        advance(theirs, grads, 1)
        old.step()
    group = theirs.param_groups[0]
    rate = LARGE / (1 - group["momentum"])
    ours = SOFIM.from_sgd(theirs, rho=LARGE)
    for name in ("lr", "initial_lr", "max_lr", "min_lr"):
        assert ours.param_groups[0][name] == pytest.approx(rate * group[name], rel=1e-14)
    for name in ("momentum", "max_momentum", "base_momentum"):
        assert ours.param_groups[0][name] == group[name]
    twin = copy.deepcopy(theirs)
    follow(ours, twin, grads, 1)
    new = continued(lambda o, _, last: make(o, 0.2 * rate, total_steps=20, last_epoch=last), ours, old, rate)
    for _ in range(15):
        advance(ours, grads, 1)
        new.step()
        old.step()
        assert ours.param_groups[0]["momentum"] == pytest.approx(group["momentum"], rel=1e-14)
        assert ours.param_groups[0]["lr"] == pytest.approx(rate * group["lr"], rel=1e-12)
    assert group["momentum"] > 0.94


def test_reduce_on_plateau_goes_on_from_its_state() -> None:
    theirs = SGD(one_group(), lr=0.05, momentum=0.5)
    old = lr_scheduler.ReduceLROnPlateau(theirs, factor=0.5, patience=2)
    for loss in (1.0, 1.0, 1.0):
        old.step(loss)
    ours = SOFIM.from_sgd(theirs, rho=2.0)
    new = lr_scheduler.ReduceLROnPlateau(ours, factor=0.5, patience=2)
    new.load_state_dict(old.state_dict())
    for scheduler in (old, new):
        scheduler.step(1.0)
    assert theirs.param_groups[0]["lr"] == 0.025
    assert ours.param_groups[0]["lr"] == pytest.approx(4 * 0.025, rel=1e-15)


def test_learning_rates_that_schedulers_keep_in_groups() -> None:
    """Tensors as new ones; what a user keeps under such a name and is no number stays."""
    theirs = SGD(one_group(), lr=torch.tensor(0.05, dtype=torch.float64), momentum=0.75)
    SWALR(theirs, swa_lr=0.02)
    theirs.param_groups[0]["lr"].requires_grad_()
    theirs.param_groups[0]["max_lr"] = None
    ours = SOFIM.from_sgd(theirs, rho=torch.tensor([3.0], requires_grad=True)).param_groups[0]
    group = theirs.param_groups[0]
    for name in ("lr", "initial_lr"):
        assert float(ours[name].detach()) == pytest.approx(12 * 0.05, rel=1e-15)
        assert ours[name].dtype == torch.float64
        assert ours[name].is_leaf
        assert ours[name].untyped_storage().data_ptr() != group[name].untyped_storage().data_ptr()
    assert ours["swa_lr"] == pytest.approx(12 * 0.02, rel=1e-15)
    assert ours["max_lr"] is None
    assert float(group["lr"].detach()) == 0.05
