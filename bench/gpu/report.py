"""Makes the document of runs on a GPU from their record.

python -m bench.gpu.report bench/results/gpu_DEVICE_DATE.jsonl
"""

from __future__ import annotations

import argparse
import math
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bench.gpu.record import Record, Row

BACKENDS = ("cpu", "cuda", "triton", "reference")
OURS = ("sofim_fused", "tests", "bench", "examples")  # Python packages of this project


def failures(found: Record) -> list[str]:
    """What makes the exit code 1.

    A missing package, another package's failure or a lack of time does not, unless because of it no test of a backend
    has passed whose tests were asked for: then nothing is known about its kernels.
    """
    bad = [f"test failed: {test['name']}" for test in found.of("test") if test["outcome"] == "failed"]
    bad += [f"not imported: {x['name']}: {x['reason']}" for x in found.of("uncollected") if not _lacking(x)]
    bad += [f"{x['name']}: {x['outcome']}: {x['detail']}" for x in found.of("sanitizer") if x["outcome"] == "failed"]
    bad += [
        f"{row['title']}: {row['provider']}: {row['reason']}"
        for row in found.rows.values()
        if row["status"] == "failed" and row["ours"]
    ]
    bad += [f"{part['name']}: {part['outcome']}" for part in found.of("part") if part["failed"]]
    tested = {backend_of(name) for name in found.passed()}
    return bad + [_untested(found, name) for name in sorted({*found.backends} - tested)]


def remarks(found: Record) -> list[str]:
    """What readers of the report have to know, although it does not make the run fail."""
    told = [note["name"] for note in found.of("note")]
    told += [f"tests left out: {x['name']}: {x['reason']}" for x in found.of("uncollected") if _lacking(x)]
    mild = [x for x in found.of("sanitizer") if x["outcome"] not in ("passed", "failed")]
    told += [f"{x['name']}: {x['outcome']} {x['detail']}" for x in mild]
    parts = [part for part in found.of("part") if part["outcome"] and not part["failed"]]
    return told + [f"{part['name']}: {part['outcome']}" for part in parts]


def tested(found: Record) -> str:
    """How many tests went how, and which were the slowest."""
    tests = found.of("test")
    counts = sorted(Counter(test["outcome"] for test in tests).items())
    slowest = sorted(tests, key=lambda test: -test["seconds"])[:3]
    times = ", ".join(f"{test['name'].rpartition('/')[2]} {test['seconds']:.0f} s" for test in slowest)
    return ", ".join(f"{count:,} {how}" for how, count in counts) + f" (slowest: {times})" if tests else "none was run"


def backend_of(test: str) -> str | None:
    """The backend that a test is about, from its name; ``None``: of none.

    It is the first parameter that names one. What follows it may be a device: ``test_x[reference-cuda]`` is about the
    backend "reference" on a CUDA device.
    """
    words = re.split(r"[-\[\]]", test.partition("[")[2])
    return next((word for word in words if word in BACKENDS), None)


def _untested(found: Record, backend: str) -> str:
    counts = Counter(test["outcome"] for test in found.of("test") if backend_of(test["name"]) == backend)
    tried = ", ".join(f"{count:,} {how}" for how, count in sorted(counts.items())) or "none was run"
    return (
        f"no test of the backend {backend} has passed ({tried}): nothing is known about its kernels. Repair what"
        " prevents it or give more time, and go on with --continue; or leave its tests out with --parts"
    )


def _lacking(line: Row) -> bool:
    """Whether a test file could not be imported because another project's package is not installed."""
    missing = re.search(r"No module named '?(\w+)", line["reason"])
    return missing is not None and missing[1] not in OURS


