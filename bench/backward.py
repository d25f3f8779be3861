"""The time and memory of ``SOFIM(in_backward=True)``, compared with SGD with momentum.

    python -m bench.backward --threads 2

**A step alone.** In each round every optimizer is given gradients, one parameter after the other from the last to the
first, and then takes its step; only the step is compared. Each gradient is computed by one kernel that reads a weight
and values that all optimizers share, as a backward pass reads a layer's weight when it computes gradients. So each
step begins with the weights and gradients in the caches as after a backward pass. The moments are in the caches only if
hooks have just used them. The other optimizers then take their turns with their own parameters, gradients and moments,
so nothing of a large model stays in a cache from round to round. A forward pass and activations would displace more;
the training steps include these.

SGD's loop does nothing to a gradient after it is computed. With ``in_backward`` the loop calls the parameter's hooks
from Python, as autograd would. The additional time of this loop over SGD's in the same round is the column "taking".

**Training steps.** ``zero_grad``, forward, backward, ``step``; every optimizer has a copy of the same network, and the
same batches in the same order. It is checked that the first losses agree, and finally the parameters of all SOFIMs.

**Memory.** The growth of the peak resident set over some training steps, compared with a network that has taken none:
moments, gradients, activations, and temporary memory of operators. Each run has a process of its own.

Writes bench/results/backward_cpu.json and .md.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import itertools
import os
import platform
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from bench import report
from bench.networks import ResNet9, Transformer, linear_layers
from bench.report import Row, Table
from bench.shapes import MODELS, Shape
from bench.timing import compare_phases, median_interval
from examples.models import LeNet5
from sofim_fused import SOFIM

NewOptimizer = Callable[[Sequence[Tensor]], Optimizer]

# In all, about the same step, and so small that over a few thousand of them a network stays what it was.
_OURS = partial(SOFIM, lr=1e-3, momentum=0.9, rho=1.0)
BASELINE, PLAIN, OVERLAPPED, RELEASED = "SGD fused", "SOFIM", "SOFIM, in_backward", "SOFIM, in_backward, release_grads"
OPTIMIZERS: dict[str, NewOptimizer] = {
    BASELINE: partial(SGD, lr=1e-4, momentum=0.9, fused=True),
    PLAIN: _OURS,
    OVERLAPPED: partial(_OURS, in_backward=True),
    RELEASED: partial(_OURS, in_backward=True, release_grads=True),
}

# The largest ratio to SGD that is aimed at.
STEP_TARGETS = {"lenet-5": 0.3, "1000x1K": 0.3, "resnet-9": 0.55, "resnet-50": 0.7, "gpt2-small": 0.7}
TRAINING_TARGETS = {PLAIN: 1.01, OVERLAPPED: 1.0}

BATCHES = 4
TRAINING_SHARE = 3  # times the seconds of a step: a few percent of a training step are the optimizer's
MEMORY_STEPS = 5
ALLOWANCE = 0.01  # of SGD's growth
# glibc begins with this, and raises it as soon as a larger block is freed; set by the user, it stays.
THRESHOLD = 128 << 10
_M_MMAP_THRESHOLD = -3
_LIBC = " ".join(platform.libc_ver()) or "malloc"
ALLOCATORS: dict[str, int | None] = {_LIBC: None, f"{_LIBC}, 128 KiB": THRESHOLD}


# A step alone


class Model:
    """Parameters with the same values each time, whose gradients are computed one after the other, and an optimizer.

    Args:
        values: the gradients, which all models share.
        new_optimizer: makes the optimizer of the parameters.
    """

    def __init__(self, values: Sequence[Tensor], new_optimizer: NewOptimizer) -> None:
        weights = normal([tuple(value.shape) for value in values], 0.02, seed=2)
        self.params: list[Tensor] = [nn.Parameter(weight) for weight in weights]
        for param in self.params:
            param.grad = torch.empty_like(param)
        self.optimizer = new_optimizer(self.params)
        hooks = [list((param._post_accumulate_grad_hooks or {}).values()) for param in self.params]
        grads = [param.grad for param in self.params]
        self._order = list(zip(self.params, weights, values, grads, hooks, strict=True))[::-1]

    @torch.no_grad()
    def make_gradients(self) -> None:
        """Compute gradients one by one, as a backward pass does, and call the hooks for each."""
        for param, weight, value, grad, hooks in self._order:
            torch.add(value, weight, alpha=0.0, out=grad)
            for hook in hooks:
                hook(param)


def normal(shapes: Sequence[Shape], deviation: float, seed: int) -> list[Tensor]:
    """Normal float32 tensors."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.empty(shape).normal_(0, deviation, generator=generator) for shape in shapes]


