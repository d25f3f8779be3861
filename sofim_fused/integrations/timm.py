"""SOFIM in timm, PyTorch Image Models (tested with 1.0.31).

import sofim_fused.integrations.timm
from timm.optim import create_optimizer_v2

sofim_fused.integrations.timm.register()
optimizer = create_optimizer_v2(model, opt="adasofim", lr=2e-3, weight_decay=0.05, layer_decay=0.75)
"""

from __future__ import annotations

from timm.optim import OptimInfo
from timm.optim._optim_factory import default_registry

from sofim_fused.adasofim import AdaSOFIM
from sofim_fused.optimizer import SOFIM


def register() -> None:
    """Let timm make the optimizers ``sofim`` and ``adasofim`` by name, also as ``lookahead_sofim`` and so on.

    ``create_optimizer_v2`` passes the other arguments on: ``momentum``, ``rho``, ``max_grad_norm`` and so on. timm's
    ``weight_decay`` is decoupled in both. A second call changes nothing.
    """
    known = default_registry._optimizers
    for info in (
        OptimInfo("sofim", SOFIM, "Momentum with a step bounded by a Fisher matrix", has_eps=False, has_momentum=True),
        OptimInfo("adasofim", AdaSOFIM, "AdamW's arguments, with means of g² over rows and columns", has_betas=True),
    ):
        if getattr(known.get(info.name), "opt_class", None) is not info.opt_class:
            default_registry.register(info)
