"""The results of bench.language_model: a document and a figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, median, stdev
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from scipy import stats

from bench.convergence.compare import table
from bench.language_model import CONTENDERS, SIZES, TEXTS, Job, Plan, job_of, runs

__all__ = ["figure", "markdown"]

STYLES = {
    "factored": ("tab:blue", "-"),
    "row": ("tab:blue", "--"),
    "element": ("tab:blue", ":"),
    "factored-95": ("tab:blue", "-."),
    "factored-moment": ("tab:cyan", "-"),
    "factored-rho": ("tab:cyan", "--"),
    "adamw-99": ("tab:orange", "-"),
    "adamw-95": ("tab:orange", "--"),
    "sofim": ("tab:green", "-"),
    "sofim-1": ("tab:green", "--"),
    "sgd": ("tab:red", "-"),
}


class Entry(NamedTuple):
    """An optimizer and its results.

    Attributes:
        name: of the contender.
        tuned: validation losses of the rates that were tried, infinite where a run diverged, in order of the rates.
        rate: the best of them; ``None``: all diverged.
        compared: results of the test runs with that rate, by seed.
        tuning: results of the tuning runs.
    """

    name: str
    tuned: dict[float, float]
    rate: float | None
    compared: dict[int, Any]
    tuning: list[Any]

    @property
    def losses(self) -> dict[int, float]:
        """Test losses by seed, where a run did not diverge."""
        return {seed: result["test"] for seed, result in self.compared.items() if not result["diverged"]}

    @property
    def all(self) -> list[Any]:
        """Results of all runs."""
        return [*self.tuning, *self.compared.values()]


def entries(plan: Plan, done: Mapping[str, Any]) -> list[Entry]:
    """All optimizers with results, in the order of ``CONTENDERS``."""
    jobs = [(job_of(key), done[key]) for key in runs(done)]
    found = []
    for name in CONTENDERS:
        tuned = plan.tuned(name, done)
        if tuned:
            rate = plan.best(name, done)
            compared = {job.seed: result for job, result in jobs if _compares(plan, job, name, rate)}
            tuning = [done[plan.tuning(name, tried).key] for tried in tuned]
            found.append(Entry(name, tuned, rate, dict(sorted(compared.items())), tuning))
    return found


def _compares(plan: Plan, job: Job, name: str, rate: float | None) -> bool:
    return (job.contender, job.rate, job.part, job.steps) == (name, rate, "test", plan.steps)


def baseline(found: Sequence[Entry]) -> Entry | None:
    """The AdamW that tuning prefers among those that were compared; ``None``: there is none."""
    adamw = [entry for entry in found if entry.name.startswith("adamw") and entry.losses]
    return min(adamw, key=lambda entry: min(entry.tuned.values()), default=None)


def markdown(plan: Plan, done: Mapping[str, Any], machines: Sequence[Mapping[str, Any]], picture: str) -> str:
    """The document; ``picture`` is the figure's name without its ending."""
    found = entries(plan, done)
    if not found:
        return f"`{plan.command}`. No run was made yet.\n"
    beside = baseline(found)
    size = SIZES[plan.size]
    parameters = found[0].all[0]["parameters"]
    tokens = plan.steps * plan.batch * size.context
    schedule = (
        f"the rate rises over the first tenth of the steps and falls to a tenth by a cosine, and matrices shrink by"
        f" {plan.shrink:g} in a step at the full rate (as with AdamW's decay of 0.1 at a rate of {size.rate:g})"
        if plan.schedule == "cosine"
        else "the rate is constant, and weights do not decay"
    )
    precision = "bfloat16 autocast over float32 weights" if plan.device == "cuda" else "float32"
    where = "; ".join(sorted({_machine(m) for m in machines}))
    parts = [
        f"# A byte-level transformer of {parameters / 1e6:.1f} M parameters on {TEXTS[plan.text].title}",
        f"`{plan.command}`: {where}.",
        f"{size.depth} layers of width {size.width}, context {size.context}; {precision}"
        f"{', torch.compile' if plan.compiled else ''}; {plan.steps} steps of {plan.batch} x {size.context} bytes,"
        f" {tokens / 1e6:.1f} M in all, the same for every optimizer; gradients are clipped to norm {plan.clip:g};"
        f" {schedule}. Losses are mean cross-entropies of the next byte, in nats. {TEXTS[plan.text].parts}",
        *_before_the_package(found),
        "## Losses",
        f"Learning rates are chosen by the validation loss of runs of {plan.tuning_steps} steps with a separate seed;"
        " \\* marks the lowest or highest rate that was tried. Test losses are those after the last step: mean ±"
        " standard deviation over the seeds;"
        + (
            f" differences to {CONTENDERS[beside.name].label} (the AdamW that tuning prefers)"
            if beside
            else " differences"
        )
        + " are taken seed by seed, with their 95 % interval (Student's t) if there are two seeds or more.",
        table(
            ["", "rate", "validation loss, last", "test loss", "each seed", "minus AdamW's [95 %]"],
            [_losses(entry, beside) for entry in found],
        ),
        "## Cost",
        "Medians over an optimizer's runs. The time of an optimizer step is without clipping; it is the median of a"
        " run, measured by events in the device's queue, and includes the time that the device waits for Python. Peak"
        " memory includes the network, its activations and gradients.",
        table(
            ["", "ms per optimizer step", "tokens/s in training", "state, bytes per parameter", "peak memory, GiB"],
            [_cost(entry) for entry in found],
        ),
        "## Tuning",
        table(["", "validation loss by rate"], [_tuning(entry) for entry in found]),
        f"![validation losses]({picture}.png)",
    ]
    return "\n\n".join(parts) + "\n"


