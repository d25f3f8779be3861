"""What bench.gpu writes down: one JSON file, one Markdown file, and what became of the targets."""

from __future__ import annotations

import json
import math
import os
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

Row = dict[str, Any]

PENDING, DONE, FAILED = "not reached", "done", "failed"


class Section(NamedTuple):
    """One comparison: a model, a dtype, whether its tensors stay in the cache, and whether it is of compiled steps."""

    model: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    cached: bool = False
    compiled: bool = False

    @property
    def table(self) -> str:
        """The title of the table that it is a part of."""
        where = f"{self.dtype}, {'in cache' if self.cached else 'from memory'}"
        return where + (", torch.compile" if self.compiled else "")

    @property
    def title(self) -> str:
        """Its name."""
        return f"{self.model}, {self.table}"

    def columns(self) -> Row:
        """What its rows have in common."""
        return {
            "section": self.title,
            "table": self.table,
            "model": self.model,
            "dtype": self.dtype,
            "cached": self.cached,
            "compiled": self.compiled,
        }


@dataclass(frozen=True)
class Target:
    """What a kind of step is to reach, in float32 and from memory; a model that never leaves the cache, from there.

    Attributes:
        name: in the table.
        kind: of a provider.
        field: of its row, as a ratio to the baseline ("ratio"; "device_ratio" of a part of a step, whose calls from
            Python no step takes) or to the copy bandwidth ("share").
        limit: the largest ratio or the smallest share.
        least, most: elements of the models that it is for.
        model: the only model that it is for. ``backend``: likewise.
        beside: a kind of provider of the same section; its ratio divides.
    """

    name: str
    kind: str
    limit: float
    field: str = "ratio"
    least: int = 0
    most: float = math.inf
    model: str | None = None
    backend: str | None = None
    beside: str | None = None

    def suits(self, row: Row) -> bool:
        """Whether the row is one that the target is about."""
        return (
            row["kind"] == self.kind
            and row["dtype"] == "float32"
            and (not row["cached"] or row["model"] in IN_CACHE)
            and not row["compiled"]
            and self.least <= row["elements"] <= self.most
            and self.model in (None, row["model"])
            and self.backend in (None, row.get("backend"))
        )


IN_CACHE = ("lenet-5",)
LARGE, MEDIUM = 100_000_000, 10_000_000
TARGETS = [
    Target("plain step, at most 10 M parameters", "plain", 1.0, most=MEDIUM),
    Target("plain step, at least 100 M parameters", "plain", 1.2, least=LARGE),
    Target("share of the copy bandwidth, at least 100 M parameters", "plain", 0.9, "share", least=LARGE),
    Target("LeNet-5 in one launch, cuda", "one launch", 0.6, model="lenet-5", backend="cuda"),
    Target("LeNet-5 in one launch, triton", "one launch", 0.6, model="lenet-5", backend="triton"),
    Target("guarded step, to SGD fused with clip_grad_norm_", "guarded", 0.9, beside="clipped sgd"),
    Target("apply alone, at least 10 M parameters", "apply alone", 0.62, "device_ratio", least=MEDIUM),
    Target("bfloat16 moment, at least 10 M parameters", "bfloat16 moment", 0.95, least=MEDIUM),
]


def verdicts(rows: Sequence[Row], judged: bool = True) -> list[Row]:
    """Each target for each model and backend that were measured, and each that nothing was measured for.

    Args:
        rows: of the timing table.
        judged: ``False``: the device is none that the targets are for, and all are "not measured".
    """
    found: list[Row] = []
    for target in TARGETS:
        suited = [row for row in rows if judged and target.suits(row)]
        measured = 0
        for row in suited:
            value = _value(target, row, rows)
            if value is None:
                continue
            measured += 1
            met = value >= target.limit if target.field == "share" else value <= target.limit
            found.append(
                {
                    "target": target.name,
                    "limit": _limit(target),
                    "model": row["model"],
                    "provider": row["provider"],
                    "value": value,
                    "verdict": "met" if met else "missed",
                }
            )
        if not measured:
            found.append(
                {
                    "target": target.name,
                    "limit": _limit(target),
                    "model": target.model or "",
                    "provider": "",
                    "value": None,
                    "verdict": "not measured",
                }
            )
    return found


def _value(target: Target, row: Row, rows: Sequence[Row]) -> float | None:
    value: float | None = row.get(target.field)
    if value is None or target.beside is None:
        return value
    divisor = next(
        (
            other["ratio"]
            for other in sorted(
                rows, key=lambda other: other.get("run", 1) != row.get("run", 1)
            )  # best of the same run
            if other["section"] == row["section"] and other["kind"] == target.beside and other.get("ratio")
        ),
        None,
    )
    return value / divisor if divisor else None


def _limit(target: Target) -> str:
    return f"{'≥' if target.field == 'share' else '≤'} {target.limit:g}"


