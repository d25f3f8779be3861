"""The whole range of every dtype, beside exact arithmetic: what stays finite and right, and the limits of that.

A finite step stays finite, is right to rounding, and in the moment form never longer than η/(2√ρ). The limits, each
pinned by a test: float32 coefficients (test_coefficients_end_where_float32_does), the gradient form's two large terms
(test_the_gradient_form_ends_where_its_terms_do), the lost bits of float16 (test_float16_keeps_no_bits_below_its_own),
bfloat16 moments (test_bfloat16_moments_end_where_bfloat16_does), float64 sums of squares
(test_float64_sums_end_at_1e154) and moments that hardly decay (test_momentum_near_one_is_rounded_as_float32).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor

from sofim_fused import SOFIM
from sofim_fused.backends.rounding import round_stochastic
from tests.step.support import full_weight, lost_bits
from tests.support.problems import NUMERATORS, same_bits
from tests.support.runs import CPU_BACKENDS

SIZES = (2, 1, 2)  # of three parameters, the last of them in a group of its own
BLOCKS = {"model": [0, 0, 0], "group": [0, 0, 1], "parameter": [0, 1, 2]}
LARGEST = torch.finfo(torch.float32).max
SCHEDULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "guarded": {"skip_nonfinite": True},
    "clipped": {"max_grad_norm": 1.0},
    "in-backward": {"in_backward": True},
}
STEPS = 3

backends = pytest.mark.parametrize("backend", CPU_BACKENDS)
schedules = pytest.mark.parametrize("schedule", SCHEDULES)
numerators = pytest.mark.parametrize("numerator", NUMERATORS)


@dataclass(frozen=True)
class Setting:
    """A method, and the decade of its gradients."""

    exponent: int
    numerator: str = "moment"
    fisher: str = "model"
    lr: float = 0.5
    momentum: float = 0.9
    rho: float = 1.0
    max_grad_norm: float | None = None


@dataclass(frozen=True)
class Expected:
    """One block's change in one step, exactly, and what its rounding is relative to.

    Attributes:
        change: of the block's elements.
        coefficient: of the moment, and ``gradient`` of the gradient.
        moment: its norm, and ``terms`` that of the largest term of the change.
        gain: the clip factor.
    """

    change: list[Fraction]
    coefficient: float
    gradient: float
    moment: float
    terms: float
    gain: float


def directions() -> list[list[float]]:
    """Per step, elements of all parameters between 0.3 and 3 in magnitude."""
    generator = torch.Generator().manual_seed(4)
    values = torch.rand(STEPS, sum(SIZES), generator=generator) * 2.4 + 0.3
    signs = torch.rand(STEPS, sum(SIZES), generator=generator).round() * 2 - 1
    return torch.where(torch.tensor([[True], [False], [True]]), values, values * signs).tolist()


def gradients(exponent: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Per step, all parameters' elements, as ``dtype`` holds them."""
    return [(torch.tensor(x, dtype=torch.float64) * 10.0**exponent).to(dtype) for x in directions()]


def norm_of(x: Sequence[Fraction]) -> float:
    """The norm, also where squares are out of a float's range."""
    largest = max(map(abs, x))
    return 0.0 if not largest else float(largest) * math.sqrt(sum(float(a / largest) ** 2 for a in x))


