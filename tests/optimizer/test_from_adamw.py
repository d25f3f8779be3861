"""``SOFIM.from_adamw``: a running ``torch.optim.AdamW`` goes on; what is taken over, what is left, and refusals."""

from __future__ import annotations

import copy
import io
import math
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, lr_scheduler

from sofim_fused import SOFIM, AdaSOFIM
from tests.optimizer.running_sgd import Group, advance, gradients, of
from tests.optimizer.test_from_sgd_state import contents
from tests.support.problems import LAYOUTS, give, give_state, make_parameter, same_bits, snapshot
from tests.support.runs import once

pytestmark = once
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "from_adamw.md"
ADAPTS = ("tensor", "row", "factored", "element")
SHAPES = ((5, 4), (3, 2, 2, 2), (7,), (), (0, 3), (1, 6))
Running = tuple[Adam, Adam, Iterator[list[Tensor]]]


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def running(
    groups: Sequence[Group], steps: int = 5, cls: type[Adam] = AdamW, dtype: torch.dtype | None = None, **arguments: Any
) -> Running:
    """An optimizer that has taken steps, its twin with parameters of its own, and the gradients that follow."""
    optimizer = cls(list(groups), **{"lr": 0.01, **arguments})
    grads = gradients(of(optimizer))
    advance(optimizer, grads, steps)
    for p in of(optimizer):
        p.grad = None
    return optimizer, copy.deepcopy(optimizer), grads


def one_group(dtype: torch.dtype = torch.float64) -> list[Group]:
    return [{"params": tensors(*SHAPES, dtype=dtype)}]


def two_groups() -> list[Group]:
    a, b, c = tensors((5, 4), (33,), (7,))
    return [
        {"params": [a, b], "betas": (0.95, 0.98), "weight_decay": 0.2, "eps": 1e-3},
        {"params": [c], "lr": 0.03, "betas": (0.0, 0.9), "maximize": True},
    ]


RUNNING: dict[str, Callable[[], Running]] = {
    "AdamW": lambda: running(one_group()),
    "Adam": lambda: running(one_group(), cls=Adam),
    "Adam with decoupled decay": lambda: running(one_group(), cls=Adam, weight_decay=0.1, decoupled_weight_decay=True),
    "two groups": lambda: running(two_groups()),
    "maximize": lambda: running(one_group(), maximize=True),
    "lr as a tensor": lambda: running(two_groups(), lr=torch.tensor([0.01], dtype=torch.float64)),
    "betas as tensors": lambda: running(one_group(), betas=tuple(torch.tensor([0.9, 0.99]).double())),
    "fused": lambda: running(one_group(), fused=True),
    "foreach": lambda: running(one_group(), foreach=True),
    "complex": lambda: running(one_group(torch.complex128)),
    "one step": lambda: running(one_group(), 1),
    "no step": lambda: running(one_group(), 0),
    "a long run": lambda: running(one_group(), 400),
}


def follow(ours: SOFIM, theirs: Adam, grads: Iterator[list[Tensor]], steps: int = 50, rtol: float = 1e-12) -> None:
    """Take steps with the same gradients, and compare how far the parameters have moved."""
    start = [p.detach().clone() for p in of(theirs)]
    for _ in range(steps):
        given = next(grads)
        for optimizer in (ours, theirs):
            give(of(optimizer), [g.clone() for g in given])
            optimizer.step()
    for p, q, old in zip(of(ours), of(theirs), start, strict=True):
        moved = q.detach() - old
        assert not p.numel() or float(moved.abs().max()) > 1e-2
        torch.testing.assert_close(p.detach() - old, moved, rtol=rtol, atol=rtol * 0.01 * steps)


# How AdamW goes on


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", RUNNING)
def test_adamw_s_path_goes_on(name: str, backend: str) -> None:
    theirs, twin, grads = RUNNING[name]()
    follow(SOFIM.from_adamw(theirs, diagonal="element", numerator="moment", backend=backend), twin, grads)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_from_the_start_the_diagonal_of_elements_is_adamw(dtype: torch.dtype, rtol: float, backend: str) -> None:
    groups = one_group(dtype)
    theirs = AdamW(copy.deepcopy(groups), lr=0.01, betas=(0.9, 0.999), weight_decay=0.1)
    options: dict[str, Any] = {"diagonal": "element", "numerator": "moment", "rho": None, "backend": backend}
    ours = SOFIM(groups, lr=0.01, momentum=0.9, beta2=0.999, weight_decay=0.1, **options)
    follow(ours, theirs, gradients(of(theirs)), rtol=rtol)


