"""Triton's passes of a step with a diagonal that adapts: what ``adaptive_kernels`` needs, and the launches.

A launch works on all tensors together; ``squares`` takes several if there are many kinds of tiles.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo as untraced

from sofim_fused.backends import addresses
from sofim_fused.backends.interface import (
    Coefficients,
    Decay,
    GuardSettings,
    ScaledSums,
    Scales,
    Settings,
    Squares,
    StepTensors,
    Variance,
    fisher_blocks,
)
from sofim_fused.backends.reference import TorchAdaptivePasses
from sofim_fused.backends.triton import pack
from sofim_fused.backends.triton.launch import KernelConfig, capturing, device_scope, number, run
from sofim_fused.backends.triton.workspace import Located, Workspace, send

WIDEST = 2**30
"""A limit of columns with running means of their own: kernels compute a column's place with 32 bits."""


class TritonAdaptive(TorchAdaptivePasses):
    """See :class:`sofim_fused.backends.interface.AdaptivePasses`.

    While a CUDA graph is being captured no pinned memory can be allocated, and the passes are those in pure PyTorch; so
    are the sweeps over tensors of ``WIDEST`` columns or more.
    """

    def __init__(self) -> None:
        self._scaled_workspace: Workspace | None = None
        self._squares_plan: SquaresPlan | None = None
        self._adapt_plan: AdaptPlan | None = None
        self._orders: dict[_OrderKey, Tensor] = {}
        self._narrow: Factors | None = None

    @untraced
    def squares(self, tensors: StepTensors) -> Squares:
        if capturing():
            return super().squares(tensors)
        k = adaptive_kernels()
        with device_scope(tensors.device):
            made = Matrices(tensors)
            plan = self._squares_plan
            if plan is None or plan.key != made.key:
                orders = [self._order(tensors.device, each.columns) for each in made.placed]
                plan = self._squares_plan = SquaresPlan(k, tensors.device, made.placed, orders)
            addressed = list(map(addresses.address, made.grads))
            plan.load(torch.tensor(addressed, dtype=torch.int64, device="cpu"))
            launch_squares(k, plan)
        return plan.squares()

    @untraced
    def adapt(
        self,
        tensors: StepTensors,
        settings: Settings,
        squares: Squares,
        guard: GuardSettings | None,
        square: Tensor | None,
    ) -> tuple[Scales, Tensor | None]:
        if not len(tensors) or capturing():
            return super().adapt(tensors, settings, squares, guard, square)
        k = adaptive_kernels()
        with device_scope(tensors.device):
            copies: list[tuple[Tensor, Tensor]] = []
            variances = [_dense_means(variance, copies) for variance in tensors.variances]
            means = [Means.of(v, w.numel()) for v, w in zip(variances, tensors.params, strict=True)]
            steps = list(map(addresses.address, tensors.steps))
            plan = self._adapt_plan
            if plan is None or plan.key != (tensors.device, tuple(steps), tuple(means)):
                orders = [self._order(tensors.device, each.columns) for each in means]
                plan = self._adapt_plan = AdaptPlan(k, tensors.device, steps, means, orders)
            scales, self._narrow, outcome = launch_adapt(k, plan, settings, squares, guard, square)
            for original, copy in copies:
                original.copy_(copy)
        blocks = (x for v in tensors.variances if not v.by_element for x in v[:3] if x is not None)
        torch.autograd.graph.increment_version(list(blocks))
        return scales, None if outcome is None else outcome[0]

    @untraced
    def accumulate_scaled(self, tensors: StepTensors, decay: Decay, scales: Scales) -> ScaledSums:
        if capturing() or _too_wide(tensors):
            return super().accumulate_scaled(tensors, decay, scales)
        k = adaptive_kernels()
        workspace = self._sweep(tensors, decay, Coefficients(scales.trace), scales, k.ACCUMULATE)
        sums = workspace.sums()
        return ScaledSums(mm=sums[k.MM], mg=sums[k.MG], trace=sums[k.TRACE])

    @untraced
    def apply_scaled(self, tensors: StepTensors, coefficients: Coefficients, scales: Scales) -> None:
        if capturing() or _too_wide(tensors):
            return super().apply_scaled(tensors, coefficients, scales)
        self._sweep(tensors, None, coefficients, scales, adaptive_kernels().APPLY)

    @untraced
    def commit_scaled(self, tensors: StepTensors, decay: Decay, coefficients: Coefficients, scales: Scales) -> None:
        if capturing() or _too_wide(tensors):
            return super().commit_scaled(tensors, decay, coefficients, scales)
        self._sweep(tensors, decay, coefficients, scales, adaptive_kernels().COMMIT)

    @untraced
    def fold_scaled(
        self,
        steps: Sequence[Tensor],
        settings: Settings,
        sums: ScaledSums,
        class_of: Tensor | None = None,
        classes: int = 1,
    ) -> Tensor:
        if capturing():
            return super().fold_scaled(steps, settings, sums, class_of, classes)
        blocks = fisher_blocks(settings.fisher, len(settings.sizes), len(steps))
        totals = settings.hyper.new_empty(classes, 4, blocks)
        if not steps:
            return totals.zero_()
        with device_scope(settings.hyper.device):
            located = self._located(steps, settings)
            launch_fold_scaled(adaptive_kernels(), located, settings, sums, class_of, totals)
        return totals

    @untraced
    def solve_scaled(
        self, steps: Sequence[Tensor], settings: Settings, blocks: Tensor | None, skip: Tensor | None
    ) -> tuple[Coefficients, Tensor | None]:
        if capturing():
            return super().solve_scaled(steps, settings, blocks, skip)
        k = adaptive_kernels()
        found = settings.hyper.new_empty(k.COEFFICIENTS, len(steps))
        signal = None if blocks is None else settings.hyper.new_empty(blocks.shape[1])
        with device_scope(settings.hyper.device):
            located = self._located(steps, settings)
            launch_solve_scaled(k, located, settings, blocks, skip, found, signal)
        torch.autograd.graph.increment_version(list(steps))
        return settings.coefficients(found), signal

    def _located(self, steps: Sequence[Tensor], settings: Settings) -> Located:
        raise NotImplementedError

    def _sweep(
        self, tensors: StepTensors, decay: Decay | None, update: Coefficients, scales: Scales, which: int
    ) -> Workspace:
        k = adaptive_kernels()
        with device_scope(tensors.device):
            packed = pack.lay_out(
                tensors.params,
                tensors.grads,
                tensors.exp_avgs,
                tensors.lost_bits,
                tensors.steps,
                tensors.ordinals,
                k.TILE,
                tensors.exp_avg_scales,
            )
            rows, permuted = self._with_variances(k, tensors, packed)
            n = len(tensors)
            hyper = torch.zeros(n, pack.HYPERS, dtype=torch.float64, device="cpu")
            if decay is not None:
                factors = [decay.moment, decay.gradient]
                hyper[:, pack.DECAY_M : pack.DECAY_W] = torch.tensor(factors, dtype=torch.float64, device="cpu").t()
            workspace = self._scaled_workspace
            if workspace is None or not workspace.fits(tensors.device, rows, packed.tiles):
                workspace = Workspace(k, tensors.device, rows, hyper, packed.tiles, [0, n])
                self._scaled_workspace = workspace
            workspace.load(rows, hyper, None)
            workspace.renew_work()
            workspace.set_coefficients(update.weight, update.gradient, update.moment, scales.gain, scales.skip)
            config = SweepConfig(
                tuple(sorted({*rows[:, pack.KIND].tolist()})),
                which,
                gradient=update.gradient is not None,
                clip=scales.gain is not None,
                skip=scales.skip is not None,
                permuted=permuted,
            )
            if self._narrow is None or self._narrow.rows is not scales.rows:  # not from here: those of several ranks
                self._narrow = Factors.of(scales)
            launch_sweep(k, workspace, config, scales, self._narrow)
            packed.finish(which != k.ACCUMULATE, which != k.APPLY, False)
            if which != k.APPLY:
                torch.autograd.graph.increment_version(
                    [v.variance for v in tensors.variances if v.variance is not None and v.by_element]
                )
        return workspace

    def _with_variances(self, k: ModuleType, tensors: StepTensors, packed: pack.PackedTensors) -> tuple[Tensor, bool]:
        """The packed rows with the columns that sweeps need beside them; and whether some memory order is another."""
        added: list[tuple[int, ...]] = []
        kinds = packed.rows[:, pack.KIND].tolist()
        row_at = col_at = 0
        permuted = False
        for i, (m, variance) in enumerate(zip(tensors.exp_avgs, tensors.variances, strict=True)):
            strides = pack.order_of(m)
            if variance.by_element:
                assert variance.variance is not None
                v = variance.variance
                if not pack.in_order(v, strides) or not pack.dense(v):
                    copy = torch.empty_strided(v.shape, strides, dtype=v.dtype, device=v.device).copy_(v)
                    packed.copies.append(pack.Copy(v, copy, moment=True))
                    v = copy
                address = addresses.address(v)
                kinds[i] |= k.ELEMENT | (pack.UNALIGNED if address & 15 else 0)
                added.append((address, max(m.numel(), 1), 1, 0, -1, 0))
                continue
            if variance.row_var is None:
                added.append((0, max(m.numel(), 1), 1, row_at, -1, 0))
                row_at += 1
                continue
            placed = placement(m.shape, strides)
            order = None if variance.col_var is None else self._order(tensors.device, placed.columns)
            permuted = permuted or placed.outside or order is not None
            at = -1 if variance.col_var is None else col_at
            column = 0 if order is None else addresses.address(order)
            added.append((0, max(placed.inner, 1), max(m.shape[0], 1), row_at, at, column))
            row_at += m.shape[0]
            col_at += 0 if variance.col_var is None else variance.col_var.numel()
        rows = torch.cat((packed.rows, torch.tensor(added, dtype=torch.int64, device="cpu")), 1)
        rows[:, pack.KIND] = torch.tensor(kinds, dtype=torch.int64, device="cpu")
        return rows, permuted

    def _order(self, device: torch.device, columns: Columns | None) -> Tensor | None:
        """The logical places of columns in memory order, int32 on the device; ``None``: these orders are the same."""
        if columns is None or columns.in_order:
            return None
        key = device, columns
        if key not in self._orders:
            numbers = torch.arange(math.prod(columns.shape), dtype=torch.int32, device="cpu")
            numbers = numbers.view(columns.shape).permute(columns.dims).reshape(-1)
            self._orders[key] = send(numbers, torch.empty_like(numbers, device=device))
        return self._orders[key]