def check_agreement(params: Mapping[str, Sequence[Tensor]]) -> None:
    """Check that parameters agree but for the order of additions.

    Raises:
        RuntimeError: the optimizers that are compared have not computed the same.
    """
    (name, first), *others = params.items()
    for other, theirs in others:
        for i, (mine, yours) in enumerate(zip(first, theirs, strict=True)):
            if not torch.allclose(mine, yours, rtol=1e-4, atol=1e-6):
                raise RuntimeError(f"{name} and {other} part at parameter {i}: they were not given the same work")


# Training steps


class Task(NamedTuple):
    """A network and what it is trained on.

    Attributes:
        network: makes it.
        batch: makes one batch: what the network takes, and a class for each row of what it gives.
    """

    network: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]


def images(count: int, channels: int) -> tuple[Tensor, Tensor]:
    """A batch of random images of 32x32, and classes out of ten."""
    return torch.randn(count, channels, 32, 32), torch.randint(10, (count,))


def tokens(count: int, length: int) -> tuple[Tensor, Tensor]:
    """A batch of random tokens out of 1,000, and tokens to follow them."""
    return torch.randint(1000, (count, length)), torch.randint(1000, (count, length))


def _vectors(count: int, width: int) -> tuple[Tensor, Tensor]:
    return torch.randn(count, width), torch.randint(width, (count,))


def _linear(count: int, width: int) -> Task:
    return Task(partial(linear_layers, count, width), partial(_vectors, 8, width))


LENET = Task(partial(LeNet5, channels=1, classes=10), partial(images, 64, 1))
TASKS = {
    "LeNet-5": LENET,
    "ResNet-9": Task(ResNet9, partial(images, 16, 3)),
    "transformer": Task(Transformer, partial(tokens, 8, 64)),
    "linear 12x2048²": _linear(12, 2048),
    "linear 12x512²": _linear(12, 512),
}


