"""The time and memory of a step, compared with SGD with momentum; of one whose diagonal adapts, with AdamW.

    python -m bench.step --device cpu --threads 2

Parameters have the shapes of models; gradients are normal with standard deviation 1e-3, and the same for all
optimizers.
Writes bench/results/step_cpu.json and .md.
"""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Adafactor, AdamW, Optimizer

from bench.report import (
    CPU,
    RESULTS,
    Row,
    Table,
    fresh_processes,
    give_back,
    measure,
    optional,
    resident,
    spread,
    verdict,
)
from bench.report import digits as _digits  # noqa: F401
from bench.report import target as _target
from bench.report import targets as targets
from bench.shapes import CPU_MODELS, Shape, elements, grid
from bench.timing import Timing, compare, copy_bandwidth
from sofim_fused import SOFIM, backends
from sofim_fused.backends import Coefficients, Decay

# In both, about the same step, and small enough that weights stay finite over any number of steps.
OURS: Mapping[str, Any] = {"lr": 1e-2, "momentum": 0.9, "rho": 1.0}
SGDS: Mapping[str, Any] = {"lr": 1e-3, "momentum": 0.9}
MAX_GRAD_NORM = 0.1  # below the gradients' norm of every model, so that clipping is at work
REFERENCE_LIMIT = 30_000_000  # elements; beyond, the reference would take most of the time
HOST_TENSORS = (10, 161, 1000)  # as many as LeNet-5 and ResNet-50 have, and many


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
    (share,) = optimizer._plan.shares(optimizer)
    passes, tensors, n = share.passes, share.tensors, len(params)
    decay = Decay(moment=[0.9] * n, gradient=[0.1] * n, weight=None, cross=False)
    plain = Coefficients(moment=torch.full((n,), -OURS["lr"], dtype=torch.float64))
    guarded = plain._replace(gain=torch.tensor(0.5, dtype=torch.float64), skip=torch.tensor(False))
    passes.accumulate(tensors, decay)  # so that no pass meets a zero moment
    calls: dict[str, Callable[[], object]] = {
        "accumulate": lambda: passes.accumulate(tensors, decay),
        "apply": lambda: passes.apply(tensors, plain),
        "dots": lambda: passes.dots(tensors, decay),
        "commit": lambda: passes.commit(tensors, decay, guarded),
    }
    return Provider(calls[name], params, optimizer)


def ours(bytes_moved: int | None, **options: Any) -> Recipe:
    """SOFIM, with the best backend there is unless ``options`` say otherwise."""
    return Recipe(SOFIM, {**OURS, **options}, bytes_moved)


def adaptive(bytes_moved: int, **options: Any) -> Recipe:
    """SOFIM with a diagonal that adapts and the look-ahead, without the term of rank one unless ``options`` say so."""
    defaults = {"lr": 1e-4, "momentum": 0.9, "diagonal": "factored", "numerator": "nesterov"}
    return Recipe(SOFIM, {**defaults, **options}, bytes_moved)


def sgd(bytes_moved: int, clip: bool = False, **options: Any) -> Recipe:
    """SGD with momentum."""
    return Recipe(SGD, {**SGDS, **options}, bytes_moved, clip)


