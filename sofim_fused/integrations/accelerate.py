"""SOFIM under Hugging Face's Accelerate (tested with 1.15.0).

A plain :class:`SOFIM` needs nothing from here: ``accelerator.prepare(model, optimizer)`` works as for every optimizer.
:func:`prepare` adds what Accelerate cannot know: its wrapper shows :attr:`~SOFIM.grad_norm` and the other results of a
step, and ``in_backward=True`` works with gradient accumulation, FSDP2 and ``release_grads``.

    from sofim_fused import SOFIM
    from sofim_fused.integrations.accelerate import prepare

    model, optimizer, loader = prepare(accelerator, model, SOFIM(model.parameters(), in_backward=True), loader)
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor

from sofim_fused.integrations.metrics import find_sofim, norm_of_gradients
from sofim_fused.optimizer import SOFIM


class AcceleratedSOFIM(AcceleratedOptimizer):
    """Accelerate's wrapper, which also shows what the SOFIM inside of it knows of its last step.

    :func:`prepare` returns it. The properties are those of :class:`SOFIM`.
    """

    @property
    def grad_norm(self) -> Tensor | None:
        """See :attr:`SOFIM.grad_norm`: a 0-dimensional float64 tensor on the device, or ``None``."""
        return self._sofim.grad_norm

    @property
    def signal(self) -> Tensor | None:
        """See :attr:`SOFIM.signal`: a float64 vector on the device, or ``None``."""
        return self._sofim.signal

    @property
    def skipped_steps(self) -> Tensor:
        """See :attr:`SOFIM.skipped_steps`: a 0-dimensional int64 tensor on the device."""
        return self._sofim.skipped_steps

    def accumulate_grads(self) -> contextlib.AbstractContextManager[None]:
        """See :meth:`SOFIM.accumulate_grads`. Not needed with ``accelerator.accumulate()``."""
        return self._sofim.accumulate_grads()

    @property
    def _sofim(self) -> SOFIM:
        found = find_sofim(self.optimizer)
        assert found is not None
        return found


def prepare(accelerator: Accelerator, *objects: Any, **options: Any) -> Any:
    """``accelerator.prepare()``, after which SOFIM's properties and ``in_backward=True`` work as without Accelerate.

    Args:
        accelerator: yours.
        objects: models, optimizers, loaders and schedulers, as ``accelerator.prepare()`` takes them.
        options: of ``accelerator.prepare()``.

    Returns:
        What ``accelerator.prepare()`` returns. Each wrapper around a :class:`SOFIM` is now an
        :class:`AcceleratedSOFIM`.
    """
    prepared = accelerator.prepare(*objects, **options)
    taking = []
    for thing in prepared if isinstance(prepared, tuple | list) else (prepared,):
        sofim = find_sofim(thing) if isinstance(thing, AcceleratedOptimizer) else None
        if sofim is None:
            continue
        thing.__class__ = AcceleratedSOFIM  # Accelerate keeps this very object in a list, to save and load it
        if watch(sofim):
            taking.append(sofim)
    if taking:
        take_in_backward(accelerator, lambda: taking)
    return prepared


def watch(sofim: SOFIM) -> bool:
    """Whether it takes gradients in the backward pass; if so, put its hooks on the parameters that it has now.

    ``fully_shard()``, and so Accelerate with FSDP2, puts other parameters in the groups. SOFIM would notice that in its
    first step, and release no gradient before.
    """
    if sofim._backward is None:
        return False
    sofim._backward.watch()
    return True


def take_in_backward(accelerator: Accelerator, optimizers: Callable[[], Iterable[SOFIM]]) -> None:
    """Tell optimizers with ``in_backward=True`` which backward pass is the last one of a step.

    It replaces two methods of this one ``Accelerator``. ``backward()`` calls :meth:`SOFIM.accumulate_grads` around all
    backward passes but the last one of a step. ``clip_grad_norm_()`` only measures: it returns the norm, or ``None`` if
    no gradients are left, and raises a ``RuntimeError`` if it is to clip, because gradients are in their moments by
    then. A second call for the same ``Accelerator`` changes only which optimizers are asked for.

    Args:
        accelerator: yours.
        optimizers: returns those that are in use now.
    """
    known: list[Callable[[], Iterable[SOFIM]]] = accelerator.__dict__.setdefault("_sofim_optimizers", [])
    if known:
        known[:] = [optimizers]
        return
    known.append(optimizers)
    backward, clip = accelerator.backward, accelerator.clip_grad_norm_

    @functools.wraps(backward)
    def accumulating(loss: Tensor, **options: Any) -> None:
        with contextlib.ExitStack() as stack:
            for sofim in known[0]() if not accelerator.sync_gradients else ():
                stack.enter_context(sofim.accumulate_grads())
            backward(loss, **options)

    @functools.wraps(clip)
    def measuring(parameters: Any, max_norm: float, norm_type: float = 2) -> Tensor | None:
        if not any(sofim._backward is not None for sofim in known[0]()):
            clipped: Tensor | None = clip(parameters, max_norm, norm_type)
            return clipped
        if not math.isinf(max_norm):
            raise RuntimeError(
                f"clip_grad_norm_(max_norm={max_norm}) with in_backward=True: the gradients are in their moments "
                "already. Leave out this call (Hugging Face's Trainer: max_grad_norm=0), or make the optimizer with "
                "max_grad_norm= and without in_backward"
            )
        return norm_of_gradients([parameters] if isinstance(parameters, Tensor) else parameters)

    accelerator.backward = accumulating
    accelerator.clip_grad_norm_ = measuring