class Training:
    """A network that is trained.

    Args:
        network: the network of this training alone.
        new_optimizer: makes the optimizer of its parameters.
        batches: taken in turn.
    """

    def __init__(
        self, network: nn.Module, new_optimizer: NewOptimizer, batches: Sequence[tuple[Tensor, Tensor]]
    ) -> None:
        self.network = network
        self.optimizer = new_optimizer(list(network.parameters()))
        self._batches = itertools.cycle(batches)

    def step(self) -> Tensor:
        """One training step; the loss before it."""
        self.optimizer.zero_grad(set_to_none=True)
        given, wanted = next(self._batches)
        loss = nn.functional.cross_entropy(self.network(given).flatten(0, -2), wanted.flatten())
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def trainings(task: Task, names: Sequence[str]) -> dict[str, Training]:
    """One for each optimizer: copies of one network, and the same batches."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = task.network()
        batches = [task.batch() for _ in range(BATCHES)]
    copies = [network, *(copy.deepcopy(network) for _ in names[1:])]
    return {name: Training(mine, OPTIMIZERS[name], batches) for name, mine in zip(names, copies, strict=True)}


# Memory


class Use(NamedTuple):
    """Bytes: growth of the resident set at its peak, and the sizes of all gradients and of the largest one."""

    growth: int
    gradients: int
    largest: int


def memory_use(task: Task, optimizer: str, threads: int, threshold: int | None) -> Use:
    """What training takes besides the network's weights. To be called in a process of its own.

    Args:
        task: what is trained.
        optimizer: of ``OPTIMIZERS``.
        threads: of torch.
        threshold: bytes from which on blocks are mapped by themselves, and unmapped when freed; ``None``: glibc
            chooses.
    """
    if threshold is not None and not ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, threshold):
        raise RuntimeError("mallopt() does not take the threshold")
    torch.set_num_threads(threads)
    _use_memory(LENET, optimizer)  # code, threads and their stacks do not count for the task
    return _use_memory(task, optimizer)


def _use_memory(task: Task, optimizer: str) -> Use:
    (training,) = trainings(task, [optimizer]).values()
    report.give_back()
    before = report.resident("VmRSS")
    for _ in range(MEMORY_STEPS):
        training.step()
    growth = report.resident("VmHWM") - before
    sizes = [param.nbytes for param in training.network.parameters()]
    return Use(growth, sum(sizes), max(sizes))


# Rows


class Run:
    """What the command line asks for, and the tables' rows.

    Args:
        models: shapes by name, for steps alone.
        trained: of ``TASKS``, for training steps. ``remembered``: for memory.
        seconds: for each comparison of steps.
        threads: of torch.
        processes: for each measurement of memory.
    """

    def __init__(
        self,
        models: Mapping[str, Sequence[Shape]],
        trained: Sequence[str],
        remembered: Sequence[str],
        seconds: float,
        threads: int,
        processes: int,
    ) -> None:
        self.models = models
        self.trained = trained
        self.remembered = remembered
        self.seconds = seconds
        self.threads = threads
        self.processes = processes

    def step(self) -> Iterator[Row]:
        """Steps alone, and what the hooks take before."""
        for model, shapes in self.models.items():
            values = normal(shapes, 1e-3, seed=1)
            models = {name: Model(values, OPTIMIZERS[name]) for name in (BASELINE, PLAIN, OVERLAPPED)}
            measured = compare_phases(
                {name: (mine.make_gradients, mine.optimizer.step) for name, mine in models.items()}, self.seconds
            )
            check_agreement({name: models[name].params for name in (PLAIN, OVERLAPPED)})
            for name in models:
                made, taken = zip(*(row[name] for row in measured.rounds), strict=True)
                base_made, base = zip(*(row[BASELINE] for row in measured.rounds), strict=True)
                row = {"model": model, "provider": name, **_times(taken), **_ratios("ratio", taken, base)}
                if name == OVERLAPPED:
                    taking = [mine - theirs for mine, theirs in zip(made, base_made, strict=True)]
                    whole = [step + hooks for step, hooks in zip(taken, taking, strict=True)]
                    row |= {f"taking_{key}": value for key, value in _times(taking).items()}
                    row |= _ratios("whole", whole, base)
                target = STEP_TARGETS.get(model) if name == OVERLAPPED else None
                yield {**row, "rounds": len(taken), "calls": measured.calls, **_verdict(target, row)}
            del models, values, measured
            gc.collect()  # frees a large model's memory for the next one

    def training(self) -> Iterator[Row]:
        """Whole training steps."""
        for name in self.trained:
            made = trainings(TASKS[name], list(OPTIMIZERS))
            losses = {optimizer: float(mine.step()) for optimizer, mine in made.items()}
            check_losses(losses)
            measured = compare_phases(
                {optimizer: (mine.step,) for optimizer, mine in made.items()}, TRAINING_SHARE * self.seconds
            )
            check_agreement({key: list(made[key].network.parameters()) for key in (PLAIN, OVERLAPPED, RELEASED)})
            base = [row[BASELINE][0] for row in measured.rounds]
            for optimizer, loss in losses.items():
                taken = [row[optimizer][0] for row in measured.rounds]
                row = {"model": name, "provider": optimizer, **_times(taken), **_ratios("ratio", taken, base)}
                target = TRAINING_TARGETS.get(optimizer)
                yield {**row, "rounds": len(taken), "calls": measured.calls, "loss": loss, **_verdict(target, row)}

    def memory(self) -> Iterator[Row]:
        """Peaks of training steps, each measured in processes of its own."""
        with report.fresh_processes() as pool:
            for name, (allocator, threshold) in itertools.product(self.remembered, ALLOCATORS.items()):
                uses: dict[str, list[Use]] = {optimizer: [] for optimizer in OPTIMIZERS}
                for _ in range(self.processes):
                    for optimizer, runs in uses.items():
                        runs.append(pool.apply(memory_use, (TASKS[name], optimizer, self.threads, threshold)))
                base = median(use.growth for use in uses[BASELINE])
                for optimizer, runs in uses.items():
                    growth = [use.growth for use in runs]
                    row: Row = {"model": name, "allocator": allocator, "provider": optimizer}
                    row |= {"processes": self.processes, "low": min(growth), "high": max(growth)}
                    row |= {"growth": median(growth), "saved": base - median(growth)}
                    row |= {"gradients": runs[0].gradients, "largest": runs[0].largest}
                    yield {**row, **_bound(optimizer, row, base)}


def check_losses(losses: Mapping[str, float], tolerance: float = 1e-6) -> None:
    """Check that networks have begun alike, to a tolerance relative to the loss.

    Raises:
        RuntimeError: what was compared is not the same network on the same data.
    """
    if not max(losses.values()) - min(losses.values()) <= tolerance * abs(losses[BASELINE]):
        raise RuntimeError(f"first losses differ: {losses}")


def _times(seconds: Sequence[float]) -> Row:
    low, *_, high = quantiles(seconds, n=5, method="inclusive")
    return {"median": median(seconds), "low": low, "high": high}


def _ratios(name: str, ours: Sequence[float], theirs: Sequence[float]) -> Row:
    ratios = [mine / base for mine, base in zip(ours, theirs, strict=True)]
    low, high = median_interval(ratios)
    return {name: median(ratios), f"{name}_low": low, f"{name}_high": high}


def _verdict(target: float | None, row: Row) -> Row:
    """Whether the target was met, and whether the ratio's interval leaves that open."""
    between = None if target is None else row["ratio_low"] <= target < row["ratio_high"]
    return {**report.verdict(target, row["ratio"]), "open": between}


