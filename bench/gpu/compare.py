"""Times two or more builds of the package on one GPU, in turns, each in processes of its own.

    python3 -m bench.gpu.compare old=FOLDER new=FOLDER --rows "(lenet-5|1000x1K), float32.*: SOFIM cuda"

Each folder holds a whole package ``sofim_fused`` with its native parts: two builds of one extension module cannot be
loaded in one process. Prints medians over rounds, and the medians of the rounds' ratios to the first build. At the end
stands how fast each build's processes ran a loop in Python: where that differs, times with Python in them say nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from bench.gpu import record
from bench.gpu.processes import Command
from bench.gpu.record import ROOT, Record

MEASURED = ("median", "device", "host")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; the exit code is 1 if nothing was measured."""
    parser = argparse.ArgumentParser(prog="python3 -m bench.gpu.compare", description=__doc__.splitlines()[0])
    parser.add_argument("builds", nargs="+", metavar="NAME=FOLDER", help="the first is what others are compared to")
    parser.add_argument("--rows", default="", metavar="PATTERN", help="as bench.gpu takes it")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=60.0, help="for a build in a round (default: %(default)g)")
    parser.add_argument("--each", type=float, default=1.0, metavar="SECONDS", help="for rows that are timed in turns")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args(arguments)
    builds = dict(build.partition("=")[::2] for build in options.builds)
    for name, folder in builds.items():
        if not Path(folder, "sofim_fused", "__init__.py").is_file():
            parser.error(f"{name}={folder}: there is no sofim_fused/__init__.py in that folder")
    found: dict[tuple[str, str], list[dict[str, record.Row]]] = {}  # by title and provider, round by round
    python: dict[str, list[float]] = {name: [] for name in builds}
    with tempfile.TemporaryDirectory() as temporary:
        for turn in range(options.rounds):
            for name, folder in builds.items():
                path = Path(temporary, f"{turn}-{name}.jsonl")
                record.add(path, "run", command="", date="", device={}, code="")
                environment = {**os.environ, "PYTHONSAFEPATH": "1"}  # or the folder that this runs in came first
                environment["PYTHONPATH"] = os.pathsep.join((str(Path(folder).resolve()), str(ROOT)))
                command = [sys.executable, "-m", "bench.gpu.rows", str(path), "--device", options.device]
                command += ["--rows", options.rows, "--each", str(options.each), "--seconds", str(options.seconds)]
                done = Command(command, environment).wait(options.seconds + 30)
                if done.code != 0:
                    print(f"round {turn}, {name}: {done}")
                results = Record(path)
                python[name] += [line["ms"] for line in results.of("python")]
                for key, row in results.rows.items():
                    if row["status"] == "measured":
                        found.setdefault(key, [{} for _ in range(options.rounds)])[turn][name] = row
    for (title, provider), rounds in found.items():
        for name in builds:
            told = []
            for what in MEASURED:
                both = [(x[name][what], x.get(next(iter(builds)), {}).get(what)) for x in rounds if name in x]
                values = [mine for mine, _ in both if mine]
                ratios = [mine / first for mine, first in both if mine and first]
                if values and ratios:
                    told.append(f"{what} {median(values) * 1e6:.1f} µs ({median(ratios):.3f})")
            print(f"{title}: {provider}: {name}: {', '.join(told)}; {len([x for x in rounds if name in x])} rounds")
    loops = ", ".join(f"{name} {median(times):.1f} ms" for name, times in python.items() if times)
    print(f"a loop in Python: {loops or 'not timed'}")
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
