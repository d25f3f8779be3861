"""Which steps ``sofim_fused._C.PackedStep`` leaves to Python, and that it leaves them as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor

from sofim_fused import SOFIM, native
from tests.backends.support import LEFT_TO_PYTHON, Subclass, Watching
from tests.support.packed import check_everything, gathered, made, new, three
from tests.support.problems import give, same_bits

pytestmark = pytest.mark.skipif(isinstance(native.cpu(), str), reason=str(native.cpu()))


class Quiet(TorchFunctionMode):
    """Would see every function of torch that is called."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(func)


def _given(name: str, make: Callable[[Tensor], Any]) -> Callable[[SOFIM], None]:
    """Replace a tensor of the second group's first parameter."""

    def change(optimizer: SOFIM) -> None:
        p = optimizer.param_groups[1]["params"][0]
        if name == "grad":
            p.grad_dtype = None
            p.grad = make(p.grad)
        elif name == "w":
            p.data = make(p.data)
        else:
            optimizer.state[p][name] = make(optimizer.state[p][name])

    return change


def _data_of(name: str, make: Callable[[Tensor], Any]) -> Callable[[SOFIM], None]:
    """Give the very same tensor other data."""

    def change(optimizer: SOFIM) -> None:
        p = optimizer.param_groups[1]["params"][0]
        x = {"w": p, "grad": p.grad}.get(name, optimizer.state[p].get(name))
        x.data = make(x.data)

    return change


def _without_memory(x: Tensor) -> Tensor:
    """A view into storage that was given up: its address is its offset."""
    view = torch.ones(x.numel() + 3)[3:]
    view.untyped_storage().resize_(0)
    return view


