"""Sums to coefficients: each backend's ``fold`` and ``solve`` beside the algebra in pure PyTorch."""

from __future__ import annotations

from itertools import product
from math import inf, nan
from typing import Any

import pytest
import torch
from torch import Tensor

from sofim_fused import backends
from sofim_fused.backends import FISHER, GuardSettings, Passes, Settings, Sums
from sofim_fused.backends.reference import ReferencePasses
from sofim_fused.step.hyperparameters import Hyperparameters
from tests.support.problems import NUMERATORS
from tests.support.runs import CPU_BACKENDS, INTERPRETED

CPU = torch.device("cpu")
BACKENDS = [name for name in CPU_BACKENDS if name != "reference"]
SIZES = [2, 0, 3]  # tensors per group
FORMS = list(product(NUMERATORS, FISHER))
GROUPS: list[dict[str, Any]] = [
    {"lr": 0.1, "momentum": 0.9, "rho": 0.5, "weight_decay": 0.0, "decoupled_weight_decay": True, "maximize": False},
    {"lr": 0.1, "momentum": 0.9, "rho": 0.5, "weight_decay": 0.1, "decoupled_weight_decay": False, "maximize": False},
    {"lr": 0.3, "momentum": 0.0, "rho": 2.0, "weight_decay": 0.2, "decoupled_weight_decay": False, "maximize": True},
]
GUARDS = [
    GuardSettings(0.5, None, None, False),
    GuardSettings(None, None, None, True),
    GuardSettings(1e9, None, None, False),
    GuardSettings(0.5, 1024.0, torch.tensor(0.0), True),
    GuardSettings(None, torch.tensor(8.0), torch.tensor([1.0]), False),
    GuardSettings(None, None, 1.0, False),
]


def settings_of(numerator: str, fisher: str, *, l2: bool = True, sizes: list[int] = SIZES, **changes: Any) -> Settings:
    groups = [{**group, **changes, **({} if l2 else {"decoupled_weight_decay": True})} for group in GROUPS]
    hyper = Hyperparameters(CPU, sizes, numerator, fisher)
    hyper.refresh(groups)
    return hyper.settings


