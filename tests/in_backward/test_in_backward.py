"""Gradients that are taken in the backward pass (``in_backward=True``): the results are those of a plain optimizer."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import lr_scheduler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from sofim_fused import SOFIM, in_backward
from tests.backends.test_cuda import launches
from tests.optimizer.test_optimizer import saved_and_loaded, small_model, train
from tests.support.oracle import real64
from tests.support.problems import Problem, give, give_state, mixed_problem, same_bits, snapshot
from tests.support.runs import EMULATED, INTERPRETED, Run, once

DOUBLE = (torch.float64, torch.complex128)
NUMERATORS = ["moment", "gradient"]
FISHERS = ["model", "group", "parameter"]
EXACT = ("cpu", "reference")  # backends that take a step in parts to the bit

on_cpu = pytest.mark.parametrize("run", [pytest.param(Run(name, "cpu"), id=name, marks=once) for name in EXACT])
"""For tests that have no more to find on other backends."""


def backward(params: Sequence[Tensor], grads: Sequence[Tensor | None], **options: Any) -> None:
    """A backward pass in which these are the parameters' gradients, to the bit."""
    terms = [
        ((p * g.conj()).real if p.is_complex() else p * g).sum().double()
        for p, g in zip(params, grads, strict=True)
        if g is not None
    ]
    if terms:
        torch.stack(terms).sum().backward(**options)


def hooks(params: Sequence[Tensor]) -> list[int]:
    """How many hooks each parameter has for its gradient."""
    return [len(getattr(p, "_post_accumulate_grad_hooks", None) or ()) for p in params]


def made(params: Any, run: Run, **options: Any) -> SOFIM:
    """An optimizer that takes gradients in the backward pass."""
    return SOFIM(params, backend=run.backend, in_backward=True, **options)


def plain(params: Any, run: Run, **options: Any) -> SOFIM:
    """One that does not. On a CPU its first step is a native one too: the passes' may differ in a last bit."""
    optimizer = SOFIM(params, backend=run.backend, **options)
    if run.backend == "cpu":
        give_state(optimizer)
    return optimizer


def both_ways(
    run: Run,
    start: Callable[[], tuple[Any, Any]],
    work: Callable[[SOFIM, Any], None],
    *,
    release: bool = False,
    tolerance: float | None = None,
    **options: Any,
) -> bool:
    """Whether ``work`` comes to the same with and without ``in_backward``.

    ``start`` makes what an optimizer takes, and what ``work`` takes besides the optimizer.
    """
    optimizers = []
    for make, more in ((made, {"release_grads": release}), (plain, {})):
        params, model = start()
        optimizer = make(params, run, **options, **more)
        work(optimizer, model)
        optimizers.append(optimizer)
    return alike(optimizers[0], optimizers[1], tolerance)


def in_backward_of(optimizer: SOFIM) -> in_backward.InBackward:
    assert optimizer._backward is not None
    return optimizer._backward


class Pair:
    """A problem twice: for an optimizer that takes gradients in the backward pass, and for a plain one."""

    def __init__(
        self,
        run: Run,
        dtype: torch.dtype | Sequence[torch.dtype] = torch.float32,
        decay: str = "none",
        *,
        release: bool = False,
        layouts: Sequence[str] = (),
        **options: Any,
    ) -> None:
        self.run = run
        problems = [mixed_problem(dtype, decay, layouts=layouts or run.layouts, device=run.device) for _ in range(2)]
        self.problem: Problem = problems[0]
        self.params, self.plain_params = (problem.params for problem in problems)
        self.optimizer = made(problems[0].groups, run, release_grads=release, **copy.deepcopy(options))
        self.plain = plain(problems[1].groups, run, **copy.deepcopy(options))
        if run.ready:
            give_state(self.optimizer)
            give_state(self.plain)

    @property
    def both(self) -> tuple[tuple[SOFIM, list[Tensor]], tuple[SOFIM, list[Tensor]]]:
        return (self.optimizer, self.params), (self.plain, self.plain_params)

    def gradients(self, count: int) -> Iterator[list[Tensor | None]]:
        return islice(self.problem.gradients(), self.run.steps(count))

    def set(self, **settings: Any) -> None:
        for group in self.optimizer.param_groups + self.plain.param_groups:
            group.update(copy.deepcopy(settings))

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()
        self.plain.zero_grad()

    def backward(self, grads: Sequence[Tensor | None]) -> None:
        """The gradients, and no others: in a backward pass, and as they are for the plain optimizer."""
        self.zero_grad()
        backward(self.params, grads)
        give(self.plain_params, grads)

    def step(self) -> None:
        self.optimizer.step()
        self.plain.step()

    def moments(self) -> list[Tensor]:
        return [s["exp_avg"].clone() for s in self.optimizer.state.values() if "exp_avg" in s]

    def alike(self, tolerance: float | None = None) -> bool:
        """Whether all parameters and states are equal: to the bit where the backend is exact, unless ``tolerance``."""
        exact = self.run.backend in EXACT and self.run.device == "cpu"  # on a GPU products and sums are fused, or not
        return alike(self.optimizer, self.plain, tolerance or (None if exact else 1e-6))


def begun(optimizer: SOFIM) -> list[Tensor]:
    """What :func:`tests.support.problems.snapshot` has, without state that was made ahead."""
    states = {p: known for p, known in optimizer.state.items() if int(known["step"])}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [x for p in params for _, x in [("", p.detach()), *sorted(states.get(p, {}).items())]]


def alike(left: SOFIM, right: SOFIM, tolerance: float | None = None) -> bool:
    """Whether they are equal: to the bit, or to a tolerance, of each tensor's norm (for float64 a millionth of it)."""
    mine, theirs = begun(left), begun(right)
    if tolerance is None:
        return same_bits(mine, theirs)
    assert [x.dtype for x in mine] == [x.dtype for x in theirs]
    for a, b in zip(mine, theirs, strict=True):
        bound = tolerance * (1e-6 if b.dtype in DOUBLE else 1.0) * real64(b).norm()
        if not (real64(a) - real64(b)).norm() <= bound:
            return False
    return True


# Every kind of step