GUARD: Mapping[str, Any] = {"max_grad_norm": MAX_GRAD_NORM, "skip_nonfinite": True}
BF16 = torch.bfloat16
F8 = torch.float8_e4m3fn
# SGD foreach and default are three sweeps (two that update the moment, one the weight), fused is a single one.
PLAIN = {
    "SOFIM": ours(24),
    "SOFIM, gradient form": ours(28, numerator="gradient"),
    "SOFIM, bfloat16 moment": ours(18, state_dtype=BF16),
    "SOFIM, 8-bit moment": ours(15, state_dtype=F8),
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
# AdamW with state for each element is one sweep; Adafactor's foreach works tensor by tensor.
ADAPTIVE = {
    "SOFIM, factored": adaptive(24),
    "SOFIM, factored, guarded": adaptive(24, **GUARD),
    "SOFIM, factored, rank one": adaptive(32, rho=1.0),
    "SOFIM, factored, 8-bit moment": adaptive(18, state_dtype=F8),
    "SOFIM, row": adaptive(24, diagonal="row"),
    "SOFIM, element": adaptive(28, diagonal="element"),
    "SOFIM, element, 8-bit moments": adaptive(16, diagonal="element", state_dtype=F8),
    "AdamW fused": Recipe(AdamW, {"lr": 1e-4, "betas": (0.9, 0.99), "fused": True}, 28),
    "Adafactor": Recipe(Adafactor, {"lr": 1e-4}, None),
}
SIXTEEN_BIT = {
    "SOFIM, float32 moment, master bits": ours(22),
    "SOFIM, float32 moment, kahan": ours(22, kahan=True),
    "SOFIM, float32 moment": ours(18, kahan=False),
    "SOFIM, bfloat16 moment, master bits": ours(16, state_dtype=BF16),
    "SOFIM, bfloat16 moment, kahan": ours(16, state_dtype=BF16, kahan=True),
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
    ("plain", "SOFIM, 8-bit moment"): {"lenet-5": 0.45, "resnet-9": 0.95, "gpt2-small": 0.88},
    ("passes", "apply"): {"resnet-50": 0.65, "gpt2-small": 0.65},
    ("guarded", "SOFIM"): {
        "lenet-5": 0.7,
        "1000x1K": 0.7,
        "resnet-9": 0.7,
        "resnet-50": 0.85,
        "gpt2-small": 0.85,
    },
    ("adaptive", "SOFIM, factored"): {
        "lenet-5": 0.3,
        "1000x1K": 0.35,
        "1000x32x32": 0.4,
        "resnet-9": 0.9,
        "resnet-50": 0.92,
        "gpt2-small": 0.92,
    },
    ("adaptive", "SOFIM, factored, 8-bit moment"): {"resnet-50": 0.7, "gpt2-small": 0.7},
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

    def adaptive(self) -> Iterator[Row]:
        """Whole steps in float32 with a diagonal that adapts."""
        for model, shapes in self.models.items():
            yield from self._steps("adaptive", model, Workload(shapes), ADAPTIVE)

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
    return verdict(TARGETS.get((table, provider), {}).get(model), ratio)


def _recreation(params: Sequence[Tensor], grads: Sequence[Tensor]) -> Callable[[], None]:
    """Gives new gradients, at other addresses, as ``zero_grad`` and a backward pass do."""

    def recreate() -> None:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()

    return recreate


# Memory


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
    give_back()
    before = resident("VmRSS")
    if provider is None:
        moments = [torch.zeros_like(param, dtype=torch.float32) for param in params]
        return sum(moment.nbytes for moment in moments), resident("VmHWM") - before
    recipe = MEMORY[provider]
    optimizer = recipe.optimizer(params, **recipe.options)
    for _ in range(3):
        optimizer.step()
    growth = resident("VmHWM") - before
    tensors = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values()), growth


# Tables


def _timed(title: str, baseline: str, rows: Callable[[Run], Iterator[Row]], note: str = "") -> Table:
    columns: dict[str, Callable[[Row], str]] = {
        "model": lambda row: row["model"],
        "provider": lambda row: row["provider"],
        "ms [20 %, 80 %]": lambda row: spread(row, 1e3),
        f"/ {baseline}": lambda row: f"{row['ratio']:.3f}",
        "B/param.": lambda row: optional(row, "bytes_per_parameter", "d"),
        "GB/s": lambda row: optional(row, "gb_per_s", ".1f"),
        "copy GB/s": lambda row: f"{row['copy_gb_per_s']:.1f}",
        "target": _target,
        "rounds": lambda row: str(row["rounds"]),
    }
    return Table(title, baseline, columns, rows, note)


_HOST: dict[str, Callable[[Row], str]] = {
    "tensors": lambda row: str(row["tensors"]),
    "gradients": lambda row: row["gradients"],
    "provider": lambda row: row["provider"],
    "µs [20 %, 80 %]": lambda row: spread(row, 1e6),
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
    "adaptive": _timed(
        "Step with a diagonal that adapts, float32",
        "AdamW fused",
        Run.adaptive,
        'SOFIM with the look-ahead. For 1-D tensors "factored" has a variance for each element: 28 bytes, not 24.',
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


INTRODUCTION = (
    "Times are medians, with the 20th and 80th percentile; ratios are medians of the ratios in each round, in which all"
    " are timed in turns. Bytes are what the sweeps of a step read and write per parameter, beside the rate of"
    " `Tensor.copy_` (read and written) over as much memory as weights, gradients and float32 moments take. SOFIM is"
    " the moment form with a float32 moment unless said otherwise."
)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument(
        "--models",
        nargs="+",
        choices=[*CPU_MODELS, "grid"],
        default=list(CPU_MODELS),
        metavar="MODEL",
        help=f"some of {', '.join(CPU_MODELS)}, and grid: equal tensors by number and size (default: all but grid)",
    )
    parser.add_argument(
        "--tables",
        nargs="+",
        choices=list(TABLES),
        default=list(TABLES),
        metavar="TABLE",
        help=f"some of {', '.join(TABLES)} (default: all)",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of torch (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=20.0, help="time for each comparison (default: %(default)g)")
    parser.add_argument("--json", type=Path, help="file for the results (default: bench/results/step_cpu.json)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write down after each table."""
    options = parsed(arguments)
    path: Path = options.json or RESULTS / f"step_{options.device}.json"
    models: dict[str, list[Shape]] = {}
    for name in options.models:
        models.update(grid() if name == "grid" else {name: CPU_MODELS[name]()})
    torch.set_num_threads(options.threads)
    command = [
        "python -m bench.step",
        f"--device {options.device}",
        *([] if options.models == list(CPU_MODELS) else [f"--models {shlex.join(options.models)}"]),
        *([] if options.tables == list(TABLES) else [f"--tables {shlex.join(options.tables)}"]),
        f"--threads {options.threads}",
        f"--seconds {options.seconds:g}",
    ]
    run = Run(models, options.seconds, options.threads)
    measure(
        run, {name: TABLES[name] for name in options.tables}, " ".join(command), options.threads, path, INTRODUCTION
    )


if __name__ == "__main__":
    main()
