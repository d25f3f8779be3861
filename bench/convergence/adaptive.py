"""The line-up of optimizers that adapt, over all tasks: losses beside AdamW's, state, rates, and what parts bring."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import NamedTuple

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from bench.convergence.compare import STYLES, Comparison, Entry, Plan, lowest_loss, paired, table
from bench.convergence.contenders import CONTENDERS, Contender
from bench.convergence.store import Store
from bench.convergence.training import Outcome

__all__ = ["Range", "memory_figure", "memory_markdown", "ranges", "rates_figure", "rates_markdown", "summary"]

CLOSE = 0.02  # a rate is good if its loss is at most this fraction above the lowest
GOAL = 1.0  # % of AdamW's loss that the upper end of an interval may reach

# What a part brings: with it, and without.
PARTS = {
    "look-ahead, rows": ("sofim-row", "sofim-row-moment"),
    "look-ahead, factored": ("sofim-factored", "sofim-factored-moment"),
    "look-ahead, elements": ("sofim-element", "sofim-element-moment"),
    "look-ahead in Adam: NAdam for AdamW": ("nadam", "adamw-beta2"),
    "look-ahead in SGD": ("sgd-nesterov", "sgd"),
    "a scale per tensor, for none": ("sofim-tensor", "sofim"),
    "rows for tensors": ("sofim-row", "sofim-tensor"),
    "rows and columns for rows": ("sofim-factored", "sofim-row"),
    "elements for rows and columns": ("sofim-element", "sofim-factored"),
    "the term of rank one, for none": ("sofim-factored-rho", "sofim-factored"),
    "rounding: SOFIM by elements for AdamW": ("sofim-element-moment", "adamw-beta2"),
}


def _entries(result: Comparison) -> dict[str, Entry]:
    return {entry.contender.name: entry for entry in result.entries}


def _diverged(*entries: Entry) -> bool:
    return any(outcome.diverged for entry in entries for outcome in entry.outcomes)


def _level(entry: Entry) -> float:
    return mean(lowest_loss(outcome) for outcome in entry.outcomes)


def _interval(middle: float, half: float, form: str) -> str:
    return f"{middle:{form}}" + (f" [{middle - half:{form}}, {middle + half:{form}}]" if math.isfinite(half) else "")


def percent(entry: Entry, baseline: Entry) -> tuple[float, float]:
    """The mean difference of lowest test losses, and half of its 95 % interval, in % of the baseline's mean loss."""
    middle, half = paired(entry, baseline)
    level = _level(baseline)
    return 100 * middle / level, 100 * half / level


def floats(entry: Entry) -> float:
    """State, in floats per parameter."""
    begun = [outcome for outcome in entry.outcomes if outcome.steps]
    return mean(outcome.memory / outcome.parameters / 4 for outcome in begun) if begun else math.nan


def _shown(results: Sequence[Comparison]) -> list[Contender]:
    """Contenders that some task has complete, in the order of the line-up."""
    lineup = results[0].plan.lineup
    there = {name for result in results for name in _entries(result)}
    return [CONTENDERS[name] for name in lineup.contenders if name in there]


def summary(results: Sequence[Comparison]) -> str:
    """Losses beside the baseline's, state, and what parts bring, as a document.

    Args:
        results: of one line-up, each with its baseline.
    """
    tasks = [result.plan.task.title for result in results]
    baseline = CONTENDERS[results[0].plan.lineup.baseline]
    losses, state = [], []
    for contender in _shown(results):
        of_loss, of_state = [contender.label], [contender.label]
        for result in results:
            entry = _entries(result).get(contender.name)
            of_loss.append("" if entry is None else _loss_cell(entry, result))
            of_state.append("" if entry is None else f"{floats(entry):.2f}")
        losses.append(of_loss)
        state.append(of_state)
    parts = []
    for title, (with_it, without) in PARTS.items():
        cells = [title]
        for result in results:
            entries = _entries(result)
            if with_it not in entries or without not in entries:
                cells.append("")
            elif _diverged(entries[with_it], entries[without]):
                cells.append("diverged")
            else:
                middle, half = paired(entries[with_it], entries[without])
                level = _level(entries[without])
                cells.append(_bold(100 * middle / level, 100 * half / level))
        if any(cells[1:]):
            parts.append(cells)
    seeds = sorted({seed for result in results for seed in result.plan.comparing})
    label = baseline.label
    return "\n\n".join(
        [
            f"All beside {label}, from the results of each task, seeds {seeds[0]} to {seeds[-1]}. Where a cell is empty"
            " the runs are not complete.",
            "### Test loss",
            f"Lowest test loss minus {label}'s from the same start, in % of {label}'s, with its 95 % interval over the"
            f" seeds (Student's t); **bold** where that leaves out zero, ✓ where its upper end is at most +{GOAL:g} %."
            f" {label}: the loss itself, in nats.",
            table(["", *tasks], losses),
            "### State",
            "Floats per parameter that the optimizer keeps.",
            table(["", *tasks], state),
            "### What each part brings",
            "The lowest test loss with it minus the one without, in % of the latter, with its 95 % interval; **bold**"
            " where that leaves out zero. Negative: it helps.",
            table(["", *tasks], parts),
        ]
    )


