"""The processes of bench.gpu: commands with a time limit, and the worker that may hang or die."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.gpu_report import Row

ROOT = Path(__file__).parent.parent
STARTING = 120  # seconds until a worker begins


class Output(NamedTuple):
    """How a command went; ``code`` is ``None`` if it was ended for want of time."""

    code: int | None
    text: str


def run(
    command: Sequence[str],
    seconds: float,
    environment: dict[str, str],
    line: Callable[[str], None] | None = None,
) -> Output:
    """Run a command in the repository's root, with all that it starts, for so many seconds at most.

    Args:
        command: program and arguments.
        seconds: after which it is ended.
        environment: of the process.
        line: takes each line of its output as it comes.
    """
    deadline = time.monotonic() + seconds
    try:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        return Output(127, str(error))
    assert process.stdout is not None
    text, code = "", None
    with process.stdout as stream, selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        partial = ""
        try:
            while (left := deadline - time.monotonic()) > 0:
                if not selector.select(min(left, 0.5)):
                    if process.poll() is not None:  # what it has started may hold the pipe open
                        break
                    continue
                data = os.read(stream.fileno(), 1 << 16)
                if not data:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(max(0.1, deadline - time.monotonic()))
                    break
                *lines, partial = (partial + data.decode(errors="replace")).split("\n")
                for part in lines:
                    text += part + "\n"
                    if line is not None:
                        line(part)
            code = process.poll()
        finally:
            _end(process)
    return Output(code, text + partial)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all of its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    # One that waits for a device may take its time, and nothing here depends on it.
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)


def tail(text: str, lines: int = 12) -> str:
    """The last lines of an output, without the paths of this machine."""
    return "\n".join(text.rstrip().splitlines()[-lines:]).replace(str(ROOT) + os.sep, "")


# The worker


class Hang(NamedTuple):
    """A worker that died or was ended, and what it was doing.

    Attributes:
        doing: as the worker says.
        reason: why it is no more.
        late: it was going on, but the time for its job was over.
    """

    doing: str
    reason: str
    late: bool = False


class Workers:
    """One worker at a time, a new one after each that hung or died.

    Args:
        device: "cuda" or "cpu".
        scale: of miniature models.
        environment: of the processes.
        module: that is run.
    """

    def __init__(self, device: str, scale: int, environment: dict[str, str], module: str = "bench.gpu_worker") -> None:
        self._arguments = [sys.executable, "-m", module, "--device", device, "--scale", str(scale)]
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self._answers = -1
        self._files = contextlib.ExitStack()
        self._doing = self._log = -1
        self._buffer = b""

    def do(self, job: Row, limit: float) -> Iterator[Row | Hang]:
        """Give a job to the worker: its rows, and last a :class:`Hang` if it did not come to its end.

        Args:
            job: for the worker.
            limit: seconds after which it is ended.
        """
        process = self._started()
        deadline = time.monotonic() + limit
        os.pwrite(self._doing, json.dumps(["starting", STARTING]).ljust(400).encode(), 0)
        alive = time.monotonic()
        seen = 0
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(job).encode() + b"\n")
            process.stdin.flush()
        except OSError:
            yield self._hang("it could not be started")
            return
        with selectors.DefaultSelector() as selector:
            selector.register(self._answers, selectors.EVENT_READ)
            while True:
                if selector.select(0.2):
                    data = os.read(self._answers, 1 << 16)
                    if not data:
                        with contextlib.suppress(subprocess.TimeoutExpired):
                            process.wait(5)
                        yield self._hang(f"its process ended with exit status {process.returncode}")
                        return
                    alive = time.monotonic()
                    *lines, self._buffer = (self._buffer + data).split(b"\n")
                    for line in lines:
                        row = json.loads(line)
                        if row.get("done"):
                            return
                        yield row
                elif process.poll() is not None:  # something that it has started holds the pipe open
                    yield self._hang(f"its process ended with exit status {process.returncode}")
                    return
                if (stamp := os.fstat(self._doing).st_mtime_ns) != seen:
                    seen, alive = stamp, time.monotonic()
                _, patience = self._at()
                if time.monotonic() - alive > patience:
                    yield self._hang(f"nothing came for {patience:g} s")
                    return
                if time.monotonic() > deadline:
                    yield self._hang("its time was over", late=True)
                    return

    def close(self) -> None:
        """End the worker, if there is one; its log is gone."""
        self._end()
        self._files.close()
        self._doing = self._log = -1

    def log(self) -> str:
        """The last lines that workers have printed."""
        if self._log < 0:
            return ""
        size = os.fstat(self._log).st_size
        return tail(os.pread(self._log, size, 0).decode(errors="replace"), 25)

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._end()
        if self._log < 0:
            files = [self._files.enter_context(tempfile.TemporaryFile(buffering=0)) for _ in range(2)]  # noqa: SIM115
            self._doing, self._log = (file.fileno() for file in files)
        self._answers, theirs = os.pipe()
        doing = self._doing
        os.lseek(self._log, 0, os.SEEK_SET)  # where the process goes on
        os.truncate(self._log, 0)
        self._buffer = b""
        self._process = subprocess.Popen(
            [*self._arguments, "--answers", str(theirs), "--doing", str(doing)],
            cwd=ROOT,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            pass_fds=(theirs, doing),
            start_new_session=True,
        )
        os.close(theirs)
        return self._process

    def _end(self) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            with contextlib.suppress(OSError):
                self._process.stdin.close()
            _end(self._process)
            os.close(self._answers)
            self._process = None

    def _at(self) -> tuple[str, float]:
        doing, patience = json.loads(os.pread(self._doing, 400, 0))
        return str(doing), float(patience)

    def _hang(self, reason: str, late: bool = False) -> Hang:
        doing, _ = self._at()
        self._end()
        return Hang(doing, reason, late)
