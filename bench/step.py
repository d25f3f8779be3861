"""What a step costs in time and memory, beside SGD with momentum.

    python -m bench.step --device cpu --threads 2

Parameters have the shapes of models; gradients are normal, of standard deviation 1e-3, and the same for all that are
compared. Writes bench/results/step_cpu.json and .md.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import json
import math
import os
import platform
import shlex
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from multiprocessing import get_context
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Optimizer

from bench.shapes import MODELS, Shape, elements, grid
from bench.timing import Timing, compare, copy_bandwidth
from sofim_fused import SOFIM, backends
from sofim_fused.backends import Coefficients, Decay

RESULTS = Path(__file__).parent / "results"
CPU = torch.device("cpu")
# In both, about the same step, and small enough that weights stay finite over any number of steps.
OURS: Mapping[str, Any] = {"lr": 1e-2, "momentum": 0.9, "rho": 1.0}
SGDS: Mapping[str, Any] = {"lr": 1e-3, "momentum": 0.9}
MAX_GRAD_NORM = 0.1  # below the gradients' norm of every model, so that clipping is at work
REFERENCE_LIMIT = 30_000_000  # elements; beyond, the reference would take most of the time
HOST_TENSORS = (10, 161, 1000)  # as many as LeNet-5 and ResNet-50 have, and many

Row = dict[str, Any]


class Recipe(NamedTuple):
    """One way to take a step.

    Attributes:
        optimizer: its class, and ``options`` its arguments.
        bytes: that the sweeps of a step read and write per parameter; ``None``: not counted.
        clip: call ``clip_grad_norm_`` before. It writes to the gradients, which are then the provider's own.
    """

    optimizer: type[Optimizer]
    options: Mapping[str, Any]
    bytes: int | None
    clip: bool = False


class Provider(NamedTuple):
    """What is timed, and the parameters and the optimizer that it works on."""

    call: Callable[[], object]
    params: list[Tensor]
    optimizer: Optimizer


class Workload:
    """Parameters of some shapes, as often as asked for, and one set of gradients for all of them."""

    def __init__(self, shapes: Sequence[Shape], dtype: torch.dtype = torch.float32) -> None:
        self.shapes = list(shapes)
        self.dtype = dtype
        self.elements = elements(self.shapes)
        self.grads = self._normal(1e-3, seed=1)

    def parameters(self) -> list[Tensor]:
        """New parameters, equal each time, with the common gradients."""
        params: list[Tensor] = [torch.nn.Parameter(values) for values in self._normal(0.02, seed=2)]
        for param, grad in zip(params, self.grads, strict=True):
            param.grad = grad
        return params

    def _normal(self, deviation: float, seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.empty(s, dtype=self.dtype).normal_(0, deviation, generator=generator) for s in self.shapes]


def whole_step(recipe: Recipe, work: Workload) -> Provider:
    """A step as a user takes it."""
    params = work.parameters()
    optimizer = recipe.optimizer(params, **recipe.options)
    if not recipe.clip:
        return Provider(optimizer.step, params, optimizer)
    for param in params:
        assert param.grad is not None
        param.grad = param.grad.clone()

    def clipped_step() -> None:
        clip_grad_norm_(params, MAX_GRAD_NORM)
        optimizer.step()

    return Provider(clipped_step, params, optimizer)


def one_pass(name: str, work: Workload, backend: str = "auto") -> Provider:
    """One of a backend's passes with coefficients that do not change."""
    params = work.parameters()
    for param in params:
        param.requires_grad_(False)  # a step runs under no_grad
    optimizer = SOFIM(params, **OURS, backend=backend)
    (lane,) = optimizer._lanes()
    passes, tiles, n = lane.passes, lane.tiles, len(params)
    decay = Decay(moment=[0.9] * n, gradient=[0.1] * n, weight=None, cross=False)
    plain = Coefficients(moment=torch.full((n,), -OURS["lr"], dtype=torch.float64))
    guarded = plain._replace(gain=torch.tensor(0.5, dtype=torch.float64), skip=torch.tensor(False))
    passes.accumulate(tiles, decay)  # so that no pass meets a zero moment
    calls: dict[str, Callable[[], object]] = {
        "accumulate": lambda: passes.accumulate(tiles, decay),
        "apply": lambda: passes.apply(tiles, plain),
        "dots": lambda: passes.dots(tiles, decay),
        "commit": lambda: passes.commit(tiles, decay, guarded),
    }
    return Provider(calls[name], params, optimizer)


