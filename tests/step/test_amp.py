"""Scaled gradients: the step under torch.amp.GradScaler, which says how large they are and whether all are finite."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sofim_fused import SOFIM
from sofim_fused.step import gather, schedule
from tests.backends.support import Transfers
from tests.support.problems import (
    GUARDED,
    NUMERATORS,
    Problem,
    give,
    give_state,
    mixed_problem,
    ready_problem,
    same_bits,
    snapshot,
)
from tests.support.runs import GPU_BACKENDS, Run, on_gpu, once

CPU = torch.device("cpu")
ONLY_MEASURED: dict[str, Any] = {"max_grad_norm": float("inf")}  # a guarded step that leaves gradients as they are


def gradients(problem: Problem, steps: int) -> Iterator[list[Tensor | None]]:
    """Of all parameters in the first step, later of all but one in every third."""
    generator = torch.Generator().manual_seed(3)
    for step in range(steps):
        absent = step % len(problem.params) if step % 3 == 1 else None
        grads: list[Tensor | None] = []
        for i, p in enumerate(problem.params):
            value = 0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
            grads.append(None if i == absent else torch.empty_like(p).copy_(value))
        yield grads


def bad(step: int) -> bool:
    """Whether a step meets an infinite gradient."""
    return step % 3 == 2


def scaler_for(run: Run, scale: float = 2.0**16) -> torch.amp.GradScaler:
    """One whose scale soon grows; every bit of a gradient survives a power of two."""
    return torch.amp.GradScaler(run.device, init_scale=scale, growth_interval=2)


def scaled(scaler: torch.amp.GradScaler, grads: Sequence[Tensor | None], spoiled: bool = False) -> list[Tensor | None]:
    """The gradients as a backward pass from a scaled loss leaves them."""
    products = [None if g is None else scaler.scale(g) for g in grads]
    if spoiled:
        target = next(g for g in products if g is not None and g.numel())
        target[(0,) * target.dim()] = float("inf")
    return products


def unscaled(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad


CLIP = 0.4
# What is done between the backward pass and the step, and to the model that is trained without scaling.
PREPARATIONS: dict[str, tuple[Callable[..., None], Callable[..., None]]] = {
    "alone": (lambda scaler, optimizer, params: None, lambda params: None),
    "unscaled": (lambda scaler, optimizer, params: scaler.unscale_(optimizer), lambda params: None),
    "clipped": (
        lambda scaler, optimizer, params: (scaler.unscale_(optimizer), nn.utils.clip_grad_norm_(params, CLIP)),
        lambda params: nn.utils.clip_grad_norm_(params, CLIP),
    ),
}
CASES: list[tuple[str, torch.dtype | tuple[torch.dtype, ...], str, dict[str, Any]]] = [
    ("alone", torch.float32, "none", {}),
    ("alone", torch.float64, "l2", {}),
    ("alone", torch.float16, "none", {}),
    ("alone", torch.float16, "l2", {"max_grad_norm": 0.5}),
    ("alone", (torch.float32, torch.bfloat16), "decoupled", {"state_dtype": torch.bfloat16}),
    ("alone", torch.float32, "l2", {"max_grad_norm": 0.5}),
    ("alone", torch.float64, "none", {"max_grad_norm": 0.5, "fisher": "group"}),
    ("alone", torch.float32, "none", {"skip_nonfinite": True, "fisher": "parameter"}),
    ("alone", torch.float64, "none", {"amp_fused": False}),
    ("alone", torch.float32, "l2", {"amp_fused": False, **GUARDED}),
    ("unscaled", torch.float64, "none", {}),
    ("unscaled", torch.float32, "l2", GUARDED),
    ("clipped", torch.float64, "l2", {}),
    ("clipped", torch.float32, "none", {"skip_nonfinite": True}),
]


@pytest.mark.covering(2, 1)
@pytest.mark.parametrize("numerator", NUMERATORS)
@pytest.mark.parametrize(("preparation", "dtype", "decay", "options"), CASES, ids=str)
def test_scaled_training_equals_unscaled(
    preparation: str,
    dtype: torch.dtype | tuple[torch.dtype, ...],
    decay: str,
    options: dict[str, Any],
    numerator: str,
    run: Run,
) -> None:
    """Over steps of which some meet an infinity. What the step unscales itself are the same bits."""
    if run.device == "cuda" and not isinstance(dtype, torch.dtype):  # PyTorch's check there takes no bfloat16
        dtype = tuple(torch.float16 if part == torch.bfloat16 else part for part in dtype)
    ours, theirs = (mixed_problem(dtype, decay, layouts=run.layouts, device=run.device) for _ in range(2))
    optimizer = SOFIM(ours.groups, numerator=numerator, backend=run.backend, **options)
    fused = options.get("amp_fused", True)
    exact = preparation == "alone" and fused
    without = {name: value for name, value in options.items() if name != "amp_fused"}
    if exact:
        without = {**ONLY_MEASURED, **without}
    twin = SOFIM(theirs.groups, numerator=numerator, backend=run.backend, **without)
    if run.ready:
        give_state(optimizer)
        give_state(twin)
    prepare, prepare_twin = PREPARATIONS[preparation]
    halves = torch.float16 in (dtype if isinstance(dtype, tuple) else (dtype,))
    scaler = scaler_for(run, 16.0 if halves else 2.0**16)
    scales, skipped, clipped = [], 0, 0
    for step, grads in enumerate(gradients(ours, run.steps(9))):
        give(ours.params, scaled(scaler, grads, bad(step)))
        prepare(scaler, optimizer, ours.params)
        before = snapshot(optimizer)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        assert "grad_scale" not in vars(optimizer)
        if bad(step):
            skipped += fused
            assert same_bits(before, snapshot(optimizer))
            assert scales[-1] == scales[-2] / 2
            if fused:
                assert optimizer.grad_norm is not None
                assert not optimizer.grad_norm.isfinite()
        else:
            give(theirs.params, [None if g is None else g.clone() for g in grads])
            prepare_twin(theirs.params)
            twin.step()
            assert not same_bits(before, snapshot(optimizer))
            if twin.grad_norm is not None and optimizer.grad_norm is not None:
                assert optimizer.grad_norm.item() == pytest.approx(twin.grad_norm.item(), rel=1e-6)
                clipped += twin.grad_norm.item() > options.get("max_grad_norm", float("inf"))
        assert int(optimizer.skipped_steps) == skipped
    assert any(new > old for old, new in pairwise(scales)) or run.steps(9) < 9
    assert clipped > 1 or "max_grad_norm" not in options or preparation == "clipped"
    pairs = list(zip(snapshot(optimizer), snapshot(twin), strict=True))
    if exact:
        assert same_bits([a for a, _ in pairs], [b for _, b in pairs])
    for a, b in pairs:
        tolerance = 1e-12 if a.dtype == torch.float64 else 1e-6
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# What GradScaler leaves at an optimizer, by hand


def scales_of(run: Run) -> list[Any]:
    """The same scale, in whatever comes."""
    device = run.device
    return [
        torch.full((), 1000.0, device=device),
        torch.full((1,), 1000.0, device=device),
        torch.full((1, 1), 1000.0, device=device, dtype=torch.float64),
        torch.full((), 1000.0, device=device, dtype=torch.bfloat16),
        torch.tensor(1000.0),
        torch.tensor([1000], device=device),
        nn.Parameter(torch.full((), 1000.0, device=device)),
        1000.0,
        1000,
    ]


def test_a_scale_of_any_kind(run: Run) -> None:
    """Also one that is no power of two; a gradient is not written to."""
    (optimizer, params), (twin, others) = (
        ready_problem(run.backend, [5, 4100, 1], run.device, max_grad_norm=0.5, decoupled_weight_decay=False)
        for _ in range(2)
    )
    for count, scale in enumerate([scales_of(run)[0], *scales_of(run)][: run.steps(10)]):
        true = [torch.sin(torch.arange(p.numel(), device=run.device) + float(count)) for p in params]
        give(others, true)
        twin.step()
        give(params, [g * 1000 for g in true])
        given, versions = [unscaled(p).clone() for p in params], [unscaled(p)._version for p in params]
        optimizer.grad_scale = scale  # type: ignore[attr-defined]
        optimizer.step()
        assert same_bits(given, [unscaled(p) for p in params])
        assert versions == [unscaled(p)._version for p in params]
        assert optimizer.grad_norm is not None
        assert twin.grad_norm is not None
        assert optimizer.grad_norm.item() == pytest.approx(twin.grad_norm.item(), rel=1e-6)
        for a, b in zip(params, others, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_float64_takes_a_float64_scale_as_it_is() -> None:
    p, q = (nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    scale = torch.tensor(1 / 3, dtype=torch.float64)
    optimizer, twin = SOFIM([p]), SOFIM([q])
    for _ in range(3):
        p.grad, q.grad = scale * torch.arange(3), torch.arange(3.0, dtype=torch.float64)
        optimizer.grad_scale = scale  # type: ignore[attr-defined]
        optimizer.step()
        twin.step()
    torch.testing.assert_close(p, q, rtol=1e-14, atol=1e-14)


def found_of(run: Run) -> list[Any]:
    """An infinity was found, in whatever comes."""
    device = run.device
    return [
        torch.full((), 1.0, device=device),
        torch.full((1,), 2.0, device=device),
        torch.full((), 1.0, device=device, dtype=torch.float64),
        torch.full((), 1.0, device=device, dtype=torch.float16),
        torch.full((), True, device=device),
        torch.tensor(1.0),
        1,
        1.0,
    ]


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}, {"skip_nonfinite": True}], ids=str)
def test_found_inf_of_any_kind(options: dict[str, Any], run: Run) -> None:
    """It skips the step whatever the gradients are; a zero of any kind does not."""
    optimizer, params = ready_problem(run.backend, [5, 4100, 1], run.device, **options)
    optimizer.step()
    everything = found_of(run)[: run.steps(8)]
    for count, found in enumerate(everything):
        before = snapshot(optimizer)
        optimizer.found_inf = found  # type: ignore[attr-defined]
        optimizer.step()
        assert same_bits(before, snapshot(optimizer)), found
        assert int(optimizer.skipped_steps) == count + 1
        assert optimizer.grad_norm is not None
        norm = torch.cat([unscaled(p) for p in params]).norm().item()
        assert optimizer.grad_norm.item() == pytest.approx(norm, rel=1e-5)
    for found in everything:
        before = snapshot(optimizer)
        optimizer.found_inf = found * 0  # type: ignore[attr-defined]
        optimizer.step()
        assert not same_bits(before, snapshot(optimizer)), found
    assert int(optimizer.skipped_steps) == len(everything)
    assert int(optimizer.state[params[0]]["step"]) == 1 + len(everything)


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}, {"skip_nonfinite": True}], ids=str)
def test_scaling_comes_and_goes(options: dict[str, Any], run: Run) -> None:
    """Nothing of a step's scale is left in the next one."""
    (optimizer, params), (twin, others) = (
        ready_problem(run.backend, [5, 4100, 1], run.device, **options) for _ in range(2)
    )
    steps = [(None, None), (8.0, None), (None, 0.0), (4.0, 0.0), (2.0, 1.0), (None, 1.0), (None, None), (16.0, None)]
    skipped = 0
    for scale, found in (*steps, *reversed(steps)):
        for name, value in (("grad_scale", scale), ("found_inf", found)):
            vars(optimizer).pop(name, None)
            if value is not None:
                setattr(optimizer, name, torch.full((), value, device=run.device))
        give(params, [unscaled(p) * (scale or 1.0) for p in others])
        optimizer.step()
        if found:
            skipped += 1
        else:
            twin.step()
    assert int(optimizer.skipped_steps) == skipped
    for a, b in zip(snapshot(optimizer), snapshot(twin), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"skip_nonfinite": True}], ids=str)
