"""Networks that the benchmarks train."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class ResNet9(nn.Module):
    """ResNet-9 for 32x32 images, as in DAWNBench; with the defaults its parameters are ``sofim_fused.shapes.resnet9``.

    Maps images (N, channels, 32, 32) to logits (N, classes).
    """

    def __init__(self, channels: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(_convolution(channels, 64), _convolution(64, 128), nn.MaxPool2d(2))
        self.first = nn.Sequential(_convolution(128, 128), _convolution(128, 128))
        self.middle = nn.Sequential(_convolution(128, 256), nn.MaxPool2d(2), _convolution(256, 512), nn.MaxPool2d(2))
        self.second = nn.Sequential(_convolution(512, 512), _convolution(512, 512))
        self.head = nn.Sequential(nn.MaxPool2d(4), nn.Flatten(), nn.Linear(512, classes))

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        x: Tensor = self.stem(images)
        x = self.middle(x + self.first(x))
        logits: Tensor = self.head(x + self.second(x))
        return logits


def _convolution(entering: int, leaving: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(entering, leaving, 3, padding=1, bias=False), nn.BatchNorm2d(leaving), nn.ReLU(inplace=True)
    )


class Transformer(nn.Sequential):
    """Two layers of width 256 between an embedding of 1,000 tokens and a head, without dropout.

    Maps tokens (N, length) to logits (N, length, 1000).
    """

    def __init__(self) -> None:
        layer = nn.TransformerEncoderLayer(256, 4, dim_feedforward=1024, dropout=0.0, batch_first=True)
        super().__init__(
            nn.Embedding(1000, 256),
            nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
            nn.Linear(256, 1000),
        )


def linear_layers(count: int, width: int) -> nn.Sequential:
    """Square linear layers without bias, with ReLU between them: (N, width) to (N, width)."""
    layers: list[nn.Module] = []
    for _ in range(count):
        layers += [nn.Linear(width, width, bias=False), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class CharacterTransformer(nn.Module):
    """A causal transformer with learned positions; each layer normalises before its attention and its perceptron.

    Attention is written out: PyTorch's fused one has no second derivative, which Hessian-vector products take.

    Maps tokens (N, length) to logits (N, length, vocabulary), length being ``context`` at most.
    """

    def __init__(self, vocabulary: int, context: int = 64, width: int = 32, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.layers = nn.ModuleList(_TransformerLayer(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits."""
        length = tokens.shape[-1]
        x = self.token(tokens) + self.position(torch.arange(length, device=tokens.device))
        later = torch.full((length, length), float("-inf"), device=tokens.device).triu(1)
        for layer in self.layers:
            x = layer(x, later)
        logits: Tensor = self.head(self.norm(x))
        return logits


class _TransformerLayer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.mixed = nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, later: Tensor) -> Tensor:
        n, length, width = x.shape
        parts = self.queries_keys_values(self.attention_norm(x)).view(n, length, 3, self.heads, width // self.heads)
        queries, keys, values = parts.permute(2, 0, 3, 1, 4)
        weights = (queries @ keys.mT * (width // self.heads) ** -0.5 + later).softmax(-1)
        x = x + self.mixed((weights @ values).transpose(1, 2).reshape(n, length, width))
        out: Tensor = x + self.perceptron(self.norm(x))
        return out


def perceptron(entering: int, hidden: int, classes: int) -> nn.Sequential:
    """Two hidden layers with tanh: (N, entering) to logits (N, classes)."""
    return nn.Sequential(
        nn.Linear(entering, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, classes)
    )


class ByteTransformer(nn.Module):
    """A causal transformer over bytes, with learned positions and no biases, whose attention is PyTorch's fused one.

    Maps bytes (N, length), int64, to logits (N, length, 256), length being ``context`` at most. What a layer adds to
    its input is made small at first, the more so the more layers there are.
    """

    def __init__(self, depth: int, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.token = nn.Embedding(256, width)
        self.position = nn.Embedding(context, width)
        self.layers = nn.ModuleList(_ByteLayer(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, 256, bias=False)
        self.reset()

    @torch.no_grad()
    def reset(self, seed: int = 0) -> None:
        """Initial weights, in the tensors that there are: the same for the same seed on the same kind of device."""
        generator = torch.Generator(self.token.weight.device).manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() < 2:
                p.fill_(1)
                continue
            # Were it 0.02, as is common, a first step of Adam's size would change an embedding by a third of itself.
            std = 0.2 if name in ("token.weight", "position.weight") else 1 / math.sqrt(3 * p.shape[1])
            if name.endswith(("mixed.weight", "down.weight")):
                std /= math.sqrt(2 * len(self.layers))
            p.normal_(0, std, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits."""
        x = self.token(tokens) + self.position.weight[: tokens.shape[-1]]
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class _ByteLayer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width, bias=False)
        self.queries_keys_values = nn.Linear(width, 3 * width, bias=False)
        self.mixed = nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        parts = self.queries_keys_values(self.attention_norm(x)).view(n, length, 3, self.heads, width // self.heads)
        queries, keys, values = parts.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.mixed(mixed.transpose(1, 2).reshape(n, length, width))
        out: Tensor = x + self.down(functional.gelu(self.up(self.norm(x))))
        return out
