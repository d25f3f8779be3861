"""Passes in C++ over all tensors at once (``csrc``), as operators over lists of tensors.

The optimizer takes whole steps in one call where it can. These operators are for steps that Python runs pass by pass:
the first step of a tensor, models on several devices, ``torch.compile``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sofim_fused.backends.interface import (
    Coefficients,
    Decay,
    GradientStep,
    GuardSettings,
    NativeInBackward,
    NativeSharded,
    NativeStep,
    ScaledSums,
    Scales,
    Settings,
    Squares,
    StepTensors,
    Sums,
    fisher_blocks,
)
from sofim_fused.backends.reference import TorchAdaptivePasses
from sofim_fused.backends.solve import TorchSolve, on_device_of
from sofim_fused.checks import RESTS

NAMESPACE = "sofim_fused"
ADAPTIVE = (
    "squares",
    "adapt",
    "accumulate_scaled",
    "apply_scaled",
    "commit_scaled",
    "fold_scaled",
    "solve_scaled",
)
"""The operators of a step with a diagonal that adapts; a device has all of them or none."""


class OperatorPasses(TorchSolve, TorchAdaptivePasses):
    """See :class:`sofim_fused.backends.interface.Passes`.

    Args:
        name: the backend's.
        new_step: makes a function that takes whole steps.
        namespace: that of the operators.
        emulated: it exists only for tests.
        new_in_backward: makes an object that takes steps in parts.
        new_sharded: makes an object that takes steps of which other ranks hold a part.
        device: the kind of device for which the operators are registered.
        any_order: sweeps with an adaptive diagonal take moments in any order of memory; others copy some of them.
        blockwise: it takes moments in 8 bits.
        blockwise_variance: it takes second moments in 8 bits.
    """

    def __init__(
        self,
        name: str,
        new_step: Callable[[], NativeStep],
        namespace: str = NAMESPACE,
        emulated: bool = False,
        new_in_backward: Callable[[], NativeInBackward | None] = lambda: None,
        new_sharded: Callable[[], NativeSharded | None] = lambda: None,
        device: str = "CPU",
        any_order: bool = False,
        blockwise: bool = False,
        blockwise_variance: bool = False,
    ) -> None:
        self.name = name
        self.emulated = emulated
        self.blockwise = blockwise
        self.blockwise_variance = blockwise_variance
        self._new_step = new_step
        self._new_in_backward = new_in_backward
        self._new_sharded = new_sharded
        self._namespace = namespace
        self._any_order = any_order
        # Without these operators, the algebra, or a step with a diagonal that adapts, runs in pure PyTorch.
        self._solves, self._adapts = (
            all(torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{each}", device) for each in operators)
            for operators in (("fold", "solve"), ADAPTIVE)
        )

    @property
    def _ops(self) -> Any:
        return getattr(torch.ops, self._namespace)

    def accumulate(self, tensors: StepTensors, decay: Decay, gradient_step: GradientStep | None = None) -> Sums:
        kept, counts = (_scales(tensors), _lost_bits(tensors)), (tensors.steps, tensors.ordinals)
        if gradient_step is None:
            sums = self._ops.accumulate(tensors.params, tensors.grads, tensors.exp_avgs, *kept, *counts, *decay)
        else:
            sums = self._ops.accumulate_step(
                tensors.params, tensors.grads, tensors.exp_avgs, *kept, *counts, *decay, *gradient_step
            )
        return Sums(*sums.unbind())

    def apply(self, tensors: StepTensors, coefficients: Coefficients) -> None:
        self._ops.apply(
            tensors.params,
            tensors.grads,
            tensors.exp_avgs,
            _scales(tensors),
            _lost_bits(tensors),
            tensors.steps,
            tensors.ordinals,
            coefficients.moment,
            coefficients.weight,
            coefficients.gradient,
        )

    def dots(self, tensors: StepTensors, decay: Decay) -> Sums:
        sums = self._ops.dots(
            tensors.params,
            tensors.grads,
            tensors.exp_avgs,
            _scales(tensors),
            _lost_bits(tensors),
            decay.weight is not None,
        )
        if decay.weight is not None:
            return Sums(*sums.unbind())
        mm, mg, gg = sums.unbind()
        return Sums(mm=mm, mg=mg, gg=gg)

    def commit(self, tensors: StepTensors, decay: Decay, coefficients: Coefficients) -> None:
        self._ops.commit(
            tensors.params,
            tensors.grads,
            tensors.exp_avgs,
            _scales(tensors),
            _lost_bits(tensors),
            tensors.steps,
            tensors.ordinals,
            decay.moment,
            decay.gradient,
            decay.weight,
            *coefficients,
        )

    def fold(
        self,
        steps: Sequence[Tensor],
        settings: Settings,
        sums: Sums,
        guarded: bool,
        class_of: Tensor | None = None,
        classes: int = 1,
    ) -> tuple[Tensor, Tensor]:
        if not (self._solves and steps):
            return super().fold(steps, settings, sums, guarded, class_of, classes)
        blocks, squares = self._ops.fold(*sums, list(steps), *_fields(settings), guarded, class_of, classes)
        return blocks, squares

    def solve(
        self,
        steps: Sequence[Tensor],
        settings: Settings,
        blocks: Tensor,
        guard: GuardSettings | None,
        square: Tensor | None,
    ) -> tuple[Coefficients, Tensor | None, Tensor | None]:
        if not (self._solves and steps):
            return super().solve(steps, settings, blocks, guard, square)
        guarded, _, *guard_fields = _guard_fields(guard, square)
        coefficients, seen = self._ops.solve(blocks, square, list(steps), *_fields(settings), guarded, *guard_fields)
        update = settings.coefficients(coefficients)
        if guard is None:
            return update, None, None
        norm, gain, skipped = seen.unbind()
        skip = skipped != 0 if guard.may_skip else None
        return update._replace(gain=gain if guard.has_gain else None, skip=skip), norm, skip

    def squares(self, tensors: StepTensors) -> Squares:
        if not self._adapts:
            return super().squares(tensors)
        grads = _in_order_of_moments(tensors) if self._any_order else tensors.grads
        return Squares(*self._ops.squares(grads, _kinds(tensors)))

    def adapt(
        self,
        tensors: StepTensors,
        settings: Settings,
        squares: Squares,
        guard: GuardSettings | None,
        square: Tensor | None,
    ) -> tuple[Scales, Tensor | None]:
        if not (self._adapts and len(tensors)):
            return super().adapt(tensors, settings, squares, guard, square)
        none = torch.empty(0, device=tensors.device)
        row_vars, col_vars, variances = (
            [none if variance is None else variance for variance in each]
            for each in zip(*(variance[:3] for variance in tensors.variances), strict=True)
        )
        heights, widths = zip(*(variance.shape for variance in tensors.variances), strict=True)
        rows, cols, numbers, seen = self._ops.adapt(
            tensors.steps,
            settings.hyper,
            settings.sizes,
            _kinds(tensors),
            heights,
            widths,
            row_vars,
            col_vars,
            variances,
            *squares[:3],
            *_guard_fields(guard, square),
        )
        trace, beta2, eps, root = numbers.unbind()
        scales = Scales(rows, cols, trace, beta2, eps, root)
        if guard is None:
            return scales, None
        norm, gain, skipped = seen.unbind()
        gain, skip = gain if guard.has_gain else None, skipped != 0 if guard.may_skip else None
        return scales._replace(gain=gain, skip=skip), norm

    def accumulate_scaled(self, tensors: StepTensors, decay: Decay, scales: Scales) -> ScaledSums:
        if not self._adapts or (not self._any_order and _rounds_copies(tensors)):
            return super().accumulate_scaled(tensors, decay, scales)
        sums = self._ops.accumulate_scaled(
            tensors.params,
            tensors.grads,
            tensors.exp_avgs,
            _scales(tensors),
            _by_element(tensors),
            _kinds(tensors),
            tensors.steps,
            tensors.ordinals,
            decay.moment,
            decay.gradient,
            *scales,
            _variance_scales(tensors),
        )
        return ScaledSums(*sums.unbind())

    def apply_scaled(self, tensors: StepTensors, coefficients: Coefficients, scales: Scales) -> None:
        if not self._adapts or (not self._any_order and _rounds_copies(tensors)):
            return super().apply_scaled(tensors, coefficients, scales)
        self._ops.apply_scaled(
            tensors.params,
            tensors.grads,
            tensors.exp_avgs,
            _scales(tensors),
            _lost_bits(tensors),
            _by_element(tensors),
            _kinds(tensors),
            tensors.steps,
            tensors.ordinals,
            *coefficients[:3],
            *scales,
            _variance_scales(tensors),
        )
        return None

    def commit_scaled(self, tensors: StepTensors, decay: Decay, coefficients: Coefficients, scales: Scales) -> None:
        if not self._adapts or (not self._any_order and _rounds_copies(tensors)):
            return super().commit_scaled(tensors, decay, coefficients, scales)
        self._ops.commit_scaled(
            tensors.params,
            tensors.grads,
            tensors.exp_avgs,
            _scales(tensors),
            _lost_bits(tensors),
            _by_element(tensors),
            _kinds(tensors),
            tensors.steps,
            tensors.ordinals,
            decay.moment,
            decay.gradient,
            *coefficients[:3],
            *scales,
            _variance_scales(tensors),
        )
        return None

    def fold_scaled(
        self,
        steps: Sequence[Tensor],
        settings: Settings,
        sums: ScaledSums,
        class_of: Tensor | None = None,
        classes: int = 1,
    ) -> Tensor:
        if not (self._adapts and steps):
            return super().fold_scaled(steps, settings, sums, class_of, classes)
        blocks: Tensor = self._ops.fold_scaled(*sums, list(steps), *_fields(settings), class_of, classes)
        return blocks

    def solve_scaled(
        self, steps: Sequence[Tensor], settings: Settings, blocks: Tensor | None, skip: Tensor | None
    ) -> tuple[Coefficients, Tensor | None]:
        if not (self._adapts and steps):
            return super().solve_scaled(steps, settings, blocks, skip)
        coefficients, signal = self._ops.solve_scaled(blocks, skip, list(steps), *_fields(settings))
        return settings.coefficients(coefficients), None if blocks is None else signal

    def native_step(self) -> NativeStep:
        return self._new_step()

    def native_sharded(self) -> NativeSharded | None:
        return self._new_sharded()

    def native_in_backward(self) -> NativeInBackward | None:
        return self._new_in_backward()


def _fields(settings: Settings) -> tuple[Tensor, list[int], int, int]:
    """The settings that the operators take, in their order."""
    return settings.hyper, settings.sizes, settings.fisher, settings.numerator


def _guard_fields(guard: GuardSettings | None, square: Tensor | None) -> tuple[Any, ...]:
    """What operators take about the guard: whether there is one, the sum of squares, and the settings."""
    if guard is None:
        return False, None, None, None, None, False
    assert square is not None
    scale, found = (None if x is None else on_device_of(square, x) for x in (guard.grad_scale, guard.found_inf))
    return True, square, guard.max_norm, scale, found, guard.skip_nonfinite


def _kinds(tensors: StepTensors) -> list[int]:
    """Which diagonal each tensor has: 1 to 4 for tensor, row, factored and element (``enum class Diagonal``)."""
    return [
        4 if variance.by_element else 1 if variance.row_var is None else 2 if variance.col_var is None else 3
        for variance in tensors.variances
    ]


def _rounds_copies(tensors: StepTensors) -> bool:
    """Whether operators would round something as a copy in another order: the random bits follow the order of memory.

    These are bfloat16 moments, and weights of 24 bits.
    """
    return any(
        (m.dtype == torch.bfloat16 or (lost is not None and lost.dtype == RESTS[24]))
        and variance.row_var is not None
        and not m.is_contiguous()
        for m, lost, variance in zip(tensors.exp_avgs, tensors.lost_bits, tensors.variances, strict=True)
    )


def _in_order_of_moments(tensors: StepTensors) -> list[Tensor]:
    """The gradients, or copies laid out as the sweeps take them: sums then have the bits of a step in one call."""
    return [
        g if g.stride() == m.stride() else torch.empty_like(m, dtype=g.dtype).copy_(g)
        for g, m in zip(tensors.grads, tensors.exp_avgs, strict=True)
    ]


def _by_element(tensors: StepTensors) -> list[Tensor]:
    """The variances of elements; an empty tensor where a tensor has none."""
    none = torch.empty(0, device=tensors.device)
    return [
        variance.variance if variance.by_element and variance.variance is not None else none
        for variance in tensors.variances
    ]


def _scales(tensors: StepTensors) -> list[Tensor]:
    if not tensors.has_codes:
        return []
    none = torch.empty(0, device=tensors.device)
    return [none if scale is None else scale for scale in tensors.exp_avg_scales]


def _variance_scales(tensors: StepTensors) -> list[Tensor]:
    if not tensors.has_coded_variances:
        return []
    none = torch.empty(0, device=tensors.device)
    return [none if variance.scale is None else variance.scale for variance in tensors.variances]


def _lost_bits(tensors: StepTensors) -> list[Tensor]:
    none = torch.empty(0, device=tensors.device)  # an operator's list may contain only tensors
    return [none if lost is None else lost for lost in tensors.lost_bits]


@cache
def register_fakes(namespace: str) -> None:
    """Register fake implementations, once: for tracing, the shapes of what the operators return."""

    def sums(params: Sequence[Tensor], rows: int) -> Tensor:
        return torch.empty(rows, len(params), dtype=torch.float64, device=params[0].device if params else "cpu")

    @torch.library.register_fake(f"{namespace}::accumulate")
    def _(  # type: ignore[no-untyped-def]
        params, grads, exp_avgs, exp_avg_scales, lost_bits, steps, ordinals, moment, gradient, weight, cross
    ):
        return sums(params, 1 + cross + (cross and weight is not None))

    @torch.library.register_fake(f"{namespace}::accumulate_step")
    def _(  # type: ignore[no-untyped-def]
        params,
        grads,
        exp_avgs,
        exp_avg_scales,
        lost_bits,
        steps,
        ordinals,
        moment,
        gradient,
        weight,
        cross,
        step_weight,
        step_gradient,
    ):
        return sums(params, 1 + cross + (cross and weight is not None))

    @torch.library.register_fake(f"{namespace}::apply")
    def _(params, grads, *rest):  # type: ignore[no-untyped-def]
        return None

    @torch.library.register_fake(f"{namespace}::dots")
    def _(params, grads, exp_avgs, exp_avg_scales, lost_bits, weights):  # type: ignore[no-untyped-def]
        return sums(params, 6 if weights else 3)

    @torch.library.register_fake(f"{namespace}::commit")
    def _(params, grads, *rest):  # type: ignore[no-untyped-def]
        return None

    @torch.library.register_fake(f"{namespace}::fold")
    def _(  # type: ignore[no-untyped-def]
        mm, mg, mw, gg, gw, ww, steps, hyper, sizes, fisher, numerator, guarded, class_of, classes
    ):
        blocks = fisher_blocks(fisher, len(sizes), len(steps))
        numbers = (6 if guarded else 1) + (numerator != 0) * (3 if guarded else 1)
        return mm.new_empty(classes, numbers, blocks), mm.new_empty(classes)

    @torch.library.register_fake(f"{namespace}::solve")
    def _(blocks, square, steps, *rest):  # type: ignore[no-untyped-def]
        return blocks.new_empty(3, len(steps)), blocks.new_empty(3)

    def double(like: Sequence[Tensor], *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.float64, device=like[0].device if like else "cpu")

    @torch.library.register_fake(f"{namespace}::squares")
    def _(grads, kinds):  # type: ignore[no-untyped-def]
        rows = sum(len(g) for g, kind in zip(grads, kinds, strict=True) if kind in (2, 3))
        cols = sum(g.shape[1:].numel() for g, kind in zip(grads, kinds, strict=True) if kind == 3)
        return double(grads, len(grads)), double(grads, rows), double(grads, cols)

    @torch.library.register_fake(f"{namespace}::adapt")
    def _(  # type: ignore[no-untyped-def]
        steps, hyper, sizes, kinds, heights, widths, row_vars, col_vars, variances, total, rows, cols, *guard
    ):
        count = len(steps)
        return (
            rows.new_empty(rows.numel() + kinds.count(1)),
            torch.empty_like(cols),
            total.new_empty(4, count),
            (total.new_empty(3)),
        )

    @torch.library.register_fake(f"{namespace}::accumulate_scaled")
    def _(params, *rest):  # type: ignore[no-untyped-def]
        return double(params, 3, len(params))

    @torch.library.register_fake(f"{namespace}::apply_scaled")
    def _(params, *rest):  # type: ignore[no-untyped-def]
        return None

    @torch.library.register_fake(f"{namespace}::commit_scaled")
    def _(params, *rest):  # type: ignore[no-untyped-def]
        return None

    @torch.library.register_fake(f"{namespace}::fold_scaled")
    def _(mm, mg, trace, steps, hyper, sizes, fisher, numerator, class_of, classes):  # type: ignore[no-untyped-def]
        return mm.new_empty(classes, 4, (1, len(sizes), len(steps))[fisher])

    @torch.library.register_fake(f"{namespace}::solve_scaled")
    def _(blocks, skip, steps, hyper, sizes, fisher, numerator):  # type: ignore[no-untyped-def]
        count = 0 if blocks is None else blocks.shape[1]
        return hyper.new_empty(3, len(steps)), hyper.new_empty(count)
