"""What ``SOFIM.from_sgd`` takes over and what it leaves: groups, hooks, state, copies; refusals, and its document."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from sofim_fused import SOFIM, from_sgd, native
from sofim_fused.backends.master_bits import joined
from tests.optimizer.running_sgd import (
    LARGE,
    RUNNING,
    SGD,
    advance,
    follow,
    gradients,
    of,
    one_group,
    running,
    two_groups,
    vectors,
)
from tests.support.oracle import Hyper, Oracle, real64
from tests.support.problems import LAYOUTS, give, give_state, make_parameter, same_bits, snapshot

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "from_sgd.md"


# What is taken over, and what is left


def test_groups_are_taken_over() -> None:
    a, b, c = vectors(2, 3, 4)
    theirs = SGD(
        [
            {"params": [("a", a), ("b", b)], "name": "body", "tags": ["x"]},
            {"params": [("c", c)], "lr": 0.2, "momentum": 0.0, "rho": 8.0, "state_dtype": None},
        ],
        lr=0.1,
        momentum=0.5,
        dampening=0.5,
        weight_decay=0.01,
        maximize=True,
        foreach=True,
    )
    ours = SOFIM.from_sgd(theirs, rho=2.0, fisher="group", max_grad_norm=3.0, backend="reference")
    first, second = ours.param_groups
    common = {
        "weight_decay": 0.01,
        "decoupled_weight_decay": False,
        "maximize": True,
        "state_dtype": None,
        "kahan": None,
        "master_weight_bits": "auto",
        "diagonal": "identity",
        "beta2": 0.99,
        "eps": 1e-8,
        "numerator": "moment",
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
        "lr": 0.2,
        "momentum": 0.5,
        "rho": 2.0,
    }
    assert second == {**common, "params": [c], "param_names": ["c"], "lr": 1.6, "momentum": 0.0, "rho": 8.0}
    assert ours.backends == {torch.device("cpu"): "reference"}
    for name in ("params", "param_names"):
        assert first[name] is not theirs.param_groups[0][name]


def test_a_group_added_later_follows_sgd_s_arguments() -> None:
    theirs, _, _ = running(two_groups(), lr=0.1, momentum=0.8, dampening=0.5, weight_decay=0.03)
    ours = SOFIM.from_sgd(theirs, rho=2.0)
    ours.add_param_group({"params": vectors(3)})
    added = ours.param_groups[2]
    assert added["lr"] == pytest.approx(2 * 0.1 * 0.5 / 0.2, rel=1e-15)
    assert [added[name] for name in ("momentum", "weight_decay", "decoupled_weight_decay")] == [0.8, 0.03, False]


def test_nesterov_becomes_the_numerator() -> None:
    """Of the whole optimizer, groups that are added later included, unless another is passed."""
    for nesterov, options, numerator in (
        (True, {}, "nesterov"),
        (False, {}, "moment"),
        (True, {"numerator": "gradient"}, "gradient"),
        (False, {"numerator": "nesterov"}, "nesterov"),
    ):
        theirs = SGD(one_group(), lr=0.1, momentum=0.9, nesterov=nesterov)
        ours = SOFIM.from_sgd(theirs, **options)
        ours.add_param_group({"params": vectors(3)})
        assert [group["numerator"] for group in ours.param_groups] == [numerator] * 2
        assert "nesterov" not in ours.param_groups[0]
    theirs.param_groups[0].update(momentum=0.0, nesterov=True)  # there is no look-ahead without momentum
    assert SOFIM.from_sgd(theirs).param_groups[0]["numerator"] == "moment"


def test_backend_switches_of_sgd_are_not_taken_over() -> None:
    for switch in ({"foreach": True}, {"foreach": False}, {"fused": True}, {"fused": False}):
        theirs = SGD(vectors(3), momentum=0.9, **switch)
        assert SOFIM.from_sgd(theirs).backends == SOFIM(vectors(3)).backends
        assert SOFIM.from_sgd(theirs, foreach=True).backends == {torch.device("cpu"): "reference"}


@pytest.mark.parametrize("options", [{"in_backward": True}, {"in_backward": True, "release_grads": True}], ids=str)
def test_gradients_in_the_backward_pass(options: dict[str, Any]) -> None:
    """The constructor has hung hooks on the parameters before there is state."""
    results = []
    for more in ({}, options):
        theirs, _, grads = running(two_groups(), momentum=0.9)
        ours = SOFIM.from_sgd(theirs, rho=2.0, **more)
        for _ in range(5):
            given = next(grads)
            torch.stack([(p * g).sum() for p, g in zip(of(ours), given, strict=True)]).sum().backward()
            ours.step()
            ours.zero_grad()
        results.append(snapshot(ours))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_hooks_and_entries_of_the_state_are_left() -> None:
    theirs, _, grads = running(one_group(), momentum=0.9)
    seen: list[Any] = []
    theirs.register_step_post_hook(lambda *_: seen.append(1))
    theirs.state[of(theirs)[0]]["note"] = torch.ones(1)
    ours = SOFIM.from_sgd(theirs)
    advance(ours, grads, 1)
    assert not seen
    assert all(set(known) == {"exp_avg", "step"} for known in ours.state.values())


def contents(optimizer: torch.optim.SGD) -> tuple[list[Any], list[Tensor]]:
    """All that an SGD optimizer holds but its parameters' values: what compares as it is, and tensors as copies."""
    whole: list[Any] = [list(optimizer.state), dict(optimizer.defaults)]
    tensors = []
    for group in optimizer.param_groups:
        whole.append(dict(group))
        tensors += [x.detach().clone() for x in group.values() if isinstance(x, Tensor)]
    for known in optimizer.state.values():
        whole.append(list(known))
        tensors += [x.clone() for x in known.values() if isinstance(x, Tensor) and not (x.is_sparse or x.is_meta)]
    return whole, tensors


