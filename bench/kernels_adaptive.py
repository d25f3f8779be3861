"""The Triton kernels of steps with a diagonal that adapts, for bench.kernels: what they are compiled for, and bytes."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from sofim_fused.backends import GuardSettings, ScaledSums, Settings, Squares
from sofim_fused.backends.interface import Scales
from sofim_fused.backends.triton import adaptive, pack
from sofim_fused.backends.triton.workspace import Located, Workspace

MOST_SLOTS = 0.5  # bytes per parameter that ``squares`` may take for sums of tiles
SQUARES, SWEEP, ALGEBRA = range(3)
SHAPE_NAMES = ("vectors", "few rows", "matrices", "few columns")
SHAPES = ((1, 1 << 16), (4, 1 << 14), (512, 1024), (4096, 32))  # of a gradient, for each of kernels.SHAPES


@dataclass(frozen=True)
class AdaptiveCase:
    """A kernel as it is used.

    Attributes:
        name: of the pass.
        what: ``SQUARES``, ``SWEEP`` or ``ALGEBRA``.
        kernel: its name.
        config: of a sweep.
        dtype: of the gradients in ``squares``.
        shape: in ``squares``, an index of ``kernels.SHAPES``.
        most: ``ALGEBRA`` with all that it can do, else with the least.
    """

    name: str
    what: int
    kernel: str
    config: adaptive.SweepConfig | None = None
    dtype: torch.dtype = torch.float32
    shape: int = 0
    most: bool = False


def adaptive_kernels() -> ModuleType:
    """The kernels."""
    return importlib.import_module("sofim_fused.backends.triton.adaptive_kernels")


def cases(kinds: dict[str, int], sums: str) -> Iterator[tuple[str, AdaptiveCase]]:
    """The kernels, each sweep for float32 and some for others, with the label of the kind; ``sums``: of the algebra."""
    k = adaptive_kernels()
    passes = {"accumulate": k.ACCUMULATE, "apply": k.APPLY, "commit": k.COMMIT}
    blocks, elements = 0, k.ELEMENT
    chosen = [("fp32", name, bit) for name in passes for bit in (blocks, elements)]
    chosen += [
        ("fp32, bf16 moment", "accumulate", blocks),
        ("fp32, 8-bit moment", "accumulate", blocks),
        ("fp32, 8-bit moment, ragged", "commit", blocks),
        ("bf16, Kahan", "commit", blocks),
        ("fp64", "commit", blocks),
    ]
    for label, name, bit in chosen:
        for gradient in (False, True) if (label, name) == ("fp32", "apply") else (name != "accumulate",):
            config = adaptive.SweepConfig((kinds[label] | bit,), passes[name], gradient=gradient, clip=True, skip=True)
            note = ", moment" if name == "apply" and not gradient else ""
            called = f"{name}_scaled ({'elements' if bit else 'blocks'}{note})"
            yield label, AdaptiveCase(called, SWEEP, "sweep", config)
    permuted = adaptive.SweepConfig((0,), k.COMMIT, gradient=True, clip=True, skip=True, permuted=True)
    yield "fp32", AdaptiveCase("commit_scaled (blocks, another memory order)", SWEEP, "sweep", permuted)
    for shape, name in enumerate(SHAPE_NAMES):
        yield "fp32", AdaptiveCase(f"squares ({name})", SQUARES, "squares", shape=shape)
    yield "bf16, Kahan", AdaptiveCase("squares (matrices)", SQUARES, "squares", dtype=torch.bfloat16, shape=2)
    yield sums, AdaptiveCase("squares (all shapes together)", ALGEBRA, "squares", most=True)
    for kernel in ("add_up", "adapt", "fold_scaled", "solve_scaled"):
        yield sums, AdaptiveCase(kernel, ALGEBRA, kernel, most=True)


def table_bytes(case: AdaptiveCase) -> tuple[int, int]:
    """Bytes per parameter that a sweep has to read and to write, from the table of passes in docs/method.md."""
    k = adaptive_kernels()
    if case.config is None:
        return torch.empty(0, dtype=case.dtype).element_size(), 0
    (kind,) = case.config.kinds
    w = {0: 4, 1: 8}.get(kind & 3, 2)
    g = 4 if kind & pack.WIDE else w
    m = 1 if kind & pack.CODES else 2 if kind & pack.ROUNDS else max(w, 4)
    v = max(w, 4) if kind & k.ELEMENT else 0
    lost = w if kind & pack.KEEPS else 0
    return {
        k.ACCUMULATE: (g + m + v, m + v),
        k.APPLY: (m + w + lost + v + (g if case.config.gradient else 0), w + lost),
        k.COMMIT: (g + m + w + lost + v, m + w + lost + v),
    }[case.config.which]


def elements(case: AdaptiveCase, hip: bool) -> int:
    """How many elements the code of a program takes: AMD's compiler repeats it for each piece of a tile."""
    k = adaptive_kernels()
    height, width, pieces = k.SHAPES[case.shape]
    return int(k.TILE if case.what == SWEEP else height * width * (pieces if hip else 1))


