"""Times SOFIM's steps beside those of PyTorch's SGD and AdamW on this machine: ``python -m sofim_fused bench``.

Each round times every optimizer once, so that what slows the machine down slows all of them, and ratios are taken
within a round. All optimizers update the same parameters from the same gradients, and only ``step()`` is timed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from sofim_fused import backends, native
from sofim_fused.adasofim import AdaSOFIM
from sofim_fused.optimizer import SOFIM
from sofim_fused.shapes import MODELS, Shape, elements

MIN_ROUNDS = 5
SAMPLE = 0.03  # seconds: shorter ones are repeated
ALIKE = 0.05  # a ratio that is closer to 1 than this is called alike
BUSY = 1.5  # the 80th percentile by the 20th, from which on times vary too much to be relied on


class Contender(NamedTuple):
    """An optimizer, its arguments, and which one it is compared with (``None``: it is one of those)."""

    kind: Callable[..., Optimizer]
    arguments: Mapping[str, Any]
    baseline: str | None = None


# Rates are so small that parameters stay what they are over thousands of steps.
CONTENDERS = {
    "SGD": Contender(SGD, {"lr": 1e-9, "momentum": 0.9}),
    "SOFIM": Contender(SOFIM, {"lr": 1e-9}, "SGD"),
    "SOFIM, bfloat16 moment": Contender(SOFIM, {"lr": 1e-9, "state_dtype": torch.bfloat16}, "SGD"),
    "AdamW": Contender(AdamW, {"lr": 1e-9, "weight_decay": 0.0}),
    "AdaSOFIM": Contender(AdaSOFIM, {"lr": 1e-9, "weight_decay": 0.0}, "AdamW"),
}


def rows(model: str, shapes: Sequence[Shape], device: torch.device, seconds: float) -> list[dict[str, Any]]:
    """Time the steps of all contenders.

    Args:
        model: a name.
        shapes: of its parameters, which are float32.
        device: where.
        seconds: how long, about; at least five rounds are timed.

    Returns:
        A dict for each contender: ``model``, ``optimizer``, ``seconds`` (the median of the rounds), ``low`` and
        ``high`` (the 20th and 80th percentile), ``rounds``, ``baseline``, and ``ratio``, the median of the rounds'
        ratios to it.
    """
    from torch.utils.benchmark import Timer  # takes long, and looks for CUDA: not for the other commands

    ends = time.monotonic() + seconds
    generator = torch.Generator().manual_seed(0)
    params: list[Tensor] = []
    for shape in shapes:
        params.append(nn.Parameter(torch.empty(shape).normal_(0, 0.02, generator=generator).to(device)))
        params[-1].grad = torch.empty(shape).normal_(0, 1e-3, generator=generator).to(device)
    threads = torch.get_num_threads()
    timers, calls = {}, {}
    for name, contender in CONTENDERS.items():
        timers[name] = Timer("step()", globals={"step": _made(contender, params).step}, num_threads=threads)
        timers[name].timeit(2)  # state is made, kernels are compiled
        calls[name] = max(1, round(SAMPLE / timers[name].timeit(1).median))
    taken: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    while len(taken["SGD"]) < MIN_ROUNDS or time.monotonic() < ends:
        for name, timer in timers.items():
            taken[name].append(timer.timeit(calls[name]).median)
    return [_row(model, name, taken) for name in CONTENDERS]


def _made(contender: Contender, params: list[Tensor]) -> Optimizer:
    """The optimizer; of PyTorch's own the fused one, where the device has it."""
    if contender.baseline is None:
        try:
            return contender.kind(params, **contender.arguments, fused=True)
        except RuntimeError:
            pass
    return contender.kind(params, **contender.arguments)


