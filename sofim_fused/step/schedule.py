"""Which passes a step runs, in which order, and what passes between them.

A step has a share for each device. Shares meet only in a few sums per Fisher block; nothing waits for a device, except
where the shares of a step lie on devices of different kinds and the sums have to travel through the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from sofim_fused.backends import Coefficients, Decay, GuardSettings, StepTensors, Sums, no_sums
from sofim_fused.step import reduce
from sofim_fused.step.hyperparameters import Group
from sofim_fused.step.reduce import DeviceShare


class Guard(NamedTuple):
    """What the guarded step saw: the gradients' global norm and whether the step was skipped (``None``: not asked)."""

    norm: Tensor
    skip: Tensor | None


def plain(shares: Sequence[DeviceShare], groups: Sequence[Group]) -> None:
    """``accumulate``, then ``apply``: 24 bytes per float32 parameter (gradient form 28; L2 decay 4 more)."""
    decays = [share.hyper.refresh(groups) for share in shares]  # all of them before anything is written
    sums = [_swept(share, share.passes.accumulate, decay) for share, decay in zip(shares, decays, strict=True)]
    _apply(shares, sums, gradients_consumed=False)


def after_backward(shares: Sequence[DeviceShare], groups: Sequence[Group], sums: Sequence[Sums]) -> None:
    """``apply`` alone, 12 bytes per float32 parameter, from the sums that ``accumulate`` left during the backward pass.

    In the gradient form w has taken the gradient's part of the step there already; gradients are not looked at.
    """
    for share in shares:
        share.hyper.refresh(groups)
    _apply(shares, sums, gradients_consumed=True)


def _apply(shares: Sequence[DeviceShare], sums: Sequence[Sums], *, gradients_consumed: bool) -> None:
    totals, _, _ = reduce.totals(shares, sums, guarded=False)
    for share, blocks in zip(shares, totals, strict=True):
        if not len(share.tensors):
            continue
        update, _, _ = share.passes.solve(share.tensors.steps, share.hyper.settings, blocks, None, None)
        if gradients_consumed and update.gradient is not None:
            update = Coefficients(moment=update.moment)
        share.passes.apply(share.tensors, update)


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
    decays = [share.hyper.refresh(groups) for share in shares]
    sums = [_swept(share, share.passes.dots, decay) for share, decay in zip(shares, decays, strict=True)]
    totals, squares, found = reduce.totals(shares, sums, guarded=True, found_inf=found_inf)
    guard = GuardSettings(max_grad_norm, grad_scale, found, skip_nonfinite)
    seen: list[Guard] = []
    for share, decay, blocks, square in zip(shares, decays, totals, squares, strict=True):
        update, norm, skip = share.passes.solve(share.tensors.steps, share.hyper.settings, blocks, guard, square)
        assert norm is not None
        seen.append(Guard(norm, skip))
        if len(share.tensors):
            share.passes.commit(share.tensors, decay, update)
    return seen[0]


def _swept(share: DeviceShare, sweep: Callable[[StepTensors, Decay], Sums], decay: Decay) -> Sums:
    """A first pass; a rank that holds nothing of a model has nothing to sweep over, and takes part in totals."""
    return sweep(share.tensors, decay) if len(share.tensors) else no_sums(share.tensors.device)
