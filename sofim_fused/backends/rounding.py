"""Stochastic rounding: the random bits, and how moments are rounded with them, the same in every backend.

Moments become bfloat16, or codes of 8 bits (:mod:`sofim_fused.blockwise`); weights may have 24 bits
(:mod:`sofim_fused.backends.master_bits`).

The bits are a function of (seed, step, parameter ordinal, element index) and of nothing else, so that a run can be
repeated, resumed and replicated bit for bit on any backend.
"""

from __future__ import annotations

import torch
from torch import Tensor

SEED = 0x50F1  # the same for all: data-parallel replicas have to round alike
WEYL = 0x9E3779B9  # 2**32 / golden ratio, odd: the multiples of neighbouring indices are far apart
_LOW = 0xFFFFFFFF


def mix(x: Tensor) -> Tensor:
    """Scramble 32-bit values held in int64 (xor-shift and multiply, the constants of Wellons' ``lowbias32``)."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _LOW
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _LOW  # wraps around in int64, but the low 32 bits are right
    return x ^ (x >> 16)


def random_bits(like: Tensor, step: Tensor, ordinal: int, seed: int = SEED) -> Tensor:
    """16 random bits for each element of ``like``.

    Args:
        like: a dense tensor of any shape; element i is the i-th in its memory order.
        step: 0-dimensional, the number of the update (from 1), on ``like``'s device.
        ordinal: the parameter's place in the optimizer.
        seed: any non-negative integer below 2**32.

    Returns:
        int32, of ``like``'s shape and strides, values in [0, 2**16).
    """
    return _in_order(like, _hashed(like, step, ordinal, seed) >> 16)


def random_bytes(like: Tensor, step: Tensor, ordinal: int, seed: int = SEED) -> Tensor:
    """8 random bits for each element of ``like``, none of which :func:`random_bits` has.

    Arguments and result are as there; values are in [0, 2**8).
    """
    return _in_order(like, _hashed(like, step, ordinal, seed) & 0xFF)


def other_random_bits(like: Tensor, step: Tensor, ordinal: int, seed: int = SEED) -> Tensor:
    """16 random bits for each element of ``like``, none of which :func:`random_bits` has.

    The lower half of the same hash. Its less significant byte is that of :func:`random_bytes`. Arguments and result are
    those of :func:`random_bits`.
    """
    return _in_order(like, _hashed(like, step, ordinal, seed) & 0xFFFF)


def _in_order(like: Tensor, bits: Tensor) -> Tensor:
    return bits.to(torch.int32).as_strided(like.shape, like.stride())


def _hashed(like: Tensor, step: Tensor, ordinal: int, seed: int) -> Tensor:
    key = mix(torch.full((), (seed + ordinal * WEYL) & _LOW, dtype=torch.int64, device=like.device))
    key = mix(key ^ (step.to(torch.int64) & _LOW))
    index = torch.arange(like.numel(), dtype=torch.int64, device=like.device)
    lane = mix(key ^ (index >> 32)) if like.numel() > _LOW else mix(key)
    return mix((lane + (index & _LOW) * WEYL) & _LOW)


def round_stochastic(value: Tensor, bits: Tensor) -> Tensor:
    """Round float32 ``value`` stochastically to bfloat16, with random ``bits``.

    The probability of rounding up in magnitude is the part that is cut off, in units of the last bit that is kept.
    ``bits`` is int32 in [0, 2**16), of ``value``'s shape. Infinities and NaN are unchanged.
    """
    raised = ((value.view(torch.int32) + bits) & ~0xFFFF).view(torch.float32)
    return torch.where(torch.isfinite(value), raised, value).to(torch.bfloat16)
