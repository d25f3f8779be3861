"""Triton's passes, one launch each: kernels over packed tensors, for any number of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo as untraced  # torch.compiler.disable imports the compiler: seconds

from sofim_fused import native
from sofim_fused.backends.interface import (
    Coefficients,
    Decay,
    GradientStep,
    GuardSettings,
    NativeInBackward,
    NativeSharded,
    NativeStep,
    Settings,
    StepTensors,
    Sums,
    fisher_blocks,
)
from sofim_fused.backends.triton import pack
from sofim_fused.backends.triton.adaptive import TritonAdaptive
from sofim_fused.backends.triton.launch import (
    KernelConfig,
    SolveConfig,
    capturing,
    device_scope,
    kernels_for,
    launch_first,
    launch_fold,
    launch_second,
    launch_solve,
    number,
)
from sofim_fused.backends.triton.step import TritonStep
from sofim_fused.backends.triton.workspace import Located, Workspace


class TritonPasses(TritonAdaptive):
    """See :class:`sofim_fused.backends.interface.Passes`. Each optimizer has its own instance, with a workspace.

    Args:
        kernels: :mod:`sofim_fused.backends.triton.kernels`.
        emulated: the kernels run in Triton's interpreter, on the CPU.
    """

    name = "triton"
    blockwise = True
    blockwise_variance = False

    def __init__(self, kernels: ModuleType, emulated: bool = False) -> None:
        super().__init__()
        self.emulated = emulated
        self._kernels = kernels
        self._workspace: Workspace | None = None
        self._tensors: Located | None = None

    def accumulate(self, tensors: StepTensors, decay: Decay, gradient_step: GradientStep | None = None) -> Sums:
        sums: Sums = self._sweep_first(tensors, decay, gradient_step, self._kernels.ACCUMULATE)
        return sums

    def dots(self, tensors: StepTensors, decay: Decay) -> Sums:
        sums: Sums = self._sweep_first(tensors, decay, None, self._kernels.DOTS)
        return sums

    def apply(self, tensors: StepTensors, coefficients: Coefficients) -> None:
        self._sweep_second(tensors, None, coefficients, self._kernels.APPLY)

    def commit(self, tensors: StepTensors, decay: Decay, coefficients: Coefficients) -> None:
        self._sweep_second(tensors, decay, coefficients, self._kernels.COMMIT)

    @untraced
    def fold(
        self,
        steps: Sequence[Tensor],
        settings: Settings,
        sums: Sums,
        guarded: bool,
        class_of: Tensor | None = None,
        classes: int = 1,
    ) -> tuple[Tensor, Tensor]:
        config = SolveConfig(settings.fisher, settings.numerator, guarded)
        blocks = fisher_blocks(settings.fisher, len(settings.sizes), len(steps))
        totals = settings.hyper.new_empty(classes, config.rows, blocks)
        squares = settings.hyper.new_empty(classes)
        if not steps:
            return totals.zero_(), squares.zero_()
        with device_scope(settings.hyper.device):
            located = self._located(steps, settings)
            launch_fold(self._kernels, config, located, settings.hyper, sums, class_of, totals, squares)
        return totals, squares

    @untraced
    def solve(
        self,
        steps: Sequence[Tensor],
        settings: Settings,
        blocks: Tensor,
        guard: GuardSettings | None,
        square: Tensor | None,
    ) -> tuple[Coefficients, Tensor | None, Tensor | None]:
        hyper = settings.hyper
        config = SolveConfig(settings.fisher, settings.numerator, guard is not None)
        found = hyper.new_empty(self._kernels.COEFFICIENTS, len(steps))
        asked: dict[str, Any] = {}
        with device_scope(hyper.device):
            if guard is not None:
                asked = {
                    "square": square,
                    "outcome": hyper.new_empty(2),
                    "skipped": hyper.new_empty(1, dtype=torch.int8),
                    "max_norm": guard.max_norm,
                    "grad_scale": number(guard.grad_scale, hyper),
                    "found_inf": number(guard.found_inf, hyper),
                    "skip_nonfinite": guard.skip_nonfinite,
                }
            located = self._located(steps, settings)
            launch_solve(self._kernels, config, located, hyper, blocks.contiguous(), found, **asked)
        torch.autograd.graph.increment_version(list(steps))
        update = settings.coefficients(found)
        if guard is None:
            return update, None, None
        norm, gain = asked["outcome"].unbind()
        skip = asked["skipped"].view(torch.bool)[0] if guard.may_skip else None
        return update._replace(gain=gain if guard.has_gain else None, skip=skip), norm, skip

    def _located(self, steps: Sequence[Tensor], settings: Settings) -> Located:
        asked = settings.hyper.device, steps, settings.sizes, settings.fisher == self._kernels.GROUP
        if self._tensors is None or not self._tensors.fits(*asked):
            self._tensors = Located(*asked)
        return self._tensors

    def native_step(self) -> NativeStep:
        """Whole steps, if the native part of the package can be used; otherwise all steps run pass by pass."""
        module = native.cpu()
        if isinstance(module, str):
            return lambda groups, state, grad_scale, found_inf, counter: None
        return TritonStep(self._kernels, module.PackedStep(self._kernels.TILE), self.emulated)

    def native_sharded(self) -> NativeSharded | None:
        return None

    def native_in_backward(self) -> NativeInBackward | None:
        return None

    @untraced
    def _sweep_first(self, tensors: StepTensors, decay: Decay, gradient_step: GradientStep | None, which: int) -> Sums:
        k = self._kernels
        dots, l2 = which == k.DOTS, decay.weight is not None
        with device_scope(tensors.device):
            packed, workspace = self._filled(tensors, decay)
            if gradient_step is not None:
                workspace.set_coefficients(gradient_step.weight, gradient_step.gradient)
            launch_first(
                k,
                workspace,
                KernelConfig(
                    tuple(packed.kinds),
                    first=which,
                    l2=l2,
                    numerator=k.GRADIENT if decay.cross and not dots else k.MOMENT,
                ),
                with_step=gradient_step is not None,
            )
            packed.finish(gradient_step is not None, not dots, False)
        mm, mg, mw, gg, gw, ww = workspace.sums().unbind()
        if dots:
            return Sums(mm=mm, mg=mg, mw=mw, gg=gg, gw=gw, ww=ww) if l2 else Sums(mm=mm, mg=mg, gg=gg)
        return Sums(mm=mm, mg=mg if decay.cross else None, mw=mw if decay.cross and l2 else None)

    @untraced
    def _sweep_second(self, tensors: StepTensors, decay: Decay | None, update: Coefficients, which: int) -> None:
        with device_scope(tensors.device):
            packed, workspace = self._filled(tensors, decay)
            workspace.set_coefficients(update.weight, update.gradient, update.moment, update.gain, update.skip)
            config = KernelConfig(
                tuple(packed.kinds),
                second=which,
                l2=decay is not None and decay.weight is not None,
                numerator=self._kernels.MOMENT if update.gradient is None else self._kernels.GRADIENT,
                clip=update.gain is not None,
                skip=update.skip is not None,
            )
            launch_second(self._kernels, workspace, config)
            packed.finish(True, decay is not None, False)

    def _filled(self, tensors: StepTensors, decay: Decay | None) -> tuple[pack.PackedTensors, Workspace]:
        """The packed tensors, and the workspace filled with them.

        Raises:
            RuntimeError: a CUDA graph is being captured, which cannot contain these passes.
        """
        if capturing():  # pinned memory cannot be allocated then
            missing = native.cpu()
            if isinstance(missing, str):
                raise RuntimeError(
                    "a step of the Triton backend is captured in a CUDA graph, which takes the native part of this "
                    f"package ({missing}): build it with {native.remedy()}, or do not capture"
                )
            raise RuntimeError(
                "a pass of the Triton backend is captured in a CUDA graph, which can contain whole steps only: leave "
                "out in_backward, take one eager step before, or take backend='cuda'"
            )
        packed = pack.lay_out(
            tensors.params,
            tensors.grads,
            tensors.exp_avgs,
            tensors.lost_bits,
            tensors.steps,
            tensors.ordinals,
            self._kernels.TILE,
            tensors.exp_avg_scales,
        )
        n = len(tensors)
        hyper = torch.zeros(n, pack.HYPERS, dtype=torch.float64, device="cpu")
        if decay is not None:
            factors = [decay.moment, decay.gradient, decay.weight or [0.0] * n]
            hyper[:, pack.DECAY_M :] = torch.tensor(factors, dtype=torch.float64, device="cpu").t()
        workspace = self._workspace
        if workspace is None or not workspace.fits(tensors.device, packed.rows, packed.tiles):
            workspace = Workspace(self._kernels, tensors.device, packed.rows, hyper, packed.tiles, [0, n])
            self._workspace = workspace
        workspace.load(packed.rows, hyper, None)
        workspace.renew_work()  # so that sums which were returned keep their values
        return packed, workspace


def passes_for(device: torch.device) -> TritonPasses | str:
    """The passes for ``device``, or the reason why it has none."""
    found = untraced(kernels_for)(device)
    return found if isinstance(found, str) else TritonPasses(*found)
