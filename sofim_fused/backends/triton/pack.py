"""The tensors of a step packed into rows of addresses and numbers, so that one launch can work on all of them.

Tensors are packed in two places. :func:`lay_out` packs them in Python, for steps that run pass by pass.
``sofim_fused._C.PackedStep`` (``csrc/gather/packed_step.cpp``) reads an optimizer's groups and state, checks them, and
packs them for whole steps; :class:`sofim_fused.backends.triton.step.PackedStep` documents it. Both fill the columns
that are described here, which the kernels read.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sofim_fused import blockwise, checks
from sofim_fused.backends import addresses
from sofim_fused.checks import RESTS

W, G, M, LOST, SCALES, STEP, NUMEL, ROW_SIZE, ORDINAL, KIND, GROUP, FIRST = range(12)
COLUMNS = 12
"""Columns of ``rows``, int64 ``[n, COLUMNS]``: one row per tensor.

``W``, ``G``, ``M``, ``LOST``, ``SCALES``, ``STEP``: addresses. The first four point to the same number of elements in
the same memory order, without gaps. ``LOST`` is 0 where no lost bits are kept. ``SCALES`` points to the scales of an m
in 8 bits (:mod:`sofim_fused.blockwise`), without gaps, and is 0 for others. All five are 0 for an empty tensor.
``STEP`` points to the step count, an int64. ``NUMEL``: the number of elements; a complex element counts as two real
ones. ``ROW_SIZE``: of an m in 8 bits, the elements of a row, else 0; ``NUMEL`` then counts each row's last block as a
whole one.
``ORDINAL``: the tensor's place among all parameters of the optimizer. ``KIND``: see :data:`UNALIGNED`. ``GROUP``: the
row of ``hyper``.
``FIRST``: the tensor's first tile; it has ``max(1, ceil(numel / tile))`` tiles."""

LR, MOMENTUM, RHO, WEIGHT_DECAY, L2, SIGN, DECAY_M, DECAY_G, DECAY_W = range(9)
HYPERS = 9
"""Columns of ``hyper``, float64 ``[groups, HYPERS]``: one row per parameter group.

``WEIGHT_DECAY`` is decoupled weight decay, ``L2`` the other kind; one of the two is 0. ``SIGN`` is -1 with
``maximize``, else 1. The moment is ``m' = DECAY_M·m + DECAY_G·g + DECAY_W·w``."""

ROW_VAR, COL_VAR, WHOLE, BY_ELEMENT, COUNT, COLUMNS_OF_ROW, INNER = range(7)
"""Columns of ``means``, int64 ``[n, 7]``, of steps with a diagonal that adapts: running means of g².

``ROW_VAR``, ``COL_VAR``, ``WHOLE``: addresses of ``row_var``, ``col_var`` and ``variance``, or 0; ``col_var`` is in the
order in which memory has a row's columns. ``BY_ELEMENT``: 1 if each element has its own variance, in the order of w.
``COUNT`` rows of ``COLUMNS_OF_ROW`` elements; one row without ``row_var``. ``INNER``: how many elements with the same
index of dimension 0 follow each other in memory."""

TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
WIDE, ROUNDS, KEEPS, UNALIGNED, ELEMENT, MASTER, CODES, RAGGED = (1 << bit for bit in range(2, 10))
KIND_BITS = 16  # in which kernels are told a kind
"""A tensor's kind, which says how it is stored: the dtype of w (:data:`TYPES`, two bits; complex numbers are stored as
real ones), and one bit each for: a float32 gradient of a 16-bit w; a bfloat16 moment; lost bits are kept; some
address among those of w, g, m, lost bits and the variances of elements is not a multiple of 16; each element has a
variance; the lost bits are more bits of float32 weights (:mod:`sofim_fused.backends.master_bits`), which are int16
together with the bit for lost bits, without it int8; the moment is in 8 bits; in 8 bits, and rows are no multiples of
a block. ``UNALIGNED`` then also says that they are no multiples of 16 elements."""

POINTERS, VALUES, LAYOUT = 1, 2, 4
EVERYTHING = POINTERS | VALUES | LAYOUT
"""What ``PackedStep.gather`` returns: bits for what differs from the last time.

``POINTERS``: anything in ``rows``. ``VALUES``: anything in ``hyper``, bit for bit. ``LAYOUT``: a column of ``rows``
that holds no address, the number of groups, the device, ``numerator``, ``fisher``, ``skip_nonfinite``, ``l2``,
``decoupled``, or whether there is a ``max_grad_norm``."""


