"""Steps with a diagonal that adapts: zero, huge, tiny and non-finite gradients, and what becomes of the state."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sofim_fused import SOFIM
from tests.step.support import TOLERANCES, distance, variances_of
from tests.support.oracle import Hyper, Oracle
from tests.support.problems import give, mixed_problem, same_bits, snapshot
from tests.support.runs import Run, once

ADAPTIVE = ["tensor", "row", "factored", "element"]
LARGEST = torch.finfo(torch.float32).max
diagonals = pytest.mark.parametrize("diagonal", ADAPTIVE)
rhos = pytest.mark.parametrize("rho", [None, 0.5], ids=["no-rank-one", "rank-one"])


def parameters(run: Run, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(2)
    shapes = [(4, 5), (6,), (2, 3, 2)]
    return [nn.Parameter(torch.randn(shape, generator=generator).to(run.device, dtype)) for shape in shapes]


def noise(params: list[nn.Parameter], seed: int = 0) -> Iterator[list[Tensor | None]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield [torch.randn(p.shape, generator=generator).to(p.device, p.dtype) for p in params]


def pair(run: Run, params: list[nn.Parameter], hyper: Hyper, **options: Any) -> tuple[SOFIM, Oracle]:
    """An optimizer over one Fisher block, and its oracle."""
    optimizer = SOFIM(
        params,
        lr=hyper.lr,
        momentum=hyper.momentum,
        rho=None if hyper.rho == float("inf") else hyper.rho,
        diagonal=hyper.diagonal,  # type: ignore[arg-type]
        beta2=hyper.beta2,
        eps=hyper.eps,
        backend=run.backend,
        **options,
    )
    oracle = Oracle([p.detach() for p in params], [hyper] * len(params), [0] * len(params), **options)
    return optimizer, oracle


def hyper_of(diagonal: str, rho: float | None, **values: Any) -> Hyper:
    return Hyper(**{"lr": 0.05, "diagonal": diagonal, "rho": float("inf") if rho is None else rho, **values})


@pytest.mark.covering(2)
@rhos
@diagonals
def test_zero_gradients(diagonal: str, rho: float | None, run: Run) -> None:
    """All of them in the first step, as those of LoRA's first matrix; later those of a row and of a column."""
    params = parameters(run)
    optimizer, oracle = pair(run, params, hyper_of(diagonal, rho))
    start = [p.detach().clone() for p in params]
    give(params, [torch.zeros_like(p) for p in params])
    optimizer.step()
    oracle.step([torch.zeros_like(p) for p in params])
    assert same_bits(start, [p.detach() for p in params])
    assert all(not v.any() for p in params for v in variances_of(optimizer, p).values())
    assert rho is None or (optimizer.signal is not None and optimizer.signal.tolist() == [0.0])
    for grads in islice(noise(params), 3):
        for g in grads:
            assert g is not None
            g[0] = 0.0
            if g.dim() > 1:
                g[:, 1] = 0.0
        give(params, grads)
        optimizer.step()
        oracle.step(grads)
    assert distance(list(params), oracle) <= TOLERANCES[torch.float32]
    for p, old in zip(params, start, strict=True):
        assert torch.equal(p[0], old[0])
        assert not torch.equal(p, old)


@pytest.mark.covering(2)
@rhos
@diagonals
def test_a_gradient_whose_square_is_no_float(diagonal: str, rho: float | None, run: Run) -> None:
    """v stays at the largest float instead of becoming infinite, from where it could never decay."""
    params = parameters(run)
    optimizer, oracle = pair(run, params, hyper_of(diagonal, rho, lr=1e-12, momentum=1e-3, beta2=1e-3))
    for step, grads in enumerate(islice(noise(params), 20 if run.steps(20) == 20 else 14)):
        if step == 0:
            grads = [1e30 * g for g in grads if g is not None]
        before = [p.detach().clone() for p in params]
        give(params, grads)
        optimizer.step()
        oracle.step(grads)
        for p, expected in zip(params, oracle.variances, strict=True):
            for name, v in variances_of(optimizer, p).items():
                assert v.isfinite().all()
                assert step or v.max() == LARGEST
                torch.testing.assert_close(v, expected[name], rtol=1e-5, atol=1e-30)
    assert distance(list(params), oracle) <= TOLERANCES[torch.float32]
    assert all(p.isfinite().all() for p in params)
    # The last step is of the usual size again.
    optimizer.param_groups[0]["lr"] = 1.0
    before = [p.detach().clone() for p in params]
    give(params, next(noise(params, 1)))
    optimizer.step()
    assert all(0.01 < (p - old).abs().max() < 4 for p, old in zip(params, before, strict=True))


