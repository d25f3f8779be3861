"""Real image data in memory, brought to 32x32 pixels and normalised.

`load` reads the files in the form in which their authors publish them and returns tensors. It
downloads nothing, and it rejects every file that is not what it should be.

Sources of the formats:

* digits: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998, as bundled
  with scikit-learn.
* fashion-mnist: H. Xiao, K. Rasul, R. Vollgraf, "Fashion-MNIST", arXiv:1708.07747, 2017, in the IDX
  format of Y. LeCun's MNIST page.
* cifar10, cifar100: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009,
  binary version.
* svhn: Y. Netzer et al., "Reading Digits in Natural Images with Unsupervised Feature Learning",
  NIPS workshop, 2011, format 2 (cropped digits).
"""

from __future__ import annotations

import dataclasses
import gzip
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.io
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional

__all__ = ["NAMES", "ImageData", "load"]

SIDE = 32
"""Height and width, in pixels, of every image that `load` returns."""


@dataclass(frozen=True)
class ImageData:
    """Labelled images, split into training and test images.

    Attributes:
        name: one of `NAMES`.
        train_images: float32, (N, channels, 32, 32); every channel has mean 0 and standard
            deviation 1 over all training images and pixels.
        train_labels: int64, (N,), from 0 to classes - 1.
        test_images: float32, (M, channels, 32, 32), scaled with the training images' statistics.
        test_labels: int64, (M,), from 0 to classes - 1.
        classes: number of classes.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int

    @property
    def channels(self) -> int:
        """Number of colour channels: 1 (grey) or 3 (red, green, blue)."""
        return self.train_images.shape[1]

    def to(self, device: torch.device | str) -> ImageData:
        """The same data with its four tensors on `device`."""
        return dataclasses.replace(
            self,
            train_images=self.train_images.to(device),
            train_labels=self.train_labels.to(device),
            test_images=self.test_images.to(device),
            test_labels=self.test_labels.to(device),
        )


class _Split(NamedTuple):
    images: NDArray[np.uint8]  # (N, channels, height, width)
    labels: NDArray[np.int64]  # (N,)


@dataclass(frozen=True)
class _Files:
    """How the files of one data set are laid out, and where they are to be had."""

    read: Callable[[Callable[[str], Path]], tuple[_Split, _Split]]
    names: tuple[str, ...]
    classes: int
    root: str
    home: str
    folder: str = ""  # sub-folder made by unpacking the authors' archive
    endings: tuple[str, ...] = ("",)


def load(name: str, root: str | Path | None = None) -> ImageData:
    """Read a data set.

    Args:
        name: "digits", "fashion-mnist", "cifar10", "cifar100" or "svhn".
        root: folder that holds the files. Default: /usr/share/datasets/fashion-mnist for
            fashion-mnist (Debian's package dataset-fashion-mnist), data/<name> below the current
            folder for cifar10, cifar100 and svhn. digits is part of scikit-learn and takes no root.

    Returns:
        All training and test images as float32 (N, channels, 32, 32), labels as int64 (N,).
        8x8 images are upsampled bilinearly, 28x28 images padded with 2 background pixels a side.

    Raises:
        FileNotFoundError: the folder or a file is missing; the message tells how the file must be
            named and where it is to be had.
        ValueError: unknown name, a root given for digits, or a file that is malformed: wrong magic
            number, truncated, of a size that is no multiple of its record's, a label out of range,
            different numbers of images and labels, a missing or wrongly shaped MATLAB variable.
    """
    if name not in NAMES:
        raise ValueError(f"unknown data set {name!r}, expected one of {', '.join(NAMES)}")
    if name == "digits":
        if root is not None:
            raise ValueError(f"digits is part of scikit-learn and takes no root, got {str(root)!r}")
        return _prepare(name, *_read_digits(), classes=10)
    files = _FILES[name]
    folder = Path(files.root if root is None else root)
    train, test = files.read(lambda file: _find(name, files, folder, file))
    return _prepare(name, train, test, files.classes)


def _prepare(name: str, train: _Split, test: _Split, classes: int) -> ImageData:
    train_images, test_images = _to_side(train.images), _to_side(test.images)
    std, mean = torch.std_mean(train_images, dim=(0, 2, 3), keepdim=True, correction=0)
    if not bool((std > 0).all()):
        raise ValueError(f"{name}: a channel of the training images is constant")
    for images in (train_images, test_images):
        images.sub_(mean).div_(std)
    return ImageData(
        name,
        train_images,
        torch.from_numpy(train.labels),
        test_images,
        torch.from_numpy(test.labels),
        classes,
    )


def _to_side(images: NDArray[np.uint8]) -> Tensor:
    pixels = torch.from_numpy(images.astype(np.float32, order="C"))
    if images.shape[-1] == 8:
        return functional.interpolate(pixels, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    margin = (SIDE - images.shape[-1]) // 2
    return functional.pad(pixels, (margin,) * 4) if margin else pixels


def _find(name: str, files: _Files, root: Path, file: str) -> Path:
    if not root.is_dir():
        raise FileNotFoundError(
            f"{name}: no folder {root}, which must hold {', '.join(files.names)}"
            f"{_gzip_note(files)}; the data set is to be had from {files.home}"
        )
    folders = [root, root / files.folder] if files.folder else [root]
    for folder in folders:
        for ending in files.endings:
            path = folder / (file + ending)
            if path.is_file():
                return path
    raise FileNotFoundError(
        f"{name}: no file named {' or '.join(file + ending for ending in files.endings)}"
        f" in {' or '.join(map(str, folders))}; the data set is to be had from {files.home}"
    )


def _gzip_note(files: _Files) -> str:
    return " (plain or with .gz added)" if ".gz" in files.endings else ""


def _checked_labels(path: Path, labels: NDArray[np.integer], low: int, high: int) -> None:
    wrong = np.flatnonzero((labels < low) | (labels > high))
    if wrong.size:
        first = int(wrong[0])
        raise ValueError(f"{path}: label {labels[first]} of image {first}, expected {low} to {high}")


def _read_digits() -> tuple[_Split, _Split]:
    digits = load_digits()
    images = digits.images.astype(np.uint8)[:, None]  # whole numbers from 0 to 16
    labels = digits.target.astype(np.int64)
    # The split is part of the data set here: it must not change with a training run's seed.
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    return _Split(images[train], labels[train]), _Split(images[test], labels[test])


def _read_fashion_mnist(find: Callable[[str], Path]) -> tuple[_Split, _Split]:
    def split(prefix: str) -> _Split:
        image_path = find(f"{prefix}-images-idx3-ubyte")
        label_path = find(f"{prefix}-labels-idx1-ubyte")
        images = _read_idx(image_path, (28, 28))
        labels = _read_idx(label_path, ()).astype(np.int64)
        if len(images) != len(labels):
            raise ValueError(f"{label_path}: {len(labels)} labels, but {image_path} holds {len(images)} images")
        _checked_labels(label_path, labels, 0, 9)
        return _Split(images[:, None], labels)

    return split("train"), split("t10k")


def _read_idx(path: Path, item_shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """An IDX file of bytes as uint8, (N, *item_shape)."""
    content = _read_bytes(path)
    dims = 1 + len(item_shape)
    header = 4 + 4 * dims
    if len(content) < header:
        raise ValueError(f"{path}: truncated, {len(content)} bytes where the header alone takes {header}")
    magic, expected = int.from_bytes(content[:4], "big"), 0x0800 + dims
    if magic != expected:
        raise ValueError(f"{path}: IDX magic number 0x{magic:08x}, expected 0x{expected:08x}")
    count, *shape = np.frombuffer(content, ">u4", dims, offset=4).tolist()
    if tuple(shape) != item_shape:
        raise ValueError(f"{path}: items of shape {tuple(shape)}, expected {item_shape}")
    if count == 0:
        raise ValueError(f"{path}: holds no items")
    size = header + count * math.prod(item_shape)
    if len(content) != size:
        raise ValueError(f"{path}: {len(content)} bytes, but the header's {count} items take {size}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(count, *item_shape)


def _read_bytes(path: Path) -> bytes:
    if path.suffix != ".gz":
        return path.read_bytes()
    try:
        with gzip.open(path) as file:
            return file.read()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file ({error})") from error


def _read_cifar10(find: Callable[[str], Path]) -> tuple[_Split, _Split]:
    parts = [_read_cifar(find(f"data_batch_{part}.bin"), (9,)) for part in range(1, 6)]
    train = _Split(
        np.concatenate([part.images for part in parts]),
        np.concatenate([part.labels for part in parts]),
    )
    return train, _read_cifar(find("test_batch.bin"), (9,))


def _read_cifar100(find: Callable[[str], Path]) -> tuple[_Split, _Split]:
    highest = (19, 99)  # coarse label, fine label
    return _read_cifar(find("train.bin"), highest), _read_cifar(find("test.bin"), highest)


def _read_cifar(path: Path, highest: tuple[int, ...]) -> _Split:
    """Records of label bytes (each up to its `highest`; the last counts) and 3x32x32 pixels."""
    content = np.fromfile(path, np.uint8)
    record = len(highest) + 3 * SIDE * SIDE
    if content.size == 0 or content.size % record:
        raise ValueError(f"{path}: {content.size} bytes, expected a positive multiple of the record's {record}")
    records = content.reshape(-1, record)
    for column, high in enumerate(highest):
        _checked_labels(path, records[:, column], 0, high)
    images = records[:, len(highest) :].reshape(-1, 3, SIDE, SIDE)
    return _Split(images, records[:, len(highest) - 1].astype(np.int64))


def _read_svhn(find: Callable[[str], Path]) -> tuple[_Split, _Split]:
    return _read_mat(find("train_32x32.mat")), _read_mat(find("test_32x32.mat"))


def _read_mat(path: Path) -> _Split:
    try:
        variables = scipy.io.loadmat(path, variable_names=("X", "y"))
    # The parser meets a broken file with many kinds of exception, some of them bare `Exception`s.
    except Exception as error:
        raise ValueError(f"{path}: not a readable MATLAB file ({error})") from error
    for variable in ("X", "y"):
        if variable not in variables:
            raise ValueError(f"{path}: variable {variable} is missing")
    pixels, labels = variables["X"], variables["y"]
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[:3] != (SIDE, SIDE, 3):
        raise ValueError(f"{path}: X is {pixels.dtype} of shape {pixels.shape}, expected uint8 (32, 32, 3, N)")
    count = pixels.shape[3]
    if labels.dtype.kind not in "iu" or labels.shape != (count, 1):
        raise ValueError(
            f"{path}: y is {labels.dtype} of shape {labels.shape}, expected integers ({count}, 1)"
            f" for the {count} images in X"
        )
    if count == 0:
        raise ValueError(f"{path}: holds no images")
    _checked_labels(path, labels[:, 0], 1, 10)
    # Digit 0 is stored as label 10.
    return _Split(pixels.transpose(3, 2, 0, 1), labels[:, 0].astype(np.int64) % 10)


_CIFAR_HOME = "https://www.cs.toronto.edu/~kriz/cifar.html (the binary version)"

_FILES = {
    "fashion-mnist": _Files(
        read=_read_fashion_mnist,
        names=(
            "train-images-idx3-ubyte",
            "train-labels-idx1-ubyte",
            "t10k-images-idx3-ubyte",
            "t10k-labels-idx1-ubyte",
        ),
        classes=10,
        root="/usr/share/datasets/fashion-mnist",
        home="Debian's package dataset-fashion-mnist or https://github.com/zalandoresearch/fashion-mnist",
        endings=("", ".gz"),
    ),
    "cifar10": _Files(
        read=_read_cifar10,
        names=(*(f"data_batch_{part}.bin" for part in range(1, 6)), "test_batch.bin"),
        classes=10,
        root="data/cifar10",
        home=_CIFAR_HOME,
        folder="cifar-10-batches-bin",
    ),
    "cifar100": _Files(
        read=_read_cifar100,
        names=("train.bin", "test.bin"),
        classes=100,
        root="data/cifar100",
        home=_CIFAR_HOME,
        folder="cifar-100-binary",
    ),
    "svhn": _Files(
        read=_read_svhn,
        names=("train_32x32.mat", "test_32x32.mat"),
        classes=10,
        root="data/svhn",
        home="http://ufldl.stanford.edu/housenumbers (format 2, cropped digits)",
    ),
}

NAMES = ("digits", *_FILES)
"""Names of the data sets that `load` reads."""