class Record:
    """Everything that is known of a run; every change is on disk before the run goes on.

    Args:
        path: of the JSON file; the Markdown goes beside it.
        copies: folders that get the same two files.
        head: command, date, device, code.
        earlier: what is taken over from earlier runs.
    """

    def __init__(self, path: Path, copies: Sequence[Path], head: Row, earlier: Row | None = None) -> None:
        self._paths = [path, *(folder / path.name for folder in copies)]
        self.data: Row = {
            **head,
            "elapsed": 0.0,
            "plan": {},
            "failures": [],
            "notes": [],
            "backends": {},
            "copy_gb_per_s": None,
            "smoke": [],
            "timing": [],
            "training": [],
            "tests": None,
            "sanitizer": {},
            "targets": [],
            "not_reached": [],
            **(earlier or {}),
        }
        self.data["runs"] = [*self.data.get("runs", ()), {}]
        self.run = len(self.data["runs"])  # the number of this one; rows have theirs

    @property
    def failed(self) -> bool:
        """Whether the exit code has to say so."""
        return bool(self.data["failures"])

    def plan(self, names: Sequence[str]) -> None:
        """What is to be done; it counts as not reached until it is."""
        self.data["plan"] = dict.fromkeys(names, PENDING)
        self.save()

    def mark(self, name: str, status: str) -> None:
        """What became of an entry of the plan."""
        self.data["plan"][name] = status
        self.save()

    def fail(self, what: str) -> None:
        """Note what makes the exit code non-zero."""
        if what not in self.data["failures"]:
            self.data["failures"].append(what)
        self.save()

    def note(self, what: str) -> None:
        """Note what a reader has to know, and what does not make a run fail."""
        if what not in self.data["notes"]:
            self.data["notes"].append(what)
        self.save()

    def add(self, table: str, row: Row, *keys: str) -> None:
        """Add a row; it takes the place of one with the same values of ``keys``."""
        rows: list[Row] = self.data[table]
        same = [i for i, other in enumerate(rows) if all(other[key] == row[key] for key in keys)]
        if same:
            rows[same[0]] = row
        else:
            rows.append(row)
        self.save()

    def save(self) -> None:
        """Write both files, each as a whole or not at all."""
        data = self.data
        data["targets"] = verdicts(data["timing"], judged=data["device"]["type"] == "cuda")
        data["not_reached"] = not_reached(data)
        about = ("command", "date", "code", "budget", "elapsed", "copy_gb_per_s")
        data["runs"][-1] = {key: data.get(key) for key in about}
        text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        document = markdown(data)
        for path in self._paths:
            write(path, text)
            write(path.with_suffix(".md"), document)


def write(path: Path, text: str) -> None:
    """Replace a file's text at once: a reader sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def not_reached(data: Row) -> list[str]:
    """By name, what was planned and not begun, or left out for want of time."""
    names = [name for name, status in data["plan"].items() if status == PENDING]
    names += [f"{row['section']}: {row['provider']}" for row in data["timing"] if row["status"] == PENDING]
    return names + [f"smoke: {row['backend']}: {row['case']}" for row in data["smoke"] if row["status"] == PENDING]


def slug(name: str) -> str:
    """A device's name as a part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "unknown"


# Markdown