def test_the_look_ahead_is_nadam_s() -> None:
    """With a momentum that does not change. At the start NAdam corrects the gradient's bias by one power of β less."""
    groups = [{"params": tensors((5, 4), (7,))}]
    theirs = torch.optim.NAdam(copy.deepcopy(groups), lr=0.01, betas=(0.8, 0.99), momentum_decay=1e9)
    ours = SOFIM(groups, lr=0.01, momentum=0.8, beta2=0.99, diagonal="element", numerator="nesterov", rho=None)
    grads = gradients(of(theirs))
    for optimizer in (ours, theirs):
        advance(optimizer, gradients(of(optimizer), 5), 160)  # 0.8^160 is below float64's precision
    with torch.no_grad():
        for p, q in zip(of(ours), of(theirs), strict=True):
            p.copy_(q)
    follow(ours, theirs, grads)  # type: ignore[arg-type]


@pytest.mark.parametrize("complex_too", [False, True])
@pytest.mark.parametrize("diagonal", ADAPTS)
def test_the_state_is_that_of_the_same_gradients(diagonal: Any, complex_too: bool) -> None:
    """Means over rows, columns and tensors of AdamW's second moments are SOFIM's own running means."""
    dtype = torch.complex128 if complex_too else torch.float64
    theirs, _, grads = running(one_group(dtype), 6)
    ours = SOFIM.from_adamw(theirs, diagonal=diagonal)
    fresh = AdaSOFIM(one_group(dtype), lr=0.01, betas=(0.9, 0.999), diagonal=diagonal)
    advance(fresh, gradients(of(fresh)), 6)
    for p, q in zip(of(ours), of(fresh), strict=True):
        assert list(ours.state[p]) == list(fresh.state[q])
        for name, value in ours.state[p].items():
            torch.testing.assert_close(value, fresh.state[q][name], rtol=1e-13, atol=1e-16)
        with torch.no_grad():
            q.copy_(p)
    follow(ours, fresh, grads, 20)  # type: ignore[arg-type]


