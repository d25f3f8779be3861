"""Groups of an optimizer with ``in_backward=True`` that are edited by hand: the result is the plain optimizer's."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sofim_fused import SOFIM, in_backward
from tests.in_backward.support import (
    FISHERS,
    NUMERATORS,
    alike,
    backward,
    hooks,
    in_backward_of,
    made,
    on_cpu,
    plain,
)
from tests.support.problems import give_state, same_bits, snapshot
from tests.support.runs import Run

SHAPES = [(5,), (3, 4), (2,), (4, 2), (6,), (1,), (300,)]
OPTIONS = ({}, {"lr": 0.05, "momentum": 0.7}, {"rho": 2.0, "weight_decay": 0.1})


class Twins:
    """The same parameters for an optimizer that takes gradients in the backward pass and for a plain one.

    Three groups that differ; an edit is a function of an optimizer and of all parameters, the last of which are spare.
    """

    def __init__(self, run: Run, release: bool = False, **options: Any) -> None:
        self.run = run
        generator = torch.Generator().manual_seed(3)
        values = [torch.randn(shape, generator=generator) for shape in SHAPES]
        self.generator = generator
        self.optimizers: list[SOFIM] = []
        self.params: list[list[nn.Parameter]] = []
        for make, more in ((made, {"release_grads": release}), (plain, {})):
            params = [nn.Parameter(x.clone().to(run.device)) for x in values]
            cuts = [params[:2], params[2:3], params[3:5]]
            groups = [{"params": part, **settings} for part, settings in zip(cuts, OPTIONS, strict=True)]
            self.params.append(params)
            self.optimizers.append(make(groups, run, **options, **more))
        self.optimizer, self.plain = self.optimizers

    def edit(self, edit: Callable[[SOFIM, list[nn.Parameter]], object]) -> None:
        for optimizer, params in zip(self.optimizers, self.params, strict=True):
            edit(optimizer, params)
        if self.run.backend == "cpu":
            give_state(self.plain)

    def backward(self) -> None:
        """All parameters get gradients, those that are in no group too."""
        grads = [torch.randn(p.shape, generator=self.generator).to(p.device) for p in self.params[0]]
        for params in self.params:
            for p in params:
                p.grad = None
            backward(params, grads)

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.backward()
            for optimizer in self.optimizers:
                optimizer.step()

    def alike(self) -> bool:
        return alike(self.optimizer, self.plain, None if self.run.backend in ("cpu", "reference") else 1e-6)


def take_out(optimizer: SOFIM, params: list[nn.Parameter]) -> None:
    del optimizer.param_groups[0]["params"][0]
    optimizer.state.pop(params[0], None)


def take_the_last_out(optimizer: SOFIM, params: list[nn.Parameter]) -> None:
    del optimizer.param_groups[2]["params"][-1]
    optimizer.state.pop(params[4], None)


def reverse(optimizer: SOFIM, _: list[nn.Parameter]) -> None:
    optimizer.param_groups.reverse()


def shuffle(optimizer: SOFIM, _: list[nn.Parameter]) -> None:
    for group in optimizer.param_groups:
        group["params"] = group["params"][::-1]


def move(optimizer: SOFIM, _: list[nn.Parameter]) -> None:
    """Across the border between two groups: the order stays."""
    first, second, _ = optimizer.param_groups
    second["params"].insert(0, first["params"].pop())


def split(optimizer: SOFIM, _: list[nn.Parameter]) -> None:
    group = optimizer.param_groups[2]
    optimizer.param_groups.append({**group, "params": group["params"][1:], "lr": 0.01})
    del group["params"][1:]


def take_a_group_out(optimizer: SOFIM, params: list[nn.Parameter]) -> None:
    del optimizer.param_groups[1]
    optimizer.state.pop(params[2], None)


def clear_and_add(optimizer: SOFIM, params: list[nn.Parameter]) -> None:
    optimizer.param_groups.clear()
    optimizer.state.clear()
    optimizer.add_param_group({"params": [params[5], params[1], params[3]]})


def clear_and_add_two(optimizer: SOFIM, params: list[nn.Parameter]) -> None:
    clear_and_add(optimizer, params)
    optimizer.add_param_group({"params": [params[6], params[0]], "momentum": 0.5})


def append(optimizer: SOFIM, params: list[nn.Parameter]) -> None:
    optimizer.param_groups[0]["params"].append(params[5])


def exchange_all(optimizer: SOFIM, params: list[nn.Parameter]) -> None:
    """As after ``fully_shard()``: no parameter that had a hook is left."""
    for group, new in zip(optimizer.param_groups, (params[5:6], params[6:], []), strict=True):
        group["params"] = new
    optimizer.state.clear()


def nothing(optimizer: SOFIM, _: list[nn.Parameter]) -> None:
    """The same parameters in new lists and dicts."""
    optimizer.param_groups[:] = [{**group, "params": list(group["params"])} for group in optimizer.param_groups]


EDITS = [
    take_out,
    take_the_last_out,
    reverse,
    shuffle,
    move,
    split,
    take_a_group_out,
    clear_and_add,
    clear_and_add_two,
    append,
    exchange_all,
    nothing,
]


def name_of(edit: Callable[..., object]) -> str:
    return edit.__name__


@pytest.mark.parametrize("numerator", NUMERATORS)
@pytest.mark.parametrize("edit", EDITS, ids=name_of)
@pytest.mark.parametrize("begun", [False, True])
def test_edited_groups(begun: bool, edit: Callable[..., None], numerator: str, run: Run) -> None:
    """Between steps. A bfloat16 moment is rounded by the place that its parameter has now."""
    fisher = FISHERS[(EDITS.index(edit) + begun) % 3]
    twins = Twins(run, numerator=numerator, fisher=fisher, state_dtype=torch.bfloat16)
    twins.step(2 if begun else 0)
    twins.edit(edit)
    twins.step(3)
    mine = {id(p) for group in twins.optimizer.param_groups for p in group["params"]}
    assert hooks(twins.params[0]) == [int(id(p) in mine) for p in twins.params[0]]
    assert {id(p) for p in twins.optimizer.state} == mine
    assert twins.alike()
    twins.optimizer.state_dict()


@on_cpu
@pytest.mark.parametrize("edit", EDITS, ids=name_of)
def test_released_gradients_of_edited_groups(edit: Callable[..., None], run: Run) -> None:
    """Those of new parameters are, too, once a step has met them."""
    twins = Twins(run, release=True)
    twins.step(2)
    twins.edit(edit)
    twins.step(2)
    twins.backward()
    mine = {id(p) for group in twins.optimizer.param_groups for p in group["params"]}
    assert [p.grad is None for p in twins.params[0]] == [id(p) in mine for p in twins.params[0]]
    for optimizer in twins.optimizers:
        optimizer.step()
    assert twins.alike()


@pytest.mark.parametrize(
    "edit", [edit for edit in EDITS if edit not in (clear_and_add, clear_and_add_two, nothing)], ids=name_of
)
@pytest.mark.parametrize("numerator", NUMERATORS)
def test_groups_that_are_edited_between_backward_and_step(numerator: str, edit: Callable[..., None], run: Run) -> None:
    """It is refused; when they are back as they were, the step is taken."""
    twins = Twins(run, numerator=numerator)
    twins.step(2)
    optimizer = twins.optimizer
    twins.backward()
    groups = [{**group, "params": list(group["params"])} for group in optimizer.param_groups]
    state = dict(optimizer.state)
    edit(optimizer, twins.params[0])
    before = snapshot(optimizer)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"param_groups were edited between backward\(\) and step\(\)"):
            optimizer.step()
    assert same_bits(before, snapshot(optimizer))
    optimizer.param_groups[:] = groups
    optimizer.state.update(state)
    for one in twins.optimizers:
        one.step()
    twins.step(2)
    assert twins.alike()


@on_cpu
def test_groups_that_are_edited_when_no_gradient_was_taken(run: Run) -> None:
    """Gradients by hand are taken for the parameters that are there."""
    twins = Twins(run)
    twins.step()
    for params in twins.params:
        for p in params:
            p.grad = torch.full_like(p, 0.5)
    twins.edit(reverse)
    for optimizer in twins.optimizers:
        optimizer.step()
    twins.step(2)
    assert twins.alike()


@pytest.mark.parametrize("numerator", NUMERATORS)
@pytest.mark.parametrize(("name", "value"), [("max_grad_norm", 1e-3), ("skip_nonfinite", True)])
def test_what_needs_the_whole_gradient_is_set_too_late(name: str, value: Any, numerator: str, run: Run) -> None:
    twins = Twins(run, numerator=numerator)
    twins.step()
    twins.backward()
    whole = twins.optimizer.param_groups[0]
    before = whole[name]
    whole[name] = value
    taken = snapshot(twins.optimizer)
    with pytest.raises(ValueError, match=rf"in_backward=True with {name}=.* is impossible"):
        twins.optimizer.step()
    assert same_bits(taken, snapshot(twins.optimizer))
    whole[name] = before
    for optimizer in (twins.optimizer, twins.plain):
        optimizer.step()
    assert twins.alike()


@on_cpu
def test_a_parameter_that_is_there_twice(run: Run) -> None:
    twins = Twins(run)
    twins.step()
    group = twins.optimizer.param_groups[2]["params"]
    group.append(twins.params[0][1])
    with pytest.raises(ValueError, match=r"parameter 2 of group 2 is also parameter 1 of group 0: list each"):
        twins.backward()
    del group[-1]
    before = snapshot(twins.plain)
    assert same_bits(before, snapshot(twins.optimizer))
    twins.step()
    assert twins.alike()


@on_cpu
def test_a_parameter_of_another_optimizer(run: Run) -> None:
    twins = Twins(run)
    other = made([twins.params[0][5]], run)
    append(twins.optimizer, twins.params[0])
    with pytest.raises(ValueError, match=r"parameter 2 of group 0: another optimizer with in_backward=True takes its"):
        twins.backward()
    assert not twins.optimizer.state
    other.remove_hooks()
    append(twins.plain, twins.params[1])
    give_state(twins.plain)
    twins.step(2)
    assert alike(twins.optimizer, twins.plain, 1e-6)


@on_cpu
@pytest.mark.parametrize("requires_grad", [True, False])
def test_a_new_parameter_at_the_address_of_an_old_one(requires_grad: bool, run: Run) -> None:
    """Identities are compared by addresses, which come again when a parameter is gone."""
    kept = nn.Parameter(torch.ones(2))
    groups = [{"params": [nn.Parameter(torch.ones(3), requires_grad), kept]}]
    optimizer = made(groups, run)
    lists = optimizer.param_groups[0]["params"]
    backward([kept], [torch.ones(2)])
    optimizer.step()
    old = id(lists[0])
    groups.clear()
    values = [torch.full((3,), 2.0) for _ in range(100)]
    del lists[0]
    made_since = [nn.Parameter(x, requires_grad) for x in values]
    new = next((p for p in made_since if id(p) == old), None)
    assert new is not None, "the address did not come again"
    lists.insert(0, new.requires_grad_(True))
    for p in (new, kept):
        p.grad = None
    for _ in range(2):
        backward([new, kept], [torch.ones(3), torch.ones(2)])
        optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in (new, kept)] == [2, 3]
    assert hooks([new, kept]) == [int(requires_grad), 1]


@on_cpu
def test_parameters_are_not_kept(run: Run) -> None:
    """Nor watched by weak references, which torch.utils.swap_tensors() refuses."""
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = made([p], run)
    twin = plain([q], run)
    for param, one in ((p, optimizer), (q, twin)):
        backward([param], [torch.ones(3)])
        one.step()
        param.grad = None
        torch.utils.swap_tensors(param, nn.Parameter(torch.zeros(3)))
        backward([param], [torch.ones(3)])
        one.step()
    assert alike(optimizer, twin)


@on_cpu
def test_hooks_that_others_take_away(run: Run) -> None:
    """They are put back with the next step; gradients that came without are taken in the step."""
    twins = Twins(run, numerator="gradient")
    twins.step()
    for p in twins.params[0]:
        if p._post_accumulate_grad_hooks:  # type: ignore[attr-defined]
            p._post_accumulate_grad_hooks.clear()  # type: ignore[attr-defined]
    twins.step(2)
    assert hooks(twins.params[0]) == [1] * 5 + [0] * 2
    assert twins.alike()


@on_cpu
def test_many_groups_are_added_without_going_over_all_of_them(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[Tensor] = []
    surveys: list[None] = []
    check, survey = in_backward.check_unwatched, in_backward.InBackward._find_parameters
    monkeypatch.setattr(in_backward, "check_unwatched", lambda p, *more: (looked_at.append(p), check(p, *more)))
    monkeypatch.setattr(in_backward.InBackward, "_find_parameters", lambda self: (surveys.append(None), survey(self)))
    twins = [[nn.Parameter(torch.full((2,), float(i))) for i in range(40)] for _ in range(2)]
    optimizers = [made(twins[0][:1], run), plain(twins[1][:1], run)]
    looked_at.clear()
    surveys.clear()
    for optimizer, params in zip(optimizers, twins, strict=True):
        for p in params[1:]:
            optimizer.add_param_group({"params": p})
    assert len(looked_at) == 39
    assert not surveys
    give_state(optimizers[1])
    for _ in range(2):
        for optimizer, params in zip(optimizers, twins, strict=True):
            optimizer.zero_grad()
            backward(params, [torch.ones(2)] * 40)
            optimizer.step()
    assert len(surveys) == 1
    assert hooks(twins[0]) == [1] * 40
    assert alike(optimizers[0], optimizers[1], None if run.backend == "cpu" else 1e-6)
    assert in_backward_of(optimizers[0])._group_of == list(range(40))


def test_copies_of_edited_groups(run: Run) -> None:
    twins = Twins(run)
    twins.step()
    twins.edit(reverse)
    params, optimizer = copy.deepcopy((twins.params[0], twins.optimizer))
    twins.step()
    generator = torch.Generator().manual_seed(9)
    for p in params:
        p.grad = None
    backward(params, [torch.randn(p.shape, generator=generator).to(p.device) for p in params])
    optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in params[:5]] == [2] * 5
    assert twins.alike()


@on_cpu
@pytest.mark.parametrize(
    "settings",
    [{"numerator": "gradient"}, {"numerator": "nesterov", "momentum": 0.5}, {"maximize": True}],
    ids=str,
)
def test_what_has_entered_the_moment_is_not_undone_by_settings(settings: dict[str, Any], run: Run) -> None:
    """The kind of a step, and how gradients enter moments, are read at its first gradient."""
    twins = Twins(run)
    twins.step(2)
    twins.backward()
    for group in twins.optimizer.param_groups:
        group.update(settings, lr=0.02)
    for group in twins.plain.param_groups:
        group["lr"] = 0.02
    for optimizer in twins.optimizers:
        optimizer.step()
    assert twins.alike()


@on_cpu
def test_a_diagonal_that_is_set_too_late(run: Run) -> None:
    """The gradients are in the moments of the other kind of step, for which rho=None is no value."""
    twins = Twins(run)
    twins.step()
    twins.backward()
    groups = [dict(group) for group in twins.optimizer.param_groups]
    before = snapshot(twins.optimizer)
    for group in twins.optimizer.param_groups:
        group.update(diagonal="factored", rho=None)
    with pytest.raises(ValueError, match=r"parameter group 0: .*rho=None"):
        twins.optimizer.step()
    assert same_bits(before, snapshot(twins.optimizer))
    for group, was in zip(twins.optimizer.param_groups, groups, strict=True):
        group.update(was)
    for optimizer in twins.optimizers:
        optimizer.step()
    assert twins.alike()


@on_cpu
def test_state_in_another_mapping(run: Run) -> None:
    twins = Twins(run)
    twins.step()
    for optimizer in twins.optimizers:
        optimizer.state = UserDict(optimizer.state)  # type: ignore[assignment]
    twins.step(2)
    assert twins.alike()


CONVERSIONS: list[tuple[torch.dtype, str | None]] = [
    (torch.bfloat16, "master_bits"),
    (torch.float16, "kahan"),
    (torch.float64, None),
]


@on_cpu
@pytest.mark.parametrize(("dtype", "lost"), CONVERSIONS, ids=str)
def test_a_model_that_is_converted_between_backward_and_step(dtype: torch.dtype, lost: str | None, run: Run) -> None:
    """Its weights get what their new dtype needs; where the moment does not fit, this is said by name."""
    twins = Twins(run, release=True)
    twins.step(2)
    twins.backward()
    for p in (p for params in twins.params for p in params):
        p.data = p.data.to(dtype)
    if lost is None:
        before = snapshot(twins.optimizer)
        for _ in range(2):
            with pytest.raises(ValueError, match=r"state of parameter 0 .* expected shape \(5,\), float64, cpu: after"):
                twins.optimizer.step()
        assert same_bits(before, snapshot(twins.optimizer))
        for p in (p for params in twins.params for p in params):
            p.data = p.data.float()
    for optimizer in twins.optimizers:
        optimizer.step()
    assert all(lost is None or lost in known for known in twins.optimizer.state.values())
    assert twins.alike()