@pytest.mark.covering(2)
@rhos
@diagonals
def test_the_largest_float64(diagonal: str, rho: float | None, run: Run) -> None:
    """Above 1e154 the sums of squares are infinite; nothing else is."""
    params = parameters(run, torch.float64)
    start = [p.detach().clone() for p in params]
    optimizer, _ = pair(run, params, hyper_of(diagonal, rho, lr=1e-18, momentum=1e-3, beta2=1e-3))
    for step, grads in enumerate(islice(noise(params), 3)):
        give(params, [1e170 * g for g in grads if g is not None] if step == 0 else grads)
        optimizer.step()
        assert all(v.isfinite().all() for p in params for v in variances_of(optimizer, p).values())
    assert all(p.isfinite().all() for p in params)
    if rho is None:  # with it, the first step's q makes that step too small to show
        assert not same_bits(start, [p.detach() for p in params])


@pytest.mark.covering(2)
@rhos
@diagonals
def test_clipping_an_infinite_norm(diagonal: str, rho: float | None, run: Run) -> None:
    """Of float64 gradients above 1e154: the clip factor is 0, so that these gradients count as zeros."""
    params = parameters(run, torch.float64)
    optimizer, oracle = pair(run, params, hyper_of(diagonal, rho), max_grad_norm=1.0)
    for step, grads in enumerate(islice(noise(params), 3)):
        given = [1e170 * g for g in grads if g is not None] if step == 1 else grads
        give(params, given)
        optimizer.step()
        oracle.step([0 * g for g in grads if g is not None] if step == 1 else grads)
        assert optimizer.grad_norm is not None
        assert bool(optimizer.grad_norm.isfinite()) == (step != 1)
    assert distance(list(params), oracle) <= TOLERANCES[torch.float64]


@pytest.mark.covering(2)
@rhos
@diagonals
def test_huge_gradients_that_are_clipped(diagonal: str, rho: float | None, run: Run) -> None:
    """Their squares never enter v."""
    params = parameters(run)
    optimizer, oracle = pair(run, params, hyper_of(diagonal, rho), max_grad_norm=1.0)
    for step, grads in enumerate(islice(noise(params), 4)):
        given = [1e30 * g for g in grads if g is not None] if step % 2 else grads
        give(params, given)
        optimizer.step()
        oracle.step(given)
    assert distance(list(params), oracle) <= TOLERANCES[torch.float32]


@pytest.mark.covering(2)
@rhos
@diagonals
@pytest.mark.parametrize("size", [1e-12, 1e-20, 1e-30, 1e-42])
def test_tiny_gradients(size: float, diagonal: str, rho: float | None, run: Run) -> None:
    """Squares below float32's range are lost; eps, far above their roots, keeps the steps right."""
    params = parameters(run)
    optimizer, oracle = pair(run, params, hyper_of(diagonal, rho, lr=1.0))
    for grads in islice(noise(params), 3):
        given = [size * g for g in grads if g is not None]
        give(params, given)
        optimizer.step()
        oracle.step(given)
    assert distance(list(params), oracle) <= TOLERANCES[torch.float32]
    if rho is not None:
        assert optimizer.signal is not None
        assert size < 1e-15 or optimizer.signal.item() == pytest.approx(oracle.signal[0], rel=1e-5)
        assert 0 < optimizer.signal.item() <= 2 * oracle.signal[0]


