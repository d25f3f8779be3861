"""A convex problem whose minimiser is known: how fast do the weights approach it?

Multinomial logistic regression on scikit-learn's digits with an L2 penalty, in float64, from zero. The minimiser w* is
found by Newton's method, and ‖w - w*‖ is followed, with full gradients and with mini-batches.

Close to w* the loss is its second-order expansion with Hessian H. There the factor by which an optimizer shrinks an
error along an eigenvector of H has a formula (:func:`predicted`), which is compared with the measurement.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from statistics import mean
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from bench.convergence.compare import STYLES, settings_of_grid, table
from bench.convergence.contenders import (
    CONFIGURATIONS,
    CONTENDERS,
    LINEUPS,
    MOMENTUM,
    Contender,
    Settings,
    gradients_by,
    scaled,
)
from bench.convergence.pool import run_missing
from bench.convergence.store import Store
from examples.train import batch_order

__all__ = ["Plan", "Problem", "figure", "markdown", "predicted", "problem", "run"]

Kind = Literal["full", "batches"]

PENALTY = 0.01
# The grids are made for networks. With full gradients of this loss rates may be far higher; the factors bring the best
# of each grid inside of it where they can.
FACTORS: Mapping[Kind, Mapping[str, float]] = {
    "full": {"sofim": 16, "sofim-gradient": 10, "sgd": 16, "adam": 4, "lbfgs": 1, "adahessian": 2.5, "nystrom": 10},
    "batches": {"sofim": 1, "sofim-gradient": 3, "sgd": 1, "adam": 4, "lbfgs": 0.3, "adahessian": 2.5, "nystrom": 3},
}
TAKING_PART = (*LINEUPS["published"].contenders, "sofim-factored")
FLOOR = 1e-12  # distances below are rounding
FEATURES, CLASSES = 65, 10


class Problem(NamedTuple):
    """Mean cross-entropy plus ``PENALTY / 2`` times the squared weights, and where it is lowest.

    Attributes:
        inputs: float64 (1797, 65): pixels from 0 to 1, and 1.
        targets: int64 (1797,).
        minimiser: float64 (650,), flat weights of shape (10, 65).
        spectrum: float64 (650,), the Hessian's eigenvalues there, in ascending order.
    """

    inputs: Tensor
    targets: Tensor
    minimiser: Tensor
    spectrum: Tensor

    def loss(self, weights: Tensor, indices: Tensor | None = None) -> Tensor:
        """Of flat weights, over all examples or over some."""
        inputs, targets = (
            (self.inputs, self.targets) if indices is None else (self.inputs[indices], self.targets[indices])
        )
        logits = inputs @ weights.view(CLASSES, FEATURES).T
        return functional.cross_entropy(logits, targets) + PENALTY / 2 * weights.square().sum()

    def hessian(self, weights: Tensor) -> Tensor:
        """Of the loss over all examples, (650, 650)."""
        chances = (self.inputs @ weights.view(CLASSES, FEATURES).T).softmax(1)
        inner = torch.diag_embed(chances) - chances[:, :, None] * chances[:, None, :]
        blocks = torch.stack(
            [self.inputs.T @ (w[:, None] * self.inputs) for w in inner.flatten(1).T / len(self.inputs)]
        ).view(CLASSES, CLASSES, FEATURES, FEATURES)
        whole = blocks.transpose(1, 2).reshape(weights.numel(), -1)
        return whole + PENALTY * torch.eye(weights.numel(), dtype=weights.dtype)


@cache
def problem() -> Problem:
    """The problem, solved."""
    pixels, targets = load_digits(return_X_y=True)
    inputs = torch.from_numpy(np.hstack([pixels / 16, np.ones((len(pixels), 1))]))
    unsolved = Problem(inputs, torch.from_numpy(targets).long(), torch.empty(0), torch.empty(0))
    weights = torch.zeros(CLASSES * FEATURES, dtype=torch.float64)
    for _ in range(50):
        gradient = torch.func.grad(unsolved.loss)(weights)
        hessian = unsolved.hessian(weights)
        step = torch.linalg.solve(hessian, gradient)
        weights = weights - step
        if step.norm() < 1e-14 * weights.norm():
            break
    return unsolved._replace(minimiser=weights, spectrum=torch.linalg.eigvalsh(hessian))


class Plan(NamedTuple):
    """How long to run.

    Attributes:
        steps: with full gradients.
        epochs: with mini-batches.
        batch_size: of these.
        seeds: of batches, and of the optimizers that draw random numbers.
    """

    steps: int = 300
    epochs: int = 20
    batch_size: int = 100
    seeds: int = 5


class Job(NamedTuple):
    """A run: of full gradients where there is no batch size."""

    contender: str
    settings: Settings
    seed: int
    steps: int
    batch_size: int | None

    @property
    def key(self) -> str:
        """The same for the same job."""
        return json.dumps(self._asdict(), sort_keys=True)


def descend(job: Job) -> dict[str, Any]:
    """‖w - w*‖ / ‖w*‖ before the first step and after each; up to the first that is not finite."""
    torch.manual_seed(job.seed)
    given, contender = problem(), CONTENDERS[job.contender]
    model = nn.Linear(CLASSES * FEATURES, 1, bias=False, dtype=torch.float64)  # one tensor, called weight
    with torch.no_grad():
        model.weight.zero_()
    optimizer = contender.build(model, job.settings)
    params = list(model.parameters())
    distances = [1.0]
    count = len(given.targets)
    evaluations = 0
    batches: list[Tensor | None] = []
    while len(batches) < job.steps:
        epoch = len(batches)
        batches += [None] if job.batch_size is None else batch_order(job.seed, epoch, count).split(job.batch_size)
    for indices in batches[: job.steps]:

        def loss(indices: Tensor | None = indices) -> Tensor:
            return given.loss(model.weight.view(-1), indices)

        def closure(loss: Any = loss) -> Any:
            nonlocal evaluations
            evaluations += 1
            optimizer.zero_grad()
            value: Tensor = loss()
            value.backward()
            return value

        if contender.gradients == "closure":
            optimizer.step(closure)
        else:
            evaluations += 1
            optimizer.zero_grad()
            gradients_by(contender, optimizer, loss(), params)
            optimizer.step()
            optimizer.zero_grad()
        distance = float((model.weight.detach().view(-1) - given.minimiser).norm() / given.minimiser.norm())
        if not math.isfinite(distance):
            break
        distances.append(float(f"{distance:.4g}"))
    return {"distances": distances, "evaluations": evaluations}


class Entry(NamedTuple):
    """An optimizer with the settings that ended closest to the minimiser; ``runs`` are its distances, by seed."""

    contender: Contender
    settings: Settings
    runs: list[list[float]]
    evaluations: float  # per step


Result = Mapping[Kind, Sequence[Entry]]


def run(plan: Plan, store: Store, workers: int, console: Console) -> Result:
    """Do what of a plan is not in the store."""
    jobs = {job.key: job for contender in _contenders() for job in _jobs(plan, contender)}
    run_missing(jobs, descend, store, workers, "convex", console)
    return result(plan, store)


def _contenders() -> list[Contender]:
    return [CONTENDERS[name] for name in TAKING_PART]


def _jobs(plan: Plan, contender: Contender) -> list[Job]:
    kinds: tuple[Kind, ...] = ("full", "batches")
    return [
        job
        for kind in kinds
        for settings in scaled(contender, FACTORS[kind]).grid
        for job in _runs(plan, contender, settings, kind)
    ]


def _runs(plan: Plan, contender: Contender, settings: Settings, kind: Kind) -> list[Job]:
    if kind == "full":
        # Nothing is drawn at random but Hessian columns and probes.
        seeds = plan.seeds if contender.gradients == "graph" else 1
        return [Job(contender.name, settings, seed, plan.steps, None) for seed in range(seeds)]
    steps = plan.epochs * math.ceil(len(problem().targets) / plan.batch_size)
    return [Job(contender.name, settings, seed, steps, plan.batch_size) for seed in range(plan.seeds)]


def result(plan: Plan, store: Store) -> Result:
    """From a store that has all of it. An optimizer that it has no run of was added later, and is left out.

    Raises:
        KeyError: it has some runs of an optimizer, and not all of them.
    """
    contenders = [contender for contender in _contenders() if any(job.key in store for job in _jobs(plan, contender))]

    def entry(contender: Contender, kind: Kind) -> Entry:
        contender = scaled(contender, FACTORS[kind])

        def outcomes(settings: Settings) -> list[dict[str, Any]]:
            return [store[job.key] for job in _runs(plan, contender, settings, kind)]

        def score(settings: Settings) -> float:
            runs = [outcome["distances"] for outcome in outcomes(settings)]
            full = _runs(plan, contender, settings, kind)[0].steps + 1
            if any(len(distances) < full for distances in runs):
                return math.inf
            # With full gradients several may end at rounding: then the one that got there first.
            arrival = mean(_arrival(distances) for distances in runs) / full
            return mean(math.log(max(_level(distances), FLOOR)) for distances in runs) + 1e-3 * arrival

        best = min(contender.grid, key=score)
        chosen = outcomes(best)
        evaluations = mean(outcome["evaluations"] / (len(outcome["distances"]) - 1 or 1) for outcome in chosen)
        return Entry(
            contender,
            best,
            [outcome["distances"] for outcome in chosen],
            evaluations,
        )

    return {kind: [entry(contender, kind) for contender in contenders] for kind in ("full", "batches")}


def _level(distances: Sequence[float]) -> float:
    """The mean of the last tenth: with mini-batches weights wander."""
    return mean(distances[-max(1, len(distances) // 10) :])


def _arrival(distances: Sequence[float]) -> int:
    return next((step for step, distance in enumerate(distances) if distance < 1e-9), len(distances))


# Theory


def predicted(contender: Contender, settings: Settings, spectrum: Tensor) -> float | None:
    """The factor by which ‖w - w*‖ shrinks per step in the end, for full gradients; ``None``: not known.

    The rank-one part of SOFIM's matrix is of second order in the gradient, so that F → ρI at a minimiser. With
    α = lr/ρ the moment form then is heavy-ball momentum, and the gradient form plain gradient descent. An error x along
    an eigenvector of eigenvalue h, and the moment m, go to::

        m' = β m + (1-β) h x,   x' = x - α m'         (SGD's buffer: m' = β m + h x)

    and the factor is the largest modulus of the eigenvalues of these 2 x 2 matrices over the spectrum.
    """
    if contender.name.startswith("sofim-gradient"):
        return float((1 - settings["lr/rho"] * spectrum).abs().max())
    if "lr/rho" in settings and contender.name.startswith("sofim"):
        momentum, gain, rate = MOMENTUM, 1 - MOMENTUM, settings["lr/rho"]
    elif contender.name == "sgd":
        momentum, gain, rate = settings["momentum"], 1.0, settings["lr"]
    else:
        return None
    matrices = torch.empty(len(spectrum), 2, 2, dtype=torch.float64)
    matrices[:, 0, 0], matrices[:, 0, 1] = momentum, gain * spectrum
    matrices[:, 1, 0], matrices[:, 1, 1] = -rate * momentum, 1 - rate * gain * spectrum
    return float(torch.linalg.eigvals(matrices).abs().max())


def seen(distances: Sequence[float]) -> float | None:
    """The factor per step over the last third of the steps above rounding; ``None`` where there is no such thing."""
    end = next((i for i, distance in enumerate(distances) if distance < 1e-11), len(distances) - 1)
    start = end - max(1, end // 3)
    if end < 3 or distances[end] <= 0:
        return None
    factor: float = (distances[end] / distances[start]) ** (1 / (end - start))
    return factor


# Report


def markdown(plan: Plan, found: Result, machine: str, command: str) -> str:
    """Both tables as a document."""
    spectrum = problem().spectrum
    introduction = (
        "Multinomial logistic regression on digits (1,797 examples, 650 weights, float64), L2 penalty"
        f" {PENALTY:g}: Hessian at the minimiser from {spectrum[0]:.3g} to {spectrum[-1]:.3g}. `{command}`:"
        f" {machine}.\n\n"
        f"For each optimizer the best of {CONFIGURATIONS} configurations by the distance in the end. \\*: at an edge of"
        " its grid."
    )
    full = [
        [
            entry.contender.label,
            settings_of_grid(entry.contender, entry.settings),
            f"{entry.evaluations:.1f}",
            _distance(entry.runs),
            _steps_to(entry.runs, 1e-3),
            _steps_to(entry.runs, 1e-6),
            _factor(predicted(entry.contender, entry.settings, spectrum)),
            _factor(seen(entry.runs[0])),
        ]
        for entry in found["full"]
    ]
    batches = [
        [
            entry.contender.label,
            settings_of_grid(entry.contender, entry.settings),
            _distance(entry.runs),
            _steps_to(entry.runs, 0.1),
        ]
        for entry in found["batches"]
    ]
    relative = "‖w - w\\*‖/‖w\\*‖"
    return "\n\n".join(
        [
            introduction,
            f"### Full gradients, {plan.steps} steps",
            table(
                [
                    "",
                    "chosen",
                    "gradients per step",
                    f"{relative} in the end",
                    "steps to 1e-3",
                    "to 1e-6",
                    "factor per step, predicted",
                    "seen",
                ],
                full,
            ),
            f"### Mini-batches of {plan.batch_size}, {plan.epochs} epochs, {plan.seeds} seeds",
            table(["", "chosen", f"{relative}, mean of the last tenth", "steps to 0.1"], batches),
        ]
    )


def _distance(runs: Sequence[Sequence[float]]) -> str:
    return f"{math.exp(mean(math.log(max(_level(run), FLOOR)) for run in runs)):.1e}"


def _steps_to(runs: Sequence[Sequence[float]], limit: float) -> str:
    steps = [next((i for i, distance in enumerate(run) if distance <= limit), None) for run in runs]
    found = [step for step in steps if step is not None]
    if not found:
        return "–"
    return f"{mean(found):.0f}" + (f" ({len(found)} of {len(runs)})" if len(found) < len(runs) else "")


def _factor(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def figure(plan: Plan, found: Result) -> Figure:
    """Distances by step."""
    drawing = Figure(figsize=(13, 5.5), layout="constrained")
    left, right = drawing.subplots(1, 2)
    titles = {
        "full": f"full gradients, best of {CONFIGURATIONS} configurations each",
        "batches": f"mini-batches of {plan.batch_size}, mean of {plan.seeds} seeds",
    }
    kinds: tuple[Kind, Kind] = ("full", "batches")
    for axes, kind in zip((left, right), kinds, strict=True):
        for entry in found[kind]:
            colour, line, width = STYLES[entry.contender.name]
            length = min(map(len, entry.runs))
            distances: NDArray[Any] = np.array([run[:length] for run in entry.runs]).clip(FLOOR)
            axes.plot(
                np.exp(np.log(distances).mean(0)), line, color=colour, linewidth=width, label=entry.contender.label
            )
        axes.set(xlabel="step", ylabel="‖w - w*‖ / ‖w*‖", yscale="log", title=titles[kind])
        axes.grid(alpha=0.3)
    left.legend(fontsize="small")
    drawing.suptitle("Logistic regression on digits: distance to the minimiser")
    return drawing
