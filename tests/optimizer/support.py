"""Shared by tests of the optimizer: a small model, its training, and a copy that was saved and loaded."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import nn

from sofim_fused import SOFIM


def small_model(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def train(model: nn.Module, optimizer: SOFIM, steps: int, first: int = 0) -> list[float]:
    """Regression on data that is a function of the step's number."""
    losses = []
    dtype = next(model.parameters()).dtype
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, 4, generator=generator).to(dtype)
        optimizer.zero_grad()
        loss = (model(x) - x[:, :3].sin()).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def saved_and_loaded(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Through a file, as a checkpoint from a stranger would be read."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded
