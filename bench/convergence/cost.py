"""The time of a training step with each optimizer: whole steps on the same mini-batch, timed in turns."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.convergence.compare import table
from bench.convergence.contenders import CONTENDERS, LINEUPS, PERIOD, memory
from bench.convergence.tasks import TASKS
from bench.convergence.training import Job, Training, prepare
from bench.timing import compare_phases, median_interval

__all__ = ["TIMED", "markdown", "measure"]

TIMED = ("fashion-mnist-lenet5", "text-transformer", "tabular-mlp")


def measure(name: str, seconds: float, root: Path | None) -> list[dict[str, Any]]:
    """Rows of one task, on the CPU with the threads that PyTorch has.

    A sample is ``PERIOD`` steps, which take Nyström-SGD the same each time. L-BFGS takes one gradient per step here.
    """
    task = TASKS[name]
    data = task.data(root, task.small.examples)
    batch = data.train.at(torch.arange(task.batch_size))
    trainings: dict[str, Training] = {}
    published = LINEUPS["published"]
    for contender in (CONTENDERS[name] for name in published.contenders):
        job = Job(name, contender.name, contender.grid[0], 0, "validation", 1, task.small.examples, task.batch_size)
        trainings[contender.name], _ = prepare(job, root)

    def steps(training: Training) -> None:
        for _ in range(PERIOD):
            training.step(batch)

    providers: dict[str, list[Callable[[], object]]] = {
        name: [partial(steps, training)] for name, training in trainings.items()
    }
    rounds = compare_phases(providers, seconds).rounds
    rows = []
    for name, training in trainings.items():
        ratios = [taken[name][0] / taken[published.baseline][0] for taken in rounds]
        low, high = median_interval(ratios)
        rows.append(
            {
                "contender": name,
                "ms": 1e3 * median(taken[name][0] for taken in rounds) / PERIOD,
                "ratio": median(ratios),
                "low": low,
                "high": high,
                "rounds": len(rounds),
                "gradients": (training.gradients + training.products * training.price) / training.steps,
                "memory": memory(training.optimizer) / sum(4 * p.numel() for p in training.params),
            }
        )
    return rows


def markdown(found: dict[str, list[dict[str, Any]]], machine: str, command: str) -> str:
    """The tables as a document."""
    parts = [
        f"Forward and backward pass and update, of all optimizers in turns. `{command}`: {machine}.\n\n"
        "Ratios are medians over the rounds, with their 95 % intervals. L-BFGS with one gradient per step; Nyström-SGD"
        f" takes its columns every {PERIOD} steps."
    ]
    heading = ["", "ms per step", "ratio to SGD [95 %]", "gradient evaluations", "state, floats per parameter"]
    for name, rows in found.items():
        lines = [
            [
                CONTENDERS[row["contender"]].label,
                f"{row['ms']:.3f}",
                f"{row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}]",
                f"{row['gradients']:.2f}",
                f"{row['memory']:.2f}",
            ]
            for row in rows
        ]
        parts += [f"### {TASKS[name].title}, batch size {TASKS[name].batch_size}", table(heading, lines)]
    return "\n\n".join(parts)