def ours(bytes_moved: int | None, **options: Any) -> Recipe:
    """SOFIM, with the best backend there is unless ``options`` say otherwise."""
    return Recipe(SOFIM, {**OURS, **options}, bytes_moved)


def sgd(bytes_moved: int, clip: bool = False, **options: Any) -> Recipe:
    """SGD with momentum."""
    return Recipe(SGD, {**SGDS, **options}, bytes_moved, clip)


GUARD: Mapping[str, Any] = {"max_grad_norm": MAX_GRAD_NORM, "skip_nonfinite": True}
BF16 = torch.bfloat16
# SGD foreach and default are three sweeps (two that update the moment, one the weight), fused is a single one.
PLAIN = {
    "SOFIM": ours(24),
    "SOFIM, gradient form": ours(28, numerator="gradient"),
    "SOFIM, bfloat16 moment": ours(18, state_dtype=BF16),
    "SOFIM, reference": ours(None, backend="reference"),
    "SGD fused": sgd(20, fused=True),
    "SGD foreach": sgd(32, foreach=True),
    "SGD default": sgd(32),
}
GUARDED = {
    "SOFIM": ours(28, **GUARD),
    "SOFIM, reference": ours(None, **GUARD, backend="reference"),
    "SGD fused, clip_grad_norm_": sgd(32, fused=True, clip=True),
}
SIXTEEN_BIT = {
    "SOFIM, float32 moment, kahan": ours(22),
    "SOFIM, float32 moment": ours(18, kahan=False),
    "SOFIM, bfloat16 moment, kahan": ours(16, state_dtype=BF16),
    "SOFIM, bfloat16 moment": ours(12, state_dtype=BF16, kahan=False),
    "SGD foreach": sgd(16, foreach=True),
    "SGD default": sgd(16),
}
HOST = {
    "SOFIM": PLAIN["SOFIM"],
    "SOFIM, guarded": GUARDED["SOFIM"],
    "SOFIM, reference": PLAIN["SOFIM, reference"],
    "SGD fused": PLAIN["SGD fused"],
    "SGD foreach": PLAIN["SGD foreach"],
    "SGD default": PLAIN["SGD default"],
}
MEMORY = {
    "SOFIM": PLAIN["SOFIM"],
    "SOFIM, guarded": GUARDED["SOFIM"],
    "SOFIM, bfloat16 moment": PLAIN["SOFIM, bfloat16 moment"],
    "SGD fused": PLAIN["SGD fused"],
}
PASSES = {"accumulate": 12, "apply": 12, "dots": 8, "commit": 20}

# The largest ratio to the table's baseline that is aimed at.
TARGETS: dict[tuple[str, str], dict[str, float]] = {
    ("plain", "SOFIM"): {
        "lenet-5": 0.5,
        "1000x1K": 0.4,
        "resnet-9": 1.05,
        "resnet-50": 1.2,
        "gpt2-small": 1.25,
    },
    ("plain", "SOFIM, bfloat16 moment"): {"gpt2-small": 1.0},
    ("passes", "apply"): {"resnet-50": 0.65, "gpt2-small": 0.65},
    ("guarded", "SOFIM"): {
        "lenet-5": 0.7,
        "1000x1K": 0.7,
        "resnet-9": 0.7,
        "resnet-50": 0.85,
        "gpt2-small": 0.85,
    },
    ("memory", "SOFIM"): {"resnet-50": 1.001, "gpt2-small": 1.001},
}


