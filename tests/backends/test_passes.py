"""The passes as such, and what the schedules promise about them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from sofim_fused import SOFIM, backends
from sofim_fused.backends import Coefficients, Decay, GradientStep, Passes, StepTensors, reference, solve
from sofim_fused.backends.reference import TILE, dot
from sofim_fused.step import gather
from tests.backends.support import Transfers
from tests.support.problems import NUMERATORS, give, mixed_problem, same_bits, snapshot
from tests.support.runs import CPU_BACKENDS as BACKENDS
from tests.support.runs import EMULATED, INTERPRETED, once

CPU = torch.device("cpu")
SCHEDULES: list[dict[str, Any]] = [{}, {"max_grad_norm": 0.5, "skip_nonfinite": True}]


def made_tiles(dtype: torch.dtype, generator: torch.Generator, sizes: tuple[int, ...] = (5, 64, 1)) -> StepTensors:
    def normal() -> list[Tensor]:
        return [torch.randn(n, generator=generator, dtype=torch.float64).to(dtype) for n in sizes]

    return StepTensors(
        CPU,
        params=normal(),
        grads=normal(),
        exp_avgs=normal(),
        lost_bits=[None] * len(sizes),
        steps=[torch.tensor(3) for _ in sizes],
        ordinals=list(range(len(sizes))),
    )


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_has_the_whole_interface(backend: str) -> None:
    passes = backends.choose(backend, CPU)
    assert isinstance(passes, Passes)
    assert passes.name == backend


def test_a_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """``auto`` passes over it; asked for by name, it raises."""
    broken = {"broken": lambda device: f"it knows no {device.type}", **backends._REGISTRY}
    monkeypatch.setattr(backends, "_REGISTRY", broken)
    p = torch.nn.Parameter(torch.ones(2))
    assert SOFIM([p]).backends == {CPU: backends.choose("auto", CPU).name}
    with pytest.raises(RuntimeError, match=r"backend='broken' cannot run on cpu \(broken: it knows no cpu\)"):
        SOFIM([p], backend="broken")


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_step_splits_the_update(backend: str) -> None:
    """The known part of the step taken in ``accumulate`` and the rest in ``apply`` give what ``apply`` gives alone."""
    passes = backends.choose(backend, CPU)
    decay = Decay([0.9, 0.5, 0.0], [0.1, 0.5, -1.0], [0.01, 0.0, 0.02], cross=True)
    weight, gradient, moment = vector(0.99, 1.0, 0.9), vector(-0.3, -0.2, 0.5), vector(0.1, -0.4, 0.2)
    whole = made_tiles(torch.float64, torch.Generator().manual_seed(1))
    split = made_tiles(torch.float64, torch.Generator().manual_seed(1))
    sums = passes.accumulate(whole, decay)
    early = passes.accumulate(split, decay, GradientStep(weight, gradient))
    passes.apply(whole, Coefficients(moment=moment, weight=weight, gradient=gradient))
    passes.apply(split, Coefficients(moment=moment))
    assert sums.mm is not None
    assert torch.equal(sums.mm, early.mm)
    for name in ("mg", "mw"):
        assert torch.equal(getattr(sums, name), getattr(early, name))
    for a, b in zip(whole.params, split.params, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dots_are_the_dot_products(backend: str) -> None:
    made = made_tiles(torch.float32, torch.Generator().manual_seed(2), (7, TILE + 3, 0))
    before = [x.clone() for x in made.params + made.grads + made.exp_avgs]
    sums = backends.choose(backend, CPU).dots(made, Decay([0.9] * 3, [0.1] * 3, [0.01] * 3, cross=True))
    pairs = {"m": made.exp_avgs, "g": made.grads, "w": made.params}
    for name in sums._fields:
        left, right = pairs[name[0]], pairs[name[1]]
        expected = torch.stack([(a.double() * b.double()).sum() for a, b in zip(left, right, strict=True)])
        torch.testing.assert_close(getattr(sums, name), expected, rtol=1e-12, atol=1e-9)
    assert same_bits(before, made.params + made.grads + made.exp_avgs)


@pytest.mark.parametrize("options", SCHEDULES, ids=["plain", "guarded"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_every_written_tensor_counts_a_version(dtype: torch.dtype, backend: str, options: dict[str, Any]) -> None:
    problem = mixed_problem(dtype)
    optimizer = SOFIM(problem.groups, backend=backend, **options)
    give(problem.params, [torch.randn_like(p) for p in problem.params])
    optimizer.step()

    def versions() -> list[int]:
        tensors = [t for p in problem.params for t in (p, *optimizer.state[p].values())]
        return [t._version for t in tensors]

    before = versions()
    optimizer.step()
    assert all(new > old for new, old in zip(versions(), before, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stale_graph_is_noticed(backend: str) -> None:
    """A weight saved for a backward pass and then updated must raise there, not give wrong gradients."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = SOFIM([p], backend=backend)
    p.grad = torch.ones(3)
    loss = (p * p).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("options", SCHEDULES, ids=["plain", "guarded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("numerator", ["moment", "gradient"])
def test_bits_do_not_depend_on_the_number_of_threads(
    numerator: str, backend: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """Float32 weights hide what happens to a float64 sum; the sums themselves and float64 weights do not."""
    # What stands in for a GPU has no use for threads; there each tile is dear.
    sizes = (3, 1000, TILE + 17) if INTERPRETED or EMULATED else (3, 1000, 5 * TILE + 17, 300_007, 64 * TILE)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            generator = torch.Generator().manual_seed(7)
            params = [torch.nn.Parameter(torch.randn(n, generator=generator, dtype=dtype)) for n in sizes]
            optimizer = SOFIM(params, lr=0.1, numerator=numerator, backend=backend, **options)
            for _ in range(2):
                give(params, [torch.randn(n, generator=generator, dtype=dtype) for n in sizes])
                optimizer.step()
            (share,) = optimizer._plan.shares(optimizer)
            decay = Decay(*([factor] * len(sizes) for factor in (0.9, 0.1, 0.01)), cross=True)
            results.append(snapshot(optimizer) + [x for x in share.passes.dots(share.tensors, decay) if x is not None])
    finally:
        torch.set_num_threads(threads)
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])


@pytest.mark.parametrize("diagonal", ["identity", "mixed"])
def test_batches_and_tiles_of_any_size_give_the_same(diagonal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many tensors the reference takes at once, and how sums are cut, shows in the last digits at most."""
    results = []
    for chunk, tile in ((reference.CHUNK, reference.TILE), (16, 4), (1, 2)):
        monkeypatch.setattr(reference, "CHUNK", chunk)
        monkeypatch.setattr(reference, "TILE", tile)
        monkeypatch.setattr(solve, "TILE", tile)
        problem = mixed_problem(torch.float64, "l2" if diagonal == "identity" else "none", diagonal=diagonal)
        optimizer = SOFIM(problem.groups, max_grad_norm=0.7, skip_nonfinite=True, backend="reference")
        for _, grads in zip(range(4), problem.gradients(), strict=False):
            give(problem.params, grads)
            optimizer.step()
        results.append([p.detach() for p in problem.params])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)


def test_gradients_are_resolved_before_a_backend_sees_them() -> None:
    """Native passes read memory, where a lazy conjugation or negation does not show."""
    p, q = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64)), torch.nn.Parameter(torch.ones(2))
    optimizer = SOFIM([p, q])
    p.grad = torch.tensor([1 + 2j, 3 - 1j]).conj()
    q.grad = torch.tensor([1 + 2j, 3 - 1j]).conj().imag
    assert p.grad.is_conj()
    assert q.grad.is_neg()
    (share,) = optimizer._plan.shares(optimizer)
    assert not any(g.is_conj() or g.is_neg() for g in share.tensors.grads)
    assert torch.equal(share.tensors.grads[0], torch.tensor([[1.0, -2.0], [3.0, 1.0]]))
    assert torch.equal(share.tensors.grads[1], torch.tensor([-2.0, 1.0]))


@pytest.mark.parametrize("size", [0, 1, TILE - 1, TILE, TILE + 1, 3 * TILE + 5, 300 * TILE + 1])
def test_dot_of_any_size(size: int) -> None:
    """Float64 products: a constant does not drift, and squares of large float32 values stay finite."""
    x = torch.full((size,), 0.1)
    assert dot(x, x).item() == pytest.approx(size * float(x[0]) ** 2 if size else 0.0, rel=1e-12)
    large = torch.full((size,), 1e30)
    assert dot(large, torch.ones_like(large)).item() == pytest.approx(size * float(torch.tensor(1e30)), rel=1e-12)
    assert dot(large, large).isfinite()


@once
@pytest.mark.parametrize("fisher", ["model", "group", "parameter"])
@pytest.mark.parametrize("numerator", NUMERATORS)
@pytest.mark.parametrize("options", SCHEDULES, ids=["plain", "guarded"])
def test_no_step_waits_for_a_gpu(options: dict[str, Any], numerator: str, fisher: str) -> None:
    """On fake tensors of a CUDA device, which have no values: gradients come and go, a learning rate changes, ρ lies on
    the device. Nothing is read back, and nothing but kernel arguments crosses over.
    """
    with FakeTensorMode():
        params = [
            torch.nn.Parameter(torch.empty(shape, device="cuda", dtype=dtype))
            for shape, dtype in [
                ((3, 4), torch.float32),
                ((5,), torch.bfloat16),
                ((), torch.float64),
                ((40_000,), torch.float32),
            ]
        ]
        rho = torch.ones((), device="cuda")
        optimizer = SOFIM(
            [{"params": params[:2], "state_dtype": torch.bfloat16}, {"params": params[2:], "rho": rho}],
            numerator=numerator,
            fisher=fisher,
            weight_decay=0.1,
            decoupled_weight_decay=False,
            backend="reference",
            **options,
        )
        with Transfers() as watch:
            for step in range(4):
                for i, p in enumerate(params):
                    p.grad = None if step == i else torch.empty_like(p)
                optimizer.step()
                optimizer.param_groups[0]["lr"] *= 0.9
            assert watch.seen == []
            params[0].detach().cpu()
            assert watch.seen, "the watch itself must notice"
        assert optimizer.state[params[3]]["exp_avg"].device.type == "cuda"
        with pytest.raises(DataDependentOutputException):
            optimizer.skipped_steps.item()


@once
@pytest.mark.parametrize("rho", [None, 0.5], ids=["no-rank-one", "rank-one"])
@pytest.mark.parametrize("options", SCHEDULES, ids=["plain", "guarded"])
@pytest.mark.parametrize("diagonal", ["tensor", "row", "factored", "element"])
def test_no_adaptive_step_waits_for_a_gpu(diagonal: str, options: dict[str, Any], rho: float | None) -> None:
    with FakeTensorMode():
        shapes = [((3, 4), torch.float32), ((5,), torch.bfloat16), ((), torch.float64), ((2, 40_000), torch.float32)]
        params = [torch.nn.Parameter(torch.empty(shape, device="cuda", dtype=dtype)) for shape, dtype in shapes]
        optimizer = SOFIM(
            params,
            lr=torch.full((), 0.1, device="cuda"),
            rho=rho if rho is None else torch.full((), rho, device="cuda"),
            diagonal=diagonal,  # type: ignore[arg-type]
            numerator="nesterov",
            weight_decay=0.1,
            backend="reference",
            **options,
        )
        with Transfers() as watch:
            for step in range(4):
                for i, p in enumerate(params):
                    p.grad = None if step == i else torch.empty_like(p)
                optimizer.step()
        assert watch.seen == []
        assert (optimizer.signal is None) == (rho is None)


@pytest.mark.parametrize("options", SCHEDULES, ids=["plain", "guarded"])
@pytest.mark.parametrize("fisher", ["model", "group", "parameter"])
@pytest.mark.parametrize("numerator", NUMERATORS)
def test_fisher_blocks_span_devices(
    numerator: str, fisher: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parameters dealt out to two shares, as if they lay on two devices, take the steps that they take in one."""
    results = []
    for shares in (1, 2):
        problem = mixed_problem(torch.float64, "l2")
        optimizer = SOFIM(problem.groups, numerator=numerator, fisher=fisher, **options)
        if shares == 2:
            monkeypatch.setattr(gather, "by_device", lambda entries: [(CPU, entries[::2]), (CPU, entries[1::2])])
        for _, grads in zip(range(6), problem.gradients(), strict=False):
            give(problem.params, grads)
            optimizer.step()
        results.append([p.detach() for p in problem.params])
        if options:
            assert optimizer.grad_norm is not None
            results[-1].append(optimizer.grad_norm)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("rank_one", [True, False], ids=["rank-one", "no-rank-one"])
@pytest.mark.parametrize("options", SCHEDULES, ids=["plain", "guarded"])
@pytest.mark.parametrize("fisher", ["model", "group", "parameter"])
def test_adaptive_fisher_blocks_span_devices(
    fisher: str, options: dict[str, Any], rank_one: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for shares in (1, 2):
        problem = mixed_problem(torch.float64, "decoupled", diagonal="mixed", rank_one=rank_one)
        optimizer = SOFIM(problem.groups, numerator="nesterov", fisher=fisher, **options)
        if shares == 2:
            monkeypatch.setattr(gather, "by_device", lambda entries: [(CPU, entries[::2]), (CPU, entries[1::2])])
        for _, grads in zip(range(6), problem.gradients(), strict=False):
            give(problem.params, grads)
            optimizer.step()
        results.append([p.detach() for p in problem.params])
        if options:
            assert optimizer.grad_norm is not None
            results[-1].append(optimizer.grad_norm)
        assert (optimizer.signal is not None) == rank_one
        if optimizer.signal is not None:
            results[-1].append(optimizer.signal)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