NARROW = (torch.bfloat16, torch.float32, torch.float16)
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "float64": (torch.float64, {}),
    "float32": (torch.float32, {}),
    "wide": ((torch.complex64, torch.float64, torch.float32), {}),
    "bf16-moments": (torch.float32, {"state_dtype": torch.bfloat16}),
    "narrow": (NARROW, {"state_dtype": torch.bfloat16, "kahan": True}),
    "narrow-without-kahan": ((torch.bfloat16, torch.complex128, torch.float16), {"kahan": False}),
}
CASES = [
    (numerator, FISHERS[(i + i // 6) % 3], release, kind, decay)
    for i, (numerator, kind, decay, release) in enumerate(
        product(NUMERATORS, KINDS, ["none", "decoupled", "l2"], [False, True])
    )
    if numerator == "moment" or not kind.startswith("narrow")
    if not (INTERPRETED and (i + i // 2) % 2)  # to a kernel it is one, whether a gradient stays
]


@pytest.mark.parametrize(("numerator", "fisher", "release", "kind", "decay"), CASES)
def test_equals_a_plain_optimizer(numerator: str, fisher: str, release: bool, kind: str, decay: str, run: Run) -> None:
    dtype, options = KINDS[kind]
    pair = Pair(run, dtype, decay, release=release, numerator=numerator, fisher=fisher, **options)
    for count, grads in enumerate(pair.gradients(7)):
        if count == 2:  # as schedulers do
            pair.set(lr=0.02, momentum=0.8, rho=1.1)
        pair.backward(grads)
        assert [p.grad is None for p in pair.params] == [release or g is None for g in grads]
        moments = pair.moments()
        pair.step()
        assert same_bits(moments, pair.moments())  # all of them were taken before
    assert pair.alike()


@on_cpu
@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("numerator", NUMERATORS)
def test_equals_a_plain_optimizer_above_the_size_of_a_tile(numerator: str, release: bool, run: Run) -> None:
    """Sums are put together from parts; the largest tensor is swept without Python's lock."""
    generator = torch.Generator().manual_seed(5)
    sizes = (40_001, (1 << 21) + 3, 70)
    values, *batches = ([1e-3 * torch.randn(n, generator=generator) for n in sizes] for _ in range(3))

    def start() -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        params = [nn.Parameter(x.clone()) for x in values]
        return params, params

    def work(optimizer: SOFIM, params: list[nn.Parameter]) -> None:
        for grads in batches:
            optimizer.zero_grad()
            backward(params, grads)
            optimizer.step()

    assert both_ways(run, start, work, release=release, numerator=numerator, rho=2.0)


class Watching(TorchDispatchMode):
    """Sees each operation, and lets it pass."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(str(func))
        return func(*args, **(kwargs or {}))


class Reluctant:
    """The native part of a step, which leaves some of it to the passes."""

    def __init__(self, native: Any, what: str) -> None:
        self._native = native
        self._what = what

    def __getattr__(self, name: str) -> Any:
        return getattr(self._native, name)

    def freeze_settings(self, *args: Any) -> bool:
        return self._what != "freeze_settings" and bool(self._native.freeze_settings(*args))

    def take(self, param: Tensor, state: Any, group: int, ordinal: int, again: bool) -> bool:
        refused = self._what == "take" or (self._what == "half" and ordinal % 2 == 0)
        return not refused and bool(self._native.take(param, state, group, ordinal, again))

    def finish(self, *args: Any) -> bool:
        return self._what != "finish" and bool(self._native.finish(*args))


@once
@pytest.mark.parametrize("what", ["freeze_settings", "take", "half", "finish"])
@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize(
    ("numerator", "dtype", "options"),
    [
        ("moment", NARROW, {"state_dtype": torch.bfloat16}),
        ("gradient", (torch.complex64, torch.float64, torch.float32), {}),
    ],
    ids=NUMERATORS,
)
def test_what_is_not_taken_natively_is_taken_by_passes(
    numerator: str, dtype: Any, options: dict[str, Any], fisher: str, what: str
) -> None:
    """All of it or a part, to the same bits."""
    pair = Pair(Run("cpu", "cpu"), dtype, "l2", numerator=numerator, fisher=fisher, **options)
    pair.plain._step_in_one_call = lambda *_: None
    mine = in_backward_of(pair.optimizer)
    mine._native = Reluctant(mine._native, what)
    for grads in pair.gradients(5):
        pair.backward(grads)
        pair.step()
    assert pair.alike()


@once
@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("numerator", NUMERATORS)
def test_on_a_cpu_all_of_it_is_native(numerator: str, release: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after a step that was not."""
    pair = Pair(Run("cpu", "cpu"), release=release, numerator=numerator)
    with Watching():
        pair.backward([torch.ones_like(p) for p in pair.params])
        pair.step()
    called: list[str] = []
    for name in ("_take_later", "_finish_by_passes"):
        monkeypatch.setattr(in_backward.InBackward, name, lambda *_, name=name: called.append(name))
    for grads in pair.gradients(4):
        pair.backward(grads)
        pair.step()
    assert called == []
    assert pair.alike()


@on_cpu
def test_in_a_dispatch_mode(run: Run) -> None:
    """Native parts leave a step to the passes there, and the mode sees what is done."""
    pair = Pair(run, decay="l2", numerator="gradient")
    ours = run.backend == "cpu"
    for count, grads in enumerate(pair.gradients(4)):
        if count % 2:
            with Watching() as mode:
                pair.backward(grads)
            assert any(("sofim_fused.accumulate_step" if ours else "_foreach_") in name for name in mode.seen)
            pair.step()
        else:
            pair.backward(grads)
            with Watching() as mode:
                pair.step()
            assert any(("sofim_fused.apply" if ours else "_foreach_") in name for name in mode.seen)
    assert pair.alike()


@on_cpu
@pytest.mark.parametrize("numerator", NUMERATORS)
def test_tensors_may_be_replaced_at_any_time(numerator: str, run: Run) -> None:
    """No pointer is kept: users replace ``param.data`` and state, also by what has gaps in memory."""
    pair = Pair(run, decay="l2", numerator=numerator)

    def replace() -> None:
        for optimizer, params in pair.both:
            for i, p in enumerate(params):
                p.data = p.data.clone()
                known = optimizer.state.get(p, {})
                known.update({name: x.clone() for name, x in known.items()})
                if known and i % 2 and p.dim():
                    known["exp_avg"] = known["exp_avg"].repeat_interleave(2, -1)[..., ::2]

    for grads in pair.gradients(5):
        replace()
        pair.backward(grads)
        replace()
        pair.step()
    assert pair.alike()


# Several backward passes for one step


def accumulated(pair: Pair, batches: Sequence[Sequence[Tensor | None]]) -> None:
    """All but the last one inside of the block."""
    pair.zero_grad()
    with pair.optimizer.accumulate_grads():
        for grads in batches[:-1]:
            backward(pair.params, grads)
    backward(pair.params, batches[-1])
    for grads in batches:
        backward(pair.plain_params, grads)


@pytest.mark.parametrize("decay", ["none", "l2"])
@pytest.mark.parametrize(
    ("numerator", "release", "dtype"),
    [
        ("moment", False, torch.float64),
        ("moment", False, NARROW),
        ("gradient", False, torch.float32),
        ("moment", True, torch.float64),
        ("moment", True, (torch.float32, torch.complex64)),
    ],
    ids=str,
)
def test_micro_batches_add_up(numerator: str, release: bool, dtype: Any, decay: str, run: Run) -> None:
    """Some parameters have gradients in the first, the second or the last micro-batch alone, or in none.

    What is released adds up in the moment, where it is rounded; L2 decay counts once all the same.
    """
    pair = Pair(run, dtype, decay, release=release, numerator=numerator)
    generator = torch.Generator().manual_seed(9)
    met = set()
    for step in range(run.steps(6)):
        batches: list[list[Tensor | None]] = []
        for batch in range(3):
            present = [(i + step) % 5 == 0 or (i + step) % 5 == batch + 1 for i in range(len(pair.params))]
            batches.append(
                [
                    torch.randn(p.shape, generator=generator).to(p) if there else None
                    for p, there in zip(pair.params, present, strict=True)
                ]
            )
        met |= {tuple(g is not None for g in grads) for grads in zip(*batches, strict=True)}
        accumulated(pair, batches)
        assert not release or all(p.grad is None for p in pair.params)
        pair.step()
    assert len(met) == 5
    assert pair.alike(1e-6 if release else None)


def three_batches(pair: Pair) -> list[list[Tensor | None]]:
    return list(islice(pair.problem.gradients(), 3, 6))


@on_cpu
@pytest.mark.parametrize("release", [False, True])
def test_blocks_may_be_nested(release: bool, run: Run) -> None:
    pair = Pair(run, torch.float64, release=release)
    first, second, third = three_batches(pair)
    with pair.optimizer.accumulate_grads():
        with pair.optimizer.accumulate_grads():
            backward(pair.params, first)
        backward(pair.params, second)
    backward(pair.params, third)
    for grads in (first, second, third):
        backward(pair.plain_params, grads)
    pair.step()
    assert pair.alike(1e-6)


@on_cpu
@pytest.mark.parametrize("release", [False, True])
def test_an_exception_ends_a_block(release: bool, run: Run) -> None:
    pair = Pair(run, torch.float64, release=release)
    first, second, third = three_batches(pair)

    def fail() -> None:
        with pair.optimizer.accumulate_grads():
            backward(pair.params, first)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    backward(pair.params, second)
    for grads in (first, second):
        backward(pair.plain_params, grads)
    pair.step()
    pair.backward(third)
    pair.step()
    assert pair.alike(1e-6)


@on_cpu
@pytest.mark.parametrize("release", [False, True])
def test_a_block_may_hold_the_last_pass_too(release: bool, run: Run) -> None:
    pair = Pair(run, torch.float64, "l2", release=release)
    for grads in three_batches(pair)[:2]:
        with pair.optimizer.accumulate_grads():
            backward(pair.params, grads)
        backward(pair.plain_params, grads)
    pair.step()
    assert pair.alike(1e-6)


@on_cpu
@pytest.mark.parametrize("same", [True, False])
def test_micro_batches_after_which_gradients_are_set_by_hand(same: bool, run: Run) -> None:
    pair = Pair(run, torch.float64, "l2", release=True)
    first, second, third = three_batches(pair)
    with pair.optimizer.accumulate_grads():
        backward(pair.params, first)
    first_again = [None if g is None else 2 * g for g in first]  # of these parameters alone, or of others too
    for grads in (first_again, second)[: 1 if same else 2]:
        for p, g in zip(pair.params, grads, strict=True):
            p.grad = g if p.grad is None else p.grad if g is None else p.grad + g
    for grads in (first, first_again, second)[: 2 if same else 3]:
        backward(pair.plain_params, grads)
    pair.step()
    pair.backward(third)
    pair.step()
    assert all(p.grad is None for p in pair.params)
    assert pair.alike(1e-6)


@on_cpu
def test_released_parts_are_not_enough_for_the_gradient_form(run: Run) -> None:
    pair = Pair(run, release=True, numerator="gradient")
    first, second, _ = three_batches(pair)
    with pytest.raises(ValueError, match="release_grads=True and numerator='gradient'"):  # noqa: SIM117
        with pair.optimizer.accumulate_grads():
            pytest.fail("the block was entered")
    for grads in (first, second):  # and all else goes on
        pair.backward(grads)
        pair.step()
    assert pair.alike()


@on_cpu
def test_a_block_of_a_plain_optimizer_does_nothing(run: Run) -> None:
    """So that one training loop serves both."""
    pair = Pair(run)
    first, _, _ = three_batches(pair)
    with pair.plain.accumulate_grads(), pair.plain.accumulate_grads():
        backward(pair.plain_params, first)
        pair.plain.step()
    backward(pair.params, first)
    pair.optimizer.step()
    assert pair.alike()


@on_cpu
@pytest.mark.parametrize("release", [False, True])
def test_no_step_inside_a_block(release: bool, run: Run) -> None:
    pair = Pair(run, torch.float64, release=release)
    first, second, _ = three_batches(pair)
    with pair.optimizer.accumulate_grads():
        backward(pair.params, first)
        before = snapshot(pair.optimizer)
        with pytest.raises(RuntimeError, match=r"step\(\) inside accumulate_grads\(\): leave the block"):
            pair.optimizer.step()
        assert same_bits(before, snapshot(pair.optimizer))
    backward(pair.params, second)
    for grads in (first, second):
        backward(pair.plain_params, grads)
    pair.step()
    assert pair.alike(1e-6)


@on_cpu
@pytest.mark.parametrize("release", [False, True])
def test_no_micro_batch_after_the_last(release: bool, run: Run) -> None:
    pair = Pair(run, release=release)
    first, second, _ = three_batches(pair)
    pair.backward(first)
    before = snapshot(pair.optimizer)
    with pytest.raises(RuntimeError, match=r"a second gradient .* before step\(\)"):  # noqa: SIM117
        with pair.optimizer.accumulate_grads():
            backward(pair.params, second)
    assert same_bits(before, snapshot(pair.optimizer))
    pair.step()
    assert pair.alike()


@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("numerator", NUMERATORS)
def test_a_second_pass_without_a_step(numerator: str, release: bool, run: Run) -> None:
    """It is refused at its first gradient, and the step goes on with those of the first."""
    pair = Pair(run, numerator=numerator, release=release)
    batches = list(islice(pair.problem.gradients(), 3, 6))
    for grads in batches:
        pair.backward(grads)
        before = snapshot(pair.optimizer)
        with pytest.raises(RuntimeError, match=r"Call step\(\) after each backward\(\).*accumulate_grads\(\)"):
            backward(pair.params, grads)
        assert same_bits(before, snapshot(pair.optimizer))
        pair.step()
    assert pair.alike()


@on_cpu
@pytest.mark.parametrize("numerator", NUMERATORS)
def test_passes_over_different_parameters_make_one_step(numerator: str, run: Run) -> None:
    """As with two losses, or ``backward(inputs=...)``: each parameter has one gradient."""
    pair = Pair(run, decay="l2", numerator=numerator)
    for grads in pair.gradients(4):
        pair.zero_grad()
        parts: list[list[Tensor | None]] = [
            [g if (i < 4) == first else None for i, g in enumerate(grads)] for first in (True, False)
        ]
        backward(pair.params, parts[0])
        backward(pair.params, grads, inputs=[p for i, p in enumerate(pair.params) if i >= 4 and grads[i] is not None])
        give(pair.plain_params, grads)
        pair.step()
    assert pair.alike()


# Gradients that no hook has seen


def by_hand(optimizer: SOFIM, params: list[Tensor], grads: list[Tensor | None]) -> None:
    optimizer.zero_grad()
    give(params, grads)
    optimizer.step()


def half_by_hand(optimizer: SOFIM, params: list[Tensor], grads: list[Tensor | None]) -> None:
    optimizer.zero_grad()
    backward(params, [g if i % 2 else None for i, g in enumerate(grads)])
    give(params[::2], grads[::2])
    optimizer.step()


def from_autograd_grad(optimizer: SOFIM, params: list[Tensor], grads: list[Tensor | None]) -> None:
    loss = torch.stack([(p * g).sum() for p, g in zip(params, grads, strict=True) if g is not None]).sum()
    give(params, torch.autograd.grad(loss, params, allow_unused=True))
    optimizer.step()


def by_hand_first(optimizer: SOFIM, params: list[Tensor], grads: list[Tensor | None]) -> None:
    """What a backward pass finds is added to it."""
    optimizer.zero_grad()
    give(
        params,
        [
            None if g is None or i % 3 else torch.empty_like(p).copy_(g)
            for i, (p, g) in enumerate(zip(params, grads, strict=True))
        ],
    )
    backward(params, grads)
    optimizer.step()


def unfrozen_later(optimizer: SOFIM, params: list[Tensor], grads: list[Tensor | None]) -> None:
    """Parameters that were frozen when the optimizer was made."""
    for p in params:
        p.requires_grad_(True)
    optimizer.zero_grad()
    backward(params, grads)
    optimizer.step()


def not_zeroed(optimizer: SOFIM, params: list[Tensor], grads: list[Tensor | None]) -> None:
    """Some of the old gradients are added to, others are met again by themselves."""
    backward(params, grads)
    optimizer.step()


def set_to_zero(optimizer: SOFIM, params: list[Tensor], grads: list[Tensor | None]) -> None:
    optimizer.zero_grad(set_to_none=False)
    backward(params, grads)
    optimizer.step()


def two_steps_in_a_row(optimizer: SOFIM, params: list[Tensor], grads: list[Tensor | None]) -> None:
    optimizer.zero_grad()
    backward(params, grads)
    optimizer.step()
    optimizer.step()


def frozen_now_and_then(optimizer: SOFIM, params: list[Tensor], grads: list[Tensor | None]) -> None:
    """Its old gradient counts as one, as for every optimizer of PyTorch's."""
    backward(params, [g if p.requires_grad else None for p, g in zip(params, grads, strict=True)])
    optimizer.step()
    params[2].requires_grad_(not params[2].requires_grad)


RELEASED = [by_hand, half_by_hand, from_autograd_grad, by_hand_first, unfrozen_later]
NEEDING_OLD_ONES = [not_zeroed, set_to_zero, two_steps_in_a_row, frozen_now_and_then]


@on_cpu
@pytest.mark.parametrize("numerator", NUMERATORS)
@pytest.mark.parametrize(
    ("take_step", "release"),
    [*product(RELEASED, [False, True]), *product(NEEDING_OLD_ONES, [False])],
)
def test_gradients_that_no_hook_has_seen(
    take_step: Callable[[SOFIM, list[Tensor], list[Tensor | None]], None], numerator: str, release: bool, run: Run
) -> None:
    batches = list(islice(mixed_problem(torch.float32).gradients(), 6))

    def start() -> tuple[list[dict[str, Any]], list[Tensor]]:
        problem = mixed_problem(torch.float32, "l2")
        for p in problem.params:
            p.requires_grad_(take_step is not unfrozen_later)
        return problem.groups, problem.params

    def work(optimizer: SOFIM, params: list[Tensor]) -> None:
        for grads in copy.deepcopy(batches):
            take_step(optimizer, params, grads)

    assert both_ways(run, start, work, release=release, numerator=numerator)


class _Wide(torch.autograd.Function):
    """Of a narrow parameter, with a gradient of float32."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, grad: Tensor) -> Tensor:
        ctx.save_for_backward(grad)
        return torch.zeros((), device=p.device)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0], None


wide_of: Callable[[Tensor, Tensor], Tensor] = _Wide.apply


@on_cpu
@pytest.mark.parametrize("release", [False, True])
def test_wide_gradients_of_narrow_parameters(release: bool, run: Run) -> None:
    """From a backward pass, and by hand."""
    pair = Pair(run, NARROW, release=release, state_dtype=torch.bfloat16)
    for count, grads in enumerate(pair.gradients(6)):
        wide = [None if g is None else g.float() * 1.001 for g in grads]
        give(pair.plain_params, wide)
        give(pair.params, wide)  # which lets gradients be wide
        if count % 2:
            pair.optimizer.zero_grad()
            losses = [wide_of(p, g) for p, g in zip(pair.params, wide, strict=True) if g is not None]
            torch.stack(losses).sum().backward()
            assert release or [p.grad is None for p in pair.params] == [g is None for g in grads]
            assert release or all(p.grad is None or p.grad.dtype == torch.float32 for p in pair.params)
        pair.step()
    assert pair.alike()


@on_cpu
@pytest.mark.parametrize("release", [False, True])
def test_a_step_without_gradients_does_nothing(release: bool, run: Run) -> None:
    pair = Pair(run, decay="decoupled", release=release)
    pair.optimizer.step()
    assert not pair.optimizer.state
    (grads,) = pair.gradients(1)
    pair.backward(grads)
    pair.step()
    pair.zero_grad()
    pair.step()
    assert pair.alike()


@on_cpu
def test_gradients_are_taken_before_anything_is_done_to_them(run: Run) -> None:
    """Nothing waits beyond the backward pass. What is done is refused, as a plain step would see it."""
    pair = Pair(run, numerator="gradient")
    for grads in pair.gradients(3):
        pair.backward(grads)
        for p in pair.params:
            if p.grad is not None:
                p.grad.fill_(float("nan"))
        pair.optimizer.zero_grad()
        with pytest.raises(RuntimeError, match=r"was removed between backward\(\) and step\(\)"):
            pair.optimizer.step()
        pair.step()
    assert pair.alike()


# Models


class Shared(nn.Module):
    """Two blocks, each of which may be checkpointed, a layer that both have, and one behind them."""

    def __init__(self, reentrant: bool | None = None, tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, 6)
        self.order = [(0, 1), (0, 2)] if tied else [(0,), (1, 2)]
        self.reentrant = reentrant

    def block(self, x: Tensor, index: int) -> Tensor:
        for layer in self.order[index]:
            x = self.layers[layer](x).tanh()
        return x

    def forward(self, x: Tensor) -> Tensor:
        for index in range(2):
            if self.reentrant is None:
                x = self.block(x, index)
            else:
                x = checkpoint(self.block, x, index, use_reentrant=self.reentrant)
        out: Tensor = self.head(x)
        return out


def loss_of(model: nn.Module, step: int) -> Tensor:
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step), requires_grad=True)
    loss: Tensor = model(x).square().sum()
    return loss


def shared(*args: Any) -> Callable[[], tuple[Any, Shared]]:
    def start() -> tuple[Any, Shared]:
        model = Shared(*args)
        return model.parameters(), model

    return start


@on_cpu
@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("numerator", NUMERATORS)
@pytest.mark.parametrize(("reentrant", "tied"), [(None, True), (False, True), (False, False), (True, False)], ids=str)
def test_shared_layers_and_checkpoints(
    reentrant: bool | None, tied: bool, numerator: str, release: bool, run: Run
) -> None:
    def work(optimizer: SOFIM, model: Shared) -> None:
        for step in range(4):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()

    assert both_ways(run, shared(reentrant, tied), work, release=release, numerator=numerator)


@on_cpu
@pytest.mark.parametrize("release", [False, True])
def test_a_shared_layer_in_reentrant_checkpoints(release: bool, run: Run) -> None:
    """It has two gradients in one backward pass, which cannot be told from those of two passes, but may add up."""
    model = Shared(reentrant=True)
    optimizer = made(model.parameters(), run, release_grads=release)
    with pytest.raises(RuntimeError, match=r"re-entrant checkpointing: pass use_reentrant=False"):
        loss_of(model, 0).backward()
    assert optimizer.state

    def work(optimizer: SOFIM, model: Shared) -> None:
        for step in range(3):
            optimizer.zero_grad()
            with optimizer.accumulate_grads():
                loss_of(model, step).backward()
            optimizer.step()

    assert both_ways(run, shared(True), work, release=release, tolerance=1e-6, weight_decay=0.1)


@on_cpu
@pytest.mark.parametrize("numerator", NUMERATORS)
def test_a_graph_of_the_backward_pass(numerator: str, run: Run) -> None:
    """``create_graph=True``: gradients have a history, and gradient mode is on where they are taken."""

    def work(optimizer: SOFIM, model: Shared) -> None:
        for step in range(3):
            optimizer.zero_grad()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a cycle that keeps the graph
                loss_of(model, step).backward(create_graph=True)
            optimizer.step()
        assert not any(x.requires_grad for known in optimizer.state.values() for x in known.values())

    assert both_ways(run, shared(), work, numerator=numerator, weight_decay=0.1)


@on_cpu
@pytest.mark.parametrize("numerator", NUMERATORS)
def test_the_backward_pass_raises_version_counters(numerator: str, run: Run) -> None:
    """So that autograd notices what it would need as it was."""
    pair = Pair(run, numerator=numerator)
    for grads in pair.gradients(2):
        pair.backward(grads)
        pair.step()
    grads = [torch.ones_like(p) for p in pair.params]
    states = [pair.optimizer.state[p]["exp_avg"] for p in pair.params if p in pair.optimizer.state]
    before = [x._version for x in states], [p._version for p in pair.params]
    pair.backward(grads)
    assert all(x._version > old for x, old in zip(states, before[0], strict=True))
    assert all((p._version > old) == (numerator == "gradient") for p, old in zip(pair.params, before[1], strict=True))
    between = [p._version for p in pair.params]
    pair.step()
    assert all(p._version > old for p, old in zip(pair.params, between, strict=True))


@on_cpu
@pytest.mark.parametrize("numerator", NUMERATORS)
def test_threads(numerator: str, run: Run) -> None:
    """Two optimizers in two threads; their large gradients are taken without Python's lock."""

    def work(seed: int, results: dict[int, list[Tensor]]) -> None:
        generator = torch.Generator().manual_seed(seed)
        params = [nn.Parameter(torch.randn(n, generator=generator)) for n in (3, (1 << 21) + 1, 50)]
        optimizer = made(params, run, numerator=numerator, release_grads=True)
        for _ in range(3):
            backward(params, [1e-3 * torch.randn(p.shape, generator=generator) for p in params])
            optimizer.step()
        results[seed] = snapshot(optimizer)

    together: dict[int, list[Tensor]] = {}
    threads = [threading.Thread(target=work, args=(seed, together)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone: dict[int, list[Tensor]] = {}
    for seed in range(2):
        work(seed, alone)
        assert same_bits(together[seed], alone[seed])


@on_cpu
@pytest.mark.parametrize("what", ["step", "all of it"])
@pytest.mark.parametrize("numerator", NUMERATORS)
def test_compiled(numerator: str, what: str, run: Run) -> None:
    """A step, or a function that runs the backward pass too."""

    def work(optimizer: SOFIM, model: Shared) -> None:
        torch._dynamo.reset()
        step: Callable[[], None] = optimizer.step
        if what == "step" and optimizer._backward:
            step = torch.compile(step, backend="eager")

        def train_on(x: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = model(x).square().sum()
            loss.backward()
            step()
            return loss

        train = torch.compile(train_on, backend="eager") if what != "step" and optimizer._backward else train_on
        for count in range(4):
            train(torch.linspace(-1, count, 12).view(2, 6))

    assert both_ways(run, shared(), work, numerator=numerator)


@pytest.mark.parametrize("numerator", NUMERATORS)
def test_a_model_that_is_moved_before_its_first_step(numerator: str, run: Run) -> None:
    """To a GPU, after the optimizer was made. (On a CPU it goes nowhere.)"""
    here = run if run.device == "cpu" else run._replace(backend="auto")
    optimizers = []
    for make in (made, plain):
        model = Shared()
        optimizer = make(model.parameters(), here, numerator=numerator)
        model.to(run.device)
        for count in range(2):
            optimizer.zero_grad()
            model(torch.linspace(-1, count, 12, device=run.device).view(2, 6)).square().sum().backward()
            optimizer.step()
        optimizers.append(optimizer)
    assert alike(optimizers[0], optimizers[1], None if run.backend in EXACT else 1e-6)


# Hooks


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


# Refusals


@on_cpu
@pytest.mark.parametrize(
    "options", [{"max_grad_norm": 1.0}, {"skip_nonfinite": True}, {"release_grads": "yes"}], ids=str
)
def test_a_refused_optimizer_leaves_no_hooks(options: dict[str, Any], run: Run) -> None:
    """The messages are in tests/optimizer/test_checks.py."""
    p = nn.Parameter(torch.ones(2))
    with pytest.raises((TypeError, ValueError), match=f"{next(iter(options))}="):
        made([p], run, **options)
    assert hooks([p]) == [0]


@on_cpu
@pytest.mark.parametrize("name", ["in_backward", "release_grads"])
def test_a_group_cannot_set_it(name: str, run: Run) -> None:
    with pytest.raises(ValueError, match=f"parameter group 0 sets {name}: pass it to the constructor"):
        plain([{"params": [nn.Parameter(torch.ones(2))], name: True}], run)


@on_cpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_form_with_narrow_parameters(dtype: torch.dtype, run: Run) -> None:
    """At construction, in a group that comes later, and after a cast."""
    wide, narrow = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3, dtype=dtype))
    message = r"parameter {} .*\(shape \(3,\), .*16, cpu\): in_backward=True with numerator='gradient' would round"
    with pytest.raises(ValueError, match=message.format("1 of group 0")):
        made([wide, narrow], run, numerator="gradient")
    assert hooks([wide, narrow]) == [0, 0]
    optimizer = made([wide], run, numerator="gradient")
    with pytest.raises(ValueError, match=message.format("0 of group 1")):
        optimizer.add_param_group({"params": [narrow]})
    assert len(optimizer.param_groups) == 1
    backward([wide], [torch.ones(2)])
    optimizer.step()  # and it works as before

    later = nn.Parameter(torch.ones(3))
    optimizer = made([later], run, numerator="gradient")
    later.data = later.data.to(dtype)
    with pytest.raises(ValueError, match=r"parameter 0 \(shape.*numerator='gradient' would round it twice"):
        backward([later], [torch.ones(3, dtype=dtype)])
    assert not optimizer.state
    assert later.tolist() == [1.0] * 3


@on_cpu
@pytest.mark.parametrize("begun", [False, True])
def test_the_gradient_form_loaded_for_narrow_parameters(begun: bool, run: Run) -> None:
    """It is refused whether there is state or not; and where it would act, if it was set in a group."""
    p, wide = nn.Parameter(torch.ones(3, dtype=torch.bfloat16)), nn.Parameter(torch.ones(3))
    optimizer, other = made([p], run), plain([wide], run, numerator="gradient", kahan=False)
    if begun:
        give([wide], [torch.ones(3)])
        other.step()
    else:
        other.state.clear()
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"parameter 0 of group 0 .* numerator='gradient' would round it twice"):
        optimizer.load_state_dict(other.state_dict())
    assert optimizer.param_groups[0]["numerator"] == "moment"
    optimizer.param_groups[0]["numerator"] = "gradient"
    with pytest.raises(ValueError, match="numerator='gradient' would round it twice"):
        backward([p], [torch.ones(3, dtype=torch.bfloat16)])
    assert same_bits(before, snapshot(optimizer))


@on_cpu
@pytest.mark.parametrize(("name", "value"), [("max_grad_norm", 0.5), ("skip_nonfinite", True)])
def test_a_guard_cannot_come_later(name: str, value: Any, run: Run) -> None:
    """With a loaded state, or set in a group."""
    pair = Pair(run)
    batches = list(pair.gradients(4))
    for grads in batches[:2]:
        pair.backward(grads)
        pair.step()
    before = snapshot(pair.optimizer)
    guarded = SOFIM(mixed_problem(torch.float32).groups, **{name: value})
    with pytest.raises(ValueError, match=rf"in_backward=True with {name}="):
        pair.optimizer.load_state_dict(guarded.state_dict())
    assert pair.optimizer.param_groups[0][name] in (None, False)
    for group in pair.optimizer.param_groups:
        group[name] = value
    with pytest.raises(ValueError, match=rf"in_backward=True with {name}="):
        backward(pair.params, batches[2])
    assert same_bits(before, snapshot(pair.optimizer))
    for group in pair.optimizer.param_groups:
        group[name] = {"max_grad_norm": None, "skip_nonfinite": False}[name]
    for grads in batches[2:]:
        pair.backward(grads)
        pair.step()
    assert pair.alike()


@on_cpu
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, r"parameter group 1: lr=-1\.0: it must be"),
        ({"lr": torch.tensor([0.1, 0.2])}, r"parameter group 1: lr is a tensor \(shape \(2,\)"),
        ({"momentum": 1.0}, r"parameter group 1: momentum=1\.0"),
        ({"fisher": "group"}, r"parameter group 1: fisher='group', but group 0 has 'model'"),
        ({"rho": None}, r"parameter group 1: rho=None: pass a float"),
        ("rho", r"parameter group 1: rho is missing"),
    ],
    ids=str,
)
def test_bad_settings_are_named_in_the_backward_pass(settings: Any, message: str, run: Run) -> None:
    pair = Pair(run)
    batches = list(pair.gradients(4))
    for grads in batches[:2]:
        pair.backward(grads)
        pair.step()
    before = snapshot(pair.optimizer)
    group = pair.optimizer.param_groups[1]
    kept = dict(group)
    if isinstance(settings, str):
        del group[settings]
    else:
        group.update(settings)
    with pytest.raises(ValueError if "pass a" not in message else TypeError, match=message):
        backward(pair.params, batches[2])
    assert same_bits(before, snapshot(pair.optimizer))
    group.update(kept)
    for grads in batches[2:]:
        pair.backward(grads)
        pair.step()
    assert pair.alike()


@on_cpu
def test_bad_settings_in_the_step(run: Run) -> None:
    """What is wrong is named, and a second try takes the step."""
    pair = Pair(run, decay="decoupled")
    for grads in pair.gradients(3):
        pair.backward(grads)
        before = snapshot(pair.optimizer)
        lr = pair.optimizer.param_groups[1]["lr"]
        pair.optimizer.param_groups[1]["lr"] = -1.0
        with pytest.raises(ValueError, match=r"parameter group 1: lr=-1\.0"):
            pair.optimizer.step()
        assert same_bits(before, snapshot(pair.optimizer))
        pair.optimizer.param_groups[1]["lr"] = lr
        pair.step()
    assert pair.alike()


@on_cpu
@pytest.mark.parametrize("release", [False, True])
def test_sparse_gradients(release: bool, run: Run) -> None:
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 1))
    optimizer = made(model.parameters(), run, release_grads=release)
    with pytest.raises(ValueError, match=r"gradient of parameter 0 of group 0 .* has the layout torch\.sparse_coo"):
        model(torch.tensor([1, 4])).sum().backward()
    assert model[0].weight not in optimizer.state