def solved(setting: Setting, grads: Sequence[Tensor]) -> list[list[Expected]]:
    """Step by step and block by block what a method should do, over the rationals."""
    beta, rho, lr = Fraction(setting.momentum), Fraction(setting.rho), Fraction(setting.lr)
    owner = [block for block, size in zip(BLOCKS[setting.fisher], SIZES, strict=True) for _ in range(size)]
    moment = [Fraction(0)] * len(owner)
    steps = []
    for t, grad in enumerate(grads, 1):
        g = [Fraction(x) for x in grad.tolist()]
        limit, norm = setting.max_grad_norm, norm_of(g)
        gain = limit / norm if limit is not None and norm > limit else 1.0
        v = [Fraction(gain) * x for x in g]
        moment = [beta * m + (1 - beta) * x for m, x in zip(moment, v, strict=True)]
        correction = 1 / (1 - beta**t)
        by_moment, by_gradient = {
            "moment": (correction, Fraction(0)),
            "gradient": (Fraction(0), Fraction(1)),
            "nesterov": (beta / (1 - beta ** (t + 1)), (1 - beta) / (1 - beta ** (t + 1))),
        }[setting.numerator]
        blocks = []
        for block in range(max(owner) + 1):
            inside = [i for i, place in enumerate(owner) if place == block]
            hat = [correction * moment[i] for i in inside]
            right = [by_moment * moment[i] + by_gradient * v[i] for i in inside]
            along = sum(h * r for h, r in zip(hat, right, strict=True)) / (rho + sum(h * h for h in hat))
            x = [(r - h * along) / rho for h, r in zip(hat, right, strict=True)]
            product = sum(h * y for h, y in zip(hat, x, strict=True))
            assert all(h * product + rho * y == r for h, r, y in zip(hat, right, x, strict=True))  # it is the solution
            change = [-lr * y for y in x]
            m = norm_of([moment[i] for i in inside])
            if setting.numerator == "moment":
                coefficient = lr * correction / (rho + sum(h * h for h in hat))
                blocks.append(Expected(change, float(coefficient), 0.0, m, float(coefficient) * m, gain))
            else:
                factor, coefficient = float(lr / rho * by_gradient), lr * (correction * along - by_moment) / rho
                terms = factor * norm_of([v[i] for i in inside])
                blocks.append(Expected(change, float(abs(coefficient)), factor, m, terms, gain))
        steps.append(blocks)
    return steps


@cache
def expected(setting: Setting) -> list[list[Expected]]:
    return solved(setting, gradients(setting.exponent))


class Model:
    """Parameters at zero, and an optimizer that is given one gradient after the other."""

    def __init__(self, setting: Setting, schedule: str, backend: str, dtype: torch.dtype, **options: Any) -> None:
        self.params = [torch.nn.Parameter(torch.zeros(n, dtype=dtype)) for n in SIZES]
        self.in_backward = schedule == "in-backward"
        self.optimizer = SOFIM(
            [{"params": self.params[:2]}, {"params": self.params[2:]}],
            lr=setting.lr,
            momentum=setting.momentum,
            rho=setting.rho,
            numerator=setting.numerator,
            fisher=setting.fisher,
            backend=backend,
            **{**SCHEDULES[schedule], **options},
        )
        self.owner = BLOCKS[setting.fisher]

    def step(self, grad: Tensor) -> list[Tensor]:
        """The change of each block, in float64."""
        parts = grad.split(SIZES)
        with torch.no_grad():
            for p in self.params:
                p.zero_()
                for name in self.optimizer.state.get(p, {}).keys() & {"kahan", "master_bits"}:
                    self.optimizer.state[p][name].zero_()
        if self.in_backward:
            torch.stack([(p * g).sum() for p, g in zip(self.params, parts, strict=True)]).sum().backward()
        else:
            for p, g in zip(self.params, parts, strict=True):
                p.grad = g.clone()
        self.optimizer.step()
        self.optimizer.zero_grad()
        change = [full_weight(self.optimizer, p) for p in self.params]
        return [
            torch.cat([x for x, owner in zip(change, self.owner, strict=True) if owner == block])
            for block in range(max(self.owner) + 1)
        ]


def distance(found: Tensor, exact: Sequence[Fraction]) -> float:
    return norm_of([Fraction(a) - b for a, b in zip(found.tolist(), exact, strict=True)])


def representable(x: Expected) -> bool:
    """Whether float32 holds the terms of a change and their coefficients."""
    return max(x.terms, x.coefficient, x.gradient, norm_of(x.change)) < 0.99 * LARGEST


def rounding(x: Expected, relative: float = 2e-6, moment: float = 8 * 2.0**-149) -> float:
    """How far a float32 step may be off, as a norm: ``relative`` to its terms, and what is lost below float32's range.

    ``moment``: what the moments' elements are off.
    """
    size = len(x.change) ** 0.5
    below_one = 2.0**-149 / min(x.gain, 1.0)  # of the clip factor, which is a float32 as well
    lost = min(x.terms, 2.0**-149 * x.moment)  # of the moment's coefficient
    return (relative + below_one) * x.terms + x.coefficient * moment * size + lost + 2.0**-148 * size


