"""``SOFIM.from_sgd``: a running ``torch.optim.SGD`` goes on as SOFIM; and what docs/from_sgd.md says about that."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

from sofim_fused import SOFIM, from_sgd, native
from tests.support.oracle import Hyper, Oracle, real64
from tests.support.problems import LAYOUTS, give, give_state, make_parameter, same_bits, snapshot

SGD = torch.optim.SGD
LARGE = 1e12  # ρ far above any ‖m̂‖² here, so that SOFIM's step is SGD's
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "from_sgd.md"
Group = dict[str, Any]


def gradients(params: Sequence[Tensor], seed: int = 1) -> Iterator[list[Tensor]]:
    """A drift plus noise, independent of the parameters' values."""
    generator = torch.Generator().manual_seed(seed)

    def normal(p: Tensor) -> Tensor:
        x = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        return torch.complex(x, 0.5 * x) if p.is_complex() else x

    drifts = [normal(p) for p in params]
    while True:
        yield [torch.empty_like(p).copy_(0.3 * (d + normal(p))) for p, d in zip(params, drifts, strict=True)]


def of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def vectors(*sizes: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(n, generator=generator, dtype=torch.float64).to(dtype)) for n in sizes]


def advance(optimizer: torch.optim.Optimizer, grads: Iterator[list[Tensor]], steps: int) -> None:
    for _ in range(steps):
        give(of(optimizer), next(grads))
        optimizer.step()


def running(
    groups: Sequence[Group], steps: int = 5, **arguments: Any
) -> tuple[torch.optim.SGD, torch.optim.SGD, Iterator[list[Tensor]]]:
    """An SGD optimizer that has taken steps, its twin with parameters of its own, and the gradients that follow."""
    optimizer = SGD(list(groups), **{"lr": 0.05, **arguments})
    grads = gradients(of(optimizer))
    advance(optimizer, grads, steps)
    for p in of(optimizer):
        p.grad = None
    return optimizer, copy.deepcopy(optimizer), grads


def follow(
    ours: SOFIM,
    theirs: torch.optim.SGD,
    grads: Iterator[list[Tensor]],
    steps: int = 20,
    after: Callable[[], None] = lambda: None,
) -> None:
    """Hold SOFIM's path to SGD's.

    With the same buffers a step of SOFIM is SGD's divided by 1 + ‖m̂‖²/ρ. Gradients do not depend on the weights, and L2
    decay, the only feedback, shrinks what they differ by. So after all steps the paths are apart by less than
    max ‖m̂‖²/ρ times SGD's length of path, and by the rounding of each step, some ulp of weights and steps.
    """
    length, ratio, size = 0.0, 0.0, 0.0
    for _ in range(steps):
        given = next(grads)
        before = [p.detach().clone() for p in of(theirs)]
        for optimizer in (ours, theirs):
            give(of(optimizer), [g.clone() for g in given])
            optimizer.step()
        moved = [p.detach() - old for p, old in zip(of(theirs), before, strict=True)]
        length += math.sqrt(sum(float(x.abs().square().sum()) for x in moved))
        size = max(size, math.sqrt(sum(float(x.abs().square().sum()) for x in before)))
        moment = sum(float(ours.state[p]["exp_avg"].abs().square().sum()) for p in of(ours))
        ratio = max(ratio, moment / min(float(group["rho"]) for group in ours.param_groups))
        after()
    apart = math.sqrt(
        sum(float((p - q).detach().abs().square().sum()) for p, q in zip(of(ours), of(theirs), strict=True))
    )
    ulp = torch.finfo(torch.float64).eps
    bound = ratio * length + 8 * steps * ulp * (size + length)
    assert bound < 1e-9 * length  # or the test would say little
    assert apart <= bound


# How SGD goes on


def two_groups() -> list[Group]:
    a, b, c = vectors(5, 33, 7)
    return [
        {"params": [a, b], "momentum": 0.95, "weight_decay": 0.02},
        {"params": [c], "lr": 0.3, "momentum": 0.5, "dampening": 0.25, "maximize": True},
    ]


