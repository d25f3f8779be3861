"""What bench.gpu times: ways to take a step, as data, and how each is made ready on a device."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import math
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, AdamW, Optimizer

from bench.shapes import Shape, elements
from sofim_fused import SOFIM
from sofim_fused.backends import Coefficients, Decay

BASELINE = "SGD fused"
# In both, about the same step, and small enough that weights stay finite over any number of steps.
OURS: Mapping[str, Any] = {"lr": 1e-2, "momentum": 0.9, "rho": 1.0}
SGDS: Mapping[str, Any] = {"lr": 1e-3, "momentum": 0.9}
ADAMW: Mapping[str, Any] = {"lr": 1e-6, "fused": True}  # each of its steps is about a learning rate
BESIDE_ADAMW = ("resnet-9", "gpt2-small")  # models that are timed with AdamW as well
BESIDE_PEERS = ("gpt2-small",)  # and with the momentum SGD of other packages, where these are installed
PEERS = {"FlashSGD": "flashoptim:FlashSGD", "optimi SGD": "optimi:SGD"}
MAX_GRAD_NORM = 0.1  # below the gradients' norm of every model, so that clipping is at work
GUARD: Mapping[str, Any] = {"max_grad_norm": MAX_GRAD_NORM, "skip_nonfinite": True}
SMALL = 2_000_000  # elements; beyond, the reference would take most of the time
SINGLE = 10_000_000  # elements; one launch for a whole step is meant for models that fit into a cache
COMPILING = 60  # seconds
WARMUP = 2  # calls for each set of tensors: the first makes the state, the second what later steps keep
BF16 = torch.bfloat16


class UnavailableError(Exception):
    """Why a provider cannot run here, which is nobody's fault."""


@dataclass(frozen=True)
class Provider:
    """One way to take a step.

    Attributes:
        name: in tables.
        kind: what targets call it.
        options: the optimizer's arguments.
        backend: of SOFIM; ``None``: the optimizer is PyTorch's, AdamW for that kind, else SGD.
        form: a call of ``step``, the second pass alone, a replayed CUDA graph of a step, or a step under
            ``torch.compile``.
        clip: ``clip_grad_norm_`` before the step.
        one_launch: what the backend's ``SINGLE_LAUNCH`` is set to; ``None``: left alone.
        largest: elements up to which it is worth its time.
        peer: another package's optimizer, "module:class"; what it moves is not counted.
    """

    name: str
    kind: str
    options: Mapping[str, Any]
    backend: str | None = None
    form: Literal["step", "apply", "graph", "compile"] = "step"
    clip: bool = False
    one_launch: bool | None = None
    largest: float = math.inf
    peer: str = ""

    @property
    def ours(self) -> bool:
        """Whether it runs this package."""
        return self.backend is not None

    def moment_size(self, dtype: torch.dtype) -> int:
        """Bytes of the moment per parameter of ``dtype``."""
        if not self.ours:
            return dtype.itemsize * (2 if self.kind == "adamw" else 1)  # AdamW's two moments
        chosen: torch.dtype = self.options.get("state_dtype") or torch.promote_types(dtype, torch.float32)
        return chosen.itemsize

    def kahan_size(self, dtype: torch.dtype) -> int:
        """Bytes kept beside each parameter of ``dtype``."""
        return dtype.itemsize if self.ours and dtype.itemsize == 2 and self.options.get("kahan") is not False else 0

    def own_size(self, dtype: torch.dtype) -> int:
        """Bytes per parameter that it does not share with the others: its state, and gradients that it writes to."""
        return self.moment_size(dtype) + self.kahan_size(dtype) + (dtype.itemsize if self.clip else 0)

    def bytes_moved(self, dtype: torch.dtype) -> int | None:
        """Bytes that its sweeps read and write per parameter (docs/method.md); ``None``: not counted."""
        w, m, kept = dtype.itemsize, self.moment_size(dtype), self.kahan_size(dtype)
        if self.peer:
            return None
        if self.kind == "adamw":
            return 7 * w  # reads a gradient, reads and writes two moments and a weight
        if not self.ours:
            # A fused or compiled step is a single sweep; foreach is three, two that update the moment, one the weight.
            sweeps = 5 * w if self.options.get("fused") or self.form == "compile" else 8 * w
            return sweeps + (3 * w if self.clip else 0)
        if self.backend == "reference":
            return None
        gradient = w if self.options.get("numerator") == "gradient" else 0
        apply = m + 2 * w + 2 * kept + gradient
        if self.form == "apply":
            return apply
        first, second = w + 2 * m, apply
        if "max_grad_norm" in self.options:
            first, second = w + m, w + 2 * m + 2 * w + 2 * kept
        return first + second