def _loss_cell(entry: Entry, result: Comparison) -> str:
    baseline = result.baseline
    assert baseline is not None
    if entry is baseline:
        return f"{_level(entry):.3f}"
    if _diverged(entry, baseline):
        return "diverged"
    middle, half = percent(entry, baseline)
    return _bold(middle, half) + (" ✓" if middle + half <= GOAL else "")


def _bold(middle: float, half: float) -> str:
    text = _interval(middle, half, "+.1f")
    return f"**{text}**" if abs(middle) > half else text


# Learning rates


class Range(NamedTuple):
    """How a contender's tuning runs depend on the learning rate, at the best value of its other setting.

    Attributes:
        rates: of the grid, in ascending order.
        losses: the lowest validation loss at each, infinite where every run diverged.
    """

    rates: list[float]
    losses: list[float]

    @property
    def good(self) -> list[float]:
        """The rates around the best one, without a gap, whose losses are within 2 % of the lowest."""
        limit = (1 + CLOSE) * min(self.losses)
        best = self.losses.index(min(self.losses))
        low = high = best
        while low > 0 and self.losses[low - 1] <= limit:
            low -= 1
        while high + 1 < len(self.rates) and self.losses[high + 1] <= limit:
            high += 1
        return self.rates[low : high + 1] if math.isfinite(limit) else []


def ranges(plan: Plan, contender: Contender, store: Store) -> Range:
    """From a store that has a contender's tuning runs.

    Raises:
        KeyError: it has not.
    """
    name = "lr/rho" if "lr/rho" in contender.grid[0] else "lr"
    found: dict[float, float] = {}
    for settings in contender.grid:
        outcomes = [Outcome.of(store[job.key]) for job in plan.tuning(contender, settings)]
        loss = mean(math.inf if outcome.diverged else lowest_loss(outcome) for outcome in outcomes)
        found[settings[name]] = min(loss, found.get(settings[name], math.inf))
    rates = sorted(found)
    return Range(rates, [found[rate] for rate in rates])


def _range_cell(found: Range) -> str:
    good = found.good
    if not good:
        return "none finite"
    low, high = good[0], good[-1]
    edges = ["\\*" if rate in (found.rates[0], found.rates[-1]) else "" for rate in (low, high)]
    if len(good) == 1:
        return f"{low:g}{edges[0]}"
    return f"×{high / low:g}: {low:g}{edges[0]} to {high:g}{edges[1]}"


def rates_markdown(results: Sequence[Comparison], found: Sequence[Mapping[str, Range]]) -> str:
    """The width of the good range of rates, as a document; ``found`` has ranges by contender, for each result."""
    rows = []
    for contender in _shown(results):
        cells = [contender.label]
        for of_task in found:
            cells.append(_range_cell(of_task[contender.name]) if contender.name in of_task else "")
        rows.append(cells)
    return "\n\n".join(
        [
            f"Learning rates whose validation loss is within {CLOSE:.0%} of the optimizer's lowest, from the tuning"
            " runs, at the best value of the other setting: how many times the lowest of them the highest is, and both."
            " \\*: at an edge of the grid, so that the range may be wider. Neighbouring rates of a grid differ by a"
            " factor of 2 as a rule; one seed (on the table of breast cancer data three), so neighbours can change"
            " places by chance. lr/ρ for SOFIM as published.",
            "### Ranges",
            table(["", *(result.plan.task.title for result in results)], rows),
        ]
    )


def rates_figure(results: Sequence[Comparison], found: Sequence[Mapping[str, Range]]) -> Figure:
    """Heat maps: for each task, optimizers by learning rates of their grids; how far above the lowest loss of all."""
    contenders = _shown(results)
    drawing = Figure(figsize=(5 * len(results) + 2, 0.42 * len(contenders) + 2.2), layout="constrained")
    panels = drawing.subplots(1, len(results), squeeze=False)[0]
    widest = max(len(r.rates) for of_task in found for r in of_task.values())
    for axes, result, of_task in zip(panels, results, found, strict=True):
        lowest = min(min(r.losses) for r in of_task.values())
        grid = np.full((len(contenders), widest), np.nan)
        for row, contender in enumerate(contenders):
            if contender.name not in of_task:
                continue
            one = of_task[contender.name]
            first = widest - len(one.rates)  # grids with fewer rates have the upper ones
            for column, loss in enumerate(one.losses, first):
                above = min(100 * (loss / lowest - 1), 1e6)
                grid[row, column] = above
                label = f"+{above:.1f}" if above < 10 else f"+{above:.0f}" if above < 1000 else "∞"
                good = one.rates[column - first] in one.good
                axes.text(
                    column,
                    row - 0.12,
                    label,
                    ha="center",
                    va="center",
                    fontsize=7,
                    weight="bold" if good else "normal",
                    color="white" if above > 25 else "black",
                )
                axes.text(
                    column,
                    row + 0.27,
                    f"{one.rates[column - first]:g}",
                    ha="center",
                    va="center",
                    fontsize=5,
                    color="white" if above > 25 else "black",
                )
        axes.imshow(np.clip(grid, 0.5, None), norm=LogNorm(0.5, 100, clip=True), cmap="viridis_r", aspect="auto")
        axes.set_xticks([])
        axes.set_yticks(range(len(contenders)), [c.label for c in contenders] if axes is panels[0] else [])
        axes.set_title(result.plan.task.title, fontsize=9)
    drawing.suptitle(
        "Validation loss in tuning, % above the lowest of all, by learning rate (small figures);"
        f" bold: within {CLOSE:.0%} of the optimizer's own lowest"
    )
    return drawing


# Memory


def memory_markdown(results: Sequence[Comparison]) -> str:
    """State and loss of every contender, as a document."""
    rows = []
    for result in results:
        for entry in sorted(result.entries, key=floats):
            level = "diverged" if _diverged(entry) else f"{_level(entry):.3f}"
            rows.append([result.plan.task.title, entry.contender.label, f"{4 * floats(entry):.2f}", level])
    return "\n\n".join(
        [
            "Bytes of state per float32 parameter, and the lowest test loss, mean over the seeds.",
            "### Memory",
            table(["task", "", "state, bytes per parameter", "lowest test loss"], rows),
        ]
    )


def memory_figure(results: Sequence[Comparison]) -> Figure:
    """State against loss, one panel for each task."""
    columns = min(3, len(results))
    lines = math.ceil(len(results) / columns)
    drawing = Figure(figsize=(5 * columns, 3.8 * lines + 1.2), layout="constrained")
    panels = drawing.subplots(lines, columns, squeeze=False).ravel()
    handles = {}
    for axes, result in zip(panels, results, strict=False):
        baseline = result.baseline
        assert baseline is not None
        level, shown, ends, last = _level(baseline), [], [], -1.0
        for entry in sorted((e for e in result.entries if not _diverged(e, baseline)), key=floats):
            middle, half = percent(entry, baseline) if entry is not baseline else (0.0, 0.0)
            name = entry.contender.name
            colour, line, _ = STYLES[name]
            marker = "s" if name.startswith("sofim") else "o"
            error = half if math.isfinite(half) else 0.0
            hollow = colour if line in ("-", "-.") and name != "sofim-factored-rho" else "none"
            last = max(4 * floats(entry), last + 0.16)  # so that none hides another
            bars = axes.errorbar(last, middle, yerr=error, fmt=marker, color=colour, markerfacecolor=hollow, capsize=2)
            handles[entry.contender.label] = bars
            shown.append(middle + error)
            ends.append(middle - error)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.axhspan(-100, GOAL, color="tab:green", alpha=0.08)
        # Those far above would press the others together.
        axes.set_ylim(min(-3.0, 1.1 * min(ends)), max(5.0, min(30.0, 1.1 * float(np.percentile(shown, 85)))))
        axes.set_xlim(0, None)
        axes.set(xlabel="state, bytes per parameter", ylabel=f"test loss above AdamW's ({level:.3f}), %")
        axes.set_title(result.plan.task.title, fontsize=10)
        axes.grid(alpha=0.3)
    for axes in panels[len(results) :]:
        axes.axis("off")
    drawing.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, fontsize="small")
    drawing.suptitle(
        "Memory against loss: 95 % intervals of the differences by seed; green: at most 1 % above AdamW;"
        " marks at the same place are moved apart, to the right"
    )
    return drawing