@on_cpu
def test_a_bad_gradient_by_hand(run: Run) -> None:
    """It is named, and nothing of the step is lost."""
    pair = Pair(run)
    for grads in pair.gradients(3):
        pair.zero_grad()
        backward(pair.params, [g if i % 2 else None for i, g in enumerate(grads)])
        pair.params[4].grad_dtype = None
        pair.params[4].grad = torch.zeros_like(pair.params[4], dtype=torch.float64)
        with pytest.raises(ValueError, match=r"gradient of parameter 1 of group 1 .* is float64"):
            pair.optimizer.step()
        for i, (p, g) in enumerate(zip(pair.params, grads, strict=True)):
            if not i % 2:
                p.grad = g
        give(pair.plain_params, grads)
        pair.step()
    assert pair.alike()


@on_cpu
@pytest.mark.parametrize("by_hand", [False, True])
def test_settings_after_a_refusal(by_hand: bool, run: Run) -> None:
    """Those of the first gradient that was taken hold, not those of the one that was refused."""
    table, other = (nn.Parameter(torch.ones(4, 2)) for _ in range(2))
    optimizer, twin = made([table], run, numerator="gradient"), plain([other], run, numerator="gradient")
    table.grad = torch.ones(4, 2).to_sparse() if by_hand else None
    loss = nn.functional.embedding(torch.tensor([1]), table, sparse=True).sum()
    with pytest.raises(ValueError, match=r"has the layout torch\.sparse_coo"):
        (optimizer.step if by_hand else loss.backward)()
    for ours in (optimizer, twin):
        ours.param_groups[0].update(lr=0.01, momentum=0.5)
        ours.zero_grad()
    backward([table, other], [torch.full((4, 2), 0.3)] * 2)
    optimizer.step()
    twin.step()
    assert alike(optimizer, twin)