def launch(case: AdaptiveCase, spy: SimpleNamespace, hip: bool) -> float:
    """Launch a case with ``spy`` in the place of the kernels; return bytes of slots per parameter."""
    ones = torch.ones(2, dtype=torch.float64)
    if case.config is not None:
        rows = torch.zeros(1, spy.COLUMNS, dtype=torch.int64)
        rows[0, pack.NUMEL], rows[0, pack.KIND] = spy.TILE, case.config.kinds[0]
        hyper = torch.zeros(1, pack.HYPERS, dtype=torch.float64)
        workspace: Any = Workspace(spy, torch.device("cpu"), rows, hyper, 1, [0, 1])  # type: ignore[arg-type]
        scales = Scales(*[ones] * 6)
        adaptive.launch_sweep(spy, workspace, case.config, scales, adaptive.Factors.of(scales), hip)  # type: ignore[arg-type]
        return 0.0
    if case.kernel in ("squares", "add_up"):
        return _squares(case, spy)
    settings = Settings(
        hyper=torch.ones(1, 8, dtype=torch.float64),
        sizes=[2],
        fisher=0 if case.most else 2,
        numerator=2 if case.most else 0,
        group_of=torch.zeros(2, dtype=torch.int64),
        scales_weight=True,
    )
    steps = [torch.tensor(1), torch.tensor(1)]
    located: Any = Located(torch.device("cpu"), steps, [2], False)
    some = torch.ones(1, 4, 1 if case.most else 2, dtype=torch.float64)
    if case.kernel == "fold_scaled":
        class_of = torch.tensor([0, 1]) if case.most else None
        adaptive.launch_fold_scaled(spy, located, settings, ScaledSums(ones, ones, ones), class_of, some)  # type: ignore[arg-type]
    elif case.kernel == "solve_scaled":
        skip = torch.tensor([False]) if case.most else None
        blocks, coefficients = some[0] if case.most else None, torch.ones(3, 2, dtype=torch.float64)
        adaptive.launch_solve_scaled(spy, located, settings, blocks, skip, coefficients, ones)  # type: ignore[arg-type]
    else:
        plan: Any = adaptive.AdaptPlan(spy, torch.device("cpu"), [], [], [])  # type: ignore[arg-type]
        plan.permuted = case.most
        guard = GuardSettings(1.0, torch.ones(()), torch.zeros(()), True) if case.most else None
        adaptive.launch_adapt(spy, plan, settings, Squares(ones, ones, ones), guard, ones)  # type: ignore[arg-type]
    return 0.0


def slots_of(shape: tuple[int, int]) -> float:
    """Bytes per parameter that ``squares`` takes for the sums of tiles of a matrix."""
    return _plan(adaptive_kernels(), [shape], torch.float32).slots * 8 / (shape[0] * shape[1])


def _squares(case: AdaptiveCase, spy: SimpleNamespace) -> float:
    shape = SHAPES[case.shape]
    plan = _plan(spy, SHAPES if case.what == ALGEBRA else [shape], case.dtype)
    plan.permuted = case.most
    adaptive.launch_squares(spy, plan)  # type: ignore[arg-type]
    return plan.slots * 8 / (shape[0] * shape[1])


def _plan(kernels: Any, shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> adaptive.SquaresPlan:
    matrices = [
        adaptive.Matrix(*shape, by_row=True, by_col=True, columns=None, type=pack.TYPES[dtype], aligned=True)
        for shape in shapes
    ]
    plan = adaptive.SquaresPlan(kernels, torch.device("cpu"), matrices, [None] * len(shapes))
    plan.load(torch.zeros(len(shapes), dtype=torch.int64))
    return plan
