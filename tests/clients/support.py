"""Shared by the tests with real frameworks: a small language model, its data, and comparisons of weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

LENGTH = 8


def rows(count: int = 32) -> list[dict[str, Tensor]]:
    """Rows of tokens, as a Trainer takes them."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, 16, (count, LENGTH), generator=generator)
    return [{"input_ids": row, "labels": row} for row in tokens]


def language_model() -> Any:
    """A GPT-2 of 1,000 parameters, from its configuration: nothing is downloaded."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=16,
        n_positions=LENGTH,
        n_embd=8,
        n_layer=1,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


class Net(nn.Module):
    """A perceptron, with a matrix large enough to have rows and columns."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(7, 13)
        self.last = nn.Linear(13, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.first(x).tanh())
        return out


def batch(step: int, count: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(count, 7, generator=generator), torch.randn(count, 3, generator=generator)


def loss_of(model: Callable[[Tensor], Tensor], step: int, part: int = 0, parts: int = 1) -> Tensor:
    """The mean loss over one of the equal parts of a batch."""
    x, y = (half.chunk(parts)[part] for half in batch(step))
    return (model(x) - y).square().mean()


def trained(make: Callable[[Any], torch.optim.Optimizer], steps: int, parts: int = 1) -> Net:
    """The perceptron after some steps in a loop without any framework."""
    model = Net()
    optimizer = make(model)
    for step in range(steps):
        optimizer.zero_grad()
        for part in range(parts):
            (loss_of(model, step, part, parts) / parts).backward()
        optimizer.step()
    return model


def weights(model: nn.Module) -> list[Tensor]:
    full = [getattr(param, "full_tensor", lambda param=param: param)() for param in model.parameters()]
    return [copy.deepcopy(param.detach()) for param in full]


def same_bits(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def distance(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> float:
    """The largest relative distance of a parameter."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True))