@on_cpu
@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("what", ["none", "half"])
def test_a_backward_pass_that_fails(what: str, release: bool, run: Run) -> None:
    """What has come until then can still be stepped with."""
    pair = Pair(run, decay="l2", release=release, numerator="gradient")
    mine = in_backward_of(pair.optimizer)
    if mine._native is not None:
        mine._native = Reluctant(mine._native, what)
        pair.plain._step_in_one_call = (lambda *_: None) if what == "half" else None
    come: list[Tensor] = []
    for p in pair.params:
        p.register_post_accumulate_grad_hook(come.append)

    def fail(_: Tensor) -> None:
        raise KeyError("lost")

    for grads in three_batches(pair):
        come.clear()
        pair.zero_grad()
        handle = pair.params[3].register_hook(fail)
        with pytest.raises(KeyError, match="lost"):
            backward(pair.params, grads)
        handle.remove()
        assert 2 < len(come) < 7
        give(
            pair.plain_params,
            [g if any(p is x for x in come) else None for p, g in zip(pair.params, grads, strict=True)],
        )
        pair.step()
    assert pair.alike()


@on_cpu
@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("amp_fused", [False, True])
@pytest.mark.parametrize("unscaled", [False, True])
def test_a_gradient_scaler_is_refused(unscaled: bool, amp_fused: bool, release: bool, run: Run) -> None:
    model = small_model()
    optimizer = made(model.parameters(), run, release_grads=release, amp_fused=amp_fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(model(torch.ones(2, 4)).sum()).backward()
    if unscaled:
        scaler.unscale_(optimizer)
    weights = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="in_backward=True under a GradScaler is impossible"):
        scaler.step(optimizer)
    assert same_bits(weights, [p.detach() for p in model.parameters()])


