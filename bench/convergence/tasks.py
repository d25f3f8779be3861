"""The tasks: data with a fixed split, a network, and targets."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from bench.convergence import plays
from bench.networks import CharacterTransformer, ResNet9, perceptron
from examples import data as images
from examples.models import LeNet5

__all__ = ["TASKS", "Data", "Size", "Split", "Targets", "Task", "docstrings"]

SPLIT_SEED = 0


class Split(NamedTuple):
    """Examples: inputs (N, ...) and whole-numbered targets (N, ...), both on one device."""

    inputs: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> Split:
        """On another device."""
        return Split(self.inputs.to(device), self.targets.to(device))

    def at(self, indices: Tensor) -> Split:
        """Some of the examples."""
        return Split(self.inputs[indices], self.targets[indices])


class Data(NamedTuple):
    """Examples to train on, to choose settings by, and to compare by; and how many classes their targets have."""

    train: Split
    validation: Split
    test: Split
    classes: int

    def to(self, device: torch.device) -> Data:
        """On another device."""
        return Data(self.train.to(device), self.validation.to(device), self.test.to(device), self.classes)


class Size(NamedTuple):
    """How much is trained: epochs over so many training examples (``None``: all that are not held out).

    In a task with ``fresh`` examples each epoch has others.
    """

    epochs: int
    examples: int | None


class Targets(NamedTuple):
    """What has to be reached, set before the runs: mean cross-entropies in nats, and a fraction."""

    train_loss: float
    test_loss: float
    test_accuracy: float


@dataclass(frozen=True)
class Task:
    """Something to train.

    Attributes:
        name: as the command line has it.
        title: as figures have it.
        load: reads the data; its argument is the folder of the files, or ``None`` for their usual place.
        model: an untrained network for the data.
        batch_size: examples a step.
        small: what two cores do in under an hour for all optimizers.
        full: what a GPU does.
        targets: at the small size.
        tuning_seeds: runs per configuration.
        factors: of the grids' rates: :func:`bench.convergence.contenders.scaled`.
        fresh: each epoch takes examples that were not seen before, until all were; else all take the same.
    """

    name: str
    title: str
    load: Callable[[Path | None], Data]
    model: Callable[[Data], nn.Module]
    batch_size: int
    small: Size
    full: Size
    targets: Targets
    tuning_seeds: int = 1
    factors: Mapping[str, float] = field(default_factory=dict)
    fresh: bool = False

    def data(self, root: Path | None, examples: int | None) -> Data:
        """The data, cut to the first ``examples`` training examples, unless each epoch takes others."""
        data = _loaded(self.name, root)
        if examples is None:
            return data
        if examples > len(data.train.targets):
            raise ValueError(f"{self.name}: {examples} training examples of {len(data.train.targets)} asked for")
        if self.fresh:
            return data
        return data._replace(train=Split(*(part[:examples] for part in data.train)))


@lru_cache(2)
def _loaded(name: str, root: Path | None) -> Data:
    return TASKS[name].load(root)


def _held_out(inputs: Tensor, targets: Tensor, fraction: float) -> tuple[Split, Split]:
    """Shuffled and split in two, the second having this fraction of each class."""
    kept, held = train_test_split(
        np.arange(len(targets)), test_size=fraction, random_state=SPLIT_SEED, stratify=targets.numpy()
    )
    both = Split(inputs, targets)
    return both.at(torch.from_numpy(kept)), both.at(torch.from_numpy(held))


def _images(name: str, validation: float, root: Path | None) -> Data:
    data = images.load(name, root)
    train, held = _held_out(data.train_images, data.train_labels, validation)
    return Data(train, held, Split(data.test_images, data.test_labels), data.classes)


def _tabular(_: Path | None) -> Data:
    inputs, targets = load_breast_cancer(return_X_y=True)
    rest, test = _held_out(torch.from_numpy(inputs).float(), torch.from_numpy(targets).long(), 0.3)
    train, validation = _held_out(*rest, 0.25)
    std, mean = torch.std_mean(train.inputs, 0)
    train, validation, test = (Split((part.inputs - mean) / std, part.targets) for part in (train, validation, test))
    return Data(train, validation, test, 2)


# Text

CONTEXT = 64
TEXT_FILES = 400  # of the standard library, in the order of their names
PLAYS_CONTEXT, LARGE_PLAYS_CONTEXT = 96, 256
LETTERS = "\n" + "".join(map(chr, range(32, 127)))  # whatever else there is becomes one more token


def docstrings(folder: Path | None = None) -> list[str]:
    """The documentation strings of Python's standard library, in a fixed order; they depend on its version."""
    root = Path(sysconfig.get_path("stdlib") if folder is None else folder)
    found = []
    for path in sorted(root.glob("*.py"))[:TEXT_FILES] + sorted(root.glob("[a-z]*/*.py"))[:TEXT_FILES]:
        if path.parent.name in {"site-packages", "dist-packages", "test", "idlelib", "lib2to3"}:
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:  # some are there to be wrong
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text:
                    found.append(text)
    return found


def _text(root: Path | None) -> Data:
    texts = docstrings(root)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(texts))
    codes = {letter: code for code, letter in enumerate(LETTERS)}
    stream = torch.tensor([codes.get(letter, len(LETTERS)) for i in order for letter in texts[i] + "\n\n"])
    windows = stream[: len(stream) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)
    count = min(len(windows) // 10, 1000)
    # Cut where they lie, not shuffled: a documentation string is in one part alone, but for one at each border.
    parts = (windows[2 * count :], windows[:count], windows[count : 2 * count])
    train, validation, test = (Split(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in parts)
    return Data(train, validation, test, len(LETTERS) + 1)


HELD_OUT_WINDOWS = 1000  # of a play, evenly spaced


def _plays(context: int, root: Path | None) -> Data:
    codes = torch.full((256,), len(LETTERS))
    codes[list(LETTERS.encode())] = torch.arange(len(LETTERS))
    parts: list[Split] = []
    for text in plays.load(plays.ROOT if root is None else root):
        windows = codes[text.long()]
        windows = windows[: len(windows) // (context + 1) * (context + 1)].view(-1, context + 1)
        if not len(windows):
            raise ValueError(f"a part of the text has {len(text)} bytes: expected {context + 1} at least")
        if parts:  # a part to evaluate
            count = min(len(windows), HELD_OUT_WINDOWS)
            windows = windows[torch.arange(count) * len(windows) // count]
        parts.append(Split(windows[:, :-1].contiguous(), windows[:, 1:].contiguous()))
    train, validation, test = parts
    return Data(train, validation, test, len(LETTERS) + 1)


# The tasks


def _lenet(data: Data) -> nn.Module:
    return LeNet5(data.train.inputs.shape[1], data.classes)


def _resnet(data: Data) -> nn.Module:
    return ResNet9(data.train.inputs.shape[1], data.classes)


def _transformer(data: Data) -> nn.Module:
    return CharacterTransformer(data.classes, CONTEXT)


def _plays_transformer(data: Data) -> nn.Module:
    return CharacterTransformer(data.classes, PLAYS_CONTEXT, width=96, heads=4, depth=3)


def _large_plays_transformer(data: Data) -> nn.Module:
    return CharacterTransformer(data.classes, LARGE_PLAYS_CONTEXT, width=576, heads=9, depth=8)


def _perceptron(data: Data) -> nn.Module:
    return perceptron(data.train.inputs.shape[1], 32, data.classes)


def _all() -> dict[str, Task]:
    tasks = [
        Task(
            "digits-lenet5",
            "LeNet-5 on digits",
            partial(_images, "digits", 0.25),
            _lenet,
            batch_size=32,
            small=Size(20, None),
            full=Size(40, None),
            targets=Targets(0.1, 0.2, 0.95),
        ),
        Task(
            "tabular-mlp",
            "Perceptron on breast cancer data",
            _tabular,
            _perceptron,
            batch_size=16,
            small=Size(20, None),
            full=Size(40, None),
            targets=Targets(0.1, 0.1, 0.96),
            tuning_seeds=3,
        ),
        Task(
            "text-transformer",
            "Character transformer on documentation strings",
            _text,
            _transformer,
            batch_size=16,
            small=Size(6, 2500),
            full=Size(20, None),
            targets=Targets(2.4, 2.4, 0.33),
            factors=_TEXT_FACTORS,
        ),
    ]
    tasks += [
        Task(
            "plays-transformer",
            "Character transformer on Shakespeare's plays",
            partial(_plays, PLAYS_CONTEXT),
            _plays_transformer,
            batch_size=16,
            small=Size(4, 2000),
            full=Size(20, 2000),
            targets=Targets(2.2, 2.2, 0.35),
            factors=_TEXT_FACTORS,
            fresh=True,
        ),
        Task(
            "plays-transformer-30m",
            "Transformer of 30 million parameters on Shakespeare's plays",
            partial(_plays, LARGE_PLAYS_CONTEXT),
            _large_plays_transformer,
            batch_size=64,
            small=Size(8, 4000),
            full=Size(8, 4000),
            targets=Targets(2.0, 2.0, 0.4),
            # The rates of a large network are lower; SGD's are not.
            factors={**_TEXT_FACTORS, "adam": 0.25, "adahessian": 1},
            fresh=True,
        ),
    ]
    # Sizes, and targets for colour images and ResNet-9, are for GPUs.
    for name in images.NAMES[1:]:
        tasks += [
            Task(
                f"{name}-lenet5",
                f"LeNet-5 on {name}",
                partial(_images, name, 0.05),
                _lenet,
                batch_size=100,
                small=Size(8, 10_000),
                full=Size(30, None),
                targets=_IMAGE_TARGETS[name][0],
            ),
            Task(
                f"{name}-resnet9",
                f"ResNet-9 on {name}",
                partial(_images, name, 0.05),
                _resnet,
                batch_size=100,
                small=Size(2, 2_000),
                full=Size(30, None),
                targets=_IMAGE_TARGETS[name][1],
            ),
        ]
    return {task.name: task for task in tasks}


_TEXT_FACTORS = {"sofim": 8, "sofim-gradient": 8, "sgd": 8, "adam": 2, "adahessian": 2.5, "nystrom": 8}
_IMAGE_TARGETS = {
    "fashion-mnist": (Targets(0.5, 0.55, 0.80), Targets(0.2, 0.3, 0.90)),
    "cifar10": (Targets(1.2, 1.2, 0.55), Targets(0.3, 0.5, 0.85)),
    "cifar100": (Targets(3.0, 3.0, 0.25), Targets(1.5, 1.8, 0.55)),
    "svhn": (Targets(0.5, 0.5, 0.85), Targets(0.2, 0.25, 0.93)),
}

TASKS = _all()
