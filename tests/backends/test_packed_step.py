"""``sofim_fused._C.PackedStep``, the tensors of a whole step: what its rows say, and that nothing is stale.

``test_packed_step_declined.py`` has the steps that it leaves to Python.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import struct
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sofim_fused import SOFIM, native
from sofim_fused.backends.triton import pack
from tests.support.packed import TILE, check_everything, gathered, made, new, three
from tests.support.problems import give, give_state, mixed_problem, same_bits, snapshot

pytestmark = pytest.mark.skipif(isinstance(native.cpu(), str), reason=str(native.cpu()))


# What the rows say

OPTIONS: list[dict[str, Any]] = [
    {},
    {"numerator": "gradient", "fisher": "group", "max_grad_norm": 2},
    {"fisher": "parameter", "skip_nonfinite": True, "kahan": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("decay", ["none", "decoupled", "l2"])
@pytest.mark.parametrize(
    ("dtypes", "state_dtype"),
    [
        ((torch.float32,), None),
        ((torch.float64, torch.complex128), None),
        ((torch.bfloat16, torch.float16, torch.float32), torch.bfloat16),
        ((torch.bfloat16, torch.float32, torch.complex64), None),
    ],
    ids=str,
)
def test_rows_and_hyper(dtypes: tuple[torch.dtype, ...], state_dtype: Any, decay: str, options: dict[str, Any]) -> None:
    """Over all layouts, with gradients that come late or rarely, in other strides, conjugated or wider."""
    problem = mixed_problem(dtypes, decay)
    optimizer = made(problem.groups, state_dtype=state_dtype, **options)
    t = new()
    for step, grads in zip(range(7), problem.gradients(), strict=False):
        wide = [g.float() if g is not None and g.element_size() == 2 and step % 2 else g for g in grads]
        give(problem.params, wide)
        assert gathered(t, optimizer) is not None
        check_everything(t, optimizer)
        t.finish(True, True, True)


def test_a_moment_with_gaps() -> None:
    optimizer, params = three()
    known = optimizer.state[params[0]]
    known["exp_avg"] = torch.arange(32.0).reshape(4, 8)[:, ::2]
    t = new()
    assert gathered(t, optimizer) == pack.EVERYTHING
    check_everything(t, optimizer)


@pytest.mark.parametrize("diagonal", ["identity", "row"])
def test_moments_in_8_bits(diagonal: str) -> None:
    """Whole rows, rows of 16 elements times a number, and others; a small tensor, and one in another order."""
    params = [nn.Parameter(torch.randn(shape)) for shape in ((40, 128), (9, 64, 3, 3), (33, 130), (40,))]
    params.append(nn.Parameter(torch.randn(5, 16, 8, 9).to(memory_format=torch.channels_last)))
    optimizer = made(params, state_dtype=torch.float8_e4m3fn, diagonal=diagonal)
    give(params, [torch.randn_like(p) for p in params])
    t = new()
    assert gathered(t, optimizer) == pack.EVERYTHING
    if diagonal == "identity":
        check_everything(t, optimizer)
    ragged = pack.CODES | pack.RAGGED
    assert t.rows[:, pack.KIND].tolist() == [pack.CODES, ragged, ragged | pack.UNALIGNED, 0, pack.CODES]
    t.finish(True, True, True)

    scales = optimizer.state[params[0]]["exp_avg_scale"]
    optimizer.state[params[0]]["exp_avg_scale"] = scales.clone()
    assert gathered(t, optimizer) == pack.POINTERS
    version = optimizer.state[params[0]]["exp_avg_scale"]._version
    t.finish(True, True, True)
    assert optimizer.state[params[0]]["exp_avg_scale"]._version > version


def test_second_moments_in_8_bits_are_left_to_python() -> None:
    param = nn.Parameter(torch.randn(40, 128))
    optimizer = made([param], state_dtype=torch.float8_e4m3fn, diagonal="element")
    give([param], [torch.randn_like(param)])
    assert gathered(new(), optimizer) is None


def test_running_means() -> None:
    """Of diagonals that adapt: addresses, sizes, and what counts as a change."""
    shapes = ((4, 5), (3,), (2, 3, 4, 5))
    params = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    params[2].data = params[2].data.to(memory_format=torch.channels_last)
    params.append(nn.Parameter(torch.ones(6, 4).t()))
    give(params, [torch.ones_like(p) for p in params])
    optimizer = made(params, diagonal="factored", rho=None, numerator="nesterov", beta2=0.5, eps=0.25)
    t = new()
    assert gathered(t, optimizer) == pack.EVERYTHING
    assert (t.adaptive, t.rank_one, t.numerator) == (True, False, "nesterov")
    assert t.settings.tolist() == [[0.5, 0.25]]
    states = [optimizer.state[p] for p in params]
    blocks = [[state["row_var"].data_ptr(), state["col_var"].data_ptr()] for state in (states[0], *states[2:])]
    expected = [
        [*blocks[0], 0, 0, 4, 5, 5],
        [0, 0, states[1]["variance"].data_ptr(), 1, 1, 3, 3],
        [*blocks[1], 0, 0, 2, 60, 60],
        [*blocks[2], 0, 0, 4, 6, 1],
    ]
    assert t.means.tolist() == expected
    assert [row[pack.KIND] >> 6 for row in t.rows.tolist()] == [0, 1, 0, 0]
    assert pack.ELEMENT in {kind & ~pack.UNALIGNED for kind in t.kinds}
    t.finish(False, False, False)
    assert gathered(t, optimizer) == 0
    states[0]["row_var"] = torch.zeros(4)
    assert gathered(t, optimizer) == pack.POINTERS
    optimizer.param_groups[0]["beta2"] = 0.75
    assert gathered(t, optimizer) == pack.VALUES
    before = [x._version for state in states for x in state.values()]
    t.finish(True, True, True)
    assert all(x._version > old for x, old in zip((x for s in states for x in s.values()), before, strict=True))


VIEWS: dict[str, Callable[[Tensor, Tensor, SOFIM], None]] = {
    "conjugated gradient": lambda c, x, o: setattr(c.grad, "data", c.grad.data.conj()),  # type: ignore[union-attr]
    "conjugated moment": lambda c, x, o: setattr(o.state[c]["exp_avg"], "data", o.state[c]["exp_avg"].conj()),
    "conjugated weight": lambda c, x, o: setattr(c, "data", c.data.conj()),
    "negated gradient": lambda c, x, o: setattr(x.grad, "data", torch._neg_view(x.grad.data)),  # type: ignore
    "negated moment": lambda c, x, o: setattr(o.state[x]["exp_avg"], "data", torch._neg_view(o.state[x]["exp_avg"])),
    "negated weight": lambda c, x, o: setattr(x, "data", torch._neg_view(x.data)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_negated_and_conjugated_tensors(name: str) -> None:
    """Views whose bit is set, over the very memory of the tensor without it."""
    c, x = nn.Parameter(torch.randn(6, dtype=torch.complex64)), nn.Parameter(torch.randn(5))
    give([c, x], [torch.randn(6, dtype=torch.complex64), torch.randn(5)])
    optimizer = made([c, x])
    for p in (c, x):
        optimizer.state[p]["exp_avg"].copy_(torch.randn(p.shape))
    t = new()
    gathered(t, optimizer)
    VIEWS[name](c, x, optimizer)
    for _ in range(2):
        assert gathered(t, optimizer) is not None
        check_everything(t, optimizer)
    before = snapshot(optimizer)
    t.finish(True, True, True)  # of copies as they were made
    assert same_bits(before, snapshot(optimizer))


@pytest.mark.parametrize("shift", ["w", "g", "m", "lost", "nothing"])
def test_kinds(shift: str) -> None:
    """Four types of weights, wider gradients, rounded moments, kept bits; any one address may be off."""

    def offset(x: Tensor, shifted: bool) -> Tensor:
        return torch.cat((x[:1], x))[1:] if shifted else x

    params, kinds = [], []
    for at, dtype in enumerate((torch.float32, torch.float64, torch.bfloat16, torch.float16)):
        for wide in (False, True)[: 1 + at // 2]:
            p = nn.Parameter(offset(torch.ones(64, dtype=dtype), shift == "w"))
            g = torch.ones(64, dtype=torch.float32 if wide else dtype)
            give([p], [offset(g, shift == "g")])
            params.append(p)
            kinds.append(at + 4 * wide + 16 * (at > 1) + 128 * (dtype == torch.bfloat16))
    optimizer = made(params)
    for p in params:
        known = optimizer.state[p]
        known.update(exp_avg=offset(known["exp_avg"], shift == "m"))
        for name in known.keys() & {"kahan", "master_bits"}:
            known[name] = offset(known[name], shift == "lost")
    off = [shift != "nothing" and (shift != "lost" or kind >= 16) for kind in kinds]
    expected = [kind + 32 * where for kind, where in zip(kinds, off, strict=True)]
    t = new()
    gathered(t, optimizer)
    assert t.rows[:, pack.KIND].tolist() == expected
    assert t.kinds == sorted(expected)
    for group in optimizer.param_groups:
        group["params"] = [p for p in params if p.dtype != torch.float64]
        group.update(state_dtype=torch.bfloat16, kahan=False)
    for p in params:
        optimizer.state[p]["exp_avg"] = torch.zeros(64, dtype=torch.bfloat16)
    assert gathered(t, optimizer) is not None
    narrow = [kind for kind in kinds if kind != 1]
    assert [kind & 31 for kind in t.rows[:, pack.KIND].tolist()] == [kind % 16 + 8 for kind in narrow]


def test_an_empty_tensor_has_a_tile_and_no_addresses() -> None:
    params = [nn.Parameter(torch.zeros(n)) for n in (0, 3 * TILE, 0, 1)]
    give(params, [torch.zeros_like(p) for p in params])
    optimizer = made(params)
    t = new()
    for expected in (pack.EVERYTHING, 0):
        assert gathered(t, optimizer) == expected
        assert t.rows[:, pack.FIRST].tolist() == [0, 1, 4, 5]
        assert t.tiles == 6
        assert t.rows[::2, :4].abs().sum() == 0
        check_everything(t, optimizer)


def test_no_gradient_at_all() -> None:
    optimizer, params = three()
    t = new()
    give(params, [None] * 3)
    assert gathered(t, optimizer) == pack.EVERYTHING
    assert (t.size, t.tiles, t.kinds, t.device) == (0, 0, [], None)
    assert t.rows.shape == (0, pack.COLUMNS)
    assert gathered(t, optimizer) == 0
    t.finish(True, True, True)
    give(params, [torch.ones_like(p) for p in params])
    assert gathered(t, optimizer) == pack.POINTERS | pack.LAYOUT
    check_everything(t, optimizer)
    t.finish(True, True, True)
    give(params, [None] * 3)
    assert gathered(t, optimizer) == pack.POINTERS | pack.LAYOUT
    check_everything(t, optimizer)


def test_hyperparameters_as_tensors_on_the_cpu_are_read_each_time() -> None:
    optimizer, _ = three()
    lr = torch.tensor(0.5, requires_grad=True)
    optimizer.param_groups[0].update(lr=lr, rho=torch.tensor([2], dtype=torch.int64))
    t = new()
    assert gathered(t, optimizer) == pack.EVERYTHING
    check_everything(t, optimizer)
    assert gathered(t, optimizer) == 0
    lr.data.fill_(0.125)
    assert gathered(t, optimizer) == pack.VALUES
    assert t.hyper[0, pack.LR] == 0.125
    lr.data.fill_(float("inf"))
    assert gathered(t, optimizer) is None


def test_a_tile_has_elements() -> None:
    with pytest.raises(ValueError, match="tile: at least 1 element"):
        new(0)
    optimizer, _ = three()
    t = new(1)
    gathered(t, optimizer)
    check_everything(t, optimizer, tile=1)


# What changed


def _set_all(**values: Any) -> Callable[[SOFIM], None]:
    def change(optimizer: SOFIM) -> None:
        for group in optimizer.param_groups:
            group.update(values)

    return change


def _set_first(**values: Any) -> Callable[[SOFIM], None]:
    return lambda optimizer: optimizer.param_groups[0].update(values)


def _first(optimizer: SOFIM) -> Any:
    return optimizer.param_groups[0]["params"][0]


def _state(optimizer: SOFIM) -> dict[str, Any]:
    known: dict[str, Any] = optimizer.state[_first(optimizer)]
    return known


def _each(change: Callable[[Tensor], object]) -> Callable[[SOFIM], None]:
    def apply(optimizer: SOFIM) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                change(p)

    return apply


def _grads_anew(optimizer: SOFIM) -> None:
    _each(lambda p: setattr(p, "grad", p.grad.clone()))(optimizer)


def _add_group(optimizer: SOFIM) -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [p]})
    p.grad = torch.ones(3)
    give_state(optimizer)


def _remove_first(optimizer: SOFIM) -> None:
    del optimizer.param_groups[0]["params"][0]


def _other_parameter(optimizer: SOFIM) -> None:
    twin = nn.Parameter(_first(optimizer).detach().clone())
    twin.grad = torch.ones_like(twin)
    optimizer.state[twin] = _state(optimizer)
    optimizer.param_groups[0]["params"][0] = twin


def _swap_states(optimizer: SOFIM) -> None:
    known = list(optimizer.state.values())
    known[1]["step"], known[2]["step"] = known[2]["step"], known[1]["step"]


POINTERS, VALUES, LAYOUT, EVERYTHING = pack.POINTERS, pack.VALUES, pack.LAYOUT, pack.EVERYTHING
CHANGES: dict[str, tuple[Callable[[SOFIM], object], int]] = {
    "nothing": (lambda optimizer: None, 0),
    "equal values": (_set_first(lr=float("0.5"), momentum=float("0.9")), 0),
    "gradients anew": (_grads_anew, POINTERS),
    "a gradient's data": (lambda o: setattr(_first(o).grad, "data", torch.ones(4, 4)), POINTERS),
    "a gradient in other memory": (lambda o: _first(o).grad.set_(torch.ones(4, 4)), POINTERS),
    "a gradient's strides": (lambda o: setattr(_first(o).grad, "data", _first(o).grad.t()), POINTERS),
    "a gradient gone": (lambda o: setattr(_first(o), "grad", None), POINTERS | LAYOUT),
    "a gradient off by one": (lambda o: setattr(_first(o), "grad", torch.ones(17)[1:].view(4, 4)), POINTERS | LAYOUT),
    "lr": (_set_first(lr=0.125), VALUES),
    "momentum": (_set_first(momentum=0.5), VALUES),
    "rho": (_set_first(rho=2), VALUES),
    "maximize": (_set_first(maximize=True), VALUES),
    "decoupled weight decay": (_set_first(weight_decay=0.5), VALUES | LAYOUT),
    "L2 decay": (_set_first(weight_decay=0.5, decoupled_weight_decay=False), VALUES | LAYOUT),
    "L2 without decay": (_set_first(decoupled_weight_decay=False), 0),
    "fisher": (_set_all(fisher="parameter"), LAYOUT),
    "numerator": (_set_all(numerator="gradient"), LAYOUT),
    "another numerator": (_set_all(numerator="nesterov"), LAYOUT),
    "a limit": (_set_all(max_grad_norm=1.0), LAYOUT),
    "skip_nonfinite": (_set_all(skip_nonfinite=True), LAYOUT),
    "a parameter's data": (lambda o: setattr(_first(o), "data", torch.ones(4, 4)), POINTERS),
    "a parameter in other memory": (lambda o: torch.no_grad()(_first(o).set_)(torch.ones(4, 4)), POINTERS),
    "a parameter's strides": (lambda o: setattr(_first(o), "data", _first(o).data.t()), POINTERS),
    "a moment replaced": (lambda o: _state(o).update(exp_avg=torch.ones(4, 4)), POINTERS),
    "a moment's data": (lambda o: setattr(_state(o)["exp_avg"], "data", torch.ones(4, 4)), POINTERS),
    "a moment in other memory": (lambda o: _state(o)["exp_avg"].set_(torch.ones(4, 4)), POINTERS),
    "a moment's strides": (lambda o: setattr(_state(o)["exp_avg"], "data", _state(o)["exp_avg"].t()), POINTERS),
    "a count replaced": (lambda o: _state(o).update(step=torch.tensor(7)), POINTERS),
    "a count's data": (lambda o: setattr(_state(o)["step"], "data", torch.tensor(7)), POINTERS),
    "counts exchanged": (_swap_states, POINTERS),
    "a state of the user's": (lambda o: _state(o).update(mine=torch.ones(2)), 0),
    "a state as another dict": (lambda o: o.state.__setitem__(_first(o), dict(_state(o))), 0),
    "a state elsewhere in the dict": (lambda o: o.state.__setitem__(_first(o), o.state.pop(_first(o))), 0),
    "state loaded": (lambda o: o.load_state_dict(copy.deepcopy(o.state_dict())), POINTERS),
    "a parameter removed": (_remove_first, POINTERS | LAYOUT),
    "another parameter": (_other_parameter, POINTERS),
    "parameters reordered": (lambda o: o.param_groups[0]["params"].reverse(), POINTERS | LAYOUT),
    "groups reversed": (lambda o: o.param_groups.reverse(), EVERYTHING),
    "a group added": (_add_group, EVERYTHING),
    "a group removed": (lambda o: o.param_groups.pop(), EVERYTHING),
}


@pytest.mark.parametrize("name", CHANGES)
def test_nothing_is_stale(name: str) -> None:
    """After a few steps as usual; what is said to have changed is what has."""
    change, expected = CHANGES[name]
    optimizer, params = three()
    t = new()
    assert gathered(t, optimizer) == EVERYTHING
    for _ in range(2):
        assert gathered(t, optimizer) == 0
        t.finish(True, True, True)
    kept = list(params), [p.grad for p in params], copy.copy(optimizer.state)  # no memory is used again
    memory = t.rows.data_ptr(), t.hyper.data_ptr(), t.size, len(t.hyper)
    change(optimizer)
    assert gathered(t, optimizer) == expected
    check_everything(t, optimizer)
    assert (t.rows.data_ptr() == memory[0]) == (t.size == memory[2])
    assert (t.hyper.data_ptr() == memory[1]) == (len(t.hyper) == memory[3])
    t.finish(True, True, True)
    if "strides" not in name:  # those have copies, anew each time
        assert gathered(t, optimizer) == 0
        check_everything(t, optimizer)
    del kept


@pytest.mark.parametrize("name", CHANGES)
def test_what_was_shown_is_as_it_was_after_a_change_and_back(name: str) -> None:
    """A gather that is declined is none: what changed is told from the one before it."""
    optimizer, params = three()
    t = new()
    gathered(t, optimizer)
    rows, hyper = t.rows.clone(), t.hyper.clone()
    optimizer.param_groups[1]["params"].append("w")
    assert gathered(t, optimizer) is None
    assert torch.equal(t.rows, rows)
    assert torch.equal(t.hyper, hyper)
    optimizer.param_groups[1]["params"].pop()
    kept = [p.grad for p in params], copy.copy(optimizer.state)
    change, expected = CHANGES[name]
    change(optimizer)
    assert gathered(t, optimizer) == expected
    check_everything(t, optimizer)
    del kept


def test_lost_bits_are_replaced() -> None:
    optimizer, params = three(torch.bfloat16)
    t = new()
    gathered(t, optimizer)
    for replace in (
        lambda known: known.update(master_bits=known["master_bits"].clone()),
        lambda known: setattr(known["master_bits"], "data", known["master_bits"].clone()),
    ):
        old = optimizer.state[params[0]]["master_bits"].data
        replace(optimizer.state[params[0]])
        assert gathered(t, optimizer) == POINTERS
        check_everything(t, optimizer)
        del old
    optimizer.param_groups[1]["kahan"] = False
    assert gathered(t, optimizer) == POINTERS | LAYOUT
    check_everything(t, optimizer)
    optimizer.param_groups[1]["kahan"] = None
    del optimizer.state[params[2]]["master_bits"]
    assert gathered(t, optimizer) is None


def test_a_limit_that_moves_is_no_other_layout() -> None:
    optimizer, _ = three(max_grad_norm=1.0)
    t = new()
    gathered(t, optimizer)
    _set_all(max_grad_norm=2.0)(optimizer)
    assert gathered(t, optimizer) == 0
    assert t.max_grad_norm == 2.0


# finish


def write(address: int, values: list[float]) -> None:
    packed = struct.pack(f"{len(values)}f", *values)
    ctypes.memmove(address, packed, len(packed))


@pytest.mark.parametrize(("weights", "moments"), [(True, True), (True, False), (False, True), (False, False)])
def test_copies_go_home(weights: bool, moments: bool) -> None:
    """A sliced parameter and a moment with gaps: what a pass writes in their place arrives, and only if it wrote."""
    p = nn.Parameter(torch.zeros(3, 8)[:, ::2])
    q = nn.Parameter(torch.zeros(3, 4))
    give([p, q], [torch.ones(3, 4), torch.ones(3, 4)])
    optimizer = made([p, q])
    optimizer.state[q]["exp_avg"] = torch.zeros(3, 8)[:, ::2]
    t = new()
    for step in range(2):
        with torch.no_grad():
            p.zero_()
            q.zero_()
        assert gathered(t, optimizer) is not None
        values = [float(i + 100 * step) for i in range(12)]
        for row in t.rows.tolist():
            write(row[pack.W], values)
            write(row[pack.M], values)
        t.finish(weights, moments, True)
        there = torch.tensor(values).view(3, 4)
        assert torch.equal(p, there) == weights
        assert torch.equal(optimizer.state[q]["exp_avg"], there) == moments
        assert torch.equal(q, there)  # these lie where the rows say
        assert torch.equal(optimizer.state[p]["exp_avg"], there)


def test_lost_bits_go_home() -> None:
    p = nn.Parameter(torch.zeros(6, dtype=torch.bfloat16))
    p.grad = torch.ones(6, dtype=torch.bfloat16)
    optimizer = made([p])
    optimizer.state[p]["master_bits"] = torch.zeros(12, dtype=torch.int16)[::2]
    t = new()
    gathered(t, optimizer)
    ctypes.memset(int(t.rows[0, pack.LOST]), 0x40, 12)
    t.finish(False, True, True)
    assert not optimizer.state[p]["master_bits"].any()
    gathered(t, optimizer)
    ctypes.memset(int(t.rows[0, pack.LOST]), 0x40, 12)
    t.finish(True, False, False)
    assert bool((optimizer.state[p]["master_bits"] == 0x4040).all())


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("moments", [False, True])
@pytest.mark.parametrize("steps", [False, True])
def test_version_counters(weights: bool, moments: bool, steps: bool) -> None:
    """Each tensor's rises if it was written, so that autograd notices."""
    optimizer, params = three(torch.bfloat16)
    t = new()
    gathered(t, optimizer)

    def versions() -> list[int]:
        names = ("exp_avg", "step", "master_bits")
        return [x._version for p in params for x in (p, p.grad, *(optimizer.state[p][name] for name in names))]

    before = versions()
    t.finish(weights, moments, steps)
    expected = [weights, False, moments, steps, weights] * 3
    assert [after > was for after, was in zip(versions(), before, strict=True)] == expected
    before = versions()
    t.finish(True, True, True)  # of nothing
    assert versions() == before