class Copy(NamedTuple):
    """A tensor that a pass writes, and the copy that it writes instead."""

    original: Tensor
    copy: Tensor
    moment: bool


@dataclass(eq=False)
class PackedTensors:
    """The packed tensors of a step; keeps them alive.

    Attributes:
        rows: int64 ``[n, COLUMNS]``, on the CPU.
        kinds: the distinct kinds, sorted.
        tiles: the number of tiles of all tensors.
        copies: the copies that replace tensors which are not laid out like their moment.
        params, grads, exp_avgs, lost_bits, steps: the tensors; ``lost_bits`` only those that exist, and ``exp_avgs``
            with the scales of those in 8 bits.
    """

    rows: Tensor
    kinds: list[int]
    tiles: int
    copies: list[Copy]
    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    exp_avgs: Sequence[Tensor]
    lost_bits: Sequence[Tensor]
    steps: Sequence[Tensor]

    def finish(self, weights: bool, moments: bool, steps: bool) -> None:
        """Write copies back, and raise the version counters of what was written, so that autograd notices.

        Args:
            weights: parameters and their lost bits were written.
            moments: moments were written.
            steps: step counts were written.
        """
        for original, copy, moment in self.copies:
            if moments if moment else weights:
                original.detach().copy_(copy)
        written: list[Tensor] = []
        if weights:
            written += [*self.params, *self.lost_bits]
        if moments:
            written += self.exp_avgs
        if steps:
            written += self.steps
        torch.autograd.graph.increment_version(written)


