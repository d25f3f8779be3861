"""Every backend, diagonal, schedule, numerator, Fisher block, dtype, decay and layout against the oracle.

As many of the combinations as it takes for any three of their values to meet (tests/support/covering.py); all of them
with ``--all-cases``, as in ``make deep``, and on a GPU.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import islice, product
from typing import Any

import pytest
import torch
from torch import Tensor

from sofim_fused import SOFIM
from tests.step.support import (
    TOLERANCES,
    distance,
    full_weight,
    lost_bits,
    moment_of,
    variances_of,
    weight_bound,
    within,
)
from tests.support.oracle import Hyper, Oracle, real64
from tests.support.problems import (
    LAYOUTS,
    NUMERATORS,
    ROWS_AND_COLUMNS,
    Problem,
    give,
    give_state,
    mixed_problem,
    shrink_a_column,
)
from tests.support.runs import Run

SCHEDULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip": {"max_grad_norm": 1.2},
    "clip-loose": {"max_grad_norm": 1e3},
    "skip": {"skip_nonfinite": True},
}


def optimizer_for(problem: Problem, numerator: str, fisher: str, run: Run, **options: Any) -> SOFIM:
    optimizer = SOFIM(problem.groups, numerator=numerator, fisher=fisher, backend=run.backend, **options)
    if run.ready:
        give_state(optimizer)
    return optimizer


@pytest.mark.covering(3)
@pytest.mark.parametrize("decay", ["none", "decoupled", "l2"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("fisher", ["model", "group", "parameter"])
@pytest.mark.parametrize("numerator", NUMERATORS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_follows_the_oracle(
    schedule: str, numerator: str, fisher: str, dtype: torch.dtype, decay: str, run: Run
) -> None:
    problem = mixed_problem(dtype, decay, layouts=run.layouts, device=run.device)
    oracle = problem.oracle(numerator, fisher, **SCHEDULES[schedule])
    optimizer = optimizer_for(problem, numerator, fisher, run, **SCHEDULES[schedule])
    start = [w.clone() for w in oracle.weights]
    steps = run.steps(100 if decay == "none" else 30)
    for count, grads in enumerate(islice(problem.gradients(), steps)):
        if count == min(12, steps - 2):  # as schedulers do
            for group in optimizer.param_groups:
                group.update(lr=group["lr"] / 2, momentum=0.8, rho=1.1)
            oracle.hypers = [replace(hyper, lr=hyper.lr / 2, momentum=0.8, rho=1.1) for hyper in oracle.hypers]
        give(problem.params, grads)
        optimizer.step()
        oracle.step(grads)
    assert distance(problem.params, oracle) <= TOLERANCES[dtype]
    assert max((a - b).abs().max().item() for a, b in zip(start, oracle.weights, strict=True) if a.numel()) > 1e-3
    assert [int(optimizer.state[p]["step"]) for p in problem.params] == oracle.steps
    if schedule != "plain":
        assert optimizer.grad_norm is not None
        assert optimizer.grad_norm.item() == pytest.approx(oracle.norm, rel=1e-6)


DIAGONALS = ["tensor", "row", "factored", "element", "mixed"]


def adaptive_layouts(run: Run) -> tuple[str, ...]:
    if not run.layouts:
        return (*LAYOUTS, *ROWS_AND_COLUMNS)
    return ("scalar", "channels-last", "sliced", "one-row", "one-column", "empty", "vector")


def assert_variances(optimizer: SOFIM, params: list[Tensor], oracle: Oracle, rtol: float) -> None:
    """The running means of g² are the oracle's."""
    for p, expected in zip(params, oracle.variances, strict=True):
        found = variances_of(optimizer, p)
        assert found.keys() == expected.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=rtol, atol=1e-30)