def test_autograd_notices() -> None:
    optimizer, params = three()
    loss = params[1].square().sum()
    t = new()
    gathered(t, optimizer)
    t.finish(True, True, True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("end", ["finish", "gather", "declined gather", "packed step gone"])
def test_gradients_are_held_until_finish(end: str) -> None:
    """From gather on they are kept alive, and copies as well; then it lets go of all of them."""
    optimizer, params = three()
    t = new()
    for _ in range(2):
        gathered(t, optimizer)
        t.finish(True, True, True)
    gathered(t, optimizer)
    storage = weakref.ref(params[0].grad)
    moment = weakref.ref(optimizer.state[params[1]]["exp_avg"])
    params[0].grad = None
    optimizer.state[params[1]]["exp_avg"] = torch.zeros(40)
    gc.collect()
    assert storage() is not None
    assert moment() is not None
    if end == "finish":
        t.finish(True, True, True)
        gathered(t, optimizer)
    elif end == "gather":
        gathered(t, optimizer)
    elif end == "declined gather":
        optimizer.param_groups[1]["lr"] = -1.0
        assert gathered(t, optimizer) is None
    else:
        del t
    gc.collect()
    assert storage() is None
    assert moment() is None


def test_a_gradient_dies_after_finish() -> None:
    optimizer, params = three()
    params[1].grad = torch.ones(80)[::2]
    t = new()
    gathered(t, optimizer)
    refs = [weakref.ref(p.grad) for p in params]
    t.finish(True, True, True)
    give(params, [None] * 3)
    gc.collect()
    assert [ref() for ref in refs] == [None] * 3


def test_a_callback_may_come_back() -> None:
    """What goes may run code that asks for another gather."""
    optimizer, params = three()
    t = new()
    answers: list[Any] = []
    gathered(t, optimizer)
    weakref.finalize(params[0].grad, lambda: (answers.append(gathered(t, optimizer)), t.finish(True, True, True)))
    params[0].grad = None
    t.finish(True, True, True)
    gc.collect()
    assert len(answers) == 1
    assert gathered(t, optimizer) is not None
    check_everything(t, optimizer)


# On a GPU


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    """Addresses on the device, copies there, and hyperparameters that are not read."""
    params = [nn.Parameter(torch.zeros(n, device="cuda")) for n in (5, 40)]
    give(params, [torch.ones(5, device="cuda"), torch.ones(80, device="cuda")[::2]])
    lr, rho = torch.tensor(0.5, device="cuda"), torch.tensor([2.0], device="cuda")
    optimizer = made([{"params": params[:1]}, {"params": params[1:], "lr": lr, "rho": rho}])
    t = new()
    assert gathered(t, optimizer) == EVERYTHING
    assert t.device == torch.device("cuda", torch.cuda.current_device())
    assert (t.rows.device.type, t.hyper.device.type) == ("cpu", "cpu")
    rows = t.rows.tolist()
    for row, p in zip(rows, params, strict=True):
        known = optimizer.state[p]
        assert [row[pack.W], row[pack.M], row[pack.STEP]] == [
            p.data_ptr(),
            known["exp_avg"].data_ptr(),
            known["step"].data_ptr(),
        ]
    assert rows[0][1] == params[0].grad.data_ptr()  # type: ignore[union-attr]
    assert rows[1][1] not in (0, params[1].grad.data_ptr())  # type: ignore[union-attr]
    assert [(group, column) for group, column, _ in t.scalars] == [(1, pack.LR), (1, pack.RHO)]
    assert t.scalars[0][2] is lr
    assert t.scalars[1][2] is rho
    assert t.hyper[1].isnan().tolist() == [name in (pack.LR, pack.RHO) for name in range(9)]
    assert (gathered(t, optimizer) or 0) & ~POINTERS == 0
    params[1].grad = torch.ones(40, device="cuda")
    optimizer.state[params[1]]["exp_avg"] = torch.ones(40)
    assert gathered(t, optimizer) is None
