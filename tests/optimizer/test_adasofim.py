"""``AdaSOFIM``: what a person who puts it in the place of AdamW expects; its state beside SOFIM's."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, lr_scheduler

from sofim_fused import SOFIM, AdaSOFIM
from tests.optimizer.support import small_model, train
from tests.support.problems import same_bits, snapshot
from tests.support.runs import once

pytestmark = once


def two(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(4, dtype=dtype)), nn.Parameter(torch.ones(2, 3, dtype=dtype))]


def step(optimizer: SOFIM, count: int = 1) -> None:
    for _ in range(count):
        for group in optimizer.param_groups:
            for i, p in enumerate(group["params"]):
                p.grad = torch.linspace(-1, 2, p.numel(), dtype=p.dtype).view_as(p) * (0.5 + i)
        optimizer.step()


def settings(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}


def test_defaults_are_the_documented_ones() -> None:
    assert settings(AdaSOFIM(two())) == {
        "lr": 4e-3,
        "momentum": 0.9,
        "rho": None,
        "weight_decay": 0.01,
        "decoupled_weight_decay": True,
        "maximize": False,
        "state_dtype": None,
        "kahan": None,
        "master_weight_bits": "auto",
        "diagonal": "factored",
        "beta2": 0.99,
        "eps": 1e-8,
        "numerator": "nesterov",
        "fisher": "model",
        "max_grad_norm": None,
        "skip_nonfinite": False,
    }


def test_arguments_stand_where_adamw_has_them() -> None:
    """So that a program in which only the class is replaced means the same."""
    theirs, ours = (inspect.signature(cls).parameters for cls in (AdamW, AdaSOFIM))
    positional = [name for name, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == list(theirs)[: len(positional)] == ["params", "lr", "betas", "eps", "weight_decay"]
    assert ours["weight_decay"].default == theirs["weight_decay"].default
    assert ours["eps"].default == theirs["eps"].default
    optimizer = AdaSOFIM(
        two(),
        1e-3,
        (0.8, 0.95),
        1e-6,
        0.1,
        maximize=True,
        foreach=None,
        capturable=False,
        differentiable=False,
        fused=None,
    )
    found = settings(optimizer)
    names = ("lr", "momentum", "beta2", "eps", "weight_decay", "maximize")
    assert [found[name] for name in names] == [1e-3, 0.8, 0.95, 1e-6, 0.1, True]


def test_a_model_learns() -> None:
    model = small_model()
    losses = train(model, AdaSOFIM(model.parameters(), lr=0.02), 300)
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize(
    "given",
    [
        {"betas": (0.8, 0.95)},
        {"betas": [0.8, 0.95]},  # as from a file in JSON
        {"momentum": 0.8, "beta2": 0.95},
    ],
    ids=str,
)
def test_betas_are_momentum_and_beta2(given: dict[str, Any]) -> None:
    optimizer, expected = (
        AdaSOFIM(two(), **given),
        SOFIM(two(), 4e-3, 0.8, beta2=0.95, diagonal="factored", numerator="nesterov", weight_decay=0.01),
    )
    assert settings(optimizer) == settings(expected)
    for made in (optimizer, expected):
        step(made, 3)
    assert same_bits(snapshot(optimizer), snapshot(expected))
    assert settings(AdaSOFIM(two(), momentum=0.5))["beta2"] == 0.99


def test_groups_may_have_betas() -> None:
    """In the constructor and later; a group of the user's own is not changed, and none keeps a key without meaning."""
    p, q, r = two()[0], two()[1], two()[0]
    given = [{"params": [p], "betas": (0.7, 0.9)}, {"params": [q]}]
    optimizer = AdaSOFIM(given, betas=(0.8, 0.95))
    later = {"params": [r], "betas": [0.6, 0.5], "lr": 0.1}
    optimizer.add_param_group(later)
    found = [(group["momentum"], group["beta2"]) for group in optimizer.param_groups]
    assert found == [(0.7, 0.9), (0.8, 0.95), (0.6, 0.5)]
    assert not any("betas" in group for group in optimizer.param_groups)
    assert given[0]["betas"] == (0.7, 0.9)
    assert later["betas"] == [0.6, 0.5]