@pytest.mark.parametrize("name", ["momentum", "two groups", "lr as a tensor", "no momentum", "complex"])
def test_nothing_is_shared_and_sgd_stays_as_it_is(name: str) -> None:
    theirs, twin, grads = RUNNING[name]()
    whole, tensors = contents(theirs)
    values = [p.detach().clone() for p in of(theirs)]
    ours = SOFIM.from_sgd(theirs)
    assert same_bits(values, of(ours))
    held = [x for known in theirs.state.values() for x in known.values() if x is not None]
    held += [group["lr"] for group in theirs.param_groups if isinstance(group["lr"], Tensor)]
    made = [x for known in ours.state.values() for x in known.values()]
    made += [group["lr"] for group in ours.param_groups if isinstance(group["lr"], Tensor)]
    addresses = [x.untyped_storage().data_ptr() for x in made]
    assert len(set(addresses)) == len(addresses)
    assert not {x.untyped_storage().data_ptr() for x in held} & set(addresses)
    advance(ours, grads, 3)
    after, now = contents(theirs)
    assert after == whole
    assert same_bits(tensors, now)
    with torch.no_grad():
        for p, value in zip(of(theirs), values, strict=True):
            p.copy_(value)
    following = gradients(of(twin), 2), gradients(of(twin), 2)
    for optimizer, given in zip((theirs, twin), following, strict=True):
        advance(optimizer, given, 3)
    assert same_bits(of(theirs), of(twin))


# The state


