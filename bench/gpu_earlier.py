"""What bench.gpu takes over from an earlier run, so that the next one does only what has no result yet.

Measured rows stay, each with the number of its run: runs may be of different days and states of the code, and only rows
of one run are comparable. What says that the code is right (tests, smoke, compute-sanitizer) holds for the same code
alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bench.gpu_report import DONE, PENDING, Row

CODE = ("csrc", "sofim_fused", "tests", "setup.py")
SUFFIXES = (".py", ".h", ".cpp", ".cu")
BUILD = "_build.json"
NATIVE = (BUILD, "_C.*.so", "_cpu_*.so")  # what native parts consist of at least
UNFINISHED = "not finished in its time"  # a verdict of compute-sanitizer's


def code_of(root: Path) -> str:
    """What the tested code amounts to: a hash over all of its files."""
    found = hashlib.sha256()
    files = [file for name in CODE for file in ([root / name] if (root / name).is_file() else (root / name).rglob("*"))]
    for file in sorted(file for file in files if file.suffix in SUFFIXES):
        found.update(f"{file.relative_to(root).as_posix()}\n".encode() + file.read_bytes() + b"\n")
    return found.hexdigest()[:12]


class Earlier(NamedTuple):
    """What is known before a run.

    Attributes:
        data: of the record, without what is only this run's; the rows and the runs that they belong to.
        providers: by section, those that were timed.
        steps: of the plan, that need not be done again.
        passed: ids of tests that passed with this code. ``failed``: likewise.
        notes: what a reader has to know of it.
    """

    data: Row
    providers: dict[str, list[str]]
    steps: frozenset[str]
    passed: frozenset[str]
    failed: frozenset[str]
    notes: Sequence[str]


NOTHING = Earlier({}, {}, frozenset(), frozenset(), frozenset(), ())


def read(path: Path) -> Row:
    """The results of an earlier run.

    Raises:
        ValueError: the file is none; the message names it.
    """
    try:
        data: Row = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data["timing"], list) or not isinstance(data["device"]["name"], str):
            raise TypeError
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} has no results of bench.gpu ({type(error).__name__}): give its .json") from None
    return data


def runs_of(data: Row) -> list[Row]:
    """The runs that an earlier file is made of; one from before they were told apart is a single one."""
    if "runs" in data:
        return list(data["runs"])
    return [{key: data.get(key) for key in ("command", "date", "code", "budget", "elapsed", "copy_gb_per_s")}]


def taken_over(data: Row, device: Row, code: str) -> Earlier:
    """What of an earlier run holds for a run on a device.

    Args:
        data: the earlier results.
        device: on which the run is, as :func:`bench.gpu_device.information` says.
        code: the tested code, as :func:`code_of` says.
    """
    theirs = data["device"]
    runs = runs_of(data)
    same_code = data.get("code") == code
    same_kind = theirs["versions"] == device["versions"] and all(
        theirs["more"].get(key) == device["more"].get(key) for key in ("compute capability",)
    )
    tests: Row = data.get("tests") or {}
    passed, failed = (frozenset(tests.get(key, ()) if same_code and same_kind else ()) for key in ("passed", "failed"))
    if theirs["name"] != device["name"] or not same_kind:
        what = f"{len(passed)} tests that passed there are left out" if passed else "all is done anew"
        return NOTHING._replace(
            passed=passed, notes=[f"the earlier results are of {theirs['name']}, with other speeds: {what}"]
        )
    timing = [{"run": len(runs), **row} for row in data["timing"] if row["status"] != PENDING]
    training = [{"run": len(runs), **row} for row in data["training"]]
    providers: dict[str, list[str]] = {}
    for row in timing:
        providers.setdefault(row["section"], []).append(row["provider"])
    steps = {f"training: {row['model']}" for row in training}
    kept: Row = {"runs": runs, "timing": timing, "training": training}
    if same_code:
        kept["smoke"] = [row for row in data["smoke"] if row["status"] != PENDING]
        kept["sanitizer"] = {name: verdict for name, verdict in data["sanitizer"].items() if verdict != UNFINISHED}
        unfinished = {name.partition(",")[0] for name in data["sanitizer"].keys() - kept["sanitizer"].keys()}
        done = {name for name, status in data["plan"].items() if status == DONE}
        steps |= {name for name in done if name.startswith("sanitizer ") and name.split()[1] not in unfinished}
        if len(kept["smoke"]) == len(data["smoke"]) and all(row["status"] != "failed" for row in kept["smoke"]):
            steps |= done & {"smoke"}
        kept["failures"] = [what for what in data["failures"] if not what.startswith("tests: ")]
    if not same_code:
        notes = ["the code is not that of the earlier run: of that one only rows of times are here"]
    else:
        notes = [f"{len(passed)} tests that passed in an earlier run are left out"] if passed else []
    return Earlier(kept, providers, frozenset(steps), passed, failed, notes)
