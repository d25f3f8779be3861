"""A whole step in one call: the native part packs the tensors, then one or two launches do everything else.

The first sweep finishes sums and coefficients on the device (:mod:`sofim_fused.backends.triton.kernels`), so that the
host waits for nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, MutableMapping
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from sofim_fused import checks
from sofim_fused.backends import triton
from sofim_fused.backends.interface import GuardSettings
from sofim_fused.backends.triton import launch, pack
from sofim_fused.backends.triton.adaptive_step import AdaptiveStep
from sofim_fused.backends.triton.launch import KernelConfig, capturing, device_scope
from sofim_fused.backends.triton.workspace import Workspace

# A step of at most this many tiles, a million elements, takes one launch. On an H200 that saves 1.2 µs with 23 tiles,
# and costs 6 µs with 1,622, because fewer programs fit at once.
SINGLE_UP_TO = 256


class PackedStep(Protocol):
    """``sofim_fused._C.PackedStep``: gathers and checks the tensors of an optimizer in each step.

    Its constructor takes one argument, the number of elements per tile (``ValueError`` if that is less than 1). Between
    steps it keeps numbers, and references to parameters and state, which the optimizer has as well. It has references
    to gradients only from ``gather`` to ``finish``. The attributes describe the last ``gather`` that did not return
    ``None``.

    Attributes:
        size: n, the tensors that take part.
        tiles: the number of tiles of all tensors.
        kinds: the distinct kinds of tensors, sorted (:mod:`sofim_fused.backends.triton.pack`).
        rows: int64 ``[n, COLUMNS]`` on the CPU; the same memory as long as n stays the same.
        hyper: float64 ``[number of parameter groups, HYPERS]`` on the CPU; the memory stays likewise.
        scalars: (group, column, tensor) for each ``lr`` and ``rho`` that is a tensor on a device other than the CPU;
            ``hyper`` has NaN there.
        device: of all tensors; ``None`` if there are none.
        numerator, fisher, max_grad_norm, skip_nonfinite: settings of the whole optimizer.
        l2, decoupled: whether some tensor that takes part has a group with such a weight decay.
        adaptive: whether diagonals adapt; then there are also
        means: int64 ``[n, 7]`` on the CPU, the running means of g² (:data:`sofim_fused.backends.triton.pack.ROW_VAR`);
        settings: float64 ``[number of parameter groups, 2]`` on the CPU, beta2 and eps; and
        rank_one: whether F has its term of rank one.
    """

    size: int
    tiles: int
    kinds: list[int]
    rows: Tensor
    hyper: Tensor
    scalars: list[tuple[int, int, Tensor]]
    device: torch.device | None
    numerator: str
    fisher: str
    max_grad_norm: float | None
    skip_nonfinite: bool
    l2: bool
    decoupled: bool
    adaptive: bool
    means: Tensor
    settings: Tensor
    rank_one: bool

    def gather(self, param_groups: list[dict[str, Any]], state: Mapping[Tensor, Any]) -> int | None:
        """Gather the tensors of a step from an optimizer's groups and state, which it does not change.

        It drops what was gathered before and not finished. Tensors that are not laid out like their moments, and
        gradients whose conjugation or negation is lazy, are copied here, and the copies are used instead.

        Returns:
            What differs from the last time that it did not return ``None``, as bits: ``POINTERS``, ``VALUES``,
            ``LAYOUT``. ``None``, with nothing changed, if Python has to check this step: a value is not the expected
            one, state is missing, a tensor is a subclass with its own behaviour, a mode intercepts operations on
            tensors, or the tensors are on several devices or on one without addresses.
        """

    def finish(self, weights: bool, moments: bool, steps: bool) -> None:
        """Write copies back, raise the version counters of what was written, and drop all gradients and copies.

        Args:
            weights: parameters and their lost bits were written.
            moments: moments were written.
            steps: step counts were written.
        """


class TritonStep:
    """Whole steps of one optimizer (:data:`sofim_fused.backends.interface.NativeStep`); keeps a workspace between them.

    Args:
        kernels: :mod:`sofim_fused.backends.triton.kernels`.
        packed: a ``sofim_fused._C.PackedStep`` for tiles of ``kernels.TILE`` elements.
        emulated: the kernels run in Triton's interpreter, on the CPU.
    """

    def __init__(self, kernels: ModuleType, packed: PackedStep, emulated: bool = False) -> None:
        self._kernels = kernels
        self._emulated = emulated
        self._packed = packed
        self._workspace: Workspace | None = None
        self._config: KernelConfig | None = None
        self._captured: list[Workspace] = []  # graphs read their pinned memory at each replay
        self._cooperates = True
        self._changed = 0  # what has changed since the workspace was filled
        self._scaling = (False, False)  # whether there is a grad_scale, a found_inf
        self._adaptive = AdaptiveStep()

    def __call__(
        self,
        groups: list[dict[str, Any]],
        state: MutableMapping[Tensor, Any],
        grad_scale: Any = None,
        found_inf: Any = None,
        _counter: Tensor | None = None,
    ) -> Any:
        if not (pack.readable(grad_scale) and pack.readable(found_inf)):
            return None
        if not isinstance(found_inf, Tensor):
            found_inf = found_inf or None
        packed = self._packed
        changed = packed.gather(groups, state)
        if changed is None:
            return None
        self._changed |= changed
        if packed.size == 0:
            return True
        assert packed.device is not None
        if packed.device.type != ("cpu" if self._emulated else "cuda"):
            packed.finish(False, False, False)
            return None
        if packed.adaptive:
            return self._take_adaptive(grad_scale, found_inf)
        scaling = (grad_scale is not None, found_inf is not None)
        if scaling != self._scaling:
            self._scaling = scaling
            self._changed |= pack.LAYOUT
        guarded = packed.max_grad_norm is not None or packed.skip_nonfinite or any(scaling)
        if self._config is None or self._changed & pack.LAYOUT:
            self._config = self._new_config(guarded)
        with device_scope(packed.device):
            workspace = self._filled(grad_scale, found_inf)
            if guarded:  # the last step's now belongs to the caller
                workspace.outcome = torch.empty(2, dtype=torch.float64, device=workspace.device)
            self._launch(workspace, self._config)
            packed.finish(True, True, True)
        if not guarded:
            return True
        norm, skipped = workspace.outcome.unbind()
        return norm, skipped.view(torch.int64)

    def _take_adaptive(self, grad_scale: Tensor | float | None, found_inf: Tensor | float | None) -> Any:
        packed, taken = self._packed, None
        assert packed.device is not None
        if not capturing():  # a graph has the passes in pure PyTorch
            guard = GuardSettings(packed.max_grad_norm, grad_scale, found_inf, packed.skip_nonfinite)
            asked = guard.has_gain or guard.may_skip
            with device_scope(packed.device):
                taken = self._adaptive.take(packed, self._changed, _bounds(packed), guard if asked else None)
        if taken is None:
            packed.finish(False, False, False)
        else:
            self._changed = 0
        return taken

    def _new_config(self, guarded: bool) -> KernelConfig:
        k, packed = self._kernels, self._packed
        return KernelConfig(
            tuple(packed.kinds),
            first=k.DOTS if guarded else k.ACCUMULATE,
            second=k.COMMIT if guarded else k.APPLY,
            finish=k.GUARDED if guarded else k.PLAIN,
            l2=packed.l2,
            numerator=checks.NUMERATORS.index(packed.numerator),
            per_tensor=packed.fisher == "parameter",
            clip=packed.max_grad_norm is not None or self._scaling[0],
            skip=packed.skip_nonfinite or self._scaling[1],
        )

    def _filled(self, grad_scale: Tensor | float | None, found_inf: Tensor | float | None) -> Workspace:
        """The workspace on the device, filled for this step."""
        packed = self._packed
        if capturing():
            if self._workspace is None or self._changed & pack.LAYOUT:
                packed.finish(False, False, False)
                raise RuntimeError(
                    "a step is captured in a graph before any like it was taken: take one with the same gradients "
                    "present and the same settings, then capture"
                )
            # A graph has a workspace of its own: a replay must not see what eager steps write into theirs.
            workspace = self._workspace.for_capture()
            self._captured.append(workspace)
            workspace.load(packed.rows, packed.hyper, packed.max_grad_norm, packed.skip_nonfinite)
        else:
            if self._workspace is None or self._changed & pack.LAYOUT:
                assert packed.device is not None
                self._workspace = Workspace(
                    self._kernels, packed.device, packed.rows, packed.hyper, packed.tiles, _bounds(packed)
                )
                self._changed = pack.EVERYTHING
            workspace = self._workspace
            workspace.load(
                packed.rows if self._changed & pack.POINTERS else None,
                packed.hyper if self._changed & pack.VALUES else None,
                packed.max_grad_norm,
                packed.skip_nonfinite,
            )
            self._changed = 0
        for group, column, value in packed.scalars:
            workspace.hyper[1 + group, column].copy_(value.detach().reshape(()))
        # Whether there are such numbers is part of the layout. A new layout gets a new workspace: none is stale.
        for column, number in ((self._kernels.GRAD_SCALE, grad_scale), (self._kernels.FOUND_INF, found_inf)):
            if isinstance(number, Tensor):
                workspace.hyper[0, column].copy_(number.detach().reshape(()), non_blocking=True)
            elif number is not None:
                workspace.hyper[0, column].fill_(number)
        return workspace

    def _launch(self, workspace: Workspace, config: KernelConfig) -> None:
        single = workspace.tiles <= SINGLE_UP_TO if triton.SINGLE_LAUNCH is None else triton.SINGLE_LAUNCH
        if single and self._cooperates and not config.takes_two:
            try:
                launch.launch_single(self._kernels, workspace, config, self._programs(workspace.device, config))
            except RuntimeError as error:
                if "cooperative" not in str(error).lower():
                    raise
                # Nothing has run: another process holds a part of the device.
                self._cooperates = False
                warnings.warn(f"a step in one launch was refused ({error}); from now on it takes two", stacklevel=4)
            else:
                return
        launch.launch_first(self._kernels, workspace, config)
        launch.launch_second(self._kernels, workspace, config)

    def _programs(self, device: torch.device, config: KernelConfig) -> int:
        if self._emulated:  # the interpreter runs programs one after the other
            return 1
        hip = torch.version.hip is not None
        return launch.multiprocessors(device) * launch.programs_per_multiprocessor(config, hip=hip)


def _bounds(packed: PackedStep) -> list[int]:
    """The indices of tensors at which Fisher blocks begin and end."""
    if packed.fisher != "group":
        return [0, packed.size]
    groups = packed.rows[:, pack.GROUP]
    return torch.searchsorted(groups.contiguous(), torch.arange(len(packed.hyper) + 1, device="cpu")).tolist()
