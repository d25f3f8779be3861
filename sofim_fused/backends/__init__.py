"""Backends: the registry that says which backend computes the passes on which device."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable

import torch

from sofim_fused import native
from sofim_fused.backends import cpu, cuda, triton
from sofim_fused.backends.adaptive import TorchAdaptive
from sofim_fused.backends.interface import (
    FISHER,
    NUMERATORS,
    AdaptivePasses,
    Coefficients,
    Decay,
    GradientStep,
    GuardSettings,
    NativeInBackward,
    NativeResult,
    NativeSharded,
    NativeStep,
    Passes,
    ScaledSums,
    Settings,
    Squares,
    StepTensors,
    Sums,
    Variance,
    fisher_blocks,
    sum_dtype,
)
from sofim_fused.backends.reference import ReferencePasses
from sofim_fused.backends.shared_memory import apart
from sofim_fused.backends.solve import gradient_step, no_sums, on_device_of, sum_of
from sofim_fused.backends.triton.launch import capturing

__all__ = [
    "FISHER",
    "NUMERATORS",
    "AdaptivePasses",
    "Coefficients",
    "Decay",
    "GradientStep",
    "GuardSettings",
    "NativeInBackward",
    "NativeResult",
    "NativeSharded",
    "NativeStep",
    "Passes",
    "ScaledSums",
    "Settings",
    "Squares",
    "StepTensors",
    "Sums",
    "TorchAdaptive",
    "Variance",
    "apart",
    "capturing",
    "choose",
    "fisher_blocks",
    "gradient_step",
    "names",
    "no_sums",
    "on_device_of",
    "requested",
    "sum_dtype",
    "sum_of",
]

# Name, and a function that gives the backend's passes for a device or the reason why it cannot run there.
# Best first: "auto" takes the first that can run. For GPUs, no measurement has yet decided which of the two is better.
_REGISTRY: dict[str, Callable[[torch.device], Passes | str]] = {
    "cpu": cpu.passes_for,
    "cuda": cuda.passes_for,
    "triton": triton.passes_for,
    "reference": lambda device: ReferencePasses(),
}
NATIVE = "native"  # what fused=True asks for: the best backend that is not pure PyTorch
# The backends that a user may expect, by the kind of device. Other kinds have only the reference.
_NATIVE_ON = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
_WARNED: set[str] = set()  # kinds of devices for which the warning was given
_CODES = "moments in 8 bits (state_dtype=torch.float8_e4m3fn)"
_SECOND_CODES = "second moments in 8 bits (diagonal='element' with state_dtype=torch.float8_e4m3fn)"
_NO_CODES, _NO_SECOND_CODES = f"it does not take {_CODES}", f"it does not take {_SECOND_CODES}"


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


def choose(backend: str, device: torch.device, blockwise: bool = False, blockwise_variance: bool = False) -> Passes:
    """The passes for ``device``: those of ``backend``, or the best that can run (``"auto"``; ``NATIVE``: natively).

    ``blockwise``: they have to take moments that are stored in 8 bits; ``blockwise_variance``: and second moments.

    If ``"auto"`` falls back to the reference where a native backend is expected, a ``UserWarning`` says why there is
    none and how to build it: once per process and kind of device.

    Raises:
        RuntimeError: the backend cannot run on this device; the message has its reason.
    """
    passes, reasons = best(backend, device, blockwise, blockwise_variance)
    if passes is not None:
        if backend == "auto" and passes.name == "reference" and not torch.compiler.is_compiling():
            if _NO_SECOND_CODES in reasons.values():
                _warn_of_codes(device, _SECOND_CODES)
            elif _NO_CODES in reasons.values():
                _warn_of_codes(device, _CODES)
            else:
                _warn(device, reasons)
        return passes
    asked = "fused=True" if backend == NATIVE else f"backend={backend!r}"
    built = {*reasons} & {*_NATIVE_ON.get(device.type, ())} - {"triton"}  # another build may provide these
    rebuild = f", or build the package again: {native.INSTALL} ." if built else ""
    if {_NO_CODES, _NO_SECOND_CODES} & {*reasons.values()}:
        rebuild = ", which computes these moments in pure PyTorch, or another state_dtype"
    raise RuntimeError(f"{asked} cannot run on {device} ({_listed(reasons)}): take backend='auto'{rebuild}")


def best(
    backend: str, device: torch.device, blockwise: bool = False, blockwise_variance: bool = False
) -> tuple[Passes | None, dict[str, str]]:
    """As :func:`choose`, without warning or error: the passes, if any can run, and why each better backend cannot."""
    candidates = {"auto": list(_REGISTRY), NATIVE: [name for name in _REGISTRY if name != "reference"]}
    reasons = {}
    for name in candidates.get(backend, [backend]):
        found = _REGISTRY[name](device)
        if isinstance(found, str):
            reasons[name] = found
        elif found.emulated and name != backend:
            reasons[name] = "it is emulated here, and runs only if asked for by name"
        elif blockwise and not found.blockwise:
            reasons[name] = _NO_CODES
        elif blockwise_variance and not found.blockwise_variance:
            reasons[name] = _NO_SECOND_CODES
        else:
            return found, reasons
    return None, reasons


def missing(device: torch.device) -> bool:
    """Whether a native backend is expected on ``device``, given that none can run there.

    ``False`` for kinds of devices that have none, for a GPU that does not exist (of fake tensors), and for the CPU if
    the native part was left out on purpose.
    """
    if device.type == "cpu":
        return bool(native.build()["expected"])
    return device.type in _NATIVE_ON and torch.cuda.is_available()


def _warn(device: torch.device, reasons: dict[str, str]) -> None:
    """Warn, once for a kind of device, that native kernels are missing there."""
    if device.type in _WARNED or not missing(device):
        return
    relevant = {name: reason for name, reason in reasons.items() if name in _NATIVE_ON[device.type]}
    _warn_caller(
        f"SOFIM runs in pure PyTorch on {device.type}, many times slower than with its native kernels, which cannot be "
        f"used ({_listed(relevant)}). Install what is missing, if anything, then build them: {native.remedy()}. "
        "python -m sofim_fused.info shows what is used; backend='reference' selects pure PyTorch without this warning."
    )
    _WARNED.add(device.type)  # not reached if warnings are errors


def _warn_of_codes(device: torch.device, codes: str) -> None:
    """Warn, once for a kind of device, that there are native kernels, but not for ``codes``."""
    kind = f"{device.type}, {codes}"
    if kind in _WARNED:
        return
    _warn_caller(
        f"SOFIM runs in pure PyTorch on {device.type}, many times slower than with its native kernels, which do not "
        f"take {codes}. state_dtype=torch.bfloat16 runs natively; "
        "backend='reference' selects pure PyTorch without this warning."
    )
    _WARNED.add(kind)


def _warn_caller(message: str) -> None:
    """Give a warning that points to the line that called this package."""
    frame, level, inside = sys._getframe(), 1, ("sofim_fused", "torch")
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in inside:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


def _listed(reasons: dict[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