class Dispatching(Tensor):
    """Has memory of its own, and ways of its own as well."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(func)


def _dispatching(x: Tensor) -> Tensor:
    made: Tensor = Tensor._make_subclass(Dispatching, x)
    return made


def _fake(x: Tensor) -> Any:
    with FakeTensorMode():
        return torch.ones(x.shape)


def _meta_parameter(optimizer: SOFIM) -> None:
    p = nn.Parameter(torch.ones(3, device="meta"))
    p.grad = torch.ones(3, device="meta")
    optimizer.param_groups[1]["params"].append(p)
    optimizer.state[p] = {"exp_avg": torch.ones(3, device="meta"), "step": torch.tensor(1, device="meta")}


DECLINED: dict[str, Callable[[SOFIM], object]] = {
    **LEFT_TO_PYTHON,
    "no group": lambda optimizer: optimizer.param_groups.clear(),
    "a group that is none": lambda optimizer: optimizer.param_groups.append("group"),
    "parameters in a tuple": lambda o: o.param_groups[1].update(params=tuple(o.param_groups[1]["params"])),
    "no parameters": lambda optimizer: optimizer.param_groups[1].pop("params"),
    "no kahan": lambda optimizer: optimizer.param_groups[1].pop("kahan"),
    "no fisher": lambda optimizer: [group.pop("fisher") for group in optimizer.param_groups],
    "lr on a device without memory": lambda o: o.param_groups[1].update(lr=torch.ones((), device="meta")),
    "lr is a string of digits": lambda o: o.param_groups[0].update(lr="1"),
    "rho is too small": lambda o: o.param_groups[0].update(rho=torch.tensor(1e-31)),
    "max_grad_norm is a tensor": lambda o: [g.update(max_grad_norm=torch.tensor(1.0)) for g in o.param_groups],
    "max_grad_norm is NaN": lambda o: [g.update(max_grad_norm=float("nan")) for g in o.param_groups],
    "a state that is none": lambda o: o.state.__setitem__(o.param_groups[1]["params"][0], "state"),
    "a count of two": _given("step", lambda x: torch.ones(2, dtype=torch.int64)),
    "a count of two, in place": _data_of("step", lambda x: torch.ones(2, dtype=torch.int64)),
    "a count of float64, in place": _data_of("step", lambda x: x.view(torch.float64)),
    "a moment of another shape, in place": _data_of("exp_avg", lambda x: x.view(1, -1)),
    "a shorter moment, in place": _data_of("exp_avg", lambda x: x[:-1]),
    "a moment of another dtype, in place": _data_of("exp_avg", lambda x: x.view(torch.int32)),
    "a parameter of another shape, in place": _data_of("w", lambda x: x.view(-1, 1)),
    "a shorter parameter, in place": _data_of("w", lambda x: x[:-1]),
    "a gradient of another shape, in place": _data_of("grad", lambda x: x.view(1, -1)),
    "a gradient of another dtype, in place": _data_of("grad", lambda x: x.view(torch.int32)),
    "a nested gradient, in place": _data_of(
        "grad", lambda x: torch.nested.nested_tensor([torch.ones(2), torch.ones(5)], layout=torch.jagged)
    ),
    "a gradient without memory": _given("grad", _without_memory),
    "a gradient without memory, in place": _data_of("grad", _without_memory),
    "a parameter without memory": lambda o: o.param_groups[1]["params"][0].untyped_storage().resize_(0),
    "a moment without memory": _given("exp_avg", _without_memory),
    "a gradient of zeros that are nowhere": _given("grad", lambda x: torch._efficientzerotensor(x.shape)),
    "a fake gradient": _given("grad", _fake),
    "a moment with ways of its own": _given("exp_avg", lambda x: TwoTensor(x, x.clone())),
    "a gradient with ways of its own": _given("grad", lambda x: TwoTensor(x, x.clone())),
    "a moment with memory and ways of its own": _given("exp_avg", _dispatching),
    "a gradient with memory and ways of its own": _given("grad", _dispatching),
    "lr with ways of its own": lambda o: o.param_groups[1].update(lr=_dispatching(torch.ones(()))),
    "an inference tensor": _given("exp_avg", lambda x: torch.inference_mode()(torch.zeros_like)(x)),
    "parameters on several devices": _meta_parameter,
}


@pytest.mark.parametrize("seasoned", [False, True], ids=["first", "later"])
@pytest.mark.parametrize("name", DECLINED)
def test_what_is_declined_is_left_alone(name: str, seasoned: bool) -> None:
    """At the first gather and at a later one; no value, no version and nothing that is said of the step is another."""
    params = [nn.Parameter(torch.linspace(-1, 1, n)) for n in (5, 40)]
    give(params, [torch.full_like(p, 0.5) for p in params])
    optimizer = made([{"params": [p]} for p in params])
    t = new()
    if seasoned:
        for _ in range(2):
            assert gathered(t, optimizer) is not None
            t.finish(True, True, True)
    DECLINED[name](optimizer)
    states = [optimizer.state.get(p) for p in params]
    tensors = [*params, *(x for known in states if isinstance(known, dict) for x in known.values())]
    tensors = [x for x in tensors if type(x) in (Tensor, nn.Parameter) and x.untyped_storage().nbytes()]
    tensors = [x for x in tensors if x.device.type == "cpu" and not x.is_inference()]
    before, versions = [x.detach().clone() for x in tensors], [x._version for x in tensors]
    shown = [(t.size, t.tiles, t.rows.clone(), t.hyper.clone())] if seasoned else []
    assert gathered(t, optimizer) is None
    assert gathered(t, optimizer) is None
    t.finish(True, True, True)
    assert same_bits(before, [x.detach() for x in tensors])
    assert versions == [x._version for x in tensors]
    for size, count, rows, hyper in shown:
        assert (size, count) == (t.size, t.tiles)
        assert torch.equal(rows, t.rows)
        assert torch.equal(hyper, t.hyper)


@pytest.mark.parametrize("groups", [None, (), "groups", {"params": []}], ids=str)
def test_groups_and_state_of_other_types(groups: Any) -> None:
    optimizer, _ = three()
    t = new()
    assert t.gather(groups, optimizer.state) is None
    assert t.gather(optimizer.param_groups, None) is None
    assert t.gather(optimizer.param_groups, list(optimizer.state.items())) is None


@pytest.mark.parametrize("fake", [False, True], ids=["meta", "fake"])
def test_tensors_without_memory(fake: bool) -> None:
    """All of them on one device, but on none that has addresses."""
    with FakeTensorMode() if fake else torch.device("meta"):
        p = nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        optimizer = made([p])
    assert gathered(new(), optimizer) is None


def test_modes_that_watch_operators_see_them() -> None:
    optimizer, _ = three()
    t = new()
    gathered(t, optimizer)
    with Watching():
        assert gathered(t, optimizer) is None
    assert gathered(t, optimizer) == 0


def test_modes_that_watch_functions_see_nothing() -> None:
    """Nor do subclasses without dispatch of their own, which are as good as tensors."""
    optimizer, params = three()
    params[0].grad = params[0].grad.as_subclass(Subclass)  # type: ignore[union-attr]
    params[1].grad = torch.ones(80)[::2]
    t = new()
    with Quiet():
        for _ in range(2):
            assert t.gather(optimizer.param_groups, optimizer.state) is not None
            t.finish(True, True, True)
    gathered(t, optimizer)
    check_everything(t, optimizer)


def test_transformed_tensors() -> None:
    """Inside of vmap and grad, what looks like a tensor stands for others."""
    optimizer, params = three()
    t = new()
    gathered(t, optimizer)
    answers = []

    def with_moment(x: Tensor) -> Tensor:
        optimizer.state[params[1]]["exp_avg"] = x
        answers.append(gathered(t, optimizer))
        return x.sum()

    torch.func.grad(with_moment)(torch.ones(40))
    torch.vmap(with_moment)(torch.ones(3, 40))
    assert answers == [None, None]


def test_inference_tensors() -> None:
    """In inference mode they can be updated, outside of it not."""
    t = new()
    with torch.inference_mode():
        p = nn.Parameter(torch.ones(20), requires_grad=False)
        p.grad = torch.ones(20)
        optimizer = SOFIM([p], backend="reference")
        optimizer.step()
        assert gathered(t, optimizer) is not None
        t.finish(True, True, True)
        assert gathered(t, optimizer) == 0
    assert gathered(t, optimizer) is None
    ordinary = nn.Parameter(torch.ones(20))
    ordinary.grad = torch.ones(20)
    memory = t.rows.data_ptr()
    assert gathered(t, made([ordinary])) is not None
    assert t.rows.data_ptr() == memory
    assert [x.is_inference() for x in (t.rows, t.hyper)] == [False, False]


def test_a_parameter_without_a_gradient_may_lie_anywhere() -> None:
    optimizer, _ = three()
    optimizer.param_groups[0]["params"].insert(1, nn.Parameter(torch.ones(3, device="meta")))
    t = new()
    for _ in range(2):
        assert gathered(t, optimizer) is not None
        check_everything(t, optimizer)
    optimizer.param_groups[0]["params"][1] = nn.Parameter(TwoTensor(torch.ones(2), torch.ones(2)))
    assert gathered(t, optimizer) is None
