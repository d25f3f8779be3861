"""The time of a step with sharded parameters, its communication, and how both scale.

    python -m bench.distributed

Ranks are processes on this machine with one thread each, which communicate through gloo. GPU clusters cannot be
measured here: their numbers are computed with the cost model by which NCCL chooses its algorithms.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.optim import SGD

from bench import documents, report, shapes
from bench.ranks import Ranks, all_reduced
from bench.report import Row, Table, digits, spread
from bench.shapes import Shape, elements
from sofim_fused import SOFIM
from sofim_fused.dtensor import local

CLIP = 1.0  # the norm that guarded steps, and SGD's gradients, are clipped to
SAMPLE = 0.02  # seconds per sample
MESSAGES = (8, 64, 1 << 10, 1 << 14, 1 << 18)  # bytes
DOCUMENT = Path(__file__).parents[1] / "docs" / "distributed.md"
MODELS = {"LeNet-5": shapes.lenet5, "ResNet-50": shapes.resnet50, "GPT-2 small": shapes.gpt2_small}


class Run(NamedTuple):
    """How long to measure, and with how many ranks."""

    rounds: int
    worlds: Sequence[int]
    models: Sequence[str]


# Measured


def _summary(samples: Sequence[float]) -> Row:
    """The median, and the 20th and 80th percentile."""
    low, *_, high = quantiles(samples, n=5, method="inclusive")
    return {"median": median(samples), "low": low, "high": high}


def _in_turns(providers: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds per call, round by round; all ranks do the same at the same time, as the first one says how often."""
    calls = {}
    for name, call in providers.items():
        call()
        distributed.barrier()
        started = time.perf_counter()
        call()
        count = torch.tensor(max(1, int(SAMPLE / (time.perf_counter() - started))))
        distributed.broadcast(count, 0)
        calls[name] = int(count)
    samples: dict[str, list[float]] = {name: [] for name in providers}
    names = list(providers)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            distributed.barrier()
            started = time.perf_counter()
            for _ in range(calls[name]):
                providers[name]()
            samples[name].append((time.perf_counter() - started) / calls[name])
    return samples


