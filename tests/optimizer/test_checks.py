"""Bad input: each row of :mod:`tests.support.bad_input` is refused by name, with a remedy, before anything changes."""

from __future__ import annotations

import copy
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sofim_fused import SOFIM, checks
from tests.support.bad_input import (
    ARGUMENTS,
    BOTH,
    INF,
    ROWS,
    STATE_DICTS,
    Argument,
    Case,
    Row,
    give_ones,
    markdown,
    one,
)
from tests.support.problems import same_bits, snapshot

ROOT = Path(__file__).resolve().parents[2]


def bits(x: Any) -> Any:
    """What can be compared of a tensor or any other value: for tensors what and where it is, and each of its bits."""
    if not isinstance(x, Tensor):
        return x if isinstance(x, (str, int, float, bool, torch.dtype, type(None))) else id(x)
    if x.layout != torch.strided:
        return str(x.layout), bits(x.detach().to_dense())
    values = b"" if x.is_meta else x.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    return x.dtype, tuple(x.shape), x.stride(), x._version, bytes(values)


def everything(case: Case) -> list[Any]:
    """All that an attempt could change, as values: parameters, their gradients and hooks, state and groups."""
    groups = [] if case.optimizer is None else case.optimizer.param_groups
    params = [*case.params, *(p for group in groups for p in group["params"])]
    found: list[Any] = [
        (bits(p), bits(p.grad if p.is_leaf else None), len(p._post_accumulate_grad_hooks or ()))
        for p in params
        if isinstance(p, Tensor)
    ]
    if case.optimizer is not None:
        for group in groups:
            found.append([(key, bits(value)) for key, value in group.items() if key != "params"])
            found.append([id(p) for p in group["params"]])
        for p, known in case.optimizer.state.items():
            entries = known.items() if isinstance(known, dict) else known
            found.append((id(p), [(bits(e[0]), bits(e[1])) if isinstance(e, tuple) else bits(e) for e in entries]))
        found.append([(key, bits(value)) for key, value in case.optimizer.defaults.items()])
        found.append((bits(case.optimizer.grad_norm), bits(case.optimizer._recorded.get("skipped_steps"))))
    return found


def refused(case: Case, error: type[Exception], pattern: str) -> None:
    """Try it, and see that nothing has changed."""
    before = everything(case)
    with pytest.raises(error, match=pattern):
        case.attempt()
    assert everything(case) == before


NAMED = [pytest.param(row, backend, id=f"{row.what} {backend}") for row in ROWS for backend in row.backends]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(("row", "backend"), NAMED)
def test_bad_input(row: Row, backend: str) -> None:
    refused(row.make(backend), row.error, row.pattern)


def test_the_table_names_each_row_once_and_each_row_says_something() -> None:
    assert len({row.what for row in ROWS}) == len(ROWS) >= 60
    for row in ROWS:
        assert len(row.text) > 20, row.what


def test_a_change_would_be_seen() -> None:
    """What looks for changes finds one of each kind."""
    changes: list[Any] = [
        lambda optimizer, p: p.data.view(torch.int32).bitwise_xor_(1),
        lambda optimizer, p: p.grad.neg_(),
        lambda optimizer, p: setattr(p, "grad", None),
        lambda optimizer, p: p.register_post_accumulate_grad_hook(print),
        lambda optimizer, p: optimizer.state[p]["step"].add_(1),
        lambda optimizer, p: optimizer.state[p]["exp_avg"].view(torch.int32).bitwise_xor_(1),
        lambda optimizer, p: optimizer.state[p].clear(),
        lambda optimizer, p: optimizer.state.clear(),
        lambda optimizer, p: optimizer.param_groups[0].update(lr=0.25),
        lambda optimizer, p: optimizer.param_groups[0]["params"].clear(),
        lambda optimizer, p: optimizer.param_groups.append({"params": []}),
        lambda optimizer, p: optimizer.defaults.update(rho=2.0),
        lambda optimizer, p: optimizer.skipped_steps,
    ]
    for change in changes:
        (p,) = one()
        optimizer = SOFIM([p])
        give_ones([p])
        optimizer.step()
        case = Case(lambda: None, (), optimizer)
        before = everything(case)
        assert everything(case) == before
        change(optimizer, p)
        assert everything(case) != before


def test_the_document_has_the_table() -> None:
    path = ROOT / "docs" / "reliability.md"
    if not path.is_file():
        pytest.skip("these are not the sources")
    text = path.read_text(encoding="utf-8").partition("<!-- bad input -->\n")[2].partition("<!-- end -->")[0]
    assert text.strip() == markdown()


# What stands for a group stands for each group, wherever it comes from

OF_A_GROUP = [
    argument
    for argument in ARGUMENTS
    if next(iter(argument.values))
    in {"lr", "momentum", "rho", "diagonal", "beta2", "eps", "weight_decay", "kahan", "master_weight_bits"}
]


@pytest.mark.parametrize("argument", OF_A_GROUP, ids=lambda argument: argument.row().what)
@pytest.mark.parametrize("when", ["construction", "add_param_group", "step"])
def test_arguments_of_a_group(when: str, argument: Argument) -> None:
    """Wherever a value comes in, also by assignment to a group, as schedulers do."""
    first, second = one(), one()
    give_ones(first + second)
    if when == "construction":
        groups: list[Any] = [{"params": first}, {"params": second, **argument.values}]
        case = Case(lambda: SOFIM(groups), first + second)
    elif when == "add_param_group":
        optimizer = SOFIM([{"params": first}])
        case = Case(lambda: optimizer.add_param_group({"params": second, **argument.values}), second, optimizer)
    else:
        optimizer = SOFIM([{"params": first}, {"params": second}])
        optimizer.param_groups[1].update(argument.values)
        case = Case(optimizer.step, (), optimizer)
    pattern = argument.row()._replace(text=f"parameter group 1: {argument.text}").pattern
    refused(case, argument.error, pattern)


@pytest.mark.parametrize("row", STATE_DICTS, ids=lambda row: row.what)
def test_after_a_bad_state_dict_a_good_one_is_taken(row: Row) -> None:
    case = row.make(row.backends[0])
    with pytest.raises(row.error):
        case.attempt()
    optimizer = case.optimizer
    assert optimizer is not None
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    give_ones([p for group in optimizer.param_groups for p in group["params"]])
    optimizer.step()


@pytest.mark.parametrize("backend", BOTH)
def test_after_a_bad_entry_a_parameter_may_start_anew(backend: str) -> None:
    """As the messages advise."""
    p, q = one()[0], one()[0]
    optimizer, twin = SOFIM([p], backend=backend), SOFIM([q], backend=backend)
    give_ones([p])
    optimizer.step()
    optimizer.state[p]["step"] = 3
    with pytest.raises(TypeError, match="delete the parameter's state to start it anew"):
        optimizer.step()
    del optimizer.state[p]
    with torch.no_grad():
        q.copy_(p)
    give_ones([p, q])
    optimizer.step()
    twin.step()
    assert same_bits(snapshot(optimizer), snapshot(twin))


# What is no row of the table


def test_a_refused_group_leaves_the_caller_s_dict_alone() -> None:
    optimizer = SOFIM(one())
    group = {"params": iter([torch.ones(2).to(torch.float8_e5m2).requires_grad_()])}
    with pytest.raises(ValueError, match="float8_e5m2"):
        optimizer.add_param_group(group)
    assert set(group) == {"params"}
    assert len(optimizer.param_groups) == 1


def test_a_gradient_on_another_device() -> None:
    """With one device at hand the check is called itself: PyTorch lets no such gradient be set."""
    elsewhere = torch.empty(2, 3, device="meta")
    with pytest.raises(
        ValueError, match=r"gradient of parameter 4 of group 2 \(shape \(2, 3\), float32, meta\) is on cpu"
    ):
        checks.gradient(elsewhere, torch.ones(2, 3), 2, 4)


# The checks' other side: unusual input that is legal


def test_a_tensor_on_a_device_is_not_read() -> None:
    """Looking at its value would wait for the device; its shape is known."""
    SOFIM(one(), lr=torch.empty((), device="meta"), rho=torch.empty(1, device="meta"))


def test_what_must_not_be_refused() -> None:
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
