"""When does SOFIM differ from SGD with momentum? ‖m̂‖²/ρ along its runs.

With F⁻¹ m̂ = m̂ / (ρ + ‖m̂‖²), a step is the momentum step lr/ρ·m̂ if ‖m̂‖² is far below ρ; above, the rank-one part of F
shortens it. The settings are those that the comparison of each task chose.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from rich.console import Console

from bench.convergence.compare import Plan, choice, settings_of_grid, table
from bench.convergence.contenders import Contender
from bench.convergence.pool import run_missing
from bench.convergence.store import Store
from bench.convergence.training import Job, prepare

__all__ = ["Course", "figure", "markdown", "run"]


class Course(NamedTuple):
    """‖m̂‖²/ρ after each step of a run."""

    plan: Plan
    job: Job
    ratios: list[float]


def sofim_of(plan: Plan) -> Contender:
    """SOFIM as it takes part in a plan."""
    (sofim,) = (contender for contender in plan.contenders if contender.name == "sofim")
    return sofim


def jobs(plans: Sequence[Plan], stores: Sequence[Store]) -> list[Job]:
    """SOFIM on each task, with the settings that were chosen, from the first seed."""
    found = []
    for plan, store in zip(plans, stores, strict=True):
        sofim = sofim_of(plan)
        found.append(plan.job(sofim, choice(plan, sofim, store)[0], 0))
    return found


def follow(job: Job, root: Path | None) -> list[float]:
    """Train, and take ‖m̂‖²/ρ after each step."""
    training, data = prepare(job, root)
    optimizer, ratios = training.optimizer, []

    def note(*_: Any) -> None:
        total = 0.0
        for group in optimizer.param_groups:
            for p in group["params"]:
                state = optimizer.state[p]
                corrected = 1 - group["momentum"] ** float(state["step"])
                total += float(state["exp_avg"].double().square().sum()) / corrected**2 / group["rho"]
        ratios.append(float(f"{total:.4g}"))

    optimizer.register_step_post_hook(note)
    training.outcome(data)
    return ratios


def run(
    plans: Sequence[Plan], stores: Sequence[Store], store: Store, workers: int, root: Path | None, console: Console
) -> list[Course]:
    """Run what the store does not have yet."""
    wanted = {job.key: job for job in jobs(plans, stores)}
    run_missing(wanted, partial(follow, root=root), store, workers, "regime", console)
    return courses(plans, stores, store)


def courses(plans: Sequence[Plan], stores: Sequence[Store], store: Store) -> list[Course]:
    """From a store that has all of it.

    Raises:
        KeyError: it has not.
    """
    return [Course(plan, job, store[job.key]) for plan, job in zip(plans, jobs(plans, stores), strict=True)]


def chosen(course: Course) -> str:
    """The settings of a run."""
    return settings_of_grid(sofim_of(course.plan), course.job.settings)


def markdown(found: Sequence[Course], machine: str, command: str) -> str:
    """How large the ratio was, as a document."""
    rows = []
    for course in found:
        half = len(course.ratios) // 2
        rows.append(
            [
                course.plan.task.title,
                chosen(course),
                f"{median(course.ratios[:half]):.2g}",
                f"{median(course.ratios[half:]):.2g}",
                f"{max(course.ratios):.2g}",
                f"{sum(ratio > 1 for ratio in course.ratios) / len(course.ratios):.0%}",
            ]
        )
    heading = ["task", "chosen", "median, first half", "median, second half", "largest", "steps above 1"]
    return f"‖m̂‖²/ρ after each step of SOFIM, one seed each. `{command}`: {machine}.\n\n{table(heading, rows)}"


def figure(found: Sequence[Course]) -> Figure:
    """The ratios by step."""
    drawing = Figure(figsize=(9, 5), layout="constrained")
    axes = drawing.subplots()
    for course in found:
        label = f"{course.plan.task.title}, {chosen(course)}"
        axes.plot(range(1, len(course.ratios) + 1), course.ratios, linewidth=0.8, label=label.replace("\\*", ""))
    axes.axhline(1, color="black", linewidth=1)
    axes.set(
        xlabel="step", ylabel="‖m̂‖²/ρ", yscale="log", title="Below 1 SOFIM takes momentum steps, above shorter ones"
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return drawing
