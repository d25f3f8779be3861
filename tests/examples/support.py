"""Shared by tests of the examples: what a run has written, and data sets in miniature."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io
import torch
from numpy.typing import NDArray


def checkpoint(out: Path) -> dict[str, Any]:
    """What a checkpoint holds, without what differs from run to run: the times."""
    content: dict[str, Any] = torch.load(out / "checkpoint.pt", weights_only=True)
    for state in content["runs"].values():
        for row in state["history"]:
            assert row.pop("seconds") > 0
            assert row.pop("step_ms") > 0
    return content


def history(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "history.json").read_text())
    return content


def assert_equal(one: Any, other: Any) -> None:
    """Equality bit for bit, through nested containers."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            assert_equal(mine, theirs)
    else:
        assert one == other


Bytes = NDArray[np.uint8]


def pixels(count: int, channels: int, side: int, seed: int) -> Bytes:
    """Random images, uint8 (count, channels, side, side)."""
    return np.random.default_rng(seed).integers(0, 256, (count, channels, side, side), np.uint8)


def cifar_bytes(images: Bytes, *labels: list[int]) -> bytes:
    """Records as the data set's page describes them: label bytes, then red, green, blue by rows."""
    content = bytearray()
    for index, image in enumerate(images):
        content += bytes(column[index] for column in labels)
        for channel in range(3):
            for row in range(32):
                content += bytes(image[channel, row, column] for column in range(32))
    return bytes(content)


def write_cifar10(root: Path) -> tuple[Bytes, Bytes]:
    train, test = pixels(10, 3, 32, seed=3), pixels(2, 3, 32, seed=4)
    for part in range(5):
        content = cifar_bytes(train[2 * part : 2 * part + 2], [part, 9 - part])
        (root / f"data_batch_{part + 1}.bin").write_bytes(content)
    (root / "test_batch.bin").write_bytes(cifar_bytes(test, [7, 4]))
    return train, test


def write_cifar100(root: Path) -> tuple[Bytes, Bytes]:
    train, test = pixels(4, 3, 32, seed=5), pixels(2, 3, 32, seed=6)
    (root / "train.bin").write_bytes(cifar_bytes(train, [0, 19, 3, 4], [99, 0, 42, 10]))
    (root / "test.bin").write_bytes(cifar_bytes(test, [1, 2], [5, 98]))
    return train, test


def write_mat(path: Path, images: Bytes, labels: list[int]) -> None:
    """As the data set's page describes it: X(row, column, channel, image), y(image, 1)."""
    count = len(images)
    x = np.empty((32, 32, 3, count), np.uint8)
    for index in range(count):
        for channel in range(3):
            x[:, :, channel, index] = images[index, channel]
    y = np.array(labels, np.uint8).reshape(-1, 1)
    scipy.io.savemat(path, {"X": x, "y": y}, do_compression=True)


def write_svhn(root: Path) -> tuple[Bytes, Bytes]:
    train, test = pixels(4, 3, 32, seed=7), pixels(3, 3, 32, seed=8)
    write_mat(root / "train_32x32.mat", train, [1, 10, 9, 5])
    write_mat(root / "test_32x32.mat", test, [10, 2, 3])
    return train, test
