"""The Triton kernels of a step with a diagonal that adapts, for all tensors together.

``squares`` and ``add_up`` sum g² over rows, columns and tensors; ``adapt`` turns these sums into the factors of D⁻¹;
``sweep`` is ``accumulate_scaled``, ``apply_scaled`` or ``commit_scaled``; ``fold_scaled`` and ``solve_scaled`` are the
algebra between. :mod:`sofim_fused.backends.adaptive` has the formulas.

A sweep works on tiles of consecutive elements, as those of :mod:`sofim_fused.backends.triton.kernels` do: an element's
row and column follow from its place in memory, and 1/s is the product of two factors that are read, or follows from the
element's own variance. Nothing but the variances of elements takes memory in proportion to the parameters.

``squares`` has tiles of rows and columns instead. Each program writes the sums of its rows and of its columns into
slots of its own, and ``add_up`` adds up the slots of a row or a column in their order. A row or a column that is all
in one tile needs no slot. No sum is taken by atomics, and the host waits for nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sofim_fused.backends import adaptive
from sofim_fused.backends.triton import kernels, pack
from sofim_fused.backends.triton.kernels import (
    _BY_GRADIENT,
    _BY_GROUP,
    _BY_MOMENT,
    _BY_PARAMETER,
    _BY_WEIGHT,
    _COEFFICIENTS,
    _EXTRAS,
    _GAIN,
    _MOMENT,
    _SKIP,
    _SLOTS,
    _SOLVE_BLOCK,
    _SUMS,
    _add_up,
    _correction,
    _factor,
    _finite,
    _gradients,
    _guard,
    _is_last,
    _load,
    _load_cg,
    _load_full,
    _look_ahead,
    _moment,
    _new_moment,
    _of_blocks,
    _split,
    _store,
    _store_moment,
    _sum,
    _sum_up,
    _typed,
    _update,
    _weight,
    _wide,
)

TILE = 2048  # elements; with those of other sweeps, places of factors would take too many registers
NUM_WARPS = kernels.NUM_WARPS
SOLVE_BLOCK = kernels.SOLVE_BLOCK
SUMS, COEFFICIENTS, EXTRAS = kernels.SUMS, kernels.COEFFICIENTS, kernels.EXTRAS
GAIN = 0  # of the extras
LIMIT, GRAD_SCALE, SKIP_NONFINITE = kernels.LIMIT, kernels.GRAD_SCALE, kernels.SKIP_NONFINITE
ACCUMULATE, APPLY, COMMIT = kernels.ACCUMULATE, kernels.APPLY, kernels.COMMIT
MODEL, GROUP, PARAMETER = kernels.MODEL, kernels.GROUP, kernels.PARAMETER

# Shapes of tiles in ``squares``: rows, columns, and how many such pieces, one below the other, a program takes.
SHAPES = ((1, 4096, 1), (4, 1024, 1), (32, 128, 4), (128, 32, 4))
# The same for kernels: the logarithms of these, three bytes for each shape.
SHAPE_BYTES = sum((size.bit_length() - 1) << 8 * i for i, size in enumerate(size for shape in SHAPES for size in shape))
# What is known of a tile when a kernel is compiled, a byte: the type of its gradient, and these.
S_UNALIGNED, S_BY_COL, S_SHAPE = 4, 8, 4  # two flags, and by how many bits the shape is shifted: see ``_squares``
MOST_KINDS = 6  # of tiles in one launch of ``squares``, which is compiled for all of them
SEGMENT, DEPTH = 64, 32  # rows or columns that a program of ``add_up`` adds up, and how many slots of each at once
FEW_ROWS = 4  # up to this many rows, ``add_up`` has a program for each
ADAPTED = 1024  # rows or columns of a program of ``adapt``
ROWS_PART, COLS_PART, OTHER_PART = range(3)  # what a program of ``add_up`` or ``adapt`` works on

_ACCUMULATE = tl.constexpr(ACCUMULATE)
_APPLY = tl.constexpr(APPLY)
_SEGMENT = tl.constexpr(SEGMENT)
_DEPTH = tl.constexpr(DEPTH)
_ADAPTED = tl.constexpr(ADAPTED)
_ROWS_PART = tl.constexpr(ROWS_PART)
_COLS_PART = tl.constexpr(COLS_PART)

# Rows of the sums after a sweep, in the place of those of other steps.
MM, MG, TRACE = range(3)
_MM = tl.constexpr(MM)
_MG = tl.constexpr(MG)
_TRACE = tl.constexpr(TRACE)

_GRADIENT = tl.constexpr(kernels.GRADIENT)

# Columns of a tensor's row in a sweep; those of pack.COLUMNS come first. ``VARIANCES``: the address of each element's
# variance, in the memory order of m, or 0. Memory holds elements by (columns before dimension 0, rows, columns after
# it): ``INNER`` is how many the latter are, ``COUNT`` the number of rows. ``ROW_AT``, ``COL_AT``: where the tensor's
# factors begin; the latter is -1 if there are none. ``ORDER``: the address of an int32 for each column in memory order,
# its place in logical order; 0 if these are the same.
VARIANCES, INNER, COUNT, ROW_AT, COL_AT, ORDER = range(pack.COLUMNS, pack.COLUMNS + 6)
COLUMNS = pack.COLUMNS + 6
ELEMENT = pack.ELEMENT
_VARIANCES = tl.constexpr(VARIANCES)
_INNER = tl.constexpr(INNER)
_COUNT = tl.constexpr(COUNT)
_ROW_AT = tl.constexpr(ROW_AT)
_COL_AT = tl.constexpr(COL_AT)
_ORDER = tl.constexpr(ORDER)
_COLUMNS = tl.constexpr(COLUMNS)
_NUMEL = tl.constexpr(pack.NUMEL)
_KIND = tl.constexpr(pack.KIND)
_GROUP = tl.constexpr(pack.GROUP)
_FIRST = tl.constexpr(pack.FIRST)
_STEP = tl.constexpr(pack.STEP)
_PACKED = tl.constexpr(pack.COLUMNS)
_HYPERS = tl.constexpr(pack.HYPERS)
_LR = tl.constexpr(pack.LR)
_MOMENTUM = tl.constexpr(pack.MOMENTUM)
_RHO = tl.constexpr(pack.RHO)
_WEIGHT_DECAY = tl.constexpr(pack.WEIGHT_DECAY)
_SIGN = tl.constexpr(pack.SIGN)
# Columns of Settings.hyper after SIGN.
_BETA2 = tl.constexpr(pack.SIGN + 1)
_EPS = tl.constexpr(pack.SIGN + 2)

# Columns of a tensor's row in ``squares`` and ``add_up``. The gradient is a matrix of ``S_ROWS`` rows, ``S_PITCH``
# elements apart, of ``S_COLS`` elements. ``..._OUT``: where in ``out`` its slots begin, or the sums themselves if one
# program has all of a row or a column; ``..._TO``: where the sums begin. ``S_ORDER``: as ``ORDER``.
S_G, S_ROWS, S_COLS, S_PITCH, S_FIRST, S_ROW_OUT, S_ROW_TO, S_ROW_SLOTS, S_COL_OUT, S_COL_TO, S_COL_SLOTS = range(11)
S_ORDER, S_SEGMENT, S_SEGMENTS, S_KIND = range(11, 15)
S_COLUMNS = 15
_S_G = tl.constexpr(S_G)
_S_ROWS = tl.constexpr(S_ROWS)
_S_COLS = tl.constexpr(S_COLS)
_S_PITCH = tl.constexpr(S_PITCH)
_S_FIRST = tl.constexpr(S_FIRST)
_S_ROW_OUT = tl.constexpr(S_ROW_OUT)
_S_ROW_TO = tl.constexpr(S_ROW_TO)
_S_ROW_SLOTS = tl.constexpr(S_ROW_SLOTS)
_S_COL_OUT = tl.constexpr(S_COL_OUT)
_S_COL_TO = tl.constexpr(S_COL_TO)
_S_COL_SLOTS = tl.constexpr(S_COL_SLOTS)
_S_ORDER = tl.constexpr(S_ORDER)
_S_SEGMENT = tl.constexpr(S_SEGMENT)
_S_SEGMENTS = tl.constexpr(S_SEGMENTS)
_S_KIND = tl.constexpr(S_KIND)
_S_COLUMNS = tl.constexpr(S_COLUMNS)

# Columns of a tensor's row in ``adapt``. ``A_ROW_VAR`` is the address of ``row_var``, or of a 0-dimensional
# ``variance``, which counts as one row whose sum is that of the tensor (``A_WHOLE`` is then 1). ``A_ROWS``, ``A_COLS``:
# how many running means there are; ``A_HEIGHT``, ``A_WIDTH``: over how many elements a column's and a row's mean is.
# ``A_LENGTH``: by what a sum of s over rows becomes one over elements, if there are no columns. ``A_SUMS_AT``: where
# its rows begin in ``rows``; ``A_ROW_AT``, ``A_COL_AT``: where its factors do. ``A_SEGMENT``: its first program, of
# ``A_ROW_SEGMENTS`` for rows and ``A_SEGMENTS`` in all.
A_STEP, A_DOUBLE, A_ROW_VAR, A_COL_VAR, A_WHOLE, A_ROWS, A_COLS, A_HEIGHT, A_WIDTH, A_LENGTH = range(10)
A_SUMS_AT, A_ROW_AT, A_COL_AT, A_ORDER, A_SEGMENT, A_ROW_SEGMENTS, A_SEGMENTS = range(10, 17)
A_COLUMNS = 17
_A_STEP = tl.constexpr(A_STEP)
_A_DOUBLE = tl.constexpr(A_DOUBLE)
_A_ROW_VAR = tl.constexpr(A_ROW_VAR)
_A_COL_VAR = tl.constexpr(A_COL_VAR)
_A_WHOLE = tl.constexpr(A_WHOLE)
_A_ROWS = tl.constexpr(A_ROWS)
_A_COLS = tl.constexpr(A_COLS)
_A_HEIGHT = tl.constexpr(A_HEIGHT)
_A_WIDTH = tl.constexpr(A_WIDTH)
_A_LENGTH = tl.constexpr(A_LENGTH)
_A_SUMS_AT = tl.constexpr(A_SUMS_AT)
_A_ROW_AT = tl.constexpr(A_ROW_AT)
_A_COL_AT = tl.constexpr(A_COL_AT)
_A_ORDER = tl.constexpr(A_ORDER)
_A_SEGMENT = tl.constexpr(A_SEGMENT)
_A_ROW_SEGMENTS = tl.constexpr(A_ROW_SEGMENTS)
_A_SEGMENTS = tl.constexpr(A_SEGMENTS)
_A_COLUMNS = tl.constexpr(A_COLUMNS)

_FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)
_FLOAT64_MAX = tl.constexpr(1.7976931348623157e308)
_COLUMN_FLOOR = tl.constexpr(adaptive.COLUMN_FLOOR)


# Sums of g².


@triton.jit
def _load_part(pointer, offsets, mask):
    return tl.load(pointer + offsets, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["start"])
def squares(
    table, tile_of, out, start,
    KINDS: tl.constexpr, N_KINDS: tl.constexpr, SHAPES: tl.constexpr, PERMUTED: tl.constexpr,
):  # fmt: skip
    """Sums of g² over the rows, and for some kinds the columns, of a tile: a program per tile.

    ``KINDS``: those of the tiles, a byte for each. ``SHAPES``: ``SHAPE_BYTES``. ``PERMUTED``: some columns have to be
    put in order.
    """
    tile = start + tl.program_id(0)
    row = table + tl.load(tile_of + tile).to(tl.int64) * _S_COLUMNS
    if N_KINDS == 1:
        _squares(row, tile, out, KINDS, SHAPES >> (24 * (KINDS >> 4)), PERMUTED)
    else:
        kind = tl.load(row + _S_KIND)
        for i in tl.static_range(N_KINDS):
            if kind == (KINDS >> (8 * i)) & 255:
                _squares(
                    row, tile, out, (KINDS >> (8 * i)) & 255, SHAPES >> (24 * ((KINDS >> (8 * i + 4)) & 15)), PERMUTED
                )  # fmt: skip


@triton.jit
def _squares(row, tile, out, KIND: tl.constexpr, SHAPE: tl.constexpr, PERMUTED: tl.constexpr):
    number: tl.constexpr = KIND & 3
    unaligned: tl.constexpr = (KIND >> 2) & 1
    by_col: tl.constexpr = (KIND >> 3) & 1
    height: tl.constexpr = 1 << (SHAPE & 255)
    width: tl.constexpr = 1 << ((SHAPE >> 8) & 255)
    pieces: tl.constexpr = 1 << ((SHAPE >> 16) & 255)
    count = tl.load(row + _S_ROWS)
    size = tl.load(row + _S_COLS)
    at = tile - tl.load(row + _S_FIRST)
    across = (size + width - 1) // width
    down = at // across
    place = at - down * across
    begin = place * width
    pitch = tl.load(row + _S_PITCH)
    if not unaligned:
        # So the compiler knows that rows are aligned too.
        elements: tl.constexpr = 4 if number == 0 else 2 if number == 1 else 8
        pitch = pitch // elements * elements
    pointer = _typed(tl.load(row + _S_G), number, unaligned)
    lanes = tl.arange(0, height)
    cols = tl.arange(0, width)
    offsets = lanes[:, None].to(tl.int64) * pitch + cols[None, :]
    by_row = out + tl.load(row + _S_ROW_OUT) + place * count
    total = tl.zeros([height, width], tl.float64)
    for piece in range(pieces):
        first = (down * pieces + piece) * height
        if first < count:
            here = pointer + (first * pitch + begin)
            if (first + height <= count) & (begin + width <= size):
                x = _load_full(here, offsets)
            else:
                x = _load_part(here, offsets, (first + lanes < count)[:, None] & (begin + cols < size)[None, :])
            g = _wide(x, number).to(tl.float64)
            square = g * g
            tl.store(by_row + first + lanes, tl.sum(square, 1), mask=first + lanes < count)
            if by_col:
                total += square
    if by_col:
        to = tl.load(row + _S_COL_OUT)
        col = begin + cols
        inside = col < size
        if PERMUTED:
            order = tl.load(row + _S_ORDER)
            if (order != 0) & (to == tl.load(row + _S_COL_TO)):
                col = tl.load(order.to(tl.pointer_type(tl.int32)) + col, mask=inside, other=0).to(tl.int64)
        tl.store(out + to + down * size + col, tl.sum(total, 0), mask=inside)


@triton.jit
def add_up(table, segments, out, totals, counters, PERMUTED: tl.constexpr):
    """The sums of rows, columns and tensors, from the slots of tiles: a program per line of ``segments``.

    ``segments``, int64 ``[programs, 3]``: a tensor, a part of it, and the first row or column, or the only row. In
    ``totals``, float64 ``[programs]``, each leaves what it adds to its tensor's sum.
    """
    program = tl.program_id(0)
    tensor = tl.load(segments + program * 3)
    part = tl.load(segments + program * 3 + 1)
    begin = tl.load(segments + program * 3 + 2)
    row = table + tensor * _S_COLUMNS
    if part == _COLS_PART:
        size = tl.load(row + _S_COLS)
        sums, col, inside = _column_of_slots(
            out + tl.load(row + _S_COL_OUT), begin, size, tl.load(row + _S_COL_SLOTS)
        )  # fmt: skip
        if PERMUTED:
            order = tl.load(row + _S_ORDER)
            if order != 0:
                col = tl.load(order.to(tl.pointer_type(tl.int32)) + col, mask=inside, other=0).to(tl.int64)
        tl.store(out + tl.load(row + _S_COL_TO) + col, sums, mask=inside)
    else:
        count = tl.load(row + _S_ROWS)
        slots = out + tl.load(row + _S_ROW_OUT)
        to = out + tl.load(row + _S_ROW_TO)
        across = tl.load(row + _S_ROW_SLOTS)
        if part == _ROWS_PART:
            sums, at, inside = _column_of_slots(slots, begin, count, across)
            tl.store(to + at, sums, mask=inside)
            total = tl.sum(sums, 0)
        else:
            lanes = tl.arange(0, _SLOTS)
            several = tl.zeros([_SLOTS], tl.float64)
            for start in range(0, across, _SLOTS):
                at = (start + lanes).to(tl.int64)
                several += tl.load(slots + at * count + begin, mask=at < across, other=0.0)
            total = tl.sum(several, 0)
            tl.store(to + begin, total)
        tl.store(totals + program, total)
        segments_here = tl.load(row + _S_SEGMENTS)
        if _is_last(counters + tensor, segments_here):
            tl.store(out + tensor, _total_of(totals, tl.load(row + _S_SEGMENT), segments_here))


@triton.jit
def _column_of_slots(slots, begin, size, count):
    """The sums of ``SEGMENT`` rows or columns over their ``count`` slots, which are ``size`` apart."""
    at = begin + tl.arange(0, _SEGMENT)
    inside = at < size
    lanes = tl.arange(0, _DEPTH)
    total = tl.zeros([_DEPTH, _SEGMENT], tl.float64)
    for start in range(0, count, _DEPTH):
        slot = (start + lanes).to(tl.int64)
        mask = (slot < count)[:, None] & inside[None, :]
        total += tl.load(slots + slot[:, None] * size + at[None, :], mask=mask, other=0.0)
    return tl.sum(total, 0), at, inside


@triton.jit
def _total_of(values, begin, count):
    """The sum of values that other programs have written in this launch."""
    lanes = tl.arange(0, _SLOTS)
    total = tl.zeros([_SLOTS], tl.float64)
    for start in range(0, count, _SLOTS):
        total += _load_cg(values + begin + start + lanes, start + lanes < count)
    return tl.sum(total, 0)


# Running means, and the factors of D⁻¹.


@triton.jit
def _load_running(address, at, mask, double):
    if double != 0:
        value = tl.load(address.to(tl.pointer_type(tl.float64)) + at, mask=mask, other=0.0, cache_modifier=".cg")
    else:
        value = tl.load(address.to(tl.pointer_type(tl.float32)) + at, mask=mask, other=0.0, cache_modifier=".cg").to(
            tl.float64
        )
    return value


@triton.jit
def _entered(address, at, mask, double, total, size, beta2, gain, go):
    """Update running means by sums of g² over ``size`` elements each, if ``go``; return them as stored."""
    old = _load_running(address, at, mask, double)
    # With an infinite norm the gain is zero, and so are the gradients that enter m.
    mean = tl.where(gain == 0.0, 0.0, total / tl.maximum(size, 1).to(tl.float64) * gain * gain)
    new = beta2 * old + (1.0 - beta2) * mean
    if double != 0:
        stored = tl.where(go, tl.where(new > _FLOAT64_MAX, _FLOAT64_MAX, new), old)
        tl.store(address.to(tl.pointer_type(tl.float64)) + at, stored, mask=mask)
    else:
        # Saturated, not infinite: from infinity it could never decay, and no later step would move.
        single = tl.where(go, tl.where(new > _FLOAT32_MAX, _FLOAT32_MAX, new), old).to(tl.float32)
        tl.store(address.to(tl.pointer_type(tl.float32)) + at, single, mask=mask)
        stored = single.to(tl.float64)
    return stored


# Vectors that are parts of larger ones may begin at any multiple of 8 bytes.
@triton.jit(do_not_specialize=["tensors"], do_not_specialize_on_alignment=["totals", "rows", "cols", "square"])
def adapt(
    table, segments, hyper, group_of, totals, rows, cols, square, grad_scale, found_inf, row_factors, col_factors,
    rows32, cols32, numbers, sums, counters, outcome, extras, skipped, limit: tl.float64, tensors,
    HYPERS: tl.constexpr, PERMUTED: tl.constexpr, GUARDED: tl.constexpr, CLIP: tl.constexpr, SCALED: tl.constexpr,
    SKIP_NONFINITE: tl.constexpr, FOUND: tl.constexpr,
):  # fmt: skip
    """Running means and the factors of D⁻¹: a program per line of ``segments``, as in ``add_up``.

    ``totals``, ``rows`` and ``cols`` are those of :class:`sofim_fused.backends.Squares`. ``numbers``, float64
    ``[4, tensors]``, gets Σs, beta2, eps and the root of the bias correction. ``sums``, float64 ``[programs]``, is used
    between the programs of a tensor. ``outcome``, float64 ``[2]``, gets the norm and, as an int64, 1 if the step is
    skipped; ``extras``, float64 ``[EXTRAS]``, the gain and the same; ``skipped``, int8 ``[1]``, the same. The rest is
    as in ``kernels.solve``.
    """
    program = tl.program_id(0)
    tensor = tl.load(segments + program * 3)
    part = tl.load(segments + program * 3 + 1)
    begin = tl.load(segments + program * 3 + 2)
    row = table + tensor * _A_COLUMNS
    group = hyper + tl.load(group_of + tensor) * HYPERS
    beta2 = tl.load(group + _BETA2)
    eps = tl.load(group + _EPS)
    gain = tl.full([], 1.0, tl.float64)
    skip = tl.full([], 0.0, tl.float64)
    if GUARDED:
        scale = tl.full([], 1.0, tl.float64)
        found = tl.full([], 0.0, tl.float64)
        if SCALED:
            scale = tl.load(grad_scale).to(tl.float64)
        if FOUND:
            found = tl.load(found_inf).to(tl.float64)
        norm, gain, skip = _guard(
            tl.load(square), tl.full([], 0.0, tl.float64) + limit, scale, found,
            tl.full([], 1.0 if SKIP_NONFINITE else 0.0, tl.float64), CLIP or SCALED, SKIP_NONFINITE or FOUND,
        )  # fmt: skip
        if program == 0:
            tl.store(outcome, norm)
            tl.store((outcome + 1).to(tl.pointer_type(tl.int64)), skip.to(tl.int64))
            tl.store(extras + _GAIN, gain)
            tl.store(extras + _SKIP, skip)
            tl.store(skipped, skip.to(tl.int8))
    go = skip == 0.0
    update = tl.load(tl.load(row + _A_STEP).to(tl.pointer_type(tl.int64))) + 1
    correction = _correction(beta2, update)
    double = tl.load(row + _A_DOUBLE)
    at = begin + tl.arange(0, _ADAPTED)
    if part == _ROWS_PART:
        inside = at < tl.load(row + _A_ROWS)
        if tl.load(row + _A_WHOLE) != 0:
            total = tl.load(totals + tensor + at, mask=inside, other=0.0)
        else:
            total = tl.load(rows + tl.load(row + _A_SUMS_AT) + at, mask=inside, other=0.0)
        running = _entered(
            tl.load(row + _A_ROW_VAR), at, inside, double, total, tl.load(row + _A_WIDTH), beta2, gain, go
        )
        s = tl.sqrt(running) * tl.sqrt(correction) + eps  # not √(c₂v): the largest v has to stay finite
        to = tl.load(row + _A_ROW_AT) + at
        factor = 1.0 / s
        tl.store(row_factors + to, factor, mask=inside)
        tl.store(rows32 + to, factor.to(tl.float32), mask=inside)
        tl.store(sums + program, tl.sum(tl.where(inside, s, 0.0), 0))
    elif part == _COLS_PART:
        inside = at < tl.load(row + _A_COLS)
        col = _ordered(tl.load(row + _A_ORDER), at, inside, PERMUTED)
        total = tl.load(cols + tl.load(row + _A_COL_AT) + col, mask=inside, other=0.0)
        running = _entered(
            tl.load(row + _A_COL_VAR), at, inside, double, total, tl.load(row + _A_HEIGHT), beta2, gain, go
        )
        tl.store(sums + program, tl.sum(tl.where(inside, running, 0.0), 0))
    if _is_last(counters + tensor, tl.load(row + _A_SEGMENTS)):
        first = tl.load(row + _A_SEGMENT)
        by_row = tl.load(row + _A_ROW_SEGMENTS)
        trace = _total_of(sums, first, by_row)
        width = tl.load(row + _A_COLS)
        if tl.load(row + _A_COL_VAR) != 0:
            mean = _total_of(sums, first + by_row, tl.load(row + _A_SEGMENTS) - by_row)
            mean = mean / tl.maximum(width, 1).to(tl.float64)
            shares = tl.zeros([_ADAPTED], tl.float64)
            for start in range(0, width, _ADAPTED):
                at = start + tl.arange(0, _ADAPTED).to(tl.int64)
                inside = at < width
                running = _load_running(tl.load(row + _A_COL_VAR), at, inside, double)
                share = tl.where(mean == 0.0, 1.0, running / tl.where(mean == 0.0, 1.0, mean))
                share = tl.sqrt(tl.where(share < _COLUMN_FLOOR, _COLUMN_FLOOR, share))
                col = _ordered(tl.load(row + _A_ORDER), at, inside, PERMUTED)
                to = tl.load(row + _A_COL_AT) + col
                factor = 1.0 / share
                tl.store(col_factors + to, factor, mask=inside)
                tl.store(cols32 + to, factor.to(tl.float32), mask=inside)
                shares += tl.where(inside, share, 0.0)
            trace *= tl.sum(shares, 0)
        else:
            trace *= tl.load(row + _A_LENGTH).to(tl.float64)
        tl.store(numbers + tensor, trace)
        tl.store(numbers + tensors + tensor, beta2)
        tl.store(numbers + 2 * tensors + tensor, eps)
        tl.store(numbers + 3 * tensors + tensor, tl.sqrt(correction))


@triton.jit
def _ordered(order, at, inside, PERMUTED: tl.constexpr):
    """The logical places of columns that are in memory order; ``order`` is the address of the list, or 0."""
    col = at
    if PERMUTED:
        if order != 0:
            col = tl.load(order.to(tl.pointer_type(tl.int32)) + at, mask=inside, other=0).to(tl.int64)
    return col


# The sweeps.


@triton.jit
def _by_blocks(
    row, row_factors, col_factors, rows32, cols32, at, offsets, left, KIND: tl.constexpr, PERMUTED: tl.constexpr
):  # fmt: skip
    """1/s of the elements from ``at`` on: the product of a row's factor and a column's."""
    inside = offsets < left
    inner = tl.load(row + _INNER)
    line = at // inner
    turns, col = _split(at - line * inner, offsets, inner)
    first_row = tl.load(row + _ROW_AT)
    first_col = tl.load(row + _COL_AT)
    if PERMUTED:
        # Lines in memory are the rows, once for each of the columns that are outside of dimension 0.
        count = tl.load(row + _COUNT)
        outside = line // count
        turns, which = _split(line - outside * count, turns, count)
        col += (outside.to(tl.int32) + turns) * inner.to(tl.int32)
        order = tl.load(row + _ORDER)
        if order != 0:
            col = tl.load(order.to(tl.pointer_type(tl.int32)) + col, mask=inside, other=0)
    else:
        which = turns
        first_row += line
    has_cols = inside & (tl.zeros_like(col) + first_col >= 0)
    if KIND & 3 == 1:
        by_row = tl.load(row_factors + first_row + which, mask=inside, other=0.0)
        by_col = tl.load(col_factors + first_col + col, mask=has_cols, other=1.0)
    else:
        by_row = tl.load(rows32 + first_row + which, mask=inside, other=0.0)
        by_col = tl.load(cols32 + first_col + col, mask=has_cols, other=1.0)
    return by_row * by_col


@triton.jit
def _variance(row, at, KIND: tl.constexpr):
    return _typed(tl.load(row + _VARIANCES), 1 if KIND & 3 == 1 else 0, (KIND >> 5) & 1) + at


@triton.jit
def _root(v, root, eps, KIND: tl.constexpr):
    """The elements of D, from their variances."""
    if KIND & 3 == 1:
        x = tl.sqrt(v)
    else:
        x = tl.sqrt_rn(v)
    return x * _factor(root, KIND) + _factor(eps, KIND)


@triton.jit
def _reciprocal(s, KIND: tl.constexpr):
    if KIND & 3 == 1:
        x = 1.0 / s
    else:
        x = tl.div_rn(1.0, s)
    return x


@triton.jit
def _new_variance(v, g, beta2, KIND: tl.constexpr):
    """The variances of elements after gradients g."""
    keep = tl.load(beta2)
    v = v * _wide(keep, KIND) + g * (g * _wide(1.0 - keep, KIND))  # 1 - β₂ may be zero if β₂ is rounded before
    if KIND & 3 == 1:
        v = tl.where(v > _FLOAT64_MAX, _FLOAT64_MAX, v)
    else:
        v = tl.where(v > _FLOAT32_MAX, _FLOAT32_MAX, v)
    return v


@triton.jit
def _gained(row, extras, at, offsets, left, KIND: tl.constexpr, FULL: tl.constexpr, CLIP: tl.constexpr):
    g = _load(_gradients(row, at, KIND), offsets, left, KIND, FULL)
    if CLIP:
        g *= _factor(extras + _GAIN, KIND)
    return g


@triton.jit
def _sums_of_tile(
    row, group, extras, slot, tiles, row_factors, col_factors, rows32, cols32, beta2, eps, root, at, offsets, left,
    KIND: tl.constexpr, FULL: tl.constexpr, CLIP: tl.constexpr, SKIP: tl.constexpr, PERMUTED: tl.constexpr,
):  # fmt: skip
    go = True
    if SKIP:
        go = tl.load(extras + _SKIP) == 0.0
    m = _moment(row, at, offsets, left, KIND, FULL)
    g = _gained(row, extras, at, offsets, left, KIND, FULL, CLIP)
    inside = offsets < left
    if (KIND >> 6) & 1:
        v_pointer = _variance(row, at, KIND)
        v = _load(v_pointer, offsets, left, KIND, FULL)
        if go:
            v = _new_variance(v, g, beta2, KIND)
            _store(v_pointer, v, offsets, left, FULL)
        s = _root(v, root, eps, KIND)
        inverse = _reciprocal(s, KIND)
        if not FULL:
            s = tl.where(inside, s, 0.0)
        _sum_up(slot + _TRACE * tiles, s.to(tl.float64))
    else:
        inverse = _by_blocks(row, row_factors, col_factors, rows32, cols32, at, offsets, left, KIND, PERMUTED)
    if go:
        m = _store_moment(_new_moment(m, g, m, group, KIND, False), row, 1, at, offsets, left, KIND, FULL)
    scaled = m * inverse
    if not FULL:
        scaled = tl.where(inside, scaled, 0.0)
    _sum(slot + _MM * tiles, m, scaled)
    _sum(slot + _MG * tiles, g, scaled)


@triton.jit
def _apply_to_tile(
    row, coefs, tensors, extras, row_factors, col_factors, rows32, cols32, eps, root, at, offsets, left,
    KIND: tl.constexpr, FULL: tl.constexpr, GRADIENT: tl.constexpr, CLIP: tl.constexpr, PERMUTED: tl.constexpr,
):  # fmt: skip
    m = _moment(row, at, offsets, left, KIND, FULL)
    if GRADIENT:
        g = _gained(row, extras, at, offsets, left, KIND, FULL, CLIP)
    else:
        g = m
    w = _weight(row, at, offsets, left, KIND, FULL)
    if (KIND >> 6) & 1:
        inverse = _reciprocal(_root(_load(_variance(row, at, KIND), offsets, left, KIND, FULL), root, eps, KIND), KIND)
    else:
        inverse = _by_blocks(row, row_factors, col_factors, rows32, cols32, at, offsets, left, KIND, PERMUTED)
    _update(w, g * inverse, m * inverse, row, coefs, tensors, at, offsets, left, KIND, FULL, GRADIENT, True)


@triton.jit
def _commit_to_tile(
    row, group, coefs, tensors, extras, row_factors, col_factors, rows32, cols32, beta2, eps, root, at, offsets, left,
    KIND: tl.constexpr, FULL: tl.constexpr, GRADIENT: tl.constexpr, CLIP: tl.constexpr, PERMUTED: tl.constexpr,
):  # fmt: skip
    m = _moment(row, at, offsets, left, KIND, FULL)
    g = _gained(row, extras, at, offsets, left, KIND, FULL, CLIP)
    w = _weight(row, at, offsets, left, KIND, FULL)
    if (KIND >> 6) & 1:
        v_pointer = _variance(row, at, KIND)
        v = _new_variance(_load(v_pointer, offsets, left, KIND, FULL), g, beta2, KIND)
        _store(v_pointer, v, offsets, left, FULL)
        inverse = _reciprocal(_root(v, root, eps, KIND), KIND)
    else:
        inverse = _by_blocks(row, row_factors, col_factors, rows32, cols32, at, offsets, left, KIND, PERMUTED)
    m = _new_moment(m, g, m, group, KIND, False)
    _store_moment(m, row, 0, at, offsets, left, KIND, FULL)
    _update(w, g * inverse, m * inverse, row, coefs, tensors, at, offsets, left, KIND, FULL, GRADIENT, True)


@triton.jit
def _run(
    row, group, coefs, tensors, extras, slot, tiles,
    row_factors, col_factors, rows32, cols32, beta2, eps, root, at, left,
    PASS: tl.constexpr, KIND: tl.constexpr, FULL: tl.constexpr, GRADIENT: tl.constexpr, CLIP: tl.constexpr,
    SKIP: tl.constexpr, PERMUTED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    offsets = tl.arange(0, SIZE)
    if (KIND >> 8) & 1:
        at, offsets, left = _of_blocks(row, at, left, KIND, SIZE)
    if PASS == _ACCUMULATE:
        _sums_of_tile(
            row, group, extras, slot, tiles,
            row_factors, col_factors, rows32, cols32, beta2, eps, root, at, offsets, left,
            KIND, FULL, CLIP, SKIP, PERMUTED,
        )  # fmt: skip
    elif PASS == _APPLY:
        _apply_to_tile(
            row, coefs, tensors, extras, row_factors, col_factors, rows32, cols32, eps, root, at, offsets, left,
            KIND, FULL, GRADIENT, CLIP, PERMUTED,
        )  # fmt: skip
    else:
        _commit_to_tile(
            row, group, coefs, tensors, extras,
            row_factors, col_factors, rows32, cols32, beta2, eps, root, at, offsets, left,
            KIND, FULL, GRADIENT, CLIP, PERMUTED,
        )  # fmt: skip


@triton.jit
def _tile(
    tile, rows, tile_of, hyper, coefs, extras, slots,
    row_factors, col_factors, rows32, cols32, beta2, eps, root, tensors, tiles,
    PASS: tl.constexpr, KINDS: tl.constexpr, N_KINDS: tl.constexpr, GRADIENT: tl.constexpr, CLIP: tl.constexpr,
    SKIP: tl.constexpr, PERMUTED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """One pass over a tile of any kind. Returns the index of its tensor."""
    tensor = tl.load(tile_of + tile).to(tl.int64)
    row = rows + tensor * _COLUMNS
    group = hyper + (tl.load(row + _GROUP) + 1) * _HYPERS
    at = (tile - tl.load(row + _FIRST)) * SIZE
    left = tl.load(row + _NUMEL) - at
    kind = tl.load(row + _KIND)
    for i in tl.static_range(N_KINDS):
        if kind == (KINDS >> (16 * i)) & 0xFFFF:
            if (KINDS >> (16 * i + 9)) & 1:
                _run(
                    row, group, coefs + tensor, tensors, extras, slots + tile, tiles, row_factors, col_factors,
                    rows32, cols32, beta2 + tensor, eps + tensor, root + tensor, at, left,
                    PASS, (KINDS >> (16 * i)) & 0xFFFF, False, GRADIENT, CLIP, SKIP, PERMUTED, SIZE,
                )  # fmt: skip
            elif left >= SIZE:
                _run(
                    row, group, coefs + tensor, tensors, extras, slots + tile, tiles, row_factors, col_factors,
                    rows32, cols32, beta2 + tensor, eps + tensor, root + tensor, at, left,
                    PASS, (KINDS >> (16 * i)) & 0xFFFF, True, GRADIENT, CLIP, SKIP, PERMUTED, SIZE,
                )  # fmt: skip
            else:
                _run(
                    row, group, coefs + tensor, tensors, extras, slots + tile, tiles, row_factors, col_factors,
                    rows32, cols32, beta2 + tensor, eps + tensor, root + tensor, at, left,
                    PASS, (KINDS >> (16 * i)) & 0xFFFF, False, GRADIENT, CLIP, SKIP, PERMUTED, SIZE,
                )  # fmt: skip
    return tensor


@triton.jit(
    do_not_specialize=["tensors", "tiles"],
    do_not_specialize_on_alignment=["row_factors", "col_factors", "trace", "beta2", "eps", "root"],
)
def sweep(
    rows, tile_of, hyper, work, counters,
    row_factors, col_factors, rows32, cols32, trace, beta2, eps, root, tensors, tiles,
    PASS: tl.constexpr, KINDS: tl.constexpr, N_KINDS: tl.constexpr, GRADIENT: tl.constexpr, CLIP: tl.constexpr,
    SKIP: tl.constexpr, PERMUTED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """``accumulate_scaled``, ``apply_scaled`` or ``commit_scaled``: one program per tile.

    Arrays are those of ``kernels.first``, with more columns in ``rows``; and the fields of
    :class:`sofim_fused.backends.Scales`, the factors also in float32, for float32 arithmetic.
    """
    coefs = work + _SUMS * tensors
    extras = coefs + _COEFFICIENTS * tensors
    slots = extras + _EXTRAS
    if PASS == _ACCUMULATE:
        tensor = _tile(
            tl.program_id(0), rows, tile_of, hyper, coefs, extras, slots,
            row_factors, col_factors, rows32, cols32, beta2, eps, root, tensors, tiles,
            PASS, KINDS, N_KINDS, GRADIENT, CLIP, SKIP, PERMUTED, SIZE,
        )  # fmt: skip
        row = rows + tensor * _COLUMNS
        if _is_last(counters + tensor, tl.maximum((tl.load(row + _NUMEL) + SIZE - 1) // SIZE, 1)):
            _add_up(slots, work, row, tensor, tensors, tiles, _MM, SIZE)
            _add_up(slots, work, row, tensor, tensors, tiles, _MG, SIZE)
            if tl.load(row + _VARIANCES) != 0:
                _add_up(slots, work, row, tensor, tensors, tiles, _TRACE, SIZE)
            else:
                tl.store(work + _TRACE * tensors + tensor, tl.load(trace + tensor))
    else:
        go = True
        if SKIP:
            go = tl.load(extras + _SKIP) == 0.0
        if go:
            # The last tile first, because it is still in the cache.
            _tile(
                tiles - 1 - tl.program_id(0), rows, tile_of, hyper, coefs, extras, slots,
                row_factors, col_factors, rows32, cols32, beta2, eps, root, tensors, tiles,
                PASS, KINDS, N_KINDS, GRADIENT, CLIP, SKIP, PERMUTED, SIZE,
            )  # fmt: skip


# The algebra between the sweeps. ``rows`` is [tensors, pack.COLUMNS] with STEP; ``hyper``, [groups, HYPERS], and
# ``group_of`` are those of :class:`sofim_fused.backends.Settings`.


@triton.jit
def _numerator(rows, hyper, group_of, at, mask, NUMERATOR: tl.constexpr, HYPERS: tl.constexpr):
    """Of tensors: the group, the step count, the bias correction, and v as factors of the new moment and of g."""
    group = hyper + tl.load(group_of + at, mask=mask, other=0) * HYPERS
    steps = tl.load(rows + at * _PACKED + _STEP, mask=mask, other=0).to(tl.pointer_type(tl.int64))
    beta = tl.load(group + _MOMENTUM, mask=mask, other=0.0)
    correction = _correction(beta, tl.load(steps, mask=mask, other=0) + 1)
    sign = tl.load(group + _SIGN, mask=mask, other=0.0)
    if NUMERATOR == _MOMENT:
        by_moment = correction
        by_gradient = tl.zeros_like(sign)
    elif NUMERATOR == _GRADIENT:
        by_moment = tl.zeros_like(sign)
        by_gradient = sign
    else:
        by_moment, by_gradient = _look_ahead(beta, correction)
        by_gradient *= sign
    return group, steps, correction, by_moment, by_gradient


@triton.jit
def _parts(
    rows, hyper, group_of, mm, mg, trace, class_of, which, at, mask,
    NUMERATOR: tl.constexpr, CLASSES: tl.constexpr, HYPERS: tl.constexpr,
):  # fmt: skip
    """What tensors add to T, Q, P and m̂ᵀD⁻¹m̂ of their Fisher block."""
    if CLASSES:
        mask = mask & (tl.load(class_of + at, mask=mask, other=-1) == which)
    group, _, correction, by_moment, by_gradient = _numerator(rows, hyper, group_of, at, mask, NUMERATOR, HYPERS)
    rho = tl.load(group + _RHO, mask=mask, other=1.0)
    t = tl.load(trace + at, mask=mask, other=0.0)
    a = tl.load(mm + at, mask=mask, other=0.0)
    b = tl.load(mg + at, mask=mask, other=0.0)
    square = correction * correction * a
    cross = correction * (by_moment * a + by_gradient * b)
    zero = tl.zeros_like(t)  # beyond the end, a correction of 1/0 would make NaN of it
    return (
        t, tl.where(mask, square / rho, zero), tl.where(mask, cross / rho, zero), tl.where(mask, square, zero),
    )  # fmt: skip


@triton.jit(do_not_specialize=["tensors", "blocks"])
def fold_scaled(
    rows, bounds, hyper, group_of, mm, mg, trace, class_of, totals, tensors, blocks,
    NUMERATOR: tl.constexpr, PER_TENSOR: tl.constexpr, CLASSES: tl.constexpr, HYPERS: tl.constexpr,
):  # fmt: skip
    """From sums to totals per Fisher block, float64 ``[classes, 4, blocks]``: one program per class of tensors."""
    which = tl.program_id(0)
    lanes = tl.arange(0, _SOLVE_BLOCK)
    out = totals + which.to(tl.int64) * 4 * blocks
    if PER_TENSOR:
        for start in range(0, tensors, _SOLVE_BLOCK):
            at = (start + lanes).to(tl.int64)
            mask = at < tensors
            t, square, cross, plain = _parts(
                rows, hyper, group_of, mm, mg, trace, class_of, which, at, mask, NUMERATOR, CLASSES, HYPERS
            )
            tl.store(out + at, t, mask=mask)
            tl.store(out + blocks + at, square, mask=mask)
            tl.store(out + 2 * blocks + at, cross, mask=mask)
            tl.store(out + 3 * blocks + at, plain, mask=mask)
    else:
        for block in range(blocks):
            zero = tl.zeros([_SOLVE_BLOCK], tl.float64)
            t, square, cross, plain = zero, zero, zero, zero
            end = tl.load(bounds + block + 1)
            for start in range(tl.load(bounds + block), end, _SOLVE_BLOCK):
                at = (start + lanes).to(tl.int64)
                a, b, c, d = _parts(
                    rows, hyper, group_of, mm, mg, trace, class_of, which, at, at < end, NUMERATOR, CLASSES, HYPERS
                )
                t += a
                square += b
                cross += c
                plain += d
            tl.store(out + block, tl.sum(t, 0))
            tl.store(out + blocks + block, tl.sum(square, 0))
            tl.store(out + 2 * blocks + block, tl.sum(cross, 0))
            tl.store(out + 3 * blocks + block, tl.sum(plain, 0))


@triton.jit(do_not_specialize=["tensors", "blocks"])
def solve_scaled(
    rows, hyper, group_of, totals, skipped, coefs, signal, tensors, blocks,
    NUMERATOR: tl.constexpr, RANK_ONE: tl.constexpr, FISHER: tl.constexpr, SKIP: tl.constexpr, HYPERS: tl.constexpr,
):  # fmt: skip
    """From totals to coefficients, float64 ``[COEFFICIENTS, tensors]``: one program per ``SOLVE_BLOCK`` tensors.

    Counts one more update of each tensor, unless ``skipped`` (int8 ``[1]``, read with ``SKIP``) is not 0. With
    ``RANK_ONE`` also writes the signal of each Fisher block.
    """
    at = (tl.program_id(0) * _SOLVE_BLOCK + tl.arange(0, _SOLVE_BLOCK)).to(tl.int64)
    mask = at < tensors
    group, steps, correction, by_moment, by_gradient = _numerator(rows, hyper, group_of, at, mask, NUMERATOR, HYPERS)
    lr = tl.load(group + _LR, mask=mask, other=0.0)
    if RANK_ONE:
        block = tl.zeros_like(at)
        if FISHER == _BY_GROUP:
            block = tl.load(group_of + at, mask=mask, other=0)
        elif FISHER == _BY_PARAMETER:
            block = at
        trace = tl.load(totals + block, mask=mask, other=1.0)
        whole = trace + tl.load(totals + blocks + block, mask=mask, other=1.0)
        if NUMERATOR == _MOMENT:
            by_moment = correction * trace / whole  # a quotient, because the difference would cancel
        else:
            by_moment -= correction * tl.load(totals + 2 * blocks + block, mask=mask, other=0.0) / whole
        here = at < blocks
        square = tl.load(totals + 3 * blocks + at, mask=here, other=0.0)
        size = tl.load(totals + at, mask=here, other=0.0)
        # A block without elements has no signal.
        tl.store(signal + at, tl.where(size == 0.0, 0.0, square / tl.where(size == 0.0, 1.0, size)), mask=here)
    by_weight = 1.0 - lr * tl.load(group + _WEIGHT_DECAY, mask=mask, other=0.0)
    tl.store(coefs + _BY_WEIGHT * tensors + at, by_weight, mask=mask)
    tl.store(coefs + _BY_GRADIENT * tensors + at, _finite(-lr * by_gradient), mask=mask)
    tl.store(coefs + _BY_MOMENT * tensors + at, _finite(-lr * by_moment), mask=mask)
    taken = tl.full([], 1, tl.int64)
    if SKIP:
        taken = tl.where(tl.load(skipped) != 0, taken - 1, taken)
    tl.store(steps, tl.load(steps, mask=mask, other=0) + taken, mask=mask)
