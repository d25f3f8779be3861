"""SOFIM under Lightning (tested with pytorch-lightning 2.6.6; the package ``lightning`` has the same classes).

from sofim_fused.integrations.lightning import SOFIMCallback

trainer = Trainer(precision="bf16-mixed", gradient_clip_val=1.0, callbacks=[SOFIMCallback()])
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from sofim_fused.integrations.metrics import find_sofim, metrics
from sofim_fused.optimizer import SOFIM

# Classes of the one are not accepted by the other: take that which the program uses.
if "lightning.pytorch" in sys.modules:
    from lightning.pytorch import Callback
else:
    try:
        from pytorch_lightning import Callback
    except ImportError:
        from lightning.pytorch import Callback


class SOFIMCallback(Callback):
    """Logs what :class:`SOFIM` knows of its steps, clips inside of them, and tells ``in_backward`` what accumulates.

    - It logs :func:`~sofim_fused.integrations.metrics.metrics` as ``sofim/lr`` and so on, as often as the Trainer logs
      (``log_every_n_steps``). With several optimizers: ``sofim0/lr``, ``sofim1/lr``.
    - ``gradient_clip_val`` (by norm) becomes the optimizer's ``max_grad_norm``: each step then clips without another
      pass over the gradients, also in mixed precision, where Lightning refuses to clip for optimizers that unscale
      gradients themselves.
    - With ``in_backward=True`` it marks the backward passes of ``accumulate_grad_batches`` that are not the last of a
      step (in Lightning's automatic optimization; in a manual one, call :meth:`SOFIM.accumulate_grads` yourself).

    Args:
        clip: whether to move the clipping into the step.
    """

    def __init__(self, clip: bool = True) -> None:
        self._clip = clip
        self._moved: float | None = None
        self._accumulating = contextlib.ExitStack()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Called by Lightning, after a checkpoint was loaded.

        Raises:
            TypeError: no optimizer is a :class:`SOFIM`.
            ValueError: ``in_backward=True`` with ``gradient_clip_val``.
        """
        found = self._found(trainer)
        if not found:
            kinds = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers) or "no optimizer"
            raise TypeError(f"SOFIMCallback with {kinds}: return a SOFIM from configure_optimizers(), or leave it out")
        limit = trainer.gradient_clip_val
        if not limit:
            return
        if any(sofim._backward is not None for sofim in found):
            raise ValueError(
                f"in_backward=True with Trainer(gradient_clip_val={limit}): gradients are in their moments before "
                "Lightning clips them: leave out one of them"
            )
        by_norm = str(getattr(trainer.gradient_clip_algorithm, "value", trainer.gradient_clip_algorithm) or "norm")
        if self._clip and by_norm == "norm" and len(found) == len(trainer.optimizers):
            for sofim in found:
                for group in (*sofim.param_groups, sofim.defaults):
                    group["max_grad_norm"] = float(limit)
            self._moved, trainer.gradient_clip_val = limit, None

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Called by Lightning: the Trainer has its ``gradient_clip_val`` again."""
        if self._moved is not None:
            self._moved, trainer.gradient_clip_val = None, self._moved

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        """Called by Lightning."""
        self._accumulating.close()  # an error may have ended the last backward pass
        if pl_module.automatic_optimization and trainer.fit_loop._should_accumulate():
            for sofim in self._found(trainer):
                self._accumulating.enter_context(sofim.accumulate_grads())

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Called by Lightning."""
        self._accumulating.close()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Called by Lightning. Reads values from the device only when the Trainer logs."""
        if not trainer.logger or not trainer._logger_connector.should_update_logs:
            return
        found = self._found(trainer)
        for index, sofim in enumerate(found):
            prefix = "sofim" if len(found) == 1 else f"sofim{index}"
            pl_module.log_dict({f"{prefix}/{name}": value for name, value in metrics(sofim).items()})

    @staticmethod
    def _found(trainer: Any) -> list[SOFIM]:
        return [sofim for sofim in map(find_sofim, trainer.optimizers) if sofim is not None]
