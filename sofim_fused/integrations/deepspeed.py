"""SOFIM under DeepSpeed's ZeRO-1 and ZeRO-2 (tested with 0.19.8).

    from sofim_fused.integrations.deepspeed import initialize

    engine, optimizer, _, _ = initialize(model, config, lr=2e-3, max_grad_norm=1.0)

ZeRO gives each rank a part of the parameters, as one flat tensor per group. So the sums that a step needs go over ranks
(``shard_group``); and a diagonal has no rows and columns to go by: ``"factored"`` keeps a number per element, as AdamW
does, divided among the ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import deepspeed
from torch import distributed, nn

from sofim_fused.adasofim import AdaSOFIM
from sofim_fused.optimizer import SOFIM


def initialize(
    model: nn.Module,
    config: dict[str, Any],
    *,
    cls: type[SOFIM] = AdaSOFIM,
    params: Iterable[Any] | None = None,
    shard_group: Any = None,
    deepspeed_options: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Any, ...]:
    """``deepspeed.initialize()`` with a :class:`SOFIM` whose sums go over all ranks that have a part.

    Args:
        model: to train.
        config: DeepSpeed's, with ``zero_optimization.stage`` 0, 1 or 2. A copy is used, in which untested optimizers
            are allowed; where ``max_grad_norm`` is among the options, DeepSpeed's own clipping, to 1 by default under
            ZeRO, is switched off.
        cls: :class:`AdaSOFIM` or :class:`SOFIM`.
        params: parameters or groups; all of the model's by default.
        shard_group: the ranks that hold a part; all by default. With a model that is parallel in other ways, too: the
            ranks that together have the whole model once.
        deepspeed_options: other arguments of ``deepspeed.initialize()``.
        options: arguments of the class.

    Returns:
        What ``deepspeed.initialize()`` returns: the engine, the optimizer, the data loader, the scheduler.

    Raises:
        ValueError: the stage is 3, whose parameters are gone between steps, or both sides are to clip; or an argument
            that the class refuses.
    """
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2):
        raise ValueError(f"zero_optimization.stage={stage!r}: take 1 or 2; or FSDP2, which shards parameters too")
    clipping = config.get("gradient_clipping", 0)
    if clipping and options.get("max_grad_norm") is not None:
        raise ValueError(
            f"max_grad_norm={options['max_grad_norm']} beside gradient_clipping={clipping} in DeepSpeed's config: "
            "gradients would be clipped twice: leave out one of them"
        )
    config = copy.deepcopy(config)
    if "optimizer" in config:
        raise ValueError("DeepSpeed's config has an optimizer: leave it out, and pass its arguments here")
    config["zero_allow_untested_optimizer"] = True
    if options.get("max_grad_norm") is not None:
        config["gradient_clipping"] = 0.0
    deepspeed.init_distributed()
    if shard_group is None and stage:
        shard_group = distributed.group.WORLD
    if not stage:
        shard_group = None  # each rank has all parameters, and their gradients are averaged before the step
    optimizer = cls(model.parameters() if params is None else params, shard_group=shard_group, **options)
    initialized: tuple[Any, ...] = deepspeed.initialize(
        model=model, optimizer=optimizer, config=config, **(deepspeed_options or {})
    )
    return initialized
