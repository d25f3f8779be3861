"""Bad input: each row is refused by name, with a remedy, and before anything has changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sofim_fused import SOFIM, checks
from tests.problems import same_bits, snapshot

NAN, INF = float("nan"), float("inf")


def one() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2, 3))]


# Constructor arguments: arguments, error, what its message must say.
ARGUMENTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"lr": -0.1}, ValueError, r"lr=-0\.1: it must be at least 0"),
    ({"lr": NAN}, ValueError, r"lr=nan"),
    ({"lr": INF}, ValueError, r"lr=inf: .*finite"),
    ({"lr": "0.1"}, TypeError, r"lr='0\.1': pass a float or a one-element tensor"),
    ({"lr": True}, TypeError, r"lr=True"),
    ({"lr": 10**400}, ValueError, r"lr=inf: .*finite"),
    ({"lr": None}, TypeError, r"lr=None"),
    ({"lr": torch.ones(2)}, ValueError, r"lr is a tensor \(shape \(2,\).*one element"),
    ({"lr": torch.tensor(-1.0)}, ValueError, r"lr=-1\.0"),
    ({"lr": torch.tensor(1j)}, ValueError, r"lr is a tensor .*real"),
    ({"momentum": 1.0}, ValueError, r"momentum=1\.0: it must be at least 0 and less than 1"),
    ({"momentum": -0.1}, ValueError, r"momentum=-0\.1"),
    ({"momentum": NAN}, ValueError, r"momentum=nan"),
    ({"momentum": torch.tensor(0.9)}, TypeError, r"momentum=tensor\(0\.9.*pass a float"),
    ({"rho": 0.0}, ValueError, r"rho=0\.0: it must be at least 1e-30"),
    ({"rho": 1e-40}, ValueError, r"rho=1e-40: it must be at least 1e-30"),
    ({"rho": -1}, ValueError, r"rho=-1\.0"),
    ({"rho": NAN}, ValueError, r"rho=nan"),
    ({"rho": INF}, ValueError, r"rho=inf"),
    ({"rho": torch.tensor(0.0)}, ValueError, r"rho=0\.0"),
    ({"rho": torch.zeros(0)}, ValueError, r"rho is a tensor"),
    ({"weight_decay": -1e-4}, ValueError, r"weight_decay=-0\.0001"),
    ({"weight_decay": NAN}, ValueError, r"weight_decay=nan"),
    ({"weight_decay": "no"}, TypeError, r"weight_decay='no'"),
    ({"decoupled_weight_decay": 1}, TypeError, r"decoupled_weight_decay=1: pass True or False"),
    ({"maximize": "yes"}, TypeError, r"maximize='yes'"),
    ({"skip_nonfinite": None}, TypeError, r"skip_nonfinite=None"),
    ({"numerator": "momentum"}, ValueError, r"numerator='momentum': take one of 'moment', 'gradient'"),
    ({"fisher": "layer"}, ValueError, r"fisher='layer': take one of 'model', 'group', 'parameter'"),
    ({"fisher": None}, ValueError, r"fisher=None"),
    ({"fisher": np.array(["model", "group"])}, ValueError, r"fisher=array.*take one of"),
    ({"state_dtype": np.array([1, 2])}, ValueError, r"state_dtype=array.*pass torch\.float32"),
    ({"capturable": torch.ones(2)}, TypeError, r"capturable=tensor.*pass True or False"),
    ({"max_grad_norm": 0.0}, ValueError, r"max_grad_norm=0\.0: it must be greater than 0"),
    ({"max_grad_norm": -1.0}, ValueError, r"max_grad_norm=-1\.0"),
    ({"max_grad_norm": NAN}, ValueError, r"max_grad_norm=nan"),
    ({"max_grad_norm": "1"}, TypeError, r"max_grad_norm='1'"),
    ({"state_dtype": torch.float16}, ValueError, r"state_dtype=torch\.float16: pass torch\.float32, torch\.bfloat16"),
    ({"state_dtype": "bfloat16"}, ValueError, r"state_dtype='bfloat16'"),
    ({"kahan": "on"}, TypeError, r"kahan='on'"),
    ({"kahan": 0}, TypeError, r"kahan=0"),
    (
        {"backend": "cublas"},
        ValueError,
        r"backend='cublas' is unknown: take one of 'auto', 'cpu', 'cuda', 'triton', 'reference'",
    ),
    ({"foreach": 1}, TypeError, r"foreach=1: pass True, False or None"),
    (
        {"foreach": True, "fused": True},
        ValueError,
        r"fused=True asks for a native backend, foreach=True for pure PyTorch",
    ),
    ({"backend": "reference", "fused": True}, ValueError, r"fused=True asks for a native backend, backend='reference'"),
    ({"in_backward": 1}, TypeError, r"in_backward=1: pass True or False"),
    ({"release_grads": 1}, TypeError, r"release_grads=1: pass True or False"),
    ({"release_grads": True}, ValueError, r"release_grads=True without in_backward=True: .* set both"),
    ({"in_backward": True, "max_grad_norm": 1.0}, ValueError, r"in_backward=True with max_grad_norm=1.0 is impossible"),
    ({"in_backward": True, "skip_nonfinite": True}, ValueError, r"in_backward=True with skip_nonfinite=True is impos"),
    ({"amp_fused": 1}, TypeError, r"amp_fused=1: pass True or False"),
    ({"differentiable": True}, ValueError, r"differentiable=True is impossible"),
]


@pytest.mark.parametrize(("arguments", "error", "text"), ARGUMENTS, ids=[str(row[0]) for row in ARGUMENTS])
def test_arguments(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        SOFIM(one(), **arguments)


PER_GROUP = [row for row in ARGUMENTS if next(iter(row[0])) in {"lr", "momentum", "rho", "weight_decay", "kahan"}]


@pytest.mark.parametrize(("arguments", "error", "text"), PER_GROUP, ids=[str(row[0]) for row in PER_GROUP])
@pytest.mark.parametrize("when", ["construction", "add_param_group", "step"])
def test_arguments_of_a_group(when: str, arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    """Wherever a value comes in, also by assignment to a group, as schedulers do."""
    first, second = one(), one()
    text = rf"parameter group 1: {text}"
    if when == "construction":
        with pytest.raises(error, match=text):
            SOFIM([{"params": first}, {"params": second, **arguments}])
        return
    optimizer = SOFIM([{"params": first}] if when == "add_param_group" else [{"params": first}, {"params": second}])
    for p in first + second:
        p.grad = torch.ones_like(p)
    before = snapshot(optimizer)
    if when == "add_param_group":
        with pytest.raises(error, match=text):
            optimizer.add_param_group({"params": second, **arguments})
        assert len(optimizer.param_groups) == 1
    else:
        optimizer.param_groups[1].update(arguments)
        with pytest.raises(error, match=text):
            optimizer.step()
    assert same_bits(before, snapshot(optimizer))
    assert not optimizer.state


def _expanded() -> Tensor:
    return torch.ones(3, 1).expand(3, 4).requires_grad_()


def _windows() -> Tensor:
    return torch.ones(6).as_strided((3, 2), (1, 1)).requires_grad_()


def _twice() -> list[Tensor]:
    p = nn.Parameter(torch.ones(2))
    return [p, nn.Parameter(torch.ones(3)), p]


def _across_groups() -> list[dict[str, Any]]:
    p = nn.Parameter(torch.ones(2))
    return [{"params": [p]}, {"params": [nn.Parameter(torch.ones(3)), p]}]


class _Wrapper(Tensor):
    """A tensor that holds another one, as sharded and quantized tensors do."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> _Wrapper:
        made: _Wrapper = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    inner: Tensor

    def __repr__(self, **_: Any) -> str:
        return "_Wrapper()"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> _Wrapper:
        return _Wrapper(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return NotImplemented


# Parameters: what is passed, error, message.
PARAMETERS: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("no list", lambda: 3, TypeError, r"params is of type int: pass model\.parameters\(\)"),
    ("a model", lambda: nn.Linear(2, 2), TypeError, r"params is of type Linear: pass model\.parameters\(\)"),
    ("a dict", lambda: {"params": one()}, TypeError, r"params is of type dict: .*list of group dicts"),
    ("a string", lambda: "weights", TypeError, r"params is of type str"),
    ("a tensor", lambda: one()[0], TypeError, r"params is a tensor \(shape \(2, 3\).*\[tensor\]"),
    ("nothing", list, ValueError, r"params is empty: pass model\.parameters\(\)"),
    ("an empty generator", lambda: iter([]), ValueError, r"params is empty"),
    ("empty groups", lambda: [{"params": []}, {"params": []}], ValueError, r"params is empty"),
    ("a group of an empty iterator", lambda: [{"params": iter([])}], ValueError, r"params is empty"),
    ("a group without params", lambda: [{"lr": 0.1}], ValueError, r"parameter group 0 has no 'params'"),
    (
        "a group that is none",
        lambda: [{"params": one()}, one()],
        TypeError,
        r"parameter group 1 is of type list: pass a dict",
    ),
    ("a set", lambda: [{"params": set(one())}], TypeError, r"parameter group 0: params is a set.*pass a list"),
    ("a number in a group", lambda: [{"params": 3}], TypeError, r"parameter group 0: params is of type int"),
    ("a name in a group", lambda: [{"params": "w"}], TypeError, r"parameter group 0: params is of type str"),
    ("no tensor", lambda: [*one(), 1.0], TypeError, r"parameter 1 of group 0 is of type float: pass tensors"),
    ("a parameter twice", _twice, ValueError, r"parameter 2 of group 0 \(shape \(2,\).*parameter 0 again"),
    ("in two groups", _across_groups, ValueError, r"parameter 1 of group 1 \(shape \(2,\).*already in group 0"),
    (
        "integers",
        lambda: [torch.ones(2, dtype=torch.int64)],
        ValueError,
        r"parameter 0 of group 0 .*int64, cpu\): only",
    ),
    ("booleans", lambda: [torch.ones(2, dtype=torch.bool)], ValueError, r"bool, cpu\): only float32"),
    (
        "float8",
        lambda: [torch.ones(2).to(torch.float8_e4m3fn)],
        ValueError,
        r"float8_e4m3fn, cpu\): only float32, float64, bfloat16, float16, complex64, complex128",
    ),
    ("sparse", lambda: [torch.ones(2).to_sparse().requires_grad_()], ValueError, r"layout torch\.sparse_coo.*to_dense"),
    ("no leaf", lambda: [one()[0] * 2], ValueError, r"parameter 0 of group 0 \(shape \(2, 3\).*not a leaf"),
    ("expanded", lambda: [_expanded()], ValueError, r"strides \(1, 0\).*may share memory.*clone"),
    ("overlapping windows", lambda: [_windows()], ValueError, r"strides \(1, 1\).*may share memory"),
    (
        "nested",
        lambda: [torch.nested.nested_tensor([torch.ones(2)])],
        ValueError,
        r"is a nested tensor: pass its parts",
    ),
    (
        "conjugated",
        lambda: [torch.ones(2, dtype=torch.complex64).conj()],
        ValueError,
        r"lazily conjugated.*resolve_conj",
    ),
    ("lazy", lambda: nn.LazyLinear(3).parameters(), ValueError, r"uninitialised.*run one forward pass"),
    (
        "a wrapper",
        lambda: [_Wrapper(torch.ones(2)).requires_grad_()],
        ValueError,
        r"is of type _Wrapper.*plain tensors",
    ),
    (
        "names for some",
        lambda: [("a", one()[0]), one()[0]],
        ValueError,
        r"all optimizer params should be with/without names",
    ),
    (
        "a group with a backend",
        lambda: [{"params": one(), "backend": "reference"}],
        ValueError,
        r"parameter group 0 sets backend: pass it to the constructor",
    ),
    (
        "a group that asks for fused",
        lambda: [{"params": one(), "fused": True}],
        ValueError,
        r"parameter group 0 sets fused: pass it to the constructor",
    ),
    (
        "a group with its own numerator",
        lambda: [{"params": one()}, {"params": one(), "numerator": "gradient"}],
        ValueError,
        r"parameter group 1: numerator='gradient', but group 0 has 'moment'",
    ),
    (
        "a narrow moment for float64",
        lambda: [{"params": [torch.ones(2, dtype=torch.float64)], "state_dtype": torch.bfloat16}],
        ValueError,
        r"float64, cpu\): state_dtype=torch\.bfloat16 is for float32 and 16-bit",
    ),
    (
        "a real moment for complex",
        lambda: [{"params": [torch.ones(2, dtype=torch.complex64)], "state_dtype": torch.float32}],
        ValueError,
        r"complex64, cpu\): state_dtype=torch\.float32 is for",
    ),
]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(("make", "error", "text"), [r[1:] for r in PARAMETERS], ids=[r[0] for r in PARAMETERS])
def test_parameters(make: Callable[[], Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        SOFIM(make())


def test_a_refused_group_leaves_the_caller_s_dict_alone() -> None:
    optimizer = SOFIM(one())
    group = {"params": iter([torch.ones(2, dtype=torch.int32)])}
    with pytest.raises(ValueError, match="int32"):
        optimizer.add_param_group(group)
    assert set(group) == {"params"}
    assert len(optimizer.param_groups) == 1


def test_options_of_the_whole_optimizer_must_agree_at_each_step() -> None:
    optimizer = SOFIM([{"params": one()}, {"params": one()}])
    optimizer.param_groups[1]["skip_nonfinite"] = True
    with pytest.raises(ValueError, match="parameter group 1: skip_nonfinite=True, but group 0 has False"):
        optimizer.step()


# What can become of a gradient, or of a parameter after its first step: what is done to it, message.
def _resized(p: nn.Parameter) -> None:
    p.data = torch.ones(5)


def _cast(p: nn.Parameter) -> None:
    p.data = p.data.double()


def _sparse_gradient(p: nn.Parameter) -> None:
    p.grad = torch.ones(2, 3).to_sparse()


def _integer_gradient(p: nn.Parameter) -> None:
    p.grad_dtype = None
    p.grad = torch.ones(2, 3, dtype=torch.int64)


def _resized_with_its_gradient(p: nn.Parameter) -> None:
    p.data = torch.ones(5)
    p.grad = torch.ones(5)


def _cast_with_its_gradient(p: nn.Parameter) -> None:
    p.grad = None
    p.data = p.data.double()
    p.grad = torch.ones(2, 3, dtype=torch.float64)


GRADIENTS: list[tuple[Callable[[nn.Parameter], None], str]] = [
    (_resized, r"gradient of parameter 1 of group 0 \(shape \(5,\).*has the shape \(2, 3\)"),
    (_cast, r"gradient of parameter 1 of group 0 .*is float32: it must be float64"),
    (_sparse_gradient, r"gradient of parameter 1 .*layout torch\.sparse_coo: SOFIM takes dense gradients"),
    (_integer_gradient, r"gradient of parameter 1 .*is int64: it must be float32"),
    (
        _resized_with_its_gradient,
        r"state of parameter 1 \(shape \(5,\).*exp_avg is shape \(2, 3\).*expected shape \(5,\)",
    ),
    (_cast_with_its_gradient, r"state of parameter 1 .*exp_avg is .*float32, cpu, expected shape \(2, 3\), float64"),
]


@pytest.mark.parametrize(("spoil", "text"), GRADIENTS, ids=[row[0].__name__ for row in GRADIENTS])
def test_gradients(spoil: Callable[[nn.Parameter], None], text: str) -> None:
    first, second = nn.Parameter(torch.ones(4)), one()[0]
    optimizer = SOFIM([first, second])
    for p in (first, second):
        p.grad = torch.ones_like(p)
    optimizer.step()
    spoil(second)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=text):
        optimizer.step()
    assert same_bits(before, snapshot(optimizer))


SCALING: list[tuple[str, Any, type[Exception], str]] = [
    ("grad_scale", torch.ones(2), ValueError, r"grad_scale is a tensor \(shape \(2,\), float32, cpu\): set a real one"),
    ("grad_scale", torch.ones((), dtype=torch.complex64), ValueError, r"grad_scale is a tensor .*complex64"),
    ("grad_scale", "8", TypeError, r"grad_scale='8': set a number or a one-element tensor, or delete it"),
    ("found_inf", torch.ones(0), ValueError, r"found_inf is a tensor \(shape \(0,\)"),
    ("found_inf", [0.0], TypeError, r"found_inf=\[0\.0\]"),
]


@pytest.mark.parametrize(("name", "value", "error", "text"), SCALING, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_what_a_grad_scaler_leaves(backend: str, name: str, value: Any, error: type[Exception], text: str) -> None:
    """Attributes of the optimizer, which anyone can set."""
    for steps in (0, 1):
        (p,) = one()
        p.grad = torch.ones_like(p)
        optimizer = SOFIM([p], backend=backend)
        for _ in range(steps):
            optimizer.step()
        before = snapshot(optimizer)
        setattr(optimizer, name, value)
        with pytest.raises(error, match=text):
            optimizer.step()
        assert same_bits(before, snapshot(optimizer))
        assert len(optimizer.state) == steps


def test_a_gradient_on_another_device() -> None:
    """With one device at hand the check is called itself: PyTorch lets no such gradient be set."""
    elsewhere = torch.empty(2, 3, device="meta")
    with pytest.raises(
        ValueError, match=r"gradient of parameter 4 of group 2 \(shape \(2, 3\), float32, meta\) is on cpu"
    ):
        checks.gradient(elsewhere, torch.ones(2, 3), 2, 4)


def test_a_bad_gradient_in_the_first_step_makes_no_state() -> None:
    first, second = nn.Parameter(torch.ones(4)), one()[0]
    optimizer = SOFIM([first, second])
    first.grad, second.grad = torch.ones(4), torch.ones(2, 3).to_sparse()
    with pytest.raises(ValueError, match="dense gradients"):
        optimizer.step()
    assert not optimizer.state


# State dicts: how a good one is spoiled, error, message.
Spoil = Callable[[dict[str, Any]], Any]


def _of(optimizer: type[torch.optim.Optimizer], **arguments: Any) -> Spoil:
    def other(_: dict[str, Any]) -> Any:
        p = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(2, 3))
        made = optimizer([{"params": p[0]}, {"params": p[1]}], **arguments)
        for x in p:
            x.grad = torch.ones_like(x)
        made.step()
        return made.state_dict()

    return other


def _without(*path: Any) -> Spoil:
    def spoil(state_dict: dict[str, Any]) -> None:
        inner: Any = state_dict
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]

    return spoil


