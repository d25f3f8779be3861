"""Results of runs as JSON lines: written results remain if the process ends for any reason."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import torch

from bench import report

__all__ = ["Store"]


class Store:
    """A file of results by key, to which one process appends.

    A line is ``{"key": ..., "result": ...}``; or ``{"machine": ...}``, for the results that follow. The last line may
    be torn, where a process was killed while it wrote: it is cut off when the next result is added.

    Args:
        path: of the file, which need not exist.

    Raises:
        ValueError: a line other than the last is no such record; the message has its number.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.machines: list[dict[str, Any]] = []
        self._results: dict[str, Any] = {}
        self._file: IO[bytes] | None = None
        self._whole = 0
        content = path.read_bytes() if path.exists() else b""
        for number, line in enumerate(content.splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
                break
            self._read(line, number)
            self._whole += len(line)

    def _read(self, line: bytes, number: int) -> None:
        try:
            record = json.loads(line)
            if "machine" in record:
                self.machines.append(record["machine"])
            else:
                self._results[record["key"]] = record["result"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path}, line {number}: not a record of results ({error!r})") from error

    def __contains__(self, key: str) -> bool:
        return key in self._results

    def __getitem__(self, key: str) -> Any:
        """The result.

        Raises:
            KeyError: there is none.
        """
        return self._results[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._results)

    def __len__(self) -> int:
        return len(self._results)

    def add(self, key: str, result: Any) -> None:
        """Write a result down, so that it survives this process.

        Raises:
            ValueError: there is one for this key.
        """
        if key in self:
            raise ValueError(f"{self.path}: there is a result for {key} already")
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab")
            self._file.truncate(self._whole)
            machine = _machine()
            if machine not in self.machines[-1:]:
                self.machines.append(machine)
                self._write({"machine": machine})
        self._write({"key": key, "result": result})
        self._results[key] = result

    def _write(self, record: Any) -> None:
        assert self._file is not None
        # JSON has no NaN and no infinity: a run that has them stores a word instead.
        self._file.write(json.dumps(record, separators=(",", ":"), allow_nan=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; the next result opens it again."""
        if self._file is not None:
            self._whole = self._file.tell()
            self._file.close()
            self._file = None


def _machine() -> dict[str, Any]:
    return {
        **report.machine(torch.get_num_threads()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "pytorch-optimizer": _version("pytorch-optimizer"),
        "date": datetime.date.today().isoformat(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # on a machine that compares no optimizer of it
        return None
