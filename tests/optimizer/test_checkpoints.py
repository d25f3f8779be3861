"""Checkpoints that load: empty states, counts of any kind, groups of other versions, and torch's own tools."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from sofim_fused import SOFIM, checks
from tests.support.problems import same_bits, snapshot
from tests.support.runs import once

pytestmark = once
BACKENDS = ("cpu", "reference")


def two(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(4, dtype=dtype)), nn.Parameter(torch.ones(2, 3, dtype=dtype))]


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def step(optimizer: SOFIM, which: slice = slice(None)) -> None:
    optimizer.zero_grad()
    for i, p in enumerate(params_of(optimizer)[which]):
        p.grad = torch.full_like(p, 0.5 + i)
    optimizer.step()


def through_a_file(saved: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def loaded(optimizer: SOFIM) -> SOFIM:
    fresh = SOFIM(
        [{"params": [p.detach().clone().requires_grad_() for p in g["params"]]} for g in optimizer.param_groups]
    )
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    return fresh


def reread(optimizer: SOFIM) -> SOFIM:
    optimizer.load_state_dict(optimizer.state_dict())
    return optimizer


WAYS: dict[str, Callable[[SOFIM], SOFIM]] = {
    "a file": loaded,
    "itself": reread,
    "deepcopy": copy.deepcopy,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
}


# A state without any of our entries is none yet


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", WAYS)
def test_reading_the_state_of_a_parameter_without_one_spoils_nothing(way: str, backend: str) -> None:
    """``optimizer.state`` is a defaultdict: looking makes an empty dict."""
    optimizer, twin = SOFIM(two(), backend=backend), SOFIM(two(), backend=backend)
    for made in (optimizer, twin):
        step(made, slice(1))  # the second parameter has no gradient
    assert optimizer.state[params_of(optimizer)[1]] == {}
    again = WAYS[way](optimizer)
    again._backend = backend
    for made in (again, twin):
        step(made)
    assert same_bits(snapshot(again), snapshot(twin))


@pytest.mark.parametrize("way", WAYS)
def test_entries_of_a_user_s_own_are_kept_as_they_are(way: str) -> None:
    """Beside ours, and where there are none of ours yet: with their types, dtypes and values."""
    optimizer = SOFIM(two(torch.bfloat16))
    step(optimizer, slice(1))
    mine = {
        "note": "third run",
        "seen": torch.tensor(2**31 + 1),  # a parameter's dtype could not hold it
        "history": [1.5, (torch.ones(2, dtype=torch.float64), None)],
        "more": {"a": {"b": b"bytes"}, 3: 1},
    }
    for p in params_of(optimizer):
        optimizer.state[p].update(copy.deepcopy(mine))
    again = WAYS[way](optimizer)
    step(again)
    for p in params_of(again):
        known = again.state[p]
        assert set(known) == {"exp_avg", "step", "master_bits", *mine}
        assert (known["note"], known["more"]) == (mine["note"], mine["more"])
        assert known["seen"].dtype == torch.int64
        assert int(known["seen"]) == 2**31 + 1
        assert isinstance(known["history"], list)
        assert known["history"][0] == 1.5
        assert isinstance(known["history"][1], tuple)
        assert known["history"][1][0].dtype == torch.float64


def test_what_was_loaded_shares_nothing_of_a_user_s_own() -> None:
    optimizer = SOFIM(two())
    optimizer.state[params_of(optimizer)[0]]["mine"] = [torch.zeros(2)]
    saved = optimizer.state_dict()
    other = SOFIM(two())
    other.load_state_dict(saved)
    saved["state"][0]["mine"][0].fill_(7.0)
    saved["state"][0]["mine"].append(1)
    (kept,) = other.state[params_of(other)[0]]["mine"]
    assert kept.sum() == 0


def test_an_array_of_a_user_s_own() -> None:
    optimizer = SOFIM(two())
    step(optimizer)
    optimizer.state[params_of(optimizer)[0]]["mine"] = np.arange(3)
    other = SOFIM(two())
    other.load_state_dict(optimizer.state_dict())
    assert other.state[params_of(other)[0]]["mine"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gone", ["exp_avg", "step"])
def test_a_state_that_lost_an_entry_is_not_started_anew_in_silence(gone: str, backend: str) -> None:
    optimizer = SOFIM(two(), backend=backend)
    step(optimizer)
    p = params_of(optimizer)[1]
    del optimizer.state[p][gone]
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=rf"state of parameter 1 .* lacks {gone}: .*delete the parameter's state"):
        step(optimizer)
    assert same_bits(before, snapshot(optimizer))
    del optimizer.state[p]
    step(optimizer)


# Counts


@pytest.mark.parametrize("count", [3, 3.0, np.int64(3), np.float32(3), Fraction(3), torch.tensor(3.0)], ids=repr)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_count_of_any_kind(count: Any, backend: str) -> None:
    optimizer, other = SOFIM(two(), backend=backend), SOFIM(two(), backend=backend)
    for _ in range(3):
        step(optimizer)
    saved = optimizer.state_dict()
    saved["state"] = {key: {**known, "step": count} for key, known in saved["state"].items()}
    other.load_state_dict(saved)
    with torch.no_grad():
        for mine, theirs in zip(params_of(other), params_of(optimizer), strict=True):
            mine.copy_(theirs)
    assert all(known["step"].dtype == torch.int64 for known in other.state.values())
    step(optimizer)
    step(other)
    assert same_bits(snapshot(optimizer), snapshot(other))


@pytest.mark.parametrize("count", [-1, 2.5, math.nan, math.inf, 2**63, 10**400, True, "3", Fraction(1, 3)], ids=repr)
def test_what_is_no_count(count: Any) -> None:
    optimizer = SOFIM(two())
    step(optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["step"] = count
    before = snapshot(optimizer)
    with pytest.raises((TypeError, ValueError), match=r"state of parameter 0 .*: step is .*"):
        optimizer.load_state_dict(saved)
    assert same_bits(before, snapshot(optimizer))


# Groups of other versions

LATER = [name for name in (*checks.PER_GROUP, *checks.WHOLE) if name not in ("lr", "momentum", "rho")]


def _other_values() -> dict[str, Any]:
    """None of them the constructor's own default."""
    return {
        "weight_decay": 0.5,
        "decoupled_weight_decay": False,
        "maximize": True,
        "state_dtype": torch.bfloat16,
        "kahan": False,
        "numerator": "gradient",
        "fisher": "group",
        "max_grad_norm": 1.0,
        "skip_nonfinite": True,
    }


