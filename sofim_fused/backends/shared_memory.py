"""Finds tensors of a step that share memory, and updates them one after the other.

A pass works on all tensors at once. If two tensors share memory (weights tied through ``.data``, views of one buffer,
one moment for two parameters), two threads would write the same elements. Such a step is defined as one that handles
the tensors in order: each pass over the first of them, then over the next. :class:`InTurn` runs any backend's passes
in this way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, pairwise

import torch
from torch import Tensor

from sofim_fused import checks
from sofim_fused.backends import addresses
from sofim_fused.backends.interface import (
    Coefficients,
    Decay,
    GradientStep,
    GuardSettings,
    NativeInBackward,
    NativeSharded,
    NativeStep,
    Passes,
    Settings,
    StepTensors,
    Sums,
)
from sofim_fused.backends.reference import TorchAdaptivePasses

Pairs = Mapping[str, tuple[int, int]]


def apart(tensors: StepTensors, passes: Passes) -> tuple[StepTensors, Passes, Pairs]:
    """Prepare a step whose tensors may share memory. If none do, the arguments are returned as they are.

    Two tensors count as sharing if their address ranges overlap, even if their elements only interleave: handling them
    in turn is right in either case. Gradients may share memory with each other, and a gradient with its own parameter,
    element by element. A gradient that shares any other memory that the step writes is copied, so that the step uses
    the values it had before the step.

    Args:
        tensors: the tensors of a step. If they have no addresses, as in tracing, nothing is checked.
        passes: those of a backend.

    Returns:
        The tensors; the passes to call with them; and the first pair of tensors that share elements, as their indices,
        by kind: ``"w"`` if both are parameters, else ``"state"``.

    Raises:
        ValueError: a parameter and its own state share elements, or a step count, or a running mean of g², shares
            memory with any tensor; the message names both. Nothing was changed.
    """
    if torch.compiler.is_compiling() or not _have_addresses(tensors):
        return tensors, passes, {}
    of = _written(tensors)
    written = addresses.Written(of)
    before, pairs = _shared(written, of, tensors)
    shared = {*before, *before.values()}
    copied = {
        i: g.detach().clone()
        for i, g in enumerate(tensors.grads)
        if written.has(g) and (i in shared or not written.is_param(i, g))
    }
    if copied:
        tensors = replace(tensors, grads=[copied.get(i, g) for i, g in enumerate(tensors.grads)])
    if not before:
        return tensors, passes, {}
    bounds = [0]
    for i in range(len(tensors)):
        if before.get(i, -1) >= bounds[-1]:
            bounds.append(i)
    return tensors, InTurn(passes, [*bounds, len(tensors)]), pairs


class InTurn(TorchAdaptivePasses):
    """The passes of a backend over consecutive groups of tensors (runs), one run after the other.

    See :class:`sofim_fused.backends.interface.Passes`.

    Args:
        passes: the backend's.
        bounds: where the runs begin, and where the last one ends: indices of tensors, from 0 to their number. No two
            tensors of a run share memory.
    """

    def __init__(self, passes: Passes, bounds: Sequence[int]) -> None:
        self.name = passes.name
        self.emulated = passes.emulated
        self.blockwise = passes.blockwise
        self.blockwise_variance = passes.blockwise_variance
        self._passes = passes
        self._runs = [slice(begin, end) for begin, end in pairwise(bounds)]

    def accumulate(self, tensors: StepTensors, decay: Decay, gradient_step: GradientStep | None = None) -> Sums:
        sums = []
        for run in self._runs:
            known = gradient_step and GradientStep(_part(gradient_step.weight, run), gradient_step.gradient[run])
            sums.append(self._passes.accumulate(_tensors(tensors, run), _decay(decay, run), known))
        mm, *others = (_joined(parts) for parts in zip(*sums, strict=True))
        assert mm is not None
        return Sums(mm, *others)

    def apply(self, tensors: StepTensors, coefficients: Coefficients) -> None:
        for run in self._runs:
            self._passes.apply(_tensors(tensors, run), _coefficients(coefficients, run))

    def dots(self, tensors: StepTensors, decay: Decay) -> Sums:
        return self._passes.dots(tensors, decay)  # it writes nothing

    def commit(self, tensors: StepTensors, decay: Decay, coefficients: Coefficients) -> None:
        for run in self._runs:
            self._passes.commit(_tensors(tensors, run), _decay(decay, run), _coefficients(coefficients, run))

    def fold(
        self,
        steps: Sequence[Tensor],
        settings: Settings,
        sums: Sums,
        guarded: bool,
        class_of: Tensor | None = None,
        classes: int = 1,
    ) -> tuple[Tensor, Tensor]:
        return self._passes.fold(steps, settings, sums, guarded, class_of, classes)

    def solve(
        self,
        steps: Sequence[Tensor],
        settings: Settings,
        blocks: Tensor,
        guard: GuardSettings | None,
        square: Tensor | None,
    ) -> tuple[Coefficients, Tensor | None, Tensor | None]:
        return self._passes.solve(steps, settings, blocks, guard, square)

    def native_step(self) -> NativeStep:
        return lambda groups, state, grad_scale, found_inf, counter: None

    def native_sharded(self) -> NativeSharded | None:
        return None

    def native_in_backward(self) -> NativeInBackward | None:
        return None


def _tensors(tensors: StepTensors, run: slice) -> StepTensors:
    return StepTensors(
        tensors.device,
        tensors.params[run],
        tensors.grads[run],
        tensors.exp_avgs[run],
        tensors.lost_bits[run],
        tensors.steps[run],
        tensors.ordinals[run],
        tensors.variances[run],
        tensors.exp_avg_scales[run],
    )


def _decay(decay: Decay, run: slice) -> Decay:
    weight = None if decay.weight is None else decay.weight[run]
    return Decay(decay.moment[run], decay.gradient[run], weight, decay.cross)


def _coefficients(all_of_them: Coefficients, run: slice) -> Coefficients:
    return all_of_them._replace(
        moment=all_of_them.moment[run],
        weight=_part(all_of_them.weight, run),
        gradient=_part(all_of_them.gradient, run),
    )


def _part(vector: Tensor | None, run: slice) -> Tensor | None:
    return None if vector is None else vector[run]


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None


def _have_addresses(tensors: StepTensors) -> bool:
    some = (x for x in (*tensors.lost_bits, *tensors.exp_avg_scales) if x is not None)
    variances = (x for v in tensors.variances for x in (*v[:3], v.scale) if x is not None)
    every = chain(tensors.params, tensors.grads, tensors.exp_avgs, some, tensors.steps, variances)
    return tensors.device.type not in addresses.WITHOUT_ADDRESSES and addresses.all_plain(every)


def _written(tensors: StepTensors) -> dict[str, Sequence[Tensor | None]]:
    """The tensors that a step writes, by role."""
    variances = tensors.variances
    return {
        "w": tensors.params,
        "exp_avg": tensors.exp_avgs,
        "exp_avg_scale": tensors.exp_avg_scales,
        "lost_bits": tensors.lost_bits,
        "step": tensors.steps,
        "row_var": [variance.row_var for variance in variances],
        "col_var": [variance.col_var for variance in variances],
        "variance": [variance.variance for variance in variances],
        "variance_scale": [variance.scale for variance in variances],
    }


def _shared(
    written: addresses.Written, of: Mapping[str, Sequence[Tensor | None]], tensors: StepTensors
) -> tuple[dict[int, int], dict[str, tuple[int, int]]]:
    """For each tensor that shares memory with earlier ones, the index of the last; and pairs as from :func:`apart`.

    Raises:
        ValueError: two tensors of one parameter share elements, or a step count or a running mean of g² shares memory.
    """
    before: dict[int, int] = {}
    pairs: dict[str, tuple[int, int]] = {}
    for one, other in written.pairs():
        a, b = of[one.role][one.tensor], of[other.role][other.tensor]
        assert a is not None
        assert b is not None
        if one.tensor != other.tensor and not {"step", *checks.VARIANCES, "variance_scale"} & {one.role, other.role}:
            before[other.tensor] = max(before.get(other.tensor, -1), one.tensor)
            kind = "w" if one.role == other.role == "w" else "state"
            if kind not in pairs and not addresses.apart(a, b):
                pairs[kind] = one.tensor, other.tensor
            continue
        if not addresses.apart(a, b):
            mine, theirs = (one, other) if other.role == "w" else (other, one)
            raise checks.shared(
                tensors.params[mine.tensor],
                tensors.ordinals[mine.tensor],
                mine.role,
                tensors.ordinals[theirs.tensor],
                theirs.role,
            )
    return before, pairs
