"""The comparison on one task: each optimizer tuned on validation examples, then trained from several seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from scipy import stats

from bench.convergence.contenders import CONFIGURATIONS, CONTENDERS, LINEUPS, Contender, Lineup, Settings, scaled
from bench.convergence.pool import run_missing
from bench.convergence.store import Store
from bench.convergence.tasks import TASKS, Size, Targets, Task
from bench.convergence.training import Job, Outcome, Point, record

__all__ = ["Comparison", "Plan", "figure", "markdown", "run", "summary"]

FIRST_TUNING_SEED = 1000  # no seed is used for tuning and for comparing
STYLES = {
    "sofim": ("tab:blue", "-", 2.2),
    "sofim-group": ("tab:blue", "--", 1.2),
    "sofim-parameter": ("tab:blue", ":", 1.2),
    "sofim-gradient": ("tab:cyan", "-", 1.2),
    "sofim-gradient-group": ("tab:cyan", "--", 1.2),
    "sofim-gradient-parameter": ("tab:cyan", ":", 1.2),
    "sofim-factored": ("tab:blue", "-.", 2.2),
    "sofim-factored-moment": ("tab:blue", ":", 1.2),
    "sofim-factored-rho": ("tab:cyan", "-.", 1.2),
    "sofim-tensor": ("tab:gray", "-", 1.2),
    "sofim-row": ("tab:olive", "-", 1.5),
    "sofim-row-moment": ("tab:olive", ":", 1.2),
    "sofim-element": ("tab:pink", "-", 1.5),
    "sofim-element-moment": ("tab:pink", ":", 1.2),
    "sgd": ("tab:red", "-", 1.5),
    "sgd-nesterov": ("tab:red", "--", 1.2),
    "adamw": ("tab:orange", "-", 1.5),
    "adamw-beta2": ("tab:orange", "-", 2.2),
    "nadam": ("tab:orange", "--", 1.5),
    "adafactor": ("black", "-", 1.2),
    "lbfgs": ("tab:green", "-", 1.5),
    "adahessian": ("tab:purple", "-", 1.5),
    "nystrom": ("tab:brown", "-", 1.5),
}


class Plan(NamedTuple):
    """What is compared.

    Attributes:
        task: what is trained.
        size: how much is trained.
        seeds: how many runs each optimizer has with the settings that were chosen.
        device: where it runs.
        configurations: how many settings of each optimizer's grid are tried, from the first on.
        lineup: which optimizers.
        only: those of them that are run; empty: all.
    """

    task: Task
    size: Size
    seeds: int
    device: str
    configurations: int = CONFIGURATIONS
    lineup: Lineup = LINEUPS["published"]
    only: tuple[str, ...] = ()

    @property
    def contenders(self) -> list[Contender]:
        """The optimizers that take part, in the order in which they are run."""
        names = [name for name in self.lineup.contenders if not self.only or name in self.only]
        scaled_ = (scaled(CONTENDERS[name], self.task.factors) for name in names)
        return [replace(contender, grid=contender.grid[: self.configurations]) for contender in scaled_]

    @property
    def comparing(self) -> range:
        """The seeds of the runs to compare by."""
        return range(self.lineup.first_seed, self.lineup.first_seed + self.seeds)

    def job(self, contender: Contender, settings: Settings, seed: int) -> Job:
        """A run to compare by."""
        return Job(
            self.task.name,
            contender.name,
            settings,
            seed,
            "test",
            self.size.epochs,
            self.size.examples,
            self.task.batch_size,
            self.device,
        )

    def tuning(self, contender: Contender, settings: Settings) -> list[Job]:
        """The runs that settings are chosen by."""
        seeds = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + self.task.tuning_seeds)
        return [replace(self.job(contender, settings, seed), held_out="validation") for seed in seeds]


class Entry(NamedTuple):
    """An optimizer with the settings chosen for it.

    Attributes:
        contender: the optimizer.
        settings: with the lowest validation loss.
        validation: that loss; infinite where every run diverged.
        outcomes: by seed.
    """

    contender: Contender
    settings: Settings
    validation: float
    outcomes: list[Outcome]


class Comparison(NamedTuple):
    """A plan and its results.

    Attributes:
        plan: what was compared.
        entries: the optimizers all of whose runs are there.
        missing: the other ones.
    """

    plan: Plan
    entries: list[Entry]
    missing: Sequence[Contender] = ()

    @property
    def baseline(self) -> Entry | None:
        """What the others are compared with; ``None`` if its runs are missing."""
        return next((entry for entry in self.entries if entry.contender.name == self.plan.lineup.baseline), None)


def run(plan: Plan, store: Store, workers: int, root: Path | None, console: Console) -> Comparison:
    """Run what the store does not have yet of a plan: one optimizer after the other, so that some are soon complete."""
    plan.task.data(root, plan.size.examples)  # raises errors in the data before any run begins
    work = partial(record, root=root)
    title = plan.task.name
    # Several processes do all in one go: each takes a second to start.
    parts = [[contender] for contender in plan.contenders] if workers == 1 else [plan.contenders]
    for contenders in parts:
        tuning = [
            job for contender in contenders for settings in contender.grid for job in plan.tuning(contender, settings)
        ]
        run_missing({job.key: job for job in tuning}, work, store, workers, f"{title}: tuning", console)
        final = [
            plan.job(contender, choice(plan, contender, store)[0], seed)
            for contender in contenders
            for seed in plan.comparing
        ]
        run_missing({job.key: job for job in final}, work, store, workers, f"{title}: comparing", console)
    return comparison(plan, store)


def comparison(plan: Plan, store: Store) -> Comparison:
    """From what a store has: optimizers whose runs are not all there are left out, and listed."""
    entries, missing = [], []
    for contender in plan.contenders:
        try:
            settings, loss = choice(plan, contender, store)
            outcomes = [Outcome.of(store[plan.job(contender, settings, seed).key]) for seed in plan.comparing]
        except KeyError:
            missing.append(contender)
        else:
            entries.append(Entry(contender, settings, loss, outcomes))
    return Comparison(plan, entries, missing)


def choice(plan: Plan, contender: Contender, store: Store) -> tuple[Settings, float]:
    """The settings of the lowest validation loss that any epoch ended with, in the mean over the tuning seeds."""

    def loss(settings: Settings) -> float:
        outcomes = [Outcome.of(store[job.key]) for job in plan.tuning(contender, settings)]
        return mean(math.inf if outcome.diverged else lowest_loss(outcome) for outcome in outcomes)

    best = min(contender.grid, key=loss)
    return best, loss(best)


def lowest_loss(outcome: Outcome) -> float:
    """Of the examples held out, after any epoch."""
    return min((point.loss for point in outcome.points), default=math.inf)


def best_accuracy(outcome: Outcome) -> float:
    """Of the examples held out, after any epoch."""
    return max((point.accuracy for point in outcome.points), default=0.0)


class Reached(NamedTuple):
    """When a target was reached: after so many epochs, gradient evaluations, seconds."""

    epochs: int
    cost: float
    seconds: float


def reached(outcome: Outcome, met: Callable[[Point], bool]) -> Reached | None:
    """After the first epoch at whose end the target was met; ``None`` if it never was."""
    for epoch, point in enumerate(outcome.points, 1):
        if met(point):
            return Reached(epoch, point.cost, point.seconds)
    return None


def milestones(targets: Targets) -> dict[str, Callable[[Point], bool]]:
    """The targets, by their headings."""
    return {
        f"training loss ≤ {targets.train_loss:g}": lambda point: point.train_loss <= targets.train_loss,
        f"test loss ≤ {targets.test_loss:g}": lambda point: point.loss <= targets.test_loss,
        f"test accuracy ≥ {100 * targets.test_accuracy:g} %": lambda point: point.accuracy >= targets.test_accuracy,
    }


# Tables


def markdown(result: Comparison, machine: str, command: str) -> str:
    """The comparison as a document."""
    plan = result.plan
    examples = "all" if plan.size.examples is None else f"{plan.size.examples:,}"
    introduction = (
        f"{plan.task.title}: {examples} training examples, {plan.size.epochs} epochs, batch size"
        f" {plan.task.batch_size}. `{command}`: {machine}.\n\n"
        f"For each optimizer the best of {plan.configurations} configurations by the lowest validation loss of any"
        f" epoch ({plan.task.tuning_seeds} seed{'s' * (plan.task.tuning_seeds > 1)} each), then {plan.seeds} other"
        " seeds. Mean ± standard deviation over these. \\*: at an edge of its grid."
    )
    if result.missing:
        names = "; ".join(contender.label for contender in result.missing)
        introduction += f"\n\nNot in the tables, because their runs are not complete: {names}."
    return "\n\n".join(
        [introduction, "### Where they end", ends(result), "### What it takes to get there", speeds(result)]
    )


def ends(result: Comparison) -> str:
    """Settings, final figures, and differences from the baseline."""
    baseline = result.baseline
    rows = []
    for entry in result.entries:
        done = [outcome for outcome in entry.outcomes if not outcome.diverged]
        cells = [entry.contender.label, settings_of(entry), _number(entry.validation)]
        if len(done) < len(entry.outcomes):
            cells += [f"diverged: {len(entry.outcomes) - len(done)} of {len(entry.outcomes)}"] + [""] * 4
        else:
            cells += [
                _spread([outcome.points[-1].train_loss for outcome in done], ".3f"),
                _spread([lowest_loss(outcome) for outcome in done], ".3f"),
                "" if baseline in (None, entry) else _difference(entry, baseline),
                _spread([100 * best_accuracy(outcome) for outcome in done], ".2f"),
                _spread([100 * outcome.points[-1].accuracy for outcome in done], ".2f"),
            ]
        rows.append(cells)
    heading = [
        "",
        "chosen",
        "validation loss",
        "training loss, last epoch",
        "lowest test loss",
        f"minus {_short(result.plan.lineup)}'s [95 %]",
        "best test accuracy, %",
        "last, %",
    ]
    return table(heading, rows)


def _short(lineup: Lineup) -> str:
    """The baseline's name in a heading."""
    return CONTENDERS[lineup.baseline].label.removesuffix("-momentum")


