"""Tensors of a step that share memory: taken one after the other by every backend, or refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sofim_fused import SOFIM, backends, native, tiles
from sofim_fused.backends import memory, table
from tests.problems import give_state
from tests.runs import EMULATED, INTERPRETED, Run, once

# With so many elements two threads meet in the same ones; what stands in for a GPU takes tensors in turn.
ELEMENTS = 3_000 if INTERPRETED else 20_000 if EMULATED else 100_000
# The gradients' norm is about √ρ: a step then changes each weight by much more than its last bit.
MOMENTUM, RHO = 0.9, 0.4 * ELEMENTS
LR, LIMIT = 0.8 * RHO, 0.8 * RHO**0.5
WIDE, NARROW = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@dataclass
class Shared:
    """Tensors that share memory.

    Attributes:
        params: the parameters.
        grads: functions that give the gradients of a step, which may lie in memory of what there is.
        state: makes a step's state share memory, once there is some.
    """

    params: list[nn.Parameter]
    state: Callable[[list[dict[str, Tensor]]], None] = lambda states: None
    grads: dict[int, Callable[[list[dict[str, Tensor]]], Tensor]] = field(default_factory=dict)


Values = Callable[..., Tensor]  # of a shape: numbers between 1 and 2, the same in each dtype


def parameters(*tensors: Tensor) -> list[nn.Parameter]:
    """On the very memory of these."""
    made = []
    for x in tensors:
        made.append(nn.Parameter(torch.empty_like(x)))
        made[-1].data = x
    return made


def tied(values: Values) -> Shared:
    x = values(ELEMENTS)
    return Shared(parameters(x, x))


def tied_with_others_between(values: Values) -> Shared:
    x = values(ELEMENTS)
    return Shared(parameters(values(5), x, values(7), x, x, values(9)))


def views_a_few_elements_apart(values: Values) -> Shared:
    x = values(ELEMENTS + 3)
    return Shared(parameters(x[:-3], x[3:]))


def views_between_each_other(values: Values) -> Shared:
    x = values(2 * ELEMENTS)
    return Shared(parameters(x[::2], x[1::2]))


def a_matrix_and_its_transpose(values: Values) -> Shared:
    side = int(ELEMENTS**0.5)
    x = values(side, side)
    return Shared(parameters(x, x.t(), x[::2]))


def one_moment(values: Values) -> Shared:
    def share(states: list[dict[str, Tensor]]) -> None:
        states[1]["exp_avg"] = states[0]["exp_avg"]

    return Shared(parameters(values(ELEMENTS), values(ELEMENTS)), share)


def moments_that_overlap(values: Values) -> Shared:
    def share(states: list[dict[str, Tensor]]) -> None:
        both = states[0]["exp_avg"].new_zeros(ELEMENTS + 1)
        states[0]["exp_avg"], states[1]["exp_avg"] = both[1:], both[:-1]

    return Shared(parameters(values(ELEMENTS), values(ELEMENTS)), share)


def one_compensation(values: Values) -> Shared:
    def share(states: list[dict[str, Tensor]]) -> None:
        if "kahan" in states[0]:
            states[1]["kahan"] = states[0]["kahan"]

    x = values(ELEMENTS)
    return Shared(parameters(x, x), share)


def a_parameter_in_anothers_moment(values: Values) -> Shared:
    shared = Shared(parameters(values(ELEMENTS), values(ELEMENTS)))

    def share(states: list[dict[str, Tensor]]) -> None:
        states[0]["exp_avg"] = shared.params[1].data

    shared.state = share
    return shared


def a_gradient_in_another_parameter(values: Values) -> Shared:
    shared = Shared(parameters(values(ELEMENTS), values(ELEMENTS), values(ELEMENTS)))
    shared.grads = {0: lambda states: shared.params[1].data, 2: lambda states: shared.params[1].data}
    return shared


def a_gradient_next_to_its_own_place(values: Values) -> Shared:
    x = values(ELEMENTS + 1)
    return Shared(parameters(x[1:], values(4)), grads={0: lambda states: x[:-1]})


def a_gradient_in_a_moment(values: Values) -> Shared:
    own: Callable[..., Tensor] = lambda states: states[0]["exp_avg"]  # noqa: E731
    return Shared(parameters(values(ELEMENTS), values(ELEMENTS)), grads={0: own, 1: own})


def a_gradient_that_is_its_tied_parameter(values: Values) -> Shared:
    x = values(ELEMENTS)
    return Shared(parameters(x, x), grads={0: lambda states: x, 1: lambda states: x})


WEIGHTS = [
    tied,
    tied_with_others_between,
    views_a_few_elements_apart,
    views_between_each_other,
    a_matrix_and_its_transpose,
]
STATES = [one_moment, moments_that_overlap, one_compensation]
GRADIENTS = [
    a_gradient_in_another_parameter,
    a_gradient_next_to_its_own_place,
    a_gradient_that_is_its_tied_parameter,
]
OF_ONE_DTYPE = [a_parameter_in_anothers_moment, a_gradient_in_a_moment]  # as the moment's
CASES = [
    *((make, dtype) for make in [*WEIGHTS, *STATES, *GRADIENTS] for dtype in (WIDE, NARROW)),
    *((make, WIDE) for make in OF_ONE_DTYPE),
]
NAMED = [pytest.param(make, dtype, id=f"{make.__name__}-{str(dtype)[6:]}") for make, dtype in CASES]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1 / LR, "max_grad_norm": LIMIT},
    {"weight_decay": 0.1, "decoupled_weight_decay": False},
    {"numerator": "gradient", "weight_decay": 0.1 / LR},
    {"numerator": "gradient", "weight_decay": 0.1, "decoupled_weight_decay": False, "max_grad_norm": LIMIT},
]


def values_of(dtype: torch.dtype, device: str) -> Values:
    generator = torch.Generator().manual_seed(0)

    def values(*shape: int) -> Tensor:
        # On a grid that bfloat16 holds: the same numbers in each dtype.
        return (1 + torch.randint(0, 64, shape, generator=generator) / 64).to(device, dtype)

    return values


def gradients(shared: Shared, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randint(-4, 5, p.shape, generator=generator) / 4).to(p.device, p.dtype) for p in shared.params]


def expected(options: dict[str, Any], make: Callable[[Values], Shared], steps: int) -> Shared:
    """The definition in float64: each pass takes the tensors in turn; gradients are those from before the step."""
    shared = make(values_of(torch.float64, "cpu"))
    states = [{"exp_avg": torch.zeros_like(p.data)} for p in shared.params]
    shared.state(states)
    decay, limit = options.get("weight_decay", 0.0), options.get("max_grad_norm")
    l2, decoupled = (decay, 0.0) if options.get("decoupled_weight_decay") is False else (0.0, decay)
    for step in range(1, steps + 1):
        given = gradients(shared, step)
        grads = [
            (shared.grads[i](states) if i in shared.grads else given[i]).clone() for i in range(len(shared.params))
        ]
        c = 1 / (1 - MOMENTUM**step)
        members = [(p.data, known["exp_avg"], g) for p, known, g in zip(shared.params, states, grads, strict=True)]
        s = cross = 0.0

        def add(m: Tensor, w: Tensor, g: Tensor) -> tuple[float, float]:
            return float(c * c * (m * m).sum() / RHO), float(c * (m * (g + l2 * w)).sum() / RHO)

        def update(w: Tensor, m: Tensor, g: Tensor, s: float, cross: float) -> None:
            if options.get("numerator") == "gradient":
                w.copy_((1 - LR * decoupled) * w - LR / RHO * (g + l2 * w - c * m * cross / (1 + s)))
            else:
                w.copy_((1 - LR * decoupled) * w - LR / RHO * c * m / (1 + s))

        if limit is None:
            for w, m, g in members:
                m.mul_(MOMENTUM).add_((1 - MOMENTUM) * (g + l2 * w))
                norm, product = add(m, w, g)
                s, cross = s + norm, cross + product
            for w, m, g in members:
                update(w, m, g, s, cross)
            continue
        norm = float(sum((g * g).sum() for g in grads)) ** 0.5
        members = [(w, m, g * min(1.0, limit / norm)) for w, m, g in members]
        for w, m, g in members:
            norm, product = add(MOMENTUM * m + (1 - MOMENTUM) * (g + l2 * w), w, g)
            s, cross = s + norm, cross + product
        for w, m, g in members:
            m.mul_(MOMENTUM).add_((1 - MOMENTUM) * (g + l2 * w))
            update(w, m, g, s, cross)
    return shared


def taken(run: Run, shared: Shared, steps: int, **options: Any) -> list[Tensor]:
    optimizer = SOFIM(shared.params, lr=LR, momentum=MOMENTUM, rho=RHO, backend=run.backend, **options)
    give_state(optimizer)
    states = [optimizer.state[p] for p in shared.params]
    shared.state(states)
    for step in range(1, steps + 1):
        for i, (p, g) in enumerate(zip(shared.params, gradients(shared, step), strict=True)):
            p.grad = shared.grads[i](states) if i in shared.grads else g
        optimizer.step()
    return [p.detach().cpu().double() for p in shared.params]


@pytest.mark.covering(2)
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "clipped", "l2", "gradient", "gradient-l2-clipped"])
@pytest.mark.parametrize(("make", "dtype"), NAMED)
def test_tensors_that_share_memory_are_taken_in_turn(
    make: Callable[[Values], Shared], dtype: torch.dtype, options: dict[str, Any], run: Run
) -> None:
    steps = 2
    wanted = expected(options, make, steps)
    found = taken(run, make(values_of(dtype, run.device)), steps, **options)
    start = make(values_of(torch.float64, "cpu"))
    # bfloat16 weights are within two of their last bits; float32's errors are those of the sums' terms.
    tolerance = 2.0**-6 if dtype == NARROW else 1e-5
    for mine, theirs, before in zip(found, wanted.params, start.params, strict=True):
        scale = theirs.detach().abs().max().clamp(min=before.detach().abs().max())
        torch.testing.assert_close(mine / scale, theirs.detach() / scale, rtol=0, atol=tolerance)


@once
def test_a_turn_that_is_left_out_would_be_seen() -> None:
    """Were one of two tied updates lost in a part of the elements, the test above would not pass."""
    for dtype, tolerance in ((WIDE, 1e-5), (NARROW, 2.0**-6)):
        start, one = tied(values_of(torch.float64, "cpu")), expected({}, tied, 1)
        moved = (one.params[0] - start.params[0]).abs() / one.params[0].abs().max()
        assert (moved / 2 > 2 * tolerance).float().mean() > 0.25
