"""Random models, settings and gradients: each step is the oracle's, and what leaves the mathematics as it is leaves
the update as it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sofim_fused import SOFIM
from sofim_fused.backends import Settings, reference, solve
from sofim_fused.step import hyperparameters
from tests.in_backward.support import backward
from tests.step.support import EPSILON, SMALLEST, full_weight, lost_bits, moment_of, within
from tests.support.oracle import Hyper, Oracle, real64
from tests.support.problems import Problem, give, give_state, same_bits, snapshot
from tests.support.runs import CPU_BACKENDS, once
from tests.support.strategies import CHECKED, SCHEDULES, Case, Ranges, cases, with_hypers

pytestmark = once
on_each_backend = pytest.mark.parametrize("backend", CPU_BACKENDS)

SINGLE = 1e-6  # what float32 arithmetic may do to a term, as in the matrix
DOUBLE = 1e-12
ULP = 2.0**-52


def optimizer_of(case: Case, problem: Problem, backend: str) -> SOFIM:
    optimizer = SOFIM(problem.groups, backend=backend, **case.whole)
    if case.ready:
        give_state(optimizer)
    return optimizer


def take(case: Case, optimizer: SOFIM, params: list[Tensor], grads: list[Tensor | None]) -> None:
    """One step, on whichever way gradients come."""
    if case.schedule in ("plain", "guarded"):
        give(params, grads)
    else:
        optimizer.zero_grad()
        backward(params, grads)
        assert all(p.grad is None for p in params) or case.schedule == "in_backward"
    optimizer.step()


def rounding_of(p: Tensor, momentum: float) -> float:
    """Relative, of a term; the oracle's 1 - βᵗ loses what is left of 1 - β."""
    return SINGLE if p.dtype not in (torch.float64, torch.complex128) else DOUBLE + ULP / (1 - momentum)


class Bounds:
    """How far from the oracle each tensor's moment and weight may be: each term of the update, times a rounding.

    To be made before the oracle takes the step, and asked after.
    """

    def __init__(self, case: Case, problem: Problem, oracle: Oracle, grads: list[Tensor | None]) -> None:
        self.case, self.problem, self.oracle = case, problem, oracle
        self.present = [i for i, g in enumerate(grads) if g is not None]
        self.before = [w.abs() for w in oracle.weights]
        given = {i: real64(g).abs() for i in self.present if (g := grads[i]) is not None}
        norm = math.sqrt(sum(g.square().sum().item() for g in given.values()))
        limit = oracle.max_grad_norm
        gain = limit / norm if limit is not None and norm > limit else 1.0
        self.seen, self.moments = {}, {}
        for i, g in given.items():
            hyper = oracle.hypers[i]
            self.seen[i] = g * gain + (0.0 if hyper.decoupled else hyper.weight_decay) * self.before[i]
            self.moments[i] = hyper.momentum * oracle.moments[i].abs() + (1 - hyper.momentum) * self.seen[i]

    def moment(self, i: int) -> Tensor:
        p, dtype = self.problem.params[i], self.case.settings[self.case.group_of[i]].state_dtype
        bound = rounding_of(p, self.oracle.hypers[i].momentum) * self.moments[i]
        if dtype == torch.bfloat16:
            bound = bound + 2.0**-7 * self.oracle.exact[i].abs()  # stochastic: up to one ulp
        return bound + 1e-37

    def _terms(self, i: int, h: Hyper) -> Tensor:
        """The terms of what F⁻¹ is applied to, unless that is the moment."""
        if self.case.numerator != "nesterov":
            return self.seen[i]
        later = 1 - h.momentum ** (self.oracle.steps[i] + 1)
        return (h.momentum * self.moments[i] + (1 - h.momentum) * self.seen[i]) / later

    def weights(self) -> dict[int, Tensor]:
        bounds = {}
        for block in {self.oracle.blocks[i] for i in self.present}:
            bounds.update(self._block([i for i in self.present if self.oracle.blocks[i] == block]))
        return bounds

    def _block(self, members: list[int]) -> dict[int, Tensor]:
        hypers = [self.oracle.hypers[i] for i in members]
        scale = [1 / (1 - h.momentum ** self.oracle.steps[i]) for i, h in zip(members, hypers, strict=True)]
        hats = [c * self.moments[i] for i, c in zip(members, scale, strict=True)]
        square = sum(
            (c * self.oracle.moments[i]).square().sum().item() / h.rho
            for i, h, c in zip(members, hypers, scale, strict=True)
        )
        largest = sum(x.square().sum().item() / h.rho for x, h in zip(hats, hypers, strict=True))
        terms = [self._terms(i, h) for i, h in zip(members, hypers, strict=True)]
        norm = math.sqrt(sum(r.square().sum().item() / h.rho for r, h in zip(terms, hypers, strict=True)))
        cross = sum((x * r).sum().item() / h.rho for x, r, h in zip(hats, terms, hypers, strict=True))
        right = math.sqrt(square) / (1 + square) if self.case.numerator == "moment" else norm
        bounds = {}
        for i, hat, h, term in zip(members, hats, hypers, terms, strict=True):
            p = self.problem.params[i]
            moving = h.lr * hat / (h.rho * (1 + square))
            if self.case.numerator != "moment":
                moving = moving * cross + h.lr * term / h.rho
            rounding = rounding_of(p, h.momentum) + 2.0**-45 * largest / (1 + square)  # of sums that cancel
            shrunk = abs(1 - h.lr * h.weight_decay) if h.decoupled else 1.0
            after = self.oracle.weights[i].abs()
            bound = rounding * (max(1.0, shrunk) * self.before[i] + after + moving)
            # The oracle's own: it solves a system with the condition 1 + S.
            bound = bound + 64 * ULP * h.lr * (1 + square) * right / math.sqrt(h.rho) + 1e-37
            lost = lost_bits(p.dtype, self.case.settings[self.case.group_of[i]].kahan)
            if p.dtype in EPSILON and lost != "master_bits":
                once = EPSILON[p.dtype] * (after + bound)
                bound = bound + (2 * EPSILON[p.dtype] * once if lost else once) + SMALLEST[p.dtype]
            bounds[i] = bound
        return bounds