def assert_bounded(change: Tensor, setting: Setting) -> None:
    assert norm_of([Fraction(x) for x in change.tolist()]) <= setting.lr / (2 * setting.rho**0.5) * (1 + 1e-6), setting


@backends
@schedules
@numerators
@pytest.mark.parametrize(
    ("rho", "fisher"), [(1.0, "model"), (1.0, "group"), (1.0, "parameter"), (1e-30, "model"), (1e30, "parameter")]
)
def test_every_decade_of_float32(rho: float, fisher: str, numerator: str, schedule: str, backend: str) -> None:
    """Gradients from 1e-38 to 1e38, of which each backend has every other decade, with the next schedule the others."""
    compared, exponents = 0, range(-38 + list(SCHEDULES).index(schedule) % 2, 39, 2)
    for exponent in exponents:
        limit = SCHEDULES[schedule].get("max_grad_norm")
        setting = Setting(exponent, numerator, fisher, rho=rho, max_grad_norm=limit)
        model = Model(setting, schedule, backend, torch.float32)
        for grad, blocks in zip(gradients(exponent), expected(setting), strict=True):
            for change, exact in zip(model.step(grad), blocks, strict=True):
                if not representable(exact):
                    continue
                compared += 1
                assert distance(change, exact.change) <= rounding(exact), setting
                if numerator == "moment":
                    assert_bounded(change, setting)
    everything = len(exponents) * STEPS * (max(BLOCKS[fisher]) + 1)
    if numerator == "moment" or rho >= 1.0 or limit is not None:
        assert compared == everything
    else:
        assert compared >= 0.55 * everything


@backends
@schedules
@numerators
@pytest.mark.parametrize("momentum", [0.0, 1 - 1e-7])
def test_extreme_momentum(momentum: float, numerator: str, schedule: str, backend: str) -> None:
    for exponent in range(-38, 39, 4):
        limit = SCHEDULES[schedule].get("max_grad_norm")
        setting = Setting(exponent, numerator, momentum=momentum, max_grad_norm=limit)
        model = Model(setting, schedule, backend, torch.float32)
        for grad, (exact,) in zip(gradients(exponent), expected(setting), strict=True):
            (change,) = model.step(grad)
            assert distance(change, exact.change) <= rounding(exact), setting
            if numerator == "moment":
                assert_bounded(change, setting)


@backends
@pytest.mark.parametrize("schedule", ["plain", "guarded", "in-backward"])
@pytest.mark.parametrize("rho", [10.0**k for k in range(-30, 31, 10)])
def test_extreme_lr_and_rho(rho: float, schedule: str, backend: str) -> None:
    compared = 0
    for exponent in range(-38, 39, 8):
        for lr in (0.0, 1e-38, 1e-20, 1e10, 1e20, 1e38):
            setting = Setting(exponent, lr=lr, rho=rho)
            model = Model(setting, schedule, backend, torch.float32)
            for grad, (exact,) in zip(gradients(exponent), expected(setting), strict=True):
                (change,) = model.step(grad)
                assert not change.isnan().any(), setting
                assert_bounded(change, setting)
                if representable(exact):
                    compared += 1
                    assert distance(change, exact.change) <= rounding(exact), setting
    assert compared >= 10 * 4 * STEPS


@backends
@schedules
def test_many_elements_of_the_largest_float32(schedule: str, backend: str) -> None:
    """More than a tile of them: sums stay far from float64's end."""
    p = torch.nn.Parameter(torch.zeros(40_000))
    optimizer = SOFIM([p], lr=1.0, backend=backend, **SCHEDULES[schedule])
    for _ in range(STEPS):
        p.grad = None
        if schedule == "in-backward":
            (p * LARGEST).sum().backward()
        else:
            p.grad = torch.full_like(p, LARGEST)
        optimizer.step()
    assert p.isfinite().all()
    assert optimizer.state[p]["exp_avg"].isfinite().all()
    tolerance = 1e-4 if schedule == "clipped" else 1e-6  # the clip factor, 1.5e-41, is a float32
    assert p.detach().double().norm() <= STEPS * 0.5 * (1 + tolerance)