def lay_out(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    lost_bits: Sequence[Tensor | None],
    steps: Sequence[Tensor],
    ordinals: Sequence[int],
    tile: int,
    scales: Sequence[Tensor | None] | None = None,
) -> PackedTensors:
    """Pack tensors of one device that were checked before; see :class:`sofim_fused.backends.StepTensors`.

    Args:
        params: w.
        grads: g.
        exp_avgs: m.
        lost_bits: the bits that w lost, ``None`` where none are kept.
        steps: step counts.
        ordinals: places among all parameters of the optimizer.
        tile: elements per tile.
        scales: those of moments in 8 bits, ``None`` for others; as a whole ``None``: there are none.

    Returns:
        Rows whose ``GROUP`` is the index of the tensor.
    """
    copies: list[Copy] = []
    kept: list[Tensor] = []
    rows: list[list[int]] = []
    tiles = 0
    scales = [None] * len(params) if scales is None else scales
    for i, (w, g, m, lost, its_scales) in enumerate(zip(params, grads, exp_avgs, lost_bits, scales, strict=True)):
        placed = _placed(w, g, m, lost, copies, kept)
        numel, row_size, at_scales = w.numel(), 0, 0
        kind = _kind(w, g, m, lost, placed)
        if its_scales is not None:
            if not its_scales.is_contiguous():
                copies.append(Copy(its_scales, its_scales.contiguous(), True))
                at_scales = addresses.address(copies[-1].copy)
            else:
                at_scales = addresses.address(its_scales)
            row_size = max(1, numel // max(1, len(w)))
            numel = -(-row_size // blockwise.BLOCK) * blockwise.BLOCK * len(w) if numel else 0
            kind |= CODES | (RAGGED if row_size % blockwise.BLOCK else 0) | (UNALIGNED if row_size & 15 else 0)
        rows.append([*placed, at_scales, addresses.address(steps[i]), numel, row_size, ordinals[i], kind, i, tiles])
        tiles += max(1, -(-numel // tile))
    flat = array("q", chain.from_iterable(rows))
    # torch.tensor would take several times as long; torch.frombuffer refuses an empty buffer.
    packed = torch.frombuffer(flat, dtype=torch.int64) if rows else torch.empty(0, dtype=torch.int64, device="cpu")
    present = [lost for lost in lost_bits if lost is not None]
    moments = [*exp_avgs, *(its_scales for its_scales in scales if its_scales is not None)]
    kinds = sorted({row[KIND] for row in rows})
    packed = packed.view(len(rows), COLUMNS)
    return PackedTensors(packed, kinds, tiles, copies, params, [*grads, *kept], moments, present, steps)


def readable(value: Any) -> bool:
    """Whether a kernel can use a value: ``None``, a number, or a tensor with one real number in memory."""
    if value is None or isinstance(value, (float, int)):
        return not isinstance(value, bool)
    return isinstance(value, Tensor) and _is_number(value) and _has_address(value)


def _is_number(x: Tensor) -> bool:
    return addresses.plain(x) and x.numel() == 1 and not x.is_complex() and x.dtype != torch.bool


def _has_address(x: Tensor) -> bool:
    """Whether a tensor is strided, has memory, and is on a device where its pointer is the address of its elements."""
    placed = x.layout == torch.strided and x.device.type not in addresses.WITHOUT_ADDRESSES and torch._C._has_storage(x)
    return placed and x.untyped_storage().data_ptr() != 0


def _kind(w: Tensor, g: Tensor, m: Tensor, lost: Tensor | None, addresses: tuple[int, int, int, int]) -> int:
    kind = TYPES[w.dtype]
    kind |= WIDE if w.dtype in checks.NARROW_DTYPES and g.dtype == torch.float32 else 0
    kind |= ROUNDS if m.dtype == torch.bfloat16 else 0
    if lost is not None:
        kind |= {RESTS[32]: KEEPS | MASTER, RESTS[24]: MASTER}.get(lost.dtype, KEEPS)
    at_w, at_g, at_m, at_lost = addresses
    return kind | (UNALIGNED if (at_w | at_g | at_m | at_lost) & 15 else 0)


def _placed(
    w: Tensor, g: Tensor, m: Tensor, lost: Tensor | None, copies: list[Copy], kept: list[Tensor]
) -> tuple[int, int, int, int]:
    """Addresses of one tensor's w, g, m and lost bits in the same memory order: that of m, or of its copy.

    Copies that are needed are added to ``copies`` if the pass writes them, and to ``kept`` if it only reads them.
    """
    address = addresses.address
    codes = m.dtype == blockwise.DTYPE
    if m.is_contiguous():
        flat = w.is_contiguous() and g.is_contiguous() and (lost is None or lost.is_contiguous())
    else:
        flat = not codes and dense(m) and all(in_order(x, m.stride()) for x in (w, g, lost) if x is not None)
    if flat and not (w.is_neg() or g.is_neg() or m.is_neg()):
        return address(w), address(g), address(m), 0 if lost is None else address(lost)
    order = order_of(m)

    def copy_of(x: Tensor) -> Tensor:
        return torch.empty_strided(x.shape, order, dtype=x.dtype, device=x.device).copy_(x.detach())

    def ready(x: Tensor) -> bool:
        return in_order(x, order) and not x.is_neg() and dense(x)

    def written(x: Tensor, moment: bool) -> int:
        if ready(x):
            return address(x)
        copies.append(Copy(x, copy_of(x), moment))
        return address(copies[-1].copy)

    at_w, at_m = written(w, False), written(m, True)
    at_lost = 0 if lost is None else written(lost, False)
    if ready(g):
        return at_w, address(g), at_m, at_lost
    kept.append(copy_of(g))
    return at_w, address(kept[-1]), at_m, at_lost


def order_of(m: Tensor) -> Sequence[int]:
    """The strides that tensors have whose moment is ``m``, or their copies. Blocks of codes need contiguous ones."""
    return m.stride() if dense(m) and m.dtype != blockwise.DTYPE else contiguous(m.shape)


def in_order(x: Tensor, strides: Sequence[int]) -> bool:
    """Whether a tensor has these strides; dimensions of size 1 are ignored."""
    return all(size < 2 or a == b for size, a, b in zip(x.shape, x.stride(), strides, strict=True))


def dense(x: Tensor) -> bool:
    """Whether elements fill a contiguous range of memory, in any order of dimensions."""
    if x.is_contiguous():
        return True
    reach = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1):
        if stride != reach:
            return False
        reach *= size
    return True


def contiguous(shape: Sequence[int]) -> list[int]:
    """The strides of a contiguous tensor."""
    strides: list[int] = []
    reach = 1
    for size in reversed(shape):
        strides.insert(0, reach)
        reach *= max(size, 1)
    return strides