class Factors(NamedTuple):
    """The factors of :class:`Scales`, and what they are in float32."""

    rows: Tensor
    rows32: Tensor
    cols32: Tensor

    @classmethod
    def of(cls, scales: Scales) -> Factors:
        """From scales that have no others yet."""
        return cls(scales.rows, scales.rows.to(torch.float32), scales.cols.to(torch.float32))


class Columns(NamedTuple):
    """The columns of a tensor: all its dimensions but the first, their sizes, and their order in memory."""

    shape: tuple[int, ...]
    dims: tuple[int, ...]

    @property
    def in_order(self) -> bool:
        """Whether columns are in memory as they are in logical order."""
        return list(self.dims) == sorted(self.dims)


_OrderKey = tuple[torch.device, Columns]


class Placement(NamedTuple):
    """How rows and columns of a dense tensor of one dimension or more lie in memory.

    Attributes:
        inner: how many elements follow each other in memory with the same index of dimension 0.
        outside: whether dimension 0 is not the outermost one.
        columns: the others.
    """

    inner: int
    outside: bool
    columns: Columns


def placement(shape: Sequence[int], strides: Sequence[int]) -> Placement:
    """Where the rows and columns of a dense tensor are; dimensions of size 1 have no place in memory."""
    dims = sorted((i for i, size in enumerate(shape) if size > 1), key=lambda i: -strides[i])
    if 0 not in dims:
        dims.insert(0, 0)
    at = dims.index(0)
    others = [i - 1 for i in dims if i]
    # Where a dimension of size 1 stands makes no difference.
    for i, size in enumerate(shape[1:]):
        if size <= 1:
            others.insert(next((j for j, other in enumerate(others) if other > i), len(others)), i)
    inner = math.prod(shape[i] for i in dims[at + 1 :]) if math.prod(shape) else math.prod(shape[1:])
    return Placement(inner, at > 0, Columns(tuple(shape[1:]), tuple(others)))


