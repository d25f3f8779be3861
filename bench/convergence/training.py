"""One training run: a task, an optimizer, settings, a seed."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from bench.convergence.contenders import CONTENDERS, Contender, Settings, gradients_by, memory
from bench.convergence.tasks import TASKS, Data, Split
from examples.train import batch_order, synchronize

__all__ = ["Job", "Outcome", "Point", "Training", "hessian_cost", "prepare", "record", "train"]

EVALUATION_BATCH = 500


@dataclass(frozen=True)
class Job:
    """All that a run's losses depend on, besides machine and versions.

    Attributes:
        task: by name.
        contender: by name.
        settings: of the optimizer.
        seed: of the initial weights, the order of the batches, and the optimizer's random numbers.
        held_out: the examples that are evaluated after each epoch.
        epochs: over the training examples.
        examples: the number of these; ``None``: all.
        batch_size: examples a step.
        device: where it runs.
    """

    task: str
    contender: str
    settings: Settings
    seed: int
    held_out: Literal["validation", "test"]
    epochs: int
    examples: int | None
    batch_size: int
    device: str = "cpu"

    @property
    def key(self) -> str:
        """The same for the same job, in any process."""
        return json.dumps(asdict(self), sort_keys=True)


class Point(NamedTuple):
    """After an epoch. Losses are mean cross-entropies in nats, the accuracy is a fraction.

    Attributes:
        train_loss: mean over the epoch's batches, each before its update.
        loss: of the examples held out.
        accuracy: of the examples held out.
        cost: gradient evaluations up to here, Hessian-vector products among them: see :func:`hessian_cost`.
        seconds: of training up to here, evaluation left out: on a CPU the process's own, whatever else runs there.
    """

    train_loss: float
    loss: float
    accuracy: float
    cost: float
    seconds: float


class Outcome(NamedTuple):
    """The results of a run.

    Attributes:
        points: of each epoch that ended with finite losses.
        diverged: whether a loss was not finite, which ended the run.
        memory: bytes of the optimizer's state.
        parameters: of the network.
        steps: updates.
        gradients: forward and backward passes.
        hessian_products: Hessian-vector products.
        hessian_cost: of one such, in gradient evaluations.
    """

    points: list[Point]
    diverged: bool
    memory: int
    parameters: int
    steps: int
    gradients: int
    hessian_products: int
    hessian_cost: float

    @property
    def cost(self) -> float:
        """In gradient evaluations."""
        return self.gradients + self.hessian_products * self.hessian_cost

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Outcome:
        """From its form in JSON."""
        return cls(**{**record, "points": [Point(*point) for point in record["points"]]})


def loss_of(model: nn.Module, batch: Split) -> Tensor:
    """Mean cross-entropy in nats, over all targets."""
    return functional.cross_entropy(model(batch.inputs).flatten(0, -2), batch.targets.flatten())


@torch.no_grad()
def evaluate(model: nn.Module, split: Split) -> tuple[float, float]:
    """Mean cross-entropy in nats, and the fraction of targets that are predicted."""
    model.eval()
    loss = correct = 0.0
    parts = (torch.split(part, EVALUATION_BATCH) for part in split)
    for inputs, targets in zip(*parts, strict=True):
        logits = model(inputs).flatten(0, -2)
        loss += functional.cross_entropy(logits, targets.flatten(), reduction="sum").item()
        correct += (logits.argmax(-1) == targets.flatten()).sum().item()
    return loss / split.targets.numel(), correct / split.targets.numel()


def hessian_cost(model: nn.Module, batch: Split) -> float:
    """What a Hessian-vector product costs, in gradient evaluations.

    It is the ratio of the floating-point operations in matrix products and convolutions: of a backward pass through the
    gradient, and of a forward and backward pass. Everything that is computed once for both counts as the gradient's.
    """
    params = list(model.parameters())
    with FlopCounterMode(display=False) as first:
        grads = torch.autograd.grad(loss_of(model, batch), params, create_graph=True)
    with FlopCounterMode(display=False) as second:
        torch.autograd.grad(grads, params, [torch.ones_like(g) for g in grads])
    ratio: float = second.get_total_flops() / first.get_total_flops()
    return ratio


@lru_cache(16)
def _hessian_cost(task: str, batch_size: int, root: Path | None, examples: int | None) -> float:
    data = TASKS[task].data(root, examples)
    model = TASKS[task].model(data)
    return hessian_cost(model, data.train.at(torch.arange(min(batch_size, len(data.train.targets)))))


def train(job: Job, root: Path | None = None) -> Outcome:
    """Train once; see :func:`prepare`."""
    training, data = prepare(job, root)
    return training.outcome(data)


def record(job: Job, root: Path | None) -> dict[str, Any]:
    """:func:`train`, in types that JSON has."""
    return train(job, root)._asdict()


def prepare(job: Job, root: Path | None = None) -> tuple[Training, Data]:
    """A job's network and optimizer before the first step, and its data, on its device.

    Args:
        job: what to train, and how.
        root: folder of the task's data; ``None``: where they usually lie.

    Raises:
        FileNotFoundError, ValueError: the data cannot be read, or there are not so many training examples.
    """
    task, contender = TASKS[job.task], CONTENDERS[job.contender]
    device = torch.device(job.device)
    data = task.data(root, job.examples)
    torch.manual_seed(job.seed)
    model = task.model(data)  # on the CPU: the same weights on every device
    price = _hessian_cost(job.task, job.batch_size, root, job.examples) if contender.gradients == "graph" else 0.0
    torch.manual_seed(job.seed)
    model.to(device)
    return Training(job, contender, model, contender.build(model, job.settings), price), data.to(device)


class Training:
    """A network and its optimizer, with what they have cost."""

    def __init__(self, job: Job, contender: Contender, model: nn.Module, optimizer: Optimizer, price: float) -> None:
        self.job, self.contender, self.model, self.optimizer, self.price = job, contender, model, optimizer, price
        self.params = list(model.parameters())
        self.steps = self.gradients = self.products = 0

    def outcome(self, data: Data) -> Outcome:
        """Train for the job's epochs."""
        # The fastest convolutions on CUDA add up in an order that changes from run to run.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            return self._outcome(data)

    def _outcome(self, data: Data) -> Outcome:
        held = data.validation if self.job.held_out == "validation" else data.test
        device = torch.device(self.job.device)
        points: list[Point] = []
        # With one thread the process's time is what the clock shows on a machine that does nothing else.
        clock = time.process_time if device.type == "cpu" else time.perf_counter
        seconds, diverged = 0.0, False
        for epoch in range(1, self.job.epochs + 1):
            synchronize(device)
            started = clock()
            train_loss = self.epoch(epoch, data.train)
            synchronize(device)
            seconds += clock() - started
            loss, accuracy = evaluate(self.model, held)
            diverged = not (math.isfinite(train_loss) and math.isfinite(loss))
            if diverged:
                break
            cost = self.gradients + self.products * self.price
            points.append(Point(*(float(f"{x:.6g}") for x in (train_loss, loss, accuracy, cost, seconds))))
        return Outcome(
            points,
            diverged,
            memory(self.optimizer),
            sum(p.numel() for p in self.params),
            self.steps,
            self.gradients,
            self.products,
            self.price,
        )

    def epoch(self, epoch: int, examples: Split) -> float:
        """Mean loss of the batches, each before its update; not finite as soon as one is not."""
        self.model.train()
        total = 0.0
        order = self.order(epoch, len(examples.targets)).to(examples.targets.device)
        for indices in order.split(self.job.batch_size):
            loss = self.step(examples.at(indices))
            if not math.isfinite(loss):
                return loss
            total += loss * len(indices)
        return total / len(order)

    def order(self, epoch: int, count: int) -> Tensor:
        """Indices of the examples of an epoch, int64, of ``count`` that there are: all, or some that are fresh."""
        if not TASKS[self.job.task].fresh or self.job.examples is None:
            return batch_order(self.job.seed, epoch, count)
        past, place = divmod((epoch - 1) * self.job.examples, count // self.job.examples * self.job.examples)
        return batch_order(self.job.seed, past, count)[place : place + self.job.examples]

    def step(self, batch: Split) -> float:
        """One update; the loss before it."""
        if self.contender.gradients == "closure":
            losses: list[float] = []

            def closure() -> Any:
                self.gradients += 1
                self.optimizer.zero_grad()
                loss = loss_of(self.model, batch)
                loss.backward()
                losses.append(loss.item())
                return loss

            self.steps += 1
            self.optimizer.step(closure)
            return losses[0]
        self.optimizer.zero_grad()
        loss = loss_of(self.model, batch)
        value = loss.item()
        if math.isfinite(value):
            self.steps += 1
            self.gradients += 1
            self.products += self.contender.hessian_products(self.optimizer)
            gradients_by(self.contender, self.optimizer, loss, self.params)
            self.optimizer.step()
        self.optimizer.zero_grad()  # gradients with a graph keep themselves alive
        return value
