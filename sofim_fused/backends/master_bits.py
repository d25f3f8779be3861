"""Float32 weights in two halves of 16 bits: a bfloat16, which the model has, and an int16 with the rest of the bits.

The bfloat16 is the float32 rounded to nearest, ties away from zero, and the rest is the difference of their bits as
integers. With u the bits of the float32::

    shown = (u + 0x8000) >> 16        rest = u - (shown << 16), from -0x8000 to 0x7FFF        u = (shown << 16) + rest

This is exact for each float32 except a NaN, which becomes the quiet NaN 0x7FC0 of its sign, with the rest 0. (Rounding
ties to even could not be undone: to a bfloat16 that ends in 0 it rounds 65,537 numbers.) The largest float32 numbers
are shown as infinite, with a negative rest, and come back.

If w was replaced from outside, its new value counts, and the old rest moves it by half an ulp of w at most. A rest that
would make a NaN of a number cannot be its own, and counts as 0: below zero (0x0000 and 0x8000), and beyond infinity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sofim_fused.checks import REST

_SIGN, _NAN = -(2**31), 0x7FC00000


def joined(shown: Tensor, rest: Tensor) -> Tensor:
    """The weights as float32.

    Args:
        shown: bfloat16, of any shape.
        rest: int16, of its shape.
    """
    upper = shown.view(torch.int16).to(torch.int32) << 16
    whole = (upper + rest).view(torch.float32)
    return torch.where(whole.isnan(), upper.view(torch.float32), whole)


def split(weight: Tensor) -> tuple[Tensor, Tensor]:
    """What :func:`joined` takes: the bfloat16 and the rest of float32 weights."""
    bits = weight.view(torch.int32)
    bits = torch.where(weight.isnan(), bits & _SIGN | _NAN, bits)
    shown = (bits + 0x8000) >> 16
    rest = bits - (shown << 16)
    return shown.to(torch.int16).view(torch.bfloat16), rest.to(REST)
