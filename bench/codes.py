"""Compares ways to store first moments in 8 bits: errors on moments of trained networks, and losses of training.

    python -m bench.codes

A code is a format of 8 bits with one scale per block of a row, and a rounding. Two small networks are trained in
float32, and their moments are stored with each code. Then both are trained again with each code: after every step the
moments are stored and read back, in plain PyTorch, whatever the sizes of tensors. Writes bench/results/codes.json and
.md.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from bench.convergence.tasks import TASKS, Data, Split
from bench.convergence.training import evaluate, loss_of
from bench.networks import CharacterTransformer
from bench.report import RESULTS, Row, Table, measure, optional
from examples.train import batch_order
from sofim_fused import SOFIM
from sofim_fused.backends.rounding import round_stochastic

STEPS = 250
BLOCKS = (64, 128, 256)
LAST, EVERY = 50, 10  # losses are means over the last steps; held-out examples are evaluated after each tenth of them
EXAMPLES = 2500  # of the text


class Case(NamedTuple):
    """A network to train: its task's name, its model, examples a step, and how many seeds."""

    task: str
    model: Callable[[Data], nn.Module]
    batch: int
    seeds: int


CASES = {
    "LeNet-5 on digits": Case("digits-lenet5", TASKS["digits-lenet5"].model, 32, 8),
    # Wide enough for rows of several blocks.
    "transformer on text": Case(
        "text-transformer", lambda data: CharacterTransformer(data.classes, width=128, heads=4, depth=1), 8, 3
    ),
}

# SOFIM's options, and its learning rates on each of CASES: in the middle of the grids of bench.convergence.
OPTIMIZERS: dict[str, tuple[dict[str, Any], tuple[float, float]]] = {
    "paper, β 0.9": ({}, (0.25, 2.0)),
    "factored, β 0.9": ({"diagonal": "factored", "numerator": "nesterov"}, (4e-3, 8e-3)),
    "factored, β 0.99": ({"diagonal": "factored", "numerator": "nesterov", "momentum": 0.99}, (4e-3, 8e-3)),
}


@dataclass(frozen=True)
class Code:
    """How a block of numbers becomes codes.

    Attributes:
        format: ``"e4m3"``, ``"int8"`` or ``"int8 root"`` (the root of a number's share of the largest, with its sign);
            ``"bfloat16"``, of 16 bits and without a scale, to compare with.
        scale: what the largest of a block becomes: ``"largest"`` the largest code, ``"power of 2"`` at most that.
        rounding: ``"nearest"`` or ``"stochastic"``.
    """

    format: str
    scale: str
    rounding: str

    @property
    def label(self) -> str:
        """As tables have it."""
        return f"{self.format}, scale a power of 2" if self.scale == "power of 2" else self.format

    def stored(self, x: Tensor, block: int, noise: torch.Generator) -> Tensor:
        """What is read back of a tensor that was stored, with the same shape.

        Args:
            x: float32, of at least two dimensions; blocks begin anew in each row.
            block: elements with one scale.
            noise: of stochastic rounding.
        """
        if self.format == "bfloat16":
            bits = torch.randint(0, 1 << 16, x.shape, generator=noise, dtype=torch.int32)
            return round_stochastic(x, bits).float()
        rows = x.reshape(x.shape[0], -1)
        size = rows.shape[1]
        blocks = pad(rows, (0, -size % block)).view(len(rows), -1, block).double()
        largest = blocks.abs().amax(-1, keepdim=True)
        top = 448.0 if self.format == "e4m3" else 127.0
        scale = torch.where(largest == 0, 1.0, largest / top)
        if self.scale == "power of 2":
            scale = scale.log2().ceil().exp2()
        y = blocks / scale
        if self.format == "e4m3":
            spacing = (y.abs().clamp(min=2.0**-6).log2().floor() - 3).exp2()
            back = self._rounded(y / spacing, noise) * spacing
        elif self.format == "int8":
            back = self._rounded(y, noise)
        else:
            root = y.sign() * (y.abs() / top).sqrt() * top
            code = self._rounded(root, noise)
            back = code.sign() * (code / top).square() * top
        return (back * scale).float().view(len(rows), -1)[:, :size].reshape(x.shape)

    def _rounded(self, x: Tensor, noise: torch.Generator) -> Tensor:
        if self.rounding == "nearest":
            return x.round()
        return (x + torch.rand(x.shape, generator=noise, dtype=x.dtype)).floor()


