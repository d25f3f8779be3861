"""What bench.gpu trains: whole training steps with SGD and with SOFIM, each on a copy of the same network."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import SGD

from bench.backward import NewOptimizer, Task, Training, images, tokens
from bench.gpu_providers import BASELINE
from bench.networks import ResNet9, Transformer, perceptron
from sofim_fused import SOFIM

# Small steps: over some thousand of them a network stays what it was.
_SGD = partial(SGD, lr=1e-4, momentum=0.9, fused=True)
_SOFIM = partial(SOFIM, lr=1e-3, momentum=0.9, rho=1.0)
ALIKE = 1e-3  # of the first losses: convolutions may add up in another order


class Autocast(nn.Module):
    """A network under ``torch.autocast`` to bfloat16; its outputs are float32, as a loss takes them there."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, given: Tensor) -> Tensor:
        """The network's outputs."""
        with torch.autocast(given.device.type, torch.bfloat16):
            outputs: Tensor = self.network(given)
        return outputs.float()


TASKS = {
    "resnet-9, batch 512": Task(ResNet9, partial(images, 512, 3)),
    "resnet-9, batch 512, bfloat16 autocast": Task(lambda: Autocast(ResNet9()), partial(images, 512, 3)),
    "transformer, batch 64 x 128": Task(Transformer, partial(tokens, 64, 128)),
}
MINIATURE = Task(partial(perceptron, 8, 8, 4), lambda: (torch.randn(6, 8), torch.randint(4, (6,))))  # on a CPU


def trainings(task: Task, device: torch.device, backends: Sequence[str]) -> dict[str, Training]:
    """One training for SGD and two for each of SOFIM's backends, the second in the backward pass, all alike so far.

    Args:
        task: what to train.
        device: where.
        backends: names of SOFIM's backends.
    """
    torch.manual_seed(0)
    network = task.network().to(device)
    given, wanted = (part.to(device) for part in task.batch())
    if given.dim() == 4:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        given = given.to(memory_format=torch.channels_last)
    made: dict[str, NewOptimizer] = {BASELINE: _SGD}
    for name in backends:
        made[f"SOFIM {name}"] = partial(_SOFIM, backend=name)
        made[f"SOFIM {name}, in_backward"] = partial(_SOFIM, backend=name, in_backward=True)
    return {name: Training(copy.deepcopy(network), optimizer, [(given, wanted)]) for name, optimizer in made.items()}
