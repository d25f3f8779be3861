"""Shared by tests of backends: what is launched, copied or left to Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sofim_fused import SOFIM, native


def module() -> Any:
    """The extension, which has to be there."""
    found = native.cuda()
    assert not isinstance(found, str), found
    return found


def launches(work: Callable[[], object]) -> int:
    """How many kernels it launches."""
    before = module().launches()
    work()
    return int(module().launches() - before)


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Subclass(Tensor):
    pass


def _state(optimizer: SOFIM) -> dict[str, Any]:
    return optimizer.state[optimizer.param_groups[1]["params"][0]]


def _set(name: str, value: Any) -> Callable[[SOFIM], None]:
    def change(optimizer: SOFIM) -> None:
        optimizer.param_groups[1][name] = value

    return change


def _set_state(name: str, value: Any) -> Callable[[SOFIM], None]:
    def change(optimizer: SOFIM) -> None:
        _state(optimizer)[name] = value

    return change


def set_grad(make: Callable[[Tensor], Tensor]) -> Callable[[SOFIM], None]:
    def change(optimizer: SOFIM) -> None:
        p = optimizer.param_groups[1]["params"][0]
        p.grad_dtype = None
        p.grad = make(p.grad)

    return change


LEFT_TO_PYTHON: dict[str, Callable[[SOFIM], None]] = {
    "no state": lambda optimizer: optimizer.state.pop(optimizer.param_groups[1]["params"][0]),
    "no moment": lambda optimizer: _state(optimizer).pop("exp_avg"),
    "no count": lambda optimizer: _state(optimizer).pop("step"),
    "lr is NaN": _set("lr", float("nan")),
    "lr is negative": _set("lr", -0.1),
    "lr is a string": _set("lr", "0.1"),
    "lr has two elements": _set("lr", torch.ones(2)),
    "lr is complex": _set("lr", torch.ones((), dtype=torch.complex64)),
    "momentum is 1": _set("momentum", 1.0),
    "momentum is a tensor": _set("momentum", torch.tensor(0.9)),
    "rho is 0": _set("rho", 0.0),
    "rho is True": _set("rho", True),
    "a huge integer": _set("rho", 10**400),
    "weight_decay is infinite": _set("weight_decay", float("inf")),
    "maximize is 1": _set("maximize", 1),
    "no decoupled_weight_decay": lambda optimizer: optimizer.param_groups[1].pop("decoupled_weight_decay"),
    "kahan is a string": _set("kahan", "on"),
    "state_dtype is a string": _set("state_dtype", "bfloat16"),
    "state_dtype is float16": _set("state_dtype", torch.float16),
    "state_dtype is not the state's": _set("state_dtype", torch.bfloat16),
    "groups that disagree": _set("numerator", "gradient"),
    "an unknown fisher": lambda optimizer: [group.update(fisher="layer") for group in optimizer.param_groups],
    "max_grad_norm is 0": lambda optimizer: [group.update(max_grad_norm=0.0) for group in optimizer.param_groups],
    "skip_nonfinite is 1": lambda optimizer: [group.update(skip_nonfinite=1) for group in optimizer.param_groups],
    "a count of float32": _set_state("step", torch.tensor(1.0)),
    "a moment of another shape": _set_state("exp_avg", torch.zeros(39)),
    "a moment of another dtype": _set_state("exp_avg", torch.zeros(40, dtype=torch.float64)),
    "a moment on another device": _set_state("exp_avg", torch.zeros(40, device="meta")),
    "a moment that is none": _set_state("exp_avg", 0.0),
    "a gradient of another dtype": set_grad(lambda g: g.double()),
    "a sparse gradient": set_grad(lambda g: g.to_sparse()),
    "a parameter that is none": lambda optimizer: optimizer.param_groups[1]["params"].append("w"),
}


class Transfers(TorchDispatchMode):
    """Collects what moves between devices. Reading a value, or a shape that depends on one, raises by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim() + x.numel() > 1]
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if len({x.device for x in given + made}) > 1:
            self.seen.append(str(func))
        return result


def adaptive_operator_samples(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    """Every operator of a step whose diagonal adapts, with arguments: one tensor of each diagonal, in two groups."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(4, 3), (4, 3), (4, 3), (7,)]

    def some() -> list[Tensor]:
        return [torch.randn(shape, generator=generator).to(device) for shape in shapes]

    def double(*values: float) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device)

    w, g, m = some(), some(), some()
    none = [torch.zeros(0, device=device)] * 4
    kinds = [1, 2, 3, 4]
    element = [*none[:3], torch.ones(7, device=device)]
    row_vars = [none[0], torch.ones(4, device=device), torch.ones(4, device=device), none[0]]
    col_vars = [*none[:2], torch.ones(3, device=device), none[0]]
    variances = [torch.ones((), device=device), *none[:2], element[3]]
    counts = [torch.tensor(2, device=device) for _ in shapes], [0, 1, 2, 3]
    hyper = double(0.1, 0.9, 0.5, 0.01, 0.0, 1.0, 0.99, 1e-8).repeat(2, 1)
    fours = double(0.1, 0.2, 0.3, 0.4)
    settings = counts[0], hyper, [1, 3]
    adapted = (*settings, kinds, [1, 4, 4, 1], [12, 3, 3, 7], row_vars, col_vars, variances)
    sums = fours, double(*range(8)), double(*range(3))
    factors = [0.9] * 4, [0.1] * 4
    scales = (double(*range(9)), double(*range(3)), *[fours] * 4)
    skip = torch.zeros((), dtype=torch.bool, device=device)
    return [
        ("squares", (g, kinds)),
        ("adapt", (*adapted, *sums, False, None, None, None, None, False)),
        ("adapt", (*adapted, *sums, True, fours[0], 0.5, fours[1], fours[2].clone(), True)),
        ("accumulate_scaled", (w, g, m, [], element, kinds, *counts, *factors, *scales, None, None, [])),
        ("apply_scaled", (w, g, m, [], none, element, kinds, *counts, fours, None, None, *scales, None, None, [])),
        (
            "commit_scaled",
            (w, g, m, [], none, element, kinds, *counts, *factors, *[fours] * 3, *scales, fours[0], skip, []),
        ),
        ("fold_scaled", (fours, fours, fours, *settings, 1, 2, torch.tensor([0, 1, 0, 1], device=device), 2)),
        ("solve_scaled", (None, None, *settings, 0, 2)),
        ("solve_scaled", (double(*range(1, 9)).view(4, 2), skip, *settings, 1, 0)),
    ]