def worth_timing(recipes: Mapping[str, Recipe], size: int) -> dict[str, Recipe]:
    """Leave the reference out where it is what "auto" takes anyway, or where it would take too long."""
    left_out = backends.choose("auto", CPU).name == "reference" or size > REFERENCE_LIMIT
    return {
        name: recipe
        for name, recipe in recipes.items()
        if not (left_out and recipe.options.get("backend") == "reference")
    }


class Run:
    """What the command line asks for, and the tables' rows.

    Args:
        models: shapes by name.
        seconds: for each comparison.
        threads: of torch.
    """

    def __init__(self, models: Mapping[str, Sequence[Shape]], seconds: float, threads: int) -> None:
        self.models = models
        self.seconds = seconds
        self.threads = threads
        self._copy = cache(lambda working_set: copy_bandwidth(working_set, seconds / 4))

    def plain(self) -> Iterator[Row]:
        """Whole steps in float32."""
        for model, shapes in self.models.items():
            yield from self._steps("plain", model, Workload(shapes), PLAIN)

    def passes(self) -> Iterator[Row]:
        """Each pass alone, beside the whole step of SGD."""
        baseline = TABLES["passes"].baseline
        for model, shapes in self.models.items():
            work = Workload(shapes)
            providers = {name: one_pass(name, work) for name in PASSES}
            providers[baseline] = whole_step(PLAIN[baseline], work)
            timings = self._compare(providers, baseline)
            moved = {**PASSES, baseline: PLAIN[baseline].bytes}
            yield from self._rows("passes", model, work, timings, moved)

    def guarded(self) -> Iterator[Row]:
        """Whole steps in float32 with clipping."""
        for model, shapes in self.models.items():
            yield from self._steps("guarded", model, Workload(shapes), GUARDED)

    def sixteen_bit(self) -> Iterator[Row]:
        """Whole steps with bfloat16 weights and gradients."""
        for model, shapes in self.models.items():
            yield from self._steps("sixteen_bit", model, Workload(shapes, BF16), SIXTEEN_BIT)

    def host(self) -> Iterator[Row]:
        """Whole steps over tensors of one element."""
        for tensors in HOST_TENSORS:
            work = Workload([(1,)] * tensors)
            for gradients in ("kept", "recreated"):
                providers = {name: whole_step(recipe, work) for name, recipe in worth_timing(HOST, tensors).items()}
                before = {}
                if gradients == "recreated":
                    before = {name: _recreation(provider.params, work.grads) for name, provider in providers.items()}
                timings = self._compare(providers, TABLES["host"].baseline, before)
                for name, timing in timings.items():
                    yield {"tensors": tensors, "gradients": gradients, "provider": name, **timing._asdict()}

    def memory(self) -> Iterator[Row]:
        """What an optimizer adds to parameters and gradients, each measured in a process of its own."""
        with fresh_processes() as pool:
            for model, shapes in self.models.items():
                moment = 4 * elements(shapes)
                _, moment_growth = pool.apply(memory_use, (shapes, None, self.threads))
                for name in MEMORY:
                    state, growth = pool.apply(memory_use, (shapes, name, self.threads))
                    ratio = max(state / moment, growth / moment_growth)
                    yield {
                        "model": model,
                        "provider": name,
                        "moment_bytes": moment,
                        "moment_growth_bytes": moment_growth,
                        "state_bytes": state,
                        "state_ratio": state / moment,
                        "growth_bytes": growth,
                        "growth_ratio": growth / moment_growth,
                        **_verdict("memory", name, model, ratio),
                    }

    def _steps(self, table: str, model: str, work: Workload, recipes: Mapping[str, Recipe]) -> Iterator[Row]:
        recipes = worth_timing(recipes, work.elements)
        timings = self._compare(
            {name: whole_step(recipe, work) for name, recipe in recipes.items()}, TABLES[table].baseline
        )
        return self._rows(table, model, work, timings, {name: recipe.bytes for name, recipe in recipes.items()})

    def _compare(
        self,
        providers: Mapping[str, Provider],
        baseline: str,
        before: Mapping[str, Callable[[], object]] | None = None,
    ) -> dict[str, Timing]:
        calls = {name: provider.call for name, provider in providers.items()}
        return compare(calls, baseline, self.seconds, before=before)

    def _rows(
        self,
        table: str,
        model: str,
        work: Workload,
        timings: Mapping[str, Timing],
        moved: Mapping[str, int | None],
    ) -> Iterator[Row]:
        # A weight, a gradient and a float32 moment.
        working_set = (2 * work.dtype.itemsize + 4) * work.elements
        copy = self._copy(working_set)
        for name, timing in timings.items():
            per_parameter = moved[name]
            rate = None if per_parameter is None else per_parameter * work.elements / timing.median / 1e9
            yield {
                "model": model,
                "provider": name,
                **timing._asdict(),
                "bytes_per_parameter": per_parameter,
                "gb_per_s": rate,
                "copy_gb_per_s": copy,
                **_verdict(table, name, model, timing.ratio),
            }