def test_a_nan_that_comes_after_unscaling(options: dict[str, Any], run: Run) -> None:
    """GradScaler does not know of it: it shows, or skip_nonfinite sees it."""
    optimizer, params = ready_problem(run.backend, [5, 40], run.device, **options)
    optimizer.step()
    scaler = scaler_for(run)
    scaler.scale(torch.ones((), device=run.device))
    scaler.unscale_(optimizer)
    unscaled(params[1])[7] = float("nan")
    scaler.step(optimizer)
    assert int(optimizer.skipped_steps) == len(options)
    assert bool(params[0].isfinite().all()) == bool(options)


@torch.no_grad()
def test_nothing_found_does_not_hide_a_nan_from_skip_nonfinite() -> None:
    """Where the verdict is not looked at before the step, as on a GPU."""
    optimizer, params = ready_problem("reference", [5, 40], skip_nonfinite=True)
    unscaled(params[1])[7] = float("nan")
    guard = schedule.guarded(
        optimizer._plan.shares(optimizer), optimizer.param_groups, None, True, found_inf=torch.zeros(())
    )
    assert guard.skip is not None
    assert guard.skip.item()
    assert params[0].isfinite().all()


def test_a_plain_step_stays_one_where_nothing_was_found() -> None:
    """On the CPU, where that can be seen; the norm is then not taken."""
    for backend in ("cpu", "reference"):
        optimizer, _ = ready_problem(backend, [5, 40])
        for _ in range(3):
            optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
            optimizer.step()
        assert optimizer.grad_norm is None
        optimizer.grad_scale = torch.ones(())  # type: ignore[attr-defined]
        optimizer.step()
        assert optimizer.grad_norm is not None


