"""Which passes a step runs, in which order, and what passes between them.

A lane is one device's share of a step. Lanes meet only in a few sums per Fisher block; nothing waits for a device,
except where the lanes of a step lie on devices of different kinds and the sums have to travel through the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sofim_fused.backends import Coefficients, Decay, Passes, Sums, Tiles, sum_dtype
from sofim_fused.distributed import Shards
from sofim_fused.scalars import Group, Scalars, advance, clip_factor


@dataclass(eq=False)
class Lane:
    """The tensors of one device, the backend that sweeps over them, and their scalars.

    Where parameters are spread over ranks there is one lane, and ``shards`` says how they are.
    """

    tiles: Tiles
    passes: Passes
    scalars: Scalars
    shards: Shards | None = None


class Guard(NamedTuple):
    """What the guarded step saw: the gradients' global norm and whether the step was skipped (``None``: not asked)."""

    norm: Tensor
    skip: Tensor | None


def plain(lanes: Sequence[Lane], groups: Sequence[Group]) -> None:
    """``accumulate``, then ``apply``: 24 bytes per float32 parameter (gradient form 28; L2 decay 4 more)."""
    decays = [lane.scalars.refresh(groups) for lane in lanes]  # all of them before anything is written
    sums = [_swept(lane, lane.passes.accumulate, decay) for lane, decay in zip(lanes, decays, strict=True)]
    _apply(lanes, sums, gradients_taken=False)


def after_backward(lanes: Sequence[Lane], groups: Sequence[Group], sums: Sequence[Sums]) -> None:
    """``apply`` alone, 12 bytes per float32 parameter, from the sums that ``accumulate`` left during the backward pass.

    In the gradient form w has taken the gradient's part of the step there already; gradients are not looked at.
    """
    for lane in lanes:
        lane.scalars.refresh(groups)
    _apply(lanes, sums, gradients_taken=True)


def _apply(lanes: Sequence[Lane], sums: Sequence[Sums], *, gradients_taken: bool) -> None:
    corrections, rows = [], []
    for lane, theirs in zip(lanes, sums, strict=True):
        corrections.append(lane.scalars.correction(lane.tiles.steps))
        rows.append(lane.scalars.plain_rows(theirs, corrections[-1]))
    blocks, _, _ = _totals(lanes, rows)
    for lane, correction, total in zip(lanes, corrections, blocks, strict=True):
        if not len(lane.tiles):
            continue
        update = lane.scalars.coefficients(total, correction)
        if gradients_taken and update.gradient is not None:
            update = Coefficients(moment=update.moment)
        lane.passes.apply(lane.tiles, update)
        advance(lane.tiles.steps, None)


def guarded(
    lanes: Sequence[Lane],
    groups: Sequence[Group],
    max_grad_norm: float | None,
    skip_nonfinite: bool,
    grad_scale: Tensor | float | None = None,
    found_inf: Tensor | float | None = None,
) -> Guard:
    """``dots``, then ``commit``: 28 bytes per float32 parameter (L2 decay 4 more), and all of the step or none of it.

    The norm is known before anything is written, so that clipping to ``max_grad_norm`` and, with ``skip_nonfinite``,
    leaving everything as it was when a gradient holds a NaN or an infinity cost no traffic of their own.

    ``grad_scale`` and ``found_inf`` are numbers, or tensors of one element anywhere, as ``torch.amp.GradScaler`` has
    them: the gradients are the true ones times the first, and if the second is not 0 the step is skipped. The sums
    are taken of the gradients as they are; the norm, and the gain at which the blocks' polynomials are taken, make up
    for the scale.
    """
    decays = [lane.scalars.refresh(groups) for lane in lanes]
    corrections, rows, squares = [], [], []
    for lane, decay in zip(lanes, decays, strict=True):
        sums = _swept(lane, lane.passes.dots, decay)
        assert sums.gg is not None
        squares.append(sums.gg)
        corrections.append(lane.scalars.correction(lane.tiles.steps))
        rows.append(lane.scalars.guarded_rows(sums, corrections[-1]))
    found = None if found_inf is None else _number(found_inf, squares[0]) != 0
    blocks, square, found = _totals(lanes, rows, squares, found)
    assert square is not None
    norm = square.sqrt()
    if grad_scale is None:
        gain = clip_factor(norm, max_grad_norm)
    else:
        unscale = _number(grad_scale, norm).reciprocal()
        norm = norm * unscale
        gain = clip_factor(norm, max_grad_norm) * unscale
    skip = torch.isfinite(norm).logical_not() if skip_nonfinite else None
    if found is not None:
        skip = found if skip is None else skip | found
    for lane, decay, correction, total in zip(lanes, decays, corrections, blocks, strict=True):
        if not len(lane.tiles):
            continue
        device = lane.tiles.device
        here = gain.to(device)
        coefficients = lane.scalars.coefficients(lane.scalars.at_gain(total, here), correction)._replace(
            gain=None if max_grad_norm is None and grad_scale is None else here,
            skip=None if skip is None else skip.to(device),
        )
        advance(lane.tiles.steps, coefficients.skip)
        lane.passes.commit(lane.tiles, decay, coefficients)
    return Guard(norm, skip)


