"""The hyperparameters of groups, as the algebra of a step takes them (:mod:`sofim_fused.backends.solve`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sofim_fused import checks
from sofim_fused.backends import FISHER, Decay, Settings, sum_dtype

Group = Mapping[str, Any]


class Hyperparameters:
    """The hyperparameters for the n tensors of one device, updated from the groups in each step.

    Args:
        device: where the tensors are.
        sizes: how many of the tensors belong to each parameter group; tensors are in the order of groups.
        numerator: one of ``checks.NUMERATORS``.
        fisher: ``"model"``, ``"group"`` or ``"parameter"``.
        adaptive: whether the groups' diagonals adapt.
    """

    def __init__(
        self, device: torch.device, sizes: Sequence[int], numerator: str, fisher: str, adaptive: bool = False
    ) -> None:
        self.sizes = list(sizes)
        self.numerator = numerator
        self.fisher = fisher
        self.adaptive = adaptive
        self._columns = _ADAPTIVE_COLUMNS if adaptive else _COLUMNS
        with torch.inference_mode(False):  # otherwise no later step could write to them
            self._hyper = torch.zeros(len(self.sizes), len(self._columns), dtype=sum_dtype(device), device=device)
            self._group_of = torch.zeros(sum(self.sizes), dtype=torch.int64, device=device)
        for index, part in enumerate(self._group_of.split(self.sizes)):
            part.fill_(index)  # passes a kernel argument; a list would have to be copied to the device, and waited for
        self._written: dict[tuple[int, int], float] = {}
        self._decay: Decay | None = None
        self._decay_key: tuple[tuple[float, float, float], ...] = ()
        self.settings = self._settings(False)

    def serves(self, sizes: Sequence[int], numerator: str, fisher: str, adaptive: bool = False) -> bool:
        """Whether it was made for these sizes and options."""
        mine = self.sizes, self.numerator, self.fisher, self.adaptive
        return mine == (list(sizes), numerator, fisher, adaptive)

    def refresh(self, groups: Sequence[Group]) -> Decay:
        """Copy the groups' hyperparameters as they are now; return how gradients enter the moments.

        Values on the host are written only if they have changed, and as kernel arguments; tensors on the device are
        copied there. So nothing here waits for the device.
        """
        present = [(group, size) for group, size in zip(groups, self.sizes, strict=True) if size]
        for row, (group, size) in enumerate(zip(groups, self.sizes, strict=True)):
            if size:
                for column, read in enumerate(self._columns.values()):
                    self._write(row, column, read(group))
        key = tuple(entering(group) for group, _ in present)
        if self._decay is None or key != self._decay_key:
            rows = [row for row, (_, size) in zip(key, present, strict=True) for _ in range(size)]
            self._decay_key, self._decay = key, decay_of(rows, checks.reads_gradient(self.numerator))
        l2 = checks.reads_gradient(self.numerator) and self._decay.weight is not None
        rank_one = any(group["rho"] is not None for group in groups)  # of all, as other ranks may have those tensors
        self.settings = self._settings(l2 or any(_decoupled(group) for group, _ in present), rank_one)
        return self._decay

    def _settings(self, scales_weight: bool, rank_one: bool = True) -> Settings:
        return Settings(
            hyper=self._hyper,
            sizes=self.sizes,
            fisher=FISHER.index(self.fisher),
            numerator=checks.NUMERATORS.index(self.numerator),
            group_of=self._group_of,
            scales_weight=scales_weight,
            rank_one=rank_one,
        )

    def _write(self, row: int, column: int, value: float | Tensor) -> None:
        if isinstance(value, Tensor) and value.device.type == "cpu":
            value = float(value.detach())
        if isinstance(value, Tensor):
            self._hyper.select(0, row).select(0, column).fill_(value.detach().reshape(()).to(self._hyper.device))
            self._written.pop((row, column), None)
        elif self._written.get((row, column)) != value:
            self._hyper.select(0, row).select(0, column).fill_(value)
            self._written[row, column] = value


def entering(group: Group) -> tuple[float, float, float]:
    """The settings of a group that determine how a gradient enters the moment: β, the sign, and the L2 decay."""
    return float(group["momentum"]), _sign(group), _l2(group)


def decay_of(rows: Sequence[tuple[float, float, float]], cross: bool) -> Decay:
    """How gradients enter the moments, from :func:`entering` of each tensor; ``cross``: as in :class:`Decay`."""
    return Decay(
        moment=[beta for beta, _, _ in rows],
        gradient=[(1 - beta) * sign for beta, sign, _ in rows],
        weight=[(1 - beta) * l2 for beta, _, l2 in rows] if any(l2 for _, _, l2 in rows) else None,
        cross=cross,
    )


def _sign(group: Group) -> float:
    return -1.0 if group["maximize"] else 1.0


def _l2(group: Group) -> float:
    return 0.0 if group["decoupled_weight_decay"] else float(group["weight_decay"])


def _decoupled(group: Group) -> float:
    return float(group["weight_decay"]) if group["decoupled_weight_decay"] else 0.0


def _number(value: Any) -> float | Tensor:
    return value if isinstance(value, Tensor) else float(value)


# The columns of Settings.hyper.
_COLUMNS: dict[str, Callable[[Group], float | Tensor]] = {
    "lr": lambda group: _number(group["lr"]),
    "momentum": lambda group: _number(group["momentum"]),
    "rho": lambda group: _number(math.inf if group["rho"] is None else group["rho"]),
    "weight_decay": _decoupled,
    "l2": _l2,
    "sign": _sign,
}
_ADAPTIVE_COLUMNS = {
    **_COLUMNS,
    "beta2": lambda group: _number(group["beta2"]),
    "eps": lambda group: _number(group["eps"]),
}
