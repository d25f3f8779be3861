"""Which passes a step runs, in which order, and what passes between them.

A lane is one device's share of a step. Lanes meet only in a few sums per Fisher block; nothing waits for a device,
except where the lanes of a step lie on devices of different kinds and the sums have to travel through the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sofim_fused.backends import Coefficients, Passes, Sums, Tiles
from sofim_fused.scalars import Group, Scalars, advance, clip_factor


@dataclass(eq=False)
class Lane:
    """The tensors of one device, the backend that sweeps over them, and their scalars."""

    tiles: Tiles
    passes: Passes
    scalars: Scalars


class Guard(NamedTuple):
    """What the guarded step saw: the gradients' global norm and whether the step was skipped (``None``: not asked)."""

    norm: Tensor
    skip: Tensor | None


def plain(lanes: Sequence[Lane], groups: Sequence[Group]) -> None:
    """``accumulate``, then ``apply``: 24 bytes per float32 parameter (gradient form 28; L2 decay 4 more)."""
    decays = [lane.scalars.refresh(groups) for lane in lanes]  # all of them before anything is written
    sums = [lane.passes.accumulate(lane.tiles, decay) for lane, decay in zip(lanes, decays, strict=True)]
    _apply(lanes, sums, gradients_taken=False)


def after_backward(lanes: Sequence[Lane], groups: Sequence[Group], sums: Sequence[Sums]) -> None:
    """``apply`` alone, 12 bytes per float32 parameter, from the sums that ``accumulate`` left during the backward pass.

    In the gradient form w has taken the gradient's part of the step there already; gradients are not looked at.
    """
    for lane in lanes:
        lane.scalars.refresh(groups)
    _apply(lanes, sums, gradients_taken=True)


def _apply(lanes: Sequence[Lane], sums: Sequence[Sums], *, gradients_taken: bool) -> None:
    corrections, blocks = [], []
    for lane, theirs in zip(lanes, sums, strict=True):
        corrections.append(lane.scalars.correction(lane.tiles.steps))
        blocks.append(lane.scalars.plain_blocks(theirs, corrections[-1]))
    for lane, correction, total in zip(lanes, corrections, _across(lanes, blocks), strict=True):
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
    corrections, blocks, squares = [], [], []
    for lane, decay in zip(lanes, decays, strict=True):
        sums = lane.passes.dots(lane.tiles, decay)
        assert sums.gg is not None
        squares.append(sums.gg.sum())
        corrections.append(lane.scalars.correction(lane.tiles.steps))
        blocks.append(lane.scalars.guarded_blocks(sums, corrections[-1]))
    square = _total(squares)
    norm = square.sqrt()
    if grad_scale is None:
        gain = clip_factor(norm, max_grad_norm)
    else:
        unscale = _number(grad_scale, norm).reciprocal()
        norm = norm * unscale
        gain = clip_factor(norm, max_grad_norm) * unscale
    skip = torch.isfinite(norm).logical_not() if skip_nonfinite else None
    if found_inf is not None:
        found = _number(found_inf, norm) != 0
        skip = found if skip is None else skip | found
    for lane, decay, correction, total in zip(lanes, decays, corrections, _across(lanes, blocks), strict=True):
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
        return torch.full_like(like, value)
    # A copy to the CPU that is not waited for would be read before it is there.
    return value.detach().reshape(()).to(like.device, like.dtype, non_blocking=like.device.type != "cpu")


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
