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
    NativeStep,
    Settings,
    StepTensors,
    Sums,
    fisher_blocks,
)
from sofim_fused.backends.reference import TorchAdaptivePasses
from sofim_fused.backends.solve import TorchSolve, on_device_of

NAMESPACE = "sofim_fused"


class OperatorPasses(TorchSolve, TorchAdaptivePasses):
    """See :class:`sofim_fused.backends.interface.Passes`.

    Args:
        name: the backend's.
        new_step: makes a function that takes whole steps.
        namespace: that of the operators.
        emulated: it exists only for tests.
        new_in_backward: makes an object that takes steps in parts.
        device: the kind of device for which the operators are registered.
    """

    def __init__(
        self,
        name: str,
        new_step: Callable[[], NativeStep],
        namespace: str = NAMESPACE,
        emulated: bool = False,
        new_in_backward: Callable[[], NativeInBackward | None] = lambda: None,
        device: str = "CPU",
    ) -> None:
        self.name = name
        self.emulated = emulated
        self._new_step = new_step
        self._new_in_backward = new_in_backward
        self._namespace = namespace
        # Without these two operators, the algebra runs in pure PyTorch.
        self._solves = all(
            torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{operator}", device)
            for operator in ("fold", "solve")
        )

    @property
    def _ops(self) -> Any:
        return getattr(torch.ops, self._namespace)

    def accumulate(self, tensors: StepTensors, decay: Decay, gradient_step: GradientStep | None = None) -> Sums:
        counts = (tensors.steps, tensors.ordinals)
        if gradient_step is None:
            sums = self._ops.accumulate(tensors.params, tensors.grads, tensors.exp_avgs, *counts, *decay)
        else:
            sums = self._ops.accumulate_step(
                tensors.params, tensors.grads, tensors.exp_avgs, _kahans(tensors), *counts, *decay, *gradient_step
            )
        return Sums(*sums.unbind())

    def apply(self, tensors: StepTensors, coefficients: Coefficients) -> None:
        self._ops.apply(
            tensors.params,
            tensors.grads,
            tensors.exp_avgs,
            _kahans(tensors),
            coefficients.moment,
            coefficients.weight,
            coefficients.gradient,
        )

    def dots(self, tensors: StepTensors, decay: Decay) -> Sums:
        sums = self._ops.dots(tensors.params, tensors.grads, tensors.exp_avgs, decay.weight is not None)
        if decay.weight is not None:
            return Sums(*sums.unbind())
        mm, mg, gg = sums.unbind()
        return Sums(mm=mm, mg=mg, gg=gg)

    def commit(self, tensors: StepTensors, decay: Decay, coefficients: Coefficients) -> None:
        self._ops.commit(
            tensors.params,
            tensors.grads,
            tensors.exp_avgs,
            _kahans(tensors),
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
        if guard is None:
            guard_fields: tuple[Any, ...] = (False, None, None, None, False)
        else:
            assert square is not None
            scale, found = (None if x is None else on_device_of(square, x) for x in (guard.grad_scale, guard.found_inf))
            guard_fields = (True, guard.max_norm, scale, found, guard.skip_nonfinite)
        coefficients, seen = self._ops.solve(blocks, square, list(steps), *_fields(settings), *guard_fields)
        update = settings.coefficients(coefficients)
        if guard is None:
            return update, None, None
        norm, gain, skipped = seen.unbind()
        skip = skipped != 0 if guard.may_skip else None
        return update._replace(gain=gain if guard.has_gain else None, skip=skip), norm, skip

    def native_step(self) -> NativeStep:
        return self._new_step()

    def native_in_backward(self) -> NativeInBackward | None:
        return self._new_in_backward()


def _fields(settings: Settings) -> tuple[Tensor, list[int], int, int]:
    """The settings that the operators take, in their order."""
    return settings.hyper, settings.sizes, settings.fisher, settings.numerator


def _kahans(tensors: StepTensors) -> list[Tensor]:
    none = torch.empty(0, device=tensors.device)  # an operator's list may contain only tensors
    return [none if kahan is None else kahan for kahan in tensors.kahans]


@cache
def register_fakes(namespace: str) -> None:
    """Register fake implementations, once: for tracing, the shapes of what the operators return."""

    def sums(params: Sequence[Tensor], rows: int) -> Tensor:
        return torch.empty(rows, len(params), dtype=torch.float64, device=params[0].device if params else "cpu")

    @torch.library.register_fake(f"{namespace}::accumulate")
    def _(params, grads, exp_avgs, steps, ordinals, moment, gradient, weight, cross):  # type: ignore[no-untyped-def]
        return sums(params, 1 + cross + (cross and weight is not None))

    @torch.library.register_fake(f"{namespace}::accumulate_step")
    def _(  # type: ignore[no-untyped-def]
        params, grads, exp_avgs, kahans, steps, ordinals, moment, gradient, weight, cross, step_weight, step_gradient
    ):
        return sums(params, 1 + cross + (cross and weight is not None))

    @torch.library.register_fake(f"{namespace}::apply")
    def _(params, grads, exp_avgs, kahans, moment, weight, gradient):  # type: ignore[no-untyped-def]
        return None

    @torch.library.register_fake(f"{namespace}::dots")
    def _(params, grads, exp_avgs, weights):  # type: ignore[no-untyped-def]
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
