"""timm: optimizers by name, with its groups for weight decay and layer decay, and under its Lookahead."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sofim_fused import SOFIM, AdaSOFIM
from sofim_fused.integrations.metrics import find_sofim, metrics
from tests.clients.support import same_bits, weights

CLASSES: dict[str, type[SOFIM]] = {"sofim": SOFIM, "adasofim": AdaSOFIM}


@pytest.fixture(autouse=True)
def _registered(torchvision: None) -> None:
    from sofim_fused.integrations import timm

    timm.register()
    timm.register()  # a program and a library may both call it


def vision_transformer() -> Any:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    return VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=2, num_heads=2, num_classes=3)


def loss_of(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    images, labels = torch.randn(4, 3, 8, 8, generator=generator), torch.randint(0, 3, (4,), generator=generator)
    return nn.functional.cross_entropy(model(images), labels)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[Tensor]:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    return weights(model)


@pytest.mark.parametrize("name", CLASSES)
def test_layer_decay(name: str) -> None:
    """timm's schedulers set the rate of each group from its ``lr_scale``; here by hand."""
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler

    model = vision_transformer()
    optimizer = create_optimizer_v2(model, opt=name, lr=0.01, weight_decay=0.05, layer_decay=0.5, max_grad_norm=1.0)
    assert type(optimizer) is CLASSES[name]
    scales = {group["lr_scale"] for group in optimizer.param_groups}
    assert scales == {0.125, 0.25, 0.5, 1.0}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.05}
    CosineLRScheduler(optimizer, t_initial=10).step(0)
    ours = train(model, optimizer, range(3))
    assert metrics(optimizer)["lr_min"] == pytest.approx(0.01 * 0.125)

    twin = vision_transformer()
    by_size = {}
    for group in optimizer.param_groups:
        by_size.update(dict.fromkeys(map(id, group["params"]), (0.01 * group["lr_scale"], group["weight_decay"])))
    groups = [
        {"params": [theirs], "lr": by_size[id(param)][0], "weight_decay": by_size[id(param)][1]}
        for param, theirs in zip(model.parameters(), twin.parameters(), strict=True)
    ]
    reference = CLASSES[name](groups, max_grad_norm=1.0)
    expected = train(twin, reference, range(3))
    for a, b in zip(ours, expected, strict=True):  # sums over parameters were added in another order
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CLASSES)
def test_lookahead(name: str) -> None:
    """timm's wrapper: every six steps the weights go half of the way back."""
    from timm.optim import create_optimizer_v2

    model = vision_transformer()
    optimizer = create_optimizer_v2(model, opt=f"lookahead_{name}", lr=0.01)
    sofim = find_sofim(optimizer)
    assert type(sofim) is CLASSES[name]
    train(model, optimizer, range(6))
    start = weights(model)  # what timm's wrapper goes back to: it makes its copy of the weights at the sixth step
    ours = train(model, optimizer, range(6, 12))
    twin = vision_transformer()
    plain = train(twin, CLASSES[name](twin.parameters(), lr=0.01, weight_decay=0.0), range(12))
    for a, b, w in zip(ours, plain, start, strict=True):
        torch.testing.assert_close(a, w + 0.5 * (b - w), rtol=1e-4, atol=1e-6)
    assert "skipped_steps" in metrics(optimizer)


@pytest.mark.parametrize("name", ["sofim", "adasofim", "lookahead_adasofim"])
def test_resuming_gives_the_same_bits(name: str) -> None:
    from timm.optim import create_optimizer_v2

    model = vision_transformer()
    optimizer = create_optimizer_v2(model, opt=name, lr=0.01, weight_decay=0.05)
    train(model, optimizer, range(8))
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    again = vision_transformer()
    again.load_state_dict(saved["model"])
    resumed = create_optimizer_v2(again, opt=name, lr=0.01, weight_decay=0.05)
    resumed.load_state_dict(saved["optimizer"])
    assert same_bits(train(again, resumed, range(8, 14)), train(model, optimizer, range(8, 14)))


def test_arguments_reach_the_class() -> None:
    """Those of timm's command line (``--opt-eps``, ``--opt-betas``, ``--momentum``) and SOFIM's own."""
    from timm.optim import create_optimizer_v2, list_optimizers

    assert {"sofim", "adasofim"} <= set(list_optimizers())
    model = vision_transformer()
    paper = create_optimizer_v2(model, opt="SOFIM", lr=0.5, momentum=0.8, rho=2.0, eps=1e-6, betas=[0.9, 0.95])
    assert (paper.defaults["momentum"], paper.defaults["rho"], paper.defaults["lr"]) == (0.8, 2.0, 0.5)
    adaptive = create_optimizer_v2(model, opt="adasofim", lr=1e-3, momentum=0.8, eps=1e-6, betas=[0.9, 0.95])
    assert (adaptive.defaults["momentum"], adaptive.defaults["beta2"]) == (0.9, 0.95)
    assert adaptive.defaults["eps"] == 1e-6
    assert create_optimizer_v2(model, opt="adasofim").defaults["lr"] == 4e-3


def test_in_backward() -> None:
    from timm.optim import create_optimizer_v2

    found = []
    for in_backward in (False, True):
        model = vision_transformer()
        optimizer = create_optimizer_v2(model, opt="adasofim", lr=0.01, in_backward=in_backward)
        found.append(train(model, optimizer, range(3)))
    assert same_bits(*found)