def _digits(value: float) -> str:
    """Three digits that count."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if value > 0 else "0"


def _optional(row: Row, name: str, show: Callable[[float], str], unit: float = 1.0) -> str:
    return "" if row.get(name) is None else show(row[name] * unit)


def _spread(row: Row) -> str:
    if row["status"] != "measured":
        return f"{row['status']}: {row['reason']}" if row["reason"] else row["status"]
    return _interval(row)


def _interval(row: Row) -> str:
    return f"{_digits(row['median'] * 1e3)} [{_digits(row['low'] * 1e3)}, {_digits(row['high'] * 1e3)}]"


TIMING: Mapping[str, Callable[[Row], str]] = {
    "model": lambda row: row["model"],
    "provider": lambda row: row["provider"],
    "step, ms [20 %, 80 %]": _spread,
    "/ SGD fused": lambda row: _optional(row, "ratio", "{:.3f}".format),
    "device, ms": lambda row: _optional(row, "device", _digits, 1e3),
    "/ SGD fused (device)": lambda row: _optional(row, "device_ratio", "{:.3f}".format),
    "host, µs": lambda row: _optional(row, "host", _digits, 1e6),
    "B/param.": lambda row: _optional(row, "bytes_per_parameter", "{:.0f}".format),
    "GB/s": lambda row: _optional(row, "gb_per_s", "{:.0f}".format),
    "of copy": lambda row: _optional(row, "share", "{:.0%}".format),
    "run": lambda row: str(row.get("run", 1)),
    "sets": lambda row: str(row["sets"]),
    "rounds": lambda row: _optional(row, "rounds", "{:.0f}".format),
}
SMOKE: Mapping[str, Callable[[Row], str]] = {
    "backend": lambda row: row["backend"],
    "case": lambda row: row["case"],
    "result": lambda row: f"{row['status']}: {row['reason']}" if row["reason"] else row["status"],
    "error / tolerance": lambda row: _optional(row, "error", "{:.2g}".format),
    "from the reference": lambda row: _optional(row, "error_to_reference", "{:.2g}".format),
}
TRAINING: Mapping[str, Callable[[Row], str]] = {
    "network": lambda row: row["model"],
    "optimizer": lambda row: row["provider"],
    "training step, ms [20 %, 80 %]": _interval,
    "/ SGD fused": lambda row: f"{row['ratio']:.3f}",
    "host, ms": lambda row: _digits(row["host"] * 1e3),
    "run": lambda row: str(row.get("run", 1)),
    "rounds": lambda row: str(row["rounds"]),
}
VERDICTS: Mapping[str, Callable[[Row], str]] = {
    "target": lambda row: row["target"],
    "limit": lambda row: row["limit"],
    "model": lambda row: row["model"],
    "provider": lambda row: row["provider"],
    "measured": lambda row: _optional(row, "value", "{:.3f}".format),
    "verdict": lambda row: row["verdict"],
}
LEGEND = (
    "Step: steps one after the other, by device events, median and percentiles; where the host is the slower one it is"
    " the host's time. Device: with all steps in the queue beforehand, where the step is not the device's time anyway."
    " Host: until a step returns that finds the queue empty. Ratios are medians over rounds in which all providers are"
    " timed in turns. Bytes are what the sweeps read and write per parameter, GB/s these by the device's time, beside"
    " the rate of `Tensor.copy_` (read and written) in the same run. From memory: sets of tensors are used in turn that"
    " together exceed the L2 cache four times. In cache: one set."
)

RUNS_LEGEND = (
    "Several runs on such a device, each of which went on where the one before had ended; rows say of which they are:"
)
TRAINING_LEGEND = (
    "`zero_grad`, forward, backward and `step` on one batch, each optimizer with a copy of the same network; that the"
    " first losses agree is checked. Timed as steps are below."
)


def table(columns: Mapping[str, Callable[[Row], str]], rows: Sequence[Row]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(_cell(show(row)) for show in columns.values()) + " |" for row in rows]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _filled(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _items(entries: Sequence[str]) -> str:
    return "\n".join(f"- {_cell(entry)}" for entry in entries)


def _run(number: int, run: Row) -> str:
    copied = "" if run["copy_gb_per_s"] is None else f", copy {run['copy_gb_per_s']:.0f} GB/s"
    return f"{number}: `{run['command']}`, {run['date']}, code {run['code'] or 'before it was noted'}{copied}"


def markdown(data: Row) -> str:
    """The record as a document."""
    device = data["device"]
    versions = ", ".join(f"{name} {value}" for name, value in device["versions"].items())
    more = ", ".join(f"{name} {value}" for name, value in device["more"].items())
    about = f"`{data['command']}`: {device['name']}; {versions}; {more + '; ' if more else ''}{data['date']}."
    blocks = ["# GPU acceptance run", _filled(about)]
    several = len(data.get("runs", ())) > 1
    if several:
        blocks += [RUNS_LEGEND, _items([_run(number, run) for number, run in enumerate(data["runs"], 1)])]

    def shown(columns: Mapping[str, Callable[[Row], str]]) -> Mapping[str, Callable[[Row], str]]:
        return columns if several else {name: show for name, show in columns.items() if name != "run"}

    if data["copy_gb_per_s"]:
        blocks.append(
            f"Copy bandwidth: {data['copy_gb_per_s']:.0f} GB/s. L2 cache: {device['l2_bytes'] / 2**20:.0f} MiB."
        )
    blocks.append(f"Failures: {len(data['failures'])}." if data["failures"] else "Failures: none.")
    if data["failures"]:
        blocks.append(_items(data["failures"]))
    if data["notes"]:
        blocks += ["Notes:", _items(data["notes"])]
    if data["not_reached"]:
        blocks += ["Not reached within the time:", _items(data["not_reached"])]
    blocks += ["## Targets", table(VERDICTS, data["targets"])]
    facts = [f"Backends: {', '.join(f'{name} ({state})' for name, state in data['backends'].items())}."]
    if data["tests"]:
        facts.append(f"Tests marked gpu: {data['tests']['summary']}.")
    facts += [f"compute-sanitizer {tool}: {verdict}." for tool, verdict in data["sanitizer"].items()]
    blocks += ["## Correctness", *facts]
    if data["smoke"]:
        blocks.append(table(SMOKE, data["smoke"]))
    if data["training"]:
        blocks += ["## Training steps", _filled(TRAINING_LEGEND), table(shown(TRAINING), data["training"])]
    blocks += ["## Timing", _filled(LEGEND)]
    for title in dict.fromkeys(row["table"] for row in data["timing"]):
        blocks += [f"### {title}", table(shown(TIMING), [row for row in data["timing"] if row["table"] == title])]
    return "\n\n".join(blocks) + "\n"