def _row(model: str, name: str, taken: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    baseline = CONTENDERS[name].baseline
    low, *_, high = quantiles(taken[name], n=5, method="inclusive")
    ratio = None
    if baseline is not None:
        ratio = median(mine / theirs for mine, theirs in zip(taken[name], taken[baseline], strict=True))
    return {
        "model": model,
        "optimizer": name,
        "seconds": median(taken[name]),
        "low": low,
        "high": high,
        "rounds": len(taken[name]),
        "baseline": baseline,
        "ratio": ratio,
    }


def verdict(timed: Sequence[Mapping[str, Any]], device: torch.device) -> list[str]:
    """Sentences on what the rows say about a device."""
    passes = backends.choose("auto", device).name
    said = [f"SOFIM's backend on {device} is {passes}."]
    for name, contender in CONTENDERS.items():
        ratios = [row["ratio"] for row in timed if row["optimizer"] == name]
        if contender.baseline is None or not ratios:
            continue
        least, most = min(ratios), max(ratios)
        if most < 1 - ALIKE:
            what = "faster than"
        elif least > 1 + ALIKE:
            what = "slower than"
        elif least < 1 - ALIKE and most > 1 + ALIKE:
            what = "faster or slower, depending on the model, than"
        elif least < 1 - ALIKE:
            what = "faster than or as fast as"
        else:
            what = "about as fast as" if most <= 1 + ALIKE else "as fast as or slower than"
        times = f"{least:.2f}" if len(ratios) == 1 else f"{least:.2f} to {most:.2f}"
        said.append(f"{name} is {what} {contender.baseline} here: {times} times its step.")
    varied = max((row["high"] / row["low"] for row in timed), default=1.0)
    if varied > BUSY:
        said.append(
            f"Times of one optimizer varied by a factor of {varied:.1f}: other programs were running. Repeat this on a "
            "machine at rest, or with fewer threads (OMP_NUM_THREADS=1)."
        )
    if passes == "reference" and backends.missing(device):
        said.append(f"It runs in pure PyTorch, many times slower than its native kernels: {native.remedy()}")
    return said


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "--models", nargs="+", choices=list(MODELS), default=["lenet-5", "resnet-50"], metavar="MODEL",
        help=f"whose shapes of parameters: {', '.join(MODELS)} (default: lenet-5 resnet-50)",
    )  # fmt: skip
    parser.add_argument("--device", help="default: the accelerator, if there is one, or else cpu")
    parser.add_argument("--seconds", type=float, default=30.0, help="in all, about (default: %(default)g)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> Iterator[str]:
    """What the command prints, a line at a time.

    Raises:
        ValueError: an argument is refused.
    """
    device = _device(options.device)
    timed: list[dict[str, Any]] = []
    if not options.json:
        place = f"{torch.get_num_threads()} threads" if device.type == "cpu" else "its queue included"
        yield f"Time of a step on {device}, torch {torch.__version__}, {place}: median [20 %, 80 %]"
    for model in options.models:
        shapes = MODELS[model]()
        if not options.json:
            yield ""
            yield f"{model}: {elements(shapes):,} float32 parameters in {len(shapes)} tensors"
        timed += rows(model, shapes, device, options.seconds / len(options.models))
        if not options.json:
            for row in timed[-len(CONTENDERS) :]:
                ratio = "" if row["ratio"] is None else f"  {row['ratio']:.2f} x {row['baseline']}"
                spread = f"[{_shown(row['low'])}, {_shown(row['high'])}]"
                yield f"  {row['optimizer']:<24}{_shown(row['seconds']):>9} {spread:<22}{ratio}".rstrip()
    if options.json:
        yield json.dumps({"device": str(device), "rows": timed, "verdict": verdict(timed, device)}, indent=1)
    else:
        yield ""
        yield from verdict(timed, device)


def _device(name: str | None) -> torch.device:
    """The device to time on.

    Raises:
        ValueError: there is no such device.
    """
    if name is None:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # a torch without CUDA asserts it
        raise ValueError(f"--device {name}: there is none here ({str(error).partition(chr(10))[0]})") from None
    return device


def _shown(seconds: float) -> str:
    """A time with three digits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"
