"""Networks whose training is timed: ResNet-9, a small transformer, and linear layers with more weights than work."""

from __future__ import annotations

from torch import Tensor, nn


class ResNet9(nn.Module):
    """ResNet-9 for 32x32 colour images and ten classes, as in DAWNBench; its parameters are ``bench.shapes.resnet9``.

    Maps images (N, 3, 32, 32) to logits (N, 10).
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(_convolution(3, 64), _convolution(64, 128), nn.MaxPool2d(2))
        self.first = nn.Sequential(_convolution(128, 128), _convolution(128, 128))
        self.middle = nn.Sequential(_convolution(128, 256), nn.MaxPool2d(2), _convolution(256, 512), nn.MaxPool2d(2))
        self.second = nn.Sequential(_convolution(512, 512), _convolution(512, 512))
        self.head = nn.Sequential(nn.MaxPool2d(4), nn.Flatten(), nn.Linear(512, 10))

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
