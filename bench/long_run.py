"""Measures how far rounding drives a long run from the oracle, and whether speed and memory stay constant.

    python -m bench.long_run

A small network is trained by the float64 oracle of the tests, for 10^5 steps, on batches of noisy clusters. Its
gradients, rounded to bfloat16, go to the oracle and to every optimizer. So all differences come from rounding, in each
step, and no gradient reduces them. Writes bench/results/long_run.json and .md.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Optimizer

from bench.report import RESULTS, Row, Table, digits, give_back, measure, resident, target, verdict
from sofim_fused import SOFIM
from sofim_fused.backends.master_bits import joined
from tests.support.oracle import Hyper, Oracle

STEPS = 100_000
HYPER = Hyper(lr=0.1, momentum=0.9, rho=1.0)
FEATURES, HIDDEN, CLASSES, SAMPLES, BATCH = 20, 24, 10, 2048, 32
BLOCK = 100  # steps that are timed together
CONTROL = "SGD with momentum, fused, float32"
MODEL = f"{FEATURES}-{HIDDEN}-{CLASSES}"


class Kind(NamedTuple):
    """How an optimizer stores weights and moments, and by how much of a value each storing may be off.

    Attributes:
        weight: half an ulp, also of what w and its lost bits make together.
        moment: half an ulp, or a whole one where rounding is stochastic.
    """

    dtype: torch.dtype
    state: torch.dtype
    kahan: bool | None
    weight: float
    moment: float


KINDS = {
    "float32": Kind(torch.float32, torch.float32, False, 2.0**-24, 2.0**-24),
    "float32, bfloat16 moment": Kind(torch.float32, torch.bfloat16, False, 2.0**-24, 2.0**-7),
    "bfloat16 with 32 master bits": Kind(torch.bfloat16, torch.float32, None, 2.0**-24, 2.0**-24),
    "bfloat16 with 32 master bits, bfloat16 moment": Kind(torch.bfloat16, torch.bfloat16, None, 2.0**-24, 2.0**-7),
    "bfloat16 with Kahan": Kind(torch.bfloat16, torch.float32, True, 2.0**-17, 2.0**-24),
    "bfloat16 with Kahan, bfloat16 moment": Kind(torch.bfloat16, torch.bfloat16, True, 2.0**-17, 2.0**-7),
    "bfloat16 without Kahan": Kind(torch.bfloat16, torch.float32, False, 2.0**-8, 2.0**-24),
}


class Timed:
    """An optimizer that is given gradients, and whose steps are timed.

    Args:
        new_optimizer: makes it.
        dtype: of its parameters.
        weights: its parameters' values.

    Attributes:
        blocks: nanoseconds of each ``BLOCK`` steps.
    """

    def __init__(
        self, new_optimizer: Callable[[list[nn.Parameter]], Optimizer], dtype: torch.dtype, weights: Sequence[Tensor]
    ) -> None:
        self.params = [nn.Parameter(w.to(dtype)) for w in weights]
        self.grads = [torch.zeros_like(p) for p in self.params]
        for p, grad in zip(self.params, self.grads, strict=True):
            p.grad = grad
        self.optimizer = new_optimizer(self.params)
        self.blocks: list[int] = []

    @property
    def tenths(self) -> tuple[float, float]:
        """Seconds of a step in the first and in the last tenth of the run."""
        tenth = max(1, len(self.blocks) // 10)
        first, last = (median(part) / BLOCK * 1e-9 for part in (self.blocks[:tenth], self.blocks[-tenth:]))
        return first, last

    def step(self, grads: Sequence[Tensor], number: int) -> None:
        """Take one step, timed."""
        torch._foreach_copy_(self.grads, list(grads))
        started = time.perf_counter_ns()
        self.optimizer.step()
        taken = time.perf_counter_ns() - started
        if number % BLOCK == 0:
            self.blocks.append(0)
        self.blocks[-1] += taken


class Runner(Timed):
    """A SOFIM optimizer in the run, and how far rounding may have moved it so far.

    Attributes:
        variance: of the weights' distance from the oracle, if every rounding were independent and uniform.
        bound: the distance, if all rounding errors had the same direction.
    """

    def __init__(self, kind: Kind, weights: Sequence[Tensor]) -> None:
        ours = partial(SOFIM, lr=HYPER.lr, momentum=HYPER.momentum, rho=HYPER.rho)
        super().__init__(partial(ours, state_dtype=kind.state, kahan=kind.kahan), kind.dtype, weights)
        self.kind = kind
        self.variance = self.bound = 0.0

    def allow(self, weight: float, moment: float, change: float) -> None:
        """Add what one step's roundings may do; the arguments are norms.

        An error of a moment goes on for 1/(1 - β) steps. So does that of float32 factors, as a part of the step.
        """
        kind, horizon = self.kind, 1 / (1 - HYPER.momentum)
        carried = change / moment * horizon if moment else 0.0  # of a moment's error into weights
        spread = kind.moment * moment * carried * (0.5 if kind.state == torch.bfloat16 else 3**-0.5)
        self.variance += (kind.weight * weight) ** 2 / 3 + spread**2
        self.bound += kind.weight * weight + (kind.moment + 2.0**-22) * moment * carried

    def distance(self, weights: Sequence[Tensor]) -> float:
        """The distance from the oracle's weights."""
        whole = [_whole(p.detach(), self.optimizer.state[p]) for p in self.params]
        return _norm([p - w for p, w in zip(whole, weights, strict=True)])


