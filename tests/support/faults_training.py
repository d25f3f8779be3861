"""Runs ``examples.train`` and kills it. Runs are forked from one process, which has loaded everything that they need.

``python -m tests.support.faults_training`` reads a line of JSON for each run from standard input. ``argv`` is the
command line. ``after`` is the number of seconds after which it is killed, or ``null``. ``at`` says where it kills
itself: the name of a moment in :data:`MOMENTS`, and in which replacement of a file, counted from the first; or
``null``. It answers with a line for each run: the exit code, as ``os.waitstatus_to_exitcode`` returns it, and how many
seconds the run took.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn

import torch
from matplotlib.figure import Figure

from examples import data, train
from sofim_fused import SOFIM

IMAGES = 96  # three batches of 32: then an epoch takes not much longer than writing a checkpoint


def die(*_: Any) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("SIGKILL cannot be ignored")


class Writings:
    """Kills the process at a moment of the n-th time that a file is replaced."""

    def __init__(self, moment: str, turn: int) -> None:
        self.moment, self.turn, self.turns = moment, turn, 0

    def now(self, moment: str) -> bool:
        self.turns += moment == "opened"  # the first of all
        return (self.moment, self.turn) == (moment, self.turns)


MOMENTS = ("opened", "half written", "written", "renamed")


def watch(writings: Writings) -> None:
    replacing, fsync, replace = train.replacing, os.fsync, os.replace

    @contextmanager
    def watched(path: Path) -> Iterator[IO[bytes]]:
        with replacing(path) as file:
            if writings.now("opened"):
                die()
            whole = io.BytesIO()
            yield whole
            content = whole.getvalue()
            if writings.now("half written"):
                file.write(content[: len(content) // 2])
                file.flush()
                fsync(file.fileno())
                die()
            file.write(content)

    train.replacing = watched
    os.fsync = lambda file: die() if writings.now("written") else fsync(file)

    def rename(source: Path, target: Path) -> None:
        replace(source, target)
        if writings.now("renamed"):
            die()

    os.replace = rename  # type: ignore[assignment]


def begin(argv: list[str], at: tuple[str, int] | None, log: Path) -> int:
    """Fork a run; return its process id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        if at is not None:
            watch(Writings(*at))
        status = train.main(argv)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def end(child: int, after: float | None) -> int:
    """Wait for a run, or kill it."""
    started = time.monotonic()
    while after is not None and time.monotonic() - started < after:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.0005)
    if after is not None:
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def small(images: data.ImageData) -> data.ImageData:
    some = {
        name: getattr(images, name)[:IMAGES].clone()
        for name in ("train_images", "train_labels", "test_images", "test_labels")
    }
    return dataclasses.replace(images, **some)


def main(log: Path) -> None:
    torch.set_num_threads(1)  # a fork has none of its parent's threads
    images = small(data.load("digits"))
    data.load = lambda *_: images
    train.plot = lambda *_: Figure(figsize=(1, 1))  # it would take longer than anything else
    # Imports what the first use imports. No backward pass is run here: after one, forks could not run another.
    assert SOFIM([torch.ones(1)]).backends
    Figure(figsize=(1, 1)).savefig(io.BytesIO(), format="png")
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        started = time.monotonic()
        child = begin(asked["argv"], asked["at"] and tuple(asked["at"]), log)
        code = end(child, asked["after"])
        print(json.dumps([code, time.monotonic() - started]), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