def taken_state(p: Tensor, **options: Any) -> SOFIM:
    theirs = SGD([p], lr=0.1, momentum=0.5)
    p.grad = torch.ones_like(p)
    theirs.step()
    return SOFIM.from_sgd(theirs, **options)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64], ids=str
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_state_is_laid_out_as_a_first_step_does(layout: str, dtype: torch.dtype) -> None:
    """So that the very next step takes one call of native code, where there is any."""
    generator = torch.Generator().manual_seed(0)
    p = make_parameter(layout, dtype, generator)
    ours = taken_state(p)
    plain = SOFIM([make_parameter(layout, dtype, generator)])
    give_state(plain)
    (known,), (expected,) = ours.state.values(), plain.state.values()
    assert list(known) == list(expected)
    for name, x in known.items():
        assert (x.dtype, x.shape, x.stride(), x.device) == (
            expected[name].dtype,
            expected[name].shape,
            expected[name].stride(),
            expected[name].device,
        )
    torch.testing.assert_close(known["exp_avg"], torch.full_like(known["exp_avg"], 0.5), rtol=0, atol=0)
    assert int(known["step"]) == from_sgd.settled(0.5)
    assert "kahan" not in known or not known["kahan"].any()
    if isinstance(native.cpu(), str):
        return
    take, answers = ours._native_step(), []
    ours._step_in_one_call = lambda *arguments: answers.append(take(*arguments)) or answers[-1]
    ours.step()
    assert answers == [True]


