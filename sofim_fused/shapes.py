"""The shapes of the parameters of known models, from the models' definitions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Shape = tuple[int, ...]


def elements(shapes: Sequence[Shape]) -> int:
    """How many elements tensors of these shapes have together."""
    return sum(map(math.prod, shapes))


def lenet5() -> list[Shape]:
    """LeNet-5 for one colour and ten classes, as examples/models.py defines it."""
    weights: list[Shape] = [(6, 1, 5, 5), (16, 6, 5, 5), (120, 16 * 5 * 5), (84, 120), (10, 84)]
    return [shape for weight in weights for shape in (weight, weight[:1])]


def resnet9() -> list[Shape]:
    """ResNet-9 for CIFAR-10 as in DAWNBench: eight convolutions with batch normalization, and a linear layer."""
    convolutions = [(3, 64), (64, 128), (128, 128), (128, 128), (128, 256), (256, 512), (512, 512), (512, 512)]
    return [shape for entering, leaving in convolutions for shape in _convolution(entering, leaving, 3)] + _linear(
        512, 10
    )


def resnet50() -> list[Shape]:
    """ResNet-50 for ImageNet, in torchvision's order."""
    shapes = _convolution(3, 64, 7)
    entering = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        leaving = 4 * width
        for block in range(blocks):
            shapes += _convolution(entering, width, 1) + _convolution(width, width, 3) + _convolution(width, leaving, 1)
            if block == 0:
                shapes += _convolution(entering, leaving, 1)  # the shortcut, where the number of channels changes
            entering = leaving
    return shapes + _linear(entering, 1000)


def gpt2_small() -> list[Shape]:
    """GPT-2 small: weights as (entering, leaving), the head tied to the token embedding."""
    width, layers, tokens, context = 768, 12, 50257, 1024
    norm: list[Shape] = [(width,), (width,)]
    attention: list[Shape] = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    feed_forward: list[Shape] = [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(tokens, width), (context, width), *(norm + attention + norm + feed_forward) * layers, *norm]


def _convolution(entering: int, leaving: int, kernel: int) -> list[Shape]:
    """A convolution without bias, and the scale and shift of its batch normalization."""
    return [(leaving, entering, kernel, kernel), (leaving,), (leaving,)]


def _linear(entering: int, leaving: int) -> list[Shape]:
    return [(leaving, entering), (leaving,)]


def vit_b() -> list[Shape]:
    """ViT-B/16 for ImageNet, in torchvision's order."""
    width, patches = 768, (224 // 16) ** 2
    stem: list[Shape] = [(1, 1, width), (width, 3, 16, 16), (width,), (1, patches + 1, width)]
    return [*stem, *_transformer_layer(width) * 12, (width,), (width,), *_linear(width, 1000)]


def lm_1b() -> list[Shape]:
    """A language model of 1.1 billion parameters: GPT-2's layers, the head tied to the token embedding."""
    width, layers, tokens, context = 2048, 20, 50257, 2048
    return [(tokens, width), (context, width), *_transformer_layer(width) * layers, (width,), (width,)]


def _transformer_layer(width: int) -> list[Shape]:
    norm: list[Shape] = [(width,), (width,)]
    attention = _linear(width, 3 * width) + _linear(width, width)
    feed_forward = _linear(width, 4 * width) + _linear(4 * width, width)
    return norm + attention + norm + feed_forward


MODELS: dict[str, Callable[[], list[Shape]]] = {
    "lenet-5": lenet5,
    "resnet-9": resnet9,
    "resnet-50": resnet50,
    "vit-b": vit_b,
    "gpt2-small": gpt2_small,
    "lm-1b": lm_1b,
}
