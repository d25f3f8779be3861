"""State dicts that were damaged at random: each is refused with nothing changed, or makes a valid optimizer."""

from __future__ import annotations

import contextlib
import copy
import math
import random
import types
import warnings
from collections import ChainMap, OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

from sofim_fused import SOFIM
from tests.in_backward.test_in_backward import backward
from tests.support.problems import give, same_bits, snapshot
from tests.support.runs import once
from tests.support.strategies import CHECKED

pytestmark = once
REFUSALS = (ValueError, TypeError, KeyError)
PER_KIND = max(300, 10 * settings.default.max_examples)  # by hypothesis's profile
WHOLE = ("numerator", "fisher", "max_grad_norm", "skip_nonfinite")


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
    "kahan": lambda: (_two_groups(BF16, torch.float16, F32), {"backend": "reference"}),
    "bf16-moments": lambda: (_two_groups(BF16, F32), {"state_dtype": BF16}),
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


# Damage


class Tagged(torch.Tensor):
    """A subclass without ways of its own."""


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
    None, -1, 7, 10**20, True, 0, 1, 2, 3, 1.0, math.nan, "0", "exp_avg", "step", "kahan", "Step", "exp_avg ", "params",
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


def outline(saved: Any) -> Any:
    """A state dict to be damaged: containers of its own, and the same tensors."""
    if isinstance(saved, dict):
        return {key: outline(inner) for key, inner in saved.items()}
    return [outline(inner) for inner in saved] if isinstance(saved, list) else saved


# What has to hold


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
        assert 1e-30 <= number(group["rho"]) < math.inf
        assert 0 <= group["weight_decay"] < math.inf
        assert group["numerator"] in ("moment", "gradient")
        assert group["fisher"] in ("model", "group", "parameter")
        assert all(type(group[name]) is bool for name in ("maximize", "decoupled_weight_decay", "skip_nonfinite"))
        assert group["max_grad_norm"] is None or group["max_grad_norm"] > 0
        assert all(group[name] == optimizer.param_groups[0][name] == optimizer.defaults[name] for name in WHOLE)
        for p in group["params"]:
            known = optimizer.state.get(p)
            if known is None:
                continue
            assert type(known["step"]) is Tensor
            assert known["step"].shape == ()
            assert known["step"].dtype == torch.int64
            assert 0 <= int(known["step"]) <= 2**63 - 2**20
            check_like(known["exp_avg"], p, group["state_dtype"] or torch.promote_types(p.dtype, torch.float32))
            if "kahan" in known:
                assert p.dtype.itemsize == 2
                check_like(known["kahan"], p, p.dtype)


def in_range(optimizer: SOFIM) -> bool:
    """Whether learning rates and momenta are what a step takes; schedulers may leave others."""
    return all(number(group["lr"]) >= 0 and 0 <= group["momentum"] < 1 for group in optimizer.param_groups)


def check_no_step(its: Subject) -> None:
    """It is saved and loaded, and the next step says what is wrong with it, before anything has changed."""
    its.twin.load_state_dict(its.optimizer.state_dict())
    groups = [{k: v for k, v in group.items() if k != "params"} for group in its.optimizer.param_groups]
    assert all(
        equal(group[k], v) for group, known in zip(its.twin.param_groups, groups, strict=True) for k, v in known.items()
    )
    its.optimizer.zero_grad()
    before = Image.of(its.optimizer)
    with pytest.raises(ValueError, match=r"parameter group \d: (lr|momentum)=.*: it must be at least 0"):
        step(its.optimizer, list(its.grads))
    assert before.same(Image.of(its.optimizer))


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
        for size in (number(group["lr"]), number(group["weight_decay"]), 1e-6 / number(group["rho"]))
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
    counts = {p: int(optimizer.state[p]["step"]) if p in optimizer.state else 0 for p in its.params}
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
        found += [p.detach(), *(known[name] for name in ("exp_avg", "step", "kahan") if name in known)]
    return found


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
    for number in range(PER_KIND):
        outcomes[attempt(its, f"{kind} {number}")] += 1
        CHECKED["damaged state dicts"] += 1
    assert min(outcomes.values()) > PER_KIND // 100
    assert equal([*saved["param_groups"]], [*its.saved["param_groups"]])
    for key, known in saved["state"].items():
        assert all(same_bits([x], [its.saved["state"][key][name]]) for name, x in known.items())


# What was found so, with the messages that it has now.


def _set(*path: Any) -> Callable[[Any], Any]:
    """Puts the value that a function makes to the end of a path."""
    *before, last, make = path

    def spoil(saved: Any) -> None:
        for key in before:
            saved = saved[key]
        saved[last] = make()

    return spoil


def _chain(saved: Any) -> None:
    saved["state"][0] = ChainMap(saved["state"][0])