def _verdict(table: str, provider: str, model: str, ratio: float) -> Row:
    target = TARGETS.get((table, provider), {}).get(model)
    return {"target": target, "met": None if target is None else ratio <= target}


def _recreation(params: Sequence[Tensor], grads: Sequence[Tensor]) -> Callable[[], None]:
    """Gives new gradients, at other addresses, as ``zero_grad`` and a backward pass do."""

    def recreate() -> None:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()

    return recreate


# Memory


def fresh_processes() -> Pool:
    """Runs each task in a process of its own, in which nothing was computed before."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["rich.console", "rich.table", "sofim_fused"])  # sofim_fused imports torch
    return context.Pool(1, maxtasksperchild=1)


def memory_use(shapes: Sequence[Shape], provider: str | None, threads: int) -> tuple[int, int]:
    """Bytes of the state's tensors, and growth of the resident set at its peak, over parameters and gradients.

    To be called in a process of its own.

    Args:
        shapes: of the parameters.
        provider: of ``MEMORY``; ``None``: a float32 tensor for each parameter and nothing else.
        threads: of torch.
    """
    torch.set_num_threads(threads)
    _use_memory(Workload([(1 << 16,)] * 2), provider)  # code, threads and their stacks are not the model's
    return _use_memory(Workload(shapes), provider)


def _use_memory(work: Workload, provider: str | None) -> tuple[int, int]:
    params = work.parameters()
    _give_back()
    before = _resident("VmRSS")
    if provider is None:
        moments = [torch.zeros_like(param, dtype=torch.float32) for param in params]
        return sum(moment.nbytes for moment in moments), _resident("VmHWM") - before
    recipe = MEMORY[provider]
    optimizer = recipe.optimizer(params, **recipe.options)
    for _ in range(3):
        optimizer.step()
    growth = _resident("VmHWM") - before
    tensors = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values()), growth


def _give_back() -> None:
    """Return free memory to the system, or it would be taken again unseen; make the peak what is resident now."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def _resident(field: str) -> int:
    """Bytes: ``VmRSS`` now, ``VmHWM`` at the peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


# Tables


class Table(NamedTuple):
    """How rows are shown: columns by heading; ``baseline`` is the provider that ratios refer to."""

    title: str
    baseline: str
    columns: Mapping[str, Callable[[Row], str]]
    rows: Callable[[Run], Iterator[Row]]
    note: str = ""


def _digits(value: float) -> str:
    """Three digits that count."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def _spread(row: Row, unit: float) -> str:
    return f"{_digits(row['median'] * unit)} [{_digits(row['low'] * unit)}, {_digits(row['high'] * unit)}]"


