"""Backends: who computes the passes on which device."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sofim_fused.backends.protocol import Coefficients, Decay, GradientStep, Passes, Sums, Tiles, sum_dtype
from sofim_fused.backends.reference import ReferencePasses

__all__ = [
    "Coefficients",
    "Decay",
    "GradientStep",
    "Passes",
    "Sums",
    "Tiles",
    "choose",
    "names",
    "requested",
    "sum_dtype",
]

# Name, and a function that gives the backend's passes for a device or the reason why it cannot run there.
# The best comes first; "auto" takes the first that can run.
_REGISTRY: dict[str, Callable[[torch.device], Passes | str]] = {
    "reference": lambda device: ReferencePasses(),
}


def names() -> list[str]:
    """The values that ``backend=`` takes."""
    return ["auto", *_REGISTRY]


def requested(backend: str, foreach: bool | None, fused: bool | None) -> str:
    """The backend that a constructor's three arguments ask for together.

    ``foreach`` (either value) and ``fused=False`` are how generic code asks ``torch.optim`` for pure PyTorch.

    Raises:
        ValueError: the backend is unknown.
        TypeError: ``foreach`` or ``fused`` is neither a bool nor ``None``.
    """
    if backend not in names():
        raise ValueError(f"backend={backend!r} is unknown: take one of {', '.join(map(repr, names()))}")
    for name, value in (("foreach", foreach), ("fused", fused)):
        if not (value is None or isinstance(value, bool)):
            raise TypeError(f"{name}={value!r}: pass True, False or None")
    if backend == "auto" and (foreach is not None or fused is False):
        return "reference"
    return backend


def choose(backend: str, device: torch.device) -> Passes:
    """The passes for ``device``: those of ``backend`` (one of :func:`names`), or with ``"auto"`` the best that can run.

    Raises:
        RuntimeError: the backend cannot run on this device; the message has its reason.
    """
    reasons = []
    for name in _REGISTRY if backend == "auto" else [backend]:
        found = _REGISTRY[name](device)
        if not isinstance(found, str):
            return found
        reasons.append(f"{name}: {found}")
    raise RuntimeError(f"backend={backend!r} cannot run on {device} ({'; '.join(reasons)}): take backend='auto'")