def test_groups_of_adamw_drop_in() -> None:
    params = two()
    optimizer = AdaSOFIM(AdamW([{"params": [p]} for p in params], lr=0.25, betas=(0.7, 0.8), eps=1e-6).param_groups)
    for group in optimizer.param_groups:
        assert [group[name] for name in ("lr", "momentum", "beta2", "eps")] == [0.25, 0.7, 0.8, 1e-6]
    step(optimizer)


def test_schedulers_cycle_the_momentum() -> None:
    optimizer = AdaSOFIM(two())
    schedule, seen = lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=10), set()
    for _ in range(9):
        step(optimizer)
        seen.add(optimizer.param_groups[0]["momentum"])
        schedule.step()
    assert len(seen) == 9


@pytest.mark.parametrize("numbers", [(np.float32(0.5), np.float64(0.75)), (0, 0.0)], ids=str)
def test_betas_of_any_kind_of_number(numbers: Any) -> None:
    optimizer = AdaSOFIM(two(), betas=numbers)
    step(optimizer, 2)
    assert all(bool(p.isfinite().all()) for p in optimizer.param_groups[0]["params"])
    saved = optimizer.state_dict()["param_groups"][0]
    assert type(saved["beta2"]) is float


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"betas": 0.9}, TypeError, r"^betas=0\.9: pass two numbers, as \(0\.9, 0\.99\)"),
    ({"betas": (0.9,)}, TypeError, r"^betas=\(0\.9,\): pass two numbers"),
    ({"betas": "09"}, TypeError, r"^betas='09': pass two numbers"),
    ({"betas": (1.0, 0.9)}, ValueError, r"^betas\[0\]=1\.0: it must be at least 0 and less than 1"),
    ({"betas": (0.9, -0.1)}, ValueError, r"^betas\[1\]=-0\.1: it must be at least 0 and less than 1"),
    ({"betas": (0.9, "0.9")}, TypeError, r"^betas\[1\]='0\.9': pass a float"),
    ({"betas": (0.9, 0.95), "beta2": 0.9}, TypeError, r"^betas is given beside momentum or beta2"),
    ({"betas": (0.9, 0.95), "momentum": 0.9}, TypeError, r"^betas is given beside momentum or beta2"),
    ({"diagonal": "identity"}, ValueError, r"^diagonal='identity' does not adapt.*take SOFIM"),
    ({"diagonal": "identity", "rho": 1.0}, ValueError, r"^diagonal='identity' does not adapt.*take SOFIM"),
    ({"diagonal": "rows"}, ValueError, r"^diagonal='rows': take one of"),
    ({"amsgrad": False}, TypeError, r"amsgrad"),
    ({"decoupled_weight_decay": False}, ValueError, r"^decoupled_weight_decay=False with diagonal='factored'"),
]