def columns_of(col_var: Tensor) -> Columns:
    """The columns of a dense tensor without dimension 0."""
    return placement((1, *col_var.shape), (0, *col_var.stride())).columns


# squares


class Matrix(NamedTuple):
    """A gradient as the matrix of which rows and columns are added up.

    Attributes:
        rows, cols: its shape; without ``row_var`` it is a single row.
        by_row, by_col: whether the sums of rows and columns are asked for, beside that of the tensor.
        columns: their order, if it may not be the logical one.
        type: of :data:`pack.TYPES`.
        aligned: whether each row begins at a multiple of 16 bytes.
    """

    rows: int
    cols: int
    by_row: bool
    by_col: bool
    columns: Columns | None
    type: int
    aligned: bool


class Matrices:
    """The gradients of a step as matrices whose rows are one after the other in memory; copies where they are not.

    Attributes:
        grads: the gradients, or copies.
        placed: the matrices.
        key: what a plan for them depends on.
    """

    def __init__(self, tensors: StepTensors) -> None:
        self.grads: list[Tensor] = []
        self.placed: list[Matrix] = []
        for g, variance in zip(tensors.grads, tensors.variances, strict=True):
            g = g.detach().resolve_neg()
            if not pack.dense(g):
                g = g.contiguous()
            rows, cols, columns = 1, g.numel(), None
            if variance.row_var is not None:
                if placement(g.shape, g.stride()).outside:
                    g = g.contiguous()
                rows, cols = g.shape[0], math.prod(g.shape[1:])
                if variance.col_var is not None:
                    columns = placement(g.shape, g.stride()).columns
            pitched = 0 if rows == 1 else cols * g.element_size()
            aligned = not (addresses.address(g) | pitched) & 15
            self.grads.append(g)
            by_row, by_col = variance.row_var is not None, variance.col_var is not None
            self.placed.append(Matrix(rows, cols, by_row, by_col, columns, pack.TYPES[g.dtype], aligned))
        self.key = (tensors.device, tuple(self.placed))