def too_large(problem: Problem, oracle: Oracle) -> bool:
    """Whether a weight does not fit into its dtype any more."""
    return any(
        w.numel() and not w.abs().max() < 0.9 * torch.finfo(p.dtype).max
        for p, w in zip(problem.params, oracle.weights, strict=True)
    )


def rescheduled(optimizer: SOFIM, oracle: Oracle) -> None:
    for group in optimizer.param_groups:
        group.update(lr=group["lr"] / 2, momentum=group["momentum"] * 0.75, rho=group["rho"] * 4)
    oracle.hypers = [replace(h, lr=h.lr / 2, momentum=h.momentum * 0.75, rho=h.rho * 4) for h in oracle.hypers]


def follows_the_oracle(case: Case, backend: str) -> None:
    """Each step on its own, from the state that the optimizer is in, as the matrix does it for 16 bits."""
    problem = case.problem()
    params = problem.params
    optimizer = optimizer_of(case, problem, backend)
    oracle = problem.oracle(
        case.numerator, case.fisher, max_grad_norm=case.whole.get("max_grad_norm"), skip_nonfinite=case.skip_nonfinite
    )
    for step, grads in enumerate(case.gradients()):
        if step == case.change:
            rescheduled(optimizer, oracle)
        if step == case.reload:
            optimizer.load_state_dict(optimizer.state_dict())
        before = snapshot(optimizer)
        if all(g is None for g in grads):
            take(case, optimizer, params, grads)
            assert same_bits(before, snapshot(optimizer))
            continue
        oracle.weights = [full_weight(optimizer, p) for p in params]
        oracle.kept = [
            full - real64(p) if "kahan" in optimizer.state.get(p, {}) else torch.zeros_like(full)
            for full, p in zip(oracle.weights, params, strict=True)
        ]
        oracle.moments = [moment_of(optimizer, p) for p in params]
        counts = [int(optimizer.state[p]["step"]) if p in optimizer.state else 0 for p in params]
        assert counts == oracle.steps
        weights = [p.detach().clone() for p in params]
        bounds = Bounds(case, problem, oracle, grads)
        skipped = oracle.skipped
        take(case, optimizer, params, grads)
        stored = [moment_of(optimizer, p) for p in params]
        # The plain step reads the moment back as stored, the guarded one has it before its rounding.
        oracle.step(grads, None if case.schedule == "guarded" else stored)
        if case.schedule == "guarded":
            assert optimizer.grad_norm is not None
            assert int(optimizer.skipped_steps) == oracle.skipped
        if oracle.skipped > skipped:
            assert [int(optimizer.state[p]["step"]) if p in optimizer.state else 0 for p in params] == counts
            assert same_bits(weights, [p.detach() for p in params])
            assert same_bits([real64(m) for m in oracle.moments], stored)
            continue
        if case.schedule == "guarded":
            assert optimizer.grad_norm.item() == pytest.approx(oracle.norm, rel=1e-12)
        if too_large(problem, oracle):
            return
        allowed = bounds.weights()
        for i, p in enumerate(params):
            actual = full_weight(optimizer, p)
            if grads[i] is None:
                assert torch.equal(actual, oracle.weights[i])
                continue
            known = optimizer.state[p]
            chosen = case.settings[case.group_of[i]]
            lost = lost_bits(p.dtype, chosen.kahan)
            assert known.keys() & {"kahan", "master_bits"} == ({lost} if lost else set())
            assert known["exp_avg"].dtype == (chosen.state_dtype or torch.promote_types(p.dtype, torch.float32))
            assert int(known["step"]) == oracle.steps[i]
            assert within(stored[i], oracle.exact[i], bounds.moment(i)), (step, i)
            assert within(actual, oracle.weights[i], allowed[i]), (step, i)
    CHECKED["examples"] += 1


