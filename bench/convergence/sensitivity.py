"""How much settings matter: LeNet-5 on Fashion-MNIST over grids of learning rate, ρ, momentum and batch size."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console

from bench.convergence.compare import table
from bench.convergence.contenders import MOMENTUM
from bench.convergence.pool import run_missing
from bench.convergence.store import Store
from bench.convergence.tasks import TASKS, Size
from bench.convergence.training import Job, Outcome, record

__all__ = ["Plan", "figure", "markdown", "run"]

CLOSE = 1.25  # a setting is good where the loss is at most so many times the lowest
Grid = NDArray[np.float64]


class Plan(NamedTuple):
    """What is varied, on one task, with one seed.

    Attributes:
        task: by name.
        size: how much is trained.
        device: where.
        rates: SOFIM's learning rates.
        rhos: its ρ.
        sgd_rates: SGD's learning rates.
        momenta: of SGD, and of SOFIM at ρ = 1.
        batch_sizes: at as many epochs, and so at fewer steps the larger they are.
    """

    task: str
    size: Size
    device: str
    rates: Sequence[float] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
    rhos: Sequence[float] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
    sgd_rates: Sequence[float] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    momenta: Sequence[float] = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98)
    batch_sizes: Sequence[int] = (32, 128, 512, 2048)

    def sofim(self, lr: float, rho: float, momentum: float = MOMENTUM, batch_size: int | None = None) -> Job:
        """A run of SOFIM."""
        return self._job("sofim", {"lr/rho": float(f"{lr / rho:.6g}"), "rho": rho, "momentum": momentum}, batch_size)

    def sgd(self, lr: float, momentum: float = MOMENTUM, batch_size: int | None = None) -> Job:
        """A run of SGD."""
        return self._job("sgd", {"lr": lr, "momentum": momentum}, batch_size)

    def _job(self, contender: str, settings: dict[str, float], batch_size: int | None) -> Job:
        size = batch_size or TASKS[self.task].batch_size
        return Job(self.task, contender, settings, 0, "validation", *self.size, size, self.device)

    def jobs(self) -> dict[str, Any]:
        """By panel: rows of runs, one row per second parameter."""
        return {
            "sofim-rho": [[self.sofim(lr, rho) for lr in self.rates] for rho in self.rhos],
            "sgd-momentum": [[self.sgd(lr, momentum) for lr in self.sgd_rates] for momentum in self.momenta],
            "sofim-momentum": [[self.sofim(lr, 1.0, momentum) for lr in self.rates] for momentum in self.momenta],
            "sofim-batch": [[self.sofim(lr, 1.0, batch_size=size) for lr in self.rates] for size in self.batch_sizes],
            "sgd-batch": [[self.sgd(lr, batch_size=size) for lr in self.sgd_rates] for size in self.batch_sizes],
        }


def run(plan: Plan, store: Store, workers: int, root: Path | None, console: Console) -> dict[str, Grid]:
    """Run what the store does not have yet of a plan; return the last epoch's training losses by panel."""
    jobs = {job.key: job for rows in plan.jobs().values() for row in rows for job in row}
    run_missing(jobs, partial(record, root=root), store, workers, "sensitivity", console)
    return losses(plan, store)


def losses(plan: Plan, store: Store) -> dict[str, Grid]:
    """From a store that has all of it; infinite where a run diverged.

    Raises:
        KeyError: it has not.
    """

    def last(job: Job) -> float:
        outcome = Outcome.of(store[job.key])
        return float("inf") if outcome.diverged else outcome.points[-1].train_loss

    return {name: np.array([[last(job) for job in row] for row in rows]) for name, rows in plan.jobs().items()}