class Run:
    """All optimizers together; the tables are made from what is noted on the way.

    Args:
        steps: to take.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps

    @cached_property
    def rows(self) -> dict[str, list[Row]]:
        """Of each table."""
        drifts: list[Row] = []
        marks = {10**k for k in range(2, 20) if 10**k < self.steps} | {self.steps}
        generator = torch.Generator().manual_seed(1)
        network = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES)).double()
        params: list[Tensor] = list(network.parameters())
        with torch.no_grad():
            for p in params:  # values that every dtype holds
                p.copy_(torch.randn(p.shape, generator=generator).mul_(0.3).bfloat16())
        centres = torch.randn(CLASSES, FEATURES, generator=generator, dtype=torch.float64)
        labels = torch.randint(CLASSES, (SAMPLES,), generator=generator)
        inputs = centres[labels] + torch.randn(SAMPLES, FEATURES, generator=generator, dtype=torch.float64)
        oracle = Oracle(params, [HYPER] * len(params), [0] * len(params))
        runners = {name: Runner(kind, params) for name, kind in KINDS.items()}
        control = Timed(partial(SGD, lr=1e-3, momentum=HYPER.momentum, fused=True), torch.float32, params)
        start, path, since = 0, 0.0, 0
        for number in range(self.steps):
            if number == BLOCK:
                give_back()
                start = resident("VmRSS")
            batch = torch.randint(SAMPLES, (BATCH,), generator=generator)
            loss = cross_entropy(network(inputs[batch]), labels[batch])
            grads = [g.bfloat16() for g in torch.autograd.grad(loss, params)]
            weight = _norm(oracle.weights)
            change = _norm(oracle.step(grads))
            moment = _norm(oracle.moments)
            path += change
            for runner in runners.values():
                runner.step(grads, number)
                runner.allow(weight, moment, change)
            control.step([g.float() for g in grads], number)
            with torch.no_grad():
                torch._foreach_copy_(params, oracle.weights)
            if number + 1 in marks:
                step = path / (number + 1 - since)
                drifts += [_drift(name, runner, oracle, number + 1, step) for name, runner in runners.items()]
                path, since = 0.0, number + 1
        give_back()
        end = resident("VmRSS")
        growth = {"model": MODEL, "provider": "all of them", "start": start, "end": end, "growth": end - start}
        return {
            "drift": sorted(drifts, key=lambda row: list(KINDS).index(row["provider"])),
            "speed": [_speed(name, timed, control) for name, timed in {**runners, CONTROL: control}.items()],
            "memory": [{**growth, **verdict(1 << 20, end - start)}],
        }


def _whole(p: Tensor, known: Mapping[str, Tensor]) -> Tensor:
    """The weights with the bits that are kept beside them."""
    if "master_bits" in known:
        return joined(p, known["master_bits"]).double()
    return p.double() + known.get("kahan", torch.zeros(()))


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(n) ** 2 for n in torch._foreach_norm(list(tensors))))


def _drift(name: str, runner: Runner, oracle: Oracle, steps: int, step: float) -> Row:
    distance, size = runner.distance(oracle.weights), _norm(oracle.weights)
    bound = distance / runner.bound
    return {
        "model": MODEL,
        "provider": name,
        "steps": steps,
        "step": step / size,
        "drift": distance / size,
        "of_walk": distance / math.sqrt(runner.variance),
        "of_bound": bound,
        **verdict(1.0, bound),
    }


def _speed(name: str, timed: Timed, control: Timed) -> Row:
    (first, last), (its_first, its_last) = timed.tenths, control.tenths
    kept = first / last
    return {
        "model": MODEL,
        "provider": name,
        "first": first,
        "last": last,
        "throughput": kept,
        "beside": kept * its_last / its_first,
    }


def _rows(key: str) -> Callable[[Run], Iterator[Row]]:
    return lambda run: iter(run.rows[key])


TABLES: Mapping[str, Table] = {
    "drift": Table(
        "Drift",
        "",
        {
            "provider": lambda row: row["provider"],
            "steps": lambda row: f"{row['steps']:,}",
            "step": lambda row: f"{row['step']:.1e}",
            "drift": lambda row: f"{row['drift']:.2e}",
            "/ random walk": lambda row: digits(row["of_walk"]),
            "/ bound": lambda row: f"{row['of_bound']:.2g}",
            "target": target,
        },
        _rows("drift"),
        "How far the weights, with the bits that are kept beside them, are from the oracle's, relative to these: beside"
        " a random walk of independent roundings, and beside their sum if all went one way. In a step a weight is"
        " rounded once, and the error of a moment goes on for 1/(1 - β) steps; so do float32 factors, which are the"
        " same in each step and no random walk. Neither is it one when steps (here their mean since the row before,"
        " relative to the weights) are below half an ulp of what they are added to, and are lost whole: about 2^-9 of"
        " a bfloat16 weight, 2^-17 with Kahan, 2^-25 of a float32 weight or one of 32 master bits.",
    ),
    "speed": Table(
        "Speed",
        "",
        {
            "provider": lambda row: row["provider"],
            "µs, first tenth": lambda row: digits(row["first"] * 1e6),
            "µs, last tenth": lambda row: digits(row["last"] * 1e6),
            "throughput, last / first": lambda row: f"{row['throughput']:.3f}",
            "beside SGD's": lambda row: f"{row['beside']:.3f}",
        },
        _rows("speed"),
        f"Of step() alone, in the first and the last tenth of the run: the median over {BLOCK} steps at a time. The"
        " machine's own speed may change meanwhile: in the last column the quotient is divided by that of an SGD with"
        " momentum, which steps in between.",
    ),
    "memory": Table(
        "Memory",
        "",
        {
            "MB at the start": lambda row: f"{row['start'] / 1e6:.2f}",
            "MB at the end": lambda row: f"{row['end'] / 1e6:.2f}",
            "growth kB": lambda row: f"{row['growth'] / 1e3:.0f}",
            "target": lambda row: f"≤ 1 MiB: {'met' if row['met'] else 'missed'}",
        },
        _rows("memory"),
        f"VmRSS of the process after {BLOCK} steps and after the last, free memory being returned before either.",
    ),
}

INTRODUCTION = (
    f"A network of {FEATURES} features, {HIDDEN} tanh units and {CLASSES} classes, batches of {BATCH} out of {SAMPLES}"
    f" samples; η {HYPER.lr:g}, β {HYPER.momentum:g}, ρ {HYPER.rho:g}. Gradients are taken at the oracle's weights,"
    " rounded to bfloat16, and go to the oracle and to all optimizers."
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, print, and write down."""
    parser = argparse.ArgumentParser(prog="python -m bench.long_run", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="at least 1000 (default: %(default)s)")
    parser.add_argument(
        "--json", type=Path, default=RESULTS / "long_run.json", help="file for the results; the tables go beside it"
    )
    options: Any = parser.parse_args(arguments)
    torch.set_num_threads(1)
    command = "python -m bench.long_run" + ("" if options.steps == STEPS else f" --steps {options.steps}")
    measure(Run(options.steps), TABLES, command, 1, options.json, INTRODUCTION)


if __name__ == "__main__":
    main()
