"""Whether each backend takes the right steps on a device: a few of each kind, beside the reference and float64.

The thorough answer is the tests'. This one takes seconds, and says whether anything is worth timing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.gpu_providers import Launches, UnavailableError
from bench.shapes import Shape, elements
from sofim_fused import SOFIM

STEPS = 4
CPU = torch.device("cpu")
# Odd sizes, and one tensor that no tile holds.
SHAPES: list[Shape] = [(40, 6, 5, 5), (17,), (), (1,), (4099,), (3, 7), (70_001,)]
SMALL_SHAPES: list[Shape] = [(6, 1, 5, 5), (17,), (), (3, 7), (4099,)]
TINY_SHAPES: list[Shape] = [(3, 7), (), (4099,)]  # for the interpreter, which takes milliseconds for each
# More tensors than a launch of the CUDA backend carries in its arguments, which is about 500.
MANY_SHAPES: list[Shape] = [(1 + i % 37,) for i in range(600)]
# Of a weight's change: what float32 arithmetic, or a moment of 8 bits, may be off by.
RELATIVE = {torch.float32: 2e-5, torch.bfloat16: 2**-5}
# Of a weight, per step: what it cannot hold of its change; with the bits that are kept beside it.
UNHELD = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}
UNHELD_BESIDE = {torch.bfloat16: 2**-15, torch.float16: 2**-20}
ALIKE = 0.95  # of the elements, where moments are rounded at random: the bits are to be those of the reference
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """A kind of step.

    Attributes:
        name: in the table.
        options: SOFIM's arguments.
        dtype: of the parameters.
        spoiled: a step at which a gradient holds a NaN.
        one_launch: what ``SINGLE_LAUNCH`` is set to; ``None``: left alone.
        many: of a model of ``MANY_SHAPES``.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    spoiled: int | None = None
    one_launch: bool | None = None
    many: bool = False


GUARD = {"max_grad_norm": 0.6, "skip_nonfinite": True}
CASES = [
    Case("plain"),
    Case("guarded", GUARD, spoiled=1),
    Case("gradient form", {"numerator": "gradient"}),
    Case("bfloat16 moment", {"state_dtype": BF16}),
    Case("bfloat16, kahan", dtype=BF16),
    Case("bfloat16, no kahan", {"kahan": False}, BF16),
    Case("plain, one launch", one_launch=True),
    Case("plain, two launches", one_launch=False),
    Case("guarded, one launch", GUARD, spoiled=1, one_launch=True),
    Case("guarded, two launches", GUARD, spoiled=1, one_launch=False),
    Case("guarded, many tensors", GUARD, spoiled=1, many=True),
    Case("gradient form, guarded", {"numerator": "gradient", **GUARD}, spoiled=2),
    Case("bfloat16, bfloat16 moment, guarded", {"state_dtype": BF16, **GUARD}, BF16, spoiled=1),
    Case("L2 decay", {"weight_decay": 0.02, "decoupled_weight_decay": False}),
    Case("decoupled decay, maximize", {"weight_decay": 0.002, "maximize": True}),
    Case("gradient form, L2 decay", {"numerator": "gradient", "weight_decay": 0.02, "decoupled_weight_decay": False}),
    Case("Fisher matrix per parameter", {"fisher": "parameter"}),
    Case("clipping only", {"max_grad_norm": 0.6}),
    Case("skipping only", {"skip_nonfinite": True}, spoiled=0),
    Case("float16, kahan", dtype=torch.float16),
    Case("capturable", {"capturable": True}),
]


class Outcome(NamedTuple):
    """What steps have done, in float64 on the CPU.

    Attributes:
        changes: of each weight, with what is kept beside it.
        counts: updates of each parameter.
        norm: of the gradients at the last step; ``None`` where nobody looked.
        skipped: steps.
    """

    changes: list[Tensor]
    counts: list[int]
    norm: float | None
    skipped: int


def take(case: Case, backend: str, device: torch.device, shapes: Sequence[Shape], exact: bool = False) -> Outcome:
    """Take the case's steps.

    Args:
        case: what to do.
        backend: who does it.
        device: where.
        shapes: of the parameters.
        exact: in float64, with the values that the case's dtype holds.

    Raises:
        UnavailableError: there is nothing like it in this version or in this backend.
    """
    generator = torch.Generator().manual_seed(3)
    dtype = torch.float64 if exact else case.dtype
    size = elements(shapes)

    def normal(deviation: float) -> list[Tensor]:
        values = [torch.randn(shape, generator=generator, dtype=torch.float64) * deviation for shape in shapes]
        return [value.to(case.dtype) for value in values]

    weights = normal(0.02)
    params: list[Tensor] = [torch.nn.Parameter(weight.to(device, dtype, copy=True)) for weight in weights]
    drift = normal(size**-0.5)
    options = dict(case.options)
    if exact:
        options = {name: value for name, value in options.items() if name not in ("state_dtype", "kahan", "capturable")}
    during: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    if case.one_launch is not None and not exact and backend != "reference":
        during = Launches(backend, case.one_launch)
    # A step is of about half a learning rate, as long as the weights together.
    try:
        optimizer = SOFIM(params, lr=0.04 * size**0.5, momentum=0.9, rho=1.0, backend=backend, **options)
    except ValueError as error:
        if "not available in this version" in str(error):
            raise UnavailableError(str(error)) from None
        raise
    with during():
        for step in range(STEPS):
            for param, mean, noise in zip(params, drift, normal(0.5 * size**-0.5), strict=True):
                grad = mean + noise
                if step == case.spoiled:
                    grad.view(-1)[-1] = float("nan")
                param.grad = grad.to(device, dtype)
            optimizer.step()
    states = [optimizer.state[param] for param in params]
    changes = []
    for param, weight, state in zip(params, weights, states, strict=True):
        after = param.detach().to(CPU, torch.float64)
        if "kahan" in state:
            after = after + state["kahan"].to(CPU, torch.float64)
        changes.append(after - weight.double())
    return Outcome(
        changes,
        [int(state["step"]) for state in states],
        None if optimizer.grad_norm is None else float(optimizer.grad_norm),
        int(optimizer.skipped_steps),
    )