@backends
@pytest.mark.parametrize("schedule", ["plain", "guarded", "in-backward"])
def test_coefficients_end_where_float32_does(schedule: str, backend: str) -> None:
    """They are float32: above its range they stay at its end; below, steps lose digits, then are none.

    That begins at ‖m̂‖ ≈ 1e19·√η; what is lost is at most 3e-23·√η, and no more than the step.
    """
    setting = Setting(-30, lr=1e10, rho=1e-30)
    model = Model(setting, schedule, backend, torch.float32)
    (change,) = model.step(gradients(-30)[0])
    assert change.isfinite().all()
    ratio = change.norm() / norm_of(expected(setting)[0][0].change)
    assert ratio == pytest.approx(LARGEST / expected(setting)[0][0].coefficient, rel=1e-6)
    largest = 0.0
    for exponent in range(15, 39):
        setting = Setting(exponent, lr=1.0)
        (change,) = Model(setting, schedule, backend, torch.float32).step(gradients(exponent)[0])
        (exact,) = expected(setting)[0]
        error = distance(change, exact.change)
        assert error <= norm_of(exact.change) * (1 + 1e-6)
        largest = max(largest, error)
        if exponent >= 24:
            assert not change.any()
    assert 1e-26 < largest <= 3e-23


@backends
@pytest.mark.parametrize("numerator", ["gradient", "nesterov"])
@pytest.mark.parametrize("schedule", ["plain", "guarded", "in-backward"])
def test_the_gradient_form_ends_where_its_terms_do(schedule: str, numerator: str, backend: str) -> None:
    """η·g/ρ is one of two terms of which, with a large gradient, little is left: it has to fit into the dtype.

    Long before that, what is left is rounding. Clipping helps.
    """
    for exponent, finite in ((18, True), (19, False)):
        setting = Setting(exponent, numerator, rho=1e-20)
        (change,) = Model(setting, schedule, backend, torch.float32).step(gradients(exponent)[0])
        assert bool(change.isfinite().all()) == finite
        if finite:
            (exact,) = expected(setting)[0]
            assert distance(change, exact.change) <= rounding(exact)
    clipped = Setting(19, numerator, rho=1e-20)
    (change,) = Model(clipped, "clipped", backend, torch.float32).step(gradients(19)[0])
    assert change.isfinite().all()


NARROW = [
    # dtype, its digits, decades of gradients
    (torch.bfloat16, 2.0**-8, (-40, -38, -30, 0, 30, 38)),
    (torch.float16, 2.0**-11, (-7, -5, -3, 0, 3, 4)),
]


@backends
@schedules
@pytest.mark.parametrize("kahan", [True, False, None])
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dtype", "unit", "exponents"), NARROW, ids=lambda x: str(x))
def test_the_ends_of_16_bits(
    dtype: torch.dtype,
    unit: float,
    exponents: Sequence[int],
    state: torch.dtype,
    kahan: bool | None,
    schedule: str,
    backend: str,
) -> None:
    """Subnormal and largest gradients, with ρ so that the step can be stored."""
    info = torch.finfo(dtype)
    quantum = info.smallest_normal * info.eps  # the smallest number there is
    for exponent in exponents:
        rho = min(max(10.0 ** (2 * exponent), 1e-30), 1e30)
        setting = Setting(exponent, lr=rho**0.5, rho=rho, max_grad_norm=SCHEDULES[schedule].get("max_grad_norm"))
        grads = [x.clamp(-info.max, info.max) for x in gradients(exponent, dtype)]
        model = Model(setting, schedule, backend, dtype, state_dtype=state, kahan=kahan)
        for grad, (exact,) in zip(grads, solved(setting, grads), strict=True):
            (change,) = model.step(grad)
            relative = {"kahan": unit**2, "master_bits": 0.0, None: unit}[lost_bits(dtype, kahan)]
            if state == torch.bfloat16:  # of each of the steps that the moment was rounded in
                relative += STEPS * 2.0**-7
            off = rounding(exact, 4e-6 + relative, 2.0**-133 * STEPS if state == torch.bfloat16 else 8 * 2.0**-149)
            assert distance(change, exact.change) <= off + quantum * sum(SIZES) ** 0.5, setting
            if state == torch.float32:
                size = norm_of([Fraction(x) for x in change.tolist()])
                assert size <= setting.lr / (2 * rho**0.5) * (1 + unit) + quantum * sum(SIZES), setting


@backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_largest_weights_overflow_as_their_dtype_does(dtype: torch.dtype, backend: str) -> None:
    """Half of an ulp above the largest number is infinite, however it was reached; nothing is kept beside infinity."""
    largest = torch.tensor(torch.finfo(dtype).max, dtype=dtype)
    quarter = (largest - largest.nextafter(torch.zeros_like(largest))).item() / 4
    p = torch.nn.Parameter(largest.repeat(3))
    optimizer = SOFIM([p], lr=3.5 * quarter, momentum=0.0, rho=1.0, maximize=True, kahan=True, backend=backend)
    p.grad = torch.full((3,), 0.5, dtype=dtype)  # of square norm 3/4: the step is lr·0.5/1.75
    optimizer.step()
    assert torch.equal(p.detach(), largest.repeat(3))
    assert optimizer.state[p]["kahan"].tolist() == [quarter] * 3
    optimizer.step()
    assert p.isinf().all()
    assert not optimizer.state[p]["kahan"].any()


@backends
def test_float16_keeps_no_bits_below_its_own(backend: str) -> None:
    """Lost bits are float16 too, which ends at 6e-8: of weights below 1.2e-4 nothing is kept, of those above 0.125 all.

    bfloat16 has float32's range.
    """
    small = 2.0**-26  # less than half of the smallest float16
    results = {}
    for dtype in (torch.float16, torch.bfloat16):
        p = torch.nn.Parameter(torch.full((1,), 2.0**-14, dtype=dtype))
        optimizer = SOFIM([p], lr=small * 2, momentum=0.0, rho=1.0, maximize=True, backend=backend)
        p.grad = torch.ones(1, dtype=dtype)
        for _ in range(64):
            optimizer.step()
        results[dtype] = p.item() - 2.0**-14
    assert results[torch.float16] == 0.0
    assert results[torch.bfloat16] == pytest.approx(64 * small, rel=0.1)


@backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@schedules
def test_subnormal_weights_are_not_flushed(schedule: str, dtype: torch.dtype, backend: str) -> None:
    info = torch.finfo(dtype)
    start = torch.tensor([1.0, -3.0, 7.0] * 7, dtype=dtype) * (info.smallest_normal * info.eps)
    p = torch.nn.Parameter(start.clone())
    optimizer = SOFIM([p], backend=backend, **SCHEDULES[schedule])
    for _ in range(2):
        if schedule == "in-backward":
            (p * 0.0).sum().backward()
        else:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert p.any()
    assert same_bits([p], [start])


@backends
def test_bfloat16_moments_end_where_bfloat16_does(backend: str) -> None:
    """Between the largest bfloat16 and the largest float32, rounding up is infinite. Below, nothing is."""
    largest = torch.finfo(torch.bfloat16).max
    results = []
    for value in (largest, LARGEST):
        p = torch.nn.Parameter(torch.zeros(64))
        optimizer = SOFIM([p], momentum=0.0, state_dtype=torch.bfloat16, backend=backend)
        p.grad = torch.full_like(p, value)
        optimizer.step()
        results.append((optimizer.state[p]["exp_avg"].isfinite().all().item(), p.isfinite().all().item()))
    assert results == [(True, True), (False, False)]
    bits = torch.tensor([0x0000, 0xFFFF], dtype=torch.int32)
    assert round_stochastic(torch.full((2,), LARGEST), bits).isinf().tolist() == [False, True]


