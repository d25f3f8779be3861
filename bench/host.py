"""The host's time for a step, without its launches: ``python -m bench.host``.

Times :meth:`SOFIM.step` on the Triton backend with tensors on the CPU, and a driver for Triton that counts launches
instead of running them: checks, pointers, packing, and Triton's own code up to the launch. Whole steps in one call need
the native part; without it, steps run pass by pass, which is timed too. It does not include what a GPU adds: the
driver's part of a launch and, if something changed, copies through pinned memory. Pass by pass a GPU adds more, because
each of PyTorch's operators on small vectors is a launch as well.

If the CUDA backend was built for the emulator (``make emulated``), its steps are timed too, with launches that copy
their arguments and run nothing. Tensors have one element each, so torch's fused SGD and AdamW, which run on the same
list, have almost nothing to compute either. Gradients are kept from step to step, or created anew outside of the timed
part.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from bench import shapes
from bench.timing import Timing, compare
from sofim_fused import SOFIM, backends, native
from sofim_fused.backends import NativeStep
from sofim_fused.backends.triton.passes import TritonPasses

RESULTS = Path(__file__).parent / "results" / "host"


class CountingDriver:
    """A driver for Triton that compiles for compute capability 9.0, and counts launches instead of running them.

    Attributes:
        launches: how many.
        arguments: of the last one, constants included.
    """

    def __init__(self) -> None:
        self.launches = 0
        self.arguments: tuple[Any, ...] = ()
        counting = self

        class Launcher:
            """Takes a launch, as the part of it in C does."""

            def __init__(self, source: object, metadata: object) -> None:
                pass

            def __call__(self, *launch: object) -> None:
                counting.launches += 1
                counting.arguments = launch[9:]  # after grid, stream, function, metadata and hooks

        self.launcher_cls = Launcher
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 232_448},
            load_binary=lambda name, kernel, shared, device: (1, 1, 0, 0, 1024),  # a module, a function, its limits
            unload_module=lambda module: None,
        )

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default stream."""
        return 0

    def get_current_target(self) -> Any:
        """What to compile for."""
        return importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, Triton launches by it."""
        config = importlib.import_module("triton.runtime").driver
        before = config.__dict__.copy()
        config.set_active(self)
        try:
            yield
        finally:
            config.__dict__.update(before)


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


# One for the whole process: a compiled kernel keeps the launcher that it was first used with.
DRIVER = CountingDriver()
FACTORED: Mapping[str, Any] = {"lr": 1e-4, "diagonal": "factored", "numerator": "nesterov"}


def on_triton(count: int, passes: type[TritonPasses], **options: Any) -> tuple[SOFIM, list[nn.Parameter]]:
    """An optimizer with state on the Triton backend."""
    kernels = importlib.import_module("sofim_fused.backends.triton.kernels")
    registered = backends._REGISTRY["triton"]
    backends._REGISTRY["triton"] = lambda device: passes(kernels, emulated=True)
    try:
        return started(count, "triton", **options)
    finally:
        backends._REGISTRY["triton"] = registered


def started(count: int, backend: str, **options: Any) -> tuple[SOFIM, list[nn.Parameter]]:
    """An optimizer of parameters with one element, after two steps."""
    params = [nn.Parameter(torch.ones(1, 1)) for _ in range(count)]
    optimizer = SOFIM(params, backend=backend, **options)
    for _ in range(2):  # the first makes the state and asks for the passes, the second launches what later ones do
        renew(params)
        optimizer.step()
    return optimizer, params


def renew(params: list[nn.Parameter]) -> None:
    """New gradients, as after ``zero_grad()`` and a backward pass."""
    for p in params:
        p.grad = torch.ones_like(p)


def measured(count: int, seconds: float) -> list[Row]:
    """Every provider and torch's fused SGD, in turns, with gradients kept and made anew."""
    providers: dict[str, Callable[[], object]] = {}
    params: dict[str, list[nn.Parameter]] = {}

    def add(name: str, optimizer: torch.optim.Optimizer, its_params: list[nn.Parameter]) -> None:
        providers[name], params[name] = optimizer.step, its_params

    cuda = native.cuda()
    emulated = not isinstance(cuda, str) and cuda.emulated
    with DRIVER.installed():
        add("Triton, by passes", *on_triton(count, ByPasses))
        if not isinstance(native.cpu(), str):
            add("Triton, whole step", *on_triton(count, TritonPasses))
            add("Triton, factored", *on_triton(count, TritonPasses, **FACTORED))
        for name in [name for name in providers if name.startswith("Triton")]:
            DRIVER.launches = 0
            providers[name]()
            if not DRIVER.launches:
                raise RuntimeError(f"{name}: no step reached its launch")
        if emulated:
            add("CUDA C++", *started(count, "cuda"))
            add("CUDA C++, factored", *started(count, "cuda", **FACTORED))
        for name, kind in (("AdamW fused", torch.optim.AdamW), ("SGD fused", torch.optim.SGD)):
            theirs = [nn.Parameter(torch.ones(1, 1)) for _ in range(count)]
            renew(theirs)
            momentum = {"momentum": 0.9} if kind is torch.optim.SGD else {}
            add(name, kind(theirs, lr=0.1, fused=True, **momentum), theirs)  # type: ignore[arg-type]
        if emulated:
            cuda.set_idle(True)  # type: ignore[union-attr]
        rows = []
        for gradients in ("kept", "made anew"):
            before = {name: _renewing(params[name]) for name in providers} if gradients == "made anew" else None
            timings = compare(providers, "SGD fused", seconds, before=before)
            rows += [Row(count, gradients, name, *_microseconds(timing)) for name, timing in timings.items()]
        if emulated:
            cuda.set_idle(False)  # type: ignore[union-attr]
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