@on_cpu
def test_a_gradient_scaler_that_is_switched_off(run: Run) -> None:
    def work(optimizer: SOFIM, model: Shared) -> None:
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        for step in range(3):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, step)).backward()
            scaler.step(optimizer)
            scaler.update()

    assert both_ways(run, shared(), work)


@once
@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs gloo"
)
def test_distributed_data_parallel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrapped before the optimizer is made, or after; models that are not replicated may be there too."""
    from torch.nn.parallel import DistributedDataParallel

    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        refused = "in_backward=True under DistributedDataParallel is impossible"
        model = small_model()
        replicated = DistributedDataParallel(model)
        with pytest.raises(ValueError, match=refused):
            SOFIM(model.parameters(), in_backward=True)
        assert hooks(list(model.parameters())) == [0] * 4

        later = small_model()
        optimizer = SOFIM(later.parameters(), in_backward=True)
        replicated_later = DistributedDataParallel(later)
        with pytest.raises(ValueError, match=refused):
            replicated_later(torch.ones(2, 4)).sum().backward()
        assert not optimizer.state

        other = small_model()
        train(other, SOFIM(other.parameters(), in_backward=True), 2)
        del replicated, replicated_later
        gc.collect()
        train(model, SOFIM(model.parameters(), in_backward=True), 2)
    finally:
        torch.distributed.destroy_process_group()


# How much waits, and how much is kept


def accumulates(optimizer: SOFIM, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The sizes of the tensors that the passes of an optimizer take, pass by pass, from now on."""
    sizes: list[list[int]] = []
    passes = optimizer._passes_for(optimizer.param_groups[0]["params"][0].device)
    take = passes.accumulate

    def noted(tensors: Any, *args: Any) -> Any:
        sizes.append([g.numel() for g in tensors.grads])
        return take(tensors, *args)

    monkeypatch.setattr(passes, "accumulate", noted)
    return sizes