@pytest.mark.covering(2)
@pytest.mark.parametrize("beta2", [0.0, 0.9999, 1 - 1e-6, 1 - 1e-9])
@diagonals
def test_extreme_beta2(beta2: float, diagonal: str, run: Run) -> None:
    """Float32 has no β₂ between 1 - 6e-8 and 1; what a gradient adds to v is not lost all the same."""
    params = parameters(run)
    optimizer, oracle = pair(run, params, hyper_of(diagonal, None, beta2=beta2))
    for grads in islice(noise(params), 4):
        give(params, grads)
        optimizer.step()
        oracle.step(grads)
    assert distance(list(params), oracle) <= TOLERANCES[torch.float32]


# What changes nothing.


@pytest.mark.covering(2)
@pytest.mark.parametrize("exponent", [5, 40])
@pytest.mark.parametrize("numerator", ["moment", "gradient", "nesterov"])
@pytest.mark.parametrize("limit", [None, 2.0])
@rhos
@pytest.mark.parametrize("diagonal", ADAPTIVE)
def test_the_unit_of_the_loss(
    diagonal: str, rho: float | None, limit: float | None, numerator: str, exponent: int, run: Run
) -> None:
    """To the bit, as it is a power of two, and eps is too small to count."""
    results = []
    for unit in (1.0, 2.0**exponent):
        params = parameters(run)
        optimizer = SOFIM(
            params,
            backend=run.backend,
            lr=0.1,
            rho=rho,
            diagonal=diagonal,  # type: ignore[arg-type]
            eps=1e-18,
            numerator=numerator,  # type: ignore[arg-type]
            max_grad_norm=None if limit is None else limit * unit,
        )
        for grads in islice(noise(params), 4):
            give(params, [g * unit for g in grads if g is not None])
            optimizer.step()
        results.append([*(p.detach() for p in params), *([] if optimizer.signal is None else [optimizer.signal])])
    assert same_bits(results[0][:3], results[1][:3])
    if rho is not None:  # of dimension one
        assert torch.equal(results[0][3], results[1][3])


# Gradients that are no numbers.


@pytest.mark.covering(2)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@diagonals
def test_a_nan_is_not_hidden(diagonal: str, value: float, run: Run) -> None:
    """Without ``skip_nonfinite`` it shows in the weights, as with the identity."""
    params = parameters(run)
    optimizer, _ = pair(run, params, hyper_of(diagonal, 0.5))
    grads = next(noise(params))
    assert grads[0] is not None
    grads[0][1, 2] = value
    give(params, grads)
    optimizer.step()
    assert not params[0].isfinite().all()