def one_group(dtype: torch.dtype = torch.float64) -> list[Group]:
    return [{"params": vectors(5, 33, dtype=dtype)}]


RUNNING: dict[str, Callable[[], tuple[torch.optim.SGD, torch.optim.SGD, Iterator[list[Tensor]]]]] = {
    "momentum": lambda: running(one_group(), momentum=0.9),
    "no momentum": lambda: running(one_group(), dampening=0.5, weight_decay=0.1),
    "dampening": lambda: running(one_group(), momentum=0.9, dampening=0.3),
    "dampening as momentum": lambda: running(one_group(), momentum=0.9, dampening=0.9),
    "negative dampening": lambda: running(one_group(), momentum=0.5, dampening=-1.0),
    "L2": lambda: running(one_group(), momentum=0.9, weight_decay=0.1),
    "maximize": lambda: running(one_group(), momentum=0.9, weight_decay=0.1, maximize=True),
    "two groups": lambda: running(two_groups()),
    "groups with and without": lambda: running([{**two_groups()[0], "momentum": 0.0}, two_groups()[1]]),
    "lr as a tensor": lambda: running(two_groups(), lr=torch.tensor([0.05], dtype=torch.float64)),
    "fused": lambda: running(one_group(), momentum=0.9, weight_decay=0.1, fused=True),
    "foreach": lambda: running(one_group(), momentum=0.9, weight_decay=0.1, foreach=True),
    "complex": lambda: running(one_group(torch.complex128), momentum=0.9, weight_decay=0.1),
    "one step": lambda: running(one_group(), 1, momentum=0.9),
    "a long run": lambda: running(one_group(), 400, momentum=0.9),
}


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


# What is taken over, and what is left


def test_groups_are_taken_over() -> None:
    a, b, c = vectors(2, 3, 4)
    theirs = SGD(
        [
            {"params": [("a", a), ("b", b)], "name": "body", "tags": ["x"]},
            {"params": [("c", c)], "lr": 0.2, "momentum": 0.0, "rho": 8.0, "state_dtype": None},
        ],
        lr=0.1,
        momentum=0.5,
        dampening=0.5,
        weight_decay=0.01,
        maximize=True,
        foreach=True,
    )
    ours = SOFIM.from_sgd(theirs, rho=2.0, fisher="group", max_grad_norm=3.0, backend="reference")
    first, second = ours.param_groups
    common = {
        "weight_decay": 0.01,
        "decoupled_weight_decay": False,
        "maximize": True,
        "state_dtype": None,
        "kahan": None,
        "numerator": "moment",
        "fisher": "group",
        "max_grad_norm": 3.0,
        "skip_nonfinite": False,
    }
    assert first == {
        **common,
        "params": [a, b],
        "param_names": ["a", "b"],
        "name": "body",
        "tags": ["x"],
        "lr": 0.2,
        "momentum": 0.5,
        "rho": 2.0,
    }
    assert second == {**common, "params": [c], "param_names": ["c"], "lr": 1.6, "momentum": 0.0, "rho": 8.0}
    assert ours.backends == {torch.device("cpu"): "reference"}
    for name in ("params", "param_names"):
        assert first[name] is not theirs.param_groups[0][name]


def test_a_group_added_later_follows_sgd_s_arguments() -> None:
    theirs, _, _ = running(two_groups(), lr=0.1, momentum=0.8, dampening=0.5, weight_decay=0.03)
    ours = SOFIM.from_sgd(theirs, rho=2.0)
    ours.add_param_group({"params": vectors(3)})
    added = ours.param_groups[2]
    assert added["lr"] == pytest.approx(2 * 0.1 * 0.5 / 0.2, rel=1e-15)
    assert [added[name] for name in ("momentum", "weight_decay", "decoupled_weight_decay")] == [0.8, 0.03, False]


def test_backend_switches_of_sgd_are_not_taken_over() -> None:
    for switch in ({"foreach": True}, {"foreach": False}, {"fused": True}, {"fused": False}):
        theirs = SGD(vectors(3), momentum=0.9, **switch)
        assert SOFIM.from_sgd(theirs).backends == SOFIM(vectors(3)).backends
        assert SOFIM.from_sgd(theirs, foreach=True).backends == {torch.device("cpu"): "reference"}


@pytest.mark.parametrize("options", [{"in_backward": True}, {"in_backward": True, "release_grads": True}], ids=str)
def test_gradients_in_the_backward_pass(options: dict[str, Any]) -> None:
    """The constructor has hung hooks on the parameters before there is state."""
    results = []
    for more in ({}, options):
        theirs, _, grads = running(two_groups(), momentum=0.9)
        ours = SOFIM.from_sgd(theirs, rho=2.0, **more)
        for _ in range(5):
            given = next(grads)
            torch.stack([(p * g).sum() for p, g in zip(of(ours), given, strict=True)]).sum().backward()
            ours.step()
            ours.zero_grad()
        results.append(snapshot(ours))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_hooks_and_entries_of_the_state_are_left() -> None:
    theirs, _, grads = running(one_group(), momentum=0.9)
    seen: list[Any] = []
    theirs.register_step_post_hook(lambda *_: seen.append(1))
    theirs.state[of(theirs)[0]]["note"] = torch.ones(1)
    ours = SOFIM.from_sgd(theirs)
    advance(ours, grads, 1)
    assert not seen
    assert all(set(known) == {"exp_avg", "step"} for known in ours.state.values())


def contents(optimizer: torch.optim.SGD) -> tuple[list[Any], list[Tensor]]:
    """All that an SGD optimizer holds but its parameters' values: what compares as it is, and tensors as copies."""
    whole: list[Any] = [list(optimizer.state), dict(optimizer.defaults)]
    tensors = []
    for group in optimizer.param_groups:
        whole.append(dict(group))
        tensors += [x.detach().clone() for x in group.values() if isinstance(x, Tensor)]
    for known in optimizer.state.values():
        whole.append(list(known))
        tensors += [x.clone() for x in known.values() if isinstance(x, Tensor) and not (x.is_sparse or x.is_meta)]
    return whole, tensors


@pytest.mark.parametrize("name", ["momentum", "two groups", "lr as a tensor", "no momentum", "complex"])
def test_nothing_is_shared_and_sgd_stays_as_it_is(name: str) -> None:
    theirs, twin, grads = RUNNING[name]()
    whole, tensors = contents(theirs)
    values = [p.detach().clone() for p in of(theirs)]
    ours = SOFIM.from_sgd(theirs)
    assert same_bits(values, of(ours))
    held = [x for known in theirs.state.values() for x in known.values() if x is not None]
    held += [group["lr"] for group in theirs.param_groups if isinstance(group["lr"], Tensor)]
    made = [x for known in ours.state.values() for x in known.values()]
    made += [group["lr"] for group in ours.param_groups if isinstance(group["lr"], Tensor)]
    addresses = [x.untyped_storage().data_ptr() for x in made]
    assert len(set(addresses)) == len(addresses)
    assert not {x.untyped_storage().data_ptr() for x in held} & set(addresses)
    advance(ours, grads, 3)
    after, now = contents(theirs)
    assert after == whole
    assert same_bits(tensors, now)
    with torch.no_grad():
        for p, value in zip(of(theirs), values, strict=True):
            p.copy_(value)
    following = gradients(of(twin), 2), gradients(of(twin), 2)
    for optimizer, given in zip((theirs, twin), following, strict=True):
        advance(optimizer, given, 3)
    assert same_bits(of(theirs), of(twin))


# The state