def counted(work: Callable[[], None]) -> int | None:
    """How many kernels are launched, where that is counted."""
    if EMULATED:
        return launches(work)
    work()
    return None


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("numerator", NUMERATORS)
def test_small_gradients_are_taken_together(
    numerator: str, by_hand: bool, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a pass has a launch to pay for."""
    count = 40 if INTERPRETED else 200 if EMULATED else 1000
    params = [nn.Parameter(torch.full((3,), float(i), device=run.device)) for i in range(count)]
    optimizer = made(params, run, numerator=numerator)
    sizes = accumulates(optimizer, monkeypatch)
    for step in range(2):
        optimizer.zero_grad()
        grads: list[Tensor | None] = [torch.full_like(p, 1e-3 * (step + 1)) for p in params]
        if by_hand:
            give(params, grads)
            optimizer.step()
        else:
            launched = counted(partial(backward, params, grads))
            assert launched == (1 if EMULATED else None)
        assert sizes == ([] if run.backend == "cpu" else [[3] * count] * (step + 1))
        if not by_hand:
            optimizer.step()


@on_cpu
@pytest.mark.parametrize("numerator", NUMERATORS)
def test_large_gradients_do_not_wait(numerator: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_backward, "BATCH", 100)
    sizes = [30, 200, 5, 60, 60, 1, 100, 3]
    sweeps: list[list[int]] = []

    def start() -> tuple[list[dict[str, Any]], list[nn.Parameter]]:
        params = [nn.Parameter(torch.linspace(-1, 1, n)) for n in sizes]
        decayed = {"params": params[:3], "weight_decay": 0.1, "decoupled_weight_decay": False}  # of some sums alone
        return [decayed, {"params": params[3:]}], params

    def work(optimizer: SOFIM, params: list[nn.Parameter]) -> None:
        with monkeypatch.context() as patch:
            seen = accumulates(optimizer, patch)
            for step in range(3):
                optimizer.zero_grad()
                backward(params, [torch.linspace(0, step + 1, n) for n in sizes])
                optimizer.step()
        sweeps.extend(seen if optimizer._backward else [])

    assert both_ways(run, start, work, numerator=numerator)
    assert len(sweeps) == (0 if run.backend == "cpu" else 3 * 4)
    assert all(sum(sorted(sweep)[:-1]) < 100 for sweep in sweeps)  # none waits that need not


@pytest.mark.parametrize("numerator", NUMERATORS)
def test_released_gradients_are_gone(numerator: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any time there is one gradient, and where passes have launches what waits for one."""
    monkeypatch.setattr(in_backward, "BATCH", 250)
    seen: list[StorageWeakRef] = []
    most = 0

    def count(p: Tensor) -> None:
        nonlocal most
        assert p.grad is not None
        seen.append(StorageWeakRef(p.grad.untyped_storage()))
        most = max(most, sum(not storage.expired() for storage in seen))

    params = [nn.Parameter(torch.full((100,), float(i), device=run.device)) for i in range(12)]
    for p in params:
        p.register_post_accumulate_grad_hook(count)  # before the optimizer's
    optimizer = made(params, run, numerator=numerator, release_grads=True)
    for step in range(2):
        backward(params, [torch.full_like(p, 1e-3 * (step + 1)) for p in params])
        assert all(storage.expired() for storage in seen)
        assert all(p.grad is None for p in params)
        optimizer.step()
    assert len(seen) == 24
    assert most == (1 if run.backend == "cpu" else 3)


@on_cpu
def test_what_is_kept_does_not_grow_with_the_patterns_of_presence(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that are left out at random make a new one in nearly every step."""
    monkeypatch.setattr(in_backward, "INDICES", 8)
    generator = torch.Generator().manual_seed(4)
    pair = Pair(run, decay="l2", numerator="gradient")
    for _ in range(40):
        present = torch.rand(len(pair.params), generator=generator) < 0.6
        pair.backward([torch.ones_like(p) if there else None for p, there in zip(pair.params, present, strict=True)])
        pair.step()
        assert len(in_backward_of(pair.optimizer)._indices) <= 8
    assert pair.alike()