def _machine(m: Mapping[str, Any]) -> str:
    return f"{m.get('gpu') or m['cpu']}, torch {m['torch']}, Python {m['python']}, {m['date']}"


def _before_the_package(found: Sequence[Entry]) -> list[str]:
    """A remark on optimizers that the package did not have yet when they ran."""
    labels = [
        CONTENDERS[entry.name].label
        for entry in found
        if not entry.name.startswith(("adamw", "sgd")) and any(result["backend"] is None for result in entry.all)
    ]
    if not labels:
        return []
    return [
        f"Computed with operators of PyTorch, before the package had them: {'; '.join(labels)}. Their losses are"
        " meaningful, their times say nothing about a fused step."
    ]


def _losses(entry: Entry, beside: Entry | None) -> list[str]:
    label = CONTENDERS[entry.name].label
    if entry.rate is None:
        return [label, "all diverged", "", "", "", ""]
    edge = "\\*" if len(entry.tuned) > 1 and entry.rate in (min(entry.tuned), max(entry.tuned)) else ""
    last = [result["curve"][-1][1] for result in entry.compared.values() if not result["diverged"]]
    losses = list(entry.losses.values())
    lost = len(entry.compared) - len(losses)
    each = ", ".join(f"{loss:.3f}" for loss in losses) + (f"; {lost} diverged" if lost else "")
    return [label, f"{entry.rate:g}{edge}", _spread(last), _spread(losses), each, _difference(entry, beside)]


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def _difference(entry: Entry, beside: Entry | None) -> str:
    if beside is None or entry.name == beside.name:
        return ""
    pairs = [(loss, beside.losses[seed]) for seed, loss in entry.losses.items() if seed in beside.losses]
    if not pairs:
        return ""
    differences = [ours - theirs for ours, theirs in pairs]
    middle, n = mean(differences), len(differences)
    if n == 1:
        return f"{middle:+.3f}"
    half = float(stats.t.ppf(0.975, n - 1)) * stdev(differences) / math.sqrt(n)
    return f"{middle:+.3f} [{middle - half:+.3f}, {middle + half:+.3f}]"


def _cost(entry: Entry) -> list[str]:
    def middle(name: str) -> float:
        return float(median(result[name] for result in entry.all))

    first = entry.all[0]
    backend = "" if first["backend"] is None else f" ({first['backend']})"
    peak = "" if first["peak_bytes"] is None else f"{middle('peak_bytes') / 2**30:.2f}"
    return [
        CONTENDERS[entry.name].label + backend,
        f"{middle('optimizer_ms'):.3g}",
        f"{middle('tokens_per_second'):,.0f}",
        f"{first['state_bytes'] / first['parameters']:.2f}",
        peak,
    ]


def _tuning(entry: Entry) -> list[str]:
    losses = (
        f"{rate:g}: " + (f"{loss:.3f}" if math.isfinite(loss) else "diverged") for rate, loss in entry.tuned.items()
    )
    return [CONTENDERS[entry.name].label, ", ".join(losses)]


def figure(plan: Plan, done: Mapping[str, Any]) -> Figure:
    """Validation losses by tokens, means over the seeds: all of the run, and its last half."""
    drawing = Figure(figsize=(12, 5), layout="constrained")
    panels = drawing.subplots(1, 2)
    late: list[float] = []
    begins = plan.steps // 2
    for entry in entries(plan, done):
        curves = [result["curve"] for result in entry.compared.values() if not result["diverged"]]
        if not curves:
            continue
        steps = [point[0] for point in curves[0]]
        values = [mean(curve[i][1] for curve in curves) for i in range(len(steps))]
        tokens = [step * plan.batch * SIZES[plan.size].context / 1e6 for step in steps]
        colour, line = STYLES[entry.name]
        for axes in panels:
            axes.plot(tokens, values, line, color=colour, label=CONTENDERS[entry.name].label)
        late += [value for step, value in zip(steps, values, strict=True) if step >= begins]
    for axes in panels:
        axes.set(xlabel="million bytes seen", ylabel="validation loss, nats per byte")
        axes.grid(alpha=0.3)
    if late:
        panels[1].set(xlim=(begins * plan.batch * SIZES[plan.size].context / 1e6, None), ylim=_around(late))
        panels[0].legend(fontsize="small")
    drawing.suptitle(f"A byte-level transformer on {TEXTS[plan.text].title}: mean over the seeds")
    return drawing


def _around(values: Sequence[float]) -> tuple[float, float]:
    margin = 0.05 * (max(values) - min(values)) + 1e-3
    return min(values) - margin, max(values) + margin
