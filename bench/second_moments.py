"""Compares ways to round second moments to 8 bits: what becomes of running means, and losses of training.

    python -m bench.second_moments

All store roots in the blocks and codes of sofim_fused/blockwise.py, and differ in the rounding: to nearest, stochastic
so that the mean is the root, or, as the package does it, so that the mean is the square. Writes
bench/results/second_moments.json and .md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from bench.codes import CASES, EVERY, LAST, Run, batches, data_of, run_command
from bench.convergence.training import evaluate, loss_of
from bench.report import Row, Table, optional
from sofim_fused import SOFIM, blockwise

BETAS = (0.99, 0.999, 0.9999)
TRAINED = (0.99, 0.999)  # values of β₂ in training
HORIZON = 6  # means start at a quarter of the truth, and are followed for so many times 1/(1 - β₂) gradients
RATES = (4e-3, 8e-3)  # on each of CASES, as bench.codes has them for factored diagonals


def _bits(x: Tensor, noise: torch.Generator) -> Tensor:
    return torch.randint(0, 1 << 16, x.shape, generator=noise, dtype=torch.int32)


def nearest(v: Tensor, noise: torch.Generator) -> Tensor:
    """As read back after a rounding to nearest."""
    return blockwise.decode_squares(*blockwise.encode_squares(v))


def mean_of_root(v: Tensor, noise: torch.Generator) -> Tensor:
    """As read back after a rounding that has √v as its mean, as first moments have theirs."""
    return blockwise.decode(*blockwise.encode(v.sqrt(), _bits(v, noise))).square_()


def mean_of_square(v: Tensor, noise: torch.Generator) -> Tensor:
    """As read back after the rounding of the package."""
    return blockwise.decode_squares(*blockwise.encode_squares(v, _bits(v, noise)))


ROUNDINGS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "nearest": nearest,
    "stochastic, mean √v": mean_of_root,
    "stochastic, mean v": mean_of_square,
}


def drift(run: Run) -> Iterator[Row]:
    """Running means of the squares of normal gradients, of variances that lie up to 2^10 apart in a block."""
    for beta2 in BETAS:
        count = min(run.steps * 240, round(HORIZON / (1 - beta2)))
        for name, stored in {"float32": lambda v, _: v, **ROUNDINGS}.items():
            noise = torch.Generator().manual_seed(0)
            truth = (10 * torch.rand(32, 128, generator=noise) - 5).exp2()
            v = stored(truth / 4, noise)
            for _ in range(count):
                g = torch.randn(truth.shape, generator=noise) * truth.sqrt()
                v = stored(v * beta2 + (1 - beta2) * g.square(), noise)
            share = (v / truth).double()
            yield {
                "beta2": beta2,
                "provider": name,
                "steps": count,
                "mean": 100 * (share.mean().item() - 1),
                "spread": 100 * share.sqrt().std().item(),
                "inverse": 100 * (share.rsqrt().mean().item() - 1),
            }


def train(name: str, rounding: str | None, state_dtype: Any, beta2: float, seed: int, steps: int) -> float:
    """The held-out loss of one of ``bench.codes.CASES``; ``rounding``: of second moments, ``None``: float32."""
    case, data = CASES[name], data_of(CASES[name].task)
    torch.manual_seed(seed)
    model = case.model(data)
    options: dict[str, Any] = {"diagonal": "element", "numerator": "nesterov", "beta2": beta2}
    made = SOFIM(model.parameters(), lr=RATES[list(CASES).index(name)], state_dtype=state_dtype, **options)
    noise = torch.Generator().manual_seed(seed)
    held_out: list[float] = []
    for count, indices in enumerate(batches(seed, len(data.train.targets), case.batch, steps), start=1):
        model.train()
        made.zero_grad()
        loss_of(model, data.train.at(indices)).backward()
        made.step()
        if rounding is not None:
            for v in (known["variance"] for known in made.state.values()):
                if v.dim() > 1:
                    v.copy_(ROUNDINGS[rounding](v, noise))
        if steps - count < LAST and (steps - count) % EVERY == 0:
            held_out.append(evaluate(model, data.validation)[0])
    return mean(held_out)


def losses(run: Run) -> Iterator[Row]:
    """Held-out losses beside those of float32 with the same seeds."""
    for name, case in CASES.items():
        seeds = range(min(case.seeds, run.seeds))
        for beta2 in TRAINED:
            exact = [train(name, None, None, beta2, seed, run.steps) for seed in seeds]
            yield _losses(name, beta2, "float32", exact, exact)
            for rounding in ROUNDINGS:
                found = [train(name, rounding, None, beta2, seed, run.steps) for seed in seeds]
                yield _losses(name, beta2, rounding, found, exact)
            found = [train(name, None, blockwise.DTYPE, beta2, seed, run.steps) for seed in seeds]
            yield _losses(name, beta2, "the package, both moments", found, exact)


def _losses(name: str, beta2: float, provider: str, found: Sequence[float], exact: Sequence[float]) -> Row:
    level = mean(exact)
    apart = [100 * (a - b) / level for a, b in zip(found, exact, strict=True)]
    return {
        "model": name,
        "beta2": beta2,
        "provider": provider,
        "held_out": mean(found),
        "difference": None if provider == "float32" else mean(apart),
        "error": None if provider == "float32" or len(apart) < 2 else stdev(apart) / math.sqrt(len(apart)),
    }


TABLES = {
    "drift": Table(
        "Running means of squares",
        "float32",
        {
            "β₂": lambda row: f"{row['beta2']:g}",
            "rounding": lambda row: row["provider"],
            "gradients": lambda row: str(row["steps"]),
            "v, % off in the mean": lambda row: f"{row['mean']:+.1f}",
            "√v, standard deviation, %": lambda row: f"{row['spread']:.1f}",
            "1/√v, % off in the mean": lambda row: f"{row['inverse']:+.1f}",
        },
        drift,
        "4,096 elements with normal gradients, whose variances lie up to a factor 2^10 apart in a block; means start "
        f"at a quarter of the truth, and {HORIZON}/(1 - β₂) gradients enter them. All is relative to the truth.",
    ),
    "losses": Table(
        "Losses of training",
        "float32",
        {
            "model": lambda row: row["model"],
            "β₂": lambda row: f"{row['beta2']:g}",
            "rounding": lambda row: row["provider"],
            "held-out loss": lambda row: f"{row['held_out']:.4f}",
            "difference, %": lambda row: optional(row, "difference", "+.2f"),
            "± (standard error)": lambda row: optional(row, "error", ".2f"),
        },
        losses,
        f"Cross-entropies in nats of held-out examples over the last {LAST} steps, with the look-ahead and a number "
        "for each element. Means over seeds; differences to float32's with the same seeds. All tensors of two "
        "dimensions or more are stored in 8 bits, but in the package's own rows only those that it stores so.",
    ),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write down."""
    about = (__doc__ or "").splitlines()[0]
    run_command(arguments, "second_moments", about, TABLES, "Ways to round second moments to 8 bits.")


if __name__ == "__main__":
    main()
