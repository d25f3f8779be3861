"""How long a newcomer waits: from the sources to the table that the demo prints, in two revisions.

    python -m bench.first_minutes --before f4f6cf7

Runs ``make demo`` in a new folder without a virtual environment, once for each revision and round, in turns; a compiler
and Python's headers have to be there. Counts the time, and the CPU-seconds of all processes. Writes
bench/results/first_minutes.json and .md.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench.builds import sources_of

__all__ = ["main", "markdown", "measured"]

PHASE = re.compile(r"^\[ *(\d+) s\] (.+)$", re.MULTILINE)  # as the Makefile prints them
TARGET = 0.5  # of the earlier revision's time and CPU-seconds


def measured(place: Path) -> dict[str, Any]:
    """Run the demo in a folder with sources alone.

    Returns:
        ``wall`` and ``cpu``, seconds; ``phases``: pairs of when each began, in seconds, and what it is.

    Raises:
        RuntimeError: it failed; the message has the end of what it printed.
    """
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        ["make", "demo"], cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != 0:
        raise RuntimeError(f"make demo ended with {done.returncode}:\n{done.stdout[-2000:]}")
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    phases = [[int(begins), what] for begins, what in PHASE.findall(done.stdout)]
    return {"wall": wall, "cpu": cpu, "phases": phases}


def markdown(record: Mapping[str, Any]) -> str:
    """The results as a document."""
    runs: Mapping[str, Sequence[Mapping[str, Any]]] = record["runs"]
    lines = [
        "`make demo` in a new folder, from nothing to the trained table: seconds until its end, and CPU-seconds of all",
        f"its processes, medians of {len(runs['now'])} run(s) in turns. `{record['command']}`: {record['cpu']}, torch"
        f" {record['torch']}; {record['date']}. Packages came from a disk, so that nothing waited for a network.",
        "",
        "| | before | now | now / before | target |",
        "|---|---|---|---|---|",
    ]
    for key, label in (("wall", "seconds"), ("cpu", "CPU-seconds")):
        before, now = (median(run[key] for run in runs[name]) for name in ("before", "now"))
        said = f"{TARGET}: {'met' if now / before <= TARGET else 'missed'}"
        lines.append(f"| {label} | {before:.0f} | {now:.0f} | {now / before:.2f} | {said} |")
    lines += ["", "What it said, now:", ""]
    lines += [f"    [{begins:3} s] {what}" for begins, what in runs["now"][-1]["phases"]]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write down."""
    from bench.report import RESULTS, machine

    parser = argparse.ArgumentParser(prog="python -m bench.first_minutes", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--before", required=True, metavar="REVISION", help="the earlier revision, as git names it")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS / "first_minutes.json")
    options = parser.parse_args(arguments)
    where = machine(1)
    record: dict[str, Any] = {
        "command": f"python -m bench.first_minutes --before {options.before} --rounds {options.rounds}",
        "date": time.strftime("%Y-%m-%d"),
        "cpu": f"{where['cpu']}, {where['cores']} cores",
        "torch": where["torch"],
        "runs": {"before": [], "now": []},
    }
    for turn in range(options.rounds):
        for name, runs in sorted(record["runs"].items(), reverse=turn % 2 == 1):
            with tempfile.TemporaryDirectory() as folder:
                runs.append(measured(sources_of(options.before if name == "before" else None, Path(folder, "sources"))))
            print(f"{name}: {runs[-1]['wall']:.0f} s, {runs[-1]['cpu']:.0f} CPU-seconds", flush=True)
    options.output.write_text(json.dumps(record, indent=1) + "\n")
    options.output.with_suffix(".md").write_text(markdown(record))
    print(markdown(record))


if __name__ == "__main__":
    main()
