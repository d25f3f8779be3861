"""Networks that the examples train."""

from __future__ import annotations

from torch import nn

__all__ = ["LeNet5"]


class LeNet5(nn.Sequential):
    """LeNet-5 for 32x32 images.

    Source: Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, "Gradient-Based Learning Applied to Document
    Recognition", Proceedings of the IEEE 86(11), 1998. Layer sizes are those of the paper. What
    differs: ReLU for the scaled tanh, max pooling for the trainable subsampling, every feature map
    of the second convolution sees all six of the first, and a linear output layer (logits) takes
    the place of the radial basis functions. Weights start as PyTorch's layers set them.

    The network maps float images (N, channels, 32, 32) to logits (N, classes). It has 61,706
    parameters for 1 channel and 10 classes.
    """

    def __init__(self, channels: int, classes: int) -> None:
        """Build the network for images of `channels` colours and `classes` classes."""
        super().__init__(
            nn.Conv2d(channels, 6, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16 * 5 * 5, 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, classes),
        )
