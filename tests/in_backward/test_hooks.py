"""The hooks of ``in_backward=True``: whose they are, and how long they stay."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from sofim_fused import SOFIM, in_backward, native
from tests.in_backward.support import NUMERATORS, Pair, backward, both_ways, hooks, made, on_cpu, plain, three_batches
from tests.support.problems import give, same_bits, snapshot
from tests.support.runs import Run


@on_cpu
@pytest.mark.parametrize("release", [False, True])
def test_remove_hooks(release: bool, run: Run) -> None:
    """From then on step() takes all gradients; also those of a step that is under way."""
    pair = Pair(run, decay="l2", release=release, numerator="gradient")
    batches = list(pair.gradients(5))
    for count, grads in enumerate(batches):
        if count == 2:
            pair.optimizer.remove_hooks()
            pair.optimizer.remove_hooks()
            assert hooks(pair.params) == [0] * len(pair.params)
        before = snapshot(pair.optimizer)
        pair.backward(grads)
        assert same_bits(before, snapshot(pair.optimizer)) == (count >= 2)
        if count == 1:
            pair.optimizer.remove_hooks()
        pair.step()
    assert pair.alike()
    pair.plain.remove_hooks()


@on_cpu
def test_without_hooks_gradients_add_up_as_ever(run: Run) -> None:
    pair = Pair(run)
    first, second, _ = three_batches(pair)
    pair.optimizer.remove_hooks()
    for grads in (first, second):
        backward(pair.params, grads)
        backward(pair.plain_params, grads)
    pair.step()
    assert pair.alike()


@on_cpu
def test_removed_hooks_do_not_come_back(run: Run) -> None:
    """With a group that is added later, or with loaded state."""
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = made([p], run)
    optimizer.remove_hooks()
    optimizer.add_param_group({"params": [q]})
    optimizer.load_state_dict(optimizer.state_dict())
    assert hooks([p, q]) == [0, 0]
    backward([p, q], [torch.ones(3), torch.ones(3)])
    assert not optimizer.state
    optimizer.step()
    assert [int(optimizer.state[x]["step"]) for x in (p, q)] == [1, 1]


@on_cpu
def test_hooks_go_with_the_optimizer(run: Run) -> None:
    pair = Pair(run)
    assert hooks(pair.params) == [1] * len(pair.params)
    (grads,) = pair.gradients(1)
    pair.backward(grads)
    pair.optimizer.step()
    before = [p.detach().clone() for p in pair.params]
    pair.optimizer = pair.plain
    gc.collect()
    assert hooks(pair.params) == [0] * len(pair.params)
    backward(pair.params, grads)
    assert same_bits(before, [p.detach() for p in pair.params])


@on_cpu
def test_an_optimizer_is_gone_at_once(run: Run) -> None:
    """Nothing of its own keeps it in a cycle: its moments would stay until Python looks for cycles."""
    p = nn.Parameter(torch.ones(3))
    optimizer = made([p], run)
    backward([p], [torch.ones(3)])
    moment = StorageWeakRef(optimizer.state[p]["exp_avg"].untyped_storage())
    gc.disable()
    try:
        del optimizer
        assert moment.expired()
        assert hooks([p]) == [0]
    finally:
        gc.enable()


@on_cpu
def test_one_optimizer_at_a_time_takes_a_parameter_s_gradients(run: Run) -> None:
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    first = made([p], run)
    refused = pytest.raises(
        ValueError, match=r"parameter 1 of group 0: another optimizer with in_backward=True .* remove_hooks\(\)"
    )
    with refused:
        made([q, p], run)
    assert hooks([p, q]) == [1, 0]
    other = made([q], run)
    with pytest.raises(ValueError, match=r"parameter 0 of group 1: another optimizer with in_backward=True"):
        other.add_param_group({"params": [p]})
    assert len(other.param_groups) == 1
    SOFIM([p, q], backend=run.backend)  # a plain one may have them
    first.remove_hooks()
    second = made([p], run)
    backward([p], [torch.ones(3)])
    assert len(first.state) == 0
    assert len(second.state) == 1
    del second
    made([p], run)


@on_cpu
def test_a_cycle_does_not_keep_parameters(run: Run) -> None:
    """Schedulers of some versions of PyTorch keep their optimizer in one."""
    p = nn.Parameter(torch.ones(3))
    optimizer: Any = made([p], run)
    optimizer.itself = optimizer
    gc.disable()
    try:
        del optimizer
        assert hooks([p]) == [1]
        second = made([p], run)
        assert hooks([p]) == [1]
    finally:
        gc.enable()
    backward([p], [torch.ones(3)])
    assert len(second.state) == 1


@on_cpu
@pytest.mark.parametrize("numerator", NUMERATORS)
def test_groups_that_are_added_later(numerator: str, run: Run) -> None:
    """They are watched from then on."""

    def start() -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        params = [nn.Parameter(torch.linspace(-1, 1, n)) for n in (4, 3, 6, 1)]
        return params[:2], params

    def work(optimizer: SOFIM, params: list[nn.Parameter]) -> None:
        for step in range(6):
            if step in (2, 4):
                optimizer.add_param_group({"params": params[step // 2 + 1], "lr": 0.1 * step, "momentum": 0.5})
            present = params[: 2 + step // 2]
            optimizer.zero_grad()
            backward(present, [torch.linspace(0, 1 + step, p.numel()) for p in present])
            assert optimizer._backward is None or len(optimizer.state) == len(present)
            optimizer.step()

    assert both_ways(run, start, work, numerator=numerator)


@on_cpu
def test_step_hooks_and_a_closure(run: Run) -> None:
    pair = Pair(run, numerator="gradient")
    seen: list[str] = []
    pair.optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    pair.optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    for grads in pair.gradients(3):

        def closure(params: Sequence[Tensor], grads: Sequence[Tensor | None] = grads) -> float:
            pair.zero_grad()
            backward(params, grads)
            seen.append("closure")
            return 7.0

        assert pair.optimizer.step(lambda: closure(pair.params)) == 7.0
        assert pair.plain.step(lambda: closure(pair.plain_params)) == 7.0
    assert seen == ["before", "closure", "after", "closure"] * 3
    assert pair.alike()


@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        *({"numerator": numerator} for numerator in NUMERATORS),
        *({"diagonal": diagonal, "rho": None, "numerator": "nesterov"} for diagonal in ("factored", "element")),
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_after_the_first_step_a_backward_pass_calls_python_once(
    options: dict[str, Any], release: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For its first gradient: settings are read once in a step. The others are taken by the native hook alone."""
    run = Run("cpu", "cpu")
    params = [nn.Parameter(torch.randn(3, 4)) for _ in range(5)]
    optimizer = made(params, run, release_grads=release, **options)
    beside = [nn.Parameter(p.detach().clone()) for p in params]
    other = plain(beside, run, **options)
    calls = []
    on_gradient = in_backward.InBackward.on_gradient

    def counted(self: in_backward.InBackward, place: Any, param: Tensor) -> None:
        calls.append(place.ordinal)
        on_gradient(self, place, param)

    monkeypatch.setattr(in_backward.InBackward, "on_gradient", counted)
    for expected in (5, 1, 1):
        grads = [torch.randn(3, 4) for _ in params]
        calls.clear()
        backward(params, grads)
        assert len(calls) == expected
        assert all((p.grad is None) == release for p in params)
        optimizer.step()
        optimizer.zero_grad()
        give(beside, grads)
        other.step()
    assert same_bits(params, beside)

    calls.clear()  # what the native hook leaves to Python
    adds_up = not release or options == {"numerator": "moment"}
    with optimizer.accumulate_grads() if adds_up else nullcontext():
        backward(params, grads)
    assert len(calls) == (5 if adds_up else 1)