@pytest.mark.parametrize("name", LATER)
def test_an_option_that_the_saving_version_did_not_have_is_as_that_version_behaved(name: str) -> None:
    """It has the constructor's default, whatever this optimizer was made with. Master weights were not there yet."""
    optimizer = SOFIM(two())
    default = None if name == "master_weight_bits" else optimizer.defaults[name]
    step(optimizer)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group[name]
    given = copy.deepcopy(saved["param_groups"])
    other = SOFIM(two(), **({name: _other_values()[name]} if name in _other_values() else {}))
    other.load_state_dict(saved)
    assert [group[name] for group in other.param_groups] == [default]
    assert saved["param_groups"] == given  # what was passed is left alone
    assert saved["param_groups"][0] is not other.param_groups[0]
    step(other)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("name", LATER)
def test_an_old_pickle_lacks_what_came_later(name: str, how: Callable[[Any], Any]) -> None:
    optimizer = SOFIM(two())
    del optimizer.param_groups[0][name]
    default = optimizer.defaults.pop(name)
    if name == "master_weight_bits":  # Kahan's compensation goes on
        default = None
    again = how(optimizer)
    assert again.param_groups[0][name] == again.defaults[name] == default
    again.add_param_group({"params": two()})
    step(again)


def test_unknown_keys_of_groups_are_kept() -> None:
    optimizer = SOFIM(two())
    saved = optimizer.state_dict()
    saved["param_groups"][0].update(option_to_come="yes", mine=[1])
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["option_to_come"] == "yes"
    assert optimizer.param_groups[0]["mine"] == [1]
    assert optimizer.state_dict()["param_groups"][0]["option_to_come"] == "yes"