def _bound(optimizer: str, row: Row, base: float) -> Row:
    """With gradients released, a step needs room for the largest of them where SGD needs it for all."""
    if optimizer != RELEASED:
        return {"bound": None, "allowance": None, "target": None, "met": None}
    bound, allowance = base - (row["gradients"] - row["largest"]), ALLOWANCE * base
    return {"bound": bound, "allowance": allowance, **report.verdict(bound + allowance, row["growth"])}


# Tables


def _interval(row: Row, name: str) -> str:
    return f"{row[name]:.3f} [{row[name + '_low']:.3f}, {row[name + '_high']:.3f}]" if name in row else ""


def _taking(row: Row) -> str:
    if "taking_median" not in row:
        return ""
    middle, low, high = (f"{1e3 * row['taking_' + key]:.3g}" for key in ("median", "low", "high"))
    return f"{middle} [{low}, {high}]"


def _target(row: Row) -> str:
    return report.target(row) + (", open" if row["open"] else "")


def _megabytes(row: Row, name: str) -> str:
    return "" if row[name] is None else f"{row[name] / 1e6:.1f}"


_RATIO = f"/ {BASELINE} [95 %]"
_STEP: dict[str, Callable[[Row], str]] = {
    "model": lambda row: row["model"],
    "provider": lambda row: row["provider"],
    "step ms [20 %, 80 %]": lambda row: report.spread(row, 1e3),
    _RATIO: lambda row: _interval(row, "ratio"),
    "target": _target,
    "taking ms [20 %, 80 %]": _taking,
    f"both {_RATIO}": lambda row: _interval(row, "whole"),
    "rounds": lambda row: str(row["rounds"]),
}
_TRAINING: dict[str, Callable[[Row], str]] = {
    "model": lambda row: row["model"],
    "provider": lambda row: row["provider"],
    "ms [20 %, 80 %]": lambda row: report.spread(row, 1e3),
    _RATIO: lambda row: _interval(row, "ratio"),
    "target": _target,
    "rounds": lambda row: str(row["rounds"]),
}
_MEMORY: dict[str, Callable[[Row], str]] = {
    "model": lambda row: row["model"],
    "allocator": lambda row: row["allocator"],
    "provider": lambda row: row["provider"],
    "growth MB [least, most]": lambda row: (
        f"{row['growth'] / 1e6:.1f} [{row['low'] / 1e6:.1f}, {row['high'] / 1e6:.1f}]"
    ),
    "gradients MB": lambda row: _megabytes(row, "gradients"),
    "largest MB": lambda row: _megabytes(row, "largest"),
    "saved MB": lambda row: _megabytes(row, "saved"),
    "bound MB": lambda row: _megabytes(row, "bound"),
    "target": lambda row: (
        "" if row["target"] is None else f"≤ {row['target'] / 1e6:.1f} MB: {'met' if row['met'] else 'missed'}"
    ),
}