def _with(*path_and_value: Any) -> Spoil:
    *path, key, value = path_and_value

    def spoil(state_dict: dict[str, Any]) -> None:
        inner: Any = state_dict
        for step in path:
            inner = inner[step]
        inner[key] = value

    return spoil


def _one_group(state_dict: dict[str, Any]) -> None:
    state_dict["param_groups"].pop()


STATE_DICTS: list[tuple[str, Spoil, type[Exception], str]] = [
    ("of SGD", _of(torch.optim.SGD, momentum=0.9), ValueError, r"parameter group 0 lacks rho, .*another optimizer's"),
    ("of Adam", _of(torch.optim.Adam), ValueError, r"parameter group 0 lacks momentum, rho"),
    ("no mapping", lambda _: [1], TypeError, r"state_dict is of type list"),
    ("a number", lambda _: 5, TypeError, r"state_dict is of type int"),
    ("a huge value", _with("param_groups", 0, "lr", 10**400), ValueError, r"parameter group 0: lr=inf"),
    (
        "on meta",
        _with("state", 0, "exp_avg", torch.ones(4, device="meta")),
        ValueError,
        r"exp_avg is on the meta device",
    ),
    ("without state", _without("state"), ValueError, r"has no 'state'"),
    ("without groups", _without("param_groups"), ValueError, r"has no 'param_groups'"),
    ("state of another type", _with("state", [1]), TypeError, r"state_dict\['state'\] is of type list"),
    ("fewer groups", _one_group, ValueError, r"has 1 parameter groups, the optimizer 2"),
    ("a group that is none", _with("param_groups", 0, 5), TypeError, r"parameter group 0 is not a dict"),
    ("without a key", _without("param_groups", 1, "rho"), ValueError, r"parameter group 1 lacks rho"),
    ("a bad value", _with("param_groups", 1, "rho", -1.0), ValueError, r"parameter group 1: rho=-1\.0"),
    ("more parameters", _with("param_groups", 0, "params", [0, 2]), ValueError, r"group 0 has 2 parameters, .*'s 1"),
    ("a repeated key", _with("param_groups", 1, "params", [0]), ValueError, r"parameter 0 stands twice"),
    ("groups that disagree", _with("param_groups", 1, "fisher", "group"), ValueError, r"group 1: fisher='group'"),
    ("a stray state", _with("state", 7, {}), ValueError, r"state for parameter 7, which is in none"),
    ("a state that is none", _with("state", 0, 3), TypeError, r"state of parameter 0 .*is of type int, not a dict"),
    (
        "without a moment",
        _without("state", 0, "exp_avg"),
        ValueError,
        r"state of parameter 0 .*has the entries \['step'\]",
    ),
    ("without a count", _without("state", 1, "step"), ValueError, r"state of parameter 1 .*\['exp_avg'\]"),
    ("no tensor", _with("state", 0, "exp_avg", [0.0] * 4), TypeError, r"exp_avg is of type list"),
    ("another shape", _with("state", 1, "exp_avg", torch.ones(3, 2)), ValueError, r"exp_avg has the shape \(3, 2\)"),
    ("integer moments", _with("state", 0, "exp_avg", torch.ones(4).int()), ValueError, r"exp_avg is int32"),
    ("complex moments", _with("state", 0, "exp_avg", torch.ones(4) * 1j), ValueError, r"exp_avg is complex64"),
    ("a long count", _with("state", 0, "step", torch.ones(2)), ValueError, r"step has the shape \(2,\), expected \(\)"),
    ("a negative count", _with("state", 0, "step", torch.tensor(-1)), ValueError, r"step is -1, expected a count"),
    ("no count", _with("state", 0, "step", torch.tensor(NAN)), ValueError, r"step is nan, expected a count"),
    ("an infinite count", _with("state", 0, "step", torch.tensor(INF)), ValueError, r"step is inf, expected a count"),
    ("kahan of another shape", _with("state", 0, "kahan", torch.ones(3)), ValueError, r"kahan has the shape \(3,\)"),
    (
        "a moment too narrow",
        _with("param_groups", 0, "state_dtype", torch.float16),
        ValueError,
        r"parameter group 0: state_dtype=torch\.float16",
    ),
]


