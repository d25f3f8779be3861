"""How the demo's settings for digits were chosen, and how its optimizers compare with them.

    python -m bench.demo_defaults
    python -m bench.demo_defaults --only adasofim

Each optimizer has the same number of configurations: LeNet-5 for 25 epochs at batch size 32, ten seeds each. Every seed
has its own initial weights, batch order, and split of the training images: four fifths for training and one fifth for
validation. The demo uses the configuration with the lowest mean validation loss (accuracy on 288 images has steps of
0.35 %); the one with the highest mean accuracy is compared too. Finally the chosen ones are trained on all training
images, ten seeds each, and evaluated on the test images. Writes bench/results/demo_defaults.json and .md. With
``--only`` one optimizer is measured, and what the files have of the others is kept.
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
MEASURED = ("sofim", "sgd", "adasofim")  # AdamW has its place in the comparison of optimizers
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
ADA_RATES = (0.0005, 0.00075, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.005, 0.006, 0.008, 0.01, 0.015)
GRID = [
    *(Configuration("sgd", lr, 0.0) for lr in SGD_RATES),
    *(Configuration("sofim", ratio * rho, rho) for rho in (1.0, 3.0, 10.0, 30.0) for ratio in (0.1, 0.15, 0.2)),
    *(Configuration("adasofim", lr, 0.0) for lr in ADA_RATES),
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
        ada_lr=configuration.lr,
        adamw_lr=configuration.lr,
        threads=1,
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


def chosen_of(outcomes: Sequence[Outcome]) -> dict[Configuration, list[str]]:
    """The configuration with the lowest mean loss, and that with the highest mean accuracy, with these words."""
    winners: dict[Configuration, list[str]] = {}
    winners.setdefault(min(outcomes, key=lambda outcome: mean(outcome.losses)).configuration, []).append("loss")
    winners.setdefault(max(outcomes, key=lambda outcome: outcome.score).configuration, []).append("accuracy")
    return winners


def outcome_of(record: dict[str, Any]) -> Outcome:
    """What :meth:`Outcome.record` made of one."""
    return Outcome(Configuration(**record["configuration"]), record["accuracies"], record["losses"])


def markdown(records: dict[str, dict[str, Any]]) -> str:
    """The document, from the records by optimizer."""
    heading = "| configuration | accuracy, % | loss |\n|---|---|---|\n"
    validation = [outcome_of(entry).line() for record in records.values() for entry in record["validation"]]
    test = [
        outcome_of(entry).line() + f" {' and '.join(entry['chosen_by'])} |"
        for record in records.values()
        for entry in record["test"]
    ]
    machines = [f"- {LABELS[name]}: {record['machine']}; {record['seconds']:.0f} s" for name, record in records.items()]
    return (
        f"`python -m bench.demo_defaults`: LeNet-5 on digits, {EPOCHS} epochs, batch {BATCH}, momentum 0.9,"
        f" {len(SEEDS)} seeds\n(mean ± standard deviation).\n\n" + "\n".join(machines) + "\n\n"
        f"Validation images:\n\n{heading}" + "\n".join(validation) + "\n\n"
        "Test images:\n\n| configuration | accuracy, % | loss | chosen by validation |\n|---|---|---|---|\n"
        + "\n".join(test)
        + "\n"
    )


def measured(pool: ProcessPoolExecutor, name: str) -> dict[str, Any]:
    """The record of one optimizer: its configurations on validation images, and the chosen ones on test images."""
    started = time.time()
    chosen_from = measure(pool, [configuration for configuration in GRID if configuration.optimizer == name], True)
    winners = chosen_of(chosen_from)
    compared = measure(pool, list(winners), choosing=False)
    return {
        "machine": f"{os.cpu_count()} cores ({platform.machine()}), torch {torch.__version__}, one thread per run",
        "seconds": time.time() - started,
        "validation": [outcome.record() for outcome in chosen_from],
        "test": [{**outcome.record(), "chosen_by": winners[outcome.configuration]} for outcome in compared],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Choose, compare, and write both down."""
    description, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m bench.demo_defaults",
        description=description,
        epilog=details.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", choices=MEASURED, help="the one optimizer to measure (default: all)")
    only = parser.parse_args(arguments).only
    file = RESULTS / "demo_defaults.json"
    records = json.loads(file.read_text()) if only and file.is_file() else {}
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        for name in [only] if only else MEASURED:
            records[name] = measured(pool, name)
    file.write_text(json.dumps(records, indent=1) + "\n")
    (RESULTS / "demo_defaults.md").write_text(markdown(records))


if __name__ == "__main__":
    main()