def providers(backends: Sequence[str], dtype: torch.dtype, model: str = "") -> list[Provider]:
    """What is compared for parameters of ``dtype``, the most telling first.

    Args:
        backends: names of SOFIM's backends that run on the device; the reference among them is timed on small models.
        dtype: of parameters and gradients.
        model: its name; some are timed with AdamW and with other packages as well.
    """
    native = [name for name in backends if name != "reference"]
    found = [
        Provider(BASELINE, "sgd", {**SGDS, "fused": True}),
        *(_sofim(name, "plain") for name in native),
        Provider(f"{BASELINE}, clip_grad_norm_", "clipped sgd", {**SGDS, "fused": True}, clip=True),
        *([Provider("AdamW fused", "adamw", ADAMW)] if model in BESIDE_ADAMW else []),
    ]
    if model in BESIDE_PEERS:
        found += [Provider(name, "peer", SGDS, peer=peer) for name, peer in PEERS.items()]
    wide = dtype.itemsize > 2

    def each(kind: str, **arguments: Any) -> list[Provider]:
        return [_sofim(name, kind, **arguments) for name in native]

    found += [*each("guarded", **GUARD), *each("bfloat16 moment", state_dtype=BF16)]
    if wide:
        found += [
            *each("apply alone", form="apply"),
            *each("one launch", one_launch=True, largest=SINGLE),
            *each("two launches", one_launch=False, largest=SINGLE),
        ]
    else:
        found += [*each("no kahan", kahan=False), *each("bfloat16 moment, no kahan", state_dtype=BF16, kahan=False)]
    found += each("gradient form", numerator="gradient")
    if wide:
        found += each("CUDA graph", form="graph", capturable=True)
    found += [Provider("SGD foreach", "sgd foreach", {**SGDS, "foreach": True})]
    if wide:
        found += [Provider(f"{BASELINE}, CUDA graph", "sgd graph", {**SGDS, "fused": True}, form="graph")]
    if "reference" in backends:
        found += [_sofim("reference", "reference", largest=SMALL)]
    return found


def compiled_providers() -> list[Provider]:
    """SGD's step under ``torch.compile``, beside the baseline."""
    return [
        Provider(BASELINE, "sgd", {**SGDS, "fused": True}),
        Provider("SGD compiled", "sgd compiled", {**SGDS, "foreach": True}, form="compile"),
    ]


def _sofim(
    backend: str,
    kind: str,
    form: Literal["step", "apply", "graph"] = "step",
    one_launch: bool | None = None,
    largest: float = math.inf,
    **options: Any,
) -> Provider:
    name = f"SOFIM {backend}" + ("" if kind in ("plain", "reference") else f", {kind}")
    given = {**OURS, **options, "backend": backend}
    return Provider(name, kind, given, backend, form, one_launch=one_launch, largest=largest)


# Tensors


def rotation(set_bytes: int, cache_bytes: int, budget_bytes: int) -> int:
    """How many sets of tensors, used in turn, exceed a cache four times, as far as the memory goes; at least one.

    Args:
        set_bytes: that a step on one set touches at least.
        cache_bytes: the cache's size.
        budget_bytes: for all sets together.
    """
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
        self.shapes = list(shapes)
        self.dtype = dtype
        self.device = device
        self.elements = elements(self.shapes)
        generator = torch.Generator(device).manual_seed(1)
        self._sets = [(self._normal(0.02, generator), self._normal(1e-3, generator)) for _ in range(sets)]

    def __len__(self) -> int:
        return len(self._sets)

    def parameters(self, index: int, own_gradients: bool = False) -> list[Tensor]:
        """New parameters in the memory of set ``index``, with its gradients or with copies of them."""
        params: list[Tensor] = []
        for weight, grad in zip(*self._sets[index], strict=True):
            param = torch.nn.Parameter(weight)
            param.grad = grad.clone() if own_gradients else grad
            params.append(param)
        return params

    def _normal(self, deviation: float, generator: torch.Generator) -> list[Tensor]:
        return [
            torch.empty(shape, dtype=self.dtype, device=self.device).normal_(0, deviation, generator=generator)
            for shape in self.shapes
        ]


# Providers made ready


class Launches:
    """A backend's switch between one launch and two, turned only while a provider runs.

    Raises:
        UnavailableError: the backend has no such switch.
    """

    def __init__(self, backend: str, one: bool) -> None:
        try:
            self._module: Any = importlib.import_module(f"sofim_fused.backends.{backend}")
        except ImportError:
            self._module = None
        if not hasattr(self._module, "SINGLE_LAUNCH"):
            raise UnavailableError(f"the backend {backend} has no SINGLE_LAUNCH")
        self._one = one

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """The switch is turned inside, and back outside."""
        before = self._module.SINGLE_LAUNCH
        self._module.SINGLE_LAUNCH = self._one
        try:
            yield
        finally:
            self._module.SINGLE_LAUNCH = before