def _all_reduces(rank: int, rounds: int) -> dict[str, list[float]]:
    messages = {str(size): torch.zeros(size // 8, dtype=torch.float64) for size in MESSAGES}

    def of(message: Tensor) -> Callable[[], Any]:
        return lambda: distributed.all_reduce(message)

    return _in_turns({name: of(message) for name, message in messages.items()}, rounds)


def all_reduce_rows(run: Run) -> Iterator[Row]:
    """By ranks and size; beside each the line through the smallest and the largest message, α + β·bytes."""
    for world in run.worlds:
        with Ranks(world) as ranks:
            measured = ranks.run(_all_reduces, run.rounds)[0]
        medians = {int(name): median(samples) for name, samples in measured.items()}
        small, large = MESSAGES[0], MESSAGES[-1]
        beta = (medians[large] - medians[small]) / (large - small)
        alpha = medians[small] - beta * small
        for size in MESSAGES:
            line = alpha + beta * size
            yield {"ranks": world, "bytes": size, **_summary(measured[str(size)]), "line": line}


def _sharded(rank: int, sizes: Sequence[Shape], rounds: int) -> dict[str, Any]:
    """Steps of tensors sharded along their first dimension, as FSDP2 does it; of plain ones where there is one rank."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    world = distributed.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    torch.manual_seed(0)

    def parameters() -> list[nn.Parameter]:
        made = []
        for shape in sizes:
            value, grad = torch.randn(shape), torch.randn(shape)
            if world > 1:
                value, grad = (distribute_tensor(x, mesh, [Shard(0)]) for x in (value, grad))
            param = nn.Parameter(value)
            param.grad = grad
            made.append(param)
        return made

    params = parameters()
    # The fused one takes no DTensor: there foreach is PyTorch's fastest.
    sgd = SGD(params, lr=1e-6, momentum=0.9, fused=world == 1, foreach=world > 1)
    plain = SOFIM(params, lr=1e-6, rho=1e6)
    guarded = SOFIM(params, lr=1e-6, rho=1e6, max_grad_norm=CLIP, skip_nonfinite=True)

    def clipped() -> None:
        nn.utils.clip_grad_norm_(params, CLIP)
        sgd.step()

    providers: dict[str, Callable[[], Any]] = {"SGD": sgd.step, "SOFIM": plain.step}
    providers |= {"SGD, clipped": clipped, "SOFIM, clipped": guarded.step}
    if world > 1:
        held = [nn.Parameter(local(param.detach())) for param in params]
        for mine, param in zip(held, params, strict=True):
            assert param.grad is not None
            mine.grad = local(param.grad)
        providers["SGD, fused, plain tensors"] = SGD(held, lr=1e-6, momentum=0.9, fused=True).step
    return {
        "samples": _in_turns(providers, rounds),
        "sent": {name: all_reduced(call) for name, call in providers.items()},
    }


def step_rows(run: Run) -> Iterator[Row]:
    """By model, ranks and provider."""
    for model in run.models:
        sizes = MODELS[model]()
        for world in (1, *(world for world in run.worlds if world == 2)):
            with Ranks(world) as ranks:
                found = ranks.run(_sharded, sizes, run.rounds)[0]
            for name, samples in found["samples"].items():
                base = found["samples"]["SGD, clipped" if "clipped" in name else "SGD"]
                ratio = median(ours / theirs for ours, theirs in zip(samples, base, strict=True))
                yield {
                    "model": model,
                    "elements": elements(sizes),
                    "ranks": world,
                    "provider": name,
                    **_summary(samples),
                    "ratio": ratio,
                    "sent": found["sent"][name] if name.startswith("SOFIM") else None,
                }


# Modelled

GPUS_PER_NODE = 8
BASE, NVLINK, NETWORK = 6.8e-6, 0.6e-6 * 1.8, 5.0e-6  # seconds: once, per GPU of a node, per level of the tree of nodes
TREE_BANDWIDTH = 80e9 / 3.8 / 2  # bytes/s
MEMORY_BANDWIDTH = 3.35e12 * 0.85  # bytes/s: an H100's, and what of it a sweep over memory gets
BYTES_PER_PARAMETER = 24  # of a plain step in float32
TENSORS_PER_BLOCK = 12  # of a transformer
STATE_BYTES = 16  # per parameter: float32 weight, gradient and moment, and bfloat16 copies in buffers
GPU_MEMORY = 80e9 * 0.5  # bytes: the other half is for activations


def all_reduce_time(gpus: int, size: int) -> float:
    """Seconds of an all-reduce by NCCL's tree algorithm in its protocol for small messages (LL).

    Source: NCCL, src/graph/tuning.cc (``ncclTopoTuneModel``): for p GPUs in n nodes
    ``base + 2 ((p/n - 1) nvlink + floor(log2 n) network) + bytes/bandwidth``.
    """
    if gpus == 1:
        return 0.0
    nodes = max(1, gpus // GPUS_PER_NODE)
    within = (gpus // nodes - 1) * (NVLINK if nodes > 1 else NVLINK / 1.8)
    return BASE + 2 * (within + int(math.log2(nodes)) * NETWORK) + size / TREE_BANDWIDTH


def model_rows(_: Run) -> Iterator[Row]:
    """By parameters and GPUs: fully sharded, and sharded over as few GPUs as one model's state fits on."""
    for parameters, layers in ((1e9, 16), (1e10, 40), (1e11, 80), (1e12, 128)):
        for gpus in (8, 64, 512, 4096, 16384):
            shards = min(gpus, 2 ** max(0, math.ceil(math.log2(parameters * STATE_BYTES / GPU_MEMORY))))
            fits = parameters * STATE_BYTES / gpus <= GPU_MEMORY
            yield {
                "parameters": parameters,
                "gpus": gpus,
                "passes": BYTES_PER_PARAMETER * parameters / gpus / MEMORY_BANDWIDTH if fits else None,
                "message": all_reduce_time(gpus, 8),
                "per_tensor": all_reduce_time(gpus, 8 * (TENSORS_PER_BLOCK * layers + 3)),
                "shards": shards if fits else None,
                "hybrid_passes": BYTES_PER_PARAMETER * parameters / shards / MEMORY_BANDWIDTH,
                "hybrid_message": all_reduce_time(shards, 8),
            }


# Tables


def _micro(value: float | None) -> str:
    return "does not fit" if value is None else digits(1e6 * value) if value else "0"


TABLES = {
    "all_reduce": Table(
        "All-reduce of float64 between processes (gloo)",
        "",
        {
            "ranks": lambda row: str(row["ranks"]),
            "bytes": lambda row: f"{row['bytes']:,}",
            "µs [20 %, 80 %]": lambda row: spread(row, 1e6),
            "α + β·bytes": lambda row: digits(1e6 * row["line"]),
        },
        all_reduce_rows,
        "The last column is the line through the smallest and the largest message. More ranks than cores wait for each"
        " other's turns.",
    ),
    "step": Table(
        "A step",
        "SGD",
        {
            "model": lambda row: str(row["model"]),
            "ranks": lambda row: str(row["ranks"]),
            "provider": lambda row: str(row["provider"]),
            "ms [20 %, 80 %]": lambda row: spread(row, 1e3),
            "ratio to SGD": lambda row: f"{row['ratio']:.2f}",
            "bytes per message": lambda row: "" if row["sent"] is None else ", ".join(map(str, row["sent"])) or "none",
        },
        step_rows,
        "Float32, sharded along the first dimension; on one rank plain tensors. SGD is torch.optim.SGD(momentum=0.9):"
        " on one rank with fused=True; of DTensors with foreach=True, as the fused one takes none. Clipped: after"
        " clip_grad_norm_, against max_grad_norm and skip_nonfinite. Last, the fused one on shards as plain tensors.",
    ),
    "model": Table(
        "Computed, not measured: GPUs",
        "",
        {
            "parameters": lambda row: f"{row['parameters']:.0e}".replace("e+", "e"),
            "GPUs": lambda row: f"{row['gpus']:,}",
            "passes, µs": lambda row: _micro(row["passes"]),
            "all-reduce, µs": lambda row: _micro(row["message"]),
            'fisher="parameter", µs': lambda row: _micro(row["per_tensor"]),
            "HSDP: GPUs a copy": lambda row: "" if row["shards"] is None else f"{row['shards']:,}",
            "its passes, µs": lambda row: "" if row["shards"] is None else _micro(row["hybrid_passes"]),
            "its all-reduce, µs": lambda row: "" if row["shards"] is None else _micro(row["hybrid_message"]),
        },
        model_rows,
        "Passes: 24 bytes per float32 parameter of the rank at 85 % of 3.35 TB/s. All-reduce: NCCL's own model of its"
        " tree algorithm (6.8 µs, 0.6 to 1.1 µs per GPU of a node of eight, 5 µs per level of the tree of nodes, the"
        ' last two twice), for 8 bytes, and for fisher="parameter" 8 per tensor. HSDP: copies over as few GPUs as hold'
        " one at 16 bytes per parameter in half of 80 GB.",
    ),
}

INTRODUCTION = "One thread for each rank. Ratios are medians of the rounds' ratios; all providers in turns."


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.distributed", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25, help="rounds of measurements (default: 25)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="numbers of ranks (default: 2 4)")
    parser.add_argument(
        "--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="models to measure (default: all)"
    )
    where = (
        "file for the results; tables are written beside it (default: bench/results/distributed.json for a full run)"
    )
    parser.add_argument("--out", type=Path, help=where)
    options = parser.parse_args(arguments)
    whole = len(options.models) == len(MODELS) and options.rounds == 25 and options.ranks == [2, 4]
    out = options.out or (report.RESULTS / "distributed.json" if whole else None)
    given = sys.argv[1:] if arguments is None else arguments
    command = " ".join(["python -m bench.distributed", *given])
    run = Run(options.rounds, options.ranks, options.models)
    report.measure(run, TABLES, command, 1, out, INTRODUCTION)
    if out == report.RESULTS / "distributed.json":
        DOCUMENT.write_text(documents.filled(DOCUMENT.read_text(), report.RESULTS))


if __name__ == "__main__":
    main()
