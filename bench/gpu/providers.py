"""What bench.gpu times, as data, in the order in which it is timed; and how each way to take a step is made ready."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from bench.backward import Task, images, tokens
from bench.networks import ResNet9, Transformer, linear_layers
from bench.shapes import Shape, elements

BASELINE = "SGD fused"
# In both, about the same step, and small enough that weights stay finite over any number of steps.
OURS: Mapping[str, Any] = {"lr": 1e-2, "momentum": 0.9, "rho": 1.0}
SGD: Mapping[str, Any] = {"lr": 1e-3, "momentum": 0.9}
MAX_GRAD_NORM = 0.1  # below the gradients' norm of every model, so that clipping is at work
GUARD: Mapping[str, Any] = {"max_grad_norm": MAX_GRAD_NORM, "skip_nonfinite": True}
BF16 = torch.bfloat16
LAUNCHING = ("cuda", "triton")  # backends whose modules have the switch
WARMUP = 2  # calls for each set of tensors: the first makes the state, the second what later steps keep


class UnavailableError(Exception):
    """Something cannot run here for a reason that is no failure: a missing package, or no GPU."""


@dataclass(frozen=True)
class Provider:
    """One way to take a step.

    Attributes:
        name: in tables.
        optimizer: "module:class".
        options: its arguments.
        form: a call of ``step``, a replayed CUDA graph of a step, or a step under ``torch.compile``.
        clip: ``clip_grad_norm_`` before the step.
        one_launch: what ``SINGLE_LAUNCH`` of the backend's module is set to; ``None``: left alone.
        moves: bytes that a step reads and writes per parameter, by the sizes of a weight, of a moment and of the bits
            that are kept beside the weight (docs/method.md); ``None``: not counted.
    """

    name: str
    optimizer: str
    options: Mapping[str, Any]
    form: Literal["step", "graph", "compile"] = "step"
    clip: bool = False
    one_launch: bool | None = None
    moves: Callable[[int, int, int], int] | None = None

    @property
    def ours(self) -> bool:
        """Whether it runs this package."""
        return self.optimizer.startswith("sofim_fused")

    def bytes_moved(self, dtype: torch.dtype) -> int | None:
        """Bytes per parameter of ``dtype``; ``None``: not counted."""
        moment = self.options.get("state_dtype") or (torch.promote_types(dtype, torch.float32) if self.ours else dtype)
        kept = dtype.itemsize if self.ours and dtype.itemsize == 2 and self.options.get("kahan") is not False else 0
        return None if self.moves is None else self.moves(dtype.itemsize, moment.itemsize, kept)

    def new(self, params: Sequence[Tensor]) -> Optimizer:
        """The optimizer.

        Raises:
            UnavailableError: the package is not installed.
        """
        module, _, name = self.optimizer.partition(":")
        options = dict(self.options)
        if name == "FlashSGD" and params[0].dtype == torch.float32:
            options["master_weight_bits"] = None  # by default it keeps more bits than float32 has, which it refuses
        try:
            made: Optimizer = getattr(importlib.import_module(module), name)(params, **options)
        except ImportError as error:
            raise UnavailableError(f"{module} cannot be imported ({error})") from None
        return made


def sofim(backend: str, kind: str = "", form: Any = "step", one_launch: bool | None = None, **options: Any) -> Provider:
    """A step of one of SOFIM's backends."""
    # Both read each gradient once more: clipping comes before any moment is written, other numerators add gradients.
    again = "max_grad_norm" in options or options.get("numerator", "moment") != "moment"

    def moves(w: int, m: int, kept: int) -> int:
        return (w + 2 * m) + (m + 2 * w + 2 * kept) + (w if again else 0)

    counted = None if backend == "reference" else moves
    name, given = f"SOFIM {backend}{', ' if kind else ''}{kind}", {**OURS, **options, "backend": backend}
    return Provider(name, "sofim_fused:SOFIM", given, form, one_launch=one_launch, moves=counted)


def _torch(name: str, accesses: int, options: Mapping[str, Any], optimizer: str = "SGD", **more: Any) -> Provider:
    return Provider(name, f"torch.optim:{optimizer}", options, moves=lambda w, m, kept: accesses * w, **more)


def adaptive(backend: str, kind: str, **options: Any) -> Provider:
    """A step of SOFIM with a diagonal that adapts and the look-ahead, without the term of rank one unless ``rho``."""
    given = {"lr": 1e-6, "momentum": 0.9, "diagonal": "factored", "numerator": "nesterov", **options}

    def moves(w: int, m: int, kept: int) -> int:
        if given["diagonal"] == "element":  # a second moment for each element, and one sweep
            return w + 2 * m + 2 * m + 2 * w + 2 * kept
        again = w + m if "rho" in options else 0  # the moment is written in a sweep before the one of the weights
        return w + w + 2 * m + 2 * w + 2 * kept + again

    counted = None if backend == "reference" else moves
    return Provider(f"SOFIM {backend}, {kind}", "sofim_fused:SOFIM", {**given, "backend": backend}, moves=counted)