def test_a_later_key_in_some_groups_alone() -> None:
    """What holds for the whole optimizer still has to be one value; what each group has may differ."""
    optimizer = SOFIM([{"params": [p]} for p in two()], maximize=True)
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["maximize"]
    optimizer.load_state_dict(saved)
    assert [group["maximize"] for group in optimizer.param_groups] == [False, True]
    saved = SOFIM([{"params": [p]} for p in two()], fisher="group").state_dict()
    del saved["param_groups"][1]["fisher"]
    with pytest.raises(ValueError, match="fisher='model', but group 0 has 'group'"):
        optimizer.load_state_dict(saved)


def test_an_empty_group_of_which_nothing_was_saved_keeps_what_it_has() -> None:
    """As torch.distributed.checkpoint makes it of an empty group; what holds for all groups is the others' value."""
    optimizer = SOFIM([{"params": [], "lr": 0.3, "momentum": 0.2}, {"params": two()}], fisher="group")
    saved = SOFIM([{"params": []}, {"params": two()}], fisher="parameter").state_dict()
    saved["param_groups"][0] = {"params": []}
    optimizer.load_state_dict(saved)
    assert [optimizer.param_groups[0][name] for name in ("lr", "momentum", "fisher")] == [0.3, 0.2, "parameter"]
    step(optimizer)
    optimizer.load_state_dict({"state": {}, "param_groups": [{"params": []}, saved["param_groups"][1]]})


def test_an_empty_group_is_not_said_to_be_another_optimizer_s() -> None:
    """Unless it has settings, and those are another's."""
    optimizer = SOFIM([{"params": []}, {"params": two()}])
    saved = optimizer.state_dict()
    saved["param_groups"][0] = {"params": [], "lr": 0.1, "betas": (0.9, 0.999)}
    with pytest.raises(ValueError, match=r"parameter group 0 .*lacks momentum, rho.*Adam"):
        optimizer.load_state_dict(saved)


# What schedulers leave in groups


@pytest.mark.parametrize("total", [2, 3, 20])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_linear_one_cycle_schedule_can_be_saved_after_its_end(total: int, backend: str) -> None:
    """PyTorch's leaves a negative learning rate after the last step, of two steps a momentum above 1 as well."""
    optimizer = SOFIM(two(), backend=backend)
    schedule = OneCycleLR(optimizer, max_lr=1.0, total_steps=total, anneal_strategy="linear")
    for _ in range(total):
        step(optimizer)
        schedule.step()
    lr = optimizer.param_groups[0]["lr"]
    assert lr < 0
    other = SOFIM(two(), backend=backend)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert other.param_groups[0]["lr"] == lr
    assert other.param_groups[0]["momentum"] == optimizer.param_groups[0]["momentum"]
    before = snapshot(other)
    with pytest.raises(ValueError, match=r"parameter group 0: lr=-0\.\d+: it must be at least 0"):
        step(other)
    assert same_bits(before, snapshot(other))
    other.param_groups[0].update(lr=0.1, momentum=0.9)
    step(other)


@pytest.mark.parametrize("name", ["lr", "momentum"])
@pytest.mark.parametrize("value", [math.nan, math.inf, "0.1", None, 10**400], ids=str)
def test_what_is_no_learning_rate_is_still_refused(name: str, value: Any) -> None:
    optimizer = SOFIM(two())
    saved = optimizer.state_dict()
    saved["param_groups"][0][name] = value
    with pytest.raises((TypeError, ValueError), match=f"parameter group 0: {name}="):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0][name] != value