def _optional(row: Row, name: str, form: str) -> str:
    return "" if row[name] is None else format(row[name], form)


def _target(row: Row) -> str:
    return "" if row["target"] is None else f"≤ {row['target']:g}: {'met' if row['met'] else 'missed'}"


def _timed(title: str, baseline: str, rows: Callable[[Run], Iterator[Row]], note: str = "") -> Table:
    columns: dict[str, Callable[[Row], str]] = {
        "model": lambda row: row["model"],
        "provider": lambda row: row["provider"],
        "ms [20 %, 80 %]": lambda row: _spread(row, 1e3),
        f"/ {baseline}": lambda row: f"{row['ratio']:.3f}",
        "B/param.": lambda row: _optional(row, "bytes_per_parameter", "d"),
        "GB/s": lambda row: _optional(row, "gb_per_s", ".1f"),
        "copy GB/s": lambda row: f"{row['copy_gb_per_s']:.1f}",
        "target": _target,
        "rounds": lambda row: str(row["rounds"]),
    }
    return Table(title, baseline, columns, rows, note)


_HOST: dict[str, Callable[[Row], str]] = {
    "tensors": lambda row: str(row["tensors"]),
    "gradients": lambda row: row["gradients"],
    "provider": lambda row: row["provider"],
    "µs [20 %, 80 %]": lambda row: _spread(row, 1e6),
    "/ SGD fused": lambda row: f"{row['ratio']:.3f}",
    "rounds": lambda row: str(row["rounds"]),
}
_MEMORY: dict[str, Callable[[Row], str]] = {
    "model": lambda row: row["model"],
    "provider": lambda row: row["provider"],
    "state MB": lambda row: f"{row['state_bytes'] / 1e6:.3f}",
    "/ moment": lambda row: f"{row['state_ratio']:.5f}",
    "growth MB": lambda row: f"{row['growth_bytes'] / 1e6:.3f}",
    "/ moment's growth": lambda row: f"{row['growth_ratio']:.5f}",
    "target": _target,
}
_TEXT = {"model", "tensors", "gradients", "provider"}  # columns that are set flush left

TABLES = {
    "plain": _timed("Plain step, float32", "SGD fused", Run.plain),
    "passes": _timed(
        "Passes alone, float32",
        "SGD fused",
        Run.passes,
        "Each called as a method of the backend, beside SGD's whole step.",
    ),
    "guarded": _timed(
        "Guarded step, float32",
        "SGD fused, clip_grad_norm_",
        Run.guarded,
        "SOFIM with max_grad_norm and skip_nonfinite; SGD after torch.nn.utils.clip_grad_norm_, which skips nothing.",
    ),
    "sixteen_bit": _timed(
        "Plain step, bfloat16 weights and gradients",
        "SGD foreach",
        Run.sixteen_bit,
        "SGD fused is no baseline here: on CPUs torch 2.13 leaves whole SIMD blocks of 16-bit parameters as they are.",
    ),
    "host": Table(
        "Host time",
        "SGD fused",
        _HOST,
        Run.host,
        "Tensors of one element each: what a step costs besides memory traffic. Gradients are the same tensors in each"
        " step, or recreated before it (which is not timed).",
    ),
    "memory": Table(
        "Memory",
        "",
        _MEMORY,
        Run.memory,
        "Over parameters and gradients, each line in a process of its own: the bytes of the state's tensors, beside a"
        " float32 moment's; and how far the resident set grows at its peak over three steps, beside its growth by"
        " float32 tensors of the parameters' shapes and nothing else. The target is for both ratios. In small models"
        " pages and fixed costs decide.",
    ),
}


def machine(threads: int) -> Row:
    """What the figures depend on."""
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