# SGD reads a gradient, a moment and a weight, and writes two of them; foreach takes three sweeps, and so does clipping.
FUSED = {**SGD, "fused": True}
SGD_FUSED = _torch(BASELINE, 5, FUSED)
CLIPPED = _torch(f"{BASELINE}, clip_grad_norm_", 8, FUSED, clip=True)
SGD_GRAPH = _torch(f"{BASELINE}, CUDA graph", 5, FUSED, form="graph")
SGD_FOREACH = _torch("SGD foreach", 8, {**SGD, "foreach": True})
SGD_COMPILED = _torch("SGD compiled", 5, {**SGD, "foreach": True}, form="compile")
ADAMW = _torch("AdamW fused", 7, {"lr": 1e-6, "fused": True}, "AdamW")
PEERS = [Provider("FlashSGD", "flashoptim:FlashSGD", SGD), Provider("optimi SGD", "optimi:SGD", SGD)]


class Autocast(nn.Module):
    """A network under ``torch.autocast`` to bfloat16; its outputs are float32, as a loss takes them there."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, given: Tensor) -> Tensor:
        """The network's outputs."""
        with torch.autocast(given.device.type, BF16):
            outputs: Tensor = self.network(given)
        return outputs.float()


TASKS = {  # whole training steps
    "training: resnet-9, batch 512": Task(ResNet9, partial(images, 512, 3)),
    "training: resnet-9, batch 512, bfloat16 autocast": Task(lambda: Autocast(ResNet9()), partial(images, 512, 3)),
    "training: transformer, batch 64 x 128": Task(Transformer, partial(tokens, 64, 128)),
}
MINIATURE = Task(partial(linear_layers, 2, 8), lambda: (torch.randn(6, 8), torch.randint(8, (6,))))  # on a CPU


class Group(NamedTuple):
    """Providers that are timed in turns beside the baseline.

    Attributes:
        model: of ``bench.shapes.GPU_MODELS``, or of ``TASKS``.
        providers: all but the baseline.
        dtype: of parameters and gradients.
        cached: whether one set of tensors is used, which the L2 cache holds; else sets in turn that exceed it.
    """

    model: str
    providers: Sequence[Provider]
    dtype: Literal["float32", "bfloat16"] = "float32"
    cached: bool = False

    @property
    def title(self) -> str:
        """Its name in tables; all groups of one model, dtype and place have the same."""
        place = f", {self.dtype}, {'in cache' if self.cached else 'from memory'}"
        return self.model + ("" if self.model in TASKS else place)


FIVE = ("lenet-5", "1000x1K", "resnet-9", "resnet-50", "gpt2-small")


def plan(backends: Sequence[str]) -> list[Group]:
    """All groups, the most telling first.

    Args:
        backends: those of SOFIM's that run on the device.
    """
    native = [name for name in backends if name != "reference"]

    def on(models: Sequence[str], *providers: Provider, dtype: Any = "float32", cached: bool = False) -> list[Group]:
        return [Group(model, providers, dtype, cached or model == "lenet-5") for model in models]

    def each(kind: str, **options: Any) -> list[Provider]:
        return [sofim(name, kind, **options) for name in native]

    def adapts(kind: str, **options: Any) -> list[Provider]:
        return [adaptive(name, kind, **options) for name in native]

    both = [CLIPPED, *each(""), *each("guarded", **GUARD)]
    factored = [*adapts("factored"), *adapts("factored, guarded", **GUARD)]
    diagonals = [
        *adapts("factored, rank one", rho=1.0),
        *adapts("row", diagonal="row"),
        *adapts("element", diagonal="element"),
    ]
    narrow = [*each("no kahan", kahan=False), *each("bfloat16 moment, no kahan", state_dtype=BF16, kahan=False)]
    return [
        *(group for name in native for group in on(FIVE, CLIPPED, sofim(name), sofim(name, "guarded", **GUARD))),
        *on(("lenet-5", "gpt2-small", "resnet-50", "1000x1K", "1000x32x32", "resnet-9"), ADAMW, *factored),
        *(Group(task, [*each(""), *each("in_backward", in_backward=True)]) for task in TASKS),
        *on(FIVE, SGD_GRAPH, *each("CUDA graph", form="graph", capturable=True)),
        *on(("lenet-5", "resnet-50", "gpt2-small"), SGD_COMPILED),
        *on(FIVE, *each("bfloat16 moment", state_dtype=BF16)),
        *on(("gpt2-small", "resnet-50", "lenet-5", "lm-1b"), *both, *narrow, dtype="bfloat16"),
        *on(("vit-b", "lm-1b"), *both),
        *on(("lenet-5", "gpt2-small"), ADAMW, *diagonals),
        *on(("gpt2-small",), *PEERS),
        *on(FIVE[:3], *each("one launch", one_launch=True), *each("two launches", one_launch=False)),
        *on(FIVE, *each("gradient form", numerator="gradient"), SGD_FOREACH),
        *on(("1000x1K", "resnet-9"), *both, cached=True),
        *on(("1000x1K", "resnet-9", "vit-b"), *both, *narrow, dtype="bfloat16"),
        *(on(FIVE[:2], sofim("reference")) if "reference" in backends else []),
    ]