# Another optimizer's


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: torch.optim.SGD(p, momentum=0.9), r"lacks rho.*torch\.optim\.SGD.*from_sgd"),
        (lambda p: torch.optim.SGD(p), r"lacks rho.*torch\.optim\.SGD.*from_sgd"),
        (torch.optim.Adam, r"lacks momentum, rho.*Adam"),
        (torch.optim.AdamW, r"lacks momentum, rho.*Adam"),
        (torch.optim.RMSprop, "lacks rho: it comes from another optimizer"),
        (torch.optim.Adagrad, "lacks momentum, rho: it comes from another optimizer"),
    ],
    ids=["SGD with momentum", "SGD", "Adam", "AdamW", "RMSprop", "Adagrad"],
)
def test_another_optimizer_s_state_dict(make: Callable[[Any], Any], words: str) -> None:
    theirs = make(two())
    step(theirs)
    optimizer = SOFIM(two())
    step(optimizer)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(theirs.state_dict())
    assert same_bits(before, snapshot(optimizer))


def test_what_others_keep_may_be_a_user_s_own_beside_ours() -> None:
    optimizer = SOFIM(two())
    step(optimizer)
    for known in optimizer.state.values():
        known["momentum_buffer"] = known["exp_avg_sq"] = torch.ones(2)
    other = loaded(optimizer)
    assert all({"momentum_buffer", "exp_avg_sq"} < known.keys() for known in other.state.values())
    step(other)


@pytest.mark.parametrize(
    ("make", "drop", "words"),
    [
        (
            lambda p: torch.optim.SGD(p, momentum=0.9),
            [],
            "has momentum_buffer, as SGD: it comes from",
        ),
        (torch.optim.Adam, [], "has exp_avg_sq, as Adam"),
        (torch.optim.Adam, ["exp_avg", "step"], "has exp_avg_sq, as Adam"),
        (torch.optim.RMSprop, [], "has square_avg, as RMSprop"),
        (torch.optim.Adagrad, [], "has step and sum, as Adagrad"),
    ],
    ids=["SGD", "Adam", "Adam's second moment", "RMSprop", "Adagrad"],
)
def test_another_optimizer_s_states_in_our_groups(make: Callable[[Any], Any], drop: list[str], words: str) -> None:
    theirs = make(two())
    step(theirs)
    optimizer = SOFIM(two())
    step(optimizer)
    before = snapshot(optimizer)
    saved = optimizer.state_dict()
    saved["state"] = {
        key: {name: value for name, value in known.items() if name not in drop}
        for key, known in theirs.state_dict()["state"].items()
    }
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(saved)
    assert same_bits(before, snapshot(optimizer))


# Plain values


class Word(str):
    """A string of a type of its own."""


# Every value that a group may have, in each of its forms.
VALUES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "tensors": {"lr": torch.tensor(0.25), "rho": torch.tensor([2.0], dtype=torch.float64)},
    "bfloat16": {"state_dtype": torch.bfloat16},
    "float32": {"state_dtype": torch.float32},
    "a dtype's name": {"state_dtype": "bfloat16"},
    "kahan": {"kahan": True},
    "no kahan": {"kahan": False},
    "kahan, master bits": {},
    "kahan: none but 32 bits": {"kahan": False, "master_weight_bits": 32},
    "gradient": {"numerator": "gradient", "fisher": "parameter"},
    "group": {"fisher": "group", "weight_decay": 1e-3, "decoupled_weight_decay": False, "maximize": True},
    "guarded": {"max_grad_norm": math.inf, "skip_nonfinite": True},
    "factored": {"diagonal": "factored", "numerator": "nesterov"},
    "row": {"diagonal": Word("row"), "rho": 0.5, "beta2": np.float32(0.5), "eps": Fraction(1, 1024)},
    "element, kahan": {"diagonal": "element", "rho": torch.tensor(0.5), "kahan": True},
    "numpy": {
        "lr": np.float64(0.25),
        "momentum": np.float32(0.5),
        "rho": np.float64(2.0),
        "weight_decay": np.float32(0.25),
        "max_grad_norm": np.float64(1.0),
    },
    "fractions": {"lr": Fraction(1, 4), "momentum": Fraction(1, 2), "rho": 2, "weight_decay": Fraction(1, 8)},
    "strings": {"numerator": Word("gradient"), "fisher": np.str_("group")},
    "a diagonal that adapts": {"diagonal": "factored", "beta2": 0.5, "eps": 1e-6},
    "of other types": {"diagonal": Word("row"), "beta2": np.float32(0.5), "eps": np.float64(1e-6), "rho": Fraction(1)},
}
PLAIN = (bool, int, float, str, type(None))


