"""A step of which other ranks hold a part, natively: two calls, and a message between them.

The native part takes plain tensors. So each parameter that has a gradient is stood in for by a tensor over the same
memory, the part that this rank holds, with a state of such parts. They are made once, and again if a parameter's local
tensor or its state is another one.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from sofim_fused import checks
from sofim_fused.backends import NativeResult, NativeSharded, on_device_of
from sofim_fused.dtensor import bump_versions, is_sharded
from sofim_fused.step import reduce
from sofim_fused.step.reduce import RankSums


class ShardedStep:
    """A step over parameters that are sharded over ranks; has the signature of :data:`sofim_fused.backends.NativeStep`.

    A result of ``None`` means that nothing was changed and no message was sent: the step has to be taken by passes,
    which send the same messages.

    Args:
        native: takes the halves.
        rank_sums: the ranks, and the totals over them.
    """

    def __init__(self, native: NativeSharded, rank_sums: RankSums) -> None:
        self._native = native
        self._rank_sums = rank_sums
        self._parts: list[_Part | None] = [None] * rank_sums.count
        self._state: dict[Tensor, dict[str, Any]] = {}

    @torch.no_grad()
    def __call__(
        self,
        param_groups: list[dict[str, Any]],
        state: MutableMapping[Tensor, Any],
        grad_scale: Tensor | float | None,
        found_inf: Tensor | float | None,
        counter: Tensor | None = None,
    ) -> NativeResult:
        """Take a step; the arguments are those of a whole native step."""
        whole, sums = param_groups[0], self._rank_sums
        numerator, fisher = whole.get("numerator"), whole.get("fisher")
        limited = whole.get("max_grad_norm") is not None or whole.get("skip_nonfinite") is not False
        guarded = limited or grad_scale is not None or found_inf is not None
        if not (isinstance(numerator, str) and isinstance(fisher, str)):
            return None
        if (numerator, fisher, len(param_groups), guarded) not in sums.compared:
            return None  # before their first step of a kind the ranks compare what they are about to do
        checks.scaling("grad_scale", grad_scale)
        checks.scaling("found_inf", found_inf)
        present: list[int] = []
        try:
            groups = self._groups_of_parts(param_groups, state, present)
            if not groups or not present:
                return None
            begun = self._native.begin_sharded(groups, self._state, guarded, sums.class_of_each, sums.classes)
            if begun is None:
                return None
            try:
                blocks, square, found_inf = reduce.over_ranks(sums, fisher, tuple(present), *begun, guarded, found_inf)
                if grad_scale is not None:
                    grad_scale = on_device_of(blocks, grad_scale)
                result = self._native.finish_sharded(blocks, square if guarded else None, grad_scale, found_inf)
            finally:
                self._native.cancel_sharded()
            bump_versions(part.param for part in map(self._parts.__getitem__, present) if part is not None)
            return result
        finally:
            for ordinal in present:
                part = self._parts[ordinal]
                if part is not None:
                    part.take_back()

    def _groups_of_parts(
        self, param_groups: list[dict[str, Any]], state: MutableMapping[Tensor, Any], present: list[int]
    ) -> list[dict[str, Any]] | None:
        """The groups with parts in the place of parameters, and their gradients; ``None``: not as they were, or new.

        ``present`` gets the ordinals of those with gradients.
        """
        groups, ordinal = [], 0
        for group in param_groups:
            parts = []
            for param in group["params"]:
                if ordinal == len(self._parts):
                    return None
                grad = param.grad
                part = self._parts[ordinal]
                if grad is not None:
                    known = state.get(param)
                    if part is None or part.param is not param or not part.fits(known):
                        part = self._new_part(ordinal, param, known)
                    if part is None or not part.give(grad):
                        return None
                    present.append(ordinal)
                parts.append(_NONE if part is None else part.tensor)
                ordinal += 1
            groups.append({**group, "params": parts})
        return groups if ordinal == len(self._parts) else None

    def _new_part(self, ordinal: int, param: Tensor, known: dict[str, Any] | None) -> _Part | None:
        before = self._parts[ordinal]
        if before is not None:
            self._state.pop(before.tensor, None)
            self._parts[ordinal] = None
        if known is None:  # a first step, which makes state
            return None
        part = self._parts[ordinal] = _Part(param, known)
        self._state[part.tensor] = part.state
        return part


class _Part:
    """What this rank holds of a parameter and its state."""

    def __init__(self, param: Tensor, known: dict[str, Any]) -> None:
        self.param: Any = param
        self._sharded = is_sharded(param)
        self._local = _local(param)
        self._spec: Any = getattr(param, "_spec", None)
        self._grad_spec = self._spec  # of the last gradient that had the parameter's placements
        self._count = len(known)
        self._entries = [(name, known[name]) for name in checks.STATE if name in known]
        # Shares memory and the version counter. A plain tensor's memory may be replaced through .data.
        self.tensor = self._local.detach() if self._sharded else param
        self.state = {name: _local(value) if isinstance(value, Tensor) else value for name, value in self._entries}

    def fits(self, known: dict[str, Any] | None) -> bool:
        """Whether the parameter's local tensor and its state are still the same."""
        if known is None or len(known) != self._count:
            return False
        if self._sharded:
            local = self.param._local_tensor
            if local is not self._local or local.data_ptr() != self.tensor.data_ptr():
                return False
        return all(known.get(name) is value for name, value in self._entries)

    def give(self, grad: Any) -> bool:
        """Set the gradient; ``False`` if its elements are elsewhere, or it is not of the tensor's shape and kind."""
        if not self._sharded:
            return True  # it is there
        spec = getattr(grad, "_spec", None)
        if spec is not self._grad_spec:
            if spec is None or spec.placements != self._spec.placements or spec.mesh != self._spec.mesh:
                return False
            self._grad_spec = spec
        grad = grad._local_tensor
        if type(grad) is not Tensor or grad.dtype != self.tensor.dtype or grad.shape != self.tensor.shape:
            return False
        self.tensor.grad = grad
        return True

    def take_back(self) -> None:
        """Remove the gradient that :meth:`give` has set."""
        if self._sharded:
            self.tensor.grad = None


def _local(x: Tensor) -> Tensor:
    """What this rank holds, the tensor itself: ``DTensor.to_local()`` makes a new view of a parameter's each time."""
    return x._local_tensor if is_sharded(x) else x  # type: ignore[attr-defined]


_NONE = torch.empty(0, device="cpu")
"""Stands in for a parameter that has had no gradient yet."""
