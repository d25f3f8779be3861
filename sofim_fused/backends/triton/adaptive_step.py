"""Whole steps with a diagonal that adapts: the native part packs the tensors, the launches are those of the passes.

A step checks and packs tensors in C++, sends what has changed, and takes five launches or a few more: ``squares``
(several, if there are many kinds of tiles), ``add_up``, ``adapt``, then ``solve_scaled`` and ``sweep``; or, with the
term of rank one, ``sweep``, ``fold_scaled``, ``solve_scaled`` and ``sweep``.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from sofim_fused.backends.interface import FISHER, NUMERATORS, GuardSettings, ScaledSums, Settings, fisher_blocks
from sofim_fused.backends.solve import sum_of
from sofim_fused.backends.triton import pack
from sofim_fused.backends.triton.adaptive import (
    WIDEST,
    AdaptPlan,
    Matrix,
    Means,
    SquaresPlan,
    SweepConfig,
    adaptive_kernels,
    launch_adapt,
    launch_fold_scaled,
    launch_solve_scaled,
    launch_squares,
    launch_sweep,
)
from sofim_fused.backends.triton.workspace import Workspace, send

if TYPE_CHECKING:
    from sofim_fused.backends.triton.step import PackedStep

_BYTES = {number: torch.empty(0, dtype=dtype).element_size() for dtype, number in pack.TYPES.items()}


class AdaptiveStep:
    """Whole steps of one optimizer while its diagonals adapt; keeps tables on the device between them."""

    def __init__(self) -> None:
        self._tables: _Tables | None = None

    def take(
        self, packed: PackedStep, changed: int, bounds: list[int], guard: GuardSettings | None
    ) -> tuple[Any, ...] | Literal[True] | None:
        """Take the step that was gathered; ``None``, with nothing changed, if it has to run pass by pass.

        Args:
            packed: the tensors, gathered and not finished.
            changed: what differs from the last step that was taken here (bits of :mod:`...triton.pack`).
            bounds: where Fisher blocks begin and end among the tensors.
            guard: of a guarded step.

        Returns:
            As :data:`sofim_fused.backends.interface.NativeStep`.
        """
        if self._tables is None or changed & pack.LAYOUT:
            self._tables = None
            matrices = _matrices(packed)
            if matrices is None:
                return None
            self._tables = _Tables(adaptive_kernels(), packed, matrices, bounds)
            changed = pack.EVERYTHING
        tables = self._tables
        tables.load(packed, changed)
        outcome, signal = tables.launch(guard, rank_one=packed.rank_one)
        packed.finish(True, True, True)
        if outcome is None:
            return True if signal is None else (None, None, signal)
        norm, skipped = outcome.unbind()
        return norm, skipped.view(torch.int64), signal


def _matrices(packed: PackedStep) -> list[Matrix] | None:
    """The gradients as ``squares`` takes them; ``None``: some would have to be copied, or have too many columns."""
    found = []
    for row, (row_var, col_var, _, _, rows, cols, inner) in zip(
        packed.rows.tolist(), packed.means.tolist(), strict=True
    ):
        if (row_var and rows > 1 and inner != cols) or cols >= WIDEST:
            return None
        kind = row[pack.KIND]
        dtype = 0 if kind & pack.WIDE else kind & 3
        pitched = 0 if rows == 1 else cols * _BYTES[dtype]
        aligned = not (kind & pack.UNALIGNED or pitched & 15)
        found.append(Matrix(rows, cols, row_var != 0, col_var != 0, None, dtype, aligned))
    return found


def _means(packed: PackedStep) -> list[Means]:
    found = []
    for row, (row_var, col_var, whole, by_element, count, columns, _) in zip(
        packed.rows.tolist(), packed.means.tolist(), strict=True
    ):
        double = row[pack.KIND] & 3 == pack.TYPES[torch.float64]
        if by_element:
            found.append(Means(0, 0, double, False, 0, 0, (1, 1), 1, None))
        elif row_var:
            cols = columns if col_var else 0
            by_col = col_var if cols else 0
            found.append(Means(row_var, by_col, double, False, count, cols, (count, columns), columns, None))
        else:
            found.append(Means(whole, 0, double, True, 1, 0, (1, columns), columns, None))
    return found


class _Located:
    """Step counts and Fisher blocks, as :class:`sofim_fused.backends.triton.workspace.Located` has them."""

    def __init__(self, rows: Tensor, bounds: Tensor) -> None:
        self.rows, self.bounds = rows, bounds


class _Tables:
    """What the kernels read, for one layout of a step's tensors."""

    def __init__(self, kernels: ModuleType, packed: PackedStep, matrices: list[Matrix], bounds: list[int]) -> None:
        k = self._kernels = kernels
        device = packed.device
        assert device is not None
        n = packed.size
        self._kinds = tuple(packed.kinds)
        self.squares = SquaresPlan(k, device, matrices, [None] * n)
        means = _means(packed)
        self.adapt = AdaptPlan(k, device, packed.rows[:, pack.STEP].tolist(), means, [None] * n)
        table = torch.zeros(n, k.COLUMNS, dtype=torch.int64, device="cpu")
        table[:, : pack.COLUMNS] = packed.rows
        tiles = (packed.rows[:, pack.NUMEL] + k.TILE - 1).div(k.TILE, rounding_mode="floor").clamp(min=1)
        ends = tiles.cumsum(0)
        table[:, pack.FIRST] = ends - tiles
        row_at = col_at = 0
        for i, (each, inner) in enumerate(zip(means, packed.means[:, pack.INNER].tolist(), strict=True)):
            table[i, k.INNER], table[i, k.COUNT] = max(inner, 1), max(each.rows, 1)
            table[i, k.ROW_AT], table[i, k.COL_AT] = row_at, col_at if each.cols else -1
            row_at += each.rows
            col_at += each.cols
        self._table = table
        self._workspace = Workspace(k, device, table, packed.hyper, int(ends[-1]), bounds)
        self._make(packed, device)

    @torch.inference_mode(False)  # otherwise no later step could write to it
    def _make(self, packed: PackedStep, device: torch.device) -> None:
        n, groups = packed.size, len(packed.hyper)
        self._located: Any = _Located(
            torch.empty(n, pack.COLUMNS, dtype=torch.int64, device=device), self._workspace.bounds
        )
        self._steps = torch.zeros(n, dtype=torch.int64, device="cpu")
        group_of = packed.rows[:, pack.GROUP].contiguous()
        self.settings = Settings(
            hyper=torch.empty(groups, 8, dtype=torch.float64, device=device),
            sizes=torch.bincount(group_of, minlength=groups).tolist(),
            fisher=FISHER.index(packed.fisher),
            numerator=NUMERATORS.index(packed.numerator),
            group_of=send(group_of, torch.empty_like(group_of, device=device)),
            scales_weight=True,
        )

    def load(self, packed: PackedStep, changed: int) -> None:
        """Send what has changed since the last step."""
        k = self._kernels
        if changed & pack.POINTERS:
            rows, means = packed.rows, packed.means
            self._table[:, : pack.NUMEL] = rows[:, : pack.NUMEL]
            by_element, row_var, whole = (means[:, at] for at in (pack.BY_ELEMENT, pack.ROW_VAR, pack.WHOLE))
            self._table[:, k.VARIANCES] = whole * by_element * (rows[:, pack.NUMEL] > 0)
            self.adapt.load(
                rows[:, pack.STEP],
                torch.where(row_var != 0, row_var, whole * (1 - by_element)),
                means[:, pack.COL_VAR],
            )
            if not torch.equal(self._steps, rows[:, pack.STEP]):
                self._steps.copy_(rows[:, pack.STEP])
                send(rows, self._located.rows)
        if changed & pack.VALUES:
            hyper = torch.cat((packed.hyper[:, : pack.SIGN + 1], packed.settings), 1)
            send(hyper, self.settings.hyper)
        self._workspace.load(
            self._table if changed & pack.POINTERS else None, packed.hyper if changed & pack.VALUES else None, None
        )
        for group, column, value in packed.scalars:
            self.settings.hyper[group, column].copy_(value.detach().reshape(()))
        self.squares.load(packed.rows[:, pack.G])

    def launch(self, guard: GuardSettings | None, rank_one: bool) -> tuple[Tensor | None, Tensor | None]:
        """Launch everything.

        Returns:
            Of a guarded step, the norm and the bits of an int64, 1 if it is skipped; and the signal, with ``rank_one``.
        """
        k, settings, workspace = self._kernels, self.settings, self._workspace
        n, hyper = workspace.tensors, settings.hyper
        begin = k.SUMS * n
        end = begin + k.COEFFICIENTS * n
        coefficients, extras = workspace.work[begin:end].view(k.COEFFICIENTS, n), workspace.work[end : end + k.EXTRAS]
        launch_squares(k, self.squares)
        squares = self.squares.squares()
        square = None if guard is None else sum_of(squares.total)
        scales, factors, outcome = launch_adapt(k, self.adapt, settings, squares, guard, square, extras)
        clip, skip = scales.gain is not None, scales.skip is not None

        def sweep(which: int) -> None:
            config = SweepConfig(self._kinds, which, which != k.ACCUMULATE and settings.reads_gradient, clip, skip)
            launch_sweep(k, workspace, config, scales, factors)

        if not rank_one:
            launch_solve_scaled(k, self._located, settings, None, scales.skip, coefficients, None)
            sweep(k.COMMIT)
            return outcome, None
        blocks = fisher_blocks(settings.fisher, len(settings.sizes), n)
        totals, signal = hyper.new_empty(1, 4, blocks), hyper.new_empty(blocks)
        sweep(k.ACCUMULATE)
        sums = workspace.sums()
        launch_fold_scaled(k, self._located, settings, ScaledSums(sums[k.MM], sums[k.MG], sums[k.TRACE]), None, totals)
        launch_solve_scaled(k, self._located, settings, totals[0], scales.skip, coefficients, signal)
        sweep(k.APPLY)
        return outcome, signal
