"""The host's time for a step, without its launches: ``python -m bench.host``.

Times :meth:`SOFIM.step` on the Triton backend with tensors on the CPU, and with every launch replaced by a counter:
checks, pointers, packing. Whole steps in one call need the native part; without it, steps run pass by pass, which is
timed too. It does not include what a GPU adds: the launches and, if something changed, copies through pinned memory.
Pass by pass a GPU adds more, because each of PyTorch's operators on small vectors is a launch as well.

If the CUDA backend was built for the emulator (``make emulated``), its steps are timed too, with launches that copy
their arguments and run nothing. Tensors have one element each, so torch's fused SGD, which runs on the same list, has
almost nothing to compute either. Gradients are kept from step to step, or created anew outside of the timed part.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn

from bench import shapes
from bench.timing import Timing, compare
from sofim_fused import SOFIM, backends, native
from sofim_fused.backends import NativeStep
from sofim_fused.backends.triton.passes import TritonPasses

RESULTS = Path(__file__).parent / "results" / "host"


class Counter:
    """Replaces a kernel, and counts its launches."""

    def __init__(self) -> None:
        self.launches = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: object, **kwargs: object) -> None:
            self.launches += 1

        return launch


@dataclass(frozen=True)
class Row:
    """Times in microseconds per step; ``provider``: the optimizer, the backend and how its step runs."""

    tensors: int
    gradients: str
    provider: str
    median: float
    low: float
    high: float


class ByPasses(TritonPasses):
    """Takes no whole steps, as without the native part."""

    def native_step(self) -> NativeStep:
        """A function that takes no step."""
        return lambda groups, state, grad_scale, found_inf, counter: None


def counted(kernels: ModuleType) -> tuple[Any, Counter]:
    """The kernels' constants, with one counter for every launch."""
    counter = Counter()
    names = ("first", "second", "single", "fold", "solve")
    return SimpleNamespace(**{**vars(kernels), **dict.fromkeys(names, counter)}), counter


def on_triton(count: int, kernels: ModuleType, passes: type[TritonPasses]) -> tuple[SOFIM, list[nn.Parameter], Counter]:
    """An optimizer with state, whose launches are counted."""
    spied, counter = counted(kernels)
    registered = backends._REGISTRY["triton"]
    backends._REGISTRY["triton"] = lambda device: passes(spied, emulated=True)
    try:
        params = [nn.Parameter(torch.ones(1)) for _ in range(count)]
        optimizer = SOFIM(params, backend="triton")
        renew(params)
        optimizer.step()  # asks for the passes
    finally:
        backends._REGISTRY["triton"] = registered
    counter.launches = 0
    return optimizer, params, counter


def on_cuda(count: int) -> tuple[SOFIM, list[nn.Parameter]]:
    """An optimizer on the emulated CUDA backend, with state."""
    params = [nn.Parameter(torch.ones(1)) for _ in range(count)]
    optimizer = SOFIM(params, backend="cuda")
    renew(params)
    optimizer.step()
    return optimizer, params


def renew(params: list[nn.Parameter]) -> None:
    """New gradients, as after ``zero_grad()`` and a backward pass."""
    for p in params:
        p.grad = torch.ones_like(p)


def measured(count: int, seconds: float) -> list[Row]:
    """Every provider and torch's fused SGD, in turns, with gradients kept and made anew."""
    kernels = importlib.import_module("sofim_fused.backends.triton.kernels")
    ways: dict[str, type[TritonPasses]] = {"Triton, by passes": ByPasses}
    if not isinstance(native.cpu(), str):
        ways["Triton, whole step"] = TritonPasses
    providers: dict[str, Callable[[], object]] = {}
    params: dict[str, list[nn.Parameter]] = {}
    counters = {}
    for name, passes in ways.items():
        optimizer, params[name], counters[name] = on_triton(count, kernels, passes)
        providers[name] = optimizer.step
    cuda = native.cuda()
    emulated = not isinstance(cuda, str) and cuda.emulated
    if emulated:
        optimizer, params["CUDA C++"] = on_cuda(count)
        providers["CUDA C++"] = optimizer.step
    params["SGD fused"] = [nn.Parameter(torch.ones(1)) for _ in range(count)]
    renew(params["SGD fused"])
    providers["SGD fused"] = torch.optim.SGD(params["SGD fused"], lr=0.1, momentum=0.9, fused=True).step
    if emulated:
        cuda.set_idle(True)  # type: ignore[union-attr]
    rows = []
    for gradients in ("kept", "made anew"):
        before = {name: _renewing(params[name]) for name in providers} if gradients == "made anew" else None
        timings = compare(providers, "SGD fused", seconds, before=before)
        rows += [Row(count, gradients, name, *_microseconds(timing)) for name, timing in timings.items()]
    if emulated:
        cuda.set_idle(False)  # type: ignore[union-attr]
    for name, counter in counters.items():
        if not counter.launches:
            raise RuntimeError(f"{name}: no step reached its launch")
    return rows


def _renewing(params: list[nn.Parameter]) -> Callable[[], None]:
    return lambda: renew(params)


def _microseconds(timing: Timing) -> tuple[float, float, float]:
    return timing.median * 1e6, timing.low * 1e6, timing.high * 1e6


def as_markdown(rows: list[Row], command: str) -> str:
    """The results as a document."""
    lines = [
        "# Host time of a step, launches left out",
        "",
        f"`{command}`, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{torch.get_num_threads()} threads. Microseconds per step, 20th and 80th percentile in brackets.",
        "",
        "| tensors | gradients | step | µs |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {r.tensors} | {r.gradients} | {r.provider} | {r.median:.1f} [{r.low:.1f}, {r.high:.1f}] |" for r in rows
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Measure and print; ``--save`` also writes bench/results/host.{json,md}."""
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--tensors", type=int, nargs="+", default=[10, len(shapes.resnet50()), 1000], help="numbers of tensors"
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each table of results")
    parser.add_argument("--save", action="store_true", help="write the results to bench/results")
    args = parser.parse_args(argv)
    rows = [row for count in args.tensors for row in measured(count, args.seconds)]
    text = as_markdown(rows, " ".join(["python -m bench.host", *(argv if argv is not None else sys.argv[1:])]))
    print(text)
    if args.save:
        RESULTS.with_suffix(".md").write_text(text, encoding="utf-8")
        RESULTS.with_suffix(".json").write_text(
            json.dumps([asdict(r) for r in rows], indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