class Verdict(NamedTuple):
    """How a case went.

    Attributes:
        error: the largest deviation of an element from float64, as a multiple of what is allowed.
        error_to_reference: the same from the reference on the same device.
        wrong: what is wrong; empty if nothing is.
    """

    error: float
    error_to_reference: float
    wrong: str


def judge(case: Case, outcome: Outcome, reference: Outcome, exact: Outcome) -> Verdict:
    """Compare what a backend has done with what the reference has done, on its device and in float64."""
    wrong = []
    moment = case.options.get("state_dtype") or torch.float32
    kept = case.dtype.itemsize == 2 and case.options.get("kahan") is not False
    unheld = (UNHELD_BESIDE if kept else UNHELD)[case.dtype] * STEPS
    # Of all tensors, whose gradients are of one size: in a tensor of one element a change may cancel.
    largest = max(float(true.abs().max()) for true in exact.changes)
    allowed = RELATIVE[moment] * largest + unheld * (0.1 + largest)  # no weight is above 5 deviations
    errors = {}
    for name, other in (("float64", exact), ("the reference", reference)):
        worst = 0.0
        for mine, theirs in zip(outcome.changes, other.changes, strict=True):
            difference = float((mine - theirs).abs().max())
            # NaN is no number of times the tolerance, and has to count as too much.
            worst = max(worst, difference / allowed if difference < float("inf") else float("inf"))
        errors[name] = worst
        if not worst <= 1:
            wrong.append(f"{worst:.3g} times the tolerance from {name}")
        if outcome.counts != other.counts:
            wrong.append(f"step counts {sorted(set(outcome.counts))} where {name} has {sorted(set(other.counts))}")
        if outcome.skipped != other.skipped:
            wrong.append(f"{outcome.skipped} skipped steps where {name} has {other.skipped}")
        if (outcome.norm is None) != (other.norm is None):
            wrong.append(f"grad_norm is {outcome.norm} where {name} has {other.norm}")
        elif outcome.norm is not None and other.norm is not None:
            limit = 1e-5 if case.dtype == torch.float32 else 1e-2
            if not abs(outcome.norm - other.norm) <= limit * other.norm:
                wrong.append(f"grad_norm is {outcome.norm} where {name} has {other.norm}")
    if not largest > 0:
        wrong.append("nothing has moved in float64: the case tests nothing")
    if moment == BF16 and not wrong:
        alike = [
            (mine - theirs).abs() <= 1e-4 * largest + unheld * 0.1
            for mine, theirs in zip(outcome.changes, reference.changes, strict=True)
        ]
        share = float(torch.cat([part.reshape(-1) for part in alike]).double().mean())
        if share < ALIKE:
            wrong.append(f"only {share:.1%} of the elements are rounded as the reference's")
    return Verdict(errors["float64"], errors["the reference"], "; ".join(wrong))


def sanitizer_target(where: str, backends: Sequence[str]) -> None:
    """Two steps of each kind of each backend, for compute-sanitizer to watch; on small tensors of odd sizes.

    Args:
        where: the device.
        backends: whose steps.
    """
    device = torch.device(where)
    watched: list[tuple[dict[str, Any], torch.dtype, bool | None, list[Shape]]] = [
        ({}, torch.float32, None, SMALL_SHAPES),
        (GUARD, torch.float32, None, SMALL_SHAPES),
        ({}, torch.float32, False, SMALL_SHAPES),
        (GUARD, torch.float32, False, SMALL_SHAPES),
        ({}, torch.float32, None, MANY_SHAPES),
        ({"numerator": "gradient", "state_dtype": BF16}, torch.float32, None, SMALL_SHAPES),
        *(
            (options, BF16, None, SMALL_SHAPES)
            for options in ({}, GUARD, {"numerator": "gradient", "state_dtype": BF16})
        ),
    ]
    for backend in backends:
        for options, dtype, one_launch, shapes in watched:
            during: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
            if one_launch is not None:
                try:
                    during = Launches(backend, one_launch)
                except UnavailableError:
                    continue
            params: list[Tensor] = [
                torch.nn.Parameter(torch.ones(shape, dtype=dtype, device=device)) for shape in shapes
            ]
            optimizer = SOFIM(params, backend=backend, **options)
            with during():
                for _ in range(2):
                    for param in params:
                        param.grad = torch.full_like(param, 0.01)
                    optimizer.step()
        print(f"{backend}: steps taken", flush=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
