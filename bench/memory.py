"""The memory that training takes with SOFIM, beside other optimizers: counted, and measured.

    python -m bench.memory

**Counted.** Bytes of weights, gradients and state. SOFIM's and PyTorch's own are those of ``sofim_fused.memory``, on
the meta device. Of torchao and bitsandbytes an optimizer is made on the CPU, takes a step, and its tensors are added
up. FlashOptim needs a GPU even to be made; its bytes are those of the layout in its source: a moment is 8 bits per
element and a float16 scale for each 32 of a tensor, and a bfloat16 weight has 8 or 16 more bits. The three packages
have to be installed; nothing of this project needs them:

    pip install --no-deps flashoptim==0.1.4 torchao==0.18.0 bitsandbytes==0.50.2

**Measured.** How far the resident set of a process grows at its peak, over weights that are made and training steps
whose backward pass makes one gradient after the other, from the last parameter to the first, and has no activations.
Each measurement has a process of its own, and glibc's threshold for freed blocks fixed, as docs/in_backward.md
recommends.

Writes bench/results/memory.json and .md, and the tables in docs/memory.md.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from bench import documents, report
from bench.backward import THRESHOLD
from bench.report import Row, Table
from bench.shapes import MODELS, Shape, elements
from sofim_fused import backends, memory
from sofim_fused.memory import OTHERS, OURS, Choice

DOCUMENT = Path(__file__).parents[1] / "docs" / "memory.md"
SHAPES: dict[str, Callable[[], list[Shape]]] = {
    "GPT-2 small": MODELS["gpt2-small"],
    "12 linear layers of 2048²": lambda: [(2048, 2048)] * 12,
    "ResNet-50": MODELS["resnet-50"],
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RELEASED: dict[str, Any] = {"in_backward": True, "release_grads": True}
STEPS = 2
LARGE = 100_000_000  # elements; models that are larger are not measured where steps run in pure PyTorch
_M_MMAP_THRESHOLD = -3


# Counted


class Peer(NamedTuple):
    """An optimizer of another package.

    Attributes:
        package: on PyPI; its version is written down.
        state: bytes of state for shapes with weights of a dtype; ``None``: it does not take the dtype.
        bits: of a bfloat16 weight, with what the state has of it.
        releases: whether the package frees gradients in the backward pass.
    """

    package: str
    state: Callable[[Sequence[Shape], str], int | None]
    bits: int
    releases: bool = False


def _flash(moments: int, bits: int) -> Callable[[Sequence[Shape], str], int | None]:
    """FlashOptim's layout: ``moments`` of 8 bits, and 8 or 16 more bits of bfloat16 weights."""

    def state(shapes: Sequence[Shape], dtype: str) -> int | None:
        if dtype == "float32":
            return None if bits < 32 else sum(_in_groups(shape, moments) for shape in shapes)
        return sum(_in_groups(shape, moments) + math.prod(shape) * (bits - 16) // 8 for shape in shapes)

    return state


def _in_groups(shape: Shape, moments: int) -> int:
    size = math.prod(shape)
    return moments * (size + 2 * math.ceil(size / 32))


def _made(new_optimizer: Callable[[list[Tensor]], Optimizer]) -> Callable[[Sequence[Shape], str], int]:
    """The state that an optimizer has after a step, tensor by tensor, so that one of them is in memory at a time."""

    def state(shapes: Sequence[Shape], dtype: str) -> int:
        counted: dict[Shape, int] = {}
        for shape in set(shapes):
            param = nn.Parameter(torch.zeros(shape, dtype=DTYPES[dtype]))
            param.grad = torch.ones_like(param)
            optimizer = new_optimizer([param])
            optimizer.step()
            counted[shape] = sum(stored(value) for value in optimizer.state[param].values())
        return sum(counted[shape] for shape in shapes)

    return state


def stored(value: Any) -> int:
    """The bytes of a tensor, or of those that a subclass such as torchao's wraps; 0 of anything else."""
    if not isinstance(value, Tensor):
        return 0
    if is_traceable_wrapper_subclass(value):
        return sum(stored(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    return value.nbytes


def _torchao(params: list[Tensor]) -> Optimizer:
    from torchao.optim import AdamW8bit  # type: ignore[import-not-found, unused-ignore]

    return AdamW8bit(params)  # type: ignore[no-any-return, unused-ignore]


def _bitsandbytes(params: list[Tensor]) -> Optimizer:
    from bitsandbytes.optim import AdamW8bit  # type: ignore[import-not-found, unused-ignore]

    return AdamW8bit(params)  # type: ignore[no-any-return, unused-ignore]


PEERS = {
    "FlashSGD, 24 bits": Peer("flashoptim", _flash(1, 24), 24, True),
    "FlashSGD, 32 bits": Peer("flashoptim", _flash(1, 32), 32, True),
    "FlashAdamW, 24 bits": Peer("flashoptim", _flash(2, 24), 24, True),
    "FlashAdamW, 32 bits": Peer("flashoptim", _flash(2, 32), 32, True),
    "torchao AdamW8bit": Peer("torchao", _made(_torchao), 16),
    "bitsandbytes AdamW8bit": Peer("bitsandbytes", _made(_bitsandbytes), 16),
}


def count(shapes: Sequence[Shape], dtype: str, choice: Choice, released: bool = False) -> memory.Use:
    """The memory of an optimizer that is counted on the meta device."""
    params = memory.parameters(shapes, DTYPES[dtype])
    return memory.count(choice.kind(params, **choice.arguments, **(RELEASED if released else {})))


def counted(model: str) -> Iterator[Row]:
    """Rows of one model: bytes."""
    shapes = SHAPES[model]()
    for dtype in DTYPES:
        for name, choice in {**OTHERS, **OURS}.items():
            use, ours = count(shapes, dtype, choice), name in OURS
            released = count(shapes, dtype, choice, released=True).peak if ours else None
            bits = 32 if ours or dtype == "float32" else 16
            yield _row(model, dtype, name, bits, use.weights, use.gradients, use.state, released)
        for name, peer in PEERS.items():
            state = peer.state(shapes, dtype)
            if state is not None:
                size = DTYPES[dtype].itemsize
                weights, largest = size * elements(shapes), size * max(map(math.prod, shapes))
                released = weights + state + largest if peer.releases else None
                bits = 32 if dtype == "float32" else peer.bits
                shown = "FlashSGD" if name.startswith("FlashSGD") else "FlashAdamW" if peer.releases else name
                yield _row(model, dtype, shown, bits, weights, weights, state, released)


def _row(
    model: str, dtype: str, provider: str, bits: int, weights: int, gradients: int, state: int, released: int | None
) -> Row:
    return {
        "model": model,
        "dtype": dtype,
        "provider": provider,
        "bits": bits,
        "parameters": elements(SHAPES[model]()),
        "weights": weights,
        "gradients": gradients,
        "state": state,
        "peak": weights + gradients + state,
        "released": released,
    }


def aims(_: object) -> Iterator[Row]:
    """What is aimed at for bfloat16 weights of 32 bits with a moment of 8."""
    for provider in ("SOFIM, 8-bit moment", "AdaSOFIM, 8-bit moment"):
        for model, released, most in (
            ("GPT-2 small", False, 7.1),
            ("GPT-2 small", True, 5.7),
            ("12 linear layers of 2048²", True, 5.25),
        ):
            use = count(SHAPES[model](), "bfloat16", OURS[provider], released)
            each = use.peak / use.parameters
            what = "the largest gradient" if released else "all gradients"
            yield {"model": model, "provider": provider, "there": what, "each": each, **report.verdict(most, each)}


# Measured

# The passes of AdamW(fused=False) would take temporary memory too.
MEASURED = {
    "SGD(momentum=0.9)": Choice(SGD, {"lr": 1e-3, "momentum": 0.9, "fused": True}),
    "AdamW": Choice(AdamW, {"lr": 1e-3, "fused": True}),
    **OURS,
}


class _MakesGradient(torch.autograd.Function):
    """Passes a number on; its backward pass makes the gradient of a parameter."""

    @staticmethod
    def forward(ctx: Any, number: Tensor, param: Tensor) -> Tensor:
        ctx.save_for_backward(param)
        return number.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (param,) = ctx.saved_tensors
        return grad, torch.full_like(param, 1e-4)


def measure(shapes: Sequence[Shape], dtype: str, provider: str, released: bool, tied: bool, threads: int) -> int:
    """Bytes by which the resident set grows at its peak. To be called in a process of its own.

    Args:
        shapes: of the parameters.
        dtype: of the weights.
        provider: of ``MEASURED``.
        released: with ``release_grads=True``.
        tied: whether the model uses its first parameter at its end too, as a head that is tied to an embedding.
        threads: of torch.
    """
    if not ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, THRESHOLD):
        raise RuntimeError("mallopt() does not take the threshold")
    torch.set_num_threads(threads)
    choice = MEASURED[provider]
    arguments = {**choice.arguments, **(RELEASED if released else {})}
    _train([(64, 128), (64,)], dtype, choice.kind, arguments, tied)  # code, threads and their stacks do not count
    report.give_back()
    before = report.resident("VmRSS")
    _train(shapes, dtype, choice.kind, arguments, tied)
    return report.resident("VmHWM") - before


def _train(
    shapes: Sequence[Shape],
    dtype: str,
    new_optimizer: Callable[..., Optimizer],
    arguments: Mapping[str, Any],
    tied: bool,
) -> None:
    params = [nn.Parameter(torch.full(shape, 0.02, dtype=DTYPES[dtype])) for shape in shapes]
    optimizer = new_optimizer(params, **arguments)
    for _ in range(STEPS):
        optimizer.zero_grad()
        number = torch.zeros((), requires_grad=True)
        for param in [*params, *params[:tied]]:
            number = _MakesGradient.apply(number, param)  # type: ignore[no-untyped-call]
        number.backward()
        optimizer.step()


class Run:
    """What the command line asks for.

    Args:
        models: of ``SHAPES``, to be measured.
        threads: of torch.
    """

    def __init__(self, models: Sequence[str], threads: int) -> None:
        self.models, self.threads = models, threads

    def measured(self) -> Iterator[Row]:
        """Measured beside counted."""
        passes, _ = backends.best("auto", report.CPU, blockwise=True)
        slow = passes is None or passes.name == "reference"
        with report.fresh_processes() as pool:
            for model in self.models:
                shapes = SHAPES[model]()
                for dtype in DTYPES:
                    for provider, choice in MEASURED.items():
                        if slow and "8-bit" in provider and elements(shapes) > LARGE:
                            continue
                        for released in (False, True) if provider in OURS else (False,):
                            for tied in (False, True) if (model, provider) == ("GPT-2 small", "SOFIM") else (False,):
                                count_of = choice if provider in OURS else OTHERS[provider]
                                use = count(shapes, dtype, count_of, released)
                                expected = use.peak + (DTYPES[dtype].itemsize * math.prod(shapes[0]) if tied else 0)
                                arguments = (shapes, dtype, provider, released, tied, self.threads)
                                growth = pool.apply(measure, arguments)
                                yield {
                                    "model": model + (", tied" if tied else ""),
                                    "dtype": dtype,
                                    "provider": provider,
                                    "released": released,
                                    "parameters": use.parameters,
                                    "counted": expected,
                                    "measured": growth,
                                }


# Tables


def _each(name: str) -> Callable[[Row], str]:
    return lambda row: "" if row[name] is None else f"{row[name] / row['parameters']:.2f}"


_COUNTED: dict[str, Callable[[Row], str]] = {
    "weights": lambda row: row["dtype"],
    "provider": lambda row: row["provider"],
    "bits of a weight": lambda row: str(row["bits"]),
    "weights, bytes": _each("weights"),
    "gradients": _each("gradients"),
    "state": _each("state"),
    "all": _each("peak"),
    "peak, gradients released": _each("released"),
}
_MEASURED: dict[str, Callable[[Row], str]] = {
    "model": lambda row: row["model"],
    "weights": lambda row: row["dtype"],
    "provider": lambda row: row["provider"],
    "gradients": lambda row: "released" if row["released"] else "all",
    "counted MB": lambda row: f"{row['counted'] / 1e6:.1f}",
    "measured MB": lambda row: f"{row['measured'] / 1e6:.1f}",
    "difference": lambda row: f"{row['measured'] / row['counted'] - 1:+.1%}",
    "measured, bytes per parameter": lambda row: f"{row['measured'] / row['parameters']:.2f}",
}
_AIMS: dict[str, Callable[[Row], str]] = {
    "model": lambda row: row["model"],
    "provider": lambda row: row["provider"],
    "gradients": lambda row: row["there"],
    "bytes per parameter": lambda row: f"{row['each']:.3f}",
    "target": report.target,
}
_NOTE = (
    "Bytes per parameter. Bits of a weight: those that the model and the state have of it together. Released: with the"
    " largest gradient alone, for optimizers that free each one in the backward pass. FlashOptim's rows are counted"
    " from its layout; of float32 weights it keeps no more bits."
)


def _counted_table(model: str) -> Table:
    return Table(f"Counted: {model}", "AdamW", _COUNTED, lambda _: counted(model), _NOTE)


TABLES = {
    **{f"counted {model}": _counted_table(model) for model in SHAPES},
    "aims": Table("Targets", "", _AIMS, aims, "bfloat16 weights of 32 bits, with a moment of 8 bits."),
    "measured": Table(
        "Measured",
        "AdamW",
        _MEASURED,
        Run.measured,
        f"The growth of the resident set at its peak, over the weights and {STEPS} steps without activations, beside"
        " the count. Tied: the embedding is used at the end of the model too, as GPT-2's is; its two gradients are"
        " there together until autograd has added them, and are counted twice. SGD and AdamW are the fused ones, which"
        " need no temporary memory. Steps with moments in 8 bits need some where they run in pure PyTorch, which the"
        " count leaves out; GPT-2 small's take minutes there, and are not measured.",
    ),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Count, measure, print, and write down."""
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=list(TABLES), default=list(TABLES), metavar="TABLE")
    parser.add_argument("--json", type=Path, help="file for the results, with the tables beside it as Markdown")
    options = parser.parse_args(arguments)
    whole = set(options.only) == set(TABLES)
    path = report.RESULTS / "memory.json" if options.json is None and whole else options.json
    versions = []
    for package in dict.fromkeys(peer.package for peer in PEERS.values()):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            parser.error(f"{package} is not installed: pip install --no-deps {package}")
    torch.set_num_threads(options.threads)
    torch.compiler.set_stance("force_eager")  # torchao compiles its step
    tables = {key: TABLES[key] for key in options.only}
    run = Run([model for model in SHAPES if model != "ResNet-50"], options.threads)
    command = f"python -m bench.memory --threads {options.threads}"
    report.measure(run, tables, command, options.threads, path, f"Beside {', '.join(versions)}.")
    if path == report.RESULTS / "memory.json":
        DOCUMENT.write_text(documents.filled(DOCUMENT.read_text(), report.RESULTS))


if __name__ == "__main__":
    main()