@pytest.mark.covering(3)
@pytest.mark.parametrize(
    ("dtype", "decay"),
    [
        (torch.float32, "none"),
        (torch.float32, "decoupled"),
        (torch.float64, "none"),
        (torch.complex64, "decoupled"),
    ],
    ids=str,
)
@pytest.mark.parametrize("fisher", ["model", "group", "parameter"])
@pytest.mark.parametrize("numerator", NUMERATORS)
@pytest.mark.parametrize("schedule", ["plain", "clip", "skip"])
@pytest.mark.parametrize("rank_one", [True, False], ids=["rank-one", "no-rank-one"])
@pytest.mark.parametrize("diagonal", DIAGONALS)
def test_adaptive_diagonals_follow_the_oracle(
    diagonal: str,
    rank_one: bool,
    schedule: str,
    numerator: str,
    fisher: str,
    dtype: torch.dtype,
    decay: str,
    run: Run,
) -> None:
    layouts = adaptive_layouts(run)
    problem = mixed_problem(dtype, decay, 0, layouts, run.device, diagonal, rank_one)
    oracle = problem.oracle(numerator, fisher, **SCHEDULES[schedule])
    optimizer = optimizer_for(problem, numerator, fisher, run, **SCHEDULES[schedule])
    start = [w.clone() for w in oracle.weights]
    steps = run.steps(8)
    for count, grads in enumerate(islice(problem.gradients(), steps)):
        if count == min(5, steps - 2):
            for group in optimizer.param_groups:
                group.update(lr=group["lr"] / 2, momentum=0.8, beta2=0.9, eps=1e-4, rho=0.6 if rank_one else None)
            oracle.hypers = [
                replace(h, lr=h.lr / 2, momentum=0.8, beta2=0.9, eps=1e-4, rho=0.6 if rank_one else h.rho)
                for h in oracle.hypers
            ]
        shrink_a_column(grads)
        give(problem.params, grads)
        optimizer.step()
        oracle.signal.clear()
        oracle.step(grads)
        if rank_one:
            assert optimizer.signal is not None
            blocks = range(3) if fisher == "group" else sorted(oracle.signal)
            expected = torch.tensor([oracle.signal.get(block, 0.0) for block in blocks], dtype=torch.float64)
            torch.testing.assert_close(optimizer.signal.cpu(), expected, rtol=20 * TOLERANCES[dtype], atol=1e-12)
    assert distance(problem.params, oracle) <= TOLERANCES[dtype]
    assert max((a - b).abs().max().item() for a, b in zip(start, oracle.weights, strict=True) if a.numel()) > 1e-2
    assert [int(optimizer.state[p]["step"]) for p in problem.params] == oracle.steps
    assert_variances(optimizer, problem.params, oracle, TOLERANCES[dtype])
    if schedule != "plain":
        assert optimizer.grad_norm is not None
        assert optimizer.grad_norm.item() == pytest.approx(oracle.norm, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("numerator", NUMERATORS)
def test_follows_the_oracle_for_100_steps_above_the_dense_size(numerator: str, dtype: torch.dtype, run: Run) -> None:
    """Larger than a tile, so that sums are put together from parts; the oracle is the closed form there."""
    generator = torch.Generator().manual_seed(3)
    params = [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in (40_001, 16_384, 70)]
    params = [torch.nn.Parameter(p.to(run.device)) for p in params]
    optimizer = SOFIM(params, lr=0.3, rho=2.0, numerator=numerator, backend=run.backend)
    oracle = Oracle([p.detach() for p in params], [Hyper(lr=0.3, rho=2.0)] * 3, [0, 0, 0], numerator)
    drift = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in params]
    for _ in range(run.steps(100)):
        grads: list[Tensor | None] = [
            (0.01 * (d + torch.randn(p.shape, generator=generator, dtype=torch.float64))).to(run.device, dtype)
            for p, d in zip(params, drift, strict=True)
        ]
        give(params, grads)
        optimizer.step()
        oracle.step(grads)
    assert distance(list(params), oracle) <= TOLERANCES[dtype]