@pytest.mark.parametrize("fisher", ["model", "group", "parameter"])
def test_over_several_devices(fisher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the parameters lay on two: one norm, one decision."""
    results = []
    for shares in (1, 2):
        problem = mixed_problem(torch.float64, "l2")
        optimizer = SOFIM(problem.groups, fisher=fisher, max_grad_norm=0.5)
        if shares == 2:
            monkeypatch.setattr(gather, "by_device", lambda entries: [(CPU, entries[::2]), (CPU, entries[1::2])])
            optimizer._step_in_one_call = lambda *_: None
        for step, grads in enumerate(gradients(problem, 6)):
            give(problem.params, [None if g is None else 64 * g for g in grads])
            optimizer.grad_scale = torch.tensor(64.0)  # type: ignore[attr-defined]
            optimizer.found_inf = torch.tensor(float(bad(step)))  # type: ignore[attr-defined]
            optimizer.step()
        assert int(optimizer.skipped_steps) == 2
        assert optimizer.grad_norm is not None
        results.append([*snapshot(optimizer), optimizer.grad_norm])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@once
@pytest.mark.parametrize("found", [None, 0.0, 1.0])
@pytest.mark.parametrize("scale", [None, 8.0])
@pytest.mark.parametrize("options", [{}, GUARDED, {"fisher": "group", "numerator": "gradient"}], ids=str)
def test_no_scaled_step_waits_for_a_gpu(options: dict[str, Any], scale: float | None, found: float | None) -> None:
    """On fake tensors of a CUDA device, which have no values (tests/backends/test_passes.py)."""
    with FakeTensorMode():
        params = [nn.Parameter(torch.empty(n, device="cuda")) for n in (3, 40_000)]
        optimizer = SOFIM([{"params": [p]} for p in params], backend="reference", **options)
        for name, value in (("grad_scale", scale), ("found_inf", found)):
            if value is not None:
                setattr(optimizer, name, torch.full((1,), value, device="cuda"))
        with Transfers() as watch:
            for _ in range(3):
                give(params, [torch.empty_like(p) for p in params])
                optimizer.step()
            assert watch.seen == []
        guarded = "max_grad_norm" in options or scale is not None or found is not None
        assert (optimizer.grad_norm is not None) == guarded


# GradScaler and the optimizer


def test_one_scaler_for_two_optimizers(run: Run) -> None:
    """The infinity in one's gradients does not stop the other."""
    scaler = scaler_for(run)
    (spoiled, params), (fine, others) = (ready_problem(run.backend, [5, 40], run.device) for _ in range(2))
    for optimizer, some, infinite in ((spoiled, params, True), (fine, others, False)):
        optimizer.step()
        give(some, scaled(scaler, [unscaled(p) for p in some], infinite))
    before = [snapshot(spoiled), snapshot(fine)]
    scaler.step(spoiled)
    scaler.step(fine)
    scaler.update()
    assert same_bits(before[0], snapshot(spoiled))
    assert not same_bits(before[1], snapshot(fine))
    assert (int(spoiled.skipped_steps), int(fine.skipped_steps)) == (1, 0)
    assert scaler.get_scale() == 2.0**15


def test_a_step_without_gradients() -> None:
    """GradScaler then has looked at nothing: found_inf is the number 0, and update() its own error."""
    optimizer = SOFIM([nn.Parameter(torch.ones(3))])
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    assert int(optimizer.skipped_steps) == 0
    assert not optimizer.state
    with pytest.raises(AssertionError, match="No inf checks were recorded"):
        scaler.update()


def test_a_disabled_scaler_changes_nothing() -> None:
    results = []
    for disabled in (True, False):
        optimizer, _ = ready_problem("auto", [5, 40])
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        for _ in range(3):
            scaler.step(optimizer) if disabled else optimizer.step()
        results.append(snapshot(optimizer))
    assert same_bits(*results)


def test_gradients_of_float16_are_taken_only_inside_the_step() -> None:
    for fused in (True, False):
        p = nn.Parameter(torch.ones(3, dtype=torch.float16))
        optimizer = SOFIM([p], amp_fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
        p.grad = scaler.scale(torch.ones(3, dtype=torch.float16))
        if fused:
            scaler.step(optimizer)
            assert int(optimizer.state[p]["step"]) == 1
        else:
            with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
                scaler.step(optimizer)


def test_gradients_too_small_for_float16_survive() -> None:
    """What scaling is for: the true gradient of 2⁻²⁶ would be 0 as a float16."""
    p = nn.Parameter(torch.zeros(2, dtype=torch.float16))
    optimizer = SOFIM([p], lr=2.0**20, momentum=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    p.grad = scaler.scale(torch.tensor([2.0**-26, 0.0])).half()
    scaler.step(optimizer)
    assert optimizer.grad_norm is not None
    assert optimizer.grad_norm.item() == 2.0**-26
    assert p.tolist() == [-(2.0**-6), 0.0]


def test_scaler_s_own_errors() -> None:
    optimizer, params = ready_problem("auto", [5])
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(AssertionError, match=r"may indicate your script did not use scaler\.scale"):
        scaler.step(optimizer)
    scaler.scale(torch.ones(()))
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        scaler.step(optimizer, closure=lambda: 0.0)
    assert same_bits(before, snapshot(optimizer))
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) has already been called"):
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match=r"step\(\) has already been called"):
        scaler.step(optimizer)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) is being called after step\(\)"):
        scaler.unscale_(optimizer)
    assert int(optimizer.state[params[0]]["step"]) == 1


