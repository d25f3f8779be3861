"""What runs on a GPU have found, as lines of JSON: whatever ends a run, and when, what was written stays.

Every line has a ``kind``. A "run" has its command, date and device, hashes of the tested code ("code") and of the
code that times it ("bench"), and the native backends whose tests it was asked for ("backends"). What follows belongs
to it: "test" (name, outcome, seconds, and the part of the run that it ran in), "uncollected" (name of a test file,
reason), "backend" (name, state), "copy" (the device's copy bandwidth), "python" (the speed of Python), "row" (title,
provider, status and times), "sanitizer" (name, outcome, detail), "part" (name, outcome, failed) and "note" (name).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

ROOT = Path(__file__).parents[2]
VARIABLE = "SOFIM_GPU_RECORD"  # of the environment: the file, for tests
PART = "SOFIM_GPU_PART"  # of the environment: the part of the run that tests belong to
CODE = ("csrc", "sofim_fused", "tests", "setup.py")  # what is tested
BENCH = ("bench", "examples")  # what times it: bench takes networks from examples
SUFFIXES = (".py", ".h", ".cpp", ".cu", ".cuh")


def add(path: Path, kind: str, **values: Any) -> None:
    """Append a line. Several processes may: a line is written in one go."""
    line = json.dumps({"kind": kind, **values}, ensure_ascii=False, allow_nan=False) + "\n"
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)


def whole(content: bytes) -> bytes:
    """The lines that were written to their ends: a process may have been killed in the middle of the last one."""
    return content[: content.rfind(b"\n") + 1]


class Record:
    """What the lines of a file come to.

    A time stays what it was, and is shown with the number of its run. What says that the code is right, and what
    failed, holds for the same code alone: that of the last run. A row without a time, and a test file that could not
    be imported, may be the fault of ``BENCH``: once that has changed, these are dropped as well, to be tried again.

    Attributes:
        runs: each run's own line.
        copies: the copy bandwidth in GB/s, by number of the run, from 1.
        rows: of times, by title and provider, each with the number of its run.
        found: other lines, by kind and name.
        backends: whose tests the runs of this code were asked for.

    Raises:
        ValueError: the file is no such record; the message names it.
    """

    def __init__(self, path: Path) -> None:
        self.runs: list[Row] = []
        self.copies: dict[int, float] = {}
        self.rows: dict[tuple[str, str], Row] = {}
        self.found: dict[str, dict[str, Row]] = {}
        self.backends: list[str] = []
        try:
            lines: list[Row] = [json.loads(line) for line in whole(path.read_bytes()).splitlines()]
            last = [line for line in lines if line["kind"] == "run"][-1]
            for line in lines:
                self._take(line, last)
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{path} has no results of bench.gpu ({type(error).__name__}): give its .jsonl") from None

    def _take(self, line: Row, last: Row) -> None:
        kind, run = line["kind"], len(self.runs)
        same = run > 0 and self.runs[-1]["code"] == last["code"]
        same_bench = same and self.runs[-1].get("bench") == last.get("bench")
        if kind == "run":
            self.runs.append(line)
            if line["code"] == last["code"]:
                self.backends = list(dict.fromkeys([*self.backends, *line.get("backends", [])]))
        elif kind == "copy":
            self.copies[run] = line["gb_per_s"]
        elif kind == "row":
            if same_bench or line["status"] == "measured":
                self.rows[line["title"], line["provider"]] = {"run": run, **line}
        elif same_bench or (same and kind != "uncollected"):
            self.found.setdefault(kind, {})[line["name"]] = line

    def of(self, kind: str) -> list[Row]:
        """The last line of each name."""
        return list(self.found.get(kind, {}).values())

    def passed(self, kind: str = "test") -> set[str]:
        """Names of tests, or of other things with an outcome, that need not be done again."""
        return {line["name"] for line in self.of(kind) if line["outcome"] == "passed"}


def code_of(root: Path = ROOT, names: Sequence[str] = CODE) -> str:
    """What code amounts to: a hash over all of its files.

    Args:
        root: the folder in which ``names`` are.
        names: of files, and of folders with all that is in them.
    """
    found = hashlib.sha256()
    files: Sequence[Path] = [
        file for name in names for file in ([root / name] if (root / name).is_file() else (root / name).rglob("*"))
    ]
    for file in sorted(file for file in files if file.suffix in SUFFIXES):
        found.update(f"{file.relative_to(root).as_posix()}\n".encode() + file.read_bytes() + b"\n")
    return found.hexdigest()[:12]