@pytest.mark.covering(2, 1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("numerator", NUMERATORS)
@pytest.mark.parametrize("schedule", ["plain", "clip"])
@pytest.mark.parametrize("rank_one", [True, False], ids=["rank-one", "no-rank-one"])
@pytest.mark.parametrize("diagonal", ["tensor", "row", "factored", "element"])
def test_adaptive_diagonals_of_large_tensors(
    diagonal: str, rank_one: bool, schedule: str, numerator: str, dtype: torch.dtype, run: Run
) -> None:
    """Rows, and columns, that are longer than a tile, or of which a tile has many, in either order of memory."""
    generator = torch.Generator().manual_seed(5)
    shapes = [(2, 33_001), (16_500, 2), (131, 257), (40, 9, 33), (70,)]
    if run.layouts:  # in the interpreter, where tiles are smaller too
        shapes = [(2, 5_001), (2_600, 2), (70, 67), (9, 5, 33), (70,)]

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    params = [torch.nn.Parameter(normal(shape).to(run.device, dtype)) for shape in shapes]
    transposed = torch.nn.Parameter(normal((300, 120)).to(run.device, dtype).t())
    params.append(transposed)
    rho, limit = (0.5, math.inf)[not rank_one], {"clip": 5.0}.get(schedule)
    optimizer = SOFIM(
        params,
        lr=0.05,
        rho=rho if rank_one else None,
        diagonal=diagonal,  # type: ignore[arg-type]
        numerator=numerator,  # type: ignore[arg-type]
        max_grad_norm=limit,
        backend=run.backend,
    )
    hyper = Hyper(lr=0.05, rho=rho, diagonal=diagonal)
    oracle = Oracle([p.detach() for p in params], [hyper] * 6, [0] * 6, numerator, limit)
    # Some rows and columns have far larger gradients than others.
    sizes = [normal(p.shape[:1]).exp().view(-1, *[1] * (p.dim() - 1)) * normal(p.shape[1:]).exp() for p in params]
    drifts = [normal(p.shape) for p in params]
    for _ in range(run.steps(5)):
        grads: list[Tensor | None] = [
            (0.1 * size * (drift + normal(drift.shape))).to(run.device, dtype)
            for size, drift in zip(sizes, drifts, strict=True)
        ]
        give(params, grads)
        optimizer.step()
        oracle.step(grads)
    assert distance(list(params), oracle) <= TOLERANCES[dtype]
    assert_variances(optimizer, list(params), oracle, TOLERANCES[dtype])


# 16-bit weights lose bits in every step, so that a long run would need a tolerance that hides errors. Each step is
# compared on its own, from the state that the optimizer is in, to what one rounding may do.

NARROW = (torch.bfloat16, torch.float32, torch.float16)
ANY = (*NARROW, torch.float64, torch.complex64)


@pytest.mark.covering(3)
@pytest.mark.parametrize("decay", ["none", "decoupled", "l2"])
@pytest.mark.parametrize("kahan", [True, False, None])
@pytest.mark.parametrize(
    ("dtypes", "state_dtype"),
    [
        *product([(torch.bfloat16,), (torch.float16,), (torch.float32,), NARROW], [None, torch.bfloat16]),
        (ANY, None),
        (ANY[::-1], None),
    ],
    ids=str,
)
@pytest.mark.parametrize("numerator", NUMERATORS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_each_step_of_16_bit_and_mixed_tensors(
    schedule: str,
    numerator: str,
    dtypes: tuple[torch.dtype, ...],
    state_dtype: torch.dtype | None,
    kahan: bool | None,
    decay: str,
    run: Run,
) -> None:
    problem = mixed_problem(dtypes, decay, layouts=run.layouts, device=run.device)
    options = {"state_dtype": state_dtype, "kahan": kahan, **SCHEDULES[schedule]}
    optimizer = optimizer_for(problem, numerator, "model", run, **options)
    oracle = problem.oracle(numerator, "model", **SCHEDULES[schedule])
    for count, grads in enumerate(islice(problem.gradients(), run.steps(8))):
        if count % 2:  # grad_dtype: float32 gradients of 16-bit parameters are legal
            grads = [g.float() if g is not None and g.dtype.itemsize == 2 else g for g in grads]
        give(problem.params, grads)
        oracle.weights = [full_weight(optimizer, p) for p in problem.params]
        oracle.kept = [  # what L2 decay does not see: of master weights it sees all
            full - real64(p) if lost_bits(p.dtype, kahan) == "kahan" else torch.zeros_like(full)
            for full, p in zip(oracle.weights, problem.params, strict=True)
        ]
        optimizer.step()
        stored = [moment_of(optimizer, p) for p in problem.params]
        # The plain step reads the moment back as stored, the guarded one has it before its rounding.
        oracle.step(grads, stored if schedule == "plain" else None)
        for i, p in enumerate(problem.params):
            if grads[i] is None:
                continue
            known = optimizer.state[p]
            lost = lost_bits(p.dtype, kahan)
            assert known.keys() & {"kahan", "master_bits"} == ({lost} if lost else set())
            assert known["exp_avg"].dtype == (state_dtype or torch.promote_types(p.dtype, torch.float32))
            rounding = 2.0**-7 if state_dtype else 1e-6  # stochastic: up to one ulp
            assert within(stored[i], oracle.exact[i], rounding * oracle.exact[i].abs() + 1e-7)
            bound = weight_bound(oracle.weights[i].abs(), p.dtype, lost)
            assert within(full_weight(optimizer, p), oracle.weights[i], bound), (count, i)
        oracle.moments = stored


@pytest.mark.covering(2, 1)
@pytest.mark.parametrize("kahan", [True, False, None])
@pytest.mark.parametrize(
    ("dtypes", "state_dtype"),
    [*product([(torch.bfloat16,), NARROW], [None, torch.bfloat16]), ((torch.float16,), torch.bfloat16), (ANY, None)],
    ids=str,
)
@pytest.mark.parametrize("numerator", NUMERATORS)
@pytest.mark.parametrize("schedule", ["plain", "clip", "skip"])
@pytest.mark.parametrize("rank_one", [True, False], ids=["rank-one", "no-rank-one"])
@pytest.mark.parametrize("diagonal", ["tensor", "factored", "element", "mixed"])
def test_each_adaptive_step_of_16_bit_and_mixed_tensors(
    diagonal: str,
    rank_one: bool,
    schedule: str,
    numerator: str,
    dtypes: tuple[torch.dtype, ...],
    state_dtype: torch.dtype | None,
    kahan: bool | None,
    run: Run,
) -> None:
    layouts = adaptive_layouts(run)
    problem = mixed_problem(dtypes, "decoupled", 0, layouts, run.device, diagonal, rank_one)
    options = {"state_dtype": state_dtype, "kahan": kahan, **SCHEDULES[schedule]}
    optimizer = optimizer_for(problem, numerator, "model", run, **options)
    oracle = problem.oracle(numerator, "model", **SCHEDULES[schedule])
    for count, grads in enumerate(islice(problem.gradients(), run.steps(6))):
        if count % 2:
            grads = [g.float() if g is not None and g.dtype.itemsize == 2 else g for g in grads]
        give(problem.params, grads)
        oracle.weights = [full_weight(optimizer, p) for p in problem.params]
        oracle.variances = [variances_of(optimizer, p) for p in problem.params]
        optimizer.step()
        stored = [moment_of(optimizer, p) for p in problem.params]
        # With the term of rank one the last sweep reads the moment as stored; without, there is one sweep for both.
        oracle.step(grads, stored if rank_one else None)
        for i, p in enumerate(problem.params):
            if grads[i] is None:
                continue
            known = optimizer.state[p]
            lost = lost_bits(p.dtype, kahan)
            assert known.keys() & {"kahan", "master_bits"} == ({lost} if lost else set())
            rounding = 2.0**-7 if state_dtype else 1e-6
            assert within(stored[i], oracle.exact[i], rounding * oracle.exact[i].abs() + 1e-7)
            for name, value in variances_of(optimizer, p).items():
                assert known[name].dtype == (torch.float64 if p.dtype == torch.float64 else torch.float32)
                assert within(value, oracle.variances[i][name], 1e-6 * value + 1e-30), (count, i, name)
            bound = weight_bound(oracle.weights[i].abs(), p.dtype, lost)
            assert within(full_weight(optimizer, p), oracle.weights[i], bound), (count, i)
        oracle.moments = stored