def reloaded(optimizer: SOFIM) -> SOFIM:
    optimizer.load_state_dict(optimizer.state_dict())
    return optimizer


COPIES: dict[str, Callable[[SOFIM], SOFIM]] = {
    "itself": lambda optimizer: optimizer,
    "loaded": reloaded,
    "pickled": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
    "copied": copy.deepcopy,
    "copied twice": lambda optimizer: copy.deepcopy(copy.deepcopy(optimizer)),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize(("given", "kept"), [({}, True), ({"amp_fused": None}, True), ({"amp_fused": False}, False)])
def test_the_setting_survives(given: dict[str, Any], kept: bool, how: str) -> None:
    optimizer, _ = ready_problem("auto", [5], **given)
    optimizer.step()
    assert COPIES[how](optimizer)._step_supports_amp_scaling is kept


def test_the_setting_of_an_old_pickle() -> None:
    """From a version that did not have it."""
    optimizer, _ = ready_problem("auto", [5], amp_fused=False)
    old = optimizer.__getstate__()
    del old["_amp_fused"]
    fresh: SOFIM = SOFIM.__new__(SOFIM)
    fresh.__setstate__(old)
    assert fresh._step_supports_amp_scaling is True


def test_a_scale_is_not_saved() -> None:
    optimizer, _ = ready_problem("auto", [5])
    optimizer.grad_scale = torch.ones(())  # type: ignore[attr-defined]
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert not hasattr(twin, "grad_scale")


# On a GPU


@pytest.fixture(params=GPU_BACKENDS)
def gpu_backend(request: pytest.FixtureRequest) -> str:
    """Each backend that runs on a GPU."""
    return on_gpu(request.param)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, GUARDED], ids=str)
