"""The addresses of tensors, and which tensors share memory."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

WITHOUT_ADDRESSES = ("meta", "mps")
"""Devices on which a tensor's pointer is not the address of its elements."""

address: Callable[[Tensor], int] = torch._C.TensorBase.data_ptr
"""The address of a tensor's first element."""

_PLAIN = {torch.Tensor, torch.nn.Parameter}


def plain(x: Tensor) -> bool:
    """Whether a tensor is only its memory: no subclass with its own behaviour, and not traced or functionalized."""
    keys, key = torch._C._dispatch_keys(x), torch._C.DispatchKey
    return not any(map(keys.has, (key.Python, key.Functionalize, key.FuncTorchBatched, key.FuncTorchGradWrapper)))


def all_plain(tensors: Iterator[Tensor]) -> bool:
    """Whether :func:`plain` holds for all; nearly always their types alone decide this."""
    return all(type(x) in _PLAIN or plain(x) for x in tensors)


def extent(x: Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    if x.is_contiguous() or not x.numel():
        return int(x.nbytes)
    reach = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return (reach + 1) * x.element_size()


class Range(NamedTuple):
    """The address range of a tensor that a step writes.

    Attributes:
        begin: the first address.
        end: one past the last address.
        tensor: its index among the parameters of the step.
        role: ``"w"``, ``"exp_avg"``, ``"exp_avg_scale"``, ``"lost_bits"``, ``"step"``, ``"row_var"``, ``"col_var"``,
            ``"variance"`` or ``"variance_scale"``.
    """

    begin: int
    end: int
    tensor: int
    role: str


class Written:
    """The memory that a step writes.

    Args:
        of: the tensors that it writes, by role and index; ``None`` where there is none. They need addresses: they must
            be :func:`plain`, and not on a device of :data:`WITHOUT_ADDRESSES`.
    """

    def __init__(self, of: Mapping[str, Sequence[Tensor | None]]) -> None:
        self._params = of["w"]
        found: list[tuple[int, int, int, str]] = []
        for role, tensors in of.items():
            for i, x in enumerate(tensors):
                if x is not None and (size := extent(x)):
                    begin = address(x)
                    found.append((begin, begin + size, i, role))
        found.sort()
        self._ranges = found
        self._begins = [begin for begin, _, _, _ in found]
        self._reach = list(accumulate((end for _, end, _, _ in found), max))

    def pairs(self) -> Iterator[tuple[Range, Range]]:
        """The pairs of ranges that overlap; in each pair, the earlier parameter's range is first."""
        if all(end <= begin for end, begin in zip(self._reach, self._begins[1:], strict=False)):
            return
        reaching: list[Range] = []
        for here in map(Range._make, self._ranges):
            reaching = [other for other in reaching if other.end > here.begin]
            for other in reaching:
                yield (here, other) if here.tensor < other.tensor else (other, here)
            reaching.append(here)

    def has(self, g: Tensor) -> bool:
        """Whether a tensor's range of addresses overlaps any of these."""
        begin, size = address(g), extent(g)
        below = bisect_left(self._begins, begin + size)  # how many begin before its end
        return size > 0 and below > 0 and self._reach[below - 1] > begin

    def is_param(self, i: int, g: Tensor) -> bool:
        """Whether a tensor has the memory of parameter ``i``, element by element."""
        w = self._params[i]
        assert w is not None
        return g is w or (address(g) == address(w) and g.dtype == w.dtype and g.stride() == w.stride())


def apart(a: Tensor, b: Tensor) -> bool:
    """Whether no two elements share memory because the elements of one tensor are in gaps between those of the other.

    ``False`` does not mean that they do share memory. For a given stride, an element's address is a multiple of the
    stride plus an offset. If the offsets of the two tensors, modulo the stride, are disjoint intervals, then the
    tensors share no element.
    """
    strides = [stride * x.element_size() for x in (a, b) for stride in x.stride() if stride > 0]
    for modulus in {*strides, gcd(*strides)} - {0}:
        widths = []
        for x in (a, b):
            steps = zip(x.shape, (stride * x.element_size() for stride in x.stride()), strict=True)
            widths.append(x.element_size() + sum((size - 1) * step for size, step in steps if step % modulus))
        ahead = (address(b) - address(a)) % modulus
        if widths[0] <= ahead and ahead + widths[1] <= modulus:
            return True
    return False