def _difference(entry: Entry, baseline: Entry | None) -> str:
    assert baseline is not None
    if any(outcome.diverged for outcome in baseline.outcomes):
        return ""
    middle, half = paired(entry, baseline)
    return f"{middle:+.3f}" + (f" [{middle - half:+.3f}, {middle + half:+.3f}]" if math.isfinite(half) else "")


def paired(entry: Entry, baseline: Entry) -> tuple[float, float]:
    """The mean difference of lowest losses from the same start and batches, and half of its 95 % interval."""
    pairs = zip(entry.outcomes, baseline.outcomes, strict=True)
    differences = [lowest_loss(ours) - lowest_loss(theirs) for ours, theirs in pairs]
    n = len(differences)
    half = stats.t.ppf(0.975, n - 1) * stdev(differences) / math.sqrt(n) if n > 1 else math.inf
    return mean(differences), float(half)


def speeds(result: Comparison) -> str:
    """Cost, and when each target was reached; without seconds where the machine was not idle."""
    targets = milestones(result.plan.task.targets)
    timed = result.plan.lineup.timed
    rows = []
    for entry in result.entries:
        outcomes = entry.outcomes
        begun = [outcome for outcome in outcomes if outcome.points]
        if not begun:
            rows.append([entry.contender.label] + [""] * (2 + timed + len(targets)))
            continue
        rows.append(
            [
                entry.contender.label,
                f"{mean(outcome.memory / outcome.parameters / 4 for outcome in begun):.2f}",
                f"{mean(outcome.cost / outcome.steps for outcome in begun):.2f}",
                *([f"{mean(_seconds_per_epoch(outcome) for outcome in begun):.2f}"] if timed else []),
                *(_reached(outcomes, met, timed) for met in targets.values()),
            ]
        )
    heading = ["", "state, floats per parameter", "gradient evaluations per step"]
    heading += (["seconds per epoch"] if timed else []) + list(targets)
    price = max(outcome.hessian_cost for entry in result.entries for outcome in entry.outcomes)
    notes = (
        f"Targets: epochs / gradient evaluations{' / seconds' * timed}, means over the seeds that reached them; how"
        " many, where not all did."
    )
    if price:
        notes += (
            f" A Hessian-vector product counts as {price:.2f} gradient evaluations (the ratio of operations in matrix"
            " products and convolutions)."
        )
    notes += (
        " On a CPU seconds are the process's, which runs one thread."
        if timed
        else " There are no seconds, because other programs used the machine."
    )
    return f"{table(heading, rows)}\n\n{notes}"


