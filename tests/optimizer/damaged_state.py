"""Optimizers whose state dicts tests damage, and what has to hold for one that was loaded all the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sofim_fused import SOFIM, blockwise
from sofim_fused.checks import STATE, VARIANCES
from sofim_fused.step import gather
from tests.in_backward.support import backward
from tests.support.problems import give, same_bits, snapshot

WHOLE = ("numerator", "fisher", "max_grad_norm", "skip_nonfinite")


def _with_rows(**settings: Any) -> list[dict[str, Any]]:
    """The groups of :func:`_two_groups`, with a parameter in each whose moment may be in 8 bits."""
    groups = _two_groups(F32, BF16, **settings)
    for i, group in enumerate(groups):
        group["params"][i] = (f"layer.{3 * i}", nn.Parameter(torch.ones(32, 130)))
    return groups


def _two_groups(*dtypes: torch.dtype, **settings: Any) -> list[dict[str, Any]]:
    shapes = ((3, 4), (), (5,), (2, 3))
    params = [nn.Parameter(torch.ones(shape, dtype=dtypes[i % len(dtypes)])) for i, shape in enumerate(shapes)]
    params[3] = nn.Parameter(torch.ones(3, 2, dtype=params[3].dtype).t())
    named = [(f"layer.{i}", p) for i, p in enumerate(params)]
    return [{"params": named[:2], **settings}, {"params": named[2:], "lr": 0.1, **settings}]


F32, BF16 = torch.float32, torch.bfloat16
# Groups and options. The last parameter of the first group has no state in any.
KINDS: dict[str, Callable[[], tuple[list[dict[str, Any]], dict[str, Any]]]] = {
    "float32": lambda: (_two_groups(F32), {}),
    "kahan": lambda: (_two_groups(BF16, torch.float16, F32), {"backend": "reference", "kahan": True}),
    "master bits": lambda: (_two_groups(BF16, torch.float16, F32), {}),
    "24 bits": lambda: (_two_groups(BF16, F32), {"master_weight_bits": 24}),
    "bf16-moments": lambda: (_two_groups(BF16, F32), {"state_dtype": BF16}),
    "8-bit-moments": lambda: (_with_rows(), {"state_dtype": torch.float8_e4m3fn, "backend": "reference"}),
    "8-bit-second-moments": lambda: (
        _with_rows(),
        {"state_dtype": torch.float8_e4m3fn, "diagonal": "element", "backend": "reference"},
    ),
    "wide": lambda: (_two_groups(torch.complex64, torch.float64), {}),
    "gradient": lambda: (
        _two_groups(F32),
        {"numerator": "gradient", "fisher": "group", "weight_decay": 0.1, "decoupled_weight_decay": False},
    ),
    "guarded": lambda: (_two_groups(F32, BF16), {"max_grad_norm": 1.0, "skip_nonfinite": True}),
    "tensors": lambda: (
        _two_groups(F32, rho=torch.tensor(0.5)),
        {"lr": torch.tensor([0.1]), "fisher": "parameter", "backend": "reference"},
    ),
    "factored": lambda: (_two_groups(F32, BF16), {"diagonal": "factored", "numerator": "nesterov"}),
    "elements": lambda: (
        _two_groups(F32, torch.float64),
        {"diagonal": "element", "rho": 0.5, "fisher": "group", "max_grad_norm": 1.0},
    ),
    "in-backward": lambda: (_two_groups(F32, BF16), {"in_backward": True}),
    "released": lambda: (
        _two_groups(F32, torch.float64),
        {"in_backward": True, "release_grads": True, "numerator": "gradient"},
    ),
}


@dataclass
class Subject:
    """An optimizer that state dicts are loaded into, with a good one, and a twin of it."""

    optimizer: SOFIM
    saved: dict[str, Any]
    twin: SOFIM
    grads: list[Tensor]
    weights: list[Tensor] = field(default_factory=list)

    @property
    def params(self) -> list[Tensor]:
        return params_of(self.optimizer)


def params_of(optimizer: SOFIM) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def subject(kind: str) -> Subject:
    optimizers = []
    for _ in range(2):
        groups, options = KINDS[kind]()
        optimizers.append(SOFIM(groups, **options))
    first, twin = optimizers
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for p in params_of(first)]
    for _ in range(2):
        step(first, [None if i == 1 else g for i, g in enumerate(grads)])
    return Subject(first, first.state_dict(), twin, grads, [p.detach().clone() for p in params_of(first)])


def step(optimizer: SOFIM, grads: list[Any]) -> None:
    params = params_of(optimizer)
    if optimizer._in_backward:
        optimizer.zero_grad()
        backward(params, grads)
    else:
        give(params, grads)
    optimizer.step()


class Tagged(torch.Tensor):
    """A subclass without ways of its own."""


def outline(saved: Any) -> Any:
    """A state dict to be damaged: containers of its own, and the same tensors."""
    if isinstance(saved, dict):
        return {key: outline(inner) for key, inner in saved.items()}
    return [outline(inner) for inner in saved] if isinstance(saved, list) else saved


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return same_bits([a], [b])
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and bool(a == b)


@dataclass
class Image:
    """All that a refused state dict must leave as it was."""

    tensors: list[Tensor]
    groups: list[dict[str, Any]]
    defaults: dict[str, Any]
    states: list[tuple[int, list[str]]]
    others: set[str]

    @classmethod
    def of(cls, optimizer: SOFIM) -> Image:
        return cls(
            snapshot(optimizer),
            [dict(group) for group in optimizer.param_groups],
            dict(optimizer.defaults),
            [(id(p), sorted(known)) for p, known in optimizer.state.items()],
            set(vars(optimizer)) | {str(len(optimizer._optimizer_load_state_dict_pre_hooks))},
        )

    def same(self, other: Image) -> bool:
        pairs = [*zip(self.groups, other.groups, strict=True), (self.defaults, other.defaults)]
        return (
            same_bits(self.tensors, other.tensors)
            and self.states == other.states
            and self.others == other.others
            and all(a.keys() == b.keys() for a, b in pairs)
            and all(a[k] is b[k] or equal(a[k], b[k]) for a, b in pairs for k in a)
        )


def check_valid(optimizer: SOFIM, params: list[Tensor]) -> None:
    """Groups and state are what an optimizer may have."""
    assert all(a is b for a, b in zip(params_of(optimizer), params, strict=True))
    for group in optimizer.param_groups:
        assert isinstance(group, dict)
        assert math.isfinite(number(group["lr"]))  # its range is for the next step to judge, as is momentum's
        assert math.isfinite(group["momentum"])
        adapts = group["diagonal"] != "identity"
        assert (adapts and group["rho"] is None) or 1e-30 <= number(group["rho"]) < math.inf
        assert 0 <= group["beta2"] < 1
        assert 1e-18 <= group["eps"] < math.inf
        assert not (adapts and group["weight_decay"] and not group["decoupled_weight_decay"])
        assert 0 <= group["weight_decay"] < math.inf
        assert group["numerator"] in ("moment", "gradient", "nesterov")
        assert group["fisher"] in ("model", "group", "parameter")
        assert all(type(group[name]) is bool for name in ("maximize", "decoupled_weight_decay", "skip_nonfinite"))
        assert group["max_grad_norm"] is None or group["max_grad_norm"] > 0
        assert all(group[name] == optimizer.param_groups[0][name] == optimizer.defaults[name] for name in WHOLE)
        for p in group["params"]:
            known = optimizer.state.get(p)
            if known is None or not any(name in known for name in STATE):  # other entries are a user's own
                continue
            assert type(known["step"]) is Tensor
            assert known["step"].shape == ()
            assert known["step"].dtype == torch.int64
            assert 0 <= int(known["step"]) <= 2**63 - 2**20
            check_like(known["exp_avg"], p, gather.moment_dtype(p, group["state_dtype"]))
            assert ("exp_avg_scale" in known) == (known["exp_avg"].dtype == torch.float8_e4m3fn)
            assert ("variance_scale" in known) == gather.codes_of(p, group)[1]
            for scale in (known[name] for name in ("exp_avg_scale", "variance_scale") if name in known):
                assert (type(scale), scale.dtype, scale.shape) == (Tensor, F32, blockwise.scale_shape(p.shape))
                assert not bool((scale < 0).any())
            if "kahan" in known:
                assert p.dtype.itemsize == 2
                check_like(known["kahan"], p, p.dtype)
            if "master_bits" in known:
                assert p.dtype == BF16
                check_like(known["master_bits"], p, torch.int8 if group["master_weight_bits"] == 24 else torch.int16)
            means = gather.variance_shapes(p, group["diagonal"])
            assert {name for name in VARIANCES if name in known} == set(means)
            for name, shape in means.items():
                assert type(known[name]) is Tensor
                assert (known[name].shape, known[name].dtype) == (shape, gather.variance_dtype(p, group))
                codes = f"{name}_scale" in known
                mean = blockwise.decode(known[name], known[f"{name}_scale"]) if codes else known[name]
                assert not bool((mean < 0).any())
                assert codes or not bool(mean.isinf().any())


def number(x: Any) -> float:
    return float(x.detach() if isinstance(x, Tensor) else x)


def check_like(x: Tensor, p: Tensor, dtype: torch.dtype) -> None:
    assert type(x) is Tensor
    assert (x.dtype, x.shape, x.device, x.layout) == (dtype, p.shape, p.device, torch.strided)
    assert x.stride() == p.stride()
    assert not x.requires_grad
    assert not x.is_inference()


def moderate(optimizer: SOFIM) -> bool:
    """Whether nothing that was loaded leads beyond what the dtypes hold."""
    sizes = [
        size
        for group in optimizer.param_groups
        for size in (number(group["lr"]), number(group["weight_decay"]), 1e-6 / number(group["rho"] or 1.0))
    ]
    tensors = known_tensors(optimizer)
    largest = [x.abs().max().item() for x in tensors if x.dtype.is_floating_point or x.dtype.is_complex]
    return all(size <= 10 for size in sizes) and all(size < 100 for size in largest)


def check_steps(its: Subject) -> None:
    """It steps, and one that was loaded from it takes the same step."""
    optimizer, twin = its.optimizer, its.twin
    twin.load_state_dict(optimizer.state_dict())
    with torch.no_grad():
        for mine, theirs in zip(its.params, params_of(twin), strict=True):
            theirs.copy_(mine)
    counts = {p: int(optimizer.state.get(p, {}).get("step", 0)) for p in its.params}
    tame = moderate(optimizer)
    for made in (optimizer, twin):
        step(made, list(its.grads))
    check_valid(optimizer, its.params)
    ours, theirs = known_tensors(optimizer), known_tensors(twin)
    assert same_bits(ours, theirs)
    assert all(int(optimizer.state[p]["step"]) == count + 1 for p, count in counts.items())
    assert not tame or all(x.isfinite().all() for x in ours)


def known_tensors(optimizer: SOFIM) -> list[Tensor]:
    found = []
    for p in params_of(optimizer):
        known = optimizer.state.get(p, {})
        plain = [name for name in STATE if not name.startswith("exp_avg")]
        if "variance_scale" in known:
            plain.remove("variance")
            found.append(blockwise.decode_squares(known["variance"], known["variance_scale"]))
        found += [p.detach(), *(known[name] for name in plain if name in known)]
        if "exp_avg_scale" in known:
            found += [blockwise.decode(known["exp_avg"], known["exp_avg_scale"]), known["exp_avg_scale"]]
        elif "exp_avg" in known:
            found.append(known["exp_avg"])
    return found