def is_plain(value: Any) -> bool:
    if type(value) in (list, tuple):
        return all(map(is_plain, value))
    return type(value) in (*PLAIN, Tensor)


@pytest.mark.parametrize("kind", VALUES)
def test_a_state_dict_holds_plain_values(kind: str) -> None:
    optimizer = SOFIM(two(), **VALUES[kind])
    live = dict(optimizer.param_groups[0])
    step(optimizer)
    (group,) = optimizer.state_dict()["param_groups"]
    assert all(map(is_plain, group.values())), group
    assert all(type(value) is Tensor for known in optimizer.state_dict()["state"].values() for value in known.values())
    assert optimizer.param_groups[0].keys() == live.keys()
    assert all(optimizer.param_groups[0][name] is live[name] for name in live)  # what is in use is as it was
    assert optimizer.param_groups[0]["state_dtype"] in (None, torch.float32, torch.bfloat16)
    assert group["state_dtype"] in (None, "float32", "bfloat16")
    assert group.keys() == live.keys()


def test_what_a_scheduler_leaves_is_plain() -> None:
    optimizer = SOFIM(two(), lr=np.float64(0.5))
    LambdaLR(optimizer, lambda t: np.cos(t))
    (group,) = optimizer.state_dict()["param_groups"]
    assert "initial_lr" in group
    assert all(map(is_plain, group.values())), group
    through_a_file(optimizer.state_dict())


def test_values_of_the_user_s_own_are_left_as_they_are() -> None:
    optimizer = SOFIM([{"params": two(), "mine": np.float64(0.5), "kind": torch.float16}])
    (group,) = optimizer.state_dict()["param_groups"]
    assert (type(group["mine"]), group["kind"]) == (np.float64, torch.float16)


def dtype_for(kind: str) -> torch.dtype:
    """16 bits where that makes a difference to the state."""
    return torch.bfloat16 if "kahan" in kind or kind == "bfloat16" else torch.float32


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", VALUES)
def test_every_value_of_a_group_survives(kind: str, way: str) -> None:
    dtype = dtype_for(kind)
    optimizer, twin = SOFIM(two(dtype), **VALUES[kind]), SOFIM(two(dtype), **VALUES[kind])
    for made in (optimizer, twin):
        step(made)
    again = WAYS[way](optimizer)
    same_group(again.param_groups[0], twin.param_groups[0])
    for made in (again, twin):
        step(made)
    assert same_bits(snapshot(again), snapshot(twin))


