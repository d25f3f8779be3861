"""The optimizers of the comparisons, and the twelve configurations among which each is tuned."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adafactor, AdamW, NAdam, Optimizer

from bench.convergence.nystrom import NystromSGD
from sofim_fused import SOFIM

__all__ = ["CONFIGURATIONS", "CONTENDERS", "LINEUPS", "Contender", "Lineup", "Settings", "layers", "memory", "scaled"]

CONFIGURATIONS = 12
MOMENTUM = 0.9
COLUMNS, PERIOD = 10, 20  # of Nyström-SGD
HISTORY = 10  # of L-BFGS
DECAY = 0.01  # of weights: the default of AdamW and of AdaSOFIM

Settings = Mapping[str, Any]
Numerator = Literal["moment", "gradient", "nesterov"]
Diagonal = Literal["tensor", "row", "factored", "element"]
Fisher = Literal["model", "group", "parameter"]


@dataclass(frozen=True)
class Contender:
    """An optimizer as it takes part.

    Attributes:
        name: as the command line and the records have it.
        label: as tables and figures have it.
        build: the optimizer of a model, by its settings.
        grid: settings to choose from.
        gradients: how a step gets them: ``"plain"``; with the ``"graph"`` that Hessian-vector products need; or by a
            ``"closure"`` that the step may call several times.
        rates: whose factor the rates of the grid are multiplied by on a task (``Task.factors``).
    """

    name: str
    label: str
    build: Callable[[nn.Module, Settings], Optimizer]
    grid: Sequence[Settings]
    gradients: Literal["plain", "graph", "closure"] = "plain"
    rates: str = ""

    @property
    def varied(self) -> list[str]:
        """The settings that the grid varies."""
        return [name for name in self.grid[0] if len({entry[name] for entry in self.grid}) > 1]

    def edges(self, settings: Settings) -> list[str]:
        """Which numbers are the lowest or the highest of the grid, so that better ones may lie outside.

        In a setting with two values both would be at an edge, which says nothing: those are left out.
        """
        found = []
        for name in self.varied:
            values = {entry[name] for entry in self.grid}
            if len(values) > 2 and settings[name] in (min(values), max(values)):
                found.append(name)
        return found

    def hessian_products(self, optimizer: Optimizer) -> int:
        """Hessian-vector products that the next step takes."""
        if isinstance(optimizer, NystromSGD):
            return optimizer.columns if optimizer.needs_graph else 0
        return 1 if self.gradients == "graph" else 0


def layers(model: nn.Module) -> list[dict[str, Any]]:
    """A parameter group for each layer: what ``fisher="group"`` has a matrix for."""
    return [
        {"params": params}
        for module in model.modules()
        if (params := [p for _, p in module.named_parameters("", False)])
    ]


def _grid(**values: Sequence[Any]) -> list[Settings]:
    grid: list[Settings] = [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]
    assert len(grid) == CONFIGURATIONS
    return grid


def _sofim(numerator: Numerator, fisher: Fisher, model: nn.Module, settings: Settings) -> Optimizer:
    rho = settings["rho"]
    lr = settings["lr/rho"] * rho
    momentum = settings.get("momentum", MOMENTUM)
    return SOFIM(layers(model), lr=lr, momentum=momentum, rho=rho, numerator=numerator, fisher=fisher)


def _adaptive(diagonal: Diagonal, numerator: Numerator, model: nn.Module, settings: Settings) -> Optimizer:
    chosen = {"rho": None, "weight_decay": DECAY, **settings}
    return SOFIM(model.parameters(), diagonal=diagonal, numerator=numerator, **chosen)


def _sgd(model: nn.Module, settings: Settings) -> Optimizer:
    return SGD(model.parameters(), lr=settings["lr"], momentum=settings["momentum"], fused=True)


def _nesterov(model: nn.Module, settings: Settings) -> Optimizer:
    return SGD(model.parameters(), lr=settings["lr"], momentum=settings["momentum"], nesterov=True, fused=True)


def _adamw(model: nn.Module, settings: Settings) -> Optimizer:
    return AdamW(model.parameters(), lr=settings["lr"], weight_decay=settings["weight_decay"], fused=True)


def _adamw_beta2(model: nn.Module, settings: Settings) -> Optimizer:
    betas = (MOMENTUM, settings["beta2"])
    return AdamW(model.parameters(), lr=settings["lr"], betas=betas, weight_decay=DECAY, fused=True)


def _nadam(model: nn.Module, settings: Settings) -> Optimizer:
    betas = (MOMENTUM, settings["beta2"])
    return NAdam(model.parameters(), lr=settings["lr"], betas=betas, weight_decay=DECAY, decoupled_weight_decay=True)


def _adafactor(model: nn.Module, settings: Settings) -> Optimizer:
    return Adafactor(model.parameters(), lr=settings["lr"], beta2_decay=settings["beta2_decay"])


def _lbfgs(model: nn.Module, settings: Settings) -> Optimizer:
    return LBFGS(
        model.parameters(),
        lr=settings["lr"],
        max_iter=settings["max_iter"],
        history_size=HISTORY,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        line_search_fn=settings["line_search"],
    )


def _adahessian(model: nn.Module, settings: Settings) -> Optimizer:
    from pytorch_optimizer import AdaHessian  # what does not compare it does not take the package

    return AdaHessian(model.parameters(), lr=settings["lr"], hessian_power=settings["hessian_power"])


def _nystrom(model: nn.Module, settings: Settings) -> Optimizer:
    rho = settings["rho"]
    return NystromSGD(model.parameters(), lr=settings["lr/rho"] * rho, rho=rho, columns=COLUMNS, period=PERIOD)


# Far below the trust region lr/rho is to SOFIM what lr/(1 - momentum) is to SGD, and lr to a method without momentum.
_SOFIM_GRID = {
    "model": _grid(**{"lr/rho": (0.1, 0.25, 0.6, 1.5), "rho": (0.1, 1.0, 10.0)}),
    "group": _grid(**{"lr/rho": (0.1, 0.25, 0.6, 1.5), "rho": (0.03, 0.3, 3.0)}),
    "parameter": _grid(**{"lr/rho": (0.1, 0.25, 0.6, 1.5), "rho": (0.03, 0.3, 3.0)}),
}
# Its noise is that of single gradients: shorter steps, more damping.
_GRADIENT_GRID = {
    "model": _grid(**{"lr/rho": (0.03, 0.1, 0.3, 1.0), "rho": (0.3, 1.0, 10.0)}),
    "group": _grid(**{"lr/rho": (0.03, 0.1, 0.3, 1.0), "rho": (0.1, 0.3, 3.0)}),
    "parameter": _grid(**{"lr/rho": (0.03, 0.1, 0.3, 1.0), "rho": (0.1, 0.3, 3.0)}),
}


_SGD_GRID = _grid(lr=(0.005, 0.01, 0.02, 0.04, 0.08, 0.16), momentum=(0.9, 0.95))
_ADAM_RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
_ADAPTIVE_GRID = _grid(lr=_ADAM_RATES, beta2=(0.99, 0.999))


def _all() -> Iterator[Contender]:
    marks: dict[Fisher, str] = {"model": "", "group": ", per layer", "parameter": ", per tensor"}
    for fisher, mark in marks.items():
        name = "sofim" + (f"-{fisher}" if mark else "")
        build = partial(_sofim, "moment", fisher)
        yield Contender(name, f"SOFIM{mark}", build, _SOFIM_GRID[fisher], rates="sofim")
    for fisher, mark in marks.items():
        name = "sofim-gradient" + (f"-{fisher}" if mark else "")
        build = partial(_sofim, "gradient", fisher)
        yield Contender(name, f"SOFIM gradient{mark}", build, _GRADIENT_GRID[fisher], rates="sofim-gradient")
    yield Contender("sgd", "SGD-momentum", _sgd, _SGD_GRID, rates="sgd")
    yield Contender("adamw", "AdamW", _adamw, _grid(lr=_ADAM_RATES, weight_decay=(0.0, DECAY)), rates="adam")
    yield Contender(
        "lbfgs",
        "L-BFGS",
        _lbfgs,
        _grid(lr=(0.1, 0.3, 1.0), max_iter=(1, 3), line_search=(None, "strong_wolfe")),
        gradients="closure",
        rates="lbfgs",
    )
    yield Contender(
        "adahessian",
        "AdaHessian",
        _adahessian,
        _grid(lr=(0.003, 0.01, 0.03, 0.1, 0.2, 0.4), hessian_power=(0.5, 1.0)),
        gradients="graph",
        rates="adahessian",
    )
    yield Contender(
        "nystrom",
        "Nyström-SGD",
        _nystrom,
        _grid(**{"lr/rho": (0.03, 0.1, 0.3, 1.0), "rho": (0.1, 1.0, 10.0)}),
        gradients="graph",
        rates="nystrom",
    )
    # Optimizers whose steps are of Adam's size have the same twelve: its rates, with two decays of the mean of g².
    yield Contender("adamw-beta2", "AdamW", _adamw_beta2, _ADAPTIVE_GRID, rates="adam")
    yield Contender("nadam", "NAdam", _nadam, _ADAPTIVE_GRID, rates="adam")
    diagonals: tuple[Diagonal, ...] = ("tensor", "row", "factored", "element")
    for diagonal in diagonals:
        name, label = f"sofim-{diagonal}", f"SOFIM, {diagonal}"
        build = partial(_adaptive, diagonal, "nesterov")
        yield Contender(name, f"{label}, look-ahead", build, _ADAPTIVE_GRID, rates="adam")
        if diagonal != "tensor":
            build = partial(_adaptive, diagonal, "moment")
            yield Contender(f"{name}-moment", label, build, _ADAPTIVE_GRID, rates="adam")
    # With ρ the term of rank one shortens steps, so the grid has the upper rates.
    yield Contender(
        "sofim-factored-rho",
        "SOFIM, factored, look-ahead, finite ρ",
        partial(_adaptive, "factored", "nesterov"),
        _grid(lr=_ADAM_RATES[2:], rho=(0.1, 0.3, 1.0)),
        rates="adam",
    )
    yield Contender("sgd-nesterov", "SGD-Nesterov", _nesterov, _SGD_GRID, rates="sgd")
    # Its rate is relative to the size of a tensor's weights, about 0.1. It has no momentum, and its decay of the mean
    # of g² is 1 - 1/t^0.8 by default; with 0.6 it forgets faster.
    yield Contender(
        "adafactor",
        "Adafactor",
        _adafactor,
        _grid(lr=tuple(10 * rate for rate in _ADAM_RATES), beta2_decay=(-0.8, -0.6)),
        rates="adam",
    )


def scaled(contender: Contender, factors: Mapping[str, float]) -> Contender:
    """With the rates of its grid multiplied, so that the best of them lie inside.

    Args:
        contender: an optimizer.
        factors: by ``Contender.rates``; 1 where there is none.
    """
    factor = factors.get(contender.rates, 1.0)
    rate = "lr/rho" if "lr/rho" in contender.grid[0] else "lr"
    grid = [{**settings, rate: float(f"{settings[rate] * factor:.6g}")} for settings in contender.grid]
    return replace(contender, grid=grid)


CONTENDERS = {contender.name: contender for contender in _all()}


@dataclass(frozen=True)
class Lineup:
    """Optimizers that are compared with each other.

    Attributes:
        name: as the command line has it.
        contenders: by name, in the order in which they are run.
        baseline: the one that the others' losses are compared with.
        first_seed: of the runs to compare by.
        timed: whether the runs' seconds say anything: not where other programs used the machine.
        seeds: how many runs each has to compare by.
        shares: the line-up whose tuning runs it shares, by being in the same file; empty: it has a file of its own.
    """

    name: str
    contenders: tuple[str, ...]
    baseline: str
    first_seed: int
    timed: bool
    seeds: int = 5
    shares: str = ""


# What the paper compares itself with; and what someone who uses AdamW would compare. Each has seeds of its own.
LINEUPS = {
    "adaptive": Lineup(
        "adaptive",
        (
            "adamw-beta2",
            "sofim-factored",
            "sgd",
            "nadam",
            "sofim-element",
            "sofim-row",
            "sofim-tensor",
            "sofim-factored-moment",
            "adafactor",
            "sgd-nesterov",
            "sofim",
            "sofim-factored-rho",
            "sofim-row-moment",
            "sofim-element-moment",
            "adahessian",
        ),
        baseline="adamw-beta2",
        first_seed=10,
        timed=False,
    ),
    # Differences that five seeds could not settle, from twenty others.
    "confirmation": Lineup(
        "confirmation",
        ("adamw-beta2", "sofim-factored"),
        baseline="adamw-beta2",
        first_seed=30,
        timed=False,
        seeds=20,
        shares="adaptive",
    ),
    "published": Lineup(
        "published",
        (
            "sofim",
            "sofim-group",
            "sofim-parameter",
            "sofim-gradient",
            "sofim-gradient-group",
            "sofim-gradient-parameter",
            "sgd",
            "adamw",
            "lbfgs",
            "adahessian",
            "nystrom",
        ),
        baseline="sgd",
        first_seed=0,
        timed=True,
    ),
}


def memory(optimizer: Optimizer) -> int:
    """Bytes of the tensors that an optimizer keeps from one step to the next."""
    seen: dict[int, int] = {}

    def visit(value: object) -> None:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, Mapping):
            for part in value.values():
                visit(part)
        elif isinstance(value, list | tuple):
            for part in value:
                visit(part)

    visit(list(optimizer.state.values()))
    if isinstance(optimizer, NystromSGD):
        visit(optimizer.factor)
    return sum(seen.values())


def gradients_by(contender: Contender, optimizer: Optimizer, loss: Tensor, params: list[nn.Parameter]) -> None:
    """Put gradients into ``.grad``, with a graph where the next step needs it."""
    if contender.hessian_products(optimizer):
        # backward(create_graph=True) would warn of the cycle that zero_grad() breaks.
        for p, g in zip(params, torch.autograd.grad(loss, params, create_graph=True), strict=True):
            p.grad = g
    else:
        loss.backward()
