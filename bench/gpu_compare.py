"""Times two or more builds of the package on one GPU, in turns, each in a separate process.

    python3 -m bench.gpu_compare --packages old=/folder/old new=/folder/new --models 1000x1K lenet-5

Each folder holds a whole package ``sofim_fused`` with its native parts. Two builds of one extension module cannot be
loaded in one process, so each build has its own process: they measure a section one after the other, over several
rounds. Ratios are to the first package, medians over rounds. Prints the table, and with ``--output`` writes all rows as
JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench.gpu import say
from bench.gpu_processes import ROOT, Hang, Workers
from bench.gpu_report import Row, Section, table
from bench.shapes import GPU_MODELS

MEASURED = ("median", "device", "host")


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python3 -m bench.gpu_compare", description=__doc__.splitlines()[0])
    parser.add_argument("--packages", nargs="+", required=True, metavar="NAME=FOLDER", help="the first is the baseline")
    parser.add_argument(
        "--models", nargs="+", choices=list(GPU_MODELS), default=["1000x1K", "lenet-5"], metavar="MODEL"
    )
    parser.add_argument(
        "--cached", nargs="+", choices=list(GPU_MODELS), default=["1000x1K", "lenet-5"], metavar="MODEL",
        help="with one set of tensors, which the cache holds; others come from memory",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--providers", nargs="+", default=["SOFIM cuda", "SOFIM cuda, guarded"], metavar="NAME")
    parser.add_argument("--backends", nargs="+", default=["cuda"], metavar="NAME")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=1.0, help="for the steps of a section in a round")
    parser.add_argument("--budget", type=float, default=90.0, metavar="SECONDS", help="start no round after this time")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--scale", type=int, default=4, help="with --device cpu: how large a model is at most")
    parser.add_argument("--output", type=Path, help="a JSON file")
    options = parser.parse_args(arguments)
    options.packages = dict(package.partition("=")[::2] for package in options.packages)
    for name, folder in options.packages.items():
        if not Path(folder, "sofim_fused", "__init__.py").is_file():
            parser.error(f"--packages {name}={folder}: there is no sofim_fused/__init__.py in that folder")
    return options


def compared(rows: Sequence[Row], packages: Sequence[str]) -> list[Row]:
    """For each section, provider and package: medians over rounds, and the median of the rounds' ratios to the first.

    Args:
        rows: as the workers answer, each with its "package" and "round".
        packages: their names, the baseline first.
    """
    found: list[Row] = []
    for section, provider in dict.fromkeys((row["section"], row["provider"]) for row in rows):
        mine = [row for row in rows if (row["section"], row["provider"]) == (section, provider)]
        by_round: dict[int, dict[str, Row]] = {}
        for row in mine:
            by_round.setdefault(row["round"], {})[row["package"]] = row
        for package in packages:
            result: Row = {"section": section, "provider": provider, "package": package}
            for name in MEASURED:
                values = [row[name] for row in mine if row["package"] == package and row[name] is not None]
                ratios = [
                    turn[package][name] / turn[packages[0]][name]
                    for turn in by_round.values()
                    if {package, packages[0]} <= turn.keys() and turn[package][name] and turn[packages[0]][name]
                ]
                result[name] = median(values) if values else None
                result[f"{name}_ratio"] = median(ratios) if ratios else None
                result["rounds"] = len(ratios)
            found.append(result)
    return found


def _number(row: Row, name: str, unit: float, form: str) -> str:
    return "" if row[name] is None else form.format(row[name] * unit)


COLUMNS: dict[str, Any] = {
    "section": lambda row: row["section"],
    "provider": lambda row: row["provider"],
    "package": lambda row: row["package"],
    "step, µs": lambda row: _number(row, "median", 1e6, "{:.1f}"),
    "/ first": lambda row: _number(row, "median_ratio", 1, "{:.3f}"),
    "device, µs": lambda row: _number(row, "device", 1e6, "{:.1f}"),
    "/ first (device)": lambda row: _number(row, "device_ratio", 1, "{:.3f}"),
    "host, µs": lambda row: _number(row, "host", 1e6, "{:.1f}"),
    "rounds": lambda row: str(row["rounds"]),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; the exit code is 1 if something was not measured."""
    options = parsed(arguments)
    started = time.monotonic()
    workers = {}
    for name, folder in options.packages.items():
        paths = [str(Path(folder).resolve()), str(ROOT)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
        workers[name] = Workers(options.device, options.scale, environment)
    sections = [Section(model, options.dtype, cached=model in options.cached) for model in options.models]
    rows: list[Row] = []
    problems: list[str] = []
    try:
        for turn in range(options.rounds):
            if time.monotonic() - started > options.budget:
                say(f"the budget ended after {turn} rounds")
                break
            for section in sections:
                for name, worker in workers.items():
                    job = {
                        "kind": "timing",
                        "section": section._asdict(),
                        "backends": options.backends,
                        "seconds": options.seconds,
                        "only": options.providers,
                        "exclude": [],
                        "deadline": time.time() + 30,
                        "copy_gb_per_s": None,
                    }
                    for row in worker.do(job, 60):
                        if isinstance(row, Hang) or row.get("status") != "measured":
                            problems.append(f"{name}: {section.title}: {row}")
                        else:
                            rows.append({"package": name, "round": turn, **row})
    finally:
        for worker in workers.values():
            worker.close()
    result = compared(rows, list(workers))
    say(table(COLUMNS, result))
    for problem in problems:
        say(problem)
    if options.output is not None:
        document = {"command": ["python3", "-m", "bench.gpu_compare"], "rows": rows, "result": result}
        options.output.write_text(json.dumps({**document, "problems": problems}, indent=1) + "\n", encoding="utf-8")
    return 1 if problems or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
