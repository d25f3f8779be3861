"""Triton's passes of a diagonal that adapts, with ``TRITON_INTERPRET=1``: against the reference, which defines them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.shapes import lenet5
from sofim_fused import SOFIM, backends, native
from sofim_fused.backends import StepTensors, Variance
from sofim_fused.backends.interface import Scales
from sofim_fused.backends.triton import adaptive, adaptive_step, pack, workspace
from tests.support.problems import give, give_state, same_bits, snapshot
from tests.support.runs import INTERPRETED

pytest.importorskip("triton")
if not INTERPRETED:
    pytest.skip("runs with TRITON_INTERPRET=1 (make interpreter)", allow_module_level=True)

CPU = torch.device("cpu")
whole_steps = pytest.mark.skipif(isinstance(native.cpu(), str), reason="takes the native part")
GUARD: dict[str, Any] = {"max_grad_norm": 0.5, "skip_nonfinite": True}


def parameters(dtype: torch.dtype, generator: torch.Generator) -> list[torch.nn.Parameter]:
    """Rows and columns of many lengths, in the memory orders that kernels treat differently."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    made = [
        normal(7, 25),
        normal(3, 1),
        normal(1, 1500),
        normal(0, 3),
        normal(9),
        normal(),
        normal(2, 3, 4, 5).to(memory_format=torch.channels_last),
        normal(6, 4).t(),
        normal(5, 3, 2).transpose(0, 1),
        normal(4, 6)[:, ::2],
    ]
    return [torch.nn.Parameter(x) for x in made]


def trained(backend: str, dtype: torch.dtype, options: dict[str, Any], steps: int) -> SOFIM:
    """Two groups after some steps; if steps may be skipped, the second one is."""
    generator = torch.Generator().manual_seed(3)
    params = parameters(dtype, generator)
    groups = [{"params": params[:5], "beta2": 0.9, "weight_decay": 0.1}, {"params": params[5:], "maximize": True}]
    optimizer = SOFIM(groups, lr=0.01, backend=backend, **options)
    for step in range(steps):
        grads: list[Tensor | None] = []
        for p in params:
            grad = (0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(dtype)
            grads.append(grad if step % 2 else torch.empty_like(p).copy_(grad))
        if step == 1 and options.get("skip_nonfinite"):
            grads[0][6, 24] = torch.nan  # type: ignore[index]
        give(params, grads)
        optimizer.step()
    return optimizer


CASES: list[tuple[str, str, float | None, dict[str, Any], torch.dtype, str]] = [
    ("tensor", "nesterov", 0.3, GUARD, torch.bfloat16, "group"),
    ("tensor", "moment", None, {}, torch.float64, "model"),
    ("row", "gradient", 0.5, {"max_grad_norm": 0.5}, torch.float64, "parameter"),
    ("row", "moment", 0.3, GUARD, torch.float32, "model"),
    ("row", "nesterov", None, {}, torch.float16, "group"),
    ("factored", "moment", 0.3, {}, torch.float32, "parameter"),
    ("factored", "nesterov", None, GUARD, torch.float64, "model"),
    ("factored", "gradient", 0.4, GUARD, torch.bfloat16, "group"),
    ("element", "gradient", None, {}, torch.bfloat16, "parameter"),
    ("element", "nesterov", 0.3, GUARD, torch.float32, "group"),
    ("element", "moment", 0.5, {}, torch.float64, "model"),
]


@pytest.mark.parametrize(
    ("diagonal", "numerator", "rho", "guard", "dtype", "fisher"),
    CASES,
    ids=lambda x: str(x).removeprefix("torch.") if not isinstance(x, dict) else "-".join(x) or "plain",
)
def test_a_step_is_the_reference_s(
    diagonal: str, numerator: str, rho: float | None, guard: dict[str, Any], dtype: torch.dtype, fisher: str
) -> None:
    """Weights, all state, the norm and the signal."""
    options = {"diagonal": diagonal, "numerator": numerator, "rho": rho, "fisher": fisher, **guard}
    if dtype == torch.bfloat16:
        options["state_dtype"] = torch.bfloat16
    steps = 3 if guard.get("skip_nonfinite") else 2
    mine, theirs = (trained(backend, dtype, options, steps) for backend in ("triton", "reference"))
    for name, a, b in zip(_names(mine), snapshot(mine), snapshot(theirs), strict=True):
        # Sums are added in another order, so that a float32 result may be rounded in the other direction, and a value
        # of 16 bits is another one then.
        if a.dtype == torch.int16:  # the rest of a weight: test_master_bits.py compares whole ones, bit by bit
            continue
        bits = torch.finfo(a.dtype).bits if a.is_floating_point() else 64
        tolerance = {64: 1e-14, 32: 3e-7, 16: 8e-3}[bits]
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")
    for a, b in ((mine.signal, theirs.signal), (mine.grad_norm, theirs.grad_norm)):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-3 if dtype == torch.bfloat16 else 1e-6, atol=0, equal_nan=True)