TABLES = {
    "step": Table(
        "A step alone",
        BASELINE,
        _STEP,
        Run.step,
        "Gradients are given before the timed part, which is step(). Taking is what the hooks need before it: how much"
        " longer it takes to make all gradients and call each parameter's hook from Python than to make them for SGD."
        " Both: taking and step together, beside SGD's step.",
    ),
    "training": Table(
        "Training steps",
        BASELINE,
        _TRAINING,
        Run.training,
        "zero_grad(set_to_none=True), forward, backward and step: LeNet-5 on 64 images of 1x32x32, ResNet-9 on 16 of"
        " 3x32x32, a transformer of two layers of width 256 on 8 sequences of 64 tokens. All have the same weights at"
        " first and the same batches.",
    ),
    "memory": Table(
        "Memory",
        BASELINE,
        _MEMORY,
        Run.memory,
        f"How far the resident set grows at its peak over {MEMORY_STEPS} training steps, over a network that has taken"
        " none; the median of several processes, with the least and the most. The bound is SGD's growth less all"
        f" gradients but the largest; the target allows {ALLOWANCE:.0%} of SGD's growth more, for pages that are"
        " partly used, small blocks and code: about as much as processes that do the same differ by. It can be reached"
        " where the peak is at the end of the backward pass, when SGD has all gradients; where activations take more,"
        " the peak comes earlier, with few gradients there to be released. Allocator: glibc keeps freed blocks below"
        " a threshold for itself, and raises the threshold as it goes; or it stays at 128 KiB, as with"
        f" MALLOC_MMAP_THRESHOLD_={THRESHOLD} in the environment.",
    ),
}

INTRODUCTION = (
    "Times are medians, with the 20th and 80th percentile. Ratios are medians of the ratios in each round, in which all"
    " are timed in turns, with the 95 % interval of the median; a verdict is on the median, and open where the interval"
    " has the target in it. SOFIM is the moment form with a float32 moment."
)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.backward", description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of torch (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, help="time for each comparison of steps (default: 20; 0.5 with --quick)"
    )
    parser.add_argument("--quick", action="store_true", help="small models, few repetitions")
    parser.add_argument("--only", nargs="+", choices=list(TABLES), default=list(TABLES), metavar="TABLE")
    parser.add_argument(
        "--json",
        type=Path,
        help="file for the results; the tables are written beside it as Markdown (default:"
        " bench/results/backward_cpu.json, but nothing with --quick or --only)",
    )
    options = parser.parse_args(arguments)
    if options.seconds is None:
        options.seconds = 0.5 if options.quick else 20.0
    if options.json is None and not options.quick and set(options.only) == set(TABLES):
        options.json = report.RESULTS / "backward_cpu.json"
    return options


def new_run(options: argparse.Namespace) -> Run:
    """What is measured."""
    models, trained = list(MODELS), ["LeNet-5", "ResNet-9", "transformer"]
    remembered, processes = ["linear 12x2048²", "ResNet-9", "transformer"], 3
    if options.quick:
        models, trained, remembered, processes = ["lenet-5", "1000x1K"], ["LeNet-5"], ["linear 12x512²"], 1
    shapes = {name: MODELS[name]() for name in models}
    return Run(shapes, trained, remembered, options.seconds, options.threads, processes)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write down after each table."""
    options = parsed(arguments)
    torch.set_num_threads(options.threads)
    command = [
        "python -m bench.backward",
        f"--threads {options.threads}",
        f"--seconds {options.seconds:g}",
        *(["--quick"] if options.quick else []),
        *([] if set(options.only) == set(TABLES) else [f"--only {shlex.join(options.only)}"]),
    ]
    tables = {key: table for key, table in TABLES.items() if key in options.only}
    report.measure(new_run(options), tables, " ".join(command), options.threads, options.json, INTRODUCTION)


if __name__ == "__main__":
    main()