@pytest.mark.covering(2)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("limit", [None, 0.5], ids=["alone", "clipping"])
@rhos
@pytest.mark.parametrize("diagonal", [*ADAPTIVE, "mixed"])
def test_a_skipped_step_changes_nothing(
    diagonal: str, rho: float | None, limit: float | None, value: float, run: Run
) -> None:
    """To the bit, the state of 16-bit parameters and the running means included; and the next step is as without it."""
    dtypes = (torch.bfloat16, torch.float32, torch.float16, torch.float64)
    layouts = run.layouts or ("matrix", "scalar", "transposed", "empty", "vector", "channels-last")
    problem, other = (
        mixed_problem(dtypes, "decoupled", 0, layouts, run.device, diagonal, rho is not None) for _ in range(2)
    )
    optimizer, twin = (
        SOFIM(each.groups, max_grad_norm=limit, skip_nonfinite=True, state_dtype=None, backend=run.backend)
        for each in (problem, other)
    )
    for step, grads in enumerate(islice(problem.gradients(), 6)):
        if step in (0, 4):
            spoiled = [None if g is None else g.clone() for g in grads]
            target = [g for g in spoiled if g is not None and g.numel()][step // 4 - 1]
            target[(-1,) * target.dim()] = value
            before = snapshot(optimizer)
            give(problem.params, spoiled)
            optimizer.step()
            if step:  # all have state
                assert same_bits(before, snapshot(optimizer))
            assert optimizer.grad_norm is not None
            assert not optimizer.grad_norm.isfinite()
        for each, mine in ((problem, optimizer), (other, twin)):
            give(each.params, [None if g is None else g.clone() for g in grads])
            mine.step()
    assert int(optimizer.skipped_steps) == 2
    assert same_bits(snapshot(optimizer), snapshot(twin))


@pytest.mark.covering(2)
@rhos
@pytest.mark.parametrize("limit", [None, 0.5], ids=["alone", "clipping"])
@pytest.mark.parametrize("diagonal", [*ADAPTIVE, "mixed"])
def test_scaled_gradients(diagonal: str, limit: float | None, rho: float | None, run: Run) -> None:
    """Under a ``torch.amp.GradScaler``: the bits of training without it, steps with an infinity left out."""
    ours, theirs = (
        mixed_problem(torch.float32, "decoupled", 0, run.layouts, run.device, diagonal, rho is not None)
        for _ in range(2)
    )
    optimizer = SOFIM(ours.groups, max_grad_norm=limit, backend=run.backend)
    twin = SOFIM(theirs.groups, max_grad_norm=float("inf") if limit is None else limit, backend=run.backend)
    scaler = torch.amp.GradScaler(run.device, init_scale=2.0**16, growth_interval=2)
    for step, grads in enumerate(islice(ours.gradients(), 6)):
        products = [None if g is None else scaler.scale(g) for g in grads]
        if step in (2, 4):
            next(g for g in products if g is not None and g.dim() and g.numel())[0] = float("inf")
        give(ours.params, products)
        scaler.step(optimizer)
        scaler.update()
        if step not in (2, 4):
            give(theirs.params, [None if g is None else g.clone() for g in grads])
            twin.step()
    assert int(optimizer.skipped_steps) == 2
    assert same_bits(snapshot(optimizer), snapshot(twin))


# The state.


def _by_state_dict(optimizer: SOFIM, params: list[Any]) -> tuple[SOFIM, list[Any]]:
    """Through a file, into a new optimizer of copies of the parameters."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    copies = copy.deepcopy(params)
    groups = [{**group, "params": [copies[0]]} for group in optimizer.param_groups]
    at = 0
    for ours, theirs in zip(optimizer.param_groups, groups, strict=True):
        theirs["params"] = copies[at : at + len(ours["params"])]
        at += len(ours["params"])
    fresh = SOFIM(groups, numerator="nesterov", backend=optimizer._backend)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh, copies


def _by_deepcopy(optimizer: SOFIM, params: list[Any]) -> tuple[SOFIM, list[Any]]:
    return copy.deepcopy((optimizer, params))


def _by_pickle(optimizer: SOFIM, params: list[Any]) -> tuple[SOFIM, list[Any]]:
    result: tuple[SOFIM, list[Any]] = pickle.loads(pickle.dumps((optimizer, params)))
    return result


@once
@pytest.mark.parametrize("way", [_by_state_dict, _by_deepcopy, _by_pickle], ids=lambda f: f.__name__.strip("_"))
@pytest.mark.parametrize(
    ("diagonal", "dtype"),
    [
        ("mixed", torch.float32),
        ("mixed", torch.bfloat16),
        ("mixed", torch.complex64),
        ("factored", torch.float64),
        ("tensor", torch.float32),
    ],
    ids=str,
)
def test_a_copy_continues_with_the_same_bits(
    diagonal: str, dtype: torch.dtype, way: Callable[[SOFIM, list[Any]], tuple[SOFIM, list[Any]]]
) -> None:
    problem = mixed_problem(dtype, "decoupled", diagonal=diagonal)
    params = problem.params
    optimizer = SOFIM(problem.groups, numerator="nesterov")
    twin, copies = optimizer, params
    for step, grads in enumerate(islice(problem.gradients(), 6)):
        if step == 3:
            twin, copies = way(optimizer, params)
            assert same_bits(snapshot(optimizer), snapshot(twin))
        give(params, grads)
        optimizer.step()
        if step >= 3:
            give(copies, [None if g is None else g.clone() for g in grads])
            twin.step()
    assert same_bits(snapshot(optimizer), snapshot(twin))


def trained(diagonal: str, **options: Any) -> tuple[SOFIM, list[nn.Parameter]]:
    params = parameters(Run("auto", "cpu"))
    optimizer = SOFIM(params, diagonal=diagonal, **options)  # type: ignore[arg-type]
    for grads in islice(noise(params), 2):
        give(params, grads)
        optimizer.step()
    return optimizer, params


@once
@pytest.mark.parametrize("other", ["identity", *ADAPTIVE])
@pytest.mark.parametrize("diagonal", ["identity", *ADAPTIVE])
def test_a_diagonal_that_is_changed_while_training(diagonal: str, other: str) -> None:
    """In a group or in a state dict: refused where the state lacks what it needs, before anything is changed.

    The paper's form needs no running means, and leaves those that are there alone.
    """
    optimizer, params = trained(diagonal, rho=0.5, backend="reference")
    saved = optimizer.state_dict()
    before = snapshot(optimizer)
    optimizer.param_groups[0]["diagonal"] = other
    give(params, next(noise(params, 1)))
    if other in (diagonal, "identity"):
        if diagonal != other:
            optimizer.param_groups[0]["rho"] = 1.0
        optimizer.step()
        assert not same_bits(before, snapshot(optimizer))
        before = snapshot(optimizer)
    else:
        with pytest.raises(ValueError, match=rf"diagonal='{other}'"):
            optimizer.step()
        assert same_bits(before, snapshot(optimizer))
    if diagonal == other:
        return
    optimizer.param_groups[0]["diagonal"] = diagonal
    changed = {**saved, "param_groups": [{**saved["param_groups"][0], "diagonal": other}]}
    if other == "identity":
        optimizer.load_state_dict(changed)  # less is needed, and the rest is left out
        assert not variances_of(optimizer, params[0])
        return
    with pytest.raises(ValueError, match=r"state_dict: state of parameter \d .*lacks|has the shape"):
        optimizer.load_state_dict(changed)
    assert same_bits(before, snapshot(optimizer))


@once
def test_an_old_state_dict_is_the_papers() -> None:
    """Whatever the diagonal of the optimizer that loads it."""
    optimizer, params = trained("identity")
    saved = optimizer.state_dict()
    for name in ("diagonal", "beta2", "eps"):
        del saved["param_groups"][0][name]
    copies = copy.deepcopy(params)
    fresh = SOFIM(copies, diagonal="factored")
    fresh.load_state_dict(saved)
    assert fresh.param_groups[0]["diagonal"] == "identity"
    assert (fresh.param_groups[0]["lr"], fresh.param_groups[0]["rho"]) == (0.5, 1.0)
    for grads in islice(noise(params, 1), 2):
        for mine, each in ((optimizer, params), (fresh, copies)):
            give(each, grads)
            mine.step()
    assert same_bits(snapshot(optimizer), snapshot(fresh))


@once
@pytest.mark.parametrize("diagonal", ["row", "factored", "element"])
def test_bits_do_not_depend_on_the_number_of_threads(diagonal: str) -> None:
    """Of float64 weights; more rows, columns and elements than torch gives to one thread."""
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            generator = torch.Generator().manual_seed(8)

            def normal(*shape: int, by: torch.Generator = generator) -> Tensor:
                return torch.randn(shape, generator=by, dtype=torch.float64)

            params = [nn.Parameter(normal(*shape)) for shape in ((70_001, 2), (2, 70_001), (100_003,))]
            optimizer = SOFIM(
                params,
                diagonal=diagonal,  # type: ignore[arg-type]
                rho=0.1,
                fisher="parameter",
                max_grad_norm=1.0,
                backend="reference",
            )
            for _ in range(2):
                give(params, [normal(*p.shape) for p in params])
                optimizer.step()
            assert optimizer.grad_norm is not None
            assert optimizer.signal is not None
            results.append([*snapshot(optimizer), optimizer.grad_norm, optimizer.signal])
    finally:
        torch.set_num_threads(threads)
    assert same_bits(results[0], results[1])