@pytest.mark.parametrize("state_dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_moments_are_buffers_rounded_once(dtype: torch.dtype, state_dtype: torch.dtype | None) -> None:
    theirs, _, grads = running([{"params": vectors(400, dtype=dtype)}], momentum=0.9)
    (p,) = of(theirs)
    ours = SOFIM.from_sgd(theirs, state_dtype=state_dtype, kahan=False)
    moment = ours.state[p]["exp_avg"]
    assert moment.dtype == (state_dtype or torch.float32)
    assert set(ours.state[p]) == {"exp_avg", "step"}
    buffer = theirs.state[p]["momentum_buffer"]
    assert buffer.dtype == dtype
    # Half an ulp of the moment, and one of the float32 product.
    error = torch.finfo(moment.dtype).eps / 2 + 1.01 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(moment.double(), buffer.double() * (1 - 0.9), rtol=error, atol=0)
    advance(ours, grads, 2)


def test_16_bit_weights_go_on_with_what_they_could_not_hold() -> None:
    theirs, _, grads = running([{"params": vectors(40, dtype=torch.bfloat16)}], momentum=0.9)
    (p,) = of(theirs)
    moment = real64(theirs.state[p]["momentum_buffer"]) * (1 - 0.9)
    hyper = Hyper(lr=0.05 / (1 - 0.9), momentum=0.9, decoupled=False)
    oracle = Oracle([p.detach()], [hyper], [0], moments=[moment], steps=[10_000])
    ours = SOFIM.from_sgd(theirs)
    for _ in range(10):
        given = next(grads)
        give([p], given)
        ours.step()
        oracle.step(given)
    held = real64(joined(p.detach(), ours.state[p]["master_bits"]))
    torch.testing.assert_close(held, oracle.weights[0], rtol=0, atol=10 * 2**-24 * float(oracle.weights[0].abs().max()))


def test_buffers_of_another_dtype() -> None:
    """Float32 gradients of 16-bit parameters leave float32 buffers."""
    (p,) = vectors(5, dtype=torch.bfloat16)
    theirs = SGD([p], lr=0.1, momentum=0.5)
    theirs.state[p]["momentum_buffer"] = torch.linspace(-1, 1, 5)
    ours = SOFIM.from_sgd(theirs)
    assert torch.equal(ours.state[p]["exp_avg"], 0.5 * torch.linspace(-1, 1, 5))


def test_what_is_made_in_inference_mode_can_be_written_to() -> None:
    theirs, _, grads = running(two_groups(), lr=torch.tensor(0.05))
    with torch.inference_mode():
        ours = SOFIM.from_sgd(theirs)
    advance(ours, grads, 1)
    ours.param_groups[0]["lr"].mul_(0.5)
    for known in ours.state.values():
        known["exp_avg"].zero_()


# Saving, copying, classes


class Mine(SOFIM):
    """A user's own."""


class Theirs(torch.optim.SGD):
    """A user's own."""


def test_classes_derived_from_either() -> None:
    theirs = Theirs(vectors(3), momentum=0.9)
    assert type(Mine.from_sgd(theirs)) is Mine


def test_saving_and_copying_go_on_to_the_same_bits() -> None:
    def straight(ours: SOFIM) -> SOFIM:
        return ours

    def reloaded(ours: SOFIM) -> SOFIM:
        file = io.BytesIO()
        torch.save(ours.state_dict(), file)
        file.seek(0)
        fresh = SOFIM([{"params": group["params"]} for group in ours.param_groups])
        fresh.load_state_dict(torch.load(file, weights_only=True))
        return fresh

    def pickled(ours: SOFIM) -> SOFIM:
        twin: SOFIM = pickle.loads(pickle.dumps(ours))
        return twin

    results = []
    for swap in (straight, reloaded, pickled, copy.deepcopy):
        theirs, _, grads = running(two_groups())
        ours = swap(SOFIM.from_sgd(theirs, rho=2.0))
        advance(ours, grads, 5)
        results.append(snapshot(ours))
    assert all(same_bits(results[0], other) for other in results[1:])


def test_a_state_dict_of_sgd_is_for_sgd() -> None:
    """It is loaded there, and taken over afterwards."""
    theirs, _, _ = running(one_group(), momentum=0.9)
    with pytest.raises(ValueError, match=r"state_dict: parameter group 0 lacks rho.*another optimizer"):
        SOFIM(one_group()).load_state_dict(theirs.state_dict())
    fresh = SGD(one_group())
    fresh.load_state_dict(theirs.state_dict())
    loaded, direct = SOFIM.from_sgd(fresh), SOFIM.from_sgd(theirs)
    for p, q in zip(of(loaded), of(direct), strict=True):
        assert same_bits(list(loaded.state[p].values()), list(direct.state[q].values()))


# Refusals


def _in_group(**values: Any) -> Callable[[torch.optim.SGD], None]:
    return lambda optimizer: optimizer.param_groups[1].update(values)


def _in_each_group(**values: Any) -> Callable[[torch.optim.SGD], None]:
    def put(optimizer: torch.optim.SGD) -> None:
        for group in optimizer.param_groups:
            group.update(values)

    return put


def _buffer(value: Any) -> Callable[[torch.optim.SGD], None]:
    def put(optimizer: torch.optim.SGD) -> None:
        optimizer.state[of(optimizer)[2]]["momentum_buffer"] = value

    return put


def _nothing(_: torch.optim.SGD) -> None:
    pass


NAMED = r"momentum buffer of parameter 0 of group 1"
SHOWN = NAMED + r" \(shape \(7,\), float64, cpu\)"
REMEDY = r".*set optimizer\.state\[param\]\['momentum_buffer'\] = None"
Spoil = Callable[[torch.optim.SGD], None]
REFUSED: list[tuple[str, Spoil, dict[str, Any], type[Exception], str]] = [
    *(
        (name, _nothing, {name: value}, TypeError, rf"^{name} comes from the SGD optimizer: leave it out, or set it")
        for name, value in {
            "params": [],
            "lr": 0.1,
            "momentum": 0.9,
            "weight_decay": 0.0,
            "decoupled_weight_decay": True,
            "maximize": False,
        }.items()
    ),
    ("steps=0", _nothing, {"steps": 0}, ValueError, r"steps=0: it must be at least 1"),
    ("steps=-3", _nothing, {"steps": -3}, ValueError, r"steps=-3: it must be at least 1"),
    ("steps=2**63", _nothing, {"steps": 2**63}, ValueError, r"steps=9223372036854775808: .*less than 2\*\*62"),
    ("steps=1.0", _nothing, {"steps": 1.0}, TypeError, r"steps=1\.0: pass how many updates SGD took"),
    ("steps=True", _nothing, {"steps": True}, TypeError, r"steps=True: pass how many updates SGD took"),
    ("rho", _nothing, {"rho": 0.0}, ValueError, r"rho=0\.0: it must be at least 1e-30"),
    ("rho's type", _nothing, {"rho": "1"}, TypeError, r"rho='1': pass a float or a one-element tensor"),
    ("a group's rho", _in_group(rho=-1.0), {}, ValueError, r"parameter group 1: rho=-1\.0"),
    ("an option", _nothing, {"fisher": "layer"}, ValueError, r"fisher='layer': take one of"),
    ("an unknown option", _nothing, {"damping": 1.0}, TypeError, r"damping"),
    ("differentiable", _nothing, {"differentiable": True}, ValueError, r"differentiable=True"),
    (
        "nesterov in one of two groups",
        _in_group(nesterov=True, dampening=0.0),
        {},
        ValueError,
        r"parameter group 0 of the SGD optimizer: nesterov=False, but another has True, .*set group",
    ),
    (
        "nesterov with dampening",
        _in_each_group(nesterov=True),
        {},
        ValueError,
        r"parameter group 1 of the SGD optimizer: dampening=0\.25 with nesterov=True, .*set group\['dampening'\] = 0",
    ),
    (
        "SGD's differentiable",
        _in_group(differentiable=True),
        {},
        ValueError,
        r"parameter group 1 of the SGD optimizer: differentiable=True: .*set group\['differentiable'\] = False first",
    ),
    (
        "dampening=1",
        _in_group(dampening=1.0),
        {},
        ValueError,
        r"parameter group 1 of the SGD optimizer: dampening=1\.0: gradients do not enter the buffer.*set it below 1",
    ),
    ("dampening=2", _in_group(dampening=2), {}, ValueError, r"dampening=2: "),
    ("dampening=nan", _in_group(dampening=math.nan), {}, ValueError, r"dampening=nan: "),
    ("dampening=-inf", _in_group(dampening=-math.inf), {}, ValueError, r"dampening=-inf: "),
    ("dampening's type", _in_group(dampening=None), {}, TypeError, r"group 1 .*: dampening=None: pass a float"),
    (
        "default dampening",
        lambda o: o.defaults.update(dampening=1.0),
        {},
        ValueError,
        r"defaults of the SGD optimizer: dampening=1\.0",
    ),
    (
        "momentum=1",
        _in_group(momentum=1.0),
        {},
        ValueError,
        r"parameter group 1: momentum=1\.0: it must be at least 0 and less than 1",
    ),
    ("momentum=-0.5", _in_group(momentum=-0.5), {}, ValueError, r"parameter group 1: momentum=-0\.5"),
    ("lr=-1", _in_group(lr=-1.0), {}, ValueError, r"parameter group 1: lr=-1\.0: it must be at least 0"),
    ("lr=nan", _in_group(lr=math.nan), {}, ValueError, r"parameter group 1: lr=nan"),
    ("weight_decay=-1", _in_group(weight_decay=-1.0), {}, ValueError, r"parameter group 1: weight_decay=-1\.0"),
    (
        "weight_decay as two numbers",
        _in_group(weight_decay=torch.full((2,), 0.1)),
        {},
        TypeError,
        r"parameter group 1: weight_decay=tensor.*pass a float",
    ),
    ("maximize", _in_group(maximize=1), {}, TypeError, r"parameter group 1: maximize=1: pass True or False"),
    ("a buffer's type", _buffer([0.0] * 7), {}, TypeError, NAMED + r" is of type list, not a tensor" + REMEDY),
    (
        "a sparse buffer",
        _buffer(torch.ones(7, dtype=torch.float64).to_sparse()),
        {},
        ValueError,
        SHOWN + r" has the layout torch\.sparse_coo: SOFIM takes dense gradients" + REMEDY + r".*to_dense\(\)",
    ),
    (
        "a buffer's shape",
        _buffer(torch.ones(7, 1, dtype=torch.float64)),
        {},
        ValueError,
        SHOWN + r" has the shape \(7, 1\)" + REMEDY,
    ),
    (
        "a buffer's device",
        _buffer(torch.ones(7, dtype=torch.float64, device="meta")),
        {},
        ValueError,
        SHOWN + r" is on meta" + REMEDY,
    ),
    (
        "a buffer's dtype",
        _buffer(torch.ones(7, dtype=torch.int64)),
        {},
        ValueError,
        SHOWN + r" is int64" + REMEDY,
    ),
    (
        "a complex buffer",
        _buffer(torch.ones(7, dtype=torch.complex128)),
        {},
        ValueError,
        SHOWN + r" is complex128" + REMEDY,
    ),
    *(
        (
            f"a buffer with {value}",
            _buffer(torch.tensor([0.0] * 6 + [value], dtype=torch.float64)),
            {},
            ValueError,
            SHOWN + r" holds NaN or infinity, as torch's fused SGD leaves it" + REMEDY + r".*zero_\(\)",
        )
        for value in (math.nan, math.inf, -math.inf)
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
def test_refusals(spoil: Spoil, options: dict[str, Any], error: type[Exception], text: str) -> None:
    theirs, _, _ = running(two_groups(), momentum=0.9)
    spoil(theirs)
    whole, tensors = contents(theirs)
    values = [p.detach().clone() for p in of(theirs)]
    with pytest.raises(error, match=text):
        SOFIM.from_sgd(theirs, **options)
    after, now = contents(theirs)
    assert repr(after) == repr(whole)  # NaN is not equal to itself
    assert same_bits(tensors, now)
    assert same_bits(values, of(theirs))


@pytest.mark.parametrize("value", [torch.optim.Adam(vectors(3)), SOFIM(vectors(3)), vectors(3), None], ids=type)
def test_what_is_no_sgd(value: Any) -> None:
    text = rf"optimizer is of type {type(value).__name__}: pass a torch\.optim\.SGD"
    with pytest.raises(TypeError, match=text):
        SOFIM.from_sgd(value)


def test_what_must_not_be_refused() -> None:
    """Switches that are not in use, and remedies that messages name."""
    theirs, twin, grads = running(one_group(), momentum=0.9, nesterov=True)
    for optimizer in (theirs, twin):
        optimizer.param_groups[0]["nesterov"] = False
    follow(SOFIM.from_sgd(theirs, rho=LARGE), twin, grads)
    theirs, twin, grads = running(two_groups(), momentum=0.9)
    for group in theirs.param_groups:
        group["nesterov"] = True  # with dampening
    follow(SOFIM.from_sgd(theirs, rho=LARGE, numerator="moment"), twin, grads)
    assert SOFIM.from_sgd(SGD(vectors(3), lr=1, momentum=0, dampening=1.0)).param_groups[0]["lr"] == 1.0
    unused = SGD(vectors(3), lr=Fraction(1, 2), momentum=Fraction(1, 2))
    assert SOFIM.from_sgd(unused, steps=7).param_groups[0]["lr"] == 1.0
    theirs, _, _ = running(one_group(), momentum=0.9)
    first, second = of(theirs)
    theirs.state[first]["momentum_buffer"] = None
    assert set(SOFIM.from_sgd(theirs).state) == {second}


# The document


def test_the_document_s_examples_run() -> None:
    if not DOCUMENT.is_file():
        pytest.skip("these are not the sources")
    examples = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert len(examples) >= 3
    model = nn.Linear(3, 2)
    theirs = SGD(model.parameters(), lr=0.05, momentum=0.9)
    old = lr_scheduler.StepLR(theirs, 30)
    for _ in range(3):
        model(torch.ones(1, 3)).sum().backward()
        theirs.step()
        old.step()
    names: dict[str, Any] = {"torch": torch, "model": model, "sgd": theirs, "old": old}
    for example in examples:
        exec(example, names)
    assert isinstance(names["optimizer"], SOFIM)
    assert names["scheduler"].last_epoch == 3


def test_the_document_names_every_argument() -> None:
    """Of SGD's constructor, in the table; and what is said of their defaults is so."""
    if not DOCUMENT.is_file():
        pytest.skip("these are not the sources")
    rows = [line.split("|")[1] for line in DOCUMENT.read_text().splitlines() if line.startswith("| `")]
    named = set(itertools.chain.from_iterable(re.findall(r"`(\w+)", row) for row in rows))
    arguments = {"params", *SGD(vectors(1)).defaults}
    assert arguments <= named