def _digits(value: float) -> str:
    """Three digits that count."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if value > 0 else "0"


def _spread(row: Row) -> str:
    if row["status"] != "measured":
        return f"{row['status']}: {row['reason']}"
    return f"{_digits(row['median'] * 1e3)} [{_digits(row['low'] * 1e3)}, {_digits(row['high'] * 1e3)}]"


def _number(name: str, show: Callable[[float], str] = _digits, unit: float = 1.0) -> Callable[[Row], str]:
    return lambda row: "" if row.get(name) is None else show(row[name] * unit)


COLUMNS: Mapping[str, Callable[[Row], str]] = {
    "provider": lambda row: str(row["provider"]),
    "step, ms [20 %, 80 %]": _spread,
    "/ SGD fused": _number("ratio", "{:.3f}".format),
    "device, ms": _number("device", _digits, 1e3),
    "/ SGD fused (device)": _number("device_ratio", "{:.3f}".format),
    "/ AdamW fused (device)": _number("to_adamw", "{:.3f}".format),
    "host, µs": _number("host", _digits, 1e6),
    "B/param.": _number("bytes_per_parameter", "{:.0f}".format),
    "GB/s": _number("gb_per_s", "{:.0f}".format),
    "of copy": _number("share", "{:.0%}".format),
    "sets": _number("sets", "{:.0f}".format),
    "rounds": _number("rounds", "{:.0f}".format),
    "run": lambda row: str(row["run"]),
}
LEGEND = (
    "Step: steps one after the other, by device events, median and percentiles; where the host is the slower one it is"
    " the host's time. Device: with all steps in the queue beforehand, where the step is not the device's time anyway."
    " Host: until a step returns that finds the queue empty. Ratios are medians over rounds in which providers are"
    " timed in turns, a few at a time, always with SGD fused. Bytes are what the sweeps read and write per parameter,"
    " GB/s these by the device's time, beside the rate of `Tensor.copy_` (read and written) in the same run. From"
    " memory: sets of tensors are used in turn that together exceed the L2 cache four times. In cache: one set."
    " Training: `zero_grad`, forward, backward and `step` on one batch, each optimizer with a copy of one network."
)


def _to_adamw(row: Row, adamw: Row | None) -> float | None:
    """A row's ratio to AdamW's, both as ratios to SGD fused: each was timed in turns with it, if in the same run."""
    if adamw is None or adamw["run"] != row["run"] or not (row.get("device_ratio") and adamw.get("device_ratio")):
        return None
    return float(row["device_ratio"]) / float(adamw["device_ratio"])


def markdown(found: Record) -> str:
    """The record as a document."""
    device = found.runs[-1]["device"]
    blocks = ["# GPU acceptance run", _filled("; ".join(f"{name} {value}" for name, value in device.items()))]
    for number, run in enumerate(found.runs, 1):
        copied = f"; copy {found.copies[number]:.0f} GB/s" if number in found.copies else ""
        blocks.append(_filled(f"Run {number}, {run['date']}, code {run['code']}: `{run['command']}`{copied}."))
    for title, entries in (("Failures", failures(found)), ("Remarks", remarks(found))):
        blocks += [f"{title}: {len(entries) or 'none'}.", _items(entries)]
    right = [f"{name}: no errors" for name in sorted(found.passed("sanitizer"))]
    states = [f"backend {backend['name']}: {backend['state']}" for backend in found.of("backend")]
    blocks += ["## Correctness", _items([f"tests: {tested(found)}", *right, *states]), "## Times", _filled(LEGEND)]
    for title in dict.fromkeys(title for title, _ in found.rows):
        table = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
        for row in (row for (other, _), row in found.rows.items() if other == title):
            copied_at = found.copies.get(row["run"])
            more = {
                "share": row["gb_per_s"] / copied_at if copied_at and row.get("gb_per_s") else None,
                "to_adamw": _to_adamw(row, found.rows.get((title, "AdamW fused"))),
            }
            table.append("| " + " | ".join(_cell(show({**row, **more})) for show in COLUMNS.values()) + " |")
        blocks += [f"### {title}", "\n".join(table)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _items(entries: Sequence[str]) -> str:
    return "\n".join(f"- {_cell(entry)}" for entry in entries)


def _filled(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def write(path: Path) -> Record:
    """Write the document beside the record."""
    found = Record(path)
    draft = path.with_suffix(".md.new")
    draft.write_text(markdown(found), encoding="utf-8")
    draft.replace(path.with_suffix(".md"))  # a reader sees the old one or the new one
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the document of the record that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.report", description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path, help="the .jsonl of a run; the document goes beside it")
    path = parser.parse_args(arguments).record
    try:
        write(path)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