def targets(tables: Mapping[str, Sequence[Row]]) -> str:
    """Which targets were met, and every one that was missed."""
    judged = [(key, row) for key, rows in tables.items() for row in rows if row.get("target") is not None]
    missed = [f"{key}: {row['provider']} on {row['model']}" for key, row in judged if not row["met"]]
    return f"Targets met: {len(judged) - len(missed)} of {len(judged)}." + (
        f" Missed: {'; '.join(missed)}." if missed else ""
    )


def markdown(record: Row) -> str:
    """The tables as a document."""
    where = record["machine"]
    parts = [
        f"`{record['command']}`: {where['cpu']}, {where['cores']} cores, {where['threads']} threads,"
        f" {where['instruction_set']}, torch {where['torch']}, SOFIM's backend {where['backend']}; {record['date']}.",
        "Times are medians, with the 20th and 80th percentile; ratios are medians of the ratios in each round, in which"
        " all are timed in turns. Bytes are what the sweeps of a step read and write per parameter, beside the rate of"
        " `Tensor.copy_` (read and written) over as much memory as weights, gradients and float32 moments take. SOFIM"
        " is the moment form with a float32 moment unless said otherwise.",
        targets(record["tables"]),
    ]
    blocks = [textwrap.fill(part, 120, break_long_words=False, break_on_hyphens=False) for part in parts]
    for key, rows in record["tables"].items():
        table = TABLES[key]
        blocks.append(f"## {table.title}")
        if table.note:
            blocks.append(textwrap.fill(table.note, 120, break_long_words=False, break_on_hyphens=False))
        lines = ["| " + " | ".join(table.columns) + " |", "|---" * len(table.columns) + "|"]
        lines += ["| " + " | ".join(show(row) for show in table.columns.values()) + " |" for row in rows]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def printed(table: Table, rows: Sequence[Row]) -> RichTable:
    """A table for the terminal, with a line between models."""
    shown = RichTable(title=table.title, caption=table.note or None, box=box.SIMPLE_HEAD, title_justify="left")
    for heading in table.columns:
        shown.add_column(heading, justify="left" if heading in _TEXT else "right")
    first = next(iter(table.columns.values()))
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        cells = [show(row) for show in table.columns.values()]
        shown.add_row(*cells, end_section=following is None or first(row) != first(following))
    return shown


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument(
        "--models",
        nargs="+",
        choices=[*MODELS, "grid"],
        default=list(MODELS),
        metavar="MODEL",
        help=f"of {', '.join(MODELS)}, and grid: equal tensors by number and size (default: all but grid)",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each comparison (default: %(default)g)")
    parser.add_argument("--json", type=Path, help="the Markdown goes beside it (default: bench/results/step_cpu.json)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write down after each table."""
    options = parsed(arguments)
    path: Path = options.json or RESULTS / f"step_{options.device}.json"
    models: dict[str, list[Shape]] = {}
    for name in options.models:
        models.update(grid() if name == "grid" else {name: MODELS[name]()})
    torch.set_num_threads(options.threads)
    command = [
        "python -m bench.step",
        f"--device {options.device}",
        *([] if options.models == list(MODELS) else [f"--models {shlex.join(options.models)}"]),
        f"--threads {options.threads}",
        f"--seconds {options.seconds:g}",
    ]
    record: Row = {
        "command": " ".join(command),
        "date": datetime.date.today().isoformat(),
        "machine": machine(options.threads),
        "tables": {},
    }
    run = Run(models, options.seconds, options.threads)
    console = Console(width=None if sys.stdout.isatty() else 140)
    for key, table in TABLES.items():
        with console.status(table.title):
            rows = list(table.rows(run))
        record["tables"][key] = rows
        console.print(printed(table, rows))
        path.write_text(json.dumps(record, indent=1) + "\n")
        path.with_suffix(".md").write_text(markdown(record))
    console.print(targets(record["tables"]))


if __name__ == "__main__":
    main()
