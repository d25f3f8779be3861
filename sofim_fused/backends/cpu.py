"""The passes on the CPU: C++ over all tensors at once (``csrc``), as operators over lists of tensors.

The optimizer takes whole steps through :class:`sofim_fused._C.Step` where it can; these operators serve schedules in
Python: the first step of a tensor, models that span devices, ``torch.compile``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from sofim_fused import native
from sofim_fused.backends.protocol import Coefficients, Decay, GradientStep, NativeStep, Sums, Tiles

# The rows of the operators' sums; the last ones only where they are asked for.
ACCUMULATED = ("mm", "mg", "mw")
DOTS = ("mm", "mg", "gg", "mw", "gw", "ww")


class CpuPasses:
    """See :class:`sofim_fused.backends.protocol.Passes`."""

    name = "cpu"
    emulated = False

    def __init__(self, new_step: Callable[[], NativeStep]) -> None:
        self._new_step = new_step

    def accumulate(self, tiles: Tiles, decay: Decay, gradient_step: GradientStep | None = None) -> Sums:
        ops = torch.ops.sofim_fused
        counts = (tiles.steps, tiles.ordinals)
        if gradient_step is None:
            sums = ops.accumulate(tiles.params, tiles.grads, tiles.exp_avgs, *counts, *decay)
        else:
            sums = ops.accumulate_step(
                tiles.params, tiles.grads, tiles.exp_avgs, _kahans(tiles), *counts, *decay, *gradient_step
            )
        return Sums(**dict(zip(ACCUMULATED, sums.unbind(), strict=False)))

    def apply(self, tiles: Tiles, coefficients: Coefficients) -> None:
        torch.ops.sofim_fused.apply(
            tiles.params,
            tiles.grads,
            tiles.exp_avgs,
            _kahans(tiles),
            coefficients.moment,
            coefficients.weight,
            coefficients.gradient,
        )

    def dots(self, tiles: Tiles, decay: Decay) -> Sums:
        sums = torch.ops.sofim_fused.dots(tiles.params, tiles.grads, tiles.exp_avgs, decay.weight is not None)
        return Sums(**dict(zip(DOTS, sums.unbind(), strict=False)))

    def commit(self, tiles: Tiles, decay: Decay, coefficients: Coefficients) -> None:
        torch.ops.sofim_fused.commit(
            tiles.params,
            tiles.grads,
            tiles.exp_avgs,
            _kahans(tiles),
            tiles.steps,
            tiles.ordinals,
            decay.moment,
            decay.gradient,
            decay.weight,
            *coefficients,
        )

    def native_step(self) -> NativeStep:
        return self._new_step()


def _kahans(tiles: Tiles) -> list[Tensor]:
    none = torch.empty(0)  # an operator's list holds tensors only
    return [none if kahan is None else kahan for kahan in tiles.kahans]


def passes_for(device: torch.device) -> CpuPasses | str:
    """The native passes for ``device``, or the reason why it has none."""
    if device.type != "cpu":
        return f"it runs on the CPU, not on {device.type}"
    loaded: CpuPasses | str = torch.compiler.disable(_loaded)()  # which files are there is nothing to trace
    return loaded


@cache
def _loaded() -> CpuPasses | str:
    module = native.cpu()
    if isinstance(module, str):
        return module
    _register_fakes()
    return CpuPasses(module.Step)


def _register_fakes() -> None:
    """What the operators return, for tracing: shapes alone."""

    def sums(params: Sequence[Tensor], rows: int) -> Tensor:
        return torch.empty(rows, len(params), dtype=torch.float64, device="cpu")

    @torch.library.register_fake("sofim_fused::accumulate")
    def _(params, grads, exp_avgs, steps, ordinals, moment, gradient, weight, cross):  # type: ignore[no-untyped-def]
        return sums(params, 1 + cross + (cross and weight is not None))

    @torch.library.register_fake("sofim_fused::accumulate_step")
    def _(  # type: ignore[no-untyped-def]
        params, grads, exp_avgs, kahans, steps, ordinals, moment, gradient, weight, cross, step_weight, step_gradient
    ):
        return sums(params, 1 + cross + (cross and weight is not None))

    @torch.library.register_fake("sofim_fused::apply")
    def _(params, grads, exp_avgs, kahans, moment, weight, gradient):  # type: ignore[no-untyped-def]
        return None

    @torch.library.register_fake("sofim_fused::dots")
    def _(params, grads, exp_avgs, weights):  # type: ignore[no-untyped-def]
        return sums(params, 6 if weights else 3)

    @torch.library.register_fake("sofim_fused::commit")
    def _(params, grads, *rest):  # type: ignore[no-untyped-def]
        return None