CODES = [
    Code(form, scale, rounding)
    for form, scale in (("e4m3", "power of 2"), ("e4m3", "largest"), ("int8", "largest"), ("int8 root", "largest"))
    for rounding in ("nearest", "stochastic")
]
WIDER = Code("bfloat16", "", "stochastic")


class Trained(NamedTuple):
    """A network after its run: losses in nats, and the optimizer with its state."""

    train_loss: float
    held_out_loss: float
    optimizer: SOFIM


@dataclass(frozen=True)
class Run:
    """How much is trained: steps, and seeds, at most so many as the case has."""

    steps: int = STEPS
    seeds: int = 1 << 30


@lru_cache(2)
def data_of(task: str) -> Data:
    """The examples of a task that runs take."""
    data = TASKS[task].data(None, None)
    count = min(EXAMPLES, len(data.train.targets))
    return data._replace(
        train=Split(*(part[:count] for part in data.train)), validation=Split(*(part[:500] for part in data.validation))
    )


def train(name: str, optimizer: str, code: Code | None, seed: int, steps: int, block: int = 128) -> Trained:
    """Train one of :data:`CASES` by one of :data:`OPTIMIZERS`; ``code``: of the moments, ``None``: float32."""
    case, (options, rates) = CASES[name], OPTIMIZERS[optimizer]
    data = data_of(case.task)
    torch.manual_seed(seed)
    model = case.model(data)
    made = SOFIM(model.parameters(), lr=rates[list(CASES).index(name)], **options)
    noise = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    held_out: list[float] = []
    for count, indices in enumerate(batches(seed, len(data.train.targets), case.batch, steps), start=1):
        model.train()
        made.zero_grad()
        loss = loss_of(model, data.train.at(indices))
        loss.backward()
        made.step()
        losses.append(loss.item())
        if code is not None:
            for moment in moments(made):
                moment.copy_(code.stored(moment, block, noise))
        if steps - count < LAST and (steps - count) % EVERY == 0:
            held_out.append(evaluate(model, data.validation)[0])
    return Trained(mean(losses[-LAST:]), mean(held_out), made)


def batches(seed: int, count: int, size: int, steps: int) -> Iterator[Tensor]:
    """The indices of each step's examples."""
    per_epoch = count // size
    for epoch in range(1, math.ceil(steps / per_epoch) + 1):
        yield from batch_order(seed, epoch, count).split(size)[: min(per_epoch, steps - (epoch - 1) * per_epoch)]


def moments(optimizer: SOFIM) -> list[Tensor]:
    """The moments of at least two dimensions."""
    return [known["exp_avg"] for known in optimizer.state.values() if known["exp_avg"].dim() > 1]


def _inverse(known: Mapping[str, Tensor]) -> Tensor:
    """1/s of a factored diagonal, up to a factor of the whole tensor."""
    share = known["col_var"] / known["col_var"].mean()
    rows = known["row_var"].view(-1, *[1] * known["col_var"].dim())
    return (rows * share.clamp(min=0.1)).add(1e-30).rsqrt()


def errors(run: Run) -> Iterator[Row]:
    """Errors of each code, over all moments of a network together."""
    for name in CASES:
        optimizer = train(name, "factored, β 0.9", None, 0, run.steps).optimizer
        states = [known for known in optimizer.state.values() if known["exp_avg"].dim() > 1]
        for block in BLOCKS:
            for code in CODES:
                noise = torch.Generator().manual_seed(0)
                off = length = update_off = update = zeros = count = 0.0
                for known in states:
                    m, inverse = known["exp_avg"], _inverse(known)
                    error = code.stored(m, block, noise) - m
                    off, length = off + float(error.norm() ** 2), length + float(m.norm() ** 2)
                    update_off += float((error * inverse).norm() ** 2)
                    update += float((m * inverse).norm() ** 2)
                    zeros += int(((error == -m) & (m != 0)).sum())
                    count += m.numel()
                yield {
                    "model": name,
                    "block": block,
                    "provider": code.label,
                    "rounding": code.rounding,
                    "error": 100 * math.sqrt(off / length),
                    "update": 100 * math.sqrt(update_off / update),
                    "zeros": 100 * zeros / count,
                }