@pytest.mark.parametrize(("spoil", "error", "text"), [r[1:] for r in STATE_DICTS], ids=[r[0] for r in STATE_DICTS])
def test_state_dicts(spoil: Spoil, error: type[Exception], text: str) -> None:
    params = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(2, 3))
    optimizer = SOFIM([{"params": params[0]}, {"params": params[1], "lr": 0.1}])
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    before, groups = snapshot(optimizer), copy.deepcopy([{**g, "params": 0} for g in optimizer.param_groups])
    spoiled = copy.deepcopy(optimizer.state_dict())
    spoiled = spoil(spoiled) or spoiled
    with pytest.raises(error, match=text):
        optimizer.load_state_dict(spoiled)
    assert same_bits(before, snapshot(optimizer))
    assert groups == [{**g, "params": 0} for g in optimizer.param_groups]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.step()


def test_a_state_dict_for_float64_needs_its_moments() -> None:
    """The loaded group's state_dtype must suit this optimizer's parameters."""
    narrow = SOFIM([nn.Parameter(torch.ones(2))], state_dtype=torch.bfloat16)
    wide = SOFIM([nn.Parameter(torch.ones(2, dtype=torch.float64))])
    with pytest.raises(ValueError, match=r"parameter 0 of group 0 .*state_dtype=torch\.bfloat16"):
        wide.load_state_dict(narrow.state_dict())