def rotation(set_bytes: int, cache_bytes: int, budget_bytes: int) -> int:
    """How many sets of tensors, used in turn, exceed a cache four times, as far as the memory goes; at least one."""
    return max(1, min(math.ceil(4 * cache_bytes / max(set_bytes, 1)), budget_bytes // max(set_bytes, 1)))


class Workload:
    """Sets of weights and gradients that all providers share: only state is each one's own.

    Args:
        shapes: of the parameters.
        dtype: of parameters and gradients.
        device: where they are made.
        sets: how many, used in turn.
    """

    def __init__(self, shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device, sets: int) -> None:
        self.device, self.elements = device, elements(shapes)
        generator = torch.Generator(device).manual_seed(1)

        def normal(deviation: float) -> list[Tensor]:
            new = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
            return [value.normal_(0, deviation, generator=generator) for value in new]

        self.sets = [(normal(0.02), normal(1e-3)) for _ in range(sets)]

    def parameters(self, index: int, own_gradients: bool = False) -> list[Tensor]:
        """New parameters in the memory of set ``index``, with its gradients or with copies of them."""
        params: list[Tensor] = []
        for weight, grad in zip(*self.sets[index], strict=True):
            params.append(nn.Parameter(weight))
            params[-1].grad = grad.clone() if own_gradients else grad
        return params


@contextlib.contextmanager
def launches(provider: Provider) -> Iterator[None]:
    """Inside, whole steps of the provider's backend take one launch or two, where it says which.

    Raises:
        UnavailableError: the backend has no such switch.
    """
    if provider.one_launch is None:
        yield
        return
    if (backend := provider.options["backend"]) not in LAUNCHING:
        raise UnavailableError(f"the backend {backend} has no launches")
    module: Any = importlib.import_module(f"sofim_fused.backends.{backend}")
    before, module.SINGLE_LAUNCH = module.SINGLE_LAUNCH, provider.one_launch
    try:
        yield
    finally:
        module.SINGLE_LAUNCH = before


def ready(provider: Provider, work: Workload) -> Callable[[], object]:
    """Make a provider ready: its state, and whatever is compiled or captured, for each set of tensors.

    Returns:
        What to call, as often as wanted, inside of :func:`launches`.

    Raises:
        UnavailableError: it cannot run on this device, or is not installed.
    """
    if provider.form != "step" and work.device.type != "cuda":
        raise UnavailableError("needs a GPU")
    if provider.form == "compile" and len(work.sets) > 1:
        raise UnavailableError("a compiled step is bound to one set of tensors, and this model is measured on several")
    pool = torch.cuda.graph_pool_handle() if provider.form == "graph" else None
    calls: list[Callable[[], object]] = []
    with launches(provider):
        for index in range(len(work.sets)):
            params = work.parameters(index, own_gradients=provider.clip)
            calls.append(_call(provider, provider.new(params), params, pool))
            for _ in range(WARMUP):
                calls[-1]()
    turns = itertools.cycle(calls)
    return calls[0] if len(calls) == 1 else lambda: next(turns)()


def _call(provider: Provider, optimizer: Optimizer, params: list[Tensor], pool: Any) -> Callable[[], object]:
    def clipped() -> None:
        clip_grad_norm_(params, MAX_GRAD_NORM, foreach=True)
        optimizer.step()

    if provider.form == "graph":
        return _captured(optimizer, pool)
    if provider.form == "compile":
        return torch.compile(lambda: optimizer.step())
    return clipped if provider.clip else optimizer.step


def _captured(optimizer: Optimizer, pool: Any) -> Callable[[], object]:
    """A replay of the step. ``torch.cuda.graph`` would collect garbage and empty caches for each set of tensors."""
    for _ in range(WARMUP):
        optimizer.step()
    torch.cuda.synchronize()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        graph.capture_begin(pool=pool)
        try:
            optimizer.step()
        except BaseException:
            with contextlib.suppress(Exception):  # it says again that the capture has failed
                graph.capture_end()
            raise
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay
