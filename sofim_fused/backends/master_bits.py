"""Float32 weights in two parts: a bfloat16, which the model has, and an int16 with the rest of the bits.

The bfloat16 is the float32 rounded to nearest, ties away from zero, and the rest is the difference of their bits as
integers. With u the bits of the float32::

    shown = (u + 0x8000) >> 16        rest = u - (shown << 16), from -0x8000 to 0x7FFF        u = (shown << 16) + rest

This is exact for each float32 except a NaN, which becomes the quiet NaN 0x7FC0 of its sign, with the rest 0. (Rounding
ties to even could not be undone: to a bfloat16 that ends in 0 it rounds 65,537 numbers.) The largest float32 numbers
are shown as infinite, with a negative rest, and come back.

If w was replaced from outside, its new value counts, and the old rest moves it by half an ulp of w at most. A rest that
would make a NaN of a number cannot be its own, and counts as 0: below zero (0x0000 and 0x8000), and beyond infinity.

Weights of 24 bits are float32 weights whose lower 8 bits are zero. They are rounded to these stochastically, with 8
random bits r: u ← (u + r) with the lower 8 bits cleared, except that a finite weight that would become infinite is
rounded down. The rest then is a multiple of 256, and its upper byte, an int8, is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sofim_fused.checks import RESTS

_SIGN, _NAN, _INFINITY = -(2**31), 0x7FC00000, 0x7F800000


def joined(shown: Tensor, rest: Tensor) -> Tensor:
    """The weights as float32.

    Args:
        shown: bfloat16, of any shape.
        rest: int16, or int8 of weights of 24 bits, of its shape.
    """
    upper = shown.view(torch.int16).to(torch.int32) << 16
    whole = (upper + (rest.to(torch.int32) << 8 if rest.dtype == RESTS[24] else rest)).view(torch.float32)
    return torch.where(whole.isnan(), upper.view(torch.float32), whole)


def split(weight: Tensor, random: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What :func:`joined` takes: the bfloat16 and the rest of float32 weights.

    Args:
        weight: float32, of any shape.
        random: int32 of its shape, in [0, 2**8), to round to 24 bits; ``None``: all 32 are kept.
    """
    bits = weight.view(torch.int32)
    bits = torch.where(weight.isnan(), bits & _SIGN | _NAN, bits)
    if random is not None:
        raised = (bits + random) & ~0xFF
        bits = torch.where(raised & ~_SIGN < _INFINITY, raised, bits & ~0xFF)
    shown = (bits + 0x8000) >> 16
    rest = bits - (shown << 16)
    shown = shown.to(torch.int16).view(torch.bfloat16)
    return shown, rest.to(RESTS[32]) if random is None else (rest >> 8).to(RESTS[24])


def converted(rest: Tensor, dtype: torch.dtype) -> Tensor:
    """The rest of a weight of 24 bits for 32, or the other way round, in which the lower 8 bits are cleared."""
    if rest.dtype == dtype:
        return rest
    return rest.to(dtype) << 8 if dtype == RESTS[32] else (rest >> 8).to(dtype)