FOUND: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "a quantized count": (
        _set("state", 0, "step", lambda: torch.quantize_per_tensor(torch.tensor(1.0), 0.1, 0, torch.quint8)),
        ValueError,
        r"state of parameter 0 .*: step is quantized: save a plain tensor",
    ),
    "a nested moment": (
        _set("state", 0, "exp_avg", lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])),
        ValueError,
        r"state of parameter 0 .*: exp_avg is nested: save a plain tensor",
    ),
    "a moment not initialised": (
        _set("state", 0, "exp_avg", nn.UninitializedBuffer),
        ValueError,
        r"state of parameter 0 .*: exp_avg is not initialised: save a plain tensor",
    ),
    "a count that the next step would carry over": (
        _set("state", 0, "step", lambda: torch.tensor(2**63 - 1)),
        ValueError,
        r"state of parameter 0 .*: step is 9223372036854775807, expected a count of updates",
    ),
    "an entry of the user's without values": (
        _set("state", 0, "mine", lambda: [{"x": torch.empty(2, device="meta")}]),
        ValueError,
        r"state of parameter 0 .*: 'mine' is on the meta device",
    ),
    "a state that torch takes for its keys": (
        _chain,
        TypeError,
        r"state of parameter 0 .* is of type ChainMap, not a dict",
    ),
    "a group that is no dict": (
        lambda saved: saved["param_groups"].__setitem__(0, UserDict(saved["param_groups"][0])),
        TypeError,
        r"parameter group 0 is not a dict",
    ),
    "a tensor for a key of the state": (
        lambda saved: saved["state"].update({nn.Parameter(torch.ones(1)): saved["state"][0]}),
        ValueError,
        r"has a tensor for a key of its state",
    ),
    "a number for a key that is no parameter's": (
        lambda saved: saved["state"].update({7.0: saved["state"].pop(0)}),
        ValueError,
        r"has a state for parameter 7\.0, which is in none of its groups",
    ),
    "a tensor among the parameters' numbers": (
        _set("param_groups", 0, "params", 1, lambda: torch.ones(2)),
        TypeError,
        r"'params' of group 0 has a tensor",
    ),
    "a flag that is neither true nor false": (
        _set("param_groups", 1, "fused", lambda: torch.ones(2)),
        TypeError,
        r"parameter group 1: fused=tensor\(.*\): pass True or False",
    ),
    "a tensor with a history": (
        _set("param_groups", 1, "mine", lambda: nn.Parameter(torch.ones(1)) * 2),
        TypeError,
        r"parameter group 1 cannot be copied: Only Tensors created explicitly",
    ),
    "a learning rate not initialised": (
        _set("param_groups", 0, "lr", nn.UninitializedBuffer),
        ValueError,
        r"parameter group 0: lr is not initialised: save a plain tensor",
    ),
    "a norm that no float holds": (
        lambda saved: [group.update(max_grad_norm=10**400) for group in saved["param_groups"]],
        ValueError,
        r"parameter group 0: max_grad_norm=inf: it must be greater than 0 and finite",
    ),
    "a learning rate without a value": (
        _set("param_groups", 0, "lr", lambda: torch.tensor(0.1, device="meta")),
        ValueError,
        r"parameter group 0: lr is on the meta device",
    ),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor")
@pytest.mark.parametrize(("spoil", "error", "text"), FOUND.values(), ids=FOUND)
def test_damage_that_was_found(spoil: Callable[[Any], Any], error: type[Exception], text: str) -> None:
    its = subject("float32")
    damaged = outline(its.saved)
    spoil(damaged)
    before = Image.of(its.optimizer)
    with pytest.raises(error, match=text):
        its.optimizer.load_state_dict(damaged)
    assert before.same(Image.of(its.optimizer))


def test_a_saved_tensor_of_another_class_is_taken_as_a_tensor() -> None:
    its = subject("float32")
    damaged = outline(its.saved)
    damaged["state"][0] = {name: x.as_subclass(Tagged) for name, x in damaged["state"][0].items()}
    its.optimizer.load_state_dict(damaged)
    check_valid(its.optimizer, its.params)
    check_steps(its)


def test_a_form_that_16_bit_parameters_cannot_take_in_the_backward_pass() -> None:
    its = subject("in-backward")
    damaged = outline(its.saved)
    for group in damaged["param_groups"]:
        group["numerator"] = "gradient"
    before = Image.of(its.optimizer)
    with pytest.raises(ValueError, match=r"state_dict: parameter 1 of group 0 .*numerator='gradient' would round it"):
        its.optimizer.load_state_dict(damaged)
    assert before.same(Image.of(its.optimizer))


class View(Mapping):  # type: ignore[type-arg]
    """A mapping that has no copy()."""

    def __init__(self, items: dict[str, Any]) -> None:
        self._items = items

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


def test_any_mapping_is_taken() -> None:
    its = subject("float32")
    before = snapshot(its.optimizer)
    its.optimizer.load_state_dict(View(its.saved))  # type: ignore[arg-type]
    assert same_bits(before, snapshot(its.optimizer))
