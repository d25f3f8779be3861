"""The memory on a device that the kernels share: rows of tensors, hyperparameters, sums, coefficients, counters."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import inf
from types import ModuleType

import torch
from torch import Tensor

from sofim_fused.backends import addresses
from sofim_fused.backends.triton import pack


class Workspace:
    """Arrays on a device for tensors of given sizes; :mod:`sofim_fused.backends.triton.kernels` has their shapes.

    Args:
        kernels: that module.
        device: the device of the arrays.
        rows: int64 ``[n, COLUMNS]`` on the CPU, packed tensors (:mod:`sofim_fused.backends.triton.pack`). Only their
            sizes are used.
        hyper: float64 ``[groups, HYPERS]`` on the CPU. Only its shape is used.
        tiles: the number of tiles of all tensors.
        bounds: where Fisher blocks begin and end among the tensors: ``[0, ..., n]``.
    """

    def __init__(
        self,
        kernels: ModuleType,
        device: torch.device,
        rows: Tensor,
        hyper: Tensor,
        tiles: int,
        bounds: Sequence[int],
    ) -> None:
        self.device = device
        self.tensors = len(rows)
        self.tiles = tiles
        self.blocks = len(bounds) - 1
        self._sum_rows, self._coefficient_rows = kernels.SUMS, kernels.COEFFICIENTS
        self._columns = kernels.LIMIT, kernels.GRAD_SCALE, kernels.SKIP_NONFINITE
        self._numels = rows[:, pack.NUMEL].clone()
        # What is on the CPU names it: torch.set_default_device may have set another default.
        ends = torch.cat((rows[1:, pack.FIRST], torch.tensor([tiles], device="cpu")))
        numbers = torch.arange(self.tensors, dtype=torch.int32, device="cpu")
        tile_of = torch.repeat_interleave(numbers, ends - rows[:, pack.FIRST])
        self.tile_of = send(tile_of, torch.empty_like(tile_of, device=device))
        bounds_ = torch.tensor(bounds, dtype=torch.int32, device="cpu")
        self.bounds = send(bounds_, torch.empty_like(bounds_, device=device))
        size = (kernels.SUMS + kernels.COEFFICIENTS) * self.tensors + kernels.EXTRAS + kernels.SUMS * tiles
        self._allocate(rows.shape, (1 + len(hyper), pack.HYPERS), size)

    @torch.inference_mode(False)  # otherwise no later step could write to it
    def _allocate(self, rows: Sequence[int], hyper: Sequence[int], work: int) -> None:
        device = self.device
        self.rows = torch.empty(rows, dtype=torch.int64, device=device)
        self.hyper = torch.empty(hyper, dtype=torch.float64, device=device)
        self.counters = torch.zeros(self.tensors + 2, dtype=torch.int32, device=device)
        self.work = torch.empty(work, dtype=torch.float64, device=device)
        self.outcome = self.work  # a stand-in: only guarded steps write it, and they replace it before
        self._rows = torch.empty(rows, dtype=torch.int64, device="cpu")
        self._hyper = torch.zeros(hyper, dtype=torch.float64, device="cpu")
        self._limit: float | None = None
        self._known = False
        # Allocated for the next capture, because pinned memory cannot be allocated while a graph is captured.
        self._pinned: tuple[Tensor, Tensor] | None = _pinned(self.rows), _pinned(self.hyper)
        self._reread = False

    def for_capture(self) -> Workspace:
        """A workspace of the same sizes for a graph that is being captured. Each capture needs an eager step before it.

        Raises:
            RuntimeError: no eager step was taken since the last capture, so there is no pinned memory.
        """
        if self._pinned is None:
            raise RuntimeError("two captures in a row: take a step outside of a graph before the second")
        twin: Workspace = object.__new__(Workspace)
        twin.__dict__.update(self.__dict__)
        with torch.inference_mode(False):  # as in _allocate
            twin.rows, twin.hyper = torch.empty_like(self.rows), torch.empty_like(self.hyper)
            twin.counters, twin.work = torch.zeros_like(self.counters), torch.empty_like(self.work)
            twin._rows, twin._hyper = torch.empty_like(self._rows), torch.zeros_like(self._hyper)
        twin.outcome = twin.work
        twin._known = False
        twin._reread = True
        self._pinned = None
        return twin

    def fits(self, device: torch.device, rows: Tensor, tiles: int) -> bool:
        """Whether it was made for tensors of these sizes on this device."""
        same = self.device == device and self.tiles == tiles and len(rows) == self.tensors
        return same and torch.equal(rows[:, pack.NUMEL], self._numels)

    def load(self, rows: Tensor | None, hyper: Tensor | None, limit: float | None, skip: bool = False) -> None:
        """Send what has changed to the device, without waiting for it.

        Args:
            rows: packed tensors on the CPU, or ``None`` if they have not changed.
            hyper: the groups' hyperparameters on the CPU, or ``None`` if they have not changed.
            limit: the limit of the gradients' norm.
            skip: a step is skipped if that norm is not finite; only read together with a new ``hyper``.
        """
        if self._pinned is None:
            self._pinned = _pinned(self.rows), _pinned(self.hyper)
        if rows is not None and not (self._known and torch.equal(rows, self._rows)):
            self._rows.copy_(rows)
            send(self._rows, self.rows, self._pinned[0] if self._reread else None)
        if hyper is not None or limit != self._limit:
            if hyper is not None:
                self._hyper[1:] = hyper
            for column, value in zip(self._columns, (inf if limit is None else limit, 1.0, float(skip)), strict=True):
                self._hyper[0, column] = value
            self._limit = limit
            send(self._hyper, self.hyper, self._pinned[1] if self._reread else None)
        self._known = True

    def arguments(self) -> tuple[Tensor | int, ...]:
        """The arguments of kernels that compute sums, in their order."""
        arrays = (self.rows, self.tile_of, self.bounds, self.hyper, self.work, self.counters, self.outcome)
        return (*arrays, self.tensors, self.tiles, self.blocks)

    def renew_work(self) -> None:
        """Allocate new memory for sums and coefficients; callers that have the old ones keep them."""
        coefficients = self._coefficients().clone()
        self.work = torch.empty_like(self.work)
        self._coefficients().copy_(coefficients)

    def sums(self) -> Tensor:
        """The sums of the last pass, float64 ``[SUMS, tensors]``: mm, mg, mw, gg, gw, ww; others are undefined."""
        return self.work[: self._sum_rows * self.tensors].view(self._sum_rows, self.tensors)

    def _coefficients(self) -> Tensor:
        start, rows = self._sum_rows * self.tensors, self._coefficient_rows
        return self.work[start : start + rows * self.tensors].view(rows, self.tensors)

    def set_coefficients(
        self,
        weight: Tensor | None,
        gradient: Tensor | None,
        moment: Tensor | None = None,
        gain: Tensor | None = None,
        skip: Tensor | None = None,
    ) -> None:
        """Set what the next update uses; see :class:`sofim_fused.backends.interface.Coefficients`."""
        for row, vector, default in zip(self._coefficients(), (weight, gradient, moment), (1.0, 0.0, 0.0), strict=True):
            row.fill_(default) if vector is None else row.copy_(vector)
        end = (self._sum_rows + self._coefficient_rows) * self.tensors
        for at, value in ((end, gain), (end + 1, skip)):
            if value is not None:
                self.work[at].copy_(value)


class Located:
    """What the algebra between the sweeps needs to know of n tensors, on a device: step counts, groups, Fisher blocks.

    Args:
        device: the device of the arrays.
        steps: the step counts, 0-dimensional int64 tensors on ``device``.
        sizes: how many tensors each parameter group has; tensors are in the order of groups.
        by_group: a Fisher block is a parameter group; else there is one, or one per tensor.

    Attributes:
        rows: int64 ``[n, COLUMNS]`` with ``STEP`` and ``GROUP`` (:mod:`sofim_fused.backends.triton.pack`), else 0.
        bounds: int32, where Fisher blocks begin and end among the tensors: ``[0, ..., n]``.
    """

    def __init__(self, device: torch.device, steps: Sequence[Tensor], sizes: Sequence[int], by_group: bool) -> None:
        self._key = (device, _addresses(steps), tuple(sizes), by_group)
        rows = torch.zeros(len(steps), pack.COLUMNS, dtype=torch.int64, device="cpu")
        rows[:, pack.STEP] = torch.tensor(self._key[1], dtype=torch.int64, device="cpu")
        numbers, counts = torch.arange(len(sizes), device="cpu"), torch.tensor(list(sizes), device="cpu")
        rows[:, pack.GROUP] = torch.repeat_interleave(numbers, counts)
        ends = accumulate(sizes) if by_group else [len(steps)]
        bounds = torch.tensor([0, *ends], dtype=torch.int32, device="cpu")
        self.rows = send(rows, torch.empty_like(rows, device=device))
        self.bounds = send(bounds, torch.empty_like(bounds, device=device))

    def fits(self, device: torch.device, steps: Sequence[Tensor], sizes: Sequence[int], by_group: bool) -> bool:
        """Whether it was made for these step counts, at the same addresses, and for these groups."""
        return self._key == (device, _addresses(steps), tuple(sizes), by_group)


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(addresses.address, tensors))


def send(values: Tensor, to: Tensor, pinned: Tensor | None = None) -> Tensor:
    """Copy from the CPU in stream order, through pinned memory, without waiting.

    Args:
        values: on the CPU; may be changed right after the call.
        to: of the same shape and dtype.
        pinned: memory to copy through. ``None``: memory of PyTorch's pool, which returns to it after the copy.

    Returns:
        ``to``.
    """
    if to.device.type == "cpu":
        return to.copy_(values)
    return to.copy_(values.pin_memory() if pinned is None else pinned.copy_(values), non_blocking=True)


@torch.inference_mode(False)  # steps in and outside of inference mode write to it
def _pinned(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=like.device.type != "cpu")
