"""Moments in 8 bits: how a tensor becomes codes with one scale per block, and back, the same in every backend.

A tensor of shape (r, ...) has r rows, of numel/r elements in the order of a contiguous tensor. A row is divided into
blocks of 128 elements; the last one of a row may be shorter. A block is stored as a float32 scale, and for each element
a code of 8 bits, ``torch.float8_e4m3fn``: a sign, 4 bits of an exponent, 3 of a fraction; the largest is 448.

Scales are powers of two, so that to multiply or divide by one is exact: the only rounding is that to a code, and no
backend can differ in it by the order of operations, fused multiply-adds or an approximate division. With A the largest
magnitude in the block, the scale is the least power of two, of 2^-140 to 2^119, by which A is at most 448:

    scale = 2^k          A ≤ 448·2^k          code = round(m / scale)          m as stored = code · scale

- A = 0: the scale is 0, and so are the codes.
- A is infinite or NaN: the scale is NaN, the codes are 0, and all of the block is NaN as stored.
- A > 448·2^119 = 2.98e38: codes are limited to 448, so that no finite number becomes infinite.
- 2^-140 times the least code, 2^-9, is float32's least number: no number becomes zero because all in its block are
  small. One becomes zero if it is less than about 2^-18 of the largest in its block.

Rounding is to nearest (ties to even, as ``Tensor.to(torch.float8_e4m3fn)``), or stochastic with 16 random bits u of
:mod:`sofim_fused.backends.rounding`: with x = |m / scale| in float32,

    x ≥ 2^-6:  code = ((bits of x + 16·u) >> 20) - 960
    x < 2^-6:  code = ((bits of (x + 2^-6) + 16·u) >> 20) - 968

The probability of rounding up in magnitude is the part that is cut off, in units of the last bit that is kept.

Second moments v, the running means of g² of a diagonal with a number for each element, are stored as their roots:
r = √v in float32 becomes codes, and v is r², at most float32's largest number. Blocks and codes are those above, and so
are scales, but that their exponents are at least -65:

- v = 0 has the code 0, and no other v has. One that would get it gets the code 1, so that no gradient is divided by eps
  alone because others in its block are larger. So v is stored too large, by any factor, where √v is less than 2^-9 of
  the scale, 2^-16.8 to 2^-17.8 of the block's largest root; steps of such elements are smaller than they would be. As
  the exponent is at least -65, the square of the code 1 is a number that float32 has.
- A NaN makes its block NaN. No v is infinite, as steps limit it to float32's largest number.
- Above the least code, what is stored has the mean v, not √v: of two neighbouring codes that stand for a ≤ √v < b, the
  upper one has the probability (v - a²)/(b² - a²). For it is v that enters the next mean, β₂v + (1 - β₂)g². Rounded to
  nearest, v would stand still, because with β₂ = 0.999 a step changes it by less than half of the distance of codes;
  and if the mean were √v, each step would add the variance of its root to v: 3 to 5 % in the end, whatever β₂ is.

With x = r/scale, its code's number a, the distance q to the next one, and 16 bits u of
:func:`sofim_fused.backends.rounding.other_random_bits`, none of which round m, the upper one is taken if

    (x - a)·(x + a) > q·(2a + q)·(u + 1/2)/2^16

in float32, where only x + a and the product of the left side are rounded. To nearest, 2^15 takes the place of u + 1/2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DTYPE = torch.float8_e4m3fn
BLOCK = 128
"""Elements with one scale; the last block of a row may have fewer."""

SMALLEST = 4096
"""A tensor with fewer elements is not stored in this way: it would save next to nothing."""

LARGEST_CODE = 448.0
_SMALLEST_SCALE, _LARGEST_SCALE = -140, 119  # the exponents
_SMALLEST_ROOT_SCALE = -65  # with the least code 2^-74, whose square is 2^-148
_NORMAL = 2.0**-6  # from here on a code has 3 bits behind its first
_LIFT = 64  # blocks of numbers near float32's least are multiplied by 2 to this power first
_LIFTED_BELOW = 2.0**-60


def suits(shape: Sequence[int]) -> bool:
    """Whether a tensor of this shape is stored in 8 bits: with rows of a block or more, and enough elements.

    Of a ``DTensor`` it is the whole shape that counts.
    """
    rows, size = (shape[0], 1) if len(shape) else (1, 1)
    for length in shape[1:]:
        size *= length
    return len(shape) > 1 and size >= BLOCK and rows * size >= SMALLEST


def scale_shape(shape: Sequence[int]) -> tuple[int, int]:
    """The shape of the scales of a tensor that :func:`suits`: rows, and blocks of a row."""
    size = 1
    for length in shape[1:]:
        size *= length
    return shape[0], -(-size // BLOCK)


def encode(value: Tensor, bits: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Store a tensor in 8 bits.

    Args:
        value: float32, of at least two dimensions, in any order in memory.
        bits: 16 random bits for each element, int32 of ``value``'s shape; ``None``: codes are rounded to nearest.

    Returns:
        The codes, ``torch.float8_e4m3fn``, contiguous, of ``value``'s shape; and the scales, float32, of
        :func:`scale_shape`.
    """
    return _stored(value, bits, _encoded)