def taken_state(p: Tensor, **options: Any) -> SOFIM:
    theirs = SGD([p], lr=0.1, momentum=0.5)
    p.grad = torch.ones_like(p)
    theirs.step()
    return SOFIM.from_sgd(theirs, **options)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64], ids=str
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_state_is_laid_out_as_a_first_step_does(layout: str, dtype: torch.dtype) -> None:
    """So that the very next step takes one call of native code, where there is any."""
    generator = torch.Generator().manual_seed(0)
    p = make_parameter(layout, dtype, generator)
    ours = taken_state(p)
    plain = SOFIM([make_parameter(layout, dtype, generator)])
    give_state(plain)
    (known,), (expected,) = ours.state.values(), plain.state.values()
    assert list(known) == list(expected)
    for name, x in known.items():
        assert (x.dtype, x.shape, x.stride(), x.device) == (
            expected[name].dtype,
            expected[name].shape,
            expected[name].stride(),
            expected[name].device,
        )
    torch.testing.assert_close(known["exp_avg"], torch.full_like(known["exp_avg"], 0.5), rtol=0, atol=0)
    assert int(known["step"]) == from_sgd.settled(0.5)
    assert "kahan" not in known or not known["kahan"].any()
    if isinstance(native.cpu(), str):
        return
    take, answers = ours._native_step(), []
    ours._step_in_one_call = lambda *arguments: answers.append(take(*arguments)) or answers[-1]
    ours.step()
    assert answers == [True]


@pytest.mark.parametrize("state_dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_moments_are_buffers_rounded_once(dtype: torch.dtype, state_dtype: torch.dtype | None) -> None:
    theirs, _, grads = running([{"params": vectors(400, dtype=dtype)}], momentum=0.9)
    (p,) = of(theirs)
    ours = SOFIM.from_sgd(theirs, state_dtype=state_dtype, kahan=False)
    moment = ours.state[p]["exp_avg"]
    assert moment.dtype == (state_dtype or torch.float32)
    assert set(ours.state[p]) == {"exp_avg", "step"}
    buffer = theirs.state[p]["momentum_buffer"]
    assert buffer.dtype == dtype
    # Half an ulp of the moment, and one of the float32 product.
    error = torch.finfo(moment.dtype).eps / 2 + 1.01 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(moment.double(), buffer.double() * (1 - 0.9), rtol=error, atol=0)
    advance(ours, grads, 2)


def test_16_bit_weights_go_on_with_what_they_could_not_hold() -> None:
    theirs, _, grads = running([{"params": vectors(40, dtype=torch.bfloat16)}], momentum=0.9)
    (p,) = of(theirs)
    moment = real64(theirs.state[p]["momentum_buffer"]) * (1 - 0.9)
    hyper = Hyper(lr=0.05 / (1 - 0.9), momentum=0.9, decoupled=False)
    oracle = Oracle([p.detach()], [hyper], [0], moments=[moment], steps=[10_000])
    ours = SOFIM.from_sgd(theirs)
    for _ in range(10):
        given = next(grads)
        give([p], given)
        ours.step()
        oracle.step(given)
    held = real64(p) + real64(ours.state[p]["kahan"])
    torch.testing.assert_close(held, oracle.weights[0], rtol=0, atol=10 * 2**-16 * float(oracle.weights[0].abs().max()))


def test_buffers_of_another_dtype() -> None:
    """Float32 gradients of 16-bit parameters leave float32 buffers."""
    (p,) = vectors(5, dtype=torch.bfloat16)
    theirs = SGD([p], lr=0.1, momentum=0.5)
    theirs.state[p]["momentum_buffer"] = torch.linspace(-1, 1, 5)
    ours = SOFIM.from_sgd(theirs)
    assert torch.equal(ours.state[p]["exp_avg"], 0.5 * torch.linspace(-1, 1, 5))


def test_what_is_made_in_inference_mode_can_be_written_to() -> None:
    theirs, _, grads = running(two_groups(), lr=torch.tensor(0.05))
    with torch.inference_mode():
        ours = SOFIM.from_sgd(theirs)
    advance(ours, grads, 1)
    ours.param_groups[0]["lr"].mul_(0.5)
    for known in ours.state.values():
        known["exp_avg"].zero_()


# Saving, copying, classes


class Mine(SOFIM):
    """A user's own."""


class Theirs(torch.optim.SGD):
    """A user's own."""


def test_classes_derived_from_either() -> None:
    theirs = Theirs(vectors(3), momentum=0.9)
    assert type(Mine.from_sgd(theirs)) is Mine


def test_saving_and_copying_go_on_to_the_same_bits() -> None:
    def straight(ours: SOFIM) -> SOFIM:
        return ours

    def reloaded(ours: SOFIM) -> SOFIM:
        file = io.BytesIO()
        torch.save(ours.state_dict(), file)
        file.seek(0)
        fresh = SOFIM([{"params": group["params"]} for group in ours.param_groups])
        fresh.load_state_dict(torch.load(file, weights_only=True))
        return fresh

    def pickled(ours: SOFIM) -> SOFIM:
        twin: SOFIM = pickle.loads(pickle.dumps(ours))
        return twin

    results = []
    for swap in (straight, reloaded, pickled, copy.deepcopy):
        theirs, _, grads = running(two_groups())
        ours = swap(SOFIM.from_sgd(theirs, rho=2.0))
        advance(ours, grads, 5)
        results.append(snapshot(ours))
    assert all(same_bits(results[0], other) for other in results[1:])


def test_a_state_dict_of_sgd_is_for_sgd() -> None:
    """It is loaded there, and taken over afterwards."""
    theirs, _, _ = running(one_group(), momentum=0.9)
    with pytest.raises(ValueError, match=r"state_dict: parameter group 0 lacks rho.*another optimizer"):
        SOFIM(one_group()).load_state_dict(theirs.state_dict())
    fresh = SGD(one_group())
    fresh.load_state_dict(theirs.state_dict())
    loaded, direct = SOFIM.from_sgd(fresh), SOFIM.from_sgd(theirs)
    for p, q in zip(of(loaded), of(direct), strict=True):
        assert same_bits(list(loaded.state[p].values()), list(direct.state[q].values()))


# Refusals


def _in_group(**values: Any) -> Callable[[torch.optim.SGD], None]:
    return lambda optimizer: optimizer.param_groups[1].update(values)


def _buffer(value: Any) -> Callable[[torch.optim.SGD], None]:
    def put(optimizer: torch.optim.SGD) -> None:
        optimizer.state[of(optimizer)[2]]["momentum_buffer"] = value

    return put


def _nothing(_: torch.optim.SGD) -> None:
    pass


NAMED = r"momentum buffer of parameter 0 of group 1"
SHOWN = NAMED + r" \(shape \(7,\), float64, cpu\)"
REMEDY = r".*set optimizer\.state\[param\]\['momentum_buffer'\] = None"
Spoil = Callable[[torch.optim.SGD], None]
REFUSED: list[tuple[str, Spoil, dict[str, Any], type[Exception], str]] = [
    *(
        (name, _nothing, {name: value}, TypeError, rf"^{name} comes from the SGD optimizer: leave it out, or set it")
        for name, value in {
            "params": [],
            "lr": 0.1,
            "momentum": 0.9,
            "weight_decay": 0.0,
            "decoupled_weight_decay": True,
            "maximize": False,
        }.items()
    ),
    ("steps=0", _nothing, {"steps": 0}, ValueError, r"steps=0: it must be at least 1"),
    ("steps=-3", _nothing, {"steps": -3}, ValueError, r"steps=-3: it must be at least 1"),
    ("steps=2**63", _nothing, {"steps": 2**63}, ValueError, r"steps=9223372036854775808: .*less than 2\*\*62"),
    ("steps=1.0", _nothing, {"steps": 1.0}, TypeError, r"steps=1\.0: pass how many updates SGD took"),
    ("steps=True", _nothing, {"steps": True}, TypeError, r"steps=True: pass how many updates SGD took"),
    ("rho", _nothing, {"rho": 0.0}, ValueError, r"rho=0\.0: it must be at least 1e-30"),
    ("rho's type", _nothing, {"rho": "1"}, TypeError, r"rho='1': pass a float or a one-element tensor"),
    ("a group's rho", _in_group(rho=-1.0), {}, ValueError, r"parameter group 1: rho=-1\.0"),
    ("an option", _nothing, {"fisher": "layer"}, ValueError, r"fisher='layer': take one of"),
    ("an unknown option", _nothing, {"damping": 1.0}, TypeError, r"damping"),
    ("differentiable", _nothing, {"differentiable": True}, ValueError, r"differentiable=True"),
    (
        "nesterov",
        _in_group(nesterov=True, dampening=0.0),
        {},
        ValueError,
        r"parameter group 1 of the SGD optimizer: nesterov=True: .*set group\['nesterov'\] = False first",
    ),
    (
        "SGD's differentiable",
        _in_group(differentiable=True),
        {},
        ValueError,
        r"parameter group 1 of the SGD optimizer: differentiable=True: .*set group\['differentiable'\] = False first",
    ),
    (
        "dampening=1",
        _in_group(dampening=1.0),
        {},
        ValueError,
        r"parameter group 1 of the SGD optimizer: dampening=1\.0: gradients do not enter the buffer.*set it below 1",
    ),
    ("dampening=2", _in_group(dampening=2), {}, ValueError, r"dampening=2: "),
    ("dampening=nan", _in_group(dampening=math.nan), {}, ValueError, r"dampening=nan: "),
    ("dampening=-inf", _in_group(dampening=-math.inf), {}, ValueError, r"dampening=-inf: "),
    ("dampening's type", _in_group(dampening=None), {}, TypeError, r"group 1 .*: dampening=None: pass a float"),
    (
        "default dampening",
        lambda o: o.defaults.update(dampening=1.0),
        {},
        ValueError,
        r"defaults of the SGD optimizer: dampening=1\.0",
    ),
    (
        "momentum=1",
        _in_group(momentum=1.0),
        {},
        ValueError,
        r"parameter group 1: momentum=1\.0: it must be at least 0 and less than 1",
    ),
    ("momentum=-0.5", _in_group(momentum=-0.5), {}, ValueError, r"parameter group 1: momentum=-0\.5"),
    ("lr=-1", _in_group(lr=-1.0), {}, ValueError, r"parameter group 1: lr=-1\.0: it must be at least 0"),
    ("lr=nan", _in_group(lr=math.nan), {}, ValueError, r"parameter group 1: lr=nan"),
    ("weight_decay=-1", _in_group(weight_decay=-1.0), {}, ValueError, r"parameter group 1: weight_decay=-1\.0"),
    (
        "weight_decay as two numbers",
        _in_group(weight_decay=torch.full((2,), 0.1)),
        {},
        TypeError,
        r"parameter group 1: weight_decay=tensor.*pass a float",
    ),
    ("maximize", _in_group(maximize=1), {}, TypeError, r"parameter group 1: maximize=1: pass True or False"),
    ("a buffer's type", _buffer([0.0] * 7), {}, TypeError, NAMED + r" is of type list, not a tensor" + REMEDY),
    (
        "a sparse buffer",
        _buffer(torch.ones(7, dtype=torch.float64).to_sparse()),
        {},
        ValueError,
        SHOWN + r" has the layout torch\.sparse_coo: SOFIM takes dense gradients" + REMEDY + r".*to_dense\(\)",
    ),
    (
        "a buffer's shape",
        _buffer(torch.ones(7, 1, dtype=torch.float64)),
        {},
        ValueError,
        SHOWN + r" has the shape \(7, 1\)" + REMEDY,
    ),
    (
        "a buffer's device",
        _buffer(torch.ones(7, dtype=torch.float64, device="meta")),
        {},
        ValueError,
        SHOWN + r" is on meta" + REMEDY,
    ),
    (
        "a buffer's dtype",
        _buffer(torch.ones(7, dtype=torch.int64)),
        {},
        ValueError,
        SHOWN + r" is int64" + REMEDY,
    ),
    (
        "a complex buffer",
        _buffer(torch.ones(7, dtype=torch.complex128)),
        {},
        ValueError,
        SHOWN + r" is complex128" + REMEDY,
    ),
    *(
        (
            f"a buffer with {value}",
            _buffer(torch.tensor([0.0] * 6 + [value], dtype=torch.float64)),
            {},
            ValueError,
            SHOWN + r" holds NaN or infinity, as torch's fused SGD leaves it" + REMEDY + r".*zero_\(\)",
        )
        for value in (math.nan, math.inf, -math.inf)
    ),
    (
        "a parameter that SOFIM cannot take",
        lambda o: o.param_groups[1]["params"].append(torch.ones(3).to(torch.float8_e4m3fn).requires_grad_()),
        {},
        ValueError,
        r"parameter 1 of group 1 \(shape \(3,\), float8_e4m3fn, cpu\): only float32",
    ),
]


@pytest.mark.parametrize(("spoil", "options", "error", "text"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_refusals(spoil: Spoil, options: dict[str, Any], error: type[Exception], text: str) -> None:
    theirs, _, _ = running(two_groups(), momentum=0.9)
    spoil(theirs)
    whole, tensors = contents(theirs)
    values = [p.detach().clone() for p in of(theirs)]
    with pytest.raises(error, match=text):
        SOFIM.from_sgd(theirs, **options)
    after, now = contents(theirs)
    assert repr(after) == repr(whole)  # NaN is not equal to itself
    assert same_bits(tensors, now)
    assert same_bits(values, of(theirs))


@pytest.mark.parametrize("value", [torch.optim.Adam(vectors(3)), SOFIM(vectors(3)), vectors(3), None], ids=type)
def test_what_is_no_sgd(value: Any) -> None:
    text = rf"optimizer is of type {type(value).__name__}: pass a torch\.optim\.SGD"
    with pytest.raises(TypeError, match=text):
        SOFIM.from_sgd(value)


def test_what_must_not_be_refused() -> None:
    """Switches that are not in use, and remedies that messages name."""
    theirs, twin, grads = running(one_group(), momentum=0.9, nesterov=True)
    for optimizer in (theirs, twin):
        optimizer.param_groups[0]["nesterov"] = False
    follow(SOFIM.from_sgd(theirs, rho=LARGE), twin, grads)
    assert SOFIM.from_sgd(SGD(vectors(3), lr=1, momentum=0, dampening=1.0)).param_groups[0]["lr"] == 1.0
    unused = SGD(vectors(3), lr=Fraction(1, 2), momentum=Fraction(1, 2))
    assert SOFIM.from_sgd(unused, steps=7).param_groups[0]["lr"] == 1.0
    theirs, _, _ = running(one_group(), momentum=0.9)
    first, second = of(theirs)
    theirs.state[first]["momentum_buffer"] = None
    assert set(SOFIM.from_sgd(theirs).state) == {second}


# The document


def test_the_document_s_examples_run() -> None:
    if not DOCUMENT.is_file():
        pytest.skip("these are not the sources")
    examples = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert len(examples) >= 3
    model = nn.Linear(3, 2)
    theirs = SGD(model.parameters(), lr=0.05, momentum=0.9)
    old = lr_scheduler.StepLR(theirs, 30)
    for _ in range(3):
        model(torch.ones(1, 3)).sum().backward()
        theirs.step()
        old.step()
    names: dict[str, Any] = {"torch": torch, "model": model, "sgd": theirs, "old": old}
    for example in examples:
        exec(example, names)
    assert isinstance(names["optimizer"], SOFIM)
    assert names["scheduler"].last_epoch == 3


def test_the_document_names_every_argument() -> None:
    """Of SGD's constructor, in the table; and what is said of their defaults is so."""
    if not DOCUMENT.is_file():
        pytest.skip("these are not the sources")
    rows = [line.split("|")[1] for line in DOCUMENT.read_text().splitlines() if line.startswith("| `")]
    named = set(itertools.chain.from_iterable(re.findall(r"`(\w+)", row) for row in rows))
    arguments = {"params", *SGD(vectors(1)).defaults}
    assert arguments <= named
