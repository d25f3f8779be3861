"""What bench.gpu trains: whole training steps with SGD and with SOFIM, each on a copy of the same network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Optimizer

from bench.gpu_providers import BASELINE
from bench.networks import ResNet9, Transformer, perceptron
from sofim_fused import SOFIM

# Small steps: over some thousand of them a network stays what it was.
_SGD = partial(SGD, lr=1e-4, momentum=0.9, fused=True)
_SOFIM = partial(SOFIM, lr=1e-3, momentum=0.9, rho=1.0)
ALIKE = 1e-3  # of the first loss: convolutions may add up in another order


@dataclass(frozen=True)
class Task:
    """A network and the batch that it is trained on.

    Attributes:
        network: makes it.
        batch: makes inputs and labels, of classes, for the network's outputs.
        autocast: to bfloat16, as networks are trained on GPUs.
    """

    network: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    autocast: bool = False


def _images(count: int) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 3, 32, 32), torch.randint(10, (count,))


def _tokens(count: int, length: int) -> tuple[Tensor, Tensor]:
    return torch.randint(1000, (count, length)), torch.randint(1000, (count, length))


TASKS: dict[str, Task] = {
    "resnet-9, batch 512": Task(ResNet9, partial(_images, 512)),
    "resnet-9, batch 512, bfloat16 autocast": Task(ResNet9, partial(_images, 512), autocast=True),
    "transformer, batch 64 x 128": Task(Transformer, partial(_tokens, 64, 128)),
}
MINIATURE = Task(partial(perceptron, 8, 8, 4), lambda: (torch.randn(6, 8), torch.randint(4, (6,))))  # on a CPU


class Training:
    """One network, its optimizer, and one batch that it is trained on again and again.

    Args:
        network: on its device.
        optimizer: of the network's parameters.
        inputs, labels: on the device.
        autocast: to bfloat16.
    """

    def __init__(
        self, network: nn.Module, optimizer: Optimizer, inputs: Tensor, labels: Tensor, autocast: bool
    ) -> None:
        self.network = network
        self.optimizer = optimizer
        self._inputs, self._labels = inputs, labels
        self._autocast = autocast

    def step(self) -> Tensor:
        """``zero_grad``, forward, backward, ``step``; gives the loss."""
        self.optimizer.zero_grad()
        with torch.autocast(self._inputs.device.type, torch.bfloat16, enabled=self._autocast):
            outputs = self.network(self._inputs)
            loss = cross_entropy(outputs.flatten(0, -2), self._labels.flatten())
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def trainings(task: Task, device: torch.device, backends: Sequence[str]) -> dict[str, Training]:
    """One training for SGD and two for each of SOFIM's backends, the second in the backward pass, all alike so far.

    Args:
        task: what to train.
        device: where.
        backends: names of SOFIM's backends.
    """
    torch.manual_seed(0)
    network = task.network().to(device)
    inputs, labels = (part.to(device) for part in task.batch())
    if inputs.dim() == 4:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        inputs = inputs.to(memory_format=torch.channels_last)
    made: dict[str, Callable[[list[Tensor]], Optimizer]] = {BASELINE: _SGD}
    for name in backends:
        made[f"SOFIM {name}"] = partial(_SOFIM, backend=name)
        made[f"SOFIM {name}, in_backward"] = partial(_SOFIM, backend=name, in_backward=True)
    result = {}
    for name, optimizer in made.items():
        own = copy.deepcopy(network)
        result[name] = Training(own, optimizer(list(own.parameters())), inputs, labels, task.autocast)
    return result


def begun(made: dict[str, Training]) -> dict[str, Any]:
    """Each training's first loss.

    Raises:
        RuntimeError: they differ: what is to be compared is not the same network on the same data.
    """
    losses = {name: float(training.step()) for name, training in made.items()}
    if not max(losses.values()) - min(losses.values()) <= ALIKE * abs(losses[BASELINE]):
        raise RuntimeError(f"first losses differ: {losses}")
    return losses