def test_a_later_state_that_does_not_fit_leaves_earlier_ones_unmade() -> None:
    first, second = nn.Parameter(torch.ones(4)), one()[0]
    optimizer = SOFIM([first, second])
    second.grad = torch.ones(2, 3)
    optimizer.step()
    first.grad = torch.ones(4)
    optimizer.param_groups[0]["state_dtype"] = torch.bfloat16
    with pytest.raises(
        ValueError, match=r"state of parameter 1 .*float32, cpu, expected .*bfloat16.*state_dtype changed"
    ):
        optimizer.step()
    assert first not in optimizer.state


def test_a_state_dtype_that_no_longer_suits() -> None:
    wide = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = SOFIM([wide])
    optimizer.param_groups[0]["state_dtype"] = torch.bfloat16
    wide.grad = torch.ones(2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"parameter 0: state_dtype=torch\.bfloat16 is for float32 and 16-bit"):
        optimizer.step()
    assert not optimizer.state


def test_a_hyperparameter_that_was_deleted() -> None:
    optimizer = SOFIM(one())
    del optimizer.param_groups[0]["rho"]
    with pytest.raises(ValueError, match=r"parameter group 0: rho is missing"):
        optimizer.step()


@pytest.mark.parametrize(
    ("known", "text"),
    [
        ({"exp_avg": torch.ones(3, device="meta")}, r"exp_avg is shape \(3,\), float32, meta, expected .*float32, cpu"),
        ({"exp_avg": torch.ones(3), "kahan": torch.ones(3)}, r"kahan is .*float32, cpu, expected .*bfloat16"),
        ({"exp_avg": torch.ones(3), "kahan": torch.ones(2).bfloat16()}, r"kahan is shape \(2,\)"),
    ],
)
def test_states_that_do_not_fit(known: dict[str, Tensor], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        checks.state_of_parameter(torch.ones(3, dtype=torch.bfloat16), known, torch.float32, 0)


def test_a_tensor_on_a_device_is_not_read() -> None:
    """Looking at its value would wait for the device; its shape is known."""
    SOFIM(one(), lr=torch.empty((), device="meta"), rho=torch.empty(1, device="meta"))
    with pytest.raises(ValueError, match=r"rho is a tensor \(shape \(3,\), float32, meta\)"):
        SOFIM(one(), rho=torch.empty(3, device="meta"))


def test_what_must_not_be_refused() -> None:
    """The checks' other side: unusual input that is legal."""
    strided = torch.arange(12.0).view(3, 4).t()[:, ::2].requires_grad_()
    group = {"params": [], "lr": 0.1}
    optimizer = SOFIM([group, {"params": [strided]}, {"params": (p for p in one()), "initial_lr": 3, "name": "head"}])
    optimizer.add_param_group({"params": nn.Parameter(torch.ones(()))})
    assert [len(g["params"]) for g in optimizer.param_groups] == [0, 1, 1, 1]
    assert optimizer.param_groups[2]["name"] == "head"
    SOFIM(one(), lr=0, rho=1, momentum=0, weight_decay=0)
    SOFIM(one(), max_grad_norm=INF)


def test_numbers_of_any_kind_work() -> None:
    """What passes the checks must also pass the step."""
    p, q = one()[0], one()[0]
    odd = SOFIM(
        [p],
        lr=Fraction(1, 2),
        momentum=np.float32(0.5),
        rho=torch.tensor([2.0], requires_grad=True),
        max_grad_norm=Fraction(1, 3),
    )
    plain = SOFIM([q], lr=0.5, momentum=0.5, rho=2.0, max_grad_norm=1 / 3)
    for _ in range(2):
        p.grad = q.grad = torch.ones(2, 3)
        odd.step()
        plain.step()
    assert torch.equal(p, q)
    big = SOFIM(one(), lr=2**64)
    big.param_groups[0]["params"][0].grad = torch.zeros(2, 3)
    big.step()


def test_groups_of_sgd_drop_in() -> None:
    p = one()[0]
    groups = torch.optim.SGD([p], lr=0.25, momentum=0.8).param_groups
    optimizer = SOFIM(groups)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]) == (0.25, 0.8)
    p.grad = torch.ones(2, 3)
    optimizer.step()