def same_group(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if name != "params":
            assert value == theirs[name], name
            assert isinstance(value, Tensor) == isinstance(theirs[name], Tensor), name


@pytest.mark.parametrize("form", ["bfloat16", torch.bfloat16], ids=str)
def test_both_forms_of_a_dtype_load(form: Any) -> None:
    optimizer = SOFIM(two(), state_dtype=torch.bfloat16)
    step(optimizer)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["state_dtype"] = form
    other = SOFIM(two())
    other.load_state_dict(saved)
    assert other.param_groups[0]["state_dtype"] is torch.bfloat16
    assert saved["param_groups"][0]["state_dtype"] == form
    assert all(known["exp_avg"].dtype == torch.bfloat16 for known in other.state.values())


def test_a_dtype_by_name_wherever_a_group_comes_from() -> None:
    """A setting from a file of settings is a string."""
    optimizer = SOFIM([{"params": two(), "state_dtype": "float32"}, {"params": two()}], state_dtype="bfloat16")
    optimizer.add_param_group({"params": two(), "state_dtype": "bfloat16"})
    optimizer.add_param_group({"params": two()})
    assert [group["state_dtype"] for group in optimizer.param_groups] == [torch.float32, *[torch.bfloat16] * 3]
    assert optimizer.defaults["state_dtype"] is torch.bfloat16
    step(optimizer)


# torch.distributed.checkpoint

OPTIONS = {
    "sharded": {},
    "full": {"full_state_dict": True},
    "offloaded": {"cpu_offload": True},
    "full, offloaded": {"full_state_dict": True, "cpu_offload": True},
    "flattened": {"flatten_optimizer_state_dict": True},
    # torch cannot load these as they were saved, of AdamW neither; it loads them as flattened ones.
    "flattened, full, offloaded": {
        "flatten_optimizer_state_dict": True,
        "full_state_dict": True,
        "cpu_offload": True,
    },
}
LOADED = {**OPTIONS, "flattened, full, offloaded": OPTIONS["flattened"]}


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """``full_state_dict`` asks a process group for its device."""
    store: Path = tmp_path_factory.mktemp("ranks") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(dtype)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", VALUES)
def test_every_value_passes_through_torch_s_checkpoints(kind: str, options: str) -> None:
    dtype = dtype_for(kind)
    net, other_net, twin_net = model(dtype), model(dtype), model(dtype)
    optimizer = SOFIM(net.parameters(), **VALUES[kind])
    twin = SOFIM(twin_net.parameters(), **VALUES[kind])
    for made in (optimizer, twin):
        step(made)
    optimizer.zero_grad()
    saved = through_a_file(get_optimizer_state_dict(net, optimizer, options=StateDictOptions(**OPTIONS[options])))
    # torch makes the state before it loads: this optimizer has to have the same.
    kept = {name: VALUES[kind][name] for name in ("diagonal", "kahan", "master_weight_bits") if name in VALUES[kind]}
    other = SOFIM(other_net.parameters(), **kept)
    set_optimizer_state_dict(other_net, other, saved, options=StateDictOptions(**LOADED[options]))
    other_net.load_state_dict(net.state_dict())
    same_group(other.param_groups[0], twin.param_groups[0])
    for made in (other, twin):
        step(made)
    assert same_bits(snapshot(other), snapshot(twin))


def test_a_flattened_state_with_a_missing_entry() -> None:
    """Flattened, a parameter without state has no entries; torch then gives ``{}`` for each of them."""
    net, other_net, twin_net = model(), model(), model()
    optimizer, twin = SOFIM(net.parameters()), SOFIM(twin_net.parameters())
    for made in (optimizer, twin):
        step(made, slice(3))
    optimizer.zero_grad()
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    saved = get_optimizer_state_dict(net, optimizer, options=options)
    assert "state.1.bias.exp_avg" not in saved
    other = SOFIM(other_net.parameters())
    set_optimizer_state_dict(other_net, other, saved, options=options)
    other_net.load_state_dict(net.state_dict())
    assert "exp_avg" not in other.state.get(params_of(other)[3], {})
    for made in (other, twin):
        step(made)
    assert same_bits(snapshot(other), snapshot(twin))


def test_a_flattened_state_without_lost_bits() -> None:
    """Saved with ``kahan=False``, loaded where bits are kept: they start at zero."""
    net, other_net = model(torch.bfloat16), model(torch.bfloat16)
    optimizer = SOFIM(net.parameters(), kahan=False)
    step(optimizer)
    optimizer.zero_grad()
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    saved = get_optimizer_state_dict(net, optimizer, options=options)
    saved.update({key: True for key in saved if key.endswith(".kahan")})
    other = SOFIM(other_net.parameters(), kahan=True)
    set_optimizer_state_dict(other_net, other, saved, options=options)
    assert all(set(known) == {"exp_avg", "step"} for known in other.state.values())
    step(other)
    assert all("kahan" in known for known in other.state.values())


@pytest.mark.parametrize(("saving", "loading"), [(True, None), (None, True)])
def test_a_flattened_state_with_lost_bits_of_the_other_kind(saving: bool | None, loading: bool | None) -> None:
    """torch reads only the entries that the optimizer has: the others would be lost without a word."""
    net, other_net = model(torch.bfloat16), model(torch.bfloat16)
    optimizer, other = SOFIM(net.parameters(), kahan=saving), SOFIM(other_net.parameters(), kahan=loading)
    step(optimizer)
    optimizer.zero_grad()
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    saved = get_optimizer_state_dict(net, optimizer, options=options)
    with pytest.raises(ValueError, match=f"make it with kahan={saving} and master_weight_bits='auto'"):
        set_optimizer_state_dict(other_net, other, saved, options=options)


def test_a_flattened_state_that_lost_one_of_two_entries_is_damaged() -> None:
    net, other_net = model(), model()
    optimizer, other = SOFIM(net.parameters()), SOFIM(other_net.parameters())
    step(optimizer)
    optimizer.zero_grad()
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    saved = get_optimizer_state_dict(net, optimizer, options=options)
    del saved["state.1.bias.step"]
    with pytest.raises(ValueError, match=r"state of parameter .* lacks step"):
        set_optimizer_state_dict(other_net, other, saved, options=options)


@pytest.mark.parametrize("options", [name for name in OPTIONS if not name.startswith("flattened")])
def test_an_empty_group_passes_through_torch_s_checkpoints(options: str) -> None:
    """torch leaves out the settings of an empty group that is not the last one, and cannot flatten any."""
    net, other_net = model(), model()
    optimizer = SOFIM([{"params": [], "lr": 0.3}, {"params": list(net.parameters()), "lr": 0.4}])
    step(optimizer)
    optimizer.zero_grad()
    given = StateDictOptions(**OPTIONS[options])
    saved = get_optimizer_state_dict(net, optimizer, options=given)
    other = SOFIM([{"params": []}, {"params": list(other_net.parameters())}])
    set_optimizer_state_dict(other_net, other, saved, options=given)
    assert other.param_groups[1]["lr"] == 0.4
    step(other)


# SGD's groups, with values of the user's own


def test_groups_of_sgd_with_values_of_the_user_s_own_are_saved_and_loaded() -> None:
    net = model()
    sgd = torch.optim.SGD(
        [{"params": list(net.parameters()), "name": "all", "state_dtype": torch.bfloat16, "mine": {"a": 1}}],
        lr=torch.tensor(0.1),
        momentum=0.5,
    )
    step(sgd)
    optimizer = SOFIM.from_sgd(sgd)
    optimizer.zero_grad()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    saved = through_a_file(get_optimizer_state_dict(net, optimizer, options=options))
    # torch wants the keys that were saved in the optimizer that they are loaded into.
    other = SOFIM([{"params": list(net.parameters()), "name": None, "mine": {"a": None}}])
    set_optimizer_state_dict(net, other, saved, options=options)
    assert other.param_groups[0]["state_dtype"] is torch.bfloat16
    assert other.param_groups[0]["name"] == "all"
    assert other.param_groups[0]["mine"] == {"a": 1}
    same_group(other.param_groups[0], optimizer.param_groups[0])
    named = SOFIM.from_sgd(torch.optim.SGD([{"params": two(), "state_dtype": "bfloat16"}], lr=0.1, momentum=0.5))
    assert named.param_groups[0]["state_dtype"] is torch.bfloat16