def _seconds_per_epoch(outcome: Outcome) -> float:
    return outcome.points[-1].seconds / len(outcome.points)


def _reached(outcomes: Sequence[Outcome], met: Callable[[Point], bool], timed: bool) -> str:
    times = [found for outcome in outcomes if (found := reached(outcome, met)) is not None]
    if not times:
        return "–"
    epochs, cost, seconds = (mean(values) for values in zip(*times, strict=True))
    some = "" if len(times) == len(outcomes) else f" ({len(times)} of {len(outcomes)})"
    return f"{epochs:.1f} / {cost:,.0f}" + (f" / {seconds:.1f}" if timed else "") + some


def settings_of(entry: Entry) -> str:
    """The settings that were chosen, those at an edge of the grid marked."""
    return settings_of_grid(entry.contender, entry.settings)


def settings_of_grid(contender: Contender, settings: Settings) -> str:
    """Settings of a grid, those at an edge of it marked."""
    edges = contender.edges(settings)
    return ", ".join(
        f"{name} {_setting(settings[name])}" + ("\\*" if name in edges else "") for name in contender.varied
    )


def _setting(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "none finite"


def _spread(values: Sequence[float], form: str) -> str:
    return format(mean(values), form) + (f" ± {stdev(values):{form}}" if len(values) > 1 else "")


def table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    lines = ["| " + " | ".join(heading) + " |", "|---" * len(heading) + "|"]
    return "\n".join(lines + ["| " + " | ".join(cells) + " |" for cells in rows])


def summary(results: Sequence[Comparison]) -> str:
    """All tasks side by side: every optimizer beside the baseline; nothing where it was not run.

    Args:
        results: of one line-up; each with its baseline.
    """
    tasks = [result.plan.task.title for result in results]
    entries = [{entry.contender.name: entry for entry in result.entries} for result in results]
    lineup = results[0].plan.lineup
    names = [name for name in lineup.contenders if name != lineup.baseline and any(name in of for of in entries)]
    losses = [
        [
            CONTENDERS[name].label,
            *(
                _relative_loss(of_task[name], of_task[lineup.baseline]) if name in of_task else ""
                for of_task in entries
            ),
        ]
        for name in names
    ]
    costs = []
    for name in names:
        cells = [CONTENDERS[name].label]
        for result, of_task in zip(results, entries, strict=True):
            met = list(milestones(result.plan.task.targets).values()) if name in of_task else []
            cells.append(" / ".join(_relative_cost(of_task[name], of_task[lineup.baseline], target) for target in met))
        costs.append(cells)
    seeds = {result.plan.seeds for result in results}
    label, short = CONTENDERS[lineup.baseline].label, _short(lineup)
    return "\n\n".join(
        [
            f"All optimizers beside {label}, from the results of each task ({', '.join(map(str, seeds))} seeds).",
            "### Test loss",
            f"Lowest mean cross-entropy on test examples, minus {short}'s from the same start: mean over the seeds,"
            " with its 95 % interval (Student's t); **bold** where that leaves out zero.",
            table(["", *tasks], losses),
            "### Cost to the targets",
            "Gradient evaluations until the target for training loss / test loss / test accuracy is met, in ratio to"
            f" {short}'s; means over the seeds. –: not by all seeds.",
            table(["", *tasks], costs),
        ]
    )


def _relative_loss(entry: Entry, baseline: Entry) -> str:
    if any(outcome.diverged for outcome in (*entry.outcomes, *baseline.outcomes)):
        return "diverged"
    text = _difference(entry, baseline)
    middle, half = paired(entry, baseline)
    return f"**{text}**" if abs(middle) > half else text


def _relative_cost(entry: Entry, baseline: Entry, met: Callable[[Point], bool]) -> str:
    costs = []
    for one in (entry, baseline):
        found = [reached(outcome, met) for outcome in one.outcomes]
        if None in found:
            return "–"
        costs.append(mean(time.cost for time in found if time is not None))
    return f"{costs[0] / costs[1]:.2f}"


# Figure


def figure(result: Comparison) -> Figure:
    """Losses and accuracy by epoch, training loss by gradient evaluations; of SOFIM and SGD with the seeds' range."""
    drawing = Figure(figsize=(13, 9), layout="constrained")
    panels = drawing.subplots(2, 2)
    curves: list[tuple[Axes, str, Callable[[Point], float], bool]] = [
        (panels[0][0], "training loss, nats", lambda point: point.train_loss, False),
        (panels[0][1], "test loss, nats", lambda point: point.loss, False),
        (panels[1][0], "test accuracy, %", lambda point: 100 * point.accuracy, False),
        (panels[1][1], "training loss, nats", lambda point: point.train_loss, True),
    ]
    for axes, name, value, by_cost in curves:
        shown: list[float] = []
        for entry in result.entries:
            whole = [outcome.points for outcome in entry.outcomes if not outcome.diverged]
            if not whole:
                continue
            colour, line, width = STYLES[entry.contender.name]
            values = np.array([[value(point) for point in points] for points in whole])
            costs = np.array([[point.cost for point in points] for points in whole])
            x = costs.mean(0) if by_cost else np.arange(1, values.shape[1] + 1)
            axes.plot(x, values.mean(0), line, color=colour, linewidth=width, label=entry.contender.label)
            if width > 2:
                axes.fill_between(x, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
            shown.extend(values.mean(0)[1:])
        axes.set(xlabel="gradient evaluations" if by_cost else "epoch", ylabel=name)
        if by_cost:
            axes.set_xscale("log")
        if "loss" in name:
            axes.set_yscale("log")
        if shown:  # first epochs and those that stay behind would press the others together
            low, high = np.percentile(shown, (0, 95)) if "loss" in name else np.percentile(shown, (8, 100))
            margin = 1.05 if "loss" in name else 1.003
            axes.set_ylim(low / margin, high * margin)
        axes.grid(alpha=0.3, which="both")
    panels[0][0].legend(fontsize="small")
    size = result.plan.size
    examples = "all" if size.examples is None else f"{size.examples:,}"
    drawing.suptitle(
        f"{result.plan.task.title}: {examples} training examples, batch size {result.plan.task.batch_size},"
        f" best of {result.plan.configurations} configurations each, mean of {result.plan.seeds} seeds"
    )
    return drawing


def plans(
    names: Sequence[str],
    full: bool,
    seeds: int | None,
    device: str,
    lineup: str = "published",
    only: Sequence[str] = (),
) -> list[Plan]:
    """Of several tasks; with the line-up's own number of seeds unless it is given."""
    chosen = [TASKS[name] for name in names]
    return [
        Plan(
            task,
            task.full if full else task.small,
            seeds or LINEUPS[lineup].seeds,
            device,
            CONFIGURATIONS,
            LINEUPS[lineup],
            tuple(only),
        )
        for task in chosen
    ]
