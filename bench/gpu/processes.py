"""Commands with a time limit."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from bench.gpu.record import ROOT

_PR_SET_PDEATHSIG = 1


class Output(NamedTuple):
    """How a command went.

    Attributes:
        code: its exit code; ``None`` if it was ended.
        text: what it has printed.
        quiet: it was ended because nothing came from it for too long.
    """

    code: int | None
    text: str
    quiet: bool = False

    def __str__(self) -> str:
        """How it ended, for a sentence."""
        return "took too long" if self.code is None else f"ended with exit status {self.code}: {tail(self.text)}"


class Command:
    """A command that runs in the repository's root, with all that it starts; it does not outlive this process.

    Args:
        command: program and arguments.
        environment: of the process.
    """

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115
        self._seen = 0
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=self._printed,
            stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=_end_with_parent,
        )  # fmt: skip

    def wait(self, seconds: float, see: Callable[[str], object] | None = None, quiet: float = 1e9) -> Output:
        """Wait for its end, and end it when the time is over or when it has been quiet for too long.

        Args:
            seconds: how long to wait.
            see: takes each line that it prints, soon after it came.
            quiet: seconds without a line.
        """
        deadline, heard = time.monotonic() + seconds, time.monotonic()
        try:
            while (code := self._process.poll()) is None:
                heard = time.monotonic() if self._new_lines(see) else heard
                if (silent := time.monotonic() - heard > quiet) or time.monotonic() > deadline:
                    return Output(None, self._text(), silent)
                time.sleep(0.05)
            self._new_lines(see)
            return Output(code, self._text())
        finally:
            self.end()

    def end(self) -> None:
        """End it, and all of its session."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that waits for a device may take its time
            self._process.wait(5)
        self._printed.close()

    def _new_lines(self, see: Callable[[str], object] | None) -> bool:
        *lines, _ = os.pread(self._printed.fileno(), 1 << 24, self._seen).split(b"\n")
        for line in lines:
            self._seen += len(line) + 1
            if see is not None:
                see(line.decode(errors="replace"))
        return bool(lines)

    def _text(self) -> str:
        return os.pread(self._printed.fileno(), 1 << 24, 0).decode(errors="replace")


def _end_with_parent() -> None:
    with contextlib.suppress(Exception):  # not Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def tail(text: str, lines: int = 1) -> str:
    """The last lines of an output, without the paths of this machine."""
    return "\n".join(text.rstrip().splitlines()[-lines:]).replace(f"{ROOT}{os.sep}", "")


def message(error: BaseException) -> str:
    """An error in one line."""
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first.strip()}".replace(f"{ROOT}{os.sep}", "")[:300]