def markdown(plan: Plan, found: dict[str, Grid], machine: str, command: str) -> str:
    """How wide the good regions are, and the best of each row."""
    introduction = (
        f"{TASKS[plan.task].title}: training loss (nats) of epoch {plan.size.epochs}, {plan.size.examples:,} training"
        f" examples, one seed, batch size {TASKS[plan.task].batch_size} unless it is varied. `{command}`: {machine}."
    )
    wide = []
    for name, label in (("sofim-rho", "SOFIM, lr × ρ"), ("sgd-momentum", "SGD, lr × momentum")):
        grid = found[name]
        good = grid <= CLOSE * grid.min()
        wide.append(
            [
                label,
                f"{grid.min():.3f}",
                f"{good.sum()} of {grid.size}",
                f"{good.sum(1).max()} of {grid.shape[1]}",
                f"{np.isfinite(grid).sum()} of {grid.size}",
                f"{(grid < 1.0).sum()} of {grid.size}",
            ]
        )
    heading = [
        "grid",
        "lowest loss",
        f"within {CLOSE - 1:.0%} of it",
        "of the learning rates in the best row",
        "not diverged",
        "loss < 1",
    ]
    parts = [introduction, "### The width of the good region", table(heading, wide)]
    parts += ["### Momentum", _best(plan.momenta, "momentum", found["sofim-momentum"], found["sgd-momentum"], plan)]
    parts += ["### Batch size", _best(plan.batch_sizes, "batch size", found["sofim-batch"], found["sgd-batch"], plan)]
    return "\n\n".join(parts)


def _best(values: Sequence[float], name: str, sofim: Grid, sgd: Grid, plan: Plan) -> str:
    rows = []
    for value, ours, theirs in zip(values, sofim, sgd, strict=True):
        cells = [f"{value:g}"]
        for losses_, rates in ((ours, plan.rates), (theirs, plan.sgd_rates)):
            good = losses_ <= CLOSE * losses_.min()
            cells += [f"{losses_.min():.3f}", f"{rates[int(losses_.argmin())]:g}", f"{good.sum()} of {len(rates)}"]
        rows.append(cells)
    within = f"rates within {CLOSE - 1:.0%} of it"
    heading = [name, "SOFIM (ρ = 1): lowest loss", "at lr", within, "SGD: lowest loss", "at lr", within]
    return table(heading, rows)


def figure(plan: Plan, found: dict[str, Grid]) -> Figure:
    """Heat maps of all panels."""
    drawing = Figure(figsize=(15, 9), layout="constrained")
    panels = drawing.subplots(2, 3)
    low = min(grid.min() for grid in found.values())
    norm = LogNorm(low, 2.5)
    shown = [
        ("sofim-rho", "SOFIM, momentum 0.9", plan.rates, "ρ", plan.rhos),
        ("sgd-momentum", "SGD", plan.sgd_rates, "momentum", plan.momenta),
        ("sofim-momentum", "SOFIM, ρ = 1", plan.rates, "momentum", plan.momenta),
        ("sofim-batch", "SOFIM, ρ = 1, momentum 0.9", plan.rates, "batch size", plan.batch_sizes),
        ("sgd-batch", "SGD, momentum 0.9", plan.sgd_rates, "batch size", plan.batch_sizes),
    ]
    for axes, (name, title, rates, second, values) in zip(panels.flat, shown, strict=False):
        image = _heat(axes, found[name], norm)
        axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
        axes.set_yticks(range(len(values)), [f"{value:g}" for value in values])
        axes.set(xlabel="learning rate", ylabel=second, title=title)
    panels.flat[-1].axis("off")
    drawing.colorbar(image, ax=panels.flat[-1], label="training loss of the last epoch, nats", location="left")
    drawing.suptitle(
        f"{TASKS[plan.task].title}, {plan.size.examples:,} training examples, {plan.size.epochs} epochs, one seed;"
        " black: diverged"
    )
    return drawing


def _heat(axes: Axes, grid: Grid, norm: LogNorm) -> Any:
    axes.set_facecolor("black")
    image = axes.imshow(np.ma.masked_invalid(grid), origin="lower", norm=norm, cmap="viridis_r", aspect="auto")
    best = grid.min()
    for row, column in itertools.product(range(grid.shape[0]), range(grid.shape[1])):
        value = grid[row, column]
        if np.isfinite(value):
            weight = "bold" if value <= CLOSE * best else "normal"
            colour = "black" if value < 0.8 else "white"
            axes.text(
                column,
                row,
                f"{value:.2f}" if value < 10 else "≥ 10",
                ha="center",
                va="center",
                fontsize=7,
                weight=weight,
                color=colour,
            )
    return image
