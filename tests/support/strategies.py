"""Strategies for hypothesis: models, hyperparameters and gradients in any legal combination.

Values are made from seeds that are drawn, not drawn one by one, so that counterexamples shrink to few tensors with
simple settings.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.support.oracle import Hyper
from tests.support.problems import NUMERATORS, Problem, _sliced

CHECKED: Counter[str] = Counter()
"""How many examples and mutations this process went through; pytest's summary shows it."""

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)
NARROW = (torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "permuted", "channels-last", "sliced", "offset")
# Around the sizes at which backends split a tensor.
LARGE = ((16_385,), (32_767,), (32_768,), (3, 10_923), (32_769,), (65_537,), (2, 4, 4_097))
SCHEDULES = ("plain", "guarded", "in_backward", "released")
FISHERS = ("model", "group", "parameter")
BAD = (math.nan, math.inf, -math.inf)


@dataclass(frozen=True)
class Shape:
    """A tensor without its values."""

    dtype: torch.dtype
    layout: str
    shape: tuple[int, ...]
    frozen: bool = False

    def empty(self) -> Tensor:
        shape, dtype = self.shape, self.dtype
        if self.layout == "permuted":
            order = random.Random(len(shape)).sample(range(len(shape)), len(shape))
            inverse = [order.index(at) for at in range(len(shape))]
            return torch.empty([shape[at] for at in order], dtype=dtype).permute(inverse)
        if self.layout == "channels-last" and len(shape) == 4:
            return torch.empty(shape, dtype=dtype).to(memory_format=torch.channels_last)
        if self.layout == "sliced" and shape and shape[-1] > 1:
            return _sliced(shape, dtype)
        if self.layout == "offset":
            return torch.empty(math.prod(shape) + 1, dtype=dtype)[1:].view(shape)
        return torch.empty(shape, dtype=dtype)


@dataclass(frozen=True)
class Settings:
    """The settings of one group."""

    hyper: Hyper
    state_dtype: torch.dtype | None = None
    kahan: bool | None = None
    tensors: torch.dtype | None = None  # of lr and rho as tensors; None: as floats

    def options(self) -> dict[str, Any]:
        """The settings as a group dict."""
        lr, rho = self.hyper.lr, self.hyper.rho
        wrap = self.tensors is not None
        return {
            "lr": torch.tensor(lr, dtype=self.tensors) if wrap else lr,
            "rho": torch.tensor(rho, dtype=self.tensors) if wrap else rho,
            "momentum": self.hyper.momentum,
            "weight_decay": self.hyper.weight_decay,
            "decoupled_weight_decay": self.hyper.decoupled,
            "maximize": self.hyper.maximize,
            "state_dtype": self.state_dtype,
            "kahan": self.kahan,
        }