def test_a_scaled_step_does_not_wait_for_the_gpu(gpu_backend: str, options: dict[str, Any]) -> None:
    optimizer, params = ready_problem(gpu_backend, [3, 5000, 1_000_003], "cuda", **options)
    scaler = torch.amp.GradScaler("cuda")
    for count in range(6):
        if count == 3:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            give(params, scaled(scaler, [torch.ones_like(p) for p in params]))
            scaler.step(optimizer)
            scaler.update()
        finally:
            if count == 5:
                torch.cuda.set_sync_debug_mode("default")
    assert int(optimizer.skipped_steps) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, GUARDED], ids=str)
def test_a_captured_step_reads_the_scale_of_each_replay(gpu_backend: str, options: dict[str, Any]) -> None:
    results = []
    for captured in (True, False):
        optimizer, params = ready_problem(gpu_backend, [3, 5000], "cuda", capturable=captured, **options)
        scale, found = torch.full((), 2.0, device="cuda"), torch.zeros((), device="cuda")
        optimizer.grad_scale, optimizer.found_inf = scale, found  # type: ignore[attr-defined]
        for _ in range(3):
            optimizer.step()
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                optimizer.step()
        for count in range(10):
            for p in params:
                unscaled(p).mul_(2)
            scale.mul_(2)
            found.fill_(float(count % 3 == 1))
            graph.replay() if captured else optimizer.step()
        results.append(snapshot(optimizer))
    assert same_bits(*results)
