"""The readers of `examples.data`, on small files in the authors' formats that the tests write."""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from sklearn.datasets import load_digits

from examples import data
from examples.data import ImageData
from tests.examples.support import Bytes, pixels, write_cifar10, write_cifar100, write_svhn

FASHION = Path("/usr/share/datasets/fashion-mnist")
FASHION_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def write_idx(path: Path, values: Bytes, zipped: bool = False) -> None:
    content = bytes((0, 0, 8, values.ndim))
    for extent in values.shape:
        content += extent.to_bytes(4, "big")
    content += values.tobytes()
    if zipped:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
    else:
        path.write_bytes(content)


def write_fashion(root: Path, zipped: bool = False) -> tuple[Bytes, Bytes]:
    """All four files; returns training and test images as (N, 1, 28, 28)."""
    train, test = pixels(7, 1, 28, seed=1), pixels(3, 1, 28, seed=2)
    write_idx(root / FASHION_FILES[0], train[:, 0], zipped)
    write_idx(root / FASHION_FILES[1], np.array([3, 0, 9, 1, 1, 2, 5], np.uint8), zipped)
    write_idx(root / FASHION_FILES[2], test[:, 0], zipped)
    write_idx(root / FASHION_FILES[3], np.array([9, 8, 0], np.uint8), zipped)
    return train, test


def assert_images(read: ImageData, train: Bytes, test: Bytes) -> None:
    """`read` holds `train` and `test`, padded to 32x32, with the training images' statistics."""
    margin = (32 - train.shape[-1]) // 2
    border = ((0, 0), (0, 0), (margin, margin), (margin, margin))
    padded = np.pad(train.astype(np.float64), border)
    mean = padded.mean((0, 2, 3), keepdims=True)
    std = padded.std((0, 2, 3), keepdims=True)
    for images, source in ((read.train_images, train), (read.test_images, test)):
        assert images.dtype == torch.float32
        assert images.is_contiguous()
        wanted = (np.pad(source.astype(np.float64), border) - mean) / std
        np.testing.assert_allclose(images.numpy(), wanted, rtol=0, atol=1e-5)


# Readers


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
def test_fashion_mnist(tmp_path: Path, zipped: bool) -> None:
    train, test = write_fashion(tmp_path, zipped)
    read = data.load("fashion-mnist", tmp_path)
    assert (read.name, read.channels, read.classes) == ("fashion-mnist", 1, 10)
    assert read.train_images.shape == (7, 1, 32, 32)
    assert read.train_labels.dtype == read.test_labels.dtype == torch.int64
    assert read.train_labels.tolist() == [3, 0, 9, 1, 1, 2, 5]
    assert read.test_labels.tolist() == [9, 8, 0]
    assert_images(read, train, test)


def test_fashion_mnist_takes_plain_and_zipped_files_side_by_side(tmp_path: Path) -> None:
    write_fashion(tmp_path)
    train, test = write_fashion(tmp_path, zipped=True)
    (tmp_path / FASHION_FILES[0]).unlink()
    (tmp_path / FASHION_FILES[3]).unlink()
    assert_images(data.load("fashion-mnist", tmp_path), train, test)


@pytest.mark.parametrize("folder", ["", "cifar-10-batches-bin"])
def test_cifar10(tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir(exist_ok=True)
    train, test = write_cifar10(tmp_path / folder)
    read = data.load("cifar10", tmp_path)
    assert (read.name, read.channels, read.classes) == ("cifar10", 3, 10)
    assert read.train_labels.dtype == read.test_labels.dtype == torch.int64
    assert read.train_labels.tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5]
    assert read.test_labels.tolist() == [7, 4]
    assert_images(read, train, test)


