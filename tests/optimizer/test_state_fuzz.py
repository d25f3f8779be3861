"""State dicts that were damaged at random: each is refused with nothing changed, or makes a valid optimizer."""

from __future__ import annotations

import contextlib
import copy
import math
import random
import types
import warnings
from collections import ChainMap, OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable, Iterator, MutableMapping
from decimal import Decimal
from fractions import Fraction
from functools import cache
from numbers import Real
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

from sofim_fused import SOFIM
from tests.optimizer.damaged_state import (
    KINDS,
    WHOLE,
    Image,
    Subject,
    Tagged,
    check_steps,
    check_valid,
    equal,
    number,
    outline,
    step,
    subject,
)
from tests.support.problems import same_bits
from tests.support.runs import once
from tests.support.strategies import CHECKED

pytestmark = once
REFUSALS = (ValueError, TypeError, KeyError)
PER_KIND = max(300, 10 * settings.default.max_examples)  # by hypothesis's profile


# Damage


class OwnDict(dict):  # type: ignore[type-arg]
    """Another."""


@cache
def odd_tensors() -> list[Tensor]:
    """Tensors that no state holds, or not there."""
    x = torch.arange(6.0).view(2, 3)
    one = torch.tensor(1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # prototypes
        return [
            one,
            torch.tensor(2),
            torch.tensor(True),
            torch.tensor([0.25]),
            torch.tensor(-1.0),
            torch.tensor(math.nan),
            torch.tensor(math.inf),
            torch.tensor(1e300, dtype=torch.float64),
            torch.tensor(2**63 - 1),
            torch.tensor(1 + 2j),
            torch.tensor(2.5),
            torch.tensor(3, dtype=torch.uint8),
            torch.tensor([]),
            x,
            x.t(),
            x.to_sparse(),
            one.to_sparse(),
            torch.tensor([1.0]).to_sparse(),
            x.to_sparse_csr(),
            torch.empty(2, 3, device="meta"),
            torch.empty((), device="meta"),
            torch.quantize_per_tensor(x, 0.1, 0, torch.quint8),
            torch.quantize_per_tensor(one, 0.1, 0, torch.quint8),
            torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
            torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
            nn.UninitializedBuffer(),
            nn.Parameter(one.clone()),
            nn.Parameter(one.clone()) * 1,
            x.to(torch.float8_e4m3fn),
            one.to(torch.float8_e5m2),
            x.as_subclass(Tagged),
            torch.tensor(0.5).as_subclass(Tagged),
            _inference(),
        ]


def _inference() -> Tensor:
    with torch.inference_mode():
        return torch.ones(2, 3)


def tensor_of(x: Tensor, choice: random.Random) -> Tensor:
    """A tensor made from one of the state dict's."""
    other: list[Callable[[], Tensor]] = [
        lambda: x.double(),
        lambda: x.half(),
        lambda: x.bfloat16(),
        lambda: x.long(),
        lambda: x.bool(),
        lambda: x.to(torch.int8),
        lambda: x.to(torch.complex64),
        lambda: x.unsqueeze(0),
        lambda: x.reshape(-1),
        lambda: x.reshape(-1)[:1],
        lambda: torch.cat((x.reshape(-1), x.reshape(-1))),
        lambda: x.t() if x.dim() == 2 else x.view(*x.shape, 1),
        lambda: x.to_sparse(),
        lambda: x.to("meta"),
        lambda: torch.full_like(x, choice.choice((math.nan, math.inf, -math.inf))) if x.is_floating_point() else -x,
        lambda: torch.full_like(x, choice.choice((1e30, -1e30, 1e-40))) if x.is_floating_point() else x + 2**62,
        lambda: -x,
        lambda: x + 0.5,
        lambda: torch.zeros_like(x),
        lambda: x.reshape(-1)[:1].reshape([1] * x.dim()).expand(x.shape) if x.numel() else x,
        lambda: torch._neg_view(x) if x.dtype != torch.bool else x,
        lambda: x.to(torch.complex64).conj(),
        lambda: x.clone().requires_grad_() if x.is_floating_point() else x,
        lambda: x.float().clone().requires_grad_() * 1,
        lambda: nn.Parameter(x.clone(), requires_grad=False),
        lambda: x.as_subclass(Tagged),
        lambda: x.to(torch.float8_e4m3fn) if x.is_floating_point() else x.double(),
        lambda: torch.cat([x.reshape(-1)] * 3)[1 : 1 + x.numel()].view(x.shape),
        lambda: x.clone(),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of complex values as real ones
        while True:
            with contextlib.suppress(RuntimeError, ValueError):  # not every tensor can all of this
                return choice.choice(other)()


NUMBERS: list[Any] = [
    0, 1, -1, 2, 0.0, -0.0, 0.5, 1.0, 1e-31, 1e-300, 1e30, 1e300, -1e-9, 10**400, -(10**400), 2**63, math.nan, math.inf,
    -math.inf, True, False, 1 + 0j, Fraction(1, 3), Fraction(10**400, 3), Decimal("0.5"), np.float32(0.5),
    np.float64(0.25), np.int64(1), np.bool_(True), np.array(0.5), np.array([0.5, 0.5]), "0.5", "nan", None,
]  # fmt: skip
WORDS: list[Any] = [
    "moment", "gradient", "model", "group", "parameter", "", "Moment", b"moment", torch.float32, torch.bfloat16,
    torch.float16, torch.float64, torch.complex64, "float32", torch.strided, float, int,
]  # fmt: skip
JUNK: list[Callable[[], Any]] = [
    list,
    dict,
    tuple,
    set,
    object,
    lambda: object,
    lambda: ...,
    lambda: [None, [1, {"a": [2.0, (3,)]}]],
    lambda: {"a": {"b": {"c": [1, 2]}}, 0: "x"},
    lambda: range(3),
    lambda: slice(1),
    lambda: "text",
    lambda: b"bytes",
    lambda: (x for x in (1, 2)),
    lambda: len,
    lambda: lambda: None,
    lambda: math,
    lambda: np.arange(4.0),
    lambda: np.zeros((3, 4), dtype=np.float32),
    lambda: torch.Size((1, 2)),
    lambda: torch.device("cpu"),
    lambda: OwnDict(a=1),
    lambda: defaultdict(list),
    lambda: deque([1, 2]),
    lambda: [torch.ones(2), {"x": torch.ones(3, dtype=torch.int64)}],
    lambda: {"step": torch.tensor(1.0), "exp_avg": torch.ones(3, 4)},
    lambda: types.SimpleNamespace(a=1),
    lambda: [0],
    lambda: [1, 0],
    lambda: [0, 0],
    lambda: [0, 1, 2, 3],
    lambda: ["a", "b"],
    lambda: "ab",
    lambda: [math.nan, math.nan],
    lambda: [[0], [1]],
]
KEYS: list[Any] = [
    None, -1, 7, 10**20, True, 0, 1, 2, 3, 1.0, math.nan, "0", "exp_avg", "step", "kahan", "master_bits", "Step",
    "exp_avg ", "params",
    "lr", "rho", "momentum_buffer", "betas", "foreach", "fused", "capturable", "differentiable", "maximize", "backend",
    "in_backward", "initial_lr", "param_names", "state", "param_groups", b"step", (), (0,), frozenset(), torch.float32,
    "mine",
]  # fmt: skip
MAPPINGS: list[Callable[[Any], Any]] = [
    OrderedDict,
    OwnDict,
    UserDict,
    ChainMap,
    types.MappingProxyType,
    lambda x: defaultdict(dict, x),
    lambda x: list(x.items()),
    lambda x: list(x),
    lambda x: types.SimpleNamespace(items=x.items),
]
LISTS: list[Callable[[Any], Any]] = [
    tuple,
    deque,
    iter,
    lambda x: set(map(str, x)),
    lambda x: dict(enumerate(x)),
    lambda x: x * 2,
    lambda x: x[:-1],
    lambda x: x[::-1],
    lambda x: [x],
    lambda x: str(x),
]


def value(old: Any, choice: random.Random) -> Any:
    """Something else in the place of ``old``."""
    kind = choice.randrange(8)
    if isinstance(old, Tensor) and kind < 5:
        odd = any(old is x for x in odd_tensors())  # torch itself crashes with some of these
        return old if odd else tensor_of(old, choice)
    if isinstance(old, MutableMapping) and kind < 3:
        return choice.choice(MAPPINGS)(old)
    if isinstance(old, list) and kind < 3:
        return choice.choice(LISTS)(old)
    if isinstance(old, (bool, int, float, str, type(None), torch.dtype)) and kind < 5:
        return choice.choice(NUMBERS if kind < 3 else WORDS)
    if kind == 5:
        return choice.choice(NUMBERS + WORDS)
    return choice.choice(odd_tensors()) if kind == 6 else choice.choice(JUNK)()


def containers(saved: Any) -> Iterator[Any]:
    """Every dict and list that damage can be done to."""
    if isinstance(saved, (dict, list)):
        yield saved
        for inner in saved.values() if isinstance(saved, dict) else saved:
            yield from containers(inner)


def all_dicts(saved: Any) -> bool:
    groups = saved.get("param_groups") if isinstance(saved, dict) else None
    return isinstance(groups, list) and bool(groups) and all(isinstance(group, dict) for group in groups)


def damage(saved: Any, choice: random.Random, params: list[Tensor]) -> tuple[Any, str]:
    """Do something to a state dict; return it, and what was done."""
    places = list(containers(saved))
    if not places or choice.random() < 0.01:
        return value(saved, choice), "all of it"
    if choice.random() < 0.1 and all_dicts(saved):  # what all groups have to agree on
        groups = saved["param_groups"]
        name = choice.choice([*WHOLE, *groups[0]])
        if name != "params":
            what = value(groups[0].get(name), choice)
            for group in groups:
                group[name] = what
            return saved, f"{name} in all groups"
    inner = choice.choice(places)
    keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
    if not keys or choice.random() < 0.1:
        what = value(None, choice)
        if isinstance(inner, dict):
            key = choice.choice([*KEYS, *params])
            inner[key] = what
        else:
            key = choice.randint(0, len(inner))
            inner.insert(key, choice.choice([what, *inner]))
        return saved, f"{key!r} added"
    key = choice.choice(keys)
    kind = choice.randrange(10)
    if kind < 5:
        inner[key] = value(inner[key], choice)
    elif kind == 5:
        del inner[key]
    elif kind == 6 and isinstance(inner, dict):
        inner[choice.choice([*KEYS, *params])] = inner.pop(key)
    elif kind == 7:  # the same object twice
        other = choice.choice(places)
        same = choice.choice([*other.values()] if isinstance(other, dict) and other else [*other, None])
        if not any(part is inner for part in containers(same)):  # no circles, which torch's own copying does not end in
            inner[key] = same
    else:
        other_key = choice.choice(keys)
        inner[key], inner[other_key] = inner[other_key], inner[key]
    return saved, f"{key!r}: {kind}"


# What has to hold


def in_range(optimizer: SOFIM) -> bool:
    """Whether learning rates and momenta are what a step takes; schedulers may leave others."""
    return all(number(group["lr"]) >= 0 and 0 <= group["momentum"] < 1 for group in optimizer.param_groups)


def check_no_step(its: Subject) -> None:
    """It is saved and loaded, and the next step says what is wrong with it, before anything has changed."""
    its.twin.load_state_dict(its.optimizer.state_dict())
    groups = [{k: v for k, v in group.items() if k != "params"} for group in its.optimizer.param_groups]
    assert all(
        equal(group[k], v) or (isinstance(v, Real) and group[k] == v)  # NumPy's numbers are saved as Python's
        for group, known in zip(its.twin.param_groups, groups, strict=True)
        for k, v in known.items()
    )
    its.optimizer.zero_grad()
    before = Image.of(its.optimizer)
    with pytest.raises(ValueError, match=r"parameter group \d: (lr|momentum)=.*: it must be at least 0"):
        step(its.optimizer, list(its.grads))
    assert before.same(Image.of(its.optimizer))


def attempt(its: Subject, seed: str) -> str:
    """Load one damaged state dict. Returns ``"refused"`` or ``"taken"``."""
    choice = random.Random(seed)
    damaged: Any = outline(its.saved)
    done = []
    for _ in range(choice.choice((1, 1, 1, 2, 3, 5))):
        damaged, what = damage(damaged, choice, its.params)
        done.append(what)
    before = Image.of(its.optimizer)
    try:
        its.optimizer.load_state_dict(damaged)
    except REFUSALS as error:
        if not str(error):
            raise AssertionError(f"{seed}: {done}: {error!r}") from error
        assert before.same(Image.of(its.optimizer)), f"{seed}: half loaded, {done}"
        return "refused"
    except Exception as error:
        raise AssertionError(f"{seed}: {done}: {error!r}") from error
    try:
        check_valid(its.optimizer, its.params)
        (check_steps if in_range(its.optimizer) else check_no_step)(its)
    except Exception as error:
        raise AssertionError(f"{seed}: {done}: not valid: {error!r}") from error
    restore(its)
    return "taken"


def restore(its: Subject) -> None:
    its.optimizer.load_state_dict(its.saved)
    with torch.no_grad():
        for p, w in zip(its.params, its.weights, strict=True):
            p.copy_(w)
    its.optimizer.zero_grad()
    its.twin.zero_grad()


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_state_dicts(kind: str) -> None:
    its = subject(kind)
    saved = copy.deepcopy(its.saved)
    outcomes = {"refused": 0, "taken": 0}
    for count in range(PER_KIND):
        outcomes[attempt(its, f"{kind} {count}")] += 1
        CHECKED["damaged state dicts"] += 1
    assert min(outcomes.values()) > PER_KIND // 100
    assert equal([*saved["param_groups"]], [*its.saved["param_groups"]])
    for key, known in saved["state"].items():
        assert all(same_bits([x], [its.saved["state"][key][name]]) for name, x in known.items())