def encode_squares(value: Tensor, bits: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Store running means of squares in 8 bits, as their roots.

    Args:
        value: float32, not negative, of at least two dimensions, in any order in memory.
        bits: as in :func:`encode`; ``None``: codes are rounded to nearest.

    Returns:
        As :func:`encode`: codes, and scales, of the roots.
    """
    return _stored(value.sqrt(), bits, _encoded_roots)


_Encode = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]


def _stored(value: Tensor, bits: Tensor | None, encoded: _Encode) -> tuple[Tensor, Tensor]:
    """Codes and scales of a tensor; ``encoded`` is called with parts of it and of the bits, divided into blocks."""
    rows, blocks = scale_shape(value.shape)
    if not value.numel():
        empty = torch.empty(value.shape, dtype=DTYPE, device=value.device)
        return empty, torch.zeros(rows, blocks, dtype=torch.float32, device=value.device)
    flat = value.reshape(rows, -1)
    flat_bits = None if bits is None else bits.reshape(rows, -1)
    # The shorter last blocks apart: Inductor (torch 2.13) crops rows wrongly that were scaled by block, see
    # findings/inductor_cropped_blocks.sh.
    whole = flat.shape[1] // BLOCK * BLOCK
    parts = []
    for begin, end, size in ((0, whole, BLOCK), (whole, flat.shape[1], flat.shape[1] - whole)):
        if begin < end:
            its_bits = None if flat_bits is None else flat_bits[:, begin:end].reshape(rows, -1, size)
            parts.append(encoded(flat[:, begin:end].reshape(rows, -1, size), its_bits))
    codes = torch.cat([part.view(rows, -1) for part, _ in parts], 1)
    return codes.view(DTYPE).view(value.shape), torch.cat([scale for _, scale in parts], 1)


def _encoded(blocked: Tensor, bits: Tensor | None) -> tuple[Tensor, Tensor]:
    """The codes of blocks as bytes, and their scales; the last dimension is the elements of a block."""
    largest = blocked.abs().amax(-1)  # NaN if any is
    lifted = (largest < _LIFTED_BELOW).to(torch.int32) * _LIFT
    lift = power_of_two(lifted)
    exponent = _exponent(largest * lift) - lifted
    exponent = exponent.clamp(_SMALLEST_SCALE, _LARGEST_SCALE)
    finite = torch.isfinite(largest)
    scale = torch.where(largest == 0, 0.0, torch.where(finite, power_of_two(exponent), torch.nan))
    inverse = power_of_two(-exponent - lifted)
    x = (blocked * lift.unsqueeze(-1)).mul_(inverse.unsqueeze(-1))
    return torch.where(finite.unsqueeze(-1), _rounded(x, bits), 0).to(torch.uint8), scale


def _encoded_roots(blocked: Tensor, bits: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same of roots."""
    largest = blocked.amax(-1)
    exponent = _exponent(largest).clamp(_SMALLEST_ROOT_SCALE, _LARGEST_SCALE)
    finite = torch.isfinite(largest)
    scale = torch.where(largest == 0, 0.0, torch.where(finite, power_of_two(exponent), torch.nan))
    x = blocked * power_of_two(-exponent).unsqueeze(-1)
    shift = torch.where(x < _NORMAL, _NORMAL, 0.0)  # below, numbers have the distance that they have above
    below = (x + shift).view(torch.int32) & -(1 << 20)
    a = below.view(torch.float32) - shift
    q = ((below & 0x7F800000) - (3 << 23)).view(torch.float32)
    chance = 2.0**-1 if bits is None else (bits.to(torch.float32) + 0.5) * 2.0**-16
    up = (x - a) * (x + a) > q * (2 * a + q) * chance
    codes = (below >> 20) - torch.where(x < _NORMAL, 968, 960) + up.to(torch.int32)
    codes = codes.clamp(max=0x7E).maximum((blocked > 0).to(torch.int32))
    return torch.where(finite.unsqueeze(-1), codes, 0).to(torch.uint8), scale


def _exponent(largest: Tensor) -> Tensor:
    """The exponent of the least power of two by which a number is at most 448, int32."""
    # The exponent of the number; 1 more if its fraction is above that of 448 = 1.75·2^8.
    return ((largest.view(torch.int32) + 0x1FFFFF) >> 23) - 127 - 8


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """The tensor that was stored: float32, contiguous, of the shape of ``codes``, which may lie in any order."""
    if not codes.numel():
        return torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    rows = scale.shape[0]
    flat = codes.reshape(rows, -1)
    whole = flat.shape[1] // BLOCK  # apart from shorter last blocks, as in encode()
    first = flat[:, : whole * BLOCK].reshape(rows, whole, BLOCK).to(torch.float32) * scale[:, :whole].unsqueeze(-1)
    last = flat[:, whole * BLOCK :].to(torch.float32) * scale[:, whole:]
    return (
        torch.cat([first.view(rows, whole * BLOCK), last], 1).view(codes.shape)
        if last.numel()
        else first.view(codes.shape)
    )


def decode_squares(codes: Tensor, scale: Tensor) -> Tensor:
    """The running means of squares whose roots were stored; otherwise as :func:`decode`."""
    return decode(codes, scale).square_().clamp_(max=torch.finfo(torch.float32).max)


def power_of_two(exponent: Tensor) -> Tensor:
    """2 to an integer power from -149 to 127, as float32; ``exponent`` is int32."""
    normal = exponent.clamp(min=-126) + 127 << 23
    tiny = torch.ones_like(exponent) << (exponent + 149).clamp(0, 22)
    return torch.where(exponent < -126, tiny, normal).view(torch.float32)


def _rounded(x: Tensor, bits: Tensor | None) -> Tensor:
    """The codes of numbers that are at most 448 in magnitude, or are limited to that, as int32 from 0 to 255."""
    sign = x.view(torch.int32) >> 24 & 0x80
    x = x.abs()
    if bits is None:
        normal = x.view(torch.int32)
        normal = (normal + 0x7FFFF + (normal >> 20 & 1) >> 20) - 960
        # Adding 2^14 rounds to a multiple of 2^-9, as float32's fraction ends there.
        small = (x + 2.0**14).view(torch.int32) - 0x46800000
    else:
        random = bits << 4
        normal = (x.view(torch.int32) + random >> 20) - 960
        small = ((x + _NORMAL).view(torch.int32) + random >> 20) - 968
    return sign | torch.where(x < _NORMAL, small, normal).clamp(max=0x7E)