def test_a_model_goes_on_to_learn() -> None:
    """With the default diagonal the run goes on from where AdamW was: no step is of another size."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer: Any = AdamW(model.parameters(), lr=0.01)
    losses = []
    for step in range(200):
        if step == 100:
            optimizer = SOFIM.from_adamw(optimizer)
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = (model(x) - x[:, :3].sin()).square().mean()
        loss.backward()
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        if 95 <= step < 105:
            moved = torch.cat([(p.detach() - q).view(-1) for p, q in zip(model.parameters(), before, strict=True)])
            assert 0.001 < float(moved.square().mean().sqrt()) < 0.02
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[90:100])


# What is taken over, and what is left


def test_groups_are_taken_over() -> None:
    a, b, c = tensors((2, 2), (3,), (4,))
    theirs = AdamW(
        [
            {"params": [("a", a), ("b", b)], "name": "body", "tags": ["x"]},
            {"params": [("c", c)], "lr": 0.2, "betas": (0.5, 0.6), "rho": 8.0, "diagonal": "row"},
        ],
        lr=0.1,
        eps=1e-6,
        maximize=True,
        foreach=True,
    )
    ours = SOFIM.from_adamw(theirs, diagonal="tensor", rho=2.0, fisher="group", max_grad_norm=3.0, backend="reference")
    first, second = ours.param_groups
    common = {
        "decoupled_weight_decay": True,
        "weight_decay": 0.01,
        "maximize": True,
        "state_dtype": None,
        "kahan": None,
        "master_weight_bits": "auto",
        "eps": 1e-6,
        "numerator": "nesterov",
        "fisher": "group",
        "max_grad_norm": 3.0,
        "skip_nonfinite": False,
    }
    assert first == {
        **common,
        "params": [a, b],
        "param_names": ["a", "b"],
        "name": "body",
        "tags": ["x"],
        "lr": 0.1,
        "momentum": 0.9,
        "beta2": 0.999,
        "rho": 2.0,
        "diagonal": "tensor",
    }
    own = {"lr": 0.2, "momentum": 0.5, "beta2": 0.6, "rho": 8.0, "diagonal": "row"}
    assert second == {**common, **own, "params": [c], "param_names": ["c"]}
    assert ours.backends == {torch.device("cpu"): "reference"}
    assert first["tags"] is theirs.param_groups[0]["tags"]
    for name in ("params", "param_names"):
        assert first[name] is not theirs.param_groups[0][name]


def test_a_group_added_later_follows_adamw_s_arguments() -> None:
    theirs, _, _ = running(two_groups(), lr=0.1, betas=(0.8, 0.9), weight_decay=0.03, eps=1e-5)
    ours = SOFIM.from_adamw(theirs)
    ours.add_param_group({"params": tensors((3,))})
    added = ours.param_groups[2]
    names = ("lr", "momentum", "beta2", "weight_decay", "eps", "decoupled_weight_decay", "diagonal", "rho")
    assert [added[name] for name in names] == [0.1, 0.8, 0.9, 0.03, 1e-5, True, "factored", None]


def test_switches_of_adamw() -> None:
    """``capturable`` is taken over, as the run needs it; backends are chosen anew."""
    for switch in ({"foreach": True}, {"foreach": False}, {"fused": True}, {"fused": False}):
        theirs = AdamW(tensors((3,)), **switch)  # type: ignore[arg-type]
        assert SOFIM.from_adamw(theirs).backends == SOFIM(tensors((3,))).backends
        assert SOFIM.from_adamw(theirs, foreach=True).backends == {torch.device("cpu"): "reference"}
    theirs = AdamW(tensors((3,)))
    assert not SOFIM.from_adamw(theirs)._capturable
    theirs.param_groups[0]["capturable"] = True
    assert SOFIM.from_adamw(theirs)._capturable
    assert not SOFIM.from_adamw(theirs, capturable=False)._capturable


def test_the_class_is_that_of_the_call() -> None:
    theirs, _, grads = running(one_group())
    ours = AdaSOFIM.from_adamw(theirs)
    assert type(ours) is AdaSOFIM
    assert ours.param_groups[0]["beta2"] == 0.999
    other = SOFIM.from_adamw(theirs)
    assert [*ours.param_groups[0].items()] == [*other.param_groups[0].items()]
    advance(ours, grads, 1)


def test_gradients_in_the_backward_pass() -> None:
    """The constructor has hung hooks on the parameters before there is state."""
    results = []
    for more in ({}, {"in_backward": True, "release_grads": True}):
        theirs, _, grads = running(two_groups())
        ours = SOFIM.from_adamw(theirs, **more)
        for _ in range(5):
            given = next(grads)
            torch.stack([(p * g).sum() for p, g in zip(of(ours), given, strict=True)]).sum().backward()
            ours.step()
            ours.zero_grad()
        results.append(snapshot(ours))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_hooks_and_entries_of_the_state_are_left() -> None:
    theirs, _, grads = running(one_group())
    seen: list[Any] = []
    theirs.register_step_post_hook(lambda *_: seen.append(1))
    theirs.state[of(theirs)[0]].update(note=torch.ones(1), max_exp_avg_sq=torch.ones(5, 4))
    theirs.state[of(theirs)[1]].clear()
    ours = SOFIM.from_adamw(theirs)
    assert set(ours.state[of(ours)[0]]) == {"exp_avg", "step", "row_var", "col_var"}
    assert of(ours)[1] not in ours.state
    advance(ours, grads, 1)
    assert not seen
    assert [int(ours.state[p]["step"]) for p in of(ours)[:3]] == [6, 1, 6]


@pytest.mark.parametrize("name", ["AdamW", "two groups", "lr as a tensor", "complex"])
def test_nothing_is_shared_and_adamw_stays_as_it_is(name: str) -> None:
    theirs, twin, grads = RUNNING[name]()
    whole, values = contents(theirs)  # type: ignore[arg-type]
    weights = [p.detach().clone() for p in of(theirs)]
    ours = SOFIM.from_adamw(theirs, diagonal="element")
    assert same_bits(weights, of(ours))
    held = [x for known in theirs.state.values() for x in known.values()]
    held += [group["lr"] for group in theirs.param_groups if isinstance(group["lr"], Tensor)]
    made = [x for known in ours.state.values() for x in known.values() if x.numel()]
    made += [group["lr"] for group in ours.param_groups if isinstance(group["lr"], Tensor)]
    addresses = [x.untyped_storage().data_ptr() for x in made]
    assert len(set(addresses)) == len(addresses)
    assert not {x.untyped_storage().data_ptr() for x in held if x.numel()} & set(addresses)
    advance(ours, grads, 3)
    after, now = contents(theirs)  # type: ignore[arg-type]
    assert after == whole
    assert same_bits(values, now)
    with torch.no_grad():
        for p, value in zip(of(theirs), weights, strict=True):
            p.copy_(value)
    for optimizer in (theirs, twin):
        advance(optimizer, gradients(of(twin), 2), 3)
    assert same_bits(of(theirs), of(twin))


@pytest.mark.parametrize(
    ("diagonal", "dtype"),
    [
        ("tensor", torch.float32),
        ("row", torch.float64),
        ("factored", torch.bfloat16),
        ("factored", torch.complex64),
        ("element", torch.bfloat16),
        ("element", torch.complex64),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_state_is_laid_out_as_a_first_step_does(layout: str, dtype: torch.dtype, diagonal: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    p = make_parameter(layout, dtype, generator)
    theirs = AdamW([p])
    p.grad = torch.full_like(p, 0.5)
    theirs.step()
    ours = SOFIM.from_adamw(theirs, diagonal=diagonal)
    plain = SOFIM([make_parameter(layout, dtype, generator)], diagonal=diagonal)
    give_state(plain)
    (known,), (expected,) = ours.state.values(), plain.state.values()
    assert list(known) == list(expected)
    for name, x in known.items():
        other = expected[name]
        assert (x.dtype, x.shape, x.stride(), x.device) == (other.dtype, other.shape, other.stride(), other.device)
    assert int(known["step"]) == 1
    p.grad = torch.full_like(p, 0.5)
    ours.step()


def test_16_bit_parameters_have_their_means_in_float32() -> None:
    theirs, _, grads = running(one_group(torch.bfloat16))
    ours = SOFIM.from_adamw(theirs, state_dtype=torch.bfloat16, kahan=False)
    p = of(ours)[0]
    square = theirs.state[p]["exp_avg_sq"]
    assert square.dtype == torch.bfloat16
    assert same_bits([ours.state[p]["exp_avg"]], [theirs.state[p]["exp_avg"]])
    torch.testing.assert_close(ours.state[p]["row_var"], square.double().mean(1).float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.state[p]["col_var"], square.double().mean(0).float(), rtol=1e-6, atol=0)
    advance(ours, grads, 2)


def test_means_saturate_as_those_of_a_step() -> None:
    (p,) = tensors((4, 2), dtype=torch.float32)
    theirs = AdamW([p], lr=0.1)
    p.grad = torch.ones_like(p)
    theirs.step()
    theirs.state[p]["exp_avg_sq"] = torch.full((4, 2), 1e39, dtype=torch.float64)  # no float32
    ours = SOFIM.from_adamw(theirs)
    assert float(ours.state[p]["row_var"].max()) == torch.finfo(torch.float32).max


def test_what_is_made_in_inference_mode_can_be_written_to() -> None:
    theirs, _, grads = running(two_groups(), lr=torch.tensor(0.05))
    with torch.inference_mode():
        ours = SOFIM.from_adamw(theirs)
    advance(ours, grads, 1)
    ours.param_groups[0]["lr"].mul_(0.5)
    for known in ours.state.values():
        known["exp_avg"].zero_()


def test_saving_and_copying_go_on_to_the_same_bits() -> None:
    def reloaded(ours: SOFIM) -> SOFIM:
        file = io.BytesIO()
        torch.save(ours.state_dict(), file)
        file.seek(0)
        fresh = SOFIM([{"params": group["params"]} for group in ours.param_groups])
        fresh.load_state_dict(torch.load(file, weights_only=True))
        return fresh

    results = []
    for swap in (lambda ours: ours, reloaded, lambda ours: pickle.loads(pickle.dumps(ours)), copy.deepcopy):
        theirs, _, grads = running(two_groups())
        ours = swap(SOFIM.from_adamw(theirs))
        advance(ours, grads, 5)
        results.append(snapshot(ours))
    assert all(same_bits(results[0], other) for other in results[1:])


def test_a_state_dict_of_adamw_is_for_adamw() -> None:
    """It is loaded there, and taken over afterwards, as the message says."""
    theirs, _, _ = running(one_group())
    with pytest.raises(
        ValueError, match=r"lacks momentum, rho.*torch\.optim\.AdamW or Adam, load it into one.*from_adamw"
    ):
        SOFIM(one_group()).load_state_dict(theirs.state_dict())
    fresh = AdamW(one_group())
    fresh.load_state_dict(theirs.state_dict())
    loaded, direct = SOFIM.from_adamw(fresh), SOFIM.from_adamw(theirs)
    for p, q in zip(of(loaded), of(direct), strict=True):
        assert same_bits(list(loaded.state[p].values()), list(direct.state[q].values()))


# Schedules


SCHEDULERS: dict[str, Callable[..., Any]] = {
    "StepLR": lambda o, last: lr_scheduler.StepLR(o, 3, 0.5, last_epoch=last),
    "CosineAnnealingLR": lambda o, last: lr_scheduler.CosineAnnealingLR(o, 30, 1e-4, last_epoch=last),
    "OneCycleLR": lambda o, last: lr_scheduler.OneCycleLR(o, 0.02, total_steps=40, last_epoch=last),
}


@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01, dtype=torch.float64)], ids=["float", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_schedule_goes_on(name: str, lr: float | Tensor) -> None:
    """As docs/from_adamw.md says; OneCycleLR changes the momentum as well, which Adam calls betas[0]."""
    theirs = AdamW(one_group(), lr=copy.deepcopy(lr))
    old, grads = SCHEDULERS[name](theirs, -1), gradients(of(theirs))
    for _ in range(4):
        advance(theirs, grads, 1)
        old.step()
    ours = SOFIM.from_adamw(theirs)
    values = copy.deepcopy([(group["lr"], group["momentum"]) for group in ours.param_groups])
    new = SCHEDULERS[name](ours, old.last_epoch - 1)
    for group, (rate, momentum) in zip(ours.param_groups, values, strict=True):
        group["lr"], group["momentum"] = rate, momentum
    for _ in range(10):
        group, mine = theirs.param_groups[0], ours.param_groups[0]
        assert float(mine["lr"]) == pytest.approx(float(group["lr"]), rel=1e-13)
        assert mine["momentum"] == pytest.approx(group["betas"][0], rel=1e-13)
        advance(ours, grads, 1)
        new.step()
        old.step()


# Refusals


def _in_group(**values: Any) -> Callable[[Adam], None]:
    return lambda optimizer: optimizer.param_groups[1].update(values)


def _entry(name: str, value: Any) -> Callable[[Adam], None]:
    def put(optimizer: Adam) -> None:
        optimizer.state[of(optimizer)[2]][name] = value

    return put


def _lost(name: str) -> Callable[[Adam], None]:
    return lambda optimizer: optimizer.state[of(optimizer)[2]].__delitem__(name)


def _nothing(_: Adam) -> None:
    pass


WHERE = r"parameter group 1 of the AdamW optimizer: "
WHICH = r"of parameter 0 of group 1 of the AdamW optimizer"
SHOWN = WHICH + r" \(shape \(7,\), float64, cpu\)"
REMEDY = r".*delete the parameter's state to start it anew"
REFUSED: list[tuple[str, Callable[[Adam], None], dict[str, Any], type[Exception], str]] = [
    *(
        (name, _nothing, {name: value}, TypeError, rf"^{name} comes from the AdamW optimizer: leave it out, or set it")
        for name, value in {
            "lr": 0.1,
            "betas": (0.9, 0.99),
            "momentum": 0.9,
            "beta2": 0.99,
            "eps": 1e-8,
            "weight_decay": 0.0,
            "decoupled_weight_decay": True,
            "maximize": False,
        }.items()
    ),
    (
        "identity",
        _nothing,
        {"diagonal": "identity"},
        ValueError,
        r"^diagonal='identity' has no use for the second moments of AdamW.*make a new SOFIM",
    ),
    ("a group's identity", _in_group(diagonal="identity"), {}, ValueError, WHERE + "diagonal='identity' has no use"),
    ("a diagonal", _nothing, {"diagonal": "rows"}, ValueError, r"diagonal='rows': take one of"),
    ("a numerator", _nothing, {"numerator": "momentum"}, ValueError, r"numerator='momentum': take one of"),
    ("rho", _nothing, {"rho": 0.0}, ValueError, r"rho=0\.0: it must be at least 1e-30"),
    ("infinite rho", _nothing, {"rho": math.inf}, ValueError, r"rho=inf: pass None"),
    ("an unknown option", _nothing, {"amsgrad": False}, TypeError, r"amsgrad"),
    ("amsgrad", _in_group(amsgrad=True), {}, ValueError, WHERE + r"amsgrad=True: .*set amsgrad to False there first"),
    (
        "differentiable",
        _in_group(differentiable=True),
        {},
        ValueError,
        WHERE + r"differentiable=True: .*set group\['differentiable'\] = False first",
    ),
    (
        "L2",
        _in_group(decoupled_weight_decay=False, weight_decay=0.1),
        {},
        ValueError,
        WHERE + r"weight_decay=0\.1 is added to the gradient \(L2\).*decoupled_weight_decay to True there first",
    ),
    (
        "L2 in defaults",
        lambda o: o.defaults.update(decoupled_weight_decay=False),
        {},
        ValueError,
        r"defaults of the AdamW optimizer: weight_decay=0\.01 is added",
    ),
    ("betas[0]", _in_group(betas=(1.0, 0.9)), {}, ValueError, WHERE + r"betas\[0\]=1\.0: it must be at least 0 and"),
    ("betas[1]", _in_group(betas=(0.9, math.nan)), {}, ValueError, WHERE + r"betas\[1\]=nan"),
    ("three betas", _in_group(betas=(0.9, 0.9, 0.9)), {}, TypeError, WHERE + r"betas=\(0\.9, 0\.9, 0\.9\): pass two"),
    ("a beta", _in_group(betas=0.9), {}, TypeError, WHERE + r"betas=0\.9: pass two numbers"),
    ("eps=0", _in_group(eps=0.0), {}, ValueError, r"parameter group 1: eps=0\.0: it must be at least 1e-18"),
    ("lr=-1", _in_group(lr=-1.0), {}, ValueError, r"parameter group 1: lr=-1\.0: it must be at least 0"),
    ("maximize", _in_group(maximize=1), {}, TypeError, r"parameter group 1: maximize=1: pass True or False"),
    ("no exp_avg", _lost("exp_avg"), {}, ValueError, f"state {WHICH} has the entries .*lacks exp_avg: " + REMEDY),
    ("no exp_avg_sq", _lost("exp_avg_sq"), {}, ValueError, r"lacks exp_avg_sq: " + REMEDY),
    ("no step", _lost("step"), {}, ValueError, r"lacks step: " + REMEDY),
    (
        "a state that is a list",
        lambda o: o.state.__setitem__(of(o)[2], [1]),
        {},
        TypeError,
        f"state {WHICH} is of type list, not a dict" + REMEDY,
    ),
    *(
        (f"{name}: {what}", _entry(name, value), {}, error, f"{name} {text}{REMEDY}")
        for name in ("exp_avg", "exp_avg_sq")
        for what, value, error, text in (
            ("type", [0.0] * 7, TypeError, WHICH + " is of type list, not a tensor"),
            ("layout", torch.ones(7, dtype=torch.float64).to_sparse(), ValueError, SHOWN + " has the layout"),
            ("shape", torch.ones(7, 1, dtype=torch.float64), ValueError, SHOWN + r" has the shape \(7, 1\)"),
            ("device", torch.ones(7, dtype=torch.float64, device="meta"), ValueError, SHOWN + " is on meta"),
            ("dtype", torch.ones(7, dtype=torch.int64), ValueError, SHOWN + " is int64"),
            ("NaN", torch.full((7,), math.nan, dtype=torch.float64), ValueError, SHOWN + " holds NaN or infinity"),
        )
    ),
    (
        "a negative square",
        _entry("exp_avg_sq", torch.tensor([1.0] * 6 + [-1e-9], dtype=torch.float64)),
        {},
        ValueError,
        f"exp_avg_sq {WHICH} has negative elements" + REMEDY,
    ),
    *(
        (f"step={value!r}", _entry("step", value), {}, ValueError, f"step {WHICH} is .*expected .*" + REMEDY)
        for value in (-1, 2.5, math.nan, True, "3", None, Fraction(1, 3), torch.tensor(-1.0), torch.ones(2))
    ),
    (
        "a parameter that SOFIM cannot take",
        lambda o: o.param_groups[1]["params"].append(torch.ones(3).to(torch.float8_e4m3fn).requires_grad_()),
        {},
        ValueError,
        r"parameter 1 of group 1 \(shape \(3,\), float8_e4m3fn, cpu\): only float32",
    ),
]


@pytest.mark.parametrize(("spoil", "options", "error", "text"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_refusals(spoil: Callable[[Adam], None], options: dict[str, Any], error: type[Exception], text: str) -> None:
    theirs, _, _ = running(two_groups())
    spoil(theirs)
    whole, values = (
        [dict(group) for group in theirs.param_groups],
        [dict(known) for known in theirs.state.values() if isinstance(known, dict)],
    )
    weights = [p.detach().clone() for p in of(theirs)]
    with pytest.raises(error, match=text):
        SOFIM.from_adamw(theirs, **options)
    assert repr([dict(group) for group in theirs.param_groups]) == repr(whole)
    assert repr([dict(known) for known in theirs.state.values() if isinstance(known, dict)]) == repr(values)
    assert all(torch.equal(p.detach(), w) for p, w in zip(of(theirs), weights, strict=False) if p.dtype == w.dtype)


@pytest.mark.parametrize(
    ("value", "way"),
    [
        (torch.optim.SGD(tensors((3,))), r"SOFIM\.from_sgd\(\) takes an SGD"),
        (torch.optim.NAdam(tensors((3,))), r"from any other make a new AdaSOFIM"),
        (SOFIM(tensors((3,))), r"from any other make a new AdaSOFIM"),
        (None, r"from any other make a new AdaSOFIM"),
    ],
    ids=["SGD", "NAdam", "SOFIM", "None"],
)
def test_what_is_no_adamw(value: Any, way: str) -> None:
    text = rf"optimizer is of type {type(value).__name__}: pass a torch\.optim\.AdamW or torch\.optim\.Adam; {way}"
    with pytest.raises(TypeError, match=text):
        SOFIM.from_adamw(value)


def test_remedies_that_messages_name() -> None:
    theirs, twin, grads = running(one_group(), amsgrad=True)
    for optimizer in (theirs, twin):
        optimizer.param_groups[0]["amsgrad"] = False
        optimizer.defaults["amsgrad"] = False
    follow(SOFIM.from_adamw(theirs, diagonal="element", numerator="moment"), twin, grads)
    theirs, _, _ = running(one_group(), cls=Adam, weight_decay=0.1)
    for values in (theirs.param_groups[0], theirs.defaults):
        values["decoupled_weight_decay"] = True
    assert SOFIM.from_adamw(theirs).param_groups[0]["weight_decay"] == 0.1
    theirs, _, _ = running(one_group())
    theirs.state[of(theirs)[0]]["exp_avg"].fill_(math.nan)
    del theirs.state[of(theirs)[0]]
    assert set(SOFIM.from_adamw(theirs).state) == set(of(theirs)[1:])


# The document


def test_the_document_s_examples_run() -> None:
    if not DOCUMENT.is_file():
        pytest.skip("these are not the sources")
    examples = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    assert len(examples) >= 3
    model = nn.Linear(3, 2)
    adamw = AdamW(model.parameters(), lr=1e-3)
    old = lr_scheduler.StepLR(adamw, 30)
    for _ in range(3):
        model(torch.ones(1, 3)).sum().backward()
        adamw.step()
        old.step()
    names: dict[str, Any] = {"model": model, "adamw": adamw, "old": old}
    for example in examples:
        exec(example, names)
    assert isinstance(names["optimizer"], SOFIM)
    assert names["scheduler"].last_epoch == old.last_epoch
    names["optimizer"].step()


def test_the_document_names_every_argument() -> None:
    """Of AdamW's constructor, and of the groups that are taken over."""
    if not DOCUMENT.is_file():
        pytest.skip("these are not the sources")
    rows = [line.split("|")[1] for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`(\w+)", row)}
    assert {"params", *AdamW(tensors((1,))).defaults} - {"decoupled_weight_decay"} <= named
    assert {"exp_avg", "exp_avg_sq", "step"} <= named