def _number(value: Tensor | float, like: Tensor) -> Tensor:
    """A number, or a tensor of one, as a 0-dimensional tensor of ``like``'s dtype where that lies."""
    if not isinstance(value, Tensor):
        return like.new_full((), value)
    # A copy to the CPU that is not waited for would be read before it is there.
    return value.detach().reshape(()).to(like.device, like.dtype, non_blocking=like.device.type != "cpu")


def _swept(lane: Lane, sweep: Callable[[Tiles, Decay], Sums], decay: Decay) -> Sums:
    """A first pass; a rank that holds nothing of a model has nothing to sweep over, and takes part in totals."""
    return sweep(lane.tiles, decay) if len(lane.tiles) else no_sums(lane.tiles.device)


def no_sums(device: torch.device) -> Sums:
    """Of no tensors."""
    none = torch.zeros(0, dtype=sum_dtype(device), device=device)
    return Sums(*[none] * len(Sums._fields))


def _totals(
    lanes: Sequence[Lane],
    rows: Sequence[Tensor],
    squares: Sequence[Tensor] | None = None,
    found: Tensor | None = None,
) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    """Over lanes and ranks: rows as totals per Fisher block, ``squares`` as one total, and whether any rank ``found``.

    Args:
        lanes: of the step.
        rows: per lane, ``[k, n]``.
        squares: per lane, ``[n]``.
        found: 0-dimensional, bool.

    Returns:
        Per lane ``[k, blocks]``; then 0-dimensional tensors, or ``None`` in their place.
    """
    if lanes[0].shards is not None:
        own = None if squares is None else squares[0]
        blocks, square, found = _over_ranks(lanes[0], lanes[0].shards, rows[0], own, found)
        return [blocks], square, found
    blocks_here = [lane.scalars.fold(theirs) for lane, theirs in zip(lanes, rows, strict=True)]
    square = None if squares is None else _total([theirs.sum() for theirs in squares])
    return _across(lanes, blocks_here), square, found


def _over_ranks(
    lane: Lane, shards: Shards, rows: Tensor, squares: Tensor | None, found: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    present = tuple(lane.tiles.ordinals)
    parts = lane.scalars.fold(shards.by_class(rows, present))
    places = shards.places(present) if lane.scalars.fisher == "parameter" else None
    if places is not None:  # other ranks may have gradients of others
        parts = parts.new_zeros(*parts.shape[:-1], shards.count).index_copy_(-1, places, parts)
    whole = parts.new_zeros(len(parts), 0 if squares is None else 2)
    if squares is not None:
        whole[:, :1] = shards.by_class(squares[None], present).sum(-1)
    if found is not None:
        whole[:, 1] = found
    total, extra = shards.total(parts.flatten(1), whole, lane.scalars.fisher)
    total = total.view(parts.shape[1:])
    if places is not None:
        total = total.index_select(-1, places)
    return total, None if squares is None else extra[0], None if found is None else extra[1] != 0


def _across(lanes: Sequence[Lane], blocks: Sequence[Tensor]) -> list[Tensor]:
    """Each lane's blocks with the other lanes' share added, on the lane's device."""
    if len(lanes) == 1 or lanes[0].scalars.fisher == "parameter":
        return list(blocks)
    total = _total(blocks)
    return [total.to(lane.tiles.device) for lane in lanes]


def _total(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part.to(total.device)
    return total