@pytest.mark.parametrize(("options", "error", "text"), REFUSED, ids=[str(row[0]) for row in REFUSED])
def test_refusals(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        AdaSOFIM(two(), **options)


@pytest.mark.parametrize(
    ("values", "error", "text"),
    [
        ({"betas": (1.0, 0.9)}, ValueError, r"^parameter group 1: betas\[0\]=1\.0: it must be at least 0"),
        ({"betas": None}, TypeError, r"^parameter group 1: betas=None: pass two numbers"),
        ({"betas": (0.9, 0.9), "momentum": 0.9}, TypeError, r"^parameter group 1: betas is given beside momentum"),
        ({"betas": (0.9, 0.9), "amsgrad": True}, ValueError, r"^parameter group 1: amsgrad=True: .*leave it out"),
    ],
    ids=str,
)
def test_groups_that_are_refused(values: dict[str, Any], error: type[Exception], text: str) -> None:
    optimizer = AdaSOFIM(two())
    with pytest.raises(error, match=text):
        optimizer.add_param_group({"params": two(), **values})
    assert len(optimizer.param_groups) == 1


def test_a_running_sgd_is_not_taken_over() -> None:
    sgd = torch.optim.SGD(two(), lr=0.1, momentum=0.9)
    with pytest.raises(
        TypeError, match=r"SGD has no running means of g².*AdaSOFIM\(model\.parameters\(\)\).*SOFIM\.from_s"
    ):
        AdaSOFIM.from_sgd(sgd)


@pytest.mark.parametrize("where", ["argument", "group"])
@pytest.mark.parametrize("diagonal", ["factored", "rows"])
def test_a_running_sgd_has_no_means_for_a_diagonal(diagonal: Any, where: str) -> None:
    sgd = torch.optim.SGD(two(), lr=0.1, momentum=0.9)
    text = rf"diagonal='{diagonal}' needs running means of g², which SGD does not have.*make a new AdaSOFIM"
    if where == "group":
        sgd.param_groups[0]["diagonal"] = diagonal
        text = "^parameter group 0 of the SGD optimizer: " + text
    with pytest.raises(ValueError, match=text):
        SOFIM.from_sgd(sgd, **({"diagonal": diagonal} if where == "argument" else {}))
    sgd.param_groups[0]["diagonal"] = "identity"
    assert SOFIM.from_sgd(sgd, diagonal="identity").param_groups[0]["diagonal"] == "identity"


# The defaults of lr and rho follow the diagonal, where the user chose neither


def rates(optimizer: SOFIM) -> list[tuple[Any, Any]]:
    return [(group["lr"], group["rho"]) for group in optimizer.param_groups]


def test_defaults_follow_the_diagonal() -> None:
    assert rates(SOFIM(two())) == [(0.5, 1.0)]
    assert rates(SOFIM(two(), diagonal="row")) == [(4e-3, None)]
    assert rates(SOFIM(two(), lr=0.1, diagonal="row")) == [(0.1, None)]
    assert rates(SOFIM(two(), rho=0.3, diagonal="row")) == [(4e-3, 0.3)]
    assert rates(SOFIM(two(), lr=None, rho="auto")) == [(0.5, 1.0)]
    assert rates(AdaSOFIM(two(), lr=None)) == [(4e-3, None)]
    assert rates(AdaSOFIM(two(), rho=0.3, fisher="group")) == [(4e-3, 0.3)]


def test_defaults_follow_a_group_s_own_diagonal() -> None:
    """Wherever the group comes in; what the group or the constructor sets stays."""
    p, q = two()
    groups = [{"params": [p], "diagonal": "row"}, {"params": [q], "diagonal": "element", "lr": 0.1}]
    optimizer = SOFIM(groups)
    assert rates(optimizer) == [(4e-3, None), (0.1, None)]
    optimizer.add_param_group({"params": two(), "diagonal": "tensor"})
    assert rates(optimizer)[2] == (4e-3, None)
    assert rates(SOFIM([{"params": two(), "diagonal": "row"}], lr=0.2, rho=2.0)) == [(0.2, 2.0)]
    assert rates(SOFIM([{"params": two(), "diagonal": "row", "rho": 2.0}])) == [(4e-3, 2.0)]
    assert rates(SOFIM([{"params": two(), "diagonal": "identity"}], diagonal="row")) == [(0.5, 1.0)]
    assert rates(SOFIM([{"params": two(), "diagonal": "identity"}], lr=0.2, diagonal="row")) == [(0.2, 1.0)]
    step(optimizer)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_defaults_follow_the_diagonal_of_a_copy_too(how: Callable[[Any], Any]) -> None:
    optimizer = how(SOFIM([{"params": two(), "diagonal": "row"}]))
    optimizer.add_param_group({"params": two(), "diagonal": "factored"})
    assert rates(optimizer)[1] == (4e-3, None)


def test_defaults_follow_the_diagonal_of_a_loaded_state() -> None:
    optimizer = SOFIM(two())
    optimizer.load_state_dict(SOFIM(two(), diagonal="row").state_dict())
    assert rates(optimizer) == [(4e-3, None)]
    optimizer.add_param_group({"params": two(), "diagonal": "row"})
    assert rates(optimizer)[1] == (4e-3, None)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_means_of_an_earlier_diagonal_are_not_used(backend: str) -> None:
    optimizer = AdaSOFIM(two(), numerator="moment", backend=backend)
    step(optimizer, 2)
    optimizer.param_groups[0].update(diagonal="identity", rho=1.0)
    twin = SOFIM([p.detach().clone().requires_grad_() for p in optimizer.param_groups[0]["params"]], backend=backend)
    twin.load_state_dict(optimizer.state_dict())
    for made in (optimizer, twin):
        step(made, 2)
    assert same_bits([*optimizer.param_groups[0]["params"]], [*twin.param_groups[0]["params"]])


# State: the two classes have one format


def through_a_file(saved: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("diagonal", ["tensor", "row", "factored", "element"])
@pytest.mark.parametrize(("one", "other"), [(AdaSOFIM, SOFIM), (SOFIM, AdaSOFIM), (AdaSOFIM, AdaSOFIM)])
def test_state_dicts_of_either_class(one: Callable[..., SOFIM], other: Callable[..., SOFIM], diagonal: str) -> None:
    first = one(two(), diagonal=diagonal, numerator="nesterov", weight_decay=0.02)
    step(first, 3)
    params = [p.detach().clone().requires_grad_() for p in first.param_groups[0]["params"]]
    second = other(params)
    second.load_state_dict(through_a_file(first.state_dict()))
    assert settings(first) == settings(second)
    for made in (first, second):
        step(made, 3)
    assert same_bits(snapshot(first), snapshot(second))
    second.add_param_group({"params": two(), "diagonal": "row"})
    step(second)


def test_a_state_dict_of_the_paper_s_form_stays_one() -> None:
    """What groups say counts, whichever class has loaded them."""
    first, second = SOFIM(two()), AdaSOFIM(two())
    step(first, 2)
    second.load_state_dict(first.state_dict())
    assert second.param_groups[0]["diagonal"] == "identity"
    with torch.no_grad():
        for p, q in zip(second.param_groups[0]["params"], first.param_groups[0]["params"], strict=True):
            p.copy_(q)
    for made in (first, second):
        step(made)
    assert same_bits(snapshot(first), snapshot(second))
    with pytest.raises(ValueError, match="the diagonals of one optimizer all adapt, or none does"):
        second.add_param_group({"params": two()})


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_are_of_the_same_class_and_go_on_alike(how: Callable[[Any], Any]) -> None:
    for steps in (0, 2):
        optimizer = AdaSOFIM([{"params": [p]} for p in two()], betas=(0.8, 0.95))
        step(optimizer, steps)
        twin = how(optimizer)
        assert type(twin) is AdaSOFIM
        for made in (optimizer, twin):
            step(made, 2)
            made.add_param_group({"params": two(), "betas": (0.5, 0.5)})
            step(made)
        assert same_bits(snapshot(optimizer), snapshot(twin))
        assert twin.param_groups[2]["weight_decay"] == 0.01


def test_saved_values_are_plain() -> None:
    """Running means of g² are tensors of float32 on the parameter's device, under the names that Adafactor has."""
    optimizer = AdaSOFIM(two(torch.bfloat16), lr=torch.tensor(0.01), state_dtype="bfloat16")
    step(optimizer)
    saved = through_a_file(optimizer.state_dict())
    assert all(
        type(value) in (bool, int, float, str, type(None), list, Tensor) for value in saved["param_groups"][0].values()
    )
    assert [sorted(saved["state"][key]) for key in (0, 1)] == [
        ["exp_avg", "master_bits", "step", "variance"],
        ["col_var", "exp_avg", "master_bits", "row_var", "step"],
    ]
    for known in saved["state"].values():
        assert all(type(value) is Tensor for value in known.values())
        assert {known[name].dtype for name in ("variance", "row_var", "col_var") if name in known} == {torch.float32}