def _names(optimizer: SOFIM) -> list[str]:
    return [
        f"{name} of parameter {i}"
        for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])
        for name in ["w", *sorted(optimizer.state[p])]
    ]


def tensors_of(grads: list[Tensor], diagonal: str) -> StepTensors:
    """Tensors of zeros with these gradients, and their running means, zero too."""
    variances = []
    for g in grads:
        by_row = diagonal in ("row", "factored") and g.dim() > 1
        col_var = torch.zeros_like(g[0], dtype=torch.float32) if by_row and diagonal == "factored" else None
        row_var = torch.zeros(g.shape[0]) if by_row else None
        whole = torch.zeros(g.shape) if diagonal == "element" else None if by_row else torch.zeros(())
        shape = (g.shape[0], g[0].numel()) if by_row else (1, g.numel())
        variances.append(Variance(row_var, col_var, whole, shape))
    zeros = [torch.zeros_like(g) for g in grads]
    steps = [torch.tensor(0) for _ in grads]
    ordinals = list(range(len(grads)))
    return StepTensors(
        CPU, zeros, grads, [torch.zeros_like(g) for g in grads], [None] * len(grads), steps, ordinals, variances
    )


@pytest.mark.parametrize("diagonal", ["tensor", "row", "factored"])
def test_squares_of_any_shape(diagonal: str) -> None:
    """Matrices of one tile and of several, in each direction; full tiles and parts; slots, and none."""
    generator = torch.Generator().manual_seed(5)
    shapes = [(1, 4100), (3, 1100), (140, 133), (600, 5), (5, 140), (130, 64), (513, 1), (128, 128), (2, 3)]
    grads = [torch.randn(shape, generator=generator) for shape in shapes]
    grads.append(torch.randn(130, 3, 2, 7, generator=generator).to(memory_format=torch.channels_last))
    grads.append(torch.randn(40, 9, generator=generator).t())
    grads.append(torch.randn(6, 8, generator=generator).bfloat16())
    tensors = tensors_of(grads, diagonal)
    mine, theirs = (backends.choose(name, CPU).squares(tensors) for name in ("triton", "reference"))
    for name, a, b in zip(mine._fields[:3], mine[:3], theirs[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=0, msg=lambda text, name=name: f"{name}: {text}")


def test_squares_take_few_launches() -> None:
    """One for a common network, whatever the shapes of its tensors; more only where there are many kinds of tiles."""
    k = adaptive.adaptive_kernels()

    def launches(grads: list[Tensor]) -> list[tuple[int, int]]:
        matrices = adaptive.Matrices(tensors_of(grads, "factored")).placed
        plan = adaptive.SquaresPlan(k, CPU, matrices, [None] * len(matrices))
        assert sum(launch.tiles for launch in plan.launches) == len(plan.tile_of)
        return [(launch.start, len(launch.kinds)) for launch in plan.launches]

    assert launches([torch.zeros(shape) for shape in lenet5()]) == [(0, 4)]
    grads = [torch.zeros(shape, dtype=dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16)
             for shape in ((8,), (4, 64), (8, 8), (8, 64))]  # fmt: skip
    (first, kinds), (second, others) = launches(grads)
    assert (first, kinds, second, others) == (0, k.MOST_KINDS, 6, 12 - k.MOST_KINDS)


def test_squares_do_not_overflow_and_means_saturate() -> None:
    """g² of the largest float32 is a float64; a running mean of such squares is the largest float32, not infinite."""
    for diagonal in ("tensor", "row", "factored", "element"):
        p = torch.nn.Parameter(torch.zeros(3, 4))
        optimizer = SOFIM([p], diagonal=diagonal, rho=None, backend="triton")
        p.grad = torch.full((3, 4), 3e38)
        optimizer.step()
        means = [x for name, x in optimizer.state[p].items() if name.endswith("var") or name == "variance"]
        assert all((x == torch.finfo(torch.float32).max).all() for x in means)
        assert p.isfinite().all()


@pytest.mark.parametrize("rho", [None, 0.3])
def test_a_skipped_step_leaves_every_bit(rho: float | None) -> None:
    options: dict[str, Any] = {"diagonal": "factored", "rho": rho, "skip_nonfinite": True}
    optimizer = trained("triton", torch.float32, options, steps=1)
    before = snapshot(optimizer)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    params[2].grad[0, 1499] = torch.inf
    optimizer.step()
    assert same_bits(before, snapshot(optimizer))
    assert int(optimizer.skipped_steps) == 1


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts launches, by kernel."""
    counts: Counter[str] = Counter()
    kernels = adaptive.adaptive_kernels()
    run = adaptive.run
    names = {
        getattr(kernels, name): name for name in ("squares", "add_up", "adapt", "sweep", "fold_scaled", "solve_scaled")
    }

    def counted(kernel: Any, *args: Any, **kwargs: Any) -> None:
        counts[names[kernel]] += 1
        run(kernel, *args, **kwargs)

    monkeypatch.setattr(adaptive, "run", counted)
    return counts


@whole_steps
@pytest.mark.parametrize(
    ("diagonal", "rho", "guard", "dtype"),
    [
        ("factored", None, {}, torch.float32),
        ("factored", 0.3, GUARD, torch.bfloat16),
        ("row", 0.3, {}, torch.float64),
        ("tensor", None, GUARD, torch.float32),
        ("element", 0.3, {"max_grad_norm": 0.1}, torch.float16),
    ],
)
def test_whole_steps_and_the_passes_take_the_same_step(
    diagonal: str,
    rho: float | None,
    guard: dict[str, Any],
    dtype: torch.dtype,
    launches: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bit for bit, with settings, gradients and addresses that change."""
    results = []
    for whole in (True, False):
        generator = torch.Generator().manual_seed(12)
        shapes = [(7, 25), (), (130, 3), (9,), (0, 3), (2, 3, 4, 5)]
        params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
        params[5].data = params[5].data.to(memory_format=torch.channels_last)
        groups = [{"params": params[:2], "beta2": 0.9}, {"params": params[2:], "lr": torch.tensor(0.02)}]
        optimizer = SOFIM(groups, lr=0.01, diagonal=diagonal, rho=rho, numerator="nesterov", backend="triton", **guard)
        give_state(optimizer)
        if not whole:
            monkeypatch.setattr(optimizer, "_native_step", lambda: lambda *_: None)
        seen = []
        for step in range(4):
            for p in params:
                p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))
            if step == 1:
                params[0].grad = None
                optimizer.param_groups[0]["lr"] *= 0.5
            elif step == 2:
                params[2].data = params[2].detach().clone()
                params[3].grad *= torch.inf  # type: ignore[operator]
            launches.clear()
            optimizer.step()
            seen += [x for x in (optimizer.signal, optimizer.grad_norm) if x is not None]
            if whole:
                assert launches["sweep"] == (1 if rho is None else 2)
        results.append((snapshot(optimizer), seen, int(optimizer.skipped_steps), launches["squares"]))
    assert same_bits(results[0][0], results[1][0])
    assert same_bits([x.nan_to_num() for x in results[0][1]], [x.nan_to_num() for x in results[1][1]])
    assert results[0][2:] == results[1][2:]