def test_the_order_of_state_does_not_matter_to_hooks() -> None:
    """They remember where each parameter's state is, and its dict may be changed."""
    run = Run("cpu", "cpu")
    params = [nn.Parameter(torch.randn(3, 4)) for _ in range(5)]
    beside = [nn.Parameter(p.detach().clone()) for p in params]
    optimizer, other = made(params, run), plain(beside, run)
    for step in range(8):
        if step == 2:  # the same entries in another order
            kept = dict(optimizer.state)
            optimizer.state.clear()
            optimizer.state.update((p, kept[p]) for p in [*params[3:], *params[:3]])
        if step == 4:
            del optimizer.state[params[1]], other.state[beside[1]]
        if step == 6:
            optimizer.load_state_dict(optimizer.state_dict())
            other.load_state_dict(other.state_dict())
        grads = [torch.randn(3, 4) for _ in params]
        backward(params, grads)
        optimizer.step()
        optimizer.zero_grad()
        give(beside, grads)
        other.step()
    assert same_bits(params, beside)


def test_a_step_that_was_begun_does_not_keep_parameters() -> None:
    """The native part holds the optimizer's state from a backward pass to the step; hooks do not hold it."""
    params = [nn.Parameter(torch.randn(3, 4)) for _ in range(3)]
    optimizer = made(params, Run("cpu", "cpu"))
    for _ in range(2):
        backward(params, [torch.randn(3, 4) for _ in params])
        optimizer.step()
    backward(params, [torch.randn(3, 4) for _ in params])
    gone = [weakref.ref(optimizer), *(weakref.ref(p) for p in params)]
    gc.disable()
    try:
        del optimizer
        assert gone[0]() is None
        backward(params, [torch.randn(3, 4) for _ in params])  # adds up in param.grad
        del params
        assert not any(x() for x in gone)
    finally:
        gc.enable()


