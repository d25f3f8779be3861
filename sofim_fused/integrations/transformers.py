"""SOFIM in Hugging Face's Trainer (tested with transformers 5.23.0).

from sofim_fused.integrations.transformers import attach, optimizer_cls_and_kwargs

args = TrainingArguments(..., learning_rate=2e-3, max_grad_norm=0)
trainer = Trainer(..., args=args, optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(args, max_grad_norm=1.0))
attach(trainer)
trainer.train()
"""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sofim_fused.adasofim import AdaSOFIM
from sofim_fused.integrations.accelerate import take_in_backward, watch
from sofim_fused.integrations.metrics import find_sofim, metrics
from sofim_fused.optimizer import SOFIM


def optimizer_cls_and_kwargs(
    args: TrainingArguments, cls: type[SOFIM] = AdaSOFIM, **options: Any
) -> tuple[type[SOFIM], dict[str, Any]]:
    """The class and its arguments for ``Trainer(optimizer_cls_and_kwargs=...)``.

    Args:
        args: whose ``learning_rate`` is used, and with :class:`AdaSOFIM` ``adam_beta1``, ``adam_beta2`` and
            ``adam_epsilon`` (of which β₂ = 0.999 is AdamW's default: :class:`AdaSOFIM`'s own is 0.99). The Trainer
            itself sets ``weight_decay``, by parameter.
        cls: :class:`AdaSOFIM`, or :class:`SOFIM` for the paper's form, whose learning rates are those of SGD divided by
            1 - momentum.
        options: arguments of the class, which come before those of ``args``. To clip inside the step, pass
            ``max_grad_norm`` here and 0 to ``TrainingArguments``, which is 1 by default.

    Raises:
        ValueError: ``max_grad_norm`` is to be used twice, or ``in_backward=True`` with clipping.
    """
    if args.max_grad_norm and options.get("in_backward"):
        raise ValueError(
            f"in_backward=True with TrainingArguments(max_grad_norm={args.max_grad_norm}): gradients are in their "
            "moments before the Trainer clips them: set max_grad_norm=0 there (its default is 1)"
        )
    if args.max_grad_norm and options.get("max_grad_norm") is not None:
        raise ValueError(
            f"max_grad_norm={options['max_grad_norm']} beside TrainingArguments(max_grad_norm={args.max_grad_norm}): "
            "gradients would be clipped twice: set max_grad_norm=0 there (its default is 1)"
        )
    kwargs: dict[str, Any] = {"lr": args.learning_rate}
    if issubclass(cls, AdaSOFIM):
        kwargs["eps"] = args.adam_epsilon
        if not {"momentum", "beta2"} & set(options):
            kwargs["betas"] = (args.adam_beta1, args.adam_beta2)
    return cls, {**kwargs, **options}


def attach(trainer: Trainer) -> SOFIMCallback:
    """Give a Trainer a :class:`SOFIMCallback`, before all others, so that TensorBoard and others get its numbers.

    Returns:
        The callback.
    """
    callback = SOFIMCallback(trainer)
    trainer.callback_handler.callbacks.insert(0, callback)
    return callback


class SOFIMCallback(TrainerCallback):
    """Adds :func:`~sofim_fused.integrations.metrics.metrics` to what the Trainer logs, as ``sofim/lr`` and so on.

    The Trainer's own ``grad_norm`` is its measurement, which reads all gradients once more; ``sofim/grad_norm`` is
    SOFIM's (with ``max_grad_norm`` or ``skip_nonfinite``).

    Args:
        trainer: with ``in_backward=True`` it is needed. :func:`attach` passes it, and puts the callback first: in
            ``Trainer(callbacks=[SOFIMCallback()])`` callbacks of loggers come before this one, and only the Trainer's
            ``log_history`` and its printed lines have the numbers.
    """

    def __init__(self, trainer: Trainer | None = None) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called by the Trainer, when the optimizer is there.

        Raises:
            TypeError: the optimizer is no :class:`SOFIM`.
            ValueError: ``in_backward=True`` without a Trainer, or with ``max_grad_norm`` in the Trainer's arguments.
        """
        optimizer = kwargs.get("optimizer")
        sofim = find_sofim(optimizer)
        if sofim is None:
            raise TypeError(
                f"SOFIMCallback with a {type(optimizer).__name__}: pass "
                "optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(args) to the Trainer"
            )
        if not watch(sofim):
            return
        if self._trainer is None:
            raise ValueError("in_backward=True: call attach(trainer) instead of passing SOFIMCallback() to the Trainer")
        if args.max_grad_norm:
            raise ValueError(
                f"in_backward=True with TrainingArguments(max_grad_norm={args.max_grad_norm}): gradients are in their "
                "moments before the Trainer clips them: set max_grad_norm=0 there (its default is 1)"
            )
        take_in_backward(self._trainer.accelerator, lambda: [sofim])

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Called by the Trainer. Adds to lines with a training loss, not to those of evaluations."""
        if logs is None or "loss" not in logs:
            return
        found = {f"sofim/{name}": value for name, value in metrics(kwargs.get("optimizer")).items()}
        logs.update(found)
        if state.log_history:
            state.log_history[-1].update(found)