@pytest.mark.parametrize("folder", ["", "cifar-100-binary"])
def test_cifar100_has_the_fine_labels(tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir(exist_ok=True)
    train, test = write_cifar100(tmp_path / folder)
    read = data.load("cifar100", str(tmp_path))
    assert (read.name, read.channels, read.classes) == ("cifar100", 3, 100)
    assert read.train_labels.tolist() == [99, 0, 42, 10]
    assert read.test_labels.tolist() == [5, 98]
    assert_images(read, train, test)


def test_svhn_has_digit_0_where_the_file_says_10(tmp_path: Path) -> None:
    train, test = write_svhn(tmp_path)
    read = data.load("svhn", tmp_path)
    assert (read.name, read.channels, read.classes) == ("svhn", 3, 10)
    assert read.train_labels.dtype == read.test_labels.dtype == torch.int64
    assert read.train_labels.tolist() == [1, 0, 9, 5]
    assert read.test_labels.tolist() == [0, 2, 3]
    assert_images(read, train, test)


def test_digits() -> None:
    read = data.load("digits")
    assert (read.name, read.channels, read.classes) == ("digits", 1, 10)
    assert read.train_images.shape == (1437, 1, 32, 32)
    assert read.test_images.shape == (360, 1, 32, 32)
    assert read.train_labels.dtype == read.test_labels.dtype == torch.int64
    std, mean = torch.std_mean(read.train_images, correction=0)
    assert mean.item() == pytest.approx(0, abs=1e-5)
    assert std.item() == pytest.approx(1, abs=1e-5)


def test_digits_are_upsampled_bilinearly_and_each_lands_in_one_split() -> None:
    source = load_digits()
    read = data.load("digits")
    # Row i of the output lies at (i + 1/2)/4 - 1/2 of the input, and no further out than its edge.
    place = np.clip((np.arange(32) + 0.5) / 4 - 0.5, 0, 7)
    weights = np.maximum(0, 1 - np.abs(place[:, None] - np.arange(8)))
    large = torch.from_numpy(weights @ source.images @ weights.T).flatten(1)
    images = torch.cat([read.train_images, read.test_images]).double().flatten(1)
    labels = torch.cat([read.train_labels, read.test_labels])
    # The normalisation is monotonic, so the highest and the lowest pixel (16 and 0) reveal it.
    low, high = images.min(), images.max()
    distances = torch.cdist((images - low) / (high - low) * 16, large)
    nearest = distances.argmin(1)
    assert distances.min(1).values.max() < 1e-2
    assert sorted(nearest.tolist()) == list(range(1797))
    assert labels.tolist() == source.target[nearest.numpy()].tolist()


def test_digits_split_is_stratified_and_fixed() -> None:
    read = data.load("digits")
    every = np.bincount(load_digits().target)
    np.testing.assert_allclose(read.test_labels.bincount().numpy(), every / 5, atol=1)
    np.random.seed(1)
    torch.manual_seed(1)
    again = data.load("digits")
    assert torch.equal(read.train_images, again.train_images)
    assert torch.equal(read.test_labels, again.test_labels)


@pytest.mark.skipif(not FASHION.is_dir(), reason="Debian's package dataset-fashion-mnist is absent")
def test_fashion_mnist_of_debian() -> None:
    read = data.load("fashion-mnist")
    assert read.train_images.shape == (60000, 1, 32, 32)
    assert read.test_images.shape == (10000, 1, 32, 32)
    assert read.train_labels[:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]
    assert read.test_labels[:10].tolist() == [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]
    assert read.train_labels.bincount().tolist() == [6000] * 10
    # The unpadded pixels have mean 0.2860 and standard deviation 0.3530 of the full scale.
    kept = 28**2 / 32**2
    mean = 0.2860 * kept
    std = ((0.3530**2 + 0.2860**2) * kept - mean**2) ** 0.5
    lowest, highest = read.train_images[:, :, :2].aminmax()
    assert lowest == highest
    assert lowest.item() == pytest.approx(-mean / std, abs=1e-3)


def test_to_moves_all_tensors() -> None:
    moved = data.load("digits").to("meta")
    tensors = (moved.train_images, moved.train_labels, moved.test_images, moved.test_labels)
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert (moved.name, moved.classes) == ("digits", 10)


# Missing files

WRITERS: dict[str, Callable[[Path], object]] = {
    "fashion-mnist": write_fashion,
    "cifar10": write_cifar10,
    "cifar100": write_cifar100,
    "svhn": write_svhn,
}
HOMES = {
    "fashion-mnist": "dataset-fashion-mnist",
    "cifar10": "binary version",
    "cifar100": "binary version",
    "svhn": "ufldl.stanford.edu/housenumbers",
}


@pytest.mark.parametrize(
    ("name", "file", "named"),
    [
        *(("fashion-mnist", file, f"{file} or {file}.gz") for file in FASHION_FILES),
        *(("cifar10", f"data_batch_{part}.bin", f"data_batch_{part}.bin") for part in range(1, 6)),
        ("cifar10", "test_batch.bin", "test_batch.bin"),
        ("cifar100", "train.bin", "train.bin"),
        ("cifar100", "test.bin", "test.bin"),
        ("svhn", "train_32x32.mat", "train_32x32.mat"),
        ("svhn", "test_32x32.mat", "test_32x32.mat"),
    ],
)
def test_missing_file(tmp_path: Path, name: str, file: str, named: str) -> None:
    WRITERS[name](tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(FileNotFoundError) as caught:
        data.load(name, tmp_path)
    message = str(caught.value)
    assert f"{name}: no file named {named} in {tmp_path}" in message
    assert HOMES[name] in message


@pytest.mark.parametrize("name", WRITERS)
def test_missing_folder(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path)
    files = [path.name for path in tmp_path.iterdir()]
    with pytest.raises(FileNotFoundError) as caught:
        data.load(name, tmp_path / "nowhere")
    message = str(caught.value)
    assert f"{name}: no folder {tmp_path / 'nowhere'}" in message
    assert HOMES[name] in message
    assert all(file in message for file in files)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn"])
def test_default_folder(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / name).mkdir(parents=True)
    WRITERS[name](tmp_path / "data" / name)
    assert data.load(name).name == name


# Malformed files


def put(path: Path, position: int, value: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] = value
    path.write_bytes(content)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def zip_and_cut(path: Path) -> None:
    zipped = gzip.compress(path.read_bytes())
    path.unlink()
    path.with_name(path.name + ".gz").write_bytes(zipped[:-20])


def not_zipped(path: Path) -> None:
    path.rename(path.with_name(path.name + ".gz"))


def zip_and_damage(path: Path) -> None:
    zipped = bytearray(gzip.compress(path.read_bytes()))
    zipped[12:20] = b"\xff" * 8
    path.unlink()
    path.with_name(path.name + ".gz").write_bytes(zipped)


def mat(path: Path, **variables: object) -> None:
    scipy.io.savemat(path, variables)


X = np.zeros((32, 32, 3, 4), np.uint8)
Y = np.ones((4, 1), np.uint8)
IMAGES, LABELS, TEST_IMAGES, TEST_LABELS = FASHION_FILES


@pytest.mark.parametrize(
    ("name", "file", "damage", "problem"),
    [
        ("fashion-mnist", IMAGES, lambda p: put(p, 3, 1),
         "IDX magic number 0x00000801, expected 0x00000803"),
        ("fashion-mnist", LABELS, lambda p: put(p, 2, 13),
         "IDX magic number 0x00000d01, expected 0x00000801"),
        ("fashion-mnist", IMAGES, lambda p: cut(p, 15),
         "truncated, 15 bytes where the header alone takes 16"),
        ("fashion-mnist", LABELS, lambda p: cut(p, 0),
         "truncated, 0 bytes where the header alone takes 8"),
        ("fashion-mnist", TEST_IMAGES, lambda p: cut(p, 16 + 3 * 784 - 1),
         "2367 bytes, but the header's 3 items take 2368"),
        ("fashion-mnist", TEST_LABELS, lambda p: p.write_bytes(p.read_bytes() + b"0"),
         "12 bytes, but the header's 3 items take 11"),
        ("fashion-mnist", IMAGES, lambda p: put(p, 11, 27),
         "items of shape (27, 28), expected (28, 28)"),
        ("fashion-mnist", LABELS, lambda p: write_idx(p, np.zeros(0, np.uint8)),
         "holds no items"),
        ("fashion-mnist", LABELS, lambda p: write_idx(p, np.zeros(6, np.uint8)),
         "6 labels, but {root}/train-images-idx3-ubyte holds 7 images"),
        ("fashion-mnist", TEST_LABELS, lambda p: put(p, 9, 10),
         "label 10 of image 1, expected 0 to 9"),
        ("fashion-mnist", IMAGES, zip_and_cut, "not a whole gzip file"),
        ("fashion-mnist", TEST_IMAGES, not_zipped, "not a whole gzip file"),
        ("fashion-mnist", IMAGES, zip_and_damage, "not a whole gzip file"),
        ("cifar10", "data_batch_3.bin", lambda p: cut(p, 6145),
         "6145 bytes, expected a positive multiple of the record's 3073"),
        ("cifar10", "test_batch.bin", lambda p: cut(p, 0),
         "0 bytes, expected a positive multiple of the record's 3073"),
        ("cifar10", "data_batch_5.bin", lambda p: put(p, 3073, 10),
         "label 10 of image 1, expected 0 to 9"),
        ("cifar100", "train.bin", lambda p: cut(p, 3073),
         "3073 bytes, expected a positive multiple of the record's 3074"),
        ("cifar100", "train.bin", lambda p: put(p, 2 * 3074, 20),
         "label 20 of image 2, expected 0 to 19"),
        ("cifar100", "test.bin", lambda p: put(p, 1, 100),
         "label 100 of image 0, expected 0 to 99"),
        ("svhn", "train_32x32.mat", lambda p: mat(p, y=Y), "variable X is missing"),
        ("svhn", "test_32x32.mat", lambda p: mat(p, X=X), "variable y is missing"),
        ("svhn", "train_32x32.mat", lambda p: mat(p, X=X.astype(float), y=Y),
         "X is float64 of shape (32, 32, 3, 4), expected uint8 (32, 32, 3, N)"),
        ("svhn", "train_32x32.mat", lambda p: mat(p, X=X.transpose(3, 0, 1, 2), y=Y),
         "X is uint8 of shape (4, 32, 32, 3), expected uint8 (32, 32, 3, N)"),
        ("svhn", "train_32x32.mat", lambda p: mat(p, X=X, y=Y[:3]),
         "y is uint8 of shape (3, 1), expected integers (4, 1) for the 4 images in X"),
        ("svhn", "train_32x32.mat", lambda p: mat(p, X=X, y=Y.astype(float)),
         "y is float64 of shape (4, 1), expected integers (4, 1)"),
        ("svhn", "train_32x32.mat", lambda p: mat(p, X=X[..., :0], y=Y[:0]), "holds no images"),
        ("svhn", "test_32x32.mat", lambda p: mat(p, X=X, y=Y * 11),
         "label 11 of image 0, expected 1 to 10"),
        ("svhn", "test_32x32.mat", lambda p: mat(p, X=X, y=Y * 0),
         "label 0 of image 0, expected 1 to 10"),
        ("svhn", "test_32x32.mat", lambda p: cut(p, 1000), "not a readable MATLAB file"),
        ("svhn", "train_32x32.mat", lambda p: cut(p, 0), "not a readable MATLAB file"),
        ("svhn", "train_32x32.mat", lambda p: p.write_text("no such thing" * 100),
         "not a readable MATLAB file"),
    ],
)  # fmt: skip
def test_malformed_file(tmp_path: Path, name: str, file: str, damage: Callable[[Path], object], problem: str) -> None:
    WRITERS[name](tmp_path)
    data.load(name, tmp_path)
    damage(tmp_path / file)
    wanted = f"^{re.escape(str(tmp_path / file))}.*: {re.escape(problem.format(root=tmp_path))}"
    with pytest.raises(ValueError, match=wanted):
        data.load(name, tmp_path)


def test_constant_training_images(tmp_path: Path) -> None:
    write_fashion(tmp_path)
    write_idx(tmp_path / IMAGES, np.zeros((7, 28, 28), np.uint8))
    with pytest.raises(ValueError, match="fashion-mnist: a channel of the training images is con"):
        data.load("fashion-mnist", tmp_path)


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="unknown data set 'mnist', expected one of digits, fash"):
        data.load("mnist")


def test_digits_take_no_root(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="digits is part of scikit-learn and takes no root, got"):
        data.load("digits", tmp_path)
