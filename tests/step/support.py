"""Shared by tests of steps: how far results are from those of the oracle, and how far they may be."""

from __future__ import annotations

import torch
from torch import Tensor

from sofim_fused import SOFIM, blockwise
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


def lost_bits(dtype: torch.dtype, kahan: bool | None) -> str | None:
    """The state that keeps what weights of a dtype lose, by the option ``kahan`` and the default of the other one."""
    if dtype == torch.bfloat16 and kahan is None:
        return "master_bits"
    return "kahan" if dtype in EPSILON and kahan is not False else None


def full_weight(optimizer: SOFIM, p: Tensor) -> Tensor:
    known = optimizer.state.get(p, {})
    if "master_bits" in known:
        return joined64(p, known["master_bits"])
    return real64(p) + real64(known["kahan"]) if "kahan" in known else real64(p)


def joined64(shown: Tensor, rest: Tensor) -> Tensor:
    """The float32 weights of two halves, from Python's integers, in float64."""
    whole = [
        (a << 16) + b & 0xFFFFFFFF
        for a, b in zip(shown.detach().view(torch.int16).flatten().tolist(), rest.flatten().tolist(), strict=True)
    ]
    bits = torch.tensor(whole, dtype=torch.int64, device=shown.device).to(torch.int32)
    return bits.view(torch.float32).view(shown.shape).double()


def variances_of(optimizer: SOFIM, p: Tensor) -> dict[str, Tensor]:
    """The running means of g² of a parameter, in float64, as the oracle has them."""
    known = optimizer.state.get(p, {})
    if "variance_scale" in known:
        return {"variance": blockwise.decode_squares(known["variance"], known["variance_scale"]).double()}
    return {name: real64(known[name]) for name in ("row_var", "col_var", "variance") if name in known}


def weight_bound(weight: Tensor, dtype: torch.dtype, lost: str | None) -> Tensor:
    """What an update may be off; ``lost``: the name of the bits that are kept beside a 16-bit weight."""
    exact = 1e-6 * (weight + 0.1)
    if dtype not in EPSILON or lost == "master_bits":
        return exact
    once = EPSILON[dtype] * weight
    return exact + (EPSILON[dtype] * once * 2 if lost else once) + SMALLEST[dtype]