class _Launch(NamedTuple):
    """A launch of ``squares``: the kinds of its tiles, the first one, and how many there are."""

    kinds: list[int]
    start: int
    tiles: int


class SquaresPlan:
    """What ``squares`` needs on the device for gradients of given sizes and layouts.

    Args:
        kernels: :mod:`sofim_fused.backends.triton.adaptive_kernels`.
        device: of the gradients.
        matrices: the gradients.
        orders: of each, the order of columns (int32 on the device), or ``None``.

    Attributes:
        slots: how many float64 slots there are, beside the sums.
    """

    def __init__(
        self,
        kernels: ModuleType,
        device: torch.device,
        matrices: Sequence[Matrix],
        orders: Sequence[Tensor | None],
    ) -> None:
        k = kernels
        self.key = (device, tuple(matrices))
        self.device = device
        self.n = n = len(matrices)
        self._orders = orders  # kept alive
        self.rows = sum(m.rows for m in matrices if m.by_row)
        self.cols = sum(m.cols for m in matrices if m.by_col)
        # Each part begins at a multiple of 16 bytes.
        self._rows_at = _even(n)
        self._cols_at = self._rows_at + _even(self.rows)
        end = first_slot = self._cols_at + _even(self.cols)
        row_to, col_to = self._rows_at, self._cols_at
        table: list[list[int]] = []
        segments: list[tuple[int, int, int]] = []
        tiles: dict[int, list[tuple[int, int]]] = {}  # by kind: tensors, and how many each has
        for i, (m, order) in enumerate(zip(matrices, orders, strict=True)):
            height, width, pieces = k.SHAPES[shape := _shape_of(m, k)]
            down, across = -(-m.rows // (height * pieces)), -(-m.cols // width)
            row = [0] * k.S_COLUMNS
            row[k.S_ROWS], row[k.S_COLS], row[k.S_PITCH] = m.rows, m.cols, m.cols if m.rows > 1 else 0
            row[k.S_ROW_TO], row[k.S_COL_TO] = row_to if m.by_row else i, col_to
            row[k.S_ROW_SLOTS], row[k.S_COL_SLOTS] = across, down
            row[k.S_ROW_OUT], row[k.S_COL_OUT] = row[k.S_ROW_TO], row[k.S_COL_TO]
            row[k.S_ORDER] = 0 if order is None else addresses.address(order)
            if across > 1:
                row[k.S_ROW_OUT], end = end, end + across * m.rows
            if m.by_col and down > 1:
                row[k.S_COL_OUT], end = end, end + down * m.cols
            row_to += m.rows if m.by_row else 0
            col_to += m.cols if m.by_col else 0
            row[k.S_SEGMENT] = len(segments)
            if down * across:
                kind = m.type | (0 if m.aligned else k.S_UNALIGNED) | (k.S_BY_COL if m.by_col else 0)
                row[k.S_KIND] = kind | shape << k.S_SHAPE
                tiles.setdefault(row[k.S_KIND], []).append((i, down * across))
                few = m.rows <= k.FEW_ROWS
                part, step = (k.OTHER_PART, 1) if few else (k.ROWS_PART, k.SEGMENT)
                segments += [(i, part, begin) for begin in range(0, m.rows, step)]
            row[k.S_SEGMENTS] = len(segments) - row[k.S_SEGMENT]
            if m.by_col and down > 1 and across:
                segments += [(i, k.COLS_PART, begin) for begin in range(0, m.cols, k.SEGMENT)]
            table.append(row)
        self.slots = end - first_slot
        self.permuted = any(order is not None for order in orders)
        self._size = end
        # Sums that no tile writes are zero.
        self._empty = any(m.rows * m.cols == 0 for m in matrices)
        tile_of: list[Tensor] = []
        self.launches: list[_Launch] = []
        start, kinds = 0, sorted(tiles)
        for begin in range(0, len(kinds), k.MOST_KINDS):
            together, first = kinds[begin : begin + k.MOST_KINDS], start
            for i, count in (pair for kind in together for pair in tiles[kind]):
                table[i][k.S_FIRST] = start
                tile_of.append(torch.full((count,), i, dtype=torch.int32, device="cpu"))
                start += count
            self.launches.append(_Launch(together, first, start - first))
        self._table = _table(table, k.S_COLUMNS)
        self._address = k.S_G
        self._sent = False
        self._make(torch.cat(tile_of) if tile_of else torch.empty(0, dtype=torch.int32, device="cpu"), segments)

    @torch.inference_mode(False)  # otherwise no later step could write to it
    def _make(self, tile_of: Tensor, segments: Sequence[tuple[int, int, int]]) -> None:
        device = self.device
        self.tile_of = send(tile_of, torch.empty_like(tile_of, device=device))
        lines = _table(segments, 3)
        self.segments = send(lines, torch.empty_like(lines, device=device))
        self.table = torch.empty(self._table.shape, dtype=torch.int64, device=device)
        self.totals = torch.empty(max(len(segments), 1), dtype=torch.float64, device=device)
        self.counters = torch.zeros(self.n, dtype=torch.int32, device=device)
        self.out = self.totals

    def load(self, grads: Tensor) -> None:
        """Set the addresses of this step's gradients, int64 on the CPU, and take new memory for their sums."""
        if not self._sent or not torch.equal(grads, self._table[:, self._address]):
            self._table[:, self._address] = grads
            send(self._table, self.table)
            self._sent = True
        self.out = torch.empty(self._size, dtype=torch.float64, device=self.device)
        if self._empty:
            self.out.zero_()

    def squares(self) -> Squares:
        """The sums, once the kernels have run."""
        out, self.out = self.out, self.totals
        return Squares(
            total=out[: self.n],
            rows=out[self._rows_at : self._rows_at + self.rows],
            cols=out[self._cols_at : self._cols_at + self.cols],
        )


def _shape_of(matrix: Matrix, kernels: ModuleType) -> int:
    """Which of ``SHAPES`` suits a matrix."""
    if matrix.rows == 1:
        return 0
    if matrix.cols <= kernels.SHAPES[3][1]:
        return 3
    return 1 if matrix.rows <= kernels.SHAPES[1][0] else 2


def launch_squares(kernels: ModuleType, plan: SquaresPlan) -> None:
    """Launch ``squares``, then ``add_up``."""
    k = kernels
    for launch in plan.launches:
        run(
            k.squares,
            launch.tiles,
            plan.table,
            plan.tile_of,
            plan.out,
            launch.start,
            KINDS=sum(kind << 8 * i for i, kind in enumerate(launch.kinds)),
            N_KINDS=len(launch.kinds),
            SHAPES=k.SHAPE_BYTES,
            PERMUTED=plan.permuted,
            num_warps=k.NUM_WARPS,
            enable_fp_fusion=False,
        )
    if len(plan.segments):
        run(
            k.add_up,
            len(plan.segments),
            plan.table,
            plan.segments,
            plan.out,
            plan.totals,
            plan.counters,
            PERMUTED=plan.permuted,
            num_warps=4,
            enable_fp_fusion=False,
        )


# adapt


def _dense_means(variance: Variance, copies: list[tuple[Tensor, Tensor]]) -> Variance:
    """A variance whose running means over blocks are dense; replaced ones are added to ``copies``."""
    replaced = {}
    for name in ("row_var", "col_var"):
        value = getattr(variance, name)
        if value is not None and not pack.dense(value):
            replaced[name] = value.contiguous()
            copies.append((value, replaced[name]))
    return variance._replace(**replaced) if replaced else variance


class Means(NamedTuple):
    """The running means of one tensor over blocks; of one whose elements have their own variances, there are none.

    Attributes:
        row_var: the address of ``row_var``, or of a 0-dimensional ``variance``, which counts as one row.
        col_var: the address of ``col_var``, or 0.
        double: whether they are float64.
        whole: whether the row is the tensor.
        rows, cols: how many there are.
        shape: over how many elements a mean of a column, and of a row, is taken.
        length: by what a sum of s over rows becomes one over elements, if there are no columns.
        columns: the order of columns, if it may not be the logical one.
    """

    row_var: int
    col_var: int
    double: bool
    whole: bool
    rows: int
    cols: int
    shape: tuple[int, int]
    length: int
    columns: Columns | None

    @classmethod
    def of(cls, variance: Variance, numel: int) -> Means:
        """Those of a tensor of ``numel`` elements, which are dense."""
        means = variance.variance if variance.row_var is None else variance.row_var
        assert means is not None
        if variance.by_element:
            return cls(0, 0, False, False, 0, 0, (1, 1), 1, None)
        cols = variance.col_var
        return cls(
            addresses.address(means),
            0 if cols is None or not cols.numel() else addresses.address(cols),
            means.dtype == torch.float64,
            variance.row_var is None,
            means.numel(),
            0 if cols is None else cols.numel(),
            variance.shape,
            numel // max(means.numel(), 1),
            None if cols is None else columns_of(cols),
        )


class AdaptPlan:
    """What ``adapt`` needs on the device for tensors at given addresses.

    Args:
        kernels: :mod:`sofim_fused.backends.triton.adaptive_kernels`.
        device: of the tensors.
        steps: the addresses of step counts.
        means: the running means.
        orders: of each, the order of columns (int32 on the device), or ``None``.
    """

    def __init__(
        self,
        kernels: ModuleType,
        device: torch.device,
        steps: Sequence[int],
        means: Sequence[Means],
        orders: Sequence[Tensor | None],
    ) -> None:
        k = kernels
        self.key = device, tuple(steps), tuple(means)
        self.n = len(means)
        self._orders = orders  # kept alive
        self.permuted = any(order is not None for order in orders)
        table: list[list[int]] = []
        segments: list[tuple[int, int, int]] = []
        sums_at = row_at = col_at = 0
        for i, (m, step, order) in enumerate(zip(means, steps, orders, strict=True)):
            row = [0] * k.A_COLUMNS
            row[k.A_STEP], row[k.A_DOUBLE], row[k.A_WHOLE] = step, int(m.double), int(m.whole)
            row[k.A_ROW_VAR], row[k.A_COL_VAR] = m.row_var, m.col_var
            row[k.A_ROWS], row[k.A_COLS], row[k.A_LENGTH] = m.rows, m.cols, m.length
            row[k.A_HEIGHT], row[k.A_WIDTH] = m.shape
            row[k.A_SUMS_AT], row[k.A_ROW_AT], row[k.A_COL_AT] = sums_at, row_at, col_at
            row[k.A_ORDER] = 0 if order is None else addresses.address(order)
            row[k.A_SEGMENT] = len(segments)
            segments += [(i, k.ROWS_PART, begin) for begin in range(0, m.rows, k.ADAPTED)]
            row[k.A_ROW_SEGMENTS] = len(segments) - row[k.A_SEGMENT]
            segments += [(i, k.COLS_PART, begin) for begin in range(0, m.cols, k.ADAPTED)]
            if len(segments) == row[k.A_SEGMENT]:
                segments.append((i, k.OTHER_PART, 0))
            row[k.A_SEGMENTS] = len(segments) - row[k.A_SEGMENT]
            row_at += m.rows
            sums_at += 0 if m.whole else m.rows
            col_at += m.cols
            table.append(row)
        self.rows, self.cols = row_at, col_at
        self._table = _table(table, k.A_COLUMNS)
        self._columns = k.A_STEP, k.A_ROW_VAR, k.A_COL_VAR
        self._make(device, _table(segments, 3))

    @torch.inference_mode(False)  # otherwise no later step could write to it
    def _make(self, device: torch.device, segments: Tensor) -> None:
        self.table = send(self._table, torch.empty_like(self._table, device=device))
        self.segments = send(segments, torch.empty_like(segments, device=device))
        self.sums = torch.empty(len(segments), dtype=torch.float64, device=device)
        self.counters = torch.zeros(self.n, dtype=torch.int32, device=device)

    def load(self, *given: Tensor) -> None:
        """Set other addresses, int64 on the CPU: of step counts, of ``row_var`` or ``variance``, and of ``col_var``."""
        same = [torch.equal(self._table[:, to], values) for to, values in zip(self._columns, given, strict=True)]
        if not all(same):
            for to, values in zip(self._columns, given, strict=True):
                self._table[:, to] = values
            send(self._table, self.table)


def launch_adapt(
    kernels: ModuleType,
    plan: AdaptPlan,
    settings: Settings,
    squares: Squares,
    guard: GuardSettings | None,
    square: Tensor | None,
    extras: Tensor | None = None,
) -> tuple[Scales, Factors, Tensor | None]:
    """Launch ``adapt``; the arguments and results are those of the pass, and the factors in float32.

    ``extras``, float64 ``[2]``, gets the gain and 1 if the step is skipped. In the place of the norm, the result has a
    float64 vector: the norm, and the bits of an int64, 1 if the step is skipped.
    """
    hyper = settings.hyper
    rows, cols = hyper.new_empty(plan.rows), hyper.new_empty(plan.cols)
    narrow = Factors(
        rows,
        hyper.new_empty(plan.rows, dtype=torch.float32),
        hyper.new_empty(plan.cols, dtype=torch.float32),
    )
    numbers = hyper.new_empty(4, plan.n)
    outcome, skipped = numbers, numbers  # stand-ins: only guarded steps write them
    extras = hyper.new_empty(kernels.EXTRAS) if extras is None else extras
    scale = found = None
    if guard is not None:
        outcome, skipped = hyper.new_empty(2), hyper.new_empty(1, dtype=torch.int8)
        scale, found = number(guard.grad_scale, hyper), number(guard.found_inf, hyper)
    limit = None if guard is None else guard.max_norm
    run(
        kernels.adapt,
        len(plan.segments),
        plan.table,
        plan.segments,
        hyper,
        settings.group_of,
        squares.total,
        squares.rows,
        squares.cols,
        hyper if square is None else square,
        hyper if scale is None else scale,
        hyper if found is None else found,
        rows,
        cols,
        narrow.rows32,
        narrow.cols32,
        numbers,
        plan.sums,
        plan.counters,
        outcome,
        extras,
        skipped,
        inf if limit is None else float(limit),
        plan.n,
        HYPERS=hyper.shape[1],
        PERMUTED=plan.permuted,
        GUARDED=guard is not None,
        CLIP=limit is not None,
        SCALED=scale is not None,
        SKIP_NONFINITE=guard is not None and guard.skip_nonfinite,
        FOUND=found is not None,
        num_warps=kernels.NUM_WARPS,
        enable_fp_fusion=False,
    )
    trace, beta2, eps, root = numbers.unbind()
    scales = Scales(rows=rows, cols=cols, trace=trace, beta2=beta2, eps=eps, root=root)
    if guard is None:
        return scales, narrow, None
    scales = scales._replace(
        gain=extras[kernels.GAIN] if guard.has_gain else None,
        skip=skipped.view(torch.bool)[0] if guard.may_skip else None,
    )
    return scales, narrow, outcome


# The sweeps, and the algebra between them


@dataclass(frozen=True)
class SweepConfig:
    """What ``sweep`` is compiled for.

    Attributes:
        kinds: those of the tensors: of :mod:`sofim_fused.backends.triton.pack`, with ``ELEMENT``.
        which: the pass.
        gradient: the update has a term in the gradient.
        clip: gradients are multiplied by a factor.
        skip: the step may be skipped.
        permuted: some tensor's memory order is not that of its dimensions.
    """

    kinds: tuple[int, ...]
    which: int
    gradient: bool = False
    clip: bool = False
    skip: bool = False
    permuted: bool = False


def launch_sweep(
    kernels: ModuleType,
    workspace: Workspace,
    config: SweepConfig,
    scales: Scales,
    factors: Factors,
    hip: bool = torch.version.hip is not None,
) -> None:
    """Launch ``sweep``; ``hip``: for an AMD GPU, whose warps have 64 threads."""
    common = KernelConfig(config.kinds, clip=config.clip, skip=config.skip).common(kernels)
    del common["L2"]
    common["num_warps"] //= 2 if hip else 1
    run(
        kernels.sweep,
        workspace.tiles,
        workspace.rows,
        workspace.tile_of,
        workspace.hyper,
        workspace.work,
        workspace.counters,
        scales.rows,
        scales.cols,
        factors.rows32,
        factors.cols32,
        scales.trace,
        scales.beta2,
        scales.eps,
        scales.root,
        workspace.tensors,
        workspace.tiles,
        PASS=config.which,
        GRADIENT=config.gradient,
        PERMUTED=config.permuted,
        **common,
    )


def launch_fold_scaled(
    kernels: ModuleType,
    located: Located,
    settings: Settings,
    sums: ScaledSums,
    class_of: Tensor | None,
    totals: Tensor,
) -> None:
    """Launch ``fold_scaled``; ``totals``, float64 ``[classes, 4, blocks]``, is written."""
    run(
        kernels.fold_scaled,
        len(totals),
        located.rows,
        located.bounds,
        settings.hyper,
        settings.group_of,
        *(vector.contiguous() for vector in (sums.mm, sums.mg, sums.trace)),
        located.rows if class_of is None else class_of.contiguous(),
        totals,
        len(located.rows),
        totals.shape[-1],
        NUMERATOR=settings.numerator,
        PER_TENSOR=settings.fisher == kernels.PARAMETER,
        CLASSES=class_of is not None,
        HYPERS=settings.hyper.shape[1],
        num_warps=kernels.SOLVE_BLOCK // 32,
        enable_fp_fusion=False,
    )


def launch_solve_scaled(
    kernels: ModuleType,
    located: Located,
    settings: Settings,
    blocks: Tensor | None,
    skip: Tensor | None,
    coefficients: Tensor,
    signal: Tensor | None,
) -> None:
    """Launch ``solve_scaled``; ``coefficients``, float64 ``[COEFFICIENTS, n]``, and ``signal`` are written."""
    count = len(located.rows)
    totals = settings.hyper if blocks is None else blocks.contiguous()
    most = max(count, 0 if blocks is None else blocks.shape[1])
    run(
        kernels.solve_scaled,
        max(1, -(-most // kernels.SOLVE_BLOCK)),
        located.rows,
        settings.hyper,
        settings.group_of,
        totals,
        located.rows if skip is None else skip.view(torch.int8),
        coefficients,
        coefficients if signal is None else signal,
        count,
        totals.shape[-1],
        NUMERATOR=settings.numerator,
        RANK_ONE=blocks is not None,
        FISHER=settings.fisher,
        SKIP=skip is not None,
        HYPERS=settings.hyper.shape[1],
        num_warps=kernels.SOLVE_BLOCK // 32,
        enable_fp_fusion=False,
    )


def _too_wide(tensors: StepTensors) -> bool:
    return any(v.col_var is not None and v.col_var.numel() >= WIDEST for v in tensors.variances)


def adaptive_kernels() -> ModuleType:
    """The module of kernels, which needs Triton."""
    return importlib.import_module("sofim_fused.backends.triton.adaptive_kernels")


def _table(lines: Iterable[Sequence[int]], columns: int) -> Tensor:
    return torch.tensor([*lines], dtype=torch.int64, device="cpu").view(-1, columns)


def _even(count: int) -> int:
    return count + count % 2