@dataclass(frozen=True)
class Case:
    """A model, an optimizer's options, and the gradients of a few steps.

    Attributes:
        group_of: the index into ``settings`` of each tensor; in order. A group may be empty.
        missing: the share of gradients that a step lacks.
        spoiled: the share of steps in whose gradients there is a NaN or an infinity.
    """

    tensors: tuple[Shape, ...]
    group_of: tuple[int, ...]
    settings: tuple[Settings, ...]
    numerator: str = "moment"
    fisher: str = "model"
    schedule: str = "plain"
    max_grad_norm: float | None = None
    skip_nonfinite: bool = False
    seed: int = 0
    steps: int = 2
    weight_scale: float = 1.0
    gradient_scale: float = 1.0
    pattern: str = "normal"
    missing: float = 0.0
    spoiled: float = 0.0
    ready: bool = False
    reload: int | None = None  # before this step, through a state dict
    change: int | None = None  # before this step, hyperparameters as schedulers do
    strange: bool = False  # gradients: other strides, lazy conjugation, float32 for 16-bit parameters

    @property
    def whole(self) -> dict[str, Any]:
        """The constructor's options."""
        options: dict[str, Any] = {"numerator": self.numerator, "fisher": self.fisher}
        if self.schedule == "guarded":
            options.update(max_grad_norm=self.max_grad_norm, skip_nonfinite=self.skip_nonfinite)
        elif self.schedule != "plain":
            options.update(in_backward=True, release_grads=self.schedule == "released")
        return options

    def problem(self) -> Problem:
        """Parameters with their values, the same at each call."""
        generator = torch.Generator().manual_seed(self.seed)
        params = []
        for shape in self.tensors:
            x = filled(shape.empty(), self.weight_scale, "normal", generator)
            params.append(torch.nn.Parameter(x, requires_grad=not shape.frozen))
        groups = [
            {"params": [p for p, g in zip(params, self.group_of, strict=True) if g == index], **settings.options()}
            for index, settings in enumerate(self.settings)
        ]
        hypers = [self.settings[g].hyper for g in self.group_of]
        return Problem(groups, hypers, list(self.group_of), generator)

    def gradients(self) -> Iterator[list[Tensor | None]]:
        """The gradients of each step, the same at each call: a drift plus noise."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        choice = random.Random(self.seed)
        drifts = [filled(t.empty(), self.gradient_scale, self.pattern, generator) for t in self.tensors]
        for step in range(self.steps):
            grads: list[Tensor | None] = []
            for shape, drift in zip(self.tensors, drifts, strict=True):
                grad = filled(torch.empty_like(drift), 0.5 * self.gradient_scale, self.pattern, generator).add_(drift)
                grads.append(self._shaped(grad, step, choice))
                if shape.frozen or choice.random() < self.missing:
                    grads[-1] = None
            if choice.random() < self.spoiled:
                spoil([g for g in grads if g is not None and g.numel()], choice)
            yield grads

    def _shaped(self, grad: Tensor, step: int, choice: random.Random) -> Tensor:
        if not self.strange:
            return grad
        kind = choice.randrange(5)
        if kind == 0 and grad.dim() >= 2:
            return grad.transpose(0, 1).contiguous().transpose(0, 1)
        if kind == 1 and grad.is_complex():
            return grad.conj()
        if kind == 2 and grad.numel() and not grad.is_complex():
            return grad.reshape(-1)[0].expand(grad.shape)  # as of a sum
        if kind == 3 and not grad.is_complex():
            return torch._neg_view(grad)
        if kind == 4 and grad.dtype in NARROW and self.schedule in ("plain", "guarded"):
            return grad.float()
        return grad


def filled(x: Tensor, scale: float, pattern: str, generator: torch.Generator) -> Tensor:
    """``x``, with values."""
    for part in (x.real, x.imag) if x.is_complex() else (x,):
        values = torch.randn(part.shape, generator=generator, dtype=torch.float64)
        if pattern == "zero":
            values.zero_()
        elif pattern == "constant":
            values.fill_(1.0)
        elif pattern == "sparse":
            values[torch.rand(part.shape, generator=generator) < 0.9] = 0.0
        elif pattern == "wide":
            values *= 10 ** (4 * torch.rand(part.shape, generator=generator, dtype=torch.float64) - 3)
        part.copy_(values * scale)
    return x


def spoil(grads: list[Tensor], choice: random.Random) -> None:
    """Put a NaN or an infinity somewhere."""
    if not grads:
        return
    grad = choice.choice(grads)
    value = choice.choice(BAD)
    place = tuple(choice.randrange(n) for n in grad.shape)
    # In an expanded or lazily conjugated gradient, other elements may show it as well.
    grad[place] = complex(value, 0.0) if grad.is_complex() else value


# Powers of ten, in tenths: they shrink to 1.
def _powers(low: int, high: int) -> st.SearchStrategy[float]:
    return st.integers(10 * low, 10 * high).map(lambda tenths: 10 ** (tenths / 10))


_seeds = st.integers(0, 2**32 - 1)
_counts = st.one_of(st.integers(1, 5), st.integers(1, 40))
# From simple to large, each as a single draw, because hypothesis spends its time on draws.
_SHAPES = sorted(
    {
        *((n,) for n in range(300)),
        *product(range(13), range(21)),
        *product(range(0, 13, 2), range(1, 6), range(1, 6)),
        *product(range(4), range(1, 5), range(1, 6, 2), range(1, 6)),
    },
    key=lambda shape: (len(shape), math.prod(shape)),
)
_shapes = st.sampled_from(((),) * 40 + tuple(_SHAPES))
_large = st.sampled_from((None,) * 23 + (LARGE,)).flatmap(lambda of: st.none() if of is None else st.sampled_from(of))
_momenta = st.one_of(st.sampled_from((0.9, 0.0, 0.5, 0.99, 0.999)), st.floats(0.0, 0.9999))
_shares = st.sampled_from((0.0, 0.0, 0.0, 0.3, 0.8))
_patterns = st.sampled_from(("normal", "normal", "normal", "constant", "sparse", "wide", "zero"))
_flags = st.booleans()
_seldom = st.sampled_from((False, False, False, False, True))
_kahans = st.sampled_from((None, True, False))
_state_dtypes = st.sampled_from((None, None, torch.bfloat16, torch.float32))
_tensors = st.sampled_from((None, None, None, torch.float64, torch.float32))


@dataclass
class Ranges:
    """The ranges that a property leaves open, in decades (powers of ten).

    Attributes:
        regime: ρ relative to the gradients' squared norm; its inverse is ‖m̂‖²/ρ.
        length: the learning rate relative to one that moves the weights by their own size.
    """

    dtypes: Sequence[torch.dtype] = DTYPES
    schedules: Sequence[str] = ("plain", "guarded")
    fishers: Sequence[str] = FISHERS
    numerators: Sequence[str] = NUMERATORS
    regime: tuple[int, int] = (-6, 6)
    length: tuple[int, int] = (-3, 1)
    scale: tuple[int, int] = (-4, 3)
    max_groups: int = 4
    narrow_moments: bool = True
    spoiled: bool = True
    one_tensor_more: bool = True  # sometimes a large one
    extra: dict[str, Any] = field(default_factory=dict)


@st.composite
def cases(draw: st.DrawFn, ranges: Ranges) -> Case:
    """Any legal combination within the ranges."""
    schedule = draw(st.sampled_from(tuple(ranges.schedules)))
    numerator = draw(st.sampled_from(tuple(ranges.numerators)))
    hooked = schedule in ("in_backward", "released")
    dtypes = [d for d in ranges.dtypes if not (hooked and numerator != "moment" and d in NARROW)]
    few = draw(_flags)
    chosen = dtypes[: draw(st.integers(1, len(dtypes)))] if few else dtypes
    kinds = st.sampled_from(tuple(product(chosen, LAYOUTS)))
    with_frozen = draw(_seldom)
    tensors = [Shape(*draw(kinds), draw(_shapes), with_frozen and draw(_seldom)) for _ in range(draw(_counts))]
    large = draw(_large) if ranges.one_tensor_more else None
    if large is not None:
        tensors.append(Shape(*draw(kinds), large))
    count = draw(st.integers(1, ranges.max_groups))
    cuts = sorted(draw(st.lists(st.integers(0, len(tensors)), min_size=count - 1, max_size=count - 1)))
    group_of = tuple(sum(at >= cut for cut in cuts) for at in range(len(tensors)))

    weight_scale = draw(_powers(-2, 1))
    gradient_scale = draw(_powers(*ranges.scale))
    elements = max(1, sum(math.prod(t.shape) for t in tensors))
    square = gradient_scale**2 * elements
    common = draw(_powers(*ranges.regime))
    settings = []
    for index in range(count):
        mine = {t.dtype for t, g in zip(tensors, group_of, strict=True) if g == index}
        tensor_dtype = draw(_tensors)
        rho = max(1e-30, square * common * draw(_powers(0, 1)))
        lr = rho**0.5 * weight_scale * draw(_powers(*ranges.length)) * (not draw(_seldom) or draw(_flags))
        if tensor_dtype is not None:
            lr, rho = (float(torch.tensor(x, dtype=tensor_dtype)) for x in (lr, rho))
        decoupled = draw(_flags)
        decay = draw(_powers(-3, 0)) * draw(_flags)
        unit = (0.5 / lr if lr else 1.0) if decoupled else gradient_scale / weight_scale
        narrow = ranges.narrow_moments and torch.float64 not in mine and torch.complex64 not in mine
        settings.append(
            Settings(
                Hyper(lr, draw(_momenta), rho, decay * unit, decoupled, draw(_seldom)),
                draw(_state_dtypes) if narrow else None,
                draw(_kahans),
                tensor_dtype,
            )
        )
    norm = None
    if schedule == "guarded":
        norm = draw(st.sampled_from(("none", "inf", "some", "some")))
        norm = {"none": None, "inf": math.inf}.get(norm, square**0.5 * draw(_powers(-2, 1)))
    skip = schedule == "guarded" and (norm is None or draw(_flags))
    steps = draw(st.integers(1, 4))
    return Case(
        tensors=tuple(tensors),
        group_of=group_of,
        settings=tuple(settings),
        numerator=numerator,
        fisher=draw(st.sampled_from(tuple(ranges.fishers))),
        schedule=schedule,
        max_grad_norm=norm,
        skip_nonfinite=skip,
        seed=draw(_seeds),
        steps=steps,
        weight_scale=weight_scale,
        gradient_scale=gradient_scale,
        pattern=draw(_patterns),
        missing=draw(_shares),
        spoiled=draw(_shares) if skip and ranges.spoiled else 0.0,
        ready=draw(_flags),
        reload=draw(st.none() | st.integers(1, 3)),
        change=draw(st.none() | st.integers(1, 3)),
        strange=draw(_flags),
        **ranges.extra,
    )


def with_hypers(case: Case, change: Any) -> Case:
    """The case with ``change`` made to the hyperparameters of each group."""
    return replace(case, settings=tuple(replace(s, hyper=change(s.hyper)) for s in case.settings))