def losses(run: Run) -> Iterator[Row]:
    """Losses of training with each code, beside those of float32 with the same seeds."""
    for name, case in CASES.items():
        seeds = range(min(case.seeds, run.seeds))
        for optimizer in OPTIMIZERS:
            exact = [train(name, optimizer, None, seed, run.steps) for seed in seeds]
            yield _losses(name, optimizer, None, exact, exact)
            for code in (WIDER, *CODES):
                if code.format == "e4m3" and code.scale == "largest":
                    continue  # as the other scale, but for the least numbers: the table of errors compares the two
                found = [train(name, optimizer, code, seed, run.steps) for seed in seeds]
                yield _losses(name, optimizer, code, found, exact)


def _losses(name: str, optimizer: str, code: Code | None, found: Sequence[Trained], exact: Sequence[Trained]) -> Row:
    level = mean(each.held_out_loss for each in exact)
    apart = [100 * (a.held_out_loss - b.held_out_loss) / level for a, b in zip(found, exact, strict=True)]
    return {
        "model": name,
        "optimizer": optimizer,
        "provider": "float32" if code is None else code.label,
        "rounding": "" if code is None else code.rounding,
        "train": mean(each.train_loss for each in found),
        "held_out": mean(each.held_out_loss for each in found),
        "difference": None if code is None else mean(apart),
        "error": None if code is None or len(apart) < 2 else stdev(apart) / math.sqrt(len(apart)),
    }


TABLES = {
    "errors": Table(
        "Errors on the moments of trained networks",
        "",
        {
            "model": lambda row: row["model"],
            "block": lambda row: str(row["block"]),
            "code": lambda row: row["provider"],
            "rounding": lambda row: row["rounding"],
            "error of m, %": lambda row: f"{row['error']:.2f}",
            "error of m/s, %": lambda row: f"{row['update']:.2f}",
            "become zero, %": lambda row: f"{row['zeros']:.2f}",
        },
        errors,
        "Norm of the error over the norm of the moment, all tensors together; m/s is the update with the factored "
        "diagonal. The paper's update is m times a number, and has the error of m.",
    ),
    "losses": Table(
        "Losses of training",
        "float32",
        {
            "model": lambda row: row["model"],
            "optimizer": lambda row: row["optimizer"],
            "code, blocks of 128": lambda row: row["provider"],
            "rounding": lambda row: row["rounding"],
            "train loss": lambda row: f"{row['train']:.4f}",
            "held-out loss": lambda row: f"{row['held_out']:.4f}",
            "difference, %": lambda row: optional(row, "difference", "+.2f"),
            "± (standard error)": lambda row: optional(row, "error", ".2f"),
        },
        losses,
        f"Cross-entropies in nats over the last {LAST} steps, of their batches and of held-out examples. Means over "
        "seeds (LeNet-5: 8, transformer: 3); differences of held-out losses to float32's with the same seeds.",
    ),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write down."""
    run_command(arguments, "codes", (__doc__ or "").splitlines()[0], TABLES, "Ways to store first moments in 8 bits.")


def run_command(
    arguments: Sequence[str] | None, name: str, description: str, tables: Mapping[str, Table], title: str
) -> None:
    """The command line of a module of bench that compares codes: results are files of its name."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=description)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of each run (default: {STEPS})")
    parser.add_argument("--seeds", type=int, default=Run.seeds, help="at most so many (default: all)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS / f"{name}.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    measure(
        Run(options.steps, options.seeds),
        tables,
        f"python -m bench.{name}",
        options.threads,
        options.output,
        f"{title} Runs of {options.steps} steps.",
    )


if __name__ == "__main__":
    main()