def test_a_hook_by_hand() -> None:
    """What the native hook calls, and what it takes."""
    module = native.cpu()
    assert not isinstance(module, str)
    seen = []
    hook = module.Hook(seen.append)
    p = nn.Parameter(torch.ones(3))
    assert hook(p) is None
    assert seen == [p]
    hook.place(module.Step(), 0)  # is gone at once
    hook(p)
    step = module.Step()
    hook.place(step, 5)  # has no parameter 5
    hook(p)
    assert len(seen) == 3
    for arguments, message in (((), "one argument"), ((p, p), "one argument")):
        with pytest.raises(TypeError, match=message):
            hook(*arguments)
    for arguments, message in (((step,), "2 arguments"), ((p, 0), "a Step or None"), ((step, "0"), "int")):
        with pytest.raises(TypeError, match=message):
            hook.place(*arguments)
    with pytest.raises(TypeError):
        module.Hook()
    for wrong in (([], bytearray(1)), ({}, b"0")):
        with pytest.raises(TypeError, match="is needed"):
            step.serve_hooks(*wrong)

    def fail(_: Tensor) -> None:
        raise ValueError("as it is")

    with pytest.raises(ValueError, match="as it is"):
        module.Hook(fail)(p)


def test_a_compiled_backward_pass_calls_hooks() -> None:
    """Compiled autograd cannot trace the native hook, and calls it."""
    params = [nn.Parameter(torch.randn(3, 4)) for _ in range(2)]
    beside = [nn.Parameter(p.detach().clone()) for p in params]
    optimizer, other = made(params, Run("cpu", "cpu")), plain(beside, Run("cpu", "cpu"))
    compiled = torch.compile(backward, backend="eager")
    for _ in range(3):
        grads = [torch.randn(3, 4) for _ in params]
        with torch._dynamo.config.patch(compiled_autograd=True):
            compiled(params, grads)
        optimizer.step()
        optimizer.zero_grad()
        give(beside, grads)
        other.step()
    assert same_bits(params, beside)
