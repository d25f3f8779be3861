"""Which passes a step runs, in which order, and what passes between them.

A share is one device's share of a step. Lanes meet only in a few sums per Fisher block; nothing waits for a device,
except where the shares of a step lie on devices of different kinds and the sums have to travel through the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sofim_fused.backends import Coefficients, Decay, Passes, StepTensors, Sums, sum_dtype
from sofim_fused.distributed import RankSums
from sofim_fused.step.solve import Group, Solver, advance, clip_factor


@dataclass(eq=False)
class DeviceShare:
    """The tensors of one device, the backend that sweeps over them, and their scalars.

    Where parameters are spread over ranks there is one share, and ``rank_sums`` adds up they are.
    """

    tensors: StepTensors
    passes: Passes
    solver: Solver
    rank_sums: RankSums | None = None


class Guard(NamedTuple):
    """What the guarded step saw: the gradients' global norm and whether the step was skipped (``None``: not asked)."""

    norm: Tensor
    skip: Tensor | None


def plain(shares: Sequence[DeviceShare], groups: Sequence[Group]) -> None:
    """``accumulate``, then ``apply``: 24 bytes per float32 parameter (gradient form 28; L2 decay 4 more)."""
    decays = [share.solver.refresh(groups) for share in shares]  # all of them before anything is written
    sums = [_swept(share, share.passes.accumulate, decay) for share, decay in zip(shares, decays, strict=True)]
    _apply(shares, sums, gradients_consumed=False)


def after_backward(shares: Sequence[DeviceShare], groups: Sequence[Group], sums: Sequence[Sums]) -> None:
    """``apply`` alone, 12 bytes per float32 parameter, from the sums that ``accumulate`` left during the backward pass.

    In the gradient form w has taken the gradient's part of the step there already; gradients are not looked at.
    """
    for share in shares:
        share.solver.refresh(groups)
    _apply(shares, sums, gradients_consumed=True)


def _apply(shares: Sequence[DeviceShare], sums: Sequence[Sums], *, gradients_consumed: bool) -> None:
    corrections, rows = [], []
    for share, theirs in zip(shares, sums, strict=True):
        corrections.append(share.solver.correction(share.tensors.steps))
        rows.append(share.solver.plain_rows(theirs, corrections[-1]))
    blocks, _, _ = _totals(shares, rows)
    for share, correction, total in zip(shares, corrections, blocks, strict=True):
        if not len(share.tensors):
            continue
        update = share.solver.coefficients(total, correction)
        if gradients_consumed and update.gradient is not None:
            update = Coefficients(moment=update.moment)
        share.passes.apply(share.tensors, update)
        advance(share.tensors.steps, None)


def guarded(
    shares: Sequence[DeviceShare],
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
    decays = [share.solver.refresh(groups) for share in shares]
    corrections, rows, squares = [], [], []
    for share, decay in zip(shares, decays, strict=True):
        sums = _swept(share, share.passes.dots, decay)
        assert sums.gg is not None
        squares.append(sums.gg)
        corrections.append(share.solver.correction(share.tensors.steps))
        rows.append(share.solver.guarded_rows(sums, corrections[-1]))
    found = None if found_inf is None else _number(found_inf, squares[0]) != 0
    blocks, square, found = _totals(shares, rows, squares, found)
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
    for share, decay, correction, total in zip(shares, decays, corrections, blocks, strict=True):
        if not len(share.tensors):
            continue
        device = share.tensors.device
        here = gain.to(device)
        coefficients = share.solver.coefficients(share.solver.at_gain(total, here), correction)._replace(
            gain=None if max_grad_norm is None and grad_scale is None else here,
            skip=None if skip is None else skip.to(device),
        )
        advance(share.tensors.steps, coefficients.skip)
        share.passes.commit(share.tensors, decay, coefficients)
    return Guard(norm, skip)


def _number(value: Tensor | float, like: Tensor) -> Tensor:
    """A number, or a tensor of one, as a 0-dimensional tensor of ``like``'s dtype where that lies."""
    if not isinstance(value, Tensor):
        return like.new_full((), value)
    # A copy to the CPU that is not waited for would be read before it is there.
    return value.detach().reshape(()).to(like.device, like.dtype, non_blocking=like.device.type != "cpu")


def _swept(share: DeviceShare, sweep: Callable[[StepTensors, Decay], Sums], decay: Decay) -> Sums:
    """A first pass; a rank that holds nothing of a model has nothing to sweep over, and takes part in totals."""
    return sweep(share.tensors, decay) if len(share.tensors) else no_sums(share.tensors.device)


def no_sums(device: torch.device) -> Sums:
    """Of no tensors."""
    none = torch.zeros(0, dtype=sum_dtype(device), device=device)
    return Sums(*[none] * len(Sums._fields))


def _totals(
    shares: Sequence[DeviceShare],
    rows: Sequence[Tensor],
    squares: Sequence[Tensor] | None = None,
    found: Tensor | None = None,
) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    """Over shares and ranks: rows as totals per Fisher block, ``squares`` as one total, and whether any rank ``found``.

    Args:
        shares: of the step.
        rows: per share, ``[k, n]``.
        squares: per share, ``[n]``.
        found: 0-dimensional, bool.

    Returns:
        Per share ``[k, blocks]``; then 0-dimensional tensors, or ``None`` in their place.
    """
    if shares[0].rank_sums is not None:
        own = None if squares is None else squares[0]
        blocks, square, found = _over_ranks(shares[0], shares[0].rank_sums, rows[0], own, found)
        return [blocks], square, found
    blocks_here = [share.solver.fold(theirs) for share, theirs in zip(shares, rows, strict=True)]
    square = None if squares is None else _total([theirs.sum() for theirs in squares])
    return _across(shares, blocks_here), square, found


def _over_ranks(
    share: DeviceShare, rank_sums: RankSums, rows: Tensor, squares: Tensor | None, found: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    present = tuple(share.tensors.ordinals)
    parts = share.solver.fold(rank_sums.by_class(rows, present))
    places = rank_sums.places(present) if share.solver.fisher == "parameter" else None
    if places is not None:  # other ranks may have gradients of others
        parts = parts.new_zeros(*parts.shape[:-1], rank_sums.count).index_copy_(-1, places, parts)
    whole = parts.new_zeros(len(parts), 0 if squares is None else 2)
    if squares is not None:
        whole[:, :1] = rank_sums.by_class(squares[None], present).sum(-1)
    if found is not None:
        whole[:, 1] = found
    total, extra = rank_sums.total(parts.flatten(1), whole, share.solver.fisher)
    total = total.view(parts.shape[1:])
    if places is not None:
        total = total.index_select(-1, places)
    return total, None if squares is None else extra[0], None if found is None else extra[1] != 0


def _across(shares: Sequence[DeviceShare], blocks: Sequence[Tensor]) -> list[Tensor]:
    """Each share's blocks with the other shares' share added, on the share's device."""
    if len(shares) == 1 or shares[0].solver.fisher == "parameter":
        return list(blocks)
    total = _total(blocks)
    return [total.to(share.tensors.device) for share in shares]


def _total(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part.to(total.device)
    return total
