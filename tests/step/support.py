"""Shared by tests of steps: how far results are from those of the oracle, and how far they may be."""

from __future__ import annotations

import torch
from torch import Tensor

from sofim_fused import SOFIM
from tests.support.oracle import Oracle, real64

TOLERANCES = {
    torch.float64: 1e-12,
    torch.complex128: 1e-12,
    torch.float32: 5e-6,
    torch.complex64: 5e-6,
}


def distance(params: list[Tensor], oracle: Oracle) -> float:
    """The largest deviation in any tensor, relative to that tensor's norm."""
    pairs = [(real64(p), w) for p, w in zip(params, oracle.weights, strict=True) if w.numel()]
    return max(((p - w).norm() / w.norm()).item() for p, w in pairs)


EPSILON = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half an ulp, relative
SMALLEST = {torch.bfloat16: 0.0, torch.float16: 2.0**-25}  # half of the smallest subnormal


def within(actual: Tensor, expected: Tensor, bound: Tensor) -> bool:
    return bool(((actual - expected).abs() <= bound).all())


def moment_of(optimizer: SOFIM, p: Tensor) -> Tensor:
    return real64(optimizer.state[p]["exp_avg"] if p in optimizer.state else torch.zeros_like(p))


def full_weight(optimizer: SOFIM, p: Tensor) -> Tensor:
    kahan = optimizer.state[p].get("kahan") if p in optimizer.state else None
    return real64(p) if kahan is None else real64(p) + real64(kahan)


def variances_of(optimizer: SOFIM, p: Tensor) -> dict[str, Tensor]:
    """The running means of g² of a parameter, in float64, as the oracle has them."""
    known = optimizer.state.get(p, {})
    return {name: real64(known[name]) for name in ("row_var", "col_var", "variance") if name in known}


def weight_bound(weight: Tensor, dtype: torch.dtype, kahan: bool) -> Tensor:
    exact = 1e-6 * (weight + 0.1)
    if dtype not in EPSILON:
        return exact
    once = EPSILON[dtype] * weight
    return exact + (EPSILON[dtype] * once * 2 if kahan else once) + SMALLEST[dtype]