def sums_of(n: int, *, l2: bool = True, guarded: bool = True) -> Sums:
    """Of n tensors of 7 random elements each: products that fit together, as those of real tensors do."""
    m, g, w = torch.randn(3, n, 7, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    made = Sums(*((a * b).sum(1) for a, b in ((m, m), (m, g), (m, w), (g, g), (g, w), (w, w))))
    if not l2:
        made = made._replace(mw=None, gw=None, ww=None)
    return made if guarded else made._replace(gg=None, gw=None, ww=None)


def new_steps(n: int) -> list[Tensor]:
    return [torch.tensor(3 * i) for i in range(n)]


def results(
    passes: Passes, settings: Settings, sums: Sums, guard: GuardSettings | None, class_of: Tensor | None = None
) -> dict[str, Tensor]:
    """What ``fold`` and ``solve`` return, by name, and the step counts afterwards."""
    steps = new_steps(len(settings.group_of))
    classes = 1 if class_of is None else int(class_of.max()) + 1
    blocks, squares = passes.fold(steps, settings, sums, guard is not None, class_of, classes)
    square = squares.sum() if guard is not None else None
    update, norm, skip = passes.solve(steps, settings, blocks.sum(0), guard, square)
    found = {"blocks": blocks, **update._asdict(), "norm": norm, "skip": skip}
    if guard is not None:
        found["squares"] = squares
    if steps:
        found["steps"] = torch.stack(steps)
    return {name: value for name, value in found.items() if value is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        finite = value[value.isfinite()].double().abs()
        scale = float(finite.max()) if finite.numel() else 0.0
        torch.testing.assert_close(
            found[name],
            value,
            rtol=1e-13,
            atol=1e-14 * scale,
            equal_nan=True,
            msg=lambda text, at=name: f"{at}: {text}",
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("numerator", "fisher"), FORMS)
def test_coefficients_are_those_of_the_definition(numerator: str, fisher: str, backend: str) -> None:
    """Plain and guarded, with and without L2 decay, in several groups of which one is empty."""
    passes, reference = backends.choose(backend, CPU), ReferencePasses()
    guards = [None, *GUARDS]
    for l2 in (False, True):
        settings = settings_of(numerator, fisher, l2=l2)
        # Minutes in the interpreter, where each form has half of them with L2 decay, and the others without.
        for guard in guards[l2::2] if INTERPRETED else guards:
            sums = sums_of(5, l2=l2, guarded=guard is not None)
            for class_of in (None, torch.tensor([1, 0, 2, 0, 1])):
                expected = results(reference, settings, sums, guard, class_of)
                assert_same(results(passes, settings, sums, guard, class_of), expected)
                skipped = guard is not None and guard.found_inf is not None and bool(guard.found_inf)
                assert expected["steps"].tolist() == [3 * i + (not skipped) for i in range(5)]


EXTREME: dict[str, tuple[dict[str, Any], dict[str, list[float]], GuardSettings | None]] = {
    # The norm overflows: κ = 0, where the coefficients of κ and κ² are infinite.
    "gain zero": ({}, {"gg": [1.0, inf, 1.0, 1.0, 1.0]}, GuardSettings(1.0, None, None, False)),
    "nan": ({}, {"gg": [1.0, nan, 1.0, 1.0, 1.0]}, GuardSettings(1.0, None, None, True)),
    "nan, plain": ({}, {"mm": [1.0, nan, 1.0, 1.0, 1.0]}, None),
    # Coefficients that would be infinite in float32.
    "too large": ({"lr": 1e300, "rho": 1e-30, "weight_decay": 0.0}, {"mm": [0.0] * 5, "mg": [1.0] * 5}, None),
    # Weights may be infinite in a group that has no L2 decay.
    "infinite weights": ({}, {"mw": [inf, nan, 1.0, 1.0, 1.0]}, None),
    "infinite weights, guarded": (
        {},
        {"mw": [inf, nan, 1.0, 1.0, 1.0], "gw": [nan, inf, 1.0, 1.0, 1.0], "ww": [inf, inf, 1.0, 1.0, 1.0]},
        GuardSettings(0.5, None, None, False),
    ),
    # β m and (1-β) g cancel: S is no smaller than its rounding error.
    "cancelled": (
        {"weight_decay": 0.0, "momentum": 0.5, "maximize": False},
        {"mm": [1.0] * 5, "mg": [-1.0] * 5, "gg": [1.0] * 5},
        GuardSettings(None, None, None, True),
    ),
}
FINITE = {"gain zero", "too large", "infinite weights", "infinite weights, guarded", "cancelled"}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("extreme", EXTREME)
def test_extreme_sums(extreme: str, backend: str) -> None:
    """Coefficients are finite in float32 wherever the step is defined, and the definition's everywhere."""
    changes, values, guard = EXTREME[extreme]
    sums = sums_of(5, guarded=guard is not None)
    sums = sums._replace(**{name: torch.tensor(x, dtype=torch.float64) for name, x in values.items()})
    for numerator, fisher in FORMS:
        settings = settings_of(numerator, fisher, **changes)
        expected = results(ReferencePasses(), settings, sums, guard)
        found = results(backends.choose(backend, CPU), settings, sums, guard)
        assert_same(found, expected)
        for name in {"moment", "gradient", "weight"} & found.keys() if extreme in FINITE else ():
            limit = 1e300 if name == "weight" else torch.finfo(torch.float32).max
            assert bool((found[name].abs() <= limit).all()), (numerator, fisher, name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_classes_do_not_mix(backend: str) -> None:
    """An infinity or a NaN in one class of tensors leaves the other's sums alone."""
    class_of = torch.tensor([0, 1, 0, 1, 1])
    sums = sums_of(5)
    assert sums.gg is not None
    spoiled = sums._replace(mm=sums.mm.clone(), gg=sums.gg.clone())
    spoiled.mm[1], spoiled.gg[4] = nan, inf  # type: ignore[index]
    passes = backends.choose(backend, CPU)
    for (numerator, fisher), guarded in product(FORMS, (False, True)):
        settings = settings_of(numerator, fisher)
        blocks, squares = passes.fold(new_steps(5), settings, spoiled, guarded, class_of, 2)
        clean, clean_squares = passes.fold(new_steps(5), settings, sums, guarded, class_of, 2)
        assert torch.equal(blocks[0], clean[0])
        assert not bool(blocks[1].isfinite().all())
        if guarded:
            assert torch.equal(squares[0], clean_squares[0])
        whole, _ = passes.fold(new_steps(5), settings, sums, guarded)
        torch.testing.assert_close(clean.sum(0), whole[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rank_without_tensors(backend: str) -> None:
    """It adds zeros, and sees the norm that all ranks see."""
    passes = backends.choose(backend, CPU)
    for numerator, fisher in FORMS:
        settings = settings_of(numerator, fisher, sizes=[0, 0, 0])
        blocks, squares = passes.fold([], settings, backends.no_sums(CPU), True)
        rows = 6 if numerator == "moment" else 9
        assert torch.equal(blocks, torch.zeros(1, rows, (1, 3, 0)[settings.fisher], dtype=torch.float64))
        assert torch.equal(squares, torch.zeros(1, dtype=torch.float64))
        square = torch.tensor(16.0, dtype=torch.float64)
        update, norm, skip = passes.solve([], settings, blocks[0], GuardSettings(1.0, 2.0, None, True), square)
        assert norm is not None
        assert skip is not None
        assert (len(update.moment), norm.item(), skip.item()) == (0, 2.0, False)


def test_native_backends_have_operators_of_their_own() -> None:
    """Else the tests above would compare the definition with itself."""
    for backend in set(BACKENDS) & {"cpu", "cuda"}:
        passes: Any = backends.choose(backend, CPU)
        assert passes._solves
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            results(passes, settings_of("moment", "model"), sums_of(5), GUARDS[0])
        seen = [event.key for event in profile.key_averages() if event.key.startswith("sofim_fused")]
        assert sorted(seen) == [f"{passes._namespace}::fold", f"{passes._namespace}::solve"]


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "mm: Double of shape [5] on the CPU is needed": ("fold", {"mm": torch.ones(4, dtype=torch.float64)}),
    "gg: Double of shape [5] on the CPU is needed": ("fold", {"gg": torch.ones(5)}),
    "mg is needed": ("fold", {"mg": None}),
    "gg is needed": ("fold", {"gg": None}),
    "hyper: Double of shape [3, 6] on the CPU is needed": ("fold", {"hyper": torch.ones(2, 6).double()}),
    "sizes: 4 tensors in groups, but 5 steps": ("fold", {"sizes": [2, 0, 2]}),
    "sizes: a group cannot have -1 tensors": ("fold", {"sizes": [2, -1, 4]}),
    "fisher: 0, 1 or 2 is needed": ("fold", {"fisher": 3}),
    "numerator: 0, 1 or 2 is needed": ("solve", {"numerator": 3}),
    "steps: 0-dimensional int64 tensors on the CPU are needed": ("fold", {"steps": [torch.tensor(0.0)] * 5}),
    "class_of: 2 is not from 0 to 1": ("fold", {"class_of": torch.tensor([0, 1, 2, 0, 1]), "classes": 2}),
    "classes: 1 or more are needed": ("fold", {"classes": 0}),
    "blocks: Double of shape [9, 1] on the CPU is needed": ("solve", {"blocks": torch.ones(6, 1).double()}),
    "square is needed": ("solve", {"square": None}),
    "grad_scale: Double of shape [] on the CPU is needed": ("solve", {"grad_scale": torch.ones(())}),
}


@pytest.mark.skipif("cpu" not in BACKENDS, reason="of the CPU's operators")
@pytest.mark.parametrize("text", REFUSED)
def test_the_operators_refuse_what_does_not_fit(text: str) -> None:
    """Before a step count is changed; what they read is memory."""
    name, changes = REFUSED[text]
    steps = new_steps(5)
    settings = settings_of("gradient", "model")
    shared = {"steps": steps, "hyper": settings.hyper, "sizes": SIZES, "fisher": 0, "numerator": 1}
    arguments = {
        "fold": {**sums_of(5)._asdict(), **shared, "guarded": True, "class_of": None, "classes": 1},
        "solve": {
            "blocks": torch.ones(9, 1).double(),
            "square": torch.ones(()).double(),
            **shared,
            "guarded": True,
            "max_norm": 1.0,
            "grad_scale": None,
            "found_inf": None,
            "skip_nonfinite": False,
        },
    }[name]
    operator = getattr(torch.ops.sofim_fused, name)
    operator(**arguments)
    before = [int(step) for step in steps]
    with pytest.raises(RuntimeError) as error:
        operator(**{**arguments, **changes})
    assert text in str(error.value)
    assert [int(step) for step in steps] == before
