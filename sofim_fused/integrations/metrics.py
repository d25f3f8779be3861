"""What an optimizer knows of its last step, as numbers that a logger takes. Needs no other package."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from sofim_fused.optimizer import SOFIM

WRAPPED = ("optimizer", "_optimizer", "base_optimizer", "_base_optimizer", "optim")
"""Where wrappers keep their optimizer: Accelerate, DeepSpeed and schedulers; Lightning; SAM; timm; PyTorch's ZeRO."""


def find_sofim(optimizer: Any) -> SOFIM | None:
    """The :class:`SOFIM` that an optimizer is, or that is somewhere inside a framework's wrapper; else ``None``."""
    seen: set[int] = set()
    while optimizer is not None and id(optimizer) not in seen:
        seen.add(id(optimizer))
        inside = next((vars(optimizer)[name] for name in WRAPPED if name in _attributes(optimizer)), None)
        # A wrapper may pretend to be the class that it wraps (Lightning's does), so what is inside comes first.
        if isinstance(optimizer, SOFIM) and inside is None:
            return optimizer
        optimizer = inside
    return None


def metrics(optimizer: Any) -> dict[str, float]:
    """What an optimizer knows of its last step, as Python numbers.

    Reading them waits for the device, so call this when you log, not in every step.

    Args:
        optimizer: a :class:`SOFIM`, or a framework's wrapper around one.

    Returns:
        ``lr`` and, unless it is ``None``, ``rho``, as the groups have them now (a scheduler may have set those of the
        next step already); ``skipped_steps``; and, where the last step has taken them, ``grad_norm`` (the norm of all
        gradients before clipping) and ``signal``. Where groups, or Fisher blocks, have
        different values, ``lr_min`` and ``lr_max`` stand for ``lr``, and likewise for the others.

    Raises:
        TypeError: there is no :class:`SOFIM` in it.
    """
    sofim = find_sofim(optimizer)
    if sofim is None:
        raise TypeError(f"metrics() of a {type(optimizer).__name__}: pass a SOFIM, or a framework's wrapper around one")
    found: dict[str, float] = {}
    for name in ("lr", "rho"):
        _add(found, name, (float(group[name]) for group in sofim.param_groups if group[name] is not None))
    found["skipped_steps"] = float(sofim.skipped_steps)
    if sofim.grad_norm is not None:
        found["grad_norm"] = float(sofim.grad_norm)
    if sofim.signal is not None:
        _add(found, "signal", sofim.signal.tolist())
    return found


def _attributes(thing: Any) -> dict[str, Any]:
    return getattr(thing, "__dict__", {})


def _add(found: dict[str, float], name: str, values: Iterable[float]) -> None:
    values = set(values)
    if len(values) == 1:
        found[name] = values.pop()
    elif values:
        found[f"{name}_min"], found[f"{name}_max"] = min(values), max(values)


def norm_of_gradients(parameters: Iterable[torch.Tensor]) -> torch.Tensor | None:
    """The norm of gradients, which are only read; ``None`` if there are none.

    ``torch.nn.utils.clip_grad_norm_`` writes to the gradients even where it has nothing to clip.
    """
    grads = [param.grad for param in parameters if param.grad is not None]
    if not grads:
        return None
    norm = torch.nn.utils.get_total_norm(grads)
    full = getattr(norm, "full_tensor", None)  # of a DTensor: over all ranks
    return norm if full is None else full()
