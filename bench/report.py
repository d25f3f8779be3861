"""Shared by the CPU benchmarks besides timing: memory measured in separate processes, targets, tables, documents."""

from __future__ import annotations

import ctypes
import datetime
import gc
import json
import math
import os
import platform
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import get_context
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from sofim_fused import backends

RESULTS = Path(__file__).parent / "results"
CPU = torch.device("cpu")

Row = dict[str, Any]


# Memory


def fresh_processes() -> Pool:
    """Runs each task in a process of its own, in which nothing was computed before."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["rich.console", "rich.table", "sofim_fused"])  # sofim_fused imports torch
    return context.Pool(1, maxtasksperchild=1)


def give_back() -> None:
    """Return free memory to the system, as its reuse would not be seen; reset the peak to what is resident now."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def resident(field: str) -> int:
    """Bytes: ``VmRSS`` now, ``VmHWM`` at the peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


# Verdicts


def verdict(target: float | None, ratio: float) -> Row:
    """Whether a ratio is at most what was aimed at, if anything was."""
    return {"target": target, "met": None if target is None else ratio <= target}


def targets(tables: Mapping[str, Sequence[Row]]) -> str:
    """Which targets were met, and every one that was missed; nothing where nothing was aimed at."""
    judged = [(key, row) for key, rows in tables.items() for row in rows if row.get("target") is not None]
    if not judged:
        return ""
    missed = [f"{key}: {row['provider']} on {_subject(row)}" for key, row in judged if not row["met"]]
    return f"Targets met: {len(judged) - len(missed)} of {len(judged)}." + (
        f" Missed: {'; '.join(missed)}." if missed else ""
    )


def _subject(row: Row) -> str:
    return f"{row['model']} (allocator {row['allocator']})" if "allocator" in row else str(row["model"])


# Tables


class Table(NamedTuple):
    """How rows are shown: columns by heading; ``baseline`` is the provider that ratios refer to."""

    title: str
    baseline: str
    columns: Mapping[str, Callable[[Row], str]]
    rows: Callable[[Any], Iterator[Row]]  # of a run
    note: str = ""


TEXT = {"model", "tensors", "gradients", "provider", "allocator"}  # columns that are set flush left


def digits(value: float) -> str:
    """A number with three significant digits."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def spread(row: Row, unit: float) -> str:
    """A median with the 20th and 80th percentile."""
    return f"{digits(row['median'] * unit)} [{digits(row['low'] * unit)}, {digits(row['high'] * unit)}]"


def optional(row: Row, name: str, form: str) -> str:
    """A number, or nothing where there is none."""
    return "" if row[name] is None else format(row[name], form)


def target(row: Row) -> str:
    """What was aimed at, and whether it was reached."""
    return "" if row["target"] is None else f"≤ {row['target']:g}: {'met' if row['met'] else 'missed'}"


# Documents


def machine(threads: int) -> Row:
    """The machine and the versions, on which the figures depend."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": threads,
        "torch": torch.__version__,
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "backend": backends.choose("auto", CPU).name,
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def markdown(record: Row, tables: Mapping[str, Table], introduction: str) -> str:
    """The tables as a document."""
    where = record["machine"]
    parts = [
        f"`{record['command']}`: {where['cpu']}, {where['cores']} cores, {where['threads']} threads,"
        f" {where['instruction_set']}, torch {where['torch']}, SOFIM's backend {where['backend']}; {record['date']}.",
        introduction,
        targets(record["tables"]),
    ]
    blocks = [_filled(part) for part in parts if part]
    for key, rows in record["tables"].items():
        table = tables[key]
        blocks.append(f"## {table.title}")
        if table.note:
            blocks.append(_filled(table.note))
        lines = ["| " + " | ".join(table.columns) + " |", "|---" * len(table.columns) + "|"]
        lines += ["| " + " | ".join(show(row) for show in table.columns.values()) + " |" for row in rows]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def _filled(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def printed(table: Table, rows: Sequence[Row]) -> RichTable:
    """A table for the terminal, with a line between models."""
    shown = RichTable(title=table.title, caption=table.note or None, box=box.SIMPLE_HEAD, title_justify="left")
    for heading in table.columns:
        shown.add_column(heading, justify="left" if heading in TEXT else "right")
    first = next(iter(table.columns.values()))
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        cells = [show(row) for show in table.columns.values()]
        shown.add_row(*cells, end_section=following is None or first(row) != first(following))
    return shown


def measure(
    run: object, tables: Mapping[str, Table], command: str, threads: int, path: Path | None, introduction: str
) -> None:
    """Measure and print table by table, and write down after each.

    Args:
        run: what each table's ``rows`` takes.
        tables: by key.
        command: that does it again.
        threads: of torch.
        path: of the JSON file, which the Markdown goes beside; ``None``: nothing is written.
        introduction: what the document says of all tables.
    """
    record: Row = {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "machine": machine(threads),
        "tables": {},
    }
    console = Console(width=None if sys.stdout.isatty() else 140)
    for key, table in tables.items():
        with console.status(table.title):
            rows = list(table.rows(run))
        record["tables"][key] = rows
        console.print(printed(table, rows))
        if path is not None:
            path.write_text(json.dumps(record, indent=1) + "\n")
            path.with_suffix(".md").write_text(markdown(record, tables, introduction))
    console.print(targets(record["tables"]))