class Ready(NamedTuple):
    """A provider on a device: what to call, as often as wanted, and what has to surround the calls."""

    call: Callable[[], object]
    during: Callable[[], contextlib.AbstractContextManager[None]]
    optimizers: list[Optimizer]


def ready(provider: Provider, work: Workload, alive: Callable[[], object] = lambda: None) -> Ready:
    """Make a provider ready: its state, and whatever is compiled or captured, for each set of tensors.

    Args:
        provider: what to make ready.
        work: what it works on.
        alive: called after each set.

    Raises:
        UnavailableError: it cannot run on this device, in this version or in this way.
    """
    if provider.form in ("graph", "compile") and work.device.type != "cuda":
        raise UnavailableError("needs a GPU")
    if provider.form == "compile" and len(work) > 1:
        raise UnavailableError("a compiled step is bound to one set of tensors, and this model is measured on several")
    during: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    if provider.one_launch is not None:
        assert provider.backend is not None
        during = Launches(provider.backend, provider.one_launch)
    calls, optimizers = [], []
    pool = torch.cuda.graph_pool_handle() if provider.form == "graph" else None
    with during():
        for index in range(len(work)):
            params = work.parameters(index, own_gradients=provider.clip)
            optimizer = _optimizer(provider, params)
            optimizers.append(optimizer)
            if provider.form == "apply":
                calls.append(_second_pass(optimizer, params))
            elif provider.form == "graph":
                calls.append(_captured(optimizer, pool))
            elif provider.form == "compile":
                calls.append(_compiled(optimizer))
            else:
                calls.append(_clipped(optimizer, params) if provider.clip else optimizer.step)
            for _ in range(WARMUP):
                calls[-1]()
            alive()
    if len(calls) == 1:
        return Ready(calls[0], during, optimizers)
    turns = itertools.cycle(calls)
    return Ready(lambda: next(turns)(), during, optimizers)


def _optimizer(provider: Provider, params: list[Tensor]) -> Optimizer:
    if provider.peer:
        module, _, name = provider.peer.partition(":")
        options = dict(provider.options)
        if name == "FlashSGD" and params[0].dtype == torch.float32:
            options["master_weight_bits"] = None  # by default it keeps more bits than float32 has, which it refuses
        try:
            made: Optimizer = getattr(importlib.import_module(module), name)(params, **options)
        except ImportError as error:
            raise UnavailableError(f"{module} cannot be imported ({error})") from None
        return made
    if not provider.ours:
        return (AdamW if provider.kind == "adamw" else SGD)(params, **provider.options)
    try:
        return SOFIM(params, **provider.options)
    except ValueError as error:
        if "not available in this version" in str(error):
            raise UnavailableError(str(error)) from None
        raise


def _clipped(optimizer: Optimizer, params: list[Tensor]) -> Callable[[], object]:
    def step() -> None:
        clip_grad_norm_(params, MAX_GRAD_NORM, foreach=True)
        optimizer.step()

    return step


def _second_pass(optimizer: Optimizer, params: list[Tensor]) -> Callable[[], object]:
    assert isinstance(optimizer, SOFIM)
    for param in params:
        param.requires_grad_(False)  # a step runs under no_grad
    (share,) = optimizer._shares()
    n = len(params)
    decay = Decay(moment=[0.9] * n, gradient=[0.1] * n, weight=None, cross=False)
    rate = torch.full((n,), -OURS["lr"], dtype=torch.float64, device=share.tensors.device)
    coefficients = Coefficients(moment=rate)
    share.passes.accumulate(share.tensors, decay)  # so that the pass meets no zero moment
    return lambda: share.passes.apply(share.tensors, coefficients)


def _captured(optimizer: Optimizer, pool: Any) -> Callable[[], object]:
    """A replay of the step as a graph. ``torch.cuda.graph`` would collect garbage and empty caches for each."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for _ in range(3):
            optimizer.step()
        torch.cuda.synchronize()
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


def _compiled(optimizer: Optimizer) -> Callable[[], object]:
    @torch.compile
    def step() -> None:
        optimizer.step()

    with time_limit(COMPILING, "torch.compile"):
        step()
        step()
    return step


@contextlib.contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """End what takes longer, in the main thread.

    Raises:
        TimeoutError: it took longer.
    """

    def end(*_: object) -> None:
        raise TimeoutError(f"{what} was not done within {seconds:g} s")

    previous = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
