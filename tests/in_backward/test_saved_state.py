"""Copies, pickles and state dicts with ``in_backward=True``, and settings that change before the step."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from sofim_fused import SOFIM
from tests.in_backward.support import NUMERATORS, Pair, alike, backward, hooks, made, on_cpu, three_batches
from tests.optimizer.support import saved_and_loaded, small_model, train
from tests.support.problems import give, same_bits, snapshot
from tests.support.runs import Run

# Copies and saved state


def as_pickled(both: Any) -> Any:
    return pickle.loads(pickle.dumps(both))


def as_saved(both: Any) -> Any:
    file = io.BytesIO()
    torch.save(both, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def into_another(both: tuple[nn.Module, SOFIM], **options: Any) -> tuple[nn.Module, SOFIM]:
    model, optimizer = both
    fresh = small_model(seed=3)
    fresh.load_state_dict(model.state_dict())
    other = SOFIM(fresh.parameters(), lr=9.0, momentum=0.1, **options)
    other.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    return fresh, other


TWINS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": as_pickled,
    "torch.save": as_saved,
    "state_dict": lambda both: into_another(both, in_backward=True, release_grads=True),
    "state_dict-plain": into_another,
    "state_dict-gradients": lambda both: into_another(both, in_backward=True),
}


@on_cpu
@pytest.mark.parametrize("numerator", NUMERATORS)
@pytest.mark.parametrize("twin", TWINS)
def test_a_twin_goes_on_bit_for_bit(twin: str, numerator: str, run: Run) -> None:
    """By hooks of its own, and the original by its own."""
    model = small_model()
    optimizer = made(model.parameters(), run, lr=0.1, numerator=numerator, release_grads=True)
    train(model, optimizer, 3)
    other, another = TWINS[twin]((model, optimizer))
    assert hooks(list(model.parameters())) == [1] * 4
    assert hooks(list(other.parameters())) == [0 if "plain" in twin else 1] * 4
    assert another._release_grads == (twin not in ("state_dict-plain", "state_dict-gradients"))
    assert [group["params"][0] is next(other.parameters()) for group in another.param_groups] == [True]
    before = snapshot(optimizer)
    train(other, another, 3, 3)
    assert same_bits(before, snapshot(optimizer))
    after = snapshot(another)
    train(model, optimizer, 3, 3)
    assert same_bits(after, snapshot(another))
    assert same_bits(after, snapshot(optimizer))


@on_cpu
@pytest.mark.parametrize("copied", [copy.deepcopy, as_pickled, as_saved])
def test_a_copy_of_the_optimizer_alone(copied: Callable[[Any], Any], run: Run) -> None:
    pair = Pair(run)
    for grads in pair.gradients(3):
        pair.backward(grads)
        pair.step()
    twin = copied(pair.optimizer)
    params = [p for group in twin.param_groups for p in group["params"]]
    assert hooks(params) == hooks(pair.params) == [1] * len(params)
    for grads in islice(pair.problem.gradients(), 3):
        pair.backward(grads)
        pair.step()
        twin.zero_grad()
        backward(params, grads)
        twin.step()
    assert pair.alike()
    assert alike(twin, pair.plain)


@on_cpu
@pytest.mark.parametrize("release", [False, True])
def test_nothing_is_saved_or_added_under_way(release: bool, run: Run) -> None:
    pair = Pair(run, release=release)
    works: dict[str, Callable[[], object]] = {
        r"state_dict\(\)": pair.optimizer.state_dict,
        "a copy": lambda: copy.deepcopy(pair.optimizer),
        " a copy": lambda: pickle.dumps(pair.optimizer),
        r"add_param_group\(\)": lambda: pair.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]}),
    }
    for grads in pair.gradients(2):
        pair.backward(grads)
        before = snapshot(pair.optimizer)
        for what, work in works.items():
            with pytest.raises(RuntimeError, match=rf"{what.strip()} between backward\(\) and step\(\)"):
                work()
        assert same_bits(before, snapshot(pair.optimizer))
        assert len(pair.optimizer.param_groups) == 3
        pair.step()
    assert pair.alike()
    for work in works.values():
        work()
    assert len(pair.optimizer.param_groups) == 4


@on_cpu
def test_micro_batches_that_are_not_released_change_nothing_yet(run: Run) -> None:
    """So that state may be saved between them. Of those that are released, moments have taken a part."""
    pair = Pair(run)
    first, second, _ = three_batches(pair)
    with pair.optimizer.accumulate_grads():
        backward(pair.params, first)
    pair.optimizer.load_state_dict(pair.optimizer.state_dict())
    copy.deepcopy(pair.optimizer)
    backward(pair.params, second)
    for grads in (first, second):
        backward(pair.plain_params, grads)
    pair.step()
    assert pair.alike()

    pair = Pair(run, release=True)
    with pair.optimizer.accumulate_grads():
        backward(pair.params, first)
    with pytest.raises(RuntimeError, match=r"state_dict\(\) between backward\(\) and step\(\)"):
        pair.optimizer.state_dict()


@on_cpu
@pytest.mark.parametrize("numerator", NUMERATORS)
def test_loading_starts_anew(numerator: str, run: Run) -> None:
    """Also in the middle of a step, as after a backward pass that has failed."""
    pair = Pair(run, numerator=numerator)
    batches = list(pair.gradients(5))
    for grads in batches[:3]:
        pair.backward(grads)
        pair.step()
    saved, weights = saved_and_loaded(pair.optimizer.state_dict()), [p.detach().clone() for p in pair.params]
    pair.backward(batches[3])
    with torch.no_grad():
        for p, weight in zip(pair.params, weights, strict=True):
            p.copy_(weight)
    pair.optimizer.load_state_dict(saved)
    for grads in batches[4:]:
        pair.backward(grads)
        pair.step()
    assert pair.alike()


@on_cpu
def test_loading_another_method(run: Run) -> None:
    """The next step is taken as the loaded groups say."""
    pair = Pair(run, decay="l2")
    batches = list(pair.gradients(5))
    for numerator, fisher in (("gradient", "group"), ("moment", "parameter"), ("gradient", "model")):
        other = Pair(run, decay="l2", numerator=numerator, fisher=fisher)
        for grads in batches[:2]:
            other.backward(grads)
            other.step()
        for optimizer, _ in pair.both:
            optimizer.load_state_dict(other.plain.state_dict())
        for grads in batches[2:]:
            pair.backward(grads)
            pair.step()
        assert pair.alike()


# Settings


@pytest.mark.parametrize("numerator", NUMERATORS)
def test_settings_changed_between_backward_and_step(numerator: str, run: Run) -> None:
    """In the moment form, lr, rho and decoupled decay act as they are in step(); all else as it was before."""
    pair = Pair(run, decay="decoupled", numerator=numerator, layouts=("matrix", "scalar", "sliced", "offset"))
    old, new = {"lr": 0.05, "rho": 0.7, "weight_decay": 0.03}, {"lr": 0.2, "rho": 2.0, "weight_decay": 0.3}
    pair.set(**old)
    for grads in pair.gradients(3):
        pair.backward(grads)
        for group in pair.optimizer.param_groups:
            group.update(new)
        for group in pair.plain.param_groups:
            group.update(new if numerator == "moment" else old)
        pair.step()
        pair.set(**old)
    assert pair.alike()


@pytest.mark.parametrize("numerator", NUMERATORS)
def test_settings_that_hold_from_the_first_gradient(numerator: str, run: Run) -> None:
    pair = Pair(run, decay="l2", numerator=numerator, layouts=("matrix", "scalar", "sliced", "offset"))
    for grads in pair.gradients(3):
        pair.backward(grads)
        kept = [dict(group) for group in pair.optimizer.param_groups]
        for group in pair.optimizer.param_groups:
            group.update(momentum=0.3, weight_decay=group["weight_decay"] * 2, maximize=not group["maximize"])
        pair.step()
        for group, old in zip(pair.optimizer.param_groups, kept, strict=True):
            group.update(old)
    assert pair.alike()


@on_cpu
@pytest.mark.parametrize("numerator", NUMERATORS)
def test_settings_between_the_gradients_of_a_step(numerator: str, run: Run) -> None:
    """All gradients are taken with one set of them."""
    pair = Pair(run, decay="l2", numerator=numerator)
    old = {"lr": 0.05, "rho": 0.7, "momentum": 0.6, "weight_decay": 0.03}
    pair.set(**old)
    for grads in pair.gradients(4):
        pair.zero_grad()
        backward(pair.params, [g if i % 2 else None for i, g in enumerate(grads)])
        pair.set(lr=0.3, rho=3.0, momentum=0.1, weight_decay=0.5)
        backward(pair.params, [None if i % 2 else g for i, g in enumerate(grads)])
        pair.set(**old)
        give(pair.plain_params, grads)
        pair.step()
    assert pair.alike()


@pytest.mark.parametrize("numerator", NUMERATORS)
def test_one_cycle_with_momentum(numerator: str, run: Run) -> None:
    pair = Pair(run, numerator=numerator, layouts=("matrix", "scalar", "sliced", "offset"))
    schedulers = [
        lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=31, cycle_momentum=True)
        for optimizer, _ in pair.both
    ]
    seen = set()
    for grads in pair.gradients(30):
        pair.backward(grads)
        pair.step()
        seen.add(pair.optimizer.param_groups[0]["momentum"])
        for scheduler in schedulers:
            scheduler.step()
    assert len(seen) == pair.run.steps(30)
    assert pair.alike()


@on_cpu
@pytest.mark.parametrize("numerator", NUMERATORS)
def test_lr_and_rho_as_tensors(numerator: str, run: Run) -> None:
    """Their values are taken at the time at which a number would be."""
    pair = Pair(run, numerator=numerator)
    lr, rho = torch.tensor(0.1), torch.tensor([0.8])
    for group in pair.optimizer.param_groups:
        group.update(lr=lr, rho=rho)
    for count, grads in enumerate(pair.gradients(5)):
        for group in pair.plain.param_groups:
            group.update(lr=float(lr), rho=float(rho))
        pair.backward(grads)
        lr.mul_(0.9)
        rho.add_(0.1)
        if numerator == "moment":
            for group in pair.plain.param_groups:
                group.update(lr=float(lr), rho=float(rho))
        pair.step()
        assert pair.optimizer.param_groups[0]["lr"] is lr
        assert count < 4 or float(lr) < 0.07
    assert pair.alike()
