"""Backends: who computes the passes on which device."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sofim_fused.backends import cpu, cuda, triton
from sofim_fused.backends.in_turn import apart
from sofim_fused.backends.protocol import (
    Coefficients,
    Decay,
    GradientStep,
    NativeOverlap,
    NativeStep,
    Passes,
    Sums,
    Tiles,
    sum_dtype,
)
from sofim_fused.backends.reference import ReferencePasses
from sofim_fused.backends.triton import capturing

__all__ = [
    "Coefficients",
    "Decay",
    "GradientStep",
    "NativeOverlap",
    "NativeStep",
    "Passes",
    "Sums",
    "Tiles",
    "apart",
    "capturing",
    "choose",
    "names",
    "requested",
    "sum_dtype",
]

# Name, and a function that gives the backend's passes for a device or the reason why it cannot run there.
# The best comes first; "auto" takes the first that can run. On a GPU no measurement has yet decided between the two.
_REGISTRY: dict[str, Callable[[torch.device], Passes | str]] = {
    "cpu": cpu.passes_for,
    "cuda": cuda.passes_for,
    "triton": triton.passes_for,
    "reference": lambda device: ReferencePasses(),
}
NATIVE = "native"  # what fused=True asks for: the best backend that is not pure PyTorch


def names() -> list[str]:
    """The values that ``backend=`` takes."""
    return ["auto", *_REGISTRY]


def requested(backend: str, foreach: bool | None, fused: bool | None) -> str:
    """The backend that a constructor's three arguments ask for together, as :func:`choose` takes it.

    ``foreach`` (either value) and ``fused=False`` are how generic code asks ``torch.optim`` for pure PyTorch.

    Raises:
        ValueError: the backend is unknown, or the arguments contradict each other.
        TypeError: ``foreach`` or ``fused`` is neither a bool nor ``None``.
    """
    if backend not in names():
        raise ValueError(f"backend={backend!r} is unknown: take one of {', '.join(map(repr, names()))}")
    for name, value in (("foreach", foreach), ("fused", fused)):
        if not (value is None or isinstance(value, bool)):
            raise TypeError(f"{name}={value!r}: pass True, False or None")
    if fused:
        if foreach or backend == "reference":
            other = "foreach=True" if foreach else "backend='reference'"
            raise ValueError(f"fused=True asks for a native backend, {other} for pure PyTorch: leave one of them out")
        return NATIVE if backend == "auto" else backend
    return "reference" if backend == "auto" and (foreach is not None or fused is False) else backend


def choose(backend: str, device: torch.device) -> Passes:
    """The passes for ``device``: those of ``backend``, or the best that can run (``"auto"``; ``NATIVE``: natively).

    Raises:
        RuntimeError: the backend cannot run on this device; the message has its reason.
    """
    candidates = {"auto": list(_REGISTRY), NATIVE: [name for name in _REGISTRY if name != "reference"]}
    reasons = []
    for name in candidates.get(backend, [backend]):
        found = _REGISTRY[name](device)
        if isinstance(found, str):
            reasons.append(f"{name}: {found}")
        elif found.emulated and name != backend:
            reasons.append(f"{name}: it is emulated here, and runs only if asked for by name")
        else:
            return found
    asked = "fused=True" if backend == NATIVE else f"backend={backend!r}"
    raise RuntimeError(f"{asked} cannot run on {device} ({'; '.join(reasons)}): take backend='auto'")
