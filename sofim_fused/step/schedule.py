"""Which passes a step runs, in which order, and what happens between them.

A step has a share for each device. Shares exchange only a few sums per Fisher block. Nothing waits for a device, unless
the shares are on devices of different kinds, and the sums have to be copied through the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sofim_fused.backends import (
    Coefficients,
    Decay,
    GuardSettings,
    Passes,
    ScaledSums,
    Settings,
    Squares,
    StepTensors,
    Sums,
    TorchAdaptive,
    no_sums,
)
from sofim_fused.step import reduce
from sofim_fused.step.hyperparameters import Group
from sofim_fused.step.reduce import DeviceShare


class Guard(NamedTuple):
    """The results of a guarded step: the gradients' global norm and whether it was skipped (``None``: not asked)."""

    norm: Tensor
    skip: Tensor | None


def plain(shares: Sequence[DeviceShare], groups: Sequence[Group]) -> None:
    """``accumulate``, then ``apply``: 24 bytes per float32 parameter (gradients read again: 28; L2 decay 4 more)."""
    decays = [share.hyper.refresh(groups) for share in shares]  # all of them before anything is written
    sums = [_swept(share, share.passes.accumulate, decay) for share, decay in zip(shares, decays, strict=True)]
    _apply(shares, sums, gradients_consumed=False)


def after_backward(shares: Sequence[DeviceShare], groups: Sequence[Group], sums: Sequence[Sums]) -> None:
    """``apply`` alone, 12 bytes per float32 parameter, from the sums of ``accumulate`` in the backward pass.

    If the step has a term in the gradient, w was already updated by it there; gradients are not read.
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

    The norm is known before anything is written. So clipping to ``max_grad_norm``, and skipping a step in which a
    gradient has a NaN or an infinity (``skip_nonfinite``), need no further reads or writes of memory.

    ``grad_scale`` and ``found_inf`` are numbers, or tensors of one element on any device, as ``torch.amp.GradScaler``
    has them: the gradients are the true ones times the first, and if the second is not 0 the step is skipped. The sums
    are those of the gradients as they are; the norm, and the gain at which the blocks' polynomials are evaluated,
    remove the scale.
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


def adaptive(
    shares: Sequence[DeviceShare], groups: Sequence[Group], guard: GuardSettings | None
) -> tuple[Guard | None, Tensor | None]:
    """A step with a diagonal that adapts: :class:`sofim_fused.backends.AdaptivePasses` has its sweeps.

    Nothing is written before the gradients' norm is known; so a guarded step (``guard``) has no sweep of its own, but
    for tensors with a variance per element, whose gradients are read for the norm.

    Returns:
        Of a guarded step the norm, and whether it is skipped; and the signal of each Fisher block, if F has a term of
        rank one.
    """
    decays = [share.hyper.refresh(groups) for share in shares]
    squares = [_squares(share.tensors, share.passes, guard is not None) for share in shares]
    square, found = (None, None) if guard is None else reduce.square_of(shares, squares, guard.found_inf)
    if guard is not None:
        guard = guard._replace(found_inf=found)
    scales, seen = [], []
    for share, sums in zip(shares, squares, strict=True):
        mine = None if square is None else square.to(share.tensors.device)
        adapt = share.passes.adapt
        if share.square_sums is not None:
            sums, adapt = share.square_sums.total(share.tensors, sums), TorchAdaptive().adapt
        made, norm = adapt(share.tensors, share.hyper.settings, sums, guard, mine)
        scales.append(made)
        seen.append(None if norm is None else Guard(norm, made.skip))
    if not any(share.hyper.settings.rank_one for share in shares):
        for share, decay, scale in zip(shares, decays, scales, strict=True):
            update, _ = share.passes.solve_scaled(share.tensors.steps, share.hyper.settings, None, scale.skip)
            if len(share.tensors):
                share.passes.commit_scaled(share.tensors, decay, update, scale)
        return seen[0], None
    swept = [
        share.passes.accumulate_scaled(share.tensors, decay, scale)
        if len(share.tensors)
        else ScaledSums(*[scale.trace] * 3)
        for share, decay, scale in zip(shares, decays, scales, strict=True)
    ]
    signals = []
    for share, blocks, scale in zip(shares, reduce.scaled_totals(shares, swept), scales, strict=True):
        settings = share.hyper.settings
        update, signal = share.passes.solve_scaled(share.tensors.steps, settings, blocks, scale.skip)
        assert signal is not None
        signals.append(signal)
        if len(share.tensors):
            share.passes.apply_scaled(share.tensors, update, scale)
    return seen[0], _joined(shares, signals)


def _joined(shares: Sequence[DeviceShare], signals: Sequence[Tensor]) -> Tensor:
    """The signal of each Fisher block, on the first device: all shares have the same, unless blocks are parameters."""
    if len(shares) == 1 or shares[0].hyper.fisher != "parameter":
        return signals[0]
    every = torch.cat([signal.to(signals[0].device) for signal in signals]).unbind()
    ordinals = [ordinal for share in shares for ordinal in share.tensors.ordinals]
    return torch.stack([every[place] for place in sorted(range(len(ordinals)), key=ordinals.__getitem__)])


def adaptive_alone(tensors: StepTensors, passes: Passes, settings: Settings, decay: Decay) -> None:
    """The step of some tensors of one device, by which no other tensor's is affected: F has no term of rank one."""
    squares = _squares(tensors, passes, False)
    scales, _ = passes.adapt(tensors, settings, squares, None, None)
    update, _ = passes.solve_scaled(tensors.steps, settings, None, None)
    passes.commit_scaled(tensors, decay, update, scales)


def _squares(tensors: StepTensors, passes: Passes, all_of_them: bool) -> Squares:
    """The sums of g², or nothing, if each element has its own variance and they are not needed for a norm."""
    if len(tensors) and (all_of_them or not all(variance.by_element for variance in tensors.variances)):
        return passes.squares(tensors)
    sums = no_sums(tensors.device).mm
    return Squares(sums.new_zeros(len(tensors)), sums, sums)


def _swept(share: DeviceShare, sweep: Callable[[StepTensors, Decay], Sums], decay: Decay) -> Sums:
    """A first pass. A rank without any tensors runs none, but it takes part in the totals."""
    return sweep(share.tensors, decay) if len(share.tensors) else no_sums(share.tensors.device)