@backends
@numerators
@schedules
def test_float64_sums_end_at_1e154(schedule: str, numerator: str, backend: str) -> None:
    """Above, squares of float64 gradients are infinite: the moment form stands still, the gradient form is NaN.

    With ``skip_nonfinite`` such a step is skipped; with ``max_grad_norm`` such gradients count as zero.
    """
    for exponent in (-300, -160, -30, 0, 30, 150, 152):
        setting = Setting(exponent, numerator, max_grad_norm=SCHEDULES[schedule].get("max_grad_norm"))
        grads = gradients(exponent, torch.float64)
        model = Model(setting, schedule, backend, torch.float64)
        for grad, (exact,) in zip(grads, solved(setting, grads), strict=True):
            (change,) = model.step(grad)
            assert change.isfinite().all(), setting
            lost = 1e-150 if exponent > 30 else 1e-307  # the gradients' own range, and that of the coefficients
            assert distance(change, exact.change) <= 1e-13 * exact.terms + lost, setting
    for exponent in (155, 200, 307):
        setting = Setting(exponent, numerator)
        model = Model(setting, schedule, backend, torch.float64)
        for grad in gradients(exponent, torch.float64):
            (change,) = model.step(grad)
            if numerator == "moment" or schedule in ("guarded", "clipped"):
                assert not change.any(), setting
            else:
                assert change.isnan().all(), setting
        if schedule == "guarded":
            assert int(model.optimizer.skipped_steps) == STEPS


@backends
@pytest.mark.parametrize("start", [2**31 - 2, 2**31, 2**32 - 2, 2**53 - 2, 2**62])
def test_step_counts_beyond_32_bits(start: int, backend: str) -> None:
    """The count goes on, bias correction is 1 or right, and random bits are the reference's."""
    for momentum in (0.0, 0.9, 1 - 1e-9):
        p = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
        optimizer = SOFIM([p], lr=1.0, momentum=momentum, backend=backend)
        p.grad = torch.linspace(-1, 1, 5, dtype=torch.float64)
        optimizer.step()
        optimizer.state[p]["step"].fill_(start)
        moment = optimizer.state[p]["exp_avg"].clone()
        for taken in range(1, 4):
            with torch.no_grad():
                p.zero_()
            optimizer.step()
            moment = momentum * moment + (1 - momentum) * p.grad
            hat = moment / -math.expm1((start + taken) * math.log(momentum) if momentum else -math.inf)
            torch.testing.assert_close(p.detach(), -hat / (1 + hat @ hat), rtol=1e-12, atol=1e-14)
        assert optimizer.state[p]["step"].item() == start + 3
    states = []
    for name in (backend, "reference"):
        p = torch.nn.Parameter(torch.zeros(1000))
        optimizer = SOFIM([p], momentum=0.5, state_dtype=torch.bfloat16, backend=name)
        for taken in count():
            p.grad = torch.arange(1000.0) - 500 + taken / 256  # no rounding before the random one
            optimizer.step()
            if taken == 0:
                optimizer.state[p]["step"].fill_(start)
            if taken == 3:
                break
        states.append(optimizer.state[p]["exp_avg"])
    assert same_bits(states[:1], states[1:])


@backends
@pytest.mark.parametrize("schedule", ["plain", "guarded"])
def test_momentum_near_one_is_rounded_as_float32(schedule: str, backend: str) -> None:
    """What a float32 moment forgets in a step, 1 - β, is off by up to 2^-24: as a part of it, 2^-24/(1 - β).

    So far a moment of steady gradients may be off, and float32 moments of β = 1 - 3e-8 forget nothing. Those of
    float64 parameters do better.
    """
    for dtype, unit in ((torch.float32, 2.0**-24), (torch.float64, 2.0**-52)):
        for beta in (0.9, 1 - 1e-4, 1 - 1e-7):
            p = torch.nn.Parameter(torch.zeros(1, dtype=dtype))
            optimizer = SOFIM([p], momentum=beta, backend=backend, **SCHEDULES[schedule])
            p.grad = torch.ones(1, dtype=dtype)
            optimizer.step()
            optimizer.state[p]["exp_avg"].fill_(1.0)
            p.grad = torch.zeros(1, dtype=dtype)
            optimizer.step()
            forgotten = 1.0 - optimizer.state[p]["exp_avg"].double().item()
            assert abs(forgotten / (1 - beta) - 1) <= unit / (1 - beta), (dtype, beta)
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = SOFIM([p], momentum=1 - 2e-8, backend=backend, **SCHEDULES[schedule])
    p.grad = torch.ones(1)
    optimizer.step()
    optimizer.state[p]["exp_avg"].fill_(1.0)
    p.grad = torch.zeros(1)
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].item() == 1.0


def test_rho_below_the_range_is_refused() -> None:
    with pytest.raises(ValueError, match="rho"):
        SOFIM([torch.nn.Parameter(torch.zeros(1))], rho=1e-31)