@whole_steps
def test_tables_are_sent_only_when_something_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a step whose gradients would have to be copied is left to the passes."""
    sent: list[int] = []
    for module in (adaptive, adaptive_step, workspace):
        send = module.send

        def noted(values: Tensor, to: Tensor, *args: Any, _send: Any = send) -> Tensor:
            sent.append(values.numel())
            return _send(values, to, *args)  # type: ignore[no-any-return]

        monkeypatch.setattr(module, "send", noted)
    p = torch.nn.Parameter(torch.ones(6, 4))
    optimizer = SOFIM([p], diagonal="factored", rho=None, backend="triton")
    give_state(optimizer)
    p.grad = torch.ones_like(p)
    for _ in range(2):
        sent.clear()
        optimizer.step()
    assert sent == []
    optimizer.param_groups[0]["lr"] *= 0.5
    optimizer.step()
    assert sent == [8, 2 * pack.HYPERS]
    sent.clear()
    p.grad = torch.ones_like(p)
    optimizer.step()
    kernels = adaptive.adaptive_kernels()
    assert sent == [kernels.COLUMNS, kernels.S_COLUMNS]
    q = torch.nn.Parameter(torch.ones(4, 6).t())
    other = SOFIM([q], diagonal="factored", rho=None, backend="triton")
    give_state(other)
    q.grad = torch.ones_like(q)
    taken: Any = other._native_step()
    assert taken(other.param_groups, other.state) is None
    other.step()
    assert (q < 1).all()
    assert int(other.state[q]["step"]) == 1


@pytest.mark.parametrize("rho", [None, 0.3])
def test_a_pass_is_one_launch_for_any_number_of_tensors(rho: float | None, launches: Counter[str]) -> None:
    """``squares`` takes one for each shape of tiles and type of gradients."""
    for count in (1, 7):
        params = [torch.nn.Parameter(torch.ones(5, 40 + 4 * i)) for i in range(count)]
        optimizer = SOFIM(params, diagonal="factored", rho=rho, numerator="nesterov", backend="triton")
        for p in params:
            p.grad = torch.ones_like(p)
        launches.clear()
        optimizer.step()
        sums = {"squares": 1, "add_up": 1, "adapt": 1}
        assert launches == {
            **sums,
            "solve_scaled": 1,
            **({"sweep": 1} if rho is None else {"sweep": 2, "fold_scaled": 1}),
        }


def test_scales_that_came_from_elsewhere_are_used() -> None:
    """As for parameters that are spread over ranks, whose factors are computed in pure PyTorch."""
    generator = torch.Generator().manual_seed(8)
    tensors = tensors_of([torch.randn(4, 6, generator=generator)], "factored")
    passes = backends.choose("triton", CPU)
    decay = backends.Decay([0.9], [0.1], None, cross=False)
    for factor in (1.0, 3.0):  # other values, perhaps at the same address
        vector = torch.ones(1, dtype=torch.float64)
        scales = Scales(
            rows=factor * torch.rand(4, generator=generator, dtype=torch.float64),
            cols=torch.rand(6, generator=generator, dtype=torch.float64),
            trace=vector,
            beta2=vector / 2,
            eps=vector,
            root=vector,
        )
        w = tensors.params[0].clone()
        m = tensors.exp_avgs[0].clone()
        passes.commit_scaled(tensors, decay, backends.Coefficients(moment=-vector), scales)
        inverse = scales.rows.float()[:, None] * scales.cols.float()
        torch.testing.assert_close(tensors.params[0], w - (0.9 * m + 0.1 * tensors.grads[0]) * inverse)


def test_running_means_with_gaps_in_memory() -> None:
    """They are copied, and written back."""
    generator = torch.Generator().manual_seed(9)
    results = []
    grads = [torch.randn(5, 6, generator=generator)]
    for backend in ("triton", "reference"):
        tensors = tensors_of(grads, "factored")
        gaps = Variance(torch.zeros(10)[::2], torch.zeros(12)[::2], None, (5, 6))
        tensors = replace(tensors, variances=[gaps])
        passes = backends.choose(backend, CPU)
        settings = backends.Settings(
            hyper=torch.tensor([[0.1, 0.9, 1.0, 0.0, 0.0, 1.0, 0.9, 1e-8]], dtype=torch.float64),
            sizes=[1],
            fisher=0,
            numerator=0,
            group_of=torch.zeros(1, dtype=torch.int64),
            scales_weight=False,
        )
        scales, _ = passes.adapt(tensors, settings, passes.squares(tensors), None, None)
        results.append([gaps.row_var, gaps.col_var, scales.rows, scales.cols, scales.trace])
    for a, b in zip(*results, strict=True):
        assert a is not None
        assert a.abs().sum() > 0
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_too_many_columns_for_32_bits_run_in_pure_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaptive, "WIDEST", 8)
    monkeypatch.setattr(adaptive, "launch_sweep", SimpleNamespace())  # cannot be called
    p = torch.nn.Parameter(torch.ones(3, 8))
    optimizer = SOFIM([p], diagonal="factored", rho=None, backend="triton")
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert (p < 1).all()