@pytest.mark.parametrize("schedule", SCHEDULES)
@on_each_backend
@given(data=st.data())
def test_each_step_is_the_oracles(data: st.DataObject, backend: str, schedule: str) -> None:
    follows_the_oracle(data.draw(cases(Ranges(schedules=(schedule,)))), backend)


# That it can fail.


def _no_correction(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(solve, "correction", lambda steps, momentum: torch.ones_like(momentum))


def _a_coefficient_slightly_off(patch: pytest.MonkeyPatch) -> None:
    right = solve.coefficients

    def wrong(*args: Any) -> Any:
        found = right(*args)
        return found._replace(moment=found.moment * (1 + 2e-5))

    patch.setattr(solve, "coefficients", wrong)


def _decay_lost(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(hyperparameters, "_l2", lambda group: 0.0)
    patch.setitem(hyperparameters._COLUMNS, "l2", lambda group: 0.0)


def _groups_as_one(patch: pytest.MonkeyPatch) -> None:
    def added_up(rows: Tensor, settings: Settings) -> Tensor:
        return rows.sum(-1, keepdim=True).expand(
            *rows.shape[:-1], (1, len(settings.sizes), rows.shape[-1])[settings.fisher]
        )

    patch.setattr(solve, "added_up", added_up)


def _bits_lost(patch: pytest.MonkeyPatch) -> None:
    right = reference._Update.run

    def run(self: Any, laid: Any, *args: Any) -> None:
        right(self, replace(laid, lost_bits=[None] * len(laid)), *args)

    patch.setattr(reference._Update, "run", run)


def _no_clipping(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(solve, "clip_factor", lambda norm, limit: torch.ones_like(norm))


BROKEN = [_no_correction, _a_coefficient_slightly_off, _decay_lost, _groups_as_one, _bits_lost, _no_clipping]


@pytest.mark.parametrize("broken", BROKEN, ids=[f.__name__.strip("_") for f in BROKEN])
def test_a_wrong_step_is_noticed(broken: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch)

    @settings(max_examples=60, phases=[Phase.generate], derandomize=True, report_multiple_bugs=False)
    @given(cases(Ranges()))
    def check(case: Case) -> None:
        follows_the_oracle(case, "reference")

    with pytest.raises(AssertionError):
        check()


# What changes nothing. Two optimizers take steps on either side of a change.

Steps = list[list[Tensor | None]]
MODERATE = Ranges(schedules=SCHEDULES, regime=(-3, 3), length=(-3, 0), one_tensor_more=False)
WIDE = replace(MODERATE, dtypes=(torch.float64, torch.float32, torch.complex64), narrow_moments=False, spoiled=False)


def trained(case: Case, problem: Problem, steps: Steps, backend: str) -> SOFIM:
    optimizer = optimizer_of(case, problem, backend)
    for step, grads in enumerate(steps):
        if step == case.reload:
            optimizer.load_state_dict(optimizer.state_dict())
        take(case, optimizer, problem.params, grads)
    return optimizer


def kept(optimizer: SOFIM, params: list[Tensor]) -> list[Tensor]:
    """Weights, and what is kept of them beside."""
    known = [optimizer.state[p] for p in params if p in optimizer.state]
    bits = [state[name] for state in known for name in ("kahan", "master_bits") if name in state]
    return [*(p.detach() for p in params), *bits]


def reach(case: Case, index: int) -> float:
    """How large a term of the updates of a tensor may be, and its weights."""
    mine = case.settings[case.group_of[index]].hyper
    smallest = min(s.hyper.rho for s in case.settings)
    elements = sum(math.prod(t.shape) for t in case.tensors)
    size = 40 * case.gradient_scale * math.sqrt(elements)
    return 10 * case.weight_scale + case.steps * mine.lr / math.sqrt(mine.rho) * (1 + size / math.sqrt(smallest))


def close(case: Case, left: Tensor, right: Tensor, index: int) -> bool:
    if not left.numel():
        return True
    tolerance = 1e-11 if left.dtype == torch.float64 else 4 * SINGLE
    return (left - right).abs().max().item() <= tolerance * reach(case, index)


def regrouped(problem: Problem, members: list[list[Tensor]]) -> Problem:
    """The problem with other parameters in its groups."""
    groups = [{**group, "params": mine} for group, mine in zip(problem.groups, members, strict=True)]
    return replace(problem, groups=groups)


@on_each_backend
@given(case=cases(WIDE), choice=st.randoms(use_true_random=False))
def test_the_order_of_parameters_within_a_group(case: Case, choice: Any, backend: str) -> None:
    problem, other = case.problem(), case.problem()
    steps = list(case.gradients())
    places = sorted(range(len(case.tensors)), key=lambda at: (case.group_of[at], choice.random()))
    params = other.params
    members = [[params[at] for at in places if case.group_of[at] == g] for g in range(len(other.groups))]
    trained(case, problem, steps, backend)
    trained(case, regrouped(other, members), [[grads[at] for at in places] for grads in steps], backend)
    assert all(close(case, a, b, i) for i, (a, b) in enumerate(zip(problem.params, params, strict=True)))
    CHECKED["examples"] += 1


@on_each_backend
@given(case=cases(replace(WIDE, fishers=("model", "group"))), choice=st.randoms(use_true_random=False))
def test_a_tensor_as_two(case: Case, choice: Any, backend: str) -> None:
    problem, other = case.problem(), case.problem()
    steps = list(case.gradients())
    cuts = [choice.randint(0, p.shape[0]) if p.dim() and choice.random() < 0.5 else None for p in problem.params]

    def parts(x: Tensor | None, cut: int | None) -> list[Tensor | None]:
        return [x] if cut is None else [None, None] if x is None else [x[:cut], x[cut:]]

    halves: list[list[Any]] = [
        [torch.nn.Parameter(x, p.requires_grad) for x in parts(p.detach(), cut) if x is not None]
        for p, cut in zip(other.params, cuts, strict=True)
    ]
    members = [
        [x for xs, g in zip(halves, case.group_of, strict=True) if g == at for x in xs]
        for at in range(len(other.groups))
    ]
    trained(case, problem, steps, backend)
    split = [[x for grad, cut in zip(grads, cuts, strict=True) for x in parts(grad, cut)] for grads in steps]
    trained(case, regrouped(other, members), split, backend)
    for i, (whole, xs) in enumerate(zip(problem.params, halves, strict=True)):
        assert close(case, whole, torch.cat(list(xs)) if len(xs) > 1 else xs[0], i)
    CHECKED["examples"] += 1


@on_each_backend
@given(
    case=cases(replace(MODERATE, dtypes=(torch.float32, torch.float64, torch.bfloat16, torch.complex64))),
    exponent=st.integers(-12, 12),
)
def test_the_unit_of_the_loss(case: Case, exponent: int, backend: str) -> None:
    """The gradient, √ρ, lr and the clipping norm times a, with decoupled decay λ/a or L2 decay λ·a; to the bit, as a is
    a power of two."""
    a = 2.0**exponent

    def scaled(hyper: Hyper) -> Hyper:
        decay = hyper.weight_decay / a if hyper.decoupled else hyper.weight_decay * a
        return replace(hyper, lr=hyper.lr * a, rho=hyper.rho * a * a, weight_decay=decay)

    other = with_hypers(replace(case, gradient_scale=case.gradient_scale * a), scaled)
    if case.max_grad_norm is not None:
        other = replace(other, max_grad_norm=case.max_grad_norm * a)
    same_updates(case, other, backend)


@on_each_backend
@given(case=cases(MODERATE))
def test_maximizing_is_minimizing_with_negated_gradients(case: Case, backend: str) -> None:
    case = replace(case, strange=False)  # negated, an expanded gradient is one no more, and its sum takes another order
    other = with_hypers(case, lambda hyper: replace(hyper, maximize=not hyper.maximize))
    same_updates(case, other, backend, [[None if g is None else -g for g in grads] for grads in case.gradients()])


def same_updates(case: Case, other: Case, backend: str, steps: Steps | None = None) -> None:
    """To the bit: weights, and what is kept of them beside."""
    results = []
    for mine, given_steps in ((case, None), (other, steps)):
        problem = mine.problem()
        optimizer = trained(mine, problem, given_steps or list(mine.gradients()), backend)
        results.append(kept(optimizer, problem.params))
    assert same_bits(*results)
    CHECKED["examples"] += 1


@on_each_backend
@given(case=cases(replace(MODERATE, fishers=("model", "parameter"))), data=st.data())
def test_a_group_as_two_with_the_same_settings(case: Case, data: st.DataObject, backend: str) -> None:
    """And a group of parameters that never have a gradient."""
    cut = data.draw(st.integers(0, len(case.tensors)))
    first = case.group_of[cut] if cut < len(case.tensors) else len(case.settings) - 1
    other = replace(
        case,
        settings=(*case.settings[: first + 1], *case.settings[first:], case.settings[0]),
        group_of=(*(g + (at >= cut) for at, g in enumerate(case.group_of)),),
    )
    results = []
    for mine in (case, other):
        problem, steps = mine.problem(), list(mine.gradients())
        if mine is other:
            unused = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
            problem.groups[-1]["params"] = unused
            steps = [[*grads, None, None] for grads in steps]
        optimizer = trained(mine, problem, steps, backend)
        results.append(kept(optimizer, problem.params[: len(case.tensors)]))
    assert all(torch.equal(x, torch.ones(3)) for x in unused)
    assert same_bits(*results)
    CHECKED["examples"] += 1


@on_each_backend
@given(
    case=cases(replace(WIDE, dtypes=(torch.float64,), fishers=("model",), max_groups=1, schedules=("plain", "guarded")))
)
def test_a_rotation_of_all_weights(case: Case, backend: str) -> None:
    """The method knows no axes: parameters and gradients, flattened, in other coordinates."""
    size = sum(math.prod(t.shape) for t in case.tensors if not t.frozen)
    assume(2 <= size <= 300)
    case = replace(case, missing=0.0, tensors=tuple(t for t in case.tensors if not t.frozen), strange=False)
    case = replace(case, group_of=(0,) * len(case.tensors))
    generator = torch.Generator().manual_seed(case.seed)
    turn, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))

    def turned(xs: list[Any]) -> list[Tensor]:
        flat = turn @ torch.cat([x.detach().reshape(-1) for x in xs])
        return [part.reshape(x.shape) for part, x in zip(flat.split([x.numel() for x in xs]), xs, strict=True)]

    problem, other = case.problem(), case.problem()
    steps = list(case.gradients())
    with torch.no_grad():
        for p, x in zip(other.params, turned(problem.params), strict=True):
            p.copy_(x)
    trained(case, problem, steps, backend)
    trained(case, other, [list(turned(grads)) for grads in steps], backend)
    for i, (x, p) in enumerate(zip(turned(problem.params), other.params, strict=True)):
        assert close(case, x, p.detach(), i)
    CHECKED["examples"] += 1
