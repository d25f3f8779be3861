"""How the demo's settings for digits were chosen, and how SOFIM and SGD-momentum compare with them.

    python -m bench.demo_defaults

Each optimizer has the same number of configurations: LeNet-5 for 25 epochs at batch size 32, ten seeds each. Every seed
has its own initial weights, batch order, and split of the training images: four fifths for training and one fifth for
validation. The demo uses the configuration with the lowest mean validation loss (accuracy on 288 images has steps of
0.35 %); the one with the highest mean accuracy is compared too. Finally the chosen ones are trained on all training
images, ten seeds each, and evaluated on the test images. Writes bench/results/demo_defaults.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.model_selection import train_test_split

from examples.data import ImageData, load
from examples.train import LABELS, Row, Settings, new_run, run_epoch

SEEDS = range(10)
EPOCHS = 25
BATCH = 32
RESULTS = Path(__file__).parent / "results"


class Configuration(NamedTuple):
    """An optimizer and its settings; ``rho`` is SOFIM's alone."""

    optimizer: str
    lr: float
    rho: float

    def __str__(self) -> str:
        """As the table shows it."""
        return f"{LABELS[self.optimizer]} lr {self.lr:g}" + (f" rho {self.rho:g}" if self.optimizer == "sofim" else "")


SGD_RATES = (0.0025, 0.005, 0.0075, 0.01, 0.0125, 0.015, 0.0175, 0.02, 0.0225, 0.025, 0.03, 0.04)
# lr/rho compares to SGD's lr/(1 - momentum).
GRID = [Configuration("sgd", lr, 0.0) for lr in SGD_RATES] + [
    Configuration("sofim", ratio * rho, rho) for rho in (1.0, 3.0, 10.0, 30.0) for ratio in (0.1, 0.15, 0.2)
]


def train(configuration: Configuration, seed: int, choosing: bool) -> Row | None:
    """Train once; return the last epoch's row, its test columns being the validation images' if ``choosing``."""
    torch.set_num_threads(1)
    data = split(seed) if choosing else digits()
    settings = Settings(
        data="digits",
        root=None,
        device="cpu",
        optimizers=[configuration.optimizer],
        epochs=EPOCHS,
        batch_size=BATCH,
        seed=seed,
        lr=configuration.lr,
        momentum=0.9,
        rho=configuration.rho,
        sgd_lr=configuration.lr,
    )
    run = new_run(configuration.optimizer, settings, data, torch.device("cpu"))
    row = None
    for epoch in range(1, EPOCHS + 1):
        row = run_epoch(run, data, settings, epoch, lambda: None)
        if row is None:
            break
    return row


@cache
def digits() -> ImageData:
    """The data, read once per process."""
    return load("digits")


def split(seed: int) -> ImageData:
    """The training images alone, with a fifth of them in the place of the test images."""
    data = digits()
    kept, held = train_test_split(
        np.arange(len(data.train_labels)), test_size=0.2, random_state=seed, stratify=data.train_labels.numpy()
    )
    return replace(
        data,
        train_images=data.train_images[kept],
        train_labels=data.train_labels[kept],
        test_images=data.train_images[held],
        test_labels=data.train_labels[held],
    )


class Outcome(NamedTuple):
    """A configuration over all seeds: accuracies and losses of the images that were not trained on."""

    configuration: Configuration
    accuracies: list[float]
    losses: list[float]

    @property
    def score(self) -> float:
        """Mean accuracy in percent; a run that diverged counts as zero."""
        return 100 * mean(self.accuracies)

    def line(self) -> str:
        """A row of the table."""
        spread = 100 * stdev(self.accuracies)
        return f"| {self.configuration} | {self.score:.2f} ± {spread:.2f} | {mean(self.losses):.4f} |"

    def record(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {**self._asdict(), "configuration": self.configuration._asdict()}


def measure(pool: ProcessPoolExecutor, grid: Sequence[Configuration], choosing: bool) -> list[Outcome]:
    """Every configuration with every seed."""
    jobs = [[pool.submit(train, configuration, seed, choosing) for seed in SEEDS] for configuration in grid]
    outcomes = []
    for configuration, futures in zip(grid, jobs, strict=True):
        rows = [future.result() for future in futures]
        accuracies = [0.0 if row is None else row["test_accuracy"] for row in rows]
        losses = [float("inf") if row is None else row["test_loss"] for row in rows]
        outcomes.append(Outcome(configuration, accuracies, losses))
        print(outcomes[-1].line(), flush=True)
    return outcomes


def main(arguments: Sequence[str] | None = None) -> None:
    """Choose, compare, and write both down."""
    description, _, details = __doc__.partition("\n\n")
    argparse.ArgumentParser(
        prog="python -m bench.demo_defaults",
        description=description,
        epilog=details.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args(arguments)
    started = time.time()
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        chosen_from = measure(pool, GRID, choosing=True)
        winners: dict[Configuration, list[str]] = {}
        for name in LABELS:
            mine = [outcome for outcome in chosen_from if outcome.configuration.optimizer == name]
            winners.setdefault(min(mine, key=lambda outcome: mean(outcome.losses)).configuration, []).append("loss")
            winners.setdefault(max(mine, key=lambda outcome: outcome.score).configuration, []).append("accuracy")
        compared = measure(pool, list(winners), choosing=False)
    machine = f"{os.cpu_count()} cores ({platform.machine()}), torch {torch.__version__}, one thread per run"
    seconds = time.time() - started
    heading = "| configuration | accuracy, % | loss |\n|---|---|---|\n"
    (RESULTS / "demo_defaults.md").write_text(
        f"`python -m bench.demo_defaults`: LeNet-5 on digits, {EPOCHS} epochs, batch {BATCH}, momentum 0.9,"
        f" {len(SEEDS)} seeds\n(mean ± standard deviation); {machine}; {seconds:.0f} s.\n\n"
        f"Validation images:\n\n{heading}" + "\n".join(outcome.line() for outcome in chosen_from) + "\n\n"
        "Test images:\n\n| configuration | accuracy, % | loss | chosen by validation |\n|---|---|---|---|\n"
        + "\n".join(outcome.line() + f" {' and '.join(winners[outcome.configuration])} |" for outcome in compared)
        + "\n"
    )
    record = {
        "machine": machine,
        "seconds": seconds,
        "validation": [outcome.record() for outcome in chosen_from],
        "test": [{**outcome.record(), "chosen_by": winners[outcome.configuration]} for outcome in compared],
    }
    (RESULTS / "demo_defaults.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
